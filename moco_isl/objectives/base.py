"""What the objectives share: a step, the bank and the mined sets around it, and what a file keeps.

Letters: N batch, C feature dimension, M images, P positives of an image after padding.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from numbers import Integral
from typing import ClassVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco_isl import dist
from moco_isl.bank import FeatureBank
from moco_isl.errors import BadInput
from moco_isl.loader import check_index, check_once
from moco_isl.losses import FORMS, LOCAL, hardest
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.record import RoundReport
from moco_isl.mining.rounds import check_features, one_round
from moco_isl.mining.variant import is_published, variant_option
from moco_isl.ops import fused
from moco_isl.options import check_value, opt
from moco_isl.schema import COUNT, Holds

CPU = torch.device("cpu")

Tensor = torch.Tensor
Parts = dict[str, Tensor]  # scalars by name: "loss", and what a line of metrics says beside it


@dataclass(eq=False, repr=False)
class Objective:
    """What is trained: loss = objective(im_q, im_k, index), the scalar to call backward on.

    A new objective is a subclass in a file of its own, with a line in `OBJECTIVES`. It gives a
    `step`, says by the attributes below what it is, and overrides what else is different. Its
    fields are its options.
    """

    model: nn.Module  # bare: neither wrapped nor compiled
    num_images: int  # M; `index` of a batch counts in 0 .. M - 1
    _: KW_ONLY
    # Ranks, which must then have equal batches, exchange features once a step in float16; fused
    # kernels are used where they work (CUDA; tried out here, and a warning says where they do not).
    fast: bool = False
    # The model's `encode` if it has been wrapped already; None wraps it here where there are ranks.
    encode: Callable | None = None

    around: ClassVar[type[nn.Module]]  # the class of model that it trains
    has_queue: ClassVar[bool] = False  # the model is a MoCo, which has a queue
    mined: ClassVar[bool] = False  # whether it trains on mined positives
    follow: ClassVar[tuple[str, ...]] = ()  # its own flags that follow how many images there are
    has_head: ClassVar[bool] = True  # whether the encoder has a projection head
    repeats: ClassVar[bool] = False  # whether an image may come several times in a step

    # Options of those that can be mined for.
    active = False  # whether the mined sets are looked at
    hpe = 0.0  # weight of hard positives

    def __post_init__(self) -> None:
        if not isinstance(self.num_images, Integral) or self.num_images < 1:
            raise BadInput(
                f"num_images is {self.num_images!r}: expected how many images there are,"
                " len(dataset)"
            )
        self.device = next(self.model.parameters()).device
        self.encode = self.encode or distributed_encode(self.model, **self.encode_options())
        self.positives = PositiveSets.empty(self.num_images, self.device)
        self.round = 0  # the number of the last round of mining
        self.turn = 0  # which window of a large set is looked at: the epoch
        self.begun = False  # a first step has been taken
        self.parts: Parts = {}  # of the last step, detached
        require_same_images(self.num_images)

    def encode_options(self) -> dict[str, nn.Module]:
        """Modules that the model's `encode` takes by name, and that train with it."""
        return {}

    @classmethod
    def options(cls) -> set[str]:
        """The names of what can be given beside model and num_images."""
        return {field.name for field in fields(cls)} - {"model", "num_images"}

    @staticmethod
    def build_model(base_encoder: Callable[..., nn.Module], **options) -> nn.Module:
        """The model to go around. Each takes the options that it knows.

        options: dim, mlp, T, K, m, num_images, clusters.
        """
        raise NotImplementedError

    @staticmethod
    def views(hpe: float) -> int:
        """How many views of each image a step takes. hpe: the option of that name."""
        return 1

    @staticmethod
    def crop(side: int) -> tuple[float, float] | None:
        """The share of an image that crops have, where crops and flips are all of its augmentation.

        side: of the views, in pixels. None: MoCo's augmentation.
        """
        return None

    @property
    def encoder(self) -> nn.Module:
        """The encoder whose features are mined."""
        return self.model.encoder_q

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer is for: all of the model's, as in MoCo's files, and what is beside."""
        return list(self.model.parameters())

    def __call__(self, *batch: Tensor) -> Tensor:
        """loss = isl(im_q, im_k, index): a mean over the batch; `parts` says what is in it.

        im_q, im_k: [N, 3, S, S] on the model's device, index: [N] int64, there or on the CPU. An
        image comes at most once in a step of all ranks, and once an epoch, unless the objective
        `repeats` images. Where one view is enough, isl(im_q, index) will do. Queue, slots and bank
        take up what the step has encoded.

        Raises BadInput for a batch that is none, before anything of it is remembered. An index on
        the CPU is looked at in every step. One on a GPU, and images, are looked at in the first
        step alone, because that waits for the device; a wrong data set shows there.
        """
        parts = self.step(*self._checked(*batch))
        self.parts = {name: value.detach() for name, value in parts.items()}
        self.begun = True
        return parts["loss"]

    def step(self, *batch: Tensor) -> Parts:
        """Encode the views, compute the loss, and update queue, slots and bank."""
        raise NotImplementedError

    def begin_epoch(
        self,
        epoch: int,
        features: Callable[[], Tensor],
        optimizer: torch.optim.Optimizer,
        labels: Tensor | None,
        tick: Callable[[], None],
    ) -> object | None:
        """Get ready for an epoch of which no step is taken yet; returns what is to be said of it.

        features(): a pass over all images without augmentation -> [M, D], what `encoder` gives for
        each, equal on all ranks. optimizer: that of `parameters`. labels [M]: for the report alone.
        tick: called often, may raise to abandon this; then nothing has changed. The report is a
        dataclass of plain values with a `kind`, its name in metrics.jsonl, and its line as `str`.
        """
        return None

    def order(self) -> Tensor | None:
        """The images of the epoch in their order, [M] int64 on the CPU; None: each once."""
        return None

    def _checked(self, *batch: Tensor) -> list[Tensor]:
        """The batch with its index on the model's device. Raises BadInput."""
        *views, index = batch
        one_will_do = self.views(self.hpe) == 1
        if len(views) != 2 and not (one_will_do and len(views) == 1):
            alternative = " or isl(im_q, index)" if one_will_do else ""
            raise BadInput(
                f"isl(...) was given {len(batch)} arguments: expected isl(im_q, im_k,"
                f" index){alternative}"
            )
        N = len(views[0])
        if len(views[-1]) != N:
            raise BadInput(
                f"{N} images and {len(views[-1])} second views of them: expected equally many"
            )
        if not N:
            raise BadInput("isl(...) was given a batch of no images: expected one at least")
        looked_at = not self.begun or getattr(index, "device", CPU) == CPU
        check_index(index, N, self.num_images, values=looked_at)
        if looked_at and not self.repeats:
            check_once(index)
        if not self.begun and not all(bool(view.isfinite().all()) for view in views):
            raise BadInput(
                "the images of the first step hold NaN or infinity: expected finite numbers; look"
                " at how they are read and normalised"
            )
        self.require_room(N * dist.world_size())
        return [*views, index.to(self.device, torch.int64, non_blocking=True)]

    def require_room(self, images: int) -> None:
        """Raise BadInput where so many images of all ranks are too many for one step."""

    def of_all_ranks(self, index: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """index [n] and features [n, C] of every rank, on every rank.

        Raises BadInput where two ranks have one image (looked for as in `__call__`).
        """
        if self.fast:
            everyone, features = dist.all_gather_features(index, features)
        else:
            everyone = dist.all_gather_rows(index)
            features = dist.all_gather_rows(features)
        if dist.world_size() > 1 and (not self.begun or everyone.device == CPU):
            check_once(everyone)
        return everyone, features

    def mean_cosine(self) -> float | None:
        """Mean cosine between the features of the steps so far: 1 where all images look alike.

        It is NaN before any step, and None where no features are kept.
        """
        return None

    def recent_features(self) -> Tensor | None:
        """[n, C]: unit rows that steps left, at most an epoch old; None where none are kept."""
        return None

    def negatives(self) -> tuple[int, float] | None:
        """(negatives of an image in a step, how many of them are keys of its own, on average).

        None for a loss that is no InfoNCE over them: with mined positives, or of another kind.
        """
        return None

    def start_from(
        self, state: dict, same_images: bool, features: Callable[[nn.Module], Tensor]
    ) -> None:
        """Begin a new run with a model that was loaded from the file of another.

        state: the `state_dict` of that run's objective, {} where the file has none; it may be of
        another objective. same_images: it counts the same images. features(encoder): a pass over
        all images -> [M, C] unit rows.
        """

    def state_dict(self) -> dict:
        """Everything beside the model that a resumed run needs: tensors and plain values.

        The miner keeps its own.
        """
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    @classmethod
    def state_shape(cls, model: nn.Module) -> dict | Holds:
        """What `load_state_dict` takes around this model, as a shape of `schema`.

        The letter M stands for num_images.
        """
        return {}


@dataclass(eq=False, repr=False, kw_only=True)
class MinedObjective(Objective):
    """An objective with a bank, whose positives rounds of mining find."""

    form: str = opt(
        "logsum",
        "--isl-loss",
        choices=(*FORMS, LOCAL),
        help="logsum: Eq. 5, for which one likely positive is enough; hard positives see to the"
        " rest. meanlog: the mean of the logs, by which each positive has to be likely. local: LA's"
        " share of the positives in the nearest images, with --objective bank",
    )
    hpe: float = opt(
        0.5,
        "--isl-hpe",
        low=0,
        metavar="w",
        help="weight of hard positive enhancement, Eq. 6 and 7; 0 turns it off",
    )
    variant: str = variant_option()
    own: float | None = opt(
        None,
        "--isl-own",
        low=0,
        low_open=True,
        high=0.99,
        metavar="a",
        rare=True,
        help="share of an image's own key in what the loss asks for, its mined positives have the"
        " rest: the larger, the less wrong ones harm and right ones teach (1 of 1 + P)",
    )
    P: int = opt(
        32,
        "--isl-max-positives",
        low=1,
        metavar="P",
        rare=True,
        help="positives of an image that a step pulls at; a larger set takes turns, one window an"
        " epoch. None of a set is ever a negative",
    )
    bank_mix: float | None = opt(
        None,
        "--isl-bank-mix",
        low=0,
        low_open=True,
        high=1,
        metavar="mu",
        rare=True,
        help="share of a new feature in its bank row, Eq. 8 (1 with the queue, whose key encoder is"
        " an average already, and 0.5 with the bank)",
    )
    bank_dtype: torch.dtype = torch.float32  # torch.float16 halves the bank's memory
    active: bool = True

    mined: ClassVar[bool] = True
    forms: ClassVar[tuple[str, ...]] = tuple(FORMS)  # those that it has
    usual_mix: ClassVar[float] = 0.5  # `bank_mix` where it is None
    begins_filled: ClassVar[bool] = False  # the bank holds random rows before the first round

    def __post_init__(self) -> None:
        if self.form not in self.forms:
            raise BadInput(f"form {self.form!r} is unknown here: use {' or '.join(self.forms)}")
        self.published = is_published(self.variant)
        check_at_least(1, P=self.P)
        check_at_least(0, hpe=self.hpe)
        check_value(self, "own")
        if self.bank_mix is None:
            self.bank_mix = self.usual_mix
        if not 0 <= self.bank_mix <= 1:
            raise BadInput(
                f"bank_mix is {self.bank_mix}: expected 0 to 1, the share of a new feature in its"
                " row"
            )
        super().__post_init__()
        self.P = min(self.P, self.num_images)
        self.bank = FeatureBank(self.model.dim, self.device, self.bank_dtype)
        if self.fast:
            fused.try_out(self.device, self.model.dim)

    @torch.no_grad()
    def mine_features(
        self,
        features: Tensor,
        miner,
        rng: torch.Generator | None = None,
        tick: Callable[[], None] | None = None,
        views: tuple[Tensor, Tensor] | None = None,
        number: int | None = None,
    ) -> RoundReport:
        """Mine once: replace the positives by what `miner` finds in features [M, C] (unit rows).

        rng: the round's draws; None: seeded by the number of the round. tick: called often, may
        raise to abandon the round; then nothing has changed. views 2 x [M, C]: unit rows of two
        random augmentations of every image, for an estimate of what is right (`mining.estimate`).
        number: of this round, from 1 on; None: the one after the last.
        Returns the round's report, one line where it is printed. The first round around a MoCo
        fills the bank with the features: they have its C numbers. Raises BadInput for features that
        are not finite, are no unit rows, or do not fit.
        """
        check_features(features, self.num_images, views)
        self._check_rows(features)
        number = self.round + 1 if number is None else number
        rng = rng or torch.Generator().manual_seed(number - 1)
        positives = one_round(miner, features, self.positives, number, rng, tick, views)
        if not self.bank.filled:
            self.bank.fill(features)
        self.positives = positives.to(self.device)
        self.round = number
        return miner.report

    def _check_rows(self, features: Tensor) -> None:
        """Raise BadInput unless the rows of features [M, C] are unit vectors of the bank's width.

        The width counts only where they are to fill the bank.
        """
        C = self.bank.dim
        if not self.bank.filled and features.shape[1] != C:
            raise BadInput(
                f"features have {features.shape[1]} numbers an image: expected {C}, as the encoder"
                " with its head gives them, for they fill the bank; take extract_features of the"
                " encoder as it is"
            )
        lengths = torch.cat([part.float().norm(dim=1) for part in features.split(1 << 16)])  # [M]
        # an encoder that has died gives rows of zeros
        odd = (lengths - 1).abs().gt(0.02) & lengths.ne(0)
        if odd.any():
            raise BadInput(
                f"features of {int(odd.sum())} of {len(features)} images are no unit rows, one has"
                f" length {float(lengths[odd].max()):.3g}: expected F.normalize(features, dim=1),"
                " for miners take products of rows as cosines"
            )

    def whole_sets(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """All members [N, L] of the sets of images index [N], L that of the largest set of all.

        present [N, L]: False for padding.
        """
        members, weight = self.positives.lookup(index, max(1, self.positives.largest))
        return members, weight > 0

    def hard_positive(
        self, index: Tensor, members: Tensor, present: Tensor, other: Tensor
    ) -> Tensor:
        """h of Eq. 6, [N, C]: the bank row of a member of each image's set, see `hardest`.

        index [N]; members, present [N, L]: see `whole_sets`. other [N, C]: what stands for it where
        a set is empty, features of another view.
        """
        own, rows = self.bank.lookup(index), self.bank.lookup(members)  # [N, C], [N, L, C]
        place = hardest(own, rows, present, self.published)  # [N]
        row = self.moved(self.bank.lookup(members.gather(1, place[:, None])))[:, 0]  # [N, C]
        return torch.where(present.any(1, keepdim=True), row, other)

    def moved(self, rows: Tensor) -> Tensor:
        """Bank rows [N, P, C] as the loss compares queries with them."""
        return rows

    @torch.no_grad()
    def mean_cosine(self) -> float:
        mean = self.mean_feature()
        return float(mean @ mean)

    def mean_feature(self) -> Tensor:
        """[C]: the mean of the features that steps left."""
        return self.bank.mean()

    @property
    def directions(self) -> int:
        """How many losses a step sums up: of each view as the query, or of one."""
        return 1

    def recent_features(self) -> Tensor | None:
        return self.bank.rows

    def state_dict(self) -> dict:
        return {
            "bank": self.bank.state_dict(),
            "positives": self.positives.state_dict(),
            "round": self.round,
        }

    def load_state_dict(self, state: dict) -> None:
        self.bank.load_state_dict(state["bank"])
        self.positives = PositiveSets.from_state(state["positives"]).to(self.device)
        self.round = state["round"]

    @classmethod
    def state_shape(cls, model: nn.Module, **more) -> Holds:
        """more: the shape of what a subclass keeps beside bank, sets and number of the round."""
        shape = {
            "bank": FeatureBank.state_shape(model.dim),
            "positives": PositiveSets.state_shape("weights", "sureness"),
            "round": COUNT,
        }

        def as_mined(state: dict) -> bool:
            filled = state["bank"]["rows"] is not None
            mined = bool(state["round"])
            edges = len(state["positives"]["members"])
            return (mined or not edges) and filled == (mined or cls.begins_filled)

        return Holds(shape | more, as_mined, "a bank and sets as the rounds leave them")


def check_at_least(least: int, **options: float) -> None:
    """Raise BadInput where one of the options is less, infinite or NaN."""
    for name, value in options.items():
        if not (value >= least and math.isfinite(value)):
            raise BadInput(f"{name} is {value}: expected a finite number of at least {least}")


def require_same_images(num_images: int) -> None:
    """Raise BadInput where ranks count different images."""
    if dist.world_size() == 1:
        return
    counts = dist.gather_objects(num_images)
    if len(set(counts)) > 1:
        different = ", ".join(map(str, counts))
        raise BadInput(
            f"num_images is {different} on the ranks: expected the number of all images on each"
            " of them"
        )


class Encode(nn.Module):
    """`model.encode` as a `forward`, which is what DistributedDataParallel wants to wrap.

    more: modules that `encode` takes by name.
    """

    def __init__(self, model: nn.Module, **more: nn.Module):
        super().__init__()
        self.model = model
        self.more = nn.ModuleDict(more)

    def forward(self, *images: Tensor, **options):
        return self.model.encode(*images, **options, **self.more)


def distributed_encode(model: nn.Module, **more: nn.Module) -> Callable:
    """`model.encode`, which averages gradients over the ranks where there are any; see `Encode`."""
    if dist.world_size() == 1:
        return functools.partial(model.encode, **more) if more else model.encode
    encode = Encode(model, **more)
    # The queue is equal on all ranks, and by far the largest buffer: not sent at every forward.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        encode, ["model.queue", "model.queue_ptr"]
    )
    device = next(model.parameters()).device
    return DistributedDataParallel(
        encode, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
