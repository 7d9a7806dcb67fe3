"""Names of files in messages, checks of paths, and files that are written whole or not at all."""

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
AnyPath = str | os.PathLike

# ---- names and texts in messages -----------------------------------------------------------------


def shown(name: str | bytes | os.PathLike) -> str:
    r"""A name that can be printed and written anywhere.

    Characters that cannot be printed, and bytes that are not UTF-8, become escapes: \n, \udcff.
    """
    text = os.fsdecode(name)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(text: str, most: int = 60) -> str:
    """A text of a user or a file for a message: escaped by `shown`, at most `most` characters."""
    text = shown(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def encodable(text: str) -> str:
    r"""The text in UTF-8; bytes of a file's name that are not UTF-8 become escapes: \udcff."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def named(flag: str, path: AnyPath) -> str:
    """A path in a message, after the flag that gave it, if any."""
    return f"{flag} '{shown(path)}'".strip()


def cure(error: int | Exception) -> str:
    """What the user can do about a system error that a path caused."""
    number = error if isinstance(error, int) else getattr(error, "errno", None)
    if number == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if number in (errno.EACCES, errno.EPERM):
        return "ask its owner for permission, or choose another path"
    return "check the path"


def print_any_name() -> None:
    r"""Let stdout and stderr take every name: what their encoding lacks becomes an escape, \xe9."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # tests and notebooks put other objects there
            stream.reconfigure(errors="backslashreplace")


# ---- what is at a path ---------------------------------------------------------------------------


def kind(path: AnyPath, flag: str = "") -> str:
    """What is at a path, links followed: "file", "folder", "other" (a pipe, a device) or "".

    flag: the flag that gave the path. Raises BadInput where the system cannot say: no permission,
    a name that is too long, links in a circle, a name with a zero byte.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        what = f"{named(flag, path)} cannot be looked at: {reason}"
        raise BadInput(f"{what}; {cure(error)}") from error
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"


def require_file(path: AnyPath, flag: str = "", expected: str = "a file") -> Path:
    """The path, which leads to a regular file that may be read. Raises BadInput otherwise.

    expected: words for what kind of file, such as "a checkpoint".
    """
    found = kind(path, flag)
    name = named(flag, path)
    if not found:
        raise BadInput(f"{name}: no such file; expected {expected}; check the path")
    if found != "file":
        word = "a folder" if found == "folder" else "a pipe or a device"
        raise BadInput(f"{name} is {word}: expected {expected}")
    if not os.access(path, os.R_OK):
        what = f"{name} cannot be read: no permission; expected {expected}"
        raise BadInput(f"{what}; {cure(errno.EACCES)}")
    return Path(path)


def require_ours(path: AnyPath, is_ours: Callable[[Path], bool], flag: str = "") -> None:
    """Raise BadInput unless `path` may be written: nothing is there, or a file that `is_ours`.

    A command asks this before its work, and again right before it writes.
    """
    found = kind(path, flag)
    name = named(flag, path)
    if found == "folder":
        raise BadInput(f"{name} is a folder: expected the name of a file to write")
    if found == "other":
        raise BadInput(f"{name} is a pipe or a device, which is not written over: name a file")
    try:
        ours = not found or is_ours(Path(path))
    except OSError as error:
        raise BadInput(
            f"{name} is there already and cannot be read ({error.strerror}), so it is not written"
            " over: choose another name"
        ) from error
    if not ours:
        raise BadInput(
            f"{name} is there already and is none of this command's files, so it is not written"
            " over: choose another name, or remove it first"
        )


def require_folder(path: AnyPath, flag: str, may_be_read_only: bool = False) -> None:
    """Raise BadInput unless `path` is a folder, or can become one, to create files in.

    may_be_read_only: a folder that exists need not be writable. Nothing is written.
    """
    path = Path(path)
    nearest = next(p for p in (path, *path.parents) if kind(p, flag))
    what = f"{named(flag, path)} cannot be written"
    expected = "a folder to create files in"
    if kind(nearest) != "folder":
        raise BadInput(f"{what}: {shown(nearest)} is a file; expected {expected}")
    if may_be_read_only and nearest == path:
        return
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise BadInput(f"{what}: no permission in {shown(nearest)}; expected {expected}")


# ---- reading -------------------------------------------------------------------------------------


@contextlib.contextmanager
def utf8_name(path: AnyPath) -> Iterator[Path]:
    """A UTF-8 name of a file, for libraries that open no other: its own, or a temporary link's."""
    path = Path(path)
    if encodable(str(path)) == str(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"link{encodable(path.suffix)}")  # some libraries look at the ending
        link.symlink_to(path.absolute())
        yield link


def read_text(
    path: AnyPath, flag: str = "", expected: str = "a text file", most: int = 64 << 20
) -> str:
    """The text of a UTF-8 file of at most `most` bytes. Raises BadInput."""
    path = require_file(path, flag, expected)
    name = named(flag, path)
    try:
        if path.stat().st_size > most:
            raise BadInput(f"{name} has more than {most} bytes: expected {expected}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} is not UTF-8 text: expected {expected}") from error
    except OSError as error:
        what = f"{name} cannot be read: {error.strerror}"
        raise BadInput(f"{what}; expected {expected}") from error


def open_regular(path: AnyPath) -> BinaryIO:
    """Open a regular file for reading bytes; raises OSError for a pipe, a device or a folder.

    Opening a pipe would wait for somebody to write into it.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            reason = "not a regular file, but a pipe, a device or a folder"
            raise OSError(errno.EINVAL, reason, os.fspath(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


# ---- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[None]:
    """The block writes `temporary`, which then becomes `path`, once it is on the disk.

    temporary: a name in the same folder that no other process uses. Where the block or the disk
    raises, `temporary` is removed and an older `path` is untouched. Raises OSError.
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
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(text: str, path: AnyPath, temporary: Path | None = None) -> None:
    """Write a UTF-8 file through `replacing`. Raises OSError.

    Bytes of file names that are not UTF-8 are escaped. temporary: default a short name with this
    process's number, since `path` may be as long as a name can be.
    """
    path = Path(path)
    temporary = temporary or path.with_name(f".{os.getpid()}{TEMPORARY}")
    with replacing(path, temporary):
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)


def write(content: dict, path: Path, temporary: Path) -> None:
    """Write `content` by torch.save through `replacing`. Raises OSError.

    At any moment `path` is the old file or the new one, also after a kill or on a full disk.
    """
    import torch  # here, because it takes seconds, and the launcher's commands do not need it

    try:
        with replacing(path, temporary):
            with undisturbed(), open(temporary, "wb") as file, _check_sums():
                torch.save(content, file)
    except BaseException as error:
        # torch's writer of zip files hides an OSError behind a RuntimeError
        if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Hold back signal handlers during the block; those of signals that came run after it.

    torch's writer of zip files ends the whole process when a handler raises within it, as torch's
    own does when a worker of a DataLoader has ended.
    """
    if threading.current_thread() is not threading.main_thread():  # no handler runs here anyway
        yield
        return
    came: dict[int, None] = {}  # each once, in the order of arrival
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
    """Let torch.save write check sums during the block, also where this process has them off."""
    import torch

    # an older torch offers no choice and always writes them
    before = getattr(torch.serialization, "get_crc32_options", lambda: True)()
    if not before:
        torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        if not before:
            torch.serialization.set_crc32_options(False)
