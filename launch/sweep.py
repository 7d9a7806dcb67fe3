#!/usr/bin/env python
"""Run one script at many settings: one folder a point, one table at the end.

One after another here; the same command again goes on:
    python launch/sweep.py FILE.yaml
As one job array, of which each point survives as a job does:
    python launch/sweep.py FILE.yaml --cluster slurm --nodes 1
The table of what is there so far:
    python launch/sweep.py FILE.yaml --table

FILE.yaml:
    script: pretrain            # or lincls, knn (default: pretrain)
    base: {dataset: digits, epochs: 20, mlp: true}
    grid: {isl-budget: [1, 5], seed: [0, 1]}  # every combination; and, or else,
    points: [{name: plain, miner: none}]      # settings one by one
    seeds: [0, 1, 2]            # every point with each; {seed} in a value is it
    columns: [loss, knn]        # of the table (default: what was logged last)
    figures: [{x: isl-budget, y: knn}]        # curves over one setting
    judge: {over: [plain]}      # for python -m studies.judge FILE.yaml
Flags by name, as in --config; null leaves one out. Points are named by what
differs between them, where they have no name.
"""

import argparse
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import executors, options, watch
from launch.job import SCRIPTS, Task
from launch.tables import require_ours, write_table
from moco_isl import commands, files, schema
from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.run import flags, plain_yaml

SETTING = (None, str, [str])  # null, a value or a list of them
PLAN = {
    "script?": set(SCRIPTS),
    "base?": {...: SETTING},
    "grid?": {...: [SETTING]},
    "points?": [{...: SETTING}],
    "seeds?": [str],
    "columns?": [str],
    "figures?": [{"x": str, "y": str}],
    "judge?": {...: SETTING},
}
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")
MOST_POINTS = 10_000
OURS = {"jobs", "table.md", "table.json"}  # names in a sweep's folder that are no points


def get_parser() -> argparse.ArgumentParser:
    usage = "%(prog)s FILE.yaml [options]"
    parser = options.LauncherParser("python launch/sweep.py", __doc__, usage=usage)
    parser.add_argument("file", metavar="FILE.yaml", type=Path)
    parser.add_argument(
        "--job-dir",
        "--job_dir",
        metavar="DIR",
        help="folder of the sweep (default: runs/<name of the file>)",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="name of the job array (default: moco_isl-<name of the file>)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the points with their commands (and the sbatch file), and touch nothing",
    )
    parser.add_argument(
        "--table", action="store_true", help="only print and write the table of what is there"
    )
    parser.add_argument(
        "--wait",
        action="store_true",
        help="with --cluster slurm or local: stay until all points are done, and print the table",
    )
    parser.add_argument(
        "--poll",
        type=float,
        default=5,
        metavar="s",
        help="seconds between two looks at the jobs while waiting (5)",
    )
    options.add_cluster_options(parser, ("none", "slurm", "local"))
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    files.print_any_name()
    try:
        opts = get_parser().parse_args(argv)
        opts.command = [*shlex.split(commands.typed("sweep")), *argv]
        return _main(opts)
    except (BadInput, RunFailed) as error:
        print(f"error: {files.shown(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\n=> interrupted: the same command goes on where this one was", file=sys.stderr)
        return Interrupted.exit_code


def _main(opts: argparse.Namespace) -> int:
    options.check_cluster_options(opts)
    plan = read_plan(opts.file)
    script = plan["script"]
    folder = Path(options.folder_of(opts.job_dir or f"runs/{opts.file.stem}", opts.cluster))
    tasks = (opts.nodes, opts.tasks_per_node) if opts.cluster != "none" else (1, 1)
    where = files.named("", opts.file)
    points = {name: flags_of(script, settings, where) for name, settings in plan["points"].items()}
    for argv in points.values():
        options.parse_script(script, argv, *tasks, check=not opts.table)
    if opts.dry_run:
        return dry_run(script, points, folder, opts)
    require_ours(plan, folder)
    code = 0
    if not opts.table:
        make_folders([folder / name for name in points])
        code = (
            run_here(script, points, folder)
            if opts.cluster == "none"
            else run_array(script, points, folder, opts)
        )
    if opts.table or opts.wait or opts.cluster == "none":
        write_table(plan, folder)
    return code


