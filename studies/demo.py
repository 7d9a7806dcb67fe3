"""make demo: MoCo v2 on the embedded digits, then three equally long continuations.

They are without mining, with kNN mining and with GAN mining.

Prints a table, whatever it shows, and writes it to runs/demo/table.json. Only the first GPU or the
CPU is used.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from torch import nn

import main_moco_isl
from benchmarks import common
from moco_isl import files
from moco_isl.builder import add_mlp
from moco_isl.encoders import build_encoder
from studies.figures import HERE, Judge, metrics

OUT = Path("runs/demo")
DIGITS = ["--config", str(HERE / "flags_digits.yaml")]
PRETRAIN = ["--epochs", "60", "--lr", "0.06"]
CONTINUE = ["--epochs", "60", "--lr", "0.02"]
MINING = "--isl-every 20 --isl-budget 10 --isl-loss meanlog --isl-hpe 0".split()
GAN = "--isl-gan-iters 3000 --isl-gan-min-iters 2000".split()
CONTINUATIONS = {  # title -> flags
    "+ 60, no mining": ["--miner", "none"],
    "+ 60, kNN mining": ["--miner", "knn", *MINING],
    "+ 60, GAN mining": ["--miner", "gan", *MINING, *GAN],
}
COLUMNS = {  # key -> heading, digits behind the point
    "knn": ("kNN %", 1),
    "one_shot": ("1-shot %", 1),
    "size": ("set size", 1),
    "reach": ("reach", 3),
    "found": ("same-class found", 3),
    "precision": ("precision", 3),
    "own_nearest": ("own nearest", 3),
    "all_pairs": ("all pairs", 3),
}


class Pixels(nn.Module):
    """An encoder that returns the pixels of the first channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :1].flatten(1)


def untrained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    encoder = build_encoder("digits", 64)
    add_mlp(encoder)
    return encoder


def pretrain(out: Path, seed: int, flags: list[str]) -> Path:
    """Run the main script in `out`; its last checkpoint. Exits where the run fails."""
    print(f"\n{out.name}", flush=True)
    own = ["--seed", str(seed), "--progress", "bar", "--out", str(out)]
    code = main_moco_isl.main([*DIGITS, *own, *flags])
    if code:
        sys.exit(code)
    return out / "checkpoint_last.pth.tar"


def one_seed(seed: int, judge: Judge) -> dict[str, dict]:
    """Row name -> figures of that row."""
    rows = {
        "raw pixels": judge.figures(*judge.features_by(Pixels())),
        "untrained": judge.figures(*judge.features_by(untrained(seed))),
    }
    start = pretrain(OUT / f"moco-{seed}", seed, PRETRAIN)
    rows["MoCo v2, 60 epochs"] = judge(start)
    for title, flags in CONTINUATIONS.items():
        out = OUT / f"{flags[1]}-{seed}"
        file = pretrain(out, seed, [*CONTINUE, "--init", str(start), *flags])
        rows[title] = judge(file) | mined(out)
    return rows


def mined(out: Path) -> dict:
    """Figures of a run's last round of mining; {} where it had none."""
    rounds = [line for line in metrics(out) if line["kind"] == "round"]
    if not rounds:
        return {}
    last = rounds[-1]
    return {
        "size": last["mean_size"],
        "reach": last["reach"],
        "found": last["same_class_found"],
        "precision": last["precision"],
        "own_nearest": last["precision_own_nearest"],
        "all_pairs": last["precision_all_pairs"],
    }


def table(seeds: list[dict[str, dict]]) -> str:
    lines = [" " * 22 + "".join(f"{heading:>18}" for heading, _ in COLUMNS.values())]
    for name in seeds[0]:
        cells = [cell(seeds, name, column) for column in COLUMNS]
        lines.append(f"{name:22}" + "".join(f"{text:>18}" for text in cells))
    return "\n".join(lines)


def cell(seeds: list[dict[str, dict]], name: str, column: str) -> str:
    """Mean and standard deviation over the seeds of one figure; "" where that row has none."""
    values = [seed[name][column] for seed in seeds if seed[name].get(column) is not None]
    return common.spread(values, digits=COLUMNS[column][1]) if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="how many seeds; more than one gives mean and standard deviation",
    )
    args = parser.parse_args()
    start = time.time()
    shutil.rmtree(OUT, ignore_errors=True)
    judge = Judge(DIGITS, 50, "cpu")
    seeds = [one_seed(seed, judge) for seed in range(args.seeds)]
    seconds = time.time() - start
    facts = {
        "command": f"make demo SEEDS={args.seeds}",
        "seconds": seconds,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "seeds": seeds,
    }
    files.write_text(json.dumps(facts, indent=1) + "\n", OUT / "table.json")
    spread = "n = 1 seed; make demo SEEDS=3 shows the spread"
    if args.seeds > 1:
        spread = f"mean ± standard deviation of n = {args.seeds} seeds"
    print(
        f"\nUCI digits, 1,437 images to train on, 360 held out; {spread}; {seconds:.0f} s. Files in"
        f" {OUT}/\n\n{table(seeds)}\n\nkNN: weighted, k 50. 1-shot: one labelled image a class,"
        " mean of 20 draws. Last round of mining: set size, share of true labels in the\nsets, and"
        " beside it that of each image's own nearest and of all pairs ranked, at equal size."
    )


if __name__ == "__main__":
    main()
