"""GANs that differ from ISL's (Eq. 1) in one thing each, for studies/miners.py.

The question is whether their proxies or scores are better.

Letters: N anchors of a batch, C feature dimension, S candidates of a draw.
"""

import math

import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm

from moco_isl.mining.gan import Discriminator, Generator
from moco_isl.mining.gan_training import Trainer
from moco_isl.mining.triplets import TripletSampler

Tensor = torch.Tensor


class SpectralNorm(Trainer):
    """D's layers have spectral norm 1 (Miyato et al., 2018), so that its logit is 1-Lipschitz."""

    def networks(self, C: int) -> tuple[Generator, Discriminator]:
        G, D = super().networks(C)
        for layer in (D.first, D.rest[1], D.rest[3]):
            spectral_norm(layer)
        return G, D


class GradientPenalty(Trainer):
    """D's loss has gamma / 2 times its squared gradient at real triplets added.

    R1; Mescheder et al., 2018.
    """

    gamma = 1.0

    def loss_of_D(self, a: Tensor, p: Tensor, n: Tensor, proxy: Tensor) -> Tensor:
        real = [x.detach().requires_grad_() for x in (a, p, n)]
        grads = torch.autograd.grad(self.D(*real).sum(), real, create_graph=True)
        return (
            super().loss_of_D(a, p, n, proxy)
            + self.gamma / 2 * sum((grad**2).sum(1) for grad in grads).mean()
        )


class GradedSampler(TripletSampler):
    """The negative is the most similar of the first g candidates of a draw.

    log g is uniform between log(fewest) and that of all candidates.
    """

    fewest = 16  # more than the anchor and its positives, at most five here, which are struck out

    def draw_negatives(self, anchors: Tensor, offset: Tensor | int) -> Tensor:
        candidates, scores = self.score_candidates(anchors, offset)
        u = torch.rand(anchors.shape, generator=self.generator, device=self.generator.device).to(
            scores.device
        )
        # [N], or [B, N]
        g = (self.fewest * torch.exp(u * math.log(self.pool / self.fewest))).long()
        scores.masked_fill_(self.slots >= g[..., None], -torch.inf)
        return candidates.gather(-1, scores.max(-1).indices)


class GradedNegatives(Trainer):
    """Negatives of graded hardness instead of only the hardest of 4,096."""

    sampler_kind = GradedSampler


class MatchedFalse(Trainer):
    """D also learns a third kind of false triplet: its positive is real, but of another anchor.

    Reed et al., 2016, do so with texts. The score then says whether anchor and positive match, and
    not only whether the positive looks real.
    """

    def loss_of_D(self, a: Tensor, p: Tensor, n: Tensor, proxy: Tensor) -> Tensor:
        lam = self.s.lam
        real, as_p, as_n = self.D.with_proxy(a, p, n, proxy)
        unmatched = self.D(a, p.roll(1, 0), n)
        false = (
            F.softplus(as_p).mean() + lam * F.softplus(as_n).mean() + F.softplus(unmatched).mean()
        ) / (2 + lam)
        return F.softplus(-real).mean() + false
