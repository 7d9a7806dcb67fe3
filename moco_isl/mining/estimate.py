"""How much of a mined set is right: by a few labelled images, or guessed without any.

With labels of a few hundred images (`by_check`) the pairs with two labelled ends are counted.

Without labels there is only a guess. Two images that are alike in one view of the data set have the
same neighbours in another view: the more neighbours i has in the first view of those that j has in
the second, the more often the pair i, j is right.

    s_ij = (|N1(i) & N2(j)| + |N2(i) & N1(j)|) / 2k

less what sets drawn by chance have in common. A pair counts as right where s is a fifth or more,
and in part where it is less: p_ij = min(5 s_ij, 1). There are two kinds of views:

  by_views    features of two random augmentations of every image. Crowds that augmentation does not
              break need not be classes: this can be far too high.
  by_pixels   the small image itself, without any encoder. It knows nothing that the encoder has
              learned, so it does not share the encoder's mistakes.

What the encoder and the plain pixels both say is taken for sure, where `doubt` finds no reason to
distrust both. The fifth was chosen on the digits. Where a round has no views there is only

  by_halves   two halves of the feature's dimensions: sigmoid(A + B logit(e + (1 - 2 e) s)), fitted
              to the digits and to features of CIFAR-10. Both halves of a poor encoder's features
              agree on wrong neighbours too, so this is an upper bound.

`python -m studies.estimate` measures how far off they are.

Letters: M images, C feature dimension, D pixels of a small image, U undirected pairs, n images or
pairs looked at, k neighbours.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

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


HALVES = Curve(2.70, 1.20, 0.02)
ENOUGH = 0.2  # the share of common neighbours from which a pair counts as right
NEIGHBOURS = 50  # k; fewer where images are few
SAMPLE = 4096  # pairs that stand for all
FEWEST_IMAGES = 500  # without labels nothing is sure of fewer
FARTHEST = 0.02  # nor by an encoder whose two views of an image lie farther apart, see `apart`
FEWEST_PAIRS = 50  # with two labelled ends, by which a list is judged


class Views(NamedTuple):
    """What a round sees of all images beside their features: rows of unit length.

    first, second [M, C]: features of two random augmentations of every image. pixels [M, D]: see
    `pixel_rows`; None: not known, and without labels nothing is sure then.
    """

    first: Tensor
    second: Tensor
    pixels: Tensor | None = None


@dataclass
class Estimate:
    """How much of a list of pairs is right, by n of its pairs.

    at [n]: their places in the list. share [n]: of the list up to each, the share that is right;
    most [n]: at most so much. doubt: why nothing can be told; '' where it can. labelled: how many
    labelled images were counted on, 0 for a guess.
    """

    at: Tensor
    share: Tensor
    most: Tensor
    doubt: str = ""
    labelled: int = 0


def pixel_rows(small: Tensor) -> Tensor:
    """small [M, D], all pixels of small images -> unit rows [M, D], less the mean image."""
    return F.normalize(small - small.mean(0), dim=1)


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
    """How far each of the pairs a [U], b [U] counts as right by two views: [U] float32.

    views: their first two are looked at.
    """
    return _in_common(views[:2], a, b, tick)


def by_pixels(pixels: Tensor, a: Tensor, b: Tensor, tick: Tick | None = None) -> Tensor:
    """How far each of the pairs a [U], b [U] counts as right by pixels [M, D]: [U] float32."""
    return _in_common((pixels, pixels), a, b, tick)


def running_mean(x: Tensor) -> Tensor:
    """x [n] -> the mean up to each of its values, [n] float32."""
    count = torch.arange(1, len(x) + 1, device=x.device)
    return (x.double().cumsum(0) / count).float()


def _in_common(views: tuple[Tensor, Tensor], a: Tensor, b: Tensor, tick: Tick | None) -> Tensor:
    by_chance = _neighbours(len(views[0])) / len(views[0])
    s = common_neighbours(views, a, b, tick)
    return ((s - by_chance) / (1 - by_chance) / ENOUGH).clamp(0, 1)


@torch.no_grad()
def apart(views: Views) -> float:
    """How far apart an encoder puts two views of one image, as a share of all images.

    Of at most 2,048 images: how many of all lie nearer to an image's second view than its first
    view does; the median of them. An encoder that tells images apart has nearly 0.
    """
    M = len(views[0])
    images = torch.linspace(0, M - 1, min(M, 2048), device=views[0].device).round().long()
    nearer = []
    for part in images.split(256):
        cosine = views[1][part] @ views[0].T  # [n, M]
        own = cosine.gather(1, part[:, None])
        nearer.append((cosine > own).sum(1).double() / M)
    return float(torch.cat(nearer).median())


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """How many directions features [M, C] use: exp of the entropy of their variances' shares.

    NaN where they are not finite.
    """
    if not features.isfinite().all():
        return float("nan")
    centred = features.float() - features.float().mean(0)
    variance = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).double()
    share = variance / variance.sum().clamp(min=1e-12)
    return float(torch.special.entr(share).sum().exp())


def doubt(views: Views | None, between: float | None = None) -> str:
    """Why nothing can be told without labels, whatever the guesses are; '' for no reason.

    between: `apart` of the views, where it is known already. On encoders with such views, or on so
    few images, guesses of 0.8 were right in 0.15.
    """
    if views is None:
        return "no views of the images were given"
    if getattr(views, "pixels", None) is None:
        return "the pixels of the images were not given"
    if len(views[0]) < FEWEST_IMAGES:
        return f"{len(views[0])} images are fewer than {FEWEST_IMAGES}"
    between = apart(views) if between is None else between
    if between > FARTHEST:
        return (
            f"the encoder hardly knows an image again: {100 * between:.1f} % of all images lie"
            f" between two views of one, and {100 * FARTHEST:g} % may"
        )
    return ""


def by_check(known: Tensor, a: Tensor, b: Tensor) -> Estimate:
    """Count the right ones among pairs a [U], b [U] with two labelled ends.

    known [M]: labels, below 0 where unknown. The labelled images have to be drawn by chance.
    """
    both = (known[a] >= 0) & (known[b] >= 0)
    at = both.nonzero().squeeze(1)
    share = running_mean((known[a[at]] == known[b[at]]).float())
    count = int((known >= 0).sum())
    # of U pairs among M images, U (n / M)^2 have two of n labelled ones
    enough = math.ceil(len(known) * math.sqrt(FEWEST_PAIRS / max(len(a), 1)))
    cure = "label more images"
    if enough > len(known):
        cure = "give a larger --isl-budget"
    elif enough > count:
        cure = f"label about {enough} images"
    few = (
        f"of {len(a)} pairs {len(at)} have two labelled images, and {FEWEST_PAIRS} are needed:"
        f" {cure}"
    )
    return Estimate(at, share, share, few if len(at) < FEWEST_PAIRS else "", count)


def spread_of_count(right: Tensor, a: Tensor, b: Tensor) -> float:
    """The standard deviation of the mean of right [n], 1 or 0 of pairs a [n], b [n].

    Pairs of one image are not independent: the variance of the sum is that of leaving out one image
    after the other, less the pairs that this counts twice.
    """
    off = right.double() - right.double().mean()
    images, place = torch.cat([a, b]).unique(return_inverse=True)
    of_image = torch.zeros(len(images), dtype=off.dtype, device=off.device)
    of_image.index_add_(0, place, torch.cat([off, off]))
    own = (off**2).sum()
    variance = torch.maximum((of_image**2).sum() - own, own)
    return float(variance.sqrt()) / max(len(off), 1)


def _neighbours(M: int) -> int:
    return max(1, min(NEIGHBOURS, M // 28))  # 50 of the digits' 1,437 images


@torch.no_grad()
def common_neighbours(
    views: tuple[Tensor, Tensor], a: Tensor, b: Tensor, tick: Tick | None = None
) -> Tensor:
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


def guess(
    features: Tensor,
    views: Views | None,
    a: Tensor,
    b: Tensor,
    tick: Tick | None = None,
    between: float | None = None,
) -> Estimate:
    """What can be guessed without labels of pairs a [U], b [U], by up to SAMPLE of them.

    share is the lower of what views and pixels say, most the highest of all three; without views
    only the halves of the features are there. The sample is spread evenly from the first pair to
    the last. between: see `doubt`. Every rank gets rank 0's answer, and raises Interrupted where
    tick raised it on rank 0.
    """
    at = torch.linspace(0, len(a) - 1, min(SAMPLE, len(a)), device=a.device).round().long()
    found = torch.zeros(2, len(at), device=a.device)
    stopped, why = False, ""
    if dist.is_main():
        try:
            found = _guesses(features, views, a[at], b[at], tick)
            why = doubt(views, between)
        except Interrupted:
            stopped = True
    dist.stop_mining_together(stopped, a.device)
    share, most = dist.broadcast(found.contiguous())
    return Estimate(at, share, most, dist.broadcast_object(why))


def _guesses(
    features: Tensor, views: Views | None, a: Tensor, b: Tensor, tick: Tick | None
) -> Tensor:
    """The lowest and the highest guess of pairs a [n], b [n]: [2, n]."""
    halves = running_mean(by_halves(features, a, b, tick))
    if views is None:
        return torch.stack([halves, halves])
    lowest = seen = running_mean(by_views(views, a, b, tick))
    if (pixels := getattr(views, "pixels", None)) is not None:
        lowest = torch.minimum(seen, running_mean(by_pixels(pixels, a, b, tick)))
    return torch.stack([lowest, torch.maximum(halves, seen)])


def widest(share: Tensor, at: Tensor, number: int, bound: float, least: int = 32) -> int:
    """How many of `number` pairs, surest first, can be kept at an estimated precision of `bound`.

    It is the length of the longest list whose estimated share of right pairs is at least `bound`.
    share [n], at [n]: of an `Estimate`. A list is judged by at least `least` of its n pairs.
    """
    good = share >= bound
    good[: min(least, len(share)) - 1] = False
    if not bool(good.any()):
        return 0
    last = int(good.nonzero()[-1])
    return number if last == len(share) - 1 else int(at[last]) + 1
