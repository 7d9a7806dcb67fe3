"""The command `python -m moco_isl.embed`: its flags, and what each rank does."""

import argparse
from dataclasses import dataclass
from functools import cached_property, partial

from moco_isl import data
from moco_isl.embed.backbone import Backbone, load_backbone
from moco_isl.embed.images import open_images
from moco_isl.embed.job import EmbedOptions, Job, compute
from moco_isl.run import devices, exits, flags, ranks
from moco_isl.run.backbone import EncoderOptions, describe
from moco_isl.run.signals import Stop

ABOUT = """Write the features of all images of a folder, or of any other source.

  python -m moco_isl.embed runs/x/checkpoint_last.pth.tar DIR --out features.parquet
  ... --nearest 5          add each image's most similar others
  ... --map map.png        draw all of them, similar ones near each other

The same command goes on where it was stopped or killed."""
GROUPS: flags.Groups = {
    "features": (EmbedOptions,),
    "data set": (data.DataOptions,),
    "encoder": (EncoderOptions,),
    "devices and processes": (ranks.DistributedOptions,),
}


def get_parser() -> flags.Parser:
    usage = "%(prog)s FILE [DIR] --out FILE [flags]"
    parser = flags.Parser("python -m moco_isl.embed", ABOUT, usage=usage)
    parser.add_groups(GROUPS)
    return parser


def main(argv: list[str] | None = None, stop=None) -> int:
    """Run with flags argv; returns the exit code."""
    return exits.exit_code(run, argv, stop)


def run(argv: list[str] | None, stop) -> None:
    args = get_parser().parse_args(argv)
    flags.check_ranges(args, *flags.kinds_of(GROUPS))
    flags.check(bool(args.file), "no encoder: name the FILE it is in, and the DIR of the images")
    flags.check(bool(args.out), "no --out: name the file to write, such as --out features.parquet")
    data.check_options(flags.take(data.DataOptions, args))
    asked = Asked(args)
    asked.job.check()
    ranks.launch(worker, args, stop, asked)


@dataclass
class Asked:
    """What the flags name, read once in a process; a copy in another one reads for itself."""

    flags: argparse.Namespace

    def __getstate__(self) -> dict:
        return {"flags": self.flags}

    @cached_property
    def job(self) -> Job:
        given = self.flags
        backbone = self._backbone()
        pixels = backbone.pixels(flags.take(data.Pixels, given))
        return Job(
            backbone=backbone,
            images=open_images(given.dataset, given.data, given.split, pixels, given.download),
            pixels=pixels,
            dataset=given.dataset,
            image_size=given.image_size,
            options=flags.take(EmbedOptions, given),
            max_bad_images=given.max_bad_images,
            cache=given.cache,
        )

    def _backbone(self) -> Backbone:
        given = self.flags
        of = {"arch": given.arch, "stem": given.stem, "key": given.key}
        return load_backbone(given.file, image_size=given.image_size or None, **of)


def worker(args, stop, asked: Asked) -> None:
    """Run one rank."""
    device = devices.resolve_device(args)
    job = asked.job
    ranks.say(data.describe(**job.images.splits))
    ranks.say(describe(job.backbone.info))
    by = job.statistics if job.pixels.mean is None else "the file or the flags say"
    ranks.say(f"=> layer {args.layer}, views of {job.side} pixels, normalised as {by}")
    devices.warn_of_slow_amp(args.amp, device, trains=False)
    workers = devices.usable_workers(args.workers, ranks.processes_here(args))
    with Stop(stop) as asked_to_stop:
        compute(
            job,
            device=device,
            workers=workers,
            say=partial(print, flush=True),
            progress=args.progress,
            stop=asked_to_stop,
        )
