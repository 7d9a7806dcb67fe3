"""Affinity diffusion, PAD (Huang et al. 2020): strongly connected subgraphs are sets of positives.

Letters: M images, C feature dimension, N anchors of a block, k neighbours, R images reached from an
anchor.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from moco_isl import dist
from moco_isl.errors import missing_package
from moco_isl.mining.edges import Edges
from moco_isl.mining.groups import Groups, merged, over_pieces
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import RoundMiner, over_blocks
from moco_isl.ops.neighbors import Tick, topk
from moco_isl.options import check_range, opt

Tensor = torch.Tensor

_REACH = 1024  # images that a walk goes on from, the likeliest ones
_TOGETHER = 1 << 22  # entries of one piece of walks


@dataclass(eq=False)
class DiffusionMiner(RoundMiner):
    """Images that reach each other by edges of high diffused affinity.

    In the graph an image points at its k nearest, with the affinity S = max(cosine, 0) / k, so that
    no row sums to more than 1. Diffused: F = sum over t = 1..steps of decay^(t-1) S^t, the walks of
    up to `steps` edges; exact as long as no more than 1,024 images are t edges away. An image then
    points at those of its k highest F. The sets are the strongly connected subgraphs: in one, every
    image is reached from every other (see `subgraphs`). They are made anew each round, and a pair
    is as sure as it is similar.
    """

    name = "diffusion"
    replaces: ClassVar[bool] = True

    k: int = opt(
        20,
        "--isl-neighbors",
        low=1,
        metavar="k",
        help="nearest images of each in the graph",
    )
    steps: int = opt(
        2, "--isl-walk", low=1, metavar="n", help="edges of the longest walk through the graph"
    )
    largest: int | None = opt(
        None,
        "--isl-subgraph",
        low=2,
        metavar="n",
        help="images of the largest subgraph: one that is larger is taken apart, by pointing at"
        " fewer images (5 % of all up to 100, or 4 times a number given to --isl-budget)",
    )
    decay: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        check_range("DiffusionMiner: decay", self.decay, 0, 1, low_open=True)
        try:
            import scipy.sparse.csgraph  # noqa: F401
        except ImportError:
            raise missing_package("--miner diffusion", "scipy", "'moco_isl[diffusion]'") from None

    def find(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None
    ) -> tuple[Edges, str]:
        M, device = len(features), features.device
        k = min(self.k, M - 1)
        bank = self.searchable(features, tick)
        nearest = lambda anchors, number: topk(features[anchors], bank, k, anchors, tick=tick)
        # [M, k] each: in order
        _, cosine, near = (dist.all_gather_rows(x) for x in over_blocks(M, device, nearest, tick))
        S = cosine.clamp(min=0) / k

        def walk(anchors: Tensor, number: int) -> tuple[Tensor, Tensor]:
            pieces = anchors.split(max(1, _TOGETHER // (min(_REACH, k ** (self.steps - 1)) * k)))
            step = lambda piece: diffuse(piece, near, S, self.steps, self.decay, k)
            return over_pieces(pieces, step, tick)

        # [M, k] each: in order
        _, reached, F = (dist.all_gather_rows(x) for x in over_blocks(M, device, walk, tick))
        largest = self.largest or max(2, replace(self.rules, max_share=None).cap(M))
        subgraph = subgraphs(reached, F > 0, largest)  # [M]
        groups = Groups(subgraph[None])
        groups.require_pairs("give a smaller --isl-subgraph")
        (sizes,) = groups.size
        joined = int((sizes > 1).sum())
        self.report.extra |= {
            "subgraphs": joined,
            "largest_subgraph": int(sizes.max()),
            "alone": float((sizes[subgraph] == 1).float().mean()),
        }
        block = lambda anchors, number: groups.edges(features, anchors, tick=tick)
        _, src, dst, _, cosine = over_blocks(M, device, block, tick)
        if not joined:
            self.report.why = (
                "no two images reach each other in the graph of nearest neighbours by affinities"
                " above 0"
            )
        return Edges(src, dst, cosine), ""


def diffuse(
    anchors: Tensor, near: Tensor, S: Tensor, steps: int, decay: float, keep: int
) -> tuple[Tensor, Tensor]:
    """Rows `anchors` [N] of F = sum of decay^(t-1) S^t: their `keep` highest entries.

    near, S: [M, k], row i holding the non-zero columns of S_i and their values. Returns images
    [N, keep] and F [N, keep]. The diagonal is left out; places without an image have F 0.
    """
    # row of S^0
    image = anchors[:, None]
    share = torch.ones(len(anchors), 1, device=S.device, dtype=S.dtype)
    images, shares = [], []
    for t in range(steps):
        share = (share[:, :, None] * S[image]).flatten(1)  # [N, R k]
        image = near[image].flatten(1)
        image, share = merged(image, share, _REACH)
        images.append(image)
        shares.append(share * decay**t)
    image, share = torch.cat(images, 1), torch.cat(shares, 1)
    image, share = merged(image, torch.where(image == anchors[:, None], 0, share), keep)
    lacking = keep - image.shape[1]
    return tuple(torch.nn.functional.pad(x, (0, lacking)) for x in (image, share))


def subgraphs(near: Tensor, points: Tensor, largest: int) -> Tensor:
    """The strongly connected subgraph of each image, [M] int64; an image may be alone in its own.

    near [M, k]: the images that each points at, the surest first; points [M, k]: False for padding.
    A subgraph of more than `largest` images is taken apart: its images point at one image less,
    the least sure one, until no subgraph is larger. The same on every rank.
    """
    import numpy as np
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    M, k = near.shape
    device = near.device
    near, points = near.cpu().numpy(), points.cpu().numpy()
    subgraph = np.zeros(M, dtype=np.int64)
    number = 0
    rest = np.arange(M)  # the images of subgraphs that are too large so far
    place = np.empty(M, dtype=np.int64)
    for width in range(k, -1, -1):
        place.fill(-1)
        place[rest] = np.arange(len(rest))
        to = place[near[rest, :width]]  # [n, width]
        edge = points[rest, :width] & (to >= 0)
        src = np.broadcast_to(np.arange(len(rest))[:, None], to.shape)[edge]
        graph = csr_array((np.ones(len(src), np.int8), (src, to[edge])), shape=(len(rest),) * 2)
        _, found = connected_components(graph, directed=True, connection="strong")
        size = np.bincount(found)
        small = size[found] <= largest
        subgraph[rest[small]] = number + found[small]
        number += len(size)
        rest = rest[~small]
        if not len(rest):
            break
    return torch.from_numpy(np.unique(subgraph, return_inverse=True)[1]).to(device, torch.int64)
