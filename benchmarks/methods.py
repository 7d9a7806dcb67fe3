"""Every method of the paper's comparison on the embedded digits, in the demo's setting, as one
table.

    python -m benchmarks.methods                # 3 seeds, a process a core
    python -m benchmarks.methods --go-on        # after an interruption: runs that ended are not run
    again

Each objective is trained for 60 epochs without mining, then continued for 60 equal ones with each
miner: a round every 20 epochs, 10 positives an image. Queue objective: MoCo v2, positives by the
mean of logs, as in `make demo`. Bank objective: Instance, Eq. 5, without and with hard positive
enhancement (HPE, Eq. 6), no MLP head, as the paper. Its SGD has no momentum here: with 12 steps an
epoch the random rows of the first epochs otherwise draw all features into one point, and the loss
stays at log M. RotNet: 60 epochs. Writes benchmarks/results/methods-digits-cpu.json and
methods-digits-gains-cpu.json; runs go to runs/methods/.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks import common, demo
from moco_isl import data, files

OUT = Path("runs/methods")
BANK = ["--objective", "bank", "--no-mlp", "--isl-loss", "logsum", "--momentum", "0"]
# of the start and of what follows, one third as in the demo
BANK_LR = (["--lr", "0.03"], ["--lr", "0.01"])
FAMILIES = {  # what it is called without mining, flags of its start, flags of what follows
    "queue": ("MoCo v2", [], ["--isl-hpe", "0"]),
    "bank": ("Instance", *([*BANK, "--isl-hpe", "0", *lr] for lr in BANK_LR)),
    "bank-hpe": ("Instance + HPE", *([*BANK, "--isl-hpe", "0.5", *lr] for lr in BANK_LR)),
}
STARTS = {
    **{family: flags for family, (_, flags, _) in FAMILIES.items()},
    "rotnet": ["--objective", "rotnet", "--no-mlp"],
}
MINERS = {
    "gan": "ISL (gan)",
    "cluster": "LA (cluster)",
    "diffusion": "PAD (diffusion)",
    "entropy": "AND (entropy)",
    "knn": "nearest (knn)",
    "none": "no mining",
}  # the longest first, so that processes end together


def one_run(family: str, miner: str | None, seed: int) -> dict:
    """Figures of one run: of the 60 epochs that all others of a family start from (miner None), or
    of 60 more.
    """
    name = f"{family}-{miner or 'start'}"
    done = OUT / f"{name}-{seed}.json"
    if done.exists():
        return json.loads(done.read_text())
    torch.set_num_threads(1)
    shutil.rmtree(demo.run_folder(name, seed, OUT), ignore_errors=True)
    if miner is None:
        flags = [*demo.PRETRAIN, *STARTS[family]]
    else:
        init = demo.run_folder(f"{family}-start", seed, OUT) / "checkpoint_last.pth.tar"
        flags = [
            *demo.CONTINUE,
            "--init",
            str(init),
            "--miner",
            miner,
            *(demo.MINING if miner != "none" else []),
            *FAMILIES[family][2],
        ]
    train = data.build_dataset("digits")
    val = data.build_dataset("digits", split="val")
    start, cpu = time.time(), time.process_time()
    with (
        open(OUT / f"{name}-{seed}.log", "w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        encoder, rounds = demo.pretrain(name, seed, *flags, folder=OUT)
    figures = (
        demo.judge(encoder, train, val)
        | demo.mined(rounds)
        | {
            "seconds": time.time() - start,
            "cpu_seconds": time.process_time() - cpu,
        }
    )
    files.write_text(json.dumps(figures), done)
    return figures


def grid(seeds: int, processes: int) -> list[dict[str, dict]]:
    """One dict of row -> figures a seed."""
    found = {}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        starts = [(family, None, seed) for family in STARTS for seed in range(seeds)]
        others = [
            (family, miner, seed)
            for miner in MINERS
            for family in FAMILIES
            for seed in range(seeds)
        ]
        for jobs in (starts, others):
            for job, figures in zip(jobs, pool.map(one_run, *zip(*jobs))):
                found[job] = figures
                print(
                    f"{' '.join(map(str, job))}: kNN {figures['knn']:.1f}, 1-shot"
                    f" {figures['one_shot']:.1f}, {figures['seconds']:.0f} s",
                    flush=True,
                )
    train = data.build_dataset("digits")
    val = data.build_dataset("digits", split="val")
    tables = []
    for seed in range(seeds):
        rows = {
            "raw pixels": demo.judge(None, train, val),
            "Random (untrained)": demo.judge(demo.untrained(seed), train, val),
            "RotNet, 60 epochs": found["rotnet", None, seed],
        }
        for family, (title, *_) in FAMILIES.items():
            rows[f"{title}, 60 epochs"] = found[family, None, seed]
            for miner in reversed(MINERS):
                rows[f"  {title} + 60, {MINERS[miner]}"] = found[family, miner, seed]
        tables.append(rows)
    return tables


def gains(seeds: list[dict[str, dict]], family: str, miner: str) -> str:
    """Points that a miner adds to the same continuation without mining, kNN / 1-shot, paired by
    seed.
    """
    title = FAMILIES[family][0]
    row = f"  {title} + 60, {MINERS[miner]}"
    base = f"  {title} + 60, {MINERS['none']}"
    differences = [[s[row][c] - s[base][c] for s in seeds] for c in ("knn", "one_shot")]
    return " / ".join(common.spread(x, "+") for x in differences)


def results(seeds: list[dict[str, dict]], note: str) -> list[common.Result]:
    """The table of all runs and that of the gains, in the common form."""
    on = (
        f"on the UCI digits (1,437 to train on, 360 held out), n = {len(seeds)} seeds, mean ±"
        " standard deviation"
    )
    whole = common.Result(
        "methods-digits",
        f"Every method {on}",
        torch.device("cpu"),
        [("what", ""), *demo.COLUMNS.items()],
    )
    for name in seeds[0]:
        whole.add(
            {
                "what": name.strip(),
                **{column: demo.figure(seeds, name, column) for column in demo.COLUMNS},
            }
        )
    whole.note(
        "kNN: weighted, k 50. 1-shot: one labelled image a class, mean of 20 draws. Precision: of"
        " the last round's sets, beside that of each image's own nearest and of all pairs ranked,"
        " at equal size."
    )
    gain = common.Result(
        "methods-digits-gains",
        "Points that mining adds to the same 60 epochs without, kNN / 1-shot, paired by seed,"
        f" {on}",
        torch.device("cpu"),
        [("what", ""), *((family, title) for family, (title, *_) in FAMILIES.items())],
    )
    for miner in reversed(MINERS):
        if miner != "none":
            gain.add(
                {
                    "what": MINERS[miner],
                    **{family: gains(seeds, family, miner) for family in FAMILIES},
                }
            )
    for result in (whole, gain):
        result.note(note)
    return [whole, gain]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="runs side by side (a process a core)"
    )
    parser.add_argument("--go-on", action="store_true", help="keep the runs that have ended")
    parser.add_argument(
        "--out", metavar="DIR", help="where the JSON goes (default: benchmarks/results)"
    )
    args = parser.parse_args()
    start, load = time.time(), os.getloadavg()[0]
    if not args.go_on:
        shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True, exist_ok=True)
    seeds = grid(args.seeds, args.processes)
    cpu_seconds = sum(row.get("cpu_seconds", 0) for rows in seeds for row in rows.values())
    note = (
        f"{cpu_seconds:,.0f} s of CPU time in all runs, one thread each; {time.time() - start:,.0f}"
        f" s of wall here, load {load:.1f} before"
    )
    for result in results(seeds, note):
        print(f"  written: {result.write(args.out)}")


if __name__ == "__main__":
    main()
