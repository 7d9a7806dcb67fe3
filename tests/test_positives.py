"""PositiveSets against sets built by loops: closure, order, lookup, and what is counted over
them.
"""

import math

import pytest
import torch

from moco_isl.mining.positives import PositiveSets


def random_edges(M: int, E: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(n, (E,), generator=g)
    # few distinct values: many ties, which the order must settle
    return draw(M), draw(M), draw(4) / 4 + 0.5, draw(5) / 4 - 0.5


def loop_sets(M, src, dst, weight, sureness, symmetric):
    """image -> [(member, weight, sureness)], by dicts and loops."""
    found = [{} for _ in range(M)]
    for i, j, w, s in zip(src.tolist(), dst.tolist(), weight.tolist(), sureness.tolist()):
        for a, b in ((i, j), (j, i)) if symmetric else ((i, j),):
            if a != b:
                old = found[a].get(b, (-math.inf, -math.inf))
                found[a][b] = max(old[0], w), max(old[1], s)
    return [
        sorted(((j, w, s) for j, (w, s) in row.items()), key=lambda x: (-x[2], x[0]))
        for row in found
    ]


def as_lists(sets: PositiveSets):
    rows = []
    for i in range(sets.num_images):
        part = slice(sets.offsets[i], sets.offsets[i + 1])
        rows.append(
            list(
                zip(
                    sets.members[part].tolist(),
                    sets.weights[part].tolist(),
                    sets.sureness[part].tolist(),
                )
            )
        )
    return rows


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_from_edges_equals_loops(symmetric, dtype):
    M = 30
    src, dst, weight, sureness = random_edges(M, 300)
    kept = src.clone(), dst.clone()
    sets = PositiveSets.from_edges(M, src.to(dtype), dst.to(dtype), weight, symmetric, sureness)
    assert as_lists(sets) == loop_sets(M, src, dst, weight, sureness, symmetric)
    # what was handed in is not written to
    assert torch.equal(src, kept[0]) and torch.equal(dst, kept[1])


def test_missing_values_are_one_and_index_order():
    sets = PositiveSets.from_edges(5, torch.tensor([3, 1, 1, 2]), torch.tensor([1, 4, 3, 2]))
    assert as_lists(sets) == [[], [(3, 1, 0), (4, 1, 0)], [], [(1, 1, 0)], [(1, 1, 0)]]


def test_sureness_of_any_sign_and_infinite_orders():
    values = torch.tensor([-1.5, 0.0, 2.0, -torch.inf, 1e-30, torch.inf, -1e-30])
    sets = PositiveSets.from_edges(8, torch.zeros(7).long(), torch.arange(1, 8), sureness=values)
    assert sets.sureness[:7].tolist() == sorted(values.tolist(), reverse=True)


def test_large_keys_do_not_overflow():
    # M squared is near the end of int64; offsets of that size would not fit, so only the keys are
    # built
    M = 2_000_000_000
    from moco_isl.mining.positives import distinct_edges

    src, dst, _ = distinct_edges(
        M, torch.tensor([M - 1, 5, M - 2]), torch.tensor([M - 2, M - 1, M - 1]), [None], True
    )
    assert src.tolist() == [5, M - 2] and dst.tolist() == [M - 1, M - 1]


def test_edges_outside_are_refused():
    for src, dst in (([0], [5]), ([-1], [2])):
        with pytest.raises(ValueError, match="0 to 4"):
            PositiveSets.from_edges(5, torch.tensor(src), torch.tensor(dst))


def test_counts_equal_loops():
    M = 40
    src, dst, weight, sureness = random_edges(M, 60, seed=3)
    sets = PositiveSets.from_edges(M, src, dst, weight, sureness=sureness)
    rows = as_lists(sets)
    labels = torch.arange(M) % 3
    members = [j for row in rows for j, _, _ in row]
    assert sets.sizes().tolist() == [len(row) for row in rows]
    assert sets.num_edges == len(members) and sets.mean_size == len(members) / M
    assert sets.coverage == pytest.approx(sum(bool(row) for row in rows) / M)
    assert sets.in_degree().tolist() == [members.count(i) for i in range(M)]
    same = sum(labels[i] == labels[j] for i, row in enumerate(rows) for j, _, _ in row)
    assert sets.precision(labels) == pytest.approx(int(same) / len(members))
    labels[::5] = -1  # unknown: not counted, though equal
    known = [
        (i, j) for i, row in enumerate(rows) for j, _, _ in row if labels[i] >= 0 and labels[j] >= 0
    ]
    assert sets.precision(labels) == pytest.approx(
        sum(int(labels[i] == labels[j]) for i, j in known) / len(known)
    )
    assert sets.sources().tolist() == [i for i, row in enumerate(rows) for _ in row]


def test_empty_sets():
    sets = PositiveSets.empty(6)
    pos, weight = sets.lookup(torch.tensor([4, 2]), 3)
    assert pos.tolist() == [[4] * 3, [2] * 3] and weight.tolist() == [[0] * 3] * 2
    assert (sets.num_images, sets.num_edges, sets.mean_size, sets.coverage) == (6, 0, 0, 0)
    assert sets.in_degree().tolist() == [0] * 6 and math.isnan(sets.precision(torch.zeros(6)))
    assert PositiveSets.from_edges(6, torch.tensor([3]), torch.tensor([3])).num_edges == 0


def test_lookup_equals_loops_and_windows_reach_everyone():
    M, P = 25, 3
    src, dst, weight, sureness = random_edges(M, 60, seed=1)
    sets = PositiveSets.from_edges(M, src, dst, weight, sureness=sureness)
    rows = as_lists(sets)
    assert max(map(len, rows)) > 2 * P and min(map(len, rows)) < P  # both cases are there
    index = torch.arange(M).flip(0)
    seen = [set() for _ in range(M)]
    for turn in range(max(map(len, rows))):
        pos, weights = sets.lookup(index, P, turn)
        assert pos.dtype == torch.int64
        for n, i in enumerate(index.tolist()):
            row = [(j, w) for j, w, _ in rows[i]]
            if len(row) > P:
                row = [row[(turn * P + c) % len(row)] for c in range(P)]
            expected = row + [(i, 0.0)] * (P - len(row))
            assert list(zip(pos[n].tolist(), weights[n].tolist())) == expected
            seen[i].update(j for j, w in expected if w)
    assert seen == [{j for j, _, _ in row} for row in rows]


def test_state_goes_through_a_file(tmp_path):
    src, dst, weight, sureness = random_edges(20, 50)
    sets = PositiveSets.from_edges(20, src, dst, weight, sureness=sureness)
    torch.save(sets.state_dict(), tmp_path / "sets")
    again = PositiveSets.from_state(torch.load(tmp_path / "sets", weights_only=True))
    assert as_lists(again.to("cpu")) == as_lists(sets)


def test_millions_of_edges_equal_counting():
    """1.3 million images as in ImageNet, 2 million edges: the counts that the construction must
    give.
    """
    M = 1_281_167
    i = torch.arange(1_000_000)
    sets = PositiveSets.from_edges(
        M, torch.cat([i, i + 1]), torch.cat([i + 1, i]), sureness=torch.rand(2_000_000)
    )
    assert sets.num_edges == 2_000_000 and sets.members.dtype == torch.int32
    sizes = sets.sizes()
    assert (
        sizes[0] == sizes[1_000_000] == 1
        and bool((sizes[1:1_000_000] == 2).all())
        and not sizes[1_000_001:].any()
    )
    pos, _ = sets.lookup(torch.tensor([500_000]), 2)
    assert sorted(pos[0].tolist()) == [499_999, 500_001]
