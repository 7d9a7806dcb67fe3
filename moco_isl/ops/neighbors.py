"""Nearest rows and most similar pairs, in pieces: nothing of size M x M is ever held.

Letters: M bank rows, Q queries, C feature dimension, k neighbours. Rows are unit vectors: a dot
product is the cosine. `topk` and `top_pairs` are the only two ways in. Behind `topk` stand a fused
kernel and, where the bank given is one, an approximate index (ivf.py).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from moco_isl.ops import fused

if TYPE_CHECKING:
    from moco_isl.ops.ivf import IVF

Tensor = torch.Tensor
Tick = Callable[[], None]  # asked often while long work goes on; what it raises ends it

# of one piece of the score matrix: a CPU is quick with small ones
_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
_COLUMNS = {"cpu": 65536, "cuda": 131072}  # of one piece, at most
_GROUP = 32  # columns whose maximum is looked at first


def _of(table: dict[str, int], device: torch.device) -> int:
    return table.get(device.type, table["cpu"])


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top k of each row of scores [Q, n].

    Where k is small, by way of the maxima of groups of columns.
    """
    Q, n = scores.shape
    groups = n // _GROUP
    if groups < 4 * k:
        return scores.topk(min(k, n), dim=1)
    whole = groups * _GROUP
    # The k best lie in the k groups with the largest maxima, or in the columns left over.
    top = scores[:, :whole].view(Q, groups, _GROUP).amax(2).topk(k, dim=1).indices  # [Q, k]
    # [Q, k * _GROUP]
    column = (top[:, :, None] * _GROUP + torch.arange(_GROUP, device=scores.device)).flatten(1)
    if whole < n:
        rest = torch.arange(whole, n, device=scores.device).expand(Q, -1)
        column = torch.cat([column, rest], 1)
    value, at = scores.gather(1, column).topk(k, dim=1)
    return value, column.gather(1, at)


def topk(
    queries: Tensor,
    bank: "Tensor | IVF",
    k: int,
    exclude: Tensor | None = None,
    bytes_limit: int | None = None,
    tick: Tick | None = None,
) -> tuple[Tensor, Tensor]:
    """queries [Q, C], bank [M, C] -> cosine [Q, k] float32, falling, and row [Q, k] int64; equal
    ones by row.

    exclude [Q] (int64) names a bank row an own query may not find (its own; -1 for none). Scores
    are computed in the bank's dtype (float32 accumulation); those of half-precision banks are
    recomputed in float32 for the rows found. Holds bytes_limit bytes of scores at a time; without
    one, a GPU searches by a kernel that never writes them. bank may be an `ivf.IVF` of such rows:
    then a few of the nearest are missed, and bytes_limit has no meaning.
    Raises ValueError if the bank has too few rows for k.
    """
    M = len(bank)
    if k > M - (exclude is not None):
        raise ValueError(f"{k} nearest were asked of a bank of {M} rows")
    if not isinstance(bank, Tensor):
        return bank.topk(queries, k, exclude, tick)
    kernels = _kernels_for(bank, k) if bytes_limit is None else None
    if kernels is not None:
        return _topk_fused(kernels, queries, bank, k, exclude, tick)
    return _topk_plain(queries, bank, k, exclude, bytes_limit, tick)


def searched_again(
    queries: Tensor, bank: Tensor, k: int, exclude: Tensor | None = None
) -> float | None:
    """The share of the queries [Q, C] that `topk` searches a second time, plainly, since float16
    could not tell their neighbours in bank [M, C] from others; None where it does not search by the
    kernel. Costs a search.
    """
    kernels = _kernels_for(bank, k)
    if kernels is None:
        return None
    sure = fused.search(kernels, queries, bank, k, exclude)[2]  # [Q]
    return 1 - float(sure.float().mean())


def _kernels_for(bank: Tensor, k: int):
    """The kernels where they serve this bank and its groups of rows are many beside k; else
    None.
    """
    kernels = fused.kernels_for(bank)
    return kernels if kernels is not None and 4 * k * kernels.GROUP <= len(bank) else None


def _topk_fused(
    kernels, queries: Tensor, bank: Tensor, k: int, exclude: Tensor | None, tick
) -> tuple[Tensor, Tensor]:
    """As `topk`; the few queries whose neighbours half precision cannot tell apart from others are
    searched plainly.
    """
    cosine, index, sure = fused.search(kernels, queries, bank, k, exclude, tick)
    cosine, index = in_order(cosine, index)
    unsure = (~sure).nonzero().squeeze(1)
    if len(unsure):
        own = None if exclude is None else exclude[unsure]
        cosine[unsure], index[unsure] = _topk_plain(queries[unsure], bank, k, own, None, tick)
    return cosine, index


