"""Encoders by name, their heads and layers, batch norm in splits, and features of a whole data set.

Letters: N batch, C feature dimension, M images in the data set, c channels and S side of an image.

Names: torchvision's classifiers, except the SqueezeNets, which end in no linear layer;
`timm:<name>`; ResNet-18/34/50 with a narrow first stage, such as `resnet18w32`; `alexnet`, with the
batch norm that papers of this field add; and `digits`, the small network of the demo. Small images
get the small stem: a 3x3 convolution and no pooling before the first stage.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from moco_isl import dist
from moco_isl.errors import BadInput, RunFailed, first_line, missing_package
from moco_isl.loader import check_index

STEMS = ("auto", "imagenet", "cifar")
AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CIFAR_SIDE = 64  # up to this many pixels a side, stem "auto" means "cifar"
NO_LINEAR_HEAD = {"squeezenet1_0", "squeezenet1_1"}  # torchvision's that end in a convolution
_NARROW = re.compile(r"resnet(18|34|50)w([1-9]\d*)")
_NARROW_LAYERS = {
    "18": ("BasicBlock", [2, 2, 2, 2]),
    "34": ("BasicBlock", [3, 4, 6, 3]),
    "50": ("Bottleneck", [3, 4, 6, 3]),
}


# ---- building ------------------------------------------------------------------------------------


def build_encoder(
    name: str,
    num_classes: int = 128,
    stem: str = "auto",
    image_size: int | None = None,
    channels: int = 3,
) -> nn.Module:
    """A freshly initialised encoder: images [N, channels, S, S] -> [N, num_classes].

    stem: "imagenet" is the architecture's own, "cifar" the small one (ResNets and alexnet), "auto"
    the small one where `image_size` is at most 64 pixels. Raises BadInput for an unknown name or
    stem, a stem or image size that the architecture does not have, and an architecture without a
    linear classifier.
    """
    if stem not in STEMS:
        raise BadInput(f"stem {stem!r} is not one of {', '.join(STEMS)}")
    is_small = image_size is not None and image_size <= CIFAR_SIDE
    small = stem == "cifar" or (stem == "auto" and is_small)
    if name == "alexnet":
        encoder = (AlexNet32 if small else AlexNet224)(num_classes, channels)
    elif name == "digits":
        encoder = DigitsNet(num_classes, channels)
    elif narrow := _NARROW.fullmatch(name):
        layers = _NARROW_LAYERS[narrow[1]]
        encoder = _narrow_resnet()(*layers, int(narrow[2]), num_classes, channels)
    elif library := _library_of(name):
        encoder = library(name, num_classes, image_size, channels)
    else:
        raise _unknown(name)
    if small and is_resnet(encoder):
        use_cifar_stem(encoder)
    elif stem == "cifar" and not isinstance(encoder, AlexNet32):
        what = f"{name} has no cifar stem (ResNets and alexnet have)"
        raise BadInput(f"{what}: use --stem auto or --stem imagenet")
    if _find_head(encoder) is None:
        raise BadInput(f"{name} {_NO_HEAD}: choose another architecture")
    return encoder


def encoder_names() -> list[str]:
    """The names `build_encoder` takes, of narrow ResNets two; timm's are `timm.list_models()`."""
    names = {*_torchvision_names(), "digits", "resnet18w16", "resnet18w32"}
    return sorted(names - NO_LINEAR_HEAD)


def _torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _library_of(name: str) -> Callable[[str, int, int | None, int], nn.Module] | None:
    """The function that builds networks of the library a name belongs to; None for no library."""
    if name.startswith("timm:"):
        return _build_timm
    return _build_torchvision if name in _torchvision_names() else None


def _unknown(name: str) -> BadInput:
    what = f"unknown architecture {name!r}"
    lower = name.lower()
    try:
        import timm

        if timm.is_model(lower):
            return BadInput(f"{what}; timm has one of this name: use timm:{lower}")
    except ImportError:
        pass
    near = _nearest(lower, encoder_names())
    known = "torchvision's names, timm:<name>, resnet18w32, alexnet and digits are known"
    return BadInput(f"{what}; {f'nearest: {near}' if near else known}")


