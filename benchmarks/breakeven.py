"""How right must mined positives be to help? From one converged MoCo checkpoint a seed, equal
epochs without positives and with an oracle's.

    python -m benchmarks.breakeven                                 the embedded digits on a CPU:
    precision x set size x loss, 3 seeds python -m benchmarks.breakeven --minutes 9
    as much of it as nine minutes allow; the same command goes on python -m benchmarks.breakeven
    --dataset cifar10 DIR           ResNet-18 of half width; use a GPU

The oracle (--miner oracle, see main_moco_isl.py --help) draws sets of a known precision from the
labels: this is research into what mining has to reach, no result of a method. Its right positives
are each image's nearest of its label, as mined ones are, and its wrong ones the nearest of another,
as mining's own mistakes are; --right uniform and --wrong uniform draw them anywhere, and right ones
from anywhere teach far more. Every run that has ended leaves a file in --folder and is never run
again, one that was broken off goes on.

Break-even: where the gain over no positives, paired by seed, its means made monotone in precision,
crosses zero; its range: 5th to 95th percentile of 1,000 bootstrap draws of the seeds. Where even
the lowest precision helped, or the highest did not, only a bound is known: the table says so, and
breakeven.json, which `python -m moco_isl.report --breakeven` takes, holds the lowest precision
tried, or 1.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import random
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import main_moco_isl
from benchmarks import common, demo
from moco_isl import data, files
from moco_isl.encoders import extract_features
from moco_isl.errors import BadInput, Interrupted
from moco_isl.evaluation.backbone import load_backbone
from moco_isl.evaluation.knn import few_shot, nearest, vote
from moco_isl.run import devices

FORMS = {  # loss form -> what it is called, its flags
    "logsum": ("Eq. 5 + hard positives", ["--isl-loss", "logsum", "--isl-hpe", "0.5"]),
    "meanlog": ("mean of logs", ["--isl-loss", "meanlog", "--isl-hpe", "0"]),
}
PRECISIONS, SIZES = [0.95, 0.8, 0.65], [2.0, 5.0, 20.0]
METRICS = {"knn": "kNN", "one_shot": "1-shot", "near": "share of true labels among the nearest"}
# what is kept of a round
IN_ROUNDS = ("mean_size", "coverage", "precision", "precision_estimate", "precision_at_most", "why")
CLOSE = 0.06  # a crossing between two precisions this close is not looked for any closer
SMALL_IMAGES = [
    "-a",
    "resnet18w32",
    "--mlp",
    "--moco-dim",
    "128",
    "--moco-k",
    "4096",
    "--moco-t",
    "0.1",
    "--moco-m",
    "0.99",
    "-b",
    "512",
    "--wd",
    "5e-4",
    "--cos",
    "--aug-plus",
    "--fast",
    "--keep",
    "1",
    "-p",
    "1000",
]


@dataclass(frozen=True)
class Setting:
    """Flags of all runs, of those that start, of those that go on; neighbours of kNN."""

    common: list[str]
    start: list[str]
    go_on: list[str]
    k: int


@dataclass(frozen=True)
class Point:
    """A continuation; without a form the one without positives."""

    seed: int
    form: str | None = None
    size: float = 0.0
    precision: float = 0.0

    @property
    def name(self) -> str:
        return (
            f"none-{self.seed}"
            if self.form is None
            else f"{self.form}-size{self.size:g}-precision{self.precision:g}-{self.seed}"
        )

    def flags(self, wrong: str, right: str, every: int) -> list[str]:
        if self.form is None:
            return ["--miner", "none"]
        return [
            "--miner",
            "oracle",
            "--research-labels",
            "--oracle-precision",
            f"{self.precision:g}",
            "--oracle-size",
            f"{self.size:g}",
            "--oracle-wrong",
            wrong,
            "--oracle-right",
            right,
            "--isl-every",
            str(every),
            *FORMS[self.form][1],
        ]


# ---------------------------------------------------------------- runs


def setting(args: argparse.Namespace) -> Setting:
    """Of the arguments of `shared_parser`.

    Raises BadInput where the data set and DIR do not fit.
    """
    if (args.data is None) != (args.dataset == "digits"):
        raise BadInput(
            f"--dataset {args.dataset} and DIR {args.data}: expected a DIR with every data set but"
            " the digits"
        )
    where = ["--dataset", args.dataset, *([args.data] if args.data else [])]
    if args.dataset == "digits":
        given = [*where, *demo.COMMON[2:]]
        start = demo.PRETRAIN
        go_on = demo.CONTINUE
        k = 50
    else:
        given = [*where, *SMALL_IMAGES]
        start = ["--epochs", "200", "--lr", "0.06"]
        go_on = ["--epochs", "100", "--lr", "0.02"]
        k = 200
    if args.quick:
        start = [*start, "--epochs", "2"]
        go_on = [*go_on, "--epochs", "2"]
    for name in ("epochs", "lr"):
        if getattr(args, name) is not None:
            go_on = [*go_on, f"--{name}", str(getattr(args, name))]
    return Setting(
        [*given, "--device", str(args.device), *shlex.split(args.flags)], start, go_on, k
    )


class Runs:
    """The runs in a folder: those that have ended by their files, the others when they are asked
    for.
    """

    def __init__(
        self,
        folder: Path,
        setting: Setting,
        device: torch.device,
        init: str | None = None,
        minutes: float | None = None,
    ):
        self.folder = folder
        self.setting = setting
        self.init = init
        end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.stop = lambda: time.monotonic() > end
        self.judge = Judge(setting, device)
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self, seed: int) -> str:
        """The checkpoint that the continuations of a seed start from, made where it is not yet
        there.
        """
        if self.init:
            return self.init
        name = f"start-{seed}"
        self._run(name, [*self.setting.start, "--seed", str(seed)], keep=True)
        return str(self.folder / name / "checkpoint_last.pth.tar")

    def go_on(self, name: str, seed: int, flags: list[str], keep: bool = False) -> dict:
        """Figures of a continuation with these flags.

        keep: its folder stays. Raises Interrupted where time is over first.
        """
        return self._run(
            name,
            [*self.setting.go_on, "--init", self.start(seed), "--seed", str(seed), *flags],
            keep,
        )

    def _run(self, name: str, flags: list[str], keep: bool = False) -> dict:
        flags = [*self.setting.common, *flags]
        out = self.folder / name
        done = self.folder / f"{name}.json"
        if done.exists():
            found = json.loads(done.read_text())
            if found["flags"] != flags:
                raise BadInput(
                    f"{done} is of a run with other flags: expected {shlex.join(flags)}; choose"
                    " another --folder, or remove it"
                )
            return found
        began = time.perf_counter()
        print(f"  {name} ...", end="", flush=True)
        with (
            open(self.folder / f"{name}.log", "a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            code = main_moco_isl.main([*flags, "--out", str(out), "--resume", "auto"], self.stop)
        if code == Interrupted.exit_code:
            print(" broken off, to be gone on with", flush=True)
            raise Interrupted(f"the time is over in {name}")
        if code:
            raise BadInput(f"{name} ended with exit code {code}: see {self.folder / name}.log")
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        rounds = [
            {key: line.get(key) for key in IN_ROUNDS} for line in lines if line["kind"] == "round"
        ]
        found = {
            "flags": flags,
            **self.judge(out / "checkpoint_last.pth.tar"),
            "rounds": rounds,
            "seconds": time.perf_counter() - began,
        }
        files.write_text(json.dumps(found, indent=1) + "\n", done)
        if not keep:
            shutil.rmtree(out)
        (self.folder / f"{name}.log").unlink()
        print(
            f" kNN {found['knn']:.1f}, 1-shot {found['one_shot']:.1f}, {found['seconds']:.0f} s",
            flush=True,
        )
        return found


class Judge:
    """Figures of a checkpoint's query encoder in per cent, the train images as the bank and the
    held-out ones as queries.
    """

    def __init__(self, setting: Setting, device: torch.device):
        args = main_moco_isl.get_parser().parse_args(setting.common)
        self.args = args
        self.k = setting.k
        self.device = device
        self.splits = [
            data.build_dataset(args.dataset, args.data, split, args.download)
            for split in ("train", "val")
        ]
        if any(split.labels is None for split in self.splits):
            raise BadInput(
                f"the images in {args.data} have no labels: expected train/ and val/ with a folder"
                " a class"
            )
        if args.cache is not None:
            self.splits = [
                data.hold_cached(split, args.cache, devices.usable_workers(args.workers, 1))
                for split in self.splits
            ]

    def __call__(self, path: Path) -> dict[str, float]:
        return self.figures(*self.features(path))

    def figures(
        self, train: tuple[torch.Tensor, torch.Tensor], val: tuple[torch.Tensor, torch.Tensor]
    ) -> dict[str, float]:
        """Of unit rows [M, C] and labels [M] of both splits, as `features` has them."""
        (bank, labels), (queries, truth) = train, val
        similarity, near = nearest(queries, bank, min(self.k, len(bank)))
        found = vote(similarity, labels[near], 0.1, int(labels.max()) + 1)
        one_shot, _ = few_shot(bank, labels, queries, truth, shots=1, draws=20, seed=0)
        return {
            "knn": 100 * float((found == truth).float().mean()),
            "one_shot": 100 * one_shot,
            "near": 100 * float((labels[near] == truth[:, None]).float().mean()),
        }

    @torch.no_grad()
    def features(self, path: Path | str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Unit rows [M, C] and labels [M] of the train images, and of the held-out ones."""
        encoder, _ = load_backbone(
            path, image_size=self.args.image_size or data.native_size(self.splits[0])
        )
        return [self._features(encoder.to(self.device), split) for split in self.splits]

    def _features(self, encoder: torch.nn.Module, split) -> tuple[torch.Tensor, torch.Tensor]:
        transform = data.get_eval_transform(
            self.args.dataset, self.args.image_size or data.native_size(split)
        )
        loader = data.eval_loader(split, transform=transform, batch_size=512, device=self.device)
        try:
            return extract_features(encoder, loader, len(split), self.device), split.labels.to(
                self.device
            )
        finally:
            loader.close()


