"""Does the fast path learn as the plain one does? The same short run on both, seeds paired: kNN at
the end.

    python -m benchmarks.equal --dataset cifar10 DIR      ten epochs of MoCo v2, ResNet-18 of half
    width (on a GPU) python -m benchmarks.equal --dataset folder DIR --flags "-a resnet18w8
    --image-size 32"      a folder of small images, and flags of one's own python -m
    benchmarks.equal                            the embedded digits; on a CPU with bf16 and channels
    last asked for, the compiler left out

Both augment on the device, by the same draws, so that they differ in numerics alone.
"""

import json
import shlex
import statistics
import tempfile
from pathlib import Path

import main_moco_isl
from benchmarks import common

COMMON = [
    "--mlp",
    "--moco-t",
    "0.1",
    "--moco-m",
    "0.99",
    "--cos",
    "--aug-plus",
    "-j",
    "0",
    "--wd",
    "5e-4",
    "-p",
    "1000",
    "--on-device",
    "--keep",
    "1",
]
SETS = {
    "digits": ["-a", "digits", "--moco-dim", "64", "--moco-k", "512", "-b", "128", "--lr", "0.06"],
    "cifar10": ["-a", "resnet18w32", "--moco-k", "4096", "-b", "512", "--lr", "0.06"],
}
SETS["folder"] = SETS["cifar10"]


def one_run(flags: list[str], epochs: int) -> float:
    """kNN in per cent after the last epoch."""
    with tempfile.TemporaryDirectory() as folder:
        if main_moco_isl.main(
            [*flags, "--epochs", str(epochs), "--knn-every", str(epochs), "--out", f"{folder}/run"]
        ):
            raise RuntimeError(f"the run ended in an error: {' '.join(flags)}")
        lines = [
            json.loads(line)
            for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        ]
    return next(line["knn"] for line in lines if "knn" in line)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("data", nargs="?", metavar="DIR")
    parser.add_argument("--dataset", choices=SETS, default="digits")
    parser.add_argument(
        "--flags",
        default="",
        metavar='"..."',
        help="more flags of main_moco_isl.py for every run, in quotes",
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    common.begin(args)
    if args.quick:
        args.epochs, args.seeds = 1, 1
    gpu = args.device.type == "cuda"
    forms = {
        "plain": ["--no-fast"],
        "fast": ["--fast", *([] if gpu else ["--amp", "bf16", "--channels-last"])],
    }
    flags = [
        *([args.data] if args.data else []),
        "--dataset",
        args.dataset,
        *SETS[args.dataset],
        *COMMON,
        *([] if gpu else ["--device", "cpu"]),
        *shlex.split(args.flags),
    ]
    name = (
        Path(args.data).resolve().name if args.dataset == "folder" and args.data else args.dataset
    )
    knn = {form: [] for form in forms}
    for seed in range(args.seeds):
        for form, own in forms.items():
            knn[form].append(one_run([*flags, *own, "--seed", str(seed)], args.epochs))
    result = common.Result(
        f"equal-{name}",
        f"Fast path and plain path, {name}, {args.epochs} epochs: weighted kNN",
        args.device,
    )
    for form in forms:
        result.add(row(f"kNN, {form} path", knn[form], "%"))
    result.add(
        row(
            "fast less plain, by seed",
            [fast - plain for fast, plain in zip(knn["fast"], knn["plain"])],
            "points",
        )
    )
    result.note(
        f"plain: {' '.join(forms['plain'])}; fast: {' '.join(forms['fast'])}; both --on-device; n"
        " is the number of seeds"
    )
    common.end(args, result)


def row(what: str, values: list[float], unit: str) -> dict:
    return {
        "what": what,
        "value": statistics.median(values),
        "unit": unit,
        "low": min(values),
        "high": max(values),
        "n": len(values),
    }


if __name__ == "__main__":
    main()
