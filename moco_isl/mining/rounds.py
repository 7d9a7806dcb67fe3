"""A round of mining: the frame that every miner but none fills with its own way to find edges.

Letters: M images, C feature dimension, N anchors of a block, E directed edges.
"""

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from moco_isl import dist
from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.files import short
from moco_isl.mining.edges import Edges, Rules, settle
from moco_isl.mining.estimate import (
    FEWEST_PAIRS,
    Estimate,
    Views,
    apart,
    by_check,
    effective_rank,
    guess,
    spread_of_count,
    widest,
)
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.reach import reach
from moco_isl.mining.record import RoundReport
from moco_isl.ops.ivf import CHOICES, IVF, check_choice, wanted
from moco_isl.ops.neighbors import Tick
from moco_isl.options import LARGEST, check_values, opt

Tensor = torch.Tensor
NOTHING_SURE = "nothing sure enough to add this round"
AUTO = 0.8  # of --isl-trust auto: on the digits mining broke even between 0.7 and 0.85
NO_BOUND = 5  # images looked for where no budget says how many
WIDEST = 200  # positives an image that --isl-budget auto looks at; fewer where images are few
OFFERED = 100_000_000  # candidates of all images that --isl-budget auto asks for at most


class Miner:
    """What the training engine and ISL ask of a miner; one that keeps nothing between rounds.

    report: of the last round. uses_labels: its class takes `labels` [M], for research. wants_views:
    a round is to be given two augmented views of every image.
    """

    uses_labels: ClassVar[bool] = False
    wants_views: bool = False
    report: RoundReport

    def begin(self, number: int) -> None:
        """The next round is the one of this number, from 1 on."""

    def mine(
        self,
        features: Tensor,
        positives: PositiveSets,
        rng: torch.Generator,
        tick: Tick | None = None,
        views: Views | None = None,
    ) -> PositiveSets:
        """The sets of a round, from features [M, C] (unit rows) and the sets so far."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        """What the next round starts from, in tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    def state_shape(self, dim: int) -> dict:
        """What load_state_dict takes, for features of `dim` numbers, as a shape of `schema`."""
        return {}


def bound_of(trust: float | str | None) -> float | None:
    """The share of right positives that `trust` asks for: a number, "auto", or None for "off".

    Raises BadInput.
    """
    if trust in (None, "off"):
        return None
    try:
        bound = AUTO if trust == "auto" else float(trust)
    except ValueError:
        bound = -1.0
    if not 0 < bound <= 1:
        raise BadInput(
            f"--isl-trust {trust}: expected auto, off, or a precision above 0 and at most 1"
        )
    return bound


AS_SURE = math.inf  # the budget of --isl-budget auto: no number bounds it


def check_budget(text: str) -> str:
    """The text of one --isl-budget. Raises BadInput."""
    try:
        budgets_of(text)
    except BadInput as error:  # the parser names the flag
        raise BadInput(str(error).removeprefix("--isl-budget ")) from None
    return text if text in ("all", "auto") else f"{float(text):g}"


def budgets_of(budget: str | float | list | tuple | None) -> list[float]:
    """The budget of each round, the last one that of all later ones.

    Empty: no bound, of "all" or None. [AS_SURE]: as wide as is sure, of "auto". Raises BadInput.
    """
    if budget is None:
        return []
    values = list(budget) if isinstance(budget, list | tuple) else [budget]
    if values == ["all"]:
        return []
    if values == ["auto"]:
        return [AS_SURE]
    found = []
    for value in values:
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0 < number <= LARGEST:
            raise BadInput(
                f"--isl-budget {short(' '.join(map(str, values)))}: expected auto or all alone, or"
                f" numbers above 0 and at most {LARGEST}"
            )
        found.append(number)
    return found


def one_round(
    miner,
    features: Tensor,
    positives: PositiveSets,
    number: int,
    rng: torch.Generator,
    tick: Tick | None,
    views: Views | None,
) -> PositiveSets:
    """The sets that a miner makes, in the round of this number, of those of before.

    A miner of a user's own need not know of rounds and views. See `Miner`.
    """
    if begin := getattr(miner, "begin", None):
        begin(number)
    given = {} if views is None else {"views": views}
    return miner.mine(features, positives, rng, tick, **given)


