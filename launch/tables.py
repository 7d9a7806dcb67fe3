"""The results of a sweep: a table with a row for each point, and curves over a setting."""

import contextlib
import io
import json
import statistics
from pathlib import Path

from launch import report
from moco_isl import files, schema
from moco_isl.errors import BadInput, RunFailed

CREATOR = "moco_isl"  # marks a curve that we wrote


def write_table(plan: dict, folder: Path) -> None:
    """Print and write table.md and table.json: a row a point, with what it logged last."""
    rows = [
        {
            "point": name,
            **{k: _number(v) for k, v in own.items()},
            **results(plan["script"], folder / name),
        }
        for name, own in plan["own"].items()
    ]
    columns = list(dict.fromkeys(k for row in rows for k in row))
    if plan["columns"]:
        own = {"point"} | {k for settings in plan["own"].values() for k in settings}
        columns = [c for c in columns if c in own] + [c for c in plan["columns"] if c in columns]
    cells = [
        columns,
        ["---"] * len(columns),
        *([_shown(row.get(c)) for c in columns] for row in rows),
    ]
    text = "\n".join("| " + " | ".join(line) + " |" for line in cells)
    print(text)
    require_ours(plan, folder)
    _write(text + "\n", folder / "table.md")
    _write(json.dumps(rows, indent=1) + "\n", folder / "table.json")
    if plan["figures"]:
        write_curves(plan["figures"], rows, folder)


def require_ours(plan: dict, folder: Path) -> None:
    """Raise BadInput where a file that `write_table` is to write is there and is not its own."""
    curves = [curve_name(number, wanted) for number, wanted in enumerate(plan["figures"] or [])]
    begins = {
        "table.md": "| point ",
        "table.json": '[\n {\n  "point": ',
        **dict.fromkeys(curves, "<?xml"),
    }
    for name, start in begins.items():
        creator = CREATOR if name in curves else ""
        files.require_ours(
            folder / name, lambda path: _is_written(path, start, creator), "--job-dir"
        )


def _is_written(path: Path, start: str, creator: str) -> bool:
    with open(path, encoding="utf-8", errors="replace") as file:
        head = file.read(4096)
    return head.startswith(start) and creator in head


def curve_name(number: int, wanted: dict) -> str:
    """The file of the curve {x: a setting, y: a column}."""
    return f"curve_{number}_{wanted['x']}.svg"


def _write(text: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(text, path)
    except OSError as error:
        raise RunFailed(
            f"cannot write '{path}': {error.strerror}; {files.cure(error)}, and give --table"
        ) from error


def _number(value):
    """A setting as the sweep's file has it; as a number, where it is one, to draw over."""
    for kind in (int, float) if isinstance(value, str) else ():
        with contextlib.suppress(ValueError):
            if report.is_number(number := kind(value)):
                return number
    return value


def _shown(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else files.shown(str(value)).replace("|", "\\|")


ROWS = {"knn": "results", "lincls": "classifiers"}  # the name of the rows in each results.json


def results(script: str, out: Path) -> dict:
    """What a point logged last, or the results.json of an evaluation.

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
    if script == "detect":
        schema.require(found, {"AP": (float, None), ...: object}, where)
        return {k: found[k] for k in ("AP", "AP50", "AP75") if report.is_number(found.get(k))}
    schema.require(found, {f"{ROWS[script]}?": [{...: object}], ...: object}, where)
    judged = [
        result for result in found.get(ROWS[script], []) if report.is_number(result.get("top1"))
    ]
    # the best learning rate, chosen on images held out
    chosen = [result for result in judged if result.get("chosen", True)]
    best = max(chosen, key=lambda result: result["top1"], default={})
    return {k: v for k, v in best.items() if isinstance(v, str) or report.is_number(v)}


def write_curves(figures: list[dict], rows: list[dict], folder: Path) -> list[Path]:
    """Draw an SVG for each {x: a setting, y: a column} into folder.

    From the points that name x themselves. Raises BadInput without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadInput(
            "figures need matplotlib: pip install 'moco_isl[report]'; the table is written"
        ) from error
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
        written.append(folder / curve_name(number, wanted))
        figure.savefig(
            buffer := io.StringIO(), format="svg", metadata={"Creator": CREATOR, "Date": None}
        )
        _write(buffer.getvalue(), written[-1])
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
