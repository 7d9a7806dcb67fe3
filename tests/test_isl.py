"""ISL around a MoCo: its identities, its queue mask, its bank, its hard positives, each against
loops.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from moco_isl.bank import FeatureBank, QueueSlots
from moco_isl.errors import BadInput
from moco_isl.isl import ISL
from moco_isl.miners.knn import KNNMiner
from moco_isl.miners.none import NoMiner
from moco_isl.mining.positives import PositiveSets
from moco_isl.objectives.bank import Instance
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


@pytest.mark.parametrize("own", [None, 0.4])
@pytest.mark.parametrize("P", [32, 2])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("form", ["logsum", "meanlog"])
def test_queue_loss_equals_loops(form, mask, P, own):
    """Where P is 2, a set of 3 is pulled at in turns; none of it is a negative in any turn."""
    isl = with_sets(form=form, hpe=0.5, mask=mask, P=P, own=own)
    isl.turn = 1
    owner = fill_queue(isl)
    index = torch.tensor([0, 1, 4, 7])  # sets of 2, 1, 3 and none
    q, k = unit(4, 11).requires_grad_(), unit(4, 12)
    loss = isl.loss(q, k, index)["loss"]
    queue, bank = isl.model.queue, isl.bank.rows
    shift = sum(queue[:, j] for j in range(K)) / K - sum(bank) / M
    shown = [(v + shift) / (v + shift).norm() for v in bank]
    total = 0
    sets = {0: [3, 9], 1: [2], 4: [5, 6, 19], 7: []}
    pulled = sets if P > 3 else {**sets, 4: [19, 5]}
    for row, i in enumerate(index.tolist()):
        kept = [j for j in range(K) if not mask or owner[j] not in [i, *sets[i]]]
        assert (len(kept) < K) is mask
        negative = sum(torch.exp(q[row] @ queue[:, j] / T) for j in kept)
        positive = [torch.exp(q[row] @ v / T) for v in [k[row], *(shown[j] for j in pulled[i])]]
        weight = [1.0] * len(positive)
        if own and pulled[i]:
            weight[0] = own / (1 - own) * len(pulled[i])
        if form == "logsum":
            likely = sum(w * p for w, p in zip(weight, positive))
            total = total - torch.log(likely / (likely + negative))
        else:
            logs = [torch.log(p / (sum(positive) + negative)) for p in positive]
            total = total - sum(w * log for w, log in zip(weight, logs)) / sum(weight)
        h = shown[min(sets[i], key=lambda j: float(bank[j] @ bank[i]))] if sets[i] else k[row]
        p_h = torch.stack([h @ queue[:, j] / T for j in kept]).softmax(0)
        p_i = torch.stack([q[row] @ queue[:, j] / T for j in kept]).softmax(0)
        total = total + 0.5 * sum(p_h * torch.log(p_h / p_i))
    assert loss.item() == pytest.approx(total.item() / 4, abs=1e-5)
    mine = torch.autograd.grad(loss, q, retain_graph=True)[0]
    truth = torch.autograd.grad(total / 4, q)[0]
    assert torch.allclose(mine, truth, atol=1e-5)


def test_positives_move_with_the_keys_that_the_bank_has_not_yet_followed():
    isl = with_sets()
    fill_queue(isl)
    isl.model.queue.copy_(F.normalize(isl.model.queue + unit(1, 99)[0][:, None], dim=0))
    rows = isl.moved(isl.bank.rows[None])[0]
    away = lambda x: float((x.mean(0) - isl.model.queue.mean(1)).norm())
    assert torch.allclose(rows.norm(dim=1), torch.ones(M))
    assert away(isl.bank.rows) > 0.5 and away(rows) < 0.4 * away(isl.bank.rows)


def shift_of(isl):
    """By how much positives are moved before they are made unit again, seen at a row of zeros."""
    bank, isl.bank.rows = isl.bank.rows, torch.zeros(M, C)
    moved = isl.moved(torch.zeros(1, 1, C))[0, 0]
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
    assert torch.equal(isl.moved(isl.bank.rows[None])[0], isl.bank.rows)
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
def test_of_a_queue_that_was_written_before_anybody_counted_owners_tell_keys(steps):
    """As by the steps before a first round. The fifth one goes round, by one slot."""
    isl, counting = with_sets(), with_sets()
    counting.moved(counting.bank.rows[None])
    for step in range(steps):
        for x in (isl, counting):
            x.slots.write(x.model.enqueue(unit(5, step)), torch.arange(5) + step % 4 * 5)
    assert isl.slots.held is None and torch.equal(shift_of(isl), shift_of(counting))
    assert isl.slots.held == counting.slots.held == min(5 * steps, K)


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
    for name in ("slots", "visits", "owner"):
        assert torch.equal(slots.state_dict()[name], again.state_dict()[name])


def test_the_mean_of_many_rows_is_of_some_of_them():
    bank = FeatureBank(C)
    bank.fill(unit(M, 0))
    assert torch.allclose(bank.mean(), bank.rows.mean(0)) and torch.allclose(
        bank.mean(most=M // 3), bank.rows[::3].mean(0)
    )


def test_edge_weights_reach_the_loss():
    isl = with_sets(hpe=0)
    q, k, index = unit(2, 1), unit(2, 2), torch.tensor([0, 4])
    before = isl.loss(q, k, index)["loss"]
    isl.positives.weights.mul_(0.1)
    assert not torch.allclose(isl.loss(q, k, index)["loss"], before)


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
    bank = FeatureBank(C)
    assert not bank.filled and not bank.lookup(torch.tensor([[4, 0]])).any()
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
    expected = isl.loss(q, k, index)["loss"].item()
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
    positive, as alike: -log(2 / (2 + K)) each way, and 0 by Eq. 6.
    """
    for symmetric in (False, True):
        isl = ISL(moco(), M, mask=False, symmetric=symmetric)
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
            assert loss.item() == pytest.approx((1 + symmetric) * wanted, abs=1e-5)
            assert isl.parts["loss"] == isl.parts["isl"] == loss and isl.parts["acc1"] == 100
            assert isl.parts["hpe"] == pytest.approx(0, abs=1e-5)


