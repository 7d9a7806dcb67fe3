"""What a scenario needs: jobs submitted as a user submits them, faults at an exact place, and the
questions to ask of a run that has ended.
"""

import contextlib
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from launch import report
from moco_isl.run import checkpoint
from tests.slurm.cluster import Cluster, _environ, _proc

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).with_name("faults")

# 12 steps an epoch; mining before the epochs 2 and 3; every step logged
KNN = shlex.split(
    "--dataset digits -a digits --mlp --moco-dim 32 --moco-k 256 --moco-t 0.1 --epochs 4 -b 128 -j"
    " 0 --device cpu --seed 1 -p 1 --miner knn --isl-start 2 --isl-every 1"
)
GAN = [
    *KNN[: KNN.index("--miner")],
    *shlex.split(
        "--miner gan --isl-start 2 --isl-every 1 --isl-gan-iters 300 --isl-gan-min-iters 100"
    ),
]
SINGLE = [
    *KNN[: KNN.index("--epochs")],
    *shlex.split(
        "--epochs 2 -b 128 -j 0 --device cpu --seed 1 -p 1 --miner knn --isl-start 1 --isl-every 1"
    ),
]
TWO_NODES = shlex.split("--nodes 2 --gpus-per-node 0 --timeout 20")
CLOCKS = {
    "time",
    "data_time",
    "images_per_s",
    "seconds",
    "fit_seconds",
    "memory_gib",
    "peak_memory_gib",
}  # what two equal runs do not share
OWN = {"out", "resume", "metrics_size", "workers", "save_every", "start_epoch"}

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(["launch.submit", "launch.sweep", "launch.status", "main_moco_isl"])


