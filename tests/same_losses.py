"""Whether a change of the house left every loss as it was, bit for bit: each objective and miner
trained for 3 epochs.

python -m tests.same_losses write FILE     at the commit before
python -m tests.same_losses compare FILE   after it, on the same machine
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import torch

import main_moco_isl

DIGITS = [
    "--dataset",
    "digits",
    "-a",
    "digits",
    "--moco-dim",
    "16",
    "--moco-k",
    "128",
    "--moco-t",
    "0.1",
    "-b",
    "64",
]
DIGITS += [
    "--knn-holdout",
    "1000",
    "--epochs",
    "3",
    "-j",
    "0",
    "--seed",
    "0",
    "--device",
    "cpu",
    "-p",
    "1",
    "--save-epochs",
    "3",
]
MINED = ["--isl-start", "1", "--isl-every", "1", "--isl-budget", "4"]
GAN = ["--miner", "gan", "--isl-gan-iters", "60"]
RUNS = {
    "moco": [],
    "moco v2": ["--mlp", "--aug-plus", "--cos"],
    "symmetric, split batch norm": ["--symmetric", "--bn-splits", "4", *MINED, "--miner", "knn"],
    "knn, mean of logs, trust": [
        *MINED,
        "--miner",
        "knn",
        "--isl-loss",
        "meanlog",
        "--isl-trust",
        "0.5",
        "--mlp",
    ],
    "knn, no hard positives, kept": [*MINED, "--miner", "knn", "--isl-hpe", "0", "--isl-keep"],
    "knn, small P": [
        *MINED,
        "--miner",
        "knn",
        "--isl-max-positives",
        "2",
        "--fast",
        "--no-compile",
        "--amp",
        "off",
    ],
    "gan": [*MINED, *GAN],
    "gan, fixed radius": [*MINED, *GAN, "--isl-radius-mode", "fixed", "--isl-loss", "meanlog"],
    "entropy": [*MINED, "--miner", "entropy"],
    "diffusion": [*MINED, "--miner", "diffusion"],
    "cluster": [*MINED, "--miner", "cluster"],
    "average, rounds": ["--miner", "average", "--isl-rounds", "3", "--isl-trust", "auto"],
    "oracle": [*MINED, "--miner", "oracle", "--research-labels"],
    "bank": ["--objective", "bank"],
    "bank, knn, half": ["--objective", "bank", *MINED, "--miner", "knn", "--isl-half-bank"],
    "bank, gan": ["--objective", "bank", *MINED, *GAN],
    "rotnet": ["--objective", "rotnet"],
}
NAMES = (
    "epoch",
    "step",
    "loss",
    "isl",
    "hpe",
    "acc1",
    "lr",
    "round",
    "edges",
    "precision",
    "precision_estimate",
)


def losses(flags: list[str]) -> list[dict]:
    """What a run's metrics.jsonl says of its losses, rates and sets."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        code = main_moco_isl.main([*DIGITS, *flags, "--out", folder])
        assert code == 0, f"{flags} ended with exit code {code}"
        lines = [
            json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()
        ]
    return [{name: line[name] for name in NAMES if name in line} for line in lines]


def main() -> int:
    torch.set_num_threads(1)
    what, path = sys.argv[1:]
    found = {name: losses(flags) for name, flags in RUNS.items()}
    if what == "write":
        Path(path).write_text(json.dumps(found))
        print(f"wrote {sum(map(len, found.values()))} lines of {len(found)} runs to {path}")
        return 0
    before = json.loads(Path(path).read_text())
    changed = [name for name in RUNS if json.loads(json.dumps(found[name])) != before[name]]
    for name in changed:
        first = next(
            (pair for pair in zip(before[name], found[name]) if pair[0] != pair[1]),
            ("fewer lines", "or more"),
        )
        print(f"{name}: {first[0]}\n  is now {first[1]}")
    print(
        f"{len(RUNS) - len(changed)} of {len(RUNS)} runs are the same bit for bit,"
        f" {sum(map(len, found.values()))} lines"
    )
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
