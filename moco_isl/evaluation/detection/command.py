"""The command `python -m moco_isl.evaluation.detection`: its flags, and what each rank does."""

import argparse
import hashlib
import random
import time
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from moco_isl import data, dist
from moco_isl.encoders import build_encoder, channels_of
from moco_isl.errors import BadInput
from moco_isl.evaluation.detection import scenes, scoring
from moco_isl.evaluation.detection.batches import Reading
from moco_isl.evaluation.detection.boxes import BoxedImages, read
from moco_isl.evaluation.detection.model import BN, KINDS, build_detector, require_stages
from moco_isl.evaluation.detection.tuning import Schedule, Tuning
from moco_isl.evaluation.results import read_own
from moco_isl.evaluation.subject import fingerprint, format_of
from moco_isl.files import shown
from moco_isl.options import opt
from moco_isl.run import checkpoint, devices, exits, flags, ranks
from moco_isl.run.backbone import EncoderOptions, describe, load_backbone
from moco_isl.run.folder import check_folder
from moco_isl.run.ranks import say
from moco_isl.run.signals import Stop
from moco_isl.run.weights import run_file, weights_file
from moco_isl.schema import EARLIER, require
from moco_isl.training import resume, state

ABOUT = """Judge features by object detection: Faster R-CNN, all of it trained, COCO's AP.

MoCo's recipe on Pascal VOC:
  python -m moco_isl.evaluation.detection FILE --data VOCdevkit
COCO:
  ... --data COCO --model fpn --iterations 90000 --steps 60000 80000
With nothing at hand, in a minute: scenes of the embedded digits:
  ... --data digits
From scratch:
  python -m moco_isl.evaluation.detection none -a resnet50 --data VOCdevkit"""
NONE = "none"


@dataclass(kw_only=True)
class DetectionOptions:
    """Which images with boxes, and which detector."""

    file: str = opt(
        "",
        "file",
        metavar="FILE",
        may_change=True,
        help="whose backbone: a checkpoint of ours or MoCo's, a run's folder, weights of"
        " torchvision or timm (.safetensors too), or a Hugging Face folder; none: from scratch, as"
        " -a says",
    )
    data: str = opt(
        "",
        metavar="DIR",
        may_change=True,
        help="images with boxes: VOCdevkit with VOC2007 and VOC2012, one such folder, or COCO's"
        " folder; or digits: scenes of the embedded digits",
    )
    train: str | None = opt(
        None,
        metavar="SPLIT",
        help="what is trained on: of VOC 2007+2012:trainval (the default), or trainval of one"
        " folder; of COCO NAME for annotations/instances_NAME.json (train2017), or a .json in DIR",
    )
    test: str | None = opt(
        None, metavar="SPLIT", help="what is judged on, alike (2007:test, test, val2017)"
    )
    max_images: int = opt(
        0, low=0, metavar="n", help="at most n images of each, evenly spread; to try a command out"
    )
    max_bad_boxes: int = opt(
        0,
        low=0,
        metavar="n",
        rare=True,
        help="leave out up to n boxes of a split that have no area or lie outside of their image"
        " (COCO's train2017 has some)",
    )
    model: str = opt(
        "c4", choices=KINDS, help="c4: MoCo's, layer4 is the head; fpn: a pyramid over all stages"
    )
    bn: str = opt(
        "sync",
        choices=BN,
        help="batch norm: sync, over all GPUs, as MoCo; frozen, as usual detectors; train, each"
        " process by itself",
    )
    sizes: list[int] | None = opt(
        None,
        low=16,
        high=4096,
        several="+",
        metavar="S",
        help="shorter side of an image in training, one of these (480 to 800 by 32; digits: 64)",
    )
    test_size: int | None = opt(
        None, low=16, high=4096, metavar="S", help="shorter side in the test (800; digits: 64)"
    )
    max_size: int = opt(
        1333, low=16, high=8192, metavar="S", rare=True, help="the longer side is at most this"
    )
    flip: bool | None = opt(
        None, rare=True, help="mirror half of the images in training (yes; digits: no)"
    )
    rois: int | None = opt(
        None,
        low=2,
        rare=True,
        metavar="n",
        help="regions of an image that the head is trained on (512; digits: 32)",
    )
    proposals: int | None = opt(
        None,
        low=1,
        rare=True,
        metavar="n",
        help="proposals of an image in the test, twice as many in training (1000; digits: 50)",
    )
    roi_size: int | None = opt(
        None,
        low=2,
        high=64,
        rare=True,
        metavar="S",
        help="side of the grid that a region is pooled to (14 of c4, 7 of fpn; digits: 8)",
    )


