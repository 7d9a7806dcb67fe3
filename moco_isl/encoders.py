"""Encoders by name, their heads and layers, batch norm in splits, and features of a whole data set.

Letters: N batch, C feature dimension, M images in the data set.

Names: every classifier of torchvision but its SqueezeNets (which end in no linear layer),
`timm:<name>`, ResNet-18/34/50 with a narrow first stage (`resnet18w32`), `alexnet` (with batch
norm, which the original lacks and every paper of this field adds), and `digits`, the small network
of the demo. Small images get the small stem (`stem`): a 3x3 convolution and no pooling before the
first stage.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from moco_isl import dist
from moco_isl.errors import BadInput, RunFailed
from moco_isl.loader import check_index

STEMS = ("auto", "imagenet", "cifar")
AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CIFAR_SIDE = 64  # up to this many pixels a side, stem "auto" means "cifar"
# of torchvision's classifiers: they end in a convolution
NO_LINEAR_HEAD = ("squeezenet1_0", "squeezenet1_1")
_NARROW = re.compile(r"resnet(18|34|50)w([1-9]\d*)")
_NARROW_LAYERS = {
    "18": ("BasicBlock", [2, 2, 2, 2]),
    "34": ("BasicBlock", [3, 4, 6, 3]),
    "50": ("Bottleneck", [3, 4, 6, 3]),
}


# ---- building ------------------------------------------------------------------------------------


def build_encoder(
    name: str, num_classes: int = 128, stem: str = "auto", image_size: int | None = None
) -> nn.Module:
    """A freshly initialised encoder: images [N, 3, S, S] -> [N, num_classes].

    stem: "imagenet" as the architecture has it, "cifar" the small one (ResNets and alexnet), "auto"
    the small one where `image_size` is at most 64 pixels. Raises BadInput for an unknown name
    (naming the nearest), an unknown stem, a stem or an image size the architecture does not have,
    and an architecture without a linear classifier.
    """
    if stem not in STEMS:
        raise BadInput(f"stem {stem!r} is not one of {', '.join(STEMS)}")
    small = stem == "cifar" or (
        stem == "auto" and image_size is not None and image_size <= CIFAR_SIDE
    )
    if name == "alexnet":
        encoder = AlexNet32(num_classes) if small else AlexNet224(num_classes)
    elif name == "digits":
        encoder, small = DigitsNet(num_classes), False
    elif narrow := _NARROW.fullmatch(name):
        encoder = NarrowResNet(
            *_NARROW_LAYERS[narrow[1]], width=int(narrow[2]), num_classes=num_classes
        )
    elif library := _library_of(name):
        encoder = library(name, num_classes, image_size)
    else:
        raise _unknown(name)
    if small and isinstance(encoder, torchvision.models.ResNet):
        use_cifar_stem(encoder)
    elif stem == "cifar" and not isinstance(encoder, AlexNet32):
        raise BadInput(
            f"{name} has no cifar stem (ResNets and alexnet have): use --stem auto or --stem"
            " imagenet"
        )
    try:
        head_name(encoder)
    except BadInput:
        raise BadInput(
            f"{name} ends in no linear classifier that a projection head could replace: choose"
            " another architecture"
        ) from None
    return encoder


def encoder_names() -> list[str]:
    """The names `build_encoder` takes, timm's aside (see `timm.list_models()`), of narrow ResNets
    two examples.
    """
    return sorted(
        ({*_torchvision_names(), "digits", "resnet18w16", "resnet18w32"}) - {*NO_LINEAR_HEAD}
    )


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _library_of(name: str) -> Callable[[str, int, int | None], nn.Module] | None:
    """What builds the networks of the library that a name belongs to; None where no library is
    known by it.
    """
    if name.startswith("timm:"):
        return _build_timm
    return _build_torchvision if name in _torchvision_names() else None


def _unknown(name: str) -> BadInput:
    try:
        import timm

        if timm.is_model(name.lower()):
            return BadInput(
                f"unknown architecture {name!r}; timm has one of this name: use timm:{name.lower()}"
            )
    except ImportError:
        pass
    near = difflib.get_close_matches(name.lower(), encoder_names(), n=3, cutoff=0.5)
    hint = (
        f"nearest: {', '.join(near)}"
        if near
        else "torchvision's names, timm:<name>, resnet18w32, alexnet and digits are known"
    )
    return BadInput(f"unknown architecture {name!r}; {hint}")


def _build_torchvision(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    extra = {}
    if name in ("googlenet", "inception_v3"):
        # the auxiliary classifiers would make the output a tuple
        extra = {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_") and image_size is not None:
        extra = {"image_size": image_size}
    with _said_in_a_line(name, image_size):
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)


def _build_timm(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    given, name = name, name.removeprefix("timm:")
    try:
        import timm
    except ImportError:
        raise BadInput(f"{given} needs the package timm: pip install timm") from None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.lower(), timm.list_models(), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join('timm:' + n for n in near)}" if near else ""
        hint = (
            f"; torchvision has one of this name: use {name}" if name in encoder_names() else hint
        )
        raise BadInput(f"timm has no model {name!r}{hint}")
    config = timm.models.get_pretrained_cfg(name)
    fixed = image_size is not None and config is not None and config.fixed_input_size
    with _said_in_a_line(given, image_size):
        return timm.create_model(
            name,
            pretrained=False,
            num_classes=num_classes,
            **({"img_size": image_size} if fixed else {}),
        )


@contextmanager
def _said_in_a_line(name: str, image_size: int | None):
    """What a library raises for a side or a classifier that its network does not have, as
    BadInput.
    """
    try:
        yield
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        what = (
            f" for images of side {image_size} ({reason}): give the --image-size it was made"
            " for, or"
        )
        what = f" as a classifier ({reason}):" if image_size is None else what
        raise BadInput(f"{name} cannot be built{what} choose another architecture") from error


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` builds, on the meta device: names and shapes, without weights or the time to
    draw them.
    """
    try:
        with torch.device("meta"):
            return build()
    # torchvision's RegNets compute their widths with tensors: then nothing but weights goes there
    except RuntimeError:
        with ExitStack() as hooks:
            hooks.callback(register_module_parameter_registration_hook(_parameter_to_meta).remove)
            hooks.callback(register_module_buffer_registration_hook(_buffer_to_meta).remove)
            return build()


