"""Data sets, augmentation, and batches of images."""

from moco_isl.data.augment import BatchAugmentation, BatchViews, DigitAugmentation
from moco_isl.data.cache import hold_cached
from moco_isl.data.datasets import (
    ImageFiles,
    ImagesInMemory,
    decode,
    describe,
    hold_small,
    holdout,
    load_into_memory,
    names_below,
    native_size,
    set_of,
    with_channels,
)
from moco_isl.data.functions import own_images
from moco_isl.data.loaders import eval_loader, train_loader, view_loader
from moco_isl.data.pixels import RGB, Pixels, measure, settled
from moco_isl.data.sets import (
    SETS,
    DataOptions,
    DataSet,
    build_dataset,
    check_options,
    find_set,
    has_val,
)
from moco_isl.data.transforms import get_augmentation, get_eval_transform, left_out

__all__ = [
    "RGB",
    "SETS",
    "BatchAugmentation",
    "BatchViews",
    "DataOptions",
    "DataSet",
    "DigitAugmentation",
    "ImageFiles",
    "ImagesInMemory",
    "Pixels",
    "build_dataset",
    "check_options",
    "decode",
    "describe",
    "eval_loader",
    "find_set",
    "get_augmentation",
    "get_eval_transform",
    "has_val",
    "hold_cached",
    "hold_small",
    "holdout",
    "left_out",
    "load_into_memory",
    "measure",
    "names_below",
    "native_size",
    "own_images",
    "set_of",
    "settled",
    "train_loader",
    "view_loader",
    "with_channels",
]
