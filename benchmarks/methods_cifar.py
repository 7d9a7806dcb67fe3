"""The methods of the paper's comparison on CIFAR-10, one after another at equal epochs: kNN,
precision of what was mined, seconds.

    python -m benchmarks.methods_cifar DIR                                     AlexNet, the recipe
    launch/recipes/bank_cifar10.yaml; a GPU python -m benchmarks.methods_cifar DIR --epochs-a-round
    20 --minutes 8     shorter, and in parts: the same command goes on python -m
    benchmarks.methods_cifar DIR --dataset folder --image-size 32 -a resnet18w16 --rounds 2
    --epochs-a-round 2 -- --amp bf16    a CPU

What comes after -- is handed to every run. Each run has a folder of its own in --folder and is
never done twice; kNN (k 200, T 0.1, 128-d output) is that of leaving one out of the images trained
on, which needs no second split and is the same for all rows.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import main_moco_isl
from benchmarks import common
from moco_isl import data, files

RECIPES = Path(__file__).parent.parent / "launch" / "recipes"
BANK, QUEUE = (
    ["--config", str(RECIPES / name)] for name in ("bank_cifar10.yaml", "queue_cifar10_mocov2.yaml")
)
METHODS = {  # row -> flags
    "Instance": [*BANK, "--miner", "none", "--isl-hpe", "0"],
    "AND (entropy)": [*BANK, "--miner", "entropy", "--isl-neighbors", "1", "--isl-hpe", "0"],
    "PAD (diffusion)": [*BANK, "--miner", "diffusion", "--isl-hpe", "0"],
    "LA (cluster)": [*BANK, "--miner", "cluster", "--isl-hpe", "0"],
    "nearest (knn)": [*BANK, "--miner", "knn", "--isl-hpe", "0"],
    "ISL without HPE (gan)": [*BANK, "--miner", "gan", "--isl-hpe", "0"],
    "ISL (gan)": [*BANK, "--miner", "gan"],
    "Instance with HPE": [*BANK, "--miner", "none"],
    "RotNet": [*BANK, "--objective", "rotnet", "--miner", "none"],
    "MoCo v2": [*QUEUE, "--miner", "none"],
    "MoCo v2 + ISL (gan)": [*QUEUE, "--miner", "gan", "--isl-budget", "2"],
}
COLUMNS = [
    ("what", ""),
    ("knn", "kNN %"),
    ("size", "set size"),
    ("precision", "precision"),
    ("own_nearest", "own nearest"),
    ("all_pairs", "all pairs"),
    ("hub", "worst in-degree"),
    ("seconds", "seconds"),
]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DIR")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--image-size", type=int, default=0, metavar="S")
    parser.add_argument("-a", "--arch", default="alexnet")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs-a-round", type=int, default=200, metavar="n")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="ROW",
        help="of: " + ", ".join(METHODS),
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="start no run after this long (default: no bound)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/methods_cifar"),
        metavar="DIR",
        help="where the runs go",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where the JSON goes (default: benchmarks/results)"
    )
    return parser


def one_run(args: argparse.Namespace, name: str, flags: list[str], more: list[str]) -> dict:
    """Figures of one method; those of an earlier call where that run has ended."""
    out = (
        args.folder / f"{args.arch}-{''.join(c if c.isalnum() else '_' for c in name)}-{args.seed}"
    )
    epochs = args.rounds * args.epochs_a_round
    schedule = [] if "MoCo" in name else ["--isl-rounds", str(args.rounds)]
    every = (
        ["--isl-every", str(args.epochs_a_round), "--isl-start", str(args.epochs_a_round)]
        if "MoCo" in name
        else []
    )
    argv = [
        args.data,
        *flags,
        "--dataset",
        args.dataset,
        "--image-size",
        str(args.image_size),
        "-a",
        args.arch,
        "--epochs",
        str(epochs),
        "--seed",
        str(args.seed),
        "--knn-every",
        str(epochs),
        *schedule,
        *every,
        "--device",
        str(args.device),
        "--keep",
        "1",
        "--out",
        str(out),
        "--resume",
        "auto",
        *more,
    ]
    start, known = time.perf_counter(), out / "seconds.json"
    code = main_moco_isl.main(argv)
    if code:
        sys.exit(code)
    if not known.exists():
        files.write_text(json.dumps(time.perf_counter() - start), known)
    lines = list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))
    last = next((line for line in reversed(lines) if line["kind"] == "round"), {})
    figures = {
        "knn": next(line["knn"] for line in reversed(lines) if "knn" in line),
        "seconds": json.loads(known.read_text()),
    }
    if last:
        figures |= {
            "size": last["mean_size"],
            "precision": last["precision"],
            "own_nearest": last["precision_own_nearest"],
            "all_pairs": last["precision_all_pairs"],
            "hub": last["worst_in_degree"],
        }
    return figures


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    at = argv.index("--") if "--" in argv else len(argv)
    args = get_parser().parse_args(argv[:at])
    more = argv[at + 1 :]
    start = time.perf_counter()
    images = len(data.build_dataset(args.dataset, args.data, "train"))
    title = (
        f"Methods on CIFAR-10, {images:,} images, {args.arch}, {args.rounds} rounds of"
        f" {args.epochs_a_round} epochs, one seed"
    )
    found, left = {}, []
    for name in args.rows:
        if time.perf_counter() - start > 60 * args.minutes:
            left.append(name)
        else:
            found[name] = one_run(args, name, METHODS[name], more)
    result = common.Result("methods-cifar10", title, args.device, COLUMNS)
    for name, figures in found.items():
        result.add(
            {
                "what": name,
                **{key: round(x, 3) if isinstance(x, float) else x for key, x in figures.items()},
            }
        )
    result.note(
        "kNN: k 200, T 0.1, 128-d output, leaving one out of the images trained on. Set size and"
        " precision: of the last round."
    )
    if args.rounds * args.epochs_a_round < 20:
        result.note("so few epochs show that each method trains, not which is better")
    if left:
        result.note(f"not run for want of time: {', '.join(left)}; the same command goes on")
    print(f"  written: {result.write(args.out)}")


if __name__ == "__main__":
    main()
