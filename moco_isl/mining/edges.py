"""Make the sets of a round from the pairs that a miner found. All miners share it.

Old pairs are judged again, then the in-degree caps and the budget are applied.

Letters: M images, C feature dimension, E directed edges as found, U undirected pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moco_isl.mining.positives import PositiveSets, distinct_edges

Tensor = torch.Tensor


@dataclass
class Edges:
    """Directed edges as a miner finds them: in any order, the same edge any number of times.

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
    max_share: no image is a positive of more than this share of all images (of at least one). None:
        as `cap` says, which follows the size of the sets.
    largest: and of no more images than this. None: no such bound.
    keep: sets of earlier rounds stay as they are (the paper only adds); the budget then bounds what
        is added.
    floor: an old pair that was not found again leaves where its cosine is below this quantile of
        the cosines of the pairs found today.
    trust: the pairs that are left, surest first, are cut to the longest list of which this share is
        right by the estimate without labels (estimate.py); the budget still bounds it. None: the
        estimate is only reported.
    """

    budget: float | None = None
    max_share: float | None = None
    largest: int | None = None
    keep: bool = False
    floor: float = 0.05
    trust: float | None = None

    def cap(self, M: int, size: float | None = None) -> int:
        """How many sets of M images may hold one image, where sets have `size` on average.

        size: None for the budget. With no share given, 4 times the size, and never less than 5 % of
        the images or 100. So the largest set is bounded whatever M is.
        """
        largest = M if self.largest is None else self.largest
        if self.max_share is not None:
            return max(1, min(int(self.max_share * M), largest))
        size = self.budget if size is None else size
        wide = 0 if size is None else math.ceil(4 * size)
        return max(1, min(max(min(M // 20, 100), wide), largest))


def settle(
    features: Tensor,
    found: Edges,
    old: PositiveSets,
    rules: Rules,
    trusted: Callable[[Tensor, Tensor], int] = lambda lower, higher: len(lower),
) -> tuple[PositiveSets, dict]:
    """Make the new sets from the edges found and the sets so far.

    features [M, C]. Returns the new sets, and how many directed edges were added and removed.
    Greedy: pairs are taken in the order of their sureness (equal ones by image), a pair that would
    put an image over the cap is passed over, and the budget ends the list. At the end trusted(lower
    [U], higher [U]) says how many of these pairs, surest first, are to stay; where that leaves
    smaller sets, the cap of their size holds. Pairs that are never dropped (`rules.keep`) stay
    anyway, and are not among those that it is asked about.
    """
    M = len(features)
    distinct = lambda src, dst, values: distinct_edges(M, src, dst, values, undirected=True)
    lower, higher, (sureness, weight) = distinct(
        found.src, found.dst, [found.sureness, found.weight]
    )
    if weight is None:
        weight = torch.ones_like(sureness)
    old_lower, old_higher, (old_sureness, old_weight) = distinct(
        old.sources(), old.members, [old.sureness, old.weights]
    )
    num_new, num_old = len(lower), len(old_lower)
    if num_new and not rules.keep:
        today = pair_cosines(features, lower, higher)
        then = pair_cosines(features, old_lower, old_higher)
        old_sureness = _judge(today, sureness, then, rules.floor)
    in_old = torch.ones(num_new + num_old, device=lower.device)
    in_old[:num_new] = 0
    lower, higher, (sureness, weight, in_old) = distinct(
        torch.cat([lower, old_lower]),
        torch.cat([higher, old_higher]),
        [torch.cat([sureness, old_sureness]), torch.cat([weight, old_weight]), in_old],
    )
    rank_by = torch.where(in_old > 0, torch.inf, sureness) if rules.keep else sureness
    chosen = _choose(lower, higher, rank_by, M, rules)
    never_dropped = int((rank_by == torch.inf).sum())
    new = chosen[never_dropped:]
    number = never_dropped + trusted(lower[new], higher[new])
    if number < len(chosen):
        chosen = chosen[:number]
        room = torch.full((M,), rules.cap(M, 2 * number / M), device=lower.device)
        fits = under_cap(lower[chosen], higher[chosen], room)
        fits[:never_dropped] = True
        chosen = chosen[fits]
    sets = PositiveSets.from_edges(
        M, lower[chosen], higher[chosen], weight[chosen], sureness=sureness[chosen]
    )
    stayed = int(in_old[chosen].sum(dtype=torch.float64))
    return sets, {
        "edges_found": 2 * num_new,
        "edges_added": 2 * (len(chosen) - stayed),
        "edges_dropped": 2 * (num_old - stayed),
    }


def _choose(
    lower: Tensor, higher: Tensor, sureness: Tensor, M: int, rules: Rules, piece: int = 1 << 22
) -> Tensor:
    """The places of the pairs [U] (sorted by image) that stay, surest first.

    A pair of sureness inf always stays, one of -inf never.
    """
    order = sureness.sort(descending=True, stable=True).indices
    kept = int((sureness == torch.inf).sum())
    out = int((sureness == -torch.inf).sum())
    always, rest = order[:kept], order[kept : len(order) - out]
    bound = len(rest) if rules.budget is None else max(0, round(rules.budget * M / 2) - kept)
    room = torch.full((M,), rules.cap(M), device=lower.device)
    room -= torch.bincount(torch.cat([lower[always], higher[always]]), minlength=M)
    chosen = [always]
    for part in rest.split(piece):  # piece by piece gives the same pairs as all at once
        taken = part[under_cap(lower[part], higher[part], room)][:bound]
        chosen.append(taken)
        bound -= len(taken)
        if not bound:
            break
    return torch.cat(chosen)


def pair_cosines(features: Tensor, a: Tensor, b: Tensor, chunk: int = 1 << 18) -> Tensor:
    """features [M, C], images a [U], b [U] -> cosines [U] float32."""
    cosine = torch.empty(len(a), device=features.device)
    for i in range(0, len(a), chunk):
        x = features[a[i : i + chunk]].float()
        y = features[b[i : i + chunk]].float()
        cosine[i : i + chunk] = (x * y).sum(1)
    return cosine


def _judge(cosine: Tensor, sureness: Tensor, old_cosine: Tensor, floor: float) -> Tensor:
    """The sureness of old pairs on the scale of the pairs found today; -inf where they must go.

    cosine [U], sureness [U] of the pairs found today, old_cosine [U_old]: all in today's features.
    An old pair goes where its cosine is below the `floor` quantile of today's. Where it stays, it
    is as sure as the pair of today whose cosine has the same rank. So both stand on one scale,
    whatever the miner's sureness means.
    """
    cosine = cosine.sort().values
    scale = sureness.sort().values
    rank = torch.searchsorted(cosine, old_cosine, right=True).sub_(1).clamp_(min=0)
    least = cosine[int(floor * (len(cosine) - 1))]
    return torch.where(old_cosine >= least, scale[rank], -torch.inf)


def under_cap(a: Tensor, b: Tensor, room: Tensor) -> Tensor:
    """Which of the pairs a [U], b [U], surest first, are taken under the cap: [U] bool.

    room [M]: how many more pairs each image may have; it is brought up to date. The result is that
    of walking down the list and taking a pair where both its images have room. It is found in
    rounds: a pair is safe where each of its images has more room than undecided pairs above this
    one, and it is out where one of them has no room.
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
