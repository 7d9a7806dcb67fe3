"""Files that are whole or not there, and folders that can take them."""

import contextlib
import os
from pathlib import Path

import torch

from moco_isl.errors import BadInput

TEMPORARY = ".half-written"


def write(content: dict, path: Path, temporary: Path) -> None:
    """Write `content` by torch.save such that `path` is at any moment the old file or the new one, also through a kill or a full disk.

    temporary: a name in the same folder, that no other process uses. Raises OSError where it cannot be written; the
    temporary file is gone then, and an older `path` untouched.
    """
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # torch's writer of zip files hides it behind a RuntimeError
        if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_folder(path: str | Path, flag: str, may_be_read_only: bool = False) -> None:
    """Raise BadInput where `path` is no folder, and none can be made there, to create files in. Writes nothing.

    may_be_read_only: a folder that is there already need not be writable.
    """
    path = Path(path)
    nearest = next(p for p in (path, *path.parents) if os.path.exists(p))
    expected = "expected a folder to create files in"
    if not nearest.is_dir():
        raise BadInput(f"{flag} '{path}' cannot be written: {nearest} is a file; {expected}")
    if may_be_read_only and nearest == path:
        return
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise BadInput(f"{flag} '{path}' cannot be written: no permission in {nearest}; {expected}")
