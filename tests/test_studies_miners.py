"""The ways to rank pairs of studies/miners.py against loops, and their figures."""

import json

import pytest
import torch

import main_moco_isl
from moco_isl.errors import BadInput
from moco_isl.miners.average import with_views
from moco_isl.miners.gan import proxies_of
from moco_isl.mining.gan import Discriminator, GANFit, GANSettings, Generator
from moco_isl.mining.gan_training import fit_gan
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.triplets import TripletSampler
from studies import miners, wide_gan
from studies.figures import Result
from tests.runs import DIGITS
from tests.test_miners import clusters


@pytest.fixture(scope="module")
def lists():
    return miners.Lists(clusters(130, groups=5, spread=0.8))


def test_pairs_are_distinct_and_the_highest_score_comes_first(lists):
    a, b = lists.pairs(lists.cosine)
    best = {}
    for i in range(lists.M):
        for j, c in zip(lists.near[i].tolist(), lists.cosine[i].tolist()):
            best[frozenset((i, j))] = c
    found = [frozenset(pair) for pair in zip(a.tolist(), b.tolist())]
    assert len(found) == len(best) and set(found) == set(best)
    assert [best[pair] for pair in found] == pytest.approx(
        sorted(best.values(), reverse=True), abs=1e-6
    )


def test_shared_and_mutual_ranks_equal_loops(lists):
    near = lists.near.tolist()
    shared, rank = lists.shared, lists.worst_rank()
    for i in range(0, lists.M, 7):
        for place, j in enumerate(near[i]):
            assert shared[i, place] == len(
                set(near[i][: miners.SHARED]) & set(near[j][: miners.SHARED])
            )
            assert rank[i, place] == max(place, near[j].index(i) if i in near[j] else len(near[j]))


def test_figures_of_pairs_equal_loops(lists):
    labels = torch.arange(lists.M) % 5
    a, b = lists.pairs(lists.cosine)
    figures = miners.undirected(a, b, labels=labels)
    for size in (1, 5):
        first = list(zip(a.tolist(), b.tolist()))[: round(size * lists.M / 2)]
        degree = [sum(i in pair for pair in first) for i in range(lists.M)]
        assert figures[f"{size}"]["precision"] == pytest.approx(
            sum(i % 5 == j % 5 for i, j in first) / len(first)
        )
        assert figures[f"{size}"]["hub"] == max(degree) and figures[f"{size}"][
            "coverage"
        ] == pytest.approx(sum(d > 0 for d in degree) / lists.M)
    weight = torch.rand(len(a), generator=torch.Generator().manual_seed(0))
    total, right = 0.0, 0.0
    for i, j, w in list(zip(a.tolist(), b.tolist(), weight.tolist()))[: round(2 * lists.M / 2)]:
        total, right = total + w, right + w * (i % 5 == j % 5)
    assert miners.undirected(a, b, weight, labels=labels)["2"]["precision"] == pytest.approx(
        right / total, rel=1e-5
    )
    # pairs of an image without a label do not count
    unknown = torch.where(torch.arange(lists.M) < 20, -1, labels)
    known = [(i, j) for i, j in list(zip(a.tolist(), b.tolist()))[: lists.M] if min(i, j) >= 20]
    assert miners.undirected(a, b, labels=unknown)["2"]["precision"] == pytest.approx(
        sum(i % 5 == j % 5 for i, j in known) / len(known)
    )
    own = miners.directed(lists.near, labels)
    assert own["2"]["precision"] == pytest.approx(
        sum(i % 5 == j % 5 for i, row in enumerate(lists.near.tolist()) for j in row[:2])
        / (2 * lists.M)
    )


def test_cosines_in_other_features_equal_a_loop(lists):
    other = clusters(130, groups=5, spread=0.8, seed=9)
    found = lists.cosine_in(other)
    for i in range(0, lists.M, 13):
        assert found[i].tolist() == pytest.approx(
            [float(other[i] @ other[j]) for j in lists.near[i].tolist()], abs=1e-6
        )


def test_scores_are_of_the_pair_with_each_of_its_negatives(lists):
    fit = fit_gan(lists.features, PositiveSets.empty(lists.M), GANSettings(5), 0)
    with torch.no_grad():
        scores = miners._scores(fit, lists, 3)
        cosines = miners._of_five(lambda a, n: fit.G(a, a, n), lists, 3)
    sampler = TripletSampler(
        lists.features,
        PositiveSets.empty(lists.M),
        lists.M,
        torch.Generator().manual_seed(3),
        miners.TRIPLETS,
    )
    for i in (0, 57):
        for t, window in enumerate(sampler.spread(0)):
            a = lists.features[i][None]
            n = lists.features[sampler.draw_negatives(torch.tensor([i]), window)]
            proxy = fit.G(a, a, n)[0]
            for place in (0, 40):
                p = lists.features[lists.near[i, place]]
                assert float(scores[i, place, t]) == pytest.approx(
                    fit.D(a, p[None], n).item(), abs=1e-5
                )
                assert float(cosines[i, place, t]) == pytest.approx((proxy @ p).item(), abs=1e-5)


