"""Seconds from the command to the end of the first step of main_moco_isl.py.

Each start is a new process.

    python -m benchmarks.start              ResNet-50, photos of 224 px, batch 256, --fast
                                            --no-compile; on a CPU ResNet-18, 64 px, batch 16
    python -m benchmarks.start --compile    on a GPU: with the compiler too, whose cache may be warm
    python -m benchmarks.start --small DIR  a folder of small images, as CIFAR's JPEGs: without
                                            --cache, with an empty one, with a full one

The photos are drawn and lie in a folder of JPEGs. Everything counts, until the line that reports
the first step: Python, imports, data set, workers, model, first batch, first step.
"""

import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common
from benchmarks.input import find_photos

ROOT = Path(__file__).parent.parent
BAR = 20  # s without the compiler, on an H200


def seconds_to_first_step(flags: list[str], out: Path) -> float:
    """Seconds until the script reports its first step.

    Raises RuntimeError with the end of its output where it never does.
    """
    script = [sys.executable, "-u", str(ROOT / "main_moco_isl.py")]
    command = [*script, *flags, "-p", "1", "--max-steps", "1", "--out", str(out)]
    start = time.perf_counter()
    seconds = None
    said = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        for line in run.stdout:
            said.append(line)
            if seconds is None and re.match(r"Epoch: \[0\]\[ *1/", line):
                seconds = time.perf_counter() - start
    if run.returncode or seconds is None:
        raise RuntimeError(f"no first step, exit code {run.returncode}:\n{''.join(said[-10:])}")
    return seconds


def cpu_seconds() -> float:
    """CPU seconds of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_cache(args) -> None:
    """Small images held on the device, by what is in the cache.

    Seconds to the first step, and CPU seconds of a whole run of one step.
    """
    arch = "digits" if args.quick else "resnet18w32"
    flags = f"-a {arch} -b 64 -j 8 --fast --no-compile --mlp --aug-plus --cos --seed 0".split()
    flags = [args.small, *flags, "--moco-k", "512"]
    flags += [] if args.device.type == "cuda" else ["--device", "cpu"]
    forms = ("without --cache", "empty cache", "full cache")
    seconds = {form: [] for form in forms}
    used = {form: [] for form in forms}
    result = common.Result(
        "start-cache",
        f"From the command to the first step: small images held on the device, {arch}, batch 64",
        args.device,
    )
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 if args.quick else args.repeats):
            for form in forms:
                if form == "empty cache":
                    shutil.rmtree(Path(folder) / "cache", ignore_errors=True)
                given = ["--cache", f"{folder}/cache"] if form != "without --cache" else []
                before = cpu_seconds()
                out = Path(tempfile.mkdtemp(dir=folder))
                seconds[form].append(seconds_to_first_step([*flags, *given], out))
                used[form].append(cpu_seconds() - before)
    for form in forms:
        result.add(common.Timing(seconds[form]).row(form, "s"))
        result.add(common.Timing(used[form]).row(f"{form}: CPU time of the run", "s"))
    result.note(
        f"{sum(1 for _ in Path(args.small).glob('train/**/*.*')):,} images; a new process each"
        " time; their files lie in the system's cache"
    )
    common.end(args, result)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--compile", action="store_true", help="measure --fast with the compiler as well"
    )
    parser.add_argument(
        "--small", metavar="DIR", help="measure --cache on this folder of small images"
    )
    args = parser.parse_args(argv)
    common.begin(args)
    if args.small:
        measure_cache(args)
        return
    gpu = args.device.type == "cuda"
    batch, arch, side = (256, "resnet50", 224) if gpu else (16, "resnet18", 64)
    if args.quick:
        batch, arch, side = 4, "digits", 16
    flags = f"-a {arch} --image-size {side} -b {batch} -j {8 if gpu else 0} --seed 0".split()
    flags += "--mlp --aug-plus --cos --moco-t 0.2".split()
    flags += ["--moco-k", "64"] if args.quick else []
    flags += [] if gpu else ["--device", "cpu"]
    title = f"From the command to the first step: {arch}, {side} px, batch {batch}"
    result = common.Result("start", title, args.device)
    forms = ["--fast --no-compile"]
    forms += [] if args.quick else ["--no-fast"]
    forms += ["--fast"] if args.compile else []
    seconds = {form: [] for form in forms}
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        (photos / "train").mkdir(parents=True)
        drawn = find_photos("/nonexistent", photos / "train", 8)
        for i in range(len(drawn), 2 * batch):
            shutil.copy(drawn[i % len(drawn)], photos / "train" / f"{i:03}.jpg")
        for _ in range(1 if args.quick else args.repeats):
            for form in forms:
                out = Path(tempfile.mkdtemp(dir=folder))
                given = [str(photos), *flags, *form.split()]
                seconds[form].append(seconds_to_first_step(given, out))
    for form in forms:
        row = common.Timing(seconds[form]).row(form, "s")
        if common.is_h200(args.device) and form == "--fast --no-compile":
            row["bar"] = BAR
        result.add(row)
    result.note(
        "a new process each time; the first finds files that may not lie in the system's cache yet"
    )
    common.end(args, result)


if __name__ == "__main__":
    main()
