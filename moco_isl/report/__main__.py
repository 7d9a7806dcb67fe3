"""Write report.html about runs: how they went, what was mined, whether it helped.

    python -m moco_isl.report RUN [RUN ...] [--labels] [--out FILE]

The page is one file that works offline. Several runs are compared; it then lies
in the first one's folder. A run that mined is held against its twin: the same
run with --miner none.
"""

import argparse
import os
import sys
from pathlib import Path

from moco_isl import files
from moco_isl.errors import BadInput
from moco_isl.run import exits, flags


def get_parser() -> argparse.ArgumentParser:
    parser = flags.Parser(prog="python -m moco_isl.report", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the --out folder of a run")
    parser.add_argument(
        "--labels",
        action=argparse.BooleanOptionalAction,
        default=False,
        help=(
            "look the labels of the images up: precision of the mined sets, mistakes, confused"
            " classes"
        ),
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page (default: RUN/report.html); over nothing but such a page",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        action="append",
        help="where the images lie now, if not where the run read them; again for each of several",
    )
    parser.add_argument(
        "--breakeven",
        metavar="FILE",
        help=(
            'from which precision on mined positives help, as JSON: {"meanlog": {"5": 0.84},'
            ' "logsum": 0.7}, by loss and set size; for the verdict on a run without a twin'
            " (default: RUN/breakeven.json, if there)"
        ),
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write the report; returns the exit code."""
    return exits.exit_code(_run, argv)


def _run(argv: list[str] | None, stop) -> None:
    args = get_parser().parse_args(argv)
    try:
        from moco_isl.report.page import is_report, write_report
    except ImportError as error:
        raise BadInput(
            f"the report needs matplotlib and jinja2 ({error}): pip install 'moco_isl[report]'"
        ) from error
    from moco_isl.report.runs import read_runs
    from moco_isl.report.verdict import read_breakeven

    runs = read_runs(args.runs)
    out = Path(args.out or runs[0].path / "report.html")
    files.require_ours(out, is_report, "--out")
    flags.check(
        files.kind(out.parent, "--out") == "folder",
        f"no folder '{out.parent}' for --out '{out}': make it first",
    )
    files.require_folder(out.parent, "--out")
    breakeven = Path(args.breakeven or runs[0].path / "breakeven.json")
    table = read_breakeven(breakeven) if args.breakeven or os.path.exists(breakeven) else None
    write_report(runs, out, args.labels, args.data, table)
    print(f"=> {files.shown(out)} ({out.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    sys.exit(main())
