"""How mining, the bank loss and the GAN's training grow with the number of images M.

Measured are seconds and memory, with fitted exponents.

    python -m benchmarks.growth                           M = 10,000, 100,000 and 1,281,167; a GAN
                                                          of 20,000 iterations
    python -m benchmarks.growth --device cpu              M = 2,000 to 20,000 (mining) and to
                                                          100,000 (loss), fewer iterations
    python -m benchmarks.growth --parts gan mining loss

  gan      its iterations at batch 256 with the hardest of 4,096 candidates and five triplets an
           anchor, M = 50,000, without an early end; on a GPU with compiled losses, as fits of
           50,000 iterations and more have them, and without
  mining   a round without the GAN's training: five triplets an anchor, the best proxy's ten nearest
           images, joined by the radius, made into sets. Proxies lie near their anchors, as those of
           a trained GAN do
  loss     the exact softmax over all M, batch 256, P 32, hard positives, forward and backward
           (benchmarks/bank_loss.py has all its forms)

Memory is what the work adds at most to features, bank and batch.
"""

import argparse
import time

import torch
import torch.nn.functional as F

from benchmarks import bank_loss, common
from benchmarks.knn import peak_bytes
from benchmarks.mining import synthetic
from moco_isl.miners.gan import GANMiner
from moco_isl.mining.gan import Discriminator, GANFit, GANSettings, Generator
from moco_isl.mining.gan_training import fit_gan
from moco_isl.mining.positives import PositiveSets

C = 128
# s, s, ms on an H200 at the largest size of each table: to be reached, hoped for
BARS = {"gan": (20, 6), "mining": (30, 10), "loss": (20, 10)}
SIZES = {"cuda": [10_000, 100_000, 1_281_167], "cpu": [2000, 6000, 20_000]}
LOSS_SIZES = {"cuda": [10_000, 100_000, 1_281_167], "cpu": [10_000, 30_000, 100_000]}


