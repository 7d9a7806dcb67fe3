"""Read a process's rank and the number of ranks from the environment.

torchrun, launch/ and SLURM set the variables.
"""

import os
import re
from typing import NamedTuple

from moco_isl import files
from moco_isl.errors import BadInput

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MOST = 999_999_999  # processes of a run, or cores of a process


class BadEnvironment(BadInput):
    """An environment variable of this process is wrong; each process prints its own error."""


class Ranks(NamedTuple):
    """The rank and size of this process's world, and the same on its node."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def ranks() -> Ranks | None:
    """The place of this process; None if it is alone. A variable that is empty counts as not set.

    Raises BadEnvironment for RANK without WORLD_SIZE and the like, for what is no number, and for
    one out of range.
    """
    given = [name for name in PLACE if os.environ.get(name)]
    if not given:
        return None
    for name in ("RANK", "WORLD_SIZE"):
        if name not in given:
            raise BadEnvironment(
                f"the environment has {_shown(given[0])}, but no {name}: expected both RANK and"
                f" WORLD_SIZE, as torchrun sets them, or neither; `unset {' '.join(given)}` for a"
                " process that runs alone"
            )
    world = number("WORLD_SIZE", 1, MOST)
    local_world = number("LOCAL_WORLD_SIZE", 1, world) or 1
    most_local = local_world if "LOCAL_WORLD_SIZE" in given else world
    local_rank = number("LOCAL_RANK", 0, most_local - 1) or 0
    return Ranks(number("RANK", 0, world - 1), world, local_rank, local_world)


def check_meeting_point() -> None:
    """Raise BadEnvironment unless MASTER_ADDR and MASTER_PORT say where the ranks meet."""
    if not os.environ.get("MASTER_ADDR"):
        raise BadEnvironment(
            "the environment has RANK and WORLD_SIZE, but no MASTER_ADDR: expected the name of rank"
            " 0's node, as torchrun sets it"
        )
    if number("MASTER_PORT", 1, 65535) is None:
        raise BadEnvironment(
            "the environment has RANK and WORLD_SIZE, but no MASTER_PORT: expected a free port of"
            " rank 0's node, as torchrun sets it"
        )


def number(name: str, low: int, high: int) -> int | None:
    """The whole number in a variable; None if it is empty or not set.

    Raises BadEnvironment unless low <= number <= high.
    """
    text = os.environ.get(name, "")
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise BadEnvironment(
            f"the environment has {_shown(name)}: expected a whole number from {low} to {high}"
        )
    return int(text)


def is_first() -> bool:
    """Whether this process prints what all know: it is rank 0, alone, or cannot tell its rank."""
    try:
        place = ranks()
    except BadEnvironment:
        return True
    return place is None or place.rank == 0


def _shown(name: str) -> str:
    text = files.shown(os.environ[name])
    return f"{name}={text if len(text) <= 40 else text[:37] + '...'}"
