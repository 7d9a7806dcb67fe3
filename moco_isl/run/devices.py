"""What the machine has: a device, cores for the processes that read images, half precision."""

import argparse
import os

import torch

from moco_isl import dist
from moco_isl.files import short
from moco_isl.run import environment
from moco_isl.run.flags import check


def usable_workers(asked: int, processes: int = 1) -> int:
    """`asked` loading processes, capped at this process's cores; a line says so when capped.

    processes: how many share the cores of this node.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    own = 0
    # SLURM may have bound a rank that is one of its tasks to cores of its own: they are not shared
    if os.environ.get("SLURM_NTASKS") == str(dist.world_size()):
        own = environment.number("SLURM_CPUS_PER_TASK", 1, environment.MOST) or 0
    most = max(1, cores // processes, min(cores, own))
    if asked > most and dist.is_main():
        print(f"=> --workers {asked} capped at {most}, the cores there are for a process")
    return min(asked, most)


def resolve_device(args: argparse.Namespace) -> torch.device:
    """This process's device, from --device, --gpu and LOCAL_RANK; BadInput where there is none."""
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
    if named:
        index = int(named[:9])
    elif args.gpu is not None:
        index = args.gpu
    else:
        place = environment.ranks()
        index = place.local_rank % count if place else 0
    check(index < count, f"GPU {index} was asked for, but there are {count}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def warn_of_slow_amp(amp: str, device: torch.device, trains: bool) -> None:
    """Print a warning where half precision is slower than none.

    It is on a CPU without instructions for it, and on every CPU that trains in fp16.
    """
    if amp == "off" or device.type != "cpu" or not dist.is_main():
        return
    if not _cpu_has(amp):
        what = f"=> warning: torch has no fast --amp {amp} on this CPU"
        print(f"{what}: it takes some ten times as long as --amp off")
    elif amp == "fp16" and trains:
        what = "=> warning: --amp fp16 trains ten to a hundred times as slowly as --amp off"
        print(f"{what} on a CPU: use --amp bf16")


def _cpu_has(amp: str) -> bool:
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{amp}_supported")())
    except (AttributeError, RuntimeError):  # a torch without that library
        return False
