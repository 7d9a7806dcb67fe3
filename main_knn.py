#!/usr/bin/env python
"""Judge features by weighted nearest neighbours: no training, no knob that matters much.

From a checkpoint to a number:     python main_knn.py --pretrained runs/x/checkpoint_last.pth.tar
DIR Several k and T in one pass:       ... --k 20 50 200 --T 0.07 0.1
Keep the features, use them again: ... --features x.safetensors
"""

import os
import sys
import time
from pathlib import Path

import torch

from moco_isl import data, dist, files
from moco_isl.encoders import AMP_TYPES, BACKBONE, OUTPUT, STEMS, Taps, require_side
from moco_isl.evaluation import features, probe
from moco_isl.evaluation.backbone import describe, load_backbone
from moco_isl.evaluation.knn import knn_grid
from moco_isl.run import checkpoint, devices, exits, flags, ranks
from moco_isl.run.signals import Stop


def get_parser() -> flags.Parser:
    parser = flags.Parser(description=__doc__)
    flags.add_data_options(parser)
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--pretrained",
        default="",
        metavar="FILE",
        help=(
            "checkpoint of ours or MoCo's, or a state dict of torchvision or timm (.safetensors"
            " too)"
        ),
    )
    group.add_argument(
        "-a", "--arch", help="architecture (default: as the file says or its tensors show)"
    )
    group.add_argument(
        "--stem", choices=STEMS, default="auto", help="auto: as the tensors of the file show"
    )
    group.add_argument(
        "--key",
        action="store_true",
        help="judge the key encoder of a MoCo file, not the query encoder",
    )
    group = parser.add_argument_group("neighbours")
    group.add_argument(
        "--k",
        type=int,
        nargs="+",
        default=[200],
        help="neighbours that vote (default: 200); several are judged in one pass",
    )
    group.add_argument(
        "--T",
        type=float,
        nargs="+",
        default=[0.1],
        help="temperature of a vote's weight exp(similarity / T) (default: 0.1)",
    )
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
        "--out",
        metavar="DIR",
        help=(
            "folder to write results.json into (default: only print); those of other checkpoints in"
            " it are kept"
        ),
    )
    group.add_argument(
        "--features",
        metavar="FILE.safetensors",
        help="keep the features in this file, or use those that are in it",
    )
    group.add_argument(
        "-b",
        "--batch-size",
        type=int,
        default=256,
        help="images at a time on each rank (default: 256)",
    )
    group.add_argument(
        "-j",
        "--workers",
        type=int,
        default=32,
        help="number of data loading workers (default: 32), at most one a core",
    )
    group.add_argument(
        "--amp",
        choices=AMP_TYPES,
        default="off",
        help="half precision in the network; bf16 on any recent GPU",
    )
    ranks.add_distributed_options(parser)
    return parser


def check_args(args) -> None:
    args.k, args.T = sorted(set(args.k)), sorted(set(args.T))
    for name, low, low_open in (
        ("k", 1, False),
        ("T", 0, True),
        ("batch_size", 1, False),
        ("workers", 0, False),
    ):
        flags.check_range(args, name, low, low_open=low_open)
    kept = args.features is not None and files.kind(args.features, "--features") != ""
    flags.check(
        args.pretrained or kept,
        "no encoder: give --pretrained FILE (or --features FILE with features kept before)",
    )
    flags.check(
        args.features is None or files.kind(args.features) != "folder",
        f"--features '{args.features}' is a folder: expected a file name",
    )
    if args.out:
        files.require_folder(args.out, "--out")  # nothing of a run that may be in it is touched
        features.require_own(args.out, "results")
    if args.data is not None or args.dataset != "folder" or not kept:
        flags.check_data_options(args)
        train = labelled_splits(args)["train"]
    if not kept:  # what does not fit shows here, before any rank starts
        encoder, info = load_backbone(
            args.pretrained, args.arch, args.stem, args.key, args.image_size or None
        )
        require_side(encoder, info["arch"], features.side(args.image_size, info, train))
        if args.features:
            checkpoint.require_writable(args.features, "--features")
    else:
        files.require_file(args.features, "--features", "features kept before")
        if args.pretrained:
            files.require_file(args.pretrained, "--pretrained", "a checkpoint")


def main(argv: list[str] | None = None, stop=None) -> int:
    """Run with flags argv; returns the exit code."""
    return exits.exit_code(run, argv, stop)


def run(argv: list[str] | None, stop) -> None:
    args = get_parser().parse_args(argv)
    check_args(args)
    ranks.launch(worker, args, stop)


def say(line: str) -> None:
    if dist.is_main():
        print(line, flush=True)


def worker(args, stop) -> None:
    """One rank: features of both splits, neighbours of its share of the queries, the results of
    all.
    """
    device = devices.resolve_device(args)
    with Stop(stop) as asked:
        splits, facts = get_features(args, device, asked)
    start = time.perf_counter()
    results = judge(splits, args.k, args.T)
    protocol = "val" if "val" in splits else "leave-one-out on train"
    say(
        features.table(
            ("feature", "dim", "k", "T", "top-1"),
            [(r["feature"], r["dim"], r["k"], f"{r['T']:g}", r["top1"]) for r in results],
        )
    )
    M = len(splits["train"].labels)
    Q = len(splits["val" if "val" in splits else "train"].labels)
    say(f"=> {Q} queries ({protocol}) against {M} images in {time.perf_counter() - start:.1f} s")
    if args.out and dist.is_main():
        facts = {**facts, "protocol": protocol, "M": M, "queries": Q, "results": results}
        print("\n".join(features.write_results(args.out, "results", facts)))


