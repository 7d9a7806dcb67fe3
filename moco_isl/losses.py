"""The losses of MoCo and ISL as pure functions of tensors: no state, no device, no rank.

Letters: N batch, C feature dimension, K queue length, M images, P positives of an image after
padding, T temperature. Logits are cosines divided by T. A logit of -inf is absent: a negative that
the queue mask took out. A weight of 0 is padding. All sums are taken in float32, whatever the
logits are stored in. A row whose negatives are all absent has
nothing to be told from: its cross-entropy and its KL are 0, and so are their gradients by the
negatives.
"""

import torch

from moco_isl.ops.softmax import softmax_pass


def multi_positive_nce(
    l_pos: torch.Tensor, l_neg: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Log of the sum over the positives: Eq. 5 of the paper with the queue as negatives.

    Args:
        l_pos: [N, S] logits of the S = 1 + P positives, the own key first.
        l_neg: [N, K] logits of the negatives.
        weight: [N, S], 0 for padding; None: all 1.

    Returns:
        Scalar, the mean over N of -log [ sum_S w e^l / (sum_S w e^l + sum_K e^l) ]. With S = 1 it
        is MoCo's cross-entropy.
    """
    l_pos = _with_weight(l_pos.float(), weight)
    positive = torch.logsumexp(l_pos, dim=1)  # [N]
    negative = _logsumexp(l_neg.float())  # [N]
    return (torch.logaddexp(positive, negative) - positive).mean()


def multi_positive_mean_log(
    l_pos: torch.Tensor, l_neg: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of the logs: every positive has to be likely, not just the easiest.

    Arguments as in `multi_positive_nce`. Returns the mean over N of - sum_S w log [ e^l / (sum_S
    e^l + sum_K e^l) ] / sum_S w: weights choose how much a positive is asked for, they do not
    change the denominator.
    """
    l_pos = l_pos.float()
    weight = torch.ones_like(l_pos) if weight is None else weight.float()
    present = l_pos.masked_fill(weight == 0, -torch.inf)
    total = torch.logaddexp(torch.logsumexp(present, dim=1), _logsumexp(l_neg.float()))  # [N]
    log_p = torch.where(weight > 0, l_pos - total[:, None], 0)  # [N, S]
    return -((weight * log_p).sum(1) / weight.sum(1)).mean()


def hard_positive_kl(l_hard: torch.Tensor, l_anchor: torch.Tensor) -> torch.Tensor:
    """Hard positive enhancement, Eq. 6: KL(sg[p_h] || p_i) over the same negatives, mean over N.

    Args:
        l_hard: [N, K] logits of the hard positive against the negatives; no gradient flows into
        them.
        l_anchor: [N, K] logits of the anchor against the same negatives, -inf at the same places.
    """
    # [N, 1]: two equal distributions in their place differ by 0
    none = (l_hard == -torch.inf).all(1, keepdim=True)
    log_h = torch.log_softmax(l_hard.detach().float().masked_fill(none, 0), dim=1)
    log_i = torch.log_softmax(l_anchor.float().masked_fill(none, 0), dim=1)
    present = log_h > -torch.inf
    # masked twice, so that neither the value nor the gradient ever sees inf - inf
    difference = torch.where(present, log_h, 0) - torch.where(present, log_i, 0)
    return (log_h.exp() * difference).sum(1).mean()


class _SoftmaxOver(torch.autograd.Function):
    """See `softmax_over`.

    The gradient of lse, mean / T, is at hand when the pass is over: neither logits nor rows are
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
    def backward(ctx, grad_lse: torch.Tensor, *_):
        (mean,) = ctx.saved_tensors
        return grad_lse[:, None] * mean / ctx.T, None, None, None, None, None, None


def softmax_over(
    f: torch.Tensor,
    rows: torch.Tensor,
    T: float,
    *,
    hard: torch.Tensor | None = None,
    absent: torch.Tensor | None = None,
    chunk: int | None = None,
    fused: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All that the losses need of the softmax of f, and of `hard`, over all rows: one pass, and no
    [N, R] tensor in either direction.

    Args:
        f: [N, C] float32 with gradient. hard: [N, C] without, or None. rows: [R, C], the queue's
        keys or the bank; they may be overwritten before backward. absent: [N, A] int64, rows that
        do not count for a feature and its `hard`, R for none.
        chunk: rows at a time. fused: by a kernel, where it works (CUDA).

    Returns:
        lse [N]: log sum_r exp(f_i v_r / T), with gradient; top [N]: the largest logit; of `hard`
        lse_h [N] and mean_h [N, C], the mean row under its softmax (without `hard` both are empty).
        All float32. A feature of which no row counts has lse and top -inf, mean_h 0 and the
        gradient 0.
    """
    return _SoftmaxOver.apply(f, hard, rows, T, absent, chunk, fused)


def linear_kl(
    f: torch.Tensor,
    lse: torch.Tensor,
    hard: torch.Tensor,
    lse_h: torch.Tensor,
    mean_h: torch.Tensor,
    T: float,
) -> torch.Tensor:
    """Eq. 6 from what `softmax_over` returns, mean over N: KL(p_h || p_i) = (h - f_i) E_h / T -
    lse_h + lse_i, with E_h = mean_h.

    It needs no pass over the anchor's logits, since they are linear in f. Of rows in half precision
    it can come out below 0 by the rounding of E_h, some 1e-3. A feature of which no row counts (lse
    -inf) adds 0.
    """
    none = lse == -torch.inf  # [N]
    lse_h = lse_h.masked_fill(none, 0)
    lse = lse.masked_fill(none, 0)
    return (((hard.float() - f) * mean_h).sum(1) / T - lse_h + lse).mean()


def bank_loss(
    f: torch.Tensor,
    bank: torch.Tensor,
    positives: torch.Tensor,
    weight: torch.Tensor,
    T: float,
    hard: torch.Tensor | None = None,
    form: str = "logsum",
    chunk: int | None = None,
    fused: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact softmax over all M bank rows: Eq. 4 and 5 (or the mean of logs), and Eq. 6.

    Nothing of size N x M is held, in neither direction (`softmax_over`, `linear_kl`). A bank in
    half precision is read by half-precision products; autocast changes nothing here.

    Args:
        f: [N, C] unit features with gradient. bank: [M, C] unit rows, float32 or half precision.
        positives: [N, S] bank rows that count as positive, the own row among them. weight: [N, S],
        0 for padding.
        hard: [N, C] features h of the hard positives, without gradient; None: no Eq. 6.
        form: "logsum" (Eq. 5) or "meanlog". chunk, fused: see `softmax_over`.

    Returns:
        (L_isl, L_hp), scalars, means over N; L_hp is 0 without `hard`.
    """
    with torch.autocast(f.device.type, enabled=False):
        f = f.float()
        lse, _, lse_h, mean_h = softmax_over(f, bank, T, hard=hard, chunk=chunk, fused=fused)
        l_pos = torch.einsum("nc,nsc->ns", f, bank[positives].float()) / T
        if form == "logsum":
            loss = (lse - torch.logsumexp(_with_weight(l_pos, weight), dim=1)).mean()
        else:
            loss = (lse - (weight * l_pos).sum(1) / weight.sum(1)).mean()
        return loss, (
            loss.new_zeros(()) if hard is None else linear_kl(f, lse, hard, lse_h, mean_h, T)
        )


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """[N, n] -> [N]: torch's, but where all of a row are -inf the gradient is 0 and not NaN."""
    none = (logits == -torch.inf).all(1)  # [N]
    return torch.logsumexp(logits.masked_fill(none[:, None], 0), dim=1).masked_fill(
        none, -torch.inf
    )


def _with_weight(l_pos: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return l_pos if weight is None else l_pos + weight.float().log()
