"""benchmarks/RESULTS.md, written from benchmarks/results/*.json: python -m benchmarks.results

The schema of those files is that of benchmarks/common.py. A file that is not in it is named at the
end of the page.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.common import RESULTS, cell, short
from moco_isl import files
from moco_isl.errors import BadInput

PAGE = Path(__file__).parent / "RESULTS.md"
HEAD = """# What was measured

Written by `python -m benchmarks.results` from `benchmarks/results/*.json`, never by hand. `make
bench` measures what a machine can and writes both. A time is the median of n repeats (least to
most), warm-up excluded; forms that are compared took turns in one process. "x as fast" and the
floor are of the same table. A bar is what is to be reached, a goal what is hoped for; both were set
for an H200 and stand only beside its figures, unless the measure is a ratio.
"""
TIMING = [
    ("what", ""),
    ("time", "median"),
    ("spread", "least to most"),
    ("n", "n"),
    ("ratio", "x as fast"),
    ("of", "as"),
    ("floor", "floor"),
    ("bar", "bar"),
    ("goal", "goal"),
    ("images_per_s", "img/s"),
    ("memory_gib", "GiB"),
]


def of_timing(row: dict) -> dict:
    """A row of timings as cells of TIMING; bar, goal and floor are in its unit."""
    spread = f"{short(row['low'])} to {short(row['high'])}" if row.get("n", 1) > 1 else None
    return {**row, "time": f"{short(row['value'])} {row['unit']}", "spread": spread}


def table(facts: dict) -> str:
    """The rows as a Markdown table; of timings only those columns that any row fills."""
    rows = facts["rows"]
    if facts.get("columns") is None:
        rows = [of_timing(row) for row in rows]
        columns = [
            (key, heading)
            for key, heading in TIMING
            if any(row.get(key) is not None for row in rows)
        ]
    else:
        columns = [(c, c) if isinstance(c, str) else tuple(c) for c in facts["columns"]]
        rows = [
            row if isinstance(row, dict) else dict(zip((key for key, _ in columns), row))
            for row in rows
        ]
    texts = [[cell(row.get(key)).replace("|", "\\|") for key, _ in columns] for row in rows]
    numbers = [
        i > 0 and all(not text or text[0] in "0123456789-+." for text in column)
        for i, column in enumerate(zip(*texts))
    ]
    lines = [
        [heading.replace("|", "\\|") for _, heading in columns],
        ["---:" if number else "---" for number in numbers],
        *texts,
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def hardware(facts: dict) -> str:
    device = facts["device"]
    if isinstance(device, str):
        return device
    text = device["name"]
    if device.get("cores"):
        text += f", {device['cores']} cores" + (
            f", {device['threads']} threads used" if device.get("threads") else ""
        )
    return text + (
        f", load {device['load']:g} at the end" if device.get("load") is not None else ""
    )


def section(facts: dict) -> str:
    """One file's part of the page. Raises KeyError where it is not in the schema."""
    versions = facts["versions"]
    words = (
        versions
        if isinstance(versions, str)
        else ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    about = [
        hardware(facts),
        words,
        facts["date"],
        *([f"commit {facts['commit']}"] if facts.get("commit") else []),
        *([f"n = {facts['n']}"] if facts.get("n") else []),
    ]
    parts = [f"## {facts['title']}", f"`{facts['command']}`  \n{'; '.join(about)}", table(facts)]
    if facts["notes"]:
        parts.append("\n".join(f"- {note}" for note in facts["notes"]))
    return "\n\n".join(parts)


def page(folder: Path = RESULTS) -> str:
    parts, others = [HEAD.rstrip()], []
    for path in sorted(folder.glob("*.json")):
        try:
            parts.append(section(json.loads(path.read_text())))
        except (KeyError, TypeError):
            others.append(path.name)
    if others:
        parts.append(f"Not in the common form, and so not shown: {', '.join(others)}.")
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="where the JSONs are (default: benchmarks/results)",
    )
    parser.add_argument(
        "--page",
        type=Path,
        default=PAGE,
        metavar="FILE.md",
        help="what to write (default: benchmarks/RESULTS.md)",
    )
    args = parser.parse_args(argv)
    try:
        files.require_ours(
            args.page,
            lambda path: path.read_bytes().startswith(HEAD.partition("\n")[0].encode()),
            "--page",
        )
    except BadInput as error:
        sys.exit(f"benchmarks.results: {error}")
    files.write_text(page(args.results), args.page)
    print(f"written: {args.page}, of {len(list(args.results.glob('*.json')))} files")


if __name__ == "__main__":
    main()
