"""The flags of the scripts that judge an encoder, and what they must be."""

import argparse
import re
from pathlib import Path

from moco_isl import files
from moco_isl.encoders import AMP_TYPES, BACKBONE, OUTPUT, STEMS
from moco_isl.run import flags, ranks
from moco_isl.run.flags import check, check_range
from moco_isl.run.folder import held

MOCO_LR, FINETUNE_LR = 30.0, 0.01


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """Which encoder of a file, and as which network: see `backbone.load_backbone`."""
    add = parser.add_argument_group("encoder").add_argument
    add("-a", "--arch", help="architecture (default: as the file says or its tensors show)")
    add("--stem", choices=STEMS, default="auto", help="auto: as the tensors of the file show")
    add("--key", action="store_true", help="the key encoder of a MoCo file, not the query encoder")


def _parser(description: str) -> flags.Parser:
    """A parser with the flags that both scripts have."""
    parser = flags.Parser(description=description)
    flags.add_data_options(parser)
    add_file_options(parser)
    add = parser.add_argument_group("judging").add_argument
    pretrained = "what to judge: a checkpoint of ours or MoCo's, or a state dict of torchvision or"
    add("--pretrained", default="", metavar="FILE", help=f"{pretrained} timm (.safetensors too)")
    workers = "number of data loading workers (default: 32), at most one a core"
    add("-j", "--workers", type=int, default=32, help=workers)
    amp = "half precision in the network; bf16 on any recent GPU"
    add("--amp", choices=AMP_TYPES, default="off", help=amp)
    config = "flags by name, values as they would be typed, switches true or false; the command"
    add("--config", metavar="FILE.yaml", help=f"{config} line wins")
    ranks.add_distributed_options(parser)
    return parser


# ---- main_knn.py ---------------------------------------------------------------------------------


def knn_parser(description: str) -> flags.Parser:
    parser = _parser(description)
    add = parser.add_argument_group("neighbours").add_argument
    k = "neighbours that vote (default: 200); several are judged in one pass"
    add("--k", type=int, nargs="+", default=[200], help=k)
    T = "temperature of a vote's weight exp(similarity / T) (default: 0.1)"
    add("--T", type=float, nargs="+", default=[0.1], help=T)
    batch = "images at a time on each rank (default: 256)"
    add("-b", "--batch-size", type=int, default=256, help=batch)
    out = "folder for results.json (default: none); results of other checkpoints in it are kept"
    add("--out", metavar="DIR", help=out)
    kept = "keep the features in this file, or use those that are in it"
    add("--features", metavar="FILE.safetensors", help=kept)
    return parser


def check_knn(args: argparse.Namespace) -> None:
    """Raise BadInput for values out of range; sorts those of several values."""
    args.k = sorted(set(args.k))
    args.T = sorted(set(args.T))
    check_range(args, "k", 1)
    check_range(args, "T", 0, low_open=True)
    check_range(args, "batch_size", 1)
    check_range(args, "workers", 0)


# ---- main_lincls.py ------------------------------------------------------------------------------


def probe_parser(description: str) -> flags.Parser:
    parser = _parser(description)
    add = parser.add_argument_group("training, as MoCo has it").add_argument
    add("--epochs", default=100, type=int, help="number of total epochs to run")
    add("--start-epoch", default=0, type=int, help="manual epoch number (useful on restarts)")
    batch = "mini-batch size (default: 256), the total of all GPUs on all nodes"
    add("-b", "--batch-size", default=256, type=int, help=batch)
    lr = "initial learning rate (default: 30; 0.01 with --finetune), or several, trained side by"
    lr += " side: the best is chosen on images held out of train"
    add("--lr", "--learning-rate", nargs="+", type=float, help=lr)
    schedule = "learning rate schedule (when to drop lr by a ratio)"
    add("--schedule", default=[60, 80], nargs="*", type=int, help=schedule)
    add("--momentum", default=0.9, type=float, help="momentum")
    decay = "weight decay (default: 0.)"
    add("--wd", "--weight-decay", default=0.0, type=float, dest="weight_decay", help=decay)
    add("-p", "--print-freq", default=10, type=int, help="print frequency (default: 10)")
    go_on = "path to latest checkpoint, ours or MoCo's, or auto: go on with what is in --out, if"
    add("--resume", default="", help=f"{go_on} anything is")
    evaluate = "evaluate the classifiers of --resume on the validation set"
    add("-e", "--evaluate", action="store_true", help=evaluate)
    seed = "seed of everything; without one it is drawn, printed and kept"
    add("--seed", default=None, type=int, help=seed)
    add("--out", metavar="DIR", help="folder of the run (default: runs/<time>-lincls)")
    mlp = "warn if the file's head is not MoCo v2's MLP (--no-mlp: if it is); not needed"
    flags.add_switch(parser, "--mlp", default=None, help=mlp)

    group = parser.add_argument_group("what is trained")
    layers = "backbone (default, MoCo's), output, conv1 ... conv5 (of a ResNet its stem and four"
    layers += " stages), or all; one classifier for each, on about 9,000 numbers"
    named = {"type": layer, "default": [BACKBONE], "metavar": "LAYER"}
    group.add_argument("--layers", nargs="+", help=layers, **named)
    cache = "train on features taken once, without augmentation: fast, not MoCo's protocol"
    group.add_argument("--cache-features", action="store_true", help=cache)
    whole = "train the whole network from the checkpoint"
    group.add_argument("--finetune", action="store_true", help=whole)
    holdout = "images of train to choose among several --lr by (a tenth, at most 10,000)"
    group.add_argument("--holdout", type=int, default=0, metavar="n", help=holdout)
    few = "also the accuracy with so many labelled images a class, e.g. 1,5,10"
    group.add_argument("--shots", default=[], type=shots, metavar="n,n", help=few)
    draws = "draws of labelled images for --shots (default: 20)"
    group.add_argument("--draws", default=20, type=int, metavar="n", help=draws)
    return parser


