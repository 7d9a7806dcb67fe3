"""Compare every way to rank pairs, among them both Euclidean baselines.

A table has the precision, the coverage and the worst hub at mean set sizes 0.5 to 50.

    python -m studies.miners FILE.safetensors       features [M, C] and labels [M] of real images,
                                                    without a GAN: minutes on a CPU
    python -m studies.miners FILE --gan 3           with the rows of the GANs, three seeds each
                                                    (half an hour of CPU a seed at 50,000 images)
    python -m studies.miners digits --gan 3         the digits by a converged MoCo v2 a seed: the
                                                    runs of start_digits.yaml and gain_digits.yaml
    python -m studies.miners FILE.pth.tar --of cifar10 DIR
                                                    what a checkpoint makes of these images

Pairs of the whole data set, the surest first, but for the rows marked "directed":
  own nearest                directed: each image's nearest by cosine
  all pairs                  by cosine
  shared neighbours          by how many of the 20 nearest they share, then by cosine
  mutual rank                by the worse of the two places that they have in each other's lists
  CSLS                       by twice the cosine less each image's mean cosine to its 10 nearest
  neighbourhood means        by the cosine of the means over their 20 or 50 nearest (--miner
                             average); with an in-degree cap; weighed by the estimate without
                             labels; with two views: means of what an image and two augmented views
                             of it have in common, where there are images
  two snapshots              by the worse cosine of two snapshots of the encoder, where there are
                             features of an earlier one
  GAN, published             directed: images nearest to each anchor's best proxy (Eq. 3, no radius)
  GAN, surest pairs          the same pairs, those nearest to their proxy first
  GAN, five proxies agree    an anchor's nearest by the worst cosine to its five proxies
  GAN, five and shared       the same plus the share of their 20 nearest that they share
  GAN, all seeds agree       an anchor's nearest by the worst cosine to the proxies of n GANs
and the surest pairs of other GANs (studies/gans.py): positives from sets (drawn from the 5 nearest,
not the anchor's own row), spectral norm, gradient penalty, graded negatives, and matched false
triplets (an anchor's nearest by D's score of them). Candidates are each image's 100 nearest. Labels
judge and choose nothing. A seed's figures are kept in --folder and made once.

Letters: M images, C feature dimension, k neighbours.
"""

import argparse
import functools
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.mining import load_features
from moco_isl import data, files
from moco_isl.encoders import SmallImages, extract_features, extract_views
from moco_isl.errors import BadInput
from moco_isl.miners.average import neighbourhood_means, with_views
from moco_isl.miners.gan import best_proxies
from moco_isl.mining.edges import under_cap
from moco_isl.mining.estimate import Views, by_halves, pixel_rows
from moco_isl.mining.gan import GANFit, GANSettings
from moco_isl.mining.gan_training import Trainer, fit_gan
from moco_isl.mining.positives import PositiveSets, distinct_edges, same_label
from moco_isl.mining.triplets import TripletSampler
from moco_isl.ops.neighbors import topk
from moco_isl.run.backbone import load_backbone
from studies import gans
from studies.figures import Result

Tensor = torch.Tensor
Pairs = tuple[Tensor, ...]  # images a [U], b [U], surest first; or with weights [U] of the pairs
SIZES = [0.5, 1, 2, 5, 10, 20, 50]
K = 100
SHARED = 20
CAP = 100
TRIPLETS = 5
KINDS = {
    "spectral norm": gans.SpectralNorm,
    "gradient penalty": gans.GradientPenalty,
    "graded negatives": gans.GradedNegatives,
}


@dataclass
class Source:
    """Features [M, C] and labels [M] of images.

    before [M, C]: by an earlier snapshot of the encoder; views 2 x [M, C]: of augmented views.
    """

    features: Tensor
    labels: Tensor
    before: Tensor | None = None
    views: Views | None = None


