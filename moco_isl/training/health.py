"""Whether a run learns, told without labels: what its features and its loss look like.

Letters: n features looked at, C feature dimension, K queue length, M images, T temperature.
"""

import math
from dataclasses import dataclass

import torch

Tensor = torch.Tensor

MOST = 8192  # features that are looked at
PAIRED = 2048  # features whose pairs are looked at
FLAT = 0.01  # a direction counts as collapsed below this share of the largest spread
ALIKE = 0.99  # the mean cosine above which all features count as alike
EASY, STUCK = 0.1, 0.98  # where the loss lies in its band: below is too easy, above is chance
PATIENCE = 5  # epochs of real negatives after which a loss at chance is worth a word,
LEAST_STEPS = 100  # and the least steps


def rank_me(features: Tensor) -> float:
    """RankMe of features [n, C]: how many directions they use, 1 to C.

    It is exp of the entropy of the shares of their singular values (Garrido et al., ICML 2023).
    NaN where they are not finite.
    """
    if not features.isfinite().all():
        return math.nan
    rows = features.double()
    sigma = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0).sqrt()  # [C]
    share = sigma / sigma.sum().clamp(min=1e-12)
    return float(torch.special.entr(share).sum().exp())


def collapsed_share(features: Tensor) -> float:
    """The share of the C principal directions of features [n, C] in which they hardly differ.

    Hardly: with a spread below 1 % of that of the first direction. It is 1 where all are equal.
    """
    rows = features.double() - features.double().mean(0)
    if len(rows) < 2 or not rows.isfinite().all():
        return math.nan
    spread = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0).sqrt()  # [C]
    if spread[-1] < 1e-6 * len(rows) ** 0.5:
        return 1.0
    return float((spread < FLAT * spread[-1]).double().mean())


def uniformity(features: Tensor) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs of unit rows [n, C]; lower is more uniform.

    Wang and Isola, ICML 2020. It is 0 where all are equal and about -4 where they are spread evenly
    over a sphere of many dimensions.
    """
    n = len(features)
    if n < 2:
        return math.nan
    rows = features.float()
    squared = (2 - 2 * rows @ rows.T).clamp(min=0)  # [n, n]
    alike = (-2 * squared).exp()
    return float(((alike.sum() - alike.diagonal().sum()) / (n * (n - 1))).log())


def figures_of(features: Tensor) -> dict[str, float]:
    """RankMe, share of collapsed directions and uniformity of unit rows [n, C].

    Of many rows evenly spread ones are looked at.
    """
    rows = _spread(features, MOST)
    return {
        "rankme": rank_me(rows),
        "collapsed": collapsed_share(rows),
        "uniformity": uniformity(_spread(rows, PAIRED)),
    }


def _spread(rows: Tensor, most: int) -> Tensor:
    """About `most` evenly spread rows."""
    return rows[:: -(-len(rows) // most)] if len(rows) > most else rows


# ---- the loss


@dataclass(frozen=True)
class Band:
    """The range of InfoNCE over some negatives.

    low: of an encoder that has learned all: the two views of an image are equal, images are spread
    evenly over the sphere. high: of one that tells nothing apart, where all cosines are equal.
    """

    low: float
    high: float

    def place(self, loss: float) -> float:
        """Where a loss lies: 0 at the low end, 1 at the high one."""
        return (loss - self.low) / (self.high - self.low)


def band_of(negatives: int, copies: float, T: float, C: int) -> Band:
    """The band of InfoNCE at temperature T over `negatives` unit rows of C numbers.

    copies: how many of them are the image's own keys, on average; a queue of K keys over M images
    holds K / M. low = log(1 + c + (K - c) exp(-1 / T) g), with g = exp(1 / (2 C T^2)), the mean of
    exp(cos / T) over an evenly filled sphere; a broken c is mixed from the two whole ones.
    high = log(1 + K).
    """
    other = math.exp(-1 / T + 1 / (2 * C * T * T))
    whole = math.floor(copies)
    at = lambda c: math.log(1 + c + max(negatives - c, 0) * other)
    part = copies - whole
    low = (1 - part) * at(whole) + part * at(whole + 1)
    high = math.log(1 + negatives)
    return Band(min(low, high - 1e-6), high)


def word_of(place: float, steps: int, of_epoch: int) -> str:
    """One sentence where the loss has left what is normal; '' where it has not.

    place: see `Band.place`. steps: for how many all negatives have been real keys; of_epoch: those
    of an epoch.
    """
    if not math.isfinite(place) or steps < of_epoch:
        return ""
    if place > STUCK and steps >= max(PATIENCE * of_epoch, LEAST_STEPS):
        return (
            f"after {steps} steps the loss is no lower than that of an encoder that tells nothing"
            " apart: try --lr ten times larger and ten times smaller"
        )
    if place < EASY:
        return (
            "the loss is nearly as low as it can be, and an easy task teaches little: give"
            " --aug-plus, and --bn-splits 8 on one GPU, since batch norm may give images away"
        )
    return ""


def alike(mean_cosine: float | None, before: float) -> str:
    """One sentence where all features are alike at the end of an epoch; '' where they are not.

    mean_cosine: between features; before: at the end of the epoch before. A new encoder gives all
    images nearly the same features too, but each epoch parts them.
    """
    if mean_cosine is None or not (mean_cosine > ALIKE and 1 - mean_cosine < 1.1 * (1 - before)):
        return ""
    return (
        f"all features are alike (mean cosine {mean_cosine:.3f}): nothing is learned so; a smaller"
        " --lr may help"
    )


def words(found: dict[str, float], means: dict[str, float], C: int) -> str:
    """What `figures_of` found, in a line. means: of the parts of the loss over the epoch."""
    return (
        f"RankMe {found['rankme']:.1f} of {C}, {100 * found['collapsed']:.0f} % of directions"
        f" collapsed, alignment {means['alignment']:.2f}, uniformity {found['uniformity']:.2f}"
    )