def _call(module: str, argv: list[str], env: dict[str, str], cwd: str, output: str) -> None:
    """`python launch/<module>.py argv` without the seconds that importing torch takes."""
    import importlib

    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((0, null), (1, stream), (2, stream)):
        os.dup2(target, number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.stdin = open(0)
    sys.stdout = open(1, "w", buffering=1)
    sys.stderr = open(2, "w", buffering=1)
    # read when torch was imported, before there was this env
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", 1)))
    sys.argv = [f"launch/{module}.py", *argv]
    sys.exit(importlib.import_module(f"launch.{module}").main(argv))


class Call:
    """A launcher command that runs, with what it prints."""

    def __init__(self, module: str, argv: list[str], env: dict[str, str], cwd: Path, output: Path):
        self.output = output
        self.process = _fork.Process(target=_call, args=(module, argv, env, str(cwd), str(output)))
        with _starting:
            self.process.start()

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def end(self, seconds: float = 300) -> int:
        """Its exit code, once it has ended."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"the command did not end in {seconds} s; it said:\n{self.text}")
        return self.process.exitcode


_starting = threading.Lock()


class Job:
    """A job of the launcher, found in what the command printed."""

    def __init__(self, lab: "Lab", call: Call, number: int = 0):
        self.lab, self.call = lab, call
        found = lab.until(lambda: _found(call, number), "the job's id", call=call, or_ended=True)
        self.id, self.folder = found
        self.logs = self.folder

    def log(self, rank: int = 0, kind: str = "out") -> str:
        return report._text(self.logs / f"{self.id}_{rank}_log.{kind}")

    @property
    def entry(self) -> report.Entry:
        return next(e for e in report.read_entries(self.logs) if e.job == self.id)

    def at(self, name: str) -> int:
        """Wait until a fault's place is reached; the process that is there."""
        mark = self.lab.marks / f"{name}.at"
        self.lab.until(
            lambda: mark.exists() and mark.read_text(), f"{name} of job {self.id}", call=self.call
        )
        return int(mark.read_text())

    def go(self, name: str) -> None:
        (self.lab.marks / f"{name}.go").touch()

    def signal(self, name: str = "USR2") -> None:
        self.lab.cluster.run("scancel", "--signal", name, self.id)

    def state(self) -> str:
        found = re.search(
            r"JobState=(\S+)", self.lab.cluster.run("scontrol", "show", "job", self.id, check=False)
        )
        return found[1] if found else ""

    def lives(self) -> int:
        return len(re.findall(r"life \d+ of job", self.log()))

    def end(self, code: int | None = 0, seconds: float = 300) -> str:
        """Wait for the waiting command; its words.

        code: what it has to exit with (None: anything but 0).
        """
        got = self.call.end(seconds)
        assert (got != 0) if code is None else (got == code), (
            f"exit code {got}, expected {code}:\n{self.call.text}\n{self.log(0, 'err')[-3000:]}"
        )
        return self.call.text


def _found(call: Call, number: int):
    jobs = re.findall(r"^job (\S+): \w+, .*\n  folder  (.+)$", call.text, re.M)
    return (jobs[number][0], Path(jobs[number][1])) if len(jobs) > number else None


class Lab:
    """One scenario's folder on a cluster."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder, self.marks, self.calls = cluster, folder, folder / "marks", 0
        self.marks.mkdir(parents=True, exist_ok=True)

    def env(self, faults: list[dict] = (), **more: str) -> dict[str, str]:
        env = {**self.cluster.env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
        if faults:
            env |= {
                "MOCO_ISL_FAULTS": json.dumps(list(faults)),
                "MOCO_ISL_FAULT_DIR": str(self.marks),
                "PYTHONPATH": f"{FAULTS}:{ROOT}",
            }
        return env

    def command(
        self, module: str, *argv: str, faults: list[dict] = (), cwd: Path | None = None, **env: str
    ) -> Call:
        self.calls += 1
        return Call(
            module,
            [*map(str, argv)],
            self.env(faults, **env),
            cwd or self.folder,
            self.folder / f"said_{self.calls}.txt",
        )

    def submit(
        self,
        *options: str,
        flags: list[str] = KNN,
        faults: list[dict] = (),
        folder: Path | None = None,
        nodes: list[str] = TWO_NODES,
        **more,
    ) -> Job:
        """Submit a pretraining that is waited for."""
        call = self.command(
            "submit",
            "pretrain",
            *nodes,
            "--wait",
            "--poll",
            "1",
            "--job-dir",
            folder or self.folder / "%j",
            *options,
            "--",
            *flags,
            faults=faults,
            **more,
        )
        return Job(self, call)

    def until(
        self,
        ready,
        what: str,
        seconds: float = 180,
        call: Call | None = None,
        or_ended: bool = False,
    ):
        """Wait for ready(); its value. A command that ends before stops the waiting."""
        end = time.monotonic() + seconds
        while True:
            ended = call is not None and call.process.exitcode is not None
            if value := ready():
                return value
            if ended or time.monotonic() > end:
                raise AssertionError(
                    f"no {what} "
                    + ("before the command ended" if ended else f"in {seconds:.0f} s")
                    + f":\n{call.text if call else ''}"
                )
            time.sleep(0.1)

    # ---- what must be so in the end

    def no_orphans(self, *jobs: Job) -> None:
        """No process of these jobs lives."""
        for job in jobs:
            self.until(
                lambda job=job: not orphans(job),
                f"end of the processes {orphans(job)} of job {job.id}",
                20,
            )

    def complete(self, job: Job, reference: Path | None, folder: Path | None = None) -> None:
        """The run is done: last weights, all state and all logged losses equal the unbroken run's;
        one final file; nothing left over.
        """
        folder = folder or job.folder
        names = sorted(p.name for p in folder.glob("checkpoint_*"))
        epochs = json.loads((folder / "args.json").read_text())["args"]["epochs"]
        assert names == [f"checkpoint_{e:04d}.pth.tar" for e in range(epochs)] + [
            "checkpoint_last.pth.tar"
        ], names
        assert (
            not list(folder.glob("*" + checkpoint.TEMPORARY))
            and all(
                json.loads(end.read_text())["state"] == "succeeded"
                for end in folder.glob(f"{job.id}_*_end.json")
            )
            and not list(folder.glob("*.save_tmp"))
        )
        if reference is not None:
            same_run(reference, folder)
        self.no_orphans(job)


def orphans(job: Job) -> list[int]:
    """The processes that were started for a job, their children too: they carry its id in the
    environment they were started with.
    """
    found = []
    for pid, _ in _proc("stat"):
        env = _environ(pid)
        on_slurm = (
            env.get("SLURM_JOB_ID") == job.id
            and env.get("SLURM_CONF") == job.lab.cluster.env["SLURM_CONF"]
        )
        if on_slurm or env.get("SUBMITIT_LOCAL_JOB_ID") == job.id:
            found.append(pid)
    return found


def same_run(a: Path, b: Path) -> None:
    """Checkpoints and logged values of two run folders are equal bit for bit."""
    one, two = (checkpoint.load(folder / "checkpoint_last.pth.tar") for folder in (a, b))
    differences = list(_differences(one, two, ""))
    assert not differences, f"{a} and {b} differ in {differences[:8]}"
    assert logged(a) == logged(b), first_difference(logged(a), logged(b))


def _differences(one, two, name: str):
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted({*one, *two} - OWN, key=str):
            if key not in one or key not in two:
                yield f"{name}.{key} (missing)"
            else:
                yield from _differences(one[key], two[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        for i, pair in enumerate(zip(one, two)):
            yield from _differences(*pair, f"{name}[{i}]")
    elif isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.shape != two.shape or not torch.equal(one, two):
            yield name
    elif one != two:
        yield f"{name}: {one!r} != {two!r}"


def logged(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def first_difference(a: list[dict], b: list[dict]) -> str:
    pairs = [(i, x, y) for i, (x, y) in enumerate(zip(a, b)) if x != y]
    return (
        f"{len(a)} and {len(b)} lines; first at {pairs[0] if pairs else 'the end of the shorter'}"
    )


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):
    """A file system of that size at folder."""
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)],
        check=True,
        capture_output=True,
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
