"""ISL, the front door: the object a user puts around a MoCo.

    isl = ISL(model, num_images=len(dataset))
    for epoch in range(epochs):
        if epoch % 20 == 0:
            isl.mine(extract_features(model.encoder_k, ordered_loader, len(dataset), device),
        GANMiner()) for (im_q, im_k), index in loader:
            loss = isl(im_q, im_k, index)

Letters: N batch, C feature dimension, K queue length, M images, P positives of an image after
padding, T temperature.
"""

import math
from collections.abc import Callable
from numbers import Integral

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from moco_isl import dist
from moco_isl.bank import FeatureBank, QueueSlots
from moco_isl.builder import Encode, Instance, MoCo
from moco_isl.encoders import evaluating
from moco_isl.errors import BadInput
from moco_isl.loader import check_index, check_once
from moco_isl.losses import (
    bank_loss,
    linear_kl,
    multi_positive_mean_log,
    multi_positive_nce,
    softmax_over,
)
from moco_isl.mining.between import in_between
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import check_features
from moco_isl.ops import fused
from moco_isl.schema import COUNT, Holds

FORMS = {"logsum": multi_positive_nce, "meanlog": multi_positive_mean_log}
CPU = torch.device("cpu")


class ISL:
    """Bank, mined positives and loss around a model.

    Around a `MoCo` it is the queue objective: the positives of an image are its key and the bank
    rows of its set, the negatives are the queue less the slots that hold the image itself or one of
    its set. Around an `Instance` it is the bank objective: a softmax over all M rows. While
    `active` is False the queue objective is MoCo v2, to the letter. In a process group it wraps the
    model in DistributedDataParallel itself.
    """

    def __init__(
        self,
        model: MoCo | Instance,
        num_images: int,
        *,
        P: int = 32,
        form: str = "logsum",
        hpe: float = 0.5,
        mask: bool = True,
        bank_mix: float | None = None,
        symmetric: bool = False,
        active: bool = True,
        seed: int = 0,
        symmetric_sum: bool = True,
        recenter: bool = True,
        between: int = 0,
        encode: Callable | None = None,
        bank_dtype: torch.dtype = torch.float32,
        fast: bool = False,
    ):
        """
        num_images: M; `index` of a batch counts in 0 .. M - 1.
        P: how many positives of an image a step looks at; a larger set takes turns, one window an
        epoch.
        form: "logsum" (Eq. 5) or "meanlog". hpe: weight of hard positive enhancement, Eq. 6 and 7;
        0 turns it off.
        mask: leave the image itself and its set out of its negatives (queue objective).
        bank_mix: mu of Eq. 8; None: 1 around a MoCo (its key encoder averages already), 0.5 around
        an Instance.
        symmetric: each view is query once and key once, and the loss is the sum of both directions,
        as in MoCo's CIFAR notebook (queue objective). symmetric_sum: False for a run that began
        with their mean, which is half of it.
        recenter: positives are bank rows moved from the bank's mean to that of the queue's keys
        (queue objective).
        between: of so many nearest images of each, those that are not in its set are neither
        positive nor negative (queue objective, needs `mask`).
        bank_dtype: torch.float16 halves the bank's memory and, around an Instance, takes the
        softmax by half-precision products.
        fast: fused kernels where they work (CUDA; tried out here, and a warning says where they do
        not), and ranks, which must then have equal batches, exchange features once a step in
        float16.
        encode: the model's `encode` if it has been wrapped already; None wraps it here where ranks
        need it.
        Raises BadInput for what cannot work. In a process group a MoCo's queue and the bank become
        those of rank 0.
        """
        require_bare(model)
        if not isinstance(num_images, Integral) or num_images < 1:
            raise BadInput(
                f"num_images is {num_images!r}: expected how many images there are, len(dataset)"
            )
        if form not in FORMS:
            raise BadInput(f"form {form!r} is unknown: use {' or '.join(FORMS)}")
        check_at_least(1, P=P)
        check_at_least(0, hpe=hpe, between=between)
        if bank_mix is not None and not 0 <= bank_mix <= 1:
            raise BadInput(
                f"bank_mix is {bank_mix}: expected 0 to 1, the share of a new feature in its row"
            )
        self.model = model
        self.queue_objective = isinstance(model, MoCo)
        self.P = P
        self.form = form
        self.hpe = hpe
        self.mask = mask
        self.symmetric = symmetric
        self.active = active
        self.symmetric_sum = symmetric_sum
        self.recenter = recenter
        self.between = min(between, num_images - 1)
        if between and not (self.queue_objective and mask):
            raise BadInput(
                "images in between are left out of the queue's negatives: they need a MoCo, and"
                " mask=True"
            )
        self.bank_mix = bank_mix if bank_mix is not None else (1.0 if self.queue_objective else 0.5)
        self.fast = fast
        self.encode = encode or distributed_encode(model)
        device = next(model.parameters()).device
        if fast:
            fused.try_out(device, model.queue.shape[0] if self.queue_objective else model.dim)
        self.bank = FeatureBank(device, bank_dtype)
        self.slots = None
        if self.queue_objective:
            self.slots = QueueSlots(num_images, model.K, 2 if symmetric else 1, device)
        else:
            self.bank.fill_random(num_images, model.dim, torch.Generator().manual_seed(seed))
        self.positives = PositiveSets.empty(num_images, device)
        self.zone = PositiveSets.empty(num_images, device)  # of each image what is in between
        self.round = 0  # the number of the last round of mining
        self.turn = 0  # which window of a large set is looked at: the epoch
        # of the last step: loss, isl, hpe, acc1; scalars on the device, detached
        self.parts: dict[str, torch.Tensor] = {}
        self.begun = False  # a first step has been taken
        self._equal_on_all_ranks()

    @torch.no_grad()
    def _equal_on_all_ranks(self) -> None:
        """What begins at random and is never sent again: equal writes keep it equal, whatever seed
        a rank was given.

        Raises BadInput where ranks count different images.
        """
        if dist.world_size() == 1:
            return
        counts = dist.gather_objects(self.positives.num_images)
        if len(set(counts)) > 1:
            different = ", ".join(map(str, counts))
            raise BadInput(
                f"num_images is {different} on the ranks: expected the number of all images on each"
                " of them"
            )
        if self.queue_objective:
            keys = self.model.queue.t().contiguous()  # [K, C]
            self.model.queue.copy_(dist.broadcast(keys).t())
            dist.broadcast(self.model.queue_ptr)
        if self.bank.filled:
            dist.broadcast(self.bank.rows)

    def __call__(self, *batch: torch.Tensor) -> torch.Tensor:
        """loss = isl(im_q, im_k, index): the scalar to call backward on; queue, slots and bank take
        the step's keys up. It is a mean over the batch; where `symmetric`, the sum of the means of
        both directions.

        im_q, im_k: [N, 3, S, S] on the model's device, index: [N] int64, there or on the CPU. An
        image comes at most once in a step of all ranks, and once an epoch. Around an `Instance`
        without hard positives, isl(im_q, index) will do.

        Raises BadInput for a batch that is none, before anything of it is remembered. An index on
        the CPU is looked at in every step. One on a GPU, and images, are looked at in the first
        step alone, because that waits for the device; a wrong data set shows there.
        """
        batch = self._checked(*batch)
        loss = (self._queue_step if self.queue_objective else self._bank_step)(*batch)
        self.begun = True
        return loss

    def _checked(self, *batch: torch.Tensor) -> list[torch.Tensor]:
        """The batch with its index on the model's device. Raises BadInput."""
        *views, index = batch
        one_will_do = not self.queue_objective and not self.hpe
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
        check_index(index, N, self.positives.num_images, values=looked_at)
        if looked_at:
            check_once(index)
        if not self.begun and not all(bool(view.isfinite().all()) for view in views):
            raise BadInput(
                "the images of the first step hold NaN or infinity: expected finite numbers; look"
                " at how they are read and normalised"
            )
        if self.queue_objective:
            self.model.require_room(N * dist.world_size() * (2 if self.symmetric else 1))
        return [*views, index.to(self.bank.device, torch.int64, non_blocking=True)]

    def _queue_step(
        self, im_q: torch.Tensor, im_k: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        # [N, C], or [2N, C] each when symmetric
        q, k = self.encode(im_q, im_k, symmetric=self.symmetric)
        views = 2 if self.symmetric else 1
        # of 2N queries it is the mean over both directions
        loss = self._queue_loss(q, k, index.repeat(views))
        if self.symmetric and self.symmetric_sum:
            loss = 2 * loss
            self.parts |= {name: 2 * self.parts[name] for name in ("loss", "isl", "hpe")}
        for keys in k.chunk(views):  # the slot table wants an image at most once a call
            everyone, keys = self._of_all_ranks(index, keys)
            self.slots.write(self.model.enqueue(keys), everyone)
            if self.bank.filled:
                self.bank.update(everyone, keys, self.bank_mix)
        return loss

    def _of_all_ranks(
        self, index: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.fast:
            everyone, features = dist.all_gather_features(index, features)
        else:
            everyone = dist.all_gather_rows(index)
            features = dist.all_gather_rows(features)
        if dist.world_size() > 1 and (not self.begun or everyone.device == CPU):
            check_once(everyone)
        return everyone, features

    def _queue_loss(self, q: torch.Tensor, k: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Loss of q [N, C] with keys k [N, C] of images index [N]; changes no state but `parts`."""
        T, queue = self.model.T, self.model.queue.t()  # [K, C]
        q, k = q.float(), k.float()
        l_own = (q * k).sum(1, keepdim=True) / T  # [N, 1]
        l_pos = l_own
        weight = None
        hard = k
        absent = None
        if self.active:
            positives, weight = self.positives.lookup(index, self.P, self.turn)  # [N, P] each
            if self.mask:
                zone, doubtful = self.zone.lookup(index, self.between)  # [N, between] each
                own = torch.ones_like(index[:, None], dtype=torch.bool)
                absent = self.slots.absent(
                    torch.cat([index[:, None], positives, zone], 1),
                    torch.cat([own, weight > 0, doubtful > 0], 1),
                )
            if self.positives.num_edges:
                bank_rows = self.bank.lookup(positives)  # [N, P, C]
                rows = self._recentered(bank_rows)
                l_pos = torch.cat([l_own, (q[:, None] * rows).sum(2) / T], dim=1)  # [N, 1 + P]
                weight = torch.cat([torch.ones_like(l_own), weight], dim=1)
                hard = self._hard_positive(index, bank_rows, weight[:, 1:], k, rows)
            else:
                weight = None
        hard = hard if self.active and self.hpe else None
        lse, top, lse_h, mean_h = softmax_over(
            q, queue, T, hard=hard, absent=absent, fused=self.fast
        )
        loss = isl = FORMS[self.form](l_pos, lse[:, None], weight)  # all negatives together as one
        hp = loss.new_zeros(())
        if hard is not None:
            hp = linear_kl(q, lse, hard, lse_h, mean_h, T)
            loss = isl + self.hpe * hp
        acc1 = (l_own[:, 0] >= top).float().mean() * 100
        self.parts = {
            "loss": loss.detach(),
            "isl": isl.detach(),
            "hpe": hp.detach(),
            "acc1": acc1.detach(),
        }
        return loss

    def _recentered(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, P, C]: rows of the bank with the queue's mean instead of the bank's, unit again.

        Rows are up to an epoch older than the keys of the queue. What all images have moved by
        since tells every positive from every
        negative: a query then follows the old mean instead of its positives, and the keys follow
        it. Before the queue holds any keys they stay as they are.
        """
        held = self._keys_held() if self.recenter else 0
        if not held:
            return rows
        keys = self.model.queue[:, :held]  # [C, n]
        return F.normalize(rows + (keys.mean(1) - self.bank.mean()), dim=-1)

    @torch.no_grad()
    def _keys_held(self) -> int:
        """How many slots of the queue, from the first on, hold keys.

        All do, or, where the slots from the pointer on are as random as they began, those before
        it. The mean of n random unit rows has a squared length of 1 / n or so, and that of keys,
        which have a direction in common, a larger one. (Of a few rows that is not sure: they may be
        left out though they hold keys, which changes a mean over all others little.) Waits for the
        device when asked for the first time; from then on the slots count what is written.
        """
        if self.slots.held is None:
            start = int(self.model.queue_ptr)
            rest = self.model.queue[:, start:].float()  # [C, n]
            known = bool((self.slots.owner[start:] >= 0).all())
            keys = known or float(rest.mean(1).square().sum()) > 6 / rest.shape[1]
            self.slots.held = self.model.K if keys else start
        return self.slots.held

    def _hard_positive(
        self,
        index: torch.Tensor,
        rows: torch.Tensor,
        weight: torch.Tensor,
        other: torch.Tensor,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[N, C]: the member of each set whose bank row is the least similar to the image's own;
        the other view's feature for an empty set.

        rows [N, P, C]: bank rows of the sets; seen [N, P, C]: what is returned of them, themselves
        where None.
        """
        # no product: autocast stays out
        cosine = (
            (self.bank.lookup(index)[:, None] * rows).sum(2).masked_fill(weight == 0, torch.inf)
        )
        hardest = cosine.argmin(dim=1)
        chosen = (rows if seen is None else seen)[
            torch.arange(len(rows), device=rows.device), hardest
        ]
        return torch.where((weight > 0).any(1, keepdim=True), chosen, other.float())

    def _bank_step(self, im_1: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        """im_1 is trained on; the second view is only looked at, for the hard positives of images
        with an empty set.
        """
        *second, index = rest
        positives, weight = self.positives.lookup(index, self.P, self.turn)
        without = (weight == 0).all(dim=1)  # [N]
        count = Coming(without.sum()) if self.hpe and self.positives.num_edges else None
        f = self.encode(im_1)  # [N, C]
        hard = None
        if self.hpe:
            other = self._second_views(*second, without, count)
            hard = self._hard_positive(index, self.bank.lookup(positives), weight, other)
        own = torch.ones_like(weight[:, :1])
        # [N, 1 + P]
        rows = torch.cat([index[:, None], positives], 1)
        weight = torch.cat([own, weight], 1)
        isl, hp = bank_loss(
            f, self.bank.rows, rows, weight, self.model.T, hard, self.form, fused=self.fast
        )
        loss = isl + self.hpe * hp
        self.bank.update(*self._of_all_ranks(index, f.detach()), self.bank_mix)
        self.parts = {"loss": loss.detach(), "isl": isl.detach(), "hpe": hp.detach()}
        return loss

    @torch.no_grad()
    def _second_views(
        self, im_2: torch.Tensor, wanted: torch.Tensor, count: "Coming | None" = None
    ) -> torch.Tensor:
        """[N, C]: features of the images im_2 [N, 3, S, S] where `wanted` [N], by the encoder in
        eval mode: they then do not depend on which others are wanted, and leave its statistics
        alone. Elsewhere anything. count: how many are wanted; None: all may be.
        """
        N = len(wanted)
        # eighths of a batch: few shapes
        some = N if count is None else min(N, -(-int(count) * 8 // N) * N // 8)
        first = wanted.int().argsort(descending=True, stable=True)[:some]
        other = self.bank.rows.new_zeros(N, self.bank.rows.shape[1], dtype=torch.float32)
        if some:
            with evaluating(self.model.encoder_q):
                other[first] = self.model.encode(im_2[first])
        return other

    @torch.no_grad()
    def mean_cosine(self) -> float:
        """Mean cosine of two of the features that steps left in the queue (in the bank, without
        one): 1 where all images look alike, NaN before any.
        """
        mean = (
            self.model.queue[:, self.slots.owner >= 0].float().mean(1)
            if self.queue_objective
            else self.bank.mean()
        )
        return float(mean @ mean)

    @torch.no_grad()
    def mine(
        self,
        features: torch.Tensor,
        miner,
        rng: torch.Generator | None = None,
        tick: Callable[[], None] | None = None,
        views: tuple[torch.Tensor, torch.Tensor] | None = None,
        number: int | None = None,
    ) -> dict:
        """One round: replace the positives by what `miner` makes of features [M, C] (unit rows) and
        of the old positives.

        rng: the round's draws; None: seeded by the number of the round. tick: called often, may
        raise to abandon the round; then nothing has changed. views 2 x [M, C]: unit rows of two
        random augmentations of every image, for an estimate of what is right (`mining.estimate`).
        number: of this round, from 1 on; None: the one after the last.
        Returns the miner's report. The first round of a MoCo fills the bank with the features: they
        have its C numbers.
        Raises BadInput for features that are not finite, are no unit rows, or do not fit.
        """
        check_features(features, self.positives.num_images, views)
        self._check_rows(features)
        number = self.round + 1 if number is None else number
        rng = rng or torch.Generator().manual_seed(number - 1)
        # a miner of a user's own need not know of them
        given = {} if views is None else {"views": views}
        positives = miner.mine(features, self.positives, rng, tick, **given).to(features.device)
        zone = (
            in_between(features, positives, self.between, tick, getattr(miner, "searchable", None))
            if self.between
            else self.zone
        )
        if not self.bank.filled:
            self.bank.fill(features)
        self.positives = positives.to(self.bank.device)
        self.zone = zone.to(self.bank.device)
        self.round = number
        return {**miner.report, "between": zone.mean_size} if self.between else miner.report

    def _check_rows(self, features: torch.Tensor) -> None:
        """Raise BadInput unless the rows of features [M, C] have the length 1 and, where they fill
        the bank, its width.
        """
        C = self.model.queue.shape[0] if self.queue_objective else self.model.dim
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

    def state_dict(self) -> dict:
        """Everything beside the model that a resumed run needs: tensors and plain values.

        The miner keeps its own.
        """
        state = {
            "bank": self.bank.state_dict(),
            "positives": self.positives.state_dict(),
            "round": self.round,
        }
        if self.slots is not None:
            state["slots"] = self.slots.state_dict()
        if self.between:
            # nobody asks for more of it
            state["zone"] = {name: self.zone.state_dict()[name] for name in ("offsets", "members")}
        return state

    def load_state_dict(self, state: dict) -> None:
        self.bank.load_state_dict(state["bank"])
        self.positives = PositiveSets.from_state(state["positives"]).to(self.bank.device)
        self.round = state["round"]
        if self.slots is not None:
            self.slots.load_state_dict(state["slots"])
        if self.between:
            nothing = torch.ones(len(state["zone"]["members"]))
            self.zone = PositiveSets.from_state(
                {**state["zone"], "weights": nothing, "sureness": nothing}
            ).to(self.bank.device)

    @staticmethod
    def state_shape(model: MoCo | Instance, dim: int, between: int = 0) -> Holds:
        """What `load_state_dict` takes, as a shape of `schema`, for an ISL put together so.

        dim: C; the letter M stands for num_images.
        """
        queue_objective = isinstance(model, MoCo)
        shape = {
            "bank": FeatureBank.state_shape(dim),
            "positives": PositiveSets.state_shape("weights", "sureness"),
            "round": COUNT,
        }
        if queue_objective:
            shape["slots"] = QueueSlots.state_shape(model.K)
        if between:
            shape["zone"] = PositiveSets.state_shape(edges="Z")

        def as_mined(state: dict) -> bool:
            filled = state["bank"]["rows"] is not None
            edges = len(state["positives"]["members"])
            return (bool(state["round"]) or not edges) and filled == (
                bool(state["round"]) or not queue_objective
            )

        return Holds(shape, as_mined, "a bank and sets as the rounds leave them")


class Coming:
    """A number on its way from the device: int() waits for the work that was queued before it was
    asked for, not for what came after.

    Asked for before the encoder runs and read behind it, it leaves the device busy while the host
    goes on.
    """

    def __init__(self, number: torch.Tensor):
        self.number, self.arrived = number, None
        if number.device.type == "cuda":
            self.number = torch.empty(number.shape, dtype=number.dtype, pin_memory=True).copy_(
                number, non_blocking=True
            )
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(number.device))

    def __int__(self) -> int:
        if self.arrived is not None:
            self.arrived.synchronize()
        return int(self.number)


def check_at_least(least: int, **options: float) -> None:
    """Raise BadInput where one of the options is less, infinite or NaN."""
    for name, value in options.items():
        if not (value >= least and math.isfinite(value)):
            raise BadInput(f"{name} is {value}: expected a finite number of at least {least}")


def require_bare(model: torch.nn.Module) -> None:
    """Raise BadInput unless model is a MoCo or an Instance itself, and say how what is around it is
    had.
    """
    if isinstance(model, (MoCo, Instance)):
        return
    name, inner = type(model).__name__, model
    # of DistributedDataParallel, of torch.compile
    while hasattr(inner, "module") or hasattr(inner, "_orig_mod"):
        inner = inner.module if hasattr(inner, "module") else inner._orig_mod
    if isinstance(inner, (MoCo, Instance)):
        bare = type(inner).__name__
        raise BadInput(
            f"ISL was given a {name} around a {bare}: expected the bare {bare}. ISL wraps it in"
            " DistributedDataParallel itself where there are ranks; to compile, give the bare"
            " model to moco_isl.training.fast.compile_encoders"
        )
    same = "moco_isl.builder.MoCo takes the same arguments and state dict"
    hint = same if type(inner).__name__ == "MoCo" else "make one around your encoder"
    raise BadInput(
        f"ISL was given a {type(model).__module__}.{name}: expected a MoCo or an Instance of "
        f"moco_isl.builder; {hint}"
    )


def distributed_encode(model: torch.nn.Module) -> Callable:
    """`model.encode`, which averages gradients over the ranks where there are any."""
    if dist.world_size() == 1:
        return model.encode
    encode = Encode(model)
    # equal on all ranks by construction, and by far the largest buffer: not to be sent at every
    # forward
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        encode, ["model.queue", "model.queue_ptr"]
    )
    device = next(model.parameters()).device
    return DistributedDataParallel(
        encode, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
