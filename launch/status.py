#!/usr/bin/env python
"""What a job is doing: state, restarts, epoch, loss, images/s; and why it failed.

The last submission into a folder:
    python launch/status.py runs/4711
All of them, and those that follow the pretraining:
    ... --all
Stay until it has ended; exit code 0 if it succeeded:
    ... --wait
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import report, watch
from launch.options import LauncherParser, check_numbers
from launch.report import Entry
from moco_isl import files
from moco_isl.errors import BadInput


def get_parser() -> argparse.ArgumentParser:
    parser = LauncherParser("python launch/status.py", __doc__)
    parser.add_version()
    folder = "the folder that submit.py or sweep.py printed"
    parser.add_argument("job_dir", metavar="JOB_DIR", type=Path, help=folder)
    every = "every submission into the folder, and into those below it"
    parser.add_argument("--all", action="store_true", help=every)
    parser.add_argument("--wait", action="store_true", help="until the job has ended")
    poll = "seconds between two looks while waiting (5)"
    parser.add_argument("--poll", type=float, default=5, metavar="s", help=poll)
    return parser


def main(argv: list[str] | None = None) -> int:
    files.print_any_name()
    try:
        args = get_parser().parse_args(argv)
        check_numbers(args)
        entries = find(args.job_dir, args.all)
    except BadInput as error:
        print(f"error: {files.shown(str(error))}", file=sys.stderr)
        return BadInput.exit_code
    if args.wait:
        watch.wait(entries, args.poll)
    states = {entry.job: report.state(entry) for entry in entries}
    for entry in entries:
        print("\n".join(describe(entry, states[entry.job])), flush=True)
    return int(any(_failed(job) for job in states.values()))


def _failed(job: report.JobState) -> bool:
    return job.final and not job.may_return and job.state != "COMPLETED"


def find(folder: Path, everything: bool) -> list[Entry]:
    """The last submission into a folder; of a sweep's folder the last of each point; or all."""
    own = folder / report.RECORDS
    if files.kind(own) and not everything:
        records = [own]
    else:
        records = sorted(folder.rglob(report.RECORDS), key=lambda f: (len(f.parts), f))
    if not records:
        expected = "expected the folder that submit.py or sweep.py printed"
        raise BadInput(f"no {report.RECORDS} in '{folder}': {expected}")
    found = []
    for file in records:
        entries = report.read_entries(file.parent)
        found += entries if everything else entries[-1:]
    # a sweep notes a job twice: with its logs, and in its point
    return list({entry.job: entry for entry in found}.values())


def describe(entry: Entry, job: report.JobState) -> list[str]:
    """The lines on one job."""
    seen = report.progress(entry.out)
    facts = [
        f"{job.state}" + (f" ({job.reason})" if job.reason and not job.final else ""),
        f"restarts {report.restarts(entry, job)}",
    ]
    facts += [f"nodes {job.nodes}"] if job.nodes else []
    facts += [f"epoch {seen['epoch']}"] if "epoch" in seen else []
    facts += [f"loss {seen['loss']:.4f}"] if "loss" in seen else []
    facts += [f"{seen['images_per_s']:.0f} images/s"] if "images_per_s" in seen else []
    facts += [f"kNN {seen['knn']:.2f} %"] if "knn" in seen else []
    lines = [
        f"job {entry.job} ({entry.script}): " + ", ".join(facts),
        f"  folder {entry.out}",
        f"  log    {entry.log(0, 'out')}",
    ]
    if _failed(job) or job.state == "UNKNOWN":
        lines += ["  " + line for line in report.explain(entry, job)]
    return [files.shown(line) for line in lines]


if __name__ == "__main__":
    sys.exit(main())
