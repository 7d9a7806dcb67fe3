"""The data sets by name: ONE table, a row each, and how each is opened.

A data set of your own is a row in a module of yours, given as --dataset my.module:row:

    def read(root, split, download):        # split: train or val
        return ImagesInMemory(images, labels, classes, f"mine/{split}")      # uint8 [M, c, S, S]

    row = DataSet(read, size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), needs_dir=False)

or a function that returns a torch Dataset, my.module:function: see `data.functions`.
M: images, c: channels, S: their side in pixels.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from moco_isl import files
from moco_isl.data import folders, functions, sources
from moco_isl.data.augment import DigitAugmentation
from moco_isl.data.datasets import ImagesInMemory, is_rgb, with_channels
from moco_isl.errors import BadInput, first_line
from moco_isl.options import listed, load_object, opt

_DIGITS_TRAIN = 1437  # of 1,797, in the order of the file: DIGITS.md says why


@dataclass(frozen=True)
class DataSet:
    """A row of the table: all that depends on which data set it is.

    open: (root, split, download) -> the images as `data.datasets` has them, None where the split is
    not there; root is None where no folder is needed, and a list with `several`. size: side of the
    views in pixels. mean, std: one number a channel, of values in [0, 1]. flip: whether a mirrored
    image still means the same. needs_dir: DIR has to be given. downloads: --download works.
    several: DIR may be several. in_files: images stay in their files, and --cache may keep them
    decoded. has_val: (root) -> whether there is a val split. augmentation: (mean, std, size=) -> an
    augmentation of its own, in place of MoCo's.
    """

    open: Callable[[Path | list[str] | None, str, bool], Dataset | None]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True
    needs_dir: bool = True
    downloads: bool = False
    several: bool = False
    in_files: bool = False
    has_val: Callable[[Path | list[str] | None], bool] = lambda root: True
    augmentation: Callable | None = None

    def __post_init__(self) -> None:
        """Raise BadInput for numbers with which no image can be normalised."""
        fit = len(self.mean) == len(self.std) > 0 and all(0 < x for x in self.std)
        if not fit or self.size < 1:
            raise BadInput(
                f"a data set has size {self.size}, mean {self.mean} and std {self.std}: expected a"
                " size of 1 or more, and a number for each channel, those of std above 0"
            )


def find_set(name: str) -> DataSet:
    """The row of that name, or that of what `my.module:name` names. Raises BadInput."""
    if name in SETS:
        return SETS[name]
    if ":" not in name:
        raise BadInput(f"no data set named {name!r}: expected one of {', '.join(SETS)}")
    row = load_object(name, "--dataset")
    if isinstance(row, DataSet):
        return row
    if not callable(row):
        raise BadInput(
            f"--dataset {name} is a {type(row).__name__}: expected a row, moco_isl.data.DataSet, or"
            " a function that returns a torch Dataset"
        )
    return _of_function(row, name)


def _of_function(function: Callable, name: str) -> DataSet:
    """The row of a function, see `data.functions`: its images are treated as those of a folder."""

    def open_it(root: Path | None, split: str, download: bool) -> Dataset | None:
        known = None
        if split == "val":
            known = getattr(functions.open_function(function, name, root, "train"), "classes", None)
        return functions.open_function(function, name, root, split, known)

    return replace(
        SETS["folder"],
        open=open_it,
        needs_dir=functions.takes_root(function, name),
        several=False,
        in_files=False,
        has_val=lambda root: functions.has_split(function, name, root, "val"),
    )


def build_dataset(
    name: str,
    root: str | os.PathLike | Sequence[str] | None = None,
    split: str = "train",
    download: bool = False,
    channels: int = 3,
    bits: int = 8,
) -> Dataset:
    """The data set of that name, see `find_set`; root: DIR, or several; split: train or val.

    channels, bits: of its images; 3 of 8 are RGB as MoCo's, see `with_channels`.

    folder: what `data.sources` knows: root/train and root/val with a folder a class, as
    torchvision's ImageFolder reads them; without root/train, root itself is the training split.
    Images in no class folder, in one alone, or beside the class folders have no labels; `describe`
    says what was found and what was skipped. Raises BadInput.
    """
    row = find_set(name)
    if split not in ("train", "val"):
        raise BadInput(f"no split named {split!r}: expected train or val")
    with folders.arrays_too(not is_rgb(channels, bits)):
        dataset = row.open(_root(row, name, root), split, download)
    if dataset is None:
        raise BadInput(
            f"data set {name} has no {split} split: expected one; do without"
            f" {'validation' if split == 'val' else 'it'}"
        )
    if missing := [part for part in functions.PARTS if not hasattr(dataset, part)]:
        raise BadInput(
            f"data set {name} opens as a {type(dataset).__name__} without {missing[0]}: expected"
            " moco_isl.data.ImagesInMemory, or what has the same parts"
        )
    dataset = with_channels(dataset, channels, bits)
    dataset.of_set = name
    return dataset


def has_val(name: str, root: str | os.PathLike | Sequence[str] | None = None) -> bool:
    """Whether a data set has a val split, as far as can be told without opening it.

    Raises BadInput.
    """
    row = find_set(name)
    return row.has_val(_root(row, name, root))


def _root(row: DataSet, name: str, root) -> Path | list[str] | None:
    """DIR as the row's functions take it. Raises BadInput."""
    dirs = listed(root)
    if not row.needs_dir:
        return None
    if not dirs:
        raise BadInput(
            f"data set {name} needs the folder it lies in: give DIR (or --dataset digits, which"
            " needs none)"
        )
    if row.several:
        return dirs
    if len(dirs) > 1:
        raise BadInput(
            f"data set {name} lies in one folder, and DIR names {len(dirs)}: expected one; leave"
            " the others out"
        )
    return Path(dirs[0])


