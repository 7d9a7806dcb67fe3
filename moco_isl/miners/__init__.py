"""The miners, which find the positives: one file for each, and the table of their names."""

import dataclasses

from moco_isl.errors import BadInput
from moco_isl.miners.average import AverageMiner
from moco_isl.miners.cluster import ClusterMiner
from moco_isl.miners.diffusion import DiffusionMiner
from moco_isl.miners.entropy import EntropyMiner
from moco_isl.miners.gan import GANMiner
from moco_isl.miners.knn import KNNMiner
from moco_isl.miners.none import NoMiner
from moco_isl.miners.oracle import OracleMiner
from moco_isl.mining.rounds import RoundMiner
from moco_isl.options import load_object

MINERS = {
    "none": NoMiner,
    "knn": KNNMiner,
    "gan": GANMiner,
    "entropy": EntropyMiner,
    "diffusion": DiffusionMiner,
    "cluster": ClusterMiner,
    "average": AverageMiner,
    "oracle": OracleMiner,
}


def find_miner(name: str) -> type:
    """The class of a miner by its name, or the one that `my.module:MyMiner` names.

    Raises BadInput.
    """
    if name in MINERS:
        return MINERS[name]
    if ":" not in name:
        raise BadInput(f"no miner named {name!r}: expected one of {', '.join(MINERS)}")
    kind = load_object(name, "--miner")
    if not (isinstance(kind, type) and issubclass(kind, RoundMiner)):
        raise BadInput(
            f"--miner {name} is no miner: expected a class made from"
            " moco_isl.mining.rounds.RoundMiner"
        )
    if any(isinstance(value, dataclasses.Field) for value in vars(kind).values()):
        raise BadInput(f"--miner {name} has flags: put @dataclass(eq=False) before the class")
    return kind
