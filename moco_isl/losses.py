"""The losses of MoCo and ISL as pure functions of tensors: no state, no device, no rank.

Letters: N batch, C feature dimension, K queue length, M images, P positives of an image after
padding, S = 1 + P with the image's own, T temperature. Logits are cosines divided by T. A weight
of 0 is padding. Sums are taken in float32, whatever the logits are stored in.

A row whose negatives are all absent has nothing to be compared with: the log-sum-exp (lse) of its
negatives is -inf, and its cross-entropy with one positive, its KL and its gradients are 0.
"""

import torch

from moco_isl.ops.softmax import softmax_pass

Tensor = torch.Tensor


def info_nce(
    q: Tensor, k: Tensor, queue: Tensor, T: float, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """MoCo's cross-entropy of q [N, C] with its keys k [N, C] among the queue [K, C].

    Returns the mean over N, and acc1: in how many per cent of the rows the own key comes first.
    """
    l_own = (q * k).sum(1, keepdim=True) / T  # [N, 1]
    lse, top, _, _ = softmax_over(q, queue, T, fused=fused)
    return multi_positive_nce(l_own, lse), accuracy(l_own, top)


def accuracy(l_own: Tensor, top: Tensor) -> Tensor:
    """Per cent of the own logits [N, 1] that are at least the largest of the negatives, top [N]."""
    return (l_own[:, 0] >= top).float().mean() * 100


@torch.no_grad()
def alignment(q: Tensor, k: Tensor) -> Tensor:
    """Mean of |q - k|^2 over the unit rows of two views, [N, C] each: 0 to 4, lower is closer.

    Wang and Isola, ICML 2020.
    """
    return 2 - 2 * (q * k).sum(1).mean()


def with_own_key(weight: Tensor, share: float | None) -> Tensor:
    """The weights [N, 1 + P] of the own key and of the mined positives, weight [N, P].

    share: what the own key has of the whole, 0 to 1 without 1. None: it weighs 1, as a positive of
    weight 1 does, which is 1 / (1 + P) of the whole. An image without positives has it alone.
    """
    own = torch.ones_like(weight[:, :1])
    if share is not None:
        others = weight.sum(1, keepdim=True)  # [N, 1]
        own = torch.where(others > 0, share / (1 - share) * others, own)
    return torch.cat([own, weight], dim=1)


def multi_positive_nce(l_pos: Tensor, lse: Tensor, weight: Tensor | None = None) -> Tensor:
    """Log of the sum over the positives: Eq. 5 of the paper with the queue as negatives.

    Args:
        l_pos: [N, S] logits of the positives, the own key first.
        lse: [N] log of the sum of exp over the logits of the negatives.
        weight: [N, S], 0 for padding; None: all 1.

    Returns:
        Scalar, the mean over N of -log [ sum_S w e^l / (sum_S w e^l + sum_K e^l) ]. With S = 1 it
        is MoCo's cross-entropy.
    """
    positive = torch.logsumexp(_with_weight(l_pos.float(), weight), dim=1)  # [N]
    return (torch.logaddexp(positive, lse) - positive).mean()


def multi_positive_mean_log(l_pos: Tensor, lse: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of the logs: every positive has to be likely, not just the easiest.

    Arguments as in `multi_positive_nce`. Returns the mean over N of - sum_S w log [ e^l / (sum_S
    e^l + sum_K e^l) ] / sum_S w: weights choose how much a positive is asked for, they do not
    change the denominator.
    """
    l_pos = l_pos.float()
    weight = torch.ones_like(l_pos) if weight is None else weight.float()
    present = l_pos.masked_fill(weight == 0, -torch.inf)
    total = torch.logaddexp(torch.logsumexp(present, dim=1), lse)  # [N]
    log_p = torch.where(weight > 0, l_pos - total[:, None], 0)  # [N, S]
    return -((weight * log_p).sum(1) / weight.sum(1)).mean()


FORMS = {"logsum": multi_positive_nce, "meanlog": multi_positive_mean_log}
LOCAL = "local"  # the form of `local_aggregation`, for a bank alone


class _SoftmaxOver(torch.autograd.Function):
    """The autograd function of `softmax_over`.

    The gradient of lse, mean / T, is known when the pass is over, so neither logits nor rows are
    kept for backward.
    """

    @staticmethod
    def forward(ctx, f, hard, rows, T, absent, chunk, fused):
        N = len(f)
        both = f if hard is None else torch.cat([f, hard.to(f.dtype)])
        lse, mean, top = softmax_pass(both, rows, T, absent, chunk, fused)
        ctx.save_for_backward(mean[:N])
        ctx.T = T
        outputs = lse[:N], top[:N], lse[N:], mean[N:]
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, grad_lse: Tensor, *_):
        (mean,) = ctx.saved_tensors
        return grad_lse[:, None] * mean / ctx.T, None, None, None, None, None, None


def softmax_over(
    f: Tensor,
    rows: Tensor,
    T: float,
    *,
    hard: Tensor | None = None,
    absent: Tensor | None = None,
    chunk: int | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that the losses need of the softmax of f, and of `hard`, over all rows, in one pass.

    Nothing of size [N, R] is held, neither forward nor backward.

    Args:
        f: [N, C] float32 with gradient. hard: [N, C] without, or None.
        rows: [R, C], the queue's keys or the bank; they may be overwritten before backward.
        absent: [N, A] int64, rows that do not count for a feature and its `hard`, R for none.
        chunk: rows at a time. fused: by a kernel, where it works (CUDA).

    Returns:
        lse [N]: log sum_r exp(f_i v_r / T), with gradient; top [N]: the largest logit; of `hard`
        lse_h [N] and mean_h [N, C], the mean row under its softmax (without `hard` both are empty).
        All float32. A feature of which no row counts has lse and top -inf, mean_h 0 and the
        gradient 0.
    """
    return _SoftmaxOver.apply(f, hard, rows, T, absent, chunk, fused)


def hardest(own: Tensor, rows: Tensor, present: Tensor, published: bool = False) -> Tensor:
    """The place in each set of its hard positive, Eq. 6: [N] int64, 0 of an empty set.

    It is the member whose row in rows [N, L, C] has the smallest cosine with the image's own row in
    own [N, C], as the paper's text says; published: the largest, as its code has it. present
    [N, L]: False for padding, which is never chosen.
    """
    cosine = (own[:, None] * rows).sum(2)  # [N, L]; no product, which autocast would halve
    if published:
        cosine = -cosine
    return cosine.masked_fill(~present, torch.inf).argmin(dim=1)


def linear_kl(
    f: Tensor, lse: Tensor, hard: Tensor, lse_h: Tensor, mean_h: Tensor, T: float
) -> Tensor:
    """Hard positive enhancement, Eq. 6, from what `softmax_over` returns; mean over N.

    The KL goes from the hard positive to the image: KL(p_h || p_i), where p_h has no gradient. It
    is (h - f_i) E_h / T - lse_h + lse_i, with E_h = mean_h: the anchor's logits are linear in f, so
    no second pass over them is needed. Of rows in half precision it can come out below 0 by the
    rounding of E_h, some 1e-3. A feature of which no row counts (lse -inf) adds 0.
    """
    none = lse == -torch.inf  # [N]
    lse_h = lse_h.masked_fill(none, 0)
    lse = lse.masked_fill(none, 0)
    return (((hard.float() - f) * mean_h).sum(1) / T - lse_h + lse).mean()


def bank_loss(
    f: Tensor,
    bank: Tensor,
    positives: Tensor,
    weight: Tensor,
    T: float,
    hard: Tensor | None = None,
    form: str = "logsum",
    absent: Tensor | None = None,
    chunk: int | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """The exact softmax over all M bank rows: Eq. 4 and 5 (or the mean of logs), and Eq. 6.

    A bank in half precision is read by half-precision products; autocast changes nothing here.

    Args:
        f: [N, C] unit features with gradient. bank: [M, C] unit rows, float32 or half precision.
        positives: [N, S] bank rows that count as positive, the own row among them.
        weight: [N, S], 0 for padding.
        hard: [N, C] features h of the hard positives, without gradient; None: no Eq. 6.
        form: "logsum" (Eq. 5) or "meanlog".
        absent: [N, A] int64, bank rows that do not count for an image, M for none.
        chunk, fused: see `softmax_over`.

    Returns:
        (L_isl, L_hp), scalars, means over N; L_hp is 0 without `hard`.
    """
    with torch.autocast(f.device.type, enabled=False):
        f = f.float()
        lse, _, lse_h, mean_h = softmax_over(
            f, bank, T, hard=hard, absent=absent, chunk=chunk, fused=fused
        )
        l_pos = torch.einsum("nc,nsc->ns", f, bank[positives].float()) / T
        if form == "logsum":
            isl = (lse - torch.logsumexp(_with_weight(l_pos, weight), dim=1)).mean()
        else:
            isl = (lse - (weight * l_pos).sum(1) / weight.sum(1)).mean()
        if hard is None:
            return isl, isl.new_zeros(())
        return isl, linear_kl(f, lse, hard, lse_h, mean_h, T)


def local_aggregation(
    f: Tensor, bank: Tensor, images: Tensor, weight: Tensor, T: float, background: int
) -> Tensor:
    """LA's loss (Zhuang et al. 2019): -log P(C and B) / P(B), a scalar, the mean over N.

    B are the `background` bank rows most similar to f_i, capped by M, and the image's own row. P is
    the softmax over all rows (Eq. 4), whose denominator cancels.

    Args:
        f: [N, C] unit features with gradient. bank: [M, C] unit rows, float32 or half precision;
        they may be overwritten before backward.
        images: [N, S] the close neighbours, bank rows, the own one first.
        weight: [N, S], 0 for padding.
    """
    N = len(f)
    with torch.autocast(f.device.type, enabled=False), torch.no_grad():
        logits = (f.to(bank.dtype) @ bank.t()).float() / T  # [N, M]
        least = logits.topk(min(background, len(bank)), dim=1).values[:, -1:]  # [N, 1]
        near = (logits >= least).scatter(1, images[:, :1], True)  # [N, M]
        l_close = _with_weight(logits.gather(1, images), weight)  # [N, S]
        l_close.masked_fill_(~near.gather(1, images), -torch.inf)
        logits.masked_fill_(~near, -torch.inf)
        loss = (logits.logsumexp(1) - l_close.logsumexp(1)).mean()
        # logits are linear in f: the gradient is the difference of the mean rows of both sets
        p = logits.softmax(1)  # [N, M]
        p.scatter_add_(1, images, -l_close.softmax(1))
        gradient = (p.to(bank.dtype) @ bank).float() / (T * N)  # [N, C]
    return loss + ((f - f.detach()).float() * gradient).sum()


def _with_weight(l_pos: Tensor, weight: Tensor | None) -> Tensor:
    return l_pos if weight is None else l_pos + weight.float().log()
