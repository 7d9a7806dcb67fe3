"""The flags of a pretraining: which dataclasses make them, and how they have to go together."""

import argparse
import math
import random
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moco_isl import data
from moco_isl.builder import MoCo
from moco_isl.commands import typed
from moco_isl.data.label_list import read_labels
from moco_isl.encoders import STEMS, on_meta
from moco_isl.losses import LOCAL
from moco_isl.miners import MINERS, find_miner
from moco_isl.mining.rounds import RoundMiner
from moco_isl.objectives import OBJECTIVES
from moco_isl.objectives.bank import BankObjective
from moco_isl.objectives.base import MinedObjective, Objective
from moco_isl.objectives.queue import build_predictor
from moco_isl.options import dashed, default_of, flags_of, listed, opt, typed_flags
from moco_isl.run import flags, loggers, ranks
from moco_isl.run.folder import FolderOptions
from moco_isl.training import fast, small

SCHEDULE = [120, 160]  # MoCo's, for its 200 epochs


@dataclass(kw_only=True)
class TrainingOptions:
    """MoCo's flags of a training by SGD, of an encoder or of classifiers."""

    epochs: int = opt(200, low=1, help="number of total epochs to run")
    start_epoch: int = opt(
        0, low=0, may_change=True, rare=True, help="manual epoch number (useful on restarts)"
    )
    batch_size: int = opt(
        256,
        "-b",
        "--batch-size",
        low=2,
        help="mini-batch size, the total of all GPUs on all nodes",
    )
    lr: float = opt(
        0.03, "--lr", "--learning-rate", low=0, help="initial learning rate for batch 256"
    )
    schedule: list[int] = opt(
        SCHEDULE,
        low=0,
        several="*",
        help="learning rate schedule (when to drop lr by 10x); with several --isl-rounds"
        " epochs of each, if not said 60 % and 80 % of it",
    )
    momentum: float = opt(0.9, low=0, high=1, rare=True, help="momentum of SGD solver")
    weight_decay: float = opt(1e-4, "--wd", "--weight-decay", low=0, help="weight decay")
    print_freq: int = opt(
        10, "-p", "--print-freq", low=1, may_change=True, rare=True, help="print frequency"
    )
    resume: str = opt(
        "",
        may_change=True,
        help="path to latest checkpoint, ours or MoCo's; a run's folder, to go on with that run; or"
        " auto: go on with what is in --out, if anything is",
    )
    seed: int | None = opt(
        None,
        low=-(2**63),
        high=2**63 - 1,
        help="seed of everything; without one it is drawn, printed and kept",
    )


@dataclass(kw_only=True)
class MoCoOptions:
    """MoCo's own flags; where its class has the default, the default is read from there."""

    arch: str = opt(
        "resnet50",
        "-a",
        "--arch",
        help="encoder: torchvision's classifiers (but squeezenet), timm:<name>, resnet18w32"
        " (narrow), alexnet, digits",
    )
    dim: int = opt(default_of(MoCo, "dim"), "--moco-dim", low=1, help="feature dimension")
    K: int = opt(
        default_of(MoCo, "K"), "--moco-k", low=1, help="queue size; number of negative keys"
    )
    m: float = opt(
        default_of(MoCo, "m"),
        "--moco-m",
        low=0,
        high=1,
        help="moco momentum of updating key encoder",
    )
    T: float = opt(
        default_of(MoCo, "T"), "--moco-t", low=0, low_open=True, help="softmax temperature"
    )
    mlp: bool = opt(default_of(MoCo, "mlp"), help="MoCo v2: use mlp head")
    aug_plus: bool = opt(False, help="MoCo v2: use its data augmentation")
    cos: bool = opt(False, help="MoCo v2: use cosine lr schedule")


@dataclass(kw_only=True)
class MoCoV3Options:
    """What MoCo v3 changes for vision transformers; its predictor is the queue objective's."""

    optimizer: str = opt(
        "sgd",
        choices=("sgd", "adamw"),
        rare=True,
        help="adamw: what vision transformers need, with --lr 1.5e-4 x batch size / 256 and --wd"
        " 0.1 in MoCo v3",
    )
    warmup_epochs: int = opt(
        0,
        low=0,
        metavar="n",
        rare=True,
        help="epochs over which the learning rate rises to --lr, by equal steps, before it falls;"
        " with several --isl-rounds in each of them (MoCo v3: 40 of 300)",
    )
    stop_grad_conv1: bool = opt(
        False,
        rare=True,
        help="leave a vision transformer's projection of patches as it was drawn, without training",
    )