def get_features(
    args, device: torch.device, asked: Stop
) -> tuple[dict[str, features.Split], dict[str, str]]:
    """Features of train and, where there is one, val: from --features if they are there, else from
    the encoder.
    """
    kept = dist.broadcast_object(args.features is not None and Path(args.features).exists())
    named = args.data is not None or args.dataset != "folder"
    sources = labelled_splits(args) if named or not kept else {}
    if sources:
        say(data.describe(**sources))
    expected = expectations(args, sources)
    if kept:
        splits, facts = features.load(args.features, expected, device)
        source, on, kept_in = (
            files.shown(str(x)) for x in (facts.get("pretrained"), facts.get("data"), args.features)
        )
        say(f"=> features of '{source}' on '{on}' from '{kept_in}'")
        if args.cache is not None:
            say("=> --cache: no image is read")
        return splits, facts
    encoder, info = load_backbone(
        args.pretrained, args.arch, args.stem, args.key, args.image_size or None
    )
    say(describe(info))
    devices.warn_of_slow_amp(args.amp, device, trains=False)
    if "val" not in sources:
        say(
            f"=> no val split in '{files.shown(args.data)}': each image of train is judged by all"
            " others (leave-one-out)"
        )
    size = features.side(args.image_size, info, sources["train"])
    for line in probe.strange(info, dataset=args.dataset, size=size):
        say(f"=> warning: {line}")
    layers = [OUTPUT, BACKBONE] if info["head"] else [BACKBONE]
    taps = Taps(encoder, layers).to(device)
    workers = devices.usable_workers(args.workers, ranks.processes_here(args))
    if args.cache is not None:
        sources = ranks.together(
            lambda: {
                name: data.hold_cached(dataset, args.cache, workers, say)
                for name, dataset in sources.items()
            }
        )
    options = {
        "transform": data.get_eval_transform(args.dataset, size),
        "batch_size": args.batch_size,
        "device": device,
        "normalize": True,
        "watch": asked.watch,
        "workers": workers,
        "amp": AMP_TYPES[args.amp],
        "max_bad_images": args.max_bad_images,
    }
    start = time.perf_counter()
    splits = {name: features.take(taps, dataset, **options) for name, dataset in sources.items()}
    seconds = time.perf_counter() - start
    images = sum(len(split.labels) for split in splits.values())
    say(
        f"=> features of {images} images of side {size} in {seconds:.1f} s ({images / seconds:.0f}"
        " img/s)"
    )
    facts = {
        **expected,
        "image_size": str(size),
        "amp": args.amp,
        "arch": info["arch"],
        "stem": info["stem"],
        "pretrained": args.pretrained,
        "data": args.data or args.dataset,
        "epoch": str(info["epoch"]),
    }
    if args.features:
        ranks.on_main(lambda: features.save(args.features, splits, facts))
    return splits, facts


def labelled_splits(args) -> dict:
    """train and, where there is one, val."""
    names = (
        ["train", "val"]
        if args.dataset != "folder" or os.path.isdir(Path(args.data) / "val")
        else ["train"]
    )
    return {name: features.labelled(args.dataset, args.data, name, args.download) for name in names}


def expectations(args, sources: dict) -> dict[str, str]:
    """What kept features have to say of themselves: all that the flags name."""
    expected = {"image_size": str(args.image_size)} if args.image_size else {}
    if sources:
        expected |= {"dataset": args.dataset, "data_sha256": features.identity(sources.values())}
    if args.pretrained:
        expected["sha256"] = features.fingerprint(args.pretrained)
    if args.pretrained or args.key:
        expected["encoder"] = "key" if args.key else "query"
    if args.arch:
        expected["arch"] = args.arch
    if args.stem != "auto":
        expected["stem"] = args.stem
    if args.pretrained or args.amp != "off":
        expected["amp"] = args.amp
    return expected


def judge(splits: dict[str, features.Split], ks: list[int], Ts: list[float]) -> list[dict]:
    """Accuracy of every feature, k and T; each rank searches for its share of the queries."""
    train, leave_one_out = splits["train"], "val" not in splits
    queries = train if leave_one_out else splits["val"]
    most = len(train.labels) - leave_one_out
    flags.check(
        most > 0,
        "there is one image and no other to judge it by: expected more of them, or a val split",
    )
    if max(ks) > most:
        say(f"=> k {max(ks)} is more than the {most} images there are: {most} instead")
        ks = sorted({min(k, most) for k in ks})
    start, stop = dist.shard(len(queries.labels))
    own = torch.arange(start, stop, device=queries.labels.device) if leave_one_out else None
    classes = int(torch.cat([train.labels, queries.labels]).max()) + 1
    results = []
    for layer in sorted(train.features, reverse=True):  # output, then backbone
        bank = train.features[layer]
        grid = knn_grid(
            queries.features[layer][start:stop], bank, train.labels, ks, Ts, classes, exclude=own
        )
        for (k, T), found in grid.items():
            found = dist.all_gather_rows(found)
            results.append(
                {
                    "feature": layer,
                    "dim": bank.shape[1],
                    "k": k,
                    "T": T,
                    "top1": features.accuracy(found, queries.labels),
                }
            )
    return results


if __name__ == "__main__":
    sys.exit(main())
