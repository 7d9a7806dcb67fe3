"""The numbers behind the figures: functions of sets, similarities and labels.

Letters: M images, E directed edges, A anchors, k neighbours, K classes. labels [M] int64, negative:
none; pairs with such an image are left out of every precision. A precision over no pair at all is
None.
"""

from collections.abc import Sequence

import torch

from moco_isl.mining.positives import PositiveSets

Tensor = torch.Tensor

SIZES = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)  # positives an image, in the figures


def agreement(labels: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """float32: 1 where images a and b have one label, 0 where two, NaN where either has none.

    a and b are broadcast.
    """
    same = labels[a] == labels[b]
    known = (labels[a] >= 0) & (labels[b] >= 0)
    return torch.where(known, same.float(), torch.nan)


def mean(correct: Tensor) -> float | None:
    """Mean of what is not NaN."""
    known = correct[~correct.isnan()]
    return float(known.double().mean()) if len(known) else None


def precision_of_first(correct: Tensor, sizes: Sequence[int] = SIZES) -> dict[int, float | None]:
    """Precision of the first `size` of every anchor.

    correct: [A, k], each anchor's own ranking, the best first.
    """
    return {size: mean(correct[:, :size]) for size in sizes if size <= correct.shape[1]}


def precision_of_best(
    value: Tensor, correct: Tensor, images: int, sizes: Sequence[float] = SIZES
) -> dict[float, float | None]:
    """Precision of the size * images best of pairs that are ranked all together.

    value: [E], correct: [E]. Sizes beyond E (by half a per cent) are left out.
    """
    order = value.flatten().sort(descending=True, stable=True).indices
    correct = correct.flatten()[order]
    E = len(correct)
    hits = correct.nan_to_num(0).double().cumsum(0)
    known = (~correct.isnan()).cumsum(0)
    last = {
        size: min(max(1, round(size * images)), E) - 1
        for size in sizes
        if size * images <= 1.005 * E
    }
    return {size: float(hits[i] / known[i]) if known[i] else None for size, i in last.items()}


def unseen(near_cosine: Tensor, M: int, size: float) -> float:
    """Share of anchors whose k known neighbours may be too few.

    More than k of their pairs may belong to the size * A best of near_cosine [A, k].
    """
    A, k = near_cosine.shape
    if k >= M - 1:
        return 0.0
    bound = near_cosine.flatten().kthvalue(near_cosine.numel() - max(1, round(size * A)) + 1).values
    return float((near_cosine[:, -1] > bound).float().mean())


def precision_by(value: Tensor, correct: Tensor, bins: int = 12) -> list[tuple[float, float, int]]:
    """Groups of equal count by rising value: (mean value, precision, count) each.

    value [n]; correct [n]; NaNs left out.
    """
    known = ~correct.isnan() & value.isfinite()
    value, order = value[known].sort(stable=True)
    correct = correct[known][order]
    pieces = zip(
        value.tensor_split(min(bins, max(len(value), 1))),
        correct.tensor_split(min(bins, max(len(value), 1))),
    )
    return [
        (float(v.double().mean()), float(c.double().mean()), len(v)) for v, c in pieces if len(v)
    ]


def share_with_at_least(sizes: Tensor) -> list[float]:
    """Share of images with at least 0, 1, 2, ... positives, up to the largest of sizes [M]."""
    count = torch.bincount(sizes)
    return (count.flip(0).cumsum(0).flip(0).double() / max(len(sizes), 1)).tolist()


def hubs(sets: PositiveSets, n: int = 8) -> list[tuple[int, int]]:
    """(image, in how many sets it stands) of the n images in most sets."""
    if not sets.num_edges:
        return []
    degree, image = sets.in_degree().sort(descending=True, stable=True)
    return [(int(i), int(d)) for i, d in zip(image[:n], degree[:n]) if d]


def confusion(sets: PositiveSets, labels: Tensor, K: int) -> Tensor:
    """[K, K] int64: wrong edges from an image of one class (row) to one of another (column)."""
    a, b = labels[sets.sources()], labels[sets.members.long()]
    wrong = (a != b) & (a >= 0) & (b >= 0)
    return torch.bincount(a[wrong] * K + b[wrong], minlength=K * K).view(K, K)


def worst_pairs(counts: Tensor, n: int = 10) -> list[tuple[int, int, int]]:
    """(class, class, edges of either direction) of the n pairs of classes confused most.

    counts: [K, K], see `confusion`.
    """
    both = (counts + counts.T).triu(1)
    value, at = both.flatten().sort(descending=True, stable=True)
    K = len(counts)
    return [(int(i) // K, int(i) % K, int(v)) for v, i in zip(value[:n], at[:n]) if v]
