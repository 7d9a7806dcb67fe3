"""What mining adds to a converged MoCo: equal continuations without mining, with own nearest, ISL's
GAN as published, neighbourhood means.

    python -m benchmarks.gain                             the embedded digits on a CPU; starts those
                                                          of benchmarks.breakeven where they are in
                                                          --folder python -m benchmarks.gain
                                                          --minutes 9                 as far as nine
                                                          minutes go; the same command goes on
                                                          python -m benchmarks.gain --dataset
                                                          cifar10 DIR       200 epochs of MoCo v2 by
                                                          a ResNet-18 of half width, then 100 a row;
                                                          use a GPU python -m benchmarks.gain
                                                          --dataset cifar10 DIR --minutes 8 && split
                                                          --bytes 15M
                                                          runs/breakeven/cifar10/start-0/checkpoint_last.pth.tar
                                                          part- in stages that leave small files;
                                                          joined at their place again (cat), the
                                                          same command goes on

Each continuation mines at its start and then every 20 epochs. On the digits 10 positives an image,
trained on by the mean of logs; elsewhere 5, by Eq. 5 with hard positives. Beside it stands the
break-even of that loss and size, where benchmarks.breakeven has left one in --folder.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
from pathlib import Path

import main_lincls
from benchmarks import breakeven, common, demo
from moco_isl.errors import BadInput, Interrupted
from moco_isl.report.verdict import breakeven_of, read_breakeven


def rows_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """Title -> flags."""
    if args.dataset == "digits":
        form = "meanlog"
        budget = 10
        gan = demo.MINING[demo.MINING.index("--isl-gan-iters") :]
    else:
        form = "logsum"
        budget = 5
        gan = []
    mining = [
        "--isl-every",
        str(args.every),
        "--isl-budget",
        str(budget),
        *breakeven.FORMS[form][1],
    ]
    return {
        "no mining": ["--miner", "none"],
        "own nearest (knn)": ["--miner", "knn", *mining],
        "GAN as published": ["--miner", "gan", *mining, *gan],
        "neighbourhood means (average)": ["--miner", "average", *mining],
        "neighbourhood means, --isl-trust auto": [
            "--miner",
            "average",
            *mining,
            "--isl-trust",
            "auto",
        ],
        "own nearest, --isl-trust auto": ["--miner", "knn", *mining, "--isl-trust", "auto"],
    }


def linear(args: argparse.Namespace, file: Path, out: Path) -> float:
    """Accuracy in per cent of a linear probe of main_lincls.py on frozen features; its rate is
    chosen on images held out of train.
    """
    if not (out / "results.json").exists():
        where = [
            "--dataset",
            args.dataset,
            *([args.data] if args.data else []),
            "--device",
            str(args.device),
        ]
        probe = "--cache-features --lr 1 3 10 30 --epochs 100 --schedule 60 80".split()
        probe += "-j 0 -p 1000 --seed 0".split()
        with contextlib.redirect_stdout(io.StringIO()):
            code = main_lincls.main(
                [*where, *probe, "--pretrained", str(file), "--out", str(out), "--resume", "auto"]
            )
        if code:
            raise BadInput(f"the probe of {file} ended with exit code {code}")
    rows = json.loads((out / "results.json").read_text())["classifiers"]
    return next(row["top1"] for row in rows if row["chosen"])


def main(argv: list[str] | None = None) -> int:
    parser = breakeven.shared_parser(__doc__)
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="TITLE",
        help="of the table, by the beginnings of their titles; no mining is always there (all)",
    )
    args = parser.parse_args(argv)
    common.begin(args)
    if args.dataset == "digits" and not args.quick:
        args.epochs = args.epochs or 20
    folder = args.folder or Path("runs/breakeven") / (
        "digits-20" if args.dataset == "digits" else breakeven.name_of(args)
    )
    rows = rows_of(args)
    chosen = [
        title
        for title in rows
        if title == "no mining" or not args.rows or any(title.startswith(x) for x in args.rows)
    ]
    found: dict[str, list[dict]] = {title: [] for title in chosen}
    code = 0
    try:
        runs = breakeven.Runs(folder, breakeven.setting(args), args.device, args.init, args.minutes)
        for seed in range(args.seeds):
            for title in chosen:
                name = f"gain{list(rows).index(title)}-{seed}"
                figures = runs.go_on(name, seed, rows[title], keep=True)
                found[title].append(
                    {
                        **figures,
                        "linear": linear(
                            args,
                            folder / name / "checkpoint_last.pth.tar",
                            folder / f"{name}-linear",
                        ),
                    }
                )
    except Interrupted as error:
        print(f"  {error}: give the same command again to go on", flush=True)
        code = error.exit_code
    except BadInput as error:
        print(f"benchmarks.gain: {error}", file=sys.stderr)
        return error.exit_code
    common.end(args, show(found, args, rows, folder))
    return code


def show(
    found: dict[str, list[dict]], args: argparse.Namespace, rows: dict[str, list[str]], folder: Path
) -> common.Result:
    columns = [
        ("row", ""),
        ("knn", "kNN %"),
        ("one_shot", "1-shot %"),
        ("linear", "linear %"),
        ("near", "true among nearest %"),
        ("gain", "kNN over no mining"),
        ("gain_shot", "1-shot over no mining"),
        ("gain_linear", "linear over no mining"),
        ("size", "set size"),
        ("precision", "precision"),
        ("estimate", "estimated"),
        ("most", "at most"),
        ("breakeven", "break-even"),
        ("seconds", "seconds"),
        ("n", "n"),
    ]
    of = breakeven.name_of(args)
    epochs = args.epochs or ("2" if args.quick else "100")
    result = common.Result(
        f"gain-{of}",
        f"What mining adds to a converged MoCo v2, {of}, {epochs} epochs more",
        args.device,
        columns,
    )
    table = (
        read_breakeven(folder / "breakeven.json") if (folder / "breakeven.json").exists() else {}
    )
    for title, seeds in found.items():
        if not seeds:
            continue
        over = lambda m: (
            common.spread([a[m] - b[m] for a, b in zip(seeds, found["no mining"])], "+")
            if title != "no mining"
            else None
        )
        last = [x for figures in seeds for x in figures["rounds"][-1:]]
        of_round = lambda key: (
            statistics.fmean(x[key] for x in last)
            if last and all(x.get(key) is not None for x in last)
            else None
        )
        size = of_round("mean_size")
        form = rows[title][rows[title].index("--isl-loss") + 1] if last else None
        bound = breakeven_of(table, form, size) if last else None
        in_words = lambda x: None if x is None else f"{x:.2f}"
        result.add(
            {
                "row": title,
                **{m: common.spread([f[m] for f in seeds]) for m in breakeven.METRICS},
                "gain": over("knn"),
                "gain_shot": over("one_shot"),
                "linear": common.spread([f["linear"] for f in seeds]),
                "gain_linear": over("linear"),
                "size": in_words(size),
                "precision": in_words(of_round("precision")),
                "estimate": in_words(of_round("precision_estimate")),
                "most": in_words(of_round("precision_at_most")),
                "breakeven": in_words(bound),
                "seconds": round(statistics.fmean(f["seconds"] for f in seeds)),
                "n": len(seeds),
            }
        )
    result.note(
        "Mean ± standard deviation of n seeds; gains are paired by seed. kNN, 1-shot and linear"
        " (main_lincls.py --cache-features) on held-out images; precision of the last round by"
        " labels, which steer nothing, and estimated without them; break-even by kNN of that loss"
        " at the nearest size, by benchmarks.breakeven."
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
