"""What plain similarity reaches at the same sizes: the comparison every round prints.

Letters: M images, C feature dimension, k neighbours.
"""

from collections.abc import Callable, Sequence

import torch

from moco_isl.mining.neighbors import top_pairs, topk

Tensor = torch.Tensor


def baselines(features: Tensor, labels: Tensor, sizes: Sequence[float] = (1, 5, 10, 50), pairs: bool = True,
              tick: Callable[[], None] | None = None) -> dict[str, list[float]]:
    """Precision at mean set sizes `sizes`: {"sizes", "own_nearest", "all_pairs"}, lists of one figure a size.

    own_nearest: the k nearest of every image, as directed edges; a size between two integers takes the nearest of all
    of the next k's edges in order of similarity. all_pairs: the size * M / 2 most similar pairs of the whole data set,
    each way an edge. features [M, C] unit rows, labels [M].
    """
    M, labels = len(features), labels.to(features.device)
    sizes = [float(min(size, M - 1)) for size in sizes]
    anchors = torch.arange(M, device=features.device)
    k = max(-int(-size // 1) for size in sizes)
    cosine, near = topk(features, features, k, exclude=anchors, tick=tick)
    correct = labels[near] == labels[:, None]  # [M, k]
    own = [_own_precision(correct, cosine, size) for size in sizes]
    result = {"sizes": sizes, "own_nearest": own}
    if pairs:
        totals = [max(1, round(size * M / 2)) for size in sizes]
        _, a, b = top_pairs(features, max(totals), tick=tick)
        hits = (labels[a] == labels[b]).double().cumsum(0)
        result["all_pairs"] = [float(hits[total - 1] / total) for total in totals]
    return result


def _own_precision(correct: Tensor, cosine: Tensor, size: float) -> float:
    M, whole = len(correct), int(size)
    hits, count = correct[:, :whole].sum(), M * whole
    extra = round((size - whole) * M)
    if extra:
        hits = hits + correct[cosine[:, whole].topk(extra).indices, whole].sum()
        count += extra
    return float(hits) / max(count, 1)
