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

from moco_isl import data
from moco_isl.data.label_list import read_labels
from moco_isl.errors import BadInput, Interrupted
from moco_isl.miners.average import AverageMiner, neighbourhood_means
from moco_isl.miners.knn import KNNMiner
from moco_isl.miners.none import NoMiner
from moco_isl.mining import estimate
from moco_isl.mining.edges import Rules
from moco_isl.mining.estimate import (
    Views,
    apart,
    by_check,
    by_halves,
    by_pixels,
    by_views,
    effective_rank,
    guess,
    halves,
    running_mean,
    spread_of_count,
    widest,
)
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import AUTO, bound_of
from moco_isl.training.pretrain import say_outcome
from tests.ranks import run_ranks
from tests.runs import DIGITS
from tests.test_bad_input import ask
from tests.test_miners import clusters, rows

SEED = lambda seed: torch.Generator().manual_seed(seed)


def mine(miner, features, seed=0, views=None):
    return miner.mine(
        features,
        PositiveSets.empty(len(features)),
        torch.Generator().manual_seed(seed),
        views=views,
    )


GROUPS = 20


def crowds(M, seed=0, C=16):
    """Clear groups, as small as the number of neighbours that the estimate looks at."""
    return clusters(M, C=C, groups=GROUPS, spread=0.3, seed=seed)


def seen(M, pixels=True):
    """Two views of the groups, in which images know each other again, and pixels that agree."""
    first = crowds(M, seed=1)
    second = F.normalize(first + 0.02 * rows(M, C=16, seed=2), dim=1)
    return Views(first, second, crowds(M, seed=3, C=24) if pixels else None)


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


def _on_ranks(rank, world, trust, views=False, check=False):
    miner = AverageMiner(k=10, budget="auto" if trust else 6.0, trust=trust)
    if check:
        miner.known = torch.where(
            torch.rand(600, generator=SEED(4)) < 0.5, torch.arange(600) % GROUPS, -1
        )
    sets = mine(miner, crowds(600), views=seen(600) if views else None)
    report = miner.report
    return sets.state_dict(), [report.precision_estimate, report.precision_at_most, report.why]


@pytest.mark.parametrize(
    "trust, views, check", [(None, False, False), (0.6, True, False), (0.6, False, True)]
)
def test_ranks_find_and_estimate_what_one_does(trust, views, check):
    alone, share = _on_ranks(0, 1, trust, views, check)
    assert len(alone["members"]) and not share[2]
    for sets, other in run_ranks(2, _on_ranks, trust, views, check):
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


@pytest.mark.parametrize("by", [by_halves, by_views, by_pixels])
def test_the_guesses_equal_loops(by):
    M, x = 80, clusters(80, groups=4, spread=0.8)
    a, b = torch.randint(M, (2, 30), generator=torch.Generator().manual_seed(0))
    k = M // 28
    two = [clusters(80, groups=4, spread=0.8, seed=seed) for seed in (1, 2)]
    views = {by_halves: halves(x), by_views: two, by_pixels: (x, x)}[by]
    near = [[set(nearest(view, i, k)) for i in range(M)] for view in views]
    found = by(two if by is by_views else x, a, b)
    for i, j, p in zip(a.tolist(), b.tolist(), found.tolist()):
        s = (len(near[0][i] & near[1][j]) + len(near[1][i] & near[0][j])) / (2 * k)
        if by is by_halves:
            logit = math.log((0.02 + 0.96 * s) / (1 - 0.02 - 0.96 * s))
            expected = 1 / (1 + math.exp(-(2.70 + 1.20 * logit)))
        else:
            expected = min(max(0, (s - k / M) / (1 - k / M)) / 0.2, 1)
        assert p == pytest.approx(expected, abs=1e-5)


def test_apart_equals_a_loop():
    first, second = rows(90, seed=1), rows(90, seed=2)
    second = F.normalize(first + second, dim=1)
    nearer = [
        sum(float(second[i] @ first[j]) > float(second[i] @ first[i]) for j in range(90)) / 90
        for i in range(90)
    ]
    assert apart(Views(first, second)) == pytest.approx(sorted(nearer)[44])
    assert apart(Views(first, first)) == 0


