"""What is trained: one file an objective. A new one is a file here and a line in OBJECTIVES."""

from moco_isl.objectives.bank import BankObjective
from moco_isl.objectives.base import Objective
from moco_isl.objectives.deepcluster import DeepClusterObjective
from moco_isl.objectives.queue import QueueObjective
from moco_isl.objectives.rotnet import RotationObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "queue": QueueObjective,
    "bank": BankObjective,
    "rotnet": RotationObjective,
    "deepcluster": DeepClusterObjective,
}
