"""The folder of a run, which one process at a time holds.

No file of an earlier run is overwritten, and metrics.jsonl has no gaps and no line twice.
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from moco_isl import __version__, files
from moco_isl.errors import BadInput, RunFailed
from moco_isl.options import opt
from moco_isl.run import checkpoint
from moco_isl.run.logs import read_facts
from moco_isl.run.meters import start_anew

LAST = "checkpoint_last.pth.tar"
SAVED = "a checkpoint was saved here\n"  # the content of .lock once there is one


@dataclass(kw_only=True)
class FolderOptions:
    """The folder of a run, what it starts from, and when it saves."""

    out: str | None = opt(
        None, metavar="DIR", may_change=True, help="folder of the run (runs/<time>-<arch>)"
    )
    init: str | None = opt(
        None,
        metavar="FILE",
        may_change=True,
        help="start at epoch 0 from the weights of this file: ours or MoCo's, to go on with mining;"
        " or a backbone of torchvision, timm, DINO or DINOv2; or a run's or a Hugging Face folder",
    )
    keep: int | None = opt(
        None,
        low=1,
        metavar="n",
        may_change=True,
        rare=True,
        help="keep the last n numbered checkpoints (all)",
    )
    save_epochs: int = opt(
        1,
        low=1,
        metavar="n",
        may_change=True,
        rare=True,
        help="save after every n-th epoch and after the last one; raise it where an epoch takes"
        " seconds. Rounds of mining and signals save in any case",
    )
    save_every: int = opt(
        0,
        low=0,
        metavar="n",
        may_change=True,
        rare=True,
        help="save every n steps as well; for long epochs on machines that die",
    )


class RunFolder:
    """The files of a run under `path`.

    They are checkpoint_0199.pth.tar, checkpoint_last.pth.tar, metrics.jsonl, args.json and
    rounds/round_0001.pt.

    Opened by rank 0 alone. Raises BadInput where the folder cannot be written, holds a run that is
    not to be resumed, or is in use. The file .lock is held while the run lives; it says whether a
    checkpoint has been saved in the folder (SAVED).
    """

    def __init__(self, path: str | Path, resume: bool, keep: int | None = None):
        self.path = Path(path)
        self.keep = keep
        self._metrics = None
        check_folder(path, resume)
        lock = self.path / ".lock"
        # `close` removes these again where the start fails before the run has written anything
        self._made = [p for p in (lock, self.path, *self.path.absolute().parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(lock, "a")
        except OSError as error:
            raise BadInput(
                f"--out '{path}' cannot be written: {error.strerror}; expected a folder to create"
                " files in"
            ) from error
        try:
            # a record lock belongs to this process: forked workers do not inherit it, and it ends
            # with the process, however that dies
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_held():
                raise BlockingIOError  # the run that held it has just removed it
        except OSError as error:
            self._lock.close()
            raise BadInput(
                f"--out '{path}' is in use by a run that is alive: wait for it or stop it, or"
                " choose another --out"
            ) from error
        try:
            check_folder(path, resume)  # again: no other run can write there now
        except BadInput:
            self.close()
            raise
        checkpoint.remove_stale(self.path)
        checkpoint.remove_stale(self.path / "rounds")

    @property
    def last(self) -> Path:
        return self.path / LAST

    def last_good(self) -> str:
        """The path of the checkpoint that was saved last; '' where none was saved."""
        return str(self.last) if self.last.exists() else ""

    def close(self) -> None:
        """Release the folder, and remove it where nothing was written into it."""
        for path in self._made if self._is_held() else []:
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        if self._metrics is not None:
            self._metrics.close()
        self._lock.close()

    def _is_held(self) -> bool:
        """Whether the folder still has the lock file that this run holds.

        It does not where the folder was moved, removed, or made anew.
        """
        try:
            return os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / ".lock"))
        except OSError:
            return False

    def require_held(self) -> None:
        """Raise RunFailed where the folder is no longer this run's: asked before every write."""
        if not self._is_held():
            raise RunFailed(
                f"{self.path} is no longer the folder of this run: it was moved, removed or made"
                " anew meanwhile, and another run may write there now. Nothing more is written;"
                " what was saved is where the folder went, and --resume goes on from it"
            )

    def begin(self, args: dict, metrics_size: int | None) -> None:
        """Begin to write the run's files: see `write_args` and `open_metrics`."""
        self.write_args(args)
        self.open_metrics(metrics_size)

    def write_args(self, args: dict) -> None:
        """Write args.json: the resolved flags, the command, the code's version and what it runs on.

        earlier: the same of the starts before this one.
        """
        self._made = []
        facts = {
            "args": args,
            "labels_used": bool(args.get("research_labels")),
            "command": [sys.executable, *sys.argv],
            "version": __version__,
            "git": _git_commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": importlib.metadata.version("torchvision"),
            "device": (
                torch.cuda.get_device_name()
                if torch.cuda.is_available()
                else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
            ),
        }
        path = self.path / "args.json"
        with self._writing(path.name):
            if path.exists() and held(self.path):
                facts["earlier"] = _starts_before(path)
            files.write_text(json.dumps(facts, indent=1, default=str) + "\n", path)

    def open_metrics(self, size: int | None) -> None:
        """Go on with metrics.jsonl after its first `size` bytes (None: after all of them).

        The lines behind them were logged after the checkpoint, and will be logged again.
        """
        path = self.path / "metrics.jsonl"
        self._made = []
        with self._writing(path.name):
            if newest(self.path) is None and _was_saved(self.path):
                self._lock.truncate(0)  # the checkpoints saved here before are gone
            # without a buffer, which close would write again where a full disk has refused it
            self._metrics = open(path, "ab", buffering=0)
            there = self._metrics.tell()
            if size is not None and there > size:
                self._metrics.truncate(size)
            else:
                self._metrics.truncate(_whole_lines(path))
        if size is not None and there < size:
            print(
                f"=> warning: {path} is shorter than it was when the checkpoint was saved ({there}"
                f" of {size} bytes): lines are missing"
            )

    def log(self, **values) -> None:
        """Write one object into metrics.jsonl."""
        line = (json.dumps(values, default=_plain) + "\n").encode()
        with self._writing("metrics.jsonl"):
            if self._metrics.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def metrics_size(self) -> int:
        """How many bytes metrics.jsonl has, once they are safely on the disk."""
        with self._writing("metrics.jsonl"):
            os.fsync(self._metrics.fileno())
            return os.fstat(self._metrics.fileno()).st_size

    def require_sound(self, broken: list[str], epoch: int, step: int) -> None:
        """Raise RunFailed where a tensor to be saved has exploded (`checkpoint.exploded`).

        So the last good file stays.
        """
        if not broken:
            return
        good = start_anew(self.last_good())
        raise RunFailed(
            f"the weights have exploded at epoch {epoch}, step {step} ({checkpoint.some(broken)}"
            f" not finite, or too large to be squared), and are not saved; {good}"
        )

    def save(self, state: dict, number: int | None) -> None:
        """Write the last checkpoint.

        With a number (an epoch's end) it is also written under MoCo's name for that epoch.
        """
        if number is None:
            with self._writing():
                checkpoint.save(state, self.last)
                self._note_saved()
            return
        # the numbered one first: a run that resumes from the last one then has those before it
        path = self.path / f"checkpoint_{number:04d}.pth.tar"
        with self._writing():
            checkpoint.save(state, path)
            self._note_saved()
        with self._writing():
            checkpoint.copy(path, self.last)
        if self.keep is not None:
            for old in numbered(self.path)[: -self.keep]:
                with self._writing(old.name):
                    old.unlink()

    def _note_saved(self) -> None:
        if not os.fstat(self._lock.fileno()).st_size:
            self._lock.write(SAVED)
            self._lock.flush()

    def save_round(self, number: int, record: dict) -> None:
        """Write the record of a round of mining; a round mined again writes the same file."""
        path = self.path / "rounds" / f"round_{number:04d}.pt"
        with self._writing(path.name):
            path.parent.mkdir(exist_ok=True)
            checkpoint.save(record, path)

    @contextlib.contextmanager
    def _writing(self, name: str = ""):
        """A context in which everything in the folder is written.

        Raises RunFailed, which names the last whole checkpoint, where a file cannot be written and
        where the folder is no longer this run's.
        """
        self.require_held()
        try:
            yield
        except (OSError, RunFailed) as error:
            what = str(error)
            if isinstance(error, OSError):
                what = f"cannot write {self.path / name}: {error.strerror}"
            stands = "no checkpoint had been saved yet"
            if self.last.exists():
                stands = f"the last whole checkpoint is {self.last}"
            raise RunFailed(
                f"{what}; {stands}. Free some space, then resume with --resume auto"
            ) from error


