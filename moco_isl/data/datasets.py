"""The data sets: folders of images, torchvision's small sets, the embedded digits.

All have len(), [i] -> (image, label), .labels (int64 [M] or None), .classes (list of names or
None), .path(i) (the image's name in messages) and .size_hint (side of the images in memory; None
for files). M is the number of images.
"""

import bisect
import io
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from moco_isl.data import folders
from moco_isl.errors import BadInput
from moco_isl.files import open_regular

try:
    # deprecated since 0.29 in favour of a package of its own
    from torchvision.io import decode_jpeg
except ImportError:
    decode_jpeg = None

NAMES = ("folder", "cifar10", "cifar100", "svhn", "digits")
SMALL = 64  # side up to which images are treated as CIFAR's are: neither enlarged nor blurred
_READ_WHOLE = 256 << 20  # bytes of a file up to which it is held in memory while it is decoded
_DIGITS_TRAIN = 1437  # of 1,797, in the order of the file: DIGITS.md says why


def decode_pixels(
    path: str, at_least: Callable[[int, int], int], unclear: Callable[[str], None] = warnings.warn
) -> tuple[torch.Tensor, tuple[int, int]]:
    """`decode` as uint8 [3, h, w], and the image's full size (H, W); at_least(W, H) says how small
    it may be decoded.

    A JPEG of its full size goes through torchvision where that still decodes: PIL's values in two
    thirds of the time.
    """
    with open_regular(path) as file:
        whole = os.fstat(file.fileno()).st_size <= _READ_WHOLE
        content = file.read() if whole else b""
        with Image.open(io.BytesIO(content) if whole else file, formats=folders.FORMATS) as image:
            W, H = image.size
            keep = max(1, at_least(W, H))
            if (
                decode_jpeg
                and whole
                and image.format == "JPEG"
                and image.mode == "RGB"
                and min(W, H) // keep < 2
            ):
                pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            else:
                pixels = pil_to_tensor(_to_rgb(image, keep, unclear))
    return pixels, (H, W)


def decode(
    path: str, at_least: int | None = None, unclear: Callable[[str], None] = warnings.warn
) -> Image.Image:
    """The image of a file as 8-bit RGB, whatever it was; orientation tags are left alone, as
    torchvision does.

    at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep that
    many pixels. unclear(why): called where the range of floats or 32-bit integers is a guess;
    `value_range` has the rule.
    Raises what PIL raises on a file it cannot read (OSError and others): also on one that is no
    regular file, of a format not in `folders.FORMATS`, or of more than 179 million pixels, PIL's
    bound against decompression bombs.
    """
    with open_regular(path) as file, Image.open(file, formats=folders.FORMATS) as image:
        return _to_rgb(image, at_least, unclear)


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
    """Grey images of 16 or 32 bits, or of floats, scaled to 0..255; PIL's convert would clip at
    255.

    Values outside of the range become its nearest end, NaN becomes black. Raises ValueError where
    no value is finite.
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
        low, high, why = value_range(values, (1, 255, 65535) if image.mode == "F" else (255, 65535))
        if why:
            unclear(
                f"{why}: {low:g}..{high:g} is taken as black to white; convert to 8 or 16 bits to"
                " choose yourself"
            )
    values = np.nan_to_num(values.clip(low, high), nan=low)
    return Image.fromarray(((values - low) * (255 / (high - low)) + 0.5).astype(np.uint8))


def value_range(values: np.ndarray, tops: Sequence[float]) -> tuple[float, float, str]:
    """(low, high, why that is no sure thing: '' where it is) of the values of an image whose scale
    is not known.

    The highest and the lowest 1 % of the values do not decide, nor do those that are not finite.
    Where the others lie between 0 and one of `tops`, the range is 0 to the first such top; else it
    is that of the others, from 0 where none of them is negative. What lies 5 % beyond a bound, as
    sharpening leaves it, counts as within. It is a sure thing where all finite values lie between 0
    and the top, and some above an eighth of it, or all are 0. Raises ValueError where no value is
    finite.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        raise ValueError("no value of the image is finite")
    few = 1 + (len(values) - 1) // 100  # so many at an end do not count: of the smallest image one
    last = max(len(values) - 1 - few, 0)
    first = min(few, last)
    ordered = np.partition(values, (first, last))
    low = ordered[first]
    high = ordered[last]
    least = values.min()
    most = values.max()
    top = next((top for top in tops if high <= 1.05 * top), None)
    if top is not None and low >= -0.05 * max(high, 0):
        dark = 0 < most < top / 8  # black on all of that range: of 12 bits, perhaps
        sure = least >= -0.05 * top and most <= 1.05 * top and not dark
        return 0.0, float(top), "" if sure else f"values reach from {least:g} to {most:g}"
    low = min(low, 0.0)
    return (
        float(low),
        float(high if high > low else low + 1),
        f"values reach from {least:g} to {most:g}",
    )


