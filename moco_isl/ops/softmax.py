"""The softmax over all rows of a bank or a queue, in pieces: nothing of size N x M is ever held.

Letters: M rows, N anchors, C feature dimension, T temperature.
"""

import torch

from moco_isl.ops.fused import kernels_for

Tensor = torch.Tensor

_SCALE = 1 << 15  # the largest power of two that float16 holds
_LEAST = 2.0**-100  # a sum of shares below it is nothing beside the largest share, which is 1
# rows at a time: logits that stay in a CPU's caches, large products on a GPU
_CHUNK = {"cpu": 2048, "cuda": 1 << 16}


@torch.no_grad()
def softmax_pass(
    f: Tensor,
    rows: Tensor,
    T: float,
    absent: Tensor | None = None,
    chunk: int | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """p_in = exp(f_i v_n / T) / sum_m exp(f_i v_m / T), Eq. 4, as its normaliser, its mean row and
    its largest logit.

    One pass over the rows. Matrix products are taken in the type of the rows, whatever autocast
    says; sums are in float32. Of float16 rows the shares are multiplied before they are stored as
    float16: 1 / M of a million rows is below what it resolves.

    Args:
        f: [N, C] features. rows: [M, C]. chunk: rows at a time, no more than [N, chunk] is held;
        None: as suits the device. absent: [n, R] int64, rows that do not count, in any order and
        number of times, M for none; those of feature i stand in row i mod n (n divides N). fused:
        by a kernel with float16 products, where it works (CUDA).

    Returns:
        lse [N]: log sum_n exp(f_i v_n / T), mean [N, C]: sum_n p_in v_n, top [N]: max_n f_i v_n /
        T; all float32. A feature without any row has lse and top -inf and a mean of 0.
    """
    if fused and (kernels := kernels_for(rows)) is not None:
        # which would join the kernel's shares in half precision
        with torch.autocast(f.device.type, enabled=False):
            return kernels.softmax_pass(f, rows, T, absent)
    mask = None
    if absent is not None:  # the last column takes what stands for none, and is cut off
        mask = torch.zeros(len(absent), len(rows) + 1, dtype=torch.bool, device=f.device).scatter_(
            1, absent, True
        )
    chunk = chunk or _CHUNK.get(f.device.type, _CHUNK["cuda"])
    top = f.new_full((len(f),), -torch.inf, dtype=torch.float32)
    total = f.new_zeros(len(f), dtype=torch.float32)  # sum of exp(logit - top) so far
    mean = f.new_zeros(f.shape, dtype=torch.float32)  # times total
    with torch.autocast(f.device.type, enabled=False):
        f = f.to(rows.dtype)
        for start in range(0, len(rows), chunk):
            here = rows[start : start + chunk]
            logits = (f @ here.t()).float().div_(T)  # [N, chunk]
            if mask is not None:
                logits.view(-1, len(mask), len(here)).masked_fill_(
                    mask[:, start : start + len(here)], -torch.inf
                )
            new = torch.maximum(top, logits.amax(1))
            shift = torch.where(new == -torch.inf, 0, new)  # absent rows alone so far: no inf - inf
            shares = logits.sub_(shift[:, None]).exp_()  # [N, chunk]
            shrink = (top - shift).exp_()
            here_total = shares.sum(1)
            total = total * shrink + here_total
            mean = mean * shrink[:, None] + _weighted_sum(shares, here_total, here)
            top = new
    # below 1 is only the total of no row
    return top + total.log(), mean / total.clamp(min=1)[:, None], top


def _weighted_sum(shares: Tensor, total: Tensor, rows: Tensor) -> Tensor:
    """shares [N, n], their sums [N], rows [n, C] -> [N, C] float32, by a product in the type of the
    rows.
    """
    if rows.dtype == torch.float32:
        return shares @ rows
    # shares then average 1 or more, and sum to what float16 can hold
    scale = min(len(rows), _SCALE)
    factor = scale / total.clamp(min=_LEAST)  # [N], finite whatever the temperature
    return (shares.mul_(factor[:, None]).to(rows.dtype) @ rows).float() / factor[:, None]


def stream_softmax(
    f: Tensor, bank: Tensor, T: float, chunk: int | None = None, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """lse [N] and mean [N, C] of `softmax_pass`."""
    return softmax_pass(f, bank, T, chunk=chunk, fused=fused)[:2]


def entropy(
    f: Tensor, bank: Tensor, T: float, chunk: int | None = None, fused: bool = False
) -> Tensor:
    """[N]: - sum_n p_in log p_in of each anchor's softmax over the bank, float32. Arguments as in
    `stream_softmax`.

    fused: products of float16 move a logit by up to 1e-3 / T. They move it up as often as down, so
    that the entropy is
    off by far less: 0.01 at most at T 0.1 in the tests. Anchors whose entropies are that close may
    change places.
    """
    lse, mean = stream_softmax(f, bank, T, chunk, fused)
    return lse - (f.float() * mean).sum(1) / T