def test_symmetric_parts_add_up_to_the_loss():
    isl = ISL(moco(), M, symmetric=True)
    fill_queue(isl)
    loss = isl(images(4, 0), images(4, 1), torch.arange(4))
    parts = isl.parts
    assert loss.item() == pytest.approx(float(parts["isl"] + isl.hpe * parts["hpe"]), abs=1e-5)
    assert parts["hpe"] > 0


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
    report = isl.mine_features(features, KNNMiner(k=2, budget=2, max_share=1.0))
    assert isl.round == 1 and report.mean_size == isl.positives.mean_size > 0
    assert torch.equal(isl.bank.rows, features)
    isl.bank.rows.zero_()
    isl.mine_features(features, NoMiner())
    assert isl.round == 2 and not isl.bank.rows.any(), (
        "a bank that holds features is not overwritten"
    )


def test_a_miner_of_ones_own_needs_no_views():
    class Pairs(NoMiner):
        def mine(self, features, positives, rng, tick=None):
            return PositiveSets.from_edges(M, torch.arange(3), torch.arange(3) + 1)

    isl = ISL(moco(), M)
    isl.mine_features(unit(M, 3), Pairs())
    assert isl.positives.num_edges == 6
    with pytest.raises(TypeError, match="views"):
        isl.mine_features(unit(M, 3), Pairs(), views=(unit(M, 1), unit(M, 2)))
    with pytest.raises(BadInput, match="do not fit features of shape"):
        isl.mine_features(unit(M, 3), KNNMiner(), views=(unit(M, 1), unit(M - 1, 2)))


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


def test_state_dict_round_trip():
    isl, fresh = with_sets(), ISL(moco(), M)
    isl(images(6, 0), images(6, 1), torch.arange(6))
    fresh.model.load_state_dict(isl.model.state_dict())
    fresh.load_state_dict(isl.state_dict())
    step = lambda x: x(images(6, 2), images(6, 3), torch.arange(6, 12)).item()
    assert step(fresh) == step(isl)


def test_each_round_of_ones_own_loop_has_its_budget():
    isl = ISL(moco(), M)
    miner = KNNMiner(budget=[1, 2, 4], max_share=1.0)
    sizes = [isl.mine_features(unit(M, 0), miner).mean_size for _ in range(4)]
    assert sizes == [1, 2, 4, 4]
