"""Positives drawn from the true labels, to study how right positives must be. Research only.

Letters: M images, C feature dimension, N anchors of a block, U undirected pairs, k neighbours of an
image.
"""

from dataclasses import dataclass

import torch

from moco_isl import dist
from moco_isl.errors import BadInput
from moco_isl.mining.edges import Edges, Rules
from moco_isl.mining.estimate import Views
from moco_isl.mining.positives import PositiveSets, distinct_edges
from moco_isl.mining.rounds import RoundMiner, over_blocks
from moco_isl.ops.neighbors import Tick
from moco_isl.options import LARGEST, opt

Tensor = torch.Tensor

_COLUMNS = 8192  # images looked through at a time for neighbours


@dataclass(eq=False)
class OracleMiner(RoundMiner):
    """Sets of `size` positives an image on average; the share `precision` has the anchor's label.

    Both hold to within one pair. "uniform" pairs are drawn, every image as an anchor equally often.
    "near" ones are each image's most similar one of its label (of another label), then each one's
    second, and so on: the pairs that real mining finds, and those it mistakes for right. Each round
    draws anew; nothing of an earlier one stays, and no budget holds. labels [M], below 0 where
    unknown: such images get no positives. Raises BadInput where the labels do not have as many
    pairs.
    """

    name = "oracle"
    uses_labels = True

    labels: Tensor
    precision: float = opt(
        1.0,
        "--oracle-precision",
        low=0,
        high=1,
        metavar="p",
        help="share of its positives that have the anchor's label",
    )
    size: float = opt(
        5.0,
        "--oracle-size",
        low=0,
        low_open=True,
        high=LARGEST,
        metavar="s",
        help="its positives an image on average",
    )
    wrong: str = opt(
        "uniform",
        "--oracle-wrong",
        choices=("uniform", "near"),
        help="its wrong positives: uniform, or near: the most similar images of another"
        " label, as mining's own mistakes are",
    )
    right: str = opt(
        "uniform",
        "--oracle-right",
        choices=("uniform", "near"),
        help="its right positives: uniform, or near: the most similar images of the same"
        " label, which teach less, as those that mining finds",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.keep or self.check or self.rules.trust is not None or self.index != "exact":
            raise BadInput(
                "--miner oracle draws its sets anew each round, of --oracle-size, by an exact"
                " search: leave --isl-keep, --isl-trust, --isl-check and --isl-index off"
            )
        self.rules = Rules(max_share=1.0)
        pairs = max(1, round(self.size * len(self.labels) / 2))
        right = round(self.precision * pairs)
        self.numbers = {"right": right, "wrong": pairs - right}
        for (kind, number), there in zip(self.numbers.items(), _pairs_there(self.labels)):
            if number > there / 2:
                raise BadInput(
                    f"an oracle of precision {self.precision:g} and {self.size:g} positives an"
                    f" image needs {number} {kind} pairs, and these labels make {there}: expected"
                    " at most half of them; ask for smaller sets"
                )

    def begin(self, number: int) -> None:
        pass  # no budget holds

    def mine(
        self,
        features: Tensor,
        positives: PositiveSets,
        rng: torch.Generator,
        tick: Tick | None = None,
        views: Views | None = None,
    ) -> PositiveSets:
        return super().mine(
            features, PositiveSets.empty(len(features), features.device), rng, tick, views
        )

    def find(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None
    ) -> tuple[Edges, str]:
        generator = torch.Generator().manual_seed(seed)
        pairs = []
        for kind, number in self.numbers.items():
            if getattr(self, kind) == "near" and number:
                pairs.append(self._near(features, kind == "right", number, tick))
            else:
                pairs.append(draw_pairs(self.labels.cpu(), kind == "right", number, generator))
        src, dst = (torch.cat(x).to(features.device) for x in zip(*pairs))
        self.report.extra |= {"labels_used": True, "right": self.right, "wrong": self.wrong}
        start, stop = dist.shard(len(src))  # every rank has drawn all pairs, and returns its share
        sureness = torch.ones(stop - start, device=features.device)
        return Edges(src[start:stop], dst[start:stop], sureness), ""

    def _near(
        self, features: Tensor, right: bool, number: int, tick: Tick | None
    ) -> tuple[Tensor, Tensor]:
        """Pairs [number] of similar images of one label, or of two.

        First each image's nearest such image, then each one's second, and so on; of the last ones
        the most similar.
        """
        M = len(features)
        labels = self.labels.to(features.device)
        k = 2 * number // len(features) + 2
        src = ()
        # where a few images only have such partners, lists have to be longer
        while len(src) < number:
            k = min(k, M - 1)
            block = lambda anchors, _: nearest_by_label(features, labels, anchors, right, k, tick)
            anchors, cosine, near = (
                dist.all_gather_rows(x) for x in over_blocks(M, features.device, block, tick)
            )
            found = cosine > -torch.inf
            # |cosine| <= 1: it decides within a place only
            sureness = cosine / 4 - torch.arange(k, device=features.device)
            src, dst, (sureness,) = distinct_edges(
                M,
                anchors[:, None].expand_as(found)[found],
                near[found],
                [sureness[found]],
                undirected=True,
            )
            k *= 2
        chosen = sureness.sort(descending=True, stable=True).indices[:number]
        return src[chosen].cpu(), dst[chosen].cpu()

    def state_dict(self) -> dict:
        return {"labels_used": True}

    def state_shape(self, dim: int) -> dict:
        return {"labels_used?": {True}}


def _pairs_there(labels: Tensor) -> tuple[int, int]:
    """How many undirected pairs of known labels are right, and how many wrong."""
    count = labels[labels >= 0].bincount().double()
    all_ = float(count.sum()) ** 2
    right = float((count**2).sum())
    return round((right - float(count.sum())) / 2), round((all_ - right) / 2)


def draw_pairs(
    labels: Tensor, right: bool, number: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw `number` distinct pairs with one label (right) or two, uniformly.

    labels [M], below 0 where unknown. Returns the pairs [U], [U]. Anchors take turns in an order of
    their own each turn. There must be enough pairs: twice as many as are drawn.
    """
    known = (labels >= 0).nonzero().squeeze(1)
    order = known[labels[known].sort(stable=True).indices]  # images, class by class
    count = labels[known].bincount()
    first = count.cumsum(0) - count
    L = len(order)
    partners = (count - 1 if right else L - count)[labels[order]]  # how many each has
    places = (partners > 0).nonzero().squeeze(1)  # in `order`, of those that can be anchors
    key = torch.empty(0, dtype=torch.int64)
    while (missing := number - len(key)) > 0:
        turns = [
            places[torch.randperm(len(places), generator=generator)]
            for _ in range(-(-missing // len(places)))
        ]
        at = torch.cat(turns)[: missing + missing // 16 + 16]
        own = labels[order[at]]
        step = (torch.rand(len(at), generator=generator, dtype=torch.float64) * partners[at]).long()
        # right: go round the class from the next image on; wrong: round all from the next class on
        if right:
            other = first[own] + (at - first[own] + 1 + step) % count[own]
        else:
            other = (first[own] + count[own] + step) % L
        a, b = order[at], order[other]
        key = _first_of_each(
            torch.cat([key, torch.minimum(a, b) * len(labels) + torch.maximum(a, b)])
        )[:number]
    return key // len(labels), key % len(labels)


def _first_of_each(key: Tensor) -> Tensor:
    """The distinct values of key [n], in the order in which they first appear."""
    values, order = key.sort(stable=True)
    new = torch.ones_like(values, dtype=torch.bool)
    torch.ne(values[1:], values[:-1], out=new[1:])
    return key[order[new].sort().values]


def nearest_by_label(
    features: Tensor, labels: Tensor, anchors: Tensor, same: bool, k: int, tick: Tick | None = None
) -> tuple[Tensor, Tensor]:
    """The k most similar others of the same label, or of another, of anchors [N].

    Returns cosines [N, k] and images [N, k]; the cosine is -inf where there are no more.
    """
    cosine = features.new_empty(len(anchors), 0, dtype=torch.float32)
    near = anchors.new_empty(len(anchors), 0)
    queries, own = features[anchors], labels[anchors]
    for start in range(0, len(features), _COLUMNS):
        if tick is not None:
            tick()
        here = labels[start : start + _COLUMNS]
        images = torch.arange(start, start + len(here), device=features.device)
        scores = (queries @ features[start : start + _COLUMNS].T).float()  # [N, columns]
        allowed = (
            ((own[:, None] == here) == same)
            & (own[:, None] >= 0)
            & (here >= 0)
            & (anchors[:, None] != images)
        )
        value, at = scores.masked_fill_(~allowed, -torch.inf).topk(min(k, scores.shape[1]), dim=1)
        cosine = torch.cat([cosine, value], 1)
        near = torch.cat([near, at + start], 1)
        cosine, keep = cosine.topk(min(k, cosine.shape[1]), dim=1)
        near = near.gather(1, keep)
    return cosine, near
