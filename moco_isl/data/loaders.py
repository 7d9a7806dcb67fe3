"""Batches of views for training and of plain images for features.

Letters: M images of the data set, B batch over all ranks, N this rank's share of it. The order of
an epoch is a function of (seed, epoch), every draw of augmentation one of (seed, epoch, index,
view): batches do not depend on the number of workers, and a start in the middle of an epoch skips
without loading.
"""

import multiprocessing.util
import sys
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from moco_isl import dist
from moco_isl.data import workers as reading
from moco_isl.data.augment import BatchAugmentation, BatchViews
from moco_isl.data.datasets import ImagesInMemory
from moco_isl.data.draws import permutation, seeded, starts, uniform
from moco_isl.errors import BadInput, RunFailed

Batch = tuple[tuple[torch.Tensor, ...], torch.Tensor]


# ---------------------------------------------------------------- inside the workers


class _Reader:
    """Reads image i, or, where its file is broken, the next readable one, and marks i as
    unreadable.

    The position stays i: bank row and positives of a broken image then follow its stand-in, and
    every other image keeps its place.
    """

    def __init__(self, dataset: Dataset, at_least: int | None = None):
        self.dataset = dataset
        self.at_least = at_least
        # [M], written by the workers, read by the parent
        self.unreadable = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()
        # of a data set in memory: those that were broken in their files, in whose places others
        # stand already
        self.known = set(getattr(dataset, "unreadable", ()))
        self.unreadable[sorted(self.known)] = 1

    def __call__(
        self, i: int, read: Callable[[int], object] | None = None
    ) -> tuple[object | None, int]:
        """(image or None when no image at all can be read, 1 when it stands in for another); read:
        in another way
        """
        M = len(self.dataset)
        for j in (*range(i, M), *range(i)):
            try:
                return read(j) if read else self.dataset.image(j, self.at_least), int(
                    j != i or i in self.known
                )
            except MemoryError:
                raise
            except Exception as error:  # PIL answers a broken file with almost any exception
                if getattr(error, "errno", None) in reading.OF_THE_MACHINE:
                    raise
                self.unreadable[j] = 1
        return None, 1


class _Items(Dataset):
    """(epoch, i) -> what a step needs of image i.

    The epoch travels with the request: workers outlive it.
    """

    def __init__(self, reader: _Reader, augmentation: Callable, seed: int, views: int):
        self.reader = reader
        self.augmentation = augmentation
        self.seed = seed
        self.views = views


class _TrainItems(_Items):
    """(epoch, i) -> the views of image i."""

    def __getitem__(self, key: tuple[int, int]):
        epoch, i = key
        image, broken = self.reader(i)
        if image is None:
            return *[torch.zeros(0)] * self.views, i, broken
        views = []
        for view in range(self.views):
            with seeded(self.seed, epoch, i, view):
                views.append(self.augmentation(image))
        return *views, i, broken


class _CropItems(_Items):
    """(epoch, i) -> the crops of image i, uint8 [3, S, S] each, decoded no larger than the smallest
    of them needs.
    """

    def __getitem__(self, key: tuple[int, int]):
        epoch, i = key
        draws = [uniform(self.seed, epoch, i, view) for view in range(self.views)]
        boxes = []

        def at_least(W: int, H: int) -> int:
            boxes[:] = [self.augmentation.box(draw, H, W) for draw in draws]
            smallest = min(side for box, _ in boxes for side in box[2:])
            # Half as large again as the view: a crop that is hardly resized any more comes out
            # sharper, by a tenth in the differences of neighbouring pixels at 1.25 times the view,
            # by 0.02 at 1.5.
            return min(W, H) // max(1, 2 * smallest // (3 * self.augmentation.size))

        found, broken = self.reader(i, lambda j: self.reader.dataset.pixels(j, at_least))
        if found is None:
            return *[torch.zeros(0)] * self.views, i, broken
        image, full = found
        return *(self.augmentation.crop_one(image, *box, full) for box in boxes), i, broken


class _EvalItems(Dataset):
    def __init__(self, reader: _Reader, transform: Callable):
        self.reader = reader
        self.transform = transform

    def __getitem__(self, i: int):
        image, broken = self.reader(i)
        return torch.zeros(0) if image is None else self.transform(image), i, broken


# ---------------------------------------------------------------- the order of an epoch


