"""What the three scripts share before any work is done: flags, config files, checks, ranks, exit
codes.
"""

import argparse
import difflib
import errno
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
from datetime import timedelta

import torch
import torch.distributed
import torch.multiprocessing

from moco_isl import __version__, dist, files, plain_yaml
from moco_isl.data import workers
from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.training import environment, signals
from moco_isl.training.environment import BadEnvironment
from moco_isl.training.signals import SIGNALS

MOCO_DIST_URL = "tcp://224.66.41.62:23456"
DATASETS = ("folder", "cifar10", "cifar100", "svhn", "digits")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that names the nearest flag, and which reads flags from a
    YAML file too.
    """

    def __init__(self, **options):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )
        self.add_argument("--version", action="version", version=f"moco_isl {__version__}")

    def error(self, message: str):
        flag = found[1].split("/")[0] if (found := re.match(r"argument (\S+): ", message)) else ""
        if found := re.search(r"invalid choice: '(.*?)'.*\(choose from (.*)\)", message):
            choices = found[2].replace("'", "")
            message = (
                f"{flag} {short(found[1])}: expected one of"
                f" {choices}{_nearest(found[1], choices.split(', '))}"
            )
        elif found := re.search(r"invalid (int|float) value: (.*)", message):
            message = (
                f"{flag} {short(found[2][1:-1])}: expected a"
                f" {'whole ' if found[1] == 'int' else ''}number"
            )
        elif message.startswith("unrecognized arguments: "):
            rest = message.removeprefix("unrecognized arguments: ")
            first = (rest.split() or [rest])[0]
            if not first.startswith("-"):
                raise BadInput(
                    f"'{short(first)}' is one argument too many: expected"
                    f" {self._what_is_expected()}; see --help"
                )
            message = (
                "no flag"
                f" {short(first)}{_nearest(first.split('=')[0], self._option_string_actions)}"
            )
        elif flag:
            message = f"{flag}: {message.split(': ', 1)[1]}"
        raise BadInput(f"{message}; see --help")

    def _what_is_expected(self) -> str:
        names = [action.metavar for action in self._actions if not action.option_strings]
        which = (
            f"at most one {names[0]}, which names the data set"
            if names == ["DIR"]
            else ", ".join(names)
        )
        return f"flags and {which}"

    def parse_args(self, argv: list[str] | None = None, namespace=None) -> argparse.Namespace:
        """Flags of argv; with `--config FILE.yaml` those of the file first, so that the command
        line wins.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        if "--config" in self._option_string_actions:
            config, _ = _ConfigOnly().parse_known_args(argv)
            argv = self._from_config(config.config) + argv if config.config else argv
        return super().parse_args(self._data_first(argv), namespace)

    def _data_first(self, argv: list[str]) -> list[str]:
        """argv with what a flag of several values would swallow moved to the front: `--lr 30 DIR`
        and `--layers all DIR` name a DIR.

        Such a flag has a type that does not take a DIR. What begins its values is left to it, to be
        judged.
        """
        front = []
        rest = []
        flag = None
        fewest = 0
        for token in argv:
            if token.startswith("-") and not _takes(float, token):
                flag = self._option_string_actions.get(token)
                flag = flag if flag is not None and flag.nargs in ("*", "+") else None
                fewest = 1 if flag is not None and flag.nargs == "+" else 0
            elif flag is not None and fewest == 0 and not _takes(flag.type, token):
                front.append(token)
                flag = None
                continue
            else:
                fewest = 0
            rest.append(token)
        return front + rest

    def _from_config(self, path: str) -> list[str]:
        """The flags that a YAML file names, as argv; DIR as the default of `data`, which the
        command line may name anew.
        """
        of = files.named("--config", path)
        content = plain_yaml.read(path, "--config", "lines 'flag: value'")
        if not isinstance(content, dict | None):
            raise BadInput(
                f"{of} holds a {'list' if isinstance(content, list) else 'text'}: expected lines"
                " 'flag: value'"
            )
        argv, data = self.argv_of(content or {}, of)
        if data is not None:
            # a positional before the flags would be a second one beside the command line's
            self.set_defaults(data=data)
        # again, such that no flag before it takes what the command line begins with
        return [*argv, "--config", path]

    def argv_of(
        self, settings: dict[str, plain_yaml.Value], of: str
    ) -> tuple[list[str], str | None]:
        """(argv, DIR or None) of flags by name with their values, as `plain_yaml.read` gives them;
        of: the file, for BadInput.
        """
        argv = []
        named = {}
        data = None
        for name, value in settings.items():
            flag = "--" + name.replace("_", "-")
            action = self._option_string_actions.get(flag)
            if name != "data" and (action is None or action.dest in ("config", "help", "version")):
                raise BadInput(
                    f"{of}: no flag named"
                    f" '{short(name)}'{_nearest(flag, self._option_string_actions)}"
                )
            other = named.setdefault("data" if action is None else action.dest, name)
            check(other == name, f"{of}: {other} and {name} are one flag: name it once")
            if name == "data":
                check(not isinstance(value, list | dict), f"{of}: data: expected one path")
                data = value
            elif action.nargs == 0:
                argv += self._switch(flag, value, of)
            elif value is not None:
                argv += _as_argv(flag, action, value, of)
        return argv, data

    def _switch(self, flag: str, value: plain_yaml.Value, of: str) -> list[str]:
        word = value.lower() if isinstance(value, str) else ""
        if word not in ON | OFF:
            given = (
                "nothing"
                if value is None
                else f"'{short(value)}'"
                if isinstance(value, str)
                else "more than a word"
            )
            raise BadInput(f"{of}: {flag[2:]} is a switch: expected true or false, got {given}")
        if word in ON:
            return [flag]
        return ["--no-" + flag[2:]] if "--no-" + flag[2:] in self._option_string_actions else []


