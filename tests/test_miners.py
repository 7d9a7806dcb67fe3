"""Rounds of mining: Eq.

2 and 3, budget, caps and old pairs by loops; equal sets on any number of ranks; scale.
"""

import json
import resource

import pytest
import torch
import torch.nn.functional as F

from moco_isl.errors import BadInput, Interrupted
from moco_isl.miners import gan
from moco_isl.miners.gan import GANMiner
from moco_isl.miners.knn import KNNMiner
from moco_isl.miners.none import NoMiner
from moco_isl.mining import edges, rounds
from moco_isl.mining.edges import Edges, Rules, settle, under_cap
from moco_isl.mining.gan import Discriminator, GANFit, Generator
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.triplets import TripletSampler, largest_set
from tests.ranks import run_ranks


def rows(M: int, C: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(M, C, generator=torch.Generator().manual_seed(seed)), dim=1)


def clusters(
    M: int, C: int = 16, groups: int = 20, spread: float = 0.3, seed: int = 0
) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, C, generator=g)
    return F.normalize(
        centres[torch.arange(M) % groups] + spread * torch.randn(M, C, generator=g), dim=1
    )


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def edge_set(sets: PositiveSets) -> set[tuple[int, int]]:
    return set(zip(sets.sources().tolist(), sets.members.tolist()))


def random_found(M: int, E: int, seed: int = 0) -> Edges:
    g = torch.Generator().manual_seed(seed)
    src, dst = torch.randint(M, (2, E), generator=g)
    return Edges(src, dst, torch.randint(20, (E,), generator=g) / 20)  # many ties


# Eq. 2 and Eq. 3


@pytest.mark.parametrize(
    "mode, radius", [("confidence", 0.6), ("confidence", 0.3), ("fixed", 0.7), ("fixed", 1.2)]
)
def test_radius_rule_equals_eq_2_by_loops(mode, radius):
    g = torch.Generator().manual_seed(0)
    score, cosine = torch.rand(40, generator=g), torch.rand(40, 10, generator=g) * 2 - 1
    joins = gan.radius_rule(score, cosine, 0.5, radius, mode)
    for i in range(40):
        for j in range(10):
            s, c = score[i].item(), cosine[i, j].item()
            if mode == "confidence":
                near = c > radius + (1 - s) * (1 - radius)
            else:
                near = (2 - 2 * c) ** 0.5 < radius
            assert bool(joins[i, j]) == (s > 0.5 and near)
    assert joins.any()


def test_radius_at_the_ends_of_the_score():
    near = torch.tensor([[0.61, 0.59]])
    assert gan.radius_rule(torch.tensor([1.0]), near, 0.0, 0.6, "confidence").tolist() == [
        [True, False]
    ]
    assert not gan.radius_rule(
        torch.tensor([1e-7]), torch.tensor([[0.999]]), 0.0, 0.6, "confidence"
    ).any()
    # s must be above
    assert not gan.radius_rule(torch.tensor([0.5]), torch.tensor([[1.0]]), 0.5, 2.0, "fixed").any()


def some_fit(C: int, seed: int = 0) -> GANFit:
    torch.manual_seed(seed)
    return GANFit(Generator(C), Discriminator(C), {}, "")