class ImageFiles(Dataset):
    """Images that stay in their files, decoded when asked for."""

    size_hint = None

    def __init__(
        self,
        paths: Sequence[str],
        labels: torch.Tensor | None,
        classes: list[str] | None,
        folder: str = "",
        layout: folders.Layout | None = None,
    ):
        # one block: of a list of a million strings every worker would soon have its own copy
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = labels
        self.classes = classes
        self.folder = folder  # in which all of them lie
        self.layout = layout or folders.Layout(f"{len(paths)} images, {len(classes or ())} classes")
        self._said_unclear = torch.zeros(1, dtype=torch.bool).share_memory_()  # by the workers too

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, i: int) -> str:
        return os.fsdecode(self._paths[i])

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        return decode(self.path(i), at_least, partial(self._unclear, i))

    def pixels(
        self, i: int, at_least: Callable[[int, int], int]
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        return decode_pixels(self.path(i), at_least, partial(self._unclear, i))

    def _unclear(self, i: int, why: str) -> None:
        """Say, once a data set, of what range the values of an image are."""
        if not self._said_unclear:
            self._said_unclear.fill_(True)
            warnings.warn(f"{self.path(i)!r}: {why} (there may be more such images)", stacklevel=2)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.image(i), (-1 if self.labels is None else int(self.labels[i]))


class ImagesInMemory(Dataset):
    """Images held whole: uint8 [M, 3, H, W].

    source: a name, or the data set they were read from.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        classes: list[str] | None,
        source: str | Dataset,
    ):
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
        # of the files: this data set need not stay
        source = self if isinstance(self.source, str) else self.source
        part = ImagesInMemory(self.images[rows], labels, self.classes, Part(source, rows))
        unreadable = set(self.unreadable)
        part.unreadable = [i for i, row in enumerate(rows.tolist()) if row in unreadable]
        if part.unreadable and len(part.unreadable) < len(part):
            for i, stand_in in stand_ins(len(part), part.unreadable):
                part.images[i] = part.images[stand_in]
        return part


def stand_ins(M: int, unreadable: Sequence[int]) -> list[tuple[int, int]]:
    """(position of an unreadable image, position of the next readable one); after the last image
    comes the first.
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

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, i: int) -> str:
        return self.dataset.path(int(self.rows[i]))

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


def build_dataset(
    name: str, root: str | os.PathLike | None = None, split: str = "train", download: bool = False
) -> Dataset:
    """The data set of that name: folder, cifar10, cifar100, svhn or digits; split train or val.

    folder: root/train and root/val with a folder a class, as torchvision's ImageFolder reads them;
    without root/train, root itself is the training split. Images in no class folder, in one alone,
    or beside the class folders have no labels; `describe` says what was found and what was skipped.
    Raises BadInput.
    """
    if name not in NAMES:
        raise BadInput(f"no data set named {name!r}: expected one of {', '.join(NAMES)}")
    if split not in ("train", "val"):
        raise BadInput(f"no split named {split!r}: expected train or val")
    if name == "digits":
        return _digits(split)
    if root is None:
        raise BadInput(
            f"data set {name} needs the folder it lies in: give DIR (or --dataset digits, which"
            " needs none)"
        )
    if name == "folder":
        return _folder(Path(root), split)
    return _torchvision(name, Path(root), split, download)


