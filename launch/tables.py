"""What a sweep has to show: a row a point, and curves of a result over a setting."""

import contextlib
import json
import statistics
from pathlib import Path

from launch import report
from moco_isl import files, schema
from moco_isl.errors import BadInput


def write_table(plan: dict, folder: Path) -> None:
    """Print and write table.md and table.json: a row a point, its own settings and what it logged last."""
    rows = [
        {"point": name, **{k: _number(v) for k, v in own.items()}, **results(plan["script"], folder / name)}
        for name, own in plan["own"].items()
    ]
    columns = list(dict.fromkeys(k for row in rows for k in row))
    if plan["columns"]:
        own = {"point"} | {k for settings in plan["own"].values() for k in settings}
        columns = [c for c in columns if c in own] + [c for c in plan["columns"] if c in columns]
    cells = [columns, ["---"] * len(columns), *([_shown(row.get(c)) for c in columns] for row in rows)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in cells)
    print(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(text + "\n", folder / "table.md")
        files.write_text(json.dumps(rows, indent=1) + "\n", folder / "table.json")
    except OSError as error:
        raise BadInput(f"cannot write into '{folder}': {error.strerror}; {files.cure(error)}") from error
    if plan["figures"]:
        write_curves(plan["figures"], rows, folder)


def _number(value):
    """A setting as it is written in the sweep's file; as a number, where it is one, to draw over."""
    for kind in (int, float) if isinstance(value, str) else ():
        with contextlib.suppress(ValueError):
            if report.is_number(number := kind(value)):
                return number
    return value


def _shown(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else files.shown(str(value)).replace("|", "\\|")


ROWS = {"knn": "results", "lincls": "classifiers"}  # where results.json has what was judged


def results(script: str, out: Path) -> dict:
    """What a point has to show: of a pretraining what it logged last, of an evaluation its results.json.

    {} where there is none yet. Raises BadInput where the file is none of ours.
    """
    if script == "pretrain":
        seen = report.progress(str(out))
        return {k: seen.get(k) for k in ("epoch", "loss", "knn")} | report.last_round(str(out))
    file = out / "results.json"
    if not files.kind(file):
        return {}
    where = files.named("", file)
    found = report.parse(files.read_text(file, expected="the results of an evaluation"), where)
    schema.require(found, {f"{ROWS[script]}?": [{...: object}], ...: object}, where)
    judged = [result for result in found.get(ROWS[script], []) if report.is_number(result.get("top1"))]
    chosen = [result for result in judged if result.get("chosen", True)]  # of learning rates, on images held out
    best = max(chosen, key=lambda result: result["top1"], default={})
    return {k: v for k, v in best.items() if isinstance(v, str) or report.is_number(v)}


def write_curves(figures: list[dict], rows: list[dict], folder: Path) -> list[Path]:
    """Draw an SVG for each {x: a setting, y: a column} into folder, from the points that name x themselves.

    Raises BadInput without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadInput("figures need matplotlib: pip install 'moco_isl[report]'; the table is written") from error
    written = []
    for number, wanted in enumerate(figures):
        x, y = wanted["x"], wanted["y"]
        curve = points_of(rows, x, y)
        if not curve:
            print(f"=> no curve of {y} over {x}: no point has both yet")
            continue
        axes = (figure := Figure(figsize=(4.5, 3.2), layout="constrained")).add_subplot()
        axes.errorbar(
            *zip(*[(value, mean) for value, mean, _ in curve]),
            yerr=[spread for *_, spread in curve],
            marker="o",
            capsize=3,
        )
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        written.append(folder / f"curve_{number}_{x}.svg")
        figure.savefig(written[-1])
        print(f"=> {written[-1]}")
    return written


def points_of(rows: list[dict], x: str, y: str) -> list[tuple[float, float, float]]:
    """(value of x, mean of y, its standard deviation or 0), by x."""
    found: dict[float, list[float]] = {}
    for row in rows:
        value, result = row.get(x), row.get(y)
        if report.is_number(value) and report.is_number(result):
            found.setdefault(value, []).append(result)
    return [
        (value, statistics.fmean(ys), statistics.stdev(ys) if len(ys) > 1 else 0.0)
        for value, ys in sorted(found.items())
    ]
