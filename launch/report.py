"""What became of a job, in words.

It is read from SLURM, from the records and logs that its ranks left, and from the run's own
metrics.

From SLURM, from the records and logs that its ranks left, and from the run's own metrics. A job's
folder holds launch.jsonl (a line a submission), and per job J and rank R: J_R_log.out,
J_R_log.err and, of a rank that has ended, J_R_end.json. Whoever may write into the folder may have
written them: they are checked as they are read. The pickles of submitit beside them are never
loaded.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
from pathlib import Path

from launch import slurm
from launch.job import FAILED, INTERRUPTED, NEW_LIFE, SCRIPTS, SUCCEEDED, end_file
from launch.slurm import JobState
from moco_isl import files, schema
from moco_isl.errors import BadInput, Interrupted
from moco_isl.schema import Number

RECORDS = "launch.jsonl"
ENTRY = {
    "job": str,
    "cluster": {"slurm", "local"},
    "script": set(SCRIPTS),
    "folder": str,
    "out": str,
    "tasks": Number(1, 1_000_000, whole=True),
    "command": [str],
}
# an array's element is A_i; on this machine a process id
JOB_ID = {
    "slurm": re.compile(r"[0-9]{1,18}(_[0-9]{1,9})?"),
    "local": re.compile(r"[1-9][0-9]{0,8}"),
}
END = {
    "state": {SUCCEEDED, FAILED, INTERRUPTED},
    "time": float,
    "rank": Number(0, 1_000_000, whole=True),
    "node": str,
    "code": Number(-255, 255, whole=True),
    "error": str,
}

# what a rank says whose partner has gone: a consequence, not a cause
CONSEQUENCE = re.compile(
    r"closed by peer|[Cc]onnection (reset|refused|closed)|[Bb]roken pipe|[Tt]imed out"
    r" waiting|Interrupted system call|"
    r"NCCL|[Ww]atchdog|DistNetworkError|DistStoreError|DistBackendError|"
    r"could not join the others|rank 0 ended while|lost another rank|was ended with the others"
)
SRUN_SAYS = re.compile(r"^srun: error: (\S+): tasks? ((?:[0-9]{1,7}[,-])*[0-9]{1,7}): (.+)$")
# what submitit says in the log of a rank
STARTS = re.compile(r"^submitit INFO \(.*\) - Starting with JobEnvironment\(", re.M)
SUCCESS = re.compile(r"^submitit INFO \(.*\) - Job completed successfully$", re.M)
# after this line ranks are killed because SLURM ends the job
TAKEN_DOWN = re.compile(r"CANCELLED AT .* DUE TO")


@dataclasses.dataclass
class Entry:
    """One submission: what status.py and --wait need to know of it later."""

    job: str
    cluster: str
    script: str
    folder: str  # where the logs are
    out: str  # run folder
    tasks: int
    command: list[str]  # the command that submitted it

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
        said = self.error.strip().splitlines()
        return said[0] if said else f"ended with exit code {self.code}"

    @property
    def consequence(self) -> bool:
        return bool(CONSEQUENCE.search(self.error))


def write_entry(entry: Entry, folder: str | Path) -> None:
    """Add a submission to the record in a folder. Raises OSError."""
    with open(Path(folder) / RECORDS, "a") as file:
        file.write(json.dumps(dataclasses.asdict(entry)) + "\n")


def read_entries(folder: Path) -> list[Entry]:
    """The submissions into a folder, oldest first.

    Raises BadInput for a record that is not as we write it.
    """
    file = folder / RECORDS
    lines = files.read_text(file, expected=f"the {RECORDS} of submit.py or sweep.py").splitlines()
    return [
        _entry(line, f"'{files.shown(file)}', line {number}")
        for number, line in enumerate(lines, 1)
    ]


def _entry(line: str, where: str) -> Entry:
    facts = parse(line, where)
    schema.require(facts, ENTRY, where)
    pattern = JOB_ID[facts["cluster"]]
    if not pattern.fullmatch(facts["job"]):
        job = files.shown(facts["job"])[:40]
        expected = f"expected the number that {facts['cluster']} gave it"
        raise BadInput(f"{where}: job is '{job}': {expected}")
    for name in ("folder", "out"):
        if "\0" in facts[name] or not _is_name(facts[name]):
            given = files.shown(facts[name])[:40]
            raise BadInput(f"{where}: {name} is '{given}': expected the path of a folder")
    return Entry(**facts)


def _is_name(text: str) -> bool:
    """Whether the system can have a file of this name: JSON can also write halves of characters."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def parse(text: str, where: str):
    """What JSON text says. Raises BadInput."""
    try:
        return json.loads(text)
    # ValueError: also a number of more digits than Python takes
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"{where} is no JSON: it was cut short, or changed by hand; remove it"
        ) from error


