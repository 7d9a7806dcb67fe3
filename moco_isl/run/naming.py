"""Names of tensors: which network they show, and how other libraries call the same ones."""

import math
import re

import torch

Tensors = dict[str, torch.Tensor]

_DEPTHS = {  # block has a third convolution, blocks a stage -> ResNet-
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
_GROUPED = {  # (depth, groups, width of the first block's 3x3 convolution) -> torchvision's name
    (50, 32, 128): "resnext50_32x4d",
    (101, 32, 256): "resnext101_32x8d",
    (101, 64, 256): "resnext101_64x4d",
    (50, 1, 128): "wide_resnet50_2",
    (101, 1, 128): "wide_resnet101_2",
}
_VIT_SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}
_TORCHVISION_VITS = {  # (width, layers, side of a patch) -> torchvision's name
    (768, 12, 16): "vit_b_16",
    (768, 12, 32): "vit_b_32",
    (1024, 24, 16): "vit_l_16",
    (1024, 24, 32): "vit_l_32",
    (1280, 32, 14): "vit_h_14",
}
# ends of the names by which an encoder below a prefix is found, in the names of every library
ANCHORS = (
    "layer1.0.conv1.weight",
    "conv1.0.weight",
    "patch_embed.proj.weight",
    "conv_proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embedder.embedder.convolution.weight",
)

# ---- names of other libraries --------------------------------------------------------------------

_TO_DETECTRON2 = (
    (re.compile(r"^(conv1|bn1)\."), r"stem.\1."),
    (re.compile(r"^layer(\d)\."), lambda m: f"res{int(m[1]) + 1}."),
    (re.compile(r"\bbn(\d)\."), r"conv\1.norm."),
    (re.compile(r"\bdownsample\.0\."), "shortcut."),
    (re.compile(r"\bdownsample\.1\."), "shortcut.norm."),
)
_FROM_DETECTRON2 = (
    (re.compile(r"\bshortcut\.norm\."), "downsample.1."),
    (re.compile(r"\bshortcut\."), "downsample.0."),
    (re.compile(r"\bconv(\d)\.norm\."), r"bn\1."),
    (re.compile(r"^res(\d)\."), lambda m: f"layer{int(m[1]) - 1}."),
    (re.compile(r"^stem\."), ""),
)


def _rename(state: Tensors, rules) -> Tensors:
    def new(name: str) -> str:
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        return name

    return {new(name): tensor for name, tensor in state.items()}


def to_detectron2(state: Tensors) -> Tensors:
    """A torchvision ResNet's tensors under the names of detectron2's ResNets."""
    return _rename(state, _TO_DETECTRON2)


def from_detectron2(state: Tensors) -> Tensors:
    """The inverse of `to_detectron2`; tensors under any other names stay as they are."""
    is_theirs = "stem.conv1.weight" in state and "res2.0.conv1.weight" in state
    return _rename(state, _FROM_DETECTRON2) if is_theirs else state


# transformers' ViT and DINOv2, of its versions 4 and 5, to timm's; the same for its ResNets
_FROM_VIT = (
    (re.compile(r"^embeddings\.patch_embeddings\.projection\."), "patch_embed.proj."),
    (re.compile(r"^embeddings\.position_embeddings$"), "pos_embed"),
    (re.compile(r"^embeddings\."), ""),
    (re.compile(r"^(encoder\.)?layers?\."), "blocks."),
    (re.compile(r"\.attention\.(attention\.)?(query|key|value|[qkv]_proj)\."), r".attn.\2."),
    (re.compile(r"\.attention\.(output\.dense|o_proj)\."), ".attn.proj."),
    (re.compile(r"\.intermediate\.dense\."), ".mlp.fc1."),
    (re.compile(r"\.output\.dense\."), ".mlp.fc2."),
    (re.compile(r"\.layernorm_before\."), ".norm1."),
    (re.compile(r"\.layernorm_after\."), ".norm2."),
    (re.compile(r"\.layer_scale(\d)\.lambda1$"), r".ls\1.gamma"),
    (re.compile(r"^layernorm\."), "norm."),
)
_FROM_RESNET = (
    (re.compile(r"^embedder\.embedder\."), "layer.0."),
    (re.compile(r"^encoder\.stages\.(\d)\.layers\."), lambda m: f"layer{int(m[1]) + 1}."),
    (re.compile(r"\bshortcut\.convolution\."), "downsample.0."),
    (re.compile(r"\bshortcut\.normalization\."), "downsample.1."),
    (re.compile(r"\blayer\.(\d)\.convolution\."), lambda m: f"conv{int(m[1]) + 1}."),
    (re.compile(r"\blayer\.(\d)\.normalization\."), lambda m: f"bn{int(m[1]) + 1}."),
)
_QKV = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"))


