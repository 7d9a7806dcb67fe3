"""The curves of a sweep: a result against one of the settings, mean and spread over the points that share its value."""

import math
import statistics
from pathlib import Path

from moco_isl.errors import BadInput


def write_curves(figures: list[dict], rows: list[dict], folder: Path) -> list[Path]:
    """Draw an SVG for each {x: a setting, y: a column} into folder; rows without either are left out. Raises BadInput without matplotlib."""
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
        axes.errorbar(*zip(*[(value, mean) for value, mean, _ in curve]), yerr=[spread for *_, spread in curve], marker="o", capsize=3)
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
        if isinstance(value, (int, float)) and isinstance(result, (int, float)) and math.isfinite(result):
            found.setdefault(value, []).append(result)
    return [(value, statistics.fmean(ys), statistics.stdev(ys) if len(ys) > 1 else 0.0) for value, ys in sorted(found.items())]
