"""The ranks of a run: joined as the environment says or started here, and what they agree on."""

import argparse
import math
import multiprocessing.connection
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed
import torch.multiprocessing

from moco_isl import dist
from moco_isl.errors import BadInput, Interrupted, RunFailed, first_line
from moco_isl.files import short
from moco_isl.options import opt
from moco_isl.run import environment, signals
from moco_isl.run.exits import KEYBOARD, exit_code
from moco_isl.run.flags import check, check_ranges
from moco_isl.run.signals import SIGNALS

MOCO_DIST_URL = "tcp://224.66.41.62:23456"


@dataclass(kw_only=True)
class DistributedOptions:
    """Devices and processes: MoCo's flags, and ours. A resumed run may change all of them."""

    world_size: int = opt(
        -1, low=-1, may_change=True, rare=True, help="number of nodes for distributed training"
    )
    rank: int = opt(
        -1, low=-1, may_change=True, rare=True, help="node rank for distributed training"
    )
    dist_url: str = opt(
        MOCO_DIST_URL,
        may_change=True,
        rare=True,
        help="url used to set up distributed training (torchrun and launch/ set their own)",
    )
    dist_backend: str = opt(
        "nccl",
        may_change=True,
        rare=True,
        help="distributed backend; gloo is taken where there is no CUDA",
    )
    dist_timeout: int = opt(
        1800,
        low=1,
        metavar="s",
        may_change=True,
        rare=True,
        help="seconds after which a rank that waits for another gives up",
    )
    gpu: int | None = opt(None, low=0, may_change=True, rare=True, help="GPU id to use.")
    multiprocessing_distributed: bool = opt(
        False,
        may_change=True,
        help="Use multi-processing distributed training to launch N processes per node, which has N"
        " GPUs. This is the fastest way to use PyTorch for either single node or multi node data"
        " parallel training",
    )
    nproc_per_node: int = opt(
        0,
        low=0,
        metavar="n",
        may_change=True,
        rare=True,
        help="processes of --multiprocessing-distributed (one a GPU); say it to use several CPU"
        " processes",
    )
    device: str = opt(
        "auto",
        metavar="auto|cpu|cuda|cuda:i",
        may_change=True,
        help="auto: CUDA where there is any",
    )


def processes_here(args: argparse.Namespace) -> int:
    """How many processes run on this node, also before they are started."""
    if place := environment.ranks():
        return place.local_world
    if not args.multiprocessing_distributed:
        return 1
    gpus = torch.cuda.device_count() if args.device != "cpu" else 0
    return args.nproc_per_node or gpus or 1


def total_ranks(args: argparse.Namespace) -> int:
    """How many processes run on all nodes. Raises BadInput."""
    check_distributed_options(args)
    if place := environment.ranks():
        return place.world
    return processes_here(args) * max(args.world_size, 1)


def check_distributed_options(args: argparse.Namespace) -> None:
    check_ranges(args, DistributedOptions)
    check(
        re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device) is not None,
        f"--device '{short(args.device)}' is no device: expected auto, cpu, cuda or cuda:i",
    )
    check(
        not args.nproc_per_node or args.multiprocessing_distributed,
        "--nproc-per-node says how many processes --multiprocessing-distributed starts: add that"
        " flag",
    )
    place = environment.ranks()  # also checks the environment
    if args.world_size > 1 and not place:
        check(
            0 <= args.rank < args.world_size,
            f"--world-size {args.world_size} needs --rank: expected 0 to {args.world_size - 1},"
            " another one on each node",
        )
        check(
            args.dist_url != MOCO_DIST_URL,
            "several nodes need --dist-url tcp://HOST:PORT, HOST being the node of --rank 0 and"
            " PORT a free one there (MoCo's default is a multicast address, which torch has"
            " given up)",
        )


def launch(
    worker: Callable, args: argparse.Namespace, stop: Callable[[], bool] | None, *given
) -> None:
    """Run worker(args, stop, *given) in every rank: in this process, or in those it starts.

    worker must be importable, `given` picklable. Raises what the worker raised; where several
    processes failed, what the first one raised.
    """
    check_distributed_options(args)
    if args.multiprocessing_distributed and not environment.ranks():
        _spawn(worker, args, given, stop)
        return
    joined = join_ranks(args)
    try:
        worker(args, stop, *given)
    except (BadInput, Interrupted) as error:
        # only what all ranks raise: after another error some are gone, and this would wait for them
        if joined and getattr(error, "agreed", isinstance(error, Interrupted)):
            torch.distributed.destroy_process_group()
        raise
    if joined:
        torch.distributed.destroy_process_group()


def join_ranks(args: argparse.Namespace) -> bool:
    """Join the process group that the environment or MoCo's flags describe; False for none.

    The environment is that of torchrun or launch/, the flags are --world-size and --rank.
    """
    if place := environment.ranks():
        environment.check_meeting_point()
        _init_process_group(args, place.rank, place.world, "env://")
        return True
    if args.world_size > 1:
        _init_process_group(args, args.rank, args.world_size, args.dist_url)
        return True
    return False


def _init_process_group(args: argparse.Namespace, rank: int, world: int, url: str) -> None:
    backend = args.dist_backend
    if backend == "nccl" and (args.device == "cpu" or not torch.cuda.is_available()):
        backend = "gloo"
        if rank == 0:
            print("=> no CUDA here: --dist-backend gloo instead of nccl")
    try:
        timeout = timedelta(seconds=args.dist_timeout)
        torch.distributed.init_process_group(
            backend, init_method=url, rank=rank, world_size=world, timeout=timeout
        )
    except (RuntimeError, ValueError, torch.distributed.DistError) as error:
        where = os.environ.get("MASTER_ADDR", url)
        raise RunFailed(
            f"rank {rank} of {world} could not join the others at {where} within"
            f" {args.dist_timeout} s: {first_line(error)}"
        ) from error


