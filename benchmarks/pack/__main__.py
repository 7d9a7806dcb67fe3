"""The first minutes on a GPU, in one command.

It proves that the fast path is right there, measures its speed, and compares the miners.

    python -m benchmarks.pack --data DIR --out OUT      nine minutes; DIR has train/ and val/ with a
                                                        folder a class
    python -m benchmarks.pack --quick --out OUT         all of it at the smallest sizes; without a
                                                        GPU a CPU stands in for one
    benchmarks/gpu.sh cifar10_jpeg.tar.gz OUT           nine minutes, of images in an archive

OUT has rows.jsonl (a line a row, as it comes), table.txt (the rows in words), results.tgz (both,
logs, metrics, and results/*.json for benchmarks.results) and encoder_fp16.pth.tar. All four are
whole at any moment: the command may be cut off.

Part C trains from the first second on. Part A runs beside it; while part B measures, the trainer is
stopped by SIGSTOP. Every part is a process of its own: one that fails or hangs costs no other. Exit
code 1 where a proof failed or a row is missing.
"""

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.pack import figures, proof, science
from benchmarks.pack.record import COLUMNS, TITLES, Context, Record, TimeUp, alarm

ROOT = Path(__file__).parent.parent.parent
END = 8  # seconds kept for the end: the last archive and the table
MEMORY_BYTES = 4 << 30
PR_SET_PDEATHSIG = 1
GRACE = 4  # seconds from a part's own alarm to its end by SIGKILL


def warm(context: Context, name: str, wanted: tuple[str, ...]) -> None:
    """Compile what part B measures, so that part B does not wait for the compiler."""
    work = figures.work_of(name, context.quick)
    for form, build in figures.step.forms(work, context.device, lambda text: None):
        if figures.FORMS.get(form) in wanted:
            build()()


Run = Callable[[Context], None]
PROOF: dict[str, Run] = {  # and beside it the compilers; those of width 32 run in the trainer
    "kernels": proof.kernels,
    "steps": proof.steps,
    "suite": proof.suite,
    "scripts": proof.scripts,
    "warm-photos": lambda context: warm(context, "photos", ("fast", "fast, ISL on")),
    "warm-gan": figures.warm_gan,
    "warm-w64": lambda context: warm(context, "w64", ("fast",)),
}
FIGURES: dict[str, Run] = {
    "photos": figures.photos,
    "mining": figures.mining,
    "small": figures.small,
}
PROOF_SECONDS = 95  # at most, of nine minutes
FIGURES_SECONDS = {"photos": 65, "mining": 45, "small": 30}
PARTS: dict[str, Run] = {**PROOF, **FIGURES, "science": science.science}
OUTSIDE = {"suite"}  # whose tests bring their own stand-in for a GPU


def plan(only: list[str]) -> dict[str, list[str]]:
    """Table -> names of the rows that these parts are to write."""
    tables = {"proof": proof.PLAN, "figures": figures.PLAN, "science": science.PLAN}
    return {
        table: [what for part, rows in parts.items() if part in only for what in rows]
        for table, parts in tables.items()
    }


# ---------------------------------------------------------------- a part, in its own process


def one_part(name: str, args: argparse.Namespace) -> int:
    """Wait for the word on stdin, which says when the part has to end, then run it."""
    record = Record(args.out, args.began, plan(args.only))
    with contextlib.suppress(OSError, AttributeError):  # Linux: no part outlives the pack
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    warnings.showwarning = lambda message, *_, **__: fall_back(record, name, str(message))
    with contextlib.ExitStack() as stack:
        rehearsal = not torch.cuda.is_available()
        if rehearsal and name not in OUTSIDE:
            from tests.pretend_cuda import pretending_with_kernels

            torch.set_num_threads(1)
            stack.enter_context(pretending_with_kernels())
        context = Context(record, torch.device("cuda"), args.data, args.work, args.quick, rehearsal)
        context.until = float(sys.stdin.readline() or 0)
        PARTS[name](context)
    return 0


def fall_back(record: Record, name: str, message: str) -> None:
    """Print a warning, and note it where it says that a slower way was taken."""
    print(f"warning: {message}", flush=True)
    if "used instead" in message:
        record.add("note", f"{name}: {message}"[:300])


def command_of(name: str, args: argparse.Namespace) -> list[str]:
    """What runs a part."""
    flags = ["--part", name, "--out", args.out, "--work", args.work]
    flags += ["--began", args.began, "--only", *args.only]
    flags += ["--data", args.data] if args.data else []
    flags += ["--quick"] if args.quick else []
    return [sys.executable, "-u", "-m", "benchmarks.pack", *map(str, flags)]


