"""Features out: those of all images of a folder, or of any other source, with their names.

    python -m moco_isl.embed FILE DIR --out features.parquet

or `moco_isl.embed(FILE, DIR, out="features.parquet")`: this module can be called.
"""

import os
import sys
import types
import warnings

import torch

from moco_isl import dist
from moco_isl.embed.backbone import Backbone, load_backbone
from moco_isl.embed.features import Features
from moco_isl.embed.images import images_of
from moco_isl.embed.job import EmbedOptions, Job, compute
from moco_isl.errors import BadInput
from moco_isl.options import check_values

__all__ = ["Backbone", "Features", "embed", "load_backbone"]


def embed(
    backbone: str | os.PathLike | Backbone,
    images,
    out: str | os.PathLike | None = None,
    *,
    layer: str = EmbedOptions.layer,
    normalize: bool = EmbedOptions.normalize,
    nearest: int = EmbedOptions.nearest,
    map: str | os.PathLike | None = None,
    map_by: str = EmbedOptions.map_by,
    map_points: str = EmbedOptions.map_points,
    map_images: int = EmbedOptions.map_images,
    split: str = EmbedOptions.split,
    dataset: str = "folder",
    image_size: int = 0,
    batch_size: int = EmbedOptions.batch_size,
    workers: int = 4,
    device: str | torch.device = "auto",
    amp: str = EmbedOptions.amp,
    max_bad_images: int | None = None,
    progress: str = "off",
) -> Features | None:
    """The features of images, and all that `python -m moco_isl.embed` makes of them.

    backbone: a file (see `load_backbone`), or what `load_backbone` gives. images: a folder; a list
    of paths or PIL images; a uint8 tensor [M, c, H, W]; a data set, whose items are images or
    begin with one; None with dataset="digits", which is embedded. out: the file to write, see
    `embed.features`; a call that was cut off goes on where it was. The others are the flags of the
    command; max_bad_images None is any number. progress: off, lines or bar.
    Where there are ranks, all of them call this; rank 0 gets the features, the others None. Raises
    BadInput, and RunFailed where features are not finite or a file cannot be written.
    """
    options = EmbedOptions(
        out="" if out is None else os.fspath(out),
        layer=layer,
        normalize=normalize,
        nearest=nearest,
        map=None if map is None else os.fspath(map),
        map_by=map_by,
        map_points=map_points,
        map_images=map_images,
        split=split,
        batch_size=batch_size,
        amp=amp,
        progress="lines" if progress == "off" else progress,
    )
    check_values(options)
    if isinstance(backbone, str | os.PathLike):
        backbone = load_backbone(backbone, image_size=image_size or None)
    if not isinstance(backbone, Backbone):
        raise BadInput(
            f"backbone is a {type(backbone).__name__}: expected a file, or what"
            " moco_isl.load_backbone gives"
        )
    pixels = backbone.pixels()
    job = Job(
        backbone=backbone,
        images=images_of(images, split, dataset, pixels),
        pixels=pixels,
        dataset=dataset,
        image_size=image_size,
        options=options,
        max_bad_images=max_bad_images,
    )
    job.check()
    where = {parameter.device for parameter in backbone.parameters()}
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = compute(
            job,
            device=torch.device(device),
            workers=min(workers, os.cpu_count() or 1),
            say=lambda line: _warn(line, progress),
            progress=progress,
        )
    finally:
        backbone.to(*where)
    return found if dist.is_main() else None


def _warn(line: str, progress: str) -> None:
    """Warnings as Python has them; other lines only where progress is shown."""
    head, is_warning, text = line.partition("=> warning: ")
    if is_warning and not head:
        warnings.warn(text, stacklevel=2)
    elif progress != "off":
        print(line, flush=True)


class _Callable(types.ModuleType):
    __call__ = staticmethod(embed)


sys.modules[__name__].__class__ = _Callable
