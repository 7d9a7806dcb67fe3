"""Judge a study: the run folders of a sweep as one table.

    python launch/sweep.py studies/gain_digits.yaml         the runs; again: it goes on
    python -m studies.judge studies/gain_digits.yaml        the table of those that have ended

Runs that differ by their seed alone are one row: mean ± standard deviation of n seeds. The part
`judge` of the sweep's file says what is shown:

    title: What mining adds         of the table (default: the file's name)
    figures: [knn, one_shot]        of knn, one_shot, near (of the k nearest images how many are of
                                    the same class), linear (main_lincls.py), logged (kNN as the run
                                    itself logged it last, see --knn-every)
    neighbours: 50                  k of knn and near (200)
    probe: --epochs 30 --schedule 18 24    flags of the probe of linear that differ from PROBE
    over: [none]                    rows that those after them are compared with, paired by seed
    breakeven: FILE.json            break-evens that a study of breakeven_*.yaml has left
    note: ...                       a line below the table

Figures of a run are kept in its folder as judged.json and made once. A sweep over the precision of
an oracle (--miner oracle) is judged by studies/breakeven.py.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from benchmarks import common
from launch import sweep
from moco_isl import files, schema
from moco_isl.errors import BadInput
from moco_isl.options import listed
from moco_isl.report.verdict import breakeven_of, read_breakeven
from moco_isl.run.logs import read_facts
from moco_isl.training.options import MAY_CHANGE
from studies import breakeven
from studies.figures import PROBE, ROUND, Judge, Result, linear, metrics, of_round

HEADINGS = {
    "knn": "kNN %",
    "one_shot": "1-shot %",
    "linear": "linear %",
    "near": "true among nearest %",
    "logged": "kNN % by the run",
}
STARTS = {"data", "init", "research_labels"}  # what a run began with, beside the flags it keeps
PART = {
    "title?": str,
    "note?": str,
    "figures?": [set(HEADINGS)],
    "neighbours?": str,  # a whole number from 1 on
    "probe?": str,
    "over?": [str],
    "breakeven?": str,
}


@dataclass
class TrainedRun:
    """A point of the sweep: its row, seed, settings and folder."""

    row: str
    seed: str
    settings: dict
    folder: Path

    @property
    def flags(self) -> list[str]:
        return sweep.flags_of("pretrain", self.settings)

    def ended(self) -> bool:
        """Whether it has. Raises BadInput where it has, but with other flags than these."""
        if not (self.folder / "checkpoint_last.pth.tar").exists():
            return False
        saved = read_facts(self.folder).get("args", {})
        asked = self.asked
        epochs = saved.get("epochs", 0)
        if asked.epochs > epochs or all(
            line.get("epoch") != epochs - 1 for line in self.lines("epoch")
        ):
            return False
        for name in sorted(asked.given - MAY_CHANGE - {"config"} | STARTS):
            before, now = saved.get(name), getattr(asked, name)
            if name == "data":
                before, now = (list(map(os.path.realpath, listed(x))) for x in (before, now))
            if name in saved and before != now:
                raise BadInput(
                    f"the run in {self.folder} has ended with --{name.replace('_', '-')} {before},"
                    f" and {now} is asked: give another --job-dir"
                )
        return True

    @cached_property
    def asked(self) -> argparse.Namespace:
        """Its flags as the script reads them."""
        return sweep.options.parse_script("pretrain", self.flags, 1, 1, check=False)

    def lines(self, kind: str) -> list[dict]:
        return [line for line in metrics(self.folder) if line["kind"] == kind]


class Figures:
    """Figures of runs; images are read once for all runs that are judged on them."""

    def __init__(self, names: list[str], k: int, device: torch.device, probe: str = ""):
        self.names = names
        self.k = k
        self.probe = probe
        self.device = device
        self.judges: dict[tuple, Judge] = {}

    def __call__(self, run: TrainedRun) -> dict:
        """Figures by labels, those that the run logged, and those of its last round of mining."""
        rounds = run.lines("round")
        found = of_round(rounds[-1]) if rounds else {}
        found["seconds"] = _seconds(run)
        if "logged" in self.names:
            found["logged"] = next(
                (line["knn"] for line in reversed(run.lines("epoch")) if "knn" in line), None
            )
        return found | self._by_labels(run)

    def _by_labels(self, run: TrainedRun) -> dict:
        file = run.folder / "checkpoint_last.pth.tar"
        kept = run.folder / "judged.json"
        state = file.stat()
        of = {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "neighbours": self.k}
        of |= {"probe": self.probe} if self.probe else {}
        found = json.loads(kept.read_text()) if kept.exists() else {}
        if found.get("of") != of:
            found = {"of": of}
        images = _images(run)
        if {"knn", "one_shot", "near"} & set(self.names) and "knn" not in found:
            if tuple(images) not in self.judges:
                self.judges[tuple(images)] = Judge(run.flags, self.k, self.device)
            found |= self.judges[tuple(images)](file)
        if "linear" in self.names and "linear" not in found:
            where = [*images, "--device", str(self.device)]
            probe = [*PROBE, *shlex.split(self.probe)]
            found["linear"] = linear(file, where, run.folder / "linear", probe)
        files.write_text(json.dumps(found) + "\n", kept)
        return {name: found[name] for name in self.names if name in found}


def _images(run: TrainedRun) -> list[str]:
    """The flags of a run that say which images it has."""
    args = run.asked
    flags = [*listed(args.data), "--dataset", args.dataset]
    if args.image_size:
        flags += ["--image-size", str(args.image_size)]
    return flags + (["--cache", str(args.cache)] if args.cache else [])


def _seconds(run: TrainedRun) -> float | None:
    """The seconds of training, by the median rate, and those of the rounds."""
    batch = read_facts(run.folder)["args"]["batch_size"]
    steps = run.lines("step")
    rates = [line["images_per_s"] for line in steps]
    if not rates:
        return None
    training = steps[-1]["total"] * batch / statistics.median(rates)
    return training + sum(line["seconds"] for line in run.lines("round"))


# ---------------------------------------------------------------- the table


def runs_of(plan: dict, folder: Path) -> list[TrainedRun]:
    runs = []
    for name, settings in plan["points"].items():
        seed = settings.get("seed") or "0"
        runs.append(TrainedRun(name.removesuffix(f",seed={seed}"), seed, settings, folder / name))
    return runs


def table(name: str, part: dict, found: dict[str, dict[str, dict]], device: torch.device) -> Result:
    """found: row -> seed -> figures."""
    shown = part.get("figures", ["knn"])
    over = part.get("over", [])
    figures = [figures for seeds in found.values() for figures in seeds.values()]
    rounds = [key for key in ROUND if any(x.get(key) is not None for x in figures)]
    known = read_breakeven(Path(part["breakeven"])) if "breakeven" in part else None
    columns = [("row", ""), *((key, HEADINGS[key]) for key in shown)]
    if over:
        columns += [(f"gain_{key}", f"gain, {HEADINGS[key].replace(' %', '')}") for key in shown]
    columns += [(key, ROUND[key][0]) for key in rounds]
    columns += [("breakeven", "break-even")] if known else []
    columns += [("seconds", "seconds"), ("n", "n")]
    result = Result(name, part.get("title", name), device, columns)
    base = None
    for row, seeds in found.items():
        base = row if row in over else base
        cells = {"row": row, "n": len(seeds)}
        for key in shown:
            values = {seed: x[key] for seed, x in seeds.items() if x.get(key) is not None}
            cells[key] = common.spread(list(values.values())) if values else None
            if base not in (None, row):
                before = {s: x[key] for s, x in found[base].items() if x.get(key) is not None}
                pairs = [values[s] - before[s] for s in values if s in before]
                cells[f"gain_{key}"] = common.spread(pairs, "+") if pairs else None
        for key in (*rounds, "seconds"):
            values = [x[key] for x in seeds.values() if x.get(key) is not None]
            cells[key] = statistics.fmean(values) if values else None
        form = next(iter(seeds.values())).get("form")
        if known and cells.get("size"):
            cells["breakeven"] = breakeven_of(known, form, cells["size"])
        result.add(cells)
    if over:
        result.note(
            f"Gains are over the row {' or '.join(over)} above, in points, paired by seed; mean ±"
            " standard deviation of n seeds."
        )
    if rounds:
        result.note("Of the last round of mining; precision is by labels, which steer nothing.")
    if "note" in part:
        result.note(part["note"])
    return result


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE.yaml", type=Path, help="the sweep")
    parser.add_argument(
        "--job-dir", metavar="DIR", type=Path, help="its folder (runs/<name of the file>)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: as torch sees fit)")
    parser.add_argument("--out", metavar="DIR", help="where the JSON goes (studies/results)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    common.begin(args)
    folder = args.job_dir or Path("runs") / args.file.stem
    name = args.file.stem.replace("_", "-")
    try:
        plan = sweep.read_plan(args.file)
        part = plan["judge"]
        schema.require(part, PART, f"{args.file}: judge")
        neighbours = part.get("neighbours", "200")
        if not neighbours.isdecimal() or not int(neighbours):
            raise BadInput(f"{args.file}: judge: neighbours {neighbours}: expected 1 or more")
        names = part.get("figures", ["knn"])
        figures = Figures(names, int(neighbours), args.device, part.get("probe", ""))
        found: dict[str, dict[str, dict]] = {}
        settings = {}
        left = []
        for run in runs_of(plan, folder):
            if not run.ended():
                left.append(run.folder.name)
                continue
            settings[run.row] = run.settings
            found.setdefault(run.row, {})[run.seed] = {
                **figures(run),
                "form": run.settings.get("isl-loss", "logsum"),
            }
        if not found:
            raise BadInput(
                f"no run in {folder} has ended: python launch/sweep.py {args.file} runs them"
            )
        if any("oracle-precision" in given for given in settings.values()):
            results = breakeven.judged(name, part, found, settings, folder, args.device)
        else:
            results = [table(name, part, found, args.device)]
    except BadInput as error:
        print(f"studies.judge: {error}", file=sys.stderr)
        return error.exit_code
    if left:
        results[-1].note(f"{len(left)} runs have not ended: {', '.join(left)[:300]}")
    for result in results:
        print(f"  written: {result.write(args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
