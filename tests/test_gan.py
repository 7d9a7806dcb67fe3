"""Triplets, Eq. 1 and training: loops, closed forms, what lambda does, a collapse that is seen."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager

from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.mining import gan_training
from moco_isl.mining.gan import (
    Discriminator,
    GANSettings,
    Generator,
    discriminator_loss,
    generator_loss,
)
from moco_isl.mining.gan_training import Trainer, fit_gan
from moco_isl.mining.gan_watch import Watch, collapse, settled
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.triplets import TripletSampler, training_search
from studies import gans


def rows(M: int, C: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(M, C, generator=torch.Generator().manual_seed(seed)), dim=1)


def clusters(
    M: int, C: int = 16, groups: int = 20, spread: float = 0.4, seed: int = 0
) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, C, generator=g)
    return F.normalize(
        centres[torch.arange(M) % groups] + spread * torch.randn(M, C, generator=g), dim=1
    )


def some_sets(M: int, E: int, seed: int = 0) -> PositiveSets:
    g = torch.Generator().manual_seed(seed)
    return PositiveSets.from_edges(M, *torch.randint(M, (2, E), generator=g))


def members(sets: PositiveSets, i: int) -> set[int]:
    return set(sets.members[sets.offsets[i] : sets.offsets[i + 1]].tolist())


@pytest.mark.parametrize("edges", [0, 300])
# True: with the fixed shapes that a CUDA graph needs
@pytest.mark.parametrize("capacity", [False, True])
def test_negatives_equal_a_loop(edges, capacity):
    M, features, sets = 200, rows(200), some_sets(200, edges)
    sampler = TripletSampler(features, sets, M, torch.Generator().manual_seed(1))
    if capacity:
        sampler.capacity = int(sets.sizes().sum())
    anchors = torch.randperm(M, generator=torch.Generator().manual_seed(2))
    for offset in (0, 77, M - 5):  # the last goes around the end of the order
        drawn = sampler.draw_negatives(anchors, offset).tolist()
        pool = [int(sampler.order[(offset + s) % M]) for s in range(sampler.pool - 1)]
        assert len(set(pool)) == sampler.pool - 1 <= M // 4
        for a, n in zip(anchors.tolist(), drawn):
            allowed = [c for c in pool if c != a and c not in members(sets, a)]
            assert n == max(allowed, key=lambda c: float(features[a] @ features[c]))


def test_windows_of_an_anchor_never_share_a_negative():
    sampler = TripletSampler(
        rows(203), PositiveSets.empty(203), 203, torch.Generator().manual_seed(1)
    )
    for start in (0, 100, 202):
        windows = [sampler.candidates(offset) for offset in sampler.spread(start)]
        assert len(windows) == 5 and len(torch.cat(windows).unique()) == 5 * sampler.pool
    negatives = torch.stack(
        [sampler.draw_negatives(torch.arange(203), offset) for offset in sampler.spread(9)]
    )
    assert all(len(set(column)) == 5 for column in negatives.T.tolist())


def test_positives_are_drawn_from_the_whole_set_or_are_the_anchor():
    M, sets = 50, some_sets(50, 40)
    sampler = TripletSampler(rows(M), sets, M, torch.Generator())
    anchors = torch.arange(M)
    drawn = [
        sampler.draw_positives(anchors, torch.full((M,), u)).tolist()
        for u in torch.linspace(0, 0.9999, 40)
    ]
    for i in range(M):
        assert {d[i] for d in drawn} == (members(sets, i) or {i})


def test_sets_that_leave_no_negative_are_refused():
    with pytest.raises(BadInput, match="no negatives"):
        TripletSampler(rows(10), PositiveSets.empty(10), 4, torch.Generator())
    full = PositiveSets.from_edges(60, torch.zeros(20).long(), torch.arange(1, 21))
    with pytest.raises(BadInput, match="up to 20 positives"):
        TripletSampler(rows(60), full, 4, torch.Generator())


def test_training_gives_an_anchor_another_draw_each_pass():
    trainer = Trainer(rows(60), PositiveSets.empty(60), GANSettings(batch=20), None, seed=3)
    pools, anchors = [], []
    for _ in range(5):
        seen = []
        for _ in range(3):
            a, p, n = (drawn.squeeze(0) for drawn in trainer.draw())
            assert torch.equal(a, p)  # the sets are empty
            seen += a.tolist()
            anchors.append(dict(zip(a.tolist(), n.tolist())))
        assert sorted(seen) == list(range(60))  # a pass has every anchor once
        pools.append(trainer.sampler.order.clone())
        trainer.shuffle()
    negatives = [{draw[i] for draw in anchors if i in draw} for i in range(60)]
    assert sum(len(n) > 1 for n in negatives) > 55
    assert all(not torch.equal(pools[0], other) for other in pools[1:])


def test_networks_have_the_layers_of_the_method():
    shapes = lambda net: [tuple(p.shape) for p in net.parameters() if p.ndim == 2]
    assert shapes(Generator(8)) == [(16, 24), (8, 16), (8, 8)]
    assert shapes(Discriminator(8)) == [(8, 24), (4, 8), (1, 4)]
    proxy = Generator(8)(rows(5), rows(5, seed=1), rows(5, seed=2))
    assert torch.allclose(proxy.norm(dim=1), torch.ones(5), atol=1e-6)


def test_shared_products_equal_three_calls():
    D, (a, p, n, x) = Discriminator(8), (rows(6, seed=s) for s in range(4))
    for found, expected in zip(D.with_proxy(a, p, n, x), (D(a, p, n), D(a, x, n), D(a, p, x))):
        assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("lam", [0.3, 1.0, 3.0])
def test_losses_equal_eq_1_written_out(lam):
    D, (a, p, n, x) = Discriminator(8), (rows(6, seed=s) for s in range(4))
    loss_D = loss_G = 0.0
    for i in range(6):
        real, as_p, as_n = (
            D(*(f[i : i + 1] for f in triplet)).sigmoid().item()
            for triplet in ((a, p, n), (a, x, n), (a, p, x))
        )
        loss_D -= (
            math.log(real) + math.log(1 - as_p) / (1 + lam) + lam / (1 + lam) * math.log(1 - as_n)
        ) / 6
        loss_G -= (math.log(as_p) / (1 + lam) + lam / (1 + lam) * math.log(as_n)) / 6
    assert discriminator_loss(D, a, p, n, x, lam).item() == pytest.approx(loss_D, abs=1e-5)
    assert generator_loss(D, a, p, n, x, lam).item() == pytest.approx(loss_G, abs=1e-5)


def test_an_undecided_discriminator_has_closed_losses():
    D = Discriminator(4)
    for param in D.parameters():
        torch.nn.init.zeros_(param)
    a = rows(3, 4)
    assert discriminator_loss(D, a, a, a, a, 2.0).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(D, a, a, a, a, 2.0).item() == pytest.approx(math.log(2))


def test_a_step_updates_both_networks_and_each_by_its_own_loss():
    trainer = Trainer(rows(60), PositiveSets.empty(60), GANSettings(batch=20), None, seed=3)
    before = trainer.state()
    trainer.adam_D.param_groups[0]["lr"] = 0.0  # D stands still, though G's step passes through it
    trainer.step()
    after = trainer.state()
    assert all(torch.equal(x, after["D"][name]) for name, x in before["D"].items())
    assert any(not torch.equal(x, after["G"][name]) for name, x in before["G"].items())
    losses = trainer.read_losses(1)
    assert (
        0 < losses["loss_G"] < 5 and 0 < losses["loss_D"] < 5 and trainer.losses.tolist() == [0, 0]
    )


def test_a_larger_lambda_pulls_proxies_to_negatives_and_off_positives():
    """Before a judge that finds a place in a triplet the more real the closer it is to what stands
    there in truth.
    """
    a, p, n = (rows(50, seed=s) for s in range(3))

    class Judge:
        def with_proxy(self, a, p, n, x):
            return None, 4 * (x * p).sum(1), 4 * (x * n).sum(1)

    cosines = []
    for lam in (0.25, 1.0, 4.0):
        x = a.clone().requires_grad_()
        for _ in range(100):
            (grad,) = torch.autograd.grad(
                generator_loss(Judge(), a, p, n, F.normalize(x, dim=1), lam), x
            )
            x = (x - 20 * grad).detach().requires_grad_()
        x = F.normalize(x, dim=1)
        cosines.append((float((x * p).sum(1).mean()), float((x * n).sum(1).mean())))
    (p_small, n_small), (p_one, n_one), (p_large, n_large) = cosines
    assert p_small > p_one + 0.1 > p_large + 0.2 and n_small < n_one - 0.1 < n_large - 0.2


@pytest.mark.long
def test_a_larger_lambda_does_so_in_the_game_too():
    margin = {0.1: 0.0, 10.0: 0.0}
    for lam in margin:
        settings = GANSettings(iters=600, min_iters=600, batch=64, lam=lam, lr=3e-4)
        for seed in (0, 2):
            report = fit_gan(rows(400, 16), PositiveSets.empty(400), settings, seed).report
            margin[lam] += (report["cos_positive"] - report["cos_negative"]) / 2
    # seen of five seeds: -0.002 to -0.03; at a larger lr either sign
    assert margin[10.0] < margin[0.1] - 0.01


def test_fit_is_repeatable_warm_starts_and_asks_tick():
    features = clusters(300)
    sets = some_sets(300, 200)
    settings = GANSettings(iters=40, min_iters=40, batch=32)
    first, again = (fit_gan(features, sets, settings, seed=5) for _ in range(2))
    assert all(
        torch.equal(x, y)
        for x, y in zip(first.G.state_dict().values(), again.G.state_dict().values())
    )
    state = {"G": first.G.state_dict(), "D": first.D.state_dict()}
    start = Trainer(features, sets, settings, state, seed=6).state()
    assert all(torch.equal(x, state["D"][name]) for name, x in start["D"].items())
    left = [30]

    def tick():
        left[0] -= 1
        if not left[0]:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        fit_gan(features, sets, settings, seed=5, tick=tick)
    assert left[0] == 0


def test_fit_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with torch.no_grad():  # and trains where gradients are off
        fit_gan(
            clusters(300), some_sets(300, 0), GANSettings(iters=3, min_iters=3, batch=32), seed=5
        )
    assert torch.equal(torch.rand(3), expected)


def looks(hubs, **wobble):
    base = {
        "loss_D": 1.38,
        "loss_G": 0.7,
        "score": 0.5,
        "cos_anchor": 0.9,
        "cos_positive": 0.9,
        "cos_negative": 0.8,
    }
    return [
        {**base, **{k: base[k] + v * i for k, v in wobble.items()}, "hub": hub}
        for i, hub in enumerate(hubs)
    ]


def test_settled_needs_still_figures_and_a_hub_that_stopped_falling():
    assert settled(looks([0.02] * 6))
    assert not settled(looks([0.02] * 5))  # too few looks
    assert not settled(looks([0.02] * 5 + [0.01]))
    for name in ("loss_D", "loss_G", "score", "cos_anchor", "cos_positive", "cos_negative"):
        assert not settled(looks([0.02] * 6, **{name: 0.02})), name


def run_scripted(monkeypatch, hubs, settings):
    """fit_gan with the looks' hubs scripted: [M = 300, batch 32]."""
    script = iter(looks(hubs))
    monkeypatch.setattr(Watch, "look", lambda self: {**next(script), "distinct": 0.9})
    monkeypatch.setattr(Trainer, "read_losses", lambda self, n: {"loss_D": 1.38, "loss_G": 0.7})
    return fit_gan(clusters(300), some_sets(300, 0), settings, seed=0).report


