"""Chunked search against the whole matrix, and the baselines against counting."""

import pytest
import torch
import torch.nn.functional as F

from moco_isl.mining.baselines import baselines
from moco_isl.ops import neighbors
from moco_isl.ops.neighbors import top_pairs, topk


def rows(M: int, C: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(M, C, generator=torch.Generator().manual_seed(seed)), dim=1)


def loop_topk(queries, bank, k, exclude=None):
    """By sorting (falling cosine, row) of the whole row."""
    scores = queries @ bank.T
    out = []
    for i, row in enumerate(scores.tolist()):
        order = sorted(
            (j for j in range(len(row)) if exclude is None or j != exclude[i]),
            key=lambda j: (-row[j], j),
        )
        out.append(order[:k])
    return torch.tensor(out), scores


@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("limit", [None, 40_000])  # 40,000 bytes: many chunks of queries
@pytest.mark.parametrize("exclude", [False, True])
def test_topk_equals_the_whole_matrix(k, limit, exclude, monkeypatch):
    bank, queries = rows(3000), rows(37, seed=1)
    own = torch.arange(37) * 50 if exclude else None
    if exclude:
        own[3] = -1
        queries[5] = bank[250]
    monkeypatch.setattr(neighbors, "_COLUMNS", {"cpu": 512 if limit else 65536})
    cosine, index = topk(queries, bank, k, own, limit)
    expected, scores = loop_topk(queries, bank, k, own)
    assert torch.equal(index, expected)
    assert torch.allclose(cosine, scores.gather(1, expected), atol=1e-6)


def test_topk_orders_equal_rows_by_index():
    bank = rows(5).repeat(40, 1)  # rows i, i + 5, i + 10, ... are the same
    _, index = topk(bank[:5], bank, 6)
    assert [sorted(row) == row and len({j % 5 for j in row}) == 1 for row in index.tolist()] == [
        True
    ] * 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_topk_of_a_half_bank_is_exact_for_what_the_bank_holds(dtype):
    bank = rows(2000, 16).to(dtype)
    cosine, index = topk(bank[:20].float(), bank, 5)
    expected, _ = loop_topk(bank[:20].float(), bank.float(), 5)
    assert torch.equal(index, expected) and cosine.dtype == torch.float32


def test_topk_refuses_a_small_bank_and_asks_tick():
    with pytest.raises(ValueError, match="bank of 4"):
        topk(rows(2), rows(4), 4, exclude=torch.tensor([0, 1]))

    class Stop(Exception):
        pass

    def tick():
        raise Stop

    with pytest.raises(Stop):
        topk(rows(2), rows(4), 2, tick=tick)


@pytest.mark.parametrize("total", [1, 50, 5000, 79800])
def test_top_pairs_equals_sorting_all(total):
    features = rows(400, 4)
    cosine, a, b = top_pairs(features, total, bytes_limit=100_000)
    scores = features @ features.T
    i, j = torch.triu_indices(400, 400, 1)
    best = scores[i, j].sort(descending=True).values[:total]
    assert torch.allclose(cosine, best, atol=1e-6) and bool((a < b).all())
    assert len({(x, y) for x, y in zip(a.tolist(), b.tolist())}) == total
    assert torch.allclose(scores[a, b], cosine, atol=1e-6)


def test_top_pairs_lowers_a_bound_guessed_too_high(monkeypatch):
    features = rows(300, 4)
    expected = top_pairs(features, 1000)
    monkeypatch.setattr(neighbors, "_guess_bound", lambda *_: 0.999)
    found = top_pairs(features, 1000)
    assert all(torch.equal(x, y) for x, y in zip(found, expected))
    with pytest.raises(ValueError, match="make 44850"):
        top_pairs(features, 44851)


# every third label is unknown, its pairs are not counted
@pytest.mark.parametrize("unknown", [0, 3])
def test_baselines_equal_counting(unknown):
    M = 200
    features, labels = rows(M, 3), torch.arange(M) % 4
    if unknown:
        labels[::unknown] = -1
    sizes = [1, 2.5, 7]
    found = baselines(features, labels, sizes)
    scores = (features @ features.T).fill_diagonal_(-2)
    near = scores.sort(dim=1, descending=True)

    def share(pairs):
        known = [(i, j) for i, j in pairs if labels[i] >= 0 and labels[j] >= 0]
        return sum(int(labels[i] == labels[j]) for i, j in known) / len(known)

    for size, own in zip(sizes, found["own_nearest"]):
        whole, extra = int(size), round((size - int(size)) * M)
        last = near.values[:, whole].sort(descending=True).indices[:extra].tolist()
        pairs = [(i, int(j)) for i in range(M) for j in near.indices[i, :whole]] + [
            (i, int(near.indices[i, whole])) for i in last
        ]
        assert own == pytest.approx(share(pairs))
    i, j = torch.triu_indices(M, M, 1)
    order = scores[i, j].sort(descending=True).indices
    for size, pairs in zip(sizes, found["all_pairs"]):
        best = order[: round(size * M / 2)]
        assert pairs == pytest.approx(share(zip(i[best].tolist(), j[best].tolist())))
    assert found["sizes"] == [1, 2.5, 7]
    assert set(baselines(features, labels, [3], pairs=False)) == {"sizes", "own_nearest"}
