"""Do pretrained features help to detect objects? Scenes of the digits, with nothing at hand.

    python -m studies.detection_digits

A small ResNet is pretrained on the digits: MoCo v2, and from it two continuations of equal epochs,
without mining and with the recommended mining. Each is then trained to detect, by the command that
users have (`python -m moco_isl.evaluation.detection FILE --data digits`), beside the same network
from scratch, for few iterations and for more. Means ± standard deviations of n seeds, each of which
pretrains and detects anew; the scenes are the same for all. A run that has ended is not run again.
Runs go side by side on the cores, with one thread each.
"""

import argparse
import contextlib
import json
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import torch

import main_moco_isl
from benchmarks import common
from moco_isl.errors import BadInput
from moco_isl.evaluation.detection import scenes
from moco_isl.evaluation.detection.command import main as detect
from moco_isl.evaluation.detection.tuning import AP
from moco_isl.run.folder import LAST
from studies.demo import RECOMMENDED, processes
from studies.figures import HERE, Judge, Result, results_of

ARCH = "resnet18w8"
OUT = Path("runs/detection_digits")
EPOCHS, MORE = 60, 30  # of MoCo v2 and of each continuation
ITERATIONS = (100, 300)  # of detection
PRETRAIN = ["--config", str(HERE / "flags_digits.yaml"), "-a", ARCH]
FLAGS = {
    "moco": "--lr 0.06",
    "none": "--lr 0.02 --miner none",
    "isl": f"--lr 0.02 --isl-every 10 {RECOMMENDED}",
}
SCRATCH = "from scratch"
ROWS = {  # -> the run that it starts from
    SCRATCH: None,
    "MoCo v2": "moco",
    "MoCo v2, going on without mining": "none",
    "MoCo v2 + ISL": "isl",
}
K = 50  # neighbours of kNN


def quietly(main, argv: list[str], out: Path) -> None:
    """Run a command in `out`, with what it says in a file beside it. Raises where it fails."""
    torch.set_num_threads(1)
    log = out.with_suffix(".log")
    with open(log, "a") as file, contextlib.redirect_stdout(file):
        with contextlib.redirect_stderr(file):
            code = main([*argv, "--out", str(out), "--resume", "auto"])
    if code:
        last = log.read_text().splitlines()[-1:]
        raise RuntimeError(f"{out} ended with exit code {code}: {' '.join(last)}")


def pretrain(out: Path, name: str, epochs: int, seed: int) -> dict[str, float]:
    """The run `name` of a seed, and the kNN accuracy of its features on the held-out digits."""
    flags = [*PRETRAIN, *FLAGS[name].split(), "--epochs", str(epochs), "--seed", str(seed)]
    if name != "moco":
        flags += ["--init", str(place(out, "moco", seed) / LAST)]
    run = place(out, name, seed)
    quietly(main_moco_isl.main, flags, run)
    return {"knn": Judge(PRETRAIN, K, "cpu")(run / LAST)["knn"]}


def detection(out: Path, name: str | None, iterations: int, seed: int) -> dict[str, float]:
    """The figures of a detector that starts from the run `name`, or from scratch."""
    run = out / f"detect_{name or 'scratch'}_{iterations},seed={seed}"
    file = ["none", "-a", ARCH, "--stem", "cifar"]
    if name:
        file = [str(place(out, name, seed) / LAST)]
    flags = f"--data digits --iterations {iterations} --seed {seed} -j 0 -p 50".split()
    if not (run / "results.json").exists():
        quietly(detect, [*file, *flags], run)
    found = results_of(run, file[0]) if name else json.loads((run / "results.json").read_text())
    return {what: found[what] for what in AP}


def place(out: Path, name: str, seed: int) -> Path:
    return out / f"{name},seed={seed}"


