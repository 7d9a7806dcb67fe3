"""Are the GAN's sets above the means' anywhere? The paper's Figure 3 at 5, 50 and 200 an image.

    python -m studies.wide_gan FILE.safetensors --images 10000
                                        features [M, C] and labels [M] of real images
    python -m studies.wide_gan FILE.pth.tar --of digits
                                        what a checkpoint makes of these images

Three rounds on the same features: from the second on, the positive of a triplet is drawn from the
sets mined before. Miners are those of the product. What joins is bounded by the budget and the
in-degree cap, for all of them no higher than a GAN's triplets can bear:

  own nearest               --miner knn
  neighbourhood means       --miner average, without views
  GAN                       --miner gan: images near an anchor's best proxy (Eq. 3)
  GAN, five joined          images near any of an anchor's five proxies

Precision and reach in per cent, mean ± standard deviation of n seeds. Labels judge and choose
nothing. A reach is the median rank of a positive among all images.

Letters: M images, C feature dimension, N anchors of a block, k candidates.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import common
from moco_isl.errors import BadInput
from moco_isl.miners.average import AverageMiner
from moco_isl.miners.gan import GANMiner, proxies_of, sampler_of_all
from moco_isl.miners.knn import KNNMiner
from moco_isl.mining.edges import Edges
from moco_isl.mining.gan import GANSettings
from moco_isl.mining.positives import PositiveSets, same_label
from moco_isl.mining.rounds import RoundMiner, over_blocks
from moco_isl.mining.triplets import largest_set
from moco_isl.ops.neighbors import Tick, topk
from studies import miners
from studies.figures import Result

Tensor = torch.Tensor
WIDTHS = (5, 50, 200)
ROUNDS = 3


@dataclass(eq=False)
class JoinedGANMiner(GANMiner):
    """ISL's miner, where the images near each of an anchor's proxies may join, not the best's."""

    name = "gan, joined"

    def find(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None
    ) -> tuple[Edges, str]:
        M = len(features)
        fit = self.fit(features, positives, seed, tick)
        if fit.why:
            self.networks = None
            none = torch.empty(0, device=features.device)
            return Edges(none.long(), none.long(), none), fit.why
        self.networks = {"G": fit.G.state_dict(), "D": fit.D.state_dict(), **fit.optimizers}
        k = min(self.candidates, M - 1)
        sampler = sampler_of_all(features, positives, seed, self.settings)

        def block(anchors: Tensor, number: int) -> tuple[Tensor, Tensor]:
            draws = torch.Generator().manual_seed(seed + number)
            _, proxies, _ = proxies_of(fit.G, fit.D, features, sampler, anchors, draws)
            found = [topk(proxy, features, k, anchors) for proxy in proxies]
            cosine, near = (torch.cat(x, dim=1) for x in zip(*found))  # [N, t k]
            return cosine, near

        anchors, cosine, near = over_blocks(M, features.device, block, tick)
        src = anchors[:, None].expand_as(near)
        return Edges(src.flatten(), near.flatten(), cosine.flatten()), ""


# A threshold of 0 and a distance of at most 2: the budget alone bounds what joins.
UNBOUNDED = {"threshold": 0.0, "radius": 2.0, "radius_mode": "fixed"}


def miner_of(row: str, width: int, iters: int | None) -> RoundMiner:
    gan = UNBOUNDED | {"budget": width, "candidates": 2 * width, "iters": iters}
    return {
        "own nearest": lambda: KNNMiner(budget=width),
        "neighbourhood means": lambda: AverageMiner(budget=width),
        "GAN": lambda: GANMiner(**gan),
        "GAN, five joined": lambda: JoinedGANMiner(**gan),
    }[row]()


ROWS = {  # -> rounds; without a GAN a second round finds the same pairs again
    "own nearest": 1,
    "neighbourhood means": 1,
    "GAN": ROUNDS,
    "GAN, five joined": ROUNDS,
}


