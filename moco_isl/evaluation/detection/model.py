"""Faster R-CNN of torchvision on a ResNet that has been pretrained.

C4 is what MoCo moves its features to: proposals and regions from layer3, and layer4 with one more
batch norm behind it as the head of each region (`Res5ROIHeadsExtraNorm`). FPN is torchvision's
pyramid over all four stages, with two dense layers as the head, and batch norm in the pyramid.

Letters: N images, R regions of all of them, c channels.
"""

from collections import OrderedDict

import torch
from torch import nn

from moco_isl.encoders import channels_of, evaluating, stage_names
from moco_isl.errors import BadInput

KINDS = ("c4", "fpn")
BN = ("sync", "frozen", "train")
_ANCHORS = (2, 4, 8, 16, 32)  # sides of C4's, in strides: 32 to 512 pixels of layer3's 16
_ANCHOR_OF_LEVEL = 8  # side of an FPN level's, in strides: 32 to 512 pixels of 4 to 64
_ASPECTS = (0.5, 1.0, 2.0)


def require_stages(encoder: nn.Module, arch: str, path: str) -> None:
    """Raise BadInput where a backbone has no four stages to put a detector on."""
    if stage_names(encoder).get("conv5") != "layer4":
        raise BadInput(
            f"'{path}' holds {arch} ({type(encoder).__name__}), which has no stages layer1 to"
            " layer4: Faster R-CNN needs a ResNet, such as -a resnet50, or resnet18w8 for small"
            " images"
        )


def build_detector(
    encoder: nn.Module,
    classes: int,
    *,
    kind: str,
    bn: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    rois: int,
    proposals: int,
    roi_size: int,
) -> nn.Module:
    """A detector of so many classes around an encoder's stages, which stay the tensors they are.

    It takes lists of images [3, h, w] in [0, 1], not resized. rois: regions of an image that the
    head is trained on. proposals: what is kept of an image, twice as many in training. roi_size:
    side of the grid that a region is pooled to; 0: 14 (C4), 7 (FPN).
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    norm = None if bn == "frozen" else nn.BatchNorm2d  # of the new layers
    parts = (_c4 if kind == "c4" else _fpn)(encoder, classes, norm, roi_size)
    anchors = AnchorGenerator(parts.pop("sizes"), (_ASPECTS,) * parts.pop("levels"))
    before = 6 * proposals if kind == "c4" else proposals  # of each level, before overlaps go
    model = FasterRCNN(
        **parts,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=2 * before,
        rpn_pre_nms_top_n_test=before,
        rpn_post_nms_top_n_train=2 * proposals,
        rpn_post_nms_top_n_test=proposals,
        box_batch_size_per_image=rois,
    )
    model.transform = _as_it_is(mean, std)
    predictor = model.roi_heads.box_predictor
    for layer, spread in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=spread)  # as detectron2 begins
        nn.init.zeros_(layer.bias)
    for part in (model.rpn, model.roi_heads):
        given = part.fg_bg_sampler
        part.fg_bg_sampler = Sampler(given.batch_size_per_image, given.positive_fraction)
    model.roi_heads.fg_bg_sampler.view = 1
    return _with_bn(model, bn)


def _c4(encoder: nn.Module, classes: int, norm: type[nn.Module] | None, roi_size: int) -> dict:
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    stride, width = _shapes(encoder)["layer3"]
    out = _shapes(encoder)["layer4"][1]
    body = IntermediateLayerGetter(encoder, {"layer3": "0"})
    body.out_channels = width
    layers = {"layer4": encoder.layer4} | ({"norm": norm(out)} if norm else {})
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    return {
        "backbone": body,
        "sizes": (tuple(side * stride for side in _ANCHORS),),
        "levels": 1,
        "box_roi_pool": _aligned_pool(roi_size or 14, stride),
        "box_head": nn.Sequential(OrderedDict(layers)),  # [R, c, 14, 14] -> [R, C]
        "box_predictor": FastRCNNPredictor(out, classes + 1),
    }


def _fpn(encoder: nn.Module, classes: int, norm: type[nn.Module] | None, roi_size: int) -> dict:
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    shapes = _shapes(encoder)
    strides = [shapes[f"layer{i}"][0] for i in (1, 2, 3, 4)]
    width = min(256, max(32, shapes["layer4"][1] // 2))
    layers = {f"layer{i}": str(i - 1) for i in (1, 2, 3, 4)}
    channels = [shapes[layer][1] for layer in layers]
    body = BackboneWithFPN(encoder, layers, channels, width, norm_layer=norm)
    side = roi_size or 7
    hidden = 4 * width
    return {
        "backbone": body,
        "sizes": tuple((_ANCHOR_OF_LEVEL * x,) for x in (*strides, 2 * strides[-1])),
        "levels": len(strides) + 1,
        "box_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], side, 2),
        "box_head": TwoMLPHead(width * side**2, hidden),
        "box_predictor": FastRCNNPredictor(hidden, classes + 1),
    }


@torch.no_grad()
def _shapes(encoder: nn.Module) -> dict[str, tuple[int, int]]:
    """(stride, channels) of what each of the four stages gives."""
    side = 128
    x = torch.zeros(1, channels_of(encoder), side, side)
    found = {}
    with evaluating(encoder):
        for name, child in encoder.named_children():
            x = child(x)
            found[name] = (side // x.shape[-1], x.shape[1])
            if name == "layer4":
                break
    return found


def _aligned_pool(side: int, stride: int) -> nn.Module:
    from torchvision.ops import MultiScaleRoIAlign, roi_align

    class AlignedPool(MultiScaleRoIAlign):
        """detectron2's ROIAlignV2 on one map: {"0": [N, c, h, w]} -> [R, c, side, side]."""

        def forward(self, x, boxes, image_shapes) -> torch.Tensor:
            grid = self.output_size
            return roi_align(x["0"], boxes, grid, 1 / stride, sampling_ratio=-1, aligned=True)

    return AlignedPool(["0"], side, -1)