def run_all(args: argparse.Namespace) -> dict[tuple, list[dict]]:
    """(row, iterations) -> figures of each seed; (row, None): of the pretraining."""
    epochs = {"moco": args.epochs, "none": args.more, "isl": args.more}
    found: dict[tuple, list[dict]] = {}
    with processes(common.machine(torch.device("cpu"))["cores"]) as pool:

        def at_once(function, jobs: list[tuple]) -> dict[tuple, Future]:
            return {job: pool.submit(function, args.out_of_runs, *job) for job in jobs}

        moco = at_once(pretrain, [("moco", epochs["moco"], seed) for seed in args.seeds])
        figures = {job: future.result() for job, future in moco.items()}
        more = [(name, epochs[name], seed) for seed in args.seeds for name in ("isl", "none")]
        figures |= {job: future.result() for job, future in at_once(pretrain, more).items()}
        jobs = [
            (name, n, seed)
            for n in sorted(args.iterations, reverse=True)
            for seed in args.seeds
            for name in ROWS.values()
        ]
        figures |= {job: future.result() for job, future in at_once(detection, jobs).items()}
    for row, name in ROWS.items():
        if name:
            found[row, None] = [figures[name, epochs[name], seed] for seed in args.seeds]
        for n in args.iterations:
            found[row, n] = [figures[name, n, seed] for seed in args.seeds]
    return found


def show(found: dict[tuple, list[dict]], args: argparse.Namespace, result: Result) -> None:
    """A row for each start and length; `over` is the mean of the seeds' differences in AP."""
    total = {None: "", "moco": args.epochs}
    for n in args.iterations:
        scratch = found[SCRATCH, n]
        for row, name in ROWS.items():
            runs = found[row, n]
            spread = lambda what: common.spread([run[what] for run in runs])
            gains = [run["AP"] - other["AP"] for run, other in zip(runs, scratch)]
            knn = found.get((row, None))
            result.add(
                {
                    "row": row,
                    "epochs": total.get(name, args.epochs + args.more),
                    "knn": common.spread([run["knn"] for run in knn]) if knn else "",
                    "iterations": n,
                    **{what: spread(what) for what in AP},
                    "over": common.spread(gains, "+") if name else "",
                    "n": len(runs),
                }
            )


def sentences(found: dict[tuple, list[dict]], args: argparse.Namespace) -> list[str]:
    """What the table says of pretraining, and of mining at equal epochs, in words."""
    lines = []
    for n in args.iterations:
        ap = {row: [run["AP"] for run in found[row, n]] for row in ROWS}
        mined, plain, scratch = ap["MoCo v2 + ISL"], ap[list(ROWS)[2]], ap[SCRATCH]
        over = lambda a, b: common.spread([x - y for x, y in zip(a, b)], "+")
        lines.append(
            f"After {n} iterations pretraining is worth {over(plain, scratch)} points of AP, and"
            f" mining {over(mined, plain)} at equal epochs."
        )
    return lines


def get_parser() -> argparse.ArgumentParser:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="n")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of MoCo v2 ({EPOCHS})")
    parser.add_argument("--more", type=int, default=MORE, help=f"of what follows ({MORE})")
    parser.add_argument(
        "--iterations", type=int, nargs="+", default=ITERATIONS, help="of detection (100 300)"
    )
    parser.add_argument(
        "--runs", type=Path, default=OUT, dest="out_of_runs", help=f"folder of the runs ({OUT})"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    common.begin(args)
    if args.quick:
        args.seeds, args.epochs, args.more, args.iterations = [0], 2, 1, [3]
    args.out_of_runs.mkdir(parents=True, exist_ok=True)
    start = time.time()
    try:
        found = run_all(args)
    except (BadInput, RuntimeError) as error:
        print(f"studies.detection_digits: {error}", file=sys.stderr)
        return 3
    columns = [
        *(("row", "starts from"), ("epochs", "epochs"), ("knn", "kNN of the digits, %")),
        *(("iterations", "iterations"), *((what, what) for what in AP)),
        *(("over", "AP over from scratch"), ("n", "n")),
    ]
    title = "Detection of the digits in scenes, by what the backbone starts from"
    result = Result("detection-digits", title, torch.device("cpu"), columns)
    show(found, args, result)
    for line in sentences(found, args):
        result.note(line)
    result.note(
        f"Faster R-CNN on {ARCH}'s C4 with the 3x3 stem, {scenes.TRAIN} scenes of {scenes.S} pixels"
        f" to train on, {scenes.TEST} of other writers' digits to test on; AP is COCO's, in per"
        " cent. MoCo v2 and what goes on from it saw the digits of train, alone and without labels."
        f" {time.time() - start:.0f} s in all."
    )
    common.end(args, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
