"""Anchor neighbourhoods, AND (Huang et al. 2019): the surest images get their nearest neighbours.

More images are anchors each round. A neighbour is a positive of its anchor, and the anchor none of
the neighbour's; the sets of a round replace those before.
Letters: M images, C feature dimension, N anchors of a block, k neighbours, T temperature.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from moco_isl import dist
from moco_isl.builder import MoCo
from moco_isl.mining.edges import Edges
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import RoundMiner, over_blocks
from moco_isl.ops.neighbors import Tick, topk
from moco_isl.ops.softmax import entropy
from moco_isl.options import default_of, opt
from moco_isl.schema import COUNT

Tensor = torch.Tensor


@dataclass(eq=False)
class EntropyMiner(RoundMiner):
    """The k nearest of the images whose softmax over all images (Eq. 4) has the lowest entropy.

    In the n-th round the first share * n of all images are anchors, the lowest entropy first. An
    edge is as sure as its anchor: what a budget leaves out is of the anchors with the highest
    entropy. On a GPU the softmax is the fused pass, whose float16 products may let anchors of
    nearly equal entropy change places (see `softmax.entropy`). Published: share 0.25, k 1.
    """

    name = "entropy"
    directed: ClassVar[bool] = True
    replaces: ClassVar[bool] = True

    k: int | None = opt(
        None,
        "--isl-neighbors",
        low=1,
        metavar="k",
        help="nearest images that an anchor gets (as many as the budget asks for)",
    )
    share: float = opt(
        0.25,
        "--isl-share",
        low=0,
        low_open=True,
        high=1,
        metavar="x",
        help="share of the images that get positives, surest first; each round adds as many",
    )
    T: float = opt(
        default_of(MoCo, "T"),
        "--moco-t",
        low=0,
        low_open=True,
        help="temperature of the softmax, that of the loss",
    )

    def __post_init__(self):
        super().__post_init__()
        self.rounds = 0

    def begin(self, number: int) -> None:
        super().begin(number)
        self.rounds = number - 1  # `find` adds the round that begins

    def find(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None
    ) -> tuple[Edges, str]:
        M = len(features)
        k = min(self.k or self.most(M), M - 1)
        bank = self.searchable(features, tick)

        def block(anchors: Tensor, number: int) -> tuple[Tensor, Tensor]:
            own = features[anchors]
            near = topk(own, bank, k, anchors, tick=tick)[1]
            # the entropy is over all images
            return entropy(own, features, self.T, fused=True), near

        # [n], [n], [n, k] of this rank's share
        anchors, own, near = over_blocks(M, features.device, block, tick)
        self.rounds += 1
        share = min(1.0, self.share * self.rounds)
        # [M]: shares are contiguous, so in the order of the images
        everyone = dist.all_gather_rows(own)
        chosen = torch.zeros(M, dtype=torch.bool, device=features.device)
        chosen[everyone.sort(stable=True).indices[: max(1, round(share * M))]] = True
        self.report.extra |= {
            "share": share,
            "entropy": float(everyone.mean()),
            "entropy_anchors": float(everyone[chosen].max()),
        }
        mine = chosen[anchors]
        src = anchors[mine].repeat_interleave(k)
        return Edges(src, near[mine].flatten(), -own[mine].repeat_interleave(k)), ""

    def state_dict(self) -> dict:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: dict) -> None:
        self.rounds = state["rounds"]

    def state_shape(self, dim: int) -> dict:
        return {"rounds": COUNT}