def together(fn: Callable):
    """fn() on every rank; where it raises an error of ours on one, every rank raises that error.

    Only rank 0's has the text, so that it is printed once.
    """
    result = error = said = None
    try:
        result = fn()
    except (BadInput, RunFailed, Interrupted) as caught:
        error = caught
        said = type(error).__name__, str(error)
    found = [x for x in dist.gather_objects(said) if x]
    if not found:
        return result
    kind, text = found[0]
    kinds = {kind.__name__: kind for kind in (BadInput, RunFailed, Interrupted)}
    agreed = kinds[kind](text if dist.is_main() else "")
    agreed.agreed = True
    raise agreed from error


def on_main(fn: Callable):
    """fn() on rank 0: its result there and None elsewhere; errors of ours as in `together`."""
    return together(lambda: fn() if dist.is_main() else None)


def say(line: str) -> None:
    """Print a line, if there is one, on rank 0."""
    if line and dist.is_main():
        print(line, flush=True)


# ---- processes of this node ----------------------------------------------------------------------


LOST = 70  # exit code by which a rank tells its parent that another rank is gone, the cause
GRACE = 10  # seconds that the other ranks have to end by themselves after one has failed


def _spawn(
    worker: Callable, args: argparse.Namespace, given: tuple, stop: Callable[[], bool] | None
) -> None:
    """--multiprocessing-distributed: run the worker in n processes on this node.

    The parent passes its signals on to them; where `stop` is given, it calls that instead.
    """
    n = processes_here(args)
    if args.dist_url == MOCO_DIST_URL:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            args.dist_url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    processes = []
    early = []  # signals that came before the processes were there

    def pass_on(number, frame=None) -> None:
        if number == signal.SIGHUP:
            signals.say("=> SIGHUP: passed on")
        if not processes:
            early.append(number)
        # the terminal sends Ctrl-C to the ranks too, and a second one would end them at once
        passed = signal.SIGTERM if number == signal.SIGINT else number
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, passed)

    is_main_thread = threading.current_thread() is threading.main_thread()
    handled = signals.caught() if stop is None and is_main_thread else ()
    old = {number: signal.signal(number, pass_on) for number in handled}
    # The ranks inherit blocked signals and let them in with their `Stop`: a signal that comes while
    # a rank imports is kept and does not end it. Only this thread blocks them. Other threads of
    # this process still take signals, so the handlers above must be set before.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        processes += torch.multiprocessing.start_processes(
            _spawned, (worker, args, n, given), nprocs=n, join=False, start_method="spawn"
        ).processes
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        for number in early:
            pass_on(number)
        _judge_ends(_ends(processes, stop, pass_on), n)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        for number, handler in old.items():
            signal.signal(number, handler)


def _ends(
    processes: list, stop: Callable[[], bool] | None, pass_on: Callable[[int], None]
) -> list[tuple[int, int]]:
    """Wait for all processes; (index, exit code) of each in the order in which they ended.

    Once one has failed the others get GRACE seconds.
    """
    alive = {process.sentinel: i for i, process in enumerate(processes)}
    ends = []
    deadline = math.inf
    while alive:
        left = max(0, deadline - time.monotonic())
        ready = multiprocessing.connection.wait(list(alive), min(left, 0.5 if stop else 3600))
        if stop is not None and stop():
            pass_on(signal.SIGTERM)
            stop = None
        for sentinel in ready:
            i = alive.pop(sentinel)
            processes[i].join()
            ends.append((i, processes[i].exitcode))
            if processes[i].exitcode:
                deadline = min(deadline, time.monotonic() + GRACE)
        # a rank may hang where no Python code runs that could take a softer signal
        if time.monotonic() >= deadline:
            for i in alive.values():
                processes[i].kill()
    return ends


def _judge_ends(ends: list[tuple[int, int]], n: int) -> None:
    """Raise what the exit code of the first process that failed stands for, if any failed.

    A process that only lost another rank is not the cause.
    """
    failed = [(i, code) for i, code in ends if code]
    if not failed:
        return
    i, code = next(((i, code) for i, code in failed if code != LOST), failed[0])
    if code == KEYBOARD:
        raise KeyboardInterrupt
    for kind in (BadInput, RunFailed, Interrupted):
        if code == kind.exit_code:
            raise kind("")  # the process has said why
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    else:
        how = "lost the others" if code == LOST else f"ended with exit code {code}"
    what = f"process {i} of {n} {how}, and the others were stopped"
    raise RunFailed(f"{what}. Resume with --resume auto")


def _spawned(
    local_rank: int, worker: Callable, args: argparse.Namespace, n: int, given: tuple
) -> None:
    rank = max(args.rank, 0) * n + local_rank
    world = n * max(args.world_size, 1)
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": n}
    os.environ |= {name: str(number) for name, number in place.items()}

    def run(_argv, _stop) -> None:
        _init_process_group(args, rank, world, args.dist_url)
        worker(args, None, *given)
        torch.distributed.destroy_process_group()

    try:
        code = exit_code(run, lost=LOST)
    except BaseException:
        traceback.print_exc()
        code = 1
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a regular exit may wait for ranks that are gone
