#!/usr/bin/env python
"""Judge features by linear classifiers on the frozen encoder: MoCo's protocol, or in seconds on
cached features.

MoCo's protocol:                python main_lincls.py --pretrained runs/x/checkpoint_last.pth.tar
DIR Without augmentation, seconds:  ... --cache-features --lr 1 3 10 30
Every layer in one pass:        ... --layers conv1 conv2 conv3 conv4 conv5 --lr 0.03 0.1 0.3
With few labels beside it:      ... --shots 1,5,10
The whole network:              ... --finetune --lr 0.01
"""

import argparse
import random
import re
import sys
import time
from pathlib import Path

import torch

from moco_isl import data, dist, files
from moco_isl.encoders import AMP_TYPES, BACKBONE, OUTPUT, STEMS, Taps, get_head, require_side
from moco_isl.evaluation import features, linear, probe
from moco_isl.evaluation.backbone import describe, load_backbone
from moco_isl.evaluation.knn import require_shots
from moco_isl.run import checkpoint, devices, exits, flags, ranks
from moco_isl.run.folder import RunFolder, check_folder, flags_of_unsaved, held
from moco_isl.run.signals import Stop
from moco_isl.training import engine, fast, resume, state

MOCO_LR, FINETUNE_LR = 30.0, 0.01
# may change on resuming: they train nothing
FREE = ("pretrained", "arch", "stem", "mlp", "shots", "draws", "evaluate")
# what -e takes from the file: the same classifiers and split
OF_THE_RUN = ("lr", "layers", "finetune", "cache_features", "key", "seed", "holdout")


def get_parser() -> flags.Parser:
    parser = flags.Parser(description=__doc__)
    flags.add_data_options(parser)
    add = parser.add_argument_group("training, as MoCo has it").add_argument
    add(
        "-a",
        "--arch",
        help=(
            "architecture (default: as the file of --pretrained says or its tensors show; MoCo:"
            " resnet50)"
        ),
    )
    add(
        "-j",
        "--workers",
        default=32,
        type=int,
        help="number of data loading workers (default: 32), at most one a core",
    )
    add("--epochs", default=100, type=int, help="number of total epochs to run")
    add("--start-epoch", default=0, type=int, help="manual epoch number (useful on restarts)")
    add(
        "-b",
        "--batch-size",
        default=256,
        type=int,
        help="mini-batch size (default: 256), the total of all GPUs on all nodes",
    )
    add(
        "--lr",
        "--learning-rate",
        nargs="+",
        type=float,
        help=(
            "initial learning rate (default: 30; 0.01 with --finetune), or several, "
            "trained side by side: the best is chosen on images held out of train"
        ),
    )
    add(
        "--schedule",
        default=[60, 80],
        nargs="*",
        type=int,
        help="learning rate schedule (when to drop lr by a ratio)",
    )
    add("--momentum", default=0.9, type=float, help="momentum")
    add(
        "--wd",
        "--weight-decay",
        default=0.0,
        type=float,
        dest="weight_decay",
        help="weight decay (default: 0.)",
    )
    add("-p", "--print-freq", default=10, type=int, help="print frequency (default: 10)")
    add(
        "--resume",
        default="",
        help=(
            "path to latest checkpoint, ours or MoCo's, or auto: go on with what is in --out, if"
            " anything is"
        ),
    )
    add(
        "-e",
        "--evaluate",
        action="store_true",
        help="evaluate the classifiers of --resume on the validation set",
    )
    add(
        "--seed",
        default=None,
        type=int,
        help="seed of everything; without one it is drawn, printed and kept",
    )
    add(
        "--pretrained",
        default="",
        metavar="FILE",
        help="what to judge: a checkpoint, ours or MoCo's, or a torchvision or timm state dict",
    )
    ranks.add_distributed_options(parser)
    add = parser.add_argument_group("encoder").add_argument
    add("--stem", choices=STEMS, default="auto", help="auto: as the tensors of the file show")
    add(
        "--key",
        action="store_true",
        help="judge the key encoder of a MoCo file, not the query encoder",
    )
    flags.add_switch(
        parser,
        "--mlp",
        default=None,
        help="warn if the file's head is not MoCo v2's MLP (--no-mlp: if it is); not needed",
    )
    add(
        "--amp",
        choices=AMP_TYPES,
        default="off",
        help="half precision in the network; bf16 on any recent GPU",
    )
    add = parser.add_argument_group("what is trained").add_argument
    add(
        "--layers",
        nargs="+",
        type=_layer,
        default=[BACKBONE],
        metavar="LAYER",
        help=(
            "backbone (default, MoCo's), output, conv1 ... conv5 (of a ResNet its "
            "stem and four stages), or all; one classifier for each, on about 9,000 numbers"
        ),
    )
    add(
        "--cache-features",
        action="store_true",
        help="train on features taken once, without augmentation: fast, not MoCo's protocol",
    )
    add("--finetune", action="store_true", help="train the whole network from the checkpoint")
    add(
        "--holdout",
        type=int,
        default=0,
        metavar="n",
        help="images of train to choose among several --lr by (a tenth, at most 10,000)",
    )
    add(
        "--shots",
        default=[],
        type=_shots,
        metavar="n,n",
        help="also the accuracy with so many labelled images a class, e.g. 1,5,10",
    )
    add(
        "--draws",
        default=20,
        type=int,
        metavar="n",
        help="draws of labelled images for --shots (default: 20)",
    )
    add = parser.add_argument_group("run").add_argument
    add(
        "--config",
        metavar="FILE.yaml",
        help=(
            "flags by name, values as they would be typed, switches true or false; the command line"
            " wins"
        ),
    )
    add("--out", metavar="DIR", help="folder of the run (default: runs/<time>-lincls)")
    return parser


