#!/usr/bin/env python
"""Run one script at many settings: one folder a point, one table at the end.

    python launch/sweep.py FILE.yaml                               one after another on this machine; again: it goes on
    python launch/sweep.py FILE.yaml --cluster slurm --nodes 1     as one job array; each point survives as a job does
    python launch/sweep.py FILE.yaml --table                       the table of what is there so far

FILE.yaml:
    script: pretrain                    # or lincls, knn (default: pretrain)
    base: {dataset: digits, epochs: 20, mlp: true}
    grid: {isl-budget: [1, 5], seed: [0, 1]}        # every combination; and, or instead,
    points: [{name: plain, miner: none, seed: 0}]   # settings one by one, with a name if you like
    columns: [loss, knn]                # of the table (default: what the runs logged last)
    figures: [{x: isl-budget, y: knn}]  # curves over one setting, drawn by matplotlib
Flags by name, as in --config. Points are named by what differs between them.
"""

import argparse
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import executors, options, report, watch  # noqa: E402
from launch.job import SCRIPTS, Run  # noqa: E402
from launch.report import Entry  # noqa: E402
from launch.tables import write_table  # noqa: E402
from moco_isl import files  # noqa: E402
from moco_isl.errors import BadInput, Interrupted  # noqa: E402

KNOWN = {"script", "base", "grid", "points", "columns", "figures"}


def get_parser() -> argparse.ArgumentParser:
    parser = options.LauncherParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE.yaml", type=Path)
    parser.add_argument(
        "--job-dir", "--job_dir", metavar="DIR", help="folder of the sweep (default: runs/<name of the file>)"
    )
    parser.add_argument("--name", metavar="NAME", help="name of the job array (default: moco_isl-<name of the file>)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the points with their commands (and the sbatch file), and touch nothing",
    )
    parser.add_argument("--table", action="store_true", help="only print and write the table of what is there")
    parser.add_argument(
        "--wait",
        action="store_true",
        help="with --cluster slurm or local: stay until all points are done, and print the table",
    )
    parser.add_argument(
        "--poll", type=float, default=5, metavar="s", help="seconds between two looks at the jobs while waiting (5)"
    )
    options.add_cluster_options(parser, ("none", "slurm", "local"))
    return parser


def main(argv: list[str] | None = None) -> int:
    files.print_any_name()
    try:
        return _main(get_parser().parse_args(argv))
    except BadInput as error:
        print(f"error: {files.shown(str(error))}", file=sys.stderr)
        return BadInput.exit_code
    except KeyboardInterrupt:
        print("\n=> interrupted: the same command goes on where this one was", file=sys.stderr)
        return Interrupted.exit_code


def _main(opts: argparse.Namespace) -> int:
    options.check_cluster_options(opts)
    plan = read_plan(opts.file)
    script, folder = plan["script"], Path(options.folder_of(opts.job_dir or f"runs/{opts.file.stem}"))
    tasks = (opts.nodes, opts.tasks_per_node) if opts.cluster != "none" else (1, 1)
    points = {name: flags_of(settings) for name, settings in plan["points"].items()}
    for flags in points.values():
        options.parse_script(script, flags, *tasks)
    if opts.dry_run:
        return dry_run(script, points, folder, opts)
    code = 0
    if not opts.table:
        code = run_here(script, points, folder) if opts.cluster == "none" else run_array(script, points, folder, opts)
    if opts.table or opts.wait or opts.cluster == "none":
        write_table(plan, folder)
    return code


def read_plan(file: Path) -> dict:
    """The sweep: script, points {name: all settings}, own {name: those of the point}, columns, figures. Or BadInput."""
    try:
        plan = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"cannot read '{file}': {str(error).splitlines()[0]}") from error
    if not isinstance(plan, dict) or (unknown := set(plan) - KNOWN):
        raise BadInput(
            f"'{file}': "
            + (f"unknown {sorted(unknown)}, " if isinstance(plan, dict) else "")
            + f"expected a mapping of {sorted(KNOWN)}"
        )
    script, base, grid = plan.get("script", "pretrain"), plan.get("base") or {}, plan.get("grid") or {}
    if script not in SCRIPTS:
        raise BadInput(f"'{file}': script {script!r}, expected one of {', '.join(SCRIPTS)}")
    if bad := [name for name, values in grid.items() if not isinstance(values, list) or not values]:
        raise BadInput(f"'{file}': grid: {bad[0]} needs a list of values")
    settings = [dict(zip(grid, values)) for values in itertools.product(*grid.values())] if grid else []
    settings += plan.get("points") or []
    if not settings:
        raise BadInput(f"'{file}': neither grid nor points: expected settings to run")
    points: dict[str, dict] = {}
    owns: dict[str, dict] = {}
    for own in settings:
        own = dict(own)
        name = re.sub(r"[^\w.=,+-]+", "_", str(own.pop("name", ",".join(f"{k}={v}" for k, v in own.items()))))
        if name in points:
            raise BadInput(f"'{file}': two points are named '{name}': give them names")
        points[name], owns[name] = {**base, **own}, {str(k): v for k, v in own.items()}
    return {
        "script": script,
        "points": points,
        "own": owns,
        "columns": plan.get("columns"),
        "figures": _figures(file, plan),
    }


