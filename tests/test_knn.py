"""Weighted kNN and few-label accuracy against loops, closed forms and another library."""

import math

import pytest
import torch
import torch.nn.functional as F

from moco_isl.errors import BadInput
from moco_isl.evaluation import knn


def features(n, dim, seed):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def knn_by_loops(queries, bank, labels, k, T, leave_one_out=False):
    predictions = []
    for i, q in enumerate(queries.tolist()):
        sims = [
            (sum(a * b for a, b in zip(q, row)), j)
            for j, row in enumerate(bank.tolist())
            if not (leave_one_out and i == j)
        ]
        votes = {}
        for sim, j in sorted(sims, reverse=True)[:k]:
            votes[labels[j].item()] = votes.get(labels[j].item(), 0.0) + math.exp(sim / T)
        predictions.append(max(votes, key=votes.get))
    return torch.tensor(predictions)


@pytest.mark.parametrize("k,T", [(1, 0.1), (7, 0.1), (20, 0.07), (60, 1.0)])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_equals_the_loops(k, T, leave_one_out):
    bank, labels = features(61, 6, 0), torch.arange(61) * 7 % 5
    queries = bank if leave_one_out else features(23, 6, 1)
    expected = knn_by_loops(queries, bank, labels, k, T, leave_one_out)
    assert len(expected.unique()) > 1
    assert torch.equal(knn.weighted_knn(queries, bank, labels, k, T, leave_one_out=leave_one_out), expected)


def test_chunks_change_nothing():
    bank, queries = features(500, 8, 0), features(100, 8, 1)
    labels = torch.randint(0, 4, (500,), generator=torch.Generator().manual_seed(2))
    whole = knn.nearest(queries, bank, 30)
    for chunk in (1, 64, 10_000):
        sim, row = knn.nearest(queries, bank, 30, chunk=chunk)
        assert torch.equal(row, whole[1]) and torch.allclose(sim, whole[0], atol=1e-6)
    whole_loo = knn_by_loops(bank[:50], bank[:50], labels[:50], 5, 0.1, leave_one_out=True)
    assert torch.equal(
        knn.weighted_knn(bank[:50], bank[:50], labels[:50], 5, 0.1, chunk=1, leave_one_out=True), whole_loo
    )


def test_equals_lightly():
    knn_predict = pytest.importorskip("lightly.utils.benchmarking").knn_predict
    bank, queries = features(1000, 32, 0), features(300, 32, 1)
    labels = torch.randint(0, 10, (1000,), generator=torch.Generator().manual_seed(2))
    for k, T in ((200, 0.1), (20, 0.07)):
        theirs = knn_predict(queries, bank.T.contiguous(), labels, num_classes=10, knn_k=k, knn_t=T)[:, 0]
        assert torch.equal(knn.weighted_knn(queries, bank, labels, k, T), theirs)


def test_grid_is_every_pair_and_a_tiny_temperature_does_not_overflow():
    bank, queries = features(80, 8, 0), features(40, 8, 1)
    labels = torch.arange(80) % 3
    grid = knn.knn_grid(queries, bank, labels, [1, 5, 20], [0.1, 0.5])
    assert set(grid) == {(k, T) for k in (1, 5, 20) for T in (0.1, 0.5)}
    for (k, T), predictions in grid.items():
        assert torch.equal(predictions, knn.weighted_knn(queries, bank, labels, k, T))
    assert torch.equal(knn.weighted_knn(queries, bank, labels, 20, T=1e-4), grid[1, 0.1])  # the nearest alone decides


def test_the_weight_decides_not_the_count():
    bank = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]), dim=1)
    query, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1, 1])
    # one vote of exp(1 / T) against two of exp(0.7071 / T): equal at T = 0.2929 / ln 2 = 0.4226
    assert knn.weighted_knn(query, bank, labels, 3, T=0.41).item() == 0
    assert knn.weighted_knn(query, bank, labels, 3, T=0.43).item() == 1


@pytest.mark.parametrize("arguments", [{"k": 0}, {"k": 11}, {"k": 10, "leave_one_out": True}, {"k": 1, "T": 0.0}])
def test_a_bad_k_or_temperature_is_said(arguments):
    bank = features(10, 4, 0)
    with pytest.raises(BadInput):
        knn.weighted_knn(bank, bank, torch.arange(10) % 2, **arguments)


def few_shot_by_loops(train, train_labels, test, test_labels, drawn):
    right = 0
    for x, y in zip(test, test_labels.tolist()):
        means = {c: train[rows].mean(dim=0) for c, rows in drawn.items()}
        right += max(means, key=lambda c: F.cosine_similarity(x, means[c], dim=0).item()) == y
    return right / len(test)


def test_few_shot_equals_the_loops():
    train, test = features(60, 5, 0), features(50, 5, 1)
    train_labels, test_labels = torch.arange(60) * 11 % 3 * 2, torch.arange(50) % 3 * 2  # classes 0, 2, 4
    mean, spread = knn.few_shot(train, train_labels, test, test_labels, shots=4, draws=3, seed=5)
    generator, expected = torch.Generator().manual_seed(5), []
    for _ in range(3):
        rows = knn.draw_shots(train_labels, 4, generator)
        assert all(len(set(r.tolist())) == 4 for r in rows)
        assert [train_labels[r].unique().tolist() for r in rows] == [[0], [2], [4]]
        drawn = dict(zip((0, 2, 4), rows))
        expected.append(few_shot_by_loops(train, train_labels, test, test_labels, drawn))
    assert mean == pytest.approx(sum(expected) / 3)
    assert spread == pytest.approx(torch.tensor(expected).std().item(), abs=1e-6)
    assert spread > 0


def test_few_shot_of_separated_classes_is_perfect_and_too_few_images_are_said():
    labels = torch.arange(40) % 4
    rows = F.one_hot(labels).float()
    assert knn.few_shot(rows, labels, rows, labels, shots=2) == (1.0, 0.0)
    with pytest.raises(BadInput, match="11 shots.*only 10"):
        knn.few_shot(rows, labels, rows, labels, shots=11)
