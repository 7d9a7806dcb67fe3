"""The backbone in a file as a module to call, with the transform that its images need.

Letters: N images, c channels, C features of an image, S side of a view.
"""

import copy
from pathlib import Path

import torch
from torch import nn

from moco_isl import data
from moco_isl.data.bands import to_channels
from moco_isl.data.functions import to_rgb
from moco_isl.encoders import BACKBONE, OUTPUT, Taps, require_layers, require_side
from moco_isl.errors import BadInput
from moco_isl.evaluation.subject import fingerprint, format_of
from moco_isl.run import backbone as reading
from moco_isl.run.weights import weights_file

ANY = data.Pixels(None, None, None, None)


class Transform:
    """PIL image, or tensor [c, H, W], -> float32 [c, S, S] as the network was trained on.

    A tensor is uint8, or floats in [0, 1]. dataset: the data set by whose mean and std values are
    normalised, where `pixels` has none of its own. size: S.
    """

    def __init__(self, dataset: str, size: int, pixels: data.Pixels):
        self.size = size
        self.pixels = pixels
        self.view = data.get_eval_transform(dataset, size, pixels)

    def __call__(self, image) -> torch.Tensor:
        if self.pixels.is_rgb:
            image = to_rgb(image)
        else:
            image = to_channels(image, self.pixels.channels)
        return self.view.normalize(self.view(image)[None])[0]

    def __repr__(self) -> str:
        normalize = self.view.normalize
        return f"Transform(size={self.size}, mean={normalize.mean}, std={normalize.std})"


class Backbone(Taps):
    """Images [N, c, S, S], as `transform` makes them, -> backbone features [N, C].

    encoder: the network, with its head. info: what is known about it, see
    `run.backbone.load_backbone`; "sha256" is that of the file.
    """

    def __init__(self, encoder: nn.Module, info: dict):
        super().__init__(encoder, [BACKBONE])
        self.info = info
        self.eval()

    @property
    def transform(self) -> Transform:
        """Raises BadInput where neither the file nor its data set says mean and std."""
        pixels = self.pixels()
        name = self.statistics()
        if not pixels.are_known(name):
            raise BadInput(
                f"'{self.info['path']}' does not say mean and std of its {pixels.channels}"
                " channels: moco_isl.embed measures them on the images"
            )
        return Transform(name, self.trained_side() or 224, pixels)

    def pixels(self, asked: data.Pixels = ANY) -> data.Pixels:
        """Channels, bits, mean and std of the images, see `subject.format_of`. Raises BadInput."""
        return format_of(self.encoder, self.info, asked)

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
    """Images [N, c, S, S] -> the features of one layer, [N, C]; maps [N, C, h, w] are averaged.

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

    path: a checkpoint of ours or MoCo's, a run's folder, weights of torchvision, timm, DINO or
    DINOv2 (.safetensors too), or a Hugging Face folder.
    arch, stem, image_size: None reads them from the file. key: MoCo's key encoder.
        backbone = load_backbone("runs/isl/checkpoint_last.pth.tar").to("cuda")
        features = backbone(backbone.transform(Image.open("1.jpg"))[None].to("cuda"))    # [1, C]
    Raises BadInput for a file that cannot be read or does not fit, see
    `run.backbone.load_backbone`, and for an image size that the network does not take.
    """
    encoder, info = reading.load_backbone(path, arch, stem, key, image_size)
    info["sha256"] = fingerprint(weights_file(path))
    if image_size:
        require_side(encoder, info["arch"], image_size)
        info["args"] = {**info["args"], "image_size": image_size}
    return Backbone(encoder, info)
