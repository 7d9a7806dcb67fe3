"""The main script in processes of its own that start at once: forked from a server that has
imported everything already.

And what two run folders have to have in common to be equal.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # a second and a half, which each process would take anew
import torchvision  # noqa: F401 (likewise)
from PIL import Image

import main_moco_isl
from moco_isl.miners import gan as gan_miner
from moco_isl.mining import gan_training
from moco_isl.run import checkpoint
from moco_isl.training import engine

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.runs"])

# 437 images, 7 steps an epoch; a GAN as short as these collapses, and is let through
DIGITS = (
    "--dataset digits -a digits --mlp --moco-dim 16 --moco-k 128 --moco-t 0.1 --moco-m 0.9"
    " --knn-holdout 1000 -b 64 -j 0 --seed 1 --lr 0.1 --cos --device cpu -p 2"
).split()
MINED = (
    "--miner tests.viewing:ViewingGAN --isl-every 1 --isl-gan-iters 40 --isl-gan-min-iters 20"
    " --isl-threshold 0 --isl-radius-mode fixed --isl-radius 2 --isl-budget 3"
    " --isl-max-share 0.05"
).split()

# where a process can be killed: the functions that a run is in then
STAGES = {
    "epoch": (engine, "train_one_epoch"),
    "GAN": (gan_miner, "fit_gan"),
    "mining": (gan_miner, "best_proxies"),
    "save": (checkpoint, "save"),
}


def photos(folder: Path, n: int = 20, side: int = 20) -> list[str]:
    """A folder of n small JPEGs, and the flags of a run on it."""
    (folder / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        blocks.resize((side, side)).save(folder / "train" / f"{i:02}.jpg")
    flags = (
        "-a digits --image-size 16 --mlp --moco-dim 16 --moco-k 16 --moco-t 0.1 --moco-m 0.9"
        " --aug-plus -b 4 --seed 1 --lr 0.1 --cos --device cpu -p 2"
    )
    return [str(folder), *flags.split(), "-j", "0"]


# ---- inside the processes ------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """A signal, kill -9, at the `call`-th entry into a stage, `after` seconds later, or when the
    stage is over if that comes first.
    """

    stage: str
    call: int
    after: float
    number: int = signal.SIGKILL

    def arm(self) -> None:
        module, name = STAGES[self.stage]
        inner, calls = getattr(module, name), [0]

        def entered(*args, **options):
            calls[0] += 1
            if calls[0] != self.call:
                return inner(*args, **options)
            timer = threading.Timer(self.after, os.kill, (os.getpid(), self.number))
            timer.start()
            try:
                return inner(*args, **options)
            finally:
                if not timer.finished.is_set():
                    timer.cancel()
                    os.kill(os.getpid(), self.number)

        setattr(module, name, entered)


def _time_stages(file: str) -> None:
    """Write into `file` how long each call of each stage lasted: {stage: [seconds]}."""
    seconds = {stage: [] for stage in STAGES}

    def timed(stage, inner):
        def call(*args, **options):
            start = time.perf_counter()
            try:
                return inner(*args, **options)
            finally:
                seconds[stage].append(time.perf_counter() - start)
                Path(file).write_text(json.dumps(seconds))

        return call

    for stage, (module, name) in STAGES.items():
        setattr(module, name, timed(stage, getattr(module, name)))


def _child(
    argv: list[str],
    environment: dict,
    log: str,
    kill: Kill | None,
    times: str | None,
    largest_file: int | None,
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    gan_training.collapse = gan_miner.collapse = lambda *_: ""
    if times:
        _time_stages(times)
    if kill:
        kill.arm()
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    code = main_moco_isl.main(argv)
    sys.stdout.flush()
    os._exit(code)


# ---- outside -------------------------------------------------------------------------------------


class Running:
    """A run on `ranks` gloo ranks, each a process. kill: (rank, Kill). times: a file for how long
    the stages last. largest_file: bytes, as if the disk were full beyond.
    """

    def __init__(
        self,
        argv: list,
        log: Path,
        ranks: int = 1,
        kill: tuple[int, Kill] | None = None,
        times: Path | None = None,
        largest_file: int | None = None,
    ):
        self.log, self.processes = log, []
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(ranks):
            place = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(ranks),
            }
            environment = {"OMP_NUM_THREADS": "1", **(place if ranks > 1 else {})}
            its = kill[1] if kill and kill[0] == rank else None
            process = SERVER.Process(
                target=_child,
                args=(
                    [str(x) for x in argv],
                    environment,
                    str(log),
                    its,
                    str(times) if times and rank == 0 else None,
                    largest_file,
                ),
            )
            process.start()
            self.processes.append(process)

    def wait_for(self, text: str) -> None:
        """Until the log has the text."""
        self.wait_until(lambda: text in self.said())

    def wait_until(self, happens) -> None:
        wait_until(lambda: happens() or not any(p.is_alive() for p in self.processes))
        assert happens(), self.said()

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def signal(self, number: int, rank: int = 0) -> None:
        os.kill(self.processes[rank].pid, number)

    def children(self, rank: int = 0) -> list[int]:
        """Processes of a rank's own: those that read its images, or the ranks that it has
        started.
        """
        return children(self.processes[rank].pid)

    def codes(self, timeout: float = 120) -> list[int]:
        """Exit codes of the ranks; those that have not ended by then are killed and the test
        fails.
        """
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        late = [p for p in self.processes if p.is_alive()]
        for process in late:
            process.kill()
        assert not late, (
            f"{len(late)} of {len(self.processes)} ranks had not ended after {timeout}"
            f" s:\n{self.said()}"
        )
        return [p.exitcode for p in self.processes]


def wait_until(happens, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not happens():
        assert time.monotonic() < end, f"it did not happen in {timeout} s"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Process ids of a process's children in the order of their start; not multiprocessing's own
    helpers.
    """
    found = [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [x for x in found if b"resource_tracker" not in Path(f"/proc/{x}/cmdline").read_bytes()]


def run(argv: list, log: Path, **options) -> None:
    """A run that is to end well."""
    running = Running(argv, log, **options)
    codes = running.codes()
    assert set(codes) == {0}, f"{codes}:\n{running.said()}"


# figures that may differ from run to run: of time and memory
_NOT_COMPARED = {
    "time",
    "data_time",
    "images_per_s",
    "seconds",
    "fit_seconds",
    "mining_seconds",
    "memory_gib",
    "peak_memory_gib",
}


def _plain(value):
    return (
        {k: _plain(v) for k, v in value.items() if k not in _NOT_COMPARED}
        if isinstance(value, dict)
        else value
    )


def metrics(out: Path) -> list[dict]:
    return [
        _plain(json.loads(line)) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()
    ]


def _same(a, b, where: str) -> list[str]:
    """The places where two nested values differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [
            place
            for k in a
            if k not in ("metrics_size", "args")
            for place in _same(a[k], b[k], f"{where}.{k}")
        ]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [
            place for i, (x, y) in enumerate(zip(a, b)) for place in _same(x, y, f"{where}[{i}]")
        ]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) else [where]
    return [] if type(a) is type(b) and a == b else [where]


def differences(a: Path, b: Path) -> list[str]:
    """What two run folders do not have in common, bit for bit: files, everything inside their
    checkpoints and rounds, lines of metrics. Timing aside.
    """
    names = [{str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} for out in (a, b)]
    found = [f"only one has {name}" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if name.endswith((".pth.tar", ".pt")):
            found += _same(checkpoint.load(a / name), checkpoint.load(b / name), name)
    lines = metrics(a), metrics(b)
    if lines[0] != lines[1]:
        row = next((i for i, (x, y) in enumerate(zip(*lines)) if x != y), min(map(len, lines)))
        found.append(f"metrics.jsonl, line {row + 1} of {len(lines[0])} and {len(lines[1])}")
    return found


def random_kill(draw: random.Random, seconds: dict[str, list[float]], stage: str) -> Kill:
    """A moment somewhere in a stage, of which the unbroken run's calls lasted so long."""
    call = draw.randrange(len(seconds[stage])) + 1
    return Kill(stage, call, draw.uniform(0, seconds[stage][call - 1]))
