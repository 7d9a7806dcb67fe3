"""ISL around a MoCo: its identities, its queue mask, its bank, its hard positives, each against
loops.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from moco_isl.bank import FeatureBank, QueueSlots
from moco_isl.builder import Instance
from moco_isl.errors import BadInput
from moco_isl.isl import ISL
from moco_isl.miners.knn import KNNMiner
from moco_isl.miners.none import NoMiner
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.record import one_line
from tests.test_builder import C, K, M, images, moco, tiny

T = 0.2


def unit(n, seed):
    return F.normalize(torch.randn(n, C, generator=torch.Generator().manual_seed(seed)), dim=1)


def with_sets(**options):
    isl = ISL(moco(), M, **options)
    src = torch.tensor([0, 0, 1, 4, 4, 4])
    dst = torch.tensor([3, 9, 2, 5, 6, 19])
    isl.positives = PositiveSets.from_edges(M, src, dst)
    isl.bank.fill(unit(M, 5))
    return isl


def fill_queue(isl):
    """Every slot of the queue holds a key of a known image, some images twice."""
    index = torch.arange(K) % M
    for part in index.split(M):
        isl.slots.write(isl.model.enqueue(unit(len(part), int(part[0]))), part)
    return index


def test_mask_off_and_no_positives_is_mocos_cross_entropy():
    """Value and gradient, with ISL active."""
    isl, model = ISL(moco(), M, mask=False, hpe=0), moco()
    loss = isl(images(6, 0), images(6, 1), torch.arange(6))
    truth = F.cross_entropy(*model(images(6, 0), images(6, 1)))
    loss.backward(), truth.backward()
    assert loss.item() == pytest.approx(truth.item(), abs=1e-6)
    for mine, theirs in zip(isl.model.encoder_q.parameters(), model.encoder_q.parameters()):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)


@pytest.mark.parametrize(
    "form, recenter, between",
    [("logsum", True, 0), ("logsum", False, 3), ("meanlog", True, 3), ("meanlog", False, 0)],
)
def test_queue_loss_equals_loops(form, recenter, between):
    isl = with_sets(form=form, hpe=0.5, recenter=recenter, between=between)
    zone = {0: [1, 8], 4: [2, 3, 7]} if between else {}
    isl.zone = PositiveSets.from_edges(
        M,
        torch.tensor([i for i in zone for _ in zone[i]]).long(),
        torch.tensor(sum(zone.values(), [])).long(),
        symmetric=False,
    )
    owner = fill_queue(isl)
    index = torch.tensor([0, 1, 4, 7])  # sets of 2, 1, 3 and none
    q, k = unit(4, 11).requires_grad_(), unit(4, 12)
    loss = isl._queue_loss(q, k, index)
    queue, bank = isl.model.queue, isl.bank.rows
    shift = sum(queue[:, j] for j in range(K)) / K - sum(bank) / M
    shown = [(v + shift) / (v + shift).norm() for v in bank] if recenter else bank
    total = 0
    sets = {0: [3, 9], 1: [2], 4: [5, 6, 19], 7: []}
    for row, i in enumerate(index.tolist()):
        kept = [j for j in range(K) if owner[j] != i and owner[j] not in sets[i] + zone.get(i, [])]
        assert len(kept) < K
        negative = sum(torch.exp(q[row] @ queue[:, j] / T) for j in kept)
        positive = [torch.exp(q[row] @ v / T) for v in [k[row], *(shown[j] for j in sets[i])]]
        if form == "logsum":
            total = total - torch.log(sum(positive) / (sum(positive) + negative))
        else:
            total = total - sum(torch.log(p / (sum(positive) + negative)) for p in positive) / len(
                positive
            )
        h = shown[min(sets[i], key=lambda j: float(bank[j] @ bank[i]))] if sets[i] else k[row]
        p_h = torch.stack([h @ queue[:, j] / T for j in kept]).softmax(0)
        p_i = torch.stack([q[row] @ queue[:, j] / T for j in kept]).softmax(0)
        total = total + 0.5 * sum(p_h * torch.log(p_h / p_i))
    assert loss.item() == pytest.approx(total.item() / 4, abs=1e-5)
    mine = torch.autograd.grad(loss, q, retain_graph=True)[0]
    truth = torch.autograd.grad(total / 4, q)[0]
    assert torch.allclose(mine, truth, atol=1e-5)


def test_positives_move_with_the_keys_that_the_bank_has_not_yet_followed():
    for recenter in (True, False):
        isl = with_sets(recenter=recenter)
        fill_queue(isl)
        isl.model.queue.copy_(F.normalize(isl.model.queue + unit(1, 99)[0][:, None], dim=0))
        rows = isl._recentered(isl.bank.rows[None])[0]
        away, before = (
            float((x.mean(0) - isl.model.queue.mean(1)).norm()) for x in (rows, isl.bank.rows)
        )
        assert torch.allclose(rows.norm(dim=1), torch.ones(M)) and before > 0.5
        assert away < 0.4 * before if recenter else away == before


def shift_of(isl):
    """By how much positives are moved before they are made unit again, seen at a row of zeros."""
    bank, isl.bank.rows = isl.bank.rows, torch.zeros(M, C)
    moved = isl._recentered(torch.zeros(1, 1, C))[0, 0]
    isl.bank.rows = bank
    return moved


def keys_alike(n, seed):
    """[n, C]: keys as a network makes them, with a direction in common."""
    return F.normalize(unit(n, seed) + 2 * torch.eye(C)[0], dim=1)


def test_only_rows_that_hold_keys_count_for_the_queues_mean():
    """On a new queue positives stay as they are; then the mean is over what was written, until all
    is. K is 24.
    """
    isl, written = with_sets(), []
    assert torch.equal(isl._recentered(isl.bank.rows[None])[0], isl.bank.rows)
    for number, n in enumerate((5, 5, 10, 4, 7)):
        keys = keys_alike(n, number)
        isl.slots.write(isl.model.enqueue(keys), torch.arange(n))
        written += [*keys]
        mean = sum(written[-K:]) / len(written[-K:])
        assert torch.allclose(shift_of(isl), mean / mean.norm(), atol=1e-6)
    assert isl.slots.held == K


@pytest.mark.parametrize("ptr", [0, 5, 12])
@pytest.mark.parametrize("written", [True, False])
def test_of_a_queue_from_elsewhere_all_keys_count_and_no_random_row(ptr, written):
    """MoCo's files do not say how far a queue was written; a network's keys have a direction in
    common, random rows have none.
    """
    isl, state = with_sets(), moco().state_dict()
    rows = (
        keys_alike(K, 1) if written else torch.cat([keys_alike(ptr, 1), state["queue"].t()[ptr:]])
    )
    isl.model.load_state_dict({**state, "queue": rows.t(), "queue_ptr": torch.tensor([ptr])})
    keys = K if written else ptr
    assert torch.allclose(
        shift_of(isl), F.normalize(sum(rows[:keys], torch.zeros(C)), dim=0), atol=1e-6
    )
    assert isl.slots.held == keys


@pytest.mark.parametrize("steps", [0, 2, 5])
def test_a_state_of_before_tells_keys_by_their_owners(steps):
    """Such a state does not say how many slots hold keys.

    With five steps of five the queue has gone round, by one slot.
    """
    isl, other = with_sets(), with_sets()
    for step in range(steps):
        isl.slots.write(isl.model.enqueue(unit(5, step)), torch.arange(5) + step % 4 * 5)
    shift = shift_of(isl)
    state = isl.state_dict()
    del state["slots"]["held"]
    other.model.load_state_dict(isl.model.state_dict())
    other.load_state_dict(state)
    assert torch.equal(shift_of(other), shift) and other.slots.held == isl.slots.held == min(
        5 * steps, K
    )


@pytest.mark.parametrize("views", [1, 2])
def test_owners_of_another_run_are_masked_as_its_own(views):
    """Whose each slot is can be read off a file; more keys of an image than a visit leaves are all
    remembered.
    """
    g = torch.Generator().manual_seed(0)
    owner = torch.randint(-1, M, (K,), generator=g)
    owner[:5] = 3
    slots = QueueSlots(M, K, views)
    slots.take_over(owner, oldest=7)
    for round_ in range(3):
        mask = torch.zeros(M, K + 1, dtype=torch.bool)
        mask.scatter_(
            1, slots.absent(torch.arange(M)[:, None], torch.ones(M, 1, dtype=torch.bool)), True
        )
        assert all(mask[i, j] == (owner[j] == i) for i in range(M) for j in range(K))
        where, index = (torch.arange(6) + 7 + 6 * round_) % K, torch.randperm(M, generator=g)[:6]
        slots.write(where, index)
        owner[where] = index
    again = QueueSlots(M, K, views)
    again.load_state_dict(slots.state_dict())
    assert all(
        torch.equal(value, again.state_dict()[name])
        for name, value in slots.state_dict().items()
        if name != "held"
    )


def test_the_mean_of_many_rows_is_of_some_of_them():
    bank = FeatureBank()
    bank.fill(unit(M, 0))
    assert torch.allclose(bank.mean(), bank.rows.mean(0)) and torch.allclose(
        bank.mean(most=M // 3), bank.rows[::3].mean(0)
    )


def test_edge_weights_reach_the_loss():
    isl = with_sets(hpe=0)
    q, k, index = unit(2, 1), unit(2, 2), torch.tensor([0, 4])
    before = isl._queue_loss(q, k, index)
    isl.positives.weights.mul_(0.1)
    assert not torch.allclose(isl._queue_loss(q, k, index), before)


@pytest.mark.parametrize(("K_slots", "views"), [(24, 1), (50, 1), (24, 2)])
def test_queue_mask_equals_loops(K_slots, views):
    """Over three epochs in new orders, with a queue shorter and longer than the data set, and two
    keys an image.
    """
    slots = QueueSlots(M, K_slots, views)
    owner, ptr, g = [None] * K_slots, 0, torch.Generator().manual_seed(0)
    for _ in range(3):
        for batch in torch.randperm(M, generator=g).split(6):
            for _ in range(views):
                where = torch.tensor([(ptr + i) % K_slots for i in range(len(batch))])
                slots.write(where, batch)
                for i, s in zip(batch.tolist(), where.tolist()):
                    owner[s] = i
                ptr += len(batch)
            rows = torch.randint(M, (5, 3), generator=g)
            present = torch.rand(5, 3, generator=g) < 0.7
            absent = slots.absent(rows, present)
            mask = torch.zeros(5, K_slots + 1, dtype=torch.bool).scatter_(1, absent, True)[:, :-1]
            for r in range(5):
                wanted = {int(i) for i, here in zip(rows[r], present[r]) if here}
                assert mask[r].tolist() == [o in wanted for o in owner]


def test_bank_update_is_eq_8():
    bank = FeatureBank()
    assert not bank.filled
    bank.fill(unit(M, 0))
    before, new = bank.rows.clone(), unit(3, 1)
    bank.update(torch.tensor([4, 0, 7]), new, mix=0.25)
    for row, i in enumerate([4, 0, 7]):
        mixed = 0.75 * before[i] + 0.25 * new[row]
        assert torch.allclose(bank.rows[i], mixed / mixed.norm(), atol=1e-6)
    assert torch.equal(bank.rows[1], before[1])
    bank.update(torch.tensor([2]), new[:1], mix=1.0)
    assert torch.equal(bank.rows[2], new[0])


def test_the_mean_cosine_is_that_of_all_pairs_that_steps_left():
    isl = with_sets()
    assert math.isnan(isl.mean_cosine())
    for keys in (5, K):
        queue = isl.model.queue.t()[:keys]
        isl.slots.owner[:keys] = 0
        assert isl.mean_cosine() == pytest.approx(
            sum(float(a @ b) for a in queue for b in queue) / keys**2, abs=1e-5
        )
    bank = ISL(Instance(tiny, C), M)
    bank.bank.fill(unit(1, 0).expand(M, C))
    assert bank.mean_cosine() == pytest.approx(1)


def test_state_moves_last():
    """The keys of a step are not among its own negatives or bank rows, and are there for the next
    one.
    """
    isl = with_sets()
    index = torch.tensor([0, 1, 4])
    q, k = isl.model.encode(images(3, 0), images(3, 1))
    isl.encode = lambda *_, **__: (q, k)
    expected = isl._queue_loss(q, k, index).item()
    assert isl(images(3, 0), images(3, 1), index).item() == pytest.approx(expected)
    assert torch.equal(isl.model.queue[:, :3].t(), k) and isl.slots.owner[:3].tolist() == [0, 1, 4]
    assert torch.equal(isl.bank.rows[index], k)


def test_symmetric_uses_both_views():
    isl = ISL(moco(), M, symmetric=True, active=False)
    im_1, im_2 = images(4, 0), images(4, 1)
    one, other = moco(), moco()
    other._momentum_update_key_encoder = lambda: None
    loss = isl(im_1, im_2, torch.arange(4))
    truth = F.cross_entropy(*one(im_1, im_2)) + F.cross_entropy(*other(im_2, im_1))
    assert loss.item() == pytest.approx(truth.item(), abs=1e-5)
    loss.backward(), truth.backward()
    for mine, *both in zip(*(model.encoder_q.parameters() for model in (isl.model, one, other))):
        assert torch.allclose(mine.grad, sum(p.grad for p in both), atol=1e-5), (
            "the step of MoCo's notebook at the same learning rate"
        )
    assert int(isl.model.queue_ptr) == 8 and isl.slots.owner[:8].tolist() == [0, 1, 2, 3] * 2


def test_symmetric_in_closed_form():
    """Queue and keys all alike: each direction has log(1 + K), MoCo's sum 2 log(1 + K). With one
    positive, as alike: -log(2 / (2 + K)) each way, and 0 by Eq. 6. Half of it for a run that began
    with the mean.
    """
    for options, views in (
        ({}, 1),
        ({"symmetric": True}, 2),
        ({"symmetric": True, "symmetric_sum": False}, 1),
    ):
        isl = ISL(moco(), M, mask=False, recenter=False, **options)
        alike = unit(1, 0)
        isl.model.queue.copy_(alike.t().expand(C, K))
        isl.bank.fill(alike.expand(M, C))
        isl.encode = lambda *_, symmetric: (alike.expand(4 * (1 + symmetric), C),) * 2
        for positives, wanted in ((None, math.log(1 + K)), (1, math.log(1 + K / 2))):
            if positives:
                isl.positives = PositiveSets.from_edges(
                    M, torch.arange(M), (torch.arange(M) + 1) % M, symmetric=False
                )
            loss = isl(images(4, 0), images(4, 1), torch.arange(4))
            assert loss.item() == pytest.approx(views * wanted, abs=1e-5)
            assert isl.parts["loss"] == isl.parts["isl"] == loss and isl.parts["acc1"] == 100
            assert isl.parts["hpe"] == pytest.approx(0, abs=1e-5)


def test_symmetric_parts_add_up_to_the_loss():
    isl, half = (ISL(moco(), M, symmetric=True, symmetric_sum=both) for both in (True, False))
    for x in (isl, half):
        fill_queue(x)
        loss = x(images(4, 0), images(4, 1), torch.arange(4))
        assert loss.item() == pytest.approx(
            float(x.parts["isl"] + x.hpe * x.parts["hpe"]), abs=1e-5
        )
    assert half.parts["hpe"] > 0 and isl.parts["acc1"] == half.parts["acc1"]
    assert all(isl.parts[name] == 2 * half.parts[name] for name in ("loss", "isl", "hpe"))


def test_a_large_set_takes_turns():
    isl = ISL(moco(), M, P=2)
    isl.positives = PositiveSets.from_edges(
        M, torch.zeros(5, dtype=torch.long), torch.arange(1, 6), symmetric=False
    )
    seen = set()
    for turn in range(3):
        pos, weight = isl.positives.lookup(torch.tensor([0]), isl.P, turn)
        assert weight.tolist() == [[1, 1]]
        seen |= set(pos[0].tolist())
    assert seen == {1, 2, 3, 4, 5}


def test_mine_replaces_sets_and_fills_the_bank():
    isl, features = ISL(moco(), M), unit(M, 3)
    report = isl.mine(features, KNNMiner(k=2, budget=2, max_share=1.0))
    assert isl.round == 1 and report["mean_size"] == isl.positives.mean_size > 0
    assert torch.equal(isl.bank.rows, features)
    isl.bank.rows.zero_()
    isl.mine(features, NoMiner())
    assert isl.round == 2 and not isl.bank.rows.any(), (
        "a bank that holds features is not overwritten"
    )


def test_a_miner_of_ones_own_needs_no_views():
    class Pairs(NoMiner):
        def mine(self, features, positives, rng, tick=None):
            return PositiveSets.from_edges(M, torch.arange(3), torch.arange(3) + 1)

    isl = ISL(moco(), M)
    isl.mine(unit(M, 3), Pairs())
    assert isl.positives.num_edges == 6
    with pytest.raises(TypeError, match="views"):
        isl.mine(unit(M, 3), Pairs(), views=(unit(M, 1), unit(M, 2)))
    with pytest.raises(BadInput, match="do not fit features of shape"):
        isl.mine(unit(M, 3), KNNMiner(), views=(unit(M, 1), unit(M - 1, 2)))


@pytest.mark.parametrize("n", [1, 5, 100])
def test_what_is_in_between_equals_loops(n):
    isl, features = ISL(moco(), M, between=n), unit(M, 3)
    report = isl.mine(features, KNNMiner(k=2, budget=2, max_share=1.0))
    sets, zone = (
        {i: set(x.members[x.offsets[i] : x.offsets[i + 1]].tolist()) for i in range(M)}
        for x in (isl.positives, isl.zone)
    )
    for i in range(M):
        nearest = sorted(set(range(M)) - {i}, key=lambda j: -float(features[i] @ features[j]))[:n]
        assert zone[i] == set(nearest) - sets[i]
    assert report["between"] == sum(map(len, zone.values())) / M
    assert ("in between" in one_line({**report, "seconds": 0.0})) and (
        n > 2 or isl.zone.num_edges < M
    )


def test_a_zone_needs_a_queue_and_its_mask():
    with pytest.raises(BadInput, match="need a MoCo"):
        ISL(Instance(tiny, C), M, between=3)
    with pytest.raises(BadInput, match="mask=True"):
        ISL(moco(), M, between=3, mask=False)


def test_bank_objective_trains_and_updates_its_rows():
    torch.manual_seed(0)
    isl = ISL(Instance(tiny, C, T=0.1), M, hpe=0.5)
    assert isl.bank.filled
    before, index = isl.bank.rows.clone(), torch.arange(4)
    loss = isl(images(4, 0), images(4, 1), index)
    loss.backward()
    f = F.normalize(isl.model.encoder_q(images(4, 0)), dim=1)
    p = (f @ before.t() / 0.1).softmax(1)
    assert isl.parts["isl"].item() == pytest.approx(-p[index, index].log().mean().item(), abs=1e-5)
    assert torch.allclose(isl.bank.rows[:4], F.normalize((before[:4] + f) / 2, dim=1), atol=1e-6)
    assert torch.equal(isl.bank.rows[4:], before[4:])


@pytest.mark.parametrize("between", [0, 4])
def test_state_dict_round_trip(between):
    isl, fresh = with_sets(between=between), ISL(moco(), M, between=between)
    if between:
        isl.zone = PositiveSets.from_edges(
            M, torch.arange(12), torch.arange(12) + 3, symmetric=False
        )
    isl(images(6, 0), images(6, 1), torch.arange(6))
    fresh.model.load_state_dict(isl.model.state_dict())
    fresh.load_state_dict(isl.state_dict())
    step = lambda x: x(images(6, 2), images(6, 3), torch.arange(6, 12)).item()
    assert step(fresh) == step(isl)
