"""make demo: MoCo v2 on the embedded digits, then three equally long continuations.

They are without mining, with the recommended mining, and with the paper's GAN. Runs go side by side
on the cores. Prints a table, whatever it shows, and what mining added; files are in runs/demo. Only
the first GPU or the CPU is used.
"""

import argparse
import contextlib
import json
import multiprocessing
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import main_moco_isl
from benchmarks import common
from moco_isl import files
from moco_isl.builder import add_mlp
from moco_isl.encoders import build_encoder
from moco_isl.evaluation.results import write_results
from moco_isl.report.__main__ import main as report
from studies.figures import HERE, ROUND, Judge, metrics, of_round

OUT = Path("runs/demo")
# the setting that README and docs/mining.md recommend
RECOMMENDED = "--miner average --isl-budget auto"
# as wide for the paper's GAN, whose radius decides; its networks go on from round to round
GAN = (
    "--miner gan --isl-budget 50 --isl-candidates 60 --isl-radius 0.2 --isl-threshold 0.3"
    " --isl-gan-iters 1200 --isl-gan-min-iters 1200"
)
DIGITS = ["--config", str(HERE / "flags_digits.yaml")]
FAST = "--fast --no-compile --channels-last --save-epochs 100".split()
EPOCHS, MORE = 60, 30  # of MoCo v2 and of each continuation
PRETRAIN = f"--epochs {EPOCHS} --lr 0.06".split()
CONTINUE = f"--epochs {MORE} --lr 0.02".split()
MINING = "--isl-every 10".split()  # three rounds
START, PLAIN, MINED, PAPER = "MoCo v2", "+ no mining", "+ recommended", "+ GAN"
CONTINUATIONS = {  # row -> folder, flags; the longest first
    PAPER: ("gan", [*MINING, *GAN.split()]),
    MINED: ("recommended", [*MINING, *RECOMMENDED.split()]),
    PLAIN: ("none", ["--miner", "none"]),
}
ROWS = ["raw pixels", "untrained", START, PLAIN, MINED, PAPER]
COLUMNS = {  # key -> heading, digits behind the point
    "knn": ("kNN %", 1),
    "one_shot": ("1-shot %", 1),
    "size": (ROUND["size"][0], 1),
    **{
        key: (ROUND[key][0], 3)
        for key in ("reach", "found", "precision", "own_nearest", "all_pairs")
    },
}
K = 50  # neighbours of kNN


class Pixels(nn.Module):
    """An encoder that returns the pixels of the first channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :1].flatten(1)


def untrained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    encoder = build_encoder("digits", 64)
    add_mlp(encoder)
    return encoder


# ---- one run, in a process of its own ------------------------------------------------------------


def train(out: Path, flags: list[str], threads: int) -> dict[str, float]:
    """Run the main script in `out`, with what it says in a file beside it; the figures of its row.

    The figures go into results.json too, for the report. Exits where the run fails.
    """
    torch.set_num_threads(threads)
    log = out.with_suffix(".log")
    with open(log, "w") as file, contextlib.redirect_stdout(file):
        with contextlib.redirect_stderr(file):
            code = main_moco_isl.main([*DIGITS, *FAST, *flags, "--out", str(out)])
    if code:
        last = log.read_text().splitlines()[-1:]
        raise RuntimeError(f"{out} ended with exit code {code}: {' '.join(last)}")
    row = Judge(DIGITS, K, "cpu")(out / "checkpoint_last.pth.tar")
    lines = metrics(out)
    facts = {
        "dataset": "digits",
        "protocol": "val",
        "epoch": sum(line["kind"] == "epoch" for line in lines),
        "results": [{"feature": "output", "k": K, "T": 0.1, "top1": row["knn"]}],
        "few_labels": [{"shots": 1, "top1": row["one_shot"]}],
    }
    write_results(out, "results", facts)
    return row | mined(lines)


def mined(lines: list[dict]) -> dict:
    """Figures of a run's last round of mining; {} where it had none."""
    rounds = [line for line in lines if line["kind"] == "round"]
    return of_round(rounds[-1]) if rounds else {}


# ---- all runs ------------------------------------------------------------------------------------


