"""What plain similarity reaches at the same sizes: the comparison that every round prints.

Letters: M images, C feature dimension, A anchors, k neighbours.
"""

import math
from collections.abc import Sequence

import torch

from moco_isl.mining.positives import same_label
from moco_isl.ops.neighbors import Tick, top_pairs, topk

Tensor = torch.Tensor


def baselines(
    features: Tensor,
    labels: Tensor,
    sizes: Sequence[float] = (1, 5, 10, 50),
    pairs: bool = True,
    tick: Tick | None = None,
    anchors: Tensor | None = None,
) -> dict[str, list[float]]:
    """Precision at mean set sizes: {"sizes", "own_nearest", "all_pairs"}, a figure a size in each.

    own_nearest: the k nearest of every image, as directed edges. Of a size between two integers the
    rest are the most similar of all edges to the next nearest.
    all_pairs: the size * M / 2 most similar pairs of the whole data set, each an edge both ways.

    features [M, C] unit rows; labels [M], below 0 where unknown: pairs with such an image are not
    counted. anchors [A]: images that stand for all in own_nearest; None: all. The search is always
    exact: an approximate one is compared with these figures.
    """
    M = len(features)
    labels = labels.to(features.device)
    sizes = [float(min(size, M - 1)) for size in sizes]
    if anchors is None:
        anchors = torch.arange(M, device=features.device)
    k = math.ceil(max(sizes))
    cosine, near = topk(features[anchors], features, k, anchors, tick=tick)  # [A, k]
    same = same_label(labels, near, anchors[:, None])
    result = {"sizes": sizes, "own_nearest": [_own_precision(same, cosine, size) for size in sizes]}
    if pairs:
        totals = [max(1, round(size * M / 2)) for size in sizes]
        _, a, b = top_pairs(features, max(totals), tick=tick)
        same = same_label(labels, a, b)
        result["all_pairs"] = [_mean(same[:total]) for total in totals]
    return result


def _own_precision(same: Tensor, cosine: Tensor, size: float) -> float:
    whole = int(size)
    parts = [same[:, :whole].flatten()]
    extra = round((size - whole) * len(same))
    if extra:
        parts.append(same[cosine[:, whole].topk(extra).indices, whole])
    return _mean(torch.cat(parts))


def _mean(same: Tensor) -> float:
    """The mean over known labels; 0 where none is known."""
    return float(same.double().nanmean().nan_to_num())
