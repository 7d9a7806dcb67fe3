"""results.json of main_knn.py and main_lincls.py, and results as a table."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moco_isl import files
from moco_isl.errors import BadInput, RunFailed
from moco_isl.options import opt
from moco_isl.schema import COUNT, Number, read_json

RESULTS = "results.json"
MEASURED = (
    "results",
    "classifiers",
    "few_labels",
    "classes",
    "AP",
    "AP50",
    "AP75",
    "seconds",
    "earlier",
)

_PERCENT = Number(0, 100)
_ROW = {"dim?": (COUNT, None), "top1": _PERCENT}
_KNN = {"feature?": str, "k?": COUNT, "T?": float, **_ROW}
_LINEAR = {
    "layer?": str,
    "lr?": float,
    "top5?": _PERCENT,
    "held_out_top1?": (_PERCENT, None),
    "best_top1_of_all_epochs?": (_PERCENT, None),
    "chosen?": bool,
    **_ROW,
}
_SHAPE = {
    "results?": [_KNN],
    "classifiers?": [_LINEAR],
    "few_labels?": [{"shots": COUNT, "top1": _PERCENT, ...: object}],
    "epoch?": (COUNT, str, None),
    "sha256?": str,
    "encoder?": {"key", "query"},
    "dataset?": str,
    "protocol?": str,
    "earlier?": [dict],
    ...: object,
}


@dataclass(kw_only=True)
class ResultsOptions:
    """Where results are written."""

    out: str | None = opt(
        None,
        metavar="DIR",
        help="folder for results.json (none); results of other checkpoints in it are kept",
    )


def read_results(path: str | Path, flag: str = "") -> dict:
    """What is in a results.json of either script. Raises BadInput."""
    return read_json(path, _SHAPE, flag, "results.json of main_knn.py or main_lincls.py")


def read_own(folder: str | Path, rows: str) -> dict:
    """The results.json in a folder, with figures under `rows`; {} where there is none.

    Raises BadInput for any other file of that name, which must not be written over.
    """
    found = {}

    def is_own(path: Path) -> bool:
        try:
            found.update(read_json(path, {rows: list, "earlier?": [dict], ...: object}))
        except BadInput:
            return False
        return True

    files.require_ours(Path(folder) / RESULTS, is_own, "--out")
    return found


def write_results(folder: str | Path, rows: str, results: dict) -> list[str]:
    """Write results.json, whole or not at all; returns the lines to print.

    rows: the name in `results` under which the figures are. The command is added. Figures that the
    file holds are replaced where all else (command, checkpoint, data) is the same; otherwise they
    move to the end of its list `earlier`. Raises BadInput where the file is somebody else's, and
    RunFailed where it cannot be written.
    """
    path = Path(folder) / RESULTS
    said = []
    results = {"command": sys.argv, **results}
    before = read_own(folder, rows)
    earlier = before.pop("earlier", [])
    if before and _setting(before) != _setting(json.loads(json.dumps(results))):
        earlier.append(before)
        said.append(
            f"=> the results of '{before.get('pretrained')}' that '{path}' held are kept in it,"
            ' under "earlier"'
        )
    if earlier:
        results["earlier"] = earlier
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(json.dumps(results, indent=1) + "\n", path)
    except OSError as error:
        raise RunFailed(f"cannot write '{path}': {error.strerror}") from error
    return [files.shown(line) for line in (*said, f"=> written to {path}")]


def _setting(results: dict) -> dict:
    """All of the results but the figures."""
    return {name: value for name, value in results.items() if name not in MEASURED}


def table(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    """Columns of text, the first left-aligned, the others right-aligned; floats with two decimals.

    None is an empty cell.
    """
    lines = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
