"""From a backbone and images to features, their nearest others, a map and a file.

Letters: M images, C features of an image, k nearest others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from moco_isl import __version__, data, dist, files
from moco_isl.embed import maps, rows
from moco_isl.embed.backbone import Backbone, Layer
from moco_isl.embed.features import Features, check_out, require_new, write
from moco_isl.embed.images import SPLITS, Images
from moco_isl.encoders import AMP_TYPES, BACKBONE, require_side
from moco_isl.errors import BadInput, Interrupted
from moco_isl.ops.neighbors import topk
from moco_isl.options import opt
from moco_isl.run import checkpoint, ranks
from moco_isl.run.signals import Stop

Say = Callable[[str], None]


@dataclass(kw_only=True)
class EmbedOptions:
    """Which features are taken, and what is made of them."""

    file: str = opt(
        "",
        "file",
        metavar="FILE",
        help="a checkpoint of ours or MoCo's, a run's folder, weights of torchvision, timm, DINO or"
        " DINOv2 (.safetensors too), or a Hugging Face folder",
    )
    out: str = opt(
        "",
        metavar="FILE",
        help="the file to write: .parquet, .csv, .npz or .safetensors; none that is there is"
        " written over",
    )
    layer: str = opt(
        BACKBONE,
        choices=(BACKBONE, "output", "conv1", "conv2", "conv3", "conv4", "conv5"),
        help="output: what the head gives; conv1 ... conv5: stages of a ResNet, averaged over the"
        " image",
    )
    split: str = opt(
        "all",
        choices=SPLITS,
        help="of a DIR with train/ and val/; the names say which image is of which",
    )
    normalize: bool = opt(
        False, help="features of length 1; without it they are as the network gives them"
    )
    batch_size: int = opt(256, "-b", "--batch-size", low=1, help="images at a time on each rank")
    amp: str = opt("off", choices=tuple(AMP_TYPES), help="half precision in the network")
    nearest: int = opt(
        0,
        low=0,
        metavar="k",
        help="add each image's k most similar others, by the cosine of their features",
    )
    map: str | None = opt(
        None,
        metavar="FILE",
        help="draw all images as points, similar ones near each other, into a .png, .svg or .pdf",
    )
    map_by: str = opt("tsne", choices=tuple(maps.WAYS), help="umap needs the package umap-learn")
    map_points: str = opt(
        "auto",
        choices=maps.POINTS,
        help="dots, coloured by class where there are any; thumbnails, as many as fit; auto:"
        " thumbnails of up to 300 images",
    )
    map_images: int = opt(
        5000, low=maps.FEWEST, metavar="n", help="of more images a map shows n, drawn at random"
    )
    progress: str = opt("lines", choices=("lines", "bar"), rare=True, help="MoCo's lines, or a bar")


@dataclass(kw_only=True)
class Job:
    """What is to be done. image_size: 0 for that of the training. dataset: what the images are, by
    whose mean and std they are normalised where the file does not name its own. pixels: of the
    images; mean and std are measured where nobody says them.
    """

    backbone: Backbone
    images: Images
    pixels: data.Pixels
    dataset: str
    image_size: int
    options: EmbedOptions
    max_bad_images: int | None
    cache: str | None = None

    @property
    def side(self) -> int:
        first = next(iter(self.images.splits.values()))
        return self.image_size or self.backbone.trained_side() or data.native_size(first)

    @property
    def folder(self) -> Path | None:
        """Where the rows of a pass are kept until all of it is done."""
        out = Path(self.options.out)
        return out.with_name(f".{out.name}.parts") if self.options.out else None

    @property
    def statistics(self) -> str:
        return self.backbone.statistics(self.dataset)

    @property
    def _numbers(self) -> tuple:
        return self.pixels.mean, self.pixels.std

    def measure(self, say: Say) -> None:
        """Measure mean and std on the images where nobody says them. Raises BadInput."""
        first = next(iter(self.images.splits.values()))
        self.pixels = data.settled(self.pixels, self.statistics, first, say)

    def check(self) -> None:
        """Raise BadInput for what cannot be done, before anything is read or written."""
        options = self.options
        M = len(self.images)
        require_side(self.backbone.encoder, self.backbone.info["arch"], self.side)
        Layer(self.backbone, options.layer)
        if options.nearest >= M:
            raise BadInput(
                f"--nearest {options.nearest}, and there are {M} images: an image has"
                f" {M - 1} others"
            )
        if options.out:
            check_out(Path(options.out))
        if options.map:
            path = Path(options.map)
            maps.check_map(path, options.map_by, M)
            if not (self.folder and (self.folder / "map").exists()):  # else a cut off start drew it
                require_new(path, "--map")
            checkpoint.require_writable(path, "--map")
        if options.out:
            checkpoint.require_writable(options.out, "--out")

    def facts(self) -> dict:
        """What must be equal for a pass to go on with the rows of an earlier start."""
        return {
            "weights": rows.weights_of(self.backbone.encoder),
            "data": rows.digest(self.images),
            "layer": self.options.layer,
            "--image-size": self.side,
            "statistics": [self.statistics, self.pixels.bits, *self._numbers],
            "--normalize": self.options.normalize,
            "--batch-size": self.options.batch_size,
            "--amp": self.options.amp,
        }

    def about(self, left_out: list[str]) -> dict:
        """What is written beside the features."""
        info = self.backbone.info
        return {
            "moco_isl": __version__,
            "file": files.shown(str(info["path"])),
            "sha256": info["sha256"],
            "arch": info["arch"],
            "stem": info["stem"],
            "encoder": info["part"],
            "layer": self.options.layer,
            "normalized": self.options.normalize,
            "image_size": self.side,
            "amp": self.options.amp,
            "statistics": self.statistics if self.pixels.mean is None else list(self._numbers),
            "data": files.shown(" ".join(self.images.dirs)) or self.dataset,
            "left_out": left_out,
        }


def compute(
    job: Job,
    *,
    device: torch.device,
    workers: int,
    say: Say,
    progress: str = "lines",
    stop: Stop | None = None,
) -> Features:
    """Do it, and return the features, on the CPU of rank 0. All ranks call it.

    workers: processes of this rank that read images. say: prints a line, on the rank that has it.
    Raises Interrupted on all ranks where `stop` was asked.
    """
    options = job.options
    if job.cache is not None:
        ranks.together(lambda: _hold_cached(job, workers, say))
    job.measure(say if dist.is_main() else lambda line: None)
    reading = rows.Reading(
        view=data.get_eval_transform(job.statistics, job.side, job.pixels),
        batch_size=options.batch_size,
        workers=workers,
        device=device,
        normalize=options.normalize,
        amp=AMP_TYPES[options.amp],
    )
    kept = rows.Rows(job.folder, job.facts() if job.folder else {})
    M = len(job.images)
    done = False
    try:
        net = Layer(job.backbone, options.layer).to(device)
        rows.take(net, job.images, reading, kept, stop, rows.Progress(progress, M, say))
        found, readable = kept.collect(M, device)
        tick = stop.tick if stop else None
        finish = lambda: _finish(job, found, readable, device, say, tick)
        result = ranks.on_main(finish)
        done = True
        return result
    except Interrupted as error:
        if job.folder is None:
            raise
        where = files.named("", job.folder)
        text = f"what was done is kept in {where}; the same command goes on"
        again = Interrupted(text if dist.is_main() else "")
        again.agreed = getattr(error, "agreed", True)
        raise again from error
    finally:
        kept.close(done)


def _hold_cached(job: Job, workers: int, say: Say) -> None:
    """Replace images in files by decoded ones that the cache keeps (see `data.hold_cached`)."""
    tell = say if dist.is_main() else lambda line: None
    job.images.splits = {
        name: data.hold_cached(dataset, job.cache, workers, tell)
        for name, dataset in job.images.splits.items()
    }


def _finish(
    job: Job,
    found: torch.Tensor,
    readable: torch.Tensor,
    device: torch.device,
    say: Say,
    tick: Callable[[], None] | None,
) -> Features:
    """What is made of the rows [n, C] of the images that are `readable`, bool [M]; on rank 0."""
    options = job.options
    rows.check(job.images, found, readable, job.max_bad_images)
    place = readable.nonzero()[:, 0].tolist()  # of each row among the images
    names = job.images.names()
    labels = job.images.labels()
    result = Features(
        names=[names[i] for i in place],
        features=found,
        labels=None if labels is None else labels[readable],
        classes=job.images.classes,
        about=job.about([names[i] for i in (~readable).nonzero()[:, 0].tolist()]),
    )
    if options.nearest:
        k = min(options.nearest, len(found) - 1)
        if k < options.nearest:
            say(f"=> warning: --nearest {k}: so many other images can be read")
        result.similarity, result.nearest = nearest_others(found.to(device), k, tick)
    if options.map:
        if job.folder:
            (job.folder / "map").touch()
        _draw(job, result, place, say)
        if tick is not None:
            tick()
    if options.out:
        write(result, Path(options.out))
        n, C = found.shape
        say(f"=> wrote '{files.shown(options.out)}': {n:,} images, {C} features each")
    return result


def _draw(job: Job, found: Features, place: list[int], say: Say) -> None:
    options = job.options

    def picture(row: int):
        dataset, own = job.images.find(place[row])
        return dataset.image(own, 128)

    path = Path(options.map)
    maps.draw(found, path, options.map_by, options.map_points, options.map_images, picture)
    say(f"=> drew '{files.shown(path)}'")


@torch.no_grad()
def nearest_others(
    features: torch.Tensor, k: int, tick: Callable[[], None] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosine float32 [M, k], row int64 [M, k]) of each image's most similar others, on the CPU.

    features [M, C] of any length. The most similar comes first; of equals the first row.
    """
    unit = F.normalize(features.float(), dim=1)
    own = torch.arange(len(unit), device=unit.device)
    cosine, row = topk(unit, unit, k, exclude=own, tick=tick)
    return cosine.cpu(), row.cpu()
