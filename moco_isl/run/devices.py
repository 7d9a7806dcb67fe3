"""The device, the processes that read images and the precision that a machine has."""

import argparse
import os

import torch
import torch.distributed
import torch.multiprocessing

from moco_isl import dist
from moco_isl.run import environment
from moco_isl.run.flags import check, short


def usable_workers(asked: int, processes: int = 1) -> int:
    """`asked` loading processes, capped at the cores this process may use; said in a line when
    capped.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    # a rank that is a task of SLURM may be bound to its own cores already, which are not to be
    # divided once more
    is_task = os.environ.get("SLURM_NTASKS") == str(dist.world_size())
    own = environment.number("SLURM_CPUS_PER_TASK", 1, environment.MOST) or 0 if is_task else 0
    most = max(1, cores // processes, min(cores, own))
    if asked > most and dist.is_main():
        print(f"=> --workers {asked} capped at {most}, the cores there are for a process")
    return min(asked, most)


def resolve_device(args: argparse.Namespace) -> torch.device:
    """The device of this process, from --device, --gpu and LOCAL_RANK.

    Raises BadInput for one that is not there.
    """
    name = args.device
    check(
        name != "auto" or args.gpu is None or torch.cuda.is_available(),
        f"--gpu {args.gpu}, but no CUDA device is visible; leave it off to run on the CPU",
    )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    check(
        torch.cuda.is_available(),
        f"--device {short(name)}, but no CUDA device is visible; use --device cpu or auto",
    )
    count = torch.cuda.device_count()
    named = name.removeprefix("cuda").removeprefix(":")
    place = environment.ranks()
    index = (
        int(named[:9])
        if named
        else args.gpu
        if args.gpu is not None
        else (place.local_rank if place else 0) % count
    )
    check(index < count, f"GPU {index} was asked for, but there are {count}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def warn_of_slow_amp(amp: str, device: torch.device, trains: bool) -> None:
    """Say where half precision takes many times as long as none: on a CPU without instructions for
    it, and on any where fp16 trains.
    """
    if amp == "off" or device.type != "cpu" or not dist.is_main():
        return
    if not _cpu_has(amp):
        print(
            f"=> warning: torch has no fast --amp {amp} on this CPU: it takes some ten times as"
            " long as --amp off"
        )
    elif amp == "fp16" and trains:
        print(
            "=> warning: --amp fp16 trains ten to a hundred times as slowly as --amp off on a CPU:"
            " use --amp bf16"
        )


def _cpu_has(amp: str) -> bool:
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{amp}_supported")())
    except (AttributeError, RuntimeError):  # a torch without that library
        return False
