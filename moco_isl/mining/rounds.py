"""A round of mining: the frame that every miner but none fills with its own way to find edges.

Letters: M images, C feature dimension, N anchors of a block, E directed edges.
"""

import resource
import sys
import time
from collections.abc import Callable
from typing import Protocol

import torch

from moco_isl import dist
from moco_isl.errors import BadInput, Interrupted
from moco_isl.mining.edges import Edges, Rules, settle
from moco_isl.mining.estimate import Views, by_halves, by_views, sampled, widest
from moco_isl.mining.positives import PositiveSets
from moco_isl.ops.ivf import IVF, check_choice, wanted
from moco_isl.ops.neighbors import Tick

Tensor = torch.Tensor
NOTHING_SURE = "nothing sure enough to add this round"


class Miner(Protocol):
    """What the training engine and ISL ask of a miner.

    report: JSON-able figures of the last round. state_dict: tensors and plain values, what the next
    round starts from; state_shape(C): what load_state_dict takes, for features of C numbers, as a
    shape of `schema`.
    """

    report: dict

    def mine(
        self,
        features: Tensor,
        positives: PositiveSets,
        rng: torch.Generator,
        tick: Tick | None = None,
        views: Views | None = None,
    ) -> PositiveSets: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def state_shape(self, dim: int) -> dict: ...


class RoundMiner:
    """The round around a `find`: settles by the rules what was found, and reports.

    A miner of this kind writes find(features, positives, seed, tick) -> (edges of this rank's
    share, why). A `why` that is not empty refuses the round, and must be so on every rank; then the
    sets stay as they were. `find` may put figures of its own into self.report. By `over_blocks` and
    the seed, sets come out equal on every rank and for any number of ranks (with equally many
    threads each: a product's last bit may depend on them). self.views is what the round has of
    views, or None.

    index: how a whole bank is searched; "exact", "ivf" (approximate, by faiss) or "auto": exact
    below the size from which ivf is faster, and wherever faiss is not installed. A `find` asks
    `self.searchable` for it. What measures, the estimates and the GAN's probe, and the centroids of
    k-means, are always searched exactly.
    rules: budget, max_share, keep, trust and whatever else `edges.Rules` knows, of every miner by
    name.
    """

    name = "miner"

    def __init__(self, index: str = "exact", **rules):
        check_choice(index)
        self.index = index
        self.rules = Rules(**rules)
        self.views: Views | None = None
        self.report: dict = {}

    def find(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None
    ) -> tuple[Edges, str]:
        raise NotImplementedError

    @torch.no_grad()
    def mine(
        self,
        features: Tensor,
        positives: PositiveSets,
        rng: torch.Generator,
        tick: Tick | None = None,
        views: Views | None = None,
    ) -> PositiveSets:
        """features [M, C] unit rows, the sets so far -> the sets of this round; both equal on all
        ranks.

        rng: a CPU generator, one draw a round (rank 0's counts). views 2 x [M, C]: unit rows of two
        random augmentations of every image, from which it is estimated how much of the sets is
        right. Raises BadInput where features do not fit, Interrupted on every rank where tick
        raised it on one.
        """
        started = time.perf_counter()
        check_features(features, positives.num_images, views)
        seed = dist.broadcast_object(int(torch.randint(2**62, (1,), generator=rng)))
        if features.device.type == "cpu":  # which multiplies half precision slowly
            features = features.float()
            views = views and tuple(view.float() for view in views)
        self.report = {"miner": self.name, "precision_estimate": None, "precision_at_most": None}
        self.views = views
        try:
            if len(features) > 1:
                edges, why = self.find(features, positives, seed, tick)
            else:
                edges = None
                why = "a single image has no others that could be like it"
        finally:
            self.views = None  # two more banks that nobody needs between rounds
        if why:
            sets = positives
            counts = {"edges_found": 0, "edges_added": 0, "edges_dropped": 0}
        else:
            sets, counts = settle(
                features,
                gather_edges(edges),
                positives,
                self.rules,
                lambda a, b: self._trusted(features, views, a, b, tick),
            )
        degree = sets.in_degree()
        self.report |= {
            **counts,
            "accepted": not why,
            "why": why or self.report.get("why", ""),
            "edges": sets.num_edges,
            "mean_size": sets.mean_size,
            "coverage": sets.coverage,
            "worst_in_degree": int(degree.max()),
            "seconds": time.perf_counter() - started,
            "peak_memory_gib": _peak_gib(features.device),
        }
        return sets

    def searchable(self, rows: Tensor, tick: Tick | None = None) -> "Tensor | IVF":
        """rows [M, C], equal on all ranks -> what `topk` takes as its bank: the rows, or an index
        built of them.

        Build it once for a bank, before the blocks; it is freed with the last name for it. All
        ranks call this together and get equal indexes. The lowest recall of a round goes into the
        report. Raises Interrupted on every rank where tick raised it on one.
        """
        if not dist.broadcast_object(wanted(self.index, rows)):
            return rows
        bank = None
        try:
            bank = IVF(rows, tick)
        except Interrupted:
            pass
        if int(dist.all_reduce_max(torch.tensor(int(bank is None), device=rows.device))):
            raise Interrupted("mining was interrupted")
        bank.nprobe, bank.recall = dist.broadcast_object((bank.nprobe, bank.recall))
        self.report["recall"] = min(bank.recall, self.report.get("recall", 1.0))
        return bank

    def _trusted(
        self, features: Tensor, views: Views | None, a: Tensor, b: Tensor, tick: Tick | None
    ) -> int:
        """How many of the pairs a [U], b [U], surest first, to keep; what is estimated of them goes
        into the report.
        """
        if not len(a):
            return 0
        found = {"precision_at_most": sampled(by_halves, features, a, b, tick)}
        bound = self.rules.trust
        number = len(a)
        if views is not None:
            found["precision_estimate"] = sampled(by_views, views, a, b, tick)
        share, at = found.get("precision_estimate", found["precision_at_most"])
        if bound is not None and not (number := widest(share, at, len(a), bound)):
            self.report["why"] = (
                f"{NOTHING_SURE}: of the surest pairs"
                f" {'at most ' if views is None else ''}{100 * share[:32].double().mean():.0f} %"
                f" are estimated to be right, and {100 * bound:.0f} % are asked for (--isl-trust)"
            )
            return 0
        self.report |= {
            name: float(share[at < number].double().mean()) for name, (share, at) in found.items()
        }
        self.report["precision_at_most"] = max(
            self.report["precision_at_most"], self.report["precision_estimate"] or 0
        )
        return number

    def begin(self, number: int) -> None:
        """The next round is that of this number in the schedule: for a miner whose rounds differ by
        their number.
        """

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    def state_shape(self, dim: int) -> dict:
        return {}