def state(entry: Entry) -> JobState:
    """The state of a job by SLURM, or by its ranks' files where SLURM does not know it."""
    if entry.cluster == "slurm" and (job := slurm.ask(entry.job)):
        return job
    if entry.cluster == "local" and _alive(entry):
        return JobState("RUNNING")
    if all(succeeded(entry, rank) for rank in range(entry.tasks)):
        return JobState("COMPLETED")
    found = failures(entry)
    if found and all(failure.code == Interrupted.exit_code for failure in found):
        return JobState(slurm.INTERRUPTED)
    return JobState("FAILED" if entry.cluster == "local" or found else "UNKNOWN")


def restarts(entry: Entry, job: JobState) -> int:
    """How often the job was started again: SLURM's count, or the one in the first rank's log."""
    if job.restarts is not None:
        return job.restarts
    life = rf"life ([0-9]{{1,9}}) of job {re.escape(entry.job)}"
    lives = re.findall(life, _text(entry.log(0, "out")))
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


def succeeded(entry: Entry, rank: int) -> bool:
    """Whether a rank's last life ended well, by its record, or by its log if it left none.

    A full disk may have refused the record.
    """
    try:
        end = _end(entry, rank)
    except BadInput:
        return False
    if end:
        return end["state"] == SUCCEEDED
    return bool(SUCCESS.search(STARTS.split(_text(entry.log(rank, "out")))[-1]))


def _end(entry: Entry, rank: int) -> dict | None:
    """The record that a rank left when it ended; None if there is none.

    Raises BadInput for one that is damaged.
    """
    file = end_file(Path(entry.folder), entry.job, rank)
    if not files.kind(file):
        return None
    where = f"the record '{files.shown(file)}'"
    facts = parse(files.read_text(file, "the record", "a rank's end", most=2**20), where)
    schema.require(facts, END, where)
    return facts


def failures(entry: Entry) -> list[Failure]:
    """The ranks that failed, the one that began it first.

    Causes come before consequences, then ranks that left an error before those that did not, then
    the earlier ones.
    """
    found = {}
    for rank in range(entry.tasks):
        try:
            end = _end(entry, rank)
        except BadInput as error:
            found[rank] = Failure(rank, "an unknown node", str(error))
            continue
        if end and end["state"] != SUCCEEDED:
            error = end["error"] or _last_error(entry.log(rank))
            found[rank] = Failure(rank, end["node"], error, end["time"], end["code"])
    for order, (rank, node, words) in enumerate(_srun_says(entry)):
        if rank not in found and not succeeded(entry, rank):
            found[rank] = Failure(rank, node, words, time=order)
    return sorted(found.values(), key=lambda f: (f.consequence, not f.error, f.time, f.rank))


def _srun_says(entry: Entry) -> list[tuple[int, str, str]]:
    """(rank, node, how it ended), as srun says at the end of rank 0's log.

    It is the only word on ranks that were killed.

    Of ranks that were killed there is nothing else.
    """
    told = []
    over = False
    for line in _this_life(entry.log(0)):
        if TAKEN_DOWN.search(line):
            break
        over = over or "Terminating StepId" in line  # one rank has failed: srun ends the others
        if match := SRUN_SAYS.match(line):
            words = match[3].replace("Exited with", "ended with")
            if over:
                words = "was ended with the others"
            elif words.startswith("Killed"):
                by = "by the kernel for want of memory, or by hand"
                words = f"was killed: exit code 137, signal 9 ({by})"
            told += [(rank, match[1], words) for rank in _numbers(match[2], entry.tasks)]
    return told


def _this_life(log: Path) -> list[str]:
    """The lines of an error log since the job was last started."""
    lines = _text(log).splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(NEW_LIFE)]
    return lines[starts[-1] :] if starts else lines