@dataclass(kw_only=True)
class WatchOptions:
    """How a run is watched, and ended early."""

    max_steps: int = opt(
        0, low=0, metavar="n", may_change=True, help="end after n steps; to try a command out"
    )
    knn_every: int = opt(
        0,
        low=0,
        metavar="n",
        may_change=True,
        help="log weighted kNN every n epochs where there are labels (never); costs a pass over the"
        " images, and steers nothing",
    )
    knn_holdout: int = opt(
        0,
        low=0,
        metavar="n",
        rare=True,
        help="judge kNN and the probe on n images held out of train; 0: kNN leaves one out",
    )
    probe_every: int = opt(
        0,
        low=0,
        metavar="n",
        may_change=True,
        rare=True,
        help="log a linear probe of the backbone every n epochs, judged on the images of"
        " --knn-holdout; it steers nothing",
    )
    progress: str = opt(
        "lines",
        choices=("lines", "bar"),
        may_change=True,
        rare=True,
        help="MoCo's lines, or a bar with the time left",
    )
    log: str = opt(
        "",
        parse=loggers.listed,
        metavar="LOGGERS",
        may_change=True,
        rare=True,
        help="log the figures elsewhere too: tensorboard, wandb, mlflow (extras of these names),"
        " with commas between them",
    )


@dataclass(kw_only=True)
class NetworkOptions:
    """The parts of the network that MoCo does not have."""

    stem: str = opt(
        "auto",
        choices=STEMS,
        rare=True,
        help="auto: a 3x3 stem without pooling for images up to 64 pixels",
    )
    crop_min: float | None = opt(
        None,
        low=0,
        low_open=True,
        high=1,
        metavar="x",
        rare=True,
        help="the least share of an image's area that a crop shows (MoCo's 0.2; its notebook for"
        " CIFAR-10 has 0.08)",
    )
    bn_splits: int = opt(
        1,
        low=1,
        metavar="n",
        rare=True,
        help="batch norm over n parts of a batch, and keys shuffled between the parts: 8 on one GPU"
        " does what shuffling BN does on 8; 1: the whole batch of a GPU",
    )


@dataclass(kw_only=True)
class LossOptions:
    """Which objective, and how it keeps its bank."""

    objective: str = opt(
        "queue",
        choices=OBJECTIVES,
        help="queue: MoCo. bank: the paper's softmax over all images. To compare with, each a"
        " classifier on the backbone, without head, queue and temperature, by crops and flips"
        " alone unless --aug-plus is given: rotnet, which way up an image is; deepcluster, which"
        " cluster it is in",
    )
    half_bank: bool = opt(
        False,
        "--isl-half-bank",
        rare=True,
        help="keep the bank in float16: half the memory, and half-precision products in the bank"
        " objective's softmax",
    )


@dataclass(kw_only=True)
class MiningOptions:
    """Which miner mines, and when."""

    miner: str = opt(
        "none",
        choices=MINERS,
        plugin=True,
        metavar="NAME",
        help="who finds the positives: none (MoCo); knn (own nearest); gan (ISL, the paper's);"
        " entropy (AND); diffusion (PAD); cluster (LA); average (neighbourhood means); or a class"
        " of your own, my.module:MyMiner. --miner NAME --help shows the flags of one",
    )
    rounds: int = opt(
        1,
        "--isl-rounds",
        low=1,
        metavar="n",
        rare=True,
        help="n equal rounds of training, each with a learning rate schedule of its own, and mining"
        " between them, as the paper, which has 4",
    )
    start: int | None = opt(
        None,
        "--isl-start",
        low=0,
        metavar="e",
        help="first mining before this epoch (0 with --init, else half of the epochs, or the second"
        " of the --isl-rounds); a young encoder mines mistakes",
    )
    every: int | None = opt(
        None,
        "--isl-every",
        low=1,
        metavar="n",
        help="epochs from mining to mining (20, or one of the --isl-rounds). A run that starts late"
        " mines once where it starts, as the last round that it missed",
    )
    mined_from: str = opt(
        "pass",
        "--isl-from",
        choices=("pass", "bank"),
        rare=True,
        help="what a round mines from. pass: features of all images by the encoder as it is; bank:"
        " the rows that training left in the bank, as AND and LA do, which costs no pass (the first"
        " round of --objective queue, whose bank is empty until then, takes one)",
    )
    research_labels: bool = opt(
        False,
        may_change=True,
        rare=True,
        help="let a miner that is made for it draw the positives from the labels; every round and"
        " every file of the run says so",
    )