def layer(text: str) -> str:
    """A value of --layers."""
    if not re.fullmatch(rf"all|{BACKBONE}|{OUTPUT}|conv\d", text):
        raise argparse.ArgumentTypeError(
            f"'{flags.short(text)}' is no layer: expected backbone, output, conv1 ... conv5, or all"
        )
    return text


def shots(text: str) -> list[int]:
    """The value of --shots."""
    try:
        return [int(n) for n in text.split(",") if n]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{flags.short(text)}' is no list of whole numbers: expected such as 1,5,10"
        ) from None


def check_resume(args: argparse.Namespace) -> None:
    """Raise BadInput unless it is clear which file to go on with, or to evaluate, and where."""
    check(
        args.resume != "auto" or (args.out and args.pretrained),
        "--resume auto needs --out, where to go on, and --pretrained",
    )
    check(
        not args.evaluate or args.resume not in ("", "auto"),
        "-e evaluates trained classifiers: name their file with --resume FILE",
    )
    if args.evaluate and args.out:
        files.require_folder(args.out, "--out")
        check(
            not held(Path(args.out)),
            f"-e writes over no run's results, and --out '{args.out}' holds a run: choose another"
            " --out",
        )


def settle_probe(args: argparse.Namespace) -> None:
    """Set --lr and --layers to what they stand for."""
    default = FINETUNE_LR if args.finetune else MOCO_LR
    args.lr = sorted(set(args.lr or [default]))
    if "all" in args.layers:
        args.layers = ["all"]


def protocol(args: argparse.Namespace) -> str:
    """The name in results.json of how the classifiers are trained."""
    if args.finetune:
        return "fine-tuning"
    return "cached features" if args.cache_features else "augmented crops (MoCo's)"


def check_probe(args: argparse.Namespace) -> None:
    """Raise BadInput for values out of range, and for flags that do not go together."""
    for name in ("epochs", "batch_size", "print_freq", "draws", "shots"):
        check_range(args, name, 1)
    for name in ("workers", "start_epoch", "schedule", "lr", "weight_decay", "holdout"):
        check_range(args, name, 0)
    check_range(args, "momentum", 0, 1)
    check_range(args, "seed", -(2**63), 2**63 - 1)
    check(
        args.start_epoch < args.epochs or args.evaluate,
        f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}: give a smaller"
        " one, or more epochs",
    )
    world = ranks.total_ranks(args)
    check(
        args.batch_size % world == 0,
        f"--batch-size {args.batch_size} does not divide into {world} ranks: use a multiple of"
        f" {world}",
    )
    check(
        bool(args.pretrained or args.resume),
        "nothing to judge: give --pretrained FILE (random weights are not probed)",
    )
    if not args.finetune:
        return
    check(
        args.batch_size >= 2 * world,
        f"--finetune with --batch-size {args.batch_size} leaves one image to each of {world} ranks,"
        f" and batch norm needs two: use at least {2 * world}",
    )
    several = len(args.lr) > 1 or args.layers != [BACKBONE]
    check(
        not (several or args.cache_features or args.shots),
        "--finetune trains one network: one --lr, no --layers, --cache-features, --shots",
    )
    check(args.amp != "fp16", "--finetune with --amp fp16 is not offered: use --amp bf16")
