"""The losses against references written with loops, in float64, that nobody can doubt."""

import math

import pytest
import torch
import torch.nn.functional as F

from moco_isl.losses import (
    bank_loss,
    hardest,
    info_nce,
    linear_kl,
    local_aggregation,
    multi_positive_mean_log,
    multi_positive_nce,
    softmax_over,
    with_own_key,
)
from moco_isl.ops.softmax import entropy, stream_softmax
from tests.references import hard_positive_kl

N, S, K = 6, 4, 50


def logits(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    l_pos = (torch.rand(N, S, generator=g, dtype=torch.float64) * 20 - 10).to(dtype)
    l_neg = (torch.rand(N, K, generator=g, dtype=torch.float64) * 20 - 10).to(dtype)
    weight = torch.rand(N, S, generator=g, dtype=torch.float64)
    weight[:, 0] = 1
    weight[0, 1:] = 0  # an image without positives
    weight[1, 2] = 0
    masked = torch.rand(N, K, generator=g) < 0.3
    return l_pos, l_neg.masked_fill(masked, -torch.inf), weight


def nce_by_hand(l_pos, l_neg, weight):
    total = 0
    for i in range(N):
        positive = sum(weight[i, s] * torch.exp(l_pos[i, s]) for s in range(S))
        negative = sum(torch.exp(l_neg[i, j]) for j in range(K) if l_neg[i, j] > -torch.inf)
        total = total - torch.log(positive / (positive + negative))
    return total / N


def mean_log_by_hand(l_pos, l_neg, weight):
    total = 0
    for i in range(N):
        present = [s for s in range(S) if weight[i, s] > 0]
        everything = sum(torch.exp(l_pos[i, s]) for s in present) + sum(
            torch.exp(l_neg[i, j]) for j in range(K) if l_neg[i, j] > -torch.inf
        )
        total = total - sum(
            weight[i, s] * torch.log(torch.exp(l_pos[i, s]) / everything) for s in present
        ) / sum(weight[i, s] for s in present)
    return total / N


def kl_by_hand(l_hard, l_anchor):
    total = 0
    for i in range(N):
        present = [j for j in range(K) if l_anchor[i, j] > -torch.inf]
        z_h, z_i = (
            sum(torch.exp(row[i, j]) for j in present) for row in (l_hard.detach(), l_anchor)
        )
        for j in present:
            p_h, p_i = torch.exp(l_hard.detach()[i, j]) / z_h, torch.exp(l_anchor[i, j]) / z_i
            total = total + p_h * torch.log(p_h / p_i)
    return total / N


@pytest.mark.parametrize(
    ("fast", "slow"),
    [(multi_positive_nce, nce_by_hand), (multi_positive_mean_log, mean_log_by_hand)],
)
# half precision rounds the logits once, relative 2^-9 (bf16) and 2^-12 (fp16) of at most 10; the
# loss and its gradient move no more than this
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04), (torch.float16, 0.005)]
)
def test_forms_equal_loops_in_value_and_gradient(fast, slow, dtype, bound):
    l_pos, l_neg, weight = logits()
    exact = [x.clone().requires_grad_() for x in (l_pos, l_neg)]
    reference = slow(*exact, weight)
    reference.backward()
    rounded = [x.to(dtype).requires_grad_() for x in (l_pos, l_neg)]
    loss = fast(rounded[0], rounded[1].float().logsumexp(1), weight)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - reference.item()) < bound
    for mine, truth in zip(rounded, exact):
        assert (mine.grad.double() - truth.grad).abs().max() < bound / N


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06), (torch.float16, 0.008)]
)
def test_hard_positive_kl_equals_loops(dtype, bound):
    _, l_anchor, _ = logits(1)
    _, l_hard, _ = logits(2)
    l_hard = torch.where(l_anchor == -torch.inf, -torch.inf, l_hard.nan_to_num(neginf=0.0))
    exact = [l_hard.clone().requires_grad_(), l_anchor.clone().requires_grad_()]
    reference = kl_by_hand(*exact)
    reference.backward()
    rounded = [l_hard.to(dtype).requires_grad_(), l_anchor.to(dtype).requires_grad_()]
    loss = hard_positive_kl(*rounded)
    loss.backward()
    assert abs(loss.item() - reference.item()) < bound
    assert (rounded[1].grad.double() - exact[1].grad).abs().max() < bound / N
    assert rounded[0].grad is None, "no gradient through p_h"