class NearAnchor(Generator):
    """Untrained, but its proxies are near their anchors; all its layers are computed."""

    def forward(self, a: torch.Tensor, p: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return F.normalize(a + 0.3 * super().forward(a, p, n), dim=1)


class FittedMiner(GANMiner):
    """A round without the GAN's training.

    Every proxy scores enough, and most images near to it join.
    """

    def __init__(self, device: torch.device):
        super().__init__(budget=10.0, threshold=0.0, radius=0.0)
        torch.manual_seed(0)
        self.fitted = GANFit(
            NearAnchor(C).to(device),
            Discriminator(C).to(device),
            {"natural_hub": 0.1, "probe_bank": 8192},
        )

    def fit(self, features, positives, seed, tick=None) -> GANFit:
        return self.fitted


def repeated(fn, device: torch.device, repeats: int, most_seconds: float = 30.0) -> common.Timing:
    """`repeats` timings, or as many as begin within most_seconds. The caller has warmed up."""
    started = time.perf_counter()
    seconds = []
    while len(seconds) < repeats and (not seconds or time.perf_counter() - started < most_seconds):
        seconds.append(common.once(fn, device, cpu_time=common.by_cpu_time(device)))
    return common.Timing(seconds)


def features_of(M: int, device: torch.device) -> torch.Tensor:
    return synthetic(M, C, device, torch.float16 if device.type == "cuda" else torch.float32, 0)[0]


def time_gan(args: argparse.Namespace, compiled: bool) -> tuple[common.Timing, float]:
    """Seconds of args.iters iterations of the GAN, and of the first 20, which compile."""
    device = args.device
    M = args.gan_images
    features = features_of(M, device)
    empty = PositiveSets.empty(M, device)
    run = lambda iters: fit_gan(features, empty, GANSettings(iters, iters, compile=compiled), 0)
    first = common.once(lambda: run(min(20, args.iters)), device)
    return repeated(lambda: run(args.iters), device, args.repeats), first


def measure_gan(args: argparse.Namespace, result: common.Result) -> None:
    more = {}
    if common.is_h200(args.device) and args.iters == 20_000:
        more = {"bar": BARS["gan"][0], "goal": BARS["gan"][1]}
    for compiled in (True, False) if args.device.type == "cuda" else (False,):
        timing, first = time_gan(args, compiled)
        how = ", compiled" if compiled else ""
        result.add(
            timing.row(f"GAN{how}, {args.iters:,} iterations, M = {args.gan_images:,}", "s", **more)
        )
        result.add(common.Timing([s / args.iters for s in timing.seconds]).row("  of them each"))
        if compiled:
            result.add(common.Timing([first]).row("  compiling, once a process", "s"))


def measure_mining(args: argparse.Namespace, result: common.Result) -> None:
    device = args.device
    miner = FittedMiner(args.device)
    done = []
    for M in args.images or SIZES[device.type]:
        features = features_of(M, device)
        empty = PositiveSets.empty(M, device)
        mine = lambda: miner.mine(features, empty, torch.Generator().manual_seed(0))
        before = peak_bytes(device, reset=True)
        if not done:  # compilers and caches, at the smallest size
            mine()
        timing = repeated(mine, device, args.repeats)
        done.append((M, timing.median, peak_bytes(device) - before))
        more = {}
        if common.is_h200(device) and M == 1_281_167:
            more = {"bar": BARS["mining"][0], "goal": BARS["mining"][1]}
        result.add(
            timing.row(f"mining pass, M = {M:,}", "s", memory_gib=done[-1][2] / 2**30, **more)
        )
        report = miner.report
        if report.why or not report.edges:
            raise RuntimeError(f"the pass joined nothing, so it measured nothing: {report.why}")
    add_exponents(result, "mining pass", done)


def measure_loss(args: argparse.Namespace, result: common.Result) -> None:
    flags = argparse.Namespace(
        dim=C, batch=args.batch, positives=32, half=False, plain_gib=0.0, repeats=args.repeats
    )
    found: dict[str, list] = {}
    failed: list[str] = []
    for M in args.images or LOSS_SIZES[args.device.type]:
        for row in bank_loss.rows_of(M, flags, args.device, failed):
            issues = (
                common.is_h200(args.device) and row["form"].startswith("fused") and M == 1_281_167
            )
            more = {"bar": BARS["loss"][0], "goal": BARS["loss"][1]} if issues else {}
            timing = common.Timing(
                row["all_cpu_seconds" if common.by_cpu_time(args.device) else "all_seconds"]
            )
            # on a CPU it is too little to show in the process's memory
            peak = row["peak_mib"] / 1024 if args.device.type == "cuda" else 0.0
            result.add(
                timing.row(f"bank loss, {row['form']}, M = {M:,}", memory_gib=peak or None, **more)
            )
            found.setdefault(row["form"], []).append((M, timing.median, peak))
    for form, points in found.items():
        add_exponents(result, f"bank loss, {form}", points)
    for text in failed:
        result.note(text)
    if failed:
        raise RuntimeError(failed[0])


def add_exponents(result: common.Result, what: str, points: list[tuple[int, float, float]]) -> None:
    """Add the exponents of points (M, seconds, memory).

    That of memory is left out where a point has 0, which stands for too little to be seen.
    """
    if len(points) < 2:
        return
    sizes, seconds, memory = zip(*points)
    b = common.exponent(sizes, seconds)
    result.add({"what": f"{what}: seconds ~ M^b, b", "value": b, "unit": ""})
    if min(memory) > 0:
        b = common.exponent(sizes, memory)
        result.add({"what": f"{what}: memory ~ M^b, b", "value": b, "unit": ""})


PARTS = {
    "gan": (measure_gan, "GAN training: batch 256, hardest of 4,096, five triplets an anchor"),
    "mining": (
        measure_mining,
        "Mining pass: five triplets an anchor, top 10 within the radius, C = 128",
    ),
    "loss": (measure_loss, "Exact bank loss, forward and backward: C = 128, P 32, hard positives"),
}


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--images",
        type=int,
        nargs="+",
        metavar="M",
        help="of mining and loss (default: by part and device)",
    )
    parser.add_argument("--iters", type=int, help="of the GAN (20,000; 500 on a CPU)")
    parser.add_argument(
        "--gan-images",
        type=int,
        metavar="M",
        help="that the GAN is trained on (50,000; 20,000 on a CPU)",
    )
    parser.add_argument(
        "--batch", type=int, default=256, metavar="N", help="of the bank loss (256)"
    )
    args = parser.parse_args(argv)
    common.begin(args)
    gpu = args.device.type == "cuda"
    iters, gan_images = (20_000, 50_000) if gpu else (500, 20_000)
    if args.quick:
        iters = 40
        gan_images = 500
        args.images = args.images or [300, 600]
        args.batch = 16
    args.iters = args.iters or iters
    args.gan_images = args.gan_images or gan_images
    for part in args.parts:
        measure, title = PARTS[part]
        result = common.Result(
            f"growth-{part}",
            title if part != "loss" else f"{title}, batch {args.batch}",
            args.device,
        )
        try:
            measure(args, result)
        finally:  # what was measured before an error is not lost
            if common.by_cpu_time(args.device):
                result.note(common.BY_CPU_TIME)
            common.end(args, result)


if __name__ == "__main__":
    main()
