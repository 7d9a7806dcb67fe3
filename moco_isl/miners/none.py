"""No mining: with this miner a run is MoCo v2."""

from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.record import RoundReport
from moco_isl.mining.rounds import Miner


class NoMiner(Miner):
    """A miner that adds no positives and removes none: the run is MoCo v2."""

    name = "none"

    def __init__(self):
        self.report = RoundReport()

    def mine(self, features, positives, rng, tick=None, views=None) -> PositiveSets:
        return positives