def test_one_positive_is_cross_entropy():
    l_pos, l_neg, _ = logits()
    l_pos = l_pos[:, :1]
    truth = F.cross_entropy(torch.cat([l_pos, l_neg], 1).float(), torch.zeros(N, dtype=torch.long))
    for form in (multi_positive_nce, multi_positive_mean_log):
        assert torch.allclose(form(l_pos, l_neg.float().logsumexp(1)), truth, atol=1e-6)


def test_closed_forms():
    """All logits equal: p = (S w) / (S w + K), so the values can be written down."""
    l_pos, lse = torch.zeros(2, 3), torch.full((2,), math.log(9))
    weight = torch.tensor([[1.0, 0.5, 0.0]] * 2)
    assert multi_positive_nce(l_pos, lse).item() == pytest.approx(-math.log(3 / 12))
    assert multi_positive_mean_log(l_pos, lse).item() == pytest.approx(-math.log(1 / 12))
    assert multi_positive_nce(l_pos, lse, weight).item() == pytest.approx(-math.log(1.5 / 10.5))
    # KL of (3/4, 1/4) from (1/2, 1/2)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert hard_positive_kl(
        torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    ).item() == pytest.approx(kl)


def test_easy_positive_satisfies_the_sum_but_not_the_mean():
    """What separates the two forms: one easy positive among hard ones."""
    l_pos, lse = torch.tensor([[10.0, -10.0]]), torch.tensor([math.log(4)])
    assert multi_positive_nce(l_pos, lse) < 0.01
    assert multi_positive_mean_log(l_pos, lse) > 5


def test_info_nce_is_mocos_cross_entropy():
    q, k, queue = unit_rows(N, 0).float(), unit_rows(N, 1).float(), unit_rows(K, 2).float()
    whole = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.2
    loss, acc1 = info_nce(q, k, queue, 0.2)
    assert loss.item() == pytest.approx(F.cross_entropy(whole, torch.zeros(N).long()).item())
    assert acc1.item() == pytest.approx(100 * (whole.argmax(1) == 0).float().mean().item())


def test_the_hard_positive_is_the_least_similar_of_a_set_or_the_most_as_published():
    own, rows = unit_rows(N, 0), unit_rows(N * S, 1).view(N, S, 8)
    _, _, weight = logits()
    weight[0] = 0  # an empty set
    found = hardest(own, rows, weight > 0)
    published = hardest(own, rows, weight > 0, published=True)
    for i in range(N):
        members = [s for s in range(S) if weight[i, s] > 0]
        cosine = lambda s: float(own[i] @ rows[i, s])
        assert int(found[i]) == min(members, key=cosine, default=0)
        assert int(published[i]) == max(members, key=cosine, default=0)


def test_the_own_key_has_its_share():
    weight = torch.tensor([[1.0, 1, 2, 0], [0.5, 0, 0, 0], [0, 0, 0, 0]])
    alone = with_own_key(weight, None)
    assert torch.equal(alone[:, 0], torch.ones(3)) and torch.equal(alone[:, 1:], weight)
    for share in (0.0, 0.2, 0.75):
        found = with_own_key(weight, share)
        assert torch.equal(found[:, 1:], weight)
        part = found[:, 0] / found.sum(1)
        assert part.tolist() == pytest.approx([share, share, 1])  # alone, it is all there is


@pytest.mark.parametrize("chunk", [7, 1000])
def test_streamed_softmax_equals_the_whole(chunk):
    g = torch.Generator().manual_seed(0)
    f, bank = (F.normalize(torch.randn(n, 8, generator=g), dim=1) for n in (5, 40))
    lse, mean = stream_softmax(f, bank, 0.1, chunk)
    whole = f.double() @ bank.double().t() / 0.1
    assert torch.allclose(lse.double(), whole.logsumexp(1), atol=1e-5)
    assert torch.allclose(mean.double(), whole.softmax(1) @ bank.double(), atol=1e-5)


