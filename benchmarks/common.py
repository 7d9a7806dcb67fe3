"""What every benchmark and study shares.

That is timing, the machine's own ceilings, a table on the screen and the file that keeps it.

A table is kept as <folder>/results/<name>-<device>.json, and `python -m benchmarks.results` writes
<folder>/RESULTS.md from all of them; folder is benchmarks or studies. Such a file holds what the
page shows, a row a line:

    title, command, date, commit, device, versions     text; device may be {name, kind, cores,
                                                       threads, load}, versions {python, torch, ...}
    columns: [[key, heading], ...]                     which values of a row are shown, in order
    rows: [{key: value, ...}, ...]                     numbers, text or None
    notes: [text, ...]                                 what a reader has to know
    name, n                                            of the file; how often each row was repeated

Without `columns` the rows are timings: {what, value, unit, low, high, n}. value is the median of n
repeats, low and high are their extremes, the warm-up is excluded. Such a row may also have: bar and
goal (in its unit, what has to be reached and what is hoped for), ratio and of (how many times as
fast as the row named), images_per_s, memory_gib, floor.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moco_isl import files

RESULTS = Path(__file__).parent / "results"


# ---------------------------------------------------------------- time


@dataclass
class Timing:
    """Seconds of one call: all repeats."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self, what: str, unit: str = "ms", **more) -> dict:
        scale = {"ms": 1e3, "s": 1.0, "us": 1e6}[unit]
        return {**extremes(what, [x * scale for x in self.seconds], unit), **more}


def extremes(what: str, values: list[float], unit: str) -> dict:
    """A row of timings: median, least, most and number of the values."""
    return {
        "what": what,
        "value": statistics.median(values),
        "unit": unit,
        "low": min(values),
        "high": max(values),
        "n": len(values),
    }


def by_cpu_time(device: torch.device) -> bool:
    """Whether tables of this device count CPU time, since others use the machine too."""
    return device.type == "cpu"


BY_CPU_TIME = "CPU time of all threads, not the wall's: others used the machine too"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(
    fn: Callable[[], object], device: torch.device, inner: int = 1, cpu_time: bool = False
) -> float:
    """Seconds of one of `inner` calls in a row; cpu_time: of all threads, not of the wall."""
    clock = time.process_time if cpu_time else time.perf_counter
    synchronize(device)
    start = clock()
    for _ in range(inner):
        fn()
    synchronize(device)
    return (clock() - start) / inner


def timed(
    fn: Callable[[], object],
    device: torch.device,
    repeats: int = 5,
    warmup: int = 2,
    inner: int = 1,
    cpu_time: bool = False,
) -> Timing:
    for _ in range(warmup):
        fn()
    return Timing([once(fn, device, inner, cpu_time) for _ in range(repeats)])


def in_turns(
    fns: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int = 5,
    warmup: int = 1,
    cpu_time: bool = False,
) -> dict[str, Timing]:
    """Timings of several calls, taken in turns.

    What else the machine does falls on all of them alike; the i-th seconds of all belong together.
    """
    for fn in fns.values():
        for _ in range(warmup):
            fn()
    rounds = [
        {name: once(fn, device, cpu_time=cpu_time) for name, fn in fns.items()}
        for _ in range(repeats)
    ]
    return {name: Timing([r[name] for r in rounds]) for name in fns}


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """b of seconds ~ size^b, least squares."""
    return statistics.linear_regression(
        [math.log(x) for x in sizes], [math.log(x) for x in seconds]
    ).slope


# ---------------------------------------------------------------- ceilings


def fastest(fn: Callable[[], object], device: torch.device, inner: int = 1) -> float:
    """Seconds of the best of five, for a ceiling."""
    return min(timed(fn, device, 5, 3, inner, by_cpu_time(device)).seconds)


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int = 8192) -> float:
    """FLOP/s of a product of square matrices of random numbers."""
    gpu = device.type == "cuda"
    side = side if gpu else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / fastest(lambda: a @ b, device, inner=5 if gpu else 2)


def convolution_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a 3x3 convolution of 256 channels; on some CPUs twice that of a product."""
    N, side, layout = 32, 8, torch.contiguous_format
    if device.type == "cuda":
        N, side, layout = 256, 56, torch.channels_last
    x, w = (
        torch.randn(shape, device=device).to(dtype=dtype, memory_format=layout)
        for shape in ((N, 256, side, side), (256, 256, 3, 3))
    )
    flops = 2 * 256 * 256 * 9 * N * side**2
    return flops / fastest(lambda: torch.conv2d(x, w, padding=1), device, inner=5)


def copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written, of a copy far larger than any cache."""
    size = 2**30 if device.type == "cuda" else 2**27
    x = torch.empty(size, dtype=torch.uint8, device=device).random_()
    y = torch.empty_like(x)
    return 2 * size / fastest(lambda: y.copy_(x), device)


def peak_gib(device: torch.device, reset: bool = False) -> float | None:
    """Peak memory of the GPU since the last reset; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return peak


# ---------------------------------------------------------------- the result


def slug(device: torch.device) -> str:
    """What result files are named after: cpu, or the GPU's name, as h200."""
    if device.type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower()
    return name.removeprefix("nvidia ").replace(" ", "-")


