"""What mining adds to a converged MoCo on the embedded digits: equal continuations without mining, with kNN, ISL's GAN as published, neighbourhood means.

    python -m benchmarks.gain                    the starts of benchmarks.breakeven where they are in --folder, otherwise made; n seeds; runs once each
    python -m benchmarks.gain --minutes 9        as far as nine minutes go; the same command goes on

Each continuation mines at its start and then every 20 epochs, 10 positives an image, and trains on the mean of logs.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from pathlib import Path

import main_lincls
from benchmarks import breakeven, common, demo
from moco_isl.errors import BadInput, Interrupted

MINING = demo.MINING[: demo.MINING.index("--isl-gan-iters")]
ROWS = {  # title -> flags
    "no mining": ["--miner", "none"],
    "own nearest (knn)": ["--miner", "knn", *MINING],
    "GAN as published": ["--miner", "gan", *demo.MINING],
    "neighbourhood means (average)": ["--miner", "average", *MINING],
    "neighbourhood means, --isl-trust auto": ["--miner", "average", *MINING, "--isl-trust", "auto"],
}


PROBE = "--dataset digits --cache-features --lr 1 3 10 30 --epochs 100 --schedule 60 80 -j 0 -p 1000 --seed 0 --device cpu".split()


def linear(file: Path, out: Path) -> float:
    """Accuracy in per cent of a linear probe of main_lincls.py on frozen features; its rate is chosen on images held out of train."""
    if not (out / "results.json").exists():
        with contextlib.redirect_stdout(io.StringIO()):
            code = main_lincls.main([*PROBE, "--pretrained", str(file), "--out", str(out), "--resume", "auto"])
        if code:
            raise BadInput(f"the probe of {file} ended with exit code {code}")
    rows = json.loads((out / "results.json").read_text())["classifiers"]
    return next(row["top1"] for row in rows if row["chosen"])


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="of a continuation (20)")
    parser.add_argument("--minutes", type=float, help="stop after as many; the same command goes on")
    parser.add_argument("--folder", type=Path, default=Path("runs/breakeven/digits-20"))
    args = parser.parse_args(argv)
    common.begin(args)
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    setting = breakeven.setting(argparse.Namespace(dataset="digits", data=None, device=args.device, quick=args.quick, epochs=None if args.quick else args.epochs, flags=""))
    found: dict[str, list[dict]] = {title: [] for title in ROWS}
    code = 0
    try:
        runs = breakeven.Runs(args.folder, setting, args.device, "near", "uniform", 20, None, None if end is None else lambda: time.monotonic() > end)
        for seed in range(args.seeds):
            for number, (title, flags) in enumerate(ROWS.items()):
                name = f"gain{number}-{seed}"
                figures = runs.go_on(name, seed, flags, keep=True)
                found[title].append({**figures, "linear": linear(args.folder / name / "checkpoint_last.pth.tar", args.folder / f"{name}-linear")})
    except Interrupted as error:
        print(f"  {error}: give the same command again to go on", flush=True)
        code = error.exit_code
    except BadInput as error:
        print(f"benchmarks.gain: {error}", file=sys.stderr)
        return error.exit_code
    common.end(args, show(found, args))
    return code


def show(found: dict[str, list[dict]], args: argparse.Namespace) -> common.Result:
    columns = [("row", ""), ("knn", "kNN %"), ("one_shot", "1-shot %"), ("linear", "linear %"), ("near", "true among nearest %"), ("gain", "kNN over no mining"), ("gain_shot", "1-shot over no mining"), ("gain_linear", "linear over no mining"),
               ("size", "set size"), ("precision", "precision"), ("estimate", "estimated"), ("seconds", "seconds"), ("n", "n")]  # fmt: skip
    result = common.Result("gain-digits", f"What mining adds to a converged MoCo v2, digits, {args.epochs} epochs more", args.device, columns)
    for title, seeds in found.items():
        if not seeds:
            continue
        over = lambda m: common.spread([a[m] - b[m] for a, b in zip(seeds, found["no mining"])], "+") if title != "no mining" else None  # noqa: B023
        last = [x for figures in seeds for x in figures["rounds"][-1:]]
        of_round = lambda key: f"{statistics.fmean(x[key] or 0 for x in last):.2f}" if last else None  # noqa: B023
        result.add({"row": title, **{m: common.spread([f[m] for f in seeds]) for m in breakeven.METRICS}, "gain": over("knn"), "gain_shot": over("one_shot"),
                    "linear": common.spread([f["linear"] for f in seeds]), "gain_linear": over("linear"),
                    "size": of_round("mean_size"), "precision": of_round("precision"), "estimate": of_round("precision_estimate"),
                    "seconds": round(statistics.fmean(f["seconds"] for f in seeds)), "n": len(seeds)})  # fmt: skip
    result.note("Mean ± standard deviation of n seeds; gains are paired by seed. kNN, 1-shot and linear (main_lincls.py --cache-features) on 360 held-out images; precision of the last round by labels, which "
                "steer nothing, and estimated without them.")  # fmt: skip
    return result


if __name__ == "__main__":
    sys.exit(main())
