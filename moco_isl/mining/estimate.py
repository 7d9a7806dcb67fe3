"""How much of a mined set is right, estimated without labels.

Two images that are alike in one view of the data set have the same neighbours in another view: the
more neighbours i has in the first view of those that j has in the second, the more often the pair
i, j is right. Neighbours that are there by chance differ between the views.

    s_ij = (|N1(i) & N2(j)| + |N2(i) & N1(j)|) / 2k
    p_ij = sigmoid(A + B logit(e + (1 - 2 e) s_ij))

There are two kinds of views, each with its own A, B and e:

  by_views    features of two random augmentations of every image; s less what sets drawn by chance
              have in common. An encoder that is not trained yet scatters the views of an image, and
              the estimate is then too low.
  by_halves   two halves of the feature's dimensions, always the same ones: it needs no more than
              the features. But both halves of a poor encoder's features agree on wrong neighbours
              too, so this is an upper bound.

A and B were fitted to labels once: those of the views on the digits by one MoCo encoder, those of
the halves on the digits and on features of CIFAR-10 by another. `python -m studies.estimate`
measures how far off both are on other features. Both hold for the pairs of one s together, not
for a single pair, and neither sees that an encoder confounds two classes.

Letters: M images, C feature dimension, U undirected pairs, n images looked at, k neighbours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moco_isl import dist
from moco_isl.errors import Interrupted
from moco_isl.ops.neighbors import Tick, topk

Tensor = torch.Tensor


@dataclass(frozen=True)
class Curve:
    """The curve that gives the share p of right pairs for a share s of common neighbours."""

    A: float
    B: float
    e: float

    def __call__(self, s: Tensor) -> Tensor:
        return torch.sigmoid(self.A + self.B * torch.logit(self.e + (1 - 2 * self.e) * s))


VIEWS = Curve(4.10, 1.44, 0.002)
HALVES = Curve(2.70, 1.20, 0.02)
NEIGHBOURS = 50  # k; fewer where images are few
SAMPLE = 4096  # pairs that stand for all
Views = tuple[Tensor, Tensor]


def halves(features: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of the dimensions of features [M, C]: [M, C / 2] unit rows each.

    The parts depend on C alone.
    """
    order = torch.randperm(features.shape[1], generator=torch.Generator().manual_seed(0))
    first, second = order.to(features.device).tensor_split(2)
    unit = lambda part: F.normalize(features[:, part].float(), dim=1).to(features.dtype)
    return unit(first), unit(second)


def by_halves(features: Tensor, a: Tensor, b: Tensor, tick: Tick | None = None) -> Tensor:
    """For each pair, at most which share of the pairs like it is right: [U] float32.

    features [M, C] unit rows, pairs a [U], b [U].
    """
    return HALVES(common_neighbours(halves(features), a, b, tick))


def by_views(views: Views, a: Tensor, b: Tensor, tick: Tick | None = None) -> Tensor:
    """For each pair, which share of the pairs like it is right: [U] float32.

    views 2 x [M, C] unit rows, of two random augmentations of every image; pairs a [U], b [U].
    """
    by_chance = _neighbours(len(views[0])) / len(views[0])
    s = common_neighbours(views, a, b, tick)
    return VIEWS(((s - by_chance) / (1 - by_chance)).clamp(min=0))


def _neighbours(M: int) -> int:
    return max(1, min(NEIGHBOURS, M // 8))


@torch.no_grad()
def common_neighbours(views: Views, a: Tensor, b: Tensor, tick: Tick | None = None) -> Tensor:
    """The share s [U] float32 of neighbours that the images of pairs a [U], b [U] have in common.

    views: two views [M, ...] of unit rows. Only the images of the pairs are searched for their
    neighbours.
    """
    k = _neighbours(len(views[0]))
    images, place = torch.cat([a, b]).unique(return_inverse=True)  # [n], [2 U]
    near_1, near_2 = (topk(view[images], view, k, images, tick=tick)[1] for view in views)  # [n, k]
    in_both = lambda x, y: (x[:, :, None] == y[:, None, :]).sum((1, 2))
    step = 1 << 12
    parts = [torch.zeros(0, device=a.device)]
    for i, j in zip(place[: len(a)].split(step), place[len(a) :].split(step)):
        parts.append((in_both(near_1[i], near_2[j]) + in_both(near_2[i], near_1[j])).float())
    return torch.cat(parts) / (2 * k)


def sampled(
    precision: Callable[..., Tensor],
    of: Tensor | Views,
    a: Tensor,
    b: Tensor,
    tick: Tick | None = None,
) -> tuple[Tensor, Tensor]:
    """precision(of, a, b) of up to SAMPLE of the pairs a [U], b [U], and their places: [n], [n].

    The sample is spread evenly from the first pair to the last. precision: `by_views` or
    `by_halves`. Every rank gets rank 0's answer, and raises Interrupted where tick raised it on
    rank 0.
    """
    at = torch.linspace(0, len(a) - 1, min(SAMPLE, len(a)), device=a.device).round().long()
    share = torch.zeros(len(at), device=a.device)
    stopped = False
    if dist.is_main():
        try:
            share = precision(of, a[at], b[at], tick)
        except Interrupted:
            stopped = True
    if int(dist.all_reduce_max(torch.tensor(int(stopped), device=a.device))):
        raise Interrupted("mining was interrupted")
    return dist.broadcast(share), at


def widest(share: Tensor, at: Tensor, number: int, bound: float) -> int:
    """How many of `number` pairs, surest first, can be kept at an estimated precision of `bound`.

    It is the length of the longest list whose estimated share of right pairs is at least `bound`.
    share [n], at [n]: of `sampled`. A list is judged by at least 32 sampled pairs.
    """
    count = torch.arange(1, len(share) + 1, device=share.device)
    mean = share.double().cumsum(0) / count
    good = (mean >= bound) & (count >= min(32, len(share)))
    if not bool(good.any()):
        return 0
    last = int(good.nonzero()[-1])
    return number if last == len(share) - 1 else int(at[last]) + 1
