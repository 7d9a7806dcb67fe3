"""One training step in several forms, side by side in one process.

The forms are the published code, lightly's, our plain path, our fast path, ours with ISL, and the
floor.

    python -m benchmarks.step --rows photos     ResNet-50, 224 px, batch 256, K 65,536, and what ISL
                                                adds at M = 1,281,167
    python -m benchmarks.step --rows w64 w32    CIFAR-size ResNet-18, batch 512, images on the
                                                device, augmentation included
    python -m benchmarks.step --rows bank       CIFAR-size AlexNet, bank objective
    python -m benchmarks.step --forms combo_kernels coordinate_descent
                                                on a GPU: the fast form compiled in other ways too
    python -m benchmarks.step --profile         and the three largest costs of a step of the
                                                published and of the fast form

On a CPU the sizes are small: all of it runs, and the forms stand beside each other. A turn is some
steps of each form; turns alternate. Our forms run `engine.train_one_epoch`, as the script does, and
read their losses once a turn; the others read theirs every step, as their scripts do.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from benchmarks import common, peers, profiling
from benchmarks.floor import floor_rows
from benchmarks.published import PublishedMoCo, published_step
from moco_isl import builder, data
from moco_isl.data.datasets import ImagesInMemory
from moco_isl.encoders import build_encoder
from moco_isl.errors import first_line
from moco_isl.isl import ISL
from moco_isl.mining.positives import PositiveSets
from moco_isl.objectives.bank import Instance
from moco_isl.run.meters import Progress
from moco_isl.run.signals import Stop
from moco_isl.training import engine, fast

DIM = 128
P = 16  # positives of an image where ISL is on
OPTIONS = {  # of inductor
    "combo_kernels": {"combo_kernels": True},
    "coordinate_descent": {"coordinate_descent_tuning": True},
}
PUBLISHED = "as published"
FAST = "ours, fast"
WITH_ISL = "ours, fast, ISL on"


@dataclass(frozen=True)
class Work:
    """A row's sizes: N batch, K queue, M images, steps of a turn.

    photos: the same two views at every step; other images are augmented anew.
    """

    title: str
    arch: str
    size: int
    N: int
    K: int
    M: int
    steps: int
    photos: bool = False
    bank: bool = False


ROWS = {
    "photos": Work("MoCo v2 step, photos", "resnet50", 224, 256, 65536, 1_281_167, 10, photos=True),
    "w64": Work(
        "MoCo v2 step, CIFAR size, ResNet-18 of width 64", "resnet18w64", 32, 512, 4096, 50_000, 20
    ),
    "w32": Work(
        "MoCo v2 step, CIFAR size, ResNet-18 of width 32", "resnet18w32", 32, 512, 4096, 50_000, 20
    ),
    "bank": Work(
        "bank objective, CIFAR size, AlexNet", "alexnet", 32, 512, 0, 50_000, 20, bank=True
    ),
}
ON_CPU = {
    "photos": {"size": 96, "N": 8, "M": 100_000, "steps": 1, "arch": "resnet18"},
    "w64": {"N": 32, "M": 2000, "steps": 1},
    "w32": {"N": 32, "M": 2000, "steps": 1},
    "bank": {"N": 128, "M": 20_000, "steps": 1},
}
QUICK = {"size": 32, "N": 4, "K": 64, "M": 200, "steps": 1, "arch": "resnet18w16"}
# ms a step on an H200 at the sizes of ROWS: what is to be reached, and what is hoped for
BARS = {
    "photos": (55, 45),
    "w64": (512 / 20_000 * 1e3, 512 / 31_000 * 1e3),
    "w32": (512 / 50_000 * 1e3, 512 / 80_000 * 1e3),
    "bank": (512 / 120_000 * 1e3, None),
}


# ---------------------------------------------------------------- batches


class SameViews:
    """A loader that has the same two views at every step, on the device, with new indices."""

    def __init__(self, work: Work, device: torch.device):
        g = torch.Generator(device).manual_seed(0)
        self.views = tuple(
            torch.randn(work.N, 3, work.size, work.size, device=device, generator=g)
            for _ in range(2)
        )
        self.index = torch.randperm(work.M, device=device, generator=g)[: work.N * 64].split(work.N)

    def __len__(self) -> int:
        return 1 << 30

    def epoch(self, epoch: int, start_step: int = 0, order: object = None) -> Iterator:
        return ((self.views, index) for index in itertools.cycle(self.index))

    def bad_images(self) -> list:
        return []


def random_images(work: Work) -> ImagesInMemory:
    g = torch.Generator().manual_seed(0)
    return ImagesInMemory(
        torch.randint(0, 256, (work.M, 3, work.size, work.size), dtype=torch.uint8, generator=g),
        None,
        None,
        "random",
    )


def small_images(
    work: Work,
    dataset: ImagesInMemory,
    device: torch.device,
    compiled: bool,
    views: int,
    options: dict | None = None,
):
    """Our loader of images held on the device.

    compiled: whether its augmentation is compiled; options: inductor's.
    """
    augmentation = data.get_augmentation("cifar10", aug_plus=True, size=work.size, on_device=True)
    if compiled:
        fast.compile_augmentation(augmentation, views * work.N, device, options)
    return data.train_loader(
        dataset, augmentation=augmentation, batch_size=work.N, seed=0, device=device, views=views
    )


# ---------------------------------------------------------------- forms: calls that take some steps

Turn = Callable[[], None]


class Silent(Progress):
    def report(self, epoch: int, step: int, values: dict[str, float]) -> None:
        """Show nothing; the values were read."""


def turn_of(step: Callable, loader, work: Work) -> Turn:
    """Convolutions are chosen by trial, as MoCo's script has it."""

    def turn() -> None:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        for (im_q, im_k), _ in itertools.islice(loader.epoch(0), work.steps):
            step(im_q, im_k)
        torch.backends.cudnn.benchmark = before

    return turn


