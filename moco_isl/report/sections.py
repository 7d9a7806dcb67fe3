"""What the page shows of runs: training, rounds of mining, and how right the mined pairs are.

Letters: M images, A anchors, K classes.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moco_isl.mining.reach import same_class_found
from moco_isl.report import figures
from moco_isl.report.charts import Chart, Line, line_chart
from moco_isl.report.figures import SIZES
from moco_isl.report.runs import Record, Round, Run
from moco_isl.report.verdict import estimates

Tensor = torch.Tensor

COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")
PART_NAMES = {
    "loss": "whole loss",
    "isl": "positives against negatives",
    "hpe": "hard positives, before their weight",
}
NO_PARTS = set(
    "kind epoch total step acc1 knn probe lr time data_time images_per_s memory_gib mean_cosine"
    " alignment uniformity rankme collapsed loss_low loss_high".split()
)
OF_EPOCHS = set("knn probe rankme collapsed uniformity loss_low loss_high".split())
RULES = {
    "mined": "mined, the surest first",
    "ranked": "the proxies' own ranking",
    "own": "each image's own nearest",
    "pairs": "all pairs ranked by similarity",
}
RULE_COLOURS = {"mined": "c1", "ranked": "c4", "own": "c2", "pairs": "c3"}


# ---------------------------------------------------------------- training


def marks(run: Run) -> list[tuple[float, bool]]:
    return [(round_.epoch, not round_.accepted) for round_ in run.rounds]


def values(run: Run, name: str) -> tuple[list[float], list[float | None]]:
    """Epochs done and the value of `name` there.

    One point an epoch or, before a second epoch has ended, one a logged interval.
    """
    lines = [line for line in run.epochs if name in line]
    if len(lines) >= 2 or name in OF_EPOCHS:
        return [line["epoch"] + 1 for line in lines], [line[name] for line in lines]
    steps = max((line["step"] for line in run.steps), default=1)
    lines = [line for line in run.steps if name in line]
    return [line["epoch"] + line["step"] / steps for line in lines], [line[name] for line in lines]


def learning_rates(run: Run) -> tuple[list[float], list[float]]:
    """Epochs done and the rate of the epoch that begins there; the last one's to its end."""
    first = {}
    for line in run.steps:
        first.setdefault(line["epoch"], line["lr"])
    epochs, rates = list(first), list(first.values())
    return (epochs + [epochs[-1] + 1], rates + rates[-1:]) if first else ([], [])


def over_rounds(run: Run, of: Callable[[dict], float | None]) -> tuple[list, list]:
    """Epochs done before each round, and what `of` finds in the round's report."""
    return [r.epoch for r in run.rounds], [of(r.report) for r in run.rounds]


def training_charts(run: Run) -> list[Chart]:
    parts = [name for name in (run.epochs or run.steps or [{}])[-1] if name not in NO_PARTS]
    drawn = {name: values(run, name) for name in parts}
    drawn = {
        name: (x, y)
        for name, (x, y) in drawn.items()
        if name == "loss" or (any(y) and y != drawn["loss"][1])
    }
    loss = [
        Line(*xy, PART_NAMES.get(name, name), colour)
        for (name, xy), colour in zip(drawn.items(), COLOURS)
    ]
    loss += [
        Line(*values(run, name), label, "muted", style=":", dots=False)
        for name, label in (("loss_high", "normal range of MoCo's loss"), ("loss_low", ""))
    ]
    found = [
        line_chart("Loss", loss, "epochs", "mean of an epoch", marks=marks(run)),
        line_chart(
            "Accuracy",
            [
                Line(*values(run, "knn"), "weighted kNN of the outputs"),
                Line(*values(run, "probe"), "linear probe of the backbone", "c2"),
            ],
            "epochs",
            "accuracy, %",
            marks=marks(run),
            note="Of the query encoder; logged by --knn-every and --probe-every.",
        ),
        *feature_charts(run),
        cluster_chart(run),
        line_chart(
            "Learning rate",
            [Line(*learning_rates(run), dots=False, steps="post")],
            "epochs",
            "learning rate",
            marks=marks(run),
        ),
    ]
    return [chart for chart in found if chart]


