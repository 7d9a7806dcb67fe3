"""A pretraining from the flags to its end: `moco_isl.pretrain(...)`, and main_moco_isl.py.

Letters: M images.
"""

import argparse
import random
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from moco_isl import data, dist, files
from moco_isl.encoders import build_encoder, freeze_patches, on_meta, require_side, split_batch_norm
from moco_isl.evaluation.knn import weighted_knn
from moco_isl.evaluation.linear import probe_accuracy
from moco_isl.miners import find_miner
from moco_isl.objectives import OBJECTIVES
from moco_isl.options import listed
from moco_isl.run import devices, exits, flags, loggers, ranks
from moco_isl.run.folder import check_folder
from moco_isl.run.logs import read_metrics
from moco_isl.run.meters import Progress, duration
from moco_isl.run.signals import Stop
from moco_isl.training import options, reading, resume, state
from moco_isl.training import pretrain as steps
from moco_isl.training.options import build_miner, build_objective, check_args

ABOUT = """Pretrain an image encoder without labels: MoCo v2, and ISL around it.

A bare run is MoCo:
    python main_moco_isl.py -a resnet50 --mlp --moco-t 0.2 --aug-plus --cos DIR
Mined by nearest neighbours:
    ... --miner knn --init runs/moco/checkpoint_last.pth.tar
A first try without any data:
    python main_moco_isl.py --dataset digits -a digits --mlp --moco-dim 64 \\
        --moco-t 0.1 --epochs 20
"""


def get_parser() -> flags.Parser:
    return options.get_parser(ABOUT)


@dataclass(frozen=True)
class Pretrained:
    """What a pretraining left: its folder, the last checkpoint, and the lines of metrics.jsonl.

    epochs, rounds: of all of them, in order. `backbone()` loads what was trained.
    """

    folder: Path
    checkpoint: Path
    epochs: list[dict]
    rounds: list[dict]

    def backbone(self):
        """The trained backbone, see `moco_isl.load_backbone`."""
        import moco_isl

        return moco_isl.load_backbone(self.checkpoint)

    def __str__(self) -> str:
        last = self.epochs[-1] if self.epochs else {}
        parts = [f"{len(self.epochs)} epochs"]
        parts += [f"{name} {last[key]:.2f}{unit}" for key, name, unit in _SHOWN if key in last]
        if self.rounds:
            parts.append(f"{len(self.rounds)} rounds of mining")
        return f"{self.folder}: {', '.join(parts)}; checkpoint {self.checkpoint}"


def _as_text(value) -> str | list[str]:
    """A flag's value, or several, as they would be typed; switches are true or false."""
    if isinstance(value, list | tuple):
        return [_as_text(one) for one in value]
    return str(value).lower() if isinstance(value, bool) else str(value)


_SHOWN = (
    ("loss", "loss", ""),
    ("rankme", "RankMe", ""),
    ("knn", "kNN", " %"),
    ("probe", "linear probe", " %"),
)


def pretrain(data=None, out: str | Path | None = None, **given) -> Pretrained:
    """Pretrain an encoder without labels, as `python main_moco_isl.py` does with the same flags.

        run = moco_isl.pretrain("photos", out="runs/moco", arch="resnet18", epochs=100, mlp=True)

    data: a folder, a list file, shards, ... or several of them; None where `dataset` needs none.
    given: flags by name, such as moco_k=512 for --moco-k 512. Returns what the run left. Raises
    BadInput for what cannot work, before anything is written; RunFailed where the run fails; and
    Interrupted after a checkpoint, when it is asked to stop.
    """
    given |= {"data": data, "out": out}
    settings = {name: _as_text(value) for name, value in given.items() if value is not None}
    argv, where = get_parser().argv_of(settings, "pretrain(...)")
    folder = run([*where, *argv], None)
    lines = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    of_kind = lambda kind: [line for line in lines if line["kind"] == kind]
    return Pretrained(
        folder, folder / "checkpoint_last.pth.tar", of_kind("epoch"), of_kind("round")
    )


def main(argv: list[str] | None = None, stop=None) -> int:
    """Run with flags argv; returns the exit code.

    stop: a launcher's own function that says whether to stop, called once a step.
    """
    return exits.exit_code(run, argv, stop)