def _numbers(text: str, most: int) -> list[int]:
    """'0,2-4' -> [0, 2, 3, 4], those below `most`"""
    ranges = [part.split("-") for part in text.split(",")]
    return [n for r in ranges for n in range(int(r[0]), min(int(r[-1]) + 1, most))]


def _last_error(log: Path) -> str:
    """The line that one of our scripts ends with when it fails by its own judgement."""
    lines = [line for line in _this_life(log) if line.startswith(("error: ", "=> not requeued"))]
    return lines[-1] if lines else ""


def _text(file: Path, most: int = 2**20) -> str:
    """The last `most` bytes of a file; '' if there is none, or if it is not a regular file."""
    try:
        with files.open_regular(file) as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - most))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


def progress(out: str) -> dict:
    """The last epoch, step, loss, images_per_s, kNN that a run logged; {} if it logged nothing."""
    return _last(out, ("step", "epoch"), ("epoch", "step", "loss", "images_per_s", "knn", "total"))


def last_round(out: str) -> dict:
    """The last mining round: size and reach and, with labels, precision; {} without one."""
    names = ("mean_size", "reach", "precision", "precision_own_nearest")
    return _last(out, ("round",), names)


def _last(out: str, kinds: tuple[str, ...], names: tuple[str, ...]) -> dict:
    seen: dict = {}
    for line in _text(Path(out) / "metrics.jsonl").splitlines():
        try:
            values = parse(line, "")
        except BadInput:  # the first line may be cut, and the last be half written
            continue
        if isinstance(values, dict) and values.get("kind") in kinds:
            seen |= {name: values[name] for name in names if is_number(values.get(name))}
    return seen


def is_number(value) -> bool:
    """Whether a value from a file is a number that can be shown: finite, and no thousand digits."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


ADVICE = {
    slurm.INTERRUPTED: "it saved and left, and nothing started it again",
    "CANCELLED": "it was cancelled; what was saved stays",
    "TIMEOUT": (
        "it reached its time limit before it had saved and left: a longer --signal-delay gives it"
        " more time"
    ),
    "NODE_FAIL": "a node failed, and SLURM did not requeue the job",
    "OUT_OF_MEMORY": "it needed more memory than it had: raise --mem-gb, or lower --workers",
    "UNKNOWN": (
        "SLURM has forgotten it, and it left neither a result nor an error: it was cancelled or"
        " killed"
    ),
}


def explain(entry: Entry, job: JobState, lines: int = 12) -> list[str]:
    """Why a job ended without success: the first cause, the end of its log, and who followed."""
    exit_code = f" (exit code {job.exit_code})" if job.exit_code not in ("", "0:0") else ""
    advice = f": {ADVICE[job.state]}" if job.state in ADVICE else ""
    text = [f"job {entry.job} {job.state}{exit_code}{advice}"]
    found = failures(entry)
    if found:
        first = found[0]
        text.append(f"rank {first.rank} on {first.node}: {first.word}")
        text.append(f"log: {entry.log(first.rank)}")
        text += ["  | " + line for line in _this_life(entry.log(first.rank))[-lines:]]
        text += [
            f"then rank {other.rank} on {other.node}: {other.word[:160]}" for other in found[1:4]
        ]
        text += [f"then {len(found) - 4} more"] if len(found) > 4 else []
    elif job.state not in ("CANCELLED", "COMPLETED"):
        text.append(f"log: {entry.log(0)}")
        text += ["  | " + line for line in _this_life(entry.log(0))[-lines:]]
    if (room := _free_mb(entry.out)) is not None and room < 16:
        text.append(f"the disk of {entry.out} is full: {room:.0f} MB are free")
    bad_input = bool(found) and found[0].code == BadInput.exit_code
    if entry.script != "knn" and not bad_input:
        of_sweep = any(Path(word).stem == "sweep" for word in entry.command[:2])
        folder = "" if of_sweep else f" with --job-dir {shlex.quote(entry.folder)}"
        text.append(f"to go on from the last checkpoint: the same command{folder}")
    return [files.shown(line.replace("\t", "    "))[:500] for line in text]


def _free_mb(folder: str) -> float | None:
    try:
        return shutil.disk_usage(folder).free / 2**20
    except OSError:
        return None