ON, OFF = {"true", "on", "yes"}, {"false", "off", "no"}


def _as_argv(flag: str, action: argparse.Action, value: str | list | dict, of: str) -> list[str]:
    """A flag with its value or values from a config file, as they would stand in argv."""
    values = value if isinstance(value, list) else [value]
    several = action.nargs in ("*", "+")
    # its type may take several from one text, such as 1,5,10
    as_one_text = action.type not in (None, str, int, float)
    if (
        not all(isinstance(x, str) for x in values)
        or isinstance(value, list)
        and not (several or as_one_text)
    ):
        raise BadInput(
            f"{of}: {flag[2:]}: expected"
            f" {'a value, or a list of them' if several or as_one_text else 'one value'}"
        )
    if not several:
        return [f"{flag}={','.join(values)}"]
    for x in values:
        check(
            not x.startswith("-") or _takes(float, x),
            f"{of}: {flag[2:]}: '{short(x)}' looks like a flag: expected a value",
        )
    return [flag, *values]


def _takes(kind: Callable | None, text: str) -> bool:
    """Whether an argument's type takes a text."""
    try:
        (kind or str)(text)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False
    return True


def short(text: str, most: int = 60) -> str:
    """A text that somebody gave, as it may stand in a message: escaped, and its beginning where it
    is long.
    """
    text = files.shown(text)
    return text if len(text) <= most else f"{text[: most - 10]}... ({len(text)} characters)"


class _ConfigOnly(argparse.ArgumentParser):
    def __init__(self):
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("--config")

    def error(self, message: str):
        raise BadInput(message)


def _nearest(word: str, known) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6) if word else []
    return f" (did you mean {near[0]}?)" if near else ""


def add_switch(group, *flags: str, help: str, default: bool = False) -> None:
    """A switch that a config file may set and the command line may take back: --x and --no-x."""
    group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=default, help=help)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="DIR",
        nargs="?",
        help=(
            "path to dataset: DIR/train and DIR/val with a folder a class; a flat folder of images"
            " (no labels) works for pretraining; for cifar10, cifar100, svhn: where torchvision"
            " keeps them"
        ),
    )
    group = parser.add_argument_group("data set")
    group.add_argument(
        "--dataset",
        choices=DATASETS,
        default="folder",
        help="what DIR holds (default: folder); digits is embedded and needs no DIR",
    )
    add_switch(
        group,
        "--download",
        help="let torchvision fetch cifar10, cifar100 or svhn into DIR; needed once",
    )
    group.add_argument(
        "--image-size",
        type=int,
        default=0,
        metavar="S",
        help=(
            "side of a crop in pixels (default: 224 for photos, the native "
            "side for sets of small images)"
        ),
    )
    group.add_argument(
        "--cache",
        metavar="DIR",
        help=(
            "keep small images of one size (up to 64 pixels) decoded in this folder, which many"
            " runs may share: later runs map them, and decode anew what has changed since. Larger"
            " ones stay in their files"
        ),
    )
    group.add_argument(
        "--max-bad-images",
        type=int,
        default=0,
        metavar="n",
        help=(
            "go on past this many unreadable images, each named "
            "(default: 0); raise it for a crawl of the web"
        ),
    )


