"""The softmax over all rows of a bank, in pieces: nothing of size N x M is ever held.

Letters: M bank rows, N anchors, C feature dimension, T temperature.
"""

import math

import torch

Tensor = torch.Tensor

_SCALE = 1 << 15  # the largest power of two that float16 holds


@torch.no_grad()
def stream_softmax(f: Tensor, bank: Tensor, T: float, chunk: int = 1 << 16) -> tuple[Tensor, Tensor]:
    """p_in = exp(f_i v_n / T) / sum_m exp(f_i v_m / T), Eq. 4, as its normaliser and its mean row; one pass over the bank.

    Matrix products are taken in the bank's type, whatever autocast says; sums are in float32. Of a float16 bank the
    shares are multiplied before they are stored as float16: 1 / M of a million rows is below what it resolves.

    Args:
        f: [N, C] features. bank: [M, C] rows. chunk: bank rows at a time; no more than [N, chunk] is held.

    Returns:
        lse [N]: log sum_n exp(f_i v_n / T), and mean [N, C]: sum_n p_in v_n; both float32.
    """
    lse = f.new_full((len(f),), -torch.inf, dtype=torch.float32)
    mean = f.new_zeros(f.shape, dtype=torch.float32)
    with torch.autocast(f.device.type, enabled=False):
        f = f.to(bank.dtype)
        for rows in bank.split(chunk):
            logits = (f @ rows.t()).float().div_(T)  # [N, chunk]
            here = torch.logsumexp(logits, dim=1)  # [N]
            total = torch.logaddexp(lse, here)
            scale = min(len(rows), _SCALE)  # shares of this chunk then average 1, and their sum stays in float16's range
            shares = logits.sub_((here - math.log(scale))[:, None]).exp_().to(rows.dtype)
            part = (shares @ rows).float() / scale  # [N, C], the mean row of this chunk
            mean = mean * (lse - total).exp()[:, None] + part * (here - total).exp()[:, None]
            lse = total
    return lse, mean


def entropy(f: Tensor, bank: Tensor, T: float, chunk: int = 1 << 16) -> Tensor:
    """[N]: - sum_n p_in log p_in of each anchor's softmax over the bank, float32. Arguments as in `stream_softmax`."""
    lse, mean = stream_softmax(f, bank, T, chunk)
    return lse - (f.float() * mean).sum(1) / T