class Lists:
    """Each image's nearest images and their cosines, [M, K] each."""

    def __init__(self, features: Tensor):
        self.features = features
        self.M = len(features)
        self.anchors = torch.arange(self.M, device=features.device)
        self.cosine, self.near = topk(features, features, min(K, self.M - 1), self.anchors)

    def pairs(self, score: Tensor, near: Tensor | None = None) -> Pairs:
        """Distinct undirected pairs, the highest score first.

        score [M, k]: of the images near [M, k].
        """
        near = self.near if near is None else near
        a, b, (value,) = distinct_edges(
            self.M,
            self.anchors.repeat_interleave(near.shape[1]),
            near.flatten(),
            [score.flatten()],
            undirected=True,
        )
        order = value.sort(descending=True, stable=True).indices
        return a[order], b[order]

    @functools.cached_property
    def shared(self) -> Tensor:
        """[M, K]: how many of their SHARED nearest an image and each of its nearest share."""
        first = self.near[:, :SHARED].int()
        return torch.cat(
            [
                (first[rows][:, None, :, None] == first[self.near[rows]][:, :, None]).sum((2, 3))
                for rows in self.anchors.split(128)
            ]
        ).float()

    def by_cosine(self) -> Pairs:
        return self.pairs(self.cosine)

    def by_shared(self) -> Pairs:
        return self.pairs(self.shared + self.cosine / 4)

    def by_means(self, k: int) -> Pairs:
        """Pairs by the cosine of their means over k neighbours, as --miner average ranks them."""
        means = Lists(neighbourhood_means(self.features, min(k, self.M - 1), 3.0))
        return means.pairs(means.cosine)

    def worst_rank(self) -> Tensor:
        """[M, K]: an image and its nearest have places in each other's lists; the larger one."""
        place = torch.arange(self.near.shape[1], device=self.near.device)
        back = []
        for rows in self.anchors.split(512):
            found = self.near[self.near[rows]] == rows[:, None, None]  # [rows, K, K]
            back.append(torch.where(found.any(2), found.int().argmax(2), len(place)))
        return torch.maximum(torch.cat(back), place).float()

    def cosine_in(self, features: Tensor) -> Tensor:
        """[M, K]: cosine of an image to each of its nearest, by other features [M, C]."""
        return torch.cat(
            [
                (features[self.near[rows]] @ features[rows][:, :, None]).squeeze(2)
                for rows in self.anchors.split(1024)
            ]
        )


# ---------------------------------------------------------------- the rows


def without_gan(
    lists: Lists, before: Tensor | None = None, views: Views | None = None
) -> dict[str, Pairs]:
    """Row -> pairs, surest first."""
    cosine = lists.cosine
    near = lists.near
    local = cosine[:, :10].mean(1)
    rows = {
        "all pairs": lists.by_cosine(),
        "shared neighbours": lists.by_shared(),
        "mutual rank": lists.pairs(cosine / 4 - lists.worst_rank()),
        "CSLS": lists.pairs(2 * cosine - local[:, None] - local[near]),
    }
    for k in (20, 50):
        rows[f"neighbourhood means of {k}"] = lists.by_means(k)
    room = torch.full((lists.M,), CAP, device=near.device)
    a, b = rows["neighbourhood means of 50"]
    taken = under_cap(torch.stack([a, b], dim=1), room)
    rows[f"  of 50, in-degree at most {CAP}"] = a[taken], b[taken]
    most = round(SIZES[-1] * lists.M / 2)
    rows["  of 50, weighed"] = a[:most], b[:most], by_halves(lists.features, a[:most], b[:most])
    if views is not None:
        rows["  of 50, with two views"] = Lists(with_views(lists.features, views)).by_means(50)
    if before is not None:
        rows["two snapshots"] = lists.pairs(torch.minimum(cosine, lists.cosine_in(before)))
    return rows


@torch.no_grad()
def with_gan(lists: Lists, seed: int, iters: int | None) -> tuple[dict[str, Pairs], Tensor, Tensor]:
    """The rows of one seed's GANs.

    Returns row -> pairs, surest first; the images nearest to each anchor's best proxy [M, K]; the
    worst cosine of an anchor's nearest to its proxies [M, K].
    """
    x = lists.features
    M = lists.M
    alone = PositiveSets.empty(M, x.device)
    nearest = PositiveSets.from_edges(
        M, lists.anchors.repeat_interleave(5), lists.near[:, :5].flatten(), symmetric=False
    )
    fit_of = lambda sets, kind=Trainer: fit_gan(x, sets, GANSettings(iters), seed, kind=kind)

    def surest(fit: GANFit, sets: PositiveSets) -> tuple[Pairs, Tensor]:
        _, _, near, cosine, _ = best_proxies(fit, x, sets, seed, min(K, M - 1))
        return lists.pairs(cosine, near), near

    fit = fit_of(alone)
    rows = {}
    rows["GAN, surest pairs"], near = surest(fit, alone)
    worst = _of_five(lambda a, n: fit.G(a, a, n), lists, seed).amin(2)  # [M, K]
    rows["GAN, five proxies agree"] = lists.pairs(worst)
    rows["GAN, five and shared"] = lists.pairs(worst + lists.shared / SHARED)
    rows["GAN, positives from sets"], _ = surest(fit_of(nearest), nearest)
    for name, kind in KINDS.items():
        rows[f"GAN, {name}"], _ = surest(fit_of(alone, kind), alone)
    matched = fit_of(nearest, gans.MatchedFalse)
    rows["GAN, matched false triplets, by D"] = lists.pairs(_scores(matched, lists, seed).mean(2))
    return rows, near, worst


