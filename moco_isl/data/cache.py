"""Decoded images kept in a file, which a run maps into its memory instead of decoding again.

The file holds the images of one folder, uint8 [M, 3, H, W] or float32 [M, c, H, W], and the name,
size and time of each file that they came from. It is used as long as these are the same. Several
data sets may share a cache folder.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL
import torch
from torch.utils.data import Dataset

from moco_isl import files
from moco_isl.data.datasets import (
    SMALL,
    ImageFiles,
    ImagesInMemory,
    is_rgb,
    load_into_memory,
    native_size,
    read_pixels,
    stat_of,
)
from moco_isl.errors import BadInput
from moco_isl.files import TEMPORARY

# Two versions of a decoder may differ in the last bit of a pixel. The format's number goes up when
# this package decodes differently.
DECODER = f"Pillow {PIL.__version__}, format 2"


def hold_cached(
    dataset: ImageFiles, folder: str | Path, threads: int = 4, say: Callable[[str], None] = print
) -> Dataset:
    """The data set in memory, mapped from the cache `folder`, into which it is decoded if needed.

    It equals what `load_into_memory` gives, with the same positions in .unreadable. Images that are
    not all small and of one size stay in their files, and `say` gets a line about it. Raises
    BadInput where the cache cannot be written, before anything is decoded.
    """
    folder = Path(folder)
    if native_size(dataset) > SMALL:
        what = f"the images in {dataset.folder} are larger than {SMALL} pixels"
        say(f"=> --cache: {what} and stay in their files")
        return dataset
    path = cache_file(dataset, folder)
    sources = list_sources(dataset, threads)
    content, why_not = _read(path, sources)
    if content is None:
        if why_not:
            say(f"=> cache {folder} {why_not}: decoding anew")
        _require_room(dataset, folder)
        with _one_at_a_time(folder, say) as alone:
            content, _ = _read(path, sources)  # another process may have written it meanwhile
            if content is None:
                return _decode(dataset, path, sources, threads, alone, say)
    say(f"=> {len(dataset):,} decoded images from cache {path}")
    return _as_dataset(content, dataset)


def cache_file(dataset: ImageFiles, folder: str | Path) -> Path:
    """The file of a data set in a cache folder: one for each folder of images and their pixels."""
    resolved = os.path.realpath(dataset.folder)
    digest = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:16]
    name = os.path.basename(resolved) or "root"
    name = os.fsdecode(os.fsencode(name)[:100])  # a file's name may have 255 bytes
    kind = "" if is_rgb(*_kind(dataset)) else "-{}x{}".format(*_kind(dataset))
    return Path(folder) / f"{name}-{digest}{kind}.images"


def _kind(dataset: ImageFiles) -> tuple[int, int]:
    return dataset.channels, dataset.bits


def list_sources(dataset: ImageFiles, threads: int = 4) -> dict[str, torch.Tensor]:
    """What the pixels of a data set depend on: names and stats of its files.

    names: uint8, the names below the folder, in order, joined by zero bytes. stats: int64 [M, 2],
    size in bytes and time of change in nanoseconds.
    """
    M = len(dataset)
    names = b"\0".join(os.fsencode(dataset.path(i).removeprefix(dataset.folder)) for i in range(M))
    stats_of = lambda start: [stat_of(dataset, i) for i in range(start, min(start + 4096, M))]
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        stats = [stat for block in pool.map(stats_of, range(0, M, 4096)) for stat in block]
    return {
        "names": torch.frombuffer(bytearray(names), dtype=torch.uint8),
        "stats": torch.tensor(stats, dtype=torch.int64),
    }


# ---------------------------------------------------------------- the file


def _read(path: Path, sources: dict[str, torch.Tensor]) -> tuple[dict | None, str]:
    """(the file's content with mapped images, ''), or (None, why it cannot be used).

    The reason is '' where there is no file.
    """
    if not os.path.exists(path):
        return None, ""
    if not os.path.isfile(path):
        return None, "holds no file of that name"
    try:
        with files.utf8_name(path) as name:  # a private mapping: writes do not reach the file
            content = torch.load(name, mmap=True, weights_only=True)
        images = content["images"]
        is_images = images.dtype in (torch.uint8, torch.float32) and images.dim() == 4
        is_complete = is_images and len(images) == len(content["stats"])
        whole = is_complete and content["checksum"] == _checksum(content)
    except Exception:  # torch answers a broken file with almost any exception
        whole = False
    if not whole:
        return None, "is damaged"
    if content["decoder"] != DECODER:
        return None, f"is stale (it was decoded by {content['decoder']}, and here is {DECODER})"
    if all(torch.equal(content[name], sources[name]) for name in ("names", "stats")):
        return content, ""
    return None, f"is stale ({_what_changed(content, sources)})"


def _what_changed(then: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> str:
    before, after = _by_name(then), _by_name(now)
    changed = sum(before.get(name) != stat for name, stat in after.items())
    gone = sum(name not in after for name in before)
    words = f"{changed:,} of {len(after):,} images changed"
    return words + (f", {gone:,} are gone" if gone else "")


def _by_name(sources: dict[str, torch.Tensor]) -> dict[bytes, tuple[int, int]]:
    names = sources["names"].numpy().tobytes().split(b"\0")
    return dict(zip(names, map(tuple, sources["stats"].tolist())))


def _checksum(content: dict) -> int:
    """The check sum of all bytes.

    150 MB take 0.1 s; decoding the images in them takes 9 s.
    """
    checksum = 0
    for name in ("images", "names", "stats", "unreadable"):
        checksum = zlib.crc32(content[name].numpy(), checksum)
    return checksum


def _decode(
    dataset: ImageFiles, path: Path, sources: dict, threads: int, alone: bool, say: Callable
) -> Dataset:
    """Decode all images and keep them in the file; returns the data set.

    alone: no other process writes into the folder.
    """
    try:
        whole = load_into_memory(dataset, threads)
    except BadInput as error:
        say(f"=> --cache keeps nothing: {error}")
        return dataset
    unreadable = torch.tensor(whole.unreadable, dtype=torch.int64)
    content = {"decoder": DECODER, "images": whole.images, "unreadable": unreadable, **sources}
    content["checksum"] = _checksum(content)
    if alone:  # then temporary files are those of killed processes
        for old in path.parent.glob(f"{path.name}.*{TEMPORARY}"):
            old.unlink(missing_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        files.write(content, path, temporary)
    except OSError as error:
        why = f"cannot write {path}: {error.strerror or error}"
        say(f"=> warning: {why}; going on with the images in memory")
        return whole
    say(f"=> {len(dataset):,} images decoded and kept in cache {path}")
    content, _ = _read(path, sources)  # mapped, so that processes share the memory
    return whole if content is None else _as_dataset(content, dataset)


def _as_dataset(content: dict, dataset: ImageFiles) -> ImagesInMemory:
    held = ImagesInMemory(content["images"], dataset.labels, dataset.classes, dataset)
    held.unreadable = content["unreadable"].tolist()
    return held


# ---------------------------------------------------------------- the folder


def _require_room(dataset: ImageFiles, folder: Path) -> None:
    """Make the folder; raise BadInput where the decoded images cannot be written into it."""
    images = (read_pixels(dataset, i) for i in range(len(dataset)))
    first = next((image for image in images if image is not None), torch.zeros(0))
    needed = len(dataset) * first.nbytes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        what = f"--cache '{folder}' cannot be written: {error.strerror}"
        raise BadInput(f"{what}; expected a folder to create files in") from error
    if free < needed:
        raise BadInput(
            f"--cache '{folder}' has {free / 2**30:.1f} GiB free, and the decoded images take"
            f" {needed / 2**30:.1f}: free some space, or choose another folder"
        )


@contextlib.contextmanager
def _one_at_a_time(folder: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Wait until no other process decodes into the folder; yields whether that is certain.

    Where the file system has no locks, several processes may decode at once: each writes a whole
    file, and the last one stays.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(descriptor, folder, say)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, say: Callable[[str], None]) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"=> another process decodes images into cache {folder}: waiting for it")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