def run(argv: list[str] | None, stop) -> Path:
    """Run with flags argv; returns the run's folder."""
    args = get_parser().parse_args(argv)
    start, content, whole = check_start(args)
    if reached := resume.finished(start, content, args.epochs, args.max_steps):
        print(f"=> already finished: {reached}")
        return Path(args.out)
    # an unknown architecture is reported here, before any process is started
    on_meta(lambda: build_encoder(args.arch, args.moco_dim, args.stem, channels=args.channels))
    if args.multiprocessing_distributed:
        # so are faults of the data and the file, which each rank will read for itself
        prepare(args, start, content, "meta", whole)
        content.clear()
        whole = None
    ranks.launch(worker, args, stop, start, content, whole)
    return Path(args.out)


def check_start(args: argparse.Namespace) -> tuple[resume.Start, dict, Dataset | None]:
    """Find and read what the run starts from, and check the flags. Raises BadInput before any work.

    Flags that were not given are taken from the file where it knows them. --resume FOLDER goes on
    with the run in that folder. Returns the start, the content of its file, and the images of a new
    run, whose number its flags follow.
    """
    flags.check(
        args.resume != "auto" or args.out,
        "--resume auto needs --out: it goes on with the run in that folder",
    )
    if args.resume not in ("", "auto") and files.kind(args.resume, "--resume") == "folder":
        args.out = args.out or args.resume
    shape = state.flags_shape(get_parser())
    start, content = resume.find_start(args.resume, args.init, args.out or None, shape)
    start = resume.settle_flags(args, start, content, get_parser())
    name = args.arch.replace(":", "-").replace("/", "-")
    args.out = args.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    opened = []

    def count() -> int:
        opened.append(open_whole(args))
        return len(opened[0])

    is_new = not start.goes_on and not start.unsaved
    check_args(args, count if is_new else None)
    check_folder(args.out, start.in_place)
    resume.check_flags(start, content, vars(args))
    return start, content, opened[0] if opened else None


def prepare(
    args: argparse.Namespace,
    start: resume.Start,
    content: dict,
    device: str = "cpu",
    whole: Dataset | None = None,
) -> tuple[reading.TrainingImages, torch.nn.Module]:
    """The images and a model on a device, checked against the flags and the file to start from.

    whole: the images, where they have been opened. Writes nothing.
    """
    images = split_images(args, open_whole(args) if whole is None else whole)
    flags.check(
        not find_miner(args.miner).uses_labels or images.train.labels is not None,
        f"--miner {args.miner} needs labels, and {' '.join(listed(args.data)) or args.dataset} has"
        " none: expected a folder a class",
    )
    miner = build_miner(args, images.train.labels, images)
    if device == "meta":  # not every network runs there, so `require_side` cannot try it out
        model = on_meta(lambda: build_model(args, images))
    else:
        model = build_model(args, images)
        require_side(model.encoder_q, args.arch, images.side)
    if start.path:
        isl_shape, parameters = options.state_shape(args, model)
        steps.check_file(
            start,
            content,
            images.train,
            model,
            isl_shape=isl_shape,
            parameters=parameters,
            miner_shape=miner.state_shape(args.moco_dim),
            labels=resume.labels_of(miner),
            batch_size=args.batch_size,
            optimizer=args.optimizer,
            momentum=args.momentum,
            fp16=args.amp == "fp16",
            out=args.out,
            arch=args.arch,
            stem=args.stem,
        )
    return images, model


def open_whole(args: argparse.Namespace) -> Dataset:
    pixels = (args.channels or data.RGB.channels, args.bits or data.RGB.bits)
    return data.build_dataset(args.dataset, args.data, "train", args.download, *pixels)


def split_images(args: argparse.Namespace, whole: Dataset) -> reading.TrainingImages:
    return reading.split(whole, args.knn_holdout, args.seed, args.image_size)


def settle_pixels(args: argparse.Namespace) -> None:
    """Set --mean and --std on all ranks where neither flags nor data set say them: measure them."""
    if flags.take(data.Pixels, args).are_known(args.dataset):
        return
    workers = devices.usable_workers(args.workers, 1)
    train = lambda: split_images(args, open_whole(args)).train
    found = ranks.on_main(lambda: data.measure(train(), workers))
    args.mean, args.std, line = dist.broadcast_object(found)
    ranks.say(f"=> {line}")


