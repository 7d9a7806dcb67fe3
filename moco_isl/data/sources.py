"""What DIR is, and the images in it: folders, lists, tar shards, Hugging Face sets, or several.

What a path is, is seen by its ending, or by what lies in the folder. Each source is opened as a
data set of `data.datasets.ImageFiles`, with its split named as `split_of` reads it off the names of
files: train-0001.tar, val.csv.
"""

import glob
import itertools
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from moco_isl import files
from moco_isl.data import folders, hub, lists, shards
from moco_isl.data.datasets import ImageFiles
from moco_isl.errors import BadInput, missing_package

_KINDS = {**dict.fromkeys(lists.ENDINGS, "list"), ".tar": "shards"} | dict.fromkeys(
    hub.ENDINGS, "table"
)
_SPLIT = re.compile(r"(?<![a-z])(training|train|validation|valid|val|testing|test)(?![a-z])")
_VAL = ("val", "valid", "validation", "test", "testing")  # the first that is there is val
_EXPECTED = (
    "expected a folder with train/ (and val/), or with images; a list (.txt, .csv), tar shards"
    " (.tar), or a Hugging Face data set (.parquet, .arrow, save_to_disk)"
)


def open_images(dirs: Sequence[str], split: str) -> ImageFiles:
    """The images of a split (train or val) of what DIR names, in one data set. Raises BadInput."""
    sources = find_sources(dirs)
    of_split = [source for source in sources if split == "train" or source.has_val()]
    if not of_split and len(sources) > 1:
        raise BadInput(
            f"no validation images: none of {' '.join(map(files.shown, dirs))} has a val split;"
            " expected one in one of them at least; add it or do without validation"
        )
    if len(sources) == 1:
        return sources[0].open(split)
    trained = together([source.open("train") for source in sources], sources)
    if split == "train":
        return trained
    parts = [source.open("val") for source in of_split]
    return together(parts, of_split, trained.classes)


def has_val(dirs: Sequence[str]) -> bool:
    """Whether what DIR names has a val split. Raises BadInput."""
    return any(source.has_val() for source in find_sources(dirs))


# ---------------------------------------------------------------- what DIR is


@dataclass(frozen=True)
class Source:
    """One source of images. kind: folder, list, shards, saved or table.

    given: as the user names it. train, val: paths of the files of each split, or of the folder.
    warning: of what else lies there.
    """

    kind: str
    given: str
    train: tuple[str, ...]
    val: tuple[str, ...] = ()
    warning: str = ""

    def has_val(self) -> bool:
        if self.kind == "folder":
            return os.path.isdir(os.path.join(self.given, "val"))
        return bool(self.val)

    def open(self, split: str) -> ImageFiles:
        """The images of a split: train or val. Raises BadInput."""
        if self.kind == "folder":
            images = _folder(Path(self.given), split)
            images.layout.warnings += [self.warning] * (bool(self.warning) and split == "train")
            return images
        if split == "train":
            return self._open(self.train, split, None)
        if not self.val:
            beside = "val beside train" if split_of(self.given) == "train" else "names with val"
            raise BadInput(
                f"no validation images: '{files.shown(self.given)}' has no val split; expected"
                f" {beside}, such as {self._example()}; add it or do without validation"
            )
        return self._open(self.val, split, self._open(self.train, "train", None).classes)

    def _example(self) -> str:
        return {
            "list": "train.csv and val.csv",
            "shards": "train-0000.tar and val-0000.tar",
            "saved": "train/ and validation/",
            "table": "train.parquet and validation.parquet",
        }[self.kind]

    def _open(self, paths: tuple[str, ...], split: str, classes: list[str] | None) -> ImageFiles:
        if self.kind == "list":
            return lists.open_list(paths[0], classes)
        if self.kind == "shards":
            return shards.open_shards(paths, self.given, classes)
        return hub.open_tables(paths, self.given, split, classes)


def find_sources(dirs: Sequence[str]) -> list[Source]:
    """What each path of DIR is. Files of one kind, such as the shards *.tar, are one source.

    A list is a source of its own. Raises BadInput.
    """
    found: list[Source] = []
    loose: dict[str, list[str]] = {}  # files given one by one, by kind, in the order given
    for given in dirs:
        paths = _expanded(given)
        for path in paths:
            kind = _kind(path)
            if kind == "folder":
                found.append(_source_in(path))
            elif kind in loose:
                loose[kind].append(path)
            else:
                loose[kind] = [path]
                found.append(Source(kind, path, ()))  # its place
    _require_once([*(x.given for x in found if x.train), *itertools.chain(*loose.values())])
    placed = []
    for source in found:
        placed += [source] if source.train else _of_files(source.kind, loose[source.kind], dirs)
    return placed