def check_features(features: Tensor, M: int, views: Views | None = None) -> None:
    """Raise BadInput unless features are [M, C], views 2 x [M, C] if there are any, and all finite.

    Waits for the device.
    """
    real = isinstance(features, Tensor) and features.is_floating_point()
    if not real or features.ndim != 2 or len(features) != M:
        found = (
            f"shape {tuple(features.shape)}"
            if real
            else f"type {getattr(features, 'dtype', type(features).__name__)}"
        )
        raise BadInput(
            f"features of {found} do not fit positive sets of {M} images: one row of real numbers"
            " an image is expected"
        )
    given = {"features": features}
    if views is not None:
        given |= {"views": views[0], "second views": views[1]}
    if any(rows.shape != features.shape for rows in given.values()):
        shapes = " and ".join(str(tuple(view.shape)) for view in views)
        raise BadInput(
            f"views of shape {shapes} do not fit features of shape {tuple(features.shape)}: equal"
            " ones are expected"
        )
    for name, rows in given.items():
        bad = torch.cat([~part.isfinite().all(dim=1) for part in rows.split(1 << 16)])  # [M]
        if bad.any():
            raise BadInput(
                f"{name} of {int(bad.sum())} of {M} images hold NaN or infinity, image"
                f" {int(bad.int().argmax())} for one: expected finite rows; look at these images,"
                " and whether the encoder's loss was finite"
            )


def block_size(M: int) -> int:
    """Anchors of a block: from M alone, so that blocks are the same for any number of ranks."""
    return min(max(-(-M // 64), 64), 4096)


def over_blocks(
    M: int,
    device: torch.device,
    block: Callable[[Tensor, int], tuple[Tensor, ...]],
    tick: Tick | None,
) -> list[Tensor]:
    """block(anchors [N], number) -> tensors of N rows, over this rank's share of whole blocks of
    images.

    Returns those of all its blocks, joined, with the anchors in front; tensors of no rows on a rank
    without a share. A block is a matter of its number alone. Where tick raises Interrupted on one
    rank, all ranks raise it here.
    """
    size = block_size(M)
    parts = []
    stopped = False
    first, last = dist.shard(-(-M // size))
    try:
        for number in range(first, last):
            if tick is not None:
                tick()
            anchors = torch.arange(number * size, min((number + 1) * size, M), device=device)
            parts.append((anchors, *block(anchors, number)))
        if not parts:  # more ranks than blocks: the shapes of an answer, of block 0
            anchors = torch.arange(min(size, M), device=device)
            parts.append(tuple(x[:0] for x in (anchors, *block(anchors, 0))))
    except Interrupted:
        stopped = True
    if int(dist.all_reduce_max(torch.tensor(int(stopped), device=device))):
        raise Interrupted("mining was interrupted")
    return [torch.cat(x) for x in zip(*parts)]


def gather_edges(edges: Edges) -> Edges:
    """The edges of all ranks, in rank order, on all ranks."""
    src, dst = (dist.all_gather_rows(x.int()) for x in (edges.src, edges.dst))
    weight = None if edges.weight is None else dist.all_gather_rows(edges.weight)
    return Edges(src, dst, dist.all_gather_rows(edges.sureness), weight)


def _peak_gib(device: torch.device) -> float:
    """The most memory so far: the GPU's where the features are there, otherwise this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
