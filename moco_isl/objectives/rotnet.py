"""RotNet, a method to compare with (Gidaris et al. 2018): by which of four right angles was an
image turned?

Letters: N batch, M images.
"""

import torch
import torch.nn.functional as F

from moco_isl.builder import Rotation
from moco_isl.isl import distributed_encode
from moco_isl.mining.positives import PositiveSets


class Rotations:
    """loss = rotations(image, index), around a `builder.Rotation`. It stands where an `ISL` stands,
    with neither bank nor rounds: an image is told nothing about others.
    """

    queue_objective = False

    def __init__(self, model: Rotation, num_images: int):
        self.model, self.encode = model, distributed_encode(model)
        self.positives = PositiveSets.empty(num_images, next(model.parameters()).device)  # for ever
        self.round = 0
        self.turn = 0
        self.active = False
        self.parts: dict[str, torch.Tensor] = {}  # of the last step: loss, acc1 (of four)

    def __call__(self, image: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of image [N, 3, S, S] in all four positions; other views and `index` are
        not looked at.
        """
        logits = self.encode(image).float()  # [4N, 4]
        truth = torch.arange(4, device=image.device).repeat_interleave(len(image))
        loss = F.cross_entropy(logits, truth)
        self.parts = {
            "loss": loss.detach(),
            "acc1": (logits.argmax(1) == truth).float().mean() * 100,
        }
        return loss

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    @staticmethod
    def state_shape() -> dict:
        return {}