def train_all(seeds: int) -> list[dict[str, dict]]:
    """Row -> figures, for each seed. As many runs at a time as there are cores."""
    cores = common.machine(torch.device("cpu"))["cores"]
    workers = min(cores, len(CONTINUATIONS) * seeds)
    epochs = (EPOCHS + MORE * len(CONTINUATIONS)) * seeds
    place = lambda name, seed: OUT / f"{name}-{seed}"

    def submit(row: str, seed: int, name: str, flags: list[str], together: int) -> None:
        threads = max(1, cores // min(together * seeds, workers))
        future = pool.submit(train, place(name, seed), [*flags, "--seed", str(seed)], threads)
        running[future] = row, seed

    running = {}
    with processes(workers) as pool:
        for seed in range(seeds):
            submit(START, seed, "moco", PRETRAIN, 1)
        judge = Judge(DIGITS, K, "cpu")
        rows = [without_training(judge, seed) for seed in range(seeds)]
        with tqdm(total=epochs, unit="epoch", disable=None) as bar:  # on a terminal only
            while running:
                ended = wait(running, timeout=1, return_when=FIRST_COMPLETED).done
                bar.update(epochs_done() - bar.n)
                for future in ended:
                    row, seed = running.pop(future)
                    found = rows[seed][row] = future.result()
                    bar.write(f"seed {seed}, {row}: kNN {found['knn']:.1f} %")
                    if row == START:
                        start = place("moco", seed) / "checkpoint_last.pth.tar"
                        for row, (name, flags) in CONTINUATIONS.items():
                            flags = [*CONTINUE, "--init", str(start), *flags]
                            submit(row, seed, name, flags, len(CONTINUATIONS))
    return rows


@contextlib.contextmanager
def processes(n: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of n processes; an error ends them, runs in them too."""
    context = multiprocessing.get_context("forkserver")
    # torch is imported once for all of them; each of them imports this module itself
    context.set_forkserver_preload(["main_moco_isl", "studies.figures"])
    pool = ProcessPoolExecutor(
        n,
        mp_context=context,
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # a run has a handler of its own
    )
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def without_training(judge: Judge, seed: int) -> dict[str, dict]:
    return {
        "raw pixels": judge.figures(*judge.features_by(Pixels())),
        "untrained": judge.figures(*judge.features_by(untrained(seed))),
    }


def epochs_done() -> int:
    logs = OUT.glob("*/metrics.jsonl")
    return sum(log.read_text().count('"kind": "epoch"') for log in logs)


# ---- what came out -------------------------------------------------------------------------------


def table(seeds: list[dict[str, dict]]) -> str:
    lines = [" " * 20 + "".join(f"{heading:>18}" for heading, _ in COLUMNS.values())]
    for name in ROWS:
        cells = [cell(seeds, name, column) for column in COLUMNS]
        lines.append(f"{name:20}" + "".join(f"{text:>18}" for text in cells))
    return "\n".join(line.rstrip() for line in lines)


def cell(seeds: list[dict[str, dict]], name: str, column: str) -> str:
    """Mean and standard deviation over the seeds of one figure; "" where that row has none."""
    values = [seed[name][column] for seed in seeds if seed[name].get(column) is not None]
    return common.spread(values, digits=COLUMNS[column][1]) if values else ""


def sentence(seeds: list[dict[str, dict]]) -> str:
    """What the recommended mining added to equal epochs: means of the seeds' differences."""
    gain = lambda key: common.spread([seed[MINED][key] - seed[PLAIN][key] for seed in seeds])
    return (
        f"Mining added {gain('one_shot')} points of 1-shot and {gain('knn')} of kNN to equal epochs"
        f" (n = {len(seeds)})."
    )


def write_report() -> None:
    """A report about the continuations of the first seed, or the command that makes it."""
    runs = [str(OUT / f"{name}-0") for name in ("recommended", "gan", "none")]
    flags = [*runs, "--labels", "--out", str(OUT / "report.html")]
    if report(flags):
        print(f"The report of these runs: python -m moco_isl.report {' '.join(flags)}")


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
    OUT.mkdir(parents=True)
    try:
        seeds = train_all(args.seeds)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("=> interrupted: make demo begins anew")
    seconds = time.time() - start
    facts = {
        "command": f"make demo SEEDS={args.seeds}",
        "recommended": RECOMMENDED,
        "seconds": seconds,
        "machine": common.machine(torch.device("cpu")),
        "torch": torch.__version__,
        "seeds": seeds,
    }
    files.write_text(json.dumps(facts, indent=1) + "\n", OUT / "table.json")
    spread = "n = 1 seed; make demo SEEDS=3 shows the spread"
    if args.seeds > 1:
        spread = f"mean ± standard deviation of n = {args.seeds} seeds"
    print(
        f"\nUCI digits, 1,437 images to train on, 360 held out; {spread}; {seconds:.0f} s.\n\n"
        f"{table(seeds)}\n\n"
        f"MoCo v2: {EPOCHS} epochs; +: {MORE} more. kNN: weighted, k {K}. 1-shot: one labelled"
        " image a class,\nmean of 20 draws. Last round of mining: set size, share of true labels in"
        " the sets, and beside it that\nof each image's own nearest and of all pairs ranked, at"
        f" equal size.\nRecommended: {RECOMMENDED}\n\n{sentence(seeds)}"
    )
    write_report()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
