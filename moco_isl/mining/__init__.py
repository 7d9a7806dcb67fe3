"""Mining: from features to positive sets. Knows nothing of training."""

from moco_isl.mining.baselines import baselines
from moco_isl.mining.miners import GANMiner, KNNMiner, NoMiner, one_line
from moco_isl.mining.neighbors import top_pairs, topk
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import Miner, RoundMiner

__all__ = [
    "GANMiner",
    "KNNMiner",
    "Miner",
    "NoMiner",
    "PositiveSets",
    "RoundMiner",
    "baselines",
    "one_line",
    "top_pairs",
    "topk",
]
