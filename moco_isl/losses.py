"""The losses of MoCo and ISL as pure functions of tensors: no state, no device, no rank.

Letters: N batch, C feature dimension, K queue length, M images, P positives of an image after padding, T temperature.
Logits are cosines divided by T. A logit of -inf is absent: a negative that the queue mask took out. A weight of 0 is
padding. All sums are taken in float32, whatever the logits are stored in.
"""

import torch

from moco_isl.mining.softmax import stream_softmax


def multi_positive_nce(l_pos: torch.Tensor, l_neg: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Log of the sum over the positives: Eq. 5 of the paper with the queue as negatives.

    Args:
        l_pos: [N, S] logits of the S = 1 + P positives, the own key first.
        l_neg: [N, K] logits of the negatives.
        weight: [N, S], 0 for padding; None: all 1.

    Returns:
        Scalar, the mean over N of -log [ sum_S w e^l / (sum_S w e^l + sum_K e^l) ]. With S = 1 it is MoCo's cross-entropy.
    """
    l_pos = _with_weight(l_pos.float(), weight)
    positive = torch.logsumexp(l_pos, dim=1)  # [N]
    negative = torch.logsumexp(l_neg.float(), dim=1)  # [N]
    return (torch.logaddexp(positive, negative) - positive).mean()


def multi_positive_mean_log(l_pos: torch.Tensor, l_neg: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of the logs: every positive has to be likely, not just the easiest.

    Arguments as in `multi_positive_nce`. Returns the mean over N of - sum_S w log [ e^l / (sum_S e^l + sum_K e^l) ] / sum_S w:
    weights choose how much a positive is asked for, they do not change the denominator.
    """
    l_pos = l_pos.float()
    weight = torch.ones_like(l_pos) if weight is None else weight.float()
    present = l_pos.masked_fill(weight == 0, -torch.inf)
    total = torch.logaddexp(torch.logsumexp(present, dim=1), torch.logsumexp(l_neg.float(), dim=1))  # [N]
    log_p = torch.where(weight > 0, l_pos - total[:, None], 0)  # [N, S]
    return -((weight * log_p).sum(1) / weight.sum(1)).mean()


def hard_positive_kl(l_hard: torch.Tensor, l_anchor: torch.Tensor) -> torch.Tensor:
    """Hard positive enhancement, Eq. 6: KL(sg[p_h] || p_i) over the same negatives, mean over N.

    Args:
        l_hard: [N, K] logits of the hard positive against the negatives; no gradient flows into them.
        l_anchor: [N, K] logits of the anchor against the same negatives, -inf at the same places. At least one is finite.
    """
    log_h = torch.log_softmax(l_hard.detach().float(), dim=1)
    log_i = torch.log_softmax(l_anchor.float(), dim=1)
    present = log_h > -torch.inf
    # masked twice, so that neither the value nor the gradient ever sees inf - inf
    difference = torch.where(present, log_h, 0) - torch.where(present, log_i, 0)
    return (log_h.exp() * difference).sum(1).mean()


class _SoftmaxOverBank(torch.autograd.Function):
    """lse [N] over all bank rows (see `stream_softmax`); its gradient, mean / T, is at hand when the pass is over."""

    @staticmethod
    def forward(ctx, f: torch.Tensor, bank: torch.Tensor, T: float, chunk: int) -> torch.Tensor:
        lse, mean = stream_softmax(f, bank, T, chunk)
        ctx.save_for_backward(mean)
        ctx.T = T
        return lse

    @staticmethod
    def backward(ctx, grad_lse: torch.Tensor):
        (mean,) = ctx.saved_tensors
        return grad_lse[:, None] * mean / ctx.T, None, None, None


def bank_loss(
    f: torch.Tensor,
    bank: torch.Tensor,
    positives: torch.Tensor,
    weight: torch.Tensor,
    T: float,
    hard: torch.Tensor | None = None,
    form: str = "logsum",
    chunk: int = 1 << 16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact softmax over all M bank rows: Eq. 4 and 5 (or the mean of logs), and Eq. 6.

    Nothing of size N x M is held, in neither direction: the gradient of lse_i = log sum_n exp(f_i v_n / T) is the mean row
    under p_i over T, which the pass that finds lse_i finds as well. With E_h the mean row under p_h, Eq. 6 needs no pass of
    its own over the anchor's logits, since they are linear in f: KL(p_h || p_i) = (h - f_i) E_h / T - lse_h + lse_i.
    A float16 bank is read by half-precision products; autocast changes nothing here. Eq. 6 of a bank in half precision
    can come out below 0 by the rounding of E_h, some 1e-3.

    Args:
        f: [N, C] unit features with gradient. bank: [M, C] unit rows, float32 or half precision.
        positives: [N, S] bank rows that count as positive, the own row among them. weight: [N, S], 0 for padding.
        hard: [N, C] features h of the hard positives, without gradient; None: no Eq. 6.
        form: "logsum" (Eq. 5) or "meanlog". chunk: bank rows at a time.

    Returns:
        (L_isl, L_hp), scalars, means over N; L_hp is 0 without `hard`.
    """
    with torch.autocast(f.device.type, enabled=False):
        f = f.float()
        lse = _SoftmaxOverBank.apply(f, bank, T, chunk)  # [N]
        l_pos = torch.einsum("nc,nsc->ns", f, bank[positives].float()) / T
        if form == "logsum":
            loss = (lse - torch.logsumexp(_with_weight(l_pos, weight), dim=1)).mean()
        else:
            loss = (lse - (weight * l_pos).sum(1) / weight.sum(1)).mean()
        if hard is None:
            return loss, loss.new_zeros(())
        lse_h, mean_h = stream_softmax(hard, bank, T, chunk)
        kl = ((hard.float() - f) * mean_h).sum(1) / T - lse_h + lse
        return loss, kl.mean()


def _with_weight(l_pos: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return l_pos if weight is None else l_pos + weight.float().log()