@torch.no_grad()
@pytest.mark.parametrize("published", [False, True])
def test_best_proxies_equal_a_loop_over_triplets(published):
    """As published, the positive of a triplet is the anchor's own row."""
    M, k, seed, features = 150, 4, 11, clusters(150)
    sets = PositiveSets.from_edges(M, torch.arange(60), torch.arange(60) + 20)
    fit = some_fit(16)
    settings = gan.GANSettings(own_row=published)
    anchors, score, near, cosine, to_triplet = gan.best_proxies(
        fit, features, sets, seed, k, settings
    )
    assert anchors.tolist() == list(range(M))
    sampler = TripletSampler(features, sets, M, rng(seed))
    size = rounds.block_size(M)
    for number in range(-(-M // size)):
        block = torch.arange(number * size, min((number + 1) * size, M))
        draws = rng((seed + 0x9E3779B97F4A7C15 * (number + 1)) % 2**63)
        start = int(torch.randint(M, (1,), generator=draws))
        u = torch.rand(5, len(block), generator=draws)
        for row, i in enumerate(block.tolist()):
            own = torch.tensor([i])
            best = None
            for t in range(5):
                p = own if published else sampler.draw_positives(own, u[t, row : row + 1])
                n = sampler.draw_negatives(own, (start + t * M // 5) % M)
                a, p, n = features[own], features[p], features[n]
                proxy = fit.G(a, p, n)
                s = fit.D(a, proxy, n).sigmoid().item()
                if best is None or s > best[0]:
                    best = s, proxy[0], [float(proxy[0] @ x[0]) for x in (a, p, n)]
            assert score[i].item() == pytest.approx(best[0], abs=1e-5)
            assert to_triplet[i].tolist() == pytest.approx(best[2], abs=1e-5)
            similar = (features @ best[1]).index_fill(0, own, -2).topk(k)
            assert near[i].tolist() == similar.indices.tolist()
            assert cosine[i].tolist() == pytest.approx(similar.values.tolist(), abs=1e-5)


def test_the_five_proxies_of_an_anchor_differ(monkeypatch):
    seen = []
    best_of = gan.best_of
    monkeypatch.setattr(
        gan,
        "best_of",
        lambda score, proxy, to: (seen.append(proxy), best_of(score, proxy, to))[1],
    )
    gan.best_proxies(some_fit(16), clusters(300), PositiveSets.empty(300), 1, 3)
    proxies = torch.cat(seen, 1)  # [5, M, C]
    assert proxies.shape[:2] == (5, 300)
    first, second = torch.triu_indices(5, 5, 1)
    apart = (proxies[:, None] - proxies[None]).norm(dim=3)[first, second]  # [10, M]
    assert float(apart.min()) > 1e-4


# The round: symmetric sets, budget, cap, old pairs


def loop_greedy(pairs, M, cap, bound, always=()):
    """Walk down the list, surest first, and take what has room."""
    degree, taken = [0] * M, []
    for a, b in always:
        degree[a] += 1
        degree[b] += 1
    for a, b in pairs:
        if len(taken) < bound and degree[a] < cap and degree[b] < cap:
            taken.append((a, b))
            degree[a] += 1
            degree[b] += 1
    return set(taken)


def unique_pairs(found: Edges) -> list[tuple[int, int]]:
    """Surest first, then by image; the surest of doubles."""
    best = {}
    for a, b, s in zip(found.src.tolist(), found.dst.tolist(), found.sureness.tolist()):
        if a != b:
            pair = min(a, b), max(a, b)
            best[pair] = max(best.get(pair, -9.0), s)
    return sorted(best, key=lambda pair: (-best[pair], pair))


@pytest.mark.parametrize("cap", [1, 3, 6, 100])
@pytest.mark.parametrize("budget", [None, 0.5, 1.37, 3.0, 50.0])
def test_settle_equals_a_greedy_loop(cap, budget):
    M, found = 60, random_found(60, 400)
    pairs = unique_pairs(found)
    bound = len(pairs) if budget is None else round(budget * M / 2)
    expected = loop_greedy(pairs, M, cap, bound)
    sets, counts = settle(rows(M), found, PositiveSets.empty(M), Rules(budget, cap / M))
    assert edge_set(sets) == expected | {(b, a) for a, b in expected}  # symmetric
    assert sets.in_degree().max() <= cap and bool((sets.weights == 1).all())
    assert counts == {
        "edges_found": 2 * len(pairs),
        "edges_added": sets.num_edges,
        "edges_dropped": 0,
    }


def test_the_budget_is_exact_where_enough_was_found():
    found = random_found(500, 20_000)
    for budget in (0.1, 1.0, 2.5, 7.0, 7.003):
        sets, _ = settle(rows(500), found, PositiveSets.empty(500), Rules(budget))
        assert abs(sets.num_edges - budget * 500) <= 1 and sets.num_edges == 2 * round(budget * 250)


def test_the_cap_follows_what_is_kept():
    """A hub is in the 80 surest pairs; where fewer pairs stay, it keeps fewer of them."""
    hub = torch.zeros(80).long(), torch.arange(1, 81)
    others = torch.arange(100, 300, 2), torch.arange(101, 300, 2)
    found = Edges(
        torch.cat([hub[0], others[0]]), torch.cat([hub[1], others[1]]), -torch.arange(180.0)
    )
    settle_ = lambda keep: settle(
        rows(300), found, PositiveSets.empty(300), Rules(budget=50.0), lambda a, b: keep
    )[0]
    whole, part = settle_(180), settle_(150)
    assert int(whole.in_degree().max()) == 80 and whole.num_edges == 360
    # of 300 images: 5 % of them, 15, is more than 4 times a set's size
    assert int(part.in_degree().max()) == 15 and part.num_edges == 2 * (15 + 70)


def test_members_come_surest_first():
    sets, _ = settle(rows(60), random_found(60, 400), PositiveSets.empty(60), Rules())
    for i in range(60):
        part = slice(sets.offsets[i], sets.offsets[i + 1])
        order = list(zip((-sets.sureness[part]).tolist(), sets.members[part].tolist()))
        assert order == sorted(order)


def test_under_cap_decides_long_chains():
    """0-1, 1-2, 2-3, ...: at a cap of 1 every second pair, each decided only by the one before
    it.
    """
    n = 200
    room = torch.ones(n + 1).long()
    pairs = torch.stack([torch.arange(n), torch.arange(n) + 1], dim=1)
    taken = under_cap(pairs, room)
    assert taken.tolist() == [i % 2 == 0 for i in range(n)] and room.tolist() == [0] * n + [1]


def test_pieces_of_the_list_change_nothing():
    M, found = 60, random_found(60, 400)
    pairs = unique_pairs(found)
    lower, higher = torch.tensor(sorted(pairs)).T
    sureness = -torch.tensor([float(pairs.index(pair)) for pair in sorted(pairs)])
    for budget in (None, 2.0):
        whole, pieces = (
            edges._choose(lower, higher, sureness, M, Rules(budget, 0.1), piece)
            for piece in (1 << 22, 7)
        )
        assert torch.equal(whole, pieces) and len(whole)


def test_weights_go_through_and_are_not_what_ranks():
    found = Edges(
        torch.tensor([0, 1, 2]),
        torch.tensor([1, 2, 3]),
        torch.tensor([0.9, 0.8, 0.1]),
        torch.tensor([0.2, 0.3, 1.0]),
    )
    sets, _ = settle(rows(4), found, PositiveSets.empty(4), Rules(budget=1.0, max_share=1.0))
    assert edge_set(sets) == {(0, 1), (1, 0), (1, 2), (2, 1)}
    assert sorted(sets.weights.tolist()) == pytest.approx([0.2, 0.2, 0.3, 0.3])


def line_features(angles) -> torch.Tensor:
    angles = torch.tensor(angles)
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_old_pairs_that_no_longer_qualify_leave():
    """On a circle: pairs found today are 0.1 apart; of the old ones one is 0.05 apart, one 1.5."""
    features = line_features([0.0, 0.1, 1.0, 1.1, 2.0, 2.05, 3.0, 4.5])
    old = PositiveSets.from_edges(
        8, torch.tensor([4, 6]), torch.tensor([5, 7]), sureness=torch.tensor([0.5, 0.99])
    )
    found = Edges(torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([0.7, 0.6]))
    sets, counts = settle(features, found, old, Rules(max_share=1.0))
    assert edge_set(sets) == {(0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)}
    assert counts == {"edges_found": 4, "edges_added": 4, "edges_dropped": 2}
    # nearer than all found today, so as sure as the surest of today; the budget then takes it
    # before the other
    assert sets.sureness[sets.offsets[4]] == pytest.approx(0.7)
    sets, counts = settle(features, found, old, Rules(budget=0.5, max_share=1.0))
    assert edge_set(sets) == {(0, 1), (1, 0), (4, 5), (5, 4)}
    kept, counts = settle(features, found, old, Rules(max_share=1.0, keep=True))
    assert (6, 7) in edge_set(kept) and counts["edges_dropped"] == 0


def test_keep_never_drops_and_the_budget_bounds_what_is_added():
    M = 100
    old = PositiveSets.from_edges(M, torch.arange(50), torch.arange(50) + 50)
    sets, counts = settle(
        rows(M), random_found(M, 900), old, Rules(budget=3.0, max_share=0.05, keep=True)
    )
    assert (
        edge_set(old) <= edge_set(sets) and sets.num_edges == 300 and counts["edges_dropped"] == 0
    )
    assert float(sets.sureness.max()) < 1  # staying is no sureness
    sets, counts = settle(rows(M), random_found(M, 900), old, Rules(budget=0.5, keep=True))
    assert edge_set(sets) == edge_set(old) and counts["edges_added"] == 0


def test_nothing_found_leaves_old_sets_within_the_budget():
    M = 40
    old = PositiveSets.from_edges(M, torch.arange(20), torch.arange(20) + 20)
    nothing = Edges(torch.empty(0).long(), torch.empty(0).long(), torch.empty(0))
    assert edge_set(settle(rows(M), nothing, old, Rules())[0]) == edge_set(old)
    assert settle(rows(M), nothing, old, Rules(budget=0.5))[0].num_edges == 20


# Miners


def test_knn_miner_finds_the_nearest_and_keeps_the_budget():
    M, k, features = 150, 5, clusters(150)
    near = (features @ features.T).fill_diagonal_(-2).topk(k).indices
    expected = {(i, j) for i in range(M) for j in near[i].tolist()}
    miner = KNNMiner(k=k, budget=None, max_share=1.0)
    sets = miner.mine(features, PositiveSets.empty(M), rng())
    assert edge_set(sets) == expected | {(j, i) for i, j in expected}
    assert miner.report.accepted and miner.report.mean_size == sets.mean_size
    again = miner.mine(features, sets, rng())
    assert edge_set(again) == edge_set(sets) and miner.report.edges_dropped <= 0.06 * sets.num_edges
    budgeted = KNNMiner(k=k, budget=2.0).mine(features, PositiveSets.empty(M), rng())
    assert budgeted.num_edges == 300 and edge_set(budgeted) <= edge_set(sets)
    assert float(budgeted.sureness.min()) >= float(sets.sureness.sort(descending=True).values[310])


def test_no_miner_is_the_identity():
    sets, miner = PositiveSets.empty(5), NoMiner()
    assert miner.mine(rows(5), sets, rng()) is sets and str(miner.report) == "no mining"
    miner.load_state_dict(miner.state_dict())


def gan_miner(**changes) -> GANMiner:
    return GANMiner(
        **{
            "budget": 4,
            "iters": 1500,
            "min_iters": 1500,
            "batch": 64,
            "lr": 1e-3,
            "threshold": 0.3,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def first_round():
    """(miner, sets) after a round on clusters(400)."""
    miner = gan_miner()
    return miner, miner.mine(clusters(400), PositiveSets.empty(400), rng())


def warm_miner(first_round, **changes) -> GANMiner:
    """A miner that starts from the networks of that round, and so needs only a few iterations."""
    miner = gan_miner(**{"iters": 20, "min_iters": 20, "lr": 1e-4, **changes})
    miner.load_state_dict(first_round[0].state_dict())
    return miner


def test_a_gan_round_is_accepted_precise_and_reported(first_round):
    M, (miner, sets) = 400, first_round
    labels = torch.arange(M) % 20
    report = miner.report
    figures = report.figures()
    assert report.accepted and report.why == ""
    assert report.edges == report.edges_added == sets.num_edges == 4 * M
    assert sets.precision(labels) > 0.8
    assert sum(figures["score_histogram"]) == M and len(figures["history"]["hub"]) == 41
    for name in (
        "mean_size",
        "coverage",
        "worst_in_degree",
        "loss_D",
        "loss_G",
        "cos_anchor",
        "cos_positive",
        "cos_negative",
        "hub",
        "distinct",
        "fit_seconds",
        "seconds",
        "iterations",
        "threshold",
        "peak_memory_gib",
    ):
        assert figures[name] >= 0, name
    json.dumps(figures, allow_nan=False)
    assert "4.00 positives an image" in str(report) and "\n" not in str(report)


def test_a_collapsed_round_adds_nothing_says_why_and_is_no_start(capsys):
    M = 1000
    old = PositiveSets.from_edges(M, torch.arange(10), torch.arange(10) + 20)
    miner = gan_miner(iters=200, min_iters=200, lr=1e-2)
    sets = miner.mine(clusters(M), old, rng())
    assert edge_set(sets) == edge_set(old)
    assert not miner.report.accepted and miner.report.edges_added == 0
    assert "collapsed" in miner.report.why and "more iterations" in str(miner.report)
    assert miner.state_dict() == {"networks": None}
    json.dumps(miner.report.figures(), allow_nan=False)


def test_proxies_that_collapse_only_in_the_mining_are_refused(monkeypatch, first_round):
    M, hub = 400, torch.zeros(400, 10).long()
    monkeypatch.setattr(
        gan,
        "best_proxies",
        lambda *_: [torch.arange(M), torch.ones(M), hub, torch.ones(M, 10), torch.ones(M, 3)],
    )
    miner = warm_miner(first_round)
    assert miner.mine(clusters(M), PositiveSets.empty(M), rng()).num_edges == 0
    assert "collapsed" in miner.report.why and not miner.report.accepted


def test_a_silent_round_says_why(first_round):
    features, empty = clusters(400), PositiveSets.empty(400)
    miner = warm_miner(first_round, threshold=1.0)
    miner.mine(features, empty, rng())
    assert "no proxy scored above 1" in miner.report.why and miner.report.accepted
    miner = warm_miner(first_round, threshold=0.0, radius=0.0, radius_mode="fixed")
    miner.mine(features, empty, rng())
    assert "--isl-radius" in miner.report.why


def test_the_next_round_starts_from_the_last_networks(tmp_path, first_round):
    first, sets = first_round
    torch.save(first.state_dict(), tmp_path / "miner")
    second = gan_miner(iters=1, min_iters=1)
    second.load_state_dict(torch.load(tmp_path / "miner", weights_only=True))
    second.mine(clusters(400), sets, rng(1))
    assert second.report.accepted and second.report.extra["hub"] < 0.25
    steps = [int(miner.networks["adam_G"][0]["step"]) for miner in (first, second)]
    # Adam goes on as well
    kept = first.report.extra["iteration_kept"]
    assert steps == [kept, kept + 1]
    cold = gan_miner(iters=1, min_iters=1)
    assert (
        not cold.mine(clusters(400), sets, rng(1)).num_edges > sets.num_edges
        and "collapsed" in cold.report.why
    )


def test_a_round_is_a_function_of_features_sets_state_and_seed(first_round):
    features, empty = clusters(400), PositiveSets.empty(400)
    first, again, other = (
        warm_miner(first_round).mine(features, empty, rng(seed)) for seed in (0, 0, 1)
    )
    assert edge_set(first) == edge_set(again) != edge_set(other) and first.num_edges


def test_wide_sets_of_a_gan_leave_negatives_for_its_next_round(first_round):
    anything = {"threshold": 0.0, "radius": 2.0, "radius_mode": "fixed", "candidates": 200}
    miner = warm_miner(first_round, budget=60, **anything)
    sets = miner.mine(clusters(400), PositiveSets.empty(400), rng())
    assert int(sets.sizes().max()) == largest_set(400, 5) == 400 // 5 - 3
    assert miner.mine(clusters(400), sets, rng()).mean_size > 50
    with pytest.raises(BadInput, match="no negatives"):  # at once, not in the second round
        GANMiner().mine(rows(19), PositiveSets.empty(19), rng())


def test_bad_settings_and_features_are_refused():
    with pytest.raises(BadInput, match="confidence or fixed"):
        GANMiner(radius_mode="round")
    with pytest.raises(BadInput, match="positive sets of 5 images"):
        KNNMiner(2).mine(rows(6), PositiveSets.empty(5), rng())
    with pytest.raises(BadInput, match="no negatives"):
        GANMiner().mine(rows(9), PositiveSets.empty(9), rng())


# Ranks


def mine_on_rank(rank, world, state, M):
    """Two rounds on this rank: sets and report. state: of a GAN miner, or None for kNN."""
    features, sets = clusters(M), PositiveSets.empty(M)
    miner = KNNMiner(6, budget=3) if state is None else gan_miner(iters=20, min_iters=20, lr=1e-4)
    miner.load_state_dict(state)
    for number in range(2):
        sets = miner.mine(features, sets, rng(number + 10 * rank))  # rank 0's draw counts
    figures = miner.report.figures().items()
    report = {name: x for name, x in figures if "seconds" not in name and "memory" not in name}
    return sets.state_dict(), report


@pytest.mark.parametrize("kind", ["knn", "gan"])
# 6 blocks of at most 64, the last short; and 2: two ranks idle
@pytest.mark.parametrize("M, worlds", [(331, (2, 4)), (100, (4,))])
def test_ranks_give_equal_sets(kind, M, worlds, first_round):
    state = first_round[0].state_dict() if kind == "gan" else None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks
    try:
        alone, report = mine_on_rank(0, 1, state, M)
    finally:
        torch.set_num_threads(threads)
    assert len(alone["members"]) >= M
    for world in worlds:
        for sets, said in run_ranks(world, mine_on_rank, state, M):
            assert all(torch.equal(sets[name], alone[name]) for name in alone)
            assert {k: v for k, v in said.items() if k not in _sums} == {
                k: v for k, v in report.items() if k not in _sums
            }
            assert all(said[name] == pytest.approx(report[name]) for name in _sums & report.keys())


# whose order of summing depends on the ranks
_sums = {"score", "cos_anchor", "cos_positive", "cos_negative"}


def interrupted_on_rank(rank, world, who, after):
    left = [after]

    def tick():
        left[0] -= 1
        if rank == who and left[0] < 0:
            raise Interrupted("asked to stop")

    try:
        gan_miner(iters=50, min_iters=50).mine(clusters(331), PositiveSets.empty(331), rng(), tick)
    except Interrupted:
        return "interrupted"
    return "finished"


def knn_interrupted_on_rank(rank, world, who):
    def tick():
        if rank == who:
            raise Interrupted("asked to stop")

    try:
        KNNMiner(3).mine(clusters(331), PositiveSets.empty(331), rng(), tick)
    except Interrupted:
        return "interrupted"
    return "finished"


def test_an_interrupt_in_the_fit_or_the_mining_reaches_all_ranks():
    assert run_ranks(2, interrupted_on_rank, 0, 20) == ["interrupted"] * 2  # in rank 0's fit
    assert run_ranks(2, knn_interrupted_on_rank, 1) == ["interrupted"] * 2  # in another's share


# Scale


def test_blocks_do_not_grow_with_the_data_set():
    assert [rounds.block_size(M) for M in (10, 50_000, 1_281_167)] == [64, 782, 4096]


def test_a_round_over_many_images_is_a_round(first_round):
    """30,000 images, more blocks and pieces than one: every anchor is mined, within the stated
    memory.
    """
    M = 30_000
    features = clusters(M, groups=3000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    miner = KNNMiner(5, budget=2.0)
    sets = miner.mine(features, PositiveSets.empty(M), rng())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10  # MiB
    assert sets.num_edges == 2 * M and sets.precision(torch.arange(M) % 3000) > 0.95
    assert grown < 1000  # a matrix of all cosines would take 3,400