def _negatives(lists: Lists, seed: int):
    """Anchors [N] at a time, with a negative of each of their triplets: (rows [N], [n [N, C]])."""
    sampler = TripletSampler(
        lists.features,
        PositiveSets.empty(lists.M, lists.features.device),
        lists.M,
        torch.Generator().manual_seed(seed),
        TRIPLETS,
    )
    for rows in lists.anchors.split(512):
        yield (
            rows,
            [
                lists.features[sampler.draw_negatives(rows, window)].float()
                for window in sampler.spread(0)
            ],
        )


def _of_five(proxy, lists: Lists, seed: int) -> Tensor:
    """[M, K, 5]: cosines of an anchor's nearest to its proxies, which are proxy(a, n) [N, C]."""
    x = lists.features
    parts = []
    for rows, negatives in _negatives(lists, seed):
        proxies = torch.stack([proxy(x[rows].float(), n) for n in negatives], 2)  # [N, C, 5]
        parts.append(x[lists.near[rows]].float() @ proxies)
    return torch.cat(parts)


def _scores(fit: GANFit, lists: Lists, seed: int) -> Tensor:
    """[M, K, 5]: D's logit of an anchor, each of its nearest as the positive, and each negative."""
    x = lists.features
    k = lists.near.shape[1]
    parts = []
    for rows, negatives in _negatives(lists, seed):
        a = x[rows].float().repeat_interleave(k, 0)  # [N k, C]
        p = x[lists.near[rows]].float().flatten(0, 1)
        parts.append(
            torch.stack([fit.D(a, p, n.repeat_interleave(k, 0)).view(-1, k) for n in negatives], 2)
        )
    return torch.cat(parts)


# ---------------------------------------------------------------- their figures


def directed(near: Tensor, labels: Tensor) -> dict[str, dict]:
    """Figures of each image's first s images of near [M, k], by whole sizes s."""
    same = same_label(labels, near, torch.arange(len(near), device=near.device)[:, None])
    return {
        f"{s}": {
            "precision": float(same[:, :s].nanmean()),
            "coverage": 1.0,
            "hub": int(near[:, :s].flatten().bincount().max()),
        }
        for s in map(int, SIZES)
        if 1 <= s <= near.shape[1]
    }


def undirected(
    a: Tensor, b: Tensor, weight: Tensor | None = None, *, labels: Tensor
) -> dict[str, dict]:
    """Figures of the first s M / 2 of some pairs, where there are as many."""
    M = len(labels)
    same = same_label(labels, a, b)
    found = {}
    weight = torch.ones_like(same) if weight is None else weight
    weight = torch.where(same.isnan(), 0, weight)
    right = same.nan_to_num() * weight
    for size in SIZES:
        if (n := round(size * M / 2)) <= len(a):
            degree = torch.bincount(torch.cat([a[:n], b[:n]]), minlength=M)
            found[f"{size:g}"] = {
                "precision": float(right[:n].sum() / weight[:n].sum()),
                "coverage": float((degree > 0).float().mean()),
                "hub": int(degree.max()),
            }
    return found


