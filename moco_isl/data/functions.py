"""Images of a function of your own, which returns a torch Dataset: --dataset my.module:function.

    def images(split):                      # split: train or val; None where there is no such split
        return torchvision.datasets.Flowers102("data", split=split)

An item is an image; (image, label, ...); or a dict with an image, and a label under one of LABELS.
An image is of PIL, or a tensor: uint8, or floats from 0 to 1, [C, H, W]. With --channels n, C is n.
Letters: M images.
"""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from moco_isl.data import bands, datasets, hub, labels
from moco_isl.errors import BadInput, first_line
from moco_isl.files import short

PARTS = ("__len__", "labels", "classes", "path", "image", "size_hint")  # of all that we read
LABELS = ("label", "labels", "cls", "class", "target")
_EXPECTED = (
    "expected an image of PIL or a tensor [C, H, W] of uint8 or of floats from 0 to 1; (image,"
    " label); or a dict with an image"
)


def _pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as uint8 [3, h, w]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class OwnImages(Dataset):
    """The images of a data set of somebody else's, read by its own code."""

    size_hint = None
    channels = 3
    bits = 8

    def __init__(self, inner, name: str, split: str, found: labels.Labels):
        self._inner = inner
        self._of = f"{name}/{split}"
        self.labels, self.classes, self.layout = found

    def __len__(self) -> int:
        return len(self._inner)

    def path(self, i: int) -> str:
        return f"{self._of}[{i}]"

    def image(self, i: int, at_least: int | None = None) -> Image.Image | torch.Tensor:
        image = image_in(self._inner[int(i)])
        if datasets.is_rgb(self.channels, self.bits):
            return to_rgb(image)
        return bands.to_channels(image, self.channels)

    def pixels(
        self, i: int, at_least: Callable[[int, int], int]
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        image = self.image(i)
        pixels = _pixels(image) if isinstance(image, Image.Image) else image
        H, W = pixels.shape[1:]
        at_least(W, H)  # it notes the size that it is told
        return pixels, (H, W)

    def __getitem__(self, i: int) -> tuple[Image.Image | torch.Tensor, int]:
        return self.image(i), (-1 if self.labels is None else int(self.labels[i]))


def takes_root(function: Callable, name: str) -> bool:
    """Whether a function takes DIR too, as `root`. Raises BadInput for parameters it cannot get."""
    try:
        named = inspect.signature(function).parameters
    except ValueError as error:  # of some functions written in C
        raise BadInput(f"--dataset {name}: {error}; expected a function of Python") from error
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in named.values():
        known = parameter.name in ("split", "root") and parameter.kind in plain
        variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not known and not variable and parameter.default is parameter.empty:
            raise BadInput(
                f"--dataset {name} needs '{parameter.name}': expected a function of split (train or"
                " val), and of root where it reads DIR"
            )
    return "root" in named


def open_function(
    function: Callable, name: str, root: Path | None, split: str, known: list[str] | None = None
) -> Dataset | None:
    """What a function returns for a split, None where it has none. Raises BadInput.

    known: the classes of train.
    """
    inner = _call(function, name, root, split)
    if inner is None:
        return None
    return _adapted(inner, f"--dataset {name} returns", name, split, known)


def own_images(dataset: Dataset, name: str = "images") -> Dataset:
    """A data set that a caller from Python gives, as ours are read. Raises BadInput.

    It is one of ours, and comes back as it is, or any that a function for --dataset may return.
    Where that has no .targets, all items are read for their labels. name: for messages.
    """
    if all(hasattr(dataset, part) for part in PARTS):
        return dataset
    found = _adapted(dataset, "the data set is", name, "train", None)
    for line in found.layout.warnings:
        warnings.warn(line, stacklevel=4)
    return found


def _adapted(inner, begins: str, name: str, split: str, known: list[str] | None) -> Dataset:
    """Somebody else's data set as ours are read. Raises BadInput; begins: its first words."""
    if isinstance(inner, IterableDataset):
        raise BadInput(
            f"{begins} an IterableDataset, a {type(inner).__name__}: a stream has no positions,"
            " which mining and exact resume need; expected a Dataset with len() and [i]"
        )
    if not (hasattr(inner, "__len__") and hasattr(inner, "__getitem__")):
        raise BadInput(
            f"{begins} a {type(inner).__name__}: expected a torch Dataset with len() and [i]"
        )
    of = begins.rsplit(" ", 1)[0]
    if not len(inner):
        raise BadInput(f"{of}: no images for {split}; expected one at least")
    if type(inner).__module__.startswith("datasets."):
        return hub.of_table(inner, f"{name}/{split}", datasets.GONE, name, known)
    try:
        first = inner[0]
        _refuse_views(first, of)
        _values(first)
    except BadInput:
        raise
    except Exception as error:
        reason = short(first_line(error), 150)
        raise BadInput(f"{of}: item 0 is no image: {reason}; {_EXPECTED}") from error
    texts, opened = _labels(inner, first, of)
    found = labels.number(texts, of, known)
    layout = found[2]
    if opened:
        layout.warnings.append(
            f"all {len(inner)} items were read for their labels: give the data set .targets"
        )
    once, again = (_values(item) for item in (first, inner[0]))
    if not np.array_equal(once, again):
        layout.warnings.append(
            "item 0 differs from one read to the next: views are then no function of the seed, and"
            " a resumed run differs; give the images without augmentation"
        )
    return OwnImages(inner, name, split, found)


def _refuse_views(item, of: str) -> None:
    """Raise BadInput for an item that holds several views of its image."""
    views = item[0] if isinstance(item, tuple | list) and len(item) else item
    if isinstance(views, tuple | list) and len(views) > 1:
        raise BadInput(
            f"{of}: item 0 holds {len(views)} views of its image, as TwoCropsTransform makes them:"
            " expected the image alone; give the images without augmentation"
        )


def has_split(function: Callable, name: str, root: Path | None, split: str) -> bool:
    """Whether a function returns a data set for a split. Raises BadInput."""
    return _call(function, name, root, split) is not None


def _call(function: Callable, name: str, root: Path | None, split: str):
    """The function's result; None for val of a function that takes no split."""
    named = inspect.signature(function).parameters
    if "split" not in named and split != "train":
        return None
    given = {"split": split, "root": root}
    try:
        return function(**{key: x for key, x in given.items() if key in named})
    except (Exception, SystemExit) as error:  # code of somebody else's may raise anything
        raise BadInput(
            f"--dataset {name} ends with {type(error).__name__}: {short(first_line(error), 150)};"
            f" expected a torch Dataset for the split {split}"
        ) from error


def _labels(inner, first, of: str) -> tuple[list[str | None], bool]:
    """(the label of each item, whether all items had to be read for it)."""
    M = len(inner)
    own = getattr(inner, "targets", getattr(inner, "labels", None))
    names = getattr(inner, "classes", None)
    if label_in(first) is None and own is None:
        return [None] * M, False
    opened = own is None or len(own) != M
    try:
        values = [label_in(inner[i]) for i in range(M)] if opened else list(map(_label, own))
    except Exception as error:
        raise BadInput(
            f"{of}: an item cannot be read for its label ({short(first_line(error))}): repair it,"
            " or give the data set .targets"
        ) from error
    named = isinstance(names, list | tuple) and all(isinstance(x, str) for x in names)
    if named and all(x is None or isinstance(x, int) and 0 <= x < len(names) for x in values):
        return [None if x is None else names[x] for x in values], opened
    return [None if x is None else str(x) for x in values], opened


def _label(value) -> int | str | None:
    """A label as a whole number or a text; None for anything else, and for -1."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of torch or numpy
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | str) or value in (-1, ""):
        return None
    return value


def label_in(item) -> int | str | None:
    """The label of an item, None for none."""
    if isinstance(item, dict):
        return next((_label(item[name]) for name in LABELS if name in item), None)
    several = isinstance(item, tuple | list) and len(item) > 1
    return _label(item[1]) if several else None


def image_in(item) -> Image.Image | torch.Tensor:
    """The image of an item. Raises ValueError."""
    parts = [item]
    if isinstance(item, dict):
        parts = item.values()
    elif isinstance(item, tuple | list):
        parts = item[:1]
    for part in parts:
        if isinstance(part, Image.Image) or isinstance(part, torch.Tensor) and part.dim() == 3:
            return part
    raise ValueError(f"it is a {type(item).__name__} without one")


def _values(item) -> np.ndarray:
    """The values of the image of an item. Raises ValueError where it is none."""
    image = image_in(item)
    if isinstance(image, torch.Tensor):
        bands.require_range(image)
        return image.cpu().numpy()
    return np.asarray(image)


def to_rgb(image: Image.Image | torch.Tensor) -> Image.Image:
    """An image of PIL or a tensor as 8-bit RGB. Raises ValueError for values out of range."""
    if isinstance(image, Image.Image):
        return datasets._to_rgb(image, None, warnings.warn)
    bands.require_range(image)
    if image.dtype != torch.uint8:
        image = image.mul(255).round().to(torch.uint8)
    pixels = bands.fit(image, 3).permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.cpu().numpy())
