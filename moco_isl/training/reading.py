"""How a rank of a run reads its images: in batches to train on, and in passes over all of them.

Letters: C feature dimension, M images.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.data import Dataset

from moco_isl import data, dist
from moco_isl.encoders import (
    AMP_TYPES,
    SmallImages,
    channels_of,
    extract_features,
    extract_views,
)
from moco_isl.errors import BadInput
from moco_isl.mining.estimate import Views, pixel_rows
from moco_isl.run.ranks import say
from moco_isl.run.signals import Never, Stop
from moco_isl.training import fast


@dataclass(frozen=True)
class Reading:
    """How images are read; the fields are the flags of these names.

    workers: processes of this rank. batch_size: of all ranks. views: of an image in a step. crop,
    crop_min: see `data.get_augmentation`; --aug-plus goes before the first. pixels: see
    `data.Pixels`.
    """

    views: int
    crop: tuple[float, float] | None
    crop_min: float | None
    workers: int
    dataset: str
    cache: str | None
    on_device: bool
    knn_holdout: int
    aug_plus: bool
    batch_size: int
    bn_splits: int
    max_bad_images: int
    seed: int
    amp: str
    compile: bool
    pixels: data.Pixels


@dataclass(frozen=True)
class TrainingImages:
    """The images of a run.

    whole: a data set as it was opened. train: the part that is trained on. held_out: the rest,
    which kNN classifies, or None. side: of a crop, in pixels.
    """

    whole: Dataset
    train: Dataset
    held_out: Dataset | None
    side: int


def split(whole: Dataset, holdout: int, seed: int, side: int = 0) -> TrainingImages:
    """Hold out `holdout` images of a data set, drawn by the seed.

    side: of a crop; 0: chosen to suit the images.
    """
    train, held_out = data.holdout(whole, holdout, seed) if holdout else (whole, None)
    return TrainingImages(whole, train, held_out, side or data.native_size(train))


@dataclass
class Reader:
    """How a rank reads the images: in batches to train on, and in passes of an encoder over all.

    labels [M]: on the device, None where there are none; they are looked at for the log alone.
    """

    images: TrainingImages
    labels: torch.Tensor | None
    loader: object  # see data.train_loader; None for passes alone
    augmentation: Callable
    settings: Reading
    device: torch.device
    stop: Stop
    pixels: torch.Tensor | None = None  # see `mining.estimate.Views`; read when first asked for
    unreadable: dict[int, str] = field(default_factory=dict)  # in this rank's passes, by position

    @property
    def M(self) -> int:
        return len(self.images.train)

    def features(
        self, encoder: nn.Module, dataset: Dataset | None = None, normalize: bool = True
    ) -> torch.Tensor:
        """Features of the centre crops of all images: [M, C] unit rows, equal on all ranks.

        The encoder is in eval mode. dataset: None for the images to train on. normalize: False for
        rows as the encoder gives them. Raises Interrupted when asked to stop.
        """
        dataset = self.images.train if dataset is None else dataset
        loader = self._plain(dataset)
        extract = functools.partial(extract_features, normalize=normalize)
        return self._pass(extract, encoder, loader, loader, len(dataset))

    def _plain(self, dataset: Dataset):
        """A loader of the centre crops of this rank's share of a data set."""
        return data.eval_loader(
            dataset,
            transform=data.get_eval_transform(
                self.settings.dataset, self.images.side, self.settings.pixels
            ),
            shard=dist.shard(len(dataset)),
            batch_size=self.settings.batch_size,
            workers=self.settings.workers,
            device=self.device,
        )

    def views(self, encoder: nn.Module, epoch: int) -> Views:
        """Features of both views of every image, 2 x [M, C], and its pixels, equal on all ranks.

        The views are those that this epoch draws; the encoder is in eval mode. Raises Interrupted
        when asked to stop.
        """
        loader = data.view_loader(
            self.images.train,
            augmentation=self.augmentation,
            seed=self.settings.seed,
            shard=dist.shard(self.M),
            # two views an image, as in a step
            batch_size=self.settings.batch_size // dist.world_size(),
            workers=self.settings.workers,
            device=self.device,
        )
        seen = self._pass(extract_views, encoder, loader, loader.epoch(epoch), self.M)
        if self.pixels is None:
            small = functools.partial(extract_features, normalize=False)
            loader = self._plain(self.images.train)
            self.pixels = pixel_rows(self._pass(small, SmallImages(), loader, loader, self.M))
        return Views(*seen, self.pixels)

    def _pass(self, extract: Callable, encoder: nn.Module, loader, batches: Iterable, M: int):
        """Call extract(encoder, batches, M, ...) with this rank's batches; close the loader."""
        # the averages of batch norm differ between the ranks since the last step; a file holds
        # those of rank 0
        for buffer in encoder.buffers():
            dist.broadcast(buffer)
        most = int(dist.all_reduce_max(torch.tensor(len(loader), device=self.device)))
        watched = self.stop.watch(batches, most)
        try:
            return extract(encoder, watched, M, self.device, amp=AMP_TYPES[self.settings.amp])
        finally:
            self.unreadable |= loader.bad_images()
            loader.close()

    def close(self) -> None:
        self.loader.close()


