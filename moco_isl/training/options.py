"""The flags of the main script: MoCo's own with their meaning and default, ours under their own
headings, and what they must be.
"""

import argparse
import math
import random

import torch

from moco_isl.encoders import STEMS
from moco_isl.ops import ivf
from moco_isl.run import flags, ranks
from moco_isl.training import fast
from moco_isl.training.engine import rounds_until

SCHEDULE = [120, 160]  # MoCo's, for its 200 epochs
TRUST = "off"
AUTO = 0.8  # on the digits mining broke even between 0.7 and 0.85


def get_parser(description: str) -> flags.Parser:
    parser = flags.Parser(description=description)
    # no flags: True, and False in a run that began without, see resume.BEFORE
    parser.set_defaults(bn_shuffle=None, symmetric_sum=None)
    flags.add_data_options(parser)
    group = parser.add_argument_group("training, as MoCo has it")
    group.add_argument(
        "-a",
        "--arch",
        default="resnet50",
        help=(
            "encoder: torchvision's classifiers (but squeezenet), timm:<name>, resnet18w32"
            " (narrow), alexnet, digits (default: resnet50)"
        ),
    )
    group.add_argument(
        "-j",
        "--workers",
        default=32,
        type=int,
        help="number of data loading workers (default: 32), at most one a core",
    )
    group.add_argument("--epochs", default=200, type=int, help="number of total epochs to run")
    group.add_argument(
        "--start-epoch", default=0, type=int, help="manual epoch number (useful on restarts)"
    )
    group.add_argument(
        "-b",
        "--batch-size",
        default=256,
        type=int,
        help="mini-batch size (default: 256), the total of all GPUs on all nodes",
    )
    group.add_argument(
        "--lr",
        "--learning-rate",
        default=0.03,
        type=float,
        help="initial learning rate for batch 256",
    )
    group.add_argument(
        "--schedule",
        default=SCHEDULE,
        nargs="*",
        type=int,
        help=(
            "learning rate schedule (when to drop lr by 10x); with --isl-rounds "
            "epochs of each round (default: 120 160, or 60 %% and 80 %% of a round)"
        ),
    )
    group.add_argument("--momentum", default=0.9, type=float, help="momentum of SGD solver")
    group.add_argument(
        "--wd",
        "--weight-decay",
        default=1e-4,
        type=float,
        dest="weight_decay",
        help="weight decay (default: 1e-4)",
    )
    group.add_argument(
        "-p", "--print-freq", default=10, type=int, help="print frequency (default: 10)"
    )
    group.add_argument(
        "--resume",
        default="",
        help=(
            "path to latest checkpoint, ours or MoCo's, or auto: go on with what is in --out, if"
            " anything is"
        ),
    )
    group.add_argument(
        "--seed",
        default=None,
        type=int,
        help="seed of everything; without one it is drawn, printed and kept",
    )
    ranks.add_distributed_options(parser)

    group = parser.add_argument_group("MoCo's own")
    group.add_argument("--moco-dim", default=128, type=int, help="feature dimension (default: 128)")
    group.add_argument(
        "--moco-k",
        default=65536,
        type=int,
        help="queue size; number of negative keys (default: 65536)",
    )
    group.add_argument(
        "--moco-m",
        default=0.999,
        type=float,
        help="moco momentum of updating key encoder (default: 0.999)",
    )
    group.add_argument(
        "--moco-t", default=0.07, type=float, help="softmax temperature (default: 0.07)"
    )
    flags.add_switch(group, "--mlp", help="MoCo v2: use mlp head")
    flags.add_switch(group, "--aug-plus", help="MoCo v2: use its data augmentation")
    flags.add_switch(group, "--cos", help="MoCo v2: use cosine lr schedule")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--config",
        metavar="FILE.yaml",
        help=(
            "flags by name, values as they would be typed, switches true or false; the command line"
            " wins"
        ),
    )
    group.add_argument(
        "--out", metavar="DIR", help="folder of the run (default: runs/<time>-<arch>)"
    )
    group.add_argument(
        "--init",
        metavar="FILE",
        help=(
            "start from the weights of this file, ours or MoCo's, at epoch 0: the way to continue a"
            " converged MoCo with mining"
        ),
    )
    group.add_argument(
        "--keep", type=int, metavar="n", help="keep the last n numbered checkpoints (default: all)"
    )
    group.add_argument(
        "--save-epochs",
        type=int,
        default=1,
        metavar="n",
        help=(
            "save after every n-th epoch and after the last one (default: 1); raise it "
            "where an epoch takes seconds. Rounds of mining and signals save in any case"
        ),
    )
    group.add_argument(
        "--save-every",
        type=int,
        default=0,
        metavar="n",
        help="save every n steps as well; for long epochs on machines that die",
    )
    group.add_argument(
        "--max-steps",
        type=int,
        default=0,
        metavar="n",
        help="end after n steps; to try a command out",
    )
    group.add_argument(
        "--knn-every",
        type=int,
        default=0,
        metavar="n",
        help=(
            "log weighted kNN every n epochs where there are labels (default: never); "
            "costs a pass over the images, and steers nothing"
        ),
    )
    group.add_argument(
        "--knn-holdout",
        type=int,
        default=0,
        metavar="n",
        help="judge kNN on n images held out of train; 0: leave one out",
    )
    group.add_argument(
        "--progress",
        choices=("lines", "bar"),
        default="lines",
        help="MoCo's lines (default), or a bar with the time left",
    )
    flags.add_switch(
        group, "--tensorboard", help="write TensorBoard events into the run's folder too (an extra)"
    )

    group = parser.add_argument_group("network and numerics")
    group.add_argument(
        "--stem",
        choices=STEMS,
        default="auto",
        help="auto: a 3x3 stem without pooling for images up to 64 pixels",
    )
    group.add_argument(
        "--bn-splits",
        type=int,
        default=1,
        metavar="n",
        help=(
            "batch norm over n parts of a batch, and keys shuffled between the parts: 8 on one GPU"
            " does what shuffling BN does on 8 (default: 1, the whole batch of a GPU)"
        ),
    )
    flags.add_switch(
        group,
        "--symmetric",
        help=(
            "each view is query once and key once: better epochs, at twice the price. The loss is"
            " the sum of both directions, as in MoCo's notebook; with the settings of a library"
            " that takes the mean give half the --lr and twice the --wd"
        ),
    )
    flags.add_switch(
        group,
        "--fast",
        help=(
            "all that makes a step fast: --on-device, --channels-last, a fused optimizer and loss"
            " and, on a GPU, TF32, --amp bf16 and --compile; each can be taken back, as in --fast"
            " --no-compile"
        ),
    )
    group.add_argument(
        "--amp",
        choices=("off", "bf16", "fp16"),
        help=(
            "half precision in the network; bf16 on any recent GPU, or a CPU with instructions for"
            " it; fp16 on a GPU (default: off)"
        ),
    )
    flags.add_switch(
        group,
        "--channels-last",
        default=None,
        help="memory format that convolutions like: faster on a CPU, and on a GPU with --amp",
    )
    flags.add_switch(
        group,
        "--compile",
        default=None,
        help=(
            "torch.compile the encoders and what is augmented on the device: a minute at the start,"
            " faster steps"
        ),
    )
    flags.add_switch(
        group,
        "--on-device",
        default=None,
        help=(
            "augment on the device: small images are held there whole, of photos the workers only"
            " decode and crop"
        ),
    )

    group = parser.add_argument_group("ISL: the loss")
    group.add_argument(
        "--objective",
        choices=("queue", "bank", "rotnet"),
        default="queue",
        help=(
            "queue: MoCo. bank: the paper's softmax over all images. rotnet: "
            "which way up an image is, to compare with"
        ),
    )
    group.add_argument(
        "--isl-loss",
        choices=("logsum", "meanlog"),
        default="logsum",
        help=(
            "logsum: Eq. 5, forgiving. meanlog: learns most from clean sets, and "
            "suffers most from wrong ones"
        ),
    )
    group.add_argument(
        "--isl-hpe",
        type=float,
        default=0.5,
        metavar="w",
        help="weight of hard positive enhancement, Eq. 6 (0.5); 0 turns it off",
    )
    group.add_argument(
        "--isl-max-positives",
        type=int,
        default=32,
        metavar="P",
        help="positives of an image that a step looks at (32); larger sets take turns",
    )
    group.add_argument(
        "--isl-bank-mix",
        type=float,
        metavar="mu",
        help="share of the new feature in a bank row, Eq. 8 (1 with the queue, 0.5 with the bank)",
    )
    flags.add_switch(
        group,
        "--isl-recenter",
        default=None,
        help=(
            "with the queue, move positives from the bank's mean to the queue's: they are up to an"
            " epoch older than the negatives, and what all images have moved by since tells one"
            " from the other (on; --no-isl-recenter: as they are)"
        ),
    )
    group.add_argument(
        "--isl-between",
        type=int,
        default=0,
        metavar="n",
        help=(
            "with the queue, leave those of an image's n nearest that are not in its set out of its"
            " negatives: too near to push away, too doubtful to pull at (0)"
        ),
    )
    flags.add_switch(
        group,
        "--isl-half-bank",
        help=(
            "keep the bank in float16: half the memory, and half-precision products in the bank"
            " objective's softmax"
        ),
    )

    group = parser.add_argument_group("ISL: mining")
    group.add_argument(
        "--miner",
        choices=("none", "knn", "gan", "entropy", "diffusion", "cluster", "average", "oracle"),
        default="none",
        help=(
            "who finds the positives (default: none, which is MoCo); gan: ISL, entropy: AND,"
            " diffusion: PAD, cluster: LA; average: by neighbourhood means; oracle: drawn from the"
            " labels, for research only"
        ),
    )
    group.add_argument(
        "--isl-rounds",
        type=int,
        default=1,
        metavar="n",
        help=(
            "n equal rounds of training, each with a learning rate schedule of its own, and mining "
            "between them, as the paper (it has 4)"
        ),
    )
    group.add_argument(
        "--isl-start",
        type=int,
        metavar="e",
        help=(
            "first mining before this epoch (default: 0 with --init, else half of the epochs, or"
            " the second of the --isl-rounds); a young encoder mines mistakes"
        ),
    )
    group.add_argument(
        "--isl-every",
        type=int,
        metavar="n",
        help=(
            "epochs from mining to mining (20, or one of the --isl-rounds). A run that starts late"
            " mines once where it starts, as the last round that it missed"
        ),
    )
    group.add_argument(
        "--isl-budget",
        type=float,
        default=5.0,
        metavar="x",
        help=(
            "mean positives of an image after a round, the surest first (5); raise it while the "
            "printed precision stays above 0.9"
        ),
    )
    flags.add_switch(
        group,
        "--isl-grow",
        help=(
            "the budget counts for a round: x in the first, 2x in the second, and so on, as the"
            " published code (with 0.5)"
        ),
    )
    group.add_argument(
        "--isl-max-share",
        type=float,
        default=0.05,
        metavar="x",
        help="no image is a positive of more than this share of all images (0.05)",
    )
    group.add_argument(
        "--isl-trust",
        default=TRUST,
        metavar="auto|p|off",
        help=(
            "keep the widest sets, within the budget, of which this share is right by an estimate"
            " without labels, and none where nothing is that sure; auto: 0.8, about where mining"
            " broke even on the digits (off)"
        ),
    )
    flags.add_switch(
        group,
        "--isl-views",
        default=None,
        help=(
            "let a round look at two augmented views of every image too, which tells how much of"
            " its sets is right: two more feature passes a round (on with --isl-trust). Without, a"
            " round can only say how much at most. --miner average mines by them too"
        ),
    )
    flags.add_switch(
        group,
        "--isl-keep",
        help="never drop a pair once mined, as the paper; off: each round judges old pairs again",
    )
    group.add_argument(
        "--isl-index",
        choices=ivf.CHOICES,
        default="exact",
        help=(
            "how a round searches all images. ivf: approximately, by the extra faiss, with 0.95 of"
            " the 10 nearest found; of use from some 100,000 images on a CPU. auto: ivf from there"
            " (14 million on a GPU) where faiss is installed. exact: what is mined depends on no"
            " extra (default)"
        ),
    )
    group.add_argument(
        "--isl-neighbors",
        type=int,
        metavar="k",
        help=(
            "nearest images looked at by knn and entropy (as many as the budget asks for) and in"
            " diffusion's graph (20); whose mean average takes (50)"
        ),
    )
    group.add_argument(
        "--isl-share",
        type=float,
        default=0.25,
        metavar="x",
        help="entropy: the surest share of all images mines, another x each round (0.25)",
    )
    group.add_argument(
        "--isl-walk",
        type=int,
        default=2,
        metavar="n",
        help="diffusion: edges of the longest walk through the graph (2)",
    )
    group.add_argument(
        "--isl-clusters",
        type=int,
        metavar="n",
        help="cluster: clusters of a clustering (one for 40 images)",
    )
    group.add_argument(
        "--isl-clusterings",
        type=int,
        default=5,
        metavar="n",
        help="cluster: how many clusterings (5)",
    )
    group.add_argument(
        "--isl-background",
        type=int,
        default=100,
        metavar="k",
        help="cluster: positives are among the k nearest (100)",
    )
    group.add_argument(
        "--isl-candidates",
        type=int,
        default=10,
        metavar="k",
        help="nearest rows of a proxy that may join (10)",
    )
    group.add_argument(
        "--isl-threshold",
        type=float,
        default=0.5,
        metavar="s",
        help="a proxy with a lower score adds nothing (0.5)",
    )
    group.add_argument(
        "--isl-radius",
        type=float,
        default=0.6,
        metavar="r",
        help="cosine (confidence) or Euclidean distance (fixed) within which rows join (0.6)",
    )
    group.add_argument(
        "--isl-radius-mode",
        choices=("confidence", "fixed"),
        default="confidence",
        help="confidence: the surer, the wider, as the published code",
    )
    group.add_argument(
        "--isl-triplets",
        type=int,
        default=5,
        metavar="n",
        help="triplets an anchor; the best proxy counts (5)",
    )
    group.add_argument(
        "--isl-lambda",
        type=float,
        default=1.0,
        metavar="l",
        help="Eq. 1: larger makes proxies explore more (1)",
    )
    group.add_argument(
        "--isl-gan-iters",
        type=int,
        metavar="n",
        help=(
            "most iterations of the GAN in a round (default: 90 times the root of the number of"
            " images, 20,000 at 50,000)"
        ),
    )
    group.add_argument(
        "--isl-gan-min-iters",
        type=int,
        metavar="n",
        help="fewest (default: a quarter of the most); a short GAN collapses onto one image",
    )

    group = parser.add_argument_group("research: how right must positives be?")
    flags.add_switch(
        group,
        "--research-labels",
        help=(
            "let --miner oracle draw the positives from the labels; every round and every file of"
            " the run says so"
        ),
    )
    group.add_argument(
        "--oracle-precision",
        type=float,
        default=1.0,
        metavar="p",
        help="share of its positives that have the anchor's label (1)",
    )
    group.add_argument(
        "--oracle-size",
        type=float,
        default=5.0,
        metavar="s",
        help="its positives an image on average (5)",
    )
    group.add_argument(
        "--oracle-wrong",
        choices=("uniform", "near"),
        default="uniform",
        help=(
            "its wrong positives: uniform (default), or near: the most similar "
            "images of another label, as mining's own mistakes are"
        ),
    )
    group.add_argument(
        "--oracle-right",
        choices=("uniform", "near"),
        default="uniform",
        help=(
            "its right positives: uniform (default), or near: the most similar "
            "images of the same label, which teach less, as those that mining finds"
        ),
    )
    return parser