def test_every_row_has_its_figures(lists, tmp_path):
    source = miners.Source(lists.features, torch.arange(lists.M) % 5, lists.features.roll(1, 1))
    rows = miners.study([source], 2, 5, tmp_path)
    assert len(rows) == 20 and all("5" in seed for seeds in rows.values() for seed in seeds)
    assert (
        len(rows["GAN, published"]) == 2 and rows["GAN, published"][0] != rows["GAN, published"][1]
    )
    again = miners.study([source], 2, 5, tmp_path)  # from its files
    assert {name: seeds for name, seeds in again.items() if "all seeds" not in name} == {
        name: seeds for name, seeds in rows.items() if "all seeds" not in name
    }
    with pytest.raises(BadInput, match="other features or iterations"):
        miners.study([source], 1, 6, tmp_path)
    columns = [("row", "row"), ("least", "least")]
    result = Result("miners-test", "test", torch.device("cpu"), columns)
    miners.show(rows, result)
    assert ["least" in row for row in result.rows] == [
        name not in ("own nearest", "all pairs") for name in rows
    ]


def test_a_checkpoint_is_judged_on_its_images(tmp_path):
    assert (
        main_moco_isl.main(
            [*DIGITS, "--epochs", "1", "--max-steps", "1", "--out", str(tmp_path / "run")]
        )
        == 0
    )
    file = str(tmp_path / "run" / "checkpoint_last.pth.tar")
    assert miners.main([file, "--of", "digits", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = {
        row["row"]: row
        for row in json.loads((tmp_path / "miners-run-cpu.json").read_text())["rows"]
    }
    assert (
        rows["all pairs"]["n"] == 1
        and "two snapshots" not in rows
        and not any("GAN" in name for name in rows)
    )
    source = miners.of_checkpoint(file, "digits", None, torch.device("cpu"))
    a, b = miners.Lists(with_views(source.features, source.views)).by_means(50)
    wanted = miners.undirected(a, b, labels=source.labels)
    shown = {f"at_{size}": f"{100 * x['precision']:.1f}" for size, x in wanted.items()}
    row = rows["  of 50, with two views"]
    assert {key: row[key] for key in shown} == shown
    assert shown["at_5"] != rows["neighbourhood means of 50"]["at_5"]
    nowhere = [file, "--of", "cifar10", str(tmp_path), "--device", "cpu", "--out", str(tmp_path)]
    assert miners.main(nowhere) == 2


def test_the_digits_need_the_runs_of_two_sweeps(tmp_path, capsys):
    assert miners.main(["digits", "--sweeps", str(tmp_path), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "run python launch/sweep.py studies/gain_digits.yaml first" in said


def test_joined_neighbourhoods_equal_a_loop_over_all_proxies(monkeypatch):
    M, seed, features = 130, 7, clusters(130)
    sets = PositiveSets.empty(M)
    fit = GANFit(Generator(16), Discriminator(16), {}, "")
    miner = wide_gan.JoinedGANMiner(budget=4, candidates=3, **wide_gan.UNBOUNDED)
    monkeypatch.setattr(miner, "fit", lambda *args: fit)
    edges, why = miner.find(features, sets, seed, None)
    assert not why and len(edges.src) == 5 * 3 * M
    found = set(zip(edges.src.tolist(), edges.dst.tolist()))
    sampler = TripletSampler(features, sets, M, torch.Generator().manual_seed(seed))
    wanted = set()
    for number, anchors in enumerate(torch.arange(M).split(64)):
        draws = torch.Generator().manual_seed(seed + number)
        _, proxies, _ = proxies_of(fit.G, fit.D, features, sampler, anchors, draws)
        for of_triplet in proxies:
            for anchor, proxy in zip(anchors.tolist(), of_triplet):
                order = (features @ proxy).argsort(descending=True).tolist()
                order.remove(anchor)
                wanted |= {(anchor, image) for image in order[:3]}
    assert found == wanted


def test_the_table_of_wide_sets_has_precision_and_reach(monkeypatch):
    monkeypatch.setattr(wide_gan, "WIDTHS", (4,))
    monkeypatch.setattr(wide_gan, "ROWS", {"own nearest": 1, "neighbourhood means": 1})
    labels = torch.arange(130) % 5
    source = miners.Source(clusters(130, groups=5), labels)
    runs = [wide_gan.study(source, seed, None) for seed in (0, 1)]
    result = Result("x", "x", torch.device("cpu"), [])
    wide_gan.show(runs, result)
    cells = {row["row"]: row for row in result.rows}
    right = runs[0]["own nearest", 1][4, "precision"]
    assert 20 < right <= 100 and cells["own nearest"]["precision_4"] == f"{right:.1f} ± 0.0"
    assert cells["neighbourhood means"]["n"] == 2 and "reach_4" in cells["neighbourhood means"]
