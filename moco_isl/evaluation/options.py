"""The flags of the scripts that judge an encoder: which dataclasses make them, and how they have to
go together.
"""

import argparse
from pathlib import Path

from moco_isl import data, files
from moco_isl.encoders import BACKBONE
from moco_isl.evaluation.features import FeatureOptions
from moco_isl.evaluation.knn import FewLabelsOptions, NeighbourOptions
from moco_isl.evaluation.probe import ProbeOptions
from moco_isl.evaluation.probing import FINETUNE_LR, MOCO_LR, ProbeTrainingOptions
from moco_isl.evaluation.results import ResultsOptions
from moco_isl.evaluation.subject import SubjectOptions
from moco_isl.run import flags, ranks
from moco_isl.run.backbone import EncoderOptions
from moco_isl.run.flags import check
from moco_isl.run.folder import held
from moco_isl.training.options import require_epochs_left

OF_BOTH: flags.Groups = {
    "data set": (data.DataOptions,),
    "encoder": (SubjectOptions, EncoderOptions),
}
DEVICES: flags.Groups = {"devices and processes": (ranks.DistributedOptions,)}
KNN_GROUPS: flags.Groups = OF_BOTH | {
    "neighbours": (NeighbourOptions, FeatureOptions),
    "results": (flags.ConfigOptions, ResultsOptions),
    **DEVICES,
}
PROBE_GROUPS: flags.Groups = OF_BOTH | {
    "training of classifiers, as MoCo has it": (flags.ConfigOptions, ProbeTrainingOptions),
    "what is trained": (ProbeOptions, FewLabelsOptions),
    **DEVICES,
}
KNN_KINDS = flags.kinds_of(KNN_GROUPS)
PROBE_KINDS = flags.kinds_of(PROBE_GROUPS)
MAY_CHANGE = flags.may_change(*PROBE_KINDS)
# the flags that -e takes from the file: which classifiers, and which images are held out
OF_THE_RUN = ("lr", "layers", "finetune", "cache_features", "key", "seed", "holdout")


def get_parser(script: str, description: str, groups: flags.Groups) -> flags.Parser:
    parser = flags.Parser(script, description, usage="%(prog)s [DIR] [flags]")
    parser.add_groups(groups)
    return parser


# ---- main_knn.py ---------------------------------------------------------------------------------


def check_knn(args: argparse.Namespace) -> None:
    """Raise BadInput for values out of range; sorts those of several values."""
    flags.check_ranges(args, *KNN_KINDS)
    args.k = sorted(set(args.k))
    args.T = sorted(set(args.T))


# ---- main_lincls.py ------------------------------------------------------------------------------


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
    flags.check_ranges(args, *PROBE_KINDS)
    if not args.evaluate:
        require_epochs_left(args)
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
