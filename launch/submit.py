#!/usr/bin/env python
"""Run a script of this repository on a SLURM cluster.

It comes back by itself after preemption, time limit and node failure.

    python launch/submit.py pretrain --nodes 4 --gpus-per-node 8 \\
        --job-dir runs/%j -- DIR --mlp
    python launch/submit.py lincls|knn ... -- --pretrained FILE DIR
    python launch/submit.py detect ... -- FILE --data DIR
Evaluate it too:
    python launch/submit.py pretrain ... --then lincls,knn --lincls "..."
Without SLURM:
    python launch/submit.py pretrain --cluster local --gpus-per-node 2 ...

After `--` come the script's own flags (pretrain --help shows them too), but
--out and --resume: the run folder is --job-dir, and a run goes on where its
last checkpoint is. The same command with --job-dir naming that folder continues
a run that was ended. The code is read anew at every restart.
"""

import argparse
import copy
import os
import shlex
import sys
import time
import traceback
from pathlib import Path

import submitit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import executors, options, watch
from launch.job import SCRIPTS, Task
from launch.report import Entry
from moco_isl import commands, files
from moco_isl.errors import BadInput
from moco_isl.options import listed


def get_parser() -> argparse.ArgumentParser:
    usage = "%(prog)s pretrain|lincls|knn|detect [options] [-- its flags]"
    parser = options.LauncherParser("python launch/submit.py", __doc__, usage=usage, add_help=False)
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this, and the script's flags"
    )
    parser.add_argument(
        "--job-dir",
        "--job_dir",
        default="runs/%j",
        metavar="DIR",
        help=(
            "run folder and logs; %%j is the job's id, on this machine the time (default: runs/%%j)"
        ),
    )
    parser.add_argument(
        "--name", metavar="NAME", help="name of the job (default: moco_isl-<script>)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the sbatch file and the resolved flags, and touch nothing",
    )
    parser.add_argument(
        "--wait",
        action="store_true",
        help="stay until all is done; exit code 0 if it succeeded, else why not",
    )
    parser.add_argument(
        "--poll",
        type=float,
        default=5,
        metavar="s",
        help="seconds between two looks at the job while waiting (5)",
    )
    group = parser.add_argument_group("and then (after pretrain)")
    group.add_argument(
        "--then",
        default="",
        metavar="lincls,knn",
        help=(
            "submit these as well, to start when the pretraining has succeeded, on one node each,"
            " in DIR/lincls and DIR/knn"
        ),
    )
    for name in ("lincls", "knn"):
        group.add_argument(
            f"--{name}",
            metavar="FLAGS",
            help=(
                f"flags of main_{name}.py in quotes (default: the pretraining's data set);"
                " --pretrained is given"
            ),
        )
    options.add_cluster_options(parser, ("slurm", "local", "debug"))
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    files.print_any_name()
    try:
        return _main(argv)
    except BadInput as error:
        print(f"error: {files.shown(str(error))}", file=sys.stderr)
        return BadInput.exit_code
    except KeyboardInterrupt:
        print("\n=> no longer waiting; a job that was submitted goes on", file=sys.stderr)
        return 130


