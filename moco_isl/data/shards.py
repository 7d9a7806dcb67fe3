"""Images in tar shards, by the conventions of the webdataset library, at any position.

A sample is the members of one key, one after another: 0001.jpg, 0001.cls. The headers of the tars
are read once, by tarfile; images are then read at their offsets. So an image has a position, which
exact resume and mining need, and a stream has none. Letters: M images.
"""

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import BinaryIO, NamedTuple

import numpy as np

from moco_isl import files
from moco_isl.data import folders, labels
from moco_isl.data.datasets import ImageFiles
from moco_isl.errors import BadInput, missing_package
from moco_isl.files import open_regular, short

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_LABELS = ("label", "cls", "class", "class_name")  # in a sample's .json


class _Shard(NamedTuple):
    """The images of one tar file. name: of the member; label: None where it has none."""

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[str | None]
    skipped: Counter


class TarImages(ImageFiles):
    """The images of tar files, in the order of the tars and of their members."""

    def __init__(self, tars: Sequence[str], shards: Sequence[_Shard], *of_files):
        """of_files: labels, classes, folder and layout, as ImageFiles has them."""
        pairs = zip(tars, shards)
        super().__init__([f"{tar}/{name}" for tar, x in pairs for name in x.names], *of_files)
        self._tars = list(tars)
        self._tar_of = np.repeat(np.arange(len(tars)), [len(x.names) for x in shards])  # [M]
        self._offsets = np.concatenate([np.array(x.offsets, np.int64) for x in shards])  # [M]
        self._sizes = np.concatenate([np.array(x.sizes, np.int64) for x in shards])  # [M]

    def open(self, i: int) -> BinaryIO:
        with open_regular(self._tars[self._tar_of[i]]) as tar:
            tar.seek(int(self._offsets[i]))
            content = tar.read(int(self._sizes[i]))
        if len(content) < self._sizes[i]:
            raise OSError(f"{self.path(i)} is cut off")
        return io.BytesIO(content)

    def stat(self, i: int) -> tuple[int, int]:
        return int(self._sizes[i]), os.stat(self._tars[self._tar_of[i]]).st_mtime_ns


def open_shards(tars: Sequence[str], folder: str, classes: list[str] | None = None) -> TarImages:
    """The images of tar files. folder: how the source is named. classes: as `lists.open_list`.

    Raises BadInput.
    """
    shards = []
    for tar in tars:
        files.require_file(tar, "", "a tar shard")
        found = os.stat(tar)
        shards.append(_index(tar, found.st_size, found.st_mtime_ns))
    of = f"'{files.shown(folder)}'"
    skipped = sum((shard.skipped for shard in shards), Counter())
    if not any(shard.names for shard in shards):
        raise BadInput(
            f"no images in {of} ({folders.many(len(tars), 'tar')}): expected members such as"
            f" 0001.jpg and 0001.cls{folders.skipped_words(skipped)}"
        )
    texts = [text for shard in shards for text in shard.labels]
    return TarImages(tars, shards, *_in_order(labels.number(texts, of, classes, skipped), folder))


def _in_order(found: labels.Labels, folder: str) -> tuple:
    numbers, names, layout = found
    return numbers, names, folder, layout


@cache  # val is numbered by the classes of train, and both are opened twice
def _index(tar: str, size: int, changed: int) -> _Shard:
    """Where the images of a tar are, of this size and time of change. Raises BadInput."""
    try:
        from webdataset.tariterators import group_by_keys
    except ImportError:
        raise missing_package("a tar shard", "webdataset", "'moco_isl[webdataset]'") from None
    shard = _Shard([], [], [], [], Counter())
    try:
        with open_regular(tar) as file, tarfile.open(fileobj=file, mode="r:") as members:
            for sample in group_by_keys(_members(tar, members, shard.skipped)):
                _add(shard, sample, file)
            _require_end(tar, members, file)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BadInput(
            f"'{files.shown(tar)}' is damaged, or no tar: {error}; expected an uncompressed tar"
            " file; write it anew"
        ) from error
    except ValueError as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"'{files.shown(tar)}' has two members of one name: {short(str(error.args[0]), 120)};"
            " expected each once"
        ) from error
    if len(set(shard.names)) < len(shard.names):
        twice = [name for name, n in Counter(shard.names).items() if n > 1]
        raise BadInput(
            f"'{files.shown(tar)}' has {len(twice)} images more than once, '{short(twice[0])}' for"
            " one: expected each name once; write it anew"
        )
    return shard


def _members(tar: str, members: tarfile.TarFile, skipped: Counter) -> Iterator[dict]:
    """The members as `group_by_keys` takes them, with their headers in the place of contents."""
    while (member := members.next()) is not None:
        members.members = []  # tarfile would keep a million of them
        if not member.isreg() or member.issparse():
            skipped["no plain file"] += not member.isdir()
        elif re.match(r"__[^/]*__($|/)", member.name) or os.path.basename(member.name).startswith(
            "."
        ):
            skipped["hidden"] += 1
        else:
            if "." not in os.path.basename(member.name):
                skipped["without an ending"] += 1
            yield {"fname": member.name, "data": member, "__url__": tar}


def _add(shard: _Shard, sample: dict, file: BinaryIO) -> None:
    """Add the image of a sample, if it has one, and its label."""
    parts = {f".{name}": x for name, x in sample.items() if isinstance(x, tarfile.TarInfo)}
    images = [ending for ending in parts if ending in folders.ENDINGS]
    label = _label(parts, file)
    if not images:
        shard.skipped.update(ending for ending in parts if ending not in (".cls", ".json"))
        return
    shard.skipped["second image of a sample"] += len(images) - 1
    image = parts[images[0]]
    shard.names.append(image.name)
    shard.offsets.append(image.offset_data)
    shard.sizes.append(image.size)
    shard.labels.append(label)


def _label(parts: dict[str, tarfile.TarInfo], file: BinaryIO) -> str | None:
    """The label in a sample's .cls, or else in its .json."""
    if ".cls" in parts:
        return _read(parts[".cls"], file).decode(errors="replace").strip() or None
    if ".json" not in parts:
        return None
    try:
        content = json.loads(_read(parts[".json"], file))
    except ValueError:
        return None
    named = content if isinstance(content, dict) else {}
    found = [named[name] for name in _LABELS if isinstance(named.get(name), int | str)]
    return str(found[0]) if found else None


def _read(member: tarfile.TarInfo, file: BinaryIO) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _require_end(tar: str, members: tarfile.TarFile, file: BinaryIO) -> None:
    """Raise BadInput where tarfile has stopped before the end: at a damaged header."""
    file.seek(members.offset)
    if file.read(512).strip(b"\0"):
        raise BadInput(
            f"'{files.shown(tar)}' is damaged at byte {members.offset}: expected the header of its"
            " next member; write it anew"
        )
