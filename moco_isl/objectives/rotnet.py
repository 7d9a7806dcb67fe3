"""RotNet (Gidaris et al. 2018), for comparison: by how many right angles was an image turned?

Letters: N batch, D numbers that the backbone gives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from moco_isl.encoders import CIFAR_SIDE, feature_dim, take_head_off
from moco_isl.objectives.base import Objective, Parts

Tensor = torch.Tensor


class Rotation(nn.Module):
    """An encoder without a head, and a classifier of rotations on what its backbone gives."""

    shown_of_an_image = 4  # a batch goes through the encoder in all four positions at once

    def __init__(self, base_encoder: Callable[..., nn.Module]):
        super().__init__()
        self.encoder_q = take_head_off(base_encoder(num_classes=1))
        self.dim = feature_dim(self.encoder_q)
        self.classifier = nn.Linear(self.dim, 4)

    def encode(self, image: Tensor) -> Tensor:
        """Logits [4N, 4] of images [N, 3, S, S], turned by 0, 90, 180 and 270 degrees."""
        turned = [torch.rot90(image, quarter, (2, 3)) for quarter in range(4)]
        return self.classifier(self.encoder_q(torch.cat(turned)))

    forward = encode


@dataclass(eq=False, repr=False, kw_only=True)
class RotationObjective(Objective):
    """Cross-entropy of every image in all four positions; no image is compared with another."""

    around: ClassVar[type[nn.Module]] = Rotation
    has_head: ClassVar[bool] = False

    @staticmethod
    def build_model(base_encoder, **_) -> Rotation:
        return Rotation(base_encoder)

    @staticmethod
    def crop(side: int) -> tuple[float, float]:
        # The published crops of CIFAR are 32 pixels out of an image with a border of 4: they show
        # 28 x 28 of its pixels at least.
        return (49 / 64, 1.0) if side <= CIFAR_SIDE else (0.08, 1.0)

    def step(self, image: Tensor, *rest: Tensor) -> Parts:
        """image: [N, 3, S, S]. A second view and the index are not looked at."""
        logits = self.encode(image).float()  # [4N, 4]
        truth = torch.arange(4, device=image.device).repeat_interleave(len(image))
        right = (logits.argmax(1) == truth).float().mean() * 100
        return {"loss": F.cross_entropy(logits, truth), "acc1": right}