class _Plan:
    """Which images this rank sees in which step.

    Also the DataLoader's batch sampler: lists of (epoch, i).
    """

    def __init__(self, M: int, batch_size: int, seed: int, multiple: int):
        self.M = M
        self.B = batch_size
        self.seed = seed
        # every batch is a multiple of it: equal shares, that split evenly once more
        self.unit = dist.world_size() * multiple
        if batch_size < 1 or batch_size % self.unit:
            raise BadInput(
                f"batch size {batch_size} does not divide by {self.unit} (ranks x splits): expected"
                " a multiple of it; change one of them"
            )
        # one image a rank has no batch statistics after a dense layer (alexnet), and would end a
        # run at the end of its first epoch: a last batch has two a rank, unless full batches have
        # one
        least = self.unit * -(-min(2, batch_size // dist.world_size()) // multiple)
        self.steps = M // batch_size + (M % batch_size >= least)
        if not self.steps:
            raise BadInput(
                f"too few images ({M}) for {self.unit} (ranks x splits): expected at least {least};"
                " use more images, or fewer ranks or splits"
            )
        self.epoch, self.start_step = 0, 0

    def rows(self, epoch: int, start_step: int) -> Iterator[torch.Tensor]:
        """This rank's share of every batch from start_step on: int64 [N]."""
        order = permutation(self.seed, epoch, self.M)
        rank, world = dist.rank(), dist.world_size()
        for step in range(start_step, self.steps):
            batch = order[step * self.B : (step + 1) * self.B]
            share = len(batch) // self.unit * self.unit // world
            yield batch[rank * share : (rank + 1) * share]

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch  # the DataLoader asks ahead: what it asks for is settled here
        for rows in self.rows(epoch, self.start_step):
            yield [(epoch, i) for i in rows.tolist()]


class _InOrder(_Plan):
    """One visit to the images `order`, by this rank alone, in batches of its own, none left out."""

    def __init__(self, order: range, batch_size: int, seed: int):
        self.order = order
        self.B = batch_size
        self.seed = seed
        self.steps = -(-len(order) // batch_size)
        self.epoch, self.start_step = 0, 0

    def rows(self, epoch: int, start_step: int) -> Iterator[torch.Tensor]:
        for step in range(start_step, self.steps):
            batch = self.order[step * self.B : (step + 1) * self.B]
            yield torch.arange(batch.start, batch.stop)


# ---------------------------------------------------------------- images in files


def refuse(dataset: Dataset, bad: list[int], most: int | None) -> None:
    """Raise RunFailed when more images are unreadable than allowed (most None: any number), or all
    are.
    """
    if bad and len(bad) == len(dataset):
        raise RunFailed(
            f"none of {len(bad)} images could be read, {dataset.path(0)} for one: expected image"
            " files; check the folder"
        )
    if most is not None and len(bad) > most:
        names = ", ".join(dataset.path(i) for i in bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise RunFailed(
            f"{len(bad)} unreadable images ({names}), expected at most {most}: repair or remove"
            " them, or raise --max-bad-images"
        )


class _FileLoader:
    """A torch DataLoader whose workers live over epochs and end for sure, and that counts
    unreadable images.
    """

    def __init__(
        self,
        items: Dataset,
        batches,
        reader: _Reader,
        transform,
        workers: int,
        device,
        pin_memory: bool | None,
    ):
        self.reader = reader
        self.device = torch.device(device)
        self.normalize = getattr(transform, "normalize", None)
        self._loader = DataLoader(
            items,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=2 if workers else None,
            pin_memory=self.device.type == "cuda" if pin_memory is None else pin_memory,
            worker_init_fn=reading.quiet,
            # forked from this process, so that torch's watch sees it die; Python 3.14's way would
            # put a server in between, and workers would outlive a killed run for ever
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            # its own: iterating draws a number, which must not move the user's random state
            generator=torch.Generator(),
        )
        self.close = multiprocessing.util.Finalize(
            self, reading.end, args=([self._loader],), exitpriority=100
        )

    def bad_images(self) -> list[tuple[int, str]]:
        """(index, path) of the images that could not be read so far, on this rank."""
        return [
            (i, self.reader.dataset.path(i))
            for i in self.reader.unreadable.nonzero()[:, 0].tolist()
        ]

    def _batches(self, most: int | None) -> Iterator[list[torch.Tensor]]:
        """[images ..., index] on the device, images as floats."""
        if not self.close.still_active():
            raise RuntimeError("this loader is closed: build a new one")
        try:
            for *images, index, broken in self._loader:
                if broken.any():  # spares the look at M flags in every step
                    refuse(
                        self.reader.dataset, self.reader.unreadable.nonzero()[:, 0].tolist(), most
                    )
                images = [x.to(self.device, non_blocking=True) for x in images]
                if self.normalize is not None:
                    images = [self.normalize(x) for x in images]
                yield [*images, index.to(self.device, non_blocking=True)]
        except (RuntimeError, OSError, EOFError) as error:
            if words := reading.befell(error, reading.exit_codes(self._loader)):
                raise RunFailed(words) from error
            raise


class FileTrainLoader(_FileLoader):
    """What train_loader gives for images augmented one by one in worker processes."""

    def __init__(
        self,
        dataset: Dataset,
        augmentation: Callable,
        plan: _Plan,
        workers: int,
        device,
        max_bad_images: int | None,
        pin_memory: bool | None,
        fast: bool,
        views: int,
    ):
        reader = _Reader(dataset, getattr(augmentation, "smallest", None) if fast else None)
        self.plan = plan
        self.max_bad_images = max_bad_images
        super().__init__(
            _TrainItems(reader, augmentation, plan.seed, views),
            plan,
            reader,
            augmentation,
            workers,
            device,
            pin_memory,
        )

    def __len__(self) -> int:
        return self.plan.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """(views, index) from start_step on, see train_loader; earlier images are not loaded.

        Raises RunFailed.
        """
        self.plan.epoch, self.plan.start_step = epoch, start_step
        for *views, index in self._batches(self.max_bad_images):
            yield tuple(views), index


class PhotoTrainLoader(_FileLoader):
    """What train_loader gives for images in files whose augmentation is finished on the device:
    workers only decode and crop. The draws are those of the same augmentation on images in memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        augmentation: BatchAugmentation,
        plan: _Plan,
        workers: int,
        device,
        max_bad_images: int | None,
        pin_memory: bool | None,
        views: int,
    ):
        reader = _Reader(dataset)
        self.augmentation = augmentation
        self.plan = plan
        self.max_bad_images = max_bad_images
        items = _CropItems(reader, augmentation, plan.seed, views)
        super().__init__(items, plan, reader, None, workers, device, pin_memory)

    def __len__(self) -> int:
        return self.plan.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """(views, index) from start_step on, see train_loader; earlier images are not loaded.

        Raises RunFailed.
        """
        self.plan.epoch, self.plan.start_step = epoch, start_step
        for *crops, index in self._batches(self.max_bad_images):
            start = torch.cat(
                [starts(self.plan.seed, epoch, index, view) for view in range(len(crops))]
            )
            u = self.augmentation.draw(start)  # [views * N, draws]
            yield self.augmentation.finish(torch.cat(crops), u).chunk(len(crops)), index


class FileEvalLoader(_FileLoader):
    """What eval_loader gives for images in files.

    Iterating raises RunFailed when no image can be read.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable,
        rows: range,
        batch_size: int,
        workers: int,
        device,
    ):
        reader = _Reader(dataset)
        self.batches = [list(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
        super().__init__(
            _EvalItems(reader, transform), self.batches, reader, transform, workers, device, None
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from map(tuple, self._batches(None))


# ---------------------------------------------------------------- images in memory


class _MemoryLoader:
    def __init__(self, dataset: ImagesInMemory, device):
        self.dataset = dataset
        self.images = dataset.images_on(device)  # uint8 [M, 3, H, W]

    def bad_images(self) -> list[tuple[int, str]]:
        """(index, path) of the images that could not be read when the data set was loaded."""
        return [(i, self.dataset.path(i)) for i in self.dataset.unreadable]

    def close(self) -> None:
        """Nothing to end: there are no workers."""


class MemoryTrainLoader(_MemoryLoader):
    """What train_loader gives for images held and augmented on the device; the same interface as
    FileTrainLoader.
    """

    def __init__(
        self,
        dataset: ImagesInMemory,
        augmentation: BatchViews,
        plan: _Plan,
        device,
        max_bad_images: int | None,
        views: int,
    ):
        super().__init__(dataset, device)
        self.augmentation = augmentation
        self.views = views
        self.plan = plan
        self.max_bad_images = max_bad_images

    def __len__(self) -> int:
        return self.plan.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        refuse(self.dataset, self.dataset.unreadable, self.max_bad_images)
        steps = list(self.plan.rows(epoch, start_step))
        if not steps:
            return
        order = torch.cat(steps).to(self.images.device)  # one copy to the device an epoch
        for index in order.split([len(rows) for rows in steps]):
            yield (
                self.augmentation.views(
                    self.images[index], self.plan.seed, epoch, index, self.views
                ),
                index,
            )


class MemoryEvalLoader(_MemoryLoader):
    def __init__(
        self, dataset: ImagesInMemory, normalize: Callable, rows: range, batch_size: int, device
    ):
        super().__init__(dataset, device)
        self.normalize = normalize
        self.rows = rows
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in torch.arange(self.rows.start, self.rows.stop, device=self.images.device).split(
            self.batch_size
        ):
            if len(rows):
                yield self.normalize(self.images[rows]), rows


# ---------------------------------------------------------------- the three doors


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
) -> FileTrainLoader | PhotoTrainLoader | MemoryTrainLoader:
    """Batches of two views, or of `views` (a supervised probe takes one). len() is the number of
    steps an epoch; .epoch(epoch, start_step=0) iterates ((im_q, im_k) float [N, 3, S, S] each,
    index int64 [N]) on the device.

    Global batch b of an epoch is permutation(seed, epoch)[b B : (b + 1) B], B = batch_size over all
    ranks; each rank takes its contiguous share. The last, smaller batch is kept, trimmed to a
    multiple of ranks x `multiple`, and left out where a rank would have less than two images; those
    that sit an epoch out are others in the next. .bad_images() names unreadable images; past
    max_bad_images the iteration raises RunFailed. .close() ends the workers. fast: large JPEGs are
    decoded smaller, never below what the smallest crop needs; their crops are drawn on the smaller
    image, so lie elsewhere. A BatchViews
    augmentation runs on the device: it takes ImagesInMemory, and no workers, or, if a
    BatchAugmentation, files, which workers then decode and crop, without loss and where they would
    at full size. Raises BadInput.
    """
    plan = _Plan(len(dataset), batch_size, seed, multiple)
    return _views_of(
        dataset, augmentation, plan, workers, device, max_bad_images, pin_memory, fast, views
    )


def view_loader(
    dataset: Dataset,
    *,
    augmentation: Callable,
    batch_size: int,
    seed: int,
    workers: int = 0,
    device="cpu",
    shard: tuple[int, int] | None = None,
) -> FileTrainLoader | PhotoTrainLoader | MemoryTrainLoader:
    """Two views of every image once and in order, start .. stop - 1 of `shard` or all, for a look
    at what an encoder makes of them.

    The loader is that of `train_loader`, .epoch(epoch) gives the views that a training epoch of
    this number would have (seed, epoch and image decide), batch_size is this rank's own. Unreadable
    images are replaced and named, never refused. Raises BadInput as `train_loader`.
    """
    plan = _InOrder(range(*(shard or (0, len(dataset)))), batch_size, seed)
    return _views_of(dataset, augmentation, plan, workers, device, None, None, False, 2)


def _views_of(
    dataset, augmentation, plan: _Plan, workers, device, max_bad_images, pin_memory, fast, views
):
    """The loader for where the images are and where they are augmented."""
    if not isinstance(augmentation, BatchViews):
        return FileTrainLoader(
            dataset, augmentation, plan, workers, device, max_bad_images, pin_memory, fast, views
        )
    if not isinstance(dataset, ImagesInMemory):
        if not isinstance(augmentation, BatchAugmentation):
            raise BadInput(
                "this augmentation on the device needs images in memory: expected a data set held"
                " whole; pass it through load_into_memory"
            )
        return PhotoTrainLoader(
            dataset, augmentation, plan, workers, device, max_bad_images, pin_memory, views
        )
    return MemoryTrainLoader(dataset, augmentation, plan, device, max_bad_images, views)


def eval_loader(
    dataset: Dataset,
    *,
    transform: Callable,
    batch_size: int,
    workers: int = 0,
    device="cpu",
    shard: tuple[int, int] | None = None,
) -> FileEvalLoader | MemoryEvalLoader:
    """(images float [n, 3, S, S], index int64 [n]) in order: images start .. stop - 1 of `shard`,
    or all.

    An unreadable image is replaced by the next readable one and named by .bad_images(). .close()
    ends the workers.
    """
    start, stop = (0, len(dataset)) if shard is None else shard
    rows = range(start, stop)
    if isinstance(dataset, ImagesInMemory) and set(dataset.images.shape[2:]) == {
        getattr(transform, "unchanged", None)
    }:
        return MemoryEvalLoader(dataset, transform.normalize, rows, batch_size, device)
    return FileEvalLoader(dataset, transform, rows, batch_size, workers, device)