def trust(text: str) -> float | None:
    """The bound that --isl-trust names."""
    if text in ("auto", "off"):
        return AUTO if text == "auto" else None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    flags.check(
        0 < value <= 1,
        f"--isl-trust {text}: expected auto, off, or a precision above 0 and at most 1",
    )
    return value


def most_positives(flags: dict) -> int:
    """Positives an image in the largest of the rounds, by flags of `check_args`."""
    rounds = (
        rounds_until(flags["epochs"] - 1, flags["isl_start"], flags["isl_every"])
        if flags["isl_grow"]
        else 1
    )
    return max(1, math.ceil(flags["isl_budget"] * rounds))


IN_USE_ANYHOW = {
    "isl_loss",
    "isl_hpe",
    "isl_max_positives",
    "isl_bank_mix",
    "isl_recenter",
    "isl_half_bank",
    "isl_rounds",
    "isl_start",
    "isl_every",
}


def idle(args: argparse.Namespace) -> list[str]:
    """The flags of mining that were given though nothing is mined."""
    if args.miner != "none":
        return []
    default = get_parser("").get_default
    names = [name for name in vars(args) if name.startswith("isl_") and name not in IN_USE_ANYHOW]
    return [
        "--" + name.replace("_", "-")
        for name in names
        if (getattr(args, name) or None) != (default(name) or None)
    ]