def test_effective_rank_of_known_features():
    even = torch.cat([torch.eye(6), -torch.eye(6)])
    assert effective_rank(even) == pytest.approx(6, abs=1e-3)
    assert effective_rank(even[[0, 6]]) == pytest.approx(1, abs=1e-3)
    assert math.isfinite(effective_rank(torch.ones(4, 3)))


def test_the_estimate_tells_right_pairs_from_wrong_ones():
    x, labels = clusters(800, C=32, groups=8, spread=0.8), torch.arange(800) % 8
    a, b = torch.randint(800, (2, 2000), generator=torch.Generator().manual_seed(0))
    share = by_halves(x, a, b)
    same = labels[a] == labels[b]
    assert share[same].mean() > 0.7 and share[~same].mean() < 0.3


def test_widest_equals_brute_force():
    generator = torch.Generator().manual_seed(2)
    for _ in range(30):
        n = int(torch.randint(40, 90, (1,), generator=generator))
        right = torch.rand(n, generator=generator).sort(
            descending=True
        ).values * 0.5 + 0.4 * torch.rand(n, generator=generator)
        at = torch.linspace(0, 499, n).round().long()
        good = [m for m in range(32, n + 1) if float(right[:m].double().mean()) >= 0.62]
        expected = 0 if not good else 500 if good[-1] == n else int(at[good[-1] - 1]) + 1
        assert widest(running_mean(right), at, 500, 0.62) == expected


