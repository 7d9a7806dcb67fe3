"""What runs on the nodes: one `Task` each, which submitit pickles, starts and restarts.

In each life a task removes what its last life left, meets the other ranks, and runs the script's
main with a `stop` that signals set. When main has saved and returns 75, it does so on all ranks:
rank 0 lets submitit requeue the job, and all wait to be ended. However a life ends, each rank
leaves a record beside the logs (`end_file`): it says whether the job succeeded, or which rank
failed first. Only submitit reads submitit's pickles.
"""

import contextlib
import dataclasses
import fcntl
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import submitit

from launch import slurm
from moco_isl import files
from moco_isl.errors import BadInput, Interrupted

# the ways in which a life of a rank ends
SUCCEEDED = "succeeded"
FAILED = "failed"
INTERRUPTED = "interrupted"
SCRIPTS = {
    "pretrain": "main_moco_isl",
    "lincls": "main_lincls",
    "knn": "main_knn",
    "detect": "moco_isl.evaluation.detection.__main__",
}
NEW_LIFE = "=> life "  # begins the line in the error log that parts a life from the one before
LOCAL_RESTARTS = 5  # submitit's controller of local jobs starts a job six times


class StopSignals:
    """The `stop` that main polls: true once SLURM asked for the node.

    USR2 is sent ahead of a preemption and of the time limit. TERM comes when a job is cancelled or
    requeued, and is the only notice of preemption on clusters without preempt_send_user_signal.
    In each case it is right to save.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        # submitit's handler: writes the pickle of the next life, requeues, exits
        self.requeue = signal.getsignal(signal.SIGUSR2)
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        if number not in self.signals:
            # print is not safe inside a handler
            os.write(1, f"=> {signal.Signals(number).name}: asked to stop\n".encode())
        self.signals.append(number)

    def __call__(self) -> bool:
        return bool(self.signals)


@dataclasses.dataclass
class Task:
    """A script with its flags in its run folder.

    `restarts` counts the lives that ended by saving and requeueing.
    """

    script: str  # a key of SCRIPTS
    flags: list[str]  # the script's own, without --out and --resume
    out: str  # run folder; %j is the job's id
    # a file: until there is a checkpoint of its own; None: the script cannot resume
    resume: str | None = "auto"
    max_restarts: int = 30
    join_timeout: float = 300  # seconds
    restarts: int = 0
    # marks the files of this submission
    ticket: str = dataclasses.field(default="", compare=False)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The next life, for submitit, which may ask for it before __call__."""
        next_life = dataclasses.replace(self, restarts=self.restarts + 1)
        return submitit.helpers.DelayedSubmission(next_life)

    def __call__(self) -> dict:
        stop = StopSignals()  # first, because until here a signal goes to submitit's handler
        env = submitit.JobEnvironment()
        _forget_last_life(env)
        out = self.out.replace("%j", env.job_id)
        try:
            code = self._main(env, out, stop)
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = BadInput.exit_code
        except Exception as error:
            _record(env, FAILED, 1, f"{type(error).__name__}: {error}")
            raise
        state = {0: SUCCEEDED, Interrupted.exit_code: INTERRUPTED}.get(code, FAILED)
        _record(env, state, code, "")
        if state == INTERRUPTED:
            self._leave(env, out, stop)
        if code:
            sys.exit(code)  # no traceback: main has said in a line what is wrong
        return {"rank": env.global_rank, "out": out, "restarts": self.restarts}

    def _main(self, env: submitit.JobEnvironment, out: str, stop: StopSignals) -> int:
        # here, and not above: torch takes seconds, and the signals had to be caught first
        from launch import rendezvous
        from moco_isl.run import environment

        life = self.restarts
        if env.cluster == "slurm":
            life = environment.number("SLURM_RESTART_COUNT", 0, environment.MOST) or 0
        nodes, tasks = env.num_nodes, env.num_tasks
        place = rendezvous.Place(
            job=env.raw_job_id,
            life=life,
            rank=env.global_rank,
            world=tasks,
            local_rank=env.local_rank,
            local_world=tasks // nodes,
            node=os.environ.get("SLURMD_NODENAME", env.hostname),
            first_node=env.hostnames[0] if nodes > 1 else "127.0.0.1",
        )
        print(
            f"=> rank {place.rank} of {place.world} on {place.node}, local rank {place.local_rank},"
            f" CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}, life {life + 1}"
            f" of job {env.job_id}",
            flush=True,
        )
        if life:
            print(f"{NEW_LIFE}{life + 1} of job {env.job_id}", file=sys.stderr, flush=True)
        if life and place.rank == 0:
            _wait_for_lock(Path(out), stop)
        store = rendezvous.join(place, self.join_timeout, stop)
        if store is None:  # asked to stop before anything ran: there is nothing to save
            return Interrupted.exit_code
        if place.rank == 0:
            where = f"{place.first_node}:{os.environ['MASTER_PORT']}"
            print(f"=> {place.world} ranks met at {where}", flush=True)
        flags = [*self.flags, "--out", out]
        if self.resume is not None:
            # rank 0 alone looks, for a shared file system may show the others an older state
            if place.rank == 0:
                saved = any(Path(out).glob("checkpoint_*.pth.tar"))
                store.set("launch/resume", "auto" if saved else self.resume)
            flags += ["--resume", store.get("launch/resume").decode()]
        return importlib.import_module(SCRIPTS[self.script]).main(flags, stop)

    def _leave(self, env: submitit.JobEnvironment, out: str, stop: StopSignals) -> None:
        """Have the job requeued, now that everything is saved, and wait for the end.

        Returns if there is no next life.
        """
        most = self.max_restarts
        if env.cluster != "slurm":
            most = min(most, LOCAL_RESTARTS)
        again = f"the same command with --job-dir {shlex.quote(out)} goes on with it"
        go_on = f"The run is saved: {again}"
        if self.restarts >= most:
            times = f"restarted {self.restarts} times already (--max-restarts)"
            _say(env, f"=> not requeued: {times}. {go_on}")
            return
        if env.cluster == "slurm":
            self._requeue(env, stop)
            _say(env, f"=> not requeued: SLURM neither took the job back nor ended it. {go_on}")
        elif env.cluster == "local" and env.global_rank == 0 and stop.signals != [signal.SIGTERM]:
            # exits with the code that tells submitit's controller to start the tasks again
            stop.requeue(signal.SIGUSR2, None)

    def _requeue(
        self, env: submitit.JobEnvironment, stop: StopSignals, patience: float = 120
    ) -> None:
        if env.global_rank == 0:
            job = slurm.ask(env.job_id)
            # a job that SLURM itself is taking down (cancelled, preempted without grace, requeued
            # by the admin) goes where SLURM sends it
            if job is None or not job.leaving:
                try:
                    stop.requeue(signal.SIGUSR2, None)
                except SystemExit:
                    pass  # done; to exit now would look like a failure to srun
                # SLURM may have begun to requeue this moment
                except (subprocess.SubprocessError, OSError) as error:
                    _say(env, f"=> {error}")
        time.sleep(patience)  # SLURM ends all tasks, at most KillWait (30 s by default) from now