def add_distributed_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("devices and processes")
    group.add_argument(
        "--world-size", default=-1, type=int, help="number of nodes for distributed training"
    )
    group.add_argument("--rank", default=-1, type=int, help="node rank for distributed training")
    group.add_argument(
        "--dist-url",
        default=MOCO_DIST_URL,
        type=str,
        help="url used to set up distributed training (torchrun and launch/ set their own)",
    )
    group.add_argument(
        "--dist-backend",
        default="nccl",
        type=str,
        help="distributed backend; gloo is taken where there is no CUDA",
    )
    group.add_argument(
        "--dist-timeout",
        default=1800,
        type=int,
        metavar="s",
        help="seconds after which a rank that waits for another gives up (1800)",
    )
    group.add_argument("--gpu", default=None, type=int, help="GPU id to use.")
    group.add_argument(
        "--multiprocessing-distributed",
        action="store_true",
        help=(
            "Use multi-processing distributed training to launch N processes per node, which has N"
            " GPUs. This is the fastest way to use PyTorch for either single node or multi node"
            " data parallel training"
        ),
    )
    group.add_argument(
        "--nproc-per-node",
        type=int,
        default=0,
        metavar="n",
        help=(
            "processes of --multiprocessing-distributed "
            "(default: one a GPU); say it to use several CPU processes"
        ),
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda|cuda:i",
        help="default: CUDA where there is any",
    )


LARGEST = 2**31 - 1  # what a flag that counts something takes


def check(ok: bool, message: str) -> None:
    """Raise BadInput(message) unless ok."""
    if not ok:
        raise BadInput(message)


def check_range(
    args: argparse.Namespace,
    name: str,
    low: float,
    high: float = float("inf"),
    low_open: bool = False,
) -> None:
    """The value(s) of flag `name` lie in [low, high], or (low, high]; infinity and NaN never do,
    nor whole numbers above LARGEST without `high`.
    """
    value = getattr(args, name)
    for v in value if isinstance(value, list) else [value]:
        if v is None:
            continue
        most = LARGEST if isinstance(v, int) and high == math.inf else high
        finite = isinstance(v, int) or math.isfinite(v)
        inside = (low < v if low_open else low <= v) and v <= most and finite
        bounds = f"{'more than' if low_open else 'at least'} {low:g}"
        if most < LARGEST or v > most:  # of LARGEST only who is above it needs to hear
            bounds += f" and at most {LARGEST if most == LARGEST else format(most, 'g')}"
        bounds += "" if finite else ", and finite"
        check(
            inside, f"--{name.replace('_', '-')} {short(str(v))} is out of range: expected {bounds}"
        )


def check_data_options(args: argparse.Namespace) -> None:
    for flag, path in (("DIR", args.data), ("--cache", args.cache)):
        check(
            path != "",
            f"{flag} is an empty text: expected a folder; '.' is the one this is started in",
        )
    if args.data is not None:
        files.kind(args.data, "DIR")  # raises where nobody can look at it
    if args.cache is not None:
        check(
            args.dataset == "folder",
            f"--cache keeps images of a folder decoded, and those of --dataset {args.dataset} need"
            " no decoding: leave it off",
        )
        # a full cache is only read
        files.require_folder(args.cache, "--cache", may_be_read_only=True)
    check_range(args, "image_size", 0, 4096)
    check_range(args, "max_bad_images", 0)
    if args.dataset == "digits":
        check(
            args.data is None,
            f"two data sets are named: --dataset digits is embedded, and DIR is '{args.data}': drop"
            " one of them",
        )
    else:
        check(
            args.data is not None,
            f"no data: --dataset {args.dataset} needs a DIR; for a first try without any, use"
            " --dataset digits",
        )
    check(
        not args.download or args.dataset in ("cifar10", "cifar100", "svhn"),
        f"--download works for cifar10, cifar100 and svhn, not for --dataset {args.dataset}",
    )


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


def processes_here(args: argparse.Namespace) -> int:
    """How many processes this node runs, before any is started."""
    if place := environment.ranks():
        return place.local_world
    if not args.multiprocessing_distributed:
        return 1
    return args.nproc_per_node or (torch.cuda.device_count() if args.device != "cpu" else 0) or 1


def total_ranks(args: argparse.Namespace) -> int:
    check_distributed_options(args)
    if place := environment.ranks():
        return place.world
    return processes_here(args) * max(args.world_size, 1)


