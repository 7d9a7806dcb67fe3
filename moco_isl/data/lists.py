"""Images that a list file names: a text file with a path a line, or a .csv with a column of paths.

Paths are relative to the folder of the list, or absolute. Letters: M images.
"""

import csv
import os
from collections import Counter

from moco_isl import files
from moco_isl.data import folders, labels
from moco_isl.data.datasets import ImageFiles
from moco_isl.errors import BadInput
from moco_isl.files import short

ENDINGS = (".txt", ".csv")
PATHS = ("path", "file", "filepath", "file_path", "filename", "file_name", "image", "image_path")
LABELS = ("label", "class", "target", "category", "label_name", "class_name")
_LARGEST = 8 << 30  # bytes: of 100 million paths


def open_list(path: str, classes: list[str] | None = None) -> ImageFiles:
    """The images that a list names, in its order.

    classes: those to number the labels by, if not those of the list. Raises BadInput.
    """
    given, texts = _read(path)
    folder = os.path.dirname(path)
    found = [os.path.normpath(os.path.join(folder, name)) for name in given]
    kept = [i for i, name in enumerate(found) if name.lower().endswith(folders.ENDINGS)]
    skipped = Counter(_ending(name) for name in found if not name.lower().endswith(folders.ENDINGS))
    paths = [found[i] for i in kept]
    if not paths:
        why = folders.skipped_words(skipped)
        first, _, last = next(iter(found), "").rpartition(" ")
        if first.lower().endswith(folders.ENDINGS):
            why = f"; '{short(last)}' looks like a label: labels need a .csv with path,label"
        raise BadInput(
            f"'{files.shown(path)}' names no image: expected {_expected(path)}, ending in"
            f" {', '.join(e[1:] for e in folders.ENDINGS)}{why}"
        )
    _require_unique(path, paths)
    _require_there(path, paths)
    own = [texts[i] for i in kept]
    numbers, names, layout = labels.number(own, f"'{files.shown(path)}'", classes, skipped)
    return ImageFiles(paths, numbers, names, path, layout)


def _expected(path: str) -> str:
    if path.lower().endswith(".csv"):
        return "a header and a row an image, with a column 'path' and perhaps 'label'"
    return "a path a line, relative to the list's folder or absolute"


def _read(path: str) -> tuple[list[str], list[str | None]]:
    """(the names as they are in a list, their labels; None for none)."""
    text = files.read_text(path, "", f"a list of images: {_expected(path)}", most=_LARGEST)
    lines = text.removeprefix("\ufeff").splitlines()
    if not path.lower().endswith(".csv"):
        names = [line.strip() for line in lines]
        names = [name for name in names if name and not name.startswith("#")]
        return names, [None] * len(names)
    rows = csv.reader(lines)
    try:
        header = [name.strip() for name in next(rows, [])]
        column = _column(header, PATHS)
        if column is None:
            raise BadInput(
                f"'{files.shown(path)}' has no column of paths: its header is"
                f" '{short(','.join(header))}'; expected a column named {', '.join(PATHS[:-1])} or"
                f" {PATHS[-1]}"
            )
        label = _column(header, LABELS)
        cell = lambda row, at: "" if at is None or at >= len(row) else row[at].strip()
        table = [(cell(row, column), cell(row, label) or None) for row in rows if any(row)]
    except csv.Error as error:
        raise BadInput(f"'{files.shown(path)}' is no .csv file: {error}") from error
    if empty := sum(not name for name, _ in table):
        raise BadInput(
            f"'{files.shown(path)}' has {folders.many(empty, 'row')} without a path: expected one"
            " in each; remove them"
        )
    return [name for name, _ in table], [text for _, text in table]


def _column(header: list[str], names: tuple[str, ...]) -> int | None:
    """The position of the first of these names that a header has."""
    lower = [name.lower() for name in header]
    return next((lower.index(name) for name in names if name in lower), None)


def _ending(name: str) -> str:
    ending = os.path.splitext(name)[1].lower()
    return ending if ending.isprintable() and 0 < len(ending) <= 10 else "without an image's ending"


def _require_unique(path: str, paths: list[str]) -> None:
    if len(set(paths)) < len(paths):
        twice = [name for name, n in Counter(paths).items() if n > 1]
        raise BadInput(
            f"'{files.shown(path)}' names {folders.many(len(twice), 'image')} more than once,"
            f" '{short(twice[0])}' for one: expected each once; remove the others"
        )


def _require_there(path: str, paths: list[str]) -> None:
    """Raise BadInput where files are missing. Their folders are read, not each file's entry."""
    inside: dict[str, set[str]] = {}
    missing = []
    for name in paths:
        folder, base = os.path.split(name)
        if folder not in inside:
            try:
                inside[folder] = set(os.listdir(folder or "."))
            except OSError:
                inside[folder] = set()
        if base not in inside[folder]:
            missing.append(name)
    if not missing:
        return
    raise BadInput(
        f"'{files.shown(path)}' names {len(missing)} of {len(paths)} images that are not there,"
        f" '{files.shown(missing[0])}' for one: expected {_expected(path)}"
    )
