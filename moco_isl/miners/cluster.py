"""Local aggregation, LA (Zhuang et al. 2019): neighbours that k-means puts together are positives.

Letters: M images, C feature dimension, N anchors of a block, k background neighbours, H
clusterings, G clusters of one.
"""

from dataclasses import dataclass

import torch

from moco_isl import dist
from moco_isl.errors import Interrupted
from moco_isl.mining.edges import Edges
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import RoundMiner, over_blocks
from moco_isl.ops.kmeans import kmeans
from moco_isl.ops.neighbors import Tick, topk
from moco_isl.options import check_range, opt

Tensor = torch.Tensor


@dataclass(eq=False)
class ClusterMiner(RoundMiner):
    """Members of an image's clusters, in any of H clusterings, among its `background` nearest.

    Each image offers its surest `candidates` (None: see `offered`): first those that more
    clusterings put beside it, among equals the more similar. iterations: of k-means.
    """

    name = "cluster"
    clusters: int | None = opt(
        None,
        "--isl-clusters",
        low=1,
        metavar="n",
        help="clusters of a clustering (one for 40 images, as published for ImageNet)",
    )
    clusterings: int = opt(5, "--isl-clusterings", low=1, metavar="n", help="how many clusterings")
    background: int = opt(
        100,
        "--isl-background",
        low=1,
        metavar="k",
        help="positives are among the k nearest, or as many as the budget if it is more",
    )
    candidates: int | None = None
    iterations: int = 20

    def __post_init__(self):
        super().__post_init__()
        check_range("ClusterMiner: candidates", self.candidates, 1)
        check_range("ClusterMiner: iterations", self.iterations, 1)

    def find(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None
    ) -> tuple[Edges, str]:
        M = len(features)
        G = min(M, self.clusters or max(1, round(M / 40)))
        k = min(max(self.background, self.most(M)), M - 1)
        cluster = self._clusterings(features, G, seed, tick)  # [H, M]
        candidates = self.candidates or self.offered(M)
        bank = self.searchable(features, tick)

        def block(anchors: Tensor, number: int) -> tuple[Tensor, Tensor]:
            cosine, near = topk(features[anchors], bank, k, anchors, tick=tick)  # [N, k]
            together = sum((own[near] == own[anchors][:, None]).float() for own in cluster)
            # |cosine| <= 1, so it only orders equals
            sureness = torch.where(together > 0, together + cosine / 4, 0)
            sureness, at = sureness.sort(dim=1, descending=True, stable=True)
            return near.gather(1, at)[:, :candidates], sureness[:, :candidates]

        anchors, near, sureness = over_blocks(M, features.device, block, tick)
        found = sureness > 0
        self.report.extra |= {"clusters": G, "largest_cluster": int(cluster[0].bincount().max())}
        return Edges(anchors[:, None].expand_as(found)[found], near[found], sureness[found]), ""

    def _clusterings(self, features: Tensor, G: int, seed: int, tick: Tick | None) -> Tensor:
        """[H, M] clusters of each image, those of all ranks; every rank makes some of them.

        All raise where one was interrupted.
        """
        cluster = torch.zeros(
            self.clusterings, len(features), dtype=torch.int64, device=features.device
        )
        stopped = False
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
            stopped = True
        dist.stop_mining_together(stopped, features.device)
        return dist.all_reduce_sum(cluster)
