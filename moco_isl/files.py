"""Files that are whole or not there, and folders that can take them."""

import contextlib
import errno
import os
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from moco_isl.errors import BadInput

TEMPORARY = ".half-written"


def shown(name: str | bytes | os.PathLike) -> str:
    """A name as it may be printed and written anywhere: what is not printable, or not UTF-8, as an
    escape such as \\n or \\udcff.
    """
    text = os.fsdecode(name)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(text: str, most: int = 60) -> str:
    """A text of a user or a file for a message: escaped by `shown`, at most `most` characters."""
    text = shown(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def encodable(text: str) -> str:
    """A text as UTF-8 can hold it: what is none in it, from the bytes of a file's name, as an
    escape such as \\udcff.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextlib.contextmanager
def utf8_name(path: str | os.PathLike) -> Iterator[Path]:
    """A name in UTF-8 of a file, for libraries that open no other: its own, or else that of a link,
    which is gone afterwards.
    """
    path = Path(path)
    if encodable(str(path)) == str(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"link{encodable(path.suffix)}")  # some go by the ending
        link.symlink_to(path.absolute())
        yield link


def print_any_name() -> None:
    """Let stdout and stderr take every name: what their encoding has not is written as an escape,
    such as \\xe9 or \\udcff.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file; not what a test or a notebook has put there
            stream.reconfigure(errors="backslashreplace")


def kind(path: str | os.PathLike, flag: str = "") -> str:
    """What is at `path`, links followed: "file", "folder", "other" (a pipe, a device) or "" for
    nothing.

    Raises BadInput where nobody can tell: no permission, a name that is too long, links in a
    circle. flag: what named the path.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(
            f"{named(flag, path)} cannot be looked at: {reason}; {cure(error)}"
        ) from error
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def require_file(path: str | os.PathLike, flag: str = "", expected: str = "a file") -> Path:
    """`path`, which is a regular file that may be read; raises BadInput in one line where it is
    not.

    expected: what kind of file, such as "a checkpoint".
    """
    found = kind(path, flag)
    if not found:
        raise BadInput(f"{named(flag, path)}: no such file; expected {expected}; check the path")
    if found != "file":
        word = "a folder" if found == "folder" else "a pipe or a device"
        raise BadInput(f"{named(flag, path)} is {word}: expected {expected}")
    if not os.access(path, os.R_OK):
        raise BadInput(
            f"{named(flag, path)} cannot be read: no permission; expected {expected};"
            f" {cure(errno.EACCES)}"
        )
    return Path(path)


def read_text(
    path: str | os.PathLike, flag: str = "", expected: str = "a text file", most: int = 64 << 20
) -> str:
    """What is in a UTF-8 file of at most `most` bytes. Raises BadInput in one line."""
    path = require_file(path, flag, expected)
    try:
        if path.stat().st_size > most:
            raise BadInput(f"{named(flag, path)} has more than {most} bytes: expected {expected}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{named(flag, path)} is not UTF-8 text: expected {expected}") from error
    except OSError as error:
        raise BadInput(
            f"{named(flag, path)} cannot be read: {error.strerror}; expected {expected}"
        ) from error


def write_text(text: str, path: str | os.PathLike, temporary: Path | None = None) -> None:
    """Write a UTF-8 file, whole or not at all: an older `path` stays until the new one is on the
    disk. Raises OSError.

    What is no UTF-8 (parts of file names) is escaped. temporary: see `replacing`; None: a short
    name, of this process.
    """
    path = Path(path)
    # the name itself may be as long as a name can be
    temporary = temporary or path.with_name(f".{os.getpid()}{TEMPORARY}")
    with replacing(path, temporary):
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)


def require_ours(path: str | os.PathLike, is_ours: Callable[[Path], bool], flag: str = "") -> None:
    """Raise BadInput unless there is nothing at `path`, or a regular file that `is_ours` knows as
    one of ours, to be written over.

    Whoever writes a file asks this before the work, and again when it is about to write.
    """
    found = kind(path, flag)
    if found == "folder":
        raise BadInput(f"{named(flag, path)} is a folder: expected the name of a file to write")
    if found == "other":
        raise BadInput(
            f"{named(flag, path)} is a pipe or a device, which is not written over: name a file"
        )
    try:
        ours = not found or is_ours(Path(path))
    except OSError as error:
        raise BadInput(
            f"{named(flag, path)} is there already and cannot be read ({error.strerror}), so it is"
            " not written over: choose another name"
        ) from error
    if not ours:
        raise BadInput(
            f"{named(flag, path)} is there already and is none of this command's files, so it is"
            " not written over: choose another name, or remove it first"
        )


def named(flag: str, path: str | os.PathLike) -> str:
    """A path in a message, with the flag that gave it, if any."""
    return f"{flag} '{shown(path)}'".strip()


def cure(error: int | Exception) -> str:
    """What to do about an error of the system that a path caused."""
    number = error if isinstance(error, int) else getattr(error, "errno", None)
    if number == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if number in (errno.EACCES, errno.EPERM):
        return "ask its owner for permission, or choose another path"
    return "check the path"


def write(content: dict, path: Path, temporary: Path) -> None:
    """Write `content` by torch.save such that `path` is at any moment the old file or the new one,
    also through a kill or a full disk.

    temporary: a name in the same folder, that no other process uses. Raises OSError where it cannot
    be written; the temporary file is gone then, and an older `path` untouched.
    """
    # here: the launcher's commands need the rest of this file, and not the seconds that this takes
    import torch

    try:
        with replacing(path, temporary):
            with undisturbed(), open(temporary, "wb") as file, _check_sums():
                torch.save(content, file)
    except BaseException as error:
        # torch's writer of zip files hides it behind a RuntimeError
        if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, no handler of a signal runs: those of the signals that came run behind it, once each.

    torch's writer of zip files ends the whole process where it is torn out of its work by what a
    handler raises, such as the news that a worker has ended.
    """
    came: dict[int, None] = {}  # in their order
    if threading.current_thread() is not threading.main_thread():  # where no handler runs anyway
        yield
        return
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, lambda number, _frame: came.setdefault(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


@contextlib.contextmanager
def _check_sums() -> Iterator[None]:
    """torch.save writes the check sum of every part, as it does by default, even where this process
    has set that off.
    """
    import torch

    # older torch always writes them
    before = getattr(torch.serialization, "get_crc32_options", lambda: True)()
    if not before:
        torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        if not before:
            torch.serialization.set_crc32_options(False)


@contextlib.contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[None]:
    """Inside, `temporary` is written; behind it, that file has the name `path`, when it is on the
    disk and not before.

    temporary: a name in the same folder, that no other process uses. Where anything is raised it is
    gone, and an older `path` is untouched. Raises OSError.
    """
    try:
        yield
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _sync(path: Path) -> None:
    """Wait until a file, or what names a folder holds, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_folder(path: str | Path, flag: str, may_be_read_only: bool = False) -> None:
    """Raise BadInput where `path` is no folder, and none can be made there, to create files in.
    Writes nothing.

    may_be_read_only: a folder that is there already need not be writable.
    """
    path = Path(path)
    nearest = next(p for p in (path, *path.parents) if kind(p, flag))
    expected = "expected a folder to create files in"
    if kind(nearest) != "folder":
        raise BadInput(
            f"{named(flag, path)} cannot be written: {shown(nearest)} is a file; {expected}"
        )
    if may_be_read_only and nearest == path:
        return
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise BadInput(
            f"{named(flag, path)} cannot be written: no permission in {shown(nearest)}; {expected}"
        )


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading bytes, without waiting.

    Raises OSError where it is a pipe, a device or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(
                errno.EINVAL,
                "not a regular file, but a pipe, a device or a folder",
                os.fspath(path),
            )
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