GROUPS: flags.Groups = {
    "data set": (data.DataOptions,),
    "run": (flags.ConfigOptions, FolderOptions, WatchOptions),
    "MoCo's own": (MoCoOptions,),
    "MoCo v3's, for vision transformers": (MoCoV3Options,),
    "training, as MoCo has it": (TrainingOptions,),
    "ISL: mining": (MiningOptions, RoundMiner),
    "ISL: the loss": (LossOptions, *OBJECTIVES.values()),
    "network and numerics": (NetworkOptions, fast.SpeedOptions),
    "devices and processes": (ranks.DistributedOptions,),
}
KINDS = flags.kinds_of(GROUPS)
MAY_CHANGE = flags.may_change(*KINDS)
# flags of one start of a run, on one machine: no later start takes them over
OF_A_START = flags.dests(flags.ConfigOptions, ranks.DistributedOptions) | {
    *("out", "init", "resume", "start_epoch", "max_steps"),
    *("download", "workers", "compile"),
}


def get_parser(description: str) -> flags.Parser:
    script = "python main_moco_isl.py"
    parser = flags.Parser(script, description, usage="%(prog)s [DIR] [flags]")
    parser.add_groups(GROUPS)
    parser.add_plugins("miner", MINERS, find_miner)
    return parser


def build_miner(args: argparse.Namespace, labels: torch.Tensor | None, images=None):
    """The miner that the flags describe. Raises BadInput.

    labels [M]: of the training images, for a miner that is allowed to see them. images: the
    `TrainingImages`, of which --isl-check names a few; None: the list is not read.
    """
    kind = find_miner(args.miner)
    miner = flags.take(kind, args, **({"labels": labels} if kind.uses_labels else {}))
    if images is not None and getattr(miner, "check", None):
        miner.known = read_labels(miner.check, images.train, images.whole, "--isl-check")
    return miner


def build_objective(args: argparse.Namespace, model: torch.nn.Module, M: int) -> Objective:
    """The objective that the flags describe, around its model. M: images."""
    kind = OBJECTIVES[args.objective]
    more = {
        "seed": args.seed,
        "bank_dtype": torch.float16 if args.isl_half_bank else torch.float32,
        "fast": args.fast,
    }
    more = {name: value for name, value in more.items() if name in kind.options()}
    return flags.take(kind, args, model=model, num_images=M, **more)


def default_flags(miner: str) -> dict:
    """The default of every flag, by name in args.json; with those of a miner's own."""
    kinds = [*KINDS, find_miner(miner)]
    return {flag.dest: flag.default for kind in kinds for flag in flags_of(kind).values()}


def state_shape(args: argparse.Namespace, model: torch.nn.Module) -> tuple[object, list]:
    """(shape of the state of the objective, parameters of its optimizer) that the flags describe.

    model: on any device.
    """
    kind = OBJECTIVES[args.objective]
    parameters = list(model.parameters())
    if not args.predictor:
        return kind.state_shape(model), parameters
    predictor = on_meta(lambda: build_predictor(args.moco_dim, args.predictor))
    return kind.state_shape(model, predictor), [*parameters, *predictor.parameters()]


def idle(args: argparse.Namespace) -> list[str]:
    """The flags of a round that were given though nothing is mined."""
    if args.miner != "none":
        return []
    of_sets = [flags_of(MinedObjective)[name] for name in ("own", "variant")]
    of_a_round = [*flags_of(RoundMiner).values(), *of_sets, flags_of(MiningOptions)["mined_from"]]
    found = [flag.name for flag in of_a_round if getattr(args, flag.dest) != flag.default]
    # these two have a value by now, given or not
    when = {"isl_start": "--isl-start", "isl_every": "--isl-every"}
    found += [name for dest, name in when.items() if dest in args.given]
    return found + (["--isl-loss"] if args.isl_loss == LOCAL else [])