@pytest.mark.parametrize("background", [1, 7, 30, 4096])
def test_local_aggregation_equals_loops(background):
    """P(C and B) / P(B); where B is all images, it is Eq. 5."""
    M, T = 30, 0.1
    bank, f = unit_rows(M, 5).double(), unit_rows(N, 6).double()
    g = torch.Generator().manual_seed(3)
    close = torch.stack([torch.randperm(M, generator=g)[:S] for _ in range(N)])
    weight = torch.ones(N, S)
    weight[:, S - 1] = 0  # padding
    weight[0, 1:] = 0  # an image alone

    exact = f.clone().requires_grad_()
    total = 0
    for i in range(N):
        p = [torch.exp(exact[i] @ bank[n] / T) for n in range(M)]
        p = [x / sum(p) for x in p]
        B = sorted(range(M), key=lambda n: -p[n].item())[:background]
        B = {*B, int(close[i, 0])}
        both = {int(close[i, s]) for s in range(S) if weight[i, s] > 0} & B
        total = total - torch.log(sum(p[n] for n in both) / sum(p[n] for n in B)) / N
    total.backward()

    mine = f.float().requires_grad_()
    loss = local_aggregation(mine, bank.float(), close, weight, T, background)
    loss.backward()
    assert loss.item() == pytest.approx(total.item(), abs=1e-5)
    assert (mine.grad.double() - exact.grad).abs().max() < 1e-5
    if background >= M:
        whole, _ = bank_loss(f.float(), bank.float(), close, weight, T)
        assert loss.item() == pytest.approx(whole.item(), abs=1e-5)


@pytest.mark.parametrize("form", ["logsum", "meanlog"])
def test_bank_loss_equals_loops(form):
    M, C, T = 30, 8, 0.1
    g = torch.Generator().manual_seed(3)
    bank = F.normalize(torch.randn(M, C, generator=g, dtype=torch.float64), dim=1)
    f = F.normalize(torch.randn(N, C, generator=g, dtype=torch.float64), dim=1)
    hard = F.normalize(torch.randn(N, C, generator=g, dtype=torch.float64), dim=1)
    positives = torch.stack([torch.randperm(M, generator=g)[:S] for _ in range(N)])
    _, _, weight = logits()

    exact = f.clone().requires_grad_()
    isl = kl = 0
    for i in range(N):
        p_i = torch.stack([torch.exp(exact[i] @ bank[n] / T) for n in range(M)])
        p_i = p_i / p_i.sum()
        p_h = torch.stack([torch.exp(hard[i] @ bank[n] / T) for n in range(M)])
        p_h = p_h / p_h.sum()
        terms = [(weight[i, s], p_i[positives[i, s]]) for s in range(S) if weight[i, s] > 0]
        if form == "logsum":
            isl = isl - torch.log(sum(w * p for w, p in terms)) / N
        else:
            isl = isl - sum(w * torch.log(p) for w, p in terms) / sum(w for w, _ in terms) / N
        kl = kl + sum(p_h[n] * torch.log(p_h[n] / p_i[n]) for n in range(M)) / N
    (isl + 0.5 * kl).backward()

    mine = f.float().requires_grad_()
    loss, hp = bank_loss(
        mine, bank.float(), positives, weight.float(), T, hard.float(), form, chunk=11
    )
    (loss + 0.5 * hp).backward()
    assert loss.item() == pytest.approx(isl.item(), abs=1e-5)
    assert hp.item() == pytest.approx(kl.item(), abs=1e-5)
    assert (mine.grad.double() - exact.grad).abs().max() < 1e-5


# ---- where nothing is left, and where half precision ends ----------------------------------------


def unit_rows(n, seed):
    return F.normalize(
        torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1
    )


