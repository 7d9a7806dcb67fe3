"""The page: what each part of the template is handed, and the file, written whole or not at all."""

import itertools
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch

from moco_isl import __version__, files
from moco_isl.errors import BadInput, RunFailed
from moco_isl.mining.record import in_percent
from moco_isl.options import listed
from moco_isl.report import figures, sections
from moco_isl.report.charts import Chart
from moco_isl.report.grids import Album, Cell, Grid, build_grids
from moco_isl.report.runs import Run
from moco_isl.report.verdict import LABELS_USED, Verdict, judge

MOST_CLASSES = 16  # most classes of a confusion table; with more, only the worst pairs are shown


@dataclass
class Confusion:
    """Wrong pairs of a round by class.

    table: (class, [(share of the largest count, count)]), empty where there are too many classes.
    """

    wrong: int
    edges: int
    classes: list[str]
    table: list[tuple[str, list[tuple[float, int]]]]
    worst: list[tuple[str, str, int, float]]


@dataclass
class Part:
    """What the page shows of one run."""

    run: Run
    colour: str
    verdict: Verdict
    facts: list[tuple[str, str]]
    training: list[Chart]
    mining: list[Chart]
    hubs: list[tuple[Cell, int]]
    precision: list[Chart]
    confusion: Confusion | None


def write_report(
    runs: Sequence[Run],
    out: Path,
    labels: bool = False,
    root: str | None = None,
    breakeven: dict | None = None,
) -> None:
    """Write the page about these runs to `out`.

    labels: look up the labels of the data sets, for precision; they are never stored. root: where
    the images lie now, if they moved.
    breakeven: see `verdict.read_breakeven`. Raises BadInput where images with --labels are gone and
    where `out` is there and is no such page, RunFailed where it cannot be written.
    """
    albums = _albums(runs, labels, root)
    parts, measured = [], []
    for run, colour in zip(runs, itertools.cycle(sections.COLOURS)):
        album = albums.get(run.images)
        rounds = _rounds(run, album)
        sections.fill_by_labels(rounds)
        measured.append((run, rounds))
        parts.append(_part(run, colour, rounds, album, judge(run, runs, breakeven)))
    comparison = None
    if len(runs) > 1:
        comparison = {
            "rows": [(part, _row(part.run)) for part in parts],
            "charts": [*sections.compared_training(runs), *sections.compared_precision(measured)],
        }
    context = {
        "parts": parts,
        "comparison": comparison,
        "grids": _grids(runs, albums),
        "labels": labels,
        "without_images": [run.name for run in runs if run.images not in albums],
        "version": __version__,
        "number": itertools.count(1).__next__,
        "colour_of": {part.run.name: part.colour for part in parts},
    }
    _write(out, _environment().get_template("report.html").render(context))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moco_isl.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    number = lambda pattern: lambda x, *a: "–" if x is None or x != x else pattern(x, *a)
    environment.filters |= {
        "percent": number(lambda x, digits=1: f"{100 * x:.{digits}f}"),
        "in_percent": number(in_percent),  # of shares that may be small
        "decimal": number(lambda x, digits=2: f"{x:.{digits}f}"),
        "count": number(lambda x: f"{x:,}"),
        "points": number(lambda x: f"{100 * x:+.1f}".replace("-", "−")),
    }
    return environment


def _albums(runs: Sequence[Run], labels: bool, root: str | list[str] | None) -> dict[tuple, Album]:
    """The images of every data set that is at hand, by `Run.images`.

    Where images are gone the page has no grids of them; with labels that is bad input.
    """
    albums = {}
    for run in runs:
        if not (labels or run.rounds):
            continue
        M = run.num_images()
        if run.images in albums:
            others = len(albums[run.images].dataset)
            if M not in (None, others):
                raise BadInput(
                    f"run '{files.shown(run.path)}' mined {M} images, and another run of the same"
                    f" data {others}: give runs of the same images"
                )
            continue
        try:
            dataset = run.dataset(root, M)
        except BadInput as error:
            if labels:
                raise
            print(f"=> no grids of images: {files.shown(str(error))}", file=sys.stderr)
            continue
        if labels and dataset.labels is None:
            raise BadInput(f"the images of run '{run.path}' have no labels: leave --labels off")
        albums[run.images] = Album(dataset, dataset.labels if labels else None)
    return albums


def _rounds(run: Run, album: Album | None) -> list[sections.Mined]:
    labels = album.labels if album else None
    K = 0 if labels is None else int(labels.max()) + 1
    return [m for round_ in run.rounds if (m := sections.mined(round_, labels, K))]


