"""Nearest rows and most similar pairs, in pieces: nothing of size M x M is held.

Rows are unit vectors, so that a dot product is the cosine. `topk` may use a fused kernel, or an
approximate index (ivf.py) where the bank given is one.

Letters: M bank rows, Q queries, C feature dimension, k neighbours.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from moco_isl.ops import fused

if TYPE_CHECKING:
    from moco_isl.ops.ivf import IVF

Tensor = torch.Tensor
Tick = Callable[[], None]  # called often during long work, which ends with what it raises

_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}  # memory of one piece of the score matrix
_COLUMNS = {"cpu": 65536, "cuda": 131072}  # most columns of one piece
_GROUP = 32  # columns whose maximum is looked at first


def _of(table: dict[str, int], device: torch.device) -> int:
    return table.get(device.type, table["cpu"])


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top k of each row of scores [Q, n]; a small k by the maxima of groups of columns."""
    Q, n = scores.shape
    groups = n // _GROUP
    if groups < 4 * k:
        return scores.topk(min(k, n), dim=1)
    whole = groups * _GROUP
    # The k best lie in the k groups with the largest maxima, or in the columns left over.
    top = scores[:, :whole].view(Q, groups, _GROUP).amax(2).topk(k, dim=1).indices  # [Q, k]
    within = torch.arange(_GROUP, device=scores.device)
    column = (top[:, :, None] * _GROUP + within).flatten(1)  # [Q, k * _GROUP]
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
    """queries [Q, C], bank [M, C] -> cosine [Q, k] float32, falling, and row [Q, k] int64.

    Equal cosines are in the order of their rows. exclude [Q] int64: a row that the query may not
    find, such as its own; -1 for none. Scores are computed in the bank's dtype (float32
    accumulation); of half-precision banks those of the rows found are computed again in float32.
    bytes_limit: of scores held at a time; where it is None, a GPU searches by a kernel that writes
    none. bank may be an `ivf.IVF`: then a few of the nearest are missed and bytes_limit is ignored.
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
    """The share of the queries [Q, C] that `topk` searches a second time in bank [M, C].

    It does so where float16 cannot tell their neighbours from others. None where no kernel
    searches. For benchmarks: it costs a search.
    """
    kernels = _kernels_for(bank, k)
    if kernels is None:
        return None
    sure = fused.search(kernels, queries, bank, k, exclude)[2]  # [Q]
    return 1 - float(sure.float().mean())


def _kernels_for(bank: Tensor, k: int):
    """The kernels where they serve this bank and k is small beside its groups; else None."""
    kernels = fused.kernels_for(bank)
    return kernels if kernels is not None and 4 * k * kernels.GROUP <= len(bank) else None


def _topk_fused(
    kernels, queries: Tensor, bank: Tensor, k: int, exclude: Tensor | None, tick
) -> tuple[Tensor, Tensor]:
    """As `topk`, by the kernel.

    Queries whose neighbours half precision cannot tell from others are searched again, without it.
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
    spare = 0 if bank.dtype == torch.float32 else 6  # rows beyond k, because scores are rounded
    columns = min(M, max(4 * k, _of(_COLUMNS, bank.device)))
    rows = max(1, limit // (columns * 4))
    cosine = torch.empty(len(queries), k, device=bank.device)
    index = torch.empty(len(queries), k, dtype=torch.int64, device=bank.device)
    for i in range(0, len(queries), rows):
        q = queries[i : i + rows].to(bank.dtype)
        own = None if exclude is None else exclude[i : i + rows]
        wide = min(k + spare, M - (own is not None))
        value, at = _search(q, bank, wide, own, columns, tick)
        if bank.dtype != torch.float32:
            value = torch.einsum("qc,qkc->qk", queries[i : i + rows].float(), bank[at].float())
        value, at = in_order(value, at)
        cosine[i : i + rows] = value[:, :k]
        index[i : i + rows] = at[:, :k]
    return cosine, index


def _search(
    q: Tensor, bank: Tensor, k: int, own: Tensor | None, columns: int, tick
) -> tuple[Tensor, Tensor]:
    """As `topk`, the best k by the scores in the bank's dtype, equal ones in any order."""
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
            v = torch.cat([value, v], 1)
            at = torch.cat([index, at], 1)
            if v.shape[1] > k:
                v, keep = v.topk(k, dim=1)
                at = at.gather(1, keep)
        value = v
        index = at
    return value, index


def top_pairs(
    features: Tensor,
    total: int,
    bytes_limit: int | None = None,
    seed: int = 0,
    tick: Tick | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """features [M, C] -> the `total` most similar pairs: cosine, lower, higher, each [total].

    The most similar come first, and of equal ones the lowest images. Exact up to the rounding of
    scores in the features' dtype: a bound is guessed from a sample of rows, all pairs above it are
    collected, and the best of them are returned. A bound that lets too few through is lowered.
    Raises ValueError if there are fewer pairs.
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
    """A cosine that a little more than `share` of all pairs exceed."""
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
    cosines = []
    keys = []
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
