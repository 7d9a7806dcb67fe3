"""Every way to rank pairs, beside both Euclidean baselines: precision, coverage and the worst hub at mean set sizes 0.5 to 50.

    python -m benchmarks.miners FILE.safetensors               features [M, C] and labels [M] of real images; no GAN: minutes on a CPU
    python -m benchmarks.miners FILE --images 12500 --gan 3     with the rows of the GAN, three seeds each, on so many images drawn from the file

Rows: own nearest (directed edges), then pairs of the whole data set, the surest first:
  all pairs                  by cosine
  shared neighbours          by how many of the 20 nearest they share, then by cosine
  mutual rank                by the worse of the two places that they have in each other's lists
  CSLS                       by twice the cosine less each image's mean cosine to its 10 nearest
  neighbourhood means        by the cosine of the means over their nearest (--miner average), 20 and 50 of them; and with an in-degree cap
  GAN, published             each anchor's images nearest to its best proxy (directed edges, Eq. 3 without a radius)
  GAN, surest pairs          the same pairs, those nearest to their proxy first
  GAN, five proxies agree    the anchor's nearest by the worst cosine to any of its five proxies
  GAN, five and shared       the same plus the share of their 20 nearest that they share
  GAN, positives from sets   surest pairs of a GAN whose positives are drawn from the 5 nearest and not the anchor's own row
Candidates are each image's 100 nearest. Labels judge and choose nothing.

Letters: M images, C feature dimension, k neighbours.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.mining import load
from moco_isl.errors import BadInput
from moco_isl.mining.average import neighbourhood_means
from moco_isl.mining.edges import under_cap
from moco_isl.mining.gan import GANSettings, fit_gan
from moco_isl.mining.miners import best_proxies
from moco_isl.mining.neighbors import topk
from moco_isl.mining.positives import PositiveSets, distinct_edges, same_label
from moco_isl.mining.triplets import TripletSampler

Tensor = torch.Tensor
SIZES = [0.5, 1, 2, 5, 10, 20, 50]
K, SHARED, CAP = 100, 20, 100


class Lists:
    """Each image's nearest images and their cosines, [M, K] each."""

    def __init__(self, features: Tensor):
        self.features, self.M = features, len(features)
        self.anchors = torch.arange(self.M, device=features.device)
        self.cosine, self.near = topk(features, features, min(K, self.M - 1), self.anchors)

    def pairs(self, score: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distinct undirected pairs, the highest score first; score [M, k] of the images near [M, k]."""
        near = self.near if near is None else near
        a, b, (value,) = distinct_edges(self.M, self.anchors.repeat_interleave(near.shape[1]), near.flatten(), [score.flatten()], undirected=True)
        order = value.sort(descending=True, stable=True).indices
        return a[order], b[order]

    def shared(self) -> Tensor:
        """[M, K]: how many of the SHARED nearest an image and each of its nearest have in common."""
        first = self.near[:, :SHARED].int()
        return torch.cat([(first[rows][:, None, :, None] == first[self.near[rows]][:, :, None]).sum((2, 3)) for rows in self.anchors.split(128)]).float()

    def worst_rank(self) -> Tensor:
        """[M, K]: the larger of the places that an image and each of its nearest have in each other's lists."""
        place = torch.arange(self.near.shape[1], device=self.near.device)
        back = []
        for rows in self.anchors.split(512):
            found = self.near[self.near[rows]] == rows[:, None, None]  # [rows, K, K]
            back.append(torch.where(found.any(2), found.int().argmax(2), len(place)))
        return torch.maximum(torch.cat(back), place).float()


# ---------------------------------------------------------------- the rows


def without_gan(lists: Lists) -> dict[str, tuple[Tensor, Tensor]]:
    """Row -> pairs, surest first."""
    cosine, near = lists.cosine, lists.near
    local = cosine[:, :10].mean(1)
    rows = {
        "all pairs": lists.pairs(cosine),
        "shared neighbours": lists.pairs(lists.shared() + cosine / 4),
        "mutual rank": lists.pairs(cosine / 4 - lists.worst_rank()),
        "CSLS": lists.pairs(2 * cosine - local[:, None] - local[near]),
    }
    for k in (20, 50):
        means = Lists(neighbourhood_means(lists.features, min(k, lists.M - 1), 3.0))
        rows[f"neighbourhood means of {k}"] = means.pairs(means.cosine)
    room = torch.full((lists.M,), CAP, device=near.device)
    a, b = rows["neighbourhood means of 50"]
    taken = under_cap(a, b, room)
    rows[f"  of 50, in-degree at most {CAP}"] = a[taken], b[taken]
    return rows


@torch.no_grad()
def with_gan(lists: Lists, seed: int, iters: int | None) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Row -> pairs, surest first; and the images nearest to each anchor's best proxy [M, K]."""
    x, M = lists.features, lists.M
    none = PositiveSets.empty(M, x.device)
    fit = fit_gan(x, none, GANSettings(iters), seed)
    _, _, near, cosine, _ = best_proxies(fit, x, none, seed, min(K, M - 1))
    worst = _five(fit, lists, seed).amin(2)  # [M, K]
    nearest = PositiveSets.from_edges(M, lists.anchors.repeat_interleave(5), lists.near[:, :5].flatten(), symmetric=False)
    other = fit_gan(x, nearest, GANSettings(iters), seed)
    _, _, near_2, cosine_2, _ = best_proxies(other, x, nearest, seed, min(K, M - 1))
    return {
        "GAN, surest pairs": lists.pairs(cosine, near),
        "GAN, five proxies agree": lists.pairs(worst),
        "GAN, five and shared": lists.pairs(worst + lists.shared() / SHARED),
        "GAN, positives from sets": lists.pairs(cosine_2, near_2),
    }, near


def _five(fit, lists: Lists, seed: int, triplets: int = 5) -> Tensor:
    """[M, K, 5]: cosine of each of an anchor's proxies to each of its nearest."""
    x, M = lists.features, lists.M
    sampler = TripletSampler(x, PositiveSets.empty(M, x.device), M, torch.Generator().manual_seed(seed), triplets)
    parts = []
    for rows in lists.anchors.split(1024):
        a = x[rows].float()
        proxies = [fit.G(a, a, x[sampler.draw_negatives(rows, window)].float()) for window in sampler.spread(0)]
        parts.append(x[lists.near[rows]].float() @ torch.stack(proxies, 2))  # [rows, K, C] @ [rows, C, 5]
    return torch.cat(parts)


# ---------------------------------------------------------------- their figures


def directed(near: Tensor, labels: Tensor) -> dict[float, dict]:
    """Figures of each image's first s images of near [M, k], by whole sizes s."""
    same = same_label(labels, near, torch.arange(len(near), device=near.device)[:, None])
    return {s: {"precision": float(same[:, :s].nanmean()), "coverage": 1.0, "hub": int(near[:, :s].flatten().bincount().max())}
            for s in map(int, SIZES) if 1 <= s <= near.shape[1]}  # fmt: skip


def undirected(a: Tensor, b: Tensor, labels: Tensor) -> dict[float, dict]:
    """Figures of the first s M / 2 of some pairs, where there are as many."""
    M, same, found = len(labels), same_label(labels, a, b), {}
    for size in SIZES:
        if (n := round(size * M / 2)) <= len(a):
            degree = torch.bincount(torch.cat([a[:n], b[:n]]), minlength=M)
            found[size] = {"precision": float(same[:n].nanmean()), "coverage": float((degree > 0).float().mean()), "hub": int(degree.max())}
    return found


def study(features: Tensor, labels: Tensor, seeds: int, iters: int | None) -> dict[str, list[dict]]:
    """Row -> its figures by size, one dict a seed."""
    lists = Lists(features)
    rows = {"own nearest": [directed(lists.near, labels)]}
    rows |= {name: [undirected(*pairs, labels)] for name, pairs in without_gan(lists).items()}
    for seed in range(seeds):
        pairs, near = with_gan(lists, seed, iters)
        found = {"GAN, published": directed(near, labels), **{name: undirected(*p, labels) for name, p in pairs.items()}}
        for name, figures in found.items():
            rows.setdefault(name, []).append(figures)
            print(f"  seed {seed}: {name}", *(f"{100 * f['precision']:.1f}" for f in figures.values()), flush=True)
    return rows


def show(rows: dict[str, list[dict]], result: common.Result) -> None:
    """A row each; the last two columns say by how many points it is above the better of both baselines, at least and at 5 and 50."""
    best = {s: max(rows[name][0][s]["precision"] for name in ("own nearest", "all pairs") if s in rows[name][0]) for s in SIZES}
    for name, seeds in rows.items():
        mean = {s: statistics.fmean(f[s]["precision"] for f in seeds) for s in SIZES if s in seeds[0]}
        at = lambda s: common.spread([100 * f[s]["precision"] for f in seeds]) if s in mean else None  # noqa: B023
        over = {s: 100 * (mean[s] - best[s]) for s in mean}
        middle = {key: statistics.fmean(f[5][key] for f in seeds) for key in ("coverage", "hub")}
        result.add({"row": name, **{f"at_{s:g}": at(s) for s in SIZES}, "coverage": round(100 * middle["coverage"]), "hub": round(middle["hub"]),
                    "least": f"{min(over.values()):+.1f}" if name not in ("own nearest", "all pairs") else None, "n": len(seeds), "figures": seeds})  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    parser = common.parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="safetensors file with features [M, C] and labels [M]")
    parser.add_argument("--images", type=int, metavar="M", help="draw so many of the file's (all)")
    parser.add_argument("--gan", type=int, default=0, metavar="n", help="seeds of the GAN's rows (0: none of them)")
    parser.add_argument("--iters", type=int, help="cap of the GAN's iterations (90 sqrt(M))")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    common.begin(args)
    try:
        features, labels = load(argparse.Namespace(file=args.file, size=None, half=False, device=str(args.device)))
    except BadInput as error:
        print(f"benchmarks.miners: {error}", file=sys.stderr)
        return error.exit_code
    if args.quick:
        args.images, args.iters = min(len(features), 1000), 50
    if args.images and args.images < len(features):
        chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[: args.images].sort().values.to(features.device)
        features, labels = features[chosen], labels[chosen]
    name = Path(args.file).stem.removeprefix("features_")
    columns = [("row", "ranked by"), *((f"at_{s:g}", f"{s:g}") for s in SIZES), ("coverage", "coverage at 5, %"), ("hub", "worst hub at 5"),
               ("least", "least over both baselines"), ("n", "n")]  # fmt: skip
    result = common.Result(f"miners-{name}" + (f"-{args.images}" if args.images else ""), f"Precision of mined pairs, {name}, {len(features):,} images", args.device, columns)
    show(study(features, labels, args.gan, args.iters), result)
    result.note("Precision in per cent at mean set sizes 0.5 to 50 (mean ± standard deviation of n seeds), of each image's 100 nearest as candidates. Own nearest and GAN, "
                "published: directed edges; all others: undirected pairs of the whole data set, surest first.")  # fmt: skip
    common.end(args, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