def _expanded(given: str) -> list[str]:
    """The paths that a pattern with *, ?, [..] or {..} stands for, sorted. Raises BadInput."""
    if re.match(r"([a-z][a-z0-9+.-]*://|pipe:)", given, re.I):
        raise BadInput(
            f"'{files.shown(given)}' is a stream, which has no positions, and mining and exact"
            " resume need them: expected files on disk; copy the shards there"
        )
    if os.path.lexists(given) or not re.search(r"[*?\[{]", given):
        return [given]
    patterns = [given]
    if "{" in given:
        try:
            from braceexpand import braceexpand
        except ImportError:
            who = f"'{files.shown(given)}'"
            raise missing_package(who, "webdataset", "'moco_isl[webdataset]'") from None
        patterns = list(braceexpand(given))
    paths = []
    for pattern in patterns:
        matching = sorted(glob.glob(pattern))
        if not matching:
            raise BadInput(f"no file matches '{files.shown(pattern)}': {_EXPECTED}")
        paths += matching
    return paths


def _kind(path: str) -> str:
    """folder, or the kind of a file by its ending. Raises BadInput."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        what = "file" if _ending(path) in _KINDS else "folder"
        raise BadInput(f"no such {what}: {path}; {_EXPECTED}") from None
    except OSError as error:  # no permission above it, or a name that is too long
        raise BadInput(f"cannot read {path}: {error.strerror}; {_EXPECTED}") from None
    if stat.S_ISDIR(mode):
        return "folder"
    if path.lower().endswith(shards.COMPRESSED):
        raise BadInput(
            f"'{files.shown(path)}' is compressed, so its images can only be read one after"
            " another, and mining and exact resume need any at any time: expected a plain .tar;"
            " unpack it with gunzip or the like"
        )
    kind = _KINDS.get(_ending(path))
    if kind is None or not stat.S_ISREG(mode):
        raise BadInput(f"not a folder: {path}; {_EXPECTED}")
    return kind


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _source_in(folder: str) -> Source:
    """What a folder holds: images, unless there are none and there are shards or tables."""
    if hub.is_saved(folder):
        splits = hub.saved_splits(folder)
        val = (splits["val"],) if "val" in splits else ()
        return Source("saved", folder, (splits["train"],), val)
    inside = {kind: list(_files_in(folder, kind)) for kind in ("shards", "table")}
    inside = {kind: paths for kind, paths in inside.items() if paths}
    if not inside:
        return Source("folder", folder, (folder,))
    first = next(iter(inside.values()))[0]
    if _holds_images(folder):
        what = f"'{files.shown(first)}' beside the images is not read: give it alone as DIR, or"
        return Source("folder", folder, (folder,), warning=f"{what} move it away")
    if len(inside) > 1:
        firsts = " and ".join(f"'{os.path.basename(paths[0])}'" for paths in inside.values())
        raise BadInput(
            f"'{files.shown(folder)}' holds tar shards and tables, such as {firsts}: expected one"
            f" kind; give the files of one, as in '{os.path.join(folder, '*.tar')}'"
        )
    kind, paths = next(iter(inside.items()))
    train, val = _divided(paths, folder)
    return Source(kind, folder, train, val)


def _files_in(folder: str, kind: str) -> Iterator[str]:
    """The files of a kind in a folder, and in folders in it named as a split or data."""
    for name in ("", "data", "train", *_VAL):
        inner = os.path.join(folder, name) if name else folder
        if os.path.isdir(inner) and os.access(inner, os.R_OK | os.X_OK):
            for entry in sorted(os.listdir(inner)):
                if _KINDS.get(_ending(entry)) == kind and not entry.startswith("."):
                    yield os.path.join(inner, entry)


def _holds_images(folder: str, deep: int = 2) -> bool:
    """Whether an image lies in a folder, or in folders up to `deep` levels below it."""
    if folders.has_image(folder):
        return True
    try:
        inner = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return False
    return deep > 0 and any(_holds_images(path, deep - 1) for path in inner)


# ---------------------------------------------------------------- which split


def split_of(path: str) -> str:
    """The split that a path names: train, one of _VAL, or ''."""
    found = _SPLIT.search(path.lower())
    word = found[1] if found else ""
    return "train" if word.startswith("train") else word


def _divided(paths: Sequence[str], folder: str = "") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(those of train, those of val) among files of one kind, by their names below a folder.

    Where none is named train, all of them are.
    """
    below = lambda path: os.path.relpath(path, folder) if folder else os.path.basename(path)
    splits = [split_of(below(path)) for path in paths]
    if "train" not in splits:
        return tuple(paths), ()
    chosen = next((word for word in _VAL if word in splits), None)
    of = lambda *words: tuple(path for path, word in zip(paths, splits) if word in words)
    return of("train", ""), of(chosen)


