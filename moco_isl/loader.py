"""Two crops of one image, blurred like SimCLR's, together with the image's position in the data set."""

import random
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageFilter
from torch.utils.data import Dataset


class TwoCropsTransform:
    """Take two random crops of one image as the query and key."""

    def __init__(self, base_transform: Callable):
        self.base_transform = base_transform

    def __call__(self, x) -> list:
        return [self.base_transform(x), self.base_transform(x)]


class GaussianBlur:
    """Gaussian blur of a PIL image with a radius drawn uniformly from sigma, in pixels (SimCLR, arXiv 2002.05709)."""

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0)):
        self.sigma = sigma

    def __call__(self, x: Image.Image) -> Image.Image:
        return x.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


class WithIndex(Dataset):
    """A data set that answers (views, index) where the given one answers (views, label).

    `WithIndex(ImageFolder(DIR, TwoCropsTransform(...)))` under a plain DataLoader gives batches ((im_q, im_k), index)
    with index int64 [N], the position in the data set that ISL's bank and positives speak of. With `transform`, the
    given data set answers bare images and transform makes the views. The draws are those of the worker's own
    generators, as in any DataLoader; `data.train_loader` makes them a function of (seed, epoch, index, view).
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Any], Any] | None = None):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        sample = self.dataset[index]
        views = sample[0] if isinstance(sample, (tuple, list)) else sample
        return (views if self.transform is None else self.transform(views)), index