class Process:
    """A part under way, in a process group of its own, its output in a log.

    It imports, and waits for `go`.
    """

    def __init__(self, name: str, command: list[str], log: Path):
        self.name = name
        self.until = None
        self.log = open(log, "w")
        # The compilers of all parts run at once: that of the largest network gets half of 16 cores.
        threads = {
            "TORCHINDUCTOR_COMPILE_THREADS": "8" if name == "warm-photos" else "3",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        }
        environment = {**os.environ, **threads, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def go(self, until: float) -> None:
        """Let it run until then (time.time())."""
        self.until = until
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{until}\n")
            self.process.stdin.flush()

    def ended(self) -> bool:
        return self.process.poll() is not None

    def pause(self, paused: bool) -> None:
        """Stop the process itself, whose kernels end first, or let it go on."""
        if not self.ended():
            os.kill(self.process.pid, signal.SIGSTOP if paused else signal.SIGCONT)

    def end(self) -> str:
        """Wait until its time is over, and a little longer; then kill it with all that it started.

        Says how it ended.
        """
        try:
            code = self.process.wait(timeout=max(0.1, self.until - time.time() + GRACE))
        except subprocess.TimeoutExpired:
            code = None
        self.kill()
        if code == 0:
            return ""  # what it left out is named in the table
        said = Path(self.log.name).read_text(errors="replace").splitlines()
        last = [line for line in said if line.strip()]
        end = f"ended with exit code {code}"
        if code is None:
            end = "was killed when its time was over"
        return f"{self.name} {end}; its log ends: {last[-1][:200] if last else ''}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver
            self.process.wait(timeout=5)
        self.log.close()


# ---------------------------------------------------------------- all of them


def conduct(args: argparse.Namespace, record: Record) -> None:
    """Start, pause and end the parts. Whatever happens, no process stays behind."""
    total = args.minutes * 60
    end = args.began + total - END
    share = lambda seconds: seconds * total / 540  # of nine minutes
    running: list[Process] = []

    def start(name: str) -> Process:
        running.append(Process(name, command_of(name, args), args.work / f"{name}.log"))
        return running[-1]

    def close(process: Process) -> None:
        said = process.end()
        with spared("the record of a part"):
            if said:
                record.add("note", said)
            record.archive(args.work)

    try:
        trainer = start("science") if "science" in args.only else None
        if trainer:
            trainer.go(end)
        beside = [start(name) for name in PROOF if name in args.only]
        until = args.began + share(PROOF_SECONDS)
        for process in beside:
            process.go(until)
        due = [name for name in FIGURES if name in args.only]
        coming = start(due[0]) if due else None  # imports meanwhile
        for process in beside:
            close(process)
        if trainer:
            with record.alone():
                trainer.pause(True)
        for name, after in zip(due, [*due[1:], None]):
            process, coming = coming, start(after) if after else None
            process.go(min(end, time.time() + share(FIGURES_SECONDS[name])))
            close(process)
        if trainer:
            trainer.pause(False)
            close(trainer)
    finally:
        for process in running:
            process.kill()


@contextlib.contextmanager
def spared(what: str) -> Iterator[None]:
    """Print an error inside, a full disk above all, and go on."""
    try:
        yield
    except Exception as error:
        print(f"{what} could not be written: {type(error).__name__}: {error}", flush=True)


def memory() -> str | None:
    """A folder in memory that has room for images and checkpoints, or None."""
    there = os.access("/dev/shm", os.W_OK)
    return "/dev/shm" if there and shutil.disk_usage("/dev/shm").free > MEMORY_BYTES else None


def write_results(record: Record, folder: Path, facts: dict) -> None:
    """The tables in the form of benchmarks/results."""
    folder.mkdir(exist_ok=True)
    for part, columns in COLUMNS.items():
        rows = record.rows(part)
        if not rows:
            continue
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        result = common.Result(f"pack-{part}", TITLES[part], device, columns)
        result.rows = [{**row, "ok": {True: "yes", False: "NO"}.get(row.get("ok"))} for row in rows]
        missing = record.missing(part)
        result.notes = [
            *([f"not done: {'; '.join(missing)}"] if missing else []),
            f"python -m benchmarks.pack, {facts['minutes']:g} minutes; {facts['device']}",
        ]
        result.write(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9, help="that all of it may take (9)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the four files go"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="images of 32 pixels for part C: CIFAR-10 as train/ and val/ with a folder a class",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=f"of {', '.join(PARTS)}",
    )
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: a rehearsal")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        return one_part(args.part, args)
    rehearsal = not torch.cuda.is_available()
    if rehearsal and not args.quick:
        parser.error("no GPU is here: expected one, or --quick, which rehearses on a CPU")
    if args.data is None and not args.quick and "science" in args.only:
        parser.error(
            "part C trains on images: expected --data DIR with train/ and val/, or --only with"
            " other parts"
        )
    if args.data and not all((args.data / split).is_dir() for split in ("train", "val")):
        parser.error(f"--data {args.data}: expected a folder with train/ and val/")
    if (args.out / "rows.jsonl").exists():
        parser.error(f"--out {args.out} has rows already: choose another folder, or move them")
    args.out = args.out.absolute()
    args.data = args.data and args.data.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work = Path(tempfile.mkdtemp(prefix="pack-", dir=memory()))
    record = Record(args.out, args.began, plan(args.only))
    facts = {
        "minutes": args.minutes,
        "device": "a rehearsal: a CPU stands in for the GPU" if rehearsal else proof.device_facts(),
    }
    note = f"{facts['device']}; commit {common.commit() or 'unknown'}; {args.minutes:g} minutes"
    if args.quick:
        note += "; the smallest sizes, whatever a row is called: no figure here means anything"
    record.add("note", note)
    # so that no part stays behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        with contextlib.suppress(TimeUp), alarm(args.began + 60 * args.minutes - 4 - time.time()):
            conduct(args, record)
    finally:
        with spared("results"):
            write_results(record, args.work / "results", facts)
        with spared("results.tgz"):
            record.archive(args.work)
        shutil.rmtree(args.work, ignore_errors=True)
        print(f"\n{record.table()}", flush=True)
    bad = [row for row in record.rows("proof") if row.get("ok") is False] + [
        row for row in record.rows() if row.get("failed")
    ]
    return int(bool(bad) or any(record.missing(table) for table in record.plan))


if __name__ == "__main__":
    sys.exit(main())
