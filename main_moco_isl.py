#!/usr/bin/env python
"""Pretrain an image encoder without labels: MoCo v2, and ISL around it.

A bare run is MoCo:            python main_moco_isl.py -a resnet50 --mlp --moco-t 0.2 --aug-plus
--cos DIR Mined by nearest neighbours:   ... --miner knn --init runs/moco/checkpoint_last.pth.tar A
first try without any data:  python main_moco_isl.py --dataset digits -a digits --mlp --moco-dim 64
--moco-k 512 --moco-t 0.1 --epochs 20
"""

import argparse
import copy
import math
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from moco_isl import builder, data, dist, files
from moco_isl.encoders import (
    AMP_TYPES,
    as_in_library,
    build_encoder,
    extract_features,
    extract_views,
    on_meta,
    split_batch_norm,
)
from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.evaluation.features import require_side
from moco_isl.evaluation.knn import weighted_knn
from moco_isl.isl import ISL
from moco_isl.miners import find_miner
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.record import one_line, precision_of_ranking, round_record
from moco_isl.objectives.rotnet import Rotations
from moco_isl.ops import ivf
from moco_isl.run import checkpoint, devices, exits, flags, logs, ranks
from moco_isl.run.folder import RunFolder, check_folder, flags_of_unsaved
from moco_isl.run.meters import Progress
from moco_isl.run.signals import Stop
from moco_isl.training import engine, fast, options, resume, state
from moco_isl.training.options import build_miner, check_args

ALIKE = 0.99  # mean cosine from which features have collapsed


def get_parser() -> flags.Parser:
    return options.get_parser(__doc__)


def check_start(args: argparse.Namespace) -> tuple[resume.Start, dict]:
    """Which file the run starts from and what is in it; everything about the files named that can
    be known before any work.
    """
    flags.check(
        args.resume in ("", "auto") or not args.init,
        "--resume goes on with a run, --init starts one: give only one of them",
    )
    flags.check(
        args.resume != "auto" or args.out,
        "--resume auto needs --out: it goes on with the run in that folder",
    )
    args.out = (
        args.out
        or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{args.arch.replace(':', '-').replace('/', '-')}"
    )
    start, content = resume.find_start(args.resume, args.init, args.out)
    flags.check(
        "probe" not in content,
        f"'{start.path}' is a linear probe of main_lincls.py: expected a pretraining file, such as"
        " the one it was trained on",
    )
    if "isl" in content:
        parser = get_parser()
        state.require_flags(content, start.path, parser, parser.optional())
    if start.goes_on and "isl" in content:
        resume.take_over(args, content["args"])
    elif start.in_place and (
        unsaved := flags_of_unsaved(args.out, state.flags_shape(get_parser()))
    ):
        resume.take_over(args, unsaved)
    check_args(args)
    check_folder(args.out, start.in_place)
    resume.check_unsaved(start, args.out, vars(args))
    if start.goes_on and "isl" in content:
        ours = content["isl"]
        begun = ours["epoch"] + bool(ours["step"])
        mined = ours["state"].get("round", 0) > 0
        resume.check_same(content["args"], vars(args), epochs=begun, mined=mined)
    return start, content


def main(argv: list[str] | None = None, stop=None) -> int:
    """Run with flags argv; returns the exit code.

    stop: a launcher's own 'shall we stop?', asked once a step.
    """
    return exits.exit_code(run, argv, stop)


def run(argv: list[str] | None, stop) -> None:
    args = get_parser().parse_args(argv)
    start, content = check_start(args)
    if reached := resume.finished(start, content, args.epochs, args.max_steps):
        print(f"=> already finished: {reached}")
        return
    # an unknown architecture shows here, before anything is started
    on_meta(lambda: build_encoder(args.arch, args.moco_dim, args.stem))
    # and what is wrong with the data and the file: before other processes are
    if args.multiprocessing_distributed:
        prepare(args, start, "meta")
    ranks.launch(worker, args, stop, start)


