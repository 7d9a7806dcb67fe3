"""Instance discrimination + ISL, the paper's own objective: a softmax over all images.

Letters: N batch, C feature dimension, M images, P positives of an image after padding, L members of
the largest set, T temperature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from moco_isl import dist
from moco_isl.builder import add_mlp
from moco_isl.encoders import evaluating
from moco_isl.losses import FORMS, LOCAL, alignment, bank_loss, local_aggregation, with_own_key
from moco_isl.objectives.base import MinedObjective, Parts
from moco_isl.options import check_value, opt

Tensor = torch.Tensor


class Instance(nn.Module):
    """The query encoder alone (non-parametric instance discrimination): its keys are a bank's rows.

    Named `encoder_q`, so that files of both objectives are read by the same tools.
    """

    shown_of_an_image = 1  # how many images the encoder sees at once of each in the batch

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        T: float = 0.1,
        mlp: bool = False,
    ):
        super().__init__()
        self.dim = dim
        self.T = T
        self.encoder_q = base_encoder(num_classes=dim)
        if mlp:
            add_mlp(self.encoder_q)

    def encode(self, image: Tensor) -> Tensor:
        """f: [N, C] unit rows, float32, of images [N, 3, S, S]."""
        return F.normalize(self.encoder_q(image).float(), dim=1)

    forward = encode


@dataclass(eq=False, repr=False, kw_only=True)
class BankObjective(MinedObjective):
    """Bank, mined positives and loss around an `Instance`: Eq. 4 to 8.

    The bank begins with random rows. In half precision its softmax is taken by half-precision
    products.
    """

    background: int = opt(
        4096,
        "--isl-background",
        low=1,
        metavar="k",
        rare=True,
        help="nearest images among which --isl-loss local compares, looked up anew at every step",
    )
    seed: int = 0  # of the random rows with which the bank begins

    forms: ClassVar[tuple[str, ...]] = (*FORMS, LOCAL)
    around: ClassVar[type[nn.Module]] = Instance
    begins_filled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_value(self, "background")
        super().__post_init__()
        self.bank.fill_random(self.num_images, torch.Generator().manual_seed(self.seed))
        # Ranks take the rows of rank 0, whatever their seeds; equal writes then keep them equal.
        dist.broadcast(self.bank.rows)

    @staticmethod
    def build_model(base_encoder, *, dim: int, T: float, mlp: bool, **_) -> Instance:
        return Instance(base_encoder, dim, T, mlp)

    @staticmethod
    def views(hpe: float) -> int:
        return 2 if hpe else 1

    def step(self, im_1: Tensor, *rest: Tensor) -> Parts:
        """Train on im_1; the second view gives the hard positives of images with an empty set."""
        *second, index = rest
        members, present = self.whole_sets(index)  # [N, L] each
        without = ~present.any(dim=1)  # [N]
        count = Coming(without.sum()) if self.hpe and self.positives.num_edges else None
        f = self.encode(im_1)  # [N, C]
        hard = None
        if self.hpe:
            other = self.second_views(*second, without, count)  # [N, C]
            hard = self.hard_positive(index, members, present, other)  # [N, C]
        isl, hp = self.losses(f, index, members, present, hard)
        apart = alignment(f, self.bank.lookup(index))  # from the row of the visit before
        self.bank.update(*self.of_all_ranks(index, f.detach()), self.bank_mix)
        return {"loss": isl + self.hpe * hp, "isl": isl, "hpe": hp, "alignment": apart}

    def losses(
        self, f: Tensor, index: Tensor, members: Tensor, present: Tensor, hard: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(L_isl, L_hp) of features f [N, C] of images index [N]. It changes no state.

        members, present [N, L]: their sets. hard [N, C]: their hard positives, None without.
        """
        bank, T = self.bank.rows, self.model.T
        is_local = self.form == LOCAL and self.active
        if is_local:
            images = torch.cat([index[:, None], members], dim=1)  # [N, 1 + L]
            weight = self.positives.lookup(index, members.shape[1])[1]  # [N, L]
            weight = with_own_key(weight, self.own)  # [N, 1 + L]
            isl = local_aggregation(f, bank, images, weight, T, self.background)
            if hard is None:
                return isl, isl.new_zeros(())
        mined, weight = self.positives.lookup(index, self.P, self.turn)  # [N, P] each
        eq_5, hp = bank_loss(
            f,
            bank,
            torch.cat([index[:, None], mined], dim=1),  # [N, 1 + P]
            with_own_key(weight, self.own),  # [N, 1 + P]
            T,
            hard,
            "logsum" if self.form == LOCAL else self.form,
            self.waiting(members, present, mined),
            fused=self.fast,
        )
        return (isl if is_local else eq_5), hp

    def negatives(self) -> tuple[int, float] | None:
        return None if self.active else (self.num_images - 1, 0.0)

    def waiting(self, members: Tensor, present: Tensor, mined: Tensor) -> Tensor | None:
        """[N, L] int64: the members of each set that are not pulled at now, M for none.

        members, present [N, L]: the sets; mined [N, P]: the window of this step. They are left out
        of the softmax, where they would count as negatives. None where all are pulled at.
        """
        if self.positives.largest <= self.P:
            return None
        pulled = (members[:, :, None] == mined[:, None]).any(2)  # [N, L]
        return torch.where(present & ~pulled, members, self.num_images)

    @torch.no_grad()
    def second_views(self, im_2: Tensor, wanted: Tensor, count: "Coming | None" = None) -> Tensor:
        """[N, C]: features of the images im_2 [N, 3, S, S] where `wanted` [N] is True.

        Other rows may hold anything. The encoder is in eval mode: a feature does then not depend
        on the other images of the batch, and batch norm's averages stay as they are.
        count: how many are wanted; None: all may be.
        """
        N = len(wanted)
        if count is None:
            some = N
        else:  # rounded up to eighths of a batch, for few different shapes
            eighths = -(-int(count) * 8 // N)
            some = min(N, eighths * N // 8)
        first = wanted.int().argsort(descending=True, stable=True)[:some]
        other = torch.zeros(N, self.bank.dim, device=self.device)
        if some:
            with evaluating(self.model.encoder_q):
                other[first] = self.model.encode(im_2[first])
        return other

    def start_from(self, state: dict, same_images: bool, features: Callable) -> None:
        # Random rows would undo what the encoder has learned.
        self.bank.fill(features(self.encoder))


class Coming:
    """A number that is being copied from the device.

    int() waits only for the work that was queued before the copy. The number is asked for before
    the encoder runs and read afterwards, so that the device stays busy while the host goes on.
    """

    def __init__(self, number: Tensor):
        self.number = number
        self.arrived = None
        if number.device.type == "cuda":
            self.number = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
            self.number.copy_(number, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(number.device))

    def __int__(self) -> int:
        if self.arrived is not None:
            self.arrived.synchronize()
        return int(self.number)
