"""What the numbers of an image are: channels, bits, and the mean and std they are normalised by.

Letters: c channels, H x W pixels.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.data import Dataset

from moco_isl.data.datasets import ImagesInMemory, is_rgb, read_pixels
from moco_isl.data.sets import SETS, DataSet, find_set
from moco_isl.errors import BadInput

LOOK = 1000  # images that mean and std are measured on


@dataclass(frozen=True)
class Pixels:
    """The flags of these names. None: not said.

    mean, std: one number a channel, of values in [0, 1].
    """

    channels: int | None
    bits: int | None
    mean: list[float] | None
    std: list[float] | None

    @property
    def is_rgb(self) -> bool:
        """Whether they are RGB of 8 bits, as MoCo's."""
        return is_rgb(self.channels, self.bits)

    def are_known(self, dataset: str) -> bool:
        """Whether mean and std are said here or in the row of a data set, or have to be measured.

        Those of `folder` are ImageNet's: of photos, of 8 bits.
        """
        row = find_set(dataset)
        of_photos = row.mean == SETS["folder"].mean and self.bits != 8
        return self.mean is not None or (len(row.mean) == self.channels and not of_photos)

    def numbers(self, row: DataSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std), those of the row where none are said here."""
        mean, std = (row.mean, row.std) if self.mean is None else (self.mean, self.std)
        if len(mean) != self.channels:
            raise ValueError(f"mean {mean} is not of {self.channels} channels: measure it first")
        return tuple(mean), tuple(std)


RGB = Pixels(3, 8, None, None)


def measure(dataset: Dataset, threads: int = 4) -> tuple[list[float], list[float], str]:
    """(mean, std, a line about them) of each channel, over all pixels of up to LOOK images.

    The images are spread evenly over the data set; unreadable ones are left out. The numbers are
    rounded to 6 digits. Raises BadInput where no image can be read.
    """
    M = len(dataset)
    rows = torch.linspace(0, M - 1, min(LOOK, M)).long().tolist()
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        found = [x for x in pool.map(partial(_sums, dataset), rows) if x is not None]
    if not found:
        raise BadInput(
            f"none of {len(rows)} images could be read, {dataset.path(0)} for one: expected image"
            " files; check the folder"
        )
    pixels, total, squares = (sum(x) for x in zip(*found))
    mean = total / pixels  # float64 [c]
    std = (squares / pixels - mean**2).clamp(min=0).sqrt()
    flat = std < 1e-6
    mean, std = ([float(f"{x:.6g}") for x in t.tolist()] for t in (mean, std.where(~flat, 1.0)))
    words = (" ".join(f"{x:g}" for x in numbers) for numbers in (mean, std))
    line = f"mean {next(words)} and std {next(words)}: measured on {len(found):,} images"
    if flat.any():
        which = " ".join(str(i + 1) for i in flat.nonzero()[:, 0].tolist())
        line += f"; channel {which} has one value everywhere, and its std counts as 1"
    return mean, std, line


def settled(
    found: Pixels, name: str, images: Dataset, say: Callable[[str], None] | None = None
) -> Pixels:
    """The same with mean and std: measured on the images where nobody has said them.

    name: of the data set. say: prints the line about what was measured. Raises BadInput.
    """
    if found.are_known(name):
        return found
    mean, std, line = measure(images)
    if say is not None:
        say(f"=> {line}")
    return replace(found, mean=mean, std=std)


def _sums(dataset: Dataset, i: int) -> tuple[int, torch.Tensor, torch.Tensor] | None:
    """(number of pixels, sum and sum of squares of each channel) of image i; None: unreadable."""
    if isinstance(dataset, ImagesInMemory):
        image = None if i in dataset.unreadable else dataset.images[i]
    else:
        image = read_pixels(dataset, i)
    if image is None:
        return None
    values = image.double().flatten(1)  # [c, H W]
    if not image.is_floating_point():
        values /= 255
    return values.shape[1], values.sum(1), (values * values).sum(1)