def check_args(args: argparse.Namespace) -> None:
    """Everything about the flags that can be known before any work; fills in what depends on
    others.
    """
    flags.check_data_options(args)
    for name, low in {
        "epochs": 1,
        "batch_size": 2,
        "workers": 0,
        "moco_k": 1,
        "moco_dim": 1,
        "print_freq": 1,
        "bn_splits": 1,
        "isl_every": 1,
        "isl_triplets": 1,
        "isl_rounds": 1,
        "isl_neighbors": 1,
        "isl_walk": 1,
        "isl_clusters": 1,
        "isl_clusterings": 1,
        "isl_background": 1,
        "isl_candidates": 1,
        "isl_max_positives": 1,
        "isl_gan_iters": 1,
        "isl_gan_min_iters": 1,
        "start_epoch": 0,
        "save_epochs": 1,
        "save_every": 0,
        "max_steps": 0,
        "schedule": 0,
        "knn_every": 0,
        "knn_holdout": 0,
        "lr": 0,
        "weight_decay": 0,
        "isl_hpe": 0,
        "isl_lambda": 0,
        "keep": 1,
        "isl_start": 0,
        "isl_between": 0,
    }.items():
        flags.check_range(args, name, low)
    flags.check_range(args, "seed", -(2**63), 2**63 - 1)
    for name, low, high, low_open in [
        ("moco_t", 0, float("inf"), True),
        ("isl_budget", 0, flags.LARGEST, True),
        ("moco_m", 0, 1, False),
        ("momentum", 0, 1, False),
        ("isl_threshold", 0, 1, False),
        ("isl_radius", 0, 2, False),
        ("isl_bank_mix", 0, 1, True),
        ("isl_max_share", 0, 1, True),
        ("isl_share", 0, 1, True),
        ("oracle_precision", 0, 1, False),
        ("oracle_size", 0, flags.LARGEST, True),
    ]:
        flags.check_range(args, name, low, high, low_open)
    flags.check(
        args.start_epoch < args.epochs,
        f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}: give a smaller"
        " one, or more epochs",
    )
    world = ranks.total_ranks(args)
    flags.check(
        args.batch_size % (world * args.bn_splits) == 0,
        f"--batch-size {args.batch_size} does not divide into {world} ranks x {args.bn_splits}"
        f" batch norm splits: use a multiple of {world * args.bn_splits}",
    )
    flags.check(
        args.batch_size >= 2 * world,
        f"--batch-size {args.batch_size} leaves one image to each of {world} ranks, and batch "
        f"norm needs two: use at least {2 * world}, or fewer ranks",
    )
    keys = args.batch_size * (2 if args.symmetric else 1)
    flags.check(
        args.objective != "queue" or args.moco_k >= keys,
        f"--moco-k {args.moco_k} is smaller than the {keys} keys of one step: use at least that",
    )
    flags.check(
        args.objective == "queue" or not args.symmetric, "--symmetric belongs to --objective queue"
    )
    flags.check(
        args.objective == "queue" or not args.isl_between,
        "--isl-between belongs to --objective queue: the bank's softmax is over all images",
    )
    flags.check(
        args.objective != "rotnet" or args.miner == "none",
        "--objective rotnet has no use for positives: leave --miner none",
    )
    bound = trust(args.isl_trust)
    oracle = args.miner == "oracle"
    flags.check(
        not oracle or args.research_labels,
        "--miner oracle draws positives from the labels: add --research-labels to say that this run"
        " may, or choose a miner that needs none",
    )
    flags.check(
        oracle or not args.research_labels,
        f"--research-labels is for --miner oracle, and --miner {args.miner} uses no labels: leave"
        " it off",
    )
    flags.check(
        not oracle or not (args.isl_grow or args.isl_keep or bound or args.isl_views),
        "--miner oracle draws its sets anew each round, of --oracle-size, and knows "
        "how right they are: leave --isl-grow, --isl-keep, --isl-trust and --isl-views off",
    )
    flags.check(
        args.isl_index != "ivf" or ivf.installed(),
        "--isl-index ivf needs the package faiss, which is not installed: pip install"
        " 'moco_isl[faiss]'",
    )
    flags.check(
        not oracle or args.isl_index == "exact",
        "--miner oracle searches by label, always exactly: leave --isl-index off",
    )
    fewest, most = args.isl_gan_min_iters, args.isl_gan_iters
    flags.check(
        None in (fewest, most) or fewest <= most,
        f"--isl-gan-min-iters {args.isl_gan_min_iters} is more than --isl-gan-iters"
        f" {args.isl_gan_iters}",
    )
    for name, value in fast.defaults(
        args.fast, cuda=args.device != "cpu" and torch.cuda.is_available()
    ).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(2**31)
    length, odd = divmod(args.epochs, args.isl_rounds)
    flags.check(
        not odd,
        f"--epochs {args.epochs} does not divide into {args.isl_rounds} rounds of equal length: use"
        f" a multiple of {args.isl_rounds}",
    )
    if args.schedule is SCHEDULE and args.isl_rounds > 1:
        # up: a round of two epochs is not to decay in its first
        args.schedule = [math.ceil(length * 3 / 5), math.ceil(length * 4 / 5)]
    args.isl_recenter = args.isl_recenter is not False
    args.bn_shuffle = args.bn_shuffle is not False
    args.symmetric_sum = args.symmetric_sum is not False
    if args.isl_views is None:
        args.isl_views = bound is not None and args.miner != "none"
    if args.isl_start is None:
        args.isl_start = 0 if args.init else length if args.isl_rounds > 1 else args.epochs // 2
    if args.isl_every is None:
        args.isl_every = length if args.isl_rounds > 1 else 20
