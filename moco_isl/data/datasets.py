"""The data sets: folders of images, torchvision's small sets, the embedded digits.

All have len(), [i] -> (image, label), .labels (int64 [M] or None), .classes (list of names or
None), .path(i) (where the image is, in messages) and .size_hint (side of the images in memory; None
for files). Those of files also have .name(i) (a name that stays when the files move), .open(i),
.side(i) and .stat(i). M is the number of images.
"""

import bisect
import io
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT
from torch.utils.data import Dataset

from moco_isl.data import folders
from moco_isl.data.bands import assumed_range, fit, read_bands
from moco_isl.errors import BadInput
from moco_isl.files import AnyPath, open_regular

SMALL = 64  # side up to which images are treated as CIFAR's are: neither enlarged nor blurred
_TIFF = (".tif", ".tiff")
GONE = (-1, -1)  # size and time of a file that is not there
_READ_WHOLE = 256 << 20  # bytes of a file up to which it is held in memory while it is decoded


def decode_pixels(
    source: AnyPath | BinaryIO,
    at_least: Callable[[int, int], int],
    unclear: Callable[[str], None] = warnings.warn,
) -> tuple[torch.Tensor, tuple[int, int]]:
    """`decode` as uint8 [3, h, w], with the image's full size (H, W).

    at_least(W, H) says how small it may be decoded. A JPEG of its full size goes through
    torchvision where that still decodes: PIL's values in two thirds of the time.
    """
    with _opened(source) as file:
        whole = file.seek(0, os.SEEK_END) <= _READ_WHOLE
        file.seek(0)
        content = file.read() if whole else b""
        with Image.open(io.BytesIO(content) if whole else file, formats=folders.FORMATS) as image:
            W, H = image.size
            keep = max(1, at_least(W, H))
            if (
                whole
                and image.format == "JPEG"
                and image.mode == "RGB"
                and min(W, H) // keep < 2
                and (decode_jpeg := _jpeg_decoder())
            ):
                pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            else:
                pixels = _to_tensor(_to_rgb(image, keep, unclear))
    return pixels, (H, W)


@cache
def _jpeg_decoder() -> Callable[[torch.Tensor], torch.Tensor] | None:
    """torchvision's, which is imported on demand: it takes a second.

    None where there is none: it is deprecated since 0.29 in favour of a package of its own.
    """
    try:
        from torchvision.io import decode_jpeg
    except ImportError:
        return None
    return decode_jpeg


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as uint8 [3, h, w]."""
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(image)


def decode(
    source: AnyPath | BinaryIO,
    at_least: int | None = None,
    unclear: Callable[[str], None] = warnings.warn,
) -> Image.Image:
    """The image of a file, given by its path or opened, as 8-bit RGB, whatever its format.

    Orientation tags are ignored, as torchvision ignores them.
    at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep that
    many pixels. unclear(why): called where the range of floats or 32-bit integers is a guess;
    `bands.value_range` has the rule.
    Raises what PIL raises on a file it cannot read (OSError and others): also on one that is no
    regular file, of a format not in `folders.FORMATS`, or of more than 179 million pixels, PIL's
    bound against decompression bombs.
    """
    with _opened(source) as file, Image.open(file, formats=folders.FORMATS) as image:
        return _to_rgb(image, at_least, unclear)


def _opened(source: AnyPath | BinaryIO) -> BinaryIO:
    return open_regular(source) if isinstance(source, str | os.PathLike) else source


def _to_rgb(
    image: Image.Image, at_least: int | None, unclear: Callable[[str], None]
) -> Image.Image:
    if at_least and image.format == "JPEG":
        image.draft("RGB", (at_least, at_least))
    if image.mode.startswith("I") or image.mode == "F":
        return _to_eight_bits(image, unclear).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as straight to RGB, without PIL's warning
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image, unclear: Callable[[str], None]) -> Image.Image:
    """Grey images of 16 or 32 bits, or of floats, scaled to 0..255.

    PIL's convert would clip at 255. Values outside of the range become its nearest end, NaN becomes
    black. Raises ValueError where no value is finite.
    """
    tags = image.tag_v2 if image.format == "TIFF" else {}
    # mode I also holds files of 16 bits, and all of PNG and PPM are
    bits = tags.get(BITSPERSAMPLE, (16,))[0]
    values = np.asarray(image)
    if image.mode == "I" and bits == 32 and tags.get(SAMPLEFORMAT, (1,))[0] == 1:
        values = values.view(np.uint32)  # PIL reads them as signed
    values = values.astype(np.float64)
    low, high = 0.0, 65535.0
    if image.mode == "F" or bits == 32:
        tops = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        low, high = assumed_range(values, tops, unclear)
    values = np.nan_to_num(values.clip(low, high), nan=low)
    return Image.fromarray(((values - low) * (255 / (high - low)) + 0.5).astype(np.uint8))


def is_rgb(channels: int, bits: int) -> bool:
    """Whether images are RGB of 8 bits, as MoCo's; `bands.read_bands` reads all others."""
    return (channels, bits) == (3, 8)