def _layer(text: str) -> str:
    if not re.fullmatch(rf"all|{BACKBONE}|{OUTPUT}|conv\d", text):
        raise argparse.ArgumentTypeError(
            f"'{flags.short(text)}' is no layer: expected backbone, output, conv1 ... conv5, or all"
        )
    return text


def _shots(text: str) -> list[int]:
    try:
        return [int(n) for n in text.split(",") if n]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{flags.short(text)}' is no list of whole numbers: expected such as 1,5,10"
        ) from None


def find_start(args) -> resume.Start:
    """Raises BadInput where the file to resume cannot be read, and where going on from it would
    overwrite what came after it.
    """
    return (
        resume.Start(args.resume)
        if args.evaluate
        else resume.find_start(args.resume, None, args.out)[0]
    )


def load_resumed(path: str | None) -> dict:
    """What is in the file to go on with, {} for none; the flags in a file of this script are as its
    parser has them. Raises BadInput.
    """
    if not path:
        return {}
    content = checkpoint.load(path)
    state.require_start(content, path, resume=True)
    if "probe" in content:
        state.require_flags(content, path, get_parser(), OF_THE_RUN)
    return content


def check_args(args) -> None:
    """Everything that can be known before any rank is started; fills in what depends on others."""
    flags.check_data_options(args)
    flags.check(
        args.resume != "auto" or (args.out and args.pretrained),
        "--resume auto needs --out, where to go on, and --pretrained",
    )
    flags.check(
        not args.evaluate or args.resume not in ("", "auto"),
        "-e evaluates trained classifiers: name their file with --resume FILE",
    )
    if args.evaluate and args.out:
        files.require_folder(args.out, "--out")
        flags.check(
            not held(Path(args.out)),
            f"-e writes over no run's results, and --out '{args.out}' holds a run: choose another"
            " --out",
        )
    args.out = args.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-lincls"
    start = find_start(args)
    resumed = load_resumed(start.path)
    flags.check(
        "isl" not in resumed,
        f"'{start.path}' is a pretraining file of main_moco_isl.py: judge it with --pretrained, and"
        " another --out",
    )
    if args.seed is None and not args.evaluate and start.in_place:
        args.seed = flags_of_unsaved(args.out, state.flags_shape(get_parser())).get("seed")
    if "probe" in resumed:
        for name in OF_THE_RUN if args.evaluate else ("seed",) if args.seed is None else ():
            setattr(args, name, resumed["args"][name])
        if args.evaluate:
            args.image_size = args.image_size or resumed["args"].get("image_size", 0)
    if "all" in args.layers:
        args.layers = ["all"]
    args.lr = sorted(set(args.lr or [FINETUNE_LR if args.finetune else MOCO_LR]))
    if not args.evaluate:
        check_folder(args.out, start.in_place)
        resume.check_unsaved(start, vars(args), FREE)
    for name in ("epochs", "batch_size", "print_freq", "draws", "shots"):
        flags.check_range(args, name, 1)
    for name in ("workers", "start_epoch", "schedule", "lr", "weight_decay", "holdout"):
        flags.check_range(args, name, 0)
    flags.check_range(args, "momentum", 0, 1)
    flags.check_range(args, "seed", -(2**63), 2**63 - 1)
    nothing_left = (
        f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}: give a smaller"
        " one, or more epochs"
    )
    flags.check(args.start_epoch < args.epochs or args.evaluate, nothing_left)
    world = ranks.total_ranks(args)
    flags.check(
        args.batch_size % world == 0,
        f"--batch-size {args.batch_size} does not divide into {world} ranks: use a multiple of"
        f" {world}",
    )
    flags.check(
        not args.finetune or args.batch_size >= 2 * world,
        f"--finetune with --batch-size {args.batch_size} leaves one image to each of "
        f"{world} ranks, and batch norm needs two: use at least {2 * world}",
    )
    flags.check(
        bool(args.pretrained or args.resume),
        "nothing to judge: give --pretrained FILE (random weights are not probed)",
    )
    probe_only = len(args.lr) > 1 or args.layers != [BACKBONE] or args.cache_features or args.shots
    flags.check(
        not args.finetune or not probe_only,
        "--finetune trains one network: one --lr, no --layers, --cache-features, --shots",
    )
    flags.check(
        not args.finetune or args.amp != "fp16",
        "--finetune with --amp fp16 is not offered: use --amp bf16",
    )
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(2**31)
    encoder, info = load_backbone(
        args.pretrained or args.resume,
        args.arch,
        args.stem,
        args.key and bool(args.pretrained),
        args.image_size or None,
    )
    # raises BadInput for a layer that is not there
    Taps(encoder, [] if args.layers == ["all"] else args.layers)
    train, _ = (
        features.labelled(args.dataset, args.data, split, args.download)
        for split in ("train", "val")
    )
    require_side(encoder, info["arch"], features.side(args.image_size, info, train))
    require_shots(train.labels, max(args.shots, default=0))
    features.require_own(args.out, "classifiers")


