"""Make the sets of a round from the pairs that a miner found. All miners share it.

Old pairs are judged again, then the in-degree caps and the budget are applied.

Letters: M images, C feature dimension, E directed edges as found, U pairs: undirected, unless the
rules say that edges have a direction.
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
    directed: i -> j makes j a positive of i and not i one of j, as in AND.
    replace: no pair of the round before stays unless it was found again, as in AND, LA and PAD.
    """

    budget: float | None = None
    max_share: float | None = None
    largest: int | None = None
    keep: bool = False
    floor: float = 0.05
    trust: float | None = None
    directed: bool = False
    replace: bool = False

    @property
    def edges_a_pair(self) -> int:
        return 1 if self.directed else 2

    def ends(self, src: Tensor, dst: Tensor) -> Tensor:
        """Which images of pairs src [U] -> dst [U] become positives of another: [U, 1 or 2]."""
        return dst[:, None] if self.directed else torch.stack([src, dst], dim=1)

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
    put an image over the cap is passed over, and the budget ends the list. At the end trusted(a
    [U], b [U]) says how many of these pairs, surest first, are to stay; where that leaves smaller
    sets, the cap of their size holds. Pairs that are never dropped (`rules.keep`) stay anyway, and
    are not among those that it is asked about.
    """
    M = len(features)
    distinct = lambda *edges: distinct_edges(M, *edges, undirected=not rules.directed)
    # a pair has its lower image first, unless edges have a direction
    a, b, (sureness, weight) = distinct(found.src, found.dst, [found.sureness, found.weight])
    if weight is None:
        weight = torch.ones_like(sureness)
    old_a, old_b, (old_sureness, old_weight) = distinct(
        old.sources(), old.members, [old.sureness, old.weights]
    )
    num_new, num_old = len(a), len(old_a)
    if rules.replace:
        old_sureness = torch.full_like(old_sureness, -torch.inf)
    elif num_new and not rules.keep:
        today = pair_cosines(features, a, b)
        then = pair_cosines(features, old_a, old_b)
        old_sureness = _judge(today, sureness, then, rules.floor)
    in_old = torch.ones(num_new + num_old, device=a.device)
    in_old[:num_new] = 0
    a, b, (sureness, weight, in_old) = distinct(
        torch.cat([a, old_a]),
        torch.cat([b, old_b]),
        [torch.cat([sureness, old_sureness]), torch.cat([weight, old_weight]), in_old],
    )
    rank_by = torch.where(in_old > 0, torch.inf, sureness) if rules.keep else sureness
    chosen = _choose(a, b, rank_by, M, rules)
    never_dropped = int((rank_by == torch.inf).sum())
    new = chosen[never_dropped:]
    number = never_dropped + trusted(a[new], b[new])
    if number < len(chosen):
        chosen = chosen[:number]
        size = rules.edges_a_pair * number / M
        room = torch.full((M,), rules.cap(M, size), device=a.device)
        fits = under_cap(rules.ends(a[chosen], b[chosen]), room)
        fits[:never_dropped] = True
        chosen = chosen[fits]
    sets = PositiveSets.from_edges(
        M,
        a[chosen],
        b[chosen],
        weight[chosen],
        symmetric=not rules.directed,
        sureness=sureness[chosen],
    )
    stayed = int(in_old[chosen].sum(dtype=torch.float64))
    return sets, {
        "edges_found": rules.edges_a_pair * num_new,
        "edges_added": rules.edges_a_pair * (len(chosen) - stayed),
        "edges_dropped": rules.edges_a_pair * (num_old - stayed),
    }


def _choose(
    a: Tensor, b: Tensor, sureness: Tensor, M: int, rules: Rules, piece: int = 1 << 22
) -> Tensor:
    """The places of the pairs a [U], b [U] (sorted by image) that stay, surest first.

    A pair of sureness inf always stays, one of -inf never.
    """
    order = sureness.sort(descending=True, stable=True).indices
    kept = int((sureness == torch.inf).sum())
    out = int((sureness == -torch.inf).sum())
    always, rest = order[:kept], order[kept : len(order) - out]
    bound = len(rest)
    if rules.budget is not None:
        bound = max(0, round(rules.budget * M / rules.edges_a_pair) - kept)
    room = torch.full((M,), rules.cap(M), device=a.device)
    room -= torch.bincount(rules.ends(a[always], b[always]).flatten(), minlength=M)
    chosen = [always]
    for part in rest.split(piece):  # piece by piece gives the same pairs as all at once
        taken = part[under_cap(rules.ends(a[part], b[part]), room)][:bound]
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


def under_cap(ends: Tensor, room: Tensor) -> Tensor:
    """Which of the pairs with these images, ends [U, n], surest first, are taken: [U] bool.

    room [M]: how many more pairs each image may have; it is brought up to date. The result is that
    of walking down the list and taking a pair where all its images have room. It is found in
    rounds: a pair is safe where each of its images has more room than undecided pairs above this
    one, and it is out where one of them has no room.
    """
    taken = torch.zeros(len(ends), dtype=torch.bool, device=ends.device)
    undecided = torch.arange(len(ends), device=ends.device)
    while len(undecided):
        undecided = undecided[(room[ends[undecided]] > 0).all(1)]
        images = ends[undecided]  # [U, n]
        safe = (_earlier(images.flatten()).view_as(images) < room[images]).all(1)
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
