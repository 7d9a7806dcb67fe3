#!/usr/bin/env python
"""Judge features by linear classifiers on the frozen encoder.

MoCo's protocol:
    python main_lincls.py --pretrained runs/x/checkpoint_last.pth.tar DIR
Without augmentation, in seconds:
    ... --cache-features --lr 1 3 10 30
Every layer in one pass:
    ... --layers conv1 conv2 conv3 conv4 conv5 --lr 0.03 0.1 0.3
With few labels, too:
    ... --shots 1,5,10
The whole network:
    ... --finetune --lr 0.01
"""

import random
import sys
import time

import torch

from moco_isl import data, dist
from moco_isl.encoders import AMP_TYPES, get_head, require_layers
from moco_isl.evaluation import options, probing
from moco_isl.evaluation.knn import require_shots
from moco_isl.evaluation.probe import Probe, layer_names
from moco_isl.evaluation.results import read_own
from moco_isl.evaluation.subject import Resumed, Subject
from moco_isl.options import listed
from moco_isl.run import devices, exits, flags, ranks
from moco_isl.run.backbone import describe
from moco_isl.run.folder import check_folder
from moco_isl.run.signals import Stop
from moco_isl.run.weights import run_file
from moco_isl.training import resume, state


def get_parser() -> flags.Parser:
    return options.get_parser("python main_lincls.py", __doc__, options.PROBE_GROUPS)


def main(argv: list[str] | None = None, stop=None) -> int:
    """Run with flags argv; returns the exit code.

    stop: a launcher's own function that says whether to stop, called once a step.
    """
    return exits.exit_code(run, argv, stop)


def run(argv: list[str] | None, stop) -> None:
    args, resumed, subject = prepare(argv)
    ranks.launch(worker, args, stop, resumed, subject)


# ---- before any rank is started ------------------------------------------------------------------


def prepare(argv: list[str] | None):
    """The flags of a run, the file it goes on with, and its subject. Raises BadInput."""
    args = get_parser().parse_args(argv)
    data.check_options(flags.take(data.DataOptions, args))
    options.check_resume(args)
    resumed = find_start(args)
    settle_flags(args, resumed)
    options.check_probe(args)
    return args, resumed, check_subject(args, resumed)


def check_args(args) -> None:
    """Raise BadInput for flags that do not go together; launch/ asks this before it submits."""
    data.check_options(flags.take(data.DataOptions, args))
    options.check_resume(args)
    options.settle_probe(args)
    options.check_probe(args)


def find_start(args) -> Resumed:
    """The file to go on with or to evaluate; sets --out. Raises BadInput."""
    args.out = args.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-lincls"
    if args.evaluate:
        resumed = Resumed(resume.Start(str(run_file(args.resume))))
    else:
        shape = state.flags_shape(get_parser())
        resumed = Resumed(*resume.find_start(args.resume, None, args.out, shape))
    flags.check(
        "isl" not in resumed.content,
        f"'{resumed.path}' is a pretraining file of main_moco_isl.py: judge it with --pretrained,"
        " and another --out",
    )
    if resumed.is_ours:
        state.require_flags(resumed.content, resumed.path, get_parser(), options.OF_THE_RUN)
    return resumed


def settle_flags(args, resumed: Resumed) -> None:
    """Set the flags that the file or other flags decide; check --out. Raises BadInput."""
    start = resumed.start
    saved = resumed.content["args"] if resumed.is_ours else {}
    if saved and args.evaluate:
        for name in options.OF_THE_RUN:
            setattr(args, name, saved[name])
        args.image_size = args.image_size or saved.get("image_size", 0)
    if args.seed is None and start.in_place and not saved:
        saved = start.unsaved
    if args.seed is None:
        args.seed = saved.get("seed")
    options.settle_probe(args)
    if not args.evaluate:
        check_folder(args.out, start.in_place)
        resume.check_unsaved(start, vars(args), options.MAY_CHANGE)
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(2**31)


