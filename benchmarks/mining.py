"""One round of mining: precision beside both Euclidean baselines, hubs, coverage, seconds, memory.

    python -m benchmarks.mining features.safetensors      features [M, C] and labels [M] of real
                                                          images
    python -m benchmarks.mining --size 1281167 --iters 200 --worst 1 --no-table
                                                          memory and seconds of that many

Rows of the table, precision at mean set sizes 1, 5, 10, 50:
  own nearest         each image's nearest by cosine
  all pairs           the most similar pairs of the whole data set, equally many
  GAN proxies         the images nearest to each anchor's best proxy, whatever its score (Eq. 3
                      without a radius)
  GAN surest pairs    those of these pairs that are most similar to their proxy, of the whole data
                      set, under the in-degree cap
Below it the round itself, as a run does it. Memory is what the process (or the GPU) held at most
beyond the features.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import common
from benchmarks.knn import peak_bytes
from moco_isl import dist
from moco_isl.errors import BadInput
from moco_isl.miners.gan import GANMiner, best_proxies
from moco_isl.mining.baselines import baselines
from moco_isl.mining.edges import Edges, Rules, settle
from moco_isl.mining.gan import Discriminator, GANFit, Generator
from moco_isl.mining.positives import PositiveSets
from moco_isl.ops.neighbors import topk


def get_parser() -> argparse.ArgumentParser:
    parser = common.parser(__doc__)
    parser.add_argument(
        "file", nargs="?", help="safetensors file with features [M, C] and labels [M]"
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="M",
        help="instead of a file: synthetic features of M images, 100 a cluster",
    )
    parser.add_argument(
        "--dim", type=int, default=128, metavar="C", help="of synthetic features (128)"
    )
    parser.add_argument(
        "--half", action="store_true", help="keep features in half precision (a GPU mines them so)"
    )
    parser.add_argument(
        "--iters",
        type=int,
        help="cap of the GAN's iterations (default: 90 sqrt(M), 20,000 at 50,000 images)",
    )
    parser.add_argument("--min-iters", type=int, help="(default: a quarter of the cap)")
    parser.add_argument("--lam", type=float, default=1.0, help="lambda of Eq. 1 (1)")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="score above which a proxy adds images (0.5)"
    )
    parser.add_argument("--radius", type=float, default=0.6, help="R of Eq. 2 (0.6)")
    parser.add_argument(
        "--budget", type=float, default=10.0, help="of the round: positives an image (10)"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="rounds one after the other, on the same features (1)"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 5, 10, 50])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-table", action="store_true", help="the round alone: no baselines, no second search"
    )
    parser.add_argument(
        "--worst",
        type=int,
        metavar="W",
        help=(
            "the most work and memory a round can be: every candidate of every anchor joins,"
            " whatever GAN and watchdog say; one of W shares of the anchors is mined, copies stand"
            " for the others"
        ),
    )
    return parser


def load(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """features [M, C] unit rows and labels [M] on the device."""
    if (args.file is None) == (args.size is None):
        raise BadInput("give a feature file or --size M, one of them")
    dtype = torch.float16 if args.half else torch.float32
    if args.size is not None:
        return synthetic(args.size, args.dim, args.device, dtype, args.seed)
    return load_features(args.file, args.device, dtype)[:2]


def load_features(
    file: str, device: str | torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """features [M, C] unit rows, labels [M], and features `before` [M, C] of an earlier encoder.

    `before` is None where the file has none. Raises BadInput.
    """
    from safetensors.torch import load_file

    if not Path(file).is_file():
        raise BadInput(
            f"no feature file at {file}: a safetensors file with features and labels is expected"
        )
    tensors = load_file(file)
    if not {"features", "labels"} <= tensors.keys():
        raise BadInput(f"{file} holds {', '.join(tensors)}: features and labels are expected")
    unit = lambda name: F.normalize(tensors[name].float(), dim=1).to(device, dtype)
    return (
        unit("features"),
        tensors["labels"].to(device),
        unit("before") if "before" in tensors else None,
    )


def synthetic(
    M: int, C: int, device: str, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows around M / 100 random centres; the labels are the centres."""
    g = torch.Generator(device).manual_seed(seed)
    centres = torch.randn(max(2, M // 100), C, generator=g, device=device)
    labels = torch.randint(len(centres), (M,), generator=g, device=device)
    features = torch.empty(M, C, dtype=dtype, device=device)
    for part, label in zip(features.split(65536), labels.split(65536)):
        part.copy_(
            F.normalize(
                centres[label] + 0.8 * torch.randn(len(label), C, generator=g, device=device), dim=1
            )
        )
    return features, labels


class WorstCase(GANMiner):
    """Mines the first of W shares of the anchors and lets every candidate join.

    Shifted copies of its edges stand for the other shares.
    """

    def __init__(self, shares: int, **kwargs):
        super().__init__(**{**kwargs, "threshold": 0.0, "radius": 2.0, "radius_mode": "fixed"})
        self.settings.max_hub = 1.0
        self.settings.min_distinct = 0.0
        self.shares = shares

    def find(self, features, positives, seed, tick):
        own = dist.shard
        dist.shard = lambda n: (0, -(-n // self.shares))
        try:
            found, why = super().find(features, positives, seed, tick)
        finally:
            dist.shard = own
        M = len(features)
        step = int(found.src.max()) + 1
        shifted = lambda x: torch.cat([((x + i * step) % M).int() for i in range(self.shares)])
        return (
            Edges(shifted(found.src), shifted(found.dst), found.sureness.repeat(self.shares)),
            why,
        )


def rounds(
    args: argparse.Namespace,
    miner: GANMiner,
    features: torch.Tensor,
    labels: torch.Tensor,
    result: common.Result,
) -> None:
    """The rounds of a run as rows, and in words as notes."""
    sets = PositiveSets.empty(len(features), features.device)
    for number in range(args.rounds):
        before = peak_bytes(args.device, reset=True)
        sets = miner.mine(features, sets, torch.Generator().manual_seed(args.seed + number))
        peak = peak_bytes(args.device)
        report = miner.report
        if sets.num_edges:
            report.precision = sets.precision(labels)
        result.add(
            {
                "what": f"round {number}",
                "size": report.mean_size,
                "hub": report.worst_in_degree,
                "seconds": report.seconds,
                "memory_gib": None if peak is None else (peak - before) / 2**30,
            }
        )
        result.note(f"round {number}: {report}")


def table(
    args: argparse.Namespace, miner: GANMiner, features: torch.Tensor, labels: torch.Tensor
) -> dict[str, dict]:
    """Row -> precision at each size, hub, seconds.

    The rows of the GAN are by the last round's networks, with empty sets.
    """
    M = len(features)
    k = max(args.sizes)
    start = time.perf_counter()
    found = baselines(features, labels, args.sizes)
    rows = {
        "own nearest": {"precision": found["own_nearest"]},
        "all pairs": {"precision": found["all_pairs"]},
    }
    rows["own nearest"]["seconds"] = time.perf_counter() - start
    _, near = topk(features, features, 10, torch.arange(M, device=features.device))
    rows["own nearest"]["hub"] = int(near.flatten().bincount().max())
    if miner.networks is None:
        return rows
    G = Generator(features.shape[1])
    D = Discriminator(features.shape[1])
    G.load_state_dict(miner.networks["G"])
    D.load_state_dict(miner.networks["D"])
    fit = GANFit(G.to(features.device), D.to(features.device), {})
    start = time.perf_counter()
    empty = PositiveSets.empty(M, features.device)
    _, score, near, cosine, _ = best_proxies(fit, features, empty, args.seed, k)
    correct = labels[near] == labels[:, None]
    rows["GAN proxies"] = {
        "precision": [float(correct[:, :size].double().mean()) for size in args.sizes],
        "seconds": time.perf_counter() - start,
        "hub": int(near[:, :10].flatten().bincount().max()),
    }
    upper = score > score.median()
    rows["  upper half of scores"] = {
        "precision": [float(correct[upper, :size].double().mean()) for size in args.sizes]
    }
    anchors = torch.arange(M, device=features.device)[:, None].expand_as(near)
    edges = Edges(anchors.flatten(), near.flatten(), cosine.flatten())
    sets = [settle(features, edges, empty, Rules(size))[0] for size in args.sizes]
    rows["GAN surest pairs"] = {
        "precision": [s.precision(labels) for s in sets],
        "hub": int(sets[-1].in_degree().max()),
    }
    return rows


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    common.begin(args)
    if args.quick:
        args.size = args.size or 600
        args.iters = 40
        args.min_iters = 20
    at = {size: f"at_{size}" for size in args.sizes}
    columns = [("what", ""), *((key, f"precision at {size}") for size, key in at.items())]
    columns += [("size", "set size"), ("hub", "worst hub"), ("seconds", "s"), ("memory_gib", "GiB")]
    try:
        features, labels = load(args)
        kind = GANMiner if args.worst is None else partial(WorstCase, args.worst)
        miner = kind(
            budget=args.budget,
            iters=args.iters,
            min_iters=args.min_iters,
            lam=args.lam,
            threshold=args.threshold,
            radius=args.radius,
        )
        title = f"Rounds of mining on {len(features):,} images, and what they could have taken"
        result = common.Result("mining", title, args.device, columns)
        rounds(args, miner, features, labels, result)
        rows = {} if args.no_table else table(args, miner, features, labels)
    except BadInput as error:
        print(f"benchmarks.mining: {error}", file=sys.stderr)
        return error.exit_code
    for name, row in rows.items():
        precision = dict(zip(at.values(), row.pop("precision")))
        result.add({"what": name.strip(), **precision, **row})
    if rows:
        result.note(
            "Worst hub: how many images the most frequent one is near to, ten nearest each; of the"
            " surest pairs its positives at the largest size."
        )
    common.end(args, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