def _parameter_to_meta(
    module: nn.Module, name: str, parameter: nn.Parameter | None
) -> nn.Parameter | None:
    if parameter is None or parameter.is_meta:
        return parameter
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


def _buffer_to_meta(
    module: nn.Module, name: str, buffer: torch.Tensor | None
) -> torch.Tensor | None:
    return None if buffer is None else buffer.to("meta")


def as_in_library(encoder: nn.Module, name: str) -> bool:
    """Whether the library that `name` belongs to has this very network, so that its own code can
    take the backbone.

    Names and shapes less the head; a small stem, or a transformer for another image size, differs.
    True for names that no library has.
    """
    if not (library := _library_of(name)):
        return True
    return backbone_shapes(encoder) == backbone_shapes(on_meta(lambda: library(name, 1, None)))


def require_side(encoder: nn.Module, arch: str, side: int) -> None:
    """Raise BadInput where an encoder, on the CPU or the meta device, does not take images of this
    side.
    """
    try:
        with evaluating(encoder):
            encoder(torch.zeros(1, 3, side, side, device=next(encoder.parameters()).device))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"{arch} does not take images of side {side} ({reason.rstrip('.')}): give the"
            " --image-size it was made for"
        ) from error


def backbone_shapes(encoder: nn.Module) -> dict[str, torch.Size]:
    """Shapes by name of all that an encoder holds but its head."""
    place = head_name(encoder) + "."
    return {name: t.shape for name, t in encoder.state_dict().items() if not name.startswith(place)}


def use_cifar_stem(resnet: torchvision.models.ResNet) -> None:
    """Give a torchvision ResNet the stem for small images: a 3x3 convolution of stride 1 and no max
    pooling.
    """
    resnet.conv1 = nn.Conv2d(
        3, resnet.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False
    )
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()


class NarrowResNet(torchvision.models.ResNet):
    """A ResNet whose first stage has `width` channels in place of 64, the others in proportion.

    Same keys.
    """

    def __init__(self, block: str, layers: list[int], width: int, num_classes: int):
        self.width = width
        block = getattr(torchvision.models.resnet, block)
        super().__init__(block, layers, num_classes=num_classes)
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(8 * width * block.expansion, num_classes)

    def _make_layer(self, block, planes: int, *args, **kwargs) -> nn.Sequential:
        if planes == 64:
            self.inplanes = self.width  # the stem feeds the first stage
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )


