"""From options to submitit: what sbatch is given, and how a job is submitted.

A job goes to SLURM, to this machine, or into this process.

To SLURM, to this machine, or into this process.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import sys
import time
import uuid
from pathlib import Path

import submitit

from launch import slurm
from launch.job import Task
from launch.options import ROOT, clean_environment
from launch.report import Entry, write_entry
from moco_isl import files
from moco_isl.errors import BadInput

# reasons to be pending that do not pass with time
STUCK = {
    "PartitionNodeLimit": "the partition has not that many nodes, or they are down",
    "PartitionConfig": (
        "the partition has no such nodes: too many of them, too many cores or GPUs, or too much"
        " memory"
    ),
    "PartitionTimeLimit": "--timeout is longer than the partition allows",
    "BadConstraints": "no node has these features",
    "InvalidAccount": "the account does not exist",
    "InvalidQOS": "the QOS does not exist",
    "AccountNotAllowed": "the account may not use this partition",
    "QOSNotAllowed": "the QOS may not use this partition",
}


class SlurmText(submitit.SlurmExecutor):
    """Writes the sbatch file where there is no SLURM, for --dry-run."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def python_command(opts: argparse.Namespace) -> str:
    """How a node starts Python.

    USR2 is ignored until the run listens to it: by default it would end an interpreter that is
    still importing.
    """
    python = opts.python or (shlex.quote(sys.executable) if not opts.container else "python")
    container = opts.container + " " if opts.container else ""
    return f"""sh -c 'trap "" USR2; exec "$@"' sh {container}{python}"""


def setup_lines(opts: argparse.Namespace) -> list[str]:
    pairs = [pair.split("=", 1) for pair in opts.env]
    return [
        *(f"export {name}={shlex.quote(value)}" for name, value in pairs),
        # a job finds this code from any folder
        f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{opts.cpus_per_task}}}",
        *opts.setup,
    ]


def slurm_parameters(opts: argparse.Namespace, name: str, after: str | None = None) -> dict:
    """submitit's parameters; after: id of the job whose success this one waits for."""
    free = {
        key: value if equals else True
        for key, equals, value in (pair.partition("=") for pair in opts.sbatch)
    }
    always = {"requeue": True}  # whatever the cluster's default is
    if after:
        # without it the job would be pending for ever once the other has failed
        always["kill-on-invalid-dep"] = "yes"
    asked = {
        "job_name": name,
        "time": opts.timeout,
        "nodes": opts.nodes,
        "ntasks_per_node": opts.tasks_per_node,
        "cpus_per_task": opts.cpus_per_task,
        "gpus_per_node": opts.gpus_per_node or None,
        "mem": f"{round(opts.mem_gb * 1024)}MB" if opts.mem_gb else None,
        "partition": opts.partition,
        "account": opts.account,
        "qos": opts.qos,
        "constraint": opts.constraint,
        "comment": opts.comment,
        "exclude": opts.exclude,
        "dependency": f"afterok:{after}" if after else None,
    }
    return {k: v for k, v in asked.items() if v is not None} | {
        "wckey": None,  # submitit would put its own name, which clusters that keep wckeys refuse
        "array_parallelism": opts.array_parallelism,
        "signal_delay_s": opts.signal_delay,
        "setup": setup_lines(opts),
        "additional_parameters": always | free,
        # since 22.05 srun no longer inherits the cores of a task; and a rank that fails must not
        # leave the others waiting for it
        "srun_args": [f"--cpus-per-task={opts.cpus_per_task}", "--kill-on-bad-exit=1", *opts.srun],
    }