def _of_files(kind: str, paths: list[str], dirs: Sequence[str]) -> list[Source]:
    """The sources of files that were given one by one, or by a pattern."""
    train, val = _divided(paths)
    if kind == "list":
        vals = {path: tuple(_beside([path])) for path in train}
        if left := [path for path in val if path not in itertools.chain(*vals.values())]:
            raise BadInput(
                f"'{files.shown(left[0])}' is named as a val split of none of the lists: expected"
                " the name of its train list with val in the place of train, in the same folder"
            )
        return [Source(kind, path, (path,), vals[path]) for path in train]
    given = dirs[0] if len(dirs) == 1 else os.path.dirname(paths[0]) or "."
    if len(paths) == 1:
        given = paths[0]
    return [Source(kind, given, train, val or tuple(_beside(train)))]


def _beside(train: Sequence[str]) -> list[str]:
    """The files of val for files of train: named alike, in the same folder, but for the split."""
    for word in _VAL:
        found = set()
        for path in train:
            folder, name = os.path.split(path)
            if split_of(name) != "train":
                continue
            at = _SPLIT.search(name.lower())
            pattern = f"{glob.escape(name[: at.start()])}{word}{glob.escape(name[at.end() :])}"
            pattern = os.path.join(glob.escape(folder), re.sub(r"\d+", "*", pattern))
            found |= set(glob.glob(pattern))
        if found:
            return sorted(found)
    return []


def _require_once(paths: Sequence[str]) -> None:
    seen = set()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise BadInput(
                f"DIR names '{files.shown(path)}' twice: expected each source once; leave one out"
            )
        seen.add(real)


# ---------------------------------------------------------------- several sources


class Several(ImageFiles):
    """The images of several data sets, one after another."""

    def __init__(self, parts: Sequence[ImageFiles], names: Sequence[str], *of_files):
        """names: of the images. of_files: labels, classes, folder, layout, as ImageFiles."""
        super().__init__([part.path(i) for part in parts for i in range(len(part))], *of_files)
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self._names = np.array([os.fsencode(name) for name in names])

    def _at(self, i: int) -> tuple[ImageFiles, int]:
        part = int(np.searchsorted(self._ends, i, side="right"))
        return self._parts[part], int(i) - int(self._ends[part - 1] if part else 0)

    def name(self, i: int) -> str:
        return os.fsdecode(self._names[i])

    def open(self, i: int) -> BinaryIO:
        part, at = self._at(i)
        return part.open(at)

    def stat(self, i: int) -> tuple[int, int]:
        part, at = self._at(i)
        return part.stat(at)


def together(
    parts: Sequence[ImageFiles], sources: Sequence[Source], classes: list[str] | None = None
) -> ImageFiles:
    """Several data sets as one. An image's name begins with that of its source.

    Classes of one name are one class. classes: of train, where they number these. Raises BadInput
    where an image is in several of them.
    """
    paths = [part.path(i) for part in parts for i in range(len(part))]
    whole = [os.path.abspath(path) for path in paths]
    if len(set(whole)) < len(whole):
        seen = set()
        twice = next(p for p, path in zip(paths, whole) if path in seen or seen.add(path))
        raise BadInput(
            f"several of the sources hold '{files.shown(twice)}': expected each image once; leave"
            " one of them out"
        )
    own = distinct([os.path.abspath(source.given) for source in sources])
    names = [f"{name}/{below}" for name, part in zip(own, parts) for below in names_in(part)]
    without = [name for name, part in zip(own, parts) if part.labels is None]
    labels = None
    if not without:
        labels, classes = _renumbered(parts, classes)
    summary = f"{folders.many(len(paths), 'image')} of {folders.many(len(parts), 'source')}"
    layout = folders.Layout(f"{summary}, {folders.many(len(classes or ()), 'class')}")
    for name, part in zip(own, parts):
        layout.parts.append(f"{name}: {part.layout.summary}")
        layout.warnings += [f"{name}: {line}" for line in part.layout.warnings]
    if without:
        classes = None
        layout.unlabelled = f"those of {folders.some(without)} have none"
        if len(without) < len(parts):
            layout.warnings.append(f"{layout.unlabelled}: no image has a label then")
    folder = "|".join(os.path.abspath(part.folder) for part in parts)
    return Several(parts, names, labels, classes, folder, layout)