@dataclass(kw_only=True, eq=False)
class RoundMiner(Miner):
    """The round around a `find`: settles by the rules what was found, and reports.

    A miner of this kind is a dataclass, its settings fields made by `options.opt`, and writes
    find(features, positives, seed, tick) -> (edges of this rank's share, why). A `why` that is not
    empty refuses the round, and must be so on every rank; then the sets stay as they were. `find`
    may put figures of its own into self.report.extra. By `over_blocks` and the seed, sets come out
    equal on every rank and for any number of ranks (with equally many threads each: a product's
    last bit may depend on them). self.views is what the round has of views, or None.

    uses_views: it wants views in any case, not only where `trust` needs them for its estimate.
    directed, replaces: its edges have a direction, and its sets are new each round; see `Rules`.
    searches: it looks for the nearest of all images, exactly or by an index.
    known [M]: labels of the few images that --isl-check names, -1 of the others; None: no labels.
    surest: the surest pairs of a round that added none, about 5 an image: [n], [n].
    """

    name: ClassVar[str] = "miner"
    uses_views: ClassVar[bool] = False
    directed: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    searches: ClassVar[bool] = True

    budget: str | float | list[str] | list[float] | None = opt(
        ["5"],
        "--isl-budget",
        parse=check_budget,
        several="+",
        metavar="x",
        help="mean positives of an image after a round, the surest first. auto: as many as are sure"
        " (--isl-trust), up to an eighth of the images and 200. all: every pair that the miner"
        " finds. Several numbers: of the first round, the second, ..., and the last of them from"
        " then on; 0.5 1 1.5 2 is the published code's",
    )
    max_share: float | None = opt(
        None,
        "--isl-max-share",
        low=0,
        low_open=True,
        high=1,
        metavar="x",
        rare=True,
        help="no image is a positive of more than this share of all images (by itself: of 4 times"
        " as many images as a set has on average, or of 5 % of them up to 100 where that is more;"
        " with --isl-budget all there is no bound)",
    )
    trust: float | str | None = opt(
        None,
        "--isl-trust",
        metavar="auto|p|off",
        help="keep the widest sets, within the budget, of which this share is right by an estimate,"
        " and none where nothing is that sure; auto: 0.8, about where mining broke even on the"
        " digits (off, but auto with --isl-budget auto). The estimate takes two more feature passes"
        " a round",
    )
    check: str | None = opt(
        None,
        "--isl-check",
        metavar="LIST",
        help="a file that names a few hundred of the training images and their labels: the estimate"
        " is then measured on them. They steer the width of the sets, and nothing else; every line"
        " of a round says so",
    )
    keep: bool = opt(
        False,
        "--isl-keep",
        rare=True,
        help="never drop a pair once mined, as the paper; off: each round judges old pairs again",
    )
    index: str = opt(
        "exact",
        "--isl-index",
        choices=CHOICES,
        rare=True,
        help="how a round searches all images. ivf: approximately, by the extra faiss, with 0.95 of"
        " the 10 nearest found; of use from some 100,000 images on a CPU. auto: ivf from there (14"
        " million on a GPU) where faiss is installed. exact: what is mined depends on no extra"
        ". What measures is always searched exactly: the estimates, the GAN's probe and"
        " the centroids of k-means",
    )

    def __post_init__(self):
        check_values(self)
        check_choice(self.index)
        if self.index == "ivf" and not self.searches:
            raise BadInput(
                f"--miner {self.name} looks for no nearest images: leave --isl-index off"
            )
        self.budgets = budgets_of(self.budget)
        if self.as_sure:
            if self.trust == "off":
                raise BadInput(
                    "--isl-budget auto makes the sets as wide as is sure, and --isl-trust off asks"
                    " for no estimate: leave one of them off"
                )
            self.trust = "auto" if self.trust is None else self.trust
        if self.keep and self.replaces:
            raise BadInput(
                f"--isl-keep never drops a pair, and --miner {self.name} makes its sets anew each"
                " round: leave it off"
            )
        everything = self.max_share is None and self.budget in ("all", ["all"], ("all",))
        self.rules = Rules(
            budget=self.budgets[0] if self.budgets else None,
            directed=self.directed,
            replace=self.replaces,
            max_share=1.0 if everything else self.max_share,
            keep=self.keep,
            trust=bound_of(self.trust),
        )
        self.known: Tensor | None = None
        self.surest: tuple[Tensor, Tensor] | None = None
        self.views: Views | None = None
        self.report = RoundReport()

    @property
    def as_sure(self) -> bool:
        """Whether the sets are to be as wide as is sure: --isl-budget auto."""
        return self.budgets == [AS_SURE]

    def most(self, M: int) -> int:
        """Positives an image in the largest of the rounds, of M images."""
        if self.as_sure:
            return max(1, min(M // 8, WIDEST, OFFERED // M))
        return max(1, math.ceil(max(self.budgets, default=NO_BOUND)))

    def offered(self, M: int) -> int:
        """Candidates of an image, of which the surest of all M images become positives.

        Four times `most`, or with --isl-budget auto twice it, which is wide already.
        """
        most = self.most(M)
        if self.as_sure:
            return max(most, min(2 * most, OFFERED // M))
        return 4 * most

    @property
    def wants_views(self) -> bool:
        """Whether a round is to be given two augmented views of every image."""
        return self.uses_views or self.rules.trust is not None

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
        """The sets of this round, from features [M, C] (unit rows) and the sets so far.

        All are equal on all ranks. rng: a CPU generator, one draw a round (rank 0's counts). views
        2 x [M, C]: unit rows of two random augmentations of every image, and its pixels, from which
        it is guessed how much of the sets is right. Raises BadInput where features do not fit,
        Interrupted on every rank where tick raised it on one.
        """
        started = time.perf_counter()
        check_features(features, positives.num_images, views)
        if self.check and self.known is None:
            raise BadInput(
                f"{type(self).__name__}(check=...) reads no list in a loop of your own: expected"
                " the labels in its attribute `known`, [M] with -1 for unknown ones"
            )
        seed = dist.broadcast_object(int(torch.randint(2**62, (1,), generator=rng)))
        if features.device.type == "cpu":  # which multiplies half precision slowly
            features = features.float()
            views = views and Views(*(x if x is None else x.float() for x in views))
        self.report = RoundReport(
            self.name,
            effective_rank=effective_rank(features),
            apart=None if views is None else apart(views),
            labels_checked=None if self.known is None else int((self.known >= 0).sum()),
        )
        self.surest = None
        if self.as_sure:
            self.rules.budget = self.most(len(features))
        self.views = views
        try:
            if len(features) > 1:
                edges, why = self._found(self.find(features, positives, seed, tick), len(features))
            else:
                edges = None
                why = "a single image has no others that could be like it"
        finally:
            self.views = None  # two more banks that nobody needs between rounds
        if why:
            sets = positives
            counts = {}
        else:
            sets, counts = settle(
                features,
                gather_edges(edges),
                positives,
                self.rules,
                lambda a, b: self._trusted(features, views, a, b, tick),
            )
        self.report = replace(
            self.report,
            **counts,
            accepted=not why,
            why=why or self.report.why,
            edges=sets.num_edges,
            mean_size=sets.mean_size,
            coverage=sets.coverage,
            worst_in_degree=int(sets.in_degree().max()),
            reach=reach(features, sets, tick),
            seconds=time.perf_counter() - started,
            peak_memory_gib=_peak_gib(features.device),
        )
        return sets

    def _found(self, answer, M: int) -> tuple[Edges, str]:
        """What `find` has answered of M images. Raises RunFailed where it is no answer."""
        pair = isinstance(answer, tuple) and len(answer) == 2
        edges, why = answer if pair else (answer, "")
        if why:
            return edges, why
        if not pair or not isinstance(edges, Edges):
            raise RunFailed(
                f"the miner {self.name} found a {type(edges).__name__} in place of pairs: expected"
                " Edges(src, dst, sureness) and a text, see docs/python.md"
            )
        images = [edges.src, edges.dst]
        whole = all(not x.is_floating_point() and x.shape == edges.sureness.shape for x in images)
        if not whole or any(len(x) and not 0 <= int(x.min()) <= int(x.max()) < M for x in images):
            raise RunFailed(
                f"the miner {self.name} found pairs of no images: expected src and dst [E] of whole"
                f" numbers from 0 to {M - 1}, and a sureness for each pair"
            )
        if not edges.sureness.isfinite().all():
            raise RunFailed(f"the miner {self.name} gave pairs a sureness that is not finite")
        return edges, why

    def searchable(self, rows: Tensor, tick: Tick | None = None) -> "Tensor | IVF":
        """What `topk` takes as its bank of rows [M, C]: the rows, or an index built of them.

        Build it once for a bank, before the blocks; it is freed with the last name for it. All
        ranks call this together, with equal rows, and get equal indexes. The lowest recall of a
        round goes into the report. Raises Interrupted on every rank where tick raised it on one.
        """
        if not dist.broadcast_object(wanted(self.index, rows)):
            return rows
        bank = None
        try:
            bank = IVF(rows, tick)
        except Interrupted:
            pass
        dist.stop_mining_together(bank is None, rows.device)
        bank.nprobe, bank.recall = dist.broadcast_object((bank.nprobe, bank.recall))
        lowest = 1.0 if self.report.recall is None else self.report.recall
        self.report.recall = min(bank.recall, lowest)
        return bank

    def _trusted(
        self, features: Tensor, views: Views | None, a: Tensor, b: Tensor, tick: Tick | None
    ) -> int:
        """How many of the pairs a [U], b [U], surest first, to keep.

        What is estimated of them goes into the report.
        """
        if not len(a):
            return 0
        if self.known is not None:
            estimate = by_check(self.known.to(a.device), a, b)
            least = FEWEST_PAIRS
        else:
            estimate = guess(features, views, a, b, tick, self.report.apart)
            least = 32
        number = len(a)
        if (bound := self.rules.trust) is not None:
            number = 0
            if not estimate.doubt:
                number = widest(estimate.share, estimate.at, len(a), bound, least)
        if number:
            self._say(estimate, a, b, number, views)
        else:
            five = max(1, round(NO_BOUND * len(features) / self.rules.edges_a_pair))
            self.surest = a[:five], b[:five]
            self.report.why = f"{NOTHING_SURE}: {_why_not(estimate, bound, least)}"
        return number

    def _say(
        self, estimate: Estimate, a: Tensor, b: Tensor, number: int, views: Views | None
    ) -> None:
        """Put into the report what is estimated of the first `number` of pairs a [U], b [U]."""
        report = self.report
        count = int((estimate.at < number).sum())  # of the estimate's pairs, those that stay
        if not count or (estimate.labelled and estimate.doubt):
            report.doubt = estimate.doubt or None
            return
        share, most = float(estimate.share[count - 1]), float(estimate.most[count - 1])
        if estimate.labelled:
            at = estimate.at[:count]
            right = self.known[a[at].cpu()] == self.known[b[at].cpu()]
            twice = 2 * spread_of_count(right.float(), a[at].cpu(), b[at].cpu())
            report.precision_estimate = share
            report.precision_at_least = max(share - twice, 0.0)
            report.precision_at_most = min(share + twice, 1.0)
            return
        report.precision_at_most = most
        if views is not None:
            report.doubt = estimate.doubt or None
            report.precision_estimate = None if estimate.doubt else share

    def begin(self, number: int) -> None:
        """The next round is the one of this number, from 1 on: take up its budget."""
        if self.budgets and not self.as_sure:
            self.rules.budget = self.budgets[min(number, len(self.budgets)) - 1]


def _why_not(estimate: Estimate, bound: float, least: int) -> str:
    """Why no pairs are sure enough for the bound, and what to do."""
    if estimate.labelled and estimate.doubt:
        return estimate.doubt
    label = "name a few hundred labelled images to be sure (--isl-check)"
    if estimate.doubt:
        return f"it cannot be told without labels how much is right ({estimate.doubt}); {label}"
    last = min(least, len(estimate.share)) - 1
    share, most = (100 * float(x[last]) for x in (estimate.share, estimate.most))
    asked = f"and {100 * bound:.0f} % are asked for (--isl-trust)"
    if estimate.labelled:
        return f"of the surest pairs {share:.0f} % are right by the labelled images, {asked}"
    return f"of the surest pairs {share:.0f} to {most:.0f} % are right by a guess, {asked}; {label}"


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
        if (pixels := getattr(views, "pixels", None)) is not None:
            given |= {"pixels": pixels}
    if any(
        rows.shape != features.shape if name != "pixels" else len(rows) != M
        for name, rows in given.items()
    ):
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
    """Join what `block` gives for each of this rank's share of the blocks of images.

    block(anchors [N], number) gives tensors of N rows; they depend on the block's number alone.
    Returns those of all its blocks, joined, with the anchors in front; tensors of no rows on a rank
    without a share. Where tick raises Interrupted on one rank, all ranks raise it here.
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
    dist.stop_mining_together(stopped, device)
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
