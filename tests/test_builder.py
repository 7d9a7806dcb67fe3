"""The drop-in contract: MoCo's state-dict keys, its forward, and its loss sequence against an
independent MoCo written with loops.
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from moco_isl.builder import MoCo
from moco_isl.encoders import split_batch_norm
from moco_isl.isl import ISL
from moco_isl.objectives.base import Objective
from moco_isl.training import fast
from tests.ranks import run_ranks

C, K, M = 8, 24, 20


def tiny(num_classes=C):
    """An encoder without batch norm, so that two ranks can equal one process."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 16), nn.ReLU())
    net.add_module("fc", nn.Linear(16, num_classes))
    return net


def images(n, seed):
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("mlp", "count"), [(False, 246), (True, 250)])
def test_state_dict_keys_are_mocos(mlp, count):
    """The stored list is that of `moco.builder.MoCo` around torchvision's ResNet-18."""
    stored = dict(
        line.split()
        for line in (
            (Path(__file__).parent / "data" / "moco_resnet18_keys.txt").read_text().splitlines()
        )
    )
    stored = {
        name: shape
        for name, shape in stored.items()
        if (".fc.0" in name or ".fc.2" in name) <= mlp
        and not (mlp and name.endswith(("fc.weight", "fc.bias")))
    }
    model = MoCo(torchvision.models.resnet18, 128, 512, mlp=mlp)
    found = {
        name: "x".join(map(str, value.shape)) or "-" for name, value in model.state_dict().items()
    }
    assert len(found) == count
    assert found == stored


def test_forward_is_mocos():
    """logits, labels, the enqueued keys and the momentum step, each by its formula; the queue wraps
    around and K need not be a multiple.
    """
    torch.manual_seed(0)
    model = MoCo(tiny, C, K, m=0.9, T=0.2)
    for step in range(5):
        im_q, im_k = images(7, 2 * step), images(7, 2 * step + 1)
        queue, ptr = model.queue.clone(), int(model.queue_ptr)
        keys = [
            0.9 * k + 0.1 * q
            for k, q in zip(model.encoder_k.parameters(), model.encoder_q.parameters())
        ]
        logits, labels = model(im_q, im_k)
        for mine, truth in zip(model.encoder_k.parameters(), keys):
            assert torch.allclose(mine, truth, atol=1e-6)
        q, k = F.normalize(model.encoder_q(im_q), dim=1), F.normalize(model.encoder_k(im_k), dim=1)
        for i in range(7):
            row = [q[i] @ k[i]] + [q[i] @ queue[:, j] for j in range(K)]
            assert torch.allclose(logits[i], torch.stack(row) / 0.2, atol=1e-5)
        assert labels.tolist() == [0] * 7
        for i in range(7):
            queue[:, (ptr + i) % K] = k[i]
        assert torch.equal(model.queue, queue) and int(model.queue_ptr) == (ptr + 7) % K
        with torch.no_grad():
            for p in model.encoder_q.parameters():
                p.add_(0.05)  # so that the next momentum step has somewhere to go


def test_the_key_encoder_follows_whatever_became_of_the_parameters():
    """Which parameters follow which is kept from step to step; not past a change of the objects."""
    model = MoCo(tiny, C, K, m=0.5)
    model.encode(images(4, 0), images(4, 1))

    def assert_follows(model):
        with torch.no_grad():
            for p in model.encoder_q.parameters():
                p.add_(1.0)
        wanted = [
            (k + q) / 2 for k, q in zip(model.encoder_k.parameters(), model.encoder_q.parameters())
        ]
        kept = model._pairs
        model.encode(images(4, 0).to(wanted[0].dtype), images(4, 1).to(wanted[0].dtype))
        assert all(torch.allclose(k, w) for k, w in zip(model.encoder_k.parameters(), wanted))
        return model._pairs is kept

    assert assert_follows(model), "looked for once"
    copied = copy.deepcopy(model)
    before = [p.clone() for p in model.parameters()]
    assert_follows(copied)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before)), (
        "a copy moves its own parameters"
    )
    model.load_state_dict(copied.state_dict(), assign=True)  # other objects
    model.requires_grad_(True).copy_query_to_key()
    assert_follows(model)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()  # other objects again
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert_follows(model)
    model.encoder_q.fc = torch.nn.Linear(16, C).double()
    model.train()
    assert_follows(model)


def test_key_encoder_starts_as_a_copy_without_gradient():
    model = MoCo(tiny, C, K)
    assert all(
        torch.equal(q, k) and not k.requires_grad
        for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters())
    )


