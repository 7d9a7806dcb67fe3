"""What SLURM knows about a job.

slurmctld is asked while it remembers the job (MinJobAge, 5 minutes after the end), then the
accounting if there is one.

From slurmctld while it remembers (MinJobAge, 5 minutes after the end), then from the accounting if
there is one.
"""

import re
import subprocess
from dataclasses import dataclass

# ours, of a job that SLURM does not know: all its ranks have saved and left
INTERRUPTED = "INTERRUPTED"
FINAL = {
    *(INTERRUPTED, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED"),
}
LEAVING = {"COMPLETING", "PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
# shown for a moment by jobs that are about to be requeued
PASSING = {"NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}


@dataclass(frozen=True)
class JobState:
    state: str
    reason: str = ""
    restarts: int | None = None
    exit_code: str = ""  # as SLURM has it, code:signal
    nodes: str = ""
    requeue: bool = False

    @property
    def final(self) -> bool:
        return self.state in FINAL

    @property
    def leaving(self) -> bool:
        """Whether SLURM is ending it, has ended it, or is about to start it again."""
        return self.final or self.state in LEAVING

    @property
    def may_return(self) -> bool:
        """Whether SLURM may requeue it by itself, though its state is final by its name."""
        return self.requeue and self.state in PASSING


def ask(job_id: str) -> JobState | None:
    """The state of a job, or of an array's element A_i; None where SLURM does not know it."""
    return _from_controller(job_id) or _from_accounting(job_id)


def _run(*command: str) -> str:
    try:
        # a job's comment and folder may be no UTF-8
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _from_controller(job_id: str) -> JobState | None:
    text = _run("scontrol", "show", "job", job_id, "-o")
    facts = re.findall(
        r"(?:^|\s)(JobState|Reason|Restarts|ExitCode|NodeList|Requeue)=(\S*)",
        text.splitlines()[0] if text else "",
    )
    # the first of a name: a comment that follows may hold another one
    found = dict(reversed(facts))
    if "JobState" not in found:
        return None
    nothing = ("None", "(null)")
    return JobState(
        state=found["JobState"],
        reason="" if found.get("Reason") in nothing else found.get("Reason", ""),
        restarts=int(found.get("Restarts", 0)),
        exit_code=found.get("ExitCode", ""),
        nodes="" if found.get("NodeList") in nothing else found.get("NodeList", ""),
        requeue=found.get("Requeue") == "1",
    )


def _from_accounting(job_id: str) -> JobState | None:
    for line in _run(
        "sacct", "-X", "-n", "-P", "-o", "JobID,State,ExitCode,NodeList", "-j", job_id
    ).splitlines():
        name, state, exit_code, nodes = line.split("|")
        if name == job_id:
            return JobState(
                state=state.split()[0],
                exit_code=exit_code,
                nodes="" if nodes == "None assigned" else nodes,
            )
    return None