def test_a_sample_stands_for_all_pairs(monkeypatch):
    x, views = crowds(300), seen(300)
    a, b = torch.randint(300, (2, 1000), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(estimate, "SAMPLE", 200)
    found = guess(x, views, a, b)
    at = found.at
    assert len(at) == 200 and (at[0], at[-1]) == (0, 999) and found.labelled == 0
    both = by_views(views, a[at], b[at]), by_pixels(views.pixels, a[at], b[at])
    both = [running_mean(share) for share in both]
    assert torch.equal(found.share, torch.minimum(*both))
    most = running_mean(by_halves(x, a[at], b[at]))
    assert torch.equal(found.most, torch.maximum(most, both[0]))
    assert torch.equal(guess(x, None, a, b).share, most)


def test_labelled_images_are_counted_as_a_loop_does():
    known = torch.where(torch.rand(200, generator=SEED(1)) < 0.4, torch.arange(200) % 3, -1)
    a, b = torch.randint(200, (2, 900), generator=SEED(0))
    found, right, pairs = by_check(known, a, b), 0, 0
    for place, (i, j) in enumerate(zip(a.tolist(), b.tolist())):
        if known[i] < 0 or known[j] < 0:
            continue
        right += int(known[i] == known[j])
        assert int(found.at[pairs]) == place
        assert float(found.share[pairs]) == pytest.approx(right / (pairs + 1), abs=1e-6)
        pairs += 1
    assert pairs == len(found.at) and found.labelled == int((known >= 0).sum())
    assert not found.doubt and by_check(known, a[:90], b[:90]).doubt.startswith("of 90 pairs ")


def test_the_spread_of_a_count_is_that_of_repeated_draws():
    """Of 60 images drawn from 600, all pairs of one of two groups of images are right in 0.9."""
    good = torch.arange(600) % 2 == 0
    shares, spreads = [], []
    for seed in range(200):
        drawn = torch.randperm(600, generator=SEED(seed))[:60]
        i, j = torch.triu_indices(60, 60, 1)
        right = (good[drawn[i]] & good[drawn[j]]).float()
        shares.append(float(right.mean()))
        spreads.append(spread_of_count(right, i, j))
    assert statistics.fmean(spreads) == pytest.approx(statistics.stdev(shares), rel=0.2)
    apart_pairs = torch.arange(80).view(2, 40)
    right = torch.arange(40) < 30
    alone = math.sqrt(0.75 * 0.25 / 40)
    assert spread_of_count(right.float(), *apart_pairs) == pytest.approx(alone, rel=1e-6)


def test_what_nothing_can_be_told_of():
    views = seen(600)
    assert estimate.doubt(views) == ""
    assert estimate.doubt(None) == "no views of the images were given"
    assert "pixels" in estimate.doubt(views[:2])
    assert estimate.doubt(seen(300)) == "300 images are fewer than 500"
    strange = Views(views[0], rows(600, C=16, seed=8), views[2])
    assert estimate.doubt(strange).startswith("the encoder hardly knows an image again: ")


def _stopped(rank, world):
    def tick():
        if rank == 0:
            raise Interrupted("asked to")

    try:
        guess(clusters(300), None, torch.arange(100), torch.arange(100, 200), tick)
    except Interrupted:
        return "interrupted"


def test_a_stop_of_rank_0_stops_all():
    assert run_ranks(2, _stopped) == ["interrupted"] * 2


# ---- what the bound does -------------------------------------------------------------------------


def test_the_widest_set_that_the_estimate_bears_is_kept():
    """Clear groups: sets wider than a group are cut, and the estimate is not below the bound."""
    x, views = crowds(600), seen(600)
    labels = torch.arange(600) % GROUPS
    wide, narrow = KNNMiner(budget=75.0), KNNMiner(budget="auto")
    free, kept = mine(wide, x), mine(narrow, x, views=views)
    assert 0 < kept.num_edges < free.num_edges and narrow.rules.trust == AUTO
    assert narrow.report.precision_estimate >= AUTO - 1e-6 and kept.precision(labels) > AUTO - 0.1
    assert narrow.report.precision_at_most >= narrow.report.precision_estimate


def test_the_labelled_images_decide_alone():
    """Crowds that views and pixels bear out, and that are no classes."""
    x, views = crowds(600), seen(600)
    known = torch.randint(2, (600,), generator=SEED(3))
    miner = KNNMiner(budget="auto")
    assert mine(miner, x, views=views).num_edges
    assert miner.report.labels_checked is None and "LABELS" not in str(miner.report)
    miner.known = known
    assert mine(miner, x, views=views).num_edges == 0 and miner.surest is not None
    assert "by the labelled images" in miner.report.why
    assert "LABELS OF 600 IMAGES WERE USED (--isl-check)" in str(miner.report)
    miner.known = torch.arange(600) % GROUPS
    assert mine(miner, x, views=views).num_edges and miner.surest is None
    report = miner.report
    assert report.precision_at_least <= report.precision_estimate <= report.precision_at_most


def test_sets_follow_what_is_sure():
    assert Rules(budget=50.0).cap(10_000) == 200 and Rules(budget=5.0).cap(10_000) == 100
    assert Rules(budget=5.0).cap(600) == 30 and Rules(50.0, 0.2).cap(1000) == 200
    assert Rules(budget=200.0).cap(10**7) == 800 and Rules(200.0).cap(10**7, 30.0) == 120
    auto, wide = KNNMiner(budget="auto"), KNNMiner(budget=[3, 20])
    assert [auto.most(M) for M in (4, 800, 10**5, 10**6)] == [1, 100, 200, 100]
    assert [auto.offered(M) for M in (800, 10**6)] == [200, 100]
    assert (wide.most(800), wide.offered(800)) == (20, 80)


@pytest.mark.parametrize(
    ("M", "pairs", "every", "cure"),
    [
        (1000, 900, 10, "label about 236 images"),  # 1000 sqrt(50 / 900)
        (1000, 900, 2, "label more images"),  # by bad luck no pair has two of 500 labelled ones
        (60, 20, 1, "give a larger --isl-budget"),  # even all labels are too few
    ],
)
def test_how_many_images_to_label_is_said(M, pairs, every, cure):
    known = torch.full((M,), -1)
    known[::every] = 0
    a = torch.arange(pairs)
    assert by_check(known, a, a + 1).doubt.endswith(f"and 50 are needed: {cure}")


def test_auto_stands_alone():
    wanted = "--isl-budget .*expected auto or all alone, or numbers above 0"
    for wrong in (["auto", "5"], ["5", "all"], "x", "0", "nan", "-1"):
        with pytest.raises(BadInput, match=wanted):
            KNNMiner(budget=wrong)
    with pytest.raises(BadInput, match="--isl-budget auto .* --isl-trust off"):
        KNNMiner(budget="auto", trust="off")
    assert KNNMiner(budget=["auto"], trust="0.7").rules.trust == 0.7


def test_nothing_sure_enough_is_said():
    miner = KNNMiner(k=5, budget=5.0, trust=0.95)
    strange = seen(600)._replace(pixels=rows(600))
    for M, views, why in (
        (600, None, r"it cannot be told .*no views of the images.*--isl-check"),
        (400, seen(400), r"it cannot be told .*400 images are fewer than 500.*--isl-check"),
        (600, strange, r"of the surest pairs \d+ to \d+ % are right by a guess, and 95 %"),
    ):
        assert not mine(miner, rows(M, C=16), views=views).num_edges
        assert re.match("nothing sure enough to add this round: " + why, miner.report.why)
        assert len(miner.surest[0]) <= round(5 * M / 2)


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
    assert code == 0 and "nothing sure enough to add this round: it cannot be told without" in out
    assert " of the surest pairs, not added; " in out


# ---- labelled images -----------------------------------------------------------------------------


def write_list(path, images, count=200):
    path.write_text("# drawn by chance\n\n" + "".join(f"{i},{i % 3}\n" for i in range(count)))
    return str(path)


def test_a_list_names_images_by_path_or_position(tmp_path):
    digits = data.build_dataset("digits", None, "train")
    found = read_labels(write_list(tmp_path / "list", digits), digits, digits, "--isl-check")
    assert found[:200].tolist() == [i % 3 for i in range(200)] and bool((found[200:] == -1).all())
    rest, held_out = data.holdout(digits, 400, 0)
    found = read_labels(write_list(tmp_path / "list", digits), rest, digits, "--isl-check")
    where = [int(rest.path(i).split("[")[1][:-1]) for i in range(len(rest))]
    assert found.tolist() == [i % 3 if i < 200 else -1 for i in where]
    paths = [f"/a/train/n{i % 7}/{i} x.jpg" for i in range(150)]
    files = data.ImageFiles(paths, None, None, "/a/train")
    names = [f"n{i % 7}/{i} x.jpg\tcat {i % 2}" for i in range(75)]
    names += [f"train/n{i % 7}/{i} x.jpg, cat {i % 2}" for i in range(75, 150)]
    (tmp_path / "names").write_text("\n".join(names))
    found = read_labels(str(tmp_path / "names"), files, files, "--isl-check")
    assert found.tolist() == [i % 2 for i in range(150)]


@pytest.mark.parametrize(
    "lines, wrong",
    [
        (None, "no such file"),
        ([f"{i},{i % 3}" for i in range(50)], " of the training images: expected at least 100"),
        ([f"{i},7" for i in range(900)], "has one label alone, '7': expected two"),
        (["0,1", "9999,1"], "line 2: no image is named '9999': expected a path such as '0'"),
        (["0,1", "1"], "line 2: '1' has no label"),
        (["0,1", "0,2"], "line 2: '0' has the labels '1' and '2'"),
    ],
)
def test_bad_lists_end_a_run_before_it_starts(tmp_path, lines, wrong):
    if lines is not None:
        (tmp_path / "list").write_text("\n".join(lines))
    flags = [*DIGITS, "--epochs", "1", "--miner", "knn", "--isl-check", str(tmp_path / "list")]
    code, out, err = ask([*flags, "--out", str(tmp_path / "out")])
    assert code == 2 and wrong in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_run_says_everywhere_that_labelled_images_were_used(tmp_path):
    digits = data.build_dataset("digits", None, "train")
    list_ = write_list(tmp_path / "list", digits, 1400)
    flags = "--epochs 1 --max-steps 1 --miner knn --isl-start 0 --isl-budget auto --isl-check"
    code, out, _ = ask([*DIGITS, *flags.split(), list_, "--out", str(tmp_path / "run")])
    assert code == 0 and re.search(r"LABELS OF \d+ IMAGES WERE USED \(--isl-check\)", out)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    count = next(line for line in lines if line["kind"] == "round")["labels_checked"]
    args = json.loads((tmp_path / "run" / "args.json").read_text())["args"]
    record = torch.load(tmp_path / "run" / "rounds" / "round_0001.pt")
    assert args["isl_check"] == list_ and int(record["labels_checked"]) == count > 100


def test_a_resumed_run_compares_with_its_last_round_and_wants_the_same_list(tmp_path):
    digits = data.build_dataset("digits", None, "train")
    list_ = write_list(tmp_path / "list", digits, 1400)
    flags = "--epochs 2 --miner knn --isl-start 0 --isl-every 1 --isl-budget auto --isl-check"
    command = [*DIGITS, *flags.split(), list_, "--out", str(tmp_path / "run"), "-p", "1"]
    code, out, _ = ask([*command, "--max-steps", "3"])
    assert code == 0 and "since the round before" not in out
    kept = (tmp_path / "list").read_text()
    (tmp_path / "list").write_text(kept.rstrip("\n").rpartition("\n")[0])  # without its last line
    code, _, err = ask([*command, "--resume", "auto"])
    assert code == 2 and "the list of --isl-check has other images or labels than when" in err
    (tmp_path / "list").write_text(kept)
    log = tmp_path / "run" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert [json.loads(line)["kind"] for line in lines] == ["round", "step", "step", "step"]
    damaged = "x" * (len(lines[1]) - 1) + "\n"
    log.write_text(lines[0] + damaged + lines[2] + lines[3][:-20])  # and cut
    code, out, err = ask([*command, "--resume", "auto"])
    assert code == 0 and "lines are missing" in out, err
    assert out.count("=> since the round before: effective rank") == 2
    again = log.read_text()
    assert again.startswith(lines[0] + damaged + lines[2] + '{"kind": "step"')
    assert all(json.loads(line) for line in again.splitlines() if line + "\n" != damaged)


# ---- the study of its errors ---------------------------------------------------------------------


def test_a_row_of_the_study_says_how_far_off_the_estimates_are(tmp_path):
    from studies import estimate as study
    from studies.miners import Source

    source = Source(crowds(1000), torch.arange(1000) % GROUPS, views=seen(1000))
    study.save(source, tmp_path / "x.safetensors")
    again = study.of_file(str(tmp_path / "x.safetensors"), torch.device("cpu"))
    assert all(torch.equal(x, y) for x, y in zip(source.views, again.views))
    row = study.row(again)
    a, b = study.ranked(again)
    truth = [
        float((again.labels[a[:n]] == again.labels[b[:n]]).float().mean()) for n in (2500, 10000)
    ]
    assert row["M"] == 1000 and row["truth"].split(", ")[:2] == [f"{100 * x:.0f}" for x in truth]
    assert " an image, " in row["kept"] and row["by_300"] and row["by_500"]
    small = study.part(again, 400)
    assert len(small.labels) == 400 and study.row(small)["kept"] == "cannot tell"
    known = torch.full((1000,), -1)
    drawn = torch.randperm(1000, generator=SEED(3))[:300]
    known[drawn] = again.labels[drawn]
    right = (again.labels[a] == again.labels[b]).float()
    counted = right[(known[a] >= 0) & (known[b] >= 0)].mean()
    errors = study.check_errors(again.labels, a, b, right, 300, 3)
    assert errors[1] == pytest.approx(100 * float(counted - right.mean()), abs=1e-3)


def test_features_that_got_worse_are_said():
    class Lines(list):
        outcome, say = None, list.append

    for rank, apart_, lines in ((7.0, 0.01, 0), (8.0, 0.02, 1), (7.5, 0.03, 2), (7.4, None, 0)):
        journal = Lines()
        journal.outcome = {7.0: None, 8.0: (7.0, 0.01), 7.5: (8.0, 0.02), 7.4: (7.5, 0.03)}[rank]
        say_outcome(journal, rank, apart_)
        assert len(journal) == lines and journal.outcome == (rank, apart_)
        assert lines < 2 or journal[1].startswith("=> warning: the features lost directions")
        assert not lines or re.search(
            r"effective rank \d.0 to [78]\.\d, .* [12].00 % to", journal[0]
        )
