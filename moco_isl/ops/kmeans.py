"""k-means: by cosines, and by distances as DeepCluster has it.

Letters: M rows, C feature dimension, G clusters.
"""

import torch
import torch.nn.functional as F

from moco_isl.ops.neighbors import Tick, topk

Tensor = torch.Tensor

_PIECE = 1 << 18  # rows that are added up at a time
_BYTES = 256 << 20  # of distances held at a time
_APART = 1e-3  # how far the two halves of a divided cluster begin from each other


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
    centroids = features[torch.randperm(M, generator=generator)[:G].to(features.device)].float()
    cluster = None
    for _ in range(iterations):
        cosine, nearest = topk(features, centroids.to(features.dtype), 1, tick=tick)
        nearest = nearest.squeeze(1)  # [M]
        if cluster is not None and torch.equal(cluster, nearest):
            break
        cluster = nearest
        centroids = F.normalize(_sums(features, cluster, G), dim=1)
        empty = cluster.bincount(minlength=G) == 0
        strangers = cosine.squeeze(1).sort(stable=True).indices[: int(empty.sum())]
        centroids[empty] = features[strangers].float()
    return cluster, centroids


def kmeans_by_distance(
    rows: Tensor, G: int, iterations: int, generator: torch.Generator, tick: Tick | None = None
) -> tuple[Tensor, Tensor, int]:
    """Cluster rows [M, C] into G <= M clusters by Euclidean distance.

    Returns the cluster of each row [M] int64, the centroids [G, C] float32, which are means, and
    how often a cluster that had lost all its rows was begun anew. Starts from G rows drawn by
    `generator` (CPU), and ends when no row changes its cluster, or after `iterations`.

    An empty cluster takes a share of one that is drawn, a larger one more likely: both begin from
    its centroid, moved a little to opposite sides. That is DeepCluster's rule (Caron et al. 2018,
    section 3.3); the draw by size is that of faiss, with which it was published.
    """
    M = len(rows)
    centroids = rows[torch.randperm(M, generator=generator)[:G].to(rows.device)].float()
    cluster = _nearest(rows, centroids, tick)
    refilled = 0
    for _ in range(iterations):
        size = cluster.bincount(minlength=G)  # [G]
        centroids = _sums(rows, cluster, G) / size.clamp(min=1)[:, None]
        refilled += _divide(centroids, size.cpu(), generator)
        before = cluster
        cluster = _nearest(rows, centroids, tick)
        if torch.equal(before, cluster):
            break
    return cluster, centroids, refilled


def _sums(rows: Tensor, cluster: Tensor, G: int) -> Tensor:
    """[G, C] float32: the sum of the rows of each cluster."""
    sums = torch.zeros(G, rows.shape[1], device=rows.device)
    for part, some in zip(cluster.split(_PIECE), rows.split(_PIECE)):
        sums.index_add_(0, part, some.float())
    return sums


def _nearest(rows: Tensor, centroids: Tensor, tick: Tick | None) -> Tensor:
    """[M] int64: the nearest centroid, which is that of the largest x c - c c / 2."""
    half = -centroids.square().sum(1, keepdim=True) / 2  # [G, 1]
    bank = torch.cat([centroids, half], dim=1)
    found = []
    for some in rows.split(_PIECE):
        some = torch.cat([some.float(), torch.ones_like(some[:, :1]).float()], dim=1)
        # in float32 throughout: the kernel for unit rows begins in half precision
        found.append(topk(some, bank, 1, bytes_limit=_BYTES, tick=tick)[1].squeeze(1))
    return torch.cat(found)


def _divide(centroids: Tensor, size: Tensor, generator: torch.Generator) -> int:
    """Let empty clusters take a share of others, see `kmeans_by_distance`; returns how many do.

    centroids [G, C] are changed; size [G]: rows of each, on the CPU.
    """
    empty = (size == 0).nonzero().squeeze(1)
    spare = (size - 1).clamp(min=0).float()  # a cluster of one row cannot be divided
    empty = empty[: int((spare > 0).sum())]
    if not len(empty):
        return 0
    divided = torch.multinomial(spare, len(empty), generator=generator)
    C = centroids.shape[1]
    aside = torch.randn(len(empty), C, generator=generator) * (_APART / C**0.5)
    aside, empty, divided = (x.to(centroids.device) for x in (aside, empty, divided))
    centroids[empty] = centroids[divided] + aside
    centroids[divided] -= aside
    return len(empty)