def read_plan(file: Path) -> dict:
    """The sweep of a file: (script, points, own, columns, figures, judge).

    points: {name: all settings}; own: {name: those of the point}.

    Settings are as `plain_yaml.read` gives them: texts, lists of texts, None. A switch's word is
    made true or false. Raises BadInput.
    """
    where = files.named("", file)
    plan = plain_yaml.read(file, "", "a sweep: base, grid, points, ... (see --help)")
    if isinstance(plan, dict):
        plan = {part: content for part, content in plan.items() if content is not None}
    schema.require(plan, PLAN, where)
    script = plan.get("script", "pretrain")
    base = plan.get("base", {})
    grid = plan.get("grid", {})
    if empty := [name for name, values in grid.items() if not values]:
        raise BadInput(f"{where}: grid.{empty[0]} is an empty list: expected values")
    seeds = plan.get("seeds")
    many = math.prod(len(values) for values in grid.values()) if grid else 0
    many = (many + len(plan.get("points", []))) * len(seeds or [None])
    if many > MOST_POINTS:
        raise BadInput(f"{where}: more than {MOST_POINTS} combinations: name fewer values")
    settings = (
        [dict(zip(grid, values)) for values in itertools.product(*grid.values())] if grid else []
    )
    settings += plan.get("points", [])
    if not settings:
        raise BadInput(f"{where}: neither grid nor points: expected settings to run")
    for name in {*base, *(name for own in settings for name in own)}:
        _check_name(name, where)
    switches = _switches(script)
    base = {name: _value(name, value, switches) for name, value in base.items()}
    points: dict[str, dict] = {}
    owns: dict[str, dict] = {}
    for number, own in enumerate(settings, 1):
        name = own.get("name")
        own = {key: _value(key, value, switches) for key, value in own.items() if key != "name"}
        name = ",".join(f"{k}={v}" for k, v in own.items()) if name is None else name
        if not isinstance(name, str):
            raise BadInput(f"{where}: the name of point {number} is a list: expected a text")
        for seed in seeds or [None]:
            full, mine = name, own
            if seed is not None:
                full, mine = f"{name},seed={seed}", {**own, "seed": seed}
            full = _folder_name(full, f"{where}: point {number}")
            if full in points:
                raise BadInput(f"{where}: two points are named '{full}': give them names")
            given = {**base, **mine}
            if seed is not None:
                given = {key: _with_seed(value, seed) for key, value in given.items()}
            points[full] = given
            owns[full] = mine
    for name in [
        *plan.get("columns", []),
        *(name for figure in plan.get("figures", []) for name in figure.values()),
    ]:
        _check_name(name, where)
    return {
        "script": script,
        "points": points,
        "own": owns,
        "columns": plan.get("columns"),
        "figures": plan.get("figures", []),
        "judge": plan.get("judge", {}),
    }


def _with_seed(value, seed: str):
    """A setting, {seed} in it replaced."""
    return value.replace("{seed}", seed) if isinstance(value, str) else value


def _check_name(name: str, where: str) -> None:
    if not NAME.fullmatch(name):
        raise BadInput(
            f"{where}: '{files.short(name)}' is no name: expected letters, digits, - and _"
        )
    if name in ("out", "resume"):
        raise BadInput(
            f"{where}: {name} is not a setting: each point has a folder of its own, and goes on"
            " there"
        )


def _switches(script: str) -> set[str]:
    """The names of the flags that are on or off."""
    actions = options.script_parser(script)._actions
    return {
        flag.removeprefix("--")
        for action in actions
        if action.nargs == 0
        for flag in action.option_strings
    }


def _value(name: str, value, switches: set[str]):
    """A setting's value as it is shown: True or False of a switch, otherwise the file's text."""
    if name.replace("_", "-") not in switches or not isinstance(value, str):
        return value
    word = value.lower()
    return True if word in flags.ON else False if word in flags.OFF else value


def _folder_name(name: str, where: str) -> str:
    """A point's name as that of its folder.

    Raises BadInput for what would be no folder of its own.
    """
    name = re.sub(r"[^\w.=,+-]+", "_", name)
    if len(os.fsencode(name)) > 200:
        raise BadInput(
            f"{where} has a name of {len(name)} characters: expected at most 200; give it one,"
            " under points"
        )
    if name in OURS or not name.strip("._"):
        raise BadInput(
            f"{where} is named '{name}', which is no name for a folder of its own: choose"
            " another one"
        )
    return name


