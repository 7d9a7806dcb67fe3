"""What the three scripts share before any work is done: flags, config files, checks, ranks, exit codes."""

import argparse
import difflib
import os
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed
import torch.multiprocessing
import yaml

from moco_isl import dist
from moco_isl.errors import BadInput, Interrupted, RunFailed

MOCO_DIST_URL = "tcp://224.66.41.62:23456"
DATASETS = ("folder", "cifar10", "cifar100", "svhn", "digits")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that names the nearest flag, and which reads flags from a YAML file too."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        unknown = message.removeprefix("unrecognized arguments: ").split()[0] if message.startswith("unrecognized") else ""
        raise BadInput(f"{message}{_nearest(unknown, self._option_string_actions)}; see --help")

    def parse_args(self, argv: list[str] | None = None, namespace=None) -> argparse.Namespace:
        """Flags of argv; with `--config FILE.yaml` those of the file first, so that the command line wins."""
        argv = list(sys.argv[1:] if argv is None else argv)
        config, _ = _ConfigOnly().parse_known_args(argv)
        return super().parse_args(self._from_config(config.config) + argv if config.config else argv, namespace)

    def _from_config(self, path: str) -> list[str]:
        try:
            with open(path) as file:
                content = yaml.safe_load(file) or {}
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise BadInput(f"cannot read --config '{path}': {str(error).splitlines()[0]}") from error
        if not isinstance(content, dict):
            raise BadInput(f"--config '{path}' holds a {type(content).__name__}: expected lines 'flag: value'")
        argv, positional = [], []
        for name, value in content.items():
            flag = "--" + str(name).replace("_", "-")
            action = self._option_string_actions.get(flag) or self._option_string_actions.get("--" + str(name))
            if name == "data":
                positional = [str(value)]
            elif action is None or name == "config":
                raise BadInput(f"--config '{path}': no flag named '{name}'{_nearest(flag, self._option_string_actions)}")
            elif action.nargs == 0:
                argv += self._switch(flag, value, path)
            elif value is not None:
                argv += [flag, *map(str, value if isinstance(value, list) else [value])]
        # a positional before the flags, or a flag that takes a list would swallow it; dropped if the command line names one
        self.set_defaults(**({"data": positional[0]} if positional else {}))
        return argv

    def _switch(self, flag: str, value, path: str) -> list[str]:
        if not isinstance(value, bool):
            raise BadInput(f"--config '{path}': {flag[2:]} is a switch: expected true or false, got {value!r}")
        if value:
            return [flag]
        return ["--no-" + flag[2:]] if "--no-" + flag[2:] in self._option_string_actions else []


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
    parser.add_argument("data", metavar="DIR", nargs="?", help="path to dataset: DIR/train and DIR/val with a folder a class; a flat folder of images "
                        "(no labels) works for pretraining; for cifar10, cifar100, svhn: where torchvision keeps them")
    group = parser.add_argument_group("data set")
    group.add_argument("--dataset", choices=DATASETS, default="folder", help="what DIR holds (default: folder); digits is embedded and needs no DIR")
    add_switch(group, "--download", help="let torchvision fetch cifar10, cifar100 or svhn into DIR; needed once")
    group.add_argument("--image-size", type=int, default=0, metavar="S", help="side of a crop in pixels (default: 224 for photos, the native "
                       "side for sets of small images)")
    group.add_argument("--max-bad-images", type=int, default=0, metavar="n", help="go on past this many unreadable images, each named "
                       "(default: 0); raise it for a crawl of the web")


def add_distributed_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("devices and processes")
    group.add_argument("--world-size", default=-1, type=int, help="number of nodes for distributed training")
    group.add_argument("--rank", default=-1, type=int, help="node rank for distributed training")
    group.add_argument("--dist-url", default=MOCO_DIST_URL, type=str, help="url used to set up distributed training (torchrun and launch/ set their own)")
    group.add_argument("--dist-backend", default="nccl", type=str, help="distributed backend; gloo is taken where there is no CUDA")
    group.add_argument("--dist-timeout", default=1800, type=int, metavar="s", help="seconds after which a rank that waits for another gives up (1800)")
    group.add_argument("--gpu", default=None, type=int, help="GPU id to use.")
    group.add_argument("--multiprocessing-distributed", action="store_true", help="Use multi-processing distributed training to launch N processes "
                       "per node, which has N GPUs. This is the fastest way to use PyTorch for either single node or multi node data parallel training")
    group.add_argument("--nproc-per-node", type=int, default=0, metavar="n", help="processes of --multiprocessing-distributed "
                       "(default: one a GPU); say it to use several CPU processes")
    group.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:i", help="default: CUDA where there is any")


def check(ok: bool, message: str) -> None:
    """Raise BadInput(message) unless ok."""
    if not ok:
        raise BadInput(message)


def check_range(args: argparse.Namespace, name: str, low: float, high: float = float("inf"), low_open: bool = False) -> None:
    """The value(s) of flag `name` lie in [low, high], or (low, high]; NaN never does."""
    value = getattr(args, name)
    for v in value if isinstance(value, list) else [value]:
        inside = v is None or ((low < v if low_open else low <= v) and v <= high)
        bounds = f"{'more than' if low_open else 'at least'} {low:g}" + (f" and at most {high:g}" if high < float("inf") else "")
        check(inside, f"--{name.replace('_', '-')} {v} is out of range: expected {bounds}")


