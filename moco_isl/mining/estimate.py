"""How much of a mined set is right, guessed without labels: do two views of the images put both
ends of a pair in one place?

Where the neighbourhood of i by one view and that of j by the other share many images, i and j lie
in one crowd by both, and such pairs are right more often; what is chance in one view is not in the
other.

    p_ij = sigmoid(A + B logit(e + (1 - 2 e) s_ij)),  s_ij = |N1(i) & N2(j)| + |N2(i) & N1(j)|, over
    2 k

Two kinds of views, each with its A, B and e:
  by_views    features of two random augmentations of every image; s less what sets drawn by chance
              have in common. An encoder that is not done yet scatters the views of an image, and
              then this is too low. by_halves   two halves of the feature's dimensions, a random
              choice made once and for all: needs no more than the features, but the crowds of a
              poor encoder agree with themselves too, and no statistic of one set of features that
              was tried could tell. So it is a bound from above.
A and B were fitted to labels once: of the views on the digits by one MoCo encoder, of the halves on
them and on features of CIFAR-10 by another. README says how far off both were elsewhere. They speak
of a kind of pairs, not of a single one, and can know nothing of classes that the encoder confounds.

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
    """From the share s of common neighbours to the share of right pairs."""

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
    """features [M, C] -> two unit-row parts [M, C / 2] of their dimensions, the same ones whenever
    C is the same.
    """
    order = torch.randperm(features.shape[1], generator=torch.Generator().manual_seed(0)).to(
        features.device
    )
    return tuple(
        F.normalize(features[:, part].float(), dim=1).to(features.dtype)
        for part in order.tensor_split(2)
    )


def by_halves(features: Tensor, a: Tensor, b: Tensor, tick: Tick | None = None) -> Tensor:
    """features [M, C] unit rows, pairs a [U], b [U] -> the share of right ones among pairs like
    each, at most, [U] float32.
    """
    return HALVES(common_neighbours(halves(features), a, b, tick))


def by_views(views: Views, a: Tensor, b: Tensor, tick: Tick | None = None) -> Tensor:
    """views 2 x [M, C] unit rows, of two random augmentations of every image, pairs a [U], b [U] ->
    the share of right ones among pairs like each, [U] float32.
    """
    by_chance = _neighbours(len(views[0])) / len(views[0])
    return VIEWS(
        ((common_neighbours(views, a, b, tick) - by_chance) / (1 - by_chance)).clamp(min=0)
    )


def _neighbours(M: int) -> int:
    return max(1, min(NEIGHBOURS, M // 8))


@torch.no_grad()
def common_neighbours(views: Views, a: Tensor, b: Tensor, tick: Tick | None = None) -> Tensor:
    """Two views [M, ...] unit rows, pairs a [U], b [U] -> s [U] float32: the share of the k nearest
    of one end by one view that are among those of the other end by the other. Searches the
    neighbours of the pairs' images alone.
    """
    k = _neighbours(len(views[0]))
    images, place = torch.cat([a, b]).unique(return_inverse=True)  # [n], [2 U]
    near = [topk(view[images], view, k, images, tick=tick)[1] for view in views]  # 2 x [n, k]
    shared = torch.zeros(len(a), device=a.device)
    for i in range(0, len(a), 1 << 12):
        at_a = place[: len(a)][i : i + (1 << 12)]
        at_b = place[len(a) :][i : i + (1 << 12)]
        for first, second in (near, near[::-1]):
            shared[i : i + (1 << 12)] += (first[at_a][:, :, None] == second[at_b][:, None, :]).sum(
                (1, 2)
            )
    return shared / (2 * k)


def sampled(
    precision: Callable[..., Tensor],
    of: Tensor | Views,
    a: Tensor,
    b: Tensor,
    tick: Tick | None = None,
) -> tuple[Tensor, Tensor]:
    """Pairs a [U], b [U] in any order -> precision(of, a, b), `by_views` or `by_halves`, of up to
    SAMPLE of them, evenly from first to last, and their
    places: [n], [n].

    Rank 0's answer on every rank, and so is Interrupted where tick raised it there.
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
    """How many of `number` pairs, surest first, make the longest list of which the share of right
    ones is estimated to be at least `bound`.

    share [n], at [n]: of `sampled`. A list is judged by at least 32 sampled pairs.
    """
    mean = share.double().cumsum(0) / torch.arange(1, len(share) + 1, device=share.device)
    good = (mean >= bound) & (
        torch.arange(1, len(share) + 1, device=share.device) >= min(32, len(share))
    )
    if not bool(good.any()):
        return 0
    last = int(good.nonzero()[-1])
    return number if last == len(share) - 1 else int(at[last]) + 1