def ours(
    isl: ISL,
    optimizer: torch.optim.Optimizer,
    loader,
    work: Work,
    device: torch.device,
    is_fast: bool,
) -> Turn:
    """`steps` steps of the training loop, from a loader's beginning; losses are read at the end."""
    flags = fast.defaults(is_fast, device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def turn() -> None:
        with fast.numerics(is_fast, device):
            engine.train_one_epoch(
                isl,
                loader,
                optimizer,
                scaler,
                engine.Position(),
                device=device,
                stop=Stop(lambda: False),
                progress=Silent("lines", 1, work.steps),
                log=lambda **_: None,
                save=lambda: None,
                last_good=lambda: "",
                amp=flags["amp"],
                channels_last=flags["channels_last"],
                print_freq=work.steps,
                max_steps=work.steps,
            )

    return turn


def our_model(
    work: Work, device: torch.device, is_fast: bool, options: dict | None = None
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    flags = fast.defaults(is_fast, device.type == "cuda")
    encoder = lambda num_classes: build_encoder(work.arch, num_classes, image_size=work.size)
    torch.manual_seed(0)
    model = (
        Instance(encoder, DIM, 0.1)
        if work.bank
        else builder.MoCo(encoder, DIM, work.K, 0.999, 0.2, mlp=True)
    )
    model.to(
        device,
        memory_format=torch.channels_last if flags["channels_last"] else torch.preserve_format,
    )
    optimizer = fast.sgd(model.parameters(), 0.03, 0.9, 1e-4, is_fast and device.type == "cuda")
    if is_fast:
        fast.count_batches_at_once(model)
    if flags["compile"]:
        fast.compile_encoders(model, work.N, options)
    return model, optimizer


def give_positives(isl: ISL, work: Work, device: torch.device) -> ISL:
    """Give an objective sets of P on average and a bank of features, as a round of mining does."""
    src = torch.arange(work.M, device=device).repeat_interleave(P // 2)
    dst = torch.randint(
        work.M, (len(src),), device=device, generator=torch.Generator(device).manual_seed(1)
    )
    isl.positives = PositiveSets.from_edges(work.M, src, dst)
    if not isl.bank.filled:
        isl.bank.fill(F.normalize(torch.randn(work.M, DIM, device=device), dim=1))
    return isl


def loaders_of(work: Work, device: torch.device) -> tuple:
    """Loaders of the same images for the plain forms, the fast one and that with ISL on.

    The bank objective has one view of an image, two where hard positives are on.
    """
    if work.photos:
        return (SameViews(work, device),) * 3
    images = random_images(work)
    few = 1 if work.bank else 2
    compiled = fast.defaults(True, device.type == "cuda")["compile"]
    return tuple(
        small_images(work, images, device, *how)
        for how in ((False, few), (compiled, few), (compiled, 2))
    )


def forms(
    work: Work, device: torch.device, note: Callable[[str], None], more: Sequence[str] = ()
) -> Iterator[tuple[str, Callable[[], Turn]]]:
    """Name -> what builds the form and returns its turn.

    The last two share model and compiler's work. more: of OPTIONS.
    """
    plain, quick, with_isl = loaders_of(work, device)
    if not work.bank:
        yield (
            PUBLISHED,
            lambda: turn_of(
                published_step(PublishedMoCo(work.arch, work.size, DIM, work.K).to(device)),
                plain,
                work,
            ),
        )
        try:
            import lightly  # noqa: F401 (is it installed?)

            sizes = work.arch, work.size, DIM, work.K, device
            yield "lightly, MoCo", lambda: turn_of(peers.moco_step(*sizes), plain, work)
            yield "lightly, NNCLR", lambda: turn_of(peers.nnclr_step(*sizes), plain, work)
        except ImportError:
            note(peers.ABSENT)
    plainly = {"hpe": 0.0} if work.bank else {"active": False}
    shared = {}  # model and optimizer of the last two forms

    def build(is_fast: bool, loader, options: dict | None = None) -> Turn:
        model, optimizer = shared[is_fast] = our_model(work, device, is_fast, options)
        return ours(
            ISL(model, work.M, fast=is_fast, **plainly), optimizer, loader, work, device, is_fast
        )

    def build_otherwise(options: dict) -> Turn:
        if work.photos:
            return build(True, quick, options)
        return build(
            True, small_images(work, quick.dataset, device, True, quick.views, options), options
        )

    def build_isl() -> Turn:
        model, optimizer = shared[True]
        isl = give_positives(ISL(model, work.M, P=P, hpe=0.5, fast=True), work, device)
        return ours(isl, optimizer, with_isl, work, device, True)

    yield "ours, plain", lambda: build(False, plain)
    for name in more:
        yield f"{FAST}, {name}", lambda name=name: build_otherwise(OPTIONS[name])
    yield FAST, lambda: build(True, quick)
    yield WITH_ISL, build_isl


# ---------------------------------------------------------------- the table


def build_all(
    work: Work,
    device: torch.device,
    result: common.Result,
    only: set[str] | None = None,
    more: Sequence[str] = (),
) -> tuple[dict[str, Turn], dict[str, float | None], list[str]]:
    """Build the forms, and warm each up by two turns.

    Returns name -> turn; name -> GiB that it needs at most beyond the others; names of those that
    could not be built.
    """
    turns = {}
    memory = {}
    failed = []
    before = 0
    for name, build in forms(work, device, result.note, more):
        if only is not None and name not in only:
            continue
        if name != WITH_ISL:  # which has the model of the form before it
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        try:
            turn = build()
            turn()
            common.peak_gib(device, reset=True)
            turn()
            common.synchronize(device)
        except Exception as error:  # of a compiler or a library: the other forms are measured
            failed.append(name)
            result.note(f"{name} is left out, {type(error).__name__}: {first_line(error)}")
            continue
        turns[name] = turn
        peak = common.peak_gib(device)
        memory[name] = None if peak is None else peak - before / 2**30
    return turns, memory, failed


def measure(
    name: str, work: Work, device: torch.device, args: argparse.Namespace
) -> Iterator[common.Result]:
    """The table, the same with the floor, and with --profile a second one, each when it is done.

    Raises RuntimeError at the end where a form is missing.
    """
    rows = f"M {work.M:,}" if work.bank else f"K {work.K:,}"
    title = f"{work.title}: {work.arch}, {work.size} px, batch {work.N}, {rows}"
    result = common.Result(f"step-{name}", title, device)
    turns, memory, failed = build_all(work, device, result, more=args.forms)
    if not turns:
        raise RuntimeError(f"could not be had: {', '.join(failed)}")
    timings = common.in_turns(
        turns, device, args.repeats, warmup=0, cpu_time=common.by_cpu_time(device)
    )
    first = next(iter(turns))
    whole = replace(work, steps=0) == replace(ROWS[name], steps=0)
    bar, goal = BARS[name] if common.is_h200(device) and whole else (None, None)
    for form, timing in timings.items():
        timing = common.Timing([seconds / work.steps for seconds in timing.seconds])
        more = {"bar": bar, "goal": goal} if form == FAST or form == WITH_ISL and work.bank else {}
        result.add(
            timing.row(form, images_per_s=work.N / timing.median, memory_gib=memory[form], **more),
            of=None if form == first else first,
        )
    if {FAST, WITH_ISL} <= timings.keys():
        add_overhead(result, timings)
    images = "random images on the device, augmentation included"
    if work.photos:
        images = "the same two random views at every step"
    isl = f"ISL on: sets of {P} on average, P {P}, hard positives"
    if not work.bank:
        images += f"; {isl}, bank update, queue mask, M = {work.M:,}"
    steps = f"{work.steps} step{'s' * (work.steps > 1)}"
    result.note(f"a turn is {steps}; all forms in turns in one process; {images}")
    if work.bank:
        result.note(
            f"{isl}, and a second view of every image made; without: Instance, which has no use for"
            " one"
        )
    if common.by_cpu_time(device):
        result.note(common.BY_CPU_TIME)
        result.note(
            "on a CPU --fast stands for augmentation on the device alone, which all forms have"
            " here: the two rows differ by noise"
        )
    yield result
    if not args.no_floor:
        one = replace(work, steps=1)
        model, optimizer = our_model(one, device, False)
        isl = ISL(model, one.M, active=one.bank, hpe=0.0)
        step = ours(isl, optimizer, loaders_of(one, device)[0], one, device, False)
        step()
        parameters = sum(p.numel() for p in model.encoder_q.parameters())
        rows = floor_rows(
            step, parameters, torch.bfloat16 if device.type == "cuda" else torch.float32, device
        )
        if FAST in timings:
            result[FAST]["floor"] = max(row["value"] for row in rows)
        for row in rows:
            result.add(row)
        yield result
    if args.profile:
        pair = {form: turns[form] for form in (first, FAST) if form in turns}
        yield profiling.result_of(name, title, pair, work.steps, device)
    if failed:
        raise RuntimeError(f"could not be had: {', '.join(failed)}")


def add_overhead(result: common.Result, timings: dict[str, common.Timing]) -> None:
    """What ISL adds to the step, by pairs of turns."""
    pairs = zip(timings[WITH_ISL].seconds, timings[FAST].seconds)
    extra = [100 * (on / off - 1) for on, off in pairs]
    row = common.extremes("what ISL adds", extra, "%")
    if result.name == "step-photos" and result.device.type == "cuda":
        row |= {"bar": 3, "goal": 1}
    result.add(row)


def sizes(args: argparse.Namespace, name: str) -> Work:
    work = ROWS[name]
    if args.device.type == "cpu":
        work = replace(work, **ON_CPU[name])
    if args.quick:
        work = replace(work, **{**QUICK, **({"arch": work.arch} if work.bank else {})})
    given = {
        "arch": args.arch,
        "size": args.size,
        "N": args.batch,
        "K": args.queue,
        "M": args.images,
        "steps": args.steps,
    }
    return replace(work, **{key: value for key, value in given.items() if value is not None})


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    for flag, metavar, text in (
        ("--size", "S", "side of an image"),
        ("--batch", "N", "images of a step"),
        ("--queue", "K", "keys"),
        ("--images", "M", "of the data set"),
        ("--steps", "n", "of a turn"),
    ):
        parser.add_argument(
            flag, type=int, metavar=metavar, help=f"{text} (default: by row and device)"
        )
    parser.add_argument("--arch", help="encoder (default: by row)")
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=OPTIONS,
        default=[],
        help="the fast form compiled with more of inductor's options, too (a GPU)",
    )
    parser.add_argument("--no-floor", action="store_true", help="leave the floor out")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="the three largest costs of a step before (published) and after (fast)",
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        help="only compile what the fast forms need, so that it lies in the compiler's cache",
    )
    args = parser.parse_args(argv)
    if args.forms and args.device.type != "cuda":
        parser.error("--forms needs a GPU: elsewhere the fast form is not compiled")
    common.begin(args)
    for name in args.rows:
        work = sizes(args, name)
        if args.warm:
            build_all(
                work,
                args.device,
                common.Result(f"step-{name}", f"warming up: {work.title}", args.device),
                only={FAST, WITH_ISL},
            )
            continue
        for result in measure(name, work, args.device, args):
            common.end(args, result)


if __name__ == "__main__":
    main()