def main(argv: list[str] | None = None, stop=None) -> int:
    """Run with flags argv; returns the exit code.

    stop: a launcher's own 'shall we stop?', asked once a step.
    """
    return exits.exit_code(run, argv, stop)


def run(argv: list[str] | None, stop) -> None:
    args = get_parser().parse_args(argv)
    check_args(args)
    ranks.launch(worker, args, stop)


def worker(args, stop) -> None:
    """One rank of the run."""
    device = devices.resolve_device(args)
    devices.warn_of_slow_amp(args.amp, device, trains=args.finetune)
    args.seed, args.out = dist.broadcast_object((args.seed, args.out))
    torch.manual_seed(args.seed)
    # looked for again in Run: what is there then stays, for the folder is held
    folder = (
        None
        if args.evaluate
        else ranks.on_main(lambda: RunFolder(args.out, find_start(args).in_place))
    )
    try:
        with Stop(stop) as stop:
            run = ranks.together(lambda: Run(args, device, folder, stop))
            run.finish() if args.evaluate else run.train()
    finally:
        if folder is not None:
            folder.close()


class Run:
    """Everything a rank has at hand, put together in the order in which it is needed."""

    def __init__(self, args, device: torch.device, folder: RunFolder | None, stop: Stop):
        self.args = args
        self.device = device
        self.folder = folder
        self.stop = stop
        start = find_start(args)
        path = start.path
        content = load_resumed(path)
        # MoCo's own hold all in one
        self.source = path if path and "probe" not in content else args.pretrained or path
        encoder, self.info = load_backbone(
            self.source,
            args.arch,
            args.stem,
            args.key and self.source != path,
            args.image_size or None,
        )
        self.say(describe(self.info))
        self.sha = features.fingerprint(self.source)
        whole, self.val = (
            features.labelled(args.dataset, args.data, s, args.download) for s in ("train", "val")
        )
        self.say(data.describe(train=whole, val=self.val))
        workers = devices.usable_workers(args.workers, ranks.processes_here(args))
        if args.cache is not None:
            whole, self.val = (
                data.hold_cached(dataset, args.cache, workers, self.say)
                for dataset in (whole, self.val)
            )
        self.data_sha = features.identity([whole])
        self.class_names = whole.classes
        size = features.side(args.image_size, self.info, whole)
        lr_given = args.finetune or args.lr != [MOCO_LR]
        flags = {
            "batch_size": args.batch_size,
            "lr_given": lr_given,
            "mlp": args.mlp,
            "dataset": args.dataset,
            "size": size,
        }
        self.say("\n".join(f"=> warning: {line}" for line in probe.traps(self.info, **flags)))
        held = args.holdout or (min(len(whole) // 10, 10_000) if len(args.lr) > 1 else 0)
        self.rest, self.held = data.holdout(whole, held, args.seed) if held else (whole, None)
        require_shots(self.rest.labels, max(args.shots, default=0))
        self.size = size
        self.reading = {
            "transform": data.get_eval_transform(args.dataset, size),
            "batch_size": args.batch_size,
            "workers": workers,
            "max_bad_images": args.max_bad_images,
        }
        head = get_head(encoder) if self.info["head"] else None
        self.probe = probe.Probe(
            encoder,
            None if args.finetune else args.layers,
            lrs=args.lr,
            classes=len(whole.classes),
            size=size,
            device=device,
            amp=AMP_TYPES[args.amp],
            momentum=args.momentum,
            weight_decay=args.weight_decay,
            reading=self.reading,
        )
        self.probe.watch = stop.watch
        # the flags by which the classifiers were trained
        self.trained = content["args"] if "probe" in content else vars(args)
        self.position = engine.Position(epoch=args.start_epoch)
        self.best = {}
        metrics_size = 0
        if path:
            metrics_size = self.resume(content, path, head)
        resume.check_unsaved(start, vars(args), FREE)
        if folder is not None:
            folder.write_args(vars(args))
            folder.open_metrics(metrics_size)

    def say(self, line: str) -> None:
        if line and dist.is_main():
            print(line, flush=True)

    def log(self, **values) -> None:
        if self.folder is not None:
            self.folder.log(**values)

    def resume(self, content: dict, path: str, head) -> int | None:
        """Go on from a file of this script, or of MoCo's; returns how much of metrics.jsonl is to
        be kept (None: all).
        """
        args, ours = self.args, content.get("probe")
        if ours is None:
            self.probe.take_over_head(head, path)
            self.position.epoch = content.get("epoch", args.start_epoch)
            if "optimizer" in content:
                state.require_optimizer(content["optimizer"], path, self.probe.parameters())
        else:
            other = (
                f"'{path}' probes another file than --pretrained '{args.pretrained}': give that"
                " one, or choose another --out"
            )
            flags.check(not args.pretrained or ours.get("sha256") == self.sha, other)
            # older files do not say
            known = ours.get("classes", self.class_names)
            same = ours.get("data_sha256", self.data_sha) == self.data_sha
            flags.check(
                known == self.class_names,
                f"the classifiers of '{path}' know the classes {checkpoint.some(known)}, and here"
                f" they are {checkpoint.some(self.class_names)}: judge them on images of the same"
                " classes, in folders of the same names",
            )
            if not args.evaluate:
                saved = {k: v for k, v in content["args"].items() if k not in FREE}
                resume.check_same(
                    saved,
                    vars(args),
                    "choose another --out",
                    epochs=ours["epoch"] + bool(ours["step"]),
                )
                flags.check(
                    same,
                    f"'{path}' was trained on other images than those of"
                    f" {args.data or args.dataset}: give the same, or choose another --out",
                )
            state.require_probe(
                content,
                path,
                self.probe.model,
                self.probe.parameters(),
                len(self.rest) if same else None,
                self.trained["batch_size"],
            )
            self.probe.model.load_state_dict(ours["model"])
            self.position = engine.Position(ours["epoch"], ours["step"], ours["total"])
            self.best = ours["best"] if same else {}
            resume.restore_rng(ours["rng"], self.device, self.position.averages)
        if "optimizer" in content and not args.evaluate:
            fast.load_optimizer(self.probe.optimizer, content["optimizer"])
        flags.check(
            not self.probe.exploded(),
            f"'{files.shown(path)}' holds classifiers that are not finite: give an older file, or"
            " start anew with a lower --lr",
        )
        self.say(
            f"=> loaded '{files.shown(path)}' (epoch {self.position.epoch}, step"
            f" {self.position.step})"
        )
        if ours is None:
            return None
        return (
            ours["metrics_size"] if Path(path).parent.resolve() == Path(args.out).resolve() else 0
        )

    def save(self) -> None:
        """checkpoint_last: MoCo's keys, and what an exact resume needs.

        Every rank has to call it.
        """
        generators = resume.rng_of_ranks(self.device, self.position.averages)
        position = self.position

        def write() -> None:
            self.folder.require_sound(self.probe.exploded(), position.epoch, position.step)
            ours = {
                "model": self.probe.model.state_dict(),
                "best": self.best,
                "rng": generators,
                "epoch": position.epoch,
                "step": position.step,
                "total": position.total,
                "sha256": self.sha,
                "classes": self.class_names,
                "data_sha256": self.data_sha,
                "metrics_size": self.folder.metrics_size(),
            }
            mocos = {
                "epoch": position.epoch,
                "arch": self.info["arch"],
                "state_dict": self.probe.state_dict(),
                "best_acc1": max(self.best.values(), default=0.0),
                "optimizer": self.probe.optimizer.state_dict(),
            }
            self.folder.save({**mocos, "args": vars(self.args), "probe": ours}, None)

        ranks.on_main(write)

    def batches(self):
        args, labels = self.args, self.rest.labels.to(self.device)
        if args.cache_features:
            self.say(
                "=> features are taken once, without augmentation: not MoCo's protocol, in which"
                " every epoch sees new crops"
            )
            return linear.CachedBatches(self.probe.take(self.rest), args.batch_size, args.seed)
        augmentation = linear.probe_augmentation(args.dataset, self.size)
        loader = data.train_loader(
            self.rest,
            augmentation=augmentation,
            batch_size=args.batch_size,
            seed=args.seed,
            device=self.device,
            workers=self.reading["workers"],
            max_bad_images=args.max_bad_images,
            views=1,
        )
        return linear.AugmentedBatches(loader, labels)

    def train(self) -> None:
        args = self.args
        position = self.position
        start = time.perf_counter()
        source, val = self.batches(), self.probe.judged(self.val)
        steps = len(source)
        left = probe.Remaining(args.epochs * steps, position.epoch * steps + position.step)

        def show(values: dict) -> None:
            self.say(
                probe.step_line(
                    position,
                    steps,
                    values,
                    self.probe.model.names,
                    left(position.epoch * steps + position.step),
                )
            )
            self.log(kind="step", epoch=position.epoch, step=position.step, **values)

        last_good = lambda: (
            str(self.folder.last) if self.folder and self.folder.last.exists() else ""
        )
        for epoch in range(position.epoch, args.epochs):
            self.probe.start_epoch(epoch, args.epochs, args.schedule)
            linear.train_one_epoch(
                self.probe.answer,
                source,
                self.probe.optimizer,
                position,
                stop=self.stop,
                show=show,
                save=self.save,
                last_good=last_good,
                print_freq=args.print_freq,
            )
            self.end_of_epoch(epoch, self.probe.judge(val))
        source.close()
        val.close()
        self.finish(time.perf_counter() - start)

    def end_of_epoch(self, epoch: int, found: dict[str, dict[str, float]]) -> None:
        name = max(found, key=lambda name: found[name]["top1"])
        self.say(
            f" * Acc@1 {found[name]['top1']:.3f} Acc@5 {found[name]['top5']:.3f}"
            + (f" (best: {name})" if len(found) > 1 else "")
        )
        self.best = {
            name: max(self.best.get(name, 0.0), row["top1"]) for name, row in found.items()
        }
        self.log(kind="epoch", epoch=epoch, val=found, **self.position.averages.epoch())
        if self.probe.frozen and epoch == self.args.start_epoch:
            self.say(self.probe.frozen.check(self.probe.encoder))
        self.position.epoch = epoch + 1
        self.position.step = 0
        self.position.averages = engine.Averages()
        self.save()

    def finish(self, seconds: float = 0.0) -> None:
        """The proof that the backbone did not move, the table, results.json."""
        args = self.args
        judge = lambda split: self.probe.judge(self.probe.judged(split))
        if self.probe.frozen:
            self.say(self.probe.frozen.check(self.probe.encoder))
        held = judge(self.held) if self.held is not None else None
        rows = probe.result_rows(
            self.probe.model.names, judge(self.val), held, self.best, self.probe.dims
        )
        few = (
            self.probe.few_labels(self.rest, self.val, args.shots, args.draws, args.seed)
            if args.shots
            else []
        )
        self.say(probe.table(rows, few))
        protocol = (
            "fine-tuning"
            if args.finetune
            else "cached features"
            if args.cache_features
            else "augmented crops (MoCo's)"
        )
        facts = {
            "pretrained": self.source,
            "sha256": self.sha,
            "encoder": "key" if args.key else "query",
            **{k: self.info[k] for k in ("arch", "stem", "epoch")},
            "dataset": args.dataset,
            "data": args.data,
            "protocol": protocol,
            "epochs": self.position.epoch,
            "batch_size": self.trained["batch_size"],
            "seed": args.seed,
            "train_images": len(self.rest),
            "held_out": len(self.held or ()),
            "val_images": len(self.val),
            "seconds": seconds,
            "backbone_unchanged": bool(self.probe.frozen),
            "classifiers": rows,
            "few_labels": few,
        }
        if self.folder is not None:
            self.folder.require_held()
        if dist.is_main():
            print("\n".join(features.write_results(args.out, "classifiers", facts)))


if __name__ == "__main__":
    sys.exit(main())
