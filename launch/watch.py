"""Waiting for jobs.

A state that SLURM calls final need not be the end, and a job that SLURM has forgotten must not be
waited for.

What SLURM calls final need not be the end, and what it has forgotten must not be waited for.
"""

import time

from launch import report
from launch.report import Entry
from launch.slurm import JobState

UNKNOWN_FOR = 30  # seconds without any word on a job until it counts as gone
PASSING_FOR = 120  # seconds that a job may stay in a state from which SLURM requeues by itself


def wait(entries: list[Entry], poll: float) -> dict[str, JobState]:
    """Wait until all jobs have ended, telling every change of state; their last states by id."""
    last: dict[str, JobState] = {}
    since: dict[str, float] = {}
    waiting = list(entries)
    while True:
        for entry in list(waiting):
            job = report.state(entry)
            if entry.job not in last or _shown(job) != _shown(last[entry.job]):
                since[entry.job] = time.monotonic()
                print(f"job {entry.job}: {_shown(job)}", flush=True)
            last[entry.job] = job
            age = time.monotonic() - since[entry.job]
            if _ended(job, age):
                waiting.remove(entry)
        if not waiting:
            return last
        time.sleep(poll)


def _ended(job: JobState, age: float) -> bool:
    if job.may_return:
        return age > PASSING_FOR
    return job.final or (job.state == "UNKNOWN" and age > UNKNOWN_FOR)


def _shown(job: JobState) -> str:
    return " ".join(
        filter(
            None,
            [
                job.state,
                f"({job.reason})" if job.reason and not job.final else "",
                f"restarted {job.restarts}x" if job.restarts else "",
            ],
        )
    )


def outcome(entries: list[Entry], states: dict[str, JobState]) -> int:
    """Print what became of the jobs, and return an exit code: 0 if all succeeded.

    Else it is the code of the first job that did not (1 where none is known).
    """
    code = 0
    for entry in entries:
        job = states[entry.job]
        if job.state == "COMPLETED":
            print(f"job {entry.job} COMPLETED: {entry.out}")
            continue
        print("\n".join(report.explain(entry, job)), flush=True)
        found = report.failures(entry)
        code = code or (found[0].code if found and found[0].code else 1)
    return code