def study(source: miners.Source, seed: int, iters: int | None) -> dict[tuple[str, int], dict]:
    """(row, round) -> {(width, "precision" or "reach"): per cent}."""
    M = len(source.labels)
    found: dict[tuple[str, int], dict] = {}
    for row, rounds in ROWS.items():
        for width in WIDTHS:
            miner = miner_of(row, width, iters)
            miner.rules.largest = largest_set(M, GANSettings.triplets)  # the GAN's bound, for all
            sets = PositiveSets.empty(M, source.features.device)
            rng = torch.Generator().manual_seed(seed)
            for number in range(1, rounds + 1):
                sets = miner.mine(source.features, sets, rng)
                cells = found.setdefault((row, number), {})
                cells[width, "size"] = sets.mean_size
                said = f"  seed {seed}, {row}, round {number}, {width} an image:"
                if not miner.report.accepted:
                    print(said, miner.report.why, flush=True)
                    continue
                right = same_label(source.labels, sets.sources(), sets.members)
                cells[width, "precision"] = 100 * float(right.nanmean())
                cells[width, "reach"] = 100 * miner.report.reach
                print(said, f"{cells[width, 'precision']:.1f} % right", flush=True)
    return found


def show(runs: list[dict], result: Result) -> None:
    """A row for each miner and round, of the figures of n seeds."""
    for row, number in runs[0]:
        cells = {"row": row, "round": number, "n": len(runs)}
        for width in WIDTHS:
            for what in ("precision", "reach"):
                values = [run[row, number].get((width, what)) for run in runs]
                mined = [x for x in values if x is not None]
                if not mined:
                    cells[f"{what}_{width}"] = "refused"
                    continue
                digits = 1 if what == "precision" else 2
                text = common.spread(mined, digits=digits)
                refused = len(values) - len(mined)
                cells[f"{what}_{width}"] = text + f" ({refused} refused)" * bool(refused)
            sizes = [run[row, number][width, "size"] for run in runs]
            if min(sizes) < 0.98 * width and min(sizes) > 0:
                cells[f"precision_{width}"] += f" at {statistics.fmean(sizes):.0f}"
        result.add(cells)


def get_parser() -> argparse.ArgumentParser:
    parser = common.parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="safetensors, or a checkpoint")
    miners.add_source(parser)
    parser.add_argument("--seeds", type=int, default=3, metavar="n", help="seeds of the GAN (3)")
    parser.add_argument("--iters", type=int, help="cap of the GAN's iterations (90 sqrt(M))")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    common.begin(args)
    if args.quick:
        args.images, args.iters, args.seeds = args.images or 1000, args.iters or 50, 1
    try:
        if args.of:
            name = args.of[0]
            root = args.of[1] if len(args.of) > 1 else None
            source = miners.of_checkpoint(Path(args.file), args.of[0], root, args.device)
        else:
            name = Path(args.file).stem.removeprefix("features_")
            (source,) = miners.from_file(args.file, args.device, args.images)
        runs = [study(source, seed, args.iters) for seed in range(args.seeds)]
    except BadInput as error:
        print(f"studies.wide_gan: {error}", file=sys.stderr)
        return error.exit_code
    M = len(source.labels)
    columns = [("row", "miner"), ("round", "round")]
    for width in WIDTHS:
        columns += [(f"precision_{width}", f"right at {width}, %"), (f"reach_{width}", "reach, %")]
    title = f"The GAN's sets beside the means', {name}, {M:,} images"
    result = Result(f"wide_gan-{name}", title, args.device, [*columns, ("n", "n")])
    show(runs, result)
    result.note(
        "From the second round on the positive of a triplet is drawn from the sets mined before."
        " Sets are symmetric and bounded by the budget and the in-degree cap, at 200 an image by"
        f" the {largest_set(M, GANSettings.triplets)} positives that a GAN's triplets can bear."
    )
    common.end(args, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