def _as_it_is(mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    class AsItIs(GeneralizedRCNNTransform):
        """torchvision's transform, which normalises and pads: the workers have resized."""

        def resize(self, image, target=None):
            return image, target

    return AsItIs(1, 1, list(mean), list(std))


def _with_bn(model: nn.Module, bn: str) -> nn.Module:
    """The model with every batch norm frozen, or synchronised, or as it is."""
    if bn == "sync":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return _frozen(model) if bn == "frozen" else model


def _frozen(module: nn.Module) -> nn.Module:
    """Replace batch norm by the affine map that it is in evaluation, which is not trained."""
    from torchvision.ops import FrozenBatchNorm2d

    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            _frozen(child)
            continue
        frozen = FrozenBatchNorm2d(child.num_features, child.eps)
        state = child.state_dict()
        state.pop("num_batches_tracked")
        frozen.load_state_dict(state)
        setattr(module, name, frozen)
    return module


class Sampler:
    """torchvision's sampler of right and wrong regions, whose draws do not depend on the batch.

    keys: a number for each image of the batch, which its draws begin with. So one process and
    several ranks draw the same, and a resumed run goes on with nothing to restore.
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float):
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.view = 0
        self.keys: list[int] = []

    def __call__(
        self, matched: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """matched: of each image int64 [regions], above 0 right, 0 wrong, below 0 neither.

        Returns masks of the right and of the wrong ones that were drawn.
        """
        right, wrong = [], []
        for key, found in zip(self.keys, matched, strict=True):
            generator = torch.Generator().manual_seed(key ^ self.view)
            positive, negative = (found >= 1).nonzero()[:, 0], (found == 0).nonzero()[:, 0]
            most = int(self.batch_size_per_image * self.positive_fraction)
            chosen = self._draw(positive, most, generator)
            right.append(torch.zeros_like(found, dtype=torch.uint8).index_fill_(0, chosen, 1))
            chosen = self._draw(negative, self.batch_size_per_image - len(chosen), generator)
            wrong.append(torch.zeros_like(found, dtype=torch.uint8).index_fill_(0, chosen, 1))
        return right, wrong

    @staticmethod
    def _draw(rows: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:n].to(rows.device)]


def set_keys(model: nn.Module, keys: list[int]) -> None:
    """Say what the draws of regions of the next batch begin with."""
    model.rpn.fg_bg_sampler.keys = keys
    model.roi_heads.fg_bg_sampler.keys = keys


def groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The parameters for an optimizer; those of batch norm have no weight decay (detectron2's)."""
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter in module.parameters()
    }
    every = [p for p in model.parameters() if p.requires_grad]
    of = lambda norm: [p for p in every if (id(p) in norms) == norm]
    kinds = [{"params": of(False), "weight_decay": weight_decay}]
    return kinds + [{"params": of(True), "weight_decay": 0.0}] * bool(of(True))