def _digits(split: str) -> ImagesInMemory:
    with np.load(Path(__file__).parent / "digits.npz") as file:
        images = torch.from_numpy(file["images"])
        labels = torch.from_numpy(file["labels"]).long()
    here = slice(0, _DIGITS_TRAIN) if split == "train" else slice(_DIGITS_TRAIN, None)
    grey = images[here, None].float() * (255 / 16)  # [M, 1, 8, 8]
    grey = (
        F.interpolate(grey, size=(16, 16), mode="bilinear", align_corners=False)
        .round()
        .to(torch.uint8)
    )
    return ImagesInMemory(
        grey.repeat(1, 3, 1, 1), labels[here], [str(d) for d in range(10)], f"digits/{split}"
    )


def _torchvision(name: str, root: Path, split: str, download: bool) -> ImagesInMemory:
    from torchvision import datasets

    train = split == "train"
    try:
        if name == "svhn":
            source = datasets.SVHN(str(root), split="train" if train else "test", download=download)
            images = source.data
            labels = source.labels
            classes = [str(d) for d in range(10)]
        else:
            source = getattr(datasets, name.upper())(str(root), train=train, download=download)
            images = source.data.transpose(0, 3, 1, 2)
            labels = source.targets
            classes = list(source.classes)
    except ImportError as error:
        raise BadInput(
            f"{name} is stored as Matlab files and needs scipy ({error}): pip install scipy"
        ) from None
    except (RuntimeError, OSError) as error:
        if download:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise BadInput(
                f"could not download {name} to {root}: {reason}; expected a way to the network and"
                " a folder that can be written; or copy the files there"
            ) from None
        raise BadInput(
            f"{name} is not in {root}, or not whole: expected torchvision's files; add --download"
        ) from None
    return ImagesInMemory(
        torch.from_numpy(np.ascontiguousarray(images)),
        torch.tensor(labels).long(),
        classes,
        f"{name}/{split}",
    )


def _folder(root: Path, split: str) -> ImageFiles:
    expected = "expected a folder with train/ (and val/), or with images"
    try:
        is_folder = stat.S_ISDIR(os.stat(root).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"no such folder: {root}; {expected}") from None
    except OSError as error:  # no permission above it, or a name that is too long
        raise BadInput(f"cannot read {root}: {error.strerror}; {expected}") from None
    if not is_folder:
        raise BadInput(f"not a folder: {root}; {expected}")
    train, val = root / "train", root / "val"
    if os.path.isdir(root / split):
        # val is numbered by the classes of train: with a class missing there, its own numbering
        # would shift all labels
        names = (
            folders.class_names(str(train)) or None
            if split == "val" and os.path.isdir(train)
            else None
        )
        images = _image_files(root / split, names)
        if split == "train" and not os.path.isdir(val):
            images.layout.warnings += _not_read(root)
        if split == "val" and os.path.isdir(train) and os.path.samefile(train, val):
            images.layout.warnings.append(
                "val/ is a link to train/, so each image is judged by its own training image"
            )
        return images
    if split == "val":
        found = f", and it holds {folders.some(others)}" if (others := _other_splits(root)) else ""
        raise BadInput(
            f"no validation images: {val} is missing{found}; expected a folder a class as in"
            " train/; add it or do without validation"
        )
    if os.path.isdir(val):
        raise BadInput(
            f"no training images: {root} has val/ but not train/; expected both; add {train} or"
            f" give {val} itself"
        )
    return _image_files(root, None)


def _not_read(root: Path) -> list[str]:
    """What lies beside train/, where there is no val/, that somebody may expect to be read; in
    words.
    """
    splits, said = _other_splits(root), []
    if splits:
        said.append(
            f"{folders.some(splits)} beside train/ in {str(root)!r} is not read: a val split is"
            " named val"
        )
    others = [
        name
        for name in sorted(os.listdir(root))
        if name not in ("train", *splits) and not name.startswith(".")
    ]
    if others := [
        name for name in others if os.path.isdir(root / name) and folders.has_image(root / name)
    ]:
        said.append(
            f"{folders.some(others)} beside train/ in {str(root)!r} hold images that are not read:"
            " expected all training images in train/; if train is one of the classes, move all of"
            " them into a folder"
        )
    return said


def _other_splits(root: Path) -> list[str]:
    """The folders beside train/ and val/ that are named as splits often are."""
    names = (
        name
        for name in sorted(os.listdir(root))
        if name not in ("train", "val") and folders.is_split_name(name)
    )
    return [name for name in names if os.path.isdir(root / name)]