def _nearest(name: str, names: list[str], before: str = "") -> str:
    """The three names that look most like this one, in words; '' for none."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return ", ".join(before + one for one in near)


def _build_torchvision(
    name: str, num_classes: int, image_size: int | None, channels: int
) -> nn.Module:
    import torchvision

    extra = {}
    if name in ("googlenet", "inception_v3"):
        # the auxiliary classifiers would make the output a tuple
        extra = {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_") and image_size is not None:
        extra = {"image_size": image_size}
    with _build_errors(name, image_size), _first_convolution_of(channels):
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)


@contextmanager
def _first_convolution_of(channels: int):
    """A network built meanwhile takes images of so many channels; it initialises itself as ever.

    torchvision's take RGB alone: their first convolution is replaced as soon as they have it.
    """
    done = channels == 3

    def replace(parent: nn.Module, name: str, module: nn.Module | None) -> nn.Module | None:
        nonlocal done
        if done or not isinstance(module, nn.Conv2d) or module.in_channels != 3:
            return None  # it stays as it is
        done = True
        names = ("kernel_size", "stride", "padding", "dilation")
        same = {name: getattr(module, name) for name in names}
        return nn.Conv2d(channels, module.out_channels, bias=module.bias is not None, **same)

    hook = register_module_module_registration_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _build_timm(given: str, num_classes: int, image_size: int | None, channels: int) -> nn.Module:
    name = given.removeprefix("timm:")
    try:
        import timm
    except ImportError:
        raise missing_package(given, "timm") from None
    if not timm.is_model(name):
        near = _nearest(name.lower(), timm.list_models(), before="timm:")
        hint = f"; nearest: {near}" if near else ""
        if name in encoder_names():
            hint = f"; torchvision has one of this name: use {name}"
        raise BadInput(f"timm has no model {name!r}{hint}")
    config = timm.models.get_pretrained_cfg(name)
    extra = {} if channels == 3 else {"in_chans": channels}
    if image_size is not None and config is not None and config.fixed_input_size:
        extra["img_size"] = image_size
    with _build_errors(given, image_size):
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **extra)


@contextmanager
def _build_errors(name: str, image_size: int | None):
    """What a library raises for a side or a classifier that its network lacks becomes BadInput."""
    try:
        yield
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        reason = first_line(error).rstrip(".")
        what = f"as a classifier ({reason}):"
        if image_size is not None:
            what = f"for images of side {image_size} ({reason}): give the --image-size it was made"
            what += " for, or"
        raise BadInput(f"{name} cannot be built {what} choose another architecture") from error


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` builds, on the meta device: names and shapes, without drawing weights."""
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError:  # torchvision's RegNets compute widths with tensors: move weights alone
        with ExitStack() as hooks:
            hooks.callback(register_module_parameter_registration_hook(_parameter_to_meta).remove)
            hooks.callback(register_module_buffer_registration_hook(_buffer_to_meta).remove)
            return build()


def _parameter_to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None):
    if parameter is None or parameter.is_meta:
        return parameter
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


def _buffer_to_meta(module: nn.Module, name: str, buffer: torch.Tensor | None):
    return None if buffer is None else buffer.to("meta")


def as_in_library(encoder: nn.Module, name: str) -> bool:
    """Whether the library of this name has the same network, so that its code loads the backbone.

    Compares names and shapes without the head: a small stem, or a transformer of torchvision for
    another image size, differs. True for names that no library has.
    """
    library = _library_of(name)
    if library is None:
        return True
    # timm's take any number of channels, torchvision's take RGB
    channels = channels_of(encoder) if library is _build_timm else 3
    # timm.create_model takes the side of a vision transformer, and our exports name it
    side = getattr(getattr(encoder, "patch_embed", None), "img_size", None)
    theirs = on_meta(lambda: library(name, 1, side and side[0], channels))
    return backbone_shapes(encoder) == backbone_shapes(theirs)