def worker(
    args: argparse.Namespace, stop, start: resume.Start, content: dict, whole: Dataset | None
) -> None:
    """Run one rank.

    content: of the file to start from, empty if it is yet to be read. whole: the images, None if
    they are yet to be opened.
    """
    begun = time.perf_counter()
    device = devices.resolve_device(args)  # first: the ranks talk through their GPUs
    devices.warn_of_slow_amp(args.amp, device, trains=True)
    own = start
    args.seed, args.out, start = dist.broadcast_object((args.seed, args.out, start))
    if start != own:  # a shared file system may show different ranks different files
        content.clear()
    settle_pixels(args)
    plan = flags.take(steps.Plan, args, mines=args.miner != "none")
    numerics = flags.take(steps.Numerics, args)
    with Stop(stop) as stop:
        reader, model = ranks.together(lambda: get_ready(args, start, content, whole, device, stop))
        with closing(reader):
            isl = build_objective(args, model, reader.M)
            miner = build_miner(args, reader.labels, reader.images)
            parts = steps.assemble(model, isl, miner, reader, plan, numerics)
            folder = resume.take_folder(args.out, start, args.keep)
            progress = Progress(args.progress, args.epochs, len(reader.loader))
            judges = steps.Judges(weighted_knn, probe_accuracy)
            with steps.Journal(folder, progress, parts.position) as journal:
                save = steps.Saver(parts, folder, vars(args), reader.images.side, device)
                steps.begin(start, content, parts, reader, journal, save, args.log)
                warned = steps.warnings(
                    parts,
                    reader,
                    plan,
                    arch=args.arch,
                    stem=args.stem,
                    research_labels=args.research_labels,
                    idle=options.idle(args),
                )
                for line in [*args.notes, *warned]:
                    journal.say(f"=> {line}")
                steps.train(parts, reader, plan, numerics, journal, save, stop, judges)
                last = f"{args.out}/checkpoint_last.pth.tar"
                took = duration(time.perf_counter() - begun)
                if parts.position.epoch < args.epochs:
                    end = f"=> ended by --max-steps {args.max_steps} after {took}"
                    journal.say(f"{end}; checkpoint {last}; --resume {args.out} goes on")
                    return
                journal.say(f"=> done in {took}; checkpoint {last}; next:")
                for line in options.next_commands(args, labelled=reader.labels is not None):
                    journal.say(f"   {line}")


def get_ready(
    args: argparse.Namespace,
    start: resume.Start,
    content: dict,
    whole: Dataset | None,
    device: torch.device,
    stop: Stop,
) -> tuple[reading.Reader, torch.nn.Module]:
    """What a rank does without the others: read the file, open the images, build the model.

    Writes nothing but --cache.
    """
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    if start.path and not content:
        content |= resume.read(start)
    images, model = prepare(args, start, content, whole=whole)
    model.to(device, memory_format=flags.take(steps.Numerics, args).layout)
    loggers.require_installed(args.log)
    workers = devices.usable_workers(args.workers, ranks.processes_here(args))
    kind = OBJECTIVES[args.objective]
    pixels = flags.take(data.Pixels, args)
    settings = flags.take(
        reading.Reading,
        args,
        views=kind.views(args.isl_hpe),
        crop=kind.crop(images.side),
        workers=workers,
        pixels=pixels,
    )
    return reading.open_reader(images, settings, device, stop), model


def build_model(args: argparse.Namespace, images: reading.TrainingImages) -> torch.nn.Module:
    def base_encoder(num_classes: int) -> torch.nn.Module:
        encoder = build_encoder(args.arch, num_classes, args.stem, images.side, args.channels)
        if args.stop_grad_conv1:
            freeze_patches(encoder, args.arch)
        return split_batch_norm(encoder, args.bn_splits) if args.bn_splits > 1 else encoder

    return OBJECTIVES[args.objective].build_model(
        base_encoder,
        dim=args.moco_dim,
        K=args.moco_k,
        m=args.moco_m,
        T=args.moco_t,
        mlp=args.mlp,
        num_images=len(images.train),
        clusters=args.dc_clusters,
    )
