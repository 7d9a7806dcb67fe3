"""Neighbourhood means: pairs are ranked by how similar the means around both images are.

Like ISL's proxy, a mean is a point between an image and its likely positives, but no network
has to be trained for it.

Letters: M images, C feature dimension, N anchors of a block, k neighbours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moco_isl import dist
from moco_isl.mining.edges import Edges
from moco_isl.mining.estimate import Views
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import RoundMiner, over_blocks
from moco_isl.ops.ivf import IVF
from moco_isl.ops.neighbors import Tick, topk
from moco_isl.options import check_range, opt

Tensor = torch.Tensor

_ROWS = 256  # anchors whose neighbours' features are held at a time


@dataclass(eq=False)
class AverageMiner(RoundMiner):
    """The pairs of images of the whole data set whose neighbourhood means are most similar.

    Where a round has two augmented views of every image, features and views are averaged together:
    the features of a single crop are partly chance. A mean has the image itself at weight 1; a
    neighbour weighs its cosine to the power of `power`, and nothing where that is below 0. Each
    image offers its `candidates` (None: see `offered`) most similar ones by their means.
    """

    name = "average"
    k: int = opt(
        50,
        "--isl-neighbors",
        low=1,
        metavar="k",
        help="nearest images that an image's mean is taken over",
    )
    candidates: int | None = None
    power: float = 3.0

    def __post_init__(self):
        super().__post_init__()
        check_range("AverageMiner: candidates", self.candidates, 1)
        check_range("AverageMiner: power", self.power, 0)

    def find(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None
    ) -> tuple[Edges, str]:
        M = len(features)
        k = min(self.k, M - 1)
        candidates = min(self.candidates or self.offered(M), M - 1)
        rows = features if self.views is None else with_views(features, self.views)
        means = neighbourhood_means(rows, k, self.power, tick, self.searchable(rows, tick))
        bank = self.searchable(means, tick)
        block = lambda anchors, number: topk(means[anchors], bank, candidates, anchors, tick=tick)
        anchors, cosine, near = over_blocks(M, features.device, block, tick)
        return Edges(anchors.repeat_interleave(candidates), near.flatten(), cosine.flatten()), ""


def with_views(features: Tensor, views: Views) -> Tensor:
    """The mean of features [M, C] and views 2 x [M, C]: unit rows [M, C] of the features' type."""
    return F.normalize(features.float() + views[0].float() + views[1].float(), dim=1).to(
        features.dtype
    )


def neighbourhood_means(
    features: Tensor,
    k: int,
    power: float,
    tick: Tick | None = None,
    bank: Tensor | IVF | None = None,
) -> Tensor:
    """The mean of each of features [M, C] and its k nearest, weighed by cosine ^ power.

    bank: what is searched, `RoundMiner.searchable` of the features; None: the features. Returns
    unit rows [M, C] of the same type, equal on all ranks.
    """
    bank = features if bank is None else bank

    def block(anchors: Tensor, number: int) -> tuple[Tensor]:
        cosine, near = topk(features[anchors], bank, k, anchors, tick=tick)  # [N, k]
        weight = cosine.clamp(min=0) ** power
        parts = []
        for i in range(0, len(anchors), _ROWS):
            rows = features[near[i : i + _ROWS]].float()  # [rows, k, C]
            parts.append(
                features[anchors[i : i + _ROWS]].float()
                + (weight[i : i + _ROWS, None] @ rows).squeeze(1)
            )
        return (F.normalize(torch.cat(parts), dim=1),)

    _, means = over_blocks(len(features), features.device, block, tick)
    return dist.all_gather_rows(means).to(features.dtype)
