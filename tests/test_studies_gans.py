"""The GANs of studies/gans.py: each is the one change that it says, and trains."""

import math

import pytest
import torch
import torch.nn.functional as F

from moco_isl.mining.gan import GANSettings, discriminator_loss
from moco_isl.mining.gan_training import Trainer, fit_gan
from moco_isl.mining.positives import PositiveSets
from studies import gans
from tests.test_miners import clusters


def trainer(kind, M: int = 200):
    return kind(clusters(M), PositiveSets.empty(M), GANSettings(batch=50), None, seed=0)


def batch(C: int = 16):
    g = torch.Generator().manual_seed(1)
    return [F.normalize(torch.randn(20, C, generator=g), dim=1) for _ in range(4)]


@pytest.mark.parametrize(
    "kind", [gans.SpectralNorm, gans.GradientPenalty, gans.GradedNegatives, gans.MatchedFalse]
)
def test_each_trains_both_networks_and_is_repeatable(kind):
    features, sets = clusters(200), PositiveSets.empty(200)
    plain, one, two = (
        fit_gan(features, sets, GANSettings(30, batch=50), 3, kind=k) for k in (Trainer, kind, kind)
    )
    a, p, n, _ = batch()
    assert torch.equal(one.G(a, p, n), two.G(a, p, n)) and not torch.allclose(
        one.G(a, p, n), plain.G(a, p, n)
    )
    assert all(math.isfinite(one.report[name]) for name in ("loss_D", "loss_G"))


def test_spectral_norms_become_one():
    t = trainer(gans.SpectralNorm)
    for _ in range(60):  # a power iteration each
        t.step()
    for layer in (t.D.first, t.D.rest[1], t.D.rest[3]):
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(
            1, abs=0.02
        )


def test_the_penalty_is_half_gamma_times_the_squared_gradient_at_real_triplets():
    t, (a, p, n, proxy) = trainer(gans.GradientPenalty), batch()
    added = t.loss_of_D(a, p, n, proxy) - discriminator_loss(t.D, a, p, n, proxy, t.s.lam)
    squares = []
    for i in range(len(a)):
        x = torch.cat([a[i], p[i], n[i]]).requires_grad_()
        t.D(*(part[None] for part in x.chunk(3))).sum().backward()
        squares.append(float((x.grad**2).sum()))
    assert float(added.detach()) == pytest.approx(
        t.gamma / 2 * sum(squares) / len(squares), rel=1e-4
    )
    assert any(
        grad.abs().sum() > 0
        for grad in torch.autograd.grad(added, list(t.D.parameters()), allow_unused=True)
        if grad is not None
    )


def test_graded_negatives_are_the_hardest_of_the_first_g_candidates():
    t = trainer(gans.GradedNegatives, M=400)
    anchors, pool = torch.arange(200), t.sampler.pool
    state = t.generator.get_state()
    drawn = t.sampler.draw_negatives(anchors, 7)
    u = torch.rand(200, generator=torch.Generator().set_state(state))
    g = (16 * (pool / 16) ** u).long()
    candidates, scores = t.sampler.score_candidates(anchors, 7)
    for i in range(0, 200, 9):
        assert drawn[i] == candidates[scores[i, : g[i]].argmax()]
    hardest = candidates[scores.argmax(1)]
    assert 0 < int((drawn == hardest).sum()) < 150 and not bool((drawn == anchors).any())


def test_an_undecided_discriminator_pays_three_false_triplets_as_one():
    t, (a, p, n, proxy) = trainer(gans.MatchedFalse), batch()
    with torch.no_grad():
        t.D.rest[3].weight.zero_(), t.D.rest[3].bias.zero_()
    assert float(t.loss_of_D(a, p, n, proxy)) == pytest.approx(2 * math.log(2))
    t.D.rest[3].bias.data.fill_(1.0)  # all triplets alike: real ones too
    assert float(t.loss_of_D(a, p, n, proxy)) == pytest.approx(
        math.log1p(math.exp(-1)) + math.log1p(math.exp(1)), rel=1e-5
    )


@pytest.mark.long
def test_a_score_trained_on_unmatched_triplets_tells_matches_from_strangers_better():
    features = clusters(300, groups=6, spread=0.3)
    # of the same group
    sets = PositiveSets.from_edges(300, torch.arange(300), (torch.arange(300) + 6) % 300)
    n = features[torch.randperm(300, generator=torch.Generator().manual_seed(2))]
    settings = GANSettings(1000, 1000, batch=100, lr=1e-3)
    told = {}
    for kind in (Trainer, gans.MatchedFalse):
        fit = fit_gan(features, sets, settings, 1, kind=kind)
        with torch.no_grad():
            same = fit.D(features, features.roll(-12, 0), n)
            other = fit.D(features, features.roll(-3, 0), n)
        told[kind] = float((same > other).float().mean())
    # seen of seeds 1 to 3: 0.83, 0.87, 0.96 beside 0.53, 0.51, 0.55
    assert told[gans.MatchedFalse] > told[Trainer] + 0.15 and told[gans.MatchedFalse] > 0.7
