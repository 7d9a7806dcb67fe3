"""The backbone in a file as a module to call, with the transform that its images need.

Letters: N images, C features of an image, S side of a view.
"""

import copy
from pathlib import Path

import torch
from torch import nn

from moco_isl import data
from moco_isl.encoders import BACKBONE, OUTPUT, Taps, require_layers, require_side
from moco_isl.errors import BadInput
from moco_isl.evaluation import backbone as reading
from moco_isl.evaluation.subject import fingerprint


class Transform:
    """PIL image, or uint8 tensor [3, H, W], -> float32 [3, S, S] as the network was trained on.

    dataset: the data set by whose mean and std values are normalised. size: S.
    """

    def __init__(self, dataset: str, size: int):
        self.dataset = dataset
        self.size = size
        self.view = data.get_eval_transform(dataset, size)

    def __call__(self, image) -> torch.Tensor:
        if not isinstance(image, torch.Tensor):
            image = image.convert("RGB")
        return self.view.normalize(self.view(image)[None])[0]

    def __repr__(self) -> str:
        normalize = self.view.normalize
        return f"Transform(size={self.size}, mean={normalize.mean}, std={normalize.std})"


class Backbone(Taps):
    """Images [N, 3, S, S], as `transform` makes them, -> backbone features [N, C].

    encoder: the network, with its head. info: what is known about it, see
    `evaluation.backbone.load_backbone`; "sha256" is that of the file.
    """

    def __init__(self, encoder: nn.Module, info: dict):
        super().__init__(encoder, [BACKBONE])
        self.info = info
        self.eval()

    @property
    def transform(self) -> Transform:
        return Transform(self.statistics(), self.trained_side() or 224)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images)[BACKBONE]

    def trained_side(self) -> int | None:
        """The side of the images of the training; None where the file does not show it."""
        return self.info["args"].get("image_size") or self.info["image_size"]

    def statistics(self, otherwise: str = "folder") -> str:
        """The data set of the training; `otherwise` where the file names none that is known."""
        name = self.info["args"].get("dataset") or otherwise
        try:
            data.find_set(name)
        except BadInput:  # such as a module that is not here
            return otherwise
        return name


class Layer(nn.Module):
    """Images [N, 3, S, S] -> the features of one layer, [N, C]; maps [N, C, h, w] are averaged.

    Raises BadInput for a layer that the network does not have, or the file no weights of.
    """

    def __init__(self, backbone: Backbone, layer: str):
        super().__init__()
        if layer == OUTPUT and backbone.info["head"] is None:
            raise BadInput(
                f"'{backbone.info['path']}' has no head, so it has no {OUTPUT}: use layer"
                f" {BACKBONE}"
            )
        require_layers(backbone.encoder, [layer])
        self.layer = layer
        # a copy, since a tap stays in the network that it is put into
        self.net = backbone if layer == BACKBONE else Taps(copy.deepcopy(backbone.encoder), [layer])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.net(images)
        found = found[self.layer] if isinstance(found, dict) else found
        return found.mean(dim=(2, 3)) if found.dim() == 4 else found


def load_backbone(
    path: str | Path,
    *,
    arch: str | None = None,
    stem: str | None = None,
    key: bool = False,
    image_size: int | None = None,
) -> Backbone:
    """The backbone in a file: a module in eval mode, on the CPU.

    path: a checkpoint of ours or MoCo's, or weights of torchvision or timm (.safetensors too).
    arch, stem, image_size: None reads them from the file. key: MoCo's key encoder.
        backbone = load_backbone("runs/isl/checkpoint_last.pth.tar").to("cuda")
        features = backbone(backbone.transform(Image.open("1.jpg"))[None].to("cuda"))    # [1, C]
    Raises BadInput for a file that cannot be read or does not fit, see
    `evaluation.backbone.load_backbone`, and for an image size that the network does not take.
    """
    encoder, info = reading.load_backbone(path, arch, stem, key, image_size)
    info["sha256"] = fingerprint(path)
    if image_size:
        require_side(encoder, info["arch"], image_size)
        info["args"] = {**info["args"], "image_size": image_size}
    return Backbone(encoder, info)