def is_h200(device: torch.device) -> bool:
    """Whether this is the GPU that bars and goals in seconds were set for."""
    return device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)


def machine(device: torch.device) -> dict:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "kind": device.type,
        "name": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }
    if device.type == "cuda":
        facts |= {
            "name": torch.cuda.get_device_name(device),
            "cpu": _cpu_name(),
            "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30,
        }
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict:
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "triton", "pillow", "lightly", "kornia", "faiss-cpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def commit() -> str | None:
    """The commit, "-dirty" added where a tracked file has changed since; results may have."""
    git = lambda *words: subprocess.run(
        ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    try:
        but = (":(exclude,top)*/results/*", ":(exclude,top)*/RESULTS.md")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *but)
        name = git("rev-parse", "--short=12", "HEAD")
    except FileNotFoundError:
        return None
    return name and name + ("-dirty" if changed else "") or None


class Result:
    """Rows of one table, shown as they come and written at the end.

    columns: [(key, heading), ...] of rows that are no timings.
    """

    folder = RESULTS
    unshown: tuple[str, ...] = ()  # keys of a row that the file keeps beside those of its columns

    def __init__(
        self,
        name: str,
        title: str,
        device: torch.device,
        columns: list[tuple[str, str]] | None = None,
    ):
        self.name = name
        self.title = title
        self.device = device
        self.columns = columns
        self.rows: list[dict] = []
        self.notes: list[str] = []
        print(f"\n{title}, on {machine(device)['name']}", flush=True)

    def add(self, row: dict, of: str | None = None) -> dict:
        """Keep and print a row; of: the row that it is compared with, in the same unit."""
        if of is not None:
            row |= {"ratio": self[of]["value"] / row["value"], "of": of}
        self.rows.append(row)
        if self.columns is None:
            text = in_words(row)
        else:
            text = "  ".join(f"{cell(row.get(key)):<12}" for key, _ in self.columns)
        print(f"  {text}", flush=True)
        return row

    def note(self, text: str) -> None:
        self.notes.append(text)
        print("  " + text, flush=True)

    def __getitem__(self, what: str) -> dict:
        return next(row for row in self.rows if row["what"] == what)

    def write(self, folder: Path | str | None = None) -> Path:
        rows = self.rows
        if self.columns is not None:
            kept = {*self.unshown, *(key for key, _ in self.columns)}
            rows = [{key: x for key, x in row.items() if key in kept} for row in rows]
        facts = {
            "name": self.name,
            "title": self.title,
            "command": _command(),
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "device": machine(self.device),
            "versions": versions(),
            **({} if self.columns is None else {"columns": self.columns}),
            "rows": rows,
            "notes": self.notes,
        }
        path = Path(folder or self.folder) / f"{self.name}-{slug(self.device)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(as_text(facts), path)
        return path


def as_text(facts: dict) -> str:
    """The facts of a table as JSON: a key a line, a row a line.

    Of a row what is None is left out, and numbers keep six digits, but for those in lists.
    """
    lines = []
    for key, value in facts.items():
        text = json.dumps(value)
        if key == "rows":
            rows = [json.dumps(_kept(row)) for row in value]
            text = "[\n  " + ",\n  ".join(rows) + "\n ]"
        lines.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _kept(row: dict) -> dict:
    """What its file keeps of a row."""
    number = lambda x: float(f"{x:.6g}") if isinstance(x, float) else x
    return {key: number(value) for key, value in row.items() if value is not None}


def _command() -> str:
    """What was typed, without --out and without the folders of absolute paths."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem
    given = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    if "--out" in given:
        at = given.index("--out")
        del given[at : at + 2]
    return shlex.join(["python", "-m", module, *given])


def in_words(row: dict) -> str:
    """One row as a line of text."""
    text = f"{row['what']:<46}{short(row['value']):>9} {row['unit']:<9}"
    if row.get("n", 1) > 1:
        text += f" ({short(row['low'])} to {short(row['high'])}, n = {row['n']})"
    for name, words in (
        ("images_per_s", "{} img/s"),
        ("memory_gib", "{} GiB"),
        ("floor", "floor {}"),
        ("bar", "bar {}"),
        ("goal", "goal {}"),
    ):
        if row.get(name) is not None:
            text += "; " + words.format(short(row[name]))
    return text + (f"; {row['ratio']:.2f}x {row['of']}" if row.get("ratio") else "")


def spread(values: list[float], sign: str = "", digits: int = 1) -> str:
    """Mean ± standard deviation; of one value the value. sign "+": always with one."""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean + f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def short(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def cell(x) -> str:
    """Any value of a row as text."""
    if x is None:
        return ""
    return short(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else str(x)


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        metavar="n",
        help="timings of each row; their median counts (5)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: as torch sees fit)")
    parser.add_argument(
        "--quick", action="store_true", help="the smallest sizes: to see that it runs"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where the JSON goes (default: results/ of its folder; none if --quick)",
    )
    return parser


def begin(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)


def end(args: argparse.Namespace, *results: Result) -> None:
    for result in results:
        if result.rows and (args.out or not args.quick):
            print(f"  written: {result.write(args.out)}")