@pytest.mark.parametrize("form", [multi_positive_nce, multi_positive_mean_log])
def test_a_row_without_negatives_has_a_gradient(form):
    """One positive and no negative: the loss is -log 1 = 0.

    With S equal positives it is 0, or log S by the mean of logs. Other rows are not touched.
    """
    l_pos, l_neg, weight = logits()
    l_neg[2] = -torch.inf
    mine = [l_pos.float().requires_grad_(), l_neg.float().logsumexp(1).requires_grad_()]
    form(*mine, weight.float()).backward()
    assert all(x.grad.isfinite().all() for x in mine) and mine[1].grad[2] == 0
    truth = l_pos.clone().requires_grad_()
    by_hand = {multi_positive_nce: nce_by_hand, multi_positive_mean_log: mean_log_by_hand}[form]
    by_hand(truth, l_neg, weight).backward()
    assert (mine[0].grad - truth.grad).abs().max() < 1e-6

    own, nothing = torch.zeros(3, 1, requires_grad=True), torch.full((3,), -torch.inf)
    loss = form(own, nothing)
    loss.backward()
    assert loss.item() == 0 and (own.grad == 0).all()
    assert form(torch.zeros(3, 4), nothing).item() == pytest.approx(
        0 if form is multi_positive_nce else math.log(4)
    )


def test_hard_positives_without_negatives_add_nothing():
    _, l_anchor, _ = logits(1)
    l_hard = torch.where(l_anchor == -torch.inf, -torch.inf, 0.5)
    l_anchor[2] = l_hard[2] = -torch.inf
    mine, truth = (l_anchor.clone().requires_grad_() for _ in range(2))
    # of no negatives by hand: a sum of nothing
    loss = hard_positive_kl(l_hard, mine)
    wanted = kl_by_hand(l_hard, truth)
    loss.backward(), wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5) and torch.allclose(
        mine.grad, truth.grad, atol=1e-6
    )


@pytest.mark.parametrize("form", [multi_positive_nce, multi_positive_mean_log])
def test_a_step_whose_negatives_are_all_masked_goes_on(form):
    """As the queue objective puts its loss together: value and gradient of the other features are
    as if the masked one were not there.
    """
    f, hard, rows, T = unit_rows(3, 0), unit_rows(3, 1), unit_rows(20, 2), 0.1
    absent = torch.full((3, 20), 20)
    absent[1] = torch.arange(20)  # all rows
    absent[2, :4] = torch.arange(4)

    def loss_of(f, hard, absent):
        lse, _, lse_h, mean_h = softmax_over(f, rows.float(), T, hard=hard, absent=absent, chunk=7)
        return form((f * hard).sum(1, keepdim=True) / T, lse) + linear_kl(
            f, lse, hard, lse_h, mean_h, T
        )

    mine, other = f.float().requires_grad_(), f[[0, 2]].float().requires_grad_()
    loss = loss_of(mine, hard.float(), absent)
    wanted = loss_of(other, hard[[0, 2]].float(), absent[[0, 2]]) * 2 / 3
    loss.backward(), wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert torch.allclose(mine.grad[[0, 2]], other.grad, atol=1e-5) and (mine.grad[1] == 0).all()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("T", [0.02, 0.005])
def test_a_bank_in_half_precision_is_finite_at_low_temperatures(dtype, bound, T):
    """Rows opposite to a feature have shares of e^(-2 / T), which float32 cannot hold: alone in
    their piece of the bank they made its mean NaN.
    """
    f = unit_rows(4, 0)
    bank = torch.cat([f, unit_rows(40, 1), -f.repeat_interleave(32, 0)])
    lse, mean = stream_softmax(f.float(), bank.to(dtype), T, chunk=16)
    log_p, log_h = ((x @ bank.T / T).log_softmax(1) for x in (f, f.roll(1, 0)))
    own = 1 / T - log_p.diag()  # the logsumexp of all logits, since the own one is 1 / T
    assert (lse.double() - own).abs().max() < 2 * bound / T
    assert (mean.double() - log_p.exp() @ bank).abs().max() < 8 * bound
    assert (
        entropy(f.float(), bank.to(dtype), T, 16) + (log_p.exp() * log_p).sum(1)
    ).abs().max() < 4 * bound / T
    rows, mine = torch.arange(4)[:, None], f.float().requires_grad_()
    loss, hp = bank_loss(
        mine, bank.to(dtype), rows, torch.ones(4, 1), T, f.roll(1, 0).float(), chunk=16
    )
    (loss + hp).backward()
    assert abs(loss.item() + log_p.diag().mean().item()) < 4 * bound / T
    assert abs(hp.item() - (log_h.exp() * (log_h - log_p)).sum(1).mean().item()) < 4 * bound / T
    assert mine.grad.isfinite().all()
