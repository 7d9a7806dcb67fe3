"""The ways to rank pairs of benchmarks.miners against loops, and their figures."""

import pytest
import torch

from benchmarks import miners
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
    assert [best[pair] for pair in found] == pytest.approx(sorted(best.values(), reverse=True), abs=1e-6)


def test_shared_and_mutual_ranks_equal_loops(lists):
    near = lists.near.tolist()
    shared, rank = lists.shared(), lists.worst_rank()
    for i in range(0, lists.M, 7):
        for place, j in enumerate(near[i]):
            assert shared[i, place] == len(set(near[i][: miners.SHARED]) & set(near[j][: miners.SHARED]))
            assert rank[i, place] == max(place, near[j].index(i) if i in near[j] else len(near[j]))


def test_figures_of_pairs_equal_loops(lists):
    labels = torch.arange(lists.M) % 5
    a, b = lists.pairs(lists.cosine)
    figures = miners.undirected(a, b, labels)
    for size in (1, 5):
        first = list(zip(a.tolist(), b.tolist()))[: round(size * lists.M / 2)]
        degree = [sum(i in pair for pair in first) for i in range(lists.M)]
        assert figures[size]["precision"] == pytest.approx(sum(i % 5 == j % 5 for i, j in first) / len(first))
        assert figures[size]["hub"] == max(degree) and figures[size]["coverage"] == pytest.approx(sum(d > 0 for d in degree) / lists.M)
    own = miners.directed(lists.near, labels)
    assert own[2]["precision"] == pytest.approx(sum(i % 5 == j % 5 for i, row in enumerate(lists.near.tolist()) for j in row[:2]) / (2 * lists.M))


def test_every_row_has_its_figures(lists):
    rows = miners.study(lists.features, torch.arange(lists.M) % 5, seeds=1, iters=5)
    assert len(rows) == 13 and all(5 in seed for seeds in rows.values() for seed in seeds)
    result = miners.common.Result("miners-test", "test", torch.device("cpu"), [("row", "row"), ("least", "least")])
    miners.show(rows, result)
    assert [row["least"] for row in result.rows[:2]] == [None, None] and all(row["least"] for row in result.rows[2:])
