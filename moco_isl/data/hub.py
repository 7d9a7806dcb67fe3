"""Images in a Hugging Face data set on disk: parquet or arrow files, or a folder of save_to_disk.

Read by the library `datasets`, row by row: nothing is decoded before it is asked for.
Letters: M images.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from moco_isl import files
from moco_isl.data import labels
from moco_isl.data.datasets import ImageFiles
from moco_isl.errors import BadInput, first_line, missing_package
from moco_isl.files import open_regular, short

ENDINGS = (".parquet", ".arrow")
SAVED = ("dataset_dict.json", "state.json")  # one of them is in a folder of save_to_disk
SPLITS = {"train": ("train",), "val": ("validation", "valid", "val", "test")}
_IMAGES = ("image", "img", "picture", "photo", "jpg", "png", "bytes")  # columns of plain bytes
_LABELS = ("label", "labels", "class", "cls", "target", "category", "fine_label")


class TableImages(ImageFiles):
    """The images in the rows of a table. name: what the rows are called, as in name[3]."""

    def __init__(self, table, column: str, name: str, stat: tuple[int, int], *of_files):
        """of_files: labels, classes, folder and layout, as ImageFiles has them."""
        super().__init__([f"{name}[{i}]" for i in range(len(table))], *of_files)
        self._table = table
        self._column = column
        self._stat = stat

    def open(self, i: int) -> BinaryIO:
        image = self._table[int(i)][self._column]
        content = image.get("bytes") if isinstance(image, dict) else image
        if content is not None:
            return io.BytesIO(content)
        if isinstance(image, dict) and image.get("path"):
            return open_regular(image["path"])
        raise OSError(f"{self.path(i)} holds no image")

    def stat(self, i: int) -> tuple[int, int]:
        return self._stat


def library():
    """The library `datasets`. Raises BadInput where it is not installed."""
    try:
        import datasets
    except ImportError:
        who = "a Hugging Face data set (.parquet, .arrow, save_to_disk)"
        raise missing_package(who, "datasets", "'moco_isl[hf]'") from None
    return datasets


def saved_splits(folder: str) -> dict[str, str]:
    """The folder of train, and of val if it is there, in a folder of save_to_disk."""
    if not os.path.exists(os.path.join(folder, SAVED[0])):
        return {"train": folder}
    inner = [name for name in sorted(os.listdir(folder)) if is_saved(os.path.join(folder, name))]
    found = {}
    for split, names in SPLITS.items():
        chosen = [name for name in names if name in inner]
        if chosen:
            found[split] = os.path.join(folder, chosen[0])
    if "train" not in found and len(inner) == 1:
        found = {"train": os.path.join(folder, inner[0])}
    if "train" not in found:
        has = f"the splits {', '.join(inner)}" if inner else "no split"
        raise BadInput(
            f"'{files.shown(folder)}' has {has}: expected train, and validation or test; give the"
            " folder of one of them"
        )
    return found


def is_saved(folder: str) -> bool:
    """Whether a folder is one of save_to_disk."""
    return any(os.path.exists(os.path.join(folder, name)) for name in SAVED)


def open_tables(
    paths: Sequence[str], folder: str, split: str, classes: list[str] | None = None
) -> TableImages:
    """The images of parquet or arrow files, or of one folder of save_to_disk, as one table.

    folder: how the source is named. classes: as `lists.open_list`. Raises BadInput.
    """
    datasets = library()
    try:
        with _silent(datasets):
            table = _read(datasets, paths)
    except Exception as error:  # of a damaged file, datasets and pyarrow raise almost anything
        cause = error.__cause__ or error
        raise BadInput(
            f"'{files.shown(folder)}' cannot be read as a Hugging Face data set:"
            f" {short(first_line(cause), 150)}; expected parquet or arrow files, or a folder of"
            " save_to_disk; write it anew"
        ) from error
    sources = [p for path in paths for p in _files_of(path)]
    stats = [os.stat(path) for path in sources]
    stat = sum(x.st_size for x in stats), sum(x.st_mtime_ns for x in stats) % 2**62
    name = os.path.join(folder if os.path.isdir(folder) else os.path.dirname(folder), split)
    return of_table(table, name, stat, folder, classes)


@contextlib.contextmanager
def _silent(datasets) -> Iterator[None]:
    """No progress bars, and no lines about an error that is raised too."""
    log = datasets.utils.logging
    shown = log.is_progress_bar_enabled()
    level = log.get_verbosity()
    datasets.disable_progress_bars()
    log.set_verbosity(log.CRITICAL)
    try:
        yield
    finally:
        log.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _files_of(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    return [os.path.join(path, name) for name in sorted(os.listdir(path))]


def _read(datasets, paths: Sequence[str]):
    if os.path.isdir(paths[0]):
        return datasets.load_from_disk(paths[0])
    if paths[0].lower().endswith(".arrow"):
        return datasets.concatenate_datasets([datasets.Dataset.from_file(path) for path in paths])
    # kept once more as arrow files, under HF_HOME: rows of parquet cannot be read one by one
    return datasets.load_dataset("parquet", data_files={"train": list(paths)}, split="train")


def of_table(
    table, name: str, stat: tuple[int, int], folder: str, classes: list[str] | None
) -> TableImages:
    """The images of a `datasets.Dataset`. Raises BadInput."""
    of = f"'{files.shown(folder)}'"
    column = _image_column(table.features)
    if column is None:
        raise BadInput(
            f"{of} has no column of images, but {short(', '.join(table.column_names), 150)}:"
            " expected one of the type datasets.Image, or bytes named image"
        )
    if not len(table):
        raise BadInput(f"{of} has no rows: expected an image in each")
    found = labels.number(_labels(table), of, classes)
    datasets = library()
    images = table.with_format(None).select_columns([column])
    if isinstance(table.features[column], datasets.Image):
        images = images.cast_column(column, datasets.Image(decode=False))
    numbers, names, layout = found
    return TableImages(images, column, name, stat, numbers, names, folder, layout)


def _image_column(features) -> str | None:
    """The first column of images; one of files' bytes where there is none."""
    datasets = library()
    kinds = features.items()
    found = [name for name, kind in kinds if isinstance(kind, datasets.Image)]
    found += [name for name, kind in kinds if isinstance(kind, dict) and "bytes" in kind]
    binary = [name for name, kind in kinds if getattr(kind, "dtype", "") in _BYTES]
    found += [name for name in _IMAGES if name in binary]
    return found[0] if found else None


_BYTES = ("binary", "large_binary")


def _labels(table) -> list[str | None]:
    """The labels of all rows: of the first ClassLabel, or else of a column of a usual name."""
    features = table.features
    datasets = library()
    named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    named += [name for name in _LABELS if isinstance(features.get(name), datasets.Value)]
    if not named:
        return [None] * len(table)
    values = table.with_format(None).select_columns(named[:1])[:][named[0]]
    kind = features[named[0]]
    if isinstance(kind, datasets.ClassLabel):  # -1 stands for none
        return [None if x is None or x < 0 else kind.names[x] for x in values]
    return [None if x is None or x == "" else str(x) for x in values]