def _digits(root: None, split: str, download: bool) -> ImagesInMemory:
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


def _read_cifar(name: str, root: Path, split: str, download: bool) -> tuple:
    from torchvision import datasets

    source = getattr(datasets, name.upper())(str(root), train=split == "train", download=download)
    return source.data.transpose(0, 3, 1, 2), source.targets, list(source.classes)


def _read_svhn(name: str, root: Path, split: str, download: bool) -> tuple:
    from torchvision import datasets

    of_torchvision = "train" if split == "train" else "test"
    source = datasets.SVHN(str(root), split=of_torchvision, download=download)
    return source.data, source.labels, [str(d) for d in range(10)]


def _torchvision(name: str, read: Callable) -> Callable:
    """What opens a data set of torchvision.

    read(name, root, split, download) gives images uint8 [M, 3, S, S], labels [M] and the classes'
    names.
    """

    def open_it(root: Path, split: str, download: bool) -> ImagesInMemory:
        try:
            images, labels, classes = read(name, root, split, download)
        except ImportError as error:
            raise BadInput(
                f"{name} is stored as Matlab files and needs scipy ({error}): pip install scipy"
            ) from None
        except (RuntimeError, OSError) as error:
            if not download:
                raise BadInput(
                    f"{name} is not in {root}, or not whole: expected torchvision's files; add"
                    " --download"
                ) from None
            raise BadInput(
                f"could not download {name} to {root}: {first_line(error)}; expected a way to the"
                " network and a folder that can be written; or copy the files there"
            ) from None
        images = torch.from_numpy(np.ascontiguousarray(images))
        return ImagesInMemory(images, torch.tensor(labels).long(), classes, f"{name}/{split}")

    return open_it


SETS = {
    "folder": DataSet(
        lambda dirs, split, download: sources.open_images(dirs, split),
        size=224,
        mean=(0.485, 0.456, 0.406),  # of ImageNet
        std=(0.229, 0.224, 0.225),
        several=True,
        in_files=True,
        has_val=sources.has_val,
    ),
    "cifar10": DataSet(
        _torchvision("cifar10", _read_cifar),
        size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        downloads=True,
    ),
    "cifar100": DataSet(
        _torchvision("cifar100", _read_cifar),
        size=32,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        downloads=True,
    ),
    "svhn": DataSet(
        _torchvision("svhn", _read_svhn),
        size=32,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        flip=False,
        downloads=True,
    ),
    "digits": DataSet(
        _digits,
        size=16,
        mean=(0.305, 0.305, 0.305),
        std=(0.319, 0.319, 0.319),
        flip=False,
        needs_dir=False,
        augmentation=DigitAugmentation,
    ),
}


