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
from moco_isl.data import bands, folders, functions
from moco_isl.data.datasets import ImageFiles, ImagesInMemory, name_of, stat_of, with_channels
from moco_isl.errors import BadInput
from moco_isl.files import shown
from moco_isl.options import listed, one_or_more

SPLITS = ("all", "train", "val")


class Images:
    """Data sets by name, such as train and val, one after the other; position i is of all images.

    dirs: what was named. Names are given without it where it is one folder, or a file in one.
    """

    def __init__(self, splits: dict[str, Dataset], dirs: Sequence[str] = ()):
        self.splits = splits
        self.dirs = dirs

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

    def stat(self, i: int) -> tuple[int, int]:
        """(size, time of change) of the file of image i; `datasets.GONE` where it has none."""
        return stat_of(*self.find(i))

    def names(self) -> list[str]:
        """The images' names in order, without the root; what cannot be printed is escaped."""
        root = ""
        if len(self.dirs) == 1:
            given = self.dirs[0]
            root = os.path.join(os.path.dirname(given) if os.path.isfile(given) else given, "")
        return [
            shown(name_of(dataset, i).removeprefix(root))
            for dataset in self.splits.values()
            for i in range(len(dataset))
        ]

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
    name: str,
    root: str | Sequence[str] | None,
    split: str,
    pixels: data.Pixels = data.RGB,
    download: bool = False,
) -> Images:
    """The images of a data set of the table (see `data.build_dataset`). Raises BadInput.

    pixels: their channels and bits. split: train, val, or all of both; a folder without train/ and
    val/ is one split, its images.
    """
    dirs = listed(root)
    splits = [split]
    if split == "all":
        splits = ["train", "val"] if data.has_val(name, root) else ["train"]
        alone = name == "folder" and len(dirs) == 1 and not Path(dirs[0], "train").is_dir()
        if alone and Path(dirs[0], "val").is_dir():
            splits = ["val"]
    of = pixels.channels, pixels.bits
    opened = {which: data.build_dataset(name, root, which, download, *of) for which in splits}
    return Images(opened, dirs)


def images_of(
    given, split: str = "all", dataset: str = "folder", pixels: data.Pixels = data.RGB
) -> Images:
    """The images that a caller from Python gives. Raises BadInput.

    given: a folder, or what else DIR may be, or a list of such; a list of images' paths, PIL images
    and tensors [c, H, W]; a tensor [M, c, H, W]; a data set as `data.datasets` has them, or any
    that `data.functions` takes; or None, for a data set that is embedded. pixels: as in
    `open_images`.
    """
    several = isinstance(given, list | tuple)
    paths = listed(given) if _are_paths(given) else []
    if given is None or (paths and not (several and all(map(_is_image, paths)))):
        root = one_or_more(paths)
        data.check_options(data.DataOptions(data=root, dataset=dataset))
        return open_images(dataset, root, split, pixels)
    found = _as_dataset(given, paths, pixels)
    return Images({"images": with_channels(found, pixels.channels, pixels.bits)})


def _as_dataset(given, paths: list[str], pixels: data.Pixels) -> Dataset:
    """What is given as a data set; paths: where it is a list of images' paths. Raises BadInput."""
    if paths:
        return ImageFiles(paths, None, None)
    if isinstance(given, torch.Tensor):
        if given.is_floating_point() and (
            pixels.is_rgb or not 0 <= given.min() <= given.max() <= 1
        ):
            raise BadInput(
                f"the images are a tensor of floats: expected uint8 [M, {pixels.channels}, H, W]; a"
                " batch that .transform has made goes into the backbone itself, backbone(images)"
            )
        return ImagesInMemory(given, None, None, "images")
    if isinstance(given, list | tuple) and not (given and isinstance(given[0], tuple | dict)):
        return Listed(given)
    if all(hasattr(given, part) for part in ("__len__", "labels", "path", "image")):
        return given
    if not hasattr(given, "__getitem__"):
        raise BadInput(
            f"the images are a {type(given).__name__}: expected a folder, a list of paths or PIL"
            f" images, a uint8 tensor [M, {pixels.channels}, H, W], or a data set with len() and"
            " items"
        )
    return functions.own_images(given)


def _are_paths(given) -> bool:
    several = given if isinstance(given, list | tuple) else [given]
    return bool(several) and all(isinstance(one, str | os.PathLike) for one in several)


def _is_image(path: str) -> bool:
    """Whether a path is one image, not a folder, a list of images or an archive of them."""
    return not os.path.isdir(path) and path.lower().endswith(folders.ENDINGS)


class Listed(Dataset):
    """Images of a list, in its order: PIL images and tensors [c, H, W], uint8 or floats in [0, 1].

    Raises BadInput where there is none.
    """

    labels = None
    classes = None
    size_hint = None
    channels = 3
    bits = 8

    def __init__(self, items: Sequence):
        if not len(items):
            raise BadInput("the list of images is empty: expected at least one")
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def path(self, i: int) -> str:
        name = getattr(self.items[i], "filename", "")
        return os.fsdecode(name) if name else f"images[{i}]"

    def image(self, i: int, at_least: int | None = None) -> Image.Image | torch.Tensor:
        image = functions.image_in(self.items[i])
        if (self.channels, self.bits) == (3, 8):
            return functions.to_rgb(image)
        return bands.to_channels(image, self.channels)

    def __getitem__(self, i: int) -> tuple[Image.Image | torch.Tensor, int]:
        return self.image(i), -1