def check_data_options(args: argparse.Namespace) -> None:
    check_range(args, "image_size", 0, 4096)
    check_range(args, "max_bad_images", 0)
    if args.dataset == "digits":
        check(args.data is None, f"two data sets are named: --dataset digits is embedded, and DIR is '{args.data}': drop one of them")
    else:
        check(args.data is not None, f"no data: --dataset {args.dataset} needs a DIR; for a first try without any, use --dataset digits")
    check(not args.download or args.dataset in ("cifar10", "cifar100", "svhn"), f"--download works for cifar10, cifar100 and svhn, not for --dataset {args.dataset}")


def usable_workers(asked: int, processes: int = 1) -> int:
    """`asked` loading processes, capped at the cores this process may use; said in a line when capped."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(1, cores // processes)
    if asked > most:
        print(f"=> --workers {asked} capped at {most}, the cores there are for a process")
    return min(asked, most)


def resolve_device(args: argparse.Namespace) -> torch.device:
    """The device of this process, from --device, --gpu and LOCAL_RANK. Raises BadInput for one that is not there."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"--device '{name}' is no device: expected auto, cpu, cuda or cuda:i") from error
    if device.type == "cuda":
        check(torch.cuda.is_available(), f"--device {name}, but no CUDA device is visible; use --device cpu or auto")
        if device.index is None:
            index = args.gpu if args.gpu is not None else int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
            device = torch.device("cuda", index)
        check(device.index < torch.cuda.device_count(), f"GPU {device.index} was asked for, but there are {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    return device


def processes_here(args: argparse.Namespace) -> int:
    """How many processes this node runs, before any is started."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not args.multiprocessing_distributed:
        return 1
    return args.nproc_per_node or (torch.cuda.device_count() if args.device != "cpu" else 0) or 1


def total_ranks(args: argparse.Namespace) -> int:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return processes_here(args) * max(args.world_size, 1)


def launch(worker: Callable, args: argparse.Namespace, stop: Callable[[], bool] | None) -> None:
    """Run worker(args, stop) in every rank: in this process, or in those that it starts.

    worker must be importable. Raises what the worker raised; of several failed processes, the first one's exit code decides.
    """
    if args.multiprocessing_distributed and "RANK" not in os.environ:
        _spawn(worker, args)
        return
    joined = join_ranks(args)
    try:
        worker(args, stop)
    finally:
        if joined:
            torch.distributed.destroy_process_group()


def join_ranks(args: argparse.Namespace) -> bool:
    """Join the process group that the environment (torchrun, launch/) or MoCo's --world-size and --rank describe, if any."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, world, url = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://"
    elif args.world_size > 1:
        check(args.rank >= 0, f"--world-size {args.world_size} needs --rank: expected 0 to {args.world_size - 1}, another one on each node")
        rank, world, url = args.rank, args.world_size, args.dist_url
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
        torch.distributed.init_process_group(backend, init_method=url, rank=rank, world_size=world, timeout=timedelta(seconds=args.dist_timeout))
    except (RuntimeError, ValueError, torch.distributed.DistError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise RunFailed(f"rank {rank} of {world} could not join the others at {os.environ.get('MASTER_ADDR', url)} within {args.dist_timeout} s: {reason}") from error


def _spawn(worker: Callable, args: argparse.Namespace) -> None:
    """--multiprocessing-distributed: n processes on this node. Signals that the parent gets are passed on."""
    n = processes_here(args)
    if args.dist_url == MOCO_DIST_URL and args.world_size <= 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            args.dist_url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    context = torch.multiprocessing.start_processes(_spawned, (worker, args, n), nprocs=n, join=False, start_method="spawn")

    def pass_on(number, frame):
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    old = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)}
    try:
        while not context.join():
            pass
    except torch.multiprocessing.ProcessExitedException as error:
        codes = {BadInput.exit_code: BadInput, RunFailed.exit_code: RunFailed, Interrupted.exit_code: Interrupted}
        if error.exit_code in codes:
            raise codes[error.exit_code]("") from error  # the process has printed its line
        raise RunFailed(f"process {error.error_index} of {n} was ended by {error.signal_name or f'exit code {error.exit_code}'}; the others were stopped. "
                        "Resume with --resume auto") from error
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _spawned(local_rank: int, worker: Callable, args: argparse.Namespace, n: int) -> None:
    os.environ["LOCAL_RANK"] = str(local_rank)
    world = n * max(args.world_size, 1)
    rank = max(args.rank, 0) * n + local_rank

    def run(_argv, _stop):
        _init_process_group(args, rank, world, args.dist_url)
        worker(args, None)
        torch.distributed.destroy_process_group()

    code = exit_code(run)
    if code:
        sys.stderr.flush()
        os._exit(code)  # not through the interpreter's end, which may wait for ranks that are gone


def on_main(fn: Callable):
    """fn() on rank 0, its result there and None elsewhere; what it raises of our errors is raised on every rank, and only rank 0 says it."""
    result, error = None, None
    if dist.is_main():
        try:
            result = fn()
        except (BadInput, RunFailed) as caught:
            error = caught
    kind = dist.broadcast_object(type(error).__name__ if error else "")
    if error:
        raise error
    if kind:
        raise {"BadInput": BadInput, "RunFailed": RunFailed}[kind]("")
    return result


def exit_code(script: Callable, argv: list[str] | None = None, stop: Callable[[], bool] | None = None) -> int:
    """Run script(argv, stop); what a user did wrong, a failed run and an interruption become one line on stderr and an exit code."""
    try:
        script(argv, stop)
        return 0
    except (BadInput, RunFailed, Interrupted) as error:
        word = "=> interrupted" if isinstance(error, Interrupted) else "error"
        everyone_says_it = isinstance(error, (BadInput, Interrupted)) and os.environ.get("RANK", "0") != "0"
        if str(error) and not everyone_says_it:
            print(f"{word}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