def without_effect(args: flags.Given) -> str:
    """A line on the flags that were given and that this objective does not look at; '' for none."""
    if OBJECTIVES[args.objective].has_head:
        return ""
    of_head = [flags_of(MoCoOptions)[field] for field in ("dim", "K", "m", "T", "mlp")]
    unused = [*of_head, *flags_of(MinedObjective).values(), flags_of(LossOptions)["half_bank"]]
    found = [
        flag.name
        for flag in unused
        if flag.dest in args.given and getattr(args, flag.dest) != flag.default
    ]
    if not found:
        return ""
    return (
        f"warning: --objective {args.objective} trains a classifier on the backbone, without head,"
        f" queue, bank and temperature: {', '.join(found)} changes nothing"
    )


def check_args(args: argparse.Namespace, count: Callable[[], int] | None = None) -> None:
    """Raise BadInput for flags that cannot work; fill in those that depend on others.

    count: opens the images of a new run and says how many there are, which its flags follow.
    """
    data.check_options(flags.take(data.DataOptions, args))
    flags.check_ranges(args, *KINDS)
    require_epochs_left(args)
    if count is not None:
        M = count() - args.knn_holdout
        args.notes += filter(None, [suit(args, M), small.what_to_expect(M)])
    args.notes += filter(None, [without_effect(args)])
    flags.check(
        not args.probe_every or args.knn_holdout,
        "--probe-every judges on images held out of train: add --knn-holdout n",
    )
    _check_batch(args)
    _check_objective(args)
    _check_optimizer(args)
    _check_miner(args)
    _fill_in(args)


def suit(args: flags.Given, M: int) -> str:
    """Set the flags that were left to their defaults to what suits M images; a line about them.

    '' where the defaults suit them.
    """
    defaults = default_flags("none")
    names = ["batch_size", *OBJECTIVES[args.objective].follow]
    if args.optimizer == "sgd":
        names += ["lr"]
    free = {name for name in names if getattr(args, name) == defaults[name]} - args.given
    values = {name: getattr(args, name) for name in small.SUITED}
    parts = ranks.total_ranks(args) * args.bn_splits
    found = small.suited(M, values, free, parts, views=2 if args.symmetric else 1)
    for name, value in found.items():
        setattr(args, name, value)
    if not found:
        return ""
    words = ", ".join(f"--{dashed(name)} {value:g}" for name, value in found.items())
    return f"{M:,} images: {words} suit them better than the defaults; a flag that is given stays"


def next_commands(args: argparse.Namespace, labelled: bool) -> list[str]:
    """Three commands to paste after a run: judge or embed, look, and mine or export."""
    quote = lambda words: " ".join(shlex.quote(str(word)) for word in words)
    where = [*listed(args.data)]
    if args.dataset != "folder":
        where += ["--dataset", args.dataset]
    last = str(Path(args.out) / "checkpoint_last.pth.tar")
    judge = f"{typed('knn')} {quote(['--pretrained', last, *where])}"
    if not labelled:
        judge = f"{typed('embed')} {quote([last, *where, '--out', 'features.parquet'])}"
    found = [judge, f"{typed('report')} {quote([args.out])}"]
    if args.miner != "none" or not OBJECTIVES[args.objective].mined:
        to = ["--to", "safetensors", "--out", "backbone.safetensors"]
        return [*found, f"{typed('export')} {quote([last, *to])}"]
    kept = {name: True for name in ("aug_plus", "cos") if getattr(args, name)}
    usual = default_flags("none") | {"channels": data.RGB.channels, "bits": data.RGB.bits}
    for name in ("batch_size", "moco_k", "moco_m", "epochs", "channels", "bits"):
        if getattr(args, name) != usual[name]:
            kept[name] = getattr(args, name)
    mined = ["--miner", "average", "--isl-budget", "auto", "--lr", f"{args.lr / 3:.2g}"]
    to = ["--init", args.out, "--out", f"{args.out.rstrip('/')}-mined"]
    return [*found, f"{typed('pretrain')} {quote([*where, *to, *mined, *typed_flags(kept)])}"]


def require_epochs_left(args: argparse.Namespace) -> None:
    flags.check(
        args.start_epoch < args.epochs,
        f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}: give a smaller"
        " one, or more epochs",
    )


