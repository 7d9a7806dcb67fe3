"""RotNet (Gidaris et al. 2018), for comparison: by how many right angles was an image turned?

Letters: N batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from moco_isl.builder import add_mlp
from moco_isl.objectives.base import Objective, Parts

Tensor = torch.Tensor


class Rotation(nn.Module):
    """The query encoder and a classifier of rotations on its output."""

    shown_of_an_image = 4  # a batch goes through the encoder in all four positions at once

    def __init__(self, base_encoder: Callable[..., nn.Module], dim: int = 128, mlp: bool = False):
        super().__init__()
        self.encoder_q = base_encoder(num_classes=dim)
        if mlp:
            add_mlp(self.encoder_q)
        self.classifier = nn.Linear(dim, 4)

    def encode(self, image: Tensor) -> Tensor:
        """Logits [4N, 4] of images [N, 3, S, S], turned by 0, 90, 180 and 270 degrees."""
        turned = [torch.rot90(image, quarter, (2, 3)) for quarter in range(4)]
        return self.classifier(F.relu(self.encoder_q(torch.cat(turned))))

    forward = encode


@dataclass(eq=False, repr=False, kw_only=True)
class RotationObjective(Objective):
    """Cross-entropy of every image in all four positions; no image is compared with another."""

    around: ClassVar[type[nn.Module]] = Rotation

    @staticmethod
    def build_model(base_encoder, *, dim: int, mlp: bool, **_) -> Rotation:
        return Rotation(base_encoder, dim, mlp)

    def step(self, image: Tensor, *rest: Tensor) -> Parts:
        """image: [N, 3, S, S]. A second view and the index are not looked at."""
        logits = self.encode(image).float()  # [4N, 4]
        truth = torch.arange(4, device=image.device).repeat_interleave(len(image))
        right = (logits.argmax(1) == truth).float().mean() * 100
        return {"loss": F.cross_entropy(logits, truth), "acc1": right}
