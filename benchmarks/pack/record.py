"""What the pack writes, in a form that is whole at any moment, and the clock of its parts."""

import contextlib
import fcntl
import io
import json
import math
import os
import signal
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import common

ARCHIVE_BYTES = 15 << 20  # of results.tgz, at most
LOG_BYTES = 1 << 20  # of a part's log that are kept, the end of it
LOCKED = 3  # seconds that a process waits for the others to write
SPREAD = [("low", "least"), ("high", "most"), ("n", "n")]
RATE = ("images_per_s", "img/s")
COLUMNS = {
    "proof": [("what", ""), ("ok", "holds"), ("said", "said"), ("at", "at s")],
    "figures": [
        *[("what", ""), ("value", "median"), ("unit", ""), *SPREAD],
        *[("bar", "before"), ("goal", "goal"), RATE, ("memory_gib", "GiB"), ("said", "said")],
    ],
    "kernels": [("what", "kernel"), ("value", "ms a step"), ("share", "%")],
    "science": [
        *[("what", ""), ("epochs", "epochs")],
        *[("knn", "kNN %"), ("one_shot", "1-shot %"), ("linear", "linear %")],
        *[("size", "set size"), ("reach", "reach"), ("found", "same-class found")],
        ("precision", "precision"),
        *[("own_nearest", "own nearest"), ("all_pairs", "all pairs"), ("estimate", "estimated")],
        *[("seconds", "training s"), RATE, ("said", "said")],
    ],
}
TITLES = {
    "proof": "Proof: does the fast path compute what the plain one does?",
    "figures": "Figures: seconds and memory, the GPU alone",
    "kernels": "The largest kernels of a fast ResNet-50 step",
    "science": "Science: what each miner adds to the same MoCo v2",
}


