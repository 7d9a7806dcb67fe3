"""How much of a mined set is right, guessed without labels: do two halves of the feature's dimensions put both ends of a pair in one place?

Each half, a random choice of dimensions made once and for all, is a view of its own: what is chance in one is not in the other. Where the
neighbourhood of i in one half and that of j in the other share many images, i and j lie in one crowd by both, and such pairs are right more often.

    p_ij = sigmoid(A + B logit(0.02 + 0.96 s_ij)),  s_ij = |N1(i) & N2(j)| + |N2(i) & N1(j)|, over 2 k

A, B were fitted to labels once, on features of CIFAR-10 by one MoCo encoder and of the digits by one. On others it was right or too high (README has
by how much): the crowds of a poor encoder agree with themselves too, and no statistic of one set of features that was tried could tell. So take it as
a bound from above. It is the share of a kind of pairs that it speaks of, not a single pair; and it can know nothing of classes that the encoder confounds.

Letters: M images, C feature dimension, U undirected pairs, n images looked at, k neighbours.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moco_isl import dist
from moco_isl.errors import Interrupted
from moco_isl.mining.neighbors import topk

Tensor = torch.Tensor

A, B = 2.70, 1.20
NEIGHBOURS = 50  # k; fewer where images are few
SAMPLE = 4096  # pairs that stand for all


def halves(features: Tensor) -> tuple[Tensor, Tensor]:
    """features [M, C] -> two unit-row parts [M, C / 2] of their dimensions, the same ones whenever C is the same."""
    order = torch.randperm(features.shape[1], generator=torch.Generator().manual_seed(0)).to(features.device)
    return tuple(F.normalize(features[:, part].float(), dim=1).to(features.dtype) for part in order.tensor_split(2))


@torch.no_grad()
def pair_precision(features: Tensor, a: Tensor, b: Tensor, tick: Callable[[], None] | None = None) -> Tensor:
    """features [M, C] unit rows, pairs a [U], b [U] -> the estimated share of right ones among pairs like each, [U] float32.

    Searches the neighbours of the pairs' images alone: two searches over half the dimensions.
    """
    M = len(features)
    k = max(1, min(NEIGHBOURS, M // 8))
    images, place = torch.cat([a, b]).unique(return_inverse=True)  # [n], [2 U]
    near = [topk(half[images], half, k, images, tick=tick)[1] for half in halves(features)]  # 2 x [n, k]
    shared = torch.zeros(len(a), device=features.device)
    for i in range(0, len(a), 1 << 12):
        at_a, at_b = place[: len(a)][i : i + (1 << 12)], place[len(a) :][i : i + (1 << 12)]
        for first, second in (near, near[::-1]):
            shared[i : i + (1 << 12)] += (first[at_a][:, :, None] == second[at_b][:, None, :]).sum((1, 2))
    return torch.sigmoid(A + B * torch.logit(0.02 + 0.96 * shared / (2 * k)))


def sampled_precision(features: Tensor, a: Tensor, b: Tensor, tick: Callable[[], None] | None = None) -> tuple[Tensor, Tensor]:
    """Pairs a [U], b [U] in any order -> `pair_precision` of up to SAMPLE of them, evenly from first to last, and their places: [n], [n].

    Rank 0's answer on every rank, and so is Interrupted where tick raised it there.
    """
    at = torch.linspace(0, len(a) - 1, min(SAMPLE, len(a)), device=a.device).round().long()
    share, stopped = torch.zeros(len(at), device=features.device), False
    if dist.is_main():
        try:
            share = pair_precision(features, a[at], b[at], tick)
        except Interrupted:
            stopped = True
    if int(dist.all_reduce_max(torch.tensor(int(stopped), device=features.device))):
        raise Interrupted("mining was interrupted")
    return dist.broadcast(share), at


def widest(share: Tensor, at: Tensor, number: int, bound: float) -> int:
    """How many of `number` pairs, surest first, make the longest list of which the share of right ones is estimated to be at least `bound`.

    share [n], at [n]: of `sampled_precision`. A list is judged by at least 32 sampled pairs.
    """
    mean = share.double().cumsum(0) / torch.arange(1, len(share) + 1, device=share.device)
    good = (mean >= bound) & (torch.arange(1, len(share) + 1, device=share.device) >= min(32, len(share)))
    if not bool(good.any()):
        return 0
    last = int(good.nonzero()[-1])
    return number if last == len(share) - 1 else int(at[last]) + 1
