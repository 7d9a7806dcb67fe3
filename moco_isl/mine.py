"""One round of mining by a trained encoder: which images go together.

    python -m moco_isl.mine FILE DIR --miner average --out runs/mined

It prints the round's line, with its precision where DIR has a folder a class.
--out keeps the sets: positives.jsonl for a program of your own, and what
`python -m moco_isl.report runs/mined` shows of them.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from moco_isl import data, files
from moco_isl.commands import as_typed
from moco_isl.encoders import AMP_TYPES, BACKBONE, OUTPUT, Taps, require_side
from moco_isl.errors import Interrupted
from moco_isl.evaluation.subject import ReadOnce, format_of, mismatches
from moco_isl.miners import MINERS, find_miner
from moco_isl.mining.edges import pair_cosines
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.record import RoundReport, precision_of_ranking, round_record
from moco_isl.mining.rounds import Miner, RoundMiner, one_round
from moco_isl.options import opt
from moco_isl.run import devices, exits, flags, ranks
from moco_isl.run.backbone import EncoderOptions, describe, load_backbone
from moco_isl.run.folder import RunFolder, check_folder, held
from moco_isl.run.ranks import say
from moco_isl.run.signals import Stop
from moco_isl.training import engine, reading
from moco_isl.training.options import build_miner

SETS = "positives.jsonl"
KINDS = {name: kind for name, kind in MINERS.items() if name != "none" and not kind.uses_labels}


@dataclass(kw_only=True)
class MineOptions:
    """Who mines from which features, and where the sets are kept."""

    miner: str = opt(
        "average",
        choices=tuple(KINDS),
        plugin=True,
        metavar="NAME",
        help="who finds the positives: knn (own nearest), average (neighbourhood means), gan (ISL,"
        " the paper's), entropy (AND), diffusion (PAD), cluster (LA), or a class of your own,"
        " my.module:MyMiner. --miner NAME --help shows the flags of one",
    )
    layer: str | None = opt(
        None,
        choices=(OUTPUT, BACKBONE),
        help="which features: the encoder's output, as a training mines them, or what its head"
        " takes in (output of a MoCo file, else backbone)",
    )
    out: str | None = opt(None, metavar="DIR", help="keep the sets in this folder (nowhere)")
    seed: int = opt(0, low=-(2**63), high=2**63 - 1, help="seed of the views and of the miner")


@dataclass(kw_only=True)
class MinedEncoderOptions(EncoderOptions):
    """Which encoder of which file, and how it computes."""

    file: str = opt(
        "",
        "file",
        metavar="FILE",
        help="any that main_knn.py judges: a checkpoint of ours or MoCo's, a run's folder, weights"
        " of a library",
    )
    key: bool | None = opt(
        None, help="the key encoder of a MoCo file, as a training mines it, or the query encoder"
    )
    amp: str = opt("off", choices=tuple(AMP_TYPES), help="half precision in the network")
    batch_size: int = opt(256, "-b", "--batch-size", low=2, help="images at a time, of all ranks")


GROUPS: flags.Groups = {
    "mined encoder": (MinedEncoderOptions,),
    "data set": (data.DataOptions,),
    "mining": (MineOptions, RoundMiner),
    "run": (flags.ConfigOptions,),
    "devices and processes": (ranks.DistributedOptions,),
}


def get_parser() -> flags.Parser:
    usage = "%(prog)s FILE [DIR] [flags]"
    parser = flags.Parser("python -m moco_isl.mine", __doc__, usage=usage)
    parser.add_groups(GROUPS)
    parser.add_plugins("miner", KINDS, find_miner)
    return parser


def main(argv: list[str] | None = None, stop=None) -> int:
    """Run with flags argv; returns the exit code."""
    return exits.exit_code(run, argv, stop)


def run(argv: list[str] | None, stop) -> None:
    args = get_parser().parse_args(argv)
    ranks.launch(worker, args, stop, check_source(args))


# ---- before any rank is started ------------------------------------------------------------------


@dataclass
class Source(ReadOnce):
    """An encoder in a file and the images that it is shown, each read once in a process."""

    args: argparse.Namespace

    @cached_property
    def encoder(self) -> tuple[nn.Module, dict]:
        """(encoder, what is known about it), see `load_backbone`."""
        args = self.args
        load = lambda key: load_backbone(
            args.file, args.arch, args.stem, key, args.image_size or None
        )
        encoder, info = load(bool(args.key))
        if args.key is None and any(str(name).startswith("encoder_k.") for name in info["left"]):
            return load(True)
        return encoder, info

    @cached_property
    def _format(self) -> data.Pixels:
        return format_of(*self.encoder, flags.take(data.Pixels, self.args))

    @cached_property
    def pixels(self) -> data.Pixels:
        """What the numbers of the images are."""
        return data.settled(self._format, self.args.dataset, self.images.train, say)

    @cached_property
    def images(self) -> reading.TrainingImages:
        """The images, at the side that the encoder was trained on where that is known."""
        args = self.args
        pixels = (self._format.channels, self._format.bits)
        whole = data.build_dataset(args.dataset, args.data, "train", args.download, *pixels)
        side = args.image_size or self.encoder[1]["args"].get("image_size") or 0
        return reading.split(whole, 0, args.seed, side)


def check_source(args: argparse.Namespace) -> Source:
    """What is mined. Raises BadInput where flags, file and images do not go together."""
    flags.check(args.file, "no encoder: give FILE, a trained one, and then DIR")
    data.check_options(flags.take(data.DataOptions, args))
    flags.check_ranges(args, *flags.kinds_of(GROUPS))
    kind = find_miner(args.miner)
    flags.check(
        kind is not MINERS["none"] and not kind.uses_labels,
        f"--miner {args.miner} mines nothing from features: expected one of {', '.join(KINDS)}",
    )
    if args.out:
        found = held(Path(args.out))
        flags.check(
            not found,
            f"--out '{args.out}' holds a run already ({found}): choose another --out",
        )
        check_folder(args.out, False)
        files.require_ours(os.path.join(args.out, SETS), lambda there: False, "--out")
    source = Source(args)
    encoder, info = source.encoder
    require_side(encoder, info["arch"], source.images.side)
    layer_of(info, args.layer)
    build_miner(args, None, source.images)
    return source


def layer_of(info: dict, asked: str | None) -> str:
    """Which features are mined. Raises BadInput for the output of a file without a head."""
    flags.check(
        info["head"] or asked != OUTPUT,
        f"--layer {OUTPUT}: '{info['path']}' has no head, and a random one says nothing: use"
        f" --layer {BACKBONE}",
    )
    of_moco = info["head"] and info["part"].startswith("encoder_")
    return asked or (OUTPUT if of_moco else BACKBONE)


# ---- the round -----------------------------------------------------------------------------------


class Sets:
    """The sets of one round: as much of an objective as `engine.mine_round` asks for."""

    def __init__(self, M: int, device: torch.device):
        self.positives = PositiveSets.empty(M, device)
        self.round = 0

    def mine_features(
        self, features: torch.Tensor, miner: Miner, rng, tick, views, number: int
    ) -> RoundReport:
        self.positives = one_round(miner, features, self.positives, number, rng, tick, views)
        self.round = number
        return miner.report


class Layer(nn.Module):
    """One layer of an encoder: images [N, 3, S, S] -> [N, C]."""

    def __init__(self, encoder: nn.Module, layer: str):
        super().__init__()
        self.taps = Taps(encoder, [layer])
        self.layer = layer

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.taps(images)[self.layer].flatten(1)


def crop_min_of(run: dict, dataset: str) -> float | None:
    """The least crop of the run that made the file; None where the data set has its own crops.

    run: its flags, out of a file that was not checked.
    """
    least = run.get("crop_min")
    known = isinstance(least, float) and 0 < least <= 1
    return least if known and data.find_set(dataset).augmentation is None else None


def worker(args: argparse.Namespace, stop, source: Source) -> None:
    """Run one rank: a pass over its share of the images, its share of the anchors."""
    device = devices.resolve_device(args)
    devices.warn_of_slow_amp(args.amp, device, trains=False)
    encoder, info = source.encoder
    say(describe(info))
    for line in mismatches(info, dataset=args.dataset, side=source.images.side):
        say(f"=> warning: {line}")
    settings = flags.take(
        reading.Reading,
        args,
        views=2,
        workers=devices.usable_workers(args.workers, ranks.processes_here(args)),
        aug_plus=bool(info["args"].get("aug_plus", True)),
        crop=None,
        crop_min=crop_min_of(info["args"], args.dataset),
        on_device=False,
        knn_holdout=0,
        bn_splits=1,
        compile=False,
        pixels=source.pixels,
    )
    mined = Layer(encoder, layer_of(info, args.layer))
    with Stop(stop) as asked:
        reader = ranks.together(lambda: reading.open_reader(source.images, settings, device, asked))
        try:
            mine(args, reader, mined.to(device), asked)
        except Interrupted:
            raise Interrupted("nothing was written: give the same command again") from None
        finally:
            reader.close()


def mine(args: argparse.Namespace, reader: reading.Reader, encoder: nn.Module, stop: Stop) -> None:
    """Mine one round, print its line, and keep its sets in --out if it is given."""
    miner = build_miner(args, None, reader.images)
    sets = Sets(reader.M, reader.device)
    before = sets.positives
    features = reader.features(encoder)  # [M, C]
    views = reader.views(encoder, 0) if miner.wants_views else None
    report = engine.mine_round(sets, miner, features, reader.labels, args.seed, stop, views)
    say(f"=> {report}")
    if not args.out:
        return
    record = round_record(features, sets.positives, miner, before)
    if reader.labels is not None:
        report.precision_ranked = precision_of_ranking(record, reader.labels)
    lines = in_words(sets.positives, features, data.names_below(reader.images.train))
    ranks.on_main(lambda: keep(args, report, record, "".join(lines)))


# ---- what is kept --------------------------------------------------------------------------------


def in_words(positives: PositiveSets, features: torch.Tensor, names: list[str]) -> Iterator[str]:
    """A line of JSON for each image: its name, those of its positives, and their cosines.

    The surest positive comes first. features [M, C]: unit rows, what was mined from.
    """
    cosine = pair_cosines(features, positives.sources(), positives.members.long()).tolist()
    members = positives.members.tolist()
    offsets = positives.offsets.tolist()
    for i, name in enumerate(names):
        own = slice(offsets[i], offsets[i + 1])
        line = {
            "image": name,
            "positives": [names[j] for j in members[own]],
            "similarity": [round(x, 4) for x in cosine[own]],
        }
        yield json.dumps(line) + "\n"


def keep(args: argparse.Namespace, report: RoundReport, record: dict, lines: str) -> None:
    """Write the sets, and a run's files about the round, which the report reads."""
    folder = RunFolder(args.out, resume=False)
    try:
        folder.begin(vars(args) | {"init": args.file, "epochs": 0}, 0)
        folder.log(kind="round", epoch=0, **report.figures())
        folder.save_round(1, record)
        files.write_text(lines, folder.path / SETS)
    finally:
        folder.close()
    out = files.shown(args.out)
    say(f"=> wrote {files.shown(folder.path / SETS)}, an image a line")
    say(f"=> to look at them: {as_typed('python -m moco_isl.report')} {out}")


if __name__ == "__main__":
    sys.exit(main())
