"""Batches of views for training, and of plain images for features.

Letters: M images of the data set, c channels, B batch over all ranks, N this rank's share of it, S
side of a view. The order of an epoch is a function of (seed, epoch), every draw of augmentation one
of (seed, epoch, index, view). So batches do not depend on the number of workers, and a start in the
middle of an epoch loads nothing of what it skips.
"""

import multiprocessing.util
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from moco_isl import dist
from moco_isl.data import workers as reading
from moco_isl.data.augment import BatchAugmentation, BatchViews
from moco_isl.data.datasets import ImagesInMemory
from moco_isl.data.draws import counted, permutation, seeded, starts, uniform
from moco_isl.errors import BadInput, RunFailed

Batch = tuple[tuple[torch.Tensor, ...], torch.Tensor]  # views, index


# ---------------------------------------------------------------- the order of an epoch


class _Plan:
    """Which images this rank sees in which step; the DataLoader iterates over (epoch, draw) lists.

    A draw is the number of an image; where the images of an epoch repeat, see `draws.counted`.
    unit: every batch is a multiple of it, so that ranks have equal shares that split evenly.
    given: the images of an epoch in their order, int64 [M] on the CPU; None: each once.
    """

    given: torch.Tensor | None = None

    def __init__(self, M: int, batch_size: int, seed: int, multiple: int):
        self.M = M
        self.B = batch_size
        self.seed = seed
        self.epoch = 0
        self.start_step = 0
        world = dist.world_size()
        self.unit = world * multiple
        if batch_size < 1 or batch_size % self.unit:
            what = f"batch size {batch_size} does not divide by {self.unit} (ranks x splits)"
            raise BadInput(f"{what}: expected a multiple of it; change one of them")
        # Batch norm behind a dense layer raises for one image a rank. So a last, smaller batch has
        # at least two a rank, or as many as full batches have.
        least = self.unit * -(-min(2, batch_size // world) // multiple)
        self.steps = M // batch_size + (M % batch_size >= least)
        if not self.steps:
            raise BadInput(
                f"too few images ({M}) for {self.unit} (ranks x splits): expected at least {least};"
                " use more images, or fewer ranks or splits"
            )

    def rows(self, epoch: int, start_step: int) -> Iterator[torch.Tensor]:
        """The draws of this rank's share of every batch from start_step on: int64 [N]."""
        if self.given is None:
            order = permutation(self.seed, epoch, self.M)
        else:
            order = counted(self.given, self.M)
        rank, world = dist.rank(), dist.world_size()
        for step in range(start_step, self.steps):
            batch = order[step * self.B : (step + 1) * self.B]
            share = len(batch) // self.unit * self.unit // world
            yield batch[rank * share : (rank + 1) * share]

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch  # the DataLoader asks ahead, when self.epoch may have moved on
        for rows in self.rows(epoch, self.start_step):
            yield [(epoch, draw) for draw in rows.tolist()]


class _InOrder(_Plan):
    """The images `order` once, for this rank alone, in batches of its own; none is left out."""

    def __init__(self, order: range, batch_size: int, seed: int):
        self.order = order
        self.B = batch_size
        self.seed = seed
        self.epoch = 0
        self.start_step = 0
        self.steps = -(-len(order) // batch_size)

    def rows(self, epoch: int, start_step: int) -> Iterator[torch.Tensor]:
        for step in range(start_step, self.steps):
            batch = self.order[step * self.B : (step + 1) * self.B]
            yield torch.arange(batch.start, batch.stop)


# ---------------------------------------------------------------- inside the workers


class _Reader:
    """Reads image i; where its file is broken, the next readable image, and marks i as unreadable.

    The position stays i: bank row and positives of a broken image are those of its stand-in, and
    every other image keeps its place.
    """

    def __init__(self, dataset: Dataset, at_least: int | None = None):
        self.dataset = dataset
        self.at_least = at_least
        # images in memory that stand in already for broken files
        self.known = set(getattr(dataset, "unreadable", ()))
        # [M], written by the workers, read by the parent
        self.unreadable = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()
        self.unreadable[sorted(self.known)] = 1

    def __call__(
        self, i: int, read: Callable[[int], object] | None = None
    ) -> tuple[object | None, int]:
        """(image, or None where no image can be read; 1 where it stands in for another, or 0).

        read: how to read an image, if not as `dataset.image` does.
        """
        for j in chain(range(i, len(self.dataset)), range(i)):
            try:
                image = read(j) if read else self.dataset.image(j, self.at_least)
            except MemoryError:
                raise
            except Exception as error:  # PIL answers a broken file with almost any exception
                if getattr(error, "errno", None) in reading.OF_THE_MACHINE:
                    raise
                if isinstance(error, BadInput) and not self.unreadable.any():  # whole, but no fit
                    warnings.warn(f"{self.dataset.path(j)!r}: {error}", stacklevel=2)
                self.unreadable[j] = 1
            else:
                return image, int(j != i or i in self.known)
        return None, 1

    def bad_rows(self) -> list[int]:
        """The positions of the images found unreadable so far."""
        return self.unreadable.nonzero()[:, 0].tolist()


class _Items(Dataset):
    """(epoch, draw) -> (view, ..., draw, whether another image stands in), see `_Plan`.

    The epoch comes with each request, since workers live over epochs.
    """

    def __init__(self, reader: _Reader, augmentation: Callable, seed: int, views: int):
        self.reader = reader
        self.augmentation = augmentation
        self.seed = seed
        self.views = views

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        epoch, draw = key
        views, broken = self.views_of(epoch, draw)
        return *(views or [torch.zeros(0)] * self.views), draw, broken

    def image_of(self, draw: int) -> int:
        return draw % len(self.reader.dataset)

    def views_of(self, epoch: int, draw: int) -> tuple[list[torch.Tensor] | None, int]:
        """(the views of a draw, or None where no image can be read; 1 for a stand-in, or 0)."""
        raise NotImplementedError


class _TrainItems(_Items):
    """Whole views, augmented one by one."""

    def views_of(self, epoch: int, draw: int) -> tuple[list[torch.Tensor] | None, int]:
        image, broken = self.reader(self.image_of(draw))
        if image is None:
            return None, broken
        views = []
        for view in range(self.views):
            with seeded(self.seed, epoch, draw, view):
                views.append(self.augmentation(image))
        return views, broken


class _CropItems(_Items):
    """Crops [c, S, S], of RGB uint8, of an image decoded no larger than the smallest crop needs."""

    def views_of(self, epoch: int, draw: int) -> tuple[list[torch.Tensor] | None, int]:
        draws = [uniform(self.seed, epoch, draw, view) for view in range(self.views)]
        i = self.image_of(draw)
        boxes = []

        def at_least(W: int, H: int) -> int:
            boxes[:] = [self.augmentation.box(draw, H, W) for draw in draws]
            smallest = min(side for box, _ in boxes for side in box[2:])
            # Decoded half as large again as the view: a crop that is hardly resized any more comes
            # out sharper, by a tenth in the differences of neighbouring pixels at 1.25 times the
            # view, by 0.02 at 1.5.
            return min(W, H) // max(1, 2 * smallest // (3 * self.augmentation.size))

        found, broken = self.reader(i, lambda j: self.reader.dataset.pixels(j, at_least))
        if found is None:
            return None, broken
        image, full = found
        return [self.augmentation.crop_one(image, *box, full) for box in boxes], broken


class _EvalItems(Dataset):
    """i -> (image, i, whether another image stands in)."""

    def __init__(self, reader: _Reader, transform: Callable):
        self.reader = reader
        self.transform = transform

    def __getitem__(self, i: int) -> tuple:
        image, broken = self.reader(i)
        return torch.zeros(0) if image is None else self.transform(image), i, broken


# ---------------------------------------------------------------- images in files


def refuse(dataset: Dataset, bad: list[int], most: int | None) -> None:
    """Raise RunFailed where more than `most` images are unreadable, or all. None: any number."""
    if bad and len(bad) == len(dataset):
        what = f"none of {len(bad)} images could be read, {dataset.path(0)} for one"
        raise RunFailed(f"{what}: expected image files; check the folder")
    if most is not None and len(bad) > most:
        names = ", ".join(dataset.path(i) for i in bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise RunFailed(
            f"{len(bad)} unreadable images ({names}), expected at most {most}: repair or remove"
            " them, or raise --max-bad-images"
        )


class _Options(NamedTuple):
    """How a loader for training reads and what it allows; see train_loader."""

    workers: int = 0
    device: torch.device | str = "cpu"
    max_bad_images: int | None = None
    pin_memory: bool | None = None
    fast: bool = False
    views: int = 2


class _FileLoader:
    """A torch DataLoader whose workers live over epochs, end for sure, and count broken images."""

    def __init__(
        self,
        items: _Items | _EvalItems,
        batches,
        normalize: Callable | None,
        workers: int,
        device: torch.device | str,
        pin_memory: bool | None = None,
    ):
        self.reader = items.reader
        self.device = torch.device(device)
        self.normalize = normalize
        self._loader = DataLoader(
            items,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=2 if workers else None,
            pin_memory=self.device.type == "cuda" if pin_memory is None else pin_memory,
            worker_init_fn=reading.quiet,
            # Forked from this process, so that torch's watch sees it die. Python 3.14 would put a
            # server in between, and the workers would outlive a killed run for ever.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            # its own: an iteration draws a number, which must not move the user's random state
            generator=torch.Generator(),
        )
        finalize = multiprocessing.util.Finalize
        self.close = finalize(self, reading.end, args=([self._loader],), exitpriority=100)

    def bad_images(self) -> list[tuple[int, str]]:
        """(index, path) of the images that could not be read so far, on this rank."""
        return [(i, self.reader.dataset.path(i)) for i in self.reader.bad_rows()]

    def _batches(self, most: int | None) -> Iterator[list[torch.Tensor]]:
        """[images ..., index] on the device, images as floats. Raises RunFailed, see `refuse`."""
        if not self.close.still_active():
            raise RuntimeError("this loader is closed: build a new one")
        try:
            for *images, index, broken in self._loader:
                if broken.any():  # only then is it worth looking at all M flags
                    refuse(self.reader.dataset, self.reader.bad_rows(), most)
                images = [x.to(self.device, non_blocking=True) for x in images]
                if self.normalize is not None:
                    images = [self.normalize(x) for x in images]
                yield [*images, index.to(self.device, non_blocking=True)]
        except (RuntimeError, OSError, EOFError) as error:
            if words := reading.trouble(error, reading.exit_codes(self._loader)):
                raise RunFailed(words) from error
            raise


class FileTrainLoader(_FileLoader):
    """The loader of train_loader for images in files, augmented one by one in worker processes."""

    def __init__(self, dataset: Dataset, augmentation: Callable, plan: _Plan, options: _Options):
        self.augmentation = augmentation
        self.plan = plan
        self.max_bad_images = options.max_bad_images
        items = self._items(dataset, options)
        how = options.workers, options.device, options.pin_memory
        super().__init__(items, plan, self._normalize(), *how)

    def _items(self, dataset: Dataset, options: _Options) -> _Items:
        at_least = getattr(self.augmentation, "smallest", None) if options.fast else None
        reader = _Reader(dataset, at_least)
        return _TrainItems(reader, self.augmentation, self.plan.seed, options.views)

    def _normalize(self) -> Callable | None:
        return getattr(self.augmentation, "normalize", None)

    def __len__(self) -> int:
        return self.plan.steps

    def epoch(
        self, epoch: int, start_step: int = 0, order: torch.Tensor | None = None
    ) -> Iterator[Batch]:
        """(views, index) from start_step on; the images before are not loaded. Raises RunFailed."""
        self.plan.epoch = epoch
        self.plan.start_step = start_step
        self.plan.given = order
        M = len(self.reader.dataset)
        for *images, draw in self._batches(self.max_bad_images):
            yield self._views(images, epoch, draw), draw if order is None else draw % M

    def _views(
        self, images: list[torch.Tensor], epoch: int, draw: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return tuple(images)


class PhotoTrainLoader(FileTrainLoader):
    """The loader of train_loader for images in files whose augmentation runs on the device.

    Workers only decode and crop. The draws are those of images in memory.
    """

    def _items(self, dataset: Dataset, options: _Options) -> _Items:
        return _CropItems(_Reader(dataset), self.augmentation, self.plan.seed, options.views)

    def _normalize(self) -> None:
        return None  # the augmentation's `finish` does it

    def _views(
        self, images: list[torch.Tensor], epoch: int, draw: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        views = range(len(images))
        start = torch.cat([starts(self.plan.seed, epoch, draw, view) for view in views])
        u = self.augmentation.draw(start)  # [views * N, draws]
        return self.augmentation.finish(torch.cat(images), u).chunk(len(images))


class FileEvalLoader(_FileLoader):
    """The loader of eval_loader for images in files.

    Iterating raises RunFailed where no image can be read.
    """

    def __init__(
        self, dataset: Dataset, transform: Callable, batches: list[torch.Tensor], workers, device
    ):
        self.batches = [batch.tolist() for batch in batches]
        items = _EvalItems(_Reader(dataset), transform)
        normalize = getattr(transform, "normalize", None)
        super().__init__(items, self.batches, normalize, workers, device)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from map(tuple, self._batches(None))


# ---------------------------------------------------------------- images in memory


class _MemoryLoader:
    def __init__(self, dataset: ImagesInMemory, device):
        self.dataset = dataset
        self.images = dataset.images_on(device)  # [M, c, H, W]

    def bad_images(self) -> list[tuple[int, str]]:
        """(index, path) of the images that could not be read when the data set was loaded."""
        return [(i, self.dataset.path(i)) for i in self.dataset.unreadable]

    def close(self) -> None:
        """Do nothing: there are no workers."""


class MemoryTrainLoader(_MemoryLoader):
    """The loader of train_loader for images held and augmented on the device."""

    def __init__(
        self, dataset: ImagesInMemory, augmentation: BatchViews, plan: _Plan, options: _Options
    ):
        super().__init__(dataset, options.device)
        self.augmentation = augmentation
        self.plan = plan
        self.max_bad_images = options.max_bad_images
        self.views = options.views

    def __len__(self) -> int:
        return self.plan.steps

    def epoch(
        self, epoch: int, start_step: int = 0, order: torch.Tensor | None = None
    ) -> Iterator[Batch]:
        """(views, index) from start_step on. Raises RunFailed, see `refuse`."""
        refuse(self.dataset, self.dataset.unreadable, self.max_bad_images)
        self.plan.given = order
        steps = list(self.plan.rows(epoch, start_step))
        if not steps:
            return
        draws = torch.cat(steps).to(self.images.device)  # one copy to the device an epoch
        index = draws if order is None else draws % len(self.images)
        sizes = [len(rows) for rows in steps]
        for draw, i in zip(draws.split(sizes), index.split(sizes)):
            of_epoch = self.plan.seed, epoch, draw
            yield self.augmentation.views(self.images[i], *of_epoch, self.views), i


class MemoryEvalLoader(_MemoryLoader):
    """The loader of eval_loader for images held on the device."""

    def __init__(
        self, dataset: ImagesInMemory, normalize: Callable, batches: list[torch.Tensor], device
    ):
        super().__init__(dataset, device)
        self.normalize = normalize
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device = self.images.device
        order = torch.cat([torch.empty(0, dtype=torch.int64), *self.batches])
        # one copy to the device
        for rows in order.to(device).split([len(batch) for batch in self.batches]):
            yield self.normalize(self.images[rows]), rows


# ---------------------------------------------------------------- the three loaders

TrainLoader = FileTrainLoader | PhotoTrainLoader | MemoryTrainLoader


def train_loader(
    dataset: Dataset,
    *,
    augmentation: Callable,
    batch_size: int,
    seed: int,
    workers: int = 0,
    device="cpu",
    multiple: int = 1,
    max_bad_images: int = 0,
    pin_memory: bool | None = None,
    fast: bool = False,
    views: int = 2,
) -> TrainLoader:
    """Batches of two views, or of `views` (a supervised probe takes one), on the device.

    len() is the number of steps an epoch. .epoch(epoch, start_step=0, order=None) iterates over
    ((im_q, im_k) float [N, c, S, S] each, index int64 [N]). .bad_images() names unreadable images;
    above max_bad_images the iteration raises RunFailed. .close() ends the workers.
    order: the images of the epoch, int64 [M] on the CPU, in which an image may come several times,
    each time with other views, or never; None: each once.

    Global batch b of an epoch is permutation(seed, epoch)[b B : (b + 1) B], B = batch_size over all
    ranks; each rank takes its contiguous share. The last, smaller batch is trimmed to a multiple of
    ranks x `multiple`, and left out where a rank would have less than two images; each epoch leaves
    out other images.

    A BatchViews augmentation runs on the device. It takes ImagesInMemory, without workers. A
    BatchAugmentation also takes files, which workers then decode and crop as at full size.
    fast: for augmentations in workers; large JPEGs are decoded smaller, never below what the
    smallest crop needs. Crops are drawn on the smaller image, so they lie elsewhere. Raises
    BadInput.
    """
    plan = _Plan(len(dataset), batch_size, seed, multiple)
    options = _Options(workers, device, max_bad_images, pin_memory, fast, views)
    return _views_of(dataset, augmentation, plan, options)


def view_loader(
    dataset: Dataset,
    *,
    augmentation: Callable,
    batch_size: int,
    seed: int,
    workers: int = 0,
    device="cpu",
    shard: tuple[int, int] | None = None,
) -> TrainLoader:
    """Two views of every image once and in order: of images start .. stop - 1 of `shard`, or all.

    A loader as `train_loader` gives; .epoch(epoch) has the views that a training epoch of this
    number would have. batch_size is this rank's own. Unreadable images are replaced and named,
    never refused. Raises BadInput as `train_loader`.
    """
    plan = _InOrder(range(*(shard or (0, len(dataset)))), batch_size, seed)
    return _views_of(dataset, augmentation, plan, _Options(workers, device))


def _views_of(dataset: Dataset, augmentation, plan: _Plan, options: _Options) -> TrainLoader:
    """The loader for where the images are and where they are augmented."""
    if not isinstance(augmentation, BatchViews):
        kind = FileTrainLoader
    elif isinstance(dataset, ImagesInMemory):
        kind = MemoryTrainLoader
    elif isinstance(augmentation, BatchAugmentation):
        kind = PhotoTrainLoader
    else:
        what = "this augmentation on the device needs images in memory"
        raise BadInput(f"{what}: expected a data set held whole; pass it through load_into_memory")
    return kind(dataset, augmentation, plan, options)


def eval_loader(
    dataset: Dataset,
    *,
    transform: Callable,
    batch_size: int,
    workers: int = 0,
    device="cpu",
    shard: tuple[int, int] | None = None,
    batches: list[torch.Tensor] | None = None,
) -> FileEvalLoader | MemoryEvalLoader:
    """(images float [n, c, S, S], index int64 [n]) in order: start .. stop - 1 of `shard`, or all.

    batches: the positions of each batch, in place of batch_size and shard.
    An unreadable image is replaced by the next readable one and named by .bad_images(). .close()
    ends the workers.
    """
    if batches is None:
        start, stop = shard or (0, len(dataset))
        batches = [b for b in torch.arange(start, stop).split(batch_size) if len(b)]
    unchanged = getattr(transform, "unchanged", None)
    if isinstance(dataset, ImagesInMemory) and set(dataset.images.shape[2:]) == {unchanged}:
        return MemoryEvalLoader(dataset, transform.normalize, batches, device)
    return FileEvalLoader(dataset, transform, batches, workers, device)