def open_reader(
    images: TrainingImages, settings: Reading, device: torch.device, stop: Stop
) -> Reader:
    """Open a reader of the images; if the settings ask for it, decode and keep all of them first.

    Writes nothing but the cache. Raises BadInput for images that cannot be read.
    """
    whole = images.whole
    say(data.describe(train=whole))
    if settings.cache is not None:
        whole = data.hold_cached(whole, settings.cache, settings.workers, say)
    elif settings.on_device:
        whole = data.hold_small(whole, settings.workers)
    images = split(whole, settings.knn_holdout, settings.seed, images.side)
    augmentation = data.get_augmentation(
        settings.dataset,
        aug_plus=settings.aug_plus,
        size=images.side,
        on_device=settings.on_device,
        pixels=settings.pixels,
        crop=None if settings.aug_plus else settings.crop,
        crop_min=settings.crop_min,
    )
    jitters = settings.aug_plus or settings.crop is None
    if jitters and not isinstance(augmentation, data.DigitAugmentation):
        say(data.left_out(settings.pixels))
    loader = data.train_loader(
        images.train,
        augmentation=augmentation,
        batch_size=settings.batch_size,
        seed=settings.seed,
        workers=settings.workers,
        device=device,
        multiple=settings.bn_splits,
        max_bad_images=settings.max_bad_images,
        views=settings.views,
    )
    if settings.compile:
        shown = settings.views * settings.batch_size // dist.world_size()
        fast.compile_augmentation(augmentation, shown, device)
    labels = images.train.labels
    labels = None if labels is None else labels.to(device)
    return Reader(images, labels, loader, augmentation, settings, device, stop)


def open_passes(
    given: Dataset,
    encoder: nn.Module,
    device: torch.device,
    *,
    size: int | None,
    batch_size: int,
    workers: int,
    aug_plus: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    seed: int,
) -> Reader:
    """A reader for passes of an encoder over a data set alone; it has no loader to train by.

    given: see `data.own_images`. size: side of a crop; None: as suits the images. mean, std: one
    number a channel, of values in [0, 1]; None: those of the data set's row, ImageNet's for any
    data set that has none; measured where these are of other channels. Raises BadInput.
    """
    dataset = data.own_images(given)
    if dataset is not given:
        dataset = data.with_channels(dataset, channels_of(encoder))
    in_memory = isinstance(dataset, data.ImagesInMemory)
    if in_memory:
        channels = dataset.images.shape[1]
        bits = 16 if dataset.images.is_floating_point() else 8
    else:
        channels, bits = getattr(dataset, "channels", 3), getattr(dataset, "bits", 8)
    numbers = [channels if x is None else len(x) for x in (mean, std)]
    if (mean is None) != (std is None) or numbers != [channels] * 2 or min(std or [1]) <= 0:
        raise BadInput(
            f"mean is {mean} and std {std}: expected mean and std together, one number a channel"
            f" ({channels}), those of std above 0"
        )
    name = data.set_of(dataset)
    pixels = data.settled(data.Pixels(channels, bits, mean, std), name, dataset)
    images = split(dataset, 0, seed, size or 0)
    augmentation = data.get_augmentation(
        name, aug_plus=aug_plus, size=images.side, on_device=in_memory, pixels=pixels
    )
    settings = Reading(
        views=2,
        crop=None,
        crop_min=None,
        workers=workers,
        dataset=name,
        cache=None,
        on_device=in_memory,
        knn_holdout=0,
        aug_plus=aug_plus,
        batch_size=max(batch_size, dist.world_size()),
        bn_splits=1,
        max_bad_images=len(dataset),
        seed=seed,
        amp="off",
        compile=False,
        pixels=pixels,
    )
    labels = None if dataset.labels is None else dataset.labels.to(device)
    return Reader(images, labels, None, augmentation, settings, device, Never())