def prepare(args: argparse.Namespace, start: resume.Start, device: str = "cpu") -> tuple:
    """Data set, side of a crop, model on a device: fit for each other and for the file to start
    from. Writes nothing.
    """
    whole = data.build_dataset(args.dataset, args.data, "train", args.download)
    dataset, _ = split(args, whole)
    size = args.image_size or data.native_size(dataset)
    flags.check(
        not find_miner(args.miner).uses_labels or dataset.labels is not None,
        f"--miner {args.miner} needs labels, and {args.data} has none: expected a folder a class",
    )
    miner = build_miner(args, dataset.labels)
    model = (
        on_meta(lambda: build_model(args, size)) if device == "meta" else build_model(args, size)
    )
    if device != "meta":  # on which not every network runs
        require_side(model.encoder_q, args.arch, size)
    if start.path:
        content = checkpoint.load(start.path, mmap=True)
        checkpoint.match(model, content, start.path)
        saved = content.get("isl", {}) if start.goes_on else {}
        images = saved.get("num_images", len(dataset))
        names = saved.get("images")
        flags.check(
            images == len(dataset),
            f"'{start.path}' was trained on {images} images, and now there are {len(dataset)}: give"
            " it the same ones, or start a new run with --init and another --out",
        )
        flags.check(
            names is None or names == resume.images_of(dataset),
            f"'{start.path}' was trained on as many images of other names, or in another order:"
            " what was mined belongs to images by their place; give it the same ones, or start a"
            " new run with --init and another --out",
        )
        if saved and start.in_place:
            logs.require_lines_after(
                Path(args.out), saved["metrics_size"], saved["total"], start.path
            )
        if saved:
            shapes = {"isl": isl_shape(args, model), "miner": miner.state_shape(args.moco_dim)}
            state.require_state(
                content,
                start.path,
                model=model,
                **shapes,
                M=len(dataset),
                batch_size=args.batch_size,
                momentum=args.momentum,
                fp16=args.amp == "fp16",
            )
        elif "isl" in content and args.objective == "queue":
            known = content["isl"].get("images") == resume.images_of(dataset)
            state.require_queue(content, start.path, model, len(dataset) if known else None)
        elif start.goes_on and "optimizer" in content:
            state.require_optimizer(content["optimizer"], start.path, [list(model.parameters())])
    return whole, size, model


def split(args: argparse.Namespace, dataset) -> tuple:
    """The images to train on, and those held out of them for kNN (or None)."""
    return (
        data.holdout(dataset, args.knn_holdout, args.seed) if args.knn_holdout else (dataset, None)
    )


def worker(args: argparse.Namespace, stop, start: resume.Start) -> None:
    """One rank of the run."""
    device = devices.resolve_device(args)  # before the ranks talk: they do it through their GPUs
    devices.warn_of_slow_amp(args.amp, device, trains=True)
    args.seed, args.out, start = dist.broadcast_object((args.seed, args.out, start))
    with Stop(stop) as stop:
        run = ranks.together(lambda: Run(args, device, start, stop))
        try:
            run.begin()
            run.train()
        finally:
            run.close()


