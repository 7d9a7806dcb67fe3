"""The folder of a run: one process at a time, nothing overwritten, metrics without gaps or doubles."""

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import torchvision

from moco_isl import __version__, checkpoint
from moco_isl.errors import BadInput, RunFailed

LAST = "checkpoint_last.pth.tar"


class RunFolder:
    """Files of a run under `path`: checkpoint_0199.pth.tar, checkpoint_last.pth.tar, metrics.jsonl, args.json, rounds/round_0001.pt.

    Opened by rank 0 alone. Raises BadInput where the folder cannot be written, holds a run that is not to be resumed, or is in use.
    """

    def __init__(self, path: str | Path, resume: bool, keep: int | None = None):
        self.path, self.keep = Path(path), keep
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a")
        except OSError as error:
            raise BadInput(f"--out '{path}' cannot be written: {error.strerror}; expected a folder to create files in") from error
        try:
            # a record lock belongs to the process: forked loading workers do not inherit it, and it ends with the process however that dies
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise BadInput(f"--out '{path}' is in use by a run that is alive: wait for it or stop it, or choose another --out") from error
        if not resume and (held := self.held()):
            self.close()
            raise BadInput(f"--out '{path}' holds a run already ({held}): add --resume auto to go on with it, or choose another --out")
        checkpoint.remove_stale(self.path)
        checkpoint.remove_stale(self.path / "rounds")
        self._metrics = None

    def held(self) -> str:
        """A file that shows that a run is in this folder; '' if none is."""
        found = [p.name for p in [*self.path.glob("checkpoint_*.pth.tar"), self.path / "metrics.jsonl"] if p.exists() and p.stat().st_size]
        return found[0] if found else ""

    @property
    def last(self) -> Path:
        return self.path / LAST

    def close(self) -> None:
        if getattr(self, "_metrics", None):
            self._metrics.close()
        self._lock.close()

    def write_args(self, args: dict) -> None:
        """args.json: the resolved flags, the command, the code's version and what it runs on."""
        facts = {
            "args": args,
            "command": [sys.executable, *sys.argv],
            "version": __version__,
            "git": _git_commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        }
        with _full_disk("args.json"):
            temporary = self.path / ("args.json" + checkpoint.TEMPORARY)
            temporary.write_text(json.dumps(facts, indent=1, default=str) + "\n")
            os.replace(temporary, self.path / "args.json")

    def open_metrics(self, size: int) -> None:
        """Go on with metrics.jsonl after its first `size` bytes: what was logged after the checkpoint will be logged again."""
        path = self.path / "metrics.jsonl"
        with _full_disk(path.name):
            self._metrics = open(path, "ab")
            if self._metrics.tell() > size:
                self._metrics.truncate(size)
                self._metrics.seek(size)

    def log(self, **values) -> None:
        """One object into metrics.jsonl."""
        with _full_disk("metrics.jsonl"):
            self._metrics.write((json.dumps(values, default=_plain) + "\n").encode())
            self._metrics.flush()

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl, safely on the disk."""
        with _full_disk("metrics.jsonl"):
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
            return os.fstat(self._metrics.fileno()).st_size

    def save(self, state: dict, number: int | None) -> None:
        """Write the last checkpoint; with a number (an epoch's end) under MoCo's name for that epoch as well."""
        checkpoint.save(state, self.last)
        if number is None:
            return
        checkpoint.copy(self.last, self.path / f"checkpoint_{number:04d}.pth.tar")
        if self.keep is not None:
            numbered = sorted(p for p in self.path.glob("checkpoint_*.pth.tar") if p.name != LAST)
            for old in numbered[: max(0, len(numbered) - self.keep)]:
                old.unlink()

    def save_round(self, number: int, record: dict) -> None:
        """Write what a round of mining leaves; one that is mined again writes the same over it."""
        path = self.path / "rounds" / f"round_{number:04d}.pt"
        with _full_disk(path.name):
            path.parent.mkdir(exist_ok=True)
        checkpoint.save(record, path)


@contextlib.contextmanager
def _full_disk(name: str):
    try:
        yield
    except OSError as error:
        raise RunFailed(f"cannot write {name}: {error.strerror}; the last checkpoint is whole. Free some space, then resume with --resume auto") from error


def _plain(value):
    return value.tolist() if isinstance(value, torch.Tensor) else str(value)


def _git_commit() -> str | None:
    """The commit of this code where it lies in a git checkout."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