# ---------------------------------------------------------------- the crossing

Gains = dict[float, list[float]]  # precision -> gains over no positives, one a seed


def monotone(values: list[float]) -> list[float]:
    """The rising sequence that is nearest to values, in squares: neighbours that fall are
    pooled.
    """
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [statistics.fmean(pool) for pool in pools for _ in pool]


def crossing(gains: Gains) -> tuple[float, str]:
    """(precision at which mean gains cross zero, ""); where they never do the end of those tried:
    "at most" the lowest, or "above" the highest.
    """
    precisions = sorted(gains)
    y = monotone([statistics.fmean(gains[p]) for p in precisions])
    if y[0] > 0:
        return precisions[0], "at most"
    if y[-1] <= 0:
        return precisions[-1], "above"
    i = next(i for i, v in enumerate(y) if v > 0)
    share = -y[i - 1] / (y[i] - y[i - 1])
    return precisions[i - 1] + share * (precisions[i] - precisions[i - 1]), ""


def bootstrap(gains: Gains, draws: int = 1000) -> tuple[float, float]:
    """5th and 95th percentile of the crossing over draws of the seeds, each precision's on their
    own.
    """
    draw = random.Random(0)
    found = sorted(
        crossing({p: draw.choices(x, k=len(x)) for p, x in gains.items()})[0] for _ in range(draws)
    )
    return found[draws // 20], found[-1 - draws // 20]


def closer(gains: Gains) -> float | None:
    """The precision to try next: between the two around the crossing, or beyond the end that it
    lies behind; None where it is known closely.
    """
    precisions = sorted(gains)
    at, bound = crossing(gains)
    if bound == "at most":
        return round(precisions[0] - 0.2, 3) if precisions[0] > 0.3 else None
    if bound == "above":
        return round((precisions[-1] + 1) / 2, 3) if precisions[-1] < 0.97 else None
    low, high = next((a, b) for a, b in itertools.pairwise(precisions) if a <= at <= b)
    return round((low + high) / 2, 3) if high - low > CLOSE else None


# ---------------------------------------------------------------- all of it


class Study:
    """Points as they come; figures[point] of those that are there."""

    def __init__(self, runs: Runs, args: argparse.Namespace):
        self.runs = runs
        self.args = args
        self.figures = {}

    def run(self) -> None:
        """The grid, a seed after the other, then what is closer to the crossings."""
        args = self.args
        for seed in range(args.seeds):
            self._take(Point(seed))
            for form in args.losses:
                for size in args.sizes:
                    for precision in args.precisions:
                        self._take(Point(seed, form, size, precision))
        for _ in range(args.refine):
            for form in args.losses:
                for size in args.sizes:
                    if (precision := closer(self.gains(form, size))) is not None:
                        for seed in range(args.seeds):
                            self._take(Point(seed, form, size, precision))

    def _take(self, point: Point) -> None:
        args = self.args
        name = point.name if point.form is None else f"{point.name}-right-{args.right}"
        self.figures[point] = self.runs.go_on(
            name, point.seed, point.flags(args.wrong, args.right, args.every)
        )

    def gains(self, form: str, size: float, metric: str | None = None) -> Gains:
        found: Gains = {}
        for point, figures in self.figures.items():
            none = self.figures.get(Point(point.seed))
            if (point.form, point.size) == (form, size) and none:
                metric_ = metric or self.args.metric
                found.setdefault(point.precision, []).append(figures[metric_] - none[metric_])
        return found

    def table(self) -> dict:
        """{form: {size: break-even}}, as the report takes it."""
        table: dict[str, dict[str, float]] = {}
        for form in self.args.losses:
            for size in self.args.sizes:
                if gains := self.gains(form, size):
                    at, bound = crossing(gains)
                    table.setdefault(form, {})[f"{size:g}"] = (
                        1.0 if bound == "above" else round(at, 3)
                    )
        return table


def show(study: Study, device: torch.device) -> list[common.Result]:
    """The break-evens, and the gains that they are read off, as two results."""
    args, metrics = study.args, list(METRICS)
    of = name_of(args)
    name = f"breakeven-{of}-right-{args.right}"
    words = f"{of}, right ones {'near' if args.right == 'near' else 'anywhere in the class'}"
    shown = [(m, METRICS[m]) for m in metrics]
    first = [("loss", "loss"), ("size", "positives an image")]
    table = common.Result(
        name, f"Break-even precision of positives, {words}", device, [*first, *shown, ("n", "n")]
    )
    for form in args.losses:
        for size in args.sizes:
            if gains := {m: study.gains(form, size, m) for m in metrics}[args.metric]:
                table.add(
                    {
                        "loss": FORMS[form][0],
                        "size": size,
                        "n": min(map(len, gains.values())),
                        **{m: _in_words(study.gains(form, size, m)) for m in metrics},
                    }
                )
    table.note(
        f"From which precision on positives help, by each measure. Wrong positives: {args.wrong},"
        f" right ones: {args.right}. In brackets: 5th to 95th percentile of 1,000 bootstrap draws"
        f" of the seeds; breakeven.json: by {METRICS[args.metric]}. Labels were used throughout"
        " (--research-labels)."
    )
    rows = common.Result(
        f"{name}-gains",
        f"Gains of positives of known precision, {words}",
        device,
        [*first, ("precision", "precision"), *shown, ("n", "n")],
    )
    none = [figures for point, figures in study.figures.items() if point.form is None]
    rows.add(
        {
            "loss": "no positives",
            "size": 0,
            "precision": None,
            "n": len(none),
            **{m: common.spread([f[m] for f in none]) for m in metrics},
        }
    )
    for form in args.losses:
        for size in args.sizes:
            gains = {m: study.gains(form, size, m) for m in metrics}
            for precision in sorted(gains[metrics[0]]):
                values = {f"{m}_gains": gains[m][precision] for m in metrics}
                rows.add(
                    {
                        "loss": FORMS[form][0],
                        "size": size,
                        "precision": precision,
                        "n": len(values["knn_gains"]),
                        **{m: common.spread(gains[m][precision], "+") for m in metrics},
                        **values,
                    }
                )
    rows.note(
        "First row: per cent. The others: points more than the same epochs without positives,"
        " paired by seed; mean ± standard deviation. kNN and 1-shot on held-out images; nearest: of"
        " those, in the training images."
    )
    return [table, rows]


def _in_words(gains: Gains) -> str:
    (at, bound), (low, high) = crossing(gains), bootstrap(gains)
    return f"{bound} {at:.2f}".strip() + (f" ({low:.2f} to {high:.2f})" if high > low else "")


def draw(study: Study, path: Path) -> None:
    """Gain against precision, a line a set size, a panel a loss; a dot a seed."""
    import matplotlib
    from matplotlib.figure import Figure

    args = study.args
    colours = ["#3b6fb6", "#c8553d", "#4f8a4c", "#8a6bb1", "#888888"]
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "breakeven",
            "font.size": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        figure = Figure(figsize=(4.6 * len(args.losses), 3.4), layout="constrained")
        for axes, form in zip(
            figure.subplots(1, len(args.losses), sharey=True, squeeze=False)[0], args.losses
        ):
            axes.axhline(0, color="#888888", linewidth=1, linestyle=(0, (2, 2)))
            for size, colour in zip(args.sizes, colours):
                gains = study.gains(form, size)
                x = sorted(gains)
                axes.plot(
                    x,
                    [statistics.fmean(gains[p]) for p in x],
                    color=colour,
                    label=f"{size:g} an image",
                    marker="o",
                    markersize=4,
                )
                axes.scatter(
                    [p for p in x for _ in gains[p]],
                    [g for p in x for g in gains[p]],
                    color=colour,
                    s=6,
                    alpha=0.5,
                )
            axes.set(
                title=FORMS[form][0],
                xlabel="precision of the positives",
                ylabel=f"points of {METRICS[args.metric]} over no positives",
            )
            axes.label_outer()
            axes.legend(frameon=False)
        figure.savefig(page := io.StringIO(), format="svg", metadata={"Date": None})
    files.write_text(page.getvalue(), path)


def name_of(args: argparse.Namespace) -> str:
    """Of the data: a folder of images is called as it is called."""
    return (
        Path(args.data).resolve().name if args.dataset == "folder" and args.data else args.dataset
    )


def shared_parser(description: str) -> argparse.ArgumentParser:
    """The flags of all studies that go on from converged checkpoints."""
    parser = common.parser(description)
    parser.add_argument(
        "data", metavar="DIR", nargs="?", help="as main_moco_isl.py takes it; none with the digits"
    )
    parser.add_argument("--dataset", default="digits", choices=data.SETS, help="(digits)")
    parser.add_argument(
        "--init",
        metavar="FILE",
        help="a converged checkpoint to start all from, instead of one made here for each seed",
    )
    parser.add_argument(
        "--flags",
        default="",
        metavar='"..."',
        help="more flags of main_moco_isl.py for every run, in quotes",
    )
    parser.add_argument(
        "--epochs", type=int, help="of a continuation (60 on the digits, 100 elsewhere)"
    )
    parser.add_argument("--lr", type=float, help="of a continuation (0.02)")
    parser.add_argument(
        "--every", type=int, default=20, help="epochs after which sets are drawn or mined anew (20)"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--minutes",
        type=float,
        help="stop after as many; what is there then is shown, and the same command goes on",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the runs go (runs/breakeven/<data set, or name of the folder>)",
    )
    return parser


def get_parser() -> argparse.ArgumentParser:
    parser = shared_parser(__doc__)
    parser.add_argument("--precisions", type=float, nargs="+", default=PRECISIONS)
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES)
    parser.add_argument("--losses", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument(
        "--wrong", choices=("near", "uniform"), default="near", help="wrong positives (near)"
    )
    parser.add_argument(
        "--right",
        choices=("near", "uniform"),
        default="near",
        help="right positives: near, as mined ones are, or anywhere in the class (near)",
    )
    parser.add_argument(
        "--refine",
        type=int,
        default=2,
        metavar="n",
        help="how often to go closer to the crossings (2)",
    )
    parser.add_argument(
        "--metric",
        choices=METRICS,
        default="knn",
        help="what break-even is read off; all are shown (knn)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    common.begin(args)
    if args.quick:
        args.precisions = [0.95, 0.5]
        args.sizes = [5.0]
        args.losses = ["meanlog"]
        args.seeds = min(args.seeds, 2)
        args.refine = 0
    folder = args.folder or Path("runs/breakeven") / name_of(args)
    whole = True
    try:
        study = Study(Runs(folder, setting(args), args.device, args.init, args.minutes), args)
        print(f"Positives of known precision, {name_of(args)}, runs in {folder}", flush=True)
        try:
            study.run()
        except Interrupted as error:
            whole = False
            print(f"  {error}: give the same command again to go on", flush=True)
    except BadInput as error:
        print(f"benchmarks.breakeven: {error}", file=sys.stderr)
        return error.exit_code
    if not any(point.form for point in study.figures):
        return Interrupted.exit_code
    results = show(study, args.device)
    if not whole:
        results[0].note("Not all runs had ended.")
    written = folder / ("breakeven" if args.right == "near" else f"breakeven-right-{args.right}")
    files.write_text(json.dumps(study.table()) + "\n", written.with_suffix(".json"))
    draw(study, written.with_suffix(".svg"))
    print(f"  written: {written}.json (for the report), {written}.svg")
    common.end(args, *results)
    return 0 if whole else Interrupted.exit_code


if __name__ == "__main__":
    sys.exit(main())
