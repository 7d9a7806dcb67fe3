"""How right must mined positives be to help? Break-even precision, from a sweep over an oracle's.

    python launch/sweep.py studies/start_digits.yaml                    a converged MoCo v2 a seed
    python launch/sweep.py studies/breakeven_digits_right_near.yaml     equal epochs from it
    python -m studies.judge studies/breakeven_digits_right_near.yaml    the tables, breakeven.json
    python -m studies.breakeven FILE-gains-cpu.json OUT.svg             the curves of a table again

The oracle (--miner oracle) draws positives of a known precision from the labels: this is research
into what mining has to reach, no result of a method. Its right positives are each image's nearest
of the same label, and its wrong ones the nearest of another, as mined sets have them. In the study
right_uniform the right ones come from anywhere in the class, and teach far more.

Break-even is where the mean gain over no positives, paired by seed and made monotone in precision,
crosses zero; its range is the 5th to 95th percentile of 1,000 bootstrap draws of the seeds. Where
even the lowest precision helps, or the highest does not, only a bound is known. breakeven.json,
which `python -m moco_isl.report --breakeven` takes, then holds the lowest precision tried, or 1.
"""

import argparse
import io
import itertools
import json
import random
import statistics
from pathlib import Path

import torch

from benchmarks import common
from moco_isl import files
from moco_isl.errors import BadInput
from studies.figures import Result

FORMS = {  # loss form -> what it is called, its flags
    "logsum": ("Eq. 5 + hard positives", ["--isl-loss", "logsum", "--isl-hpe", "0.5"]),
    "meanlog": ("mean of logs", ["--isl-loss", "meanlog", "--isl-hpe", "0"]),
}
METRICS = {"knn": "kNN", "one_shot": "1-shot", "near": "share of true labels among the nearest"}
COLOURS = ["#3b6fb6", "#c8553d", "#4f8a4c", "#8a6bb1", "#b08a2e", "#3a9a9a", "#888888", "#a05a7a"]
CLOSE = 0.06  # the search for the crossing ends between two precisions this close

# ---------------------------------------------------------------- the crossing

Gains = dict[float, list[float]]  # precision -> gains over no positives, one a seed