def from_transformers(state: Tensors) -> Tensors:
    """A ViT, DINOv2 or ResNet of transformers under timm's and torchvision's names.

    Queries, keys and values become one tensor; the pooler is left out. Tensors under any other
    names stay as they are.
    """
    if "embedder.embedder.convolution.weight" in state:
        return _rename(state, _FROM_RESNET)
    if "embeddings.patch_embeddings.projection.weight" not in state:
        return state
    state = _rename({n: t for n, t in state.items() if not n.startswith("pooler.")}, _FROM_VIT)
    for first, *others in _QKV:
        for name in [name for name in state if f".attn.{first}." in name]:
            names = [name, *(name.replace(f".{first}.", f".{other}.") for other in others)]
            if len({getattr(state.get(one), "shape", None) for one in names}) == 1:
                merged = torch.cat([state.pop(one) for one in names])  # [3 C, C] or [3 C]
                state[name.replace(f".{first}.", ".qkv.")] = merged
    return state


def from_chunks(state: Tensors) -> Tensors:
    """DINOv2's training keeps its blocks in chunks: blocks.1.7.* is blocks.7.*.

    Tensors under any other names stay as they are.
    """
    if not {"cls_token", "mask_token"} <= state.keys():
        return state
    return _rename(state, ((re.compile(r"^blocks\.\d+\.(\d+)\."), r"blocks.\1."),))


def known_names(state: Tensors) -> Tensors:
    """The tensors of one encoder under torchvision's and timm's names."""
    return from_chunks(from_transformers(from_detectron2(state)))


# ---- which network -------------------------------------------------------------------------------


def looks_like(state: Tensors) -> tuple[str | None, str | None]:
    """(architecture, stem) that names and shapes show, each None where they do not."""
    shape = {name: tuple(t.shape) for name, t in state.items()}
    if "fc6.0.weight" in shape and "conv5.0.weight" in shape:
        return "alexnet", "cifar" if shape["conv1.0.weight"][2] == 3 else "imagenet"
    first = shape.get("conv1.0.weight", ())  # [32, channels, 3, 3]
    if (*first[:1], *first[2:]) == (32, 3, 3) and shape.get("conv3.0.weight") == (128, 64, 3, 3):
        return "digits", "auto"
    if "patch_embed.proj.weight" in shape or "conv_proj.weight" in shape:
        return _transformer(shape), None
    if "layer1.0.conv1.weight" not in shape or len(shape.get("conv1.weight", ())) != 4:
        return None, None
    blocks = tuple(
        len({n.split(".")[1] for n in shape if n.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4)
    )
    bottleneck = "layer1.0.conv3.weight" in shape
    stem = {3: "cifar", 7: "imagenet"}.get(shape["conv1.weight"][2])
    depth = _DEPTHS.get((bottleneck, blocks))
    width = shape["conv1.weight"][0]
    if depth is None:
        return None, stem
    middle, inner = shape["layer1.0.conv2.weight"][:2]
    if bottleneck and middle != width:
        return _GROUPED.get((depth, middle // inner, middle)), stem
    return f"resnet{depth}" + (f"w{width}" if width != 64 else ""), stem


def _transformer(shape: dict[str, tuple]) -> str | None:
    """The name of a plain vision transformer of timm or torchvision; None for any other.

    Heads of 64 numbers are taken for granted, as in all of these: tensors do not show them.
    """
    patches = shape.get("patch_embed.proj.weight", shape.get("conv_proj.weight"))
    if len(patches) != 4 or not shape.keys() & {"cls_token", "class_token"}:
        return None
    width, side = patches[0], patches[-1]
    layer = re.compile(r"(?:blocks\.|encoder\.layers\.encoder_layer_)(\d+)\.")
    depth = len({found[1] for name in shape if (found := layer.match(name))})
    if "conv_proj.weight" in shape:
        return _TORCHVISION_VITS.get((width, depth, side))
    size = _VIT_SIZES.get((width, depth))
    name = f"vit_{size}_patch{side}_224"
    if "blocks.0.ls1.gamma" in shape:
        registers = shape.get("register_tokens", shape.get("reg_token", (1, 0)))[1]
        name = f"vit_{size}_patch{side}_{f'reg{registers}_' if registers else ''}dinov2"
    import timm

    return f"timm:{name}" if timm.is_model(name) else None


def side_shown(state: Tensors) -> int | None:
    """The side of the images that a vision transformer of torchvision or timm is built for.

    Its positions are a square of patches, and up to two tokens that are no patch.
    """
    for names in (
        ("encoder.pos_embedding", "conv_proj.weight"),
        ("pos_embed", "patch_embed.proj.weight"),
    ):
        positions, patches = (tuple(state[n].shape) if n in state else () for n in names)
        if len(positions) != 3 or len(patches) != 4:
            continue
        for n in range(positions[1], max(positions[1] - 3, 0), -1):
            if math.isqrt(n) ** 2 == n:
                return math.isqrt(n) * patches[-1]
    return None
