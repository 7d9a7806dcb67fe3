"""Reach, the ranks behind it, and the share of same-class pairs found: by loops, in closed form, in
pieces, in half precision, over ranks and interrupted.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moco_isl.errors import Interrupted
from moco_isl.mining import reach as module
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.reach import ranks_of_positives, reach, same_class_found
from moco_isl.mining.record import RoundReport
from moco_isl.ops.neighbors import topk
from moco_isl.report import runs, sections
from tests.ranks import run_ranks

Tensor = torch.Tensor


def rows(M: int, C: int = 8) -> Tensor:
    return F.normalize(torch.randn(M, C, generator=torch.Generator().manual_seed(0)), dim=1)


def drawn(M: int, E: int = 150) -> PositiveSets:
    """Sets of different sizes, some of them empty."""
    src, dst = torch.randint(M, (2, E), generator=torch.Generator().manual_seed(1))
    return PositiveSets.from_edges(M, src[src % 5 != 0], dst[src % 5 != 0], symmetric=False)


def own_nearest(features: Tensor, k: int) -> PositiveSets:
    M = len(features)
    cosine, near = topk(features, features, k, torch.arange(M))
    src = torch.arange(M)[:, None].expand(-1, k)
    return PositiveSets.from_edges(
        M, src.flatten(), near.flatten(), symmetric=False, sureness=cosine.flatten()
    )


def slow_ranks(features: Tensor, sets: PositiveSets, anchors: list[int]) -> list[int]:
    cosines = features.double() @ features.double().T
    found = []
    for i in anchors:
        for j in sets.members[sets.offsets[i] : sets.offsets[i + 1]].tolist():
            others = [x for x in range(len(features)) if x != i]
            found.append(1 + sum(bool(cosines[i, x] > cosines[i, j] + 1e-9) for x in others))
    return found


def lower_median(values: list[int]) -> int:
    return sorted(values)[(len(values) - 1) // 2]


@pytest.mark.parametrize("columns", [7, 65536])
def test_ranks_and_reach_equal_loops(columns, monkeypatch):
    monkeypatch.setattr(module, "COLUMNS", columns)
    monkeypatch.setattr(module, "BLOCK", 9)
    M = 60
    features = rows(M)
    sets = drawn(M)
    anchors = [3, 50, 0, 17, 21, 8, 9, 59, 4, 33, 31]
    found = ranks_of_positives(features, sets, torch.tensor(anchors))
    assert found.tolist() == slow_ranks(features, sets, anchors)
    want = lower_median(slow_ranks(features, sets, list(range(M)))) / M
    assert reach(features, sets) == pytest.approx(want)


def test_own_nearest_have_the_reach_of_half_their_number():
    features = rows(1000)
    assert reach(features, own_nearest(features, 10)) == pytest.approx(0.005)
    assert reach(features, own_nearest(features, 1)) == pytest.approx(0.001)


def test_what_has_no_positives_has_no_reach():
    assert reach(rows(5), PositiveSets.empty(5)) is None


def test_equal_images_have_the_best_of_their_ranks():
    features = rows(1).expand(20, -1)
    assert reach(features, drawn(20)) == pytest.approx(1 / 20)


def test_a_few_images_with_positives_stand_for_all(monkeypatch):
    """The first that have any in an order that M alone decides, however few have."""
    monkeypatch.setattr(module, "ANCHORS", 5)
    M = 60
    features = rows(M)
    sets = drawn(M)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(0)).tolist()
    anchors = [i for i in order if sets.offsets[i] < sets.offsets[i + 1]][:5]
    want = lower_median(slow_ranks(features, sets, anchors)) / M
    assert reach(features, sets) == pytest.approx(want)


def test_half_precision_gives_the_reach_of_its_own_rows():
    features = rows(300).half()
    sets = own_nearest(features.float(), 7)
    assert reach(features, sets) == reach(features.float(), sets) == pytest.approx(4 / 300)


def reach_on_rank(rank: int, world: int) -> float:
    return reach(rows(60), drawn(60))


def interrupted_on_rank(rank: int, world: int) -> str:
    def tick() -> None:
        raise Interrupted("asked to stop")

    try:
        reach(rows(60), drawn(60), tick)
    except Interrupted as error:
        return str(error)
    return "not interrupted"


def test_ranks_have_one_answer_and_one_interruption():
    assert run_ranks(2, reach_on_rank) == [reach(rows(60), drawn(60))] * 2
    assert run_ranks(2, interrupted_on_rank) == ["mining was interrupted"] * 2


def test_same_class_pairs_found_equal_counting():
    """Pairs with an image of unknown label count neither as found nor as to be found."""
    M = 60
    labels = torch.arange(M) % 4
    labels[::7] = -1
    sets = drawn(M)
    same = lambda i, j: i != j and labels[i] >= 0 and labels[i] == labels[j]
    all_pairs = sum(bool(same(i, j)) for i in range(M) for j in range(M))
    edges = zip(sets.sources().tolist(), sets.members.tolist())
    right = sum(bool(same(i, j)) for i, j in edges)
    assert same_class_found(sets, labels) == pytest.approx(right / all_pairs)


def test_same_class_pairs_found_in_closed_form():
    labels = torch.arange(20) // 5  # classes of 5: each image has 4 others
    one = PositiveSets.from_edges(20, torch.arange(20), torch.arange(20) ^ 1, symmetric=False)
    # 8 of the 10 pairs 0-1, 2-3, ... lie within a class: all but 4-5 and 14-15
    assert same_class_found(one, labels) == pytest.approx(16 / 80)
    assert same_class_found(one, torch.full((20,), -1)) is None
    assert same_class_found(one, torch.arange(20)) is None


def test_the_line_of_a_round_says_both():
    report = RoundReport("knn", reach=0.0123, same_class_found=0.0806)
    assert "; reach 1.2 % of all images, 8.1 % of the same-class pairs found; " in str(report)
    report.same_class_found = None
    report.reach = 0.000034
    assert "; reach 0.0034 % of all images; " in str(report)
    report.reach = None
    assert "reach" not in str(report)
    assert report.figures()["reach"] is None


def test_a_run_without_rounds_has_no_chart_of_reach():
    run = runs.Run(Path("none"), "none", {}, {}, [], [], [])
    assert sections.mining_charts(run, []) == []