@dataclass(kw_only=True)
class TuningOptions:
    """The training, MoCo's recipe for VOC by default."""

    iterations: int | None = opt(
        None, low=1, metavar="n", help="batches to train on (24000; digits: 400)"
    )
    batch_size: int | None = opt(
        None,
        "-b",
        "--batch-size",
        low=1,
        help="images of a batch, the total of all GPUs on all nodes (16; digits: 8)",
    )
    lr: float | None = opt(
        None,
        "--lr",
        "--learning-rate",
        low=0,
        help="learning rate (0.02 for 16 images; digits: 0.05 for 8)",
    )
    steps: list[int] | None = opt(
        None,
        low=0,
        several="*",
        metavar="n",
        help="iterations at which the rate falls to a tenth (3/4 and 11/12 of all: 18000 22000)",
    )
    warmup: int | None = opt(
        None, low=0, metavar="n", help="iterations in which the rate rises (100; digits: 50)"
    )
    momentum: float = opt(0.9, low=0, high=1, rare=True, help="momentum of SGD")
    weight_decay: float = opt(
        1e-4, "--wd", "--weight-decay", low=0, help="weight decay, not of batch norm"
    )
    precise_bn: int | None = opt(
        None,
        low=0,
        metavar="n",
        rare=True,
        help="batches that batch norm's statistics are measured on before the test (200, MoCo's;"
        " digits: 25); 0: leave them as the training does",
    )
    amp: str = opt("off", choices=("off", "bf16"), help="half precision; bf16 on any recent GPU")
    out: str | None = opt(
        None, metavar="DIR", may_change=True, help="folder of the run (runs/<time>-detection)"
    )
    resume: str = opt(
        "",
        may_change=True,
        help="a checkpoint of this command, or auto: go on with what is in --out, if anything is",
    )
    save_every: int = opt(
        1000, low=1, metavar="n", may_change=True, rare=True, help="save every n iterations"
    )
    print_freq: int = opt(
        20, "-p", "--print-freq", low=1, may_change=True, rare=True, help="print frequency"
    )
    seed: int | None = opt(
        None,
        low=0,
        high=2**63 - 1,
        help="seed of everything but the scenes; without one it is drawn, printed and kept",
    )
    workers: int = opt(
        16,
        "-j",
        "--workers",
        low=0,
        may_change=True,
        help="number of data loading workers, at most one a core",
    )


GROUPS: flags.Groups = {
    "detection": (DetectionOptions,),
    "backbone": (EncoderOptions,),
    "training of a detector": (flags.ConfigOptions, TuningOptions),
    "devices and processes": (ranks.DistributedOptions,),
}
KINDS_OF_FLAGS = flags.kinds_of(GROUPS)
MAY_CHANGE = flags.may_change(*KINDS_OF_FLAGS)
# MoCo's for photos, and one for the scenes; the steps are parts of all iterations
RECIPES = {
    "photos": {
        "iterations": 24_000,
        "batch_size": 16,
        "lr": 0.02,
        "warmup": 100,
        "precise_bn": 200,
        "sizes": [*range(480, 801, 32)],
        "test_size": 800,
        "flip": True,
        "rois": 512,
        "proposals": 1000,
        "roi_size": 0,
    },
    scenes.NAME: {
        "iterations": 400,
        "batch_size": 8,
        "lr": 0.05,
        "warmup": 50,
        "precise_bn": 25,
        "sizes": [scenes.S],
        "test_size": scenes.S,
        "flip": False,
        "rois": 32,
        "proposals": 50,
        "roi_size": 8,
    },
}


def get_parser() -> flags.Parser:
    usage = "%(prog)s FILE --data DIR [flags]"
    parser = flags.Parser("python -m moco_isl.evaluation.detection", ABOUT, usage=usage)
    parser.add_groups(GROUPS)
    return parser


def main(argv: list[str] | None = None, stop=None) -> int:
    """Run with flags argv; returns the exit code.

    stop: a launcher's own function that says whether to stop, called once a step.
    """
    return exits.exit_code(run, argv, stop)


def run(argv: list[str] | None, stop) -> None:
    args = get_parser().parse_args(argv)
    check_args(args)
    require_sync(args)
    args.out = args.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-detection"
    start, content = resume.find_start(args.resume, None, args.out, state.flags_shape(get_parser()))
    saved = saved_flags(start, content)
    if args.seed is None:
        args.seed = saved.get("seed")
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(2**31)
    task = Task(args)
    task.check()
    check_folder(args.out, start.in_place)
    read_own(args.out, "classes")
    now = vars(args)
    resume.check_unsaved(start, now, MAY_CHANGE)
    if start.goes_on:
        resume.check_same(saved, now, "choose another --out", may_change=MAY_CHANGE)
    ranks.launch(worker, args, stop, start, task)