def sbatch_text(
    opts: argparse.Namespace, folder: str, name: str, count: int = 1, after: str | None = None
) -> str:
    """The file that sbatch would be given, for one job or for an array of `count`."""
    executor = SlurmText(folder, max_num_timeout=opts.max_restarts, python=python_command(opts))
    executor.update_parameters(**slurm_parameters(opts, name, after))
    if count > 1:
        executor.parameters["map_count"] = count
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def submit(
    opts: argparse.Namespace,
    runs: list[Task],
    folder: str,
    name: str,
    command: list[str],
    after: str | None = None,
) -> list[Entry]:
    """Submit runs, several as one array, and note them in launch.jsonl.

    folder: of the logs (%j: the job's id). Raises BadInput with SLURM's reason if it refuses.
    """
    ticket = uuid.uuid4().hex
    runs = [dataclasses.replace(run, ticket=ticket) for run in runs]
    before = _half_submitted(folder)
    with clean_environment() if opts.cluster == "slurm" else contextlib.nullcontext():
        try:
            executor = (
                _slurm(opts, folder, name, after)
                if opts.cluster == "slurm"
                else _local(opts, folder)
            )
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
                jobs = [executor.submit(runs[0])] if len(runs) == 1 else executor.submit_array(runs)
        except OSError as error:
            raise BadInput(
                f"cannot write into '{folder}': {error.strerror}; nothing was submitted"
            ) from error
        except submitit.core.utils.FailedJobError as error:
            for file in _half_submitted(folder) - before:
                if _is_of(file, ticket, name):
                    file.unlink()
            raise BadInput(f"SLURM refused the job: {' '.join(str(error).split())}") from error
    tasks = opts.nodes * opts.tasks_per_node
    entries = [
        Entry(
            job.job_id,
            opts.cluster,
            run.script,
            str(job.paths.folder),
            run.out.replace("%j", job.job_id),
            tasks,
            command,
        )
        for job, run in zip(jobs, runs)
    ]
    for entry in entries:
        note(entry, entry.folder)
    return entries


def note(entry: Entry, folder: str) -> None:
    """Write a submission into a folder's record.

    Where that fails the job runs nevertheless: a warning says it.
    """
    try:
        write_entry(entry, folder)
    except OSError as error:
        line = (
            f"warning: job {entry.job} is submitted, but not noted in '{folder}': {error.strerror}"
        )
        print(files.shown(f"{line}; status.py will not know of it"), file=sys.stderr)


def _half_submitted(folder: str) -> set[Path]:
    """The files that submitit writes before it knows whether sbatch takes the job.

    Other submissions may have such files in the same folder.

    Other submissions may have theirs there too.
    """
    fixed = submitit.core.utils.JobPaths.get_first_id_independent_folder(folder)
    return {*fixed.glob(".submission_file_*.sh"), *fixed.glob("*.pkl")} if fixed.is_dir() else set()


def _is_of(file: Path, ticket: str, name: str) -> bool:
    """Whether this submission wrote such a file.

    The ticket is searched for in the bytes of a pickle, which is never loaded.

    A pickle is searched for the ticket as it lies there, never loaded.
    """
    mark = ticket if file.suffix == ".pkl" else f"--job-name={shlex.quote(name)}\n"
    try:
        return files.kind(file) == "file" and mark.encode() in file.read_bytes()
    except (BadInput, OSError):  # another submission's, just moved
        return False


def _slurm(
    opts: argparse.Namespace, folder: str, name: str, after: str | None
) -> submitit.SlurmExecutor:
    if not shutil.which("sbatch"):
        raise BadInput(
            "no sbatch here: submit from a login node of the cluster, or run on this machine with"
            " --cluster local"
        )
    executor = submitit.SlurmExecutor(
        folder, max_num_timeout=opts.max_restarts, python=python_command(opts)
    )
    executor.update_parameters(**slurm_parameters(opts, name, after))
    return executor


def _local(opts: argparse.Namespace, folder: str) -> submitit.LocalExecutor:
    """An executor for this machine.

    A job inherits this process's environment, so its variables are put there.

    A job inherits this process's environment, so that is where its variables go.
    """
    os.environ.update(pair.split("=", 1) for pair in opts.env)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(opts.cpus_per_task))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = (
        [int(v) for v in visible] if all(re.fullmatch("[0-9]{1,4}", v) for v in visible) else []
    )
    if visible and opts.gpus_per_node > len(visible):
        raise BadInput(
            f"--gpus-per-node {opts.gpus_per_node}, but CUDA_VISIBLE_DEVICES shows {len(visible)}"
            " here"
        )
    executor = submitit.LocalExecutor(
        folder, max_num_timeout=opts.max_restarts, python=python_command(opts)
    )
    executor.update_parameters(
        timeout_min=opts.timeout,
        signal_delay_s=opts.signal_delay,
        tasks_per_node=opts.tasks_per_node,
        gpus_per_node=opts.gpus_per_node,
        visible_gpus=tuple(visible),
        setup=opts.setup,
    )
    return executor


def why_stuck(job_id: str, seconds: float = 2) -> str:
    """SLURM's reason why a job that was just submitted will not start; '' if it gives none."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = slurm.ask(job_id)
        if job and job.reason in STUCK:
            return f"{job.reason}: {STUCK[job.reason]}"
        if job and job.state != "PENDING":
            break
        time.sleep(0.3)
    return ""
