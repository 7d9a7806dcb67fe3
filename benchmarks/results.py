"""Write benchmarks/RESULTS.md and studies/RESULTS.md from the results/*.json beside each.

    python -m benchmarks.results              both pages
    python -m benchmarks.results FOLDER       FOLDER/RESULTS.md from FOLDER/results/*.json

benchmarks/common.py says what such a file holds. A file of another form is named at the end of the
page.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.common import cell, short
from moco_isl import files
from moco_isl.errors import BadInput

ROOT = Path(__file__).parent.parent
FOLDERS = [ROOT / "benchmarks", ROOT / "studies"]
TITLE = "# What was measured"
WRITTEN = """\
Written by `python -m benchmarks.results` from the files in `results/`, never by hand. Every table
has its command, its machine, its versions and its commit; n is how often a row was repeated.
"""
ABOUT = {
    "benchmarks": """\
`make bench` measures what a machine can and writes this page. A time is the median of n repeats
(least to most), warm-up excluded; forms that are compared took turns in one process. "x as fast"
and the floor are of the same table. A bar is what has to be reached, a goal what is hoped for; both
were set for an H200 and stand only beside its figures, unless the measure is a ratio.
""",
    "studies": """\
Questions to the method, answered by training and by features; see the files beside this page. A
command is the one that was typed at the commit beside it: before there were sweep files
(`studies/*.yaml`, judged by `python -m studies.judge FILE.yaml`), each study had a script in
`benchmarks/`.
""",
}
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
    columns = facts.get("columns")
    if columns is None:
        rows = [of_timing(row) for row in rows]
        filled = {key for row in rows for key, value in row.items() if value is not None}
        columns = [(key, heading) for key, heading in TIMING if key in filled]
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


def hardware(device: dict | str) -> str:
    if isinstance(device, str):
        return device
    text = device["name"]
    if device.get("cores"):
        text += f", {device['cores']} cores"
    if device.get("threads"):
        text += f", {device['threads']} threads used"
    if device.get("load") is not None:
        text += f", load {device['load']:g} at the end"
    return text


def section(facts: dict) -> str:
    """One file's part of the page. Raises KeyError where the file is of another form."""
    versions = facts["versions"]
    if not isinstance(versions, str):
        versions = ", ".join(f"{name} {version}" for name, version in versions.items())
    about = [hardware(facts["device"]), versions, facts["date"]]
    if facts.get("commit"):
        about.append(f"commit {facts['commit']}")
    if facts.get("n"):
        about.append(f"n = {facts['n']}")
    parts = [f"## {facts['title']}", f"`{facts['command']}`  \n{'; '.join(about)}", table(facts)]
    if facts["notes"]:
        parts.append("\n".join(f"- {note}" for note in facts["notes"]))
    return "\n\n".join(parts)


def page(folder: Path) -> str:
    """The text of a folder's RESULTS.md."""
    parts = [f"{TITLE}\n\n{WRITTEN}{ABOUT.get(folder.name, '')}".rstrip()]
    others = []
    for path in sorted((folder / "results").glob("*.json")):
        try:
            parts.append(section(json.loads(path.read_text())))
        except (KeyError, TypeError):
            others.append(path.name)
    if others:
        parts.append(f"Of another form, and so not shown: {', '.join(others)}.")
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", default=FOLDERS)
    for folder in parser.parse_args(argv).folders:
        path = folder / "RESULTS.md"
        is_ours = lambda path: path.read_bytes().startswith(TITLE.encode())
        try:
            files.require_ours(path, is_ours, "FOLDER")
        except BadInput as error:
            sys.exit(f"benchmarks.results: {error}")
        files.write_text(page(folder), path)
        print(f"written: {path}, of {len(list((folder / 'results').glob('*.json')))} files")


if __name__ == "__main__":
    main()
