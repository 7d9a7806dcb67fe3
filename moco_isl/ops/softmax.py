"""The softmax over all rows of a bank or a queue, in pieces: nothing of size N x M is held.

Letters: M rows, N anchors, C feature dimension, T temperature.
"""

import torch

from moco_isl.ops.fused import kernels_for

Tensor = torch.Tensor

_SCALE = 1 << 15  # the largest power of two that float16 holds
_LEAST = 2.0**-100  # a sum of shares below it is nothing beside the largest share, which is 1
_CHUNK = {"cpu": 2048, "cuda": 1 << 16}  # rows at a time: a CPU keeps their logits in its caches


@torch.no_grad()
def softmax_pass(
    f: Tensor,
    rows: Tensor,
    T: float,
    absent: Tensor | None = None,
    chunk: int | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 4, p_in = exp(f_i v_n / T) / sum_m exp(f_i v_m / T), in one pass over the rows.

    Matrix products are in the type of the rows, whatever autocast says; sums are in float32.

    Args:
        f: [N, C] features.
        rows: [M, C].
        absent: [n, R] int64, rows that do not count, in any order, also repeated; M stands for
            none. Those of feature i are in row i mod n (n divides N).
        chunk: rows at a time, so that [N, chunk] logits are held; None: as suits the device.
        fused: by a kernel with float16 products, where it works (CUDA).

    Returns:
        lse [N]: log sum_n exp(f_i v_n / T); mean [N, C]: sum_n p_in v_n; top [N]: max_n f_i v_n /
        T; all float32. A feature without any row has lse and top -inf and a mean of 0.
    """
    if fused and (kernels := kernels_for(rows)) is not None:
        # Autocast would join the kernel's shares in half precision.
        with torch.autocast(f.device.type, enabled=False):
            return kernels.softmax_pass(f, rows, T, absent)
    mask = None
    if absent is not None:  # one more column, for the M that stands for none
        mask = torch.zeros(len(absent), len(rows) + 1, dtype=torch.bool, device=f.device)
        mask.scatter_(1, absent, True)
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
                gone = mask[:, start : start + len(here)]
                logits.view(-1, len(mask), len(here)).masked_fill_(gone, -torch.inf)
            new = torch.maximum(top, logits.amax(1))
            shift = torch.where(new == -torch.inf, 0, new)  # no inf - inf where all were absent
            shares = logits.sub_(shift[:, None]).exp_()  # [N, chunk]
            shrink = (top - shift).exp_()
            here_total = shares.sum(1)
            total = total * shrink + here_total
            mean = mean * shrink[:, None] + _weighted_sum(shares, here_total, here)
            top = new
    mean /= total.clamp(min=1)[:, None]  # it is 1 or more, or 0 where there is no row
    return top + total.log(), mean, top


def _weighted_sum(shares: Tensor, total: Tensor, rows: Tensor) -> Tensor:
    """shares [N, n], their sums [N], rows [n, C] -> [N, C] float32, a product in the rows' type.

    Shares are scaled before they are stored in half precision: 1 / M of a million rows is below
    what float16 resolves.
    """
    if rows.dtype == torch.float32:
        return shares @ rows
    scale = min(len(rows), _SCALE)  # shares then average 1 or more, and float16 holds their sum
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
    """- sum_n p_in log p_in of each anchor's softmax over the bank, [N] float32.

    fused: products of float16 move a logit by up to 1e-3 / T, up as often as down, so that the
    entropy is off by far less: 0.01 at most at T 0.1 in the tests. Anchors whose entropies are that
    close may change places.
    """
    lse, mean = stream_softmax(f, bank, T, chunk, fused)
    return lse - (f.float() * mean).sum(1) / T