def feature_charts(run: Run) -> list[Chart | None]:
    """What the features look like without labels, see `training.health`."""
    return [
        line_chart(
            "Directions in use",
            [Line(*values(run, "rankme"))],
            "epochs",
            "RankMe",
            marks=marks(run),
            note="More is better where runs of one width are compared.",
        ),
        line_chart(
            "Collapsed directions",
            [Line(*values(run, "collapsed"))],
            "epochs",
            "of all, %",
            marks=marks(run),
            percent=True,
            note="Those in which features hardly differ; rising shares are a bad sign.",
        ),
        line_chart(
            "Alignment and uniformity",
            [
                Line(*values(run, "alignment"), "alignment: views of one image"),
                Line(*values(run, "uniformity"), "uniformity: different images", "c2"),
            ],
            "epochs",
            "lower is better",
            marks=marks(run),
        ),
    ]


def cluster_chart(run: Run) -> Chart | None:
    """How alike DeepCluster's clusterings are to each other and, with labels, to the classes."""
    epochs = [line["epoch"] for line in run.clusterings]
    of = lambda name: (epochs, [line.get(name) for line in run.clusterings])
    return line_chart(
        "Clusterings",
        [
            Line(*of("nmi"), "with the clustering before"),
            Line(*of("nmi_labels"), "with the labels", "c2"),
        ],
        "epochs",
        "NMI",
        note="1 where both say the same. The clusters settle where the first line rises.",
    )


def compared_training(runs: Sequence[Run]) -> list[Chart]:
    coloured = list(zip(runs, itertools.cycle(COLOURS)))
    lines = lambda of: [Line(*of(run), run.name, colour) for run, colour in coloured]
    by_round = lambda name: lines(lambda run: over_rounds(run, lambda report: report.get(name)))
    found = [
        line_chart("Weighted kNN", lines(lambda run: values(run, "knn")), "epochs", "accuracy, %"),
        line_chart(
            "Linear probe", lines(lambda run: values(run, "probe")), "epochs", "accuracy, %"
        ),
        line_chart(
            "Directions in use", lines(lambda run: values(run, "rankme")), "epochs", "RankMe"
        ),
        line_chart(
            "Loss",
            lines(lambda run: values(run, "loss")),
            "epochs",
            "whole loss",
            note="Losses of different forms do not compare in height.",
        ),
        line_chart(
            "Images with any positive", by_round("coverage"), "epochs", "images, %", percent=True
        ),
        line_chart(
            "Worst hub",
            by_round("worst_in_degree"),
            "epochs",
            "sets that one image is in, at most",
            whole_y=True,
        ),
        line_chart(
            "Reach of the sets", by_round("reach"), "epochs", "median rank, % of all", percent=True
        ),
        line_chart(
            "Same-class pairs found",
            by_round("same_class_found"),
            "epochs",
            "pairs of one class, %",
            percent=True,
        ),
        line_chart(
            "Precision of the sets", by_round("precision"), "epochs", "right pairs, %", percent=True
        ),
    ]
    return [chart for chart in found if chart]


# ---------------------------------------------------------------- rounds


@dataclass
class Mined:
    """Numbers of a round with a record.

    curves: rule of RULES -> {positives an image: precision}.
    Without labels curves, by_cosine and by_score are empty, confusion and same_class_found None.
    """

    round: Round
    mean_size: float
    at_least: list[float]
    hubs: list[tuple[int, int]]
    score: Tensor | None
    curves: dict[str, dict[float, float | None]]
    by_cosine: dict[str, list[tuple[float, float, int]]]
    by_score: list[tuple[float, float, int]]
    confusion: Tensor | None
    same_class_found: float | None  # the share of the pairs of one class that the sets hold
    unseen: float  # share of anchors whose known neighbours are too few, see figures.unseen
    sampled: bool  # whether the anchors are a sample


def mined(round_: Round, labels: Tensor | None, K: int = 0) -> Mined | None:
    record = round_.load()
    if record is None:
        return None
    sets = record.sets
    curves = {}
    by_cosine = {}
    by_score = []
    counts = None
    found = None
    unseen = 0.0
    if labels is not None:
        curves, by_cosine, by_score, unseen = judge(record, labels)
        counts = figures.confusion(sets, labels, K)
        found = same_class_found(sets, labels)
    return Mined(
        round_,
        sets.mean_size,
        figures.share_with_at_least(sets.sizes()),
        figures.hubs(sets),
        record.score,
        curves,
        by_cosine,
        by_score,
        counts,
        found,
        unseen,
        len(record.anchors) < record.M,
    )


