"""The images to embed: data sets one after the other, their names, labels and classes.

M: images of all of them.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from moco_isl import data
from moco_isl.data.datasets import ImagesInMemory
from moco_isl.errors import BadInput
from moco_isl.files import shown

SPLITS = ("all", "train", "val")


class Images:
    """Data sets by name, such as train and val, one after the other; position i is of all images.

    root: the folder that names are given without, if they lie in it.
    """

    def __init__(self, splits: dict[str, Dataset], root: str | os.PathLike | None = None):
        self.splits = splits
        self.root = os.path.join(root, "") if root is not None else ""

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))

    def parts(self) -> list[tuple[int, Dataset]]:
        """(the position of its first image, the data set) of each split."""
        found = []
        start = 0
        for dataset in self.splits.values():
            found.append((start, dataset))
            start += len(dataset)
        return found

    def find(self, i: int) -> tuple[Dataset, int]:
        """The data set of image i, and its position in it."""
        start, dataset = [part for part in self.parts() if part[0] <= i][-1]
        return dataset, i - start

    def names(self) -> list[str]:
        """The images' names in order, without the root; what cannot be printed is escaped."""
        names = []
        for dataset in self.splits.values():
            name_of = getattr(dataset, "name", dataset.path)
            names += [shown(name_of(i).removeprefix(self.root)) for i in range(len(dataset))]
        return names

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes; those of the first split that has labels."""
        return next((d.classes for d in self.splits.values() if d.labels is not None), None)

    def labels(self) -> torch.Tensor | None:
        """int64 [M], -1 for none; None where no image has one."""
        if all(dataset.labels is None for dataset in self.splits.values()):
            return None
        labels = [
            torch.full((len(dataset),), -1) if dataset.labels is None else dataset.labels
            for dataset in self.splits.values()
        ]
        return torch.cat(labels)


def open_images(
    name: str, root: str | os.PathLike | None, split: str, download: bool = False
) -> Images:
    """The images of a data set of the table (see `data.build_dataset`). Raises BadInput.

    split: train, val, or all of both; a folder without train/ and val/ is one split, its images.
    """
    open_split = lambda which: data.build_dataset(name, root, which, download)
    if split != "all":
        return Images({split: open_split(split)}, root)
    if name == "folder":
        there = [which for which in ("train", "val") if root and Path(root, which).is_dir()]
        return Images({which: open_split(which) for which in there or ["train"]}, root)
    splits = {"train": open_split("train")}
    try:
        splits["val"] = open_split("val")
    except BadInput:  # not every data set of a user's own has one
        pass
    return Images(splits, root)


def images_of(given, split: str = "all", dataset: str = "folder") -> Images:
    """The images that a caller from Python gives. Raises BadInput.

    given: a folder; a list of paths and PIL images; a uint8 tensor [M, 3, H, W]; a data set as
    `data.datasets` has them, or any with len() and items that are images or begin with one; or
    None, for a data set that is embedded.
    """
    if given is None or isinstance(given, str | os.PathLike):
        given = None if given is None else os.fspath(given)
        data.check_options(data.DataOptions(data=given, dataset=dataset))
        return open_images(dataset, given, split)
    if isinstance(given, torch.Tensor):
        if given.is_floating_point():
            raise BadInput(
                "the images are a tensor of floats: expected uint8 [M, 3, H, W]; a batch that"
                " .transform has made goes into the backbone itself, backbone(images)"
            )
        return Images({"images": ImagesInMemory(given, None, None, "images")})
    if all(hasattr(given, part) for part in ("__len__", "labels", "path", "image")):
        return Images({"images": given})
    if not hasattr(given, "__getitem__") or not hasattr(given, "__len__"):
        raise BadInput(
            f"the images are a {type(given).__name__}: expected a folder, a list of paths or PIL"
            " images, a uint8 tensor [M, 3, H, W], or a data set with len() and items"
        )
    return Images({"images": Listed(given)})


class Listed(Dataset):
    """Images of a list or of a data set of anybody's, in its order.

    An item is a path, a PIL image, a uint8 tensor [3, H, W], or a tuple that begins with one of
    these. Labels are not looked at: that would read every image. Raises BadInput where there is no
    image.
    """

    labels = None
    classes = None
    size_hint = None

    def __init__(self, items: Sequence):
        if not len(items):
            raise BadInput("the list of images is empty: expected at least one")
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def path(self, i: int) -> str:
        if not isinstance(self.items, list | tuple):
            return f"images[{i}]"
        item = self.items[i]
        name = item if isinstance(item, str | os.PathLike) else getattr(item, "filename", "")
        return os.fsdecode(name) if name else f"images[{i}]"

    def image(self, i: int, at_least: int | None = None) -> Image.Image | torch.Tensor:
        item = self.items[i]
        if isinstance(item, tuple | list):
            item = item[0]
        if isinstance(item, str | os.PathLike):
            return data.decode(os.fspath(item), at_least)
        return item if isinstance(item, torch.Tensor) else item.convert("RGB")

    def __getitem__(self, i: int) -> tuple:
        return self.image(i), -1
