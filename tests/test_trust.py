"""Precision guessed without labels, the widest set that it bears, and the miner of neighbourhood
means: against loops, on ranks, in a run.
"""

import json
import math
import re
import statistics
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from moco_isl.errors import BadInput, Interrupted
from moco_isl.miners.average import AverageMiner, neighbourhood_means
from moco_isl.miners.knn import KNNMiner
from moco_isl.miners.none import NoMiner
from moco_isl.mining import estimate
from moco_isl.mining.estimate import by_halves, by_views, halves, sampled, widest
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import AUTO, bound_of
from tests.ranks import run_ranks
from tests.runs import DIGITS
from tests.test_bad_input import ask
from tests.test_miners import clusters, rows


def mine(miner, features, seed=0, views=None):
    return miner.mine(
        features,
        PositiveSets.empty(len(features)),
        torch.Generator().manual_seed(seed),
        views=views,
    )


def nearest(x, i, k):
    return sorted((j for j in range(len(x)) if j != i), key=lambda j: -float(x[i] @ x[j]))[:k]


# ---- neighbourhood means -------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 3.0])
def test_neighbourhood_means_equal_loops(power):
    x = rows(70)
    found = neighbourhood_means(x, 6, power)
    for i in range(70):
        weight = {j: max(float(x[i] @ x[j]), 0) ** power for j in nearest(x, i, 6)}
        assert torch.allclose(
            found[i], F.normalize(x[i] + sum(w * x[j] for j, w in weight.items()), dim=0), atol=1e-5
        )


def test_average_miner_takes_the_pairs_whose_means_are_most_similar():
    x = rows(70, seed=3)
    means = neighbourhood_means(x, 8, 3.0)
    sets = mine(AverageMiner(k=8, candidates=69, budget=2.0, max_share=1.0), x)
    best = sorted((-float(means[i] @ means[j]), i, j) for i in range(70) for j in range(i))[:70]
    assert {frozenset(pair) for pair in zip(sets.sources().tolist(), sets.members.tolist())} == {
        frozenset(pair[1:]) for pair in best
    }


def test_average_miner_takes_features_and_views_together():
    x, views = rows(70, seed=3), (rows(70, seed=4), rows(70, seed=5))
    together = F.normalize(torch.stack([sum(parts) for parts in zip(x, *views)]), dim=1)
    miner, plain = (AverageMiner(k=8, candidates=20, budget=2.0) for _ in range(2))
    found, wanted = mine(miner, x, views=views), mine(plain, together)
    assert (
        found.num_edges == 140
        and torch.equal(found.offsets, wanted.offsets)
        and torch.equal(found.members, wanted.members)
    )
    assert miner.views is None and not torch.equal(found.members, mine(plain, x).members)


def test_means_find_more_right_pairs_than_cosines_where_features_are_noisy():
    x, labels = clusters(600, C=32, groups=6, spread=2.0), torch.arange(600) % 6
    by_means, by_cosine = (
        mine(miner, x).precision(labels)
        for miner in (AverageMiner(k=30, budget=5.0), KNNMiner(k=20, budget=5.0))
    )
    assert by_means > by_cosine + 0.05


def _on_ranks(rank, world, trust, views=False):
    miner = AverageMiner(k=10, budget=6.0, trust=trust)
    sets = mine(
        miner,
        clusters(600, spread=0.8),
        views=[clusters(600, spread=0.8, seed=seed) for seed in (1, 2)] if views else None,
    )
    return sets.state_dict(), [miner.report.precision_estimate, miner.report.precision_at_most]


@pytest.mark.parametrize("trust, views", [(None, False), (0.9, False), (0.9, True)])
def test_ranks_find_and_estimate_what_one_does(trust, views):
    alone, share = _on_ranks(0, 1, trust, views)
    for sets, other in run_ranks(2, _on_ranks, trust, views):
        assert (
            all(torch.equal(sets[key], alone[key]) for key in ("offsets", "members"))
            and other == share
        )


def test_senseless_means_are_refused():
    for wrong in ({"k": 0}, {"candidates": 0}, {"power": -1}):
        with pytest.raises(BadInput):
            AverageMiner(**wrong)


# ---- the estimate --------------------------------------------------------------------------------