def test_the_kept_weights_have_the_smallest_hub_after_the_minimum(monkeypatch):
    monkeypatch.setattr(gan_training, "settled", lambda history: False)
    settings = GANSettings(iters=10, min_iters=4, batch=32)  # a look an iteration
    report = run_scripted(
        monkeypatch, [0.01, 0.9, 0.8, 0.7, 0.3, 0.2, 0.4, 0.2, 0.5, 0.3], settings
    )
    assert (report["iteration_kept"], report["hub"], report["iterations"]) == (8, 0.2, 10)
    assert report["history"]["iteration"] == list(range(1, 11))


def test_a_settled_fit_stops_before_the_cap_but_not_before_the_minimum(monkeypatch):
    settings = GANSettings(iters=40, min_iters=9, batch=32)
    assert run_scripted(monkeypatch, [0.02] * 40, settings)["iterations"] == 9
    assert (
        run_scripted(monkeypatch, [0.05 - 0.001 * i for i in range(20)] + [0.03] * 20, settings)[
            "iterations"
        ]
        == 26
    )
    # still, but collapsed
    assert run_scripted(monkeypatch, [0.9] * 40, settings)["iterations"] == 40


def test_spans_follow_the_number_of_images():
    assert GANSettings().span(50_000) == (5031, 20125) and GANSettings().span(1437)[1] == 3412
    assert GANSettings(iters=7).span(50_000) == (1, 7) and GANSettings(
        iters=100, min_iters=500
    ).span(9) == (100, 100)


