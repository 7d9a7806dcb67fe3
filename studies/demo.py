"""make demo: MoCo v2 on the embedded digits, then three equal continuations: without mining, with
kNN mining, with GAN mining.

Prints a table, true whatever it shows, and writes it to runs/demo/table.json. Only the first GPU or
the CPU is used.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import main_moco_isl
from benchmarks import common
from moco_isl import data, files
from moco_isl.builder import add_mlp
from moco_isl.encoders import build_encoder, extract_features
from moco_isl.evaluation.knn import few_shot, weighted_knn
from moco_isl.run import checkpoint

OUT = Path("runs/demo")
COMMON = [
    "--dataset",
    "digits",
    "-a",
    "digits",
    "--mlp",
    "--moco-dim",
    "64",
    "--moco-k",
    "512",
    "--moco-t",
    "0.1",
    "--moco-m",
    "0.99",
    "-b",
    "128",
    "-j",
    "0",
    "--wd",
    "5e-4",
    "--cos",
    "--progress",
    "bar",
    "--keep",
    "1",
    "-p",
    "12",
]
PRETRAIN = ["--epochs", "60", "--lr", "0.06"]
CONTINUE = ["--epochs", "60", "--lr", "0.02"]
MINING = [
    "--isl-every",
    "20",
    "--isl-budget",
    "10",
    "--isl-loss",
    "meanlog",
    "--isl-hpe",
    "0",
    "--isl-gan-iters",
    "3000",
    "--isl-gan-min-iters",
    "2000",
]
COLUMNS = {
    "knn": "kNN %",
    "one_shot": "1-shot %",
    "size": "set size",
    "precision": "precision",
    "own_nearest": "own nearest",
    "all_pairs": "all pairs",
}


def pretrain(
    name: str, seed: int, *flags: str, folder: Path = OUT
) -> tuple[torch.nn.Module, list[dict]]:
    """One run of the main script in <folder>/<name>-<seed>: its query encoder, and its rounds of
    mining.
    """
    out = run_folder(name, seed, folder)
    print(f"\n{name}, seed {seed}", flush=True)
    code = main_moco_isl.main([*COMMON, "--seed", str(seed), "--out", str(out), *flags])
    if code:
        sys.exit(code)
    encoder = untrained(seed, mlp="--no-mlp" not in flags)
    state = checkpoint.load(out / "checkpoint_last.pth.tar")["state_dict"]
    encoder.load_state_dict(
        {
            n.removeprefix("module.encoder_q."): v
            for n, v in state.items()
            if n.startswith("module.encoder_q.")
        }
    )
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return encoder, [line for line in lines if line["kind"] == "round"]


def run_folder(name: str, seed: int, folder: Path = OUT) -> Path:
    return folder / f"{name}-{seed}"


def untrained(seed: int, mlp: bool = True) -> torch.nn.Module:
    torch.manual_seed(seed)
    encoder = build_encoder("digits", 64)
    if mlp:
        add_mlp(encoder)
    return encoder


def judge(encoder: torch.nn.Module | None, train, val) -> dict[str, float]:
    """Weighted kNN (k 50, T 0.1) and 1-shot accuracy on the held-out split; encoder None: raw
    pixels.
    """
    bank, queries = (_features(encoder, dataset) for dataset in (train, val))
    found = weighted_knn(queries, bank, train.labels, k=50, T=0.1)
    one_shot, _ = few_shot(bank, train.labels, queries, val.labels, shots=1, draws=20, seed=0)
    return {"knn": (found == val.labels).float().mean().item() * 100, "one_shot": one_shot * 100}


def _features(encoder: torch.nn.Module | None, dataset) -> torch.Tensor:
    transform = data.get_eval_transform("digits", data.native_size(dataset))
    loader = data.eval_loader(dataset, transform=transform, batch_size=512)
    if encoder is not None:
        return extract_features(encoder, loader, len(dataset), "cpu")
    return F.normalize(torch.cat([images[:, :1].flatten(1) for images, _ in loader]), dim=1)


def one_seed(seed: int, train, val) -> dict[str, dict]:
    """Row name -> figures of that row."""
    rows = {"raw pixels": judge(None, train, val), "untrained": judge(untrained(seed), train, val)}
    moco, _ = pretrain("moco", seed, *PRETRAIN)
    rows["MoCo v2, 60 epochs"] = judge(moco, train, val)
    init = ["--init", str(run_folder("moco", seed) / "checkpoint_last.pth.tar")]
    for miner, title in (
        ("none", "+ 60, no mining"),
        ("knn", "+ 60, kNN mining"),
        ("gan", "+ 60, GAN mining"),
    ):
        encoder, rounds = pretrain(
            miner, seed, *CONTINUE, *init, "--miner", miner, *(MINING if miner != "none" else [])
        )
        rows[title] = judge(encoder, train, val) | mined(rounds)
    return rows


def mined(rounds: list[dict]) -> dict:
    """Figures of the last of some rounds of mining."""
    if not rounds:
        return {}
    last = rounds[-1]
    return {
        "size": last["mean_size"],
        "precision": last["precision"],
        "own_nearest": last["precision_own_nearest"],
        "all_pairs": last["precision_all_pairs"],
        "accepted": sum(r["accepted"] for r in rounds),
        "rounds": len(rounds),
    }


def table(seeds: list[dict[str, dict]]) -> str:
    lines = [" " * 22 + "".join(f"{title:>16}" for title in COLUMNS.values())]
    for name in seeds[0]:
        lines.append(
            f"{name:22}" + "".join(f"{figure(seeds, name, column):>16}" for column in COLUMNS)
        )
    return "\n".join(lines)


def figure(seeds: list[dict[str, dict]], name: str, column: str) -> str:
    """Mean and standard deviation over the seeds of one figure; '' where that row has none."""
    values = [seed[name][column] for seed in seeds if seed[name].get(column) is not None]
    return (
        common.spread(
            values, digits=3 if column in ("precision", "own_nearest", "all_pairs") else 1
        )
        if values
        else ""
    )


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
    train = data.build_dataset("digits")
    val = data.build_dataset("digits", split="val")
    seeds = [one_seed(seed, train, val) for seed in range(args.seeds)]
    text = table(seeds)
    seconds = time.time() - start
    facts = {
        "command": f"make demo SEEDS={args.seeds}",
        "seconds": seconds,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "seeds": seeds,
    }
    files.write_text(json.dumps(facts, indent=1) + "\n", OUT / "table.json")
    spread = (
        f"mean ± standard deviation of n = {args.seeds} seeds"
        if args.seeds > 1
        else "n = 1 seed; make demo SEEDS=3 shows the spread"
    )
    print(
        f"\nUCI digits, 1,437 images to train on, 360 held out; {spread}; {seconds:.0f} s. Files in"
        f" {OUT}/\n\n{text}\n"
    )
    print(
        "kNN: weighted, k 50. 1-shot: one labelled image a class, mean of 20 draws. Last round of"
        " mining: set size, share of true labels in the sets,\nand beside it that of each image's"
        " own nearest and of all pairs ranked, at equal size."
    )


if __name__ == "__main__":
    main()
