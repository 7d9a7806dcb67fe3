"""What became of a job, in words: from SLURM, from the records and logs that its ranks left, and from the run's own
metrics.

A job's folder holds launch.jsonl (a line a submission), and per job J and rank R: J_R_log.out, J_R_log.err,
J_R_failure.json, J_R_result.pkl.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
from pathlib import Path

from launch import slurm
from launch.job import NEW_LIFE, record_file
from launch.slurm import JobState
from moco_isl.errors import BadInput

RECORDS = "launch.jsonl"

# what a rank says whose partner has gone: a consequence, not a cause
CONSEQUENCE = re.compile(
    r"closed by peer|[Cc]onnection (reset|refused|closed)|[Bb]roken pipe|[Tt]imed out waiting|Interrupted system call|"
    r"NCCL|[Ww]atchdog|DistNetworkError|DistStoreError|DistBackendError|"
    r"could not join the others|rank 0 ended while|lost another rank|was ended with the others"
)
SRUN_SAYS = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.+)$")
TAKEN_DOWN = re.compile(r"CANCELLED AT .* DUE TO")  # after this line ranks are killed because SLURM ends the job


@dataclasses.dataclass
class Entry:
    """One submission: what status and --wait have to know of it later."""

    job: str
    cluster: str
    script: str
    folder: str  # of the logs
    out: str  # run folder
    tasks: int
    command: list[str]  # that submitted it

    def log(self, rank: int, kind: str = "err") -> Path:
        return Path(self.folder) / f"{self.job}_{rank}_log.{kind}"


@dataclasses.dataclass
class Failure:
    rank: int
    node: str
    error: str
    time: float = float("inf")
    code: int | None = None

    @property
    def word(self) -> str:
        """What it said last, or with which code it ended."""
        return self.error.strip().splitlines()[0] if self.error.strip() else f"ended with exit code {self.code}"

    @property
    def consequence(self) -> bool:
        return bool(CONSEQUENCE.search(self.error))


def write_entry(entry: Entry) -> None:
    with open(Path(entry.folder) / RECORDS, "a") as file:
        file.write(json.dumps(dataclasses.asdict(entry)) + "\n")


def read_entries(folder: Path) -> list[Entry]:
    """The submissions into a folder, oldest first."""
    return [Entry(**json.loads(line)) for line in (folder / RECORDS).read_text().splitlines()]


def state(entry: Entry) -> JobState:
    """From SLURM; from the files of the ranks where SLURM has forgotten the job or has no part in it."""
    if entry.cluster == "slurm" and (job := slurm.ask(entry.job)):
        return job
    if entry.cluster == "local" and _alive(entry):
        return JobState("RUNNING")
    if all(_succeeded(entry, rank) for rank in range(entry.tasks)):
        return JobState("COMPLETED")
    return JobState("FAILED" if entry.cluster == "local" or failures(entry) else "UNKNOWN")


def restarts(entry: Entry, job: JobState) -> int:
    """How often the job has been started again: SLURM's count, else as the first rank's log has it."""
    if job.restarts is not None:
        return job.restarts
    lives = re.findall(rf"life (\d+) of job {re.escape(entry.job)}", _text(entry.log(0, "out")))
    return int(lives[-1]) - 1 if lives else 0


def _alive(entry: Entry) -> bool:
    """Whether submitit's controller of a local job runs: the job's id is its process id."""
    pid = int(entry.job)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # if it is our child and has ended, let it go
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True
    return not words or b"submitit" in words  # no words: it is just being started


def _succeeded(entry: Entry, rank: int) -> bool:
    try:
        with open(Path(entry.folder) / f"{entry.job}_{rank}_result.pkl", "rb") as file:
            return pickle.load(file)[0] == "success"
    except (OSError, EOFError, pickle.UnpicklingError):
        return False


def failures(entry: Entry) -> list[Failure]:
    """The ranks that failed, the one that began it first: causes before consequences, those with a word before those
    without, then by time.
    """
    found = {}
    for rank in range(entry.tasks):
        file = record_file(Path(entry.folder), entry.job, rank)
        if text := _text(file):
            facts = json.loads(text)
            error = facts["error"] or _last_error(entry.log(rank))
            found[rank] = Failure(rank, facts["node"], error, facts["time"], facts["code"])
    for order, (rank, node, words) in enumerate(_srun_says(entry)):
        if rank not in found and not _succeeded(entry, rank):
            found[rank] = Failure(rank, node, words, time=order)
    return sorted(found.values(), key=lambda f: (f.consequence, not f.error, f.time, f.rank))


def _srun_says(entry: Entry) -> list[tuple[int, str, str]]:
    """(rank, node, how it ended) as srun tells it at the end of rank 0's log: of ranks that were killed, all that
    there is.
    """
    told, over = [], False
    for line in _this_life(entry.log(0)):
        if TAKEN_DOWN.search(line):
            break
        over = over or "Terminating StepId" in line  # one rank has failed: srun ends the others
        if match := SRUN_SAYS.match(line):
            words = match[3].replace("Exited with", "ended with")
            if over:
                words = "was ended with the others"
            elif words.startswith("Killed"):
                words = "was killed: exit code 137, signal 9 (by the kernel for want of memory, or by hand)"
            told += [(rank, match[1], words) for rank in _numbers(match[2])]
    return told


def _this_life(log: Path) -> list[str]:
    """The lines of an error log since the job was last started."""
    lines = _text(log).splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(NEW_LIFE)]
    return lines[starts[-1] :] if starts else lines


def _numbers(text: str) -> list[int]:
    """'0,2-4' -> [0, 2, 3, 4]"""
    ranges = [part.split("-") for part in text.split(",")]
    return [n for r in ranges for n in range(int(r[0]), int(r[-1]) + 1)]


def _last_error(log: Path) -> str:
    """The line that one of our scripts ends with when it fails by its own judgement."""
    lines = [line for line in _this_life(log) if line.startswith(("error: ", "=> not requeued"))]
    return lines[-1] if lines else ""


def _text(file: Path, most: int = 2**20) -> str:
    """The last `most` bytes of a file; '' if there is none."""
    try:
        with open(file, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - most))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


def progress(out: str) -> dict:
    """The last epoch, step, loss, images_per_s and kNN that a run logged; {} if it logged nothing."""
    return _last(out, ("step", "epoch"), ("epoch", "step", "loss", "images_per_s", "knn", "total"))


def last_round(out: str) -> dict:
    """The last mining round: mean size of the sets, and their precision if there were labels; {} if there was none."""
    return _last(out, ("round",), ("mean_size", "precision", "precision_own_nearest"))


def _last(out: str, kinds: tuple[str, ...], names: tuple[str, ...]) -> dict:
    seen: dict = {}
    for line in _text(Path(out) / "metrics.jsonl").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:  # the first line may be cut, and the last be half written
            continue
        if values.get("kind") in kinds:
            seen |= {name: values[name] for name in names if name in values}
    return seen


ADVICE = {
    "CANCELLED": "it was cancelled; what was saved stays",
    "TIMEOUT": "it reached its time limit before it had saved and left: a longer --signal-delay gives it more time",
    "NODE_FAIL": "a node failed, and SLURM did not requeue the job",
    "OUT_OF_MEMORY": "it needed more memory than it had: raise --mem-gb, or lower --workers",
    "UNKNOWN": "SLURM has forgotten it, and it left neither a result nor an error: it was cancelled or killed",
}


def explain(entry: Entry, job: JobState, lines: int = 12) -> list[str]:
    """Why a job ended without success: the first cause with its log and the end of it, then the ranks that only
    followed.
    """
    exit_code = f" (exit code {job.exit_code})" if job.exit_code not in ("", "0:0") else ""
    text = [f"job {entry.job} {job.state}{exit_code}" + (f": {ADVICE[job.state]}" if job.state in ADVICE else "")]
    found = failures(entry)
    if found:
        first = found[0]
        text += [f"rank {first.rank} on {first.node}: {first.word}", f"log: {entry.log(first.rank)}"]
        text += ["  | " + line for line in _this_life(entry.log(first.rank))[-lines:]]
        text += [f"then rank {other.rank} on {other.node}: {other.word[:160]}" for other in found[1:4]]
        text += [f"then {len(found) - 4} more"] if len(found) > 4 else []
    elif job.state not in ("CANCELLED", "COMPLETED"):
        text.append(f"log: {entry.log(0)}")
        text += ["  | " + line for line in _this_life(entry.log(0))[-lines:]]
    if (room := _free_mb(entry.out)) is not None and room < 16:
        text.append(f"the disk of {entry.out} is full: {room:.0f} MB are free")
    bad_input = bool(found) and found[0].code == BadInput.exit_code
    if entry.script != "knn" and not bad_input:
        folder = "" if any("sweep.py" in word for word in entry.command) else f" with --job-dir {entry.folder}"
        text.append(f"to go on from the last checkpoint: the same command{folder}")
    return text


def _free_mb(folder: str) -> float | None:
    try:
        return shutil.disk_usage(folder).free / 2**20
    except OSError:
        return None