def _main(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        get_parser().parse_args(argv)
    if not argv or argv[0] not in SCRIPTS:
        if argv and argv[0] not in ("-h", "--help"):
            raise BadInput(
                f"'{argv[0]}' is nothing to submit: expected pretrain, lincls, knn or detect, and"
                " then the options"
            )
        get_parser().print_help()
        return 0 if argv else BadInput.exit_code
    script = argv[0]
    opts, flags = options.split_flags(get_parser(), argv[1:])
    if opts.help:
        get_parser().print_help()
        print(
            f"\nthe script's own flags, after --\n\n{options.script_parser(script).format_help()}"
        )
        return 0
    options.check_cluster_options(opts)
    plan = make_plan(script, opts, flags)
    if opts.dry_run:
        return dry_run(plan, opts)
    command = [*shlex.split(commands.typed("submit")), *argv]
    return debug(plan[0]) if opts.cluster == "debug" else submit_all(plan, opts, command)


def make_plan(script: str, opts: argparse.Namespace, flags: list[str]) -> list[Task]:
    """The run, and those that follow it, with all flags checked by their scripts.

    Raises BadInput.
    """
    then = [name for name in opts.then.split(",") if name]
    for name in then:
        if name not in ("lincls", "knn"):
            raise BadInput(f"--then {opts.then}: expected lincls, knn or both, with a comma")
    if then and (script != "pretrain" or opts.cluster == "debug"):
        raise BadInput("--then follows a pretraining on --cluster slurm or local")
    for name in ("lincls", "knn"):
        if getattr(opts, name) is not None and name not in then:
            raise BadInput(
                f"--{name} has flags for main_{name}.py, but --then does not name {name}"
            )
    job_dir = opts.job_dir
    if opts.cluster != "slurm":  # submitit's local controller would make a folder of the name %j
        job_dir = job_dir.replace(
            "%j",
            (
                "debug"
                if opts.cluster == "debug"
                else time.strftime(f"local-%Y%m%d-%H%M%S-{os.getpid()}")
            ),
        )
    folder = options.folder_of(job_dir, opts.cluster)
    flags, resume = options.take_run_flags(flags)
    args = options.parse_script(
        script,
        flags + (["--resume", resume] if resume != "auto" else []),
        opts.nodes,
        opts.tasks_per_node,
    )
    plan = [_run(script, flags, folder, opts, resume)]
    for name in then:
        same_data = ["--dataset", args.dataset, *listed(args.data)]
        given = getattr(opts, name)
        flags = [
            "--pretrained",
            f"{folder}/checkpoint_last.pth.tar",
            *(same_data if given is None else options.words(given, f"--{name}")),
        ]
        # the file is yet to come
        options.parse_script(name, flags, 1, opts.tasks_per_node, check=False)
        plan.append(_run(name, flags, f"{folder}/{name}", opts))
    return plan


def _run(
    script: str, flags: list[str], out: str, opts: argparse.Namespace, resume: str = "auto"
) -> Task:
    return Task(
        script,
        flags,
        out,
        resume if options.takes(script, "--resume") else None,
        opts.max_restarts,
        opts.join_timeout,
    )


def _name(run: Task, opts: argparse.Namespace) -> str:
    return opts.name or f"moco_isl-{run.script}"


def _one_node(opts: argparse.Namespace) -> argparse.Namespace:
    opts = copy.copy(opts)
    opts.nodes = 1
    return opts


def dry_run(plan: list[Task], opts: argparse.Namespace) -> int:
    for i, run in enumerate(plan):
        own = _one_node(opts) if i else opts
        if opts.cluster == "slurm":
            print(f"# ---- sbatch file of {run.script}")
            print(
                executors.sbatch_text(
                    own, run.out, _name(run, opts), after="JOB_OF_PRETRAIN" if i else None
                ).strip()
            )
        print(
            f"# ---- {SCRIPTS[run.script]}, {own.nodes} x {own.tasks_per_node} tasks, run folder"
            f" {run.out}"
        )
        args = options.parse_script(
            run.script, run.flags, own.nodes, own.tasks_per_node, check=False
        )
        given = {"out": run.out, **({"resume": run.resume} if run.resume else {})}
        # the whole may be kept as a file for sbatch: each stays in its line
        print(
            "\n".join(
                files.shown(f"# {name}: {value}")
                for name, value in sorted({**vars(args), **given}.items())
            )
        )
    print("# nothing was submitted")
    return 0


def submit_all(plan: list[Task], opts: argparse.Namespace, command: list[str]) -> int:
    """Submit the plan.

    SLURM holds what follows until the first job has succeeded; on this machine this process waits.
    """
    first = executors.submit(opts, plan[:1], plan[0].out, _name(plan[0], opts), command)[0]
    tell(first, opts)
    entries, code = [first], 0
    for run in plan[1:]:
        if opts.cluster == "local" and (
            code := watch.outcome(entries[-1:], watch.wait(entries[-1:], opts.poll))
        ):
            return code
        run.out = run.out.replace("%j", first.job)
        run.flags = [flag.replace("%j", first.job) for flag in run.flags]
        entries += executors.submit(
            _one_node(opts), [run], run.out, _name(run, opts), command, after=first.job
        )
        tell(entries[-1], opts)
    if opts.wait:
        waiting = entries if opts.cluster == "slurm" else entries[-1:]
        code = watch.outcome(waiting, watch.wait(waiting, opts.poll))
    elif opts.cluster == "local":
        job = entries[-1].job
        status = f"{commands.typed('status')} {shlex.quote(entries[-1].folder)}"
        print(
            f"=> the job runs on in the background: {status} --wait stays until its end,"
            f" kill {job} saves and ends it",
            flush=True,
        )
    return code


def tell(entry: Entry, opts: argparse.Namespace) -> None:
    """Print the job's id, where its logs are, and how to follow them."""
    where = f"partition {opts.partition}" if opts.partition else "default partition"
    print(
        f"job {entry.job}: {entry.script}, {entry.tasks} task{'s' if entry.tasks > 1 else ''}"
        + (f", {where}" if entry.cluster == "slurm" else ", on this machine")
    )
    print(f"  folder  {entry.out}")
    print(f"  logs    {entry.log(0, 'out')}  (.err, and a pair for every rank)")
    print(f"  follow  tail -F {shlex.quote(str(entry.log(0, 'out')))}")
    print(f"  state   {commands.typed('status')} {shlex.quote(entry.folder)}", flush=True)
    if (
        entry.cluster == "slurm"
        and not entry.out.endswith(("/lincls", "/knn"))
        and (stuck := executors.why_stuck(entry.job))
    ):
        print(
            f"warning: job {entry.job} will not start: {stuck}. To take it back: scancel"
            f" {entry.job}",
            file=sys.stderr,
            flush=True,
        )


def debug(run: Task) -> int:
    """Run one task in this very process; where it fails a debugger opens, if somebody can type."""
    files.require_folder(run.out, "--job-dir")
    Path(run.out).mkdir(parents=True, exist_ok=True)
    os.environ["SUBMITIT_FOLDER"] = run.out
    job = submitit.DebugExecutor(run.out).submit(run)
    try:
        if sys.stdin.isatty():
            job.results()
            return 0
        os.environ["SUBMITIT_DEBUG_JOB_ID"] = job.job_id
        error = job.exception()  # runs it as results() does, without the debugger
    except SystemExit as end:
        return end.code
    if error is not None:
        traceback.print_exception(error)
    return 1 if error is not None else 0


if __name__ == "__main__":
    sys.exit(main())