def check_subject(args, resumed: Resumed) -> Subject:
    """The subject to judge. Raises BadInput where flags, files and images do not go together."""
    # a file of MoCo's holds the encoder, too
    resumes = bool(resumed.path) and not (resumed.is_ours and args.pretrained)
    path = resumed.path if resumes else args.pretrained
    encoder = (path, args.arch, args.stem, args.key and not resumes)
    images = (args.dataset, args.data, args.download, args.image_size)
    asked = flags.take(data.Pixels, args)
    subject = Subject(*encoder, *images, resumed=resumed if resumes else None, asked=asked)
    args.bits, args.mean, args.std = (subject.pixels.bits, subject.pixels.mean, subject.pixels.std)
    require_layers(subject.encoder, layer_names(subject.encoder, args.layers))
    subject.require_fit()
    require_shots(subject.splits["train"].labels, max(args.shots, default=0))
    read_own(args.out, "classifiers")
    if resumed.is_ours:
        named = "" if args.evaluate else " ".join(listed(args.data)) or args.dataset
        probing.require_origin(resumed, subject.origin, file=args.pretrained, images=named)
        if not args.evaluate:
            begun = resumed.content["epoch"] + bool(resumed.content["probe"]["step"])
            resume.check_same(
                resumed.content["args"],
                vars(args),
                "choose another --out",
                epochs=begun,
                may_change=options.MAY_CHANGE,
            )
    return subject


# ---- on every rank -------------------------------------------------------------------------------


def worker(args, stop, resumed: Resumed, subject: Subject) -> None:
    device = devices.resolve_device(args)
    devices.warn_of_slow_amp(args.amp, device, trains=args.finetune)
    args.seed, args.out = dist.broadcast_object((args.seed, args.out))
    folder = None if args.evaluate else resume.take_folder(args.out, resumed.start)
    try:
        with Stop(stop) as stop:
            run = ranks.together(lambda: assemble(args, device, folder, stop, resumed, subject))
            if not args.evaluate:
                run.train(
                    epochs=args.epochs,
                    batch_size=args.batch_size,
                    cache_features=args.cache_features,
                    schedule=args.schedule,
                    print_freq=args.print_freq,
                )
            encoder = {"encoder": "key" if args.key else "query"}
            facts = encoder | {"protocol": options.protocol(args)}
            run.finish(args.out, facts, shots=args.shots, draws=args.draws)
    finally:
        if folder is not None:
            folder.close()


def assemble(args, device, folder, stop: Stop, resumed: Resumed, subject: Subject):
    """A probe of the subject, in the state that the file to go on with has. Raises BadInput."""
    ranks.say(describe(subject.info))
    ranks.say(data.describe(**subject.splits))
    workers = devices.usable_workers(args.workers, ranks.processes_here(args))
    subject.hold_cached(args.cache, workers)
    lr_given = args.finetune or args.lr != [probing.MOCO_LR]
    traps = probing.traps(subject.info, args.batch_size, lr_given, args.mlp)
    for line in traps + subject.mismatches():
        ranks.say(f"=> warning: {line}")
    images = probing.hold_out(subject, args.holdout, len(args.lr), args.seed)
    require_shots(images.train.labels, max(args.shots, default=0))
    head = get_head(subject.encoder) if subject.info["head"] else None
    torch.manual_seed(args.seed)  # so the initial weights depend on the seed alone
    probe = Probe(
        subject.encoder,
        None if args.finetune else layer_names(subject.encoder, args.layers),
        lrs=args.lr,
        classes=len(subject.origin["classes"]),
        size=subject.side,
        device=device,
        amp=AMP_TYPES[args.amp],
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        reading={
            "transform": data.get_eval_transform(args.dataset, subject.side, subject.pixels),
            "batch_size": args.batch_size,
            "workers": workers,
            "max_bad_images": args.max_bad_images,
        },
        watch=stop.watch,
    )
    run = probing.Probing(
        probe, subject, images, args.seed, args.start_epoch, vars(args), folder, stop
    )
    if resumed.path:
        run.restore(resumed, head, args.evaluate)
    if folder is not None:
        folder.begin(vars(args), probing.metrics_size(resumed, args.out))
    resumed.let_go()
    return run


if __name__ == "__main__":
    sys.exit(main())
