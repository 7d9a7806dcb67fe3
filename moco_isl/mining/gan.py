"""The GAN of ISL: generator G, discriminator D and their losses (Eq. 1).

Letters: M images, N batch of anchors, C feature dimension; a triplet (a, p, n) holds the features
of anchors, of one of their positives each, and of a negative each.
gan_training.py trains both networks, gan_watch.py notices a collapse.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from moco_isl.schema import Tensor as TensorOf
from moco_isl.schema import like

Tensor = torch.Tensor


class Generator(nn.Module):
    """Triplet of features (a, p, n), each [N, C] -> proxy [N, C], unit rows. Layers 3C-2C-C-C."""

    def __init__(self, C: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 * C, 2 * C),
            nn.LeakyReLU(0.2),
            nn.Linear(2 * C, C),
            nn.LeakyReLU(0.2),
            nn.Linear(C, C),
        )

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return F.normalize(self.layers(torch.cat([a, p, n], 1)), dim=1)


class Discriminator(nn.Module):
    """Triplet (a, p, n), each [N, C] -> logit [N] that it is a real one. Layers 3C-C-C/2-1.

    The sigmoid of the logit is the score.
    """

    def __init__(self, C: int):
        super().__init__()
        self.first = nn.Linear(3 * C, C)
        self.rest = nn.Sequential(
            nn.LeakyReLU(0.2), nn.Linear(C, C // 2), nn.LeakyReLU(0.2), nn.Linear(C // 2, 1)
        )

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return self.rest(self.first(torch.cat([a, p, n], 1))).squeeze(1)

    def with_proxy(self, a: Tensor, p: Tensor, n: Tensor, proxy: Tensor) -> tuple[Tensor, ...]:
        """Logits [N] of (a, p, n), of (a, proxy, n) and of (a, p, proxy), computed together."""
        if a.device.type == "cuda":  # one large call: launching kernels costs more than arithmetic
            stacked = torch.cat([a, a, a]), torch.cat([p, proxy, p]), torch.cat([n, n, proxy])
            return self(*stacked).chunk(3)
        # On a CPU the products of the first layer that the triplets share are computed once.
        W_a, W_p, W_n = self.first.weight.chunk(3, dim=1)  # each [C, C]
        from_a = F.linear(a, W_a, self.first.bias)
        from_n = F.linear(n, W_n)
        a_p = from_a + F.linear(p, W_p)
        real = a_p + from_n
        as_positive = (from_a + from_n) + F.linear(proxy, W_p)
        as_negative = a_p + F.linear(proxy, W_n)
        return self.rest(torch.cat([real, as_positive, as_negative])).squeeze(1).chunk(3)


def discriminator_loss(
    D: Discriminator, a: Tensor, p: Tensor, n: Tensor, proxy: Tensor, lam: float
) -> Tensor:
    """Eq. 1 as D minimises it: real triplets to 1, both kinds of false ones to 0. Scalar."""
    real, as_positive, as_negative = D.with_proxy(a, p, n, proxy)
    false = (F.softplus(as_positive) + lam * F.softplus(as_negative)) / (1 + lam)  # [N]
    return (F.softplus(-real) + false).mean()


def generator_loss(
    D: Discriminator, a: Tensor, p: Tensor, n: Tensor, proxy: Tensor, lam: float
) -> Tensor:
    """Eq. 1 as G minimises it, not saturating: both kinds of false triplets to 1. Scalar."""
    _, as_positive, as_negative = D.with_proxy(a, p, n, proxy)
    return (F.softplus(-as_positive) + lam * F.softplus(-as_negative)).mean() / (1 + lam)


@dataclass
class GANSettings:
    """How a GAN is trained, and when its proxies count as collapsed."""

    iters: int | None = None  # at most; None: 90 sqrt(M), 3,400 at 1,437 images, 20,000 at 50,000
    min_iters: int | None = None  # at least; None: a quarter of iters
    batch: int = 256  # N
    lam: float = 1.0  # lambda of Eq. 1
    lr: float = 1e-4  # of Adam, for both networks
    triplets: int = 5  # of an anchor
    own_row: bool = False  # the positive of a triplet is the anchor, not a member of its set
    # Collapsed: one image is near more than this share of the proxies, and near more than this many
    # times the share that the most popular image has among the features themselves.
    max_hub: float = 0.05
    times_natural: float = 5.0
    min_distinct: float = 0.1  # collapsed: fewer distinct nearest images than this share of proxies
    compile: bool | None = None  # None: on a GPU, where iters is COMPILE_FROM or more

    def span(self, M: int) -> tuple[int, int]:
        """The least and the most iterations for M images."""
        most = round(90 * math.sqrt(M)) if self.iters is None else self.iters
        least = max(1, most // 4) if self.min_iters is None else min(self.min_iters, most)
        return least, most


@dataclass
class GANFit:
    """A trained GAN.

    report: figures of the weights that were kept, and `history`, a list a figure, one entry a look.
    why: not empty where the GAN collapsed. optimizers: the state of Adam at those weights,
    {"adam_G", "adam_D"}; empty on ranks that did not train.
    """

    G: Generator
    D: Discriminator
    report: dict
    why: str = ""
    optimizers: dict = field(default_factory=dict)


def networks_shape(C: int) -> dict:
    """The shape (see `schema`) of a `Trainer.state` for features of C numbers; Adam may miss."""
    with torch.device("meta"):
        G, D = Generator(C), Discriminator(C)

    def moments(network: nn.Module) -> dict:
        shapes = [tuple(p.shape) for p in network.parameters()]
        step = TensorOf("float", (), low=0)
        of = lambda shape: {
            "step": step,
            "exp_avg": TensorOf("float", shape),
            "exp_avg_sq": TensorOf("float", shape, low=0),
        }
        return {number: of(shape) for number, shape in enumerate(shapes)}

    weights = {"G": like(G.state_dict()), "D": like(D.state_dict())}
    return {**weights, "adam_G?": moments(G), "adam_D?": moments(D)}