def study(
    sources: list[Source], seeds: int, iters: int | None, folder: Path
) -> dict[str, list[dict]]:
    """Row -> its figures by size: a dict a source, or for rows of GANs a dict a seed.

    A seed has source number seed % len(sources).
    """
    rows: dict[str, list[dict]] = {}
    worst = []
    all_lists = [Lists(source.features) for source in sources]
    for source, lists in zip(sources, all_lists):
        rows.setdefault("own nearest", []).append(directed(lists.near, source.labels))
        for name, pairs in without_gan(lists, source.before, source.views).items():
            rows.setdefault(name, []).append(undirected(*pairs, labels=source.labels))
    for seed in range(seeds):
        at = seed % len(sources)
        found, least = _seed(sources[at], all_lists[at], seed, iters, folder)
        worst.append(least)
        for name, figures in found.items():
            rows.setdefault(name, []).append(figures)
            print(
                f"  seed {seed}: {name}",
                *(f"{100 * f['precision']:.1f}" for f in figures.values()),
                flush=True,
            )
    if seeds > 1 and len(sources) == 1:
        rows["GAN, all seeds agree"] = [
            undirected(*all_lists[0].pairs(torch.stack(worst).amin(0)), labels=sources[0].labels)
        ]
    return rows


def _seed(
    source: Source, lists: Lists, seed: int, iters: int | None, folder: Path
) -> tuple[dict[str, dict], Tensor]:
    """Figures of a seed by row of the GANs, and the worst cosines [M, K].

    They are kept in `folder`, and made where the seed has no file there yet.
    """
    done = folder / f"seed-{seed}.pt"
    key = {"iters": iters, "images": lists.M, "sum": round(float(lists.cosine.double().sum()), 2)}
    if done.exists():
        kept = torch.load(done, weights_only=True)
        if kept["key"] != key:
            raise BadInput(
                f"{done} is of other features or iterations: expected {key}, it has {kept['key']};"
                " choose another --folder, or remove it"
            )
        return json.loads(kept["figures"]), kept["worst"].float().to(lists.near.device)
    pairs, near, worst = with_gan(lists, seed, iters)
    figures = {
        "GAN, published": directed(near, source.labels),
        **{name: undirected(*p, labels=source.labels) for name, p in pairs.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.write(
        {"key": key, "figures": json.dumps(figures), "worst": worst.half().cpu()},
        done,
        done.with_suffix(".tmp"),
    )
    return figures, worst


def show(rows: dict[str, list[dict]], result: Result) -> None:
    """Add a row each.

    Its last columns: by how many points it is at least above the better of both baselines, over all
    sizes, at 5 and at 50.
    """
    baselines = ("own nearest", "all pairs")
    mean = {
        name: {s: statistics.fmean(f[s]["precision"] for f in seeds) for s in seeds[0]}
        for name, seeds in rows.items()
    }
    best = {s: max(mean[name].get(s, 0) for name in baselines) for s in map("{:g}".format, SIZES)}
    for name, seeds in rows.items():
        cells = {"row": name, "n": len(seeds)}
        for s in seeds[0]:
            cells[f"at_{s}"] = common.spread([100 * f[s]["precision"] for f in seeds])
        cells["coverage"] = round(100 * statistics.fmean(f["5"]["coverage"] for f in seeds))
        cells["hub"] = round(statistics.fmean(f["5"]["hub"] for f in seeds))
        if name not in baselines:
            over = {s: 100 * (mean[name][s] - best[s]) for s in mean[name]}
            gains = {
                "least": min(over.values()),
                "over_5": over.get("5"),
                "over_50": over.get("50"),
            }
            cells |= {key: f"{x:+.1f}" for key, x in gains.items() if x is not None}
        result.add(cells)


# ---------------------------------------------------------------- the features


def from_file(file: str, device: torch.device, images: int | None) -> list[Source]:
    """All of the file's images, or so many of them, drawn."""
    features, labels, before = load_features(file, device)
    if images and images < len(features):
        chosen = (
            torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:images]
            .sort()
            .values.to(features.device)
        )
        features = features[chosen]
        labels = labels[chosen]
        before = None if before is None else before[chosen]
    return [Source(features, labels, before)]


def of_checkpoint(file: Path, dataset: str, root: str | None, device: torch.device) -> Source:
    """A data set's train images and two MoCo v2 views of each by a checkpoint's query encoder."""
    images = data.build_dataset(dataset, root, "train")
    if images.labels is None:
        raise BadInput(f"{root} has no labels to judge by: expected a folder a class")
    size = data.native_size(images)
    M = len(images)
    encoder, _ = load_backbone(file, image_size=size)
    encoder.to(device)
    plain = data.eval_loader(
        images, transform=data.get_eval_transform(dataset, size), batch_size=256, device=device
    )
    augmentation = data.get_augmentation(dataset, aug_plus=True, size=size)
    seen = data.view_loader(
        images, augmentation=augmentation, batch_size=256, seed=0, device=device
    )
    features = extract_features(encoder, plain, M, device)
    small = extract_features(SmallImages(), plain, M, device, normalize=False)
    first, second = extract_views(encoder, seen.epoch(0), M, device)
    return Source(features, images.labels.to(device), views=Views(first, second, pixel_rows(small)))


def of_digits(seeds: int, device: torch.device, runs: Path) -> list[Source]:
    """The digits' train images by each seed's MoCo v2 of gain_digits, trained 40 more epochs.

    The features before those epochs are of start_digits. Raises BadInput where a run is missing.
    """
    sources = []
    for seed in range(seeds):
        files = [
            runs / "gain_digits" / f"none,seed={seed}" / "checkpoint_last.pth.tar",
            runs / "start_digits" / f"moco,seed={seed}" / "checkpoint_last.pth.tar",
        ]
        if missing := [file for file in files if not file.is_file()]:
            study = f"studies/{missing[0].parent.parent.name}.yaml"
            raise BadInput(f"no file at {missing[0]}: run python launch/sweep.py {study} first")
        source, before = (of_checkpoint(file, "digits", None, device) for file in files)
        source.before = before.features
        sources.append(source)
    return sources


def add_source(parser: argparse.ArgumentParser) -> None:
    """The flags that say of which images a file is."""
    parser.add_argument(
        "--of",
        nargs="+",
        metavar="X",
        help="of a checkpoint: the name of the data set and, but for digits, where it is",
    )
    parser.add_argument("--images", type=int, metavar="M", help="draw so many of the file's (all)")


def get_parser() -> argparse.ArgumentParser:
    parser = common.parser(__doc__)
    parser.add_argument(
        "file",
        metavar="FILE|digits",
        help="safetensors file with features [M, C] and labels [M], or a checkpoint",
    )
    add_source(parser)
    parser.add_argument(
        "--gan", type=int, default=0, metavar="n", help="seeds of the GANs' rows (0: none of them)"
    )
    parser.add_argument("--iters", type=int, help="cap of the GAN's iterations (90 sqrt(M))")
    parser.add_argument("--folder", type=Path, help="where a seed's figures go (runs/miners/NAME)")
    parser.add_argument(
        "--sweeps", type=Path, default=Path("runs"), help="where the digits' sweeps have run (runs)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    common.begin(args)
    if args.quick:
        args.images = args.images or 1000
        args.iters = 50
    name = Path(args.file).stem.removeprefix("features_")
    if args.images and args.file != "digits":
        name += f"-{args.images}"
    columns = [
        ("row", "ranked by"),
        *((f"at_{s:g}", f"{s:g}") for s in SIZES),
        ("coverage", "coverage at 5, %"),
        ("hub", "worst hub at 5"),
        ("least", "least over both baselines"),
        ("over_5", "at 5"),
        ("over_50", "at 50"),
        ("n", "n"),
    ]
    try:
        if args.of:
            name = Path(args.file).resolve().parent.name
            root = args.of[1] if len(args.of) > 1 else None
            sources = [of_checkpoint(Path(args.file), args.of[0], root, args.device)]
        elif args.file == "digits":
            sources = of_digits(max(1, args.gan), args.device, args.sweeps)
        else:
            sources = from_file(args.file, args.device, args.images)
        folder = args.folder or Path("runs/miners") / (name + "-quick" * args.quick)
        rows = study(sources, args.gan, args.iters, folder)
    except BadInput as error:
        print(f"studies.miners: {error}", file=sys.stderr)
        return error.exit_code
    title = f"Precision of mined pairs, {name}, {len(sources[0].labels):,} images"
    result = Result(f"miners-{name}", title, args.device, columns)
    show(rows, result)
    result.note(
        "Precision in per cent at mean set sizes 0.5 to 50 (mean ± standard deviation of n seeds),"
        " of each image's 100 nearest as candidates. Own nearest and GAN, published: directed"
        " edges; all others: undirected pairs of the whole data set, surest first."
    )
    common.end(args, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
