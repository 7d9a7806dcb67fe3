"""No mining: with this miner a run is MoCo v2."""

import torch

from moco_isl.mining.estimate import Views
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.record import RoundReport
from moco_isl.ops.neighbors import Tick

Tensor = torch.Tensor


class NoMiner:
    """A miner that adds no positives and removes none: the run is MoCo v2."""

    name = "none"
    uses_labels = False
    wants_views = False

    def __init__(self):
        self.report = RoundReport()

    def mine(
        self,
        features: Tensor,
        positives: PositiveSets,
        rng: torch.Generator,
        tick: Tick | None = None,
        views: Views | None = None,
    ) -> PositiveSets:
        return positives

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    def state_shape(self, dim: int) -> dict:
        return {}
