"""The miners, which find the positives: one file for each, and the table of their names."""

import dataclasses

from moco_isl.errors import BadInput, first_line
from moco_isl.miners.average import AverageMiner
from moco_isl.miners.cluster import ClusterMiner
from moco_isl.miners.diffusion import DiffusionMiner
from moco_isl.miners.entropy import EntropyMiner
from moco_isl.miners.gan import GANMiner
from moco_isl.miners.knn import KNNMiner
from moco_isl.miners.none import NoMiner
from moco_isl.miners.oracle import OracleMiner
from moco_isl.mining.rounds import RoundMiner
from moco_isl.options import flags_of, load_object, needed

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
    if wrong := _what_is_wrong(kind):
        raise BadInput(f"--miner {name} {wrong}")
    return kind


def _what_is_wrong(kind: type) -> str:
    """What a miner's class from elsewhere lacks, seen before any work; '' for nothing."""
    if any(isinstance(value, dataclasses.Field) for value in vars(kind).values()):
        return "has flags: put @dataclass(eq=False) before the class"
    try:
        flags_of(kind)
    except Exception as error:  # the annotations of its fields are evaluated
        return f"has a field that cannot be a flag: {first_line(error)}"
    if missing := needed(kind) - ({"labels"} if kind.uses_labels else set()):
        return f"has the field {sorted(missing)[0]} without a default: expected a default"
    if kind.find is RoundMiner.find and kind.mine is RoundMiner.mine:
        return "finds nothing: expected a method find(features, positives, seed, tick)"
    if kind.state_dict is not RoundMiner.state_dict and kind.state_shape is RoundMiner.state_shape:
        return (
            "keeps a state of its own, without which no run of it can be resumed: expected"
            " state_shape(dim) beside state_dict, see moco_isl.schema"
        )
    return ""