class TimeUp(BaseException):
    """The time of a row or of a part is over.

    It is no Exception: an `except Exception` around a trial must not take it for a failure.
    """


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TimeUp inside after so many seconds, as soon as Python runs again; alarms may nest."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_) -> None:
        raise TimeUp(f"not done after {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, ring)
    before, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    began = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if before:
            signal.setitimer(signal.ITIMER_REAL, max(before - (time.monotonic() - began), 0.01))


class Record:
    """rows.jsonl, table.txt and results.tgz in one folder. Several processes may write at once.

    A row is {"part", "what", "at": seconds since `began`, ...}; `COLUMNS` has what the table shows
    of it. plan: part -> names of the rows that are to come; the table names those that are missing.
    """

    def __init__(self, out: Path, began: float, plan: dict[str, list[str]]):
        self.out = out
        self.began = began
        self.plan = plan
        self.out.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, what: str, **figures) -> dict:
        """Append a row and write the table anew."""
        row = {"part": part, "what": what, "at": round(time.time() - self.began, 1), **figures}
        with self.alone() as file:
            file.write(json.dumps(_finite(row), default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
            _replace(self.out / "table.txt", self.table())
        print(f"[{row['at']:5.0f} s] {part}: {in_words(row)}", flush=True)
        return row

    def rows(self, part: str | None = None) -> list[dict]:
        """The rows so far, of a part or of all; a line that was cut off is left out."""
        path = self.out / "rows.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [row for row in found if part in (None, row["part"])]

    def missing(self, part: str) -> list[str]:
        """Names of the planned rows of a part that are not there."""
        there = {row["what"] for row in self.rows(part)}
        return [what for what in self.plan.get(part, []) if what not in there]

    def table(self) -> str:
        """All rows as text, a table a part, and what is missing of it."""
        parts = []
        for part, columns in COLUMNS.items():
            rows = self.rows(part)
            missing = self.missing(part)
            if not rows and not missing:
                continue
            shown = [
                (key, heading)
                for key, heading in columns
                if any(row.get(key) is not None for row in rows)
            ]
            lines = [
                TITLES[part],
                *_aligned(
                    [[heading for _, heading in shown], *[_cells(row, shown) for row in rows]]
                ),
            ]
            if missing:
                lines.append(f"  not done: {'; '.join(missing)}")
            parts.append("\n".join(lines))
        notes = [f"{row['at']:.0f} s: {row['what']}" for row in self.rows("note")]
        return "\n\n".join(["\n".join(notes), *parts]) + "\n"

    def archive(self, work: Path) -> None:
        """Replace results.tgz: rows, table, and the work folder's logs, metrics and results."""
        with self.alone():
            temporary = self.out / f".results.{os.getpid()}.tmp"
            with tarfile.open(temporary, "w:gz") as tar:
                ours = (self.out / "rows.jsonl", self.out / "table.txt")
                for path in (*ours, *sorted(work.rglob("*.log"))):
                    _add_end(tar, path, path.name)
                for path in sorted([*work.rglob("metrics.jsonl"), *work.glob("results/*.json")]):
                    if temporary.stat().st_size < ARCHIVE_BYTES:
                        _add_end(tar, path, str(path.relative_to(work)))
            os.replace(temporary, self.out / "results.tgz")

    @contextlib.contextmanager
    def alone(self) -> Iterator[io.TextIOWrapper]:
        """Hold rows.jsonl for one process at a time; the lock ends with its holder.

        After LOCKED seconds the caller goes on without the lock: a process that was stopped while
        it wrote must not stop all others. A line that is appended stays whole, and a later table
        replaces an older one.
        """
        with open(self.out / "rows.jsonl", "a") as file:
            end = time.monotonic() + LOCKED
            while time.monotonic() < end:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.01)
            yield file


def _finite(row: dict) -> dict:
    """The row with None in place of NaN and infinities, which JSON does not know."""
    return {
        key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()
    }


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _add_end(tar: tarfile.TarFile, path: Path, name: str) -> None:
    """The last LOG_BYTES of a file that may still be written."""
    if not path.exists():
        return
    content = path.read_bytes()[-LOG_BYTES:]
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mtime = int(time.time())
    tar.addfile(member, io.BytesIO(content))


def _cells(row: dict, columns: list[tuple[str, str]]) -> list[str]:
    return [
        {True: "yes", False: "NO"}.get(x, "") if key == "ok" else common.cell(x)
        for key, x in ((key, row.get(key)) for key, _ in columns)
    ]


def _aligned(rows: list[list[str]]) -> list[str]:
    rows = [[text[:100] for text in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip()
        for row in rows
    ]


def in_words(row: dict) -> str:
    """A row as one line for the screen."""
    shown = [
        f"{heading or key} {common.cell(row[key])}"
        for key, heading in COLUMNS.get(row["part"], [])
        if key not in ("what", "at") and row.get(key) is not None
    ]
    return ", ".join([row["what"], *shown])


@dataclass
class Context:
    """What a part is given.

    data: a folder with train/ and val/, or None for the digits; work: for files of its own, fast
    and local.
    """

    record: Record
    device: torch.device
    data: Path | None
    work: Path
    quick: bool
    rehearsal: bool  # a CPU stands in for the GPU
    until: float = field(default=math.inf)  # time.time() at which the part ends

    def left(self) -> float:
        """Seconds until the part ends."""
        return self.until - time.time()

    @contextlib.contextmanager
    def row(self, part: str, what: str, seconds: float = math.inf) -> Iterator[dict]:
        """A row of the record, filled in inside; an error or alarm becomes what the row says."""
        figures: dict = {}
        try:
            with alarm(max(min(seconds, self.left()), 0.01)):
                yield figures
        # a driver's, a compiler's, a library's: the other rows can still be had
        except (Exception, TimeUp) as error:
            reason = (str(error).strip().splitlines() or [""])[-1]
            figures |= {"said": f"{type(error).__name__}: {reason}"[:300], "failed": True}
            if part == "proof":
                figures["ok"] = False
        self.record.add(part, what, **figures)
