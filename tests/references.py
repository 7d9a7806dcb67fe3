"""Slow forms that hold whole logits, for what the package computes without them."""

import torch

Tensor = torch.Tensor


def hard_positive_kl(l_hard: Tensor, l_anchor: Tensor) -> Tensor:
    """Eq. 6 of logits [N, K] of the hard positive and the anchor: KL(sg[p_h] || p_i), mean over N.

    -inf stands at the same places in both, for negatives that are absent. A row without any
    negative adds 0.
    """
    none = (l_hard == -torch.inf).all(1, keepdim=True)  # [N, 1]
    log_h = torch.log_softmax(l_hard.detach().float().masked_fill(none, 0), dim=1)
    log_i = torch.log_softmax(l_anchor.float().masked_fill(none, 0), dim=1)
    present = log_h > -torch.inf
    # masked twice, so that neither the value nor the gradient ever sees inf - inf
    difference = torch.where(present, log_h, 0) - torch.where(present, log_i, 0)
    return (log_h.exp() * difference).sum(1).mean()
