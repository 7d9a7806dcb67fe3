"""From what a miner found to the sets of a round: old pairs judged anew, in-degree caps, the
budget. All miners share it.

Letters: M images, C feature dimension, E directed edges as found, U undirected pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moco_isl.mining.positives import PositiveSets, distinct_edges

Tensor = torch.Tensor


@dataclass
class Edges:
    """Directed edges as a miner finds them: any order, doubles allowed.

    sureness: larger is surer, on one scale a round.
    """

    src: Tensor  # [E] integers
    dst: Tensor  # [E]
    sureness: Tensor  # [E] float32
    weight: Tensor | None = None  # [E] float32, 1 where None


@dataclass
class Rules:
    """What a round may keep.

    budget: positives an image on average. Exactly round(budget * M / 2) pairs stay where so many
        were found, that is budget * M directed edges to within one. None: no bound.
    max_share: no image is a positive of more than this share of all images (of at least one).
    keep: sets of earlier rounds stay as they are (the paper only adds); the budget then bounds what
    is added.
    floor: of an old pair and the pairs found this round, the old one leaves if its cosine is below
    this quantile of theirs.
    trust: what then stays is the longest list, surest first, of which this share or more is right
        by the estimate without labels (`estimate.py`); the budget stays its bound. None: the
        estimate is only reported.
    """

    budget: float | None = None
    max_share: float = 0.05
    keep: bool = False
    floor: float = 0.05
    trust: float | None = None


def settle(
    features: Tensor,
    found: Edges,
    old: PositiveSets,
    rules: Rules,
    trusted: Callable[[Tensor, Tensor], int] = lambda lower, higher: len(lower),
) -> tuple[PositiveSets, dict]:
    """features [M, C], the edges found and the sets so far -> the new sets, and how many directed
    edges came and went.

    trusted(lower [U], higher [U]): asked last, how many of these pairs, surest first, are to stay;
    those that are never dropped do anyway. Surest first, greedily: pairs are taken in the order of
    their sureness (equal ones by image), one that would put an image over the cap is passed over,
    and the budget ends the list.
    """
    M = len(features)
    lower, higher, (sureness, weight) = distinct_edges(
        M, found.src, found.dst, [found.sureness, found.weight], undirected=True
    )
    new = len(lower)
    was = distinct_edges(
        M, old.sources(), old.members, [old.sureness, old.weights], undirected=True
    )
    was_sureness = (
        was[2][0]
        if rules.keep or not new
        else _judge(features, (lower, higher, sureness), was[:2], rules.floor)
    )
    weight = torch.ones_like(sureness) if weight is None else weight
    in_old = torch.cat(
        [torch.zeros(new, device=lower.device), torch.ones(len(was[0]), device=lower.device)]
    )
    lower, higher, (sureness, weight, in_old) = distinct_edges(
        M,
        torch.cat([lower, was[0]]),
        torch.cat([higher, was[1]]),
        [torch.cat([sureness, was_sureness]), torch.cat([weight, was[2][1]]), in_old],
        undirected=True,
    )
    rank_by = torch.where(in_old > 0, torch.inf, sureness) if rules.keep else sureness
    chosen = _choose(lower, higher, rank_by, M, rules)
    chosen = chosen[
        : max(trusted(lower[chosen], higher[chosen]), int((rank_by == torch.inf).sum()))
    ]
    sets = PositiveSets.from_edges(
        M, lower[chosen], higher[chosen], weight[chosen], sureness=sureness[chosen]
    )
    stayed = int(in_old[chosen].sum(dtype=torch.float64))
    return sets, {
        "edges_found": 2 * new,
        "edges_added": 2 * (len(chosen) - stayed),
        "edges_dropped": 2 * (len(was[0]) - stayed),
    }


def _choose(
    lower: Tensor, higher: Tensor, sureness: Tensor, M: int, rules: Rules, piece: int = 1 << 22
) -> Tensor:
    """Which pairs [U], sorted by image, stay: their places, surest first.

    Sureness inf: always; -inf: never.
    """
    order = sureness.sort(descending=True, stable=True).indices
    kept = int((sureness == torch.inf).sum())
    out = int((sureness == -torch.inf).sum())
    chosen, rest = [order[:kept]], order[kept : len(order) - out]
    bound = len(rest) if rules.budget is None else max(0, round(rules.budget * M / 2) - kept)
    room = torch.full((M,), max(1, int(rules.max_share * M)), device=lower.device)
    room -= torch.bincount(torch.cat([lower[chosen[0]], higher[chosen[0]]]), minlength=M)
    for part in rest.split(piece):  # greedy on a list is greedy on its pieces in turn
        taken = part[under_cap(lower[part], higher[part], room)][:bound]
        chosen.append(taken)
        bound -= len(taken)
        if not bound:
            break
    return torch.cat(chosen)


def pair_cosines(features: Tensor, a: Tensor, b: Tensor, chunk: int = 1 << 18) -> Tensor:
    """features [M, C], images a [U], b [U] -> cosines [U] float32."""
    parts = [
        (features[a[i : i + chunk]].float() * features[b[i : i + chunk]].float()).sum(1)
        for i in range(0, len(a), chunk)
    ]
    return torch.cat(parts) if parts else torch.empty(0, device=features.device)


def _judge(
    features: Tensor, new: tuple[Tensor, Tensor, Tensor], old: tuple[Tensor, Tensor], floor: float
) -> Tensor:
    """Old pairs under today's features, measured by today's pairs: their sureness [U_old], -inf
    where they must leave.

    A pair mined in an earlier round has no proxy today, but it has a cosine. It leaves where that
    is below the `floor` quantile of the cosines of the pairs found today. Where it stays, it is as
    sure as the pair found today whose cosine
    and sureness have the same rank: both then stand on one scale, whatever the miner's sureness
    means.
    """
    cosine = pair_cosines(features, *new[:2]).sort().values
    scale = new[2].sort().values
    today = pair_cosines(features, *old)
    rank = torch.searchsorted(cosine, today, right=True).sub_(1).clamp_(min=0)
    return torch.where(today >= cosine[int(floor * (len(cosine) - 1))], scale[rank], -torch.inf)


def under_cap(a: Tensor, b: Tensor, room: Tensor) -> Tensor:
    """Pairs a [U], b [U], surest first, and the room [M] their images have left -> which are taken,
    [U] bool.

    The same as walking down the list and taking a pair where both its images have room; `room` is
    brought up to date. In rounds: a pair with fewer undecided pairs above it than there is room, at
    both its images, is safe; one with a full image is out.
    """
    taken = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    undecided = torch.arange(len(a), device=a.device)
    while len(undecided):
        fits = (room[a[undecided]] > 0) & (room[b[undecided]] > 0)
        undecided = undecided[fits]
        images = torch.stack([a[undecided], b[undecided]], 1)  # [U, 2]
        safe = (_earlier(images.flatten()).view(-1, 2) < room[images]).all(1)
        taken[undecided[safe]] = True
        room -= torch.bincount(images[safe].flatten(), minlength=len(room))
        undecided = undecided[~safe]
    return taken


def _earlier(images: Tensor) -> Tensor:
    """images [n] -> how often each has come before in the list, [n]."""
    values, order = images.sort(stable=True)
    place = torch.arange(len(images), device=images.device)
    first = torch.ones_like(values, dtype=torch.bool)
    torch.ne(values[1:], values[:-1], out=first[1:])
    start = torch.where(first, place, 0).cummax(0).values
    return torch.empty_like(place).index_copy_(0, order, place - start)