def _dense(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(c_in, c_out, bias=False), nn.BatchNorm1d(c_out), nn.ReLU(inplace=True)
    )


class AlexNet32(nn.Module):
    """AlexNet with batch norm for images of 32 pixels: five 3x3 convolutions and two layers of
    1,024.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = _conv(3, 64, 3)
        self.conv2 = _conv(64, 192, 3)
        self.conv3 = _conv(192, 384, 3)
        self.conv4 = _conv(384, 256, 3)
        self.conv5 = _conv(256, 256, 3)
        self.pool = nn.MaxPool2d(2)
        self.fit = nn.AdaptiveAvgPool2d(4)  # the identity at 32 pixels
        self.fc6 = _dense(256 * 4 * 4, 1024)
        self.fc7 = _dense(1024, 1024)
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.conv1(x))  # [N, 64, 16, 16]
        x = self.pool(self.conv2(x))  # [N, 192, 8, 8]
        x = self.pool(self.conv5(self.conv4(self.conv3(x))))  # [N, 256, 4, 4]
        x = self.fit(x).flatten(1)
        return self.fc(self.fc7(self.fc6(x)))


class AlexNet224(nn.Module):
    """AlexNet with batch norm for images of 224 pixels: five convolutions and two layers of
    4,096.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = _conv(3, 96, 11, stride=4, padding=2)
        self.conv2 = _conv(96, 256, 5, padding=2)
        self.conv3 = _conv(256, 384, 3)
        self.conv4 = _conv(384, 384, 3)
        self.conv5 = _conv(384, 256, 3)
        self.pool = nn.MaxPool2d(3, stride=2)
        self.fit = nn.AdaptiveAvgPool2d(6)  # the identity at 224 pixels
        self.fc6 = _dense(256 * 6 * 6, 4096)
        self.fc7 = _dense(4096, 4096)
        self.fc = nn.Linear(4096, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.conv1(x))  # [N, 96, 27, 27]
        x = self.pool(self.conv2(x))  # [N, 256, 13, 13]
        x = self.pool(self.conv5(self.conv4(self.conv3(x))))  # [N, 256, 6, 6]
        x = self.fit(x).flatten(1)
        return self.fc(self.fc7(self.fc6(x)))