def monotone(values: list[float]) -> list[float]:
    """The rising sequence nearest to values by squared distance: falling neighbours are pooled."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [statistics.fmean(pool) for pool in pools for _ in pool]


def crossing(gains: Gains) -> tuple[float, str]:
    """The precision at which mean gains cross zero, and "".

    Where they never do: the lowest precision and "at most", or the highest and "above".
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
    """5th and 95th percentile of the crossing over draws of each precision's seeds."""
    draw = random.Random(0)
    order = sorted(gains, reverse=True)  # the draws do not depend on that of the runs
    one = lambda: crossing({p: draw.choices(gains[p], k=len(gains[p])) for p in order})[0]
    found = sorted(one() for _ in range(draws))
    return found[draws // 20], found[-1 - draws // 20]


def closer(gains: Gains) -> float | None:
    """The precision to try next: halfway between the two around the crossing, or beyond the last.

    None where the crossing is known to CLOSE.
    """
    precisions = sorted(gains)
    at, bound = crossing(gains)
    if bound == "at most":
        return round(precisions[0] - 0.2, 3) if precisions[0] > 0.3 else None
    if bound == "above":
        return round((precisions[-1] + 1) / 2, 3) if precisions[-1] < 0.97 else None
    low, high = next((a, b) for a, b in itertools.pairwise(precisions) if a <= at <= b)
    return round((low + high) / 2, 3) if high - low > CLOSE else None


# ---------------------------------------------------------------- the tables


def judged(
    name: str,
    part: dict,
    found: dict[str, dict[str, dict]],
    settings: dict[str, dict],
    folder: Path,
    device: torch.device,
) -> list[Result]:
    """Two tables of a sweep's runs: the gains, and the break-evens.

    Writes breakeven.json and breakeven.svg into its folder. found: row -> seed -> figures;
    settings: row -> those of one of its runs. The row without oracle-precision is the one without
    positives.
    """
    bare = next((row for row, given in settings.items() if not given.get("oracle-precision")), None)
    if bare is None:
        raise BadInput(f"no run without positives has ended in {folder}: it is compared with")
    gains = gains_table(name, part, found, settings, bare, device)
    evens = evens_table(name, part, gains.rows, device)
    even: dict[str, dict[str, float]] = {}
    for (form, size), points in _curves(gains.rows).items():
        at, bound = crossing(points["knn"])
        even.setdefault(form, {})[f"{size:g}"] = 1.0 if bound == "above" else round(at, 3)
    files.write_text(json.dumps(even) + "\n", folder / "breakeven.json")
    draw(gains.rows, folder / "breakeven.svg")
    print(f"  written: {folder}/breakeven.json (for the report), breakeven.svg")
    return [evens, gains]


def gains_table(
    name: str,
    part: dict,
    found: dict[str, dict[str, dict]],
    settings: dict[str, dict],
    bare: str,
    device: torch.device,
) -> Result:
    """A row a loss form, size and precision; `<metric>_gains` are those of the seeds."""
    columns = [("loss", "loss"), ("size", "positives an image"), ("precision", "precision")]
    columns += [*METRICS.items(), ("n", "n")]
    title = part.get("title", name)
    title = f"Gains of positives of known precision, {title}"
    result = Result(f"{name}-gains", title, device, columns)
    result.unshown = tuple(f"{m}_gains" for m in METRICS)
    none = found[bare]
    cells = {m: common.spread([x[m] for x in none.values()]) for m in METRICS}
    result.add({"loss": "no positives", "size": 0, "n": len(none), **cells})
    for row, seeds in found.items():
        if row == bare or not none.keys() & seeds.keys():
            continue
        given = settings[row]
        gains = {m: [x[m] - none[s][m] for s, x in seeds.items() if s in none] for m in METRICS}
        result.add(
            {
                "loss": FORMS[given["isl-loss"]][0],
                "size": float(given["oracle-size"]),
                "precision": float(given["oracle-precision"]),
                "n": len(gains["knn"]),
                **{m: common.spread(x, "+") for m, x in gains.items()},
                **{f"{m}_gains": x for m, x in gains.items()},
            }
        )
    result.note(
        "First row: per cent. The others: points more than the same epochs without positives,"
        " paired by seed; mean ± standard deviation. kNN and 1-shot on held-out images; nearest: of"
        " those, in the training images."
    )
    return result


def evens_table(name: str, part: dict, rows: list[dict], device: torch.device) -> Result:
    """The break-even of each loss form and size, by each metric, of the rows of `gains_table`."""
    columns = [("loss", "loss"), ("size", "positives an image"), *METRICS.items(), ("n", "n")]
    title = f"Break-even precision of positives, {part.get('title', name)}"
    result = Result(name, title, device, columns)
    for (form, size), points in _curves(rows).items():
        cells = {m: in_words(gains) for m, gains in points.items()}
        n = min(map(len, points["knn"].values()))
        result.add({"loss": FORMS[form][0], "size": size, "n": n, **cells})
        if (precision := closer(points["knn"])) is not None:
            print(f"    its kNN is known closer with precision {precision:g} tried too")
    result.note(
        "From which precision on positives help, by each measure. In brackets: 5th to 95th"
        " percentile of 1,000 bootstrap draws of the seeds; breakeven.json: by kNN. Labels were"
        " used throughout (--research-labels)."
    )
    if "note" in part:
        result.note(part["note"])
    return result


def _curves(rows: list[dict]) -> dict[tuple[str, float], dict[str, Gains]]:
    """(loss form, size) -> metric -> gains by precision, of the rows of `gains_table`."""
    forms = {title: form for form, (title, _) in FORMS.items()}
    found: dict[tuple[str, float], dict[str, Gains]] = {}
    for row in rows:
        if row["loss"] in forms:
            of = found.setdefault((forms[row["loss"]], row["size"]), {m: {} for m in METRICS})
            for m in METRICS:
                of[m][row["precision"]] = row[f"{m}_gains"]
    return found


def in_words(gains: Gains) -> str:
    """The crossing, and in brackets its range."""
    at, bound = crossing(gains)
    low, high = bootstrap(gains)
    return f"{bound} {at:.2f}".strip() + (f" ({low:.2f} to {high:.2f})" if high > low else "")


# ---------------------------------------------------------------- the curves


def draw(rows: list[dict], path: Path) -> None:
    """Gain of kNN against precision, of rows of `gains_table`: a panel a loss, a line a size."""
    panels: dict[str, dict[str, Gains]] = {}
    for (form, size), points in _curves(rows).items():
        panels.setdefault(FORMS[form][0], {})[f"{size:g} an image"] = points["knn"]
    draw_panels(panels, "points of kNN over no positives", path)


def draw_panels(
    panels: dict[str, dict[str, Gains]], ylabel: str, path: Path, sharey: bool = True
) -> None:
    """Gain against precision: a panel a title, a line a name, a dot a seed."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "breakeven", "font.size": 9.5}
    with matplotlib.rc_context(style | {f"axes.spines.{x}": False for x in ("top", "right")}):
        figure = Figure(figsize=(4.6 * len(panels) + 1.4, 3.4), layout="constrained")
        all_axes = figure.subplots(1, len(panels), sharey=sharey, squeeze=False)[0]
        for axes, (title, lines) in zip(all_axes, panels.items()):
            axes.axhline(0, color="#888888", linewidth=1, linestyle=(0, (2, 2)))
            for (name, gains), colour in zip(lines.items(), COLOURS):
                x = sorted(gains)
                y = [statistics.fmean(gains[p]) for p in x]
                axes.plot(x, y, color=colour, label=name, marker="o", markersize=4)
                dots = [(p, gain) for p in x for gain in gains[p]]
                axes.scatter(*zip(*dots), color=colour, s=6, alpha=0.5)
            axes.set(title=title, xlabel="precision of the positives", ylabel=ylabel)
            if sharey:
                axes.label_outer()
        # the panels have the same lines
        figure.legend(
            *all_axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False
        )
        page = io.StringIO()
        figure.savefig(page, format="svg", metadata={"Date": None})
    files.write_text(page.getvalue(), path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="a file of studies/results, ...-gains-....json")
    parser.add_argument("out", type=Path, metavar="OUT.svg")
    args = parser.parse_args(argv)
    draw(json.loads(args.table.read_text())["rows"], args.out)


if __name__ == "__main__":
    main()
