"""Every method of the paper's comparison on the embedded digits, in the demo's setting, as one table.

    python -m benchmarks.methods                # 3 seeds, a process a core
    python -m benchmarks.methods --go-on        # after an interruption: runs that ended are not run again

Each objective is trained for 60 epochs without mining, then continued for 60 equal ones with each miner: a round every 20 epochs,
10 positives an image. Queue objective: MoCo v2, positives by the mean of logs, as in `make demo`. Bank objective: Instance, Eq. 5,
without and with hard positive enhancement (HPE, Eq. 6), no MLP head, as the paper. Its SGD has no momentum here: with 12 steps an epoch
the random rows of the first epochs otherwise draw all features into one point, and the loss stays at log M.
RotNet: 60 epochs. Writes benchmarks/results/methods_digits.json; runs go to runs/methods/.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks import demo
from moco_isl import data

OUT = Path("runs/methods")
RESULT = Path(__file__).parent / "results" / "methods_digits.json"
BANK = ["--objective", "bank", "--no-mlp", "--isl-loss", "logsum", "--momentum", "0"]
BANK_LR = (["--lr", "0.03"], ["--lr", "0.01"])  # of the start and of what follows, one third as in the demo
FAMILIES = {  # what it is called without mining, flags of its start, flags of what follows
    "queue": ("MoCo v2", [], ["--isl-hpe", "0"]),
    "bank": ("Instance", *([*BANK, "--isl-hpe", "0", *lr] for lr in BANK_LR)),
    "bank-hpe": ("Instance + HPE", *([*BANK, "--isl-hpe", "0.5", *lr] for lr in BANK_LR)),
}
STARTS = {**{family: flags for family, (_, flags, _) in FAMILIES.items()}, "rotnet": ["--objective", "rotnet", "--no-mlp"]}
MINERS = {"gan": "ISL (gan)", "cluster": "LA (cluster)", "diffusion": "PAD (diffusion)", "entropy": "AND (entropy)", "knn": "nearest (knn)",
          "none": "no mining"}  # the longest first, so that processes end together  # fmt: skip


def one_run(family: str, miner: str | None, seed: int) -> dict:
    """Figures of one run: of the 60 epochs that all others of a family start from (miner None), or of 60 more."""
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
        flags = [*demo.CONTINUE, "--init", str(init), "--miner", miner, *(demo.MINING if miner != "none" else []), *FAMILIES[family][2]]
    train, val = data.build_dataset("digits"), data.build_dataset("digits", split="val")
    start, cpu = time.time(), time.process_time()
    with open(OUT / f"{name}-{seed}.log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        encoder, rounds = demo.pretrain(name, seed, *flags, folder=OUT)
    figures = demo.judge(encoder, train, val) | demo.mined(rounds) | {"seconds": time.time() - start, "cpu_seconds": time.process_time() - cpu}
    done.write_text(json.dumps(figures))
    return figures


def grid(seeds: int, processes: int) -> list[dict[str, dict]]:
    """One dict of row -> figures a seed."""
    found = {}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        starts = [(family, None, seed) for family in STARTS for seed in range(seeds)]
        others = [(family, miner, seed) for miner in MINERS for family in FAMILIES for seed in range(seeds)]
        for jobs in (starts, others):
            for job, figures in zip(jobs, pool.map(one_run, *zip(*jobs))):
                found[job] = figures
                print(f"{' '.join(map(str, job))}: kNN {figures['knn']:.1f}, 1-shot {figures['one_shot']:.1f}, {figures['seconds']:.0f} s", flush=True)
    train, val = data.build_dataset("digits"), data.build_dataset("digits", split="val")
    tables = []
    for seed in range(seeds):
        rows = {"raw pixels": demo.judge(None, train, val), "Random (untrained)": demo.judge(demo.untrained(seed), train, val),
                "RotNet, 60 epochs": found["rotnet", None, seed]}  # fmt: skip
        for family, (title, *_) in FAMILIES.items():
            rows[f"{title}, 60 epochs"] = found[family, None, seed]
            for miner in reversed(MINERS):
                rows[f"  {title} + 60, {MINERS[miner]}"] = found[family, miner, seed]
        tables.append(rows)
    return tables


def gains(seeds: list[dict[str, dict]]) -> str:
    """Points that each miner adds to the same continuation without mining, by kNN and 1-shot, paired by seed."""
    lines = [f"{'':17}" + "".join(f"{title:>34}" for title, *_ in FAMILIES.values())]
    for miner in reversed(MINERS):
        if miner == "none":
            continue
        cells = []
        for title, *_ in FAMILIES.values():
            row, base = f"  {title} + 60, {MINERS[miner]}", f"  {title} + 60, {MINERS['none']}"
            differences = {c: [s[row][c] - s[base][c] for s in seeds] for c in ("knn", "one_shot")}
            spread = lambda x: f" ± {statistics.stdev(x):.1f}" if len(x) > 1 else ""  # noqa: E731
            cells.append(" / ".join(f"{statistics.mean(x):+.1f}{spread(x)}" for x in differences.values()))
        lines.append(f"{MINERS[miner]:17}" + "".join(f"{cell:>34}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs side by side (a process a core)")
    parser.add_argument("--go-on", action="store_true", help="keep the runs that have ended")
    parser.add_argument("--result", type=Path, default=RESULT, metavar="FILE.json")
    args = parser.parse_args()
    start, load = time.time(), os.getloadavg()[0]
    if not args.go_on:
        shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True, exist_ok=True)
    seeds = grid(args.seeds, args.processes)
    seconds, cpu_seconds = time.time() - start, sum(row.get("cpu_seconds", 0) for rows in seeds for row in rows.values())
    facts = {"command": "python -m benchmarks.methods " + " ".join(sys.argv[1:]), "seconds": seconds, "cpu_seconds": cpu_seconds,
             "load_before": load, "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__,
             "n": args.seeds, "seeds": seeds}  # fmt: skip
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.result.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"\nUCI digits, 1,437 images to train on, 360 held out; n = {args.seeds} seeds, mean ± standard deviation; {seconds:.0f} s, "
          f"{cpu_seconds:.0f} s of CPU time in all runs\n\n{demo.table(seeds)}\n")
    print(f"Points over the same 60 epochs without mining, kNN / 1-shot, paired by seed:\n\n{gains(seeds)}\n\nWritten to {args.result}")


if __name__ == "__main__":
    main()