def first_convolution(encoder: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """(name, module) of the convolution that takes in the images; None where there is none."""
    modules = encoder.named_modules()
    return next(((name, m) for name, m in modules if isinstance(m, nn.Conv2d)), None)


def channels_of(encoder: nn.Module) -> int:
    """How many channels the images have that an encoder takes."""
    first = first_convolution(encoder)
    return first[1].in_channels if first else 3


def backbone_shapes(encoder: nn.Module) -> dict[str, torch.Size]:
    """The shapes, by name, of everything in an encoder's state dict but its head."""
    place = head_name(encoder) + "."
    return {name: t.shape for name, t in encoder.state_dict().items() if not name.startswith(place)}


def is_resnet(encoder: nn.Module) -> bool:
    """Whether it is one of torchvision's ResNets, or a narrow one."""
    import torchvision

    return isinstance(encoder, torchvision.models.ResNet)


def use_cifar_stem(resnet: nn.Module) -> None:
    """Give a ResNet the stem for small images: a 3x3 convolution of stride 1 and no max pooling."""
    first = resnet.conv1
    resnet.conv1 = _stem(first.in_channels, first.out_channels, kernel=3, stride=1)
    resnet.maxpool = nn.Identity()


def _stem(c_in: int, c_out: int, kernel: int, stride: int) -> nn.Conv2d:
    """A ResNet's first convolution, initialised as torchvision does."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


@functools.cache
def _narrow_resnet() -> type[nn.Module]:
    """The class of narrow ResNets. It is made on demand: torchvision takes a second to import."""
    from torchvision.models import resnet

    class NarrowResNet(resnet.ResNet):
        """A ResNet whose first stage has `width` channels, not 64, the others in proportion.

        State-dict keys are those of a ResNet.
        """

        def __init__(
            self, block: str, layers: list[int], width: int, num_classes: int, channels: int
        ):
            self.width = width
            block = getattr(resnet, block)
            super().__init__(block, layers, num_classes=num_classes)
            self.conv1 = _stem(channels, width, kernel=7, stride=2)
            self.bn1 = nn.BatchNorm2d(width)
            self.fc = nn.Linear(8 * width * block.expansion, num_classes)

        def _make_layer(self, block, planes: int, *args, **kwargs) -> nn.Sequential:
            if planes == 64:
                self.inplanes = self.width  # the stem feeds the first stage
            return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)

    return NarrowResNet


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )


def _dense(c_in: int, c_out: int) -> nn.Sequential:
    linear = nn.Linear(c_in, c_out, bias=False)
    return nn.Sequential(linear, nn.BatchNorm1d(c_out), nn.ReLU(inplace=True))


class _AlexNet(nn.Module):
    """AlexNet with batch norm: five convolutions and two hidden dense layers.

    convs: (c_in, c_out, kernel, stride, padding) of each; pool: kernel of the three max poolings;
    side: of what the last one leaves; hidden: width of the dense layers.
    """

    def __init__(self, convs: list[tuple], pool: int, side: int, hidden: int, num_classes: int):
        super().__init__()
        for i, conv in enumerate(convs, 1):
            self.add_module(f"conv{i}", _conv(*conv))
        self.pool = nn.MaxPool2d(pool, stride=2)
        self.fit = nn.AdaptiveAvgPool2d(side)  # changes nothing at the usual image size
        self.fc6 = _dense(256 * side * side, hidden)
        self.fc7 = _dense(hidden, hidden)
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.conv1(x))  # [N, 64, 16, 16] of 32 pixels, [N, 96, 27, 27] of 224
        x = self.pool(self.conv2(x))  # [N, 192, 8, 8], [N, 256, 13, 13]
        x = self.pool(self.conv5(self.conv4(self.conv3(x))))  # [N, 256, 4, 4], [N, 256, 6, 6]
        return self.fc(self.fc7(self.fc6(self.fit(x).flatten(1))))


class AlexNet32(_AlexNet):
    """AlexNet for images of 32 pixels: 3x3 convolutions and dense layers of 1,024."""

    def __init__(self, num_classes: int, channels: int = 3):
        convs = [(channels, 64, 3), (64, 192, 3), (192, 384, 3), (384, 256, 3), (256, 256, 3)]
        super().__init__(convs, pool=2, side=4, hidden=1024, num_classes=num_classes)


class AlexNet224(_AlexNet):
    """AlexNet for images of 224 pixels, with dense layers of 4,096."""

    def __init__(self, num_classes: int, channels: int = 3):
        first = [(channels, 96, 11, 4, 2), (96, 256, 5, 1, 2)]
        convs = [*first, (256, 384, 3), (384, 384, 3), (384, 256, 3)]
        super().__init__(convs, pool=3, side=6, hidden=4096, num_classes=num_classes)


class DigitsNet(nn.Module):
    """The demo's network: three 3x3 convolutions on [N, c, 16, 16] and global average pooling.

    It has 94 thousand weights.
    """

    def __init__(self, num_classes: int, channels: int = 3):
        super().__init__()
        self.conv1 = _conv(channels, 32, 3)
        self.conv2 = _conv(32, 64, 3)
        self.conv3 = _conv(64, 128, 3)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(128, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv3(self.pool(self.conv2(self.pool(self.conv1(x)))))  # [N, 128, 4, 4]
        return self.fc(x.mean(dim=(2, 3)))


@torch.no_grad()
def require_side(encoder: nn.Module, arch: str, side: int) -> None:
    """Raise BadInput where an encoder does not take images of this side.

    The encoder is on the CPU or the meta device.
    """
    device = next(encoder.parameters()).device
    try:
        with evaluating(encoder):
            encoder(torch.zeros(1, channels_of(encoder), side, side, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = first_line(error).rstrip(".")
        raise BadInput(
            f"{arch} does not take images of side {side} ({reason}): give the --image-size it was"
            " made for"
        ) from error


def freeze_patches(encoder: nn.Module, arch: str) -> nn.Module:
    """Take the projection of the patches out of the training, as MoCo v3 does; returns the encoder.

    It stays as it was drawn: its gradients are what makes the training of a transformer jump (Chen,
    Xie and He, 2021, section 4.1). Raises BadInput where the network does not begin with one.
    """
    first = next((layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is None or first.kernel_size != first.stride or max(first.stride) == 1:
        raise BadInput(
            f"{arch} does not begin with a projection of patches: leave out --stop-grad-conv1,"
            " which is for vision transformers"
        )
    first.requires_grad_(False)
    return encoder


# ---- the head: the last linear layer, or the MLP that MoCo v2 puts in its place ------------------


def head_name(encoder: nn.Module) -> str:
    """The dotted name of the head: the last linear layer, or MoCo v2's Linear-ReLU-Linear.

    Raises BadInput where there is none.
    """
    name = _find_head(encoder)
    if name is None:
        raise BadInput(f"{type(encoder).__name__} {_NO_HEAD}")
    return name


_NO_HEAD = "ends in no linear classifier that a projection head could replace"


def _find_head(encoder: nn.Module) -> str | None:
    modules = dict(encoder.named_modules())
    if gone := [name for name, module in modules.items() if isinstance(module, NoHead)]:
        return gone[0]
    name = getattr(encoder, "pretrained_cfg", {}).get("classifier")  # timm's networks say it
    if name is None:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        if not linear:
            return None
        name = linear[-1]
        parent = name.rpartition(".")[0]
        if parent and _is_mlp(modules[parent]):
            name = parent
    head = modules.get(name) if isinstance(name, str) else None
    return name if isinstance(head, nn.Linear) or _is_mlp(head) else None


def _is_mlp(module: nn.Module | None) -> bool:
    layers = (nn.Linear, nn.ReLU, nn.Linear)  # timm has a Linear of its own
    fits = isinstance(module, nn.Sequential) and len(module) == len(layers)
    return fits and all(isinstance(m, layer) for m, layer in zip(module, layers))


def get_head(encoder: nn.Module) -> nn.Linear:
    """The last linear layer: of an MLP head its second one."""
    head = encoder.get_submodule(head_name(encoder))
    return head[-1] if isinstance(head, nn.Sequential) else head


def set_head(encoder: nn.Module, module: nn.Module) -> None:
    """Put `module` where the classifier (or the MLP head) is."""
    parent, _, last = head_name(encoder).rpartition(".")
    encoder.get_submodule(parent).add_module(last, module)


class NoHead(nn.Identity):
    """It stands where an encoder's head was taken off, and keeps the head's name."""

    def __init__(self, dim: int):
        super().__init__()
        self.in_features = self.out_features = dim


def take_head_off(encoder: nn.Module) -> nn.Module:
    """Let an encoder return its backbone's output, [N, feature_dim], for good; returns it.

    Its state dict has no head then. Everything else that asks for its head finds the place.
    """
    set_head(encoder, NoHead(feature_dim(encoder)))
    return encoder


def feature_dim(encoder: nn.Module) -> int:
    """The dimension of the backbone's output, which is what the head takes in."""
    head = encoder.get_submodule(head_name(encoder))
    return (head[0] if isinstance(head, nn.Sequential) else head).in_features


# ---- layers by name, for the probe ---------------------------------------------------------------

OUTPUT = "output"
BACKBONE = "backbone"


def stage_names(encoder: nn.Module) -> dict[str, str]:
    """conv1 ... conv5 -> the submodule whose output they are; {} where an architecture has none.

    Of a ResNet conv1 is the stem with its pooling, conv2 to conv5 are the four stages.
    """
    children = dict(encoder.named_children())
    if {"maxpool", "layer1", "layer2", "layer3", "layer4"} <= children.keys():
        return {"conv1": "maxpool", **{f"conv{i + 1}": f"layer{i}" for i in (1, 2, 3, 4)}}
    if isinstance(encoder, (_AlexNet, DigitsNet)):
        return {name: name for name in children if name.startswith("conv")}
    return {}


def require_layers(encoder: nn.Module, layers: Iterable[str]) -> None:
    """Raise BadInput for a layer that the encoder does not have (see `Taps`)."""
    known = [*stage_names(encoder), BACKBONE]
    for layer in layers:
        if layer not in known and layer != OUTPUT:
            raise BadInput(
                f"{type(encoder).__name__} has no layer {layer!r}; it has {', '.join(known)}"
            )


class Taps(nn.Module):
    """An encoder that returns several of its layers: images [N, c, S, S] -> {layer: tensor}.

    layers: "output", what the encoder returns, [N, dim]; "backbone", what its head takes in,
    [N, feature_dim]; "conv1" ... "conv5", see `stage_names`, [N, c, h, w]. Raises BadInput for a
    layer that the encoder does not have.
    """

    def __init__(self, encoder: nn.Module, layers: Iterable[str]):
        super().__init__()
        self.encoder = encoder
        self.layers = list(layers)
        self._seen: dict[str, torch.Tensor] = {}
        require_layers(encoder, self.layers)
        stages = stage_names(encoder)
        for layer in self.layers:
            if layer == BACKBONE:
                encoder.get_submodule(head_name(encoder)).register_forward_pre_hook(self._before)
            elif layer != OUTPUT:
                encoder.get_submodule(stages[layer]).register_forward_hook(self._after(layer))

    def _before(self, module: nn.Module, inputs: tuple) -> None:
        self._seen[BACKBONE] = inputs[0]

    def _after(self, layer: str):
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            self._seen[layer] = output

        return hook

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self._seen = {}
        self._seen[OUTPUT] = self.encoder(images)
        seen = self._seen
        self._seen = {}  # hold no activation between batches
        return {layer: seen[layer] for layer in self.layers}


# ---- batch norm in splits ------------------------------------------------------------------------


class SplitBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with statistics over each of `num_splits` parts of the batch.

    It stands for a batch spread over devices. Where a query and its key are normalised with the
    same images, the statistics they share give the key away; MoCo therefore shuffles keys between
    GPUs. On one GPU splits alone do not help, for a part is a matter of place: the images i,
    i + num_splits, ... form one. `builder.MoCo` shuffles keys between the parts, as MoCo's CIFAR
    notebook does; a loop of your own around two encoders has to do the same.

    The running statistics are the mean over the parts. A batch that does not divide falls back to
    the largest number of parts that does. State-dict keys are those of BatchNorm; so is eval mode.
    """

    def __init__(self, num_features: int, num_splits: int, **kwargs):
        super().__init__(num_features, **kwargs)
        self.num_splits = num_splits

    def _check_input_dim(self, x: torch.Tensor) -> None:
        if x.dim() not in (2, 4):
            raise ValueError(f"expected [N, C] or [N, C, H, W], got {tuple(x.shape)}")

    def _splits(self, x: torch.Tensor) -> int:
        """The largest number of parts that divides the batch and leaves a part two values."""
        N = len(x)
        values = x[0, 0].numel()  # of an image in a channel; one value alone has no variance
        for splits in range(min(self.num_splits, N), 1, -1):
            if N % splits == 0 and N // splits * values > 1:
                return splits
        return 1

    def _count(self) -> None:
        """Count a batch in `num_batches_tracked`."""
        self.num_batches_tracked.add_(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        splits = self._splits(x)
        momentum = self.momentum
        if self.track_running_stats:
            self._count()
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        # [N, C, ...] -> [N / splits, splits * C, ...]: each part gets channels of its own, and so
        # statistics of its own
        parts = x.reshape(len(x) // splits, splits * x.shape[1], *x.shape[2:])
        mean, var, weight, bias = (
            None if t is None else t.repeat(splits)
            for t in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        out = F.batch_norm(parts, mean, var, weight, bias, True, momentum or 0.0, self.eps)
        out = out.reshape(x.shape)
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.copy_(mean.view(splits, -1).mean(dim=0))
                self.running_var.copy_(var.view(splits, -1).mean(dim=0))
        layout = torch.channels_last
        if x.dim() == 4 and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            return out.contiguous(memory_format=layout)
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_splits={self.num_splits}"


def split_batch_norm(module: nn.Module, num_splits: int) -> nn.Module:
    """Replace every BatchNorm1d/2d inside by a SplitBatchNorm; 1 changes nothing.

    Returns the module, or a new one where it is itself a batch norm. Keys and values are unchanged.
    Raises BadInput for other kinds of batch norm.
    """
    if num_splits == 1:
        return module
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
        names = ("eps", "momentum", "affine", "track_running_stats")
        options = {name: getattr(module, name) for name in names}
        split = SplitBatchNorm(module.num_features, num_splits, **options)
        tensors = [*module.parameters(), *module.buffers()]
        floats = [t for t in tensors if t.is_floating_point()]
        if floats:
            split = split.to(floats[0].device, floats[0].dtype)
        split.load_state_dict(module.state_dict())
        return split.train(module.training)
    other = isinstance(module, nn.modules.batchnorm._BatchNorm)
    if other and not isinstance(module, SplitBatchNorm):
        what = f"batch norm of the kind {type(module).__name__} cannot be split"
        raise BadInput(f"{what}: use --bn-splits 1")
    for name, child in module.named_children():
        setattr(module, name, split_batch_norm(child, num_splits))
    return module


# ---- counting the batches of all batch norms at once ---------------------------------------------


class _Uncounted:
    """A batch norm whose batches `count_batches_at_once` counts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        averages = self.running_mean, self.running_var
        return F.batch_norm(x, *averages, self.weight, self.bias, True, self.momentum, self.eps)


class UncountedBatchNorm1d(_Uncounted, nn.BatchNorm1d):
    pass


class UncountedBatchNorm2d(_Uncounted, nn.BatchNorm2d):
    pass


class UncountedSplitBatchNorm(SplitBatchNorm):
    def _count(self) -> None:
        pass


_UNCOUNTED = {
    nn.BatchNorm1d: UncountedBatchNorm1d,
    nn.BatchNorm2d: UncountedBatchNorm2d,
    SplitBatchNorm: UncountedSplitBatchNorm,
}


def count_batches_at_once(encoder: nn.Module) -> nn.Module:
    """Let all batch norms of an encoder count a batch in one operation, before its `forward`.

    One by one they are 20 launches a pass of a ResNet-18, 53 of a ResNet-50. State dicts are as
    before. Batch norms that use their count (momentum None) or keep no averages stay as they are.
    Returns the encoder.
    """
    encoder.counted = []  # an attribute, so that a copy of the encoder has a list of its own
    for layer in encoder.modules():
        if type(layer) in _UNCOUNTED and layer.track_running_stats and layer.momentum is not None:
            layer.__class__ = _UNCOUNTED[type(layer)]
            encoder.counted.append(layer)
    encoder.register_forward_pre_hook(_count_batch)
    return encoder


@torch.no_grad()
def _count_batch(encoder: nn.Module, _inputs: tuple) -> None:
    counts = [layer.num_batches_tracked for layer in encoder.counted if layer.training]
    if counts:
        torch._foreach_add_(counts, 1)


# ---- features of a whole data set ----------------------------------------------------------------


@contextmanager
def evaluating(module: nn.Module):
    """Eval mode during the block; after it every submodule is in its mode of before."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for m, mode in modes:
            m.training = mode


@contextmanager
def without_head(encoder: nn.Module):
    """The encoder returns its backbone's output, [N, feature_dim], during the block."""
    parent, _, last = head_name(encoder).rpartition(".")
    owner = encoder.get_submodule(parent)
    head = getattr(owner, last)
    owner.add_module(last, nn.Identity())
    try:
        yield encoder
    finally:
        owner.add_module(last, head)


class SmallImages(nn.Module):
    """No network: images [n, c, S, S] -> their pixels at 8 by 8, [n, 64 c].

    They are less the image's own mean of each channel: its colour alone makes no two images alike.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        small = F.adaptive_avg_pool2d(images.float(), 8).flatten(2)  # [n, c, 64]
        return (small - small.mean(2, keepdim=True)).flatten(1)


def extract_features(
    encoder: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    M: int,
    device: str | torch.device,
    normalize: bool = True,
    amp: torch.dtype | None = None,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Features of a data set in eval mode: [M, C], float32 on `device`, equal on all ranks.

    Row i is image i. loader yields (images [n, c, S, S], index [n]), each rank its share.
    normalize: unit rows. amp: run the encoder under autocast of this type. An encoder that returns
    a dict (`Taps`) gives a dict of [M, ...]. Raises BadInput for an index out of range (its values
    are checked where it is on the CPU), and RunFailed unless every image comes exactly once.
    """
    device = torch.device(device)
    autocast = torch.autocast(device.type, dtype=amp) if amp is not None else nullcontext()
    alone = dist.world_size() == 1  # rows then go into the bank at once, not held twice
    bank = {}
    parts = {}  # by layer, until the ranks exchange them
    indices = [torch.empty(0, dtype=torch.int64, device=device)]
    with evaluating(encoder):
        for images, index in loader:
            on_cpu = getattr(index, "device", device).type == "cpu"
            check_index(index, len(images), M, values=on_cpu)
            index = index.to(device)
            indices.append(index)
            with torch.no_grad(), autocast:  # not around the loader, which may augment here
                out = encoder(images.to(device, non_blocking=True))
            for layer, rows in (out if isinstance(out, dict) else {None: out}).items():
                rows = F.normalize(rows.float(), dim=1) if normalize else rows.float()
                if not alone:
                    parts.setdefault(layer, []).append(rows)
                    continue
                if layer not in bank:
                    bank[layer] = torch.empty(M, *rows.shape[1:], device=device)
                bank[layer].index_copy_(0, index, rows)
    index = dist.all_gather_rows(torch.cat(indices))
    if len(index) != M or not torch.equal(index.sort().values, torch.arange(M, device=device)):
        what = f"features of {len(index)} images came"
        raise RunFailed(f"{what} where each of {M} was expected exactly once")
    for layer, rows in _same_on_all_ranks(parts, device).items():
        rows = dist.all_gather_rows(rows)
        bank[layer] = torch.empty_like(rows).index_copy_(0, index, rows)
    return bank[None] if bank.keys() == {None} else bank


def extract_views(
    encoder: nn.Module,
    loader: Iterable,
    M: int,
    device: str | torch.device,
    amp: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of two views of every image: 2 x [M, C], unit rows.

    loader yields ((view, view), index [n]), as `data.view_loader` does.
    """
    # [2n, c, S, S], [2n]
    both = ((torch.cat(views), torch.cat([index, index + M])) for views, index in loader)
    return extract_features(encoder, both, 2 * M, device, amp=amp).chunk(2)


def _same_on_all_ranks(parts: dict, device: torch.device) -> dict[str | None, torch.Tensor]:
    """Each layer's rows as one tensor, on every rank for the same layers.

    A rank whose share was empty takes the shape of a row from the others.
    """
    shapes = dist.gather_objects({layer: rows[0].shape[1:] for layer, rows in parts.items()})
    known = next(filter(None, shapes), {})
    empty = {layer: [torch.empty(0, *row, device=device)] for layer, row in known.items()}
    return {layer: torch.cat(parts.pop(layer, empty[layer])) for layer in known}