def check_folder(path: str | Path, resume: bool) -> None:
    """Raise BadInput where a run cannot have its files in `path`.

    It cannot where the folder cannot be written, or holds a run already and there is no `resume`.
    """
    path = Path(path)
    files.require_folder(path, "--out")
    found = held(path)
    if found and not resume:
        raise BadInput(
            f"--out '{path}' holds a run already ({found}): add --resume auto to go on with it, or"
            " choose another --out"
        )
    if not found:
        files.require_ours(path / "args.json", _is_args, "--out")


def flags_of_unsaved(path: str | Path, shape: dict | None = None) -> dict:
    """The flags of the run in `path` that ended before its first checkpoint; {} if there is none.

    shape: that of the flags, see `state.flags_shape`; None: any. Raises BadInput where the flags
    have another shape, where checkpoints were saved and are gone, and where args.json is missing: a
    new start there would overwrite what that run has logged.
    """
    path = Path(path)
    found = held(path)
    if not found or newest(path):
        return {}
    cure = (
        f"choose another --out (and --init to start from a file), or remove {found} and what else"
        " is left of that run"
    )
    facts = _facts(path)
    if _was_saved(path):
        raise BadInput(
            f"--out '{path}' holds a run ({found}) whose checkpoints are gone, so that nothing can"
            f" be resumed: {cure}"
        )
    if not facts:
        raise BadInput(
            f"--out '{path}' holds a run ({found}) without a checkpoint and without the args.json"
            f" that says which run it is: {cure}"
        )
    return read_facts(path, shape)["args"]


