"""Neighbourhood means with two views, for the studies: `--miner studies.with_views:WithViews`.

The product takes views only where --isl-trust needs them for its estimate. The studies compare sets
of a given width, whatever an estimate says.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from moco_isl.miners.average import AverageMiner, neighbourhood_means, with_views
from moco_isl.mining.edges import Edges
from moco_isl.mining.estimate import common_neighbours
from moco_isl.mining.positives import PositiveSets
from moco_isl.ops.neighbors import Tick

Tensor = torch.Tensor


@dataclass(eq=False)
class WithViews(AverageMiner):
    """AverageMiner over features and views."""

    name = "average with views"
    uses_views: ClassVar[bool] = True


@dataclass(eq=False)
class Twice(WithViews):
    """Pairs are ranked by the means of the means."""

    name = "means taken twice"

    def find(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None
    ) -> tuple[Edges, str]:
        rows = with_views(features, self.views)
        self.views = None  # they are in the rows
        means = neighbourhood_means(rows, min(self.k, len(rows) - 1), self.power, tick)
        return super().find(means, positives, seed, tick)


@dataclass(eq=False)
class Weighed(WithViews):
    """A pair weighs what the estimate without labels says of it: min(5 s, 1)."""

    name = "average, weighed"

    def find(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None
    ) -> tuple[Edges, str]:
        edges, why = super().find(features, positives, seed, tick)
        M = len(features)
        surest = edges.sureness.topk(min(len(edges.src), 2 * self.most(M) * M)).indices
        src, dst = edges.src[surest], edges.dst[surest]
        first, second, pixels = self.views
        shared = torch.minimum(
            common_neighbours((first, second), src, dst, tick),
            common_neighbours((pixels, pixels), src, dst, tick),
        )
        weight = (5 * shared).clamp(0.01, 1)
        return replace(edges, src=src, dst=dst, sureness=edges.sureness[surest], weight=weight), why