def test_halves_share_the_dimensions_out():
    x = rows(5, C=7)
    first, second = halves(x)
    assert first.shape[1] + second.shape[1] == 7 and torch.allclose(
        first.norm(dim=1), torch.ones(5)
    )
    assert torch.equal(halves(x)[0], first), "always the same ones"
    both = sorted(
        torch.cat([first[0] / first[0].abs().max(), second[0] / second[0].abs().max()]).tolist()
    )
    parts = [
        [v / max(map(abs, part)) for v in part]
        for part in (
            x[0, order].tolist()
            for order in torch.randperm(7, generator=torch.Generator().manual_seed(0)).tensor_split(
                2
            )
        )
    ]
    assert both == pytest.approx(sorted([*parts[0], *parts[1]]))


@pytest.mark.parametrize("curve", ["halves", "views"])
def test_both_estimates_equal_loops(curve):
    M, x = 80, clusters(80, groups=4, spread=0.8)
    a, b = torch.randint(M, (2, 30), generator=torch.Generator().manual_seed(0))
    k = M // 8
    views = (
        halves(x)
        if curve == "halves"
        else [clusters(80, groups=4, spread=0.8, seed=seed) for seed in (1, 2)]
    )
    A, B, e = (2.70, 1.20, 0.02) if curve == "halves" else (4.10, 1.44, 0.002)
    near = [[set(nearest(view, i, k)) for i in range(M)] for view in views]
    found = by_halves(x, a, b) if curve == "halves" else by_views(views, a, b)
    for i, j, p in zip(a.tolist(), b.tolist(), found.tolist()):
        s = (len(near[0][i] & near[1][j]) + len(near[1][i] & near[0][j])) / (2 * k)
        s = s if curve == "halves" else max(0, (s - k / M) / (1 - k / M))
        logit = math.log((e + (1 - 2 * e) * s) / (1 - e - (1 - 2 * e) * s))
        assert p == pytest.approx(1 / (1 + math.exp(-(A + B * logit))), abs=1e-5)


def test_the_estimate_tells_right_pairs_from_wrong_ones():
    x, labels = clusters(800, C=32, groups=8, spread=0.8), torch.arange(800) % 8
    a, b = torch.randint(800, (2, 2000), generator=torch.Generator().manual_seed(0))
    share = by_halves(x, a, b)
    same = labels[a] == labels[b]
    assert share[same].mean() > 0.8 and share[~same].mean() < 0.3


def test_widest_equals_brute_force():
    generator = torch.Generator().manual_seed(2)
    for _ in range(30):
        n = int(torch.randint(40, 90, (1,), generator=generator))
        share = torch.rand(n, generator=generator).sort(
            descending=True
        ).values * 0.5 + 0.4 * torch.rand(n, generator=generator)
        at = torch.linspace(0, 499, n).round().long()
        good = [m for m in range(32, n + 1) if float(share[:m].double().mean()) >= 0.62]
        expected = 0 if not good else 500 if good[-1] == n else int(at[good[-1] - 1]) + 1
        assert widest(share, at, 500, 0.62) == expected


