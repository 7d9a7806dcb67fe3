"""Two crops of one image, blurred like SimCLR's, with the image's place in the data set."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import Dataset

from moco_isl.errors import BadInput

WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class TwoCropsTransform:
    """Take two random crops of one image as the query and key."""

    def __init__(self, base_transform: Callable):
        self.base_transform = base_transform

    def __call__(self, x) -> list:
        return [self.base_transform(x), self.base_transform(x)]


class GaussianBlur:
    """Gaussian blur of a PIL image: SimCLR, https://arxiv.org/abs/2002.05709.

    The radius is drawn uniformly from sigma, in pixels.
    """

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0)):
        self.sigma = sigma

    def __call__(self, x: Image.Image) -> Image.Image:
        return x.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


class WithIndex(Dataset):
    """A data set that answers (views, index) where the given one answers (views, label).

    `WithIndex(ImageFolder(DIR, TwoCropsTransform(...)))` under a plain DataLoader gives batches
    ((im_q, im_k), index) with index int64 [N], the position in the data set that ISL's bank and
    positives speak of. With `transform`, the given data set answers bare images and transform makes
    the views. The draws are those of the worker's own generators, as in any DataLoader;
    `data.train_loader` makes them a function of (seed, epoch, index, view).
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Any], Any] | None = None):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        sample = self.dataset[index]
        views = sample[0] if isinstance(sample, (tuple, list)) else sample
        if self.transform is not None:
            views = self.transform(views)
        return views, index


def check_index(index: torch.Tensor, n: int, M: int, values: bool = True) -> None:
    """Raise BadInput unless index says of n images which of M each of them is.

    It has to be a tensor of whole numbers of shape [n], and with `values` each of them lies in 0 ..
    M - 1. Reading the values of a tensor that is not on the CPU waits for its device.
    """
    place = "each image's place in the data set"
    kind = index.dtype if isinstance(index, torch.Tensor) else type(index).__name__
    if kind not in WHOLE_NUMBERS:
        raise BadInput(
            f"the index of a batch is of type {kind}: expected an int64 tensor, {place}; WithIndex"
            " gives it"
        )
    if index.shape != (n,):
        raise BadInput(
            f"the index of {n} images has shape {list(index.shape)}: expected [{n}], {place}"
        )
    if not values or not n:
        return
    places = index.cpu().numpy()
    low, high = places.min(), places.max()
    if low < 0 or high >= M:
        raise BadInput(
            f"index {low if low < 0 else high} is none of {M} images: expected 0 to {M - 1}, places"
            " in the data set that num_images counts; of a part of one they are those in the part,"
            " WithIndex(Subset(...)) and not Subset(WithIndex(...))"
        )


def check_once(index: torch.Tensor) -> None:
    """Raise BadInput where an image comes twice in a step: index [n], of all ranks."""
    images, counts = np.unique(index.cpu().numpy(), return_counts=True)
    if len(images) < len(index):
        worst = counts.argmax()
        raise BadInput(
            f"image {images[worst]} comes {counts[worst]} times in one step: expected each at most"
            " once, and once an epoch, so that none of its keys is among its negatives; give its"
            " place in the data set as index, not its label, and draw images without replacement"
        )