def test_collapse_is_judged_beside_the_features_own_hub():
    settings = GANSettings()
    assert collapse(0.04, 0.5, 0.0, settings) == "" and "6.0 %" in collapse(
        0.06, 0.5, 0.0, settings
    )
    assert collapse(0.2, 0.5, 0.05, settings) == ""  # few images: hubs are that large without a GAN
    assert "more iterations" in collapse(0.9, 0.5, 0.5, settings)
    assert "5.0 % of their nearest images differ" in collapse(0.01, 0.05, 0.0, settings)


def test_a_short_hasty_fit_is_caught_as_collapsed():
    fit = fit_gan(
        clusters(1000), some_sets(1000, 0), GANSettings(iters=200, min_iters=200, lr=1e-2), seed=0
    )
    assert "collapsed" in fit.why and fit.report["hub"] > 0.25


def test_losses_that_are_not_finite_end_the_fit():
    features = clusters(300)
    features[5] = torch.nan
    with pytest.raises(RunFailed, match="not finite"):
        fit_gan(features, some_sets(300, 0), GANSettings(iters=20, min_iters=20, batch=300), seed=0)


def test_training_search_is_near_enough():
    """Where bfloat16 is used, the negative it finds is as hard to within 0.01 of cosine."""
    features = clusters(2000, 32)
    search = training_search(features)
    exact, fast = (
        TripletSampler(
            features, PositiveSets.empty(2000), 500, torch.Generator().manual_seed(1), search=s
        ).draw_negatives(torch.arange(500), 3)
        for s in (None, search)
    )
    hardness = lambda n: (features[:500] * features[n]).sum(1)
    assert float((hardness(exact) - hardness(fast)).max()) < 0.01