class MoCoByHand:
    """MoCo v2 in loops over images and keys, with SGD written out; imports nothing of the
    package.
    """

    def __init__(self, encoder_q, encoder_k, queue, m, T, lr, momentum):
        self.q = encoder_q
        self.k = encoder_k
        self.queue = [*queue.clone()]
        self.m = m
        self.T = T
        self.lr = lr
        self.momentum = momentum
        self.velocity = [torch.zeros_like(p) for p in encoder_q.parameters()]
        self.ptr = 0

    def step(self, im_q, im_k):
        with torch.no_grad():
            for p_k, p_q in zip(self.k.parameters(), self.q.parameters()):
                p_k.copy_(self.m * p_k + (1 - self.m) * p_q)
        loss, keys = 0, []
        for i in range(len(im_q)):
            q, k = self.q(im_q[i : i + 1])[0], self.k(im_k[i : i + 1])[0].detach()
            q, k = q / q.norm(), k / k.norm()
            others = sum(torch.exp(q @ key / self.T) for key in self.queue)
            own = torch.exp(q @ k / self.T)
            loss = loss - torch.log(own / (own + others)) / len(im_q)
            keys.append(k)
        grads = torch.autograd.grad(loss, list(self.q.parameters()))
        with torch.no_grad():
            for p, v, g in zip(self.q.parameters(), self.velocity, grads):
                v.mul_(self.momentum).add_(g)
                p.sub_(self.lr * v)
        for k in keys:
            self.queue[self.ptr % len(self.queue)] = k
            self.ptr += 1
        return loss.item()