def check_distributed_options(args: argparse.Namespace) -> None:
    check_range(args, "nproc_per_node", 0)
    check_range(args, "dist_timeout", 1)
    check_range(args, "gpu", 0)
    check_range(args, "world_size", -1)
    check_range(args, "rank", -1)
    check(
        re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device) is not None,
        f"--device '{short(args.device)}' is no device: expected auto, cpu, cuda or cuda:i",
    )
    check(
        not args.nproc_per_node or args.multiprocessing_distributed,
        "--nproc-per-node says how many processes --multiprocessing-distributed starts: add that"
        " flag",
    )
    place = environment.ranks()  # first of all whether it makes sense
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
    """Run worker(args, stop, *given) in every rank: in this process, or in those that it starts.

    worker must be importable, `given` picklable. Raises what the worker raised; of several
    processes that failed, the first decides.
    """
    check_distributed_options(args)
    if args.multiprocessing_distributed and not environment.ranks():
        _spawn(worker, args, given, stop)
        return
    joined = join_ranks(args)
    try:
        worker(args, stop, *given)
    except (BadInput, Interrupted) as error:
        _part(joined and getattr(error, "agreed", isinstance(error, Interrupted)))
        raise
    _part(joined)


def _part(together: bool) -> None:
    """Leave the process group where all ranks do: after a failure of one the others may be gone,
    and this would wait for them.
    """
    if together:
        torch.distributed.destroy_process_group()


def join_ranks(args: argparse.Namespace) -> bool:
    """Join the process group that the environment (torchrun, launch/) or MoCo's --world-size and
    --rank describe, if any.
    """
    if place := environment.ranks():
        environment.check_meeting_point()
        rank = place.rank
        world = place.world
        url = "env://"
    elif args.world_size > 1:
        rank = args.rank
        world = args.world_size
        url = args.dist_url
    else:
        return False
    _init_process_group(args, rank, world, url)
    return True


def _init_process_group(args: argparse.Namespace, rank: int, world: int, url: str) -> None:
    backend = args.dist_backend
    if backend == "nccl" and (args.device == "cpu" or not torch.cuda.is_available()):
        backend = "gloo"
        if rank == 0:
            print("=> no CUDA here: --dist-backend gloo instead of nccl")
    try:
        torch.distributed.init_process_group(
            backend,
            init_method=url,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=args.dist_timeout),
        )
    except (RuntimeError, ValueError, torch.distributed.DistError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise RunFailed(
            f"rank {rank} of {world} could not join the others at"
            f" {os.environ.get('MASTER_ADDR', url)} within {args.dist_timeout} s: {reason}"
        ) from error


# ---- processes that this one starts --------------------------------------------------------------

# exit code between a rank and its parent: another rank was gone, so that one is the cause
LOST = 70
GRACE = 10  # seconds that the ranks have to end by themselves once one of them has ended early


def _spawn(
    worker: Callable, args: argparse.Namespace, given: tuple, stop: Callable[[], bool] | None
) -> None:
    """--multiprocessing-distributed: n processes on this node.

    Signals that the parent gets are passed on, or what `stop` says if there is one.
    """
    n = processes_here(args)
    if args.dist_url == MOCO_DIST_URL:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            args.dist_url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    processes, early = [], []

    def pass_on(number, frame=None) -> None:
        if number == signal.SIGHUP:
            signals.say("=> SIGHUP: passed on")
        if not processes:
            early.append(number)
        # Ctrl-C reaches the ranks from the terminal too, and twice would mean at once
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM if number == signal.SIGINT else number)

    handled = (
        signals.caught()
        if stop is None and threading.current_thread() is threading.main_thread()
        else ()
    )
    old = {number: signal.signal(number, pass_on) for number in handled}
    # blocked in the ranks until their `Stop` takes them: one that comes while a rank is still
    # importing is neither lost nor deadly. Blocked in this thread alone: a library's own threads
    # still take what is sent to this process, so its handlers have to be in place by now
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
    """Wait for all; (index, exit code) of each in the order in which they ended.

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
        # they may hang where no Python runs that could take a softer signal
        if time.monotonic() >= deadline:
            for i in alive.values():
                processes[i].kill()
    return ends


def _judge_ends(ends: list[tuple[int, int]], n: int) -> None:
    """Raise what the first process to fail stands for; those that only lost another rank are not
    the cause.
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
    how = (
        f"was ended by {signal.Signals(-code).name}"
        if code < 0
        else "lost the others"
        if code == LOST
        else f"ended with exit code {code}"
    )
    raise RunFailed(
        f"process {i} of {n} {how}, and the others were stopped. Resume with --resume auto"
    )


