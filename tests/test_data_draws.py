"""Counted draws: SplitMix64's numbers, uniform, functions of (seed, epoch, index, view) alone."""

import math
import random

import pytest
import torch

from moco_isl.data.draws import hash64, permutation, seeded, uniforms

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(state):
    """Next number of SplitMix64 from its state, in unbounded integers."""
    z = (state + GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_hash_is_splitmix():
    assert hash64(0) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    assert hash64(7, -3) == splitmix((splitmix(7) - 3) & MASK)


def test_uniforms_equal_a_loop_in_unbounded_integers():
    index = torch.tensor([0, 1, 5, 1_281_166, 2**40])
    got = uniforms(3, 2, index, 1, 6)
    key = splitmix((splitmix((splitmix(3) + 2) & MASK) + 1) & MASK)
    for i, position in enumerate(index.tolist()):
        row = splitmix((key + position - GOLDEN) & MASK)  # one mix without the step
        for j in range(6):
            assert got[i, j].item() == (splitmix((row + j * GOLDEN) & MASK) >> 40) / 2**24


def test_uniforms_fill_the_unit_interval_evenly():
    u = uniforms(0, 0, torch.arange(20_000), 0, 8)
    assert u.dtype == torch.float32 and 0 <= u.min() and u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    chi2 = ((counts - 2500) ** 2 / 2500).sum().item()
    assert 63 - 5 * math.sqrt(126) < chi2 < 63 + 5 * math.sqrt(126)


def test_uniforms_of_different_columns_views_epochs_seeds_and_neighbours_are_unrelated():
    index = torch.arange(20_000)
    base = uniforms(0, 0, index, 0, 4)
    others = [(0, 0, index, 1), (0, 1, index, 0), (1, 0, index, 0), (0, 0, index + 1, 0)]
    columns = [*base.T, *(uniforms(*other, 1)[:, 0] for other in others)]
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert correlation.abs().max() < 5 / math.sqrt(20_000)


def test_uniforms_do_not_depend_on_the_batch_or_on_n():
    index = torch.tensor([9, 4, 100, 4])
    whole = uniforms(5, 1, index, 0, 7)
    for row, i in zip(whole, index):
        assert torch.equal(row, uniforms(5, 1, i[None], 0, 7)[0])
    assert torch.equal(whole[:, :3], uniforms(5, 1, index, 0, 3))
    assert torch.equal(whole[1], whole[3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_uniforms_are_equal_on_a_gpu():
    index = torch.arange(1000)
    assert torch.equal(uniforms(1, 2, index, 0, 50), uniforms(1, 2, index.cuda(), 0, 50).cpu())


def test_seeded_gives_the_same_draws_and_leaves_no_trace():
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    seen = []
    for key in ((0, 0, 3, 0), (0, 0, 3, 0), (0, 0, 3, 1), (0, 1, 3, 0), (1, 0, 3, 0), (0, 0, 4, 0)):
        with seeded(*key):
            seen.append((torch.rand(()).item(), random.random()))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert seen[0] == seen[1]
    assert len({a for a, _ in seen}) == len({b for _, b in seen}) == 5


def test_seeded_restores_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        with seeded(0, 0, 0, 0):
            torch.rand(3)
            raise KeyError
    assert torch.equal(before, torch.get_rng_state())


def test_permutation_holds_every_image_once_and_follows_seed_and_epoch():
    orders = [permutation(*key, 50).tolist() for key in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] == orders[3] and orders[0] != orders[1] != orders[2] != orders[0]