class DigitsNet(nn.Module):
    """The demo's network, 94 thousand weights: three 3x3 convolutions on [N, 3, 16, 16] and global
    average pooling.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = _conv(3, 32, 3)
        self.conv2 = _conv(32, 64, 3)
        self.conv3 = _conv(64, 128, 3)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(128, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv3(self.pool(self.conv2(self.pool(self.conv1(x)))))  # [N, 128, 4, 4]
        return self.fc(x.mean(dim=(2, 3)))


# ---- the head: the last linear layer, or the MLP that MoCo v2 puts in its place ------------------


def head_name(encoder: nn.Module) -> str:
    """Dotted name of the classifier: the last linear layer, or MoCo v2's Linear-ReLU-Linear in its
    place.

    Raises BadInput where there is none.
    """
    name = getattr(encoder, "pretrained_cfg", {}).get("classifier")  # timm says it
    if name is None:
        linear = [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear)]
        name = linear[-1] if linear else None
        if (
            name
            and _is_mlp(parent := encoder.get_submodule(name.rpartition(".")[0]))
            and parent is not encoder
        ):
            name = name.rpartition(".")[0]
    head = dict(encoder.named_modules()).get(name) if isinstance(name, str) else None
    if not (isinstance(head, nn.Linear) or _is_mlp(head)):
        raise BadInput(
            f"{type(encoder).__name__} ends in no linear classifier that a projection head could"
            " replace"
        )
    return name


def _is_mlp(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Sequential) and [type(m) for m in module] == [
        nn.Linear,
        nn.ReLU,
        nn.Linear,
    ]


def get_head(encoder: nn.Module) -> nn.Linear:
    """The last linear layer; of an MLP head its second one."""
    head = encoder.get_submodule(head_name(encoder))
    return head[-1] if isinstance(head, nn.Sequential) else head


def set_head(encoder: nn.Module, module: nn.Module) -> None:
    """Put `module` where the classifier (or the MLP head) is."""
    parent, _, last = head_name(encoder).rpartition(".")
    encoder.get_submodule(parent).add_module(last, module)


def feature_dim(encoder: nn.Module) -> int:
    """Numbers an image in the backbone output, which is what the head takes in."""
    head = encoder.get_submodule(head_name(encoder))
    return (head[0] if isinstance(head, nn.Sequential) else head).in_features


# ---- layers: named taps for the probe ------------------------------------------------------------

OUTPUT, BACKBONE = "output", "backbone"


def stage_names(encoder: nn.Module) -> dict[str, str]:
    """conv1 ... conv5 -> the submodule whose output they mean; empty where an architecture has no
    such stages.

    Of a ResNet conv1 is the stem (after its pooling) and conv2 to conv5 the four stages.
    """
    children = dict(encoder.named_children())
    if {"maxpool", "layer1", "layer2", "layer3", "layer4"} <= children.keys():
        return {"conv1": "maxpool", **{f"conv{i + 1}": f"layer{i}" for i in (1, 2, 3, 4)}}
    if isinstance(encoder, (AlexNet32, AlexNet224, DigitsNet)):
        return {name: name for name in children if name.startswith("conv")}
    return {}


class Taps(nn.Module):
    """An encoder that answers with several of its layers: images [N, 3, S, S] -> {layer: tensor}.

    layers: "output" (what the encoder returns, [N, dim]), "backbone" (what goes into its head, [N,
    feature_dim]), "conv1" ... "conv5" (see `stage_names`, [N, c, h, w]). Raises BadInput for a
    layer the encoder does not have.
    """

    def __init__(self, encoder: nn.Module, layers: Iterable[str]):
        super().__init__()
        self.encoder, self.layers = encoder, list(layers)
        self._seen: dict[str, torch.Tensor] = {}
        stages = stage_names(encoder)
        for layer in self.layers:
            if layer == BACKBONE:
                encoder.get_submodule(head_name(encoder)).register_forward_pre_hook(self._before)
            elif layer in stages:
                encoder.get_submodule(stages[layer]).register_forward_hook(self._after(layer))
            elif layer != OUTPUT:
                raise BadInput(
                    f"{type(encoder).__name__} has no layer {layer!r}; it has"
                    f" {', '.join([*stages, BACKBONE])}"
                )

    def _before(self, module: nn.Module, inputs: tuple) -> None:
        self._seen[BACKBONE] = inputs[0]

    def _after(self, layer: str):
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            self._seen[layer] = output

        return hook

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self._seen = {}
        self._seen[OUTPUT] = self.encoder(images)
        # hold no activation between batches
        seen = self._seen
        self._seen = {}
        return {layer: seen[layer] for layer in self.layers}


# ---- batch norm in splits ------------------------------------------------------------------------


class SplitBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with statistics over each of `num_splits` parts of the batch, as if each sat on
    its own device.

    Where a query and its key are normalised with the same images, the statistics that they share
    give the key away. On many GPUs MoCo shuffles keys between them against that. On one GPU splits
    alone change nothing: a part is a matter of place (the images i, i + num_splits, ... form one).
    `builder.MoCo` shuffles keys between the parts, as MoCo's CIFAR notebook does; a loop of your
    own around two encoders has to do it itself. The running statistics take the mean over the
    parts. A batch that does not divide falls back to the largest number of parts that does.
    State-dict keys are those of BatchNorm; in eval mode it is one.
    """

    def __init__(self, num_features: int, num_splits: int, **kwargs):
        super().__init__(num_features, **kwargs)
        self.num_splits = num_splits

    def _check_input_dim(self, x: torch.Tensor) -> None:
        if x.dim() not in (2, 4):
            raise ValueError(f"expected [N, C] or [N, C, H, W], got {tuple(x.shape)}")

    def _splits(self, x: torch.Tensor) -> int:
        # a part of a single value has no variance
        n = len(x)
        values = x[0, 0].numel()
        return next(
            (
                s
                for s in range(min(self.num_splits, n), 1, -1)
                if n % s == 0 and n // s * values > 1
            ),
            1,
        )

    def _count(self) -> None:
        """Note in `num_batches_tracked` that a batch came."""
        self.num_batches_tracked.add_(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        splits = self._splits(x)
        momentum = self.momentum
        if self.track_running_stats:
            self._count()
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        # [N, C, ...] -> [N / splits, splits * C, ...]: every part gets its own channels, and so its
        # own statistics
        parts = x.reshape(len(x) // splits, splits * x.shape[1], *x.shape[2:])
        mean, var, weight, bias = (
            None if t is None else t.repeat(splits)
            for t in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        out = F.batch_norm(parts, mean, var, weight, bias, True, momentum or 0.0, self.eps).reshape(
            x.shape
        )
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.copy_(mean.view(splits, -1).mean(dim=0))
                self.running_var.copy_(var.view(splits, -1).mean(dim=0))
        channels_last = (
            x.dim() == 4
            and x.is_contiguous(memory_format=torch.channels_last)
            and not x.is_contiguous()
        )
        return out.contiguous(memory_format=torch.channels_last) if channels_last else out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_splits={self.num_splits}"


def split_batch_norm(module: nn.Module, num_splits: int) -> nn.Module:
    """Replace every BatchNorm1d/2d inside by a SplitBatchNorm (keys and values unchanged). 1
    changes nothing.

    Returns the module (a new one if it is itself a batch norm). Raises BadInput for a kind it does
    not know.
    """
    if num_splits == 1:
        return module
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
        options = {"eps": module.eps, "momentum": module.momentum, "affine": module.affine}
        split = SplitBatchNorm(
            module.num_features,
            num_splits,
            track_running_stats=module.track_running_stats,
            **options,
        )
        reference = next(
            (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None
        )
        split = split if reference is None else split.to(reference.device, reference.dtype)
        split.load_state_dict(module.state_dict())
        return split.train(module.training)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(
        module, SplitBatchNorm
    ):
        raise BadInput(
            f"batch norm of the kind {type(module).__name__} cannot be split: use --bn-splits 1"
        )
    for name, child in module.named_children():
        setattr(module, name, split_batch_norm(child, num_splits))
    return module


# ---- batches that batch norm has seen, counted at once -------------------------------------------


class _Uncounted:
    """A batch norm that leaves it to `count_batches_at_once` to count its batches."""

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
    Returns the encoder.

    One by one they are 20 launches a pass of a ResNet-18, 53 of a ResNet-50. Keys and values of the
    state dict are as before. Batch norms that use their count (momentum None) or keep no averages
    stay as they are.
    """
    encoder.counted = []  # the layers; a copy of the encoder has a list of its own
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
    """Eval mode inside, and afterwards every submodule in the mode it was in."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for m, mode in modes:
            m.training = mode


def extract_features(
    encoder: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    M: int,
    device: str | torch.device,
    normalize: bool = True,
    amp: torch.dtype | None = None,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Features [M, C] of a data set, float32 on `device`, row i being image i, equal on all ranks.

    loader yields (images [n, 3, S, S], index [n]); each rank brings its share. normalize: unit
    rows. amp: run the encoder under autocast of this type. An encoder that answers with a dict
    (`Taps`) gives a dict of [M, ...] tensors. Eval mode, and the mode of before restored. Raises
    BadInput for an index that cannot be one (its values are looked at where it is on the CPU), and
    RunFailed unless every image comes exactly once.
    """
    device = torch.device(device)
    autocast = torch.autocast(device.type, dtype=amp) if amp is not None else nullcontext()
    alone = dist.world_size() == 1  # then rows go straight to their place: the bank is held once
    bank = {}
    parts = {}
    indices = [torch.empty(0, dtype=torch.int64, device=device)]
    with evaluating(encoder):
        for images, index in loader:
            check_index(
                index, len(images), M, values=getattr(index, "device", device).type == "cpu"
            )
            index = index.to(device)
            indices.append(index)
            # around no more than this: a loader may augment on the device
            with torch.no_grad(), autocast:
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
        raise RunFailed(
            f"features of {len(index)} images came where each of {M} was expected exactly once"
        )
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
    """Features of two views of every image, 2 x [M, C] unit rows: `extract_features` of what
    `data.view_loader` yields, ((view, view), index [n]).
    """
    # [2n, 3, S, S], [2n]
    both = ((torch.cat(views), torch.cat([index, index + M])) for views, index in loader)
    return extract_features(encoder, both, 2 * M, device, amp=amp).chunk(2)


def _same_on_all_ranks(parts: dict, device: torch.device) -> dict[str | None, torch.Tensor]:
    """One tensor a layer, also on a rank whose share was empty, which takes the row shape of the
    others.
    """
    shapes = [
        s
        for s in dist.gather_objects({layer: rows[0].shape[1:] for layer, rows in parts.items()})
        if s
    ]
    return {
        layer: (
            torch.cat(parts.pop(layer)) if layer in parts else torch.empty(0, *row, device=device)
        )
        for layer, row in (shapes[0] if shapes else {}).items()
    }
