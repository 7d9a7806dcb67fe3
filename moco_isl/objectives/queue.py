"""MoCo v2 + ISL.

Positives of an image: its key and the bank rows of its mined set. Negatives: the queue, less the
keys of the image itself and of its set.

Letters: N batch, C feature dimension, K queue length, M images, P positives of an image after
padding, L members of the largest set, S slots remembered of an image, T temperature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from moco_isl import dist
from moco_isl.bank import QueueSlots
from moco_isl.builder import MoCo
from moco_isl.errors import BadInput
from moco_isl.losses import (
    FORMS,
    accuracy,
    alignment,
    info_nce,
    linear_kl,
    softmax_over,
    with_own_key,
)
from moco_isl.objectives.base import MinedObjective, Parts, check_at_least
from moco_isl.options import opt
from moco_isl.schema import Holds, like, require

Tensor = torch.Tensor


@dataclass(eq=False, repr=False, kw_only=True)
class QueueObjective(MinedObjective):
    """Bank, mined positives and loss around a `MoCo`. While `active` is False it is MoCo v2."""

    symmetric: bool = opt(
        False,
        help="each view is query once and key once: better epochs, at twice the price. The loss is"
        " the sum of both directions, as in MoCo's notebook; with the settings of a library that"
        " takes the mean give half the --lr and twice the --wd",
    )
    predictor: int = opt(
        0,
        low=0,
        high=1 << 20,
        metavar="n",
        rare=True,
        help="a predictor behind the query encoder, as in MoCo v3: an MLP with n hidden units and"
        " batch norm, which MoCo v3 gives 4096; the key encoder has none (0: none)",
    )
    mask: bool = True  # leave the image itself and its set out of its negatives

    usual_mix: ClassVar[float] = 1.0
    around: ClassVar[type[nn.Module]] = MoCo
    has_queue: ClassVar[bool] = True
    follow: ClassVar[tuple[str, ...]] = ("moco_k", "moco_m")

    def __post_init__(self) -> None:
        check_at_least(0, predictor=self.predictor)
        self.predict = None
        if self.predictor:
            if self.encode is not None:
                raise BadInput(
                    "predictor is given, and encode too: expected only one of them, because the"
                    " predictor has to be in what is wrapped"
                )
            device = next(self.model.parameters()).device
            self.predict = build_predictor(self.model.dim, self.predictor).to(device)
        super().__post_init__()
        self.slots = QueueSlots(self.num_images, self.model.K, self.directions, self.device)
        # The queue begins at random. Ranks take that of rank 0; equal writes then keep it equal.
        keys = self.model.queue.t().contiguous()  # [K, C]
        self.model.queue.copy_(dist.broadcast(keys).t())
        dist.broadcast(self.model.queue_ptr)

    @staticmethod
    def build_model(base_encoder, *, dim: int, K: int, m: float, T: float, mlp: bool, **_) -> MoCo:
        return MoCo(base_encoder, dim, K, m, T, mlp)

    @staticmethod
    def views(hpe: float) -> int:
        return 2

    def encode_options(self) -> dict[str, nn.Module]:
        return {} if self.predict is None else {"predictor": self.predict}

    def parameters(self) -> list[nn.Parameter]:
        beside = [] if self.predict is None else self.predict.parameters()
        return [*super().parameters(), *beside]

    @property
    def directions(self) -> int:
        return 2 if self.symmetric else 1

    @property
    def encoder(self) -> nn.Module:
        return self.model.encoder_k

    def require_room(self, images: int) -> None:
        self.model.require_room(images * self.directions)

    def step(self, im_q: Tensor, im_k: Tensor, index: Tensor) -> Parts:
        # [N, C] each; symmetric: [2N, C], the second half with the roles of the views exchanged
        q, k = self.encode(im_q, im_k, symmetric=self.symmetric)
        parts = self.loss(q, k, index.repeat(self.directions))
        if self.symmetric:  # the mean over both directions so far
            parts |= {name: 2 * parts[name] for name in ("loss", "isl", "hpe")}
        parts["alignment"] = alignment(q, k)
        for keys in k.chunk(self.directions):  # an image may come once in a call of `write`
            everyone, keys = self.of_all_ranks(index, keys)
            self.slots.write(self.model.enqueue(keys), everyone)
            if self.bank.filled:
                self.bank.update(everyone, keys, self.bank_mix)
        return parts

    def loss(self, q: Tensor, k: Tensor, index: Tensor) -> Parts:
        """Loss of q [N, C] with keys k [N, C] of images index [N]. It changes no state."""
        if not self.active:  # MoCo v2
            loss, acc1 = info_nce(q, k, self.model.queue.t(), self.model.T, self.fast)
            return {"loss": loss, "isl": loss, "hpe": loss.new_zeros(()), "acc1": acc1}
        T = self.model.T
        queue = self.model.queue.t()  # [K, C]

        # The set of each image; of a large one, a window is pulled at in this step.
        members, present = self.whole_sets(index)  # [N, L] each
        mined, weight = self.positives.lookup(index, self.P, self.turn)  # [N, P] each
        rows = self.moved(self.bank.lookup(mined))  # [N, P, C]
        hard = self.hard_positive(index, members, present, k) if self.hpe else None  # [N, C]

        # The image itself and all of its set are no negatives.
        absent = None
        if self.mask:
            alike = torch.cat([index[:, None], members], dim=1)  # [N, 1 + L]
            own = torch.ones_like(present[:, :1])  # [N, 1]
            absent = self.slots.absent(alike, torch.cat([own, present], dim=1))  # [N, (1 + L) S]

        weight = with_own_key(weight, self.own)  # [N, 1 + P]

        # Logits, and one pass over the queue.
        l_own = (q * k).sum(1, keepdim=True) / T  # [N, 1]
        l_mined = (q[:, None] * rows).sum(2) / T  # [N, P]
        l_pos = torch.cat([l_own, l_mined], dim=1)  # [N, 1 + P]
        lse, top, lse_h, mean_h = softmax_over(
            q, queue, T, hard=hard, absent=absent, fused=self.fast
        )

        isl = FORMS[self.form](l_pos, lse, weight)  # Eq. 5
        hp = isl.new_zeros(())
        if self.hpe:
            hp = linear_kl(q, lse, hard, lse_h, mean_h, T)  # Eq. 6
        loss = isl + self.hpe * hp  # Eq. 7
        return {"loss": loss, "isl": isl, "hpe": hp, "acc1": accuracy(l_own, top)}

    def moved(self, rows: Tensor) -> Tensor:
        """Bank rows [N, P, C], moved from the bank's mean to that of the queue's keys; unit again.

        Rows are up to an epoch older than keys, and all features have moved in a common direction
        meanwhile. Without the move this shift would tell positives from negatives, and the query
        would learn the shift. Rows stay as they are until the queue holds keys, and while no image
        has positives: then all of them are padding.
        """
        if not self.positives.num_edges:
            return rows
        held = self.slots.count_held(self.model.queue, self.model.queue_ptr)
        if not held:
            return rows
        keys = self.model.queue[:, :held]  # [C, n]
        return F.normalize(rows + (keys.mean(1) - self.bank.mean()), dim=-1)

    def mean_feature(self) -> Tensor:
        return self.model.queue[:, self.slots.owner >= 0].float().mean(1)

    def recent_features(self) -> Tensor:
        return self.model.queue[:, self.slots.owner >= 0].t()

    def negatives(self) -> tuple[int, float] | None:
        return None if self.active else (self.model.K, self.model.K / self.num_images)

    def start_from(self, state: dict, same_images: bool, features: Callable) -> None:
        saved = state.get("predictor")
        if self.predict is not None and _fits(saved, self.predict):
            self.predict.load_state_dict(saved)
        slots = state.get("slots")
        if slots is None:
            return
        if same_images:
            self.slots.take_over(slots["owner"], oldest=int(self.model.queue_ptr))
        self.slots.held = slots["held"]

    def state_dict(self) -> dict:
        state = super().state_dict() | {"slots": self.slots.state_dict()}
        if self.predict is not None:  # here, so that the model's names stay those of MoCo
            state["predictor"] = dict(self.predict.state_dict())
        return state

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.slots.load_state_dict(state["slots"])
        if self.predict is not None:
            self.predict.load_state_dict(state["predictor"])

    @classmethod
    def state_shape(cls, model: MoCo, predictor: nn.Module | None = None) -> Holds:
        """predictor: one of the shapes of the file's, on any device; None: it has none."""
        more = {} if predictor is None else {"predictor": like(predictor.state_dict())}
        return super().state_shape(model, slots=QueueSlots.state_shape(model.K), **more)


def build_predictor(dim: int, hidden: int) -> nn.Sequential:
    """MoCo v3's predictor: [N, dim] -> [N, dim], two linear layers, each with batch norm.

    The last batch norm has no weights: q is scaled to a unit row anyway.
    """
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, dim, bias=False),
        nn.BatchNorm1d(dim, affine=False),
    )


def _fits(saved: object, predictor: nn.Module) -> bool:
    """Whether a state dict, out of a file that was not checked, is one of this predictor."""
    try:
        require(saved, like(predictor.state_dict()), "the predictor")
    except BadInput:
        return False
    return True