def judge(record: Record, labels: Tensor) -> tuple[dict, dict, list, float]:
    """curves, by_cosine, by_score and unseen of a round."""
    sets = record.sets
    anchors = record.anchors
    near, cosine = record.nearest
    edges = figures.agreement(labels, sets.sources(), sets.members.long())  # [E]
    around = figures.agreement(labels, anchors[:, None], near)  # [A, k]
    sizes = sorted({*(s for s in SIZES if s <= 1.005 * sets.mean_size), sets.mean_size})
    curves = {
        "mined": {},
        "own": figures.precision_of_first(around),
        "pairs": figures.precision_of_best(cosine, around, len(anchors)),
    }
    if sets.num_edges:
        curves["mined"] = figures.precision_of_best(sets.sureness, edges, record.M, sizes)
    by_cosine = {
        "mined": figures.precision_by(record.cosine, edges),
        "own": figures.precision_by(cosine[:, :100].flatten(), around[:, :100].flatten()),
    }
    by_score = []
    if record.ranked is not None:
        ranked = figures.agreement(labels, anchors[:, None], record.ranked)
        curves["ranked"] = figures.precision_of_first(ranked)
        by_score = figures.precision_by(record.score, ranked[:, :10].nanmean(1), 10)
    return curves, by_cosine, by_score, figures.unseen(cosine, record.M, 100)


def mining_charts(run: Run, rounds: Sequence[Mined]) -> list[Chart]:
    coverage = over_rounds(run, lambda report: report.get("coverage"))
    worst = over_rounds(run, lambda report: report.get("worst_in_degree"))
    found = [
        line_chart(
            "Size of the sets",
            [
                _shaded(i, rounds, list(range(len(m.at_least))), m.at_least, steps="mid")
                for i, m in enumerate(rounds)
            ],
            "positives, at least",
            "images, %",
            percent=True,
            whole_x=True,
        ),
        line_chart(
            "Images with any positive",
            [Line(*coverage)],
            "epochs",
            "images, %",
            marks=marks(run),
            percent=True,
        ),
        reach_chart(run),
        estimate_chart(run),
        line_chart(
            "Worst hub",
            [Line(*worst, colour="c2")],
            "epochs",
            "sets that one image is in, at most",
            marks=marks(run),
            whole_y=True,
        ),
        *gan_charts(run),
        score_histogram(run, rounds),
    ]
    return [chart for chart in found if chart]


def reach_chart(run: Run) -> Chart | None:
    """The sets' reach, and that of as many of each image's own nearest, which is their middle."""
    if not run.rounds:
        return None
    sets = over_rounds(run, lambda report: report.get("reach"))
    lines = [Line(*sets, "the mined sets")]
    if M := run.rounds[-1].M:
        middle = lambda report: math.ceil(round(report["mean_size"], 1) / 2) / M
        own = over_rounds(run, lambda report: middle(report) or None)
        lines.append(Line(*own, RULES["own"], RULE_COLOURS["own"], "--"))
    return line_chart(
        "Reach of the sets",
        lines,
        "epochs",
        "median rank of a positive, % of all",
        marks=marks(run),
        percent=True,
        note="Rank 1 is the image most similar to the anchor. Own nearest: at the same mean size.",
    )


def estimate_chart(run: Run) -> Chart | None:
    if all(estimates(round_.report) == (None, None) for round_ in run.rounds):
        return None
    estimate = over_rounds(run, lambda report: estimates(report)[0])
    at_most = over_rounds(run, lambda report: estimates(report)[1])
    by_labels = over_rounds(run, lambda report: report.get("precision"))
    return line_chart(
        "Right pairs, by the estimate",
        [
            Line(*estimate, "estimate"),
            Line(*at_most, "at most", "c2"),
            Line(*by_labels, "by labels", "c3", "--"),
        ],
        "epochs",
        "right pairs, %",
        marks=marks(run),
        percent=True,
        note=(
            "With --isl-check: by labelled images. Without: the lower guess by views and pixels"
            " (--isl-trust), and at most, which was up to 76 points too high."
        ),
    )


