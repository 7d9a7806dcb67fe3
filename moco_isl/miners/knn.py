"""The baseline: the nearest images of each are its positives."""

from dataclasses import dataclass

import torch

from moco_isl.mining.edges import Edges
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import RoundMiner, over_blocks
from moco_isl.ops.neighbors import Tick, topk
from moco_isl.options import opt

Tensor = torch.Tensor


@dataclass(eq=False)
class KNNMiner(RoundMiner):
    """The k nearest of every image; an edge is as sure as it is similar."""

    name = "knn"
    k: int | None = opt(
        None,
        "--isl-neighbors",
        low=1,
        metavar="k",
        help="nearest images of each that may become its positives (as many as the budget asks"
        " for)",
    )

    def find(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None
    ) -> tuple[Edges, str]:
        M = len(features)
        k = min(self.k or self.most(M), M - 1)
        bank = self.searchable(features, tick)
        block = lambda anchors, number: topk(features[anchors], bank, k, anchors, tick=tick)
        anchors, cosine, near = over_blocks(M, features.device, block, tick)
        return Edges(anchors.repeat_interleave(k), near.flatten(), cosine.flatten()), ""