def in_order(cosine: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Columns sorted by falling cosine, equal ones by row."""
    order = index.argsort(dim=1)
    value, at = cosine.gather(1, order).sort(dim=1, descending=True, stable=True)
    return value, index.gather(1, order).gather(1, at)


def _topk_plain(
    queries: Tensor, bank: Tensor, k: int, exclude: Tensor | None, bytes_limit: int | None, tick
) -> tuple[Tensor, Tensor]:
    M = len(bank)
    limit = bytes_limit or _of(_BYTES, bank.device)
    columns = min(M, max(4 * k, _of(_COLUMNS, bank.device)))
    rows = max(1, limit // (columns * 4))
    cosine = torch.empty(len(queries), k, device=bank.device)
    index = torch.empty(len(queries), k, dtype=torch.int64, device=bank.device)
    for i in range(0, len(queries), rows):
        q = queries[i : i + rows].to(bank.dtype)
        own = None if exclude is None else exclude[i : i + rows]
        found = _search(q, bank, min(k + _spare(bank), M - (own is not None)), own, columns, tick)
        if bank.dtype != torch.float32:
            exact = torch.einsum(
                "qc,qkc->qk", queries[i : i + rows].float(), bank[found[1]].float()
            )
            found = exact, found[1]
        value, at = in_order(*found)
        cosine[i : i + rows], index[i : i + rows] = value[:, :k], at[:, :k]
    return cosine, index


def _spare(bank: Tensor) -> int:
    """Rows found beyond k, so that half-precision rounding of scores costs no true neighbour."""
    return 0 if bank.dtype == torch.float32 else 6


def _search(
    q: Tensor, bank: Tensor, k: int, own: Tensor | None, columns: int, tick
) -> tuple[Tensor, Tensor]:
    value = index = None
    for j in range(0, len(bank), columns):
        if tick is not None:
            tick()
        scores = q @ bank[j : j + columns].T  # [rows, columns]
        if own is not None:
            here = ((own >= j) & (own < j + scores.shape[1])).nonzero().squeeze(1)
            scores[here, own[here] - j] = -torch.inf
        v, at = _best(scores, min(k, scores.shape[1]))
        at = at + j
        if value is not None:
            v, at = torch.cat([value, v], 1), torch.cat([index, at], 1)
            if v.shape[1] > k:
                v, keep = v.topk(k, dim=1)
                at = at.gather(1, keep)
        value, index = v, at
    return value, index


def top_pairs(
    features: Tensor,
    total: int,
    bytes_limit: int | None = None,
    seed: int = 0,
    tick: Tick | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `total` most similar pairs of the whole data set: cosine [total], lower [total], higher
    [total], falling.

    Exact up to the rounding of scores in the features' dtype (equal cosines: lowest images first):
    a bound is guessed from a sample of rows, all pairs above it are collected from the upper
    triangle, and the best of them are returned; a bound that let too few through is lowered.
    features [M, C]. Raises ValueError if there are fewer pairs.
    """
    M = len(features)
    pairs = M * (M - 1) // 2
    if total > pairs:
        raise ValueError(f"{total} pairs were asked of {M} images, which make {pairs}")
    limit = bytes_limit or _of(_BYTES, features.device)
    bound = _guess_bound(features, total / pairs, seed)
    while True:
        cosine, key = _pairs_above(features, bound, limit, tick)
        if len(cosine) >= total:
            break
        bound = bound - 0.02 - 0.1 * abs(bound)
    key, order = key.sort()
    cosine, at = cosine[order].sort(descending=True, stable=True)
    key = key[at[:total]]
    return cosine[:total], torch.div(key, M, rounding_mode="floor"), key % M


def _guess_bound(features: Tensor, share: float, seed: int) -> float:
    """A cosine that somewhat more than `share` of all pairs exceed."""
    M = len(features)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(M, (min(M, 256),), generator=generator).to(features.device)
    columns = torch.randint(M, (min(M, 65536),), generator=generator).to(features.device)
    scores = (features[rows] @ features[columns].T).float()
    scores = scores[rows[:, None] != columns]
    count = min(len(scores), int(1.1 * share * len(scores)) + 32)
    return float(scores.topk(count).values[-1])


def _pairs_above(features: Tensor, bound: float, limit: int, tick) -> tuple[Tensor, Tensor]:
    """Cosines and keys (lower * M + higher) of all pairs above or at the bound."""
    M = len(features)
    side = max(1, min(M, int((limit / 4) ** 0.5)))
    cosines, keys = [], []
    for i in range(0, M, side):
        for j in range(i, M, side):
            if tick is not None:
                tick()
            scores = features[i : i + side] @ features[j : j + side].T
            passed = scores >= bound
            if i == j:
                passed.triu_(1)
            row, column = passed.nonzero(as_tuple=True)
            cosines.append(scores[row, column].float())
            keys.append((row + i) * M + column + j)
    return torch.cat(cosines), torch.cat(keys)