class Run:
    """Everything a rank has at hand, put together in the order in which it is needed."""

    def __init__(
        self, args: argparse.Namespace, device: torch.device, start: resume.Start, stop: Stop
    ):
        """What can fail by bad input comes first, and apart from the other ranks.

        Writes nothing but --cache.
        """
        self.args = args
        self.device = device
        self.start = start
        self.stop = stop
        self.folder = None
        self.writer = None
        self.mean_cosine = math.inf  # at the end of the epoch before
        torch.manual_seed(args.seed)
        random.seed(args.seed)
        whole, size, self.model = prepare(args, start)
        self.say(data.describe(train=whole))
        workers = devices.usable_workers(args.workers, ranks.processes_here(args))
        if args.cache is not None:
            whole = data.hold_cached(whole, args.cache, workers, self.say)
        elif args.on_device:
            whole = data.hold_small(whole, workers)
        self.size = size
        dataset, self.held_out = split(args, whole)
        self.images = resume.images_of(dataset)
        self.dataset = dataset
        self.M = len(dataset)
        self.transform = data.get_eval_transform(args.dataset, size)
        self.ordered = {"batch_size": args.batch_size, "workers": workers, "device": device}
        views = 2 if args.objective == "queue" or args.objective == "bank" and args.isl_hpe else 1
        self.augmentation = data.get_augmentation(
            args.dataset, aug_plus=args.aug_plus, size=size, on_device=args.on_device
        )
        self.loader = data.train_loader(
            dataset,
            augmentation=self.augmentation,
            batch_size=args.batch_size,
            seed=args.seed,
            workers=workers,
            device=device,
            multiple=args.bn_splits,
            max_bad_images=args.max_bad_images,
            views=views,
        )
        if args.compile:
            fast.compile_augmentation(
                self.augmentation, views * args.batch_size // dist.world_size(), device
            )
        self.labels = None if dataset.labels is None else dataset.labels.to(device)
        self.model.to(
            device,
            memory_format=torch.channels_last if args.channels_last else torch.preserve_format,
        )
        self.progress = Progress(args.progress, args.epochs, len(self.loader))
        if args.tensorboard:
            tensorboard_writer()

    def begin(self) -> None:
        """Take the folder, load what the run starts from, open the files.

        The ranks do this side by side.
        """
        args = self.args
        self.folder = ranks.on_main(lambda: RunFolder(args.out, self.start.in_place, args.keep))
        ranks.on_main(self.look_again)
        self.fused = args.fast and self.device.type == "cuda"
        # all parameters, as MoCo's file has it
        self.optimizer = fast.sgd(
            self.model.parameters(), args.lr, args.momentum, args.weight_decay, self.fused
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.isl = (
            Rotations(self.model, self.M)
            if args.objective == "rotnet"
            else ISL(
                self.model,
                self.M,
                P=min(args.isl_max_positives, self.M),
                form=args.isl_loss,
                hpe=args.isl_hpe,
                bank_mix=args.isl_bank_mix,
                symmetric=args.symmetric,
                seed=args.seed,
                bank_dtype=torch.float16 if args.isl_half_bank else torch.float32,
                fast=args.fast,
            )
        )
        if args.fast:
            fast.count_batches_at_once(self.model)
        if args.compile:
            fast.compile_encoders(self.model, args.batch_size // dist.world_size())
        self.miner = build_miner(args, self.labels)
        self.parts = resume.Parts(
            self.model, self.optimizer, self.scaler, self.isl, self.miner, self.images
        )
        self.position = engine.Position(epoch=args.start_epoch)
        metrics_size = self._load() if self.start.path else 0
        ranks.on_main(lambda: self.folder.begin(vars(args), metrics_size))
        if self.start.goes_on and not self.start.in_place:
            # from here on the folder holds all that --resume auto needs, however early this run
            # dies
            self.save()
        self.progress.begin(self.position.total)
        if self.start.path and args.objective != "rotnet":
            self.mean_cosine = self.isl.mean_cosine()
        if self.folder is not None and args.tensorboard:
            self.writer = tensorboard_writer()(args.out, purge_step=self.position.total)
        self._warn()

    def look_again(self) -> None:
        """Raise BadInput where another run was in the folder between the first look and the
        lock.
        """
        resume.require_unchanged(self.start, self.args.out)
        resume.check_unsaved(self.start, self.args.out, vars(self.args))

    def close(self) -> None:
        self.loader.close()
        self.progress.close()
        for file in (self.writer, self.folder):
            if file is not None:
                file.close()

    def features(self, encoder: torch.nn.Module, dataset=None) -> torch.Tensor:
        """[M, C] unit rows, equal on all ranks: centre crops through the encoder in eval mode.

        Raises Interrupted when asked to stop.
        """
        dataset = self.dataset if dataset is None else dataset
        loader = data.eval_loader(
            dataset, transform=self.transform, shard=dist.shard(len(dataset)), **self.ordered
        )
        return self._pass(extract_features, encoder, loader, loader, len(dataset))

    def views(self, encoder: torch.nn.Module, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """2 x [M, C] unit rows, equal on all ranks: both views of every image, as this epoch draws
        them, through the encoder in eval mode. Raises Interrupted.
        """
        # two views an image: as many as in a step
        ordered = {**self.ordered, "batch_size": self.args.batch_size // dist.world_size()}
        loader = data.view_loader(
            self.dataset,
            augmentation=self.augmentation,
            seed=self.args.seed,
            shard=dist.shard(self.M),
            **ordered,
        )
        return self._pass(extract_views, encoder, loader, loader.epoch(epoch), self.M)

    def _pass(self, extract: Callable, encoder: torch.nn.Module, loader, batches: Iterable, M: int):
        """extract(encoder, batches, M, ...), of which each rank brings its share; closes the
        loader.
        """
        # batch norm's averages are each rank's own since the last step; a file holds rank 0's
        for buffer in encoder.buffers():
            dist.broadcast(buffer)
        most = int(dist.all_reduce_max(torch.tensor(len(loader), device=self.device)))
        try:
            return extract(
                encoder,
                self.stop.watch(batches, most),
                M,
                self.device,
                amp=AMP_TYPES[self.args.amp],
            )
        finally:
            loader.close()

    def _load(self) -> int | None:
        """Resume or initialise; returns how much of metrics.jsonl is to be kept (None: all)."""
        args = self.args
        path = self.start.path
        content = ranks.together(lambda: read_sound(self.start.path))
        filled = checkpoint.load_model(self.model, content, path)
        fills = {"encoder_k": "copied from encoder_q", "queue": "filled anew by one feature pass"}
        epoch = resume.epoch_of(content)
        self.say(
            f"=> loaded '{files.shown(path)}' (epoch {'unknown' if epoch is None else epoch})"
            + "".join(f"; it has no {part}, which is {fills[part]}" for part in filled)
        )
        if "queue" in filled:
            self.refill_queue()
        flags = content.get("args")
        if (
            not self.start.goes_on
            and isinstance(flags, dict)
            and flags.get("research_labels") is True
        ):
            self.say(
                f"=> warning: labels were used in the training of '{files.shown(path)}'"
                " (--research-labels), and so in what is made of it here"
            )
        if not self.start.goes_on:
            if args.objective == "queue" and "queue" not in filled:
                self._know_queue(content)
            # of features: random rows would undo what the encoder has learned
            if args.objective == "bank":
                self.isl.bank.fill(self.features(self.model.encoder_q))
            return 0
        if "isl" not in content:
            self._go_on_from_moco(content)
            return None
        self.position, same = self.parts.restore(content, self.device)
        if len(set(dist.gather_objects((self.position.epoch, self.position.step)))) > 1:
            raise RunFailed(
                f"the ranks read different states out of '{path}': a shared file system that lags"
                " behind? Start again"
            )
        if not same:
            self.say(
                f"=> '{files.shown(path)}' was saved by {len(content['isl']['rng'])} ranks, here"
                f" are {dist.world_size()}: going on, but not bit for bit"
            )
        return content["isl"]["metrics_size"] if self.start.in_place else 0

    def _know_queue(self, content: dict) -> None:
        """What a file of ours says of its queue's keys: how many there are and, where it is of the
        same images, whose.
        """
        ours = content.get("isl", {})
        flags = content.get("args", {})
        slots = ours.get("state", {}).get("slots")
        if slots is None:
            return
        if flags.get("dataset") == self.args.dataset and ours.get("images") == self.images:
            self.isl.slots.take_over(slots["owner"], oldest=int(self.model.queue_ptr))
        self.isl.slots.held = slots.get("held")

    def _go_on_from_moco(self, content: dict) -> None:
        self.position.epoch = resume.epoch_of(content) or self.args.start_epoch
        if "optimizer" not in content:
            self.say("=> it has no optimizer either: that one starts fresh")
            return
        fast.load_optimizer(self.optimizer, content["optimizer"])

    @torch.no_grad()
    def refill_queue(self) -> None:
        """Fill the queue from one feature pass of the key encoder: random images, each as often as
        the queue is longer than the data set.
        """
        try:
            rows = self.features(self.model.encoder_k)
        except Interrupted:
            raise Interrupted(
                "before the first step, so there was nothing to save: give the same command again"
            ) from None
        order = torch.randperm(self.M, generator=torch.Generator().manual_seed(self.args.seed)).to(
            self.device
        )
        while (start := int(self.model.queue_ptr)) < self.args.moco_k:
            chosen = order[: self.args.moco_k - start]
            self.isl.slots.write(self.model.enqueue(rows[chosen]), chosen)
            if start + len(chosen) == self.args.moco_k:
                break
        self.say(f"=> queue filled with features of {min(self.M, self.args.moco_k)} images")

    def save(self, number: int | None = None) -> None:
        """checkpoint_last, and with a number checkpoint_<number>: MoCo's keys, and what an exact
        resume needs. Every rank has to call it.
        """
        generators = resume.rng_of_ranks(self.device, self.position.averages)

        def write() -> None:
            state = self.parts.state(
                self.position, vars(self.args), generators, self.folder.metrics_size()
            )
            self.folder.require_sound(
                checkpoint.exploded(state), self.position.epoch, self.position.step
            )
            self.folder.save({**state, "image_size": self.size}, number)

        ranks.on_main(write)

    def say(self, line: str) -> None:
        if dist.is_main():
            print(line, flush=True)

    def log(self, **values) -> None:
        if self.folder is not None:
            self.folder.log(**values)
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and name not in ("epoch", "step", "total"):
                    self.writer.add_scalar(f"{values['kind']}/{name}", value, self.position.total)

    def _warn(self) -> None:
        args = self.args
        if args.research_labels:
            self.say(
                "=> warning: --research-labels: the positives of this run are drawn from the"
                " labels; what it reaches is no result without labels"
            )
        if args.objective == "queue" and args.moco_k > self.M:
            step = args.batch_size * (2 if args.symmetric else 1)
            suits = max(step, 2 ** ((self.M // 2).bit_length() - 1))
            self.say(
                f"=> warning: the queue ({args.moco_k}) is longer than the data set ({self.M}):"
                f" {args.moco_k / self.M:.1f} of its keys are an image's own; --moco-k {suits}"
                " would suit it"
            )
        if not as_in_library(self.model.encoder_q, args.arch):
            library = "timm" if args.arch.startswith("timm:") else "torchvision"
            self.say(
                f"=> warning: {library} has no {args.arch.removeprefix('timm:')} of this shape"
                f" (--stem {args.stem}, side {self.size}), and cannot read what is trained here:"
                " its backbone goes to safetensors and to this project's own scripts"
            )
        if args.knn_every and self.labels is None:
            self.say("=> warning: --knn-every without labels: nothing to judge by")
        if idle := options.idle(args):
            self.say(
                f"=> warning: without --miner nothing is mined, and {', '.join(idle)} changes"
                " nothing"
            )
        if (
            args.miner != "none"
            and not args.research_labels
            and args.isl_index == "exact"
            and ivf.wins(self.M, self.device)
        ):
            self.say(
                f"=> {self.M} images are searched exactly, which takes a time that grows with their"
                " square: --isl-index ivf would be faster"
            )
        if args.miner != "none" and args.isl_start >= args.epochs:
            self.say(
                f"=> warning: --isl-start {args.isl_start} is past the last epoch of --epochs"
                f" {args.epochs}: nothing will be mined"
            )

    def train(self) -> None:
        args, position = self.args, self.position
        last_good = lambda: (
            str(self.folder.last) if self.folder and self.folder.last.exists() else ""
        )
        self.say(
            f"=> {self.M} images, {len(self.loader)} steps an epoch, {dist.world_size()} x"
            f" {self.device}, seed {args.seed}, files in {files.shown(args.out)}"
        )
        for epoch in range(position.epoch, args.epochs):
            lr = engine.learning_rate(
                epoch,
                lr=args.lr,
                epochs=args.epochs,
                cos=args.cos,
                schedule=args.schedule,
                rounds=args.isl_rounds,
            )
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.isl.turn = epoch
            self.isl.active = args.miner != "none" and epoch >= args.isl_start
            number = (
                engine.rounds_until(epoch, args.isl_start, args.isl_every) if self.isl.active else 0
            )
            # of those that a late start has missed, the last one
            if position.step == 0 and self.isl.round < number:
                self.mine(epoch, number)
            with fast.numerics(args.fast, self.device):
                finished = engine.train_one_epoch(
                    self.isl,
                    self.loader,
                    self.optimizer,
                    self.scaler,
                    position,
                    device=self.device,
                    stop=self.stop,
                    progress=self.progress,
                    log=self.log,
                    save=self.save,
                    last_good=last_good,
                    amp=args.amp,
                    channels_last=args.channels_last,
                    print_freq=args.print_freq,
                    save_every=args.save_every,
                    max_steps=args.max_steps,
                )
            if not finished:
                self.save()
                break
            self.end_of_epoch(epoch)

    def mine(self, epoch: int, number: int) -> None:
        """The round of this number in the schedule, before an epoch."""
        before = self.isl.positives
        miner = copy.deepcopy(self.miner.state_dict())
        generators = resume.rng_of_ranks(self.device)
        self.miner.begin(number)
        try:
            encoder = self.model.encoder_k if self.isl.queue_objective else self.model.encoder_q
            features = self.features(encoder)
            views = self.views(encoder, epoch) if self.miner.wants_views else None
            report = engine.mine_round(
                self.isl,
                self.miner,
                features,
                self.labels,
                self.args.seed,
                self.stop,
                views,
                number=number,
            )
        except Interrupted:  # as if this round had not begun
            self.miner.load_state_dict(miner)
            resume.restore_rng(generators, self.device)
            self.save()
            raise Interrupted(
                f"saved before the mining of epoch {epoch}: go on with --resume auto"
            ) from None
        report |= ranks.on_main(lambda: self.keep_round(features, before)) or {}
        self.progress.say(f"=> {one_line(report)}")
        self.log(kind="round", epoch=epoch, **report)
        self.save()

    def keep_round(self, features: torch.Tensor, before: PositiveSets) -> dict:
        """On rank 0: write the round's record, and answer what it says of the miner's own ranking
        where there are labels.
        """
        record = round_record(features, self.isl.positives, self.miner, before)
        self.folder.save_round(self.isl.round, record)
        return {} if self.labels is None else precision_of_ranking(record, self.labels)

    def end_of_epoch(self, epoch: int) -> None:
        """kNN where it is due, the epoch's line, the checkpoint where it is due."""
        values = self.position.averages.epoch()
        if self.args.objective != "rotnet":
            before = self.mean_cosine
            self.mean_cosine = self.isl.mean_cosine()
            values["mean_cosine"] = self.mean_cosine
            # of a young encoder they are, but less so with every epoch
            if self.mean_cosine > ALIKE and 1 - self.mean_cosine < 1.1 * (1 - before):
                self.progress.say(
                    f"=> warning: epoch {epoch} ends with all features alike (mean cosine"
                    f" {values['mean_cosine']:.3f}): nothing is learned so; a smaller --lr may help"
                )
        if (
            self.args.knn_every
            and self.labels is not None
            and (epoch + 1) % self.args.knn_every == 0
        ):
            try:
                values["knn"] = self.knn()
            except Interrupted:
                self.save()
                raise Interrupted(
                    f"saved at the end of epoch {epoch}: go on with --resume auto"
                ) from None
            self.progress.say(f"=> epoch {epoch}: weighted kNN {values['knn']:.2f} %")
        self.log(kind="epoch", epoch=epoch, total=self.position.total, **values)
        self.position.epoch = epoch + 1
        self.position.step = 0
        self.position.averages = engine.Averages()
        if (epoch + 1) % self.args.save_epochs == 0 or epoch + 1 == self.args.epochs:
            self.save(epoch)

    def knn(self) -> float:
        """Accuracy in per cent of weighted kNN (k 200, T 0.1) with the query encoder's features, on
        held-out images or leaving one out.
        """
        bank = self.features(self.model.encoder_q)
        queries, truth = bank, self.labels
        if self.held_out is not None:
            queries = self.features(self.model.encoder_q, self.held_out)
            truth = self.held_out.labels.to(self.device)
        found = weighted_knn(
            queries,
            bank,
            self.labels,
            k=min(200, self.M - (self.held_out is None)),
            T=0.1,
            leave_one_out=self.held_out is None,
        )
        return (found == truth).float().mean().item() * 100


def read_sound(path: str) -> dict:
    """A checkpoint, whole.

    Raises BadInput where it is damaged, or holds what no training can go on from.
    """
    content = checkpoint.load(path)
    if broken := checkpoint.exploded(content):
        raise BadInput(
            f"'{path}' holds values that are not finite, or too large to be squared"
            f" ({checkpoint.some(broken)}): give an older file, or start anew with a lower --lr"
        )
    return content


def build_model(args: argparse.Namespace, size: int) -> torch.nn.Module:
    def base_encoder(num_classes: int) -> torch.nn.Module:
        encoder = build_encoder(args.arch, num_classes, args.stem, size)
        return split_batch_norm(encoder, args.bn_splits) if args.bn_splits > 1 else encoder

    if args.objective == "queue":
        return builder.MoCo(
            base_encoder,
            args.moco_dim,
            args.moco_k,
            args.moco_m,
            args.moco_t,
            args.mlp,
        )
    if args.objective == "rotnet":
        return builder.Rotation(base_encoder, args.moco_dim, args.mlp)
    return builder.Instance(base_encoder, args.moco_dim, args.moco_t, args.mlp)


def isl_shape(args: argparse.Namespace, model: torch.nn.Module):
    """What the file of such a run holds of its `ISL`, or of what stands where one stands."""
    if args.objective == "rotnet":
        return Rotations.state_shape()
    return ISL.state_shape(model, args.moco_dim)


def tensorboard_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BadInput(
            "--tensorboard needs the package tensorboard: pip install 'moco_isl[tensorboard]'"
        ) from error
    return SummaryWriter


if __name__ == "__main__":
    sys.exit(main())
