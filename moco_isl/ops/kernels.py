"""Fused kernels (Triton) of the passes over all rows, the softmax and the search.

The scores never leave the chip.

Letters: N anchors or queries, M rows, C feature dimension, T temperature; BN, BM, BC: the sides of
a tile in each; C fits one tile.

Products are of float16 with float32 sums: unit rows need no more range, and float16 resolves more
than bfloat16. Offsets of whole rows are int64: M * C, and N times the words of the bits, exceed
2^31. Triton starts kernels on the current device, so each start is under `device_of` of its
tensors. Import this file only where Triton is installed (see fused.py). TRITON_INTERPRET=1 runs the
kernels on a CPU, slowly.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

_SCALE = 32768.0  # shares exp(logit - top) are at most 1: as float16 they are stored times this


class Tile(NamedTuple):
    """How a kernel is cut: anchors and rows of a tile, warps of a program, loads in flight."""

    anchors: int
    rows: int
    warps: int
    stages: int


GROUP = 64  # rows of a group of the search


def softmax_tile(C: int) -> Tile:
    """A tile whose kernel, compiled for Hopper, keeps to its registers (as that of the search)."""
    return Tile(128, 64, 8, 3) if C <= 128 else Tile(64, 64, 4, 2)


def search_tile(C: int) -> Tile:
    return Tile(256, GROUP, 8, 3) if C <= 128 else Tile(128, GROUP, 8, 3)


# ---------------------------------------------------------------- softmax


@triton.jit
def _bits_kernel(absent_ptr, bits_ptr, R, M, words, BLOCK: tl.constexpr):
    """Program (row of absent, part of it): sets bit r of its row of bits for every r < M in it."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    r = tl.load(absent_ptr + i * R + at, mask=at < R, other=M).to(tl.int32)
    tl.atomic_or(bits_ptr + i * words + r // 32, (1 << (r % 32)).to(tl.int32), mask=r < M)


@triton.jit
def _softmax_kernel(
    f_ptr,
    rows_ptr,
    bits_ptr,
    top_ptr,
    total_ptr,
    mean_ptr,
    N,
    M,
    n,
    words,
    scale,
    length,
    C: tl.constexpr,
    MASKED: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Program (block of anchors, share of the rows): running maximum, sum and weighted sum.

    As in flash attention, with the rows as keys and values. Logits are in base 2.
    """
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    f = tl.load(
        f_ptr + i[:, None].to(tl.int64) * C + c[None, :],
        mask=(i[:, None] < N) & (c[None, :] < C),
        other=0.0,
    )
    f = (f.to(tl.float32) * scale).to(tl.float16)  # [BN, BC]
    top = tl.full([BN], float("-inf"), tl.float32)
    total = tl.zeros([BN], tl.float32)
    mean = tl.zeros([BN, BC], tl.float32)
    bits_ptr += (i % n).to(tl.int64) * words
    start = tl.program_id(1) * length
    for first in range(start, tl.minimum(start + length, M), BM):
        j = first + tl.arange(0, BM)
        v = tl.load(
            rows_ptr + j[:, None].to(tl.int64) * C + c[None, :],
            mask=(j[:, None] < M) & (c[None, :] < C),
            other=0.0,
        )  # [BM, BC]
        x = tl.dot(f, tl.trans(v))  # [BN, BM]
        x = tl.where(j[None, :] < M, x, float("-inf"))
        if MASKED:
            column = tl.arange(0, BM)[None, :]
            word = tl.load(bits_ptr + first // 32)[:, None]  # bits of 32 rows for each anchor
            for b in tl.static_range(1, BM // 32):
                following = tl.load(bits_ptr + first // 32 + b)[:, None]
                word = tl.where(column // 32 == b, following, word)
            x = tl.where((word >> (column % 32)) & 1 != 0, float("-inf"), x)
        new = tl.maximum(top, tl.max(x, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)  # no inf - inf where all were absent
        p = tl.exp2(x - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        mean = tl.dot((p * SHARES).to(tl.float16), v, mean * shrink[:, None])
        top = new
    out = tl.program_id(1).to(tl.int64) * N + i
    tl.store(top_ptr + out, top, mask=i < N)
    tl.store(total_ptr + out, total, mask=i < N)
    tl.store(
        mean_ptr + out[:, None] * C + c[None, :], mean, mask=(i[:, None] < N) & (c[None, :] < C)
    )


@torch.no_grad()
def softmax_pass(
    f: Tensor, rows: Tensor, T: float, absent: Tensor | None = None, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `softmax.softmax_pass`: f [N, C], rows [M, C], absent [n, R] -> lse, mean, top."""
    N, C = f.shape
    M = len(rows)
    n = 1 if absent is None else len(absent)
    tile = tile or softmax_tile(C)
    blocks = triton.cdiv(N, tile.anchors)
    most = max(1, 2 * _processors(f.device) // max(1, blocks))  # shares that keep the chip busy
    length = triton.cdiv(triton.cdiv(M, most), tile.rows) * tile.rows
    shares = triton.cdiv(M, length)
    words = triton.cdiv(M, tile.rows) * tile.rows // 32
    bits = torch.zeros(n, words, dtype=torch.int32, device=f.device)
    top, total = f.new_empty(2, shares, N, dtype=torch.float32)
    mean = f.new_empty(shares, N, C, dtype=torch.float32)
    with torch.cuda.device_of(f):
        if absent is not None:
            R = absent.shape[1]
            parts = triton.cdiv(R, 128)
            _bits_kernel[(n, parts)](absent.contiguous(), bits, R, M, words, BLOCK=128)
        tensors = f.contiguous(), rows.half().contiguous(), bits, top, total, mean
        scalars = N, M, n, words, math.log2(math.e) / T, length
        masked = {"MASKED": absent is not None, "SHARES": _SCALE}
        _softmax_kernel[(blocks, shares)](*tensors, *scalars, **masked, **_cut(tile, C))
    highest = top.amax(0)  # [N]
    weight = torch.exp2(top - torch.where(highest == -torch.inf, 0, highest))  # [shares, N]
    whole = (weight * total).sum(0)
    mean = torch.einsum("sn,snc->nc", weight, mean) / (whole.clamp(min=1) * _SCALE)[:, None]
    return (highest + whole.log2()) * math.log(2), mean, highest * math.log(2)


# ---------------------------------------------------------------- search


@triton.jit
def _maxima_kernel(
    q_ptr,
    bank_ptr,
    out_ptr,
    N,
    M,
    groups,
    per,
    C: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Program (block of queries, `per` groups of BM rows): the best score of each query in each."""
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    q = tl.load(
        q_ptr + i[:, None].to(tl.int64) * C + c[None, :],
        mask=(i[:, None] < N) & (c[None, :] < C),
        other=0.0,
    )
    first = tl.program_id(1) * per
    out_ptr += first.to(tl.int64) * N + i
    for g in range(first, tl.minimum(first + per, groups)):
        j = g * BM + tl.arange(0, BM)
        v = tl.load(
            bank_ptr + j[:, None].to(tl.int64) * C + c[None, :],
            mask=(j[:, None] < M) & (c[None, :] < C),
            other=0.0,
        )
        x = tl.where(j[None, :] < M, tl.dot(q, tl.trans(v)), float("-inf"))  # [BN, BM]
        tl.store(out_ptr + (g - first) * N, tl.max(x, 1), mask=i < N)


@triton.jit
def _rescore_kernel(
    q_ptr, bank_ptr, group_ptr, out_ptr, M, k, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    """Program (query, one of its k groups): the scores of the group's rows in float32."""
    i, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BC)
    q = tl.load(q_ptr + i * C + c, mask=c < C, other=0.0).to(tl.float32)
    j = tl.load(group_ptr + i * k + slot) * BM + tl.arange(0, BM)  # int64 [BM]
    v = tl.load(
        bank_ptr + j[:, None] * C + c[None, :], mask=(j[:, None] < M) & (c[None, :] < C), other=0.0
    )
    score = tl.sum(v.to(tl.float32) * q[None, :], 1)
    tl.store(
        out_ptr + (i * k + slot) * BM + tl.arange(0, BM), tl.where(j < M, score, float("-inf"))
    )


def group_maxima(queries: Tensor, bank: Tensor, tile: Tile | None = None) -> Tensor:
    """The best score of each query in each group of GROUP rows: [groups, N] float32.

    queries [N, C], bank [M, C], both float16.
    """
    N, C = queries.shape
    M = len(bank)
    tile = tile or search_tile(C)
    groups = triton.cdiv(M, tile.rows)
    blocks = triton.cdiv(N, tile.anchors)
    per = max(1, min(64, triton.cdiv(groups * blocks, 4 * _processors(bank.device))))
    out = torch.empty(groups, N, device=bank.device)
    with torch.cuda.device_of(bank):
        # Blocks of queries vary fastest: programs that run together share rows in the L2 cache.
        tensors = queries.contiguous(), bank.contiguous(), out
        grid = blocks, triton.cdiv(groups, per)
        _maxima_kernel[grid](*tensors, N, M, groups, per, **_cut(tile, C))
    return out


def rescore(queries: Tensor, bank: Tensor, groups: Tensor) -> Tensor:
    """Scores in float32 of the rows of groups [N, k]: [N, k * GROUP], -inf past the end of bank."""
    N, C = queries.shape
    k = groups.shape[1]
    out = torch.empty(N, k * GROUP, device=bank.device)
    with torch.cuda.device_of(bank):
        tensors = queries.contiguous(), bank.contiguous(), groups.contiguous(), out
        sides = {"C": C, "BM": GROUP, "BC": triton.next_power_of_2(C)}
        _rescore_kernel[(N, k)](*tensors, len(bank), k, **sides, num_warps=4)
    return out


def _cut(tile: Tile, C: int) -> dict:
    """What a tile says to a kernel, and to Triton, of how to cut rows of C numbers."""
    sides = {"C": C, "BN": tile.anchors, "BM": tile.rows, "BC": max(16, triton.next_power_of_2(C))}
    return {**sides, "num_warps": tile.warps, "num_stages": tile.stages}


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