def losses(isl_or_model, steps, optimizer, batch=slice(None)):
    found = []
    for step in range(steps):
        im_q, im_k = images(6, 10 + step), images(6, 20 + step)
        index = (torch.arange(6) + 6 * step) % M
        if isinstance(isl_or_model, Objective):
            loss = isl_or_model(im_q[batch], im_k[batch], index[batch])
        else:
            loss = F.cross_entropy(*isl_or_model(im_q[batch], im_k[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def moco(seed=1):
    torch.manual_seed(seed)
    return MoCo(tiny, C, K, m=0.9, T=0.2)


def sgd(model):
    return torch.optim.SGD(model.encoder_q.parameters(), 0.5, momentum=0.9)


@pytest.mark.parametrize("front", ["forward", "isl"])
def test_without_mining_it_trains_moco(front):
    model, other = moco(), moco()
    by_hand = MoCoByHand(other.encoder_q, other.encoder_k, other.queue.t(), 0.9, 0.2, 0.5, 0.9)
    truth = [by_hand.step(images(6, 10 + s), images(6, 20 + s)) for s in range(8)]
    mine = losses(ISL(model, M, active=False) if front == "isl" else model, 8, sgd(model))
    assert mine == pytest.approx(truth, abs=1e-5)
    assert truth[0] != pytest.approx(truth[-1], abs=1e-3), (
        "it must have trained for this to say anything"
    )


def _two_ranks(rank, world, active):
    # as moco(); made here, since DistributedDataParallel wants the process group
    torch.manual_seed(1)
    model = MoCo(tiny, C, K, m=0.9, T=0.2)
    isl = _with_positives(ISL(model, M), active)
    share = losses(isl, 6, sgd(model), slice(rank * 3, rank * 3 + 3))
    return share, model.state_dict(), isl.state_dict()


def _with_positives(isl, active):
    from moco_isl.mining.positives import PositiveSets

    isl.active = active
    if active:
        src = torch.arange(M)
        isl.positives = PositiveSets.from_edges(
            M, torch.cat([src, src]), torch.cat([(src + 3) % M, (src + 5) % M])
        )
        isl.bank.fill(
            F.normalize(torch.randn(M, C, generator=torch.Generator().manual_seed(2)), dim=1)
        )
    return isl


@pytest.mark.parametrize("active", [False, True])
def test_two_ranks_equal_one_process(active):
    """Mean of the ranks' losses, weights, queue, bank, slots and positives; for an encoder without
    batch norm.
    """
    model = moco()
    isl = _with_positives(ISL(model, M), active)
    truth = losses(isl, 6, sgd(model))
    (first, state, isl_state), (second, state_2, isl_state_2) = run_ranks(2, _two_ranks, active)
    assert [(a + b) / 2 for a, b in zip(first, second)] == pytest.approx(truth, abs=1e-5)
    for mine, theirs in ((state, state_2), (_flat(isl_state), _flat(isl_state_2))):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), "ranks differ"
    for mine, one in ((state, model.state_dict()), (_flat(isl_state), _flat(isl.state_dict()))):
        for name, value in one.items():
            assert torch.allclose(mine[name].double(), value.double(), atol=1e-5), name


def _flat(state, prefix=""):
    flat = {}
    for name, value in state.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            flat[prefix + name] = value
    return flat


def test_logits_in_half_precision_are_divided_in_single():
    """Autocast's products are float16, which ends at 65,504: at T 1e-5 any cosine above 0.66 was an
    infinite logit.
    """
    torch.manual_seed(0)
    model = MoCo(tiny, C, K, T=1e-5)
    with torch.autocast("cpu", torch.float16):
        logits, _ = model(images(4, 0), images(4, 0))
    assert logits.dtype == torch.float32 and logits[:, 0].tolist() == pytest.approx(
        [1e5] * 4, rel=2**-10
    )


# ---- shuffling BN on one device ------------------------------------------------------------------


def in_parts(splits):
    """A MoCo whose batch norm takes `splits` parts of a batch, in float64; the key encoder stays
    where it is.
    """

    def encoder(num_classes=C):
        stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())  # [N, 4, 2, 2]
        net = nn.Sequential(stem, nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())
        net.add_module("fc", nn.Linear(16, num_classes))
        return split_batch_norm(net, splits)

    torch.manual_seed(1)
    return MoCo(encoder, C, K, m=1.0).double()


def changed_by_image_3(model, seed, part=slice(None), layout=torch.contiguous_format, **options):
    """Which queries and which keys of 32 change, where both views of image 3 do."""
    encoded = []
    for other in (0, 1):
        views = [images(32, 5).double(), images(32, 6).double()]
        for view in views:
            view[3] *= 1 - other
        torch.manual_seed(seed)
        encoded.append(
            model.encode(
                *(view[part].contiguous(memory_format=layout) for view in views), **options
            )
        )
    return [(a != b).any(1).nonzero().squeeze(1).tolist() for a, b in zip(*encoded)]


def test_a_key_is_not_normalised_with_the_images_of_its_query():
    """The query of an image tells a key by the statistics that they share. Of 8 parts, queries 3,
    11, 19 and 27 are one, and keys 3 and three random ones. Of 100 draws each other key is with key
    3 in 3 / 31, which is 10 +- 3, whether its query is with query 3 or not.
    """
    model, met = in_parts(8), torch.zeros(32, dtype=torch.int64)
    for seed in range(100):
        queries, keys = changed_by_image_3(model, seed)
        assert queries == [3, 11, 19, 27] and len(keys) == 4 and 3 in keys
        assert keys != queries
        met[keys] += 1
    assert met[3] == 100 and met.sum() == 400
    others = met[torch.arange(32) != 3]
    assert 2 <= others.min() and others.max() <= 20 and met[[11, 19, 27]].sum() < 60


def test_each_view_of_a_symmetric_step_is_shuffled_by_a_draw_of_its_own():
    for seed in range(3):
        queries, keys = changed_by_image_3(in_parts(8), seed, symmetric=True)
        assert queries == [3, 11, 19, 27, 35, 43, 51, 59] and len(keys) == 8
        first, second = [i for i in keys if i < 32], [i - 32 for i in keys if i >= 32]
        assert (
            3 in first
            and 3 in second
            and [3, 11, 19, 27] not in (first, second)
            and first != second
        )


def test_the_fast_path_shuffles_too(monkeypatch):
    """Compiled encoders, channels last, batches counted at once: what the key encoder is shown is
    still channels last.
    """
    model, shown = in_parts(8).to(memory_format=torch.channels_last), []
    monkeypatch.setattr(
        torch,
        "compile",
        lambda fn, dynamic, options: lambda x, *rest: (shown.append(x), fn(x, *rest))[1],
    )
    fast.count_batches_at_once(model)
    fast.compile_encoders(model, 32)
    queries, keys = changed_by_image_3(model, 0, layout=torch.channels_last)
    assert queries == [3, 11, 19, 27] != keys and 3 in keys and len(keys) == 4
    assert len(shown) == 4 and all(
        x.is_contiguous(memory_format=torch.channels_last) for x in shown
    )


def test_shuffled_keys_are_those_of_their_images():
    """By hand: the encoder on the permuted batch, put back.

    The permutation is one draw of the device's own generator, and none without parts.
    """
    model, im_q, im_k = in_parts(4), images(12, 5).double(), images(12, 6).double()
    torch.manual_seed(7)
    _, k = model.encode(im_q, im_k)
    after = torch.rand(1)
    torch.manual_seed(7)
    order = torch.randperm(12)
    assert torch.equal(torch.rand(1), after)
    shuffled = F.normalize(model.encoder_k(im_k[order]).float(), dim=1)
    assert all(torch.allclose(k[order[place]], shuffled[place]) for place in range(12))
    whole = in_parts(1)
    torch.manual_seed(7)
    _, k = whole.encode(im_q, im_k)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(7)))
    assert torch.allclose(k, F.normalize(whole.encoder_k(im_k).float(), dim=1))


def test_parts_are_looked_for_again_where_layers_may_have_changed():
    model = in_parts(1)
    assert changed_by_image_3(model, 0) == [list(range(32))] * 2
    split_batch_norm(model, 8)
    assert len(changed_by_image_3(model.train(), 0)[1]) == 4 and changed_by_image_3(model, 0)[
        1
    ] != [3, 11, 19, 27]


def _two_ranks_in_parts(rank, world):
    """Image 3 of rank 0's 16 changes; 4 parts a rank."""
    found = changed_by_image_3(in_parts(4), 0, slice(rank * 16, rank * 16 + 16))
    return [[i + rank * 16 for i in rows] for rows in found]


def test_two_ranks_with_parts_shuffle_between_ranks_and_parts():
    (queries, keys), (queries_2, keys_2) = run_ranks(2, _two_ranks_in_parts)
    assert (queries, queries_2) == ([3, 7, 11, 15], [])
    assert len(keys + keys_2) == 4 and 3 in keys and keys_2 and keys != [3, 7, 11, 15]
