#!/usr/bin/env python
"""Judge features by weighted nearest neighbours: nothing is trained.

From a checkpoint to a number:
    python main_knn.py --pretrained runs/x/checkpoint_last.pth.tar DIR
Several k and T in one pass:
    ... --k 20 50 200 --T 0.07 0.1
Keep the features for later:
    ... --features x.safetensors
"""

import sys
import time

import torch

from moco_isl import data, dist, files
from moco_isl.encoders import AMP_TYPES, BACKBONE, OUTPUT, Taps
from moco_isl.evaluation import features, options, results
from moco_isl.evaluation.knn import judge
from moco_isl.evaluation.subject import Subject, identity
from moco_isl.options import listed
from moco_isl.run import checkpoint, devices, exits, flags, ranks
from moco_isl.run.backbone import describe
from moco_isl.run.ranks import say
from moco_isl.run.signals import Stop
from moco_isl.run.weights import weights_file


def get_parser() -> flags.Parser:
    return options.get_parser("python main_knn.py", __doc__, options.KNN_GROUPS)


def main(argv: list[str] | None = None, stop=None) -> int:
    """Run with flags argv; returns the exit code."""
    return exits.exit_code(run, argv, stop)


def run(argv: list[str] | None, stop) -> None:
    args, subject = prepare(argv)
    ranks.launch(worker, args, stop, subject)


def prepare(argv: list[str] | None):
    """The flags and the subject of a run, before any rank is started. Raises BadInput."""
    args = get_parser().parse_args(argv)
    options.check_knn(args)
    return args, check_subject(args)


def check_args(args) -> None:
    """Raise BadInput for flags that do not go together; launch/ asks this before it submits."""
    options.check_knn(args)
    if names_data(args):
        data.check_options(flags.take(data.DataOptions, args))


def has_features(args) -> bool:
    """Whether --features names a file: no encoder is needed then."""
    return args.features is not None and files.kind(args.features, "--features") != ""


def names_data(args) -> bool:
    return args.data is not None or args.dataset != "folder"


def check_subject(args) -> Subject:
    """The subject to judge. Raises BadInput where flags, files and images do not go together."""
    kept = has_features(args)
    flags.check(
        args.pretrained or kept,
        "no encoder: give --pretrained FILE (or --features FILE with features kept before)",
    )
    if args.out:
        files.require_folder(args.out, "--out")
        results.read_own(args.out, "results")
    if names_data(args) or not kept:
        data.check_options(flags.take(data.DataOptions, args))
    encoder = (args.pretrained, args.arch, args.stem, args.key)
    images = (args.dataset, args.data, args.download, args.image_size)
    subject = Subject(*encoder, *images, needs_val=False, asked=flags.take(data.Pixels, args))
    if kept:
        files.require_file(args.features, "--features", "features kept before")
        if args.pretrained:
            weights_file(args.pretrained)
        return subject
    subject.require_fit()
    if args.features:
        checkpoint.require_writable(args.features, "--features")
    return subject


def worker(args, stop, subject: Subject) -> None:
    """Run one rank: features of all images, its share of the queries, the results of all ranks."""
    device = devices.resolve_device(args)
    with Stop(stop) as asked:
        if dist.broadcast_object(has_features(args)):
            splits, facts = read_features(args, subject, device)
        else:
            splits, facts = take_features(args, subject, device, asked)
    start = time.perf_counter()
    rows = judge(splits, args.k, args.T)
    protocol = "val" if "val" in splits else "leave-one-out on train"
    cells = [(r["feature"], r["dim"], r["k"], f"{r['T']:g}", r["top1"]) for r in rows]
    say(results.table(("feature", "dim", "k", "T", "top-1"), cells))
    M = len(splits["train"].labels)
    Q = len(splits["val"].labels) if "val" in splits else M
    say(f"=> {Q} queries ({protocol}) against {M} images in {time.perf_counter() - start:.1f} s")
    if args.out and dist.is_main():
        facts = {**facts, "protocol": protocol, "M": M, "queries": Q, "results": rows}
        print("\n".join(results.write_results(args.out, "results", facts)))


Features = tuple[dict[str, features.Split], dict[str, str]]  # splits, and metadata


def read_features(args, subject: Subject, device: torch.device) -> Features:
    """Read the features kept in --features. Raises BadInput where the flags name others."""
    named = names_data(args)
    if named:
        say(data.describe(**subject.splits))
    splits, facts = features.load(args.features, expectations(args, subject, named), device)
    of, on = (files.shown(str(facts.get(name))) for name in ("pretrained", "data"))
    say(f"=> features of '{of}' on '{on}' from '{files.shown(args.features)}'")
    if args.cache is not None:
        say("=> --cache: no image is read")
    return splits, facts


def take_features(args, subject: Subject, device: torch.device, stop: Stop) -> Features:
    """Take the encoder's features, output and backbone; keep them in --features if it is given."""
    say(data.describe(**subject.splits))
    say(describe(subject.info))
    devices.warn_of_slow_amp(args.amp, device, trains=False)
    if "val" not in subject.splits:
        where = files.shown(" ".join(listed(args.data)) or args.dataset)
        say(
            f"=> no val split in '{where}': each image of train is judged by all others"
            " (leave-one-out)"
        )
    for line in subject.mismatches():
        say(f"=> warning: {line}")
    expected = expectations(args, subject, named=True)
    taps = Taps(subject.encoder, [OUTPUT, BACKBONE] if subject.info["head"] else [BACKBONE])
    taps.to(device)
    workers = devices.usable_workers(args.workers, ranks.processes_here(args))
    ranks.together(lambda: subject.hold_cached(args.cache, workers))
    reading = {
        "transform": data.get_eval_transform(args.dataset, subject.side, subject.pixels),
        "batch_size": args.batch_size,
        "workers": workers,
        "device": device,
        "normalize": True,
        "amp": AMP_TYPES[args.amp],
        "watch": stop.watch,
        "max_bad_images": args.max_bad_images,
    }
    start = time.perf_counter()
    splits = {name: features.take(taps, x, **reading) for name, x in subject.splits.items()}
    seconds = time.perf_counter() - start
    M = sum(len(split.labels) for split in splits.values())
    say(
        f"=> features of {M} images of side {subject.side} in {seconds:.1f} s"
        f" ({M / seconds:.0f} img/s)"
    )
    facts = {
        **expected,
        "image_size": str(subject.side),
        "arch": subject.info["arch"],
        "stem": subject.info["stem"],
        "pretrained": args.pretrained,
        "data": " ".join(listed(args.data)) or args.dataset,
        "epoch": str(subject.info["epoch"]),
    }
    if args.features:
        ranks.on_main(lambda: features.save(args.features, splits, facts))
    return splits, facts


def expectations(args, subject: Subject, named: bool) -> dict[str, str]:
    """The metadata that kept features must have to fit the flags.

    named: the flags name the data too.
    """
    expected = {"image_size": str(args.image_size)} if args.image_size else {}
    if named:
        expected |= {"dataset": args.dataset, "data_sha256": identity(subject.splits.values())}
    if args.pretrained:
        expected["sha256"] = subject.sha256
    if args.pretrained or args.key:
        expected["encoder"] = "key" if args.key else "query"
    if args.pretrained or args.amp != "off":
        expected["amp"] = args.amp
    if args.arch:
        expected["arch"] = args.arch
    if args.stem != "auto":
        expected["stem"] = args.stem
    return expected


if __name__ == "__main__":
    sys.exit(main())
