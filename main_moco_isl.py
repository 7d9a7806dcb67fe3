#!/usr/bin/env python
"""Pretrain an image encoder without labels: MoCo v2, and ISL around it.

A bare run is MoCo:
    python main_moco_isl.py -a resnet50 --mlp --moco-t 0.2 --aug-plus --cos DIR
Mined by nearest neighbours:
    ... --miner knn --init runs/moco/checkpoint_last.pth.tar
A first try without any data:
    python main_moco_isl.py --dataset digits -a digits --mlp --moco-dim 64 \\
        --moco-k 512 --moco-t 0.1 --epochs 20
"""

import argparse
import random
import sys
import time
from contextlib import closing

import torch

from moco_isl import data, dist, files
from moco_isl.encoders import build_encoder, freeze_patches, on_meta, require_side, split_batch_norm
from moco_isl.evaluation.knn import weighted_knn
from moco_isl.evaluation.linear import probe_accuracy
from moco_isl.miners import find_miner
from moco_isl.objectives import OBJECTIVES
from moco_isl.options import listed
from moco_isl.run import devices, exits, flags, loggers, ranks
from moco_isl.run.folder import check_folder
from moco_isl.run.meters import Progress
from moco_isl.run.signals import Stop
from moco_isl.training import options, pretrain, reading, resume, state
from moco_isl.training.options import build_miner, build_objective, check_args


def get_parser() -> flags.Parser:
    return options.get_parser(__doc__)


def main(argv: list[str] | None = None, stop=None) -> int:
    """Run with flags argv; returns the exit code.

    stop: a launcher's own function that says whether to stop, called once a step.
    """
    return exits.exit_code(run, argv, stop)


def run(argv: list[str] | None, stop) -> None:
    args = get_parser().parse_args(argv)
    start, content = check_start(args)
    if reached := resume.finished(start, content, args.epochs, args.max_steps):
        print(f"=> already finished: {reached}")
        return
    # an unknown architecture is reported here, before any process is started
    on_meta(lambda: build_encoder(args.arch, args.moco_dim, args.stem, channels=args.channels))
    if args.multiprocessing_distributed:
        # so are faults of the data and the file, which each rank will read for itself
        prepare(args, start, content, "meta")
        content.clear()
    ranks.launch(worker, args, stop, start, content)


def check_start(args: argparse.Namespace) -> tuple[resume.Start, dict]:
    """Find and read what the run starts from, and check the flags. Raises BadInput before any work.

    Flags that were not given are taken from the file where it knows them. --resume FOLDER goes on
    with the run in that folder. Returns the start and the content of its file.
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
    check_args(args)
    check_folder(args.out, start.in_place)
    resume.check_flags(start, content, vars(args))
    return start, content


def prepare(
    args: argparse.Namespace, start: resume.Start, content: dict, device: str = "cpu"
) -> tuple[reading.TrainingImages, torch.nn.Module]:
    """The images and a model on a device, checked against the flags and the file to start from.

    Writes nothing.
    """
    images = open_images(args)
    flags.check(
        not find_miner(args.miner).uses_labels or images.train.labels is not None,
        f"--miner {args.miner} needs labels, and {' '.join(listed(args.data)) or args.dataset} has"
        " none: expected a folder a class",
    )
    miner = build_miner(args, images.train.labels, images)
    if device == "meta":  # not every network runs there, so `require_side` cannot try it out
        model = on_meta(lambda: build_model(args, images.side))
    else:
        model = build_model(args, images.side)
        require_side(model.encoder_q, args.arch, images.side)
    if start.path:
        isl_shape, parameters = options.state_shape(args, model)
        pretrain.check_file(
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


def open_images(args: argparse.Namespace) -> reading.TrainingImages:
    pixels = (args.channels, args.bits)
    whole = data.build_dataset(args.dataset, args.data, "train", args.download, *pixels)
    return reading.split(whole, args.knn_holdout, args.seed, args.image_size)


def settle_pixels(args: argparse.Namespace) -> None:
    """Set --mean and --std on all ranks where neither flags nor data set say them: measure them."""
    if flags.take(data.Pixels, args).are_known(args.dataset):
        return
    workers = devices.usable_workers(args.workers, 1)
    found = ranks.on_main(lambda: data.measure(open_images(args).train, workers))
    args.mean, args.std, line = dist.broadcast_object(found)
    ranks.say(f"=> {line}")


def worker(args: argparse.Namespace, stop, start: resume.Start, content: dict) -> None:
    """Run one rank. content: of the file to start from, empty if it is yet to be read."""
    device = devices.resolve_device(args)  # first: the ranks talk through their GPUs
    devices.warn_of_slow_amp(args.amp, device, trains=True)
    own = start
    args.seed, args.out, start = dist.broadcast_object((args.seed, args.out, start))
    if start != own:  # a shared file system may show different ranks different files
        content.clear()
    settle_pixels(args)
    plan = flags.take(pretrain.Plan, args, mines=args.miner != "none")
    numerics = flags.take(pretrain.Numerics, args)
    with Stop(stop) as stop:
        reader, model = ranks.together(lambda: get_ready(args, start, content, device, stop))
        with closing(reader):
            isl = build_objective(args, model, reader.M)
            miner = build_miner(args, reader.labels, reader.images)
            parts = pretrain.assemble(model, isl, miner, reader, plan, numerics)
            folder = resume.take_folder(args.out, start, args.keep)
            progress = Progress(args.progress, args.epochs, len(reader.loader))
            judges = pretrain.Judges(weighted_knn, probe_accuracy)
            with pretrain.Journal(folder, progress, parts.position) as journal:
                save = pretrain.Saver(parts, folder, vars(args), reader.images.side, device)
                pretrain.begin(start, content, parts, reader, journal, save, args.log)
                for line in pretrain.warnings(
                    parts,
                    reader,
                    plan,
                    arch=args.arch,
                    stem=args.stem,
                    research_labels=args.research_labels,
                    idle=options.idle(args),
                ):
                    journal.say(f"=> {line}")
                pretrain.train(parts, reader, plan, numerics, journal, save, stop, judges)


def get_ready(
    args: argparse.Namespace, start: resume.Start, content: dict, device: torch.device, stop: Stop
) -> tuple[reading.Reader, torch.nn.Module]:
    """What a rank does without the others: read the file, open the images, build the model.

    Writes nothing but --cache.
    """
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    if start.path and not content:
        content |= resume.read(start)
    images, model = prepare(args, start, content)
    model.to(device, memory_format=flags.take(pretrain.Numerics, args).layout)
    loggers.require_installed(args.log)
    workers = devices.usable_workers(args.workers, ranks.processes_here(args))
    views = OBJECTIVES[args.objective].views(args.isl_hpe)
    pixels = flags.take(data.Pixels, args)
    settings = flags.take(reading.Reading, args, views=views, workers=workers, pixels=pixels)
    return reading.open_reader(images, settings, device, stop), model


def build_model(args: argparse.Namespace, size: int) -> torch.nn.Module:
    def base_encoder(num_classes: int) -> torch.nn.Module:
        encoder = build_encoder(args.arch, num_classes, args.stem, size, args.channels)
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
    )


if __name__ == "__main__":
    sys.exit(main())