class ImageFiles(Dataset):
    """Images that stay in their files, decoded when asked for.

    A subclass whose images are in larger files, such as tar shards, overrides `open` and `stat`.

    channels, bits: 3 of 8 are PIL images; any others are float32 [channels, H, W] in [0, 1], see
    `bands.read_bands`.
    """

    size_hint = None
    channels = 3
    bits = 8

    def __init__(
        self,
        paths: Sequence[str],
        labels: torch.Tensor | None,
        classes: list[str] | None,
        folder: str = "",
        layout: folders.Layout | None = None,
    ):
        # one block: every worker would soon have a copy of its own of a list of a million strings
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = labels
        self.classes = classes
        self.folder = folder  # the folder in which all of them lie, or another name of their source
        self.layout = layout or folders.Layout(f"{len(paths)} images, {len(classes or ())} classes")
        self._said_unclear = torch.zeros(1, dtype=torch.bool).share_memory_()  # workers share it

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, i: int) -> str:
        return os.fsdecode(self._paths[i])

    def name(self, i: int) -> str:
        """A name that no other image of the data set has; `names_below` makes it relative."""
        return self.path(i)

    def open(self, i: int) -> BinaryIO:
        """The bytes of image i, opened in the process that asks. Raises OSError."""
        return open_regular(self.path(i))

    def stat(self, i: int) -> tuple[int, int]:
        """(size in bytes, time of change in nanoseconds) of image i. Raises OSError."""
        found = os.stat(self.path(i))
        return found.st_size, found.st_mtime_ns

    def side(self, i: int) -> int:
        """The shorter side of image i in pixels. Raises what PIL raises."""
        if not is_rgb(self.channels, self.bits):
            return min(self.image(i).shape[1:])
        with self.open(i) as file, Image.open(file, formats=folders.FORMATS) as image:
            return min(image.size)  # from its header

    def image(self, i: int, at_least: int | None = None) -> Image.Image | torch.Tensor:
        if is_rgb(self.channels, self.bits):
            return decode(self.open(i), at_least, partial(self._unclear, i))
        with self.open(i) as file:
            return read_bands(file, self.channels, at_least, partial(self._unclear, i))

    def pixels(
        self, i: int, at_least: Callable[[int, int], int]
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        if is_rgb(self.channels, self.bits):
            return decode_pixels(self.open(i), at_least, partial(self._unclear, i))
        image = self.image(i)
        H, W = image.shape[1:]
        at_least(W, H)  # draws the boxes; these images are never decoded smaller
        return image, (H, W)

    def _unclear(self, i: int, why: str) -> None:
        """Print once for a data set which range is assumed for the values of an image."""
        if not self._said_unclear:
            self._said_unclear.fill_(True)
            warnings.warn(f"{self.path(i)!r}: {why} (there may be more such images)", stacklevel=2)

    def __getitem__(self, i: int) -> tuple[Image.Image | torch.Tensor, int]:
        return self.image(i), (-1 if self.labels is None else int(self.labels[i]))


def _require_images(images: torch.Tensor) -> None:
    kind = getattr(images, "dtype", type(images).__name__)
    shape = tuple(getattr(images, "shape", ()))
    fits = isinstance(images, torch.Tensor) and kind in (torch.uint8, torch.float32)
    if not fits or len(shape) != 4 or 0 in shape:
        raise BadInput(
            f"images are {kind} of shape {shape}: expected a tensor of uint8 [M, channels, H, W],"
            " or of float32 in [0, 1]"
        )


def _require_labels(labels: torch.Tensor | None, M: int, classes: list[str] | None) -> None:
    if labels is None:
        return
    kind = getattr(labels, "dtype", type(labels).__name__)
    shape = tuple(getattr(labels, "shape", ()))
    if kind != torch.int64 or shape != (M,):
        raise BadInput(f"labels are {kind} of shape {shape}: expected int64 of shape ({M},)")
    if classes is not None and int(labels.max()) >= len(classes):
        raise BadInput(
            f"labels go up to {int(labels.max())}, and there are {len(classes)} classes: expected"
            " a name for each label, from 0 on"
        )


class ImagesInMemory(Dataset):
    """Images held whole: uint8 [M, c, H, W], or float32 in [0, 1]; c channels, of RGB 3.

    labels: int64 [M], -1 for none, or None. classes: a name for each label, or None. source: a
    name, or the data set they were read from. Raises BadInput for anything else.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        classes: list[str] | None,
        source: str | Dataset,
    ):
        _require_images(images)
        _require_labels(labels, len(images), classes)
        self.images = images
        self.labels = labels
        self.classes = classes
        self.source = source
        self.size_hint = min(images.shape[-2:])
        self._copies: dict[torch.device, torch.Tensor] = {}
        # positions whose file could not be read and that hold the next readable image
        self.unreadable: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def path(self, i: int) -> str:
        return f"{self.source}[{i}]" if isinstance(self.source, str) else self.source.path(i)

    def name(self, i: int) -> str:
        return self.path(i) if isinstance(self.source, str) else name_of(self.source, i)

    def image(self, i: int, at_least: int | None = None) -> torch.Tensor:
        return self.images[i]

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.images[i], (-1 if self.labels is None else int(self.labels[i]))

    def images_on(self, device: torch.device | str) -> torch.Tensor:
        """The images on a device: moved there once, kept for all loaders."""
        device = torch.device(device)
        if self.images.device != device and device not in self._copies:
            self._copies[device] = self.images.to(device)
        return self._copies.get(device, self.images)

    def part(self, rows: torch.Tensor) -> "ImagesInMemory":
        """The images at these positions, as a data set of their own.

        The place of an unreadable image holds the next readable one of the part, as if the part had
        been read from files.
        """
        labels = None if self.labels is None else self.labels[rows]
        # the files, where there are any, so that this data set can be freed
        source = self if isinstance(self.source, str) else self.source
        part = ImagesInMemory(self.images[rows], labels, self.classes, Part(source, rows))
        part.of_set = set_of(self)
        unreadable = set(self.unreadable)
        part.unreadable = [i for i, row in enumerate(rows.tolist()) if row in unreadable]
        if part.unreadable and len(part.unreadable) < len(part):
            for i, stand_in in stand_ins(len(part), part.unreadable):
                part.images[i] = part.images[stand_in]
        return part


def stand_ins(M: int, unreadable: Sequence[int]) -> list[tuple[int, int]]:
    """The position of each unreadable image, and that of the next readable one.

    After the last image comes the first.
    """
    broken = set(unreadable)
    readable = [i for i in range(M) if i not in broken]
    return [(i, readable[bisect.bisect(readable, i) % len(readable)]) for i in unreadable]


class Part(Dataset):
    """Some images of a data set, in the order given: position i here is position rows[i] there."""

    def __init__(self, dataset: Dataset, rows: torch.Tensor):
        self.dataset = dataset
        self.rows = rows
        self.labels = None if dataset.labels is None else dataset.labels[rows]
        self.classes = dataset.classes
        self.size_hint = dataset.size_hint
        self.of_set = set_of(dataset)

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, i: int) -> str:
        return self.dataset.path(int(self.rows[i]))

    def name(self, i: int) -> str:
        return name_of(self.dataset, int(self.rows[i]))

    def side(self, i: int) -> int:
        return side_of(self.dataset, int(self.rows[i]))

    def stat(self, i: int) -> tuple[int, int]:
        return stat_of(self.dataset, int(self.rows[i]))

    def image(self, i: int, at_least: int | None = None):
        return self.dataset.image(int(self.rows[i]), at_least)

    def pixels(self, i: int, at_least: Callable[[int, int], int]):
        return self.dataset.pixels(int(self.rows[i]), at_least)

    def __getitem__(self, i: int):
        return self.dataset[int(self.rows[i])]


def holdout(dataset: Dataset, n: int, seed: int) -> tuple[Dataset, Dataset]:
    """(the rest, n images held out): drawn by the seed, each in the order of the data set.

    Raises BadInput.
    """
    M = len(dataset)
    if not 0 <= n < M:
        raise BadInput(
            f"cannot hold out {n} of {M} images: expected 0 to {M - 1}; choose a smaller number"
        )
    order = torch.randperm(M, generator=torch.Generator().manual_seed(seed))
    rest = order[n:].sort().values
    held_out = order[:n].sort().values
    if isinstance(dataset, ImagesInMemory):
        return dataset.part(rest), dataset.part(held_out)
    return Part(dataset, rest), Part(dataset, held_out)


def with_channels(dataset: Dataset, channels: int = 3, bits: int = 8) -> Dataset:
    """The data set with images of so many channels and bits; see `bands.fit` for what can be made.

    Raises BadInput where it has others. A few files are read for that.
    """
    if isinstance(dataset, ImagesInMemory):
        if is_rgb(channels, bits) and dataset.images.is_floating_point():
            raise BadInput(f"the images of {dataset.source} are floats: add --bits 16")
        if dataset.images.shape[1] == channels:
            return dataset
        try:
            images = fit(dataset.images, channels)
        except BadInput as error:
            raise BadInput(f"{dataset.path(0)}: {error}") from None
        return ImagesInMemory(images, dataset.labels, dataset.classes, dataset.source)
    if is_rgb(channels, bits) and (
        isinstance(dataset, ImageFiles) or not hasattr(dataset, "channels")
    ):
        return dataset  # any file is read as RGB
    if not hasattr(dataset, "channels"):
        raise BadInput(
            f"a {type(dataset).__name__} gives RGB of 8 bits alone: expected --channels 3 --bits 8,"
            " or moco_isl.data.ImagesInMemory"
        )
    dataset.channels, dataset.bits = channels, bits
    for i in _spread_over(dataset):
        try:
            dataset.image(i)
        except BadInput as error:
            raise BadInput(f"{dataset.path(i)}: {error}") from None
        except Exception:  # a broken file; the loader is the one that names it
            continue
    return dataset


def _spread_over(dataset: Dataset, look: int = 16) -> list[int]:
    """The positions of a few images spread over a data set."""
    return torch.linspace(0, len(dataset) - 1, min(look, len(dataset))).long().tolist()


def describe(**splits: Dataset) -> str:
    """Lines for the start of a run: images and classes of each split, and warnings."""
    lines = []
    for name, dataset in splits.items():
        if hasattr(dataset, "layout"):
            lines.append(f"=> {name}: {dataset.layout.summary}")
            lines += [f"=> {name}: {line}" for line in dataset.layout.parts]
            lines += [f"=> warning: {name}: {line}" for line in dataset.layout.warnings]
        else:
            classes = len(dataset.classes or [])
            lines.append(f"=> {name}: {len(dataset)} images, {classes} classes")
    return "\n".join(lines)


def set_of(dataset: Dataset) -> str:
    """The name of the row of the table that a data set was built by; folder for any other."""
    return getattr(dataset, "of_set", "folder")


def name_of(dataset: Dataset, i: int) -> str:
    """The name of image i; its path where the data set has no other names."""
    return getattr(dataset, "name", dataset.path)(i)


def side_of(dataset: Dataset, i: int) -> int:
    """The shorter side of image i, which is decoded where the data set has no quicker way."""
    if hasattr(dataset, "side"):
        return dataset.side(i)
    image = dataset.image(i)
    return min(image.shape[1:] if isinstance(image, torch.Tensor) else image.size)


def stat_of(dataset: Dataset, i: int) -> tuple[int, int]:
    """(size, time of change) of the file of image i; GONE where it has none."""
    if isinstance(dataset, ImagesInMemory):
        return GONE if isinstance(dataset.source, str) else stat_of(dataset.source, i)
    stat = getattr(dataset, "stat", None) or partial(ImageFiles.stat, dataset)
    try:
        return stat(i)
    except OSError:
        return GONE


def names_below(dataset: Dataset) -> list[str]:
    """The images' names in order, without the folder that they all lie in."""
    names = [name_of(dataset, i) for i in range(len(dataset))]
    root = os.path.commonprefix([min(names), max(names)]).rfind("/") + 1
    return [name[root:] for name in names]


def native_size(dataset: Dataset) -> int:
    """The side of views that fits the images: up to 64 pixels their own, else 224, as MoCo.

    Median of the shorter sides of a few images spread over the data set; only headers are read.
    Raises BadInput.
    """
    side = dataset.size_hint
    if side is None:
        looked_at = _spread_over(dataset)
        sides = sorted(filter(None, (_side(dataset, i) for i in looked_at)))
        if not sides:
            first = dataset.path(0)
            bands = "; a TIFF of several bands needs --channels" * first.lower().endswith(_TIFF)
            raise BadInput(
                f"none of {len(looked_at)} images could be read, {first} for one: expected image"
                f" files; check the folder{bands}"
            )
        side = sides[len(sides) // 2]
    return side if side <= SMALL else 224


def _side(dataset: Dataset, i: int) -> int | None:
    try:
        return side_of(dataset, i)
    except Exception:  # an unreadable image has no size; the loader is the one that names it
        return None


def load_into_memory(
    dataset: Dataset, threads: int = 4, limit_bytes: int = 8 << 30
) -> ImagesInMemory:
    """Decode a folder of small images of one size once, to be augmented on the device.

    The place of an unreadable image holds the next readable one and stands in .unreadable. Raises
    BadInput.
    """
    if isinstance(dataset, ImagesInMemory):
        return dataset
    M = len(dataset)
    images: list[torch.Tensor | None] = [None] * M
    with ThreadPoolExecutor(max(threads, 1)) as pool:  # PIL decodes outside the interpreter's lock
        for start in range(0, M, 4096):
            rows = range(start, min(start + 4096, M))
            for i, image in zip(rows, pool.map(partial(read_pixels, dataset), rows)):
                images[i] = image
            _check_size(dataset, images, rows, limit_bytes)
    unreadable = [i for i, image in enumerate(images) if image is None]
    if len(unreadable) == M:
        raise BadInput(
            f"none of {M} images could be read, {dataset.path(0)} for one: expected image files;"
            " check the folder"
        )
    for i, stand_in in stand_ins(M, unreadable):
        images[i] = images[stand_in]
    whole = ImagesInMemory(torch.stack(images), dataset.labels, dataset.classes, dataset)
    whole.unreadable = unreadable
    whole.of_set = set_of(dataset)
    return whole


def hold_small(dataset: Dataset, threads: int = 4) -> Dataset:
    """The data set held in memory if its images are small and of one size; else as it is."""
    if native_size(dataset) > SMALL:
        return dataset
    try:
        return load_into_memory(dataset, threads)
    except BadInput:
        # of several sizes, or too many: they stay in their files, and the loader names what is
        # broken
        return dataset


def read_pixels(dataset: Dataset, i: int) -> torch.Tensor | None:
    """Image i as uint8 [3, H, W], or float32 [c, H, W]; None where its file cannot be read."""
    try:
        image = dataset.image(i)
        return image if isinstance(image, torch.Tensor) else _to_tensor(image)
    except Exception:  # PIL answers a broken file with almost any exception
        return None


def _check_size(
    dataset: Dataset, images: list[torch.Tensor | None], rows: range, limit_bytes: int
) -> None:
    first = next((image for image in images if image is not None), None)
    if first is None:
        return
    for i in rows:
        if images[i] is not None and images[i].shape != first.shape:
            size = "x".join(map(str, images[i].shape[1:]))
            raise BadInput(
                "images to be held in memory must have one size: expected"
                f" {'x'.join(map(str, first.shape[1:]))}, {dataset.path(i)} has {size} (height x"
                " width); resize them or leave them in their files"
            )
    if first.nbytes * len(images) > limit_bytes:
        raise BadInput(
            f"{len(images)} images take {first.nbytes * len(images) / 2**30:.1f} GiB: expected at"
            f" most {limit_bytes / 2**30:.1f} GiB in memory; leave them in their files"
        )