def _check_batch(args: argparse.Namespace) -> None:
    world = ranks.total_ranks(args)
    parts = world * args.bn_splits
    flags.check(
        args.batch_size % parts == 0,
        f"--batch-size {args.batch_size} does not divide into {world} ranks x {args.bn_splits}"
        f" batch norm splits: use a multiple of {parts}",
    )
    flags.check(
        args.batch_size >= 2 * world,
        f"--batch-size {args.batch_size} leaves one image to each of {world} ranks, and batch norm"
        f" needs two: use at least {2 * world}, or fewer ranks",
    )


def _check_objective(args: argparse.Namespace) -> None:
    kind = OBJECTIVES[args.objective]
    keys = args.batch_size * (2 if args.symmetric else 1)
    flags.check(
        not kind.has_queue or args.moco_k >= keys,
        f"--moco-k {args.moco_k} is smaller than the {keys} keys of one step: use at least that",
    )
    flags.check(
        args.crop_min is None or data.find_set(args.dataset).augmentation is None,
        f"--crop-min: {args.dataset} has an augmentation of its own; leave it off",
    )
    forms = kind.forms if kind.mined else [args.isl_loss]
    flags.check(
        args.isl_loss in forms,
        f"--isl-loss {args.isl_loss} does not belong to --objective {args.objective}: expected"
        f" {' or '.join(forms)}",
    )
    usual = flags_of(BankObjective)["background"].default
    flags.check(
        args.isl_loss == LOCAL or args.isl_background == usual,
        "--isl-background belongs to --isl-loss local",
    )
    for name, other in OBJECTIVES.items():
        others = [x for x in OBJECTIVES.values() if x is not other]
        for flag in flags_of(other).values():
            is_shared = any(flag in flags_of(x).values() for x in others)
            given = getattr(args, flag.dest) != flag.default
            flags.check(
                other is kind or is_shared or not given,
                f"{flag.name} belongs to --objective {name}",
            )
    flags.check(
        kind.mined or args.miner == "none",
        f"--objective {args.objective} has no use for positives: leave --miner none",
    )


def _check_optimizer(args: argparse.Namespace) -> None:
    flags.check(
        args.optimizer == "sgd" or args.momentum == flags_of(TrainingOptions)["momentum"].default,
        f"--momentum {args.momentum:g} is SGD's: leave it out with --optimizer {args.optimizer}",
    )
    length = args.epochs // args.isl_rounds
    flags.check(
        not args.warmup_epochs or args.warmup_epochs < length,
        f"--warmup-epochs {args.warmup_epochs} leaves nothing of the {length} epochs of a learning"
        " rate schedule: give fewer, or more --epochs",
    )


def _check_miner(args: argparse.Namespace) -> None:
    kind = find_miner(args.miner)
    flags.check(
        not kind.uses_labels or args.research_labels,
        f"--miner {args.miner} draws positives from the labels: add --research-labels to say that"
        " this run may, or choose a miner that needs none",
    )
    flags.check(
        kind.uses_labels or not args.research_labels,
        f"--research-labels is for a miner that draws positives from the labels, and --miner"
        f" {args.miner} uses none: leave it off",
    )
    if kind.uses_labels:  # it is built once the images are read
        flags.check_ranges(args, kind)
    else:
        build_miner(args, None)


def _fill_in(args: argparse.Namespace) -> None:
    """Give a value to every flag that was not given and depends on others."""
    cuda = args.device != "cpu" and torch.cuda.is_available()
    for name, value in fast.defaults(args.fast, cuda).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.channels = args.channels or data.RGB.channels
    args.bits = args.bits or data.RGB.bits
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(2**31)
    length, odd = divmod(args.epochs, args.isl_rounds)
    flags.check(
        not odd,
        f"--epochs {args.epochs} does not divide into {args.isl_rounds} rounds of equal length: use"
        f" a multiple of {args.isl_rounds}",
    )
    several = args.isl_rounds > 1
    if args.schedule is flags_of(TrainingOptions)["schedule"].default and several:
        # rounded up, so that the rate of a round of two epochs does not drop in its first
        args.schedule = [math.ceil(length * 3 / 5), math.ceil(length * 4 / 5)]
    if args.isl_start is None:
        late = length if several else args.epochs // 2
        args.isl_start = 0 if args.init else late
    if args.isl_every is None:
        args.isl_every = length if several else 20
    flags.check(
        args.miner == "none"
        or args.isl_from != "bank"
        or args.isl_start
        or args.init
        or args.objective == "queue",
        "--isl-from bank mines before the first step, when the bank holds random rows: give"
        " --isl-start n, or --init",
    )