def flags_of(script: str, settings: dict, where: str = "the sweep") -> list[str]:
    """{'dataset': 'digits', 'mlp': True, 'data': 'DIR'} -> ['DIR', '--dataset=digits', '--mlp'].

    Raises BadInput.
    """
    words = {True: "true", False: "false"}
    given = {
        name: words.get(value, value) if isinstance(value, bool) else value
        for name, value in settings.items()
    }
    given = {name: value for name, value in given.items() if value is not None}
    config = given.pop("config", None)
    if config is not None and not isinstance(config, str):
        raise BadInput(f"{where}: config: expected one path")
    argv, data = options.script_parser(script).argv_of(given, where)
    for path in data:
        if not path or path.startswith("-"):
            given = files.short(path)
            raise BadInput(
                f"{where}: data is '{given}': expected the path of a folder, such as ./{given}"
            )
    for text in [*argv, config or "", *data]:
        options.require_one_line(text, f"{where}:")
    return [
        *data,
        *([] if config is None else [f"--config={config}"]),
        *argv,
    ]


def _runs(
    script: str, points: dict[str, list[str]], folder: Path, opts: argparse.Namespace
) -> list[Task]:
    resume = "auto" if options.takes(script, "--resume") else None
    return [
        Task(script, flags, str(folder / name), resume, opts.max_restarts, opts.join_timeout)
        for name, flags in points.items()
    ]


def _command(script: str, flags: list[str], out: Path) -> list[str]:
    resume = ["--resume", "auto"] if options.takes(script, "--resume") else []
    return [
        sys.executable,
        str(options.ROOT / f"{SCRIPTS[script]}.py"),
        *flags,
        "--out",
        str(out),
        *resume,
    ]


def dry_run(
    script: str, points: dict[str, list[str]], folder: Path, opts: argparse.Namespace
) -> int:
    if opts.cluster == "slurm":
        print(
            executors.sbatch_text(
                opts,
                str(folder / "jobs" / "%j"),
                opts.name or f"moco_isl-{folder.name}",
                len(points),
            ).strip()
        )
    for name, argv in points.items():
        print(f"# ---- {name}\n" + shlex.join(_command(script, argv, folder / name)))
    print("# nothing was started")
    return 0


def make_folders(folders: list[Path]) -> None:
    """Make a folder for each point, before anything is started. Raises BadInput."""
    for folder in folders:
        files.require_folder(folder, "the folder of a point,")
        folder.mkdir(parents=True, exist_ok=True)


def run_here(script: str, points: dict[str, list[str]], folder: Path) -> int:
    """Run one point after another; a point that fails does not stop the others.

    The script itself leaves alone what is finished already.
    """
    failed = []
    for i, (name, argv) in enumerate(points.items()):
        out = folder / name
        print(f"=> point {i + 1} of {len(points)}: {name}", flush=True)
        start = time.monotonic()
        with open(out / "log.txt", "a") as log:
            child = subprocess.Popen(
                _command(script, argv, out), stdout=log, stderr=subprocess.STDOUT
            )
            try:
                code = child.wait()
            except KeyboardInterrupt:
                # it has had the Ctrl-C as well; either way it saves and leaves
                child.send_signal(signal.SIGTERM)
                child.wait()
                raise
        if code:
            failed.append(name)
            tail = (out / "log.txt").read_text(errors="replace").splitlines()[-1:]
            said = files.shown("".join(tail))
            print(f"=> {name} ended with exit code {code}: {said}", file=sys.stderr, flush=True)
        else:
            print(f"=> {name}: {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failed else 0


def run_array(
    script: str, points: dict[str, list[str]], folder: Path, opts: argparse.Namespace
) -> int:
    runs = _runs(script, points, folder, opts)
    logs = (
        folder
        / "jobs"
        / ("%j" if opts.cluster == "slurm" else time.strftime("local-%Y%m%d-%H%M%S"))
    )
    entries = executors.submit(
        opts, runs, str(logs), opts.name or f"moco_isl-{folder.name}", opts.command
    )
    for entry in entries:
        executors.note(entry, entry.out)  # in the point's folder too, for status.py
        print(f"job {entry.job}: {Path(entry.out).name}\n  logs    {entry.log(0, 'out')}")
    print(
        f"state: {commands.typed('status')} {shlex.quote(str(folder))}\n"
        f"table: {commands.typed('sweep')} {shlex.quote(str(opts.file))} --job-dir"
        f" {shlex.quote(str(folder))} --table",
        flush=True,
    )
    return watch.outcome(entries, watch.wait(entries, opts.poll)) if opts.wait else 0


if __name__ == "__main__":
    sys.exit(main())
