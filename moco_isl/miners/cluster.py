"""Local aggregation (LA, Zhuang et al. 2019): close neighbours are those that k-means puts
together, several times over.

Letters: M images, C feature dimension, N anchors of a block, k background neighbours, H
clusterings, G clusters of one.
"""

import torch

from moco_isl import dist
from moco_isl.errors import BadInput, Interrupted
from moco_isl.mining.edges import Edges
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import RoundMiner, over_blocks
from moco_isl.ops.kmeans import kmeans
from moco_isl.ops.neighbors import Tick, topk

Tensor = torch.Tensor


class ClusterMiner(RoundMiner):
    """Members of an image's clusters in any of H clusterings, as far as they are among its
    `background` nearest.

    clusters: G; None: one for 40 images, as published for ImageNet (30,000). Each image offers its
    surest `candidates`: first those that more clusterings put beside it, among equals the more
    similar.
    """

    name = "cluster"

    def __init__(
        self,
        clusters: int | None = None,
        clusterings: int = 5,
        background: int = 100,
        candidates: int = 20,
        iterations: int = 20,
        **rules,
    ):
        super().__init__(**rules)
        if (
            not (clusters is None or clusters >= 1)
            or min(clusterings, background, candidates, iterations) < 1
        ):
            raise BadInput(
                f"{clusterings} clusterings into {clusters} clusters in {iterations} iterations,"
                f" {background} background neighbours, {candidates} candidates: expected at least 1"
                " of each"
            )
        self.clusters = clusters
        self.clusterings = clusterings
        self.background = background
        self.candidates, self.iterations = candidates, iterations

    def find(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None
    ) -> tuple[Edges, str]:
        M = len(features)
        G = min(M, self.clusters or max(1, round(M / 40)))
        k = min(self.background, M - 1)
        cluster = self._clusterings(features, G, seed, tick)  # [H, M]
        bank = self.searchable(features, tick)

        def block(anchors: Tensor, number: int) -> tuple[Tensor, Tensor]:
            cosine, near = topk(features[anchors], bank, k, anchors, tick=tick)  # [N, k]
            together = sum((own[near] == own[anchors][:, None]).float() for own in cluster)
            # |cosine| <= 1: it decides among equals only
            sureness = torch.where(together > 0, together + cosine / 4, 0)
            sureness, at = sureness.sort(dim=1, descending=True, stable=True)
            return near.gather(1, at)[:, : self.candidates], sureness[:, : self.candidates]

        anchors, near, sureness = over_blocks(M, features.device, block, tick)
        found = sureness > 0
        self.report |= {"clusters": G, "largest_cluster": int(cluster[0].bincount().max())}
        return Edges(anchors[:, None].expand_as(found)[found], near[found], sureness[found]), ""

    def _clusterings(self, features: Tensor, G: int, seed: int, tick: Tick | None) -> Tensor:
        """[H, M] clusters of each image, those of all ranks; every rank makes some of them.

        All raise where one was interrupted.
        """
        cluster = torch.zeros(
            self.clusterings, len(features), dtype=torch.int64, device=features.device
        )
        stopped = torch.zeros((), dtype=torch.int64, device=features.device)
        try:
            for h in range(dist.rank(), self.clusterings, dist.world_size()):
                cluster[h] = kmeans(
                    features,
                    G,
                    self.iterations,
                    torch.Generator().manual_seed((seed + h) % 2**63),
                    tick,
                )[0]
        except Interrupted:
            stopped += 1
        if int(dist.all_reduce_max(stopped)):
            raise Interrupted("mining was interrupted")
        return dist.all_reduce_sum(cluster)