def _image_files(folder: Path, classes: list[str] | None) -> ImageFiles:
    """All images of a folder, at any depth, labelled by its sub-folder that they are in.

    Without labels where they lie in no sub-folder, some lie beside the sub-folders, or all in the
    same one: that tells nothing apart. classes: those that the labels count, if not the
    sub-folders.
    """
    found = folders.find_images(str(folder))
    paths, labels = found.paths(), found.labels()
    if not paths:
        raise BadInput(
            f"no images in {folder}: expected files ending in"
            f" {', '.join(e[1:] for e in folders.ENDINGS)}, in a folder a class or directly; check"
            f" the path{folders.skipped_words(found.skipped)}"
        )
    names = classes or found.classes
    if extra := sorted({found.classes[label] for label in labels if label >= 0} - set(names)):
        raise BadInput(
            f"{folder} has a class that train lacks: {extra[0]!r}; expected a subset of the"
            f" {len(names)} classes of train; move it away"
        )
    layout = folders.layout_of(found, classes)
    if layout.unlabelled:
        return ImageFiles(paths, None, None, str(folder), layout)
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number[found.classes[label]] for label in labels])
    return ImageFiles(paths, labels, names, str(folder), layout)


def describe(**splits: Dataset) -> str:
    """What each split holds, in lines for the start of a run: images, classes, what was skipped,
    what looks wrong.
    """
    lines = []
    for name, dataset in splits.items():
        if isinstance(dataset, ImageFiles):
            lines.append(f"=> {name}: {dataset.layout.summary}")
            lines += [f"=> warning: {name}: {line}" for line in dataset.layout.warnings]
        else:
            lines.append(f"=> {name}: {len(dataset)} images, {len(dataset.classes)} classes")
    return "\n".join(lines)


def names_below(dataset: Dataset) -> list[str]:
    """The images' names in order, without the folder that they all lie in."""
    names = [dataset.path(i) for i in range(len(dataset))]
    root = len(os.path.commonprefix([min(names), max(names)]))
    return [name[root:] for name in names]


def native_size(dataset: Dataset, look: int = 16) -> int:
    """The side of views that fits the images: small ones, up to 64 pixels, keep theirs; for larger
    ones 224, as MoCo.

    Median of the shorter sides of a few images spread over the data set; only headers are read.
    Raises BadInput.
    """
    side = dataset.size_hint
    if side is None:
        looked_at = torch.linspace(0, len(dataset) - 1, min(look, len(dataset))).long().tolist()
        sides = sorted(filter(None, (_side(dataset.path(i)) for i in looked_at)))
        if not sides:
            raise BadInput(
                f"none of {len(looked_at)} images could be read, {dataset.path(0)} for one: "
                "expected image files; check the folder"
            )
        side = sides[len(sides) // 2]
    return side if side <= SMALL else 224


def _side(path: str) -> int | None:
    try:
        with open_regular(path) as file, Image.open(file, formats=folders.FORMATS) as image:
            return min(image.size)
    except Exception:  # an unreadable image has no size; the loader is the one that names it
        return None


def load_into_memory(
    dataset: Dataset, threads: int = 4, limit_bytes: int = 8 << 30
) -> ImagesInMemory:
    """Decode a folder of small images, all of one size, once, so that they can be augmented on the
    device.

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
    return whole


def hold_small(dataset: Dataset, threads: int = 4) -> Dataset:
    """The data set held in memory where its images are small ones of one size, as CIFAR's;
    otherwise as it is.
    """
    if native_size(dataset) > SMALL:
        return dataset
    try:
        return load_into_memory(dataset, threads)
    except BadInput:
        # of several sizes, or too many: they stay in their files, and the loader names what is
        # broken
        return dataset


def read_pixels(dataset: Dataset, i: int) -> torch.Tensor | None:
    """Image i as uint8 [3, H, W]; None where its file cannot be read."""
    try:
        return pil_to_tensor(dataset.image(i))
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
    if first.numel() * len(images) > limit_bytes:
        raise BadInput(
            f"{len(images)} images take {first.numel() * len(images) / 2**30:.1f} GiB: expected at"
            f" most {limit_bytes / 2**30:.1f} GiB in memory; leave them in their files"
        )