def _figures(file: Path, plan: dict) -> list[dict]:
    figures = plan.get("figures") or []
    if bad := [f for f in figures if not isinstance(f, dict) or set(f) != {"x", "y"}]:
        raise BadInput(f"'{file}': figures: {bad[0]!r}, expected {{x: a setting, y: a column}}")
    return figures


def flags_of(settings: dict) -> list[str]:
    """{'dataset': 'digits', 'mlp': True, 'data': 'DIR'} -> ['DIR', '--dataset', 'digits', '--mlp']"""
    flags = [str(settings["data"])] if settings.get("data") is not None else []
    for name, value in settings.items():
        flag = "--" + str(name).replace("_", "-")
        if isinstance(value, bool):
            flags += [flag if value else "--no-" + flag[2:]]
        elif value is not None and name != "data":
            flags += [flag, *map(str, value if isinstance(value, list) else [value])]
    return flags


def _runs(script: str, points: dict[str, list[str]], folder: Path, opts: argparse.Namespace) -> list[Run]:
    resume = "auto" if options.takes(script, "--resume") else None
    return [
        Run(script, flags, str(folder / name), resume, opts.max_restarts, opts.join_timeout)
        for name, flags in points.items()
    ]


def _command(script: str, flags: list[str], out: Path) -> list[str]:
    resume = ["--resume", "auto"] if options.takes(script, "--resume") else []
    return [sys.executable, str(options.ROOT / f"{SCRIPTS[script]}.py"), *flags, "--out", str(out), *resume]


def dry_run(script: str, points: dict[str, list[str]], folder: Path, opts: argparse.Namespace) -> int:
    if opts.cluster == "slurm":
        print(
            executors.sbatch_text(
                opts, str(folder / "jobs" / "%j"), opts.name or f"moco_isl-{folder.name}", len(points)
            ).strip()
        )
    for name, flags in points.items():
        print(f"# ---- {name}\n" + shlex.join(_command(script, flags, folder / name)))
    print("# nothing was started")
    return 0


def run_here(script: str, points: dict[str, list[str]], folder: Path) -> int:
    """One point after another; a point that fails does not stop the others. What is finished already is left alone by
    the script itself.
    """
    failed = []
    for i, (name, flags) in enumerate(points.items()):
        out = folder / name
        out.mkdir(parents=True, exist_ok=True)
        print(f"=> point {i + 1} of {len(points)}: {name}", flush=True)
        start = time.monotonic()
        with open(out / "log.txt", "a") as log:
            child = subprocess.Popen(_command(script, flags, out), stdout=log, stderr=subprocess.STDOUT)
            try:
                code = child.wait()
            except KeyboardInterrupt:
                child.send_signal(signal.SIGTERM)  # it has had the Ctrl-C as well; either way it saves and leaves
                child.wait()
                raise
        if code:
            failed.append(name)
            tail = (out / "log.txt").read_text(errors="replace").splitlines()[-1:]
            print(f"=> {name} ended with exit code {code}: {''.join(tail)}", file=sys.stderr, flush=True)
        else:
            print(f"=> {name}: {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failed else 0


def run_array(script: str, points: dict[str, list[str]], folder: Path, opts: argparse.Namespace) -> int:
    runs = _runs(script, points, folder, opts)
    for run in runs:
        Path(run.out).mkdir(parents=True, exist_ok=True)
    command = ["python", "launch/sweep.py", *sys.argv[1:]]
    logs = folder / "jobs" / ("%j" if opts.cluster == "slurm" else time.strftime("local-%Y%m%d-%H%M%S"))
    entries = executors.submit(opts, runs, str(logs), opts.name or f"moco_isl-{folder.name}", command)
    for entry in entries:
        _note_in_point(entry)
        print(f"job {entry.job}: {Path(entry.out).name}\n  logs    {entry.log(0, 'out')}")
    print(
        f"state: python launch/status.py {shlex.quote(str(folder))}\n"
        f"table: python launch/sweep.py {shlex.quote(str(opts.file))} --job-dir {shlex.quote(str(folder))} --table",
        flush=True,
    )
    return watch.outcome(entries, watch.wait(entries, opts.poll)) if opts.wait else 0


def _note_in_point(entry: Entry) -> None:
    """The record of a job in the folder of its point too, where status.py is asked for it."""
    with open(Path(entry.out) / report.RECORDS, "a") as file:
        file.write(json.dumps(vars(entry)) + "\n")


if __name__ == "__main__":
    sys.exit(main())
