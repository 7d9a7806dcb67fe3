"""From what a miner found to the sets of a round: old pairs judged anew, in-degree caps, the budget. All miners share it.

Letters: M images, C feature dimension, E directed edges as found, U undirected pairs.
"""

from dataclasses import dataclass

import torch

from moco_isl.mining.positives import PositiveSets

Tensor = torch.Tensor


@dataclass
class Edges:
    """Directed edges as a miner finds them: any order, doubles allowed. sureness: larger is surer, on one scale a round."""

    src: Tensor  # [E] integers
    dst: Tensor  # [E]
    sureness: Tensor  # [E] float32
    weight: Tensor | None = None  # [E] float32, 1 where None


@dataclass
class Rules:
    """What a round may keep.

    budget: positives an image on average. Exactly round(budget * M / 2) pairs stay where so many were found, that is
        budget * M directed edges to within one. None: no bound.
    max_share: no image is a positive of more than this share of all images (of at least one).
    keep: sets of earlier rounds stay as they are (the paper only adds); the budget then bounds what is added.
    floor: of an old pair and the pairs found this round, the old one leaves if its cosine is below this quantile of theirs.
    """

    budget: float | None = None
    max_share: float = 0.05
    keep: bool = False
    floor: float = 0.05


def settle(features: Tensor, found: Edges, old: PositiveSets, rules: Rules) -> tuple[PositiveSets, dict]:
    """features [M, C], the edges found and the sets so far -> the new sets, and how many directed edges came and went.

    Surest first, greedily: pairs are taken in the order of their sureness (equal ones by image), one that would put an
    image over the cap is passed over, and the budget ends the list.
    """
    M = len(features)
    new = PositiveSets.from_edges(M, found.src, found.dst, found.weight, sureness=found.sureness)
    lower, higher, sureness, weight = _pairs(new)
    old_lower, old_higher, old_sureness, old_weight = _pairs(old)
    if len(old_lower) and not rules.keep and len(lower):
        old_sureness, stays = _judge(features, (lower, higher, sureness), (old_lower, old_higher), rules.floor)
        old_lower, old_higher, old_sureness, old_weight = (
            x[stays] for x in (old_lower, old_higher, old_sureness, old_weight))
    if rules.keep:  # above everything new, among themselves as before
        old_sureness = torch.full_like(old_sureness, torch.inf)
    union = PositiveSets.from_edges(M, torch.cat([lower, old_lower]), torch.cat([higher, old_higher]),
                                    torch.cat([weight, old_weight]), symmetric=False,
                                    sureness=torch.cat([sureness, old_sureness]))
    src, dst, sureness, weight = union.sources(), union.members.long(), union.sureness, union.weights
    order = sureness.sort(descending=True, stable=True).indices  # from_edges left them by (lower, sureness, higher)
    src, dst, sureness, weight = (x[order] for x in (src, dst, sureness, weight))
    taken = under_cap(src, dst, M, max(1, int(rules.max_share * M)), always=torch.isinf(sureness))
    if rules.budget is not None:
        bound = round(rules.budget * M / 2)
        taken &= (taken.cumsum(0) <= bound) | torch.isinf(sureness)
    src, dst, sureness, weight = (x[taken] for x in (src, dst, sureness, weight))
    sets = PositiveSets.from_edges(M, src, dst, weight, sureness=sureness)
    stayed = _common(old, sets)
    return sets, {"edges_found": new.num_edges, "edges_added": sets.num_edges - stayed, "edges_dropped": old.num_edges - stayed}


def _pairs(sets: PositiveSets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each mutual pair once: lower [U], higher [U] int64, sureness [U], weight [U]."""
    src, dst = sets.sources(), sets.members.long()
    once = src < dst
    return src[once], dst[once], sets.sureness[once], sets.weights[once]


def pair_cosines(features: Tensor, a: Tensor, b: Tensor, chunk: int = 1 << 18) -> Tensor:
    """features [M, C], images a [U], b [U] -> cosines [U] float32."""
    parts = [(features[a[i:i + chunk]].float() * features[b[i:i + chunk]].float()).sum(1) for i in range(0, len(a), chunk)]
    return torch.cat(parts) if parts else torch.empty(0, device=features.device)


def _judge(features: Tensor, new: tuple[Tensor, Tensor, Tensor], old: tuple[Tensor, Tensor], floor: float) -> tuple[Tensor, Tensor]:
    """Old pairs under today's features, measured by today's pairs: sureness [U_old] and which stay [U_old] bool.

    A pair mined in an earlier round has no proxy today, but it has a cosine. It leaves where that is below the `floor`
    quantile of the cosines of the pairs found today. Where it stays, it is as sure as a pair found today whose cosine
    has the same rank: both then stand on one scale, whatever the miner's sureness means.
    """
    cosine = pair_cosines(features, *new[:2]).sort().values
    scale = new[2].sort().values
    today = pair_cosines(features, *old)
    rank = torch.searchsorted(cosine, today, right=True).sub_(1)
    stays = today >= cosine[int(floor * (len(cosine) - 1))]
    return scale[rank.clamp(min=0)], stays


def under_cap(src: Tensor, dst: Tensor, M: int, cap: int, always: Tensor | None = None) -> Tensor:
    """Pairs src [U], dst [U], surest first -> [U] bool: which a greedy pass takes that gives no image more than cap.

    The same as walking down the list and taking a pair where both its images have room. In rounds: a pair that has
    fewer than cap - taken undecided pairs above it at both its images is safe; one with a full image is out.
    `always` [U] bool: pairs taken whatever the cap (they count for it).
    """
    taken = torch.zeros(len(src), dtype=torch.bool, device=src.device)
    room = torch.full((M,), cap, device=src.device)
    open_ = torch.arange(len(src), device=src.device)
    if always is not None and bool(always.any()):
        taken |= always
        room -= torch.bincount(torch.cat([src[always], dst[always]]), minlength=M)
        open_ = open_[~always]
    while len(open_):
        a, b = src[open_], dst[open_]
        fits = (room[a] > 0) & (room[b] > 0)
        open_, a, b = open_[fits], a[fits], b[fits]
        if not len(open_):
            break
        above_a, above_b = _above(a, b)
        safe = (above_a < room[a]) & (above_b < room[b])
        taken[open_[safe]] = True
        room -= torch.bincount(torch.cat([a[safe], b[safe]]), minlength=M)
        open_ = open_[~safe]
    return taken


def _above(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs a [U], b [U] in order -> for each end how many earlier pairs its image stands in, [U] and [U]."""
    image = torch.stack([a, b], 1).flatten()  # earlier pairs first
    sorted_, order = image.sort(stable=True)
    position = torch.arange(len(image), device=a.device)
    first = torch.ones_like(sorted_, dtype=torch.bool)
    torch.ne(sorted_[1:], sorted_[:-1], out=first[1:])
    start = torch.where(first, position, 0).cummax(0).values
    above = torch.empty_like(position)
    above[order] = position - start
    above = above.view(-1, 2)
    return above[:, 0], above[:, 1]


def _common(a: PositiveSets, b: PositiveSets) -> int:
    """Directed edges that are in both."""
    key = lambda sets: sets.sources() * sets.num_images + sets.members
    return int(torch.isin(key(a), key(b)).sum()) if a.num_edges and b.num_edges else 0