def _spawned(
    local_rank: int, worker: Callable, args: argparse.Namespace, n: int, given: tuple
) -> None:
    rank = max(args.rank, 0) * n + local_rank
    world = n * max(args.world_size, 1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(n),
    }

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
        os._exit(code)  # not through the interpreter's end, which may wait for ranks that are gone


# ---- errors of one rank, of all ranks, and of the process ----------------------------------------

KEYBOARD = 130  # what a shell makes of a process that Ctrl-C ended


def together(fn: Callable):
    """fn() on every rank.

    Where it raises one of our errors on any, all raise it: rank 0 with its text, so that it is said
    once.
    """
    result = error = None
    try:
        result = fn()
    except (BadInput, RunFailed, Interrupted) as caught:
        error = caught
    found = [
        x
        for x in dist.gather_objects(None if error is None else (type(error).__name__, str(error)))
        if x
    ]
    if not found:
        return result
    kind, text = found[0]
    agreed = {"BadInput": BadInput, "RunFailed": RunFailed, "Interrupted": Interrupted}[kind](
        text if dist.is_main() else ""
    )
    agreed.agreed = True
    raise agreed from error


def on_main(fn: Callable):
    """fn() on rank 0, its result there and None elsewhere; what it raises of our errors is raised
    on every rank, and only rank 0 says it.
    """
    return together(lambda: fn() if dist.is_main() else None)


def exit_code(
    script: Callable,
    argv: list[str] | None = None,
    stop: Callable[[], bool] | None = None,
    lost: int = RunFailed.exit_code,
) -> int:
    """Run script(argv, stop); what a user did wrong, a failed run and an interruption become one
    line on stderr and an exit code.

    lost: the exit code where the run failed because another rank is gone.
    """
    files.print_any_name()
    try:
        script(argv, stop)
        return 0
    except (BadInput, RunFailed, Interrupted) as error:
        # a stop, and what is wrong before the ranks meet, is known to all of them; of what goes
        # wrong later only who is to say it has the text
        own = (
            isinstance(error, (RunFailed, BadEnvironment))
            or isinstance(error, BadInput)
            and dist.active()
        )
        if str(error) and (own or environment.is_first()):
            _say("=> interrupted" if isinstance(error, Interrupted) else "error", error)
        return error.exit_code
    except KeyboardInterrupt:
        _say(
            "=> interrupted",
            "at once, without saving; --resume auto goes on from the last checkpoint",
        )
        return KEYBOARD
    except Exception as error:
        if _lost_a_rank(error):
            if lost == RunFailed.exit_code:
                _say(
                    "error",
                    f"rank {os.environ.get('RANK', '?')} lost another rank, which has ended: see"
                    " what that one said. Resume with --resume auto",
                )
            return lost
        if not (text := _in_words(error)):
            raise
        _say("error", text)
        return RunFailed.exit_code


def _say(word: str, text) -> None:
    print(f"{word}: {files.shown(str(text))}", file=sys.stderr, flush=True)


def _lost_a_rank(error: Exception) -> bool:
    text = str(error)
    return dist.active() and (
        isinstance(error, torch.distributed.DistError)
        or "Connection closed by peer" in text
        or "Connection reset by peer" in text
        or "gloo" in text
    )


OF_A_PATH = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}


def _in_words(error: Exception) -> str:
    """What befell the machine, and not the program, in a line; '' for anything else, which deserves
    its traceback.
    """
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            f"the GPU's memory is full ({text}): use a smaller --batch-size, --amp bf16, or more"
            " GPUs"
        )
    if (
        isinstance(error, MemoryError)
        or "t allocate memory" in text
        or "Storage size calculation overflowed" in text
    ):
        return (
            f"the memory is full ({short(text, 200)}): use a smaller --batch-size, --moco-k or"
            " --moco-dim"
        )
    if words := workers.befell(error):
        return words
    if isinstance(error, OSError) and error.errno in OF_A_PATH:
        where = f" '{files.shown(error.filename)}'" if error.filename else ""
        return f"a file or folder{where} cannot be used: {error.strerror}; {files.cure(error)}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{error.strerror}; the last checkpoint is whole. Free some space, then resume with"
            " --resume auto"
        )
    return ""