def _part(
    run: Run, colour: str, rounds: list[sections.Mined], album: Album | None, verdict: Verdict
) -> Part:
    hubs = [(album.cell(i), degree) for i, degree in rounds[-1].hubs] if album and rounds else []
    judged = bool(rounds) and bool(rounds[-1].curves)
    return Part(
        run,
        colour,
        verdict,
        _facts(run),
        sections.training_charts(run),
        sections.mining_charts(run, rounds),
        hubs,
        sections.precision_charts(rounds) if judged else [],
        _confusion(rounds[-1], album) if judged else None,
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    flags = run.flags
    done = run.epochs[-1]["epoch"] + 1 if run.epochs else 0
    version = [run.facts.get("version"), (run.facts.get("git") or "")[:10]]
    speed = [line["images_per_s"] for line in run.steps if "images_per_s" in line]
    facts = [
        ("images", " ".join(filter(None, [flags.get("dataset"), *listed(flags.get("data"))]))),
        ("encoder", flags.get("arch")),
        ("objective", flags.get("objective")),
        ("miner", flags.get("miner")),
        ("labels", LABELS_USED if flags.get("research_labels") else None),
        ("loss", flags.get("isl_loss") if flags.get("miner") != "none" else None),
        ("epochs", f"{done} of {flags.get('epochs')}"),
        ("batch", flags.get("batch_size")),
        ("seed", flags.get("seed")),
        ("started from", flags.get("init")),
        ("speed", f"{statistics.median(speed):,.0f} images a second" if speed else None),
        ("on", run.facts.get("device")),
        ("version", ", ".join(filter(None, version))),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _row(run: Run) -> dict:
    """A line of the comparison."""
    knn = [line["knn"] for line in run.epochs if "knn" in line]
    last = run.rounds[-1].report if run.rounds else {}
    gap = lambda rule: (
        None if None in (last.get("precision"), last.get(rule)) else last["precision"] - last[rule]
    )
    miner = run.flags.get("miner")
    if run.flags.get("research_labels"):
        miner = f"{miner} ({LABELS_USED})"
    return {
        "miner": miner,
        "loss": run.flags.get("isl_loss") if run.rounds else None,
        "epochs": run.epochs[-1]["epoch"] + 1 if run.epochs else 0,
        "rounds": (
            f"{sum(r.accepted for r in run.rounds)} of {len(run.rounds)}" if run.rounds else "–"
        ),
        "size": last.get("mean_size"),
        "coverage": last.get("coverage"),
        "hub": last.get("worst_in_degree"),
        "reach": last.get("reach"),
        "same_class_found": last.get("same_class_found"),
        "precision": last.get("precision"),
        "over_own": gap("precision_own_nearest"),
        "over_pairs": gap("precision_all_pairs"),
        "knn": knn[-1] if knn else None,
        "best_knn": max(knn) if knn else None,
        "seconds": sum(r.report.get("seconds", 0) for r in run.rounds) if run.rounds else None,
    }


def _confusion(m: sections.Mined, album: Album) -> Confusion:
    counts = m.confusion
    K = len(counts)
    names = list(album.dataset.classes or map(str, range(K)))
    wrong = int(counts.sum())
    shares = (counts.double() / counts.max().clamp(min=1)).tolist()
    table = []
    if K <= MOST_CLASSES and wrong:
        table = [(names[i], list(zip(shares[i], counts[i].tolist()))) for i in range(K)]
    worst = [(names[a], names[b], n, n / wrong) for a, b, n in figures.worst_pairs(counts)]
    return Confusion(wrong, m.round.report.get("edges", 0), names[:K], table, worst)


def _grids(runs: Sequence[Run], albums: dict[tuple, Album]) -> list[Grid]:
    grids = []
    with torch.no_grad():
        for images, album in albums.items():
            grids += build_grids([run for run in runs if run.images == images], album)
    return grids


def is_report(path: Path) -> bool:
    """Whether a file is a page that `write_report` wrote, this version's or an earlier one's."""
    with open(path, "rb") as file:
        ours = r'<meta name="generator" content="moco_isl|· moco_isl</title>'
        return bool(re.search(ours.encode(), file.read(1 << 16)))


def _write(out: Path, text: str) -> None:
    files.require_ours(out, is_report, "--out")
    try:
        files.write_text(text, out)
    except OSError as error:
        message = f"cannot write {out}: {error.strerror}; give another file with --out"
        raise RunFailed(message) from error
