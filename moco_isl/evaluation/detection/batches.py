"""Images and their objects for a detector: in the order of the training, flipped and resized.

Every draw is a function of (seed, epoch, index), so that batches do not depend on the number of
workers, and a start in the middle loads nothing of what it skips. B: batch over all ranks, n:
objects of an image, M: images.
"""

import multiprocessing.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from moco_isl import dist
from moco_isl.data import workers as reading
from moco_isl.data.draws import hash64, permutation, uniform
from moco_isl.errors import RunFailed
from moco_isl.evaluation.detection.boxes import Boxed, BoxedImages


@dataclass
class Sample:
    """An image as the network takes it: uint8 [3, h, w]; None where its file cannot be read.

    boxes float32 [n, 4] of it, labels int64 [n] from 0 on. index: of the image. key: what the draws
    of its proposals begin with.
    """

    image: torch.Tensor | None
    boxes: torch.Tensor
    labels: torch.Tensor
    index: int
    key: int


def resized(image: Image.Image, shortest: int, longest: int) -> torch.Tensor:
    """uint8 [3, h, w]: the shorter side has `shortest` pixels, the longer one at most `longest`."""
    scale = min(shortest / min(image.size), longest / max(image.size))
    size = tuple(max(1, int(side * scale + 0.5)) for side in image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def scaled(boxes: torch.Tensor, size: tuple[int, int], to: tuple[int, int]) -> torch.Tensor:
    """Boxes [n, 4] of an image of this size (width, height), in one of another."""
    x, y = to[0] / size[0], to[1] / size[1]
    return boxes * boxes.new_tensor([x, y, x, y])


class _Items(Dataset):
    """Items are (epoch, index). sizes: of the shorter side, of which one is drawn."""

    def __init__(self, images: BoxedImages, sizes: list[int], longest: int, flip: bool, seed: int):
        self.images = images
        self.sizes = sizes
        self.longest = longest
        self.flip = flip
        self.seed = seed

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, i = item
        row: Boxed = self.images.rows[i]
        keep = ~row.crowd
        boxes, labels = torch.from_numpy(row.boxes[keep]), torch.from_numpy(row.labels[keep])
        draw = uniform(self.seed, epoch, i, 0)
        key = hash64(self.seed, epoch, i, 1)
        try:
            picture = self.images.open(i)
        except Exception as error:  # PIL answers a broken file with almost any exception
            if getattr(error, "errno", None) in reading.OF_THE_MACHINE:
                raise
            return Sample(None, boxes, labels, i, key)
        size = picture.size
        image = resized(picture, self.sizes[int(draw(0) * len(self.sizes))], self.longest)
        width = image.shape[2]
        # by the size that the file says: that of the image may be another one
        boxes = scaled(boxes, (row.width, row.height), (width, image.shape[1]))
        if size != (row.width, row.height):
            return Sample(None, boxes, labels, i, key)
        if self.flip and draw(1) < 0.5:
            image = image.flip(2)
            boxes = torch.stack(
                [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]]
            )
            boxes = boxes.T.contiguous()
        return Sample(image, boxes, labels, i, key)


class Stream:
    """This rank's share of batches `start` to `stop`: lists of (epoch, index).

    An epoch has every image once, in an order of its own; a batch may reach into the next one.
    """

    def __init__(self, M: int, B: int, seed: int, start: int, stop: int, first_epoch: int = 0):
        self.M = M
        self.B = B
        self.seed = seed
        self.steps = range(start, stop)
        self.first_epoch = first_epoch

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.B // dist.world_size()
        orders: dict[int, torch.Tensor] = {}
        for step in self.steps:
            first = step * self.B + dist.rank() * share
            items = []
            for place in range(first, first + share):
                epoch = self.first_epoch + place // self.M
                if epoch not in orders:
                    orders = {e: order for e, order in orders.items() if e == epoch - 1}
                    orders[epoch] = permutation(self.seed, epoch, self.M)
                items.append((epoch, int(orders[epoch][place % self.M])))
            yield items


class Batches:
    """Lists of Samples, read by worker processes, with the images on the device.

    Iterating raises RunFailed where an image cannot be read, or has another size than its
    annotation says.
    """

    def __init__(self, items: _Items, order, workers: int, device: torch.device):
        self.images = items.images
        self.device = device
        self._loader = DataLoader(
            items,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=reading.quiet,
            # as data.loaders has it: forked workers see their parent die
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            generator=torch.Generator(),  # an iteration draws a number of its own
        )
        finalize = multiprocessing.util.Finalize
        self.close = finalize(self, reading.end, args=([self._loader],), exitpriority=100)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Sample]]:
        try:
            for samples in self._loader:
                for sample in samples:
                    if sample.image is None:
                        row = self.images.rows[sample.index]
                        raise RunFailed(
                            f"'{self.images.path(sample.index)}' cannot be read, or is not of the"
                            f" {row.width} x {row.height} pixels that its annotation says: repair"
                            " it, then resume with --resume auto"
                        )
                    sample.image = sample.image.to(self.device, non_blocking=True)
                    sample.boxes = sample.boxes.to(self.device)
                    sample.labels = sample.labels.to(self.device)
                yield samples
        except (RuntimeError, OSError, EOFError) as error:
            if isinstance(error, RunFailed):
                raise
            if words := reading.trouble(error, reading.exit_codes(self._loader)):
                raise RunFailed(words) from error
            raise


@dataclass(frozen=True)
class Reading:
    """How images are read. sizes, test_size: of the shorter side; longest: of the longer one."""

    sizes: list[int]
    test_size: int
    longest: int
    flip: bool
    seed: int
    workers: int
    device: torch.device

    def train(self, images: BoxedImages, B: int, start: int, stop: int, epoch: int = 0) -> Batches:
        """Batches `start` to `stop` of a training that begins with an epoch of this number."""
        items = _Items(images, self.sizes, self.longest, self.flip, self.seed)
        order = Stream(len(images), B, self.seed, start, stop, epoch)
        return Batches(items, order, self.workers, self.device)

    def test(self, images: BoxedImages) -> Batches:
        """This rank's share of the images, one at a time: so no result depends on a neighbour."""
        items = _Items(images, [self.test_size], self.longest, False, self.seed)
        order = [[(0, i)] for i in range(*dist.shard(len(images)))]
        return Batches(items, order, self.workers, self.device)