# ------------------------------------------------------ several iterations at once, compiled losses


def drawn(trainer, lengths: list[int]) -> torch.Tensor:
    """Triplets of images [3, iterations, N] of draws of so many iterations each."""
    return torch.cat([torch.stack(trainer.draw(length)) for length in lengths], 1)


@pytest.mark.parametrize("edges", [0, 300])
def test_draws_of_several_iterations_are_those_of_one_after_the_other(edges, monkeypatch):
    trainers = [
        Trainer(rows(200), some_sets(200, edges), GANSettings(batch=20), None, seed=3)
        for _ in range(2)
    ]
    for trainer in trainers:
        trainer.lane = torch.arange(10)
        trainer.sampler.capacity = (
            int(trainer.sampler.positives.sizes().sum()) if trainer is trainers[1] else None
        )
    one, several = drawn(trainers[0], [1] * 10), drawn(trainers[1], [4, 6])
    assert torch.equal(one, several) and one.shape == (3, 10, 20)
    assert sorted(one[0].flatten().tolist()) == list(range(200))  # a pass
    for trainer in trainers:
        trainer.shuffle()
    assert torch.equal(drawn(trainers[0], [1] * 10), drawn(trainers[1], [10]))


def test_several_iterations_train_as_one_after_the_other():
    trainers = [
        Trainer(clusters(300), some_sets(300, 200), GANSettings(batch=32), None, seed=5)
        for _ in range(2)
    ]
    for trainer in trainers:
        trainer.lane = torch.arange(4)
    for _ in range(8):
        trainers[0].step()
    trainers[1].step(4), trainers[1].step(4)
    for x, y in zip(trainers[0].G.state_dict().values(), trainers[1].G.state_dict().values()):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(trainers[0].losses, trainers[1].losses)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile with a backend that needs no compiler of C++ or CUDA; yields the graphs that it
    was asked for.
    """
    compiler, seen = torch.compile, []

    def trace(graph, inputs):
        seen.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(
        torch, "compile", lambda fn, **options: compiler(fn, backend=trace, **options)
    )
    gan_training._compiled.cache_clear()
    torch._dynamo.reset()
    yield seen
    gan_training._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "kind",
    [Trainer, gans.SpectralNorm, gans.GradientPenalty, gans.GradedNegatives, gans.MatchedFalse],
)
def test_compiled_losses_train_as_plain_ones(kind, traced, recwarn):
    features, sets = clusters(200), some_sets(200, 100)
    fits = []
    start = None  # of the plain one
    for compiled in (False, True):
        trainer = kind(features, sets, GANSettings(batch=50, compile=compiled), None, seed=0)
        if compiled:
            trainer.D.load_state_dict(start)  # spectral norms go on whenever they are computed
        else:
            start = trainer.state()["D"]
        for _ in range(6):
            trainer.step()
        fits.append(trainer.state())
    assert traced and not [w for w in recwarn if "not compiled" in str(w.message)]
    for net in ("G", "D"):
        for name, x in fits[0][net].items():
            torch.testing.assert_close(fits[1][net][name], x, atol=1e-5, rtol=1e-4)


def test_a_later_fit_finds_the_networks_compiled(traced):
    fit = lambda seed: fit_gan(
        clusters(200), some_sets(200, 0), GANSettings(6, 6, batch=50, compile=True), seed
    )
    fit(0)
    graphs = len(traced)
    fit(1)
    assert graphs == 3 and len(traced) == (3 if torch.__version__ >= "2.5" else 6)


def test_a_fit_goes_on_where_nothing_compiles(monkeypatch):
    def compile(fn, **options):
        def run(*args):
            raise RuntimeError("no compiler here\nand more")

        return run

    features, sets = clusters(200), some_sets(200, 100)
    plain = fit_gan(features, sets, GANSettings(6, 6, batch=50), 0)
    monkeypatch.setattr(torch, "compile", compile)
    gan_training._compiled.cache_clear()
    with pytest.warns(
        UserWarning, match="not compiled, plain ones used instead: RuntimeError: no compiler here$"
    ):
        fit = fit_gan(features, sets, GANSettings(6, 6, batch=50, compile=True), 0)
    gan_training._compiled.cache_clear()
    assert all(
        torch.equal(x, y)
        for x, y in zip(fit.G.state_dict().values(), plain.G.state_dict().values())
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_iteration_trains_and_draws_anew():
    features = clusters(3000).cuda()
    sets = some_sets(3000, 2000).to("cuda")
    trainer = Trainer(features, sets, GANSettings(batch=100), None, seed=0)
    for _ in range(3):
        trainer.run()
    trainer.read_losses(1)
    seen, weights = [], trainer.state()
    for _ in range(20):
        trainer.run()
        seen.append(int(trainer.cursor))
    assert seen == list(range(4, 24)) and set(trainer.graphs) == {1}
    losses = trainer.read_losses(20)
    assert 0.1 < losses["loss_D"] < 5 and 0.1 < losses["loss_G"] < 5
    after = trainer.state()
    assert all(
        not torch.equal(x, after[net][name])
        for net in ("G", "D")
        for name, x in weights[net].items()
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_fit_on_a_gpu_spreads_as_on_the_cpu():
    settings = GANSettings(iters=1500, min_iters=1500, batch=64, lr=1e-3)
    fits = [
        fit_gan(clusters(400).to(device), PositiveSets.empty(400, device), settings, seed=0)
        for device in ("cpu", "cuda")
    ]
    assert not fits[0].why and not fits[1].why
    assert abs(fits[0].report["cos_anchor"] - fits[1].report["cos_anchor"]) < 0.1
