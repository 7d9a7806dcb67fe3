"""What plain similarity reaches at the same sizes: the comparison every round prints.

Letters: M images, C feature dimension, k neighbours.
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
    """Precision at mean set sizes `sizes`: {"sizes", "own_nearest", "all_pairs"}, lists of one
    figure a size.

    own_nearest: the k nearest of every image, as directed edges; a size between two integers takes
    the nearest of all of the next k's edges in order of similarity. all_pairs: the size * M / 2
    most similar pairs of the whole data set, each way an edge. features [M, C] unit rows, labels
    [M], below 0 where
    unknown: pairs with such an image are not counted. anchors [A]: images that stand for all in
    own_nearest; None: all. The search is always exact: these figures are what an approximate one is
    compared with.
    """
    M, labels = len(features), labels.to(features.device)
    sizes = [float(min(size, M - 1)) for size in sizes]
    anchors = torch.arange(M, device=features.device) if anchors is None else anchors
    cosine, near = topk(
        features[anchors], features, max(math.ceil(size) for size in sizes), anchors, tick=tick
    )
    same = same_label(labels, near, anchors[:, None])  # [M, k]
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
    if extra := round((size - whole) * len(same)):
        parts.append(same[cosine[:, whole].topk(extra).indices, whole])
    return _mean(torch.cat(parts))


def _mean(same: Tensor) -> float:
    """Of what is known; 0 where nothing is."""
    return float(same.double().nanmean().nan_to_num())