# ---- before any rank is started ------------------------------------------------------------------


def check_args(args: argparse.Namespace) -> None:
    """Raise BadInput for flags that do not go together; sets those that the recipe decides."""
    flags.check_ranges(args, *KINDS_OF_FLAGS)
    is_digits = args.data == scenes.NAME
    flags.check(
        bool(args.file),
        "nothing to judge: name the FILE whose backbone it is, or none -a ARCH for one from"
        " scratch",
    )
    flags.check(
        bool(args.data),
        "no --data: expected VOCdevkit, a folder in COCO's layout, or digits (embedded)",
    )
    flags.check(
        args.file != NONE or bool(args.arch), "none says no network: give -a, such as -a resnet50"
    )
    flags.check(
        not is_digits or not (args.train or args.test),
        "--data digits has its own scenes to train and to test on: leave --train and --test out",
    )
    for name, value in RECIPES[scenes.NAME if is_digits else "photos"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.steps is None:
        args.steps = [args.iterations * 3 // 4, args.iterations * 11 // 12]
    args.steps = sorted(args.steps)
    world = ranks.total_ranks(args)
    flags.check(
        args.batch_size % world == 0,
        f"--batch-size {args.batch_size} does not divide into {world} ranks: use a multiple of"
        f" {world}",
    )
    scoring.require_package()


def require_sync(args: argparse.Namespace) -> None:
    """Raise BadInput where batch norm cannot be synchronised here; a login node may lack GPUs."""
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    flags.check(
        args.bn != "sync" or ranks.total_ranks(args) == 1 or not on_cpu,
        "--bn sync over several ranks needs GPUs, where torch synchronises batch norm: use --bn"
        " frozen, or --bn train, where each rank has its own",
    )


def saved_flags(start: resume.Start, content: dict) -> dict:
    """The flags of the run to go on with; {} for none. Raises BadInput for another file."""
    if not start.goes_on:
        return start.unsaved
    flags.check(
        "detector" in content,
        f"'{shown(start.path)}' is no checkpoint of this command: give its encoder as FILE, and"
        " another --out",
    )
    shape = {**state.flags_shape(get_parser())}
    require(content.get("args"), shape, state.where(start.path), cure=EARLIER)
    return content["args"]


@dataclass
class Task:
    """What the flags name, read once in a process; a copy in another one reads for itself."""

    flags: argparse.Namespace

    def __getstate__(self) -> dict:
        return {"flags": self.flags}

    @cached_property
    def _encoder(self) -> tuple[nn.Module, dict]:
        given = self.flags
        if given.file != NONE:
            return load_backbone(given.file, given.arch, given.stem, given.key)
        torch.manual_seed(given.seed)  # so the initial weights depend on the seed alone
        return build_encoder(given.arch, 1, given.stem), {"arch": given.arch, "args": {}}

    @property
    def encoder(self) -> nn.Module:
        return self._encoder[0]

    @property
    def info(self) -> dict:
        """See `load_backbone`; of a network from scratch its arch alone."""
        return self._encoder[1]

    @cached_property
    def images(self) -> dict[str, BoxedImages]:
        """The images to train on, of which each has an object, and those to test on."""
        given = self.flags
        if given.data == scenes.NAME:
            sizes = {"train": ("train", scenes.TRAIN), "test": ("val", scenes.TEST)}
            found = {name: scenes.make_scenes(*size) for name, size in sizes.items()}
        else:
            train = read(given.data, given.train, most_bad=given.max_bad_boxes)
            test = read(given.data, given.test, train, given.max_bad_boxes)
            found = {"train": train, "test": test}
        found = {name: images.at_most(given.max_images) for name, images in found.items()}
        found["train"] = found["train"].with_objects()
        return found

    @cached_property
    def pixels(self) -> data.Pixels:
        takes = channels_of(self.encoder)
        if takes != 3:
            raise BadInput(
                f"'{self.flags.file}' takes images of {takes} channels, and detection reads those"
                " of 3: expected an encoder of colour images"
            )
        return format_of(self.encoder, self.info, data.RGB)

    @cached_property
    def origin(self) -> dict:
        """What a checkpoint says of encoder and images: see `tuning.ORIGIN`."""
        given = self.flags
        file = "" if given.file == NONE else fingerprint(weights_file(given.file))
        digest = hashlib.sha256()
        for images in self.images.values():
            for row in images.rows:
                digest.update(f"{row.image.rpartition('/')[2]} {row.width} {row.height}".encode())
                digest.update(row.boxes.tobytes() + row.labels.tobytes())
        classes = self.images["train"].classes
        return {"sha256": file, "classes": classes, "data_sha256": digest.hexdigest()}

    def check(self) -> None:
        """Raise BadInput where file, flags and images do not go together; sets --arch."""
        require_stages(self.encoder, self.info["arch"], self.flags.file)
        if not self.images["train"].rows:
            raise BadInput(
                f"no image of {self.images['train'].source} has an object to train on: expected"
                " some; choose another --train"
            )
        self.flags.arch = self.info["arch"]
        self.pixels  # noqa: B018

    def detector(self) -> nn.Module:
        given = self.flags
        torch.manual_seed(given.seed)
        row = data.find_set("digits" if given.data == scenes.NAME else "folder")
        mean, std = self.pixels.numbers(row)
        synchronised = given.bn == "sync" and dist.world_size() > 1
        return build_detector(
            self.encoder,
            len(self.images["train"].classes),
            kind=given.model,
            bn="train" if given.bn == "sync" and not synchronised else given.bn,
            mean=mean,
            std=std,
            rois=given.rois,
            proposals=given.proposals,
            roi_size=given.roi_size,
        )

    def says(self) -> list[str]:
        """Lines about what is trained on what, and about what lowers the figures."""
        given = self.flags
        train, test = self.images["train"], self.images["test"]
        info = self.info
        lines = [
            describe(info) if given.file != NONE else f"=> {info['arch']} from scratch",
            f"=> {train.source}: {len(train):,} images, {train.objects:,} objects of"
            f" {len(train.classes)} classes; test on {test.source}: {len(test):,} images,"
            f" {test.objects:,} objects",
        ]
        recipe = RECIPES[scenes.NAME if given.data == scenes.NAME else "photos"]
        share = given.batch_size / recipe["batch_size"]
        if share != 1 and given.lr == recipe["lr"]:
            longer = round(recipe["iterations"] / share)
            lines.append(
                f"=> warning: --lr {given.lr:g} is for {recipe['batch_size']} images a batch, here"
                f" they are {given.batch_size}: linear scaling gives --lr {given.lr * share:g}"
                f" --iterations {longer} --warmup {round(recipe['warmup'] / share)}"
            )
        if given.bn == "frozen" and given.file == NONE:
            lines.append(
                "=> warning: --bn frozen from scratch leaves every batch norm the identity: use"
                " --bn sync or train"
            )
        return lines


# ---- on every rank -------------------------------------------------------------------------------


def worker(args, stop, start: resume.Start, task: Task) -> None:
    device = devices.resolve_device(args)
    devices.warn_of_slow_amp(args.amp, device, trains=True)
    args.seed, args.out = dist.broadcast_object((args.seed, args.out))
    task.flags = args
    folder = resume.take_folder(args.out, start)
    try:
        with Stop(stop) as stop:
            tuning = ranks.together(lambda: assemble(args, device, folder, stop, start, task))
            tuning.train(print_freq=args.print_freq, save_every=args.save_every)
            names = ("file", "arch", "stem", "data", "train", "test", "model", "bn", "lr", "seed")
            facts = {name: getattr(args, name) for name in (*names, "batch_size")}
            facts |= {"pretrained": args.file, "sha256": task.origin["sha256"]}
            facts |= {"epoch": task.info.get("epoch"), "protocol": "Faster R-CNN, COCO's AP"}
            tuning.judge(args.out, facts, args.precise_bn)
    finally:
        if folder is not None:
            folder.close()


def assemble(args, device, folder, stop: Stop, start: resume.Start, task: Task) -> Tuning:
    """A tuning of the task, in the state that the file to go on with has. Raises BadInput."""
    task.check()
    for line in task.says():
        say(line)
    reading = Reading(
        sizes=args.sizes,
        test_size=args.test_size,
        longest=args.max_size,
        flip=args.flip,
        seed=args.seed,
        workers=devices.usable_workers(args.workers, ranks.processes_here(args)),
        device=device,
    )
    tuning = Tuning(
        task.detector(),
        task.images,
        reading,
        Schedule(args.iterations, args.batch_size, args.lr, args.steps, args.warmup),
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        amp=args.amp,
        origin=task.origin,
        flags=vars(args),
        folder=folder,
        stop=stop,
    )
    size = 0
    if start.goes_on:
        content = checkpoint.load(run_file(start.path))
        tuning.restore(content, start.path)
        size = content["detector"]["metrics_size"] if start.in_place else 0
    if folder is not None:
        folder.begin(vars(args), size)
    return tuning
