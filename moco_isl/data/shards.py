"""Images in tar shards, by the conventions of the webdataset library, at any position.

A sample is the members of one key, one after another: 0001.jpg, 0001.cls. The headers of the tars
are read once, by tarfile; images are then read at their offsets. So an image has a position, which
exact resume and mining need, and a stream has none. Letters: M images.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from moco_isl import files
from moco_isl.data import folders, labels
from moco_isl.data.datasets import ImageFiles
from moco_isl.errors import BadInput, missing_package
from moco_isl.files import open_regular, short

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_KEEP = 20_000  # images from which on an index is kept
_FORMAT = 1  # of a kept index
_LABELS = ("label", "cls", "class", "class_name")  # in a sample's .json


class _Index(NamedTuple):
    """Where the images of some tars are. skipped: what else is in them, counted, as JSON."""

    names: np.ndarray  # bytes [M], of the members
    labels: np.ndarray  # bytes [M], empty for none
    tar_of: np.ndarray  # int64 [M], the position of the tar
    offsets: np.ndarray  # int64 [M]
    sizes: np.ndarray  # int64 [M]
    skipped: np.ndarray


class TarImages(ImageFiles):
    """The images of tar files, in the order of the tars and of their members."""

    def __init__(self, tars: Sequence[str], index: _Index, *of_files):
        """of_files: labels, classes, folder and layout, as ImageFiles has them."""
        of = zip(index.tar_of.tolist(), index.names)
        super().__init__([f"{tars[tar]}/{os.fsdecode(name)}" for tar, name in of], *of_files)
        self._tars = list(tars)
        self._tar_of = index.tar_of
        self._offsets = index.offsets
        self._sizes = index.sizes

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
    stats = [os.stat(files.require_file(tar, "", "a tar shard")) for tar in tars]
    found = tuple((tar, x.st_size, x.st_mtime_ns) for tar, x in zip(tars, stats))
    index = _index(found, folders.ENDINGS)
    of = f"'{files.shown(folder)}'"
    skipped = Counter(json.loads(str(index.skipped)))
    if not len(index.names):
        raise BadInput(
            f"no images in {of} ({folders.many(len(tars), 'tar')}): expected members such as"
            f" 0001.jpg and 0001.cls{folders.skipped_words(skipped)}"
        )
    texts = [label.decode(errors="replace") or None for label in index.labels]
    numbers, names, layout = labels.number(texts, of, classes, skipped)
    return TarImages(tars, index, numbers, names, folder, layout)


# ---------------------------------------------------------------- the index


@cache  # val is numbered by the classes of train, and both are opened twice
def _index(tars: tuple[tuple[str, int, int], ...], endings: tuple[str, ...]) -> _Index:
    """Where the images of these endings are in tars of these names, sizes and times of change.

    That of many members is kept below ~/.cache, since reading their headers takes minutes. Raises
    BadInput.
    """
    of = [(os.path.realpath(tar), size, changed) for tar, size, changed in tars]
    digest = hashlib.sha256(repr((_FORMAT, endings, of)).encode(errors="replace"))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    kept = Path(cache, "moco_isl", f"shards-{digest.hexdigest()[:32]}.npz")
    try:
        with np.load(kept) as content:
            return _Index(*(content[name] for name in _Index._fields))
    except Exception:  # of a damaged file, zipfile and numpy raise almost anything
        pass
    rows = []  # (position of the tar, name, label, offset, size) of each image
    skipped = Counter()
    for i, (tar, _, _) in enumerate(tars):
        rows += [(i, *row) for row in _read_headers(tar, skipped)]
    tar_of, names, texts, offsets, sizes = zip(*rows) if rows else [()] * 5
    whole = lambda values: np.array(values, dtype=np.int64)
    index = _Index(
        np.array([os.fsencode(name) for name in names], dtype=bytes),
        np.array([text.encode(errors="replace") for text in texts], dtype=bytes),
        *map(whole, (tar_of, offsets, sizes)),
        np.array(json.dumps(+skipped)),
    )
    if len(rows) >= _KEEP:
        with contextlib.suppress(OSError):  # then the headers are read again next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_name(f"{kept.name}.{uuid.uuid4().hex[:8]}{files.TEMPORARY}")
            with files.replacing(kept, temporary), open(temporary, "wb") as file:
                np.savez_compressed(file, **index._asdict())
    return index


def _read_headers(tar: str, skipped: Counter) -> list[tuple[str, str, int, int]]:
    """(name, label, offset, size) of each image of a tar; the rest is counted. Raises BadInput."""
    try:
        from webdataset.tariterators import group_by_keys
    except ImportError:
        raise missing_package("a tar shard", "webdataset", "'moco_isl[webdataset]'") from None
    rows = []
    try:
        with open_regular(tar) as file, tarfile.open(fileobj=file, mode="r:") as members:
            for sample in group_by_keys(_members(tar, members, skipped)):
                rows += _row(sample, file, skipped)
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
    names = [name for name, *_ in rows]
    if len(set(names)) < len(names):
        twice = [name for name, n in Counter(names).items() if n > 1]
        raise BadInput(
            f"'{files.shown(tar)}' has {folders.many(len(twice), 'image')} more than once,"
            f" '{short(twice[0])}' for one: expected each name once; write it anew"
        )
    return rows


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


def _row(sample: dict, file: BinaryIO, skipped: Counter) -> list[tuple[str, str, int, int]]:
    """The row of a sample's image, if it has one."""
    parts = {f".{name}": x for name, x in sample.items() if isinstance(x, tarfile.TarInfo)}
    images = [ending for ending in parts if ending in folders.ENDINGS]
    if not images:
        skipped.update(ending for ending in parts if ending not in (".cls", ".json"))
        return []
    skipped["second image of a sample"] += len(images) - 1
    image = parts[images[0]]
    return [(image.name, _label(parts, file), image.offset_data, image.size)]


def _label(parts: dict[str, tarfile.TarInfo], file: BinaryIO) -> str:
    """The label in a sample's .cls, or else in its .json; '' for none."""
    if ".cls" in parts:
        return _read(parts[".cls"], file).decode(errors="replace").strip()
    if ".json" not in parts:
        return ""
    try:
        content = json.loads(_read(parts[".json"], file))
    except ValueError:
        return ""
    named = content if isinstance(content, dict) else {}
    found = [named[name] for name in _LABELS if isinstance(named.get(name), int | str)]
    return str(found[0]) if found else ""


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