def numbered(path: Path) -> list[Path]:
    """The checkpoints of epochs' ends in a folder, in their order."""
    name = re.compile(r"checkpoint_(\d{4,})\.pth\.tar")
    found = [p for p in path.glob("checkpoint_*.pth.tar") if name.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(name.fullmatch(p.name)[1]))


def _whole_lines(path: Path) -> int:
    """Bytes of a file to the end of its last whole line: a kill may have cut the one behind."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - (1 << 16))
            file.seek(start)
            if (place := file.read(end - start).rfind(b"\n")) >= 0:
                return start + place + 1
            end = start
    return 0


def newest(path: str | Path) -> Path | None:
    """The checkpoint to resume from in a folder; None if there is none.

    It is the last one, or the last numbered one where that is missing.
    """
    last = Path(path) / LAST
    return last if last.is_file() else next(reversed(numbered(Path(path))), None)


def held(path: Path) -> str:
    """A file that shows that a run is in a folder; '' if none is."""
    if found := newest(path):
        return found.name
    metrics = path / "metrics.jsonl"
    if metrics.is_file() and metrics.stat().st_size:
        return metrics.name
    rounds = sorted(path.glob("rounds/round_*.pt"))
    return f"rounds/{rounds[0].name}" if rounds else ""


def _was_saved(path: Path) -> bool:
    """Whether a checkpoint was ever saved in a folder: .lock then has the length of SAVED.

    It is not opened, because a process that closes a file loses every lock that it has on it.
    """
    lock = path / ".lock"
    return lock.is_file() and lock.stat().st_size == len(SAVED)


def _is_args(path: Path) -> bool:
    """Whether a file is an args.json as `RunFolder.write_args` writes it."""
    return bool(_facts(path.parent))


def _facts(folder: Path) -> dict:
    """What args.json in a folder says; {} where it is none as `RunFolder.write_args` writes it."""
    try:
        facts = read_facts(folder)
    except BadInput:
        return {}
    return facts if "args" in facts and "version" in facts else {}


def _starts_before(path: Path) -> list[dict]:
    """What args.json says of the starts so far, the first one first; [] for a broken file."""
    try:
        facts = read_facts(path.parent)
        return [*facts.pop("earlier", []), facts]
    except BadInput:
        return []


def _plain(value):
    return value.tolist() if isinstance(value, torch.Tensor) else str(value)


def _git_commit() -> str | None:
    """The commit of this code where it lies in a git checkout."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
