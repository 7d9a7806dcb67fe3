"""Anchor neighbourhoods (AND, Huang et al. 2019): the surest images get their nearest neighbours,
more of them each round.

Letters: M images, C feature dimension, N anchors of a block, k neighbours, T temperature.
"""

import torch

from moco_isl import dist
from moco_isl.errors import BadInput
from moco_isl.mining.edges import Edges
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import RoundMiner, over_blocks
from moco_isl.ops.neighbors import Tick, topk
from moco_isl.ops.softmax import entropy
from moco_isl.schema import COUNT

Tensor = torch.Tensor


class EntropyMiner(RoundMiner):
    """Images ranked by the entropy of their softmax over all images (Eq. 4, themselves included),
    the lowest first; in the n-th round the first share * n of them are anchors and each gets its k
    nearest.

    T: temperature of the softmax, that of the loss. An edge is as sure as its anchor: what a budget
    leaves out is of the anchors with the highest entropy. On a GPU the softmax is the fused pass,
    whose float16 products may let anchors of nearly equal entropy change places (see
    `softmax.entropy`). Published: share 0.25, k 1.
    """

    name = "entropy"

    def __init__(self, k: int = 1, share: float = 0.25, T: float = 0.1, **rules):
        super().__init__(**rules)
        if not (k >= 1 and 0 < share <= 1 and T > 0):
            raise BadInput(
                f"entropy miner with {k} neighbours, a share of {share} and temperature {T}:"
                " expected at least 1, above 0 and at most 1, above 0"
            )
        self.k = k
        self.share = share
        self.T = T
        self.rounds = 0

    def begin(self, number: int) -> None:
        self.rounds = number - 1  # `find` counts its own

    def find(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None
    ) -> tuple[Edges, str]:
        M = len(features)
        k = min(self.k, M - 1)
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
        self.report |= {
            "share": share,
            "entropy": float(everyone.mean()),
            "entropy_anchors": float(everyone[chosen].max()),
        }
        mine = chosen[anchors]
        return (
            Edges(
                anchors[mine].repeat_interleave(k),
                near[mine].flatten(),
                -own[mine].repeat_interleave(k),
            ),
            "",
        )

    def state_dict(self) -> dict:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: dict) -> None:
        self.rounds = state["rounds"]

    def state_shape(self, dim: int) -> dict:
        return {"rounds": COUNT}