def _forget_last_life(env: submitit.JobEnvironment) -> None:
    """Remove what this rank's last life left.

    An old error would be taken for one of this life, and submitit fails on half-written files.
    """
    paths = env.paths
    stale = [paths.result_pickle, end_file(paths.folder, env.job_id, env.global_rank)]
    if env.global_rank == 0:
        stale.append(paths.submitted_pickle.with_suffix(".pkl.save_tmp"))
    for file in [*stale, paths.result_pickle.with_suffix(".pkl.save_tmp")]:
        file.unlink(missing_ok=True)


def _wait_for_lock(out: Path, stop: StopSignals, seconds: float = 180) -> None:
    """Wait a while for the run folder that the last life may still hold.

    After a node failed, rank 0's last life may run on where SLURM cannot reach it, or a dead node's
    lock may outlive it. A second run would be refused at once.
    """
    lock = out / ".lock"
    end = time.monotonic() + seconds
    while lock.exists() and time.monotonic() < end and not stop():
        try:
            with open(lock, "a") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            time.sleep(1)


def end_file(folder: Path, job_id: str, rank: int) -> Path:
    """The record of how a rank's last life ended: state, time, rank, node, code, error."""
    return folder / f"{job_id}_{rank}_end.json"


def _record(env: submitit.JobEnvironment, state: str, code: int, error: str) -> None:
    """Write when, where and how this rank ended, in a file that is whole or not there.

    A full disk may refuse it: the logs and the exit code remain.
    """
    facts = {
        "state": state,
        "time": time.time(),
        "rank": env.global_rank,
        "node": os.environ.get("SLURMD_NODENAME", env.hostname),
        "code": code,
        "error": error,
    }
    file = end_file(env.paths.folder, env.job_id, env.global_rank)
    half = file.with_name(file.name + files.TEMPORARY)  # no other rank's: the name has job and rank
    with contextlib.suppress(OSError):
        files.write_text(json.dumps(facts), file, half)


def _say(env: submitit.JobEnvironment, line: str) -> None:
    if env.global_rank == 0:
        print(line, file=sys.stderr, flush=True)
