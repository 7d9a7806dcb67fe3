"""Local aggregation, LA (Zhuang et al. 2019): images that k-means puts together are positives.

These are the close neighbours C of the paper. Its background neighbours B are looked up at every
step by the loss that is made for them, `losses.local_aggregation`.
Letters: M images, C feature dimension, N anchors of a block, H clusterings, G clusters of one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from moco_isl import dist
from moco_isl.errors import Interrupted
from moco_isl.mining.edges import Edges
from moco_isl.mining.groups import Groups
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import RoundMiner, over_blocks
from moco_isl.ops.kmeans import kmeans
from moco_isl.ops.neighbors import Tick
from moco_isl.options import check_range, opt

Tensor = torch.Tensor


@dataclass(eq=False)
class ClusterMiner(RoundMiner):
    """Members of an image's clusters, in any of H clusterings, which are made anew each round.

    A pair is surer the more clusterings put it together, and among equals the more similar it is.
    Under a budget each image offers its surest `candidates` (None: see `offered`), without one all.
    iterations: of k-means.
    """

    name = "cluster"
    replaces: ClassVar[bool] = True
    searches: ClassVar[bool] = False

    clusters: int | None = opt(
        None,
        "--isl-clusters",
        low=1,
        metavar="n",
        help="clusters of a clustering (one for 40 images, as published for ImageNet)",
    )
    clusterings: int = opt(5, "--isl-clusterings", low=1, metavar="n", help="how many clusterings")
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
        cluster = self._clusterings(features, G, seed, tick)  # [H, M]
        candidates = self.candidates
        if candidates is None and self.rules.budget is not None:
            candidates = self.offered(M)
        groups = Groups(cluster)
        if candidates is None:
            groups.require_pairs("give more --isl-clusters, or a number to --isl-budget")
        block = lambda anchors, number: groups.edges(features, anchors, candidates, tick)
        _, src, dst, together, cosine = over_blocks(M, features.device, block, tick)
        self.report.extra |= {"clusters": G, "largest_cluster": int(cluster[0].bincount().max())}
        return Edges(src, dst, together + cosine / 4), ""

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
