"""Read args.json and metrics.jsonl of a run folder.

Each line is compared with the shape of what `folder.RunFolder` and the scripts write.
"""

from pathlib import Path

from moco_isl import files
from moco_isl.errors import BadInput
from moco_isl.schema import Holds, Number, parse_json, read_json, require

MOST = 4 << 30  # bytes of metrics.jsonl

WHOLE = Number(0, 10**12, whole=True)
FIGURE = Number(-1e100, 1e100, finite=False)  # the means of a failing run may be anything
SHARE = Number(0, 1, finite=False)

_FACTS = {
    "command?": [str],
    "version?": str,
    "git?": (str, None),
    "device?": (str, None),
    "earlier?": [dict],
    "labels_used?": bool,
    ...: object,
}
_HISTORY = Holds(
    {"iteration": [WHOLE], ...: [FIGURE]},
    lambda history: len({len(figures) for figures in history.values()}) == 1,
    "a list of equal length for each figure",
)
LINES = {
    "step": {
        "kind": {"step"},
        "epoch": WHOLE,
        "step": WHOLE,
        "total?": WHOLE,
        "lr": FIGURE,
        "loss": FIGURE,
        ...: FIGURE,
    },
    "epoch": {
        "kind": {"epoch"},
        "epoch": WHOLE,
        "total?": WHOLE,
        "loss": FIGURE,
        "knn?": Number(0, 100),
        "probe?": Number(0, 100, finite=False),
        ...: FIGURE,
    },
    "round": {
        "kind": {"round"},
        "epoch": WHOLE,
        "round": WHOLE,
        "miner?": str,
        "accepted?": bool,
        "why?": str,
        "edges?": WHOLE,
        "mean_size": Number(0, 1e12),
        "coverage": Number(0, 1),
        "worst_in_degree?": WHOLE,
        "seconds?": Number(0, 1e12),
        "distinct?": SHARE,
        "threshold?": FIGURE,
        "reach?": (SHARE, None),
        "same_class_found?": (SHARE, None),
        "effective_rank?": FIGURE,
        "apart?": SHARE,
        "history?": _HISTORY,
        **{
            f"precision{of}?": (SHARE, None)
            for of in ("", "_own_nearest", "_all_pairs", "_estimate", "_at_most")
        },
        ...: object,
    },
    "clusters": {
        "epoch": WHOLE,
        "nmi?": FIGURE,
        "nmi_labels?": FIGURE,
        ...: object,
    },
}


def read_facts(folder: Path, flags: dict | None = None) -> dict:
    """Read args.json of a run folder.

    flags: the shape of its "args", see `state.flags_shape`; None: any. Raises BadInput.
    """
    return read_json(
        folder / "args.json",
        {**_FACTS, "args?": flags or dict},
        expected="args.json as our scripts write it",
    )


def read_metrics(folder: Path) -> list[dict]:
    """Read the lines of a pretraining's metrics.jsonl, except a last one that a kill cut off.

    Raises BadInput.
    """
    path = folder / "metrics.jsonl"
    whole = files.read_text(
        path, expected="metrics.jsonl as main_moco_isl.py writes it", most=MOST
    ).split("\n")[:-1]
    return [
        _line(text, f"cannot read {files.named('', path)}, line {number}")
        for number, text in enumerate(whole, 1)
        if text
    ]


def last_round(folder: Path, size: int) -> dict:
    """The last line of a round in the first `size` bytes of metrics.jsonl; {} where there is none.

    No file and lines that are no JSON of ours are passed over: a run can go on without them.
    """
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            lines = file.read(size).decode(errors="replace").split("\n")
    except OSError:
        return {}
    for text in reversed(lines):
        if '"round"' in text:
            try:
                line = _line(text, "")
            except BadInput:
                continue
            if line["kind"] == "round":
                return line
    return {}


def _line(text: str, where: str) -> dict:
    line = parse_json(text, where)
    require(line, {"kind": str, ...: object}, where)
    require(line, LINES.get(line["kind"], {...: object}), where)
    return line


def require_lines_after(folder: Path, size: int, total: int, path) -> None:
    """Raise BadInput where the checkpoint `path` and metrics.jsonl are not of one run.

    What stands behind the first `size` bytes of metrics.jsonl will be cut, and so must have been
    logged after the `total` steps that the checkpoint knows of.
    """
    metrics = folder / "metrics.jsonl"
    if files.kind(metrics) != "file" or metrics.stat().st_size <= size:
        return
    with open(metrics, "rb") as file:
        file.seek(max(size - 1, 0))
        inside = size > 0 and file.read(1) != b"\n"
        later = file.read().decode(errors="replace").split("\n")
    for text in later[:-1]:
        try:
            line = parse_json(text, "")
            require(line, {"total?": WHOLE, ...: object}, "")
        except BadInput:
            inside = True  # half a line, or what no run of ours wrote
            break
        inside = inside or line.get("total", total) < total
    if inside:
        raise BadInput(
            f"{files.named('', path)} was saved after {size} bytes of {files.named('', metrics)},"
            " but lines from before it come behind them: they are not of one run; start a new one"
            " with --init and another --out"
        )