def _shaded(i: int, rounds: Sequence[Mined], x: list, y: list, **options) -> Line:
    """A line of the i-th of several rounds: the later, the stronger.

    The first and the last are named.
    """
    last = len(rounds) - 1
    label = f"round {rounds[i].round.number}" if i in (0, last) else ""
    alpha = 0.4 + 0.6 * i / last if last else 1.0
    return Line(x, y, label, "c1", alpha=alpha, dots=False, **options)


def gan_charts(run: Run) -> list[Chart | None]:
    """Losses, proxies and hubs along the GAN's iterations, the rounds one behind the other."""
    figures_of = {}
    x = []
    starts = []
    for round_ in run.rounds:
        history = round_.report.get("history")
        if not history or not history["iteration"]:
            continue
        start = x[-1] if x else 0
        starts.append((start, not round_.accepted))
        x += [start + i for i in history["iteration"]]
        unknown = [None] * len(history["iteration"])
        for name in "loss_D loss_G cos_anchor cos_positive cos_negative distinct hub".split():
            figures_of.setdefault(name, []).extend(history.get(name, unknown))
    if not x:
        return []
    line = lambda name, label, colour: Line(x, figures_of[name], label, colour, dots=False)
    return [
        line_chart(
            "GAN losses",
            [line("loss_D", "discriminator", "c1"), line("loss_G", "generator", "c2")],
            "iterations, round after round",
            "loss",
            marks=starts,
        ),
        line_chart(
            "Cosine of the proxies",
            [
                line("cos_anchor", "to the anchor", "c1"),
                line("cos_positive", "to the positive", "c3"),
                line("cos_negative", "to the negative", "c2"),
            ],
            "iterations, round after round",
            "mean cosine",
            marks=starts,
            note=(
                "Near 0: nothing learned yet. Near 1 to the anchor: mining is plain nearest"
                " neighbours."
            ),
        ),
        line_chart(
            "Are the proxies spread?",
            [
                line("distinct", "nearest images that differ", "c1"),
                line("hub", "proxies near one image, at most", "c2"),
            ],
            "iterations, round after round",
            "%",
            marks=starts,
            percent=True,
        ),
    ]


def score_histogram(run: Run, rounds: Sequence[Mined], bins: int = 30) -> Chart | None:
    """How the scores of the best proxies are spread, a line a round.

    The threshold of the last round is marked.
    """
    scored = [m for m in rounds if m.score is not None]
    if not scored:
        return None
    threshold = scored[-1].round.report.get("threshold")
    low = min(float(m.score.min()) for m in scored)
    high = max(float(m.score.max()) for m in scored)
    low, high = (low - 0.01, high + 0.01) if high - low < 0.02 else (low, high)
    centres = [low + (i + 0.5) * (high - low) / bins for i in range(bins)]
    shares = [(torch.histc(m.score, bins, low, high) / len(m.score)).tolist() for m in scored]
    lines = [_shaded(i, scored, centres, share, steps="mid") for i, share in enumerate(shares)]
    inside = threshold is not None and low <= threshold <= high
    if inside:
        top = max(max(line.y) for line in lines)
        lines.append(Line([threshold, threshold], [0, top], "threshold", "bad", "--", dots=False))
    note = "" if inside or threshold is None else f"The threshold, {threshold:g}, lies outside."
    return line_chart(
        "Scores of the best proxies", lines, "score", "images, %", percent=True, note=note
    )


# ---------------------------------------------------------------- precision


