"""All measurements that this machine can make, the most important first.

    python -m benchmarks.bench [--minutes 8]

Each part is a process with a time limit of its own: one that fails or hangs costs no other, and its
JSON is there when it ends. With --minutes, parts that no longer fit are left out and named. On a
GPU the compilers run first, all of them side by side, so that the parts find their work done. At
the end the pages are written. Exit code 1 where a part failed.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import common, results

# part: (module and flags, seconds it may take at most)
GPU = {
    "step, photos": ("benchmarks.step --rows photos --profile --steps 6", 240),
    "step, width 64": ("benchmarks.step --rows w64 --profile", 150),
    "step, width 32": ("benchmarks.step --rows w32", 150),
    "step, bank": ("benchmarks.step --rows bank", 120),
    "growth, GAN": ("benchmarks.growth --parts gan --repeats 2", 90),
    "growth, mining": ("benchmarks.growth --parts mining --repeats 3", 120),
    "growth, loss": ("benchmarks.growth --parts loss", 100),
    "input": ("benchmarks.input --images 32 --repeats 3", 120),
    "start": ("benchmarks.start --repeats 1", 120),
    "kNN": ("benchmarks.knn --repeats 3", 100),
}
WARM = (
    "benchmarks.step --rows photos --warm",
    "benchmarks.step --rows w64 --warm",
    "benchmarks.step --rows w32 --warm",
    "benchmarks.step --rows bank --warm",
)
GRACE = 10  # seconds from the interrupt to the end
CPU = {
    "step, photos": ("benchmarks.step --rows photos --profile", 300),
    "step, width 64": ("benchmarks.step --rows w64", 300),
    "step, width 32": ("benchmarks.step --rows w32", 300),
    "step, bank": ("benchmarks.step --rows bank", 300),
    "growth": ("benchmarks.growth --repeats 3", 400),
    "input": ("benchmarks.input --images 16 --repeats 3", 400),
    "start": ("benchmarks.start --repeats 3", 200),
    "kNN": ("benchmarks.knn --images 20000 --queries 1000 --dims 128 --repeats 3", 200),
}


def start(part: str, more: list[str]) -> subprocess.Popen:
    """Start the part in a process group of its own, with all processes that it will start."""
    return subprocess.Popen(
        [sys.executable, "-m", *part.split(), *more],
        cwd=Path(__file__).parent.parent,
        preexec_fn=os.setpgrp,
    )


def end(process: subprocess.Popen, seconds: float) -> str:
    """Wait at most so long, then interrupt the part, which writes what it has measured.

    Returns "" where the part ended well, otherwise how it ended.
    """
    try:
        code = process.wait(timeout=max(1.0, seconds))
        return f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=GRACE)
        return f"not done after {seconds:.0f} s"
    finally:  # compilers and workers of the part too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60, help="that all of it may take (60)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"of {', '.join(GPU)}")
    parser.add_argument("--quick", action="store_true", help="smallest sizes: to see that it runs")
    parser.add_argument(
        "--out",
        type=Path,
        default=common.RESULTS,
        metavar="DIR",
        help="where the JSONs go (default: benchmarks/results)",
    )
    args = parser.parse_args(argv)
    gpu = args.device.startswith("cuda")
    began = time.perf_counter()
    left = lambda: args.minutes * 60 - (time.perf_counter() - began)
    more = ["--device", args.device, "--out", str(args.out.absolute())]
    more += [] if gpu else ["--threads", "1"]
    more += ["--quick"] if args.quick else []
    parts = {
        name: part
        for name, part in (GPU if gpu else CPU).items()
        if not args.only or any(name.startswith(only) for only in args.only)
    }
    if gpu:
        compilers = [
            start(part, more)
            for part in WARM
            if not args.only or any(part.split()[2] in flags for flags, _ in parts.values())
        ]
        limit = time.perf_counter() + min(180.0, left() / 3)
        for process in compilers:
            end(process, limit - time.perf_counter())
        print(f"compilers: {time.perf_counter() - began:.0f} s", flush=True)
    said = {}
    for name, (part, most) in parts.items():
        if left() < 5:
            said[name] = "left out: no time was left"
            continue
        since = time.perf_counter()
        failed = end(start(part, more), min(most, left()))
        said[name] = failed or f"done in {time.perf_counter() - since:.0f} s"
    print(f"\n{(time.perf_counter() - began) / 60:.1f} minutes")
    for name, text in said.items():
        print(f"  {name}: {text}", flush=True)
    if args.out == common.RESULTS:
        results.main([])
    return int(any(not text.startswith("done") for text in said.values()))


if __name__ == "__main__":
    sys.exit(main())