def _renumbered(
    parts: Sequence[ImageFiles], classes: list[str] | None
) -> tuple[torch.Tensor, list[str]]:
    """(labels, classes) of labelled data sets, each with classes of its own."""
    named = {name for part in parts for name in part.classes}
    classes = classes or sorted(named)
    if extra := sorted(named - set(classes)):
        raise BadInput(
            f"val has a class that train lacks: {extra[0]!r}; expected a subset of the"
            f" {len(classes)} classes of train; leave it out"
        )
    number = {name: i for i, name in enumerate(classes)}
    own = [torch.tensor([number[name] for name in part.classes]) for part in parts]
    return torch.cat([numbers[part.labels] for numbers, part in zip(own, parts)]), classes


def names_in(part: ImageFiles) -> list[str]:
    """The names of the images of a source below the folder that the source is in."""
    below = os.path.join(os.path.dirname(part.folder), "") if _ending(part.folder) else ""
    roots = [os.path.join(part.folder, ""), below]
    root = next((r for r in roots if r and part.name(0).startswith(r)), "")
    return [part.name(i).removeprefix(root).lstrip("/") for i in range(len(part))]


def distinct(paths: Sequence[str]) -> list[str]:
    """The shortest ends of these paths that differ from one another."""
    parts = [path.strip(os.sep).split(os.sep) for path in paths]
    for deep in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(names[-deep:]) for names in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{'/'.join(names)} ({i})" for i, names in enumerate(parts)]


# ---------------------------------------------------------------- a folder of images


def _folder(root: Path, split: str) -> ImageFiles:
    train, val = root / "train", root / "val"
    if os.path.isdir(root / split):
        # val is numbered by the classes of train: with a class missing there, its own numbering
        # would shift all labels
        names = (
            folders.class_names(str(train)) or None
            if split == "val" and os.path.isdir(train)
            else None
        )
        images = _image_files(root / split, names)
        if split == "train" and not os.path.isdir(val):
            images.layout.warnings += _not_read(root)
        if split == "val" and os.path.isdir(train) and os.path.samefile(train, val):
            images.layout.warnings.append(
                "val/ is a link to train/, so each image is judged by its own training image"
            )
        return images
    if split == "val":
        found = f", and it holds {folders.some(others)}" if (others := _other_splits(root)) else ""
        raise BadInput(
            f"no validation images: {val} is missing{found}; expected a folder a class as in"
            " train/; add it or do without validation"
        )
    if os.path.isdir(val):
        raise BadInput(
            f"no training images: {root} has val/ but not train/; expected both; add {train} or"
            f" give {val} itself"
        )
    return _image_files(root, None)


def _not_read(root: Path) -> list[str]:
    """Warnings of what lies beside train/, where there is no val/, and is not read."""
    splits, said = _other_splits(root), []
    if splits:
        said.append(
            f"{folders.some(splits)} beside train/ in {str(root)!r} is not read: a val split is"
            " named val"
        )
    others = [
        name
        for name in sorted(os.listdir(root))
        if name not in ("train", *splits) and not name.startswith(".")
    ]
    if others := [
        name for name in others if os.path.isdir(root / name) and folders.has_image(root / name)
    ]:
        said.append(
            f"{folders.some(others)} beside train/ in {str(root)!r} hold images that are not read:"
            " expected all training images in train/; if train is one of the classes, move all of"
            " them into a folder"
        )
    return said


def _other_splits(root: Path) -> list[str]:
    """The folders beside train/ and val/ that are named as splits often are."""
    names = (
        name
        for name in sorted(os.listdir(root))
        if name not in ("train", "val") and folders.is_split_name(name)
    )
    return [name for name in names if os.path.isdir(root / name)]


def _image_files(folder: Path, classes: list[str] | None) -> ImageFiles:
    """All images of a folder, at any depth, labelled by its sub-folder that they are in.

    Without labels where they lie in no sub-folder, some lie beside the sub-folders, or all in the
    same one: that tells nothing apart. classes: those that the labels count, if not the
    sub-folders.
    """
    found = folders.find_images(str(folder))
    paths, labels = found.paths(), found.labels()
    if not paths:
        raise BadInput(
            f"no images in {folder}: expected files ending in"
            f" {', '.join(e[1:] for e in folders.ENDINGS)}, in a folder a class or directly; check"
            f" the path{folders.skipped_words(found.skipped)}"
        )
    names = classes or found.classes
    if extra := sorted({found.classes[label] for label in labels if label >= 0} - set(names)):
        raise BadInput(
            f"{folder} has a class that train lacks: {extra[0]!r}; expected a subset of the"
            f" {len(names)} classes of train; move it away"
        )
    layout = folders.layout_of(found, classes)
    if layout.unlabelled:
        return ImageFiles(paths, None, None, str(folder), layout)
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number[found.classes[label]] for label in labels])
    return ImageFiles(paths, labels, names, str(folder), layout)