def precision_charts(rounds: Sequence[Mined]) -> list[Chart]:
    last = rounds[-1]
    note = ""
    if last.sampled:
        note = "Estimated on a sample of 4,096 images, to about a point."
    if last.unseen > 0.01:
        note += (
            f" All pairs ranked: at 100 positives {100 * last.unseen:.0f} % of the images have more"
            " than the 512 nearest that are known."
        )
    found = [
        line_chart(
            f"Precision against set size, round {last.round.number}",
            _rules(last.curves),
            "positives an image",
            "right pairs, %",
            percent=True,
            x_sizes=True,
            note=note,
        ),
        *(_over_epochs(rounds, size) for size in (5, 50)),
        line_chart(
            "Same-class pairs found",
            [Line([m.round.epoch for m in rounds], [m.same_class_found for m in rounds])],
            "epochs",
            "pairs of one class, %",
            percent=True,
            note="How many of all pairs of images of one class stand in the sets.",
        ),
        line_chart(
            f"Precision against similarity, round {last.round.number}",
            [
                Line(*_columns(last.by_cosine["mined"]), "mined pairs", RULE_COLOURS["mined"]),
                Line(
                    *_columns(last.by_cosine["own"]),
                    "every image and its 100 nearest",
                    RULE_COLOURS["own"],
                ),
            ],
            "cosine",
            "right pairs, %",
            percent=True,
            note="Groups of equal count.",
        ),
        line_chart(
            f"Precision against score, round {last.round.number}",
            [Line(*_columns(last.by_score), colour="c4")],
            "score of the best proxy",
            "right among the 10 nearest to it, %",
            percent=True,
            note="Ten groups of equal count. A score that ranks would rise from left to right.",
        ),
    ]
    return [chart for chart in found if chart]


def _columns(groups: list[tuple[float, float, int]]) -> tuple[list[float], list[float]]:
    """Mean values and precisions of `figures.precision_by`."""
    return [value for value, _, _ in groups], [precision for _, precision, _ in groups]


def _rules(curves: dict[str, dict]) -> list[Line]:
    lines = []
    for rule, label in RULES.items():
        if curve := curves.get(rule):
            style = "-" if rule == "mined" else "--"
            lines.append(Line(list(curve), list(curve.values()), label, RULE_COLOURS[rule], style))
    return lines


def _over_epochs(rounds: Sequence[Mined], size: int) -> Chart | None:
    """The paper's Figure 3: precision at one set size over the rounds."""
    x = [m.round.epoch for m in rounds]
    lines = []
    for rule, label in RULES.items():
        y = [m.curves.get(rule, {}).get(size) for m in rounds]
        style = "-" if rule in ("mined", "ranked") else "--"
        lines.append(Line(x, y, label, RULE_COLOURS[rule], style))
    note = ""
    if all(m.curves.get("mined", {}).get(size) is None for m in rounds):
        mean = rounds[-1].mean_size
        note = f"The mined sets hold {mean:.1f} positives an image: they do not reach {size}."
    return line_chart(
        f"Precision at {size} positives an image",
        lines,
        "epochs",
        "right pairs, %",
        percent=True,
        note=note,
    )


def compared_precision(runs: Sequence[tuple[Run, Sequence[Mined]]]) -> list[Chart]:
    """Last rounds of several runs, each beside its own nearest."""
    lines = []
    for (run, rounds), colour in zip(runs, itertools.cycle(COLOURS)):
        if rounds and rounds[-1].curves:
            mined = rounds[-1].curves["mined"]
            own = rounds[-1].curves["own"]
            lines.append(Line(list(mined), list(mined.values()), run.name, colour))
            name = f"{run.name}: own nearest"
            lines.append(Line(list(own), list(own.values()), name, colour, "--"))
    chart = line_chart(
        "Precision against set size, last rounds",
        lines,
        "positives an image",
        "right pairs, %",
        percent=True,
        x_sizes=True,
    )
    return [chart] if chart else []


def fill_by_labels(rounds: Sequence[Mined]) -> None:
    """Put what the labels now say into reports of rounds logged without labels."""
    for m in rounds:
        if m.curves.get("mined") and m.round.report.get("precision") is None:
            m.round.report |= {
                "same_class_found": m.same_class_found,
                "precision": m.curves["mined"][m.mean_size],
                "precision_own_nearest": _at(m.curves["own"], m.mean_size),
                "precision_all_pairs": _at(m.curves["pairs"], m.mean_size),
            }


def _at(curve: dict[float, float | None], size: float) -> float | None:
    """The precision at the set size that is the nearest to this one."""
    return curve[min(curve, key=lambda s: abs(math.log(s / size)))]
