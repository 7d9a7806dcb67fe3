"""Spherical k-means of unit rows.

Letters: M rows, C feature dimension, G clusters.
"""

import torch
import torch.nn.functional as F

from moco_isl.ops.neighbors import Tick, topk

Tensor = torch.Tensor


def kmeans(
    features: Tensor, G: int, iterations: int, generator: torch.Generator, tick: Tick | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster unit rows [M, C] into G <= M clusters.

    Returns the cluster of each row [M] int64 and the unit centroids [G, C] float32.

    Starts from G rows drawn by `generator` (CPU) and ends when no row changes its cluster, or after
    `iterations`. A cluster that has lost all its rows starts anew from the row that is least like
    its own centroid.
    """
    M = len(features)
    piece = 1 << 18
    centroids = features[torch.randperm(M, generator=generator)[:G].to(features.device)].float()
    cluster = None
    for _ in range(iterations):
        cosine, nearest = topk(features, centroids.to(features.dtype), 1, tick=tick)
        nearest = nearest.squeeze(1)  # [M]
        if cluster is not None and torch.equal(cluster, nearest):
            break
        cluster = nearest
        sums = torch.zeros_like(centroids)
        for part, rows in zip(cluster.split(piece), features.split(piece)):
            sums.index_add_(0, part, rows.float())
        centroids = F.normalize(sums, dim=1)
        empty = cluster.bincount(minlength=G) == 0
        strangers = cosine.squeeze(1).sort(stable=True).indices[: int(empty.sum())]
        centroids[empty] = features[strangers].float()
    return cluster, centroids
