"""The table of a transfer over seeds: results.json of moco_isl.transfer, a row a kind of encoder.

    python -m moco_isl.transfer runs/start_tiny100/* --to cifar10:CIFAR --out runs/transfer_tiny100
    python -m studies.transfer runs/transfer_tiny100

Encoders whose names differ by ",seed=N" alone are one row: mean ± standard deviation.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

from benchmarks import common
from moco_isl.errors import BadInput
from moco_isl.report.runs import shortest_ends
from moco_isl.transfer import WAYS, read_own
from studies.figures import Result

SEED = re.compile(r",seed=\d+(?=/|$)")


def kinds(rows: list[dict]) -> dict[tuple[str, str], dict]:
    """(data set, encoder without its seed) -> {"epoch", way: [top-1 of the seeds]}."""
    kind = lambda row: Path(SEED.sub("", Path(row["encoder"]).as_posix()))
    paths = list(dict.fromkeys(map(kind, rows)))
    names = dict(zip(paths, shortest_ends(paths, least=2)))
    found: dict[tuple[str, str], dict] = {}
    for row in rows:
        name = names[kind(row)]
        cells = found.setdefault((row["to"], name), {"epoch": row["epoch"]})
        cells.setdefault(row["by"], []).append(row["top1"])
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="--out of moco_isl.transfer")
    parser.add_argument("--title", help="of the table (default: the folder's name)")
    parser.add_argument("--note", action="append", default=[], help="a line below the table")
    parser.add_argument("--out", metavar="DIR", help="where the JSON goes (studies/results)")
    args = parser.parse_args(argv)
    try:
        rows = read_own(args.folder)
        if not rows:
            raise BadInput(f"no results.json in {args.folder}: expected --out of moco_isl.transfer")
    except BadInput as error:
        print(f"studies.transfer: {error}", file=sys.stderr)
        return error.exit_code
    ways = [way for way in WAYS if any(row["by"] == way for row in rows)]
    columns = [("to", "judged on"), ("row", "encoder"), ("epoch", "epoch")]
    columns += [(way, f"{WAYS[way][2]} %") for way in ways]
    name = args.folder.name.replace("_", "-")
    result = Result(name, args.title or name, torch.device("cpu"), [*columns, ("n", "n")])
    for (to, row), cells in sorted(kinds(rows).items()):
        figures = {way: common.spread(cells[way]) for way in ways if way in cells}
        n = max(len(cells[way]) for way in figures)
        result.add({"to": to, "row": row, "epoch": cells["epoch"], "n": n, **figures})
    for note in args.note:
        result.note(note)
    print(f"  written: {result.write(args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