@dataclass(kw_only=True)
class DataOptions:
    """Which images, and how they are read."""

    data: str | list[str] | None = opt(
        None,
        "data",
        metavar="DIR",
        several="*",
        may_change=True,
        help="path to dataset: DIR/train and DIR/val with a folder a class; a flat folder of images"
        " (no labels) works for pretraining; or a list of files (.txt, .csv), tar shards (.tar), a"
        " Hugging Face data set (.parquet, .arrow, save_to_disk), or several of these; for cifar10,"
        " cifar100, svhn: where torchvision keeps them",
    )
    dataset: str = opt(
        "folder",
        choices=SETS,
        plugin=True,
        metavar="NAME",
        help=f"what DIR holds: {', '.join(SETS)} (embedded, needs no DIR), or one of your own as"
        " my.module:row, or my.module:function that returns a torch Dataset",
    )
    download: bool = opt(
        False,
        may_change=True,
        help="let torchvision fetch cifar10, cifar100 or svhn into DIR; needed once",
    )
    workers: int = opt(
        32,
        "-j",
        "--workers",
        low=0,
        may_change=True,
        help="number of data loading workers, at most one a core",
    )
    image_size: int = opt(
        0,
        low=0,
        high=4096,
        metavar="S",
        help="side of a crop in pixels (224 for photos, the native side for sets of small images)",
    )
    channels: int | None = opt(
        None,
        low=1,
        high=1000,
        metavar="n",
        help="channels of the images (3, RGB): 1 for grey, more for bands of a TIFF or an .npy. Any"
        " but 3 keep all their bits; their mean and std are measured once. Of the colour jitter"
        " brightness and contrast remain",
    )
    bits: int | None = opt(
        None,
        low=8,
        high=16,
        metavar="n",
        rare=True,
        help="16 keeps all bits of images of 3 channels (8)",
    )
    mean: list[float] | None = opt(
        None,
        several="+",
        low=0,
        high=1,
        rare=True,
        help="mean of each channel, of values in 0 to 1 (the data set's; measured where it has none"
        " for these channels or bits)",
    )
    std: list[float] | None = opt(
        None, several="+", low=0, low_open=True, high=1, rare=True, help="standard deviation alike"
    )
    cache: str | None = opt(
        None,
        metavar="DIR",
        may_change=True,
        rare=True,
        help="keep small images of one size (up to 64 pixels) decoded in this folder, which many"
        " runs may share: later runs map them, and decode anew what has changed since. Larger ones"
        " stay in their files",
    )
    max_bad_images: int = opt(
        0,
        low=0,
        metavar="n",
        may_change=True,
        rare=True,
        help="go on past this many unreadable images, each named; raise it for a crawl of the web",
    )


def check_options(given: DataOptions) -> None:
    """Raise BadInput where flags of the data set do not go together, or name no folder."""
    row = find_set(given.dataset)
    dirs = listed(given.data)
    for flag, path in (*(("DIR", path) for path in dirs), ("--cache", given.cache)):
        if path == "":
            raise BadInput(
                f"{flag} is an empty text: expected a folder; '.' is the one this is started in"
            )
    for path in dirs:
        files.kind(path, "DIR")  # raises where the system does not let it be looked at
    _check_pixels(given)
    if given.cache is not None and not row.in_files:
        raise BadInput(
            f"--cache keeps images of files decoded, and those of --dataset {given.dataset} are"
            " not read from files: leave it off"
        )
    if given.cache is not None:
        # a full cache is only read
        files.require_folder(given.cache, "--cache", may_be_read_only=True)
    if given.data is not None and not row.needs_dir:
        raise BadInput(
            f"two data sets are named: --dataset {given.dataset} needs no DIR, and DIR is"
            f" '{' '.join(dirs)}': drop one of them"
        )
    if given.data is None and row.needs_dir:
        raise BadInput(
            f"no data: --dataset {given.dataset} needs a DIR; for a first try without any, use"
            " --dataset digits"
        )
    if given.download and not row.downloads:
        known = [name for name, row in SETS.items() if row.downloads]
        raise BadInput(
            f"--download works for {', '.join(known[:-1])} and {known[-1]}, not for --dataset"
            f" {given.dataset}"
        )


def _check_pixels(given: DataOptions) -> None:
    """Raise BadInput where the flags of channels, bits, mean and std do not go together."""
    if given.bits not in (None, 8, 16):
        raise BadInput(f"--bits {given.bits}: expected 8 or 16")
    if (given.mean is None) != (given.std is None):
        there, missing = ("std", "mean") if given.mean is None else ("mean", "std")
        raise BadInput(f"--{there} goes with --{missing}: give both, or neither to have them found")
    for flag, numbers in (("--mean", given.mean), ("--std", given.std)):
        wanted = given.channels or 3
        if numbers is not None and len(numbers) != wanted:
            raise BadInput(
                f"{flag} has {len(numbers)} numbers, and --channels is {wanted}: give one a channel"
            )