def test_a_sample_stands_for_all_pairs(monkeypatch):
    x = clusters(300, spread=0.8)
    a, b = torch.randint(300, (2, 1000), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(estimate, "SAMPLE", 200)
    share, at = sampled(by_halves, x, a, b)
    assert (
        len(at) == 200
        and (at[0], at[-1]) == (0, 999)
        and torch.equal(share, by_halves(x, a[at], b[at]))
    )


def _stopped(rank, world):
    def tick():
        if rank == 0:
            raise Interrupted("asked to")

    try:
        sampled(by_halves, clusters(300), torch.arange(100), torch.arange(100, 200), tick)
    except Interrupted:
        return "interrupted"


def test_a_stop_of_rank_0_stops_all():
    assert run_ranks(2, _stopped) == ["interrupted"] * 2


# ---- what the bound does -------------------------------------------------------------------------


def test_the_widest_set_that_the_estimate_bears_is_kept():
    """Clear groups beside noise: the bound ends the list of pairs, surest first, and the estimate
    of what stays is not below it.
    """
    x = torch.cat([clusters(400, C=32, groups=4, spread=0.5), rows(1200, C=32, seed=5)])
    free, bound = KNNMiner(k=10, budget=8.0), KNNMiner(k=10, budget=8.0, trust=0.9)
    wide, narrow = mine(free, x), mine(bound, x)
    assert (
        0 < narrow.num_edges < wide.num_edges
        and free.report.precision_at_most < 0.9 <= bound.report.precision_at_most + 1e-6
    )
    assert (
        float(narrow.sureness.min())
        >= float(wide.sureness.sort(descending=True).values[narrow.num_edges - 1]) - 1e-6
    )


def test_nothing_sure_enough_is_said():
    miner = KNNMiner(k=5, budget=5.0, trust=0.95)
    sets = mine(miner, rows(400, C=32))
    assert sets.num_edges == 0 and miner.report.why.startswith(
        "nothing sure enough to add this round: of the surest pairs "
    )


def test_what_is_never_dropped_stays():
    miner, x = KNNMiner(k=5, budget=3.0, keep=True), rows(400, C=32)
    first = mine(miner, x)
    miner.rules.trust = 0.999
    second = miner.mine(x, first, torch.Generator().manual_seed(1))
    assert second.num_edges == first.num_edges > 0


def test_the_flag_names_a_bound():
    assert [bound_of(x) for x in ("off", None, "auto", "0.7", 0.7)] == [None, None, AUTO, 0.7, 0.7]
    for wrong in ("sure", "0", "1.2", "nan"):
        with pytest.raises(BadInput, match="expected auto, off, or a precision"):
            KNNMiner(trust=wrong)


def test_views_decide_where_they_are_there():
    """Features in clear groups that two views of the images do not bear out."""
    x = clusters(600, C=32, groups=6, spread=0.3)
    chance = [rows(600, C=32, seed=seed) for seed in (1, 2)]
    miner = KNNMiner(k=5, budget=3.0)
    sets = mine(miner, x, views=chance)
    assert (
        sets.num_edges == 1800
        and miner.report.precision_at_most > 0.9
        and miner.report.precision_estimate < 0.2
    )
    miner.rules.trust = 0.8
    assert mine(miner, x).num_edges == 1800
    assert mine(miner, x, views=chance).num_edges == 0 and re.match(
        "nothing sure enough .*: of the surest pairs 1?[0-9] % are estimated", miner.report.why
    )


def test_views_are_asked_for_by_a_bound():
    @dataclass(eq=False)
    class Looks(KNNMiner):
        uses_views = True

    assert not KNNMiner().wants_views and Looks().wants_views and not NoMiner().wants_views
    assert KNNMiner(trust="auto").wants_views and KNNMiner(trust=0.5).wants_views


def test_a_run_says_its_estimate_and_that_nothing_is_sure(tmp_path):
    flags = [
        *DIGITS,
        "--epochs",
        "1",
        "--max-steps",
        "1",
        "--miner",
        "average",
        "--isl-start",
        "0",
        "--isl-neighbors",
        "20",
    ]
    code, out, err = ask([*flags, "--out", str(tmp_path / "free")])
    assert (
        (code, err) == (0, "")
        and "; at most 0." in out
        and " by the estimate without labels" in out
    )
    line = next(
        x
        for x in map(json.loads, (tmp_path / "free" / "metrics.jsonl").read_text().splitlines())
        if x["kind"] == "round"
    )
    assert (
        0 < line["precision_at_most"] < 1
        and line["precision"] > 0
        and line["precision_estimate"] is None
    )
    code, out, _ = ask([*flags, "--isl-trust", "0.999", "--out", str(tmp_path / "bound")])
    assert code == 0 and "nothing sure enough to add this round: of the surest pairs " in out


def test_errors_of_the_estimate_are_what_it_says_less_what_is_right():
    from studies import estimate as study

    features, labels = clusters(150, groups=5, spread=0.6), torch.arange(150) % 5
    views = [clusters(150, groups=5, spread=0.6, seed=seed) for seed in (1, 2)]
    sets, errors = study.sets(features), study.errors(features, labels, views)
    assert len(errors) == 4 * len(study.SIZES) and sets.keys() == errors.keys()
    for name in ("own nearest, 5", "all pairs, 10"):
        a, b = sets[name]
        truth = statistics.fmean(i % 5 == j % 5 for i, j in zip(a.tolist(), b.tolist()))
        guesses = {"halves": by_halves(features, a, b), "views": by_views(views, a, b)}
        assert errors[name] == pytest.approx(
            {
                "truth": 100 * truth,
                **{by: 100 * (float(p.mean()) - truth) for by, p in guesses.items()},
            },
            abs=1e-3,
        )
        assert bool((a != b).all()) and len(a) <= study.SAMPLE
    near = features @ features.T - 2 * torch.eye(150)
    a, b = sets["own nearest, 5"]
    assert bool((near[a, b] >= near.topk(5, dim=1).values[a, -1] - 1e-6).all())
