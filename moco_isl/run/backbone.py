"""The encoder in a file: ours, MoCo's, torchvision's, timm's, detectron2's, safetensors.

Architecture and stem are read from the file where it says them or its tensors show them. A file
that does not fit raises an error that names the tensors, so that no random encoder is judged.
"""

import argparse
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from moco_isl import files
from moco_isl.builder import add_mlp
from moco_isl.encoders import (
    STEMS,
    backbone_shapes,
    build_encoder,
    feature_dim,
    head_name,
    on_meta,
    set_head,
)
from moco_isl.errors import BadInput
from moco_isl.options import opt
from moco_isl.run import checkpoint
from moco_isl.schema import COUNT, EARLIER, Number, like, require

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
# beginnings of the names of architectures that have both stems
_STEMMED = ("resnet", "resnext", "wide_resnet", "alexnet")
LARGEST_SIDE = 4096  # the largest --image-size
# extra classifiers of torchvision's Inceptions, which are left out
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


@dataclass(kw_only=True)
class EncoderOptions:
    """Which encoder of a file, and as which network."""

    arch: str | None = opt(
        None,
        "-a",
        "--arch",
        may_change=True,
        help="architecture (as the file says or its tensors show)",
    )
    stem: str = opt(
        "auto", choices=STEMS, may_change=True, help="auto: as the tensors of the file show"
    )
    key: bool = opt(False, help="the key encoder of a MoCo file, not the query encoder")


def load_backbone(
    path: str | Path,
    arch: str | None = None,
    stem: str | None = None,
    key_encoder: bool = False,
    image_size: int | None = None,
    content: dict | None = None,
) -> tuple[nn.Module, dict]:
    """The encoder in a file, on the CPU, and what is known about it. Never executes a pickle.

    arch, stem: as for `build_encoder`; None (or stem "auto") reads them from the file. key_encoder:
    MoCo's other one. image_size: side of the images, for networks that are built for one; None
    reads it from the file. content: what is in the file, where that has been read.

    Names of wrappers are left out (`checkpoint.plain_names`). An encoder below a prefix is found,
    such as Lightning's "model.backbone.".

    info: arch, stem, head ("linear", "mlp", or None: the file has none, and the encoder's is
    random), dim (numbers of the output), feature_dim, image_size (the side it is built for, None if
    unknown), part (which encoder), used and left (names of tensors), epoch, args (flags of the run
    that wrote it, {} if unknown; image_size is a whole number), metadata (of safetensors). Raises
    BadInput for a file that cannot be read or does not fit.
    """
    metadata = {}
    if content is None:
        content, metadata = read_file(path)
    state, left = _state_dict(content, path)
    if "isl" in content or "probe" in content:  # a file of ours must have these entries
        require(
            content,
            {"epoch": COUNT, "args": _TRAINED_ON, ...: object},
            f"cannot read {files.named('', path)}",
            cure=EARLIER,
        )
    args = _args(content, metadata)
    said = metadata.get("arch") or content.get("arch")
    known = arch or (said if isinstance(said, str) else None)
    state, part, more = _one_encoder(state, known, key_encoder, path)
    state = from_detectron2(state)
    shown, shown_stem = looks_like(state)
    name = known or shown
    if name is None:
        raise BadInput(
            f"'{path}' does not say its architecture and {checkpoint.some(state)} do not show it:"
            " give it with -a"
        )
    if stem in (None, "auto"):
        stem = shown_stem if shown_stem and name.startswith(_STEMMED) else "auto"
    side = _side_shown(state) or image_size or args.get("image_size")
    encoder, state, head = _with_head(name, stem, state, side, path)
    looks = ""
    if shown:
        looks = f"; it looks like {shown}" + (f" with stem {shown_stem}" if shown_stem else "")
    used, extra = _load(encoder, head, state, path, f"{name} with stem {stem}", looks)
    info = {
        "path": str(path),
        "arch": name,
        "stem": stem,
        "head": head,
        "dim": state[_last_weight(state, head_name(encoder))].shape[0] if head else None,
        "feature_dim": feature_dim(encoder),
        "image_size": side,
        "part": part,
        "used": used,
        "left": left + more + extra,
        "epoch": content.get("epoch") if _fits(content.get("epoch"), int) else None,
        "args": args,
        "metadata": metadata,
    }
    return encoder, info


# flags that are looked at, as files of ours hold them; a flag of another file counts if it fits
_TRAINED_ON = {
    "dataset?": (str, None),
    "mlp?": (bool, None),
    "objective?": str,
    "miner?": str,
    "epochs?": COUNT,
    "research_labels?": bool,
    "image_size?": (COUNT, None),
    ...: object,
}


def _fits(value, shape) -> bool:
    try:
        require(value, shape, "")
    except BadInput:
        return False
    return True


def describe(info: dict) -> str:
    """What was loaded, in one line: tensors used, tensors left."""
    head = f"{info['head']} head to {info['dim']}" if info["head"] else "no head"
    epoch = f", epoch {info['epoch']}" if info["epoch"] is not None else ""
    parts = Counter(re.split(r"[.:]", files.shown(str(name)))[0] for name in info["left"])
    left = ", ".join(f"{n} of {part}" if n > 1 else part for part, n in parts.items())
    left = left and f"; left {left}"
    return (
        f"=> loaded '{files.shown(info['path'])}' ({info['arch']}, stem {info['stem']},"
        f" {head}{epoch}): used all {len(info['used'])} tensors of {info['part']}{left}"
    )


# ---- reading -------------------------------------------------------------------------------------


def read_file(path: str | Path) -> tuple[dict, dict[str, str]]:
    """(content, safetensors' metadata) of a file of tensors. Raises BadInput."""
    path = checkpoint.require_file(path)
    if path.suffix == ".safetensors" or checkpoint.is_safetensors(path):
        try:
            with files.utf8_name(path) as known, safe_open(known, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise BadInput(
                f"cannot read '{path}' as safetensors: {error}; is it cut off, or of another kind?"
            ) from error
    return checkpoint.load(path), {}


def _args(content: dict, metadata: dict[str, str]) -> dict:
    """The flags of the run that wrote a file, {} if unknown; image_size as a whole number."""
    args = content.get("args")
    if isinstance(args, (argparse.Namespace, SimpleNamespace)):
        args = vars(args)
    if not isinstance(args, dict) or not args:
        args = {key: metadata[key] for key in ("dataset", "image_size") if key in metadata}
    # files of ours have both, and the flag may be 0
    side = _side(args.get("image_size")) or _side(content.get("image_size"))
    args = {**args, "image_size": side}
    return {
        name: files.shown(value) if isinstance(value, str) else value
        for name, value in args.items()
        if _fits({name: value}, _TRAINED_ON) and (name != "image_size" or value)
    }


def _side(said: object) -> int | None:
    """The side of square images in what a file says of their size, None where it says none.

    It may be 32, 32.0, "32", "32x32", (32, 32) or [3, 32, 32].
    """
    if isinstance(said, str):
        words = [word for word in re.split(r"[\sx×,()\[\]]+", said) if word]
        said = [float(word) if re.fullmatch(r"\d{1,5}(\.0*)?", word) else None for word in words]
        return _side(said) if None not in said else None
    if isinstance(said, (list, tuple)):
        sides = {_side(one) for one in said[-2:]}  # height and width come last
        return sides.pop() if len(sides) == 1 else None
    if not _fits(said, Number(1, LARGEST_SIDE)) or said != int(said):
        return None
    return int(said)


def _state_dict(content: dict, path: str | Path) -> tuple[Tensors, list[str]]:
    """The tensors of the model by their plain names, and the names of what else is in the file."""
    for key in ("state_dict", "model", None):
        state = content.get(key) if key else content
        if isinstance(state, dict) and any(isinstance(v, torch.Tensor) for v in state.values()):
            break
    else:
        raise BadInput(
            f"'{path}' holds no tensors but {checkpoint.some(content) or 'nothing'}: expected a"
            " state dict, bare or under state_dict or model"
        )
    beside = {} if state is content else content
    left = [
        key
        for key, value in beside.items()
        if isinstance(value, (dict, torch.Tensor)) and value is not state and key != "args"
    ]
    tensors = {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    return checkpoint.plain_names(tensors, path), left


def _one_encoder(
    state: Tensors, arch: str | None, key_encoder: bool, path: str | Path
) -> tuple[Tensors, str, list[str]]:
    """(tensors, its name, names left) of the wanted encoder of a MoCo file, or of the only one."""
    moco = any(name.startswith("encoder_q.") for name in state)
    if moco or key_encoder:
        prefix = "encoder_k." if key_encoder else "encoder_q."
    else:
        prefix = _prefix(state, arch, path)
    chosen = _below(state, prefix)
    if not chosen:
        raise BadInput(
            f"'{path}' has no key encoder (encoder_k.*), only {checkpoint.some(state)}: use the"
            " query encoder"
        )
    left = [name for name in state if not name.startswith(prefix)]
    return chosen, prefix[:-1] or "the encoder", left


def _below(state: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _prefix(state: Tensors, arch: str | None, path: str | Path) -> str:
    """What the names of the encoder begin with: "" in a bare state dict, such as "model.backbone.".

    Raises BadInput where there are several encoders.
    """
    if arch is None:
        found = {
            name.removesuffix(end)
            for name in state
            for end in _ANCHORS
            if f".{name}".endswith(f".{end}")
        }
        found = [prefix for prefix in found if looks_like(_below(state, prefix))[0]]
    else:
        own = backbone_shapes(on_meta(lambda: build_encoder(arch, 1)))
        own = [
            name
            for name in checkpoint.plain_names(own, path)
            if not name.endswith("num_batches_tracked")
        ]
        found = {name.removesuffix(own[0]) for name in state if f".{name}".endswith(f".{own[0]}")}
        found = [prefix for prefix in found if all(prefix + name in state for name in own)]
    if not found or "" in found:
        return ""
    if len(found) > 1:
        first = min(found)
        raise BadInput(
            f"'{path}' holds {len(found)} encoders, named"
            f" {', '.join(f'{p}*' for p in sorted(found))}: save the one you mean alone, as in"
            f" torch.save({{n.removeprefix('{first}'): t for n, t in state.items() if"
            f" n.startswith('{first}')}}, FILE)"
        )
    return found[0]


# ---- names ---------------------------------------------------------------------------------------

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


def looks_like(state: Tensors) -> tuple[str | None, str | None]:
    """(architecture, stem) that names and shapes show, each None where they do not."""
    shape = {name: tuple(t.shape) for name, t in state.items()}
    if "fc6.0.weight" in shape and "conv5.0.weight" in shape:
        return "alexnet", "cifar" if shape["conv1.0.weight"][2] == 3 else "imagenet"
    digits = {"conv1.0.weight": (32, 3, 3, 3), "conv3.0.weight": (128, 64, 3, 3)}
    if digits.items() <= shape.items():
        return "digits", "auto"
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


# names by which `looks_like` knows a network
_ANCHORS = ("layer1.0.conv1.weight", "conv1.0.weight")


def _side_shown(state: Tensors) -> int | None:
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
                return _side(math.isqrt(n) * patches[-1])
    return None


# ---- loading -------------------------------------------------------------------------------------


def _last_weight(state: Tensors, head: str) -> str:
    return f"{head}.2.weight" if f"{head}.2.weight" in state else f"{head}.weight"


def _with_head(
    arch: str, stem: str, state: Tensors, image_size: int | None, path: str | Path
) -> tuple[nn.Module, Tensors, str | None]:
    """(network, tensors by its names, head) with the head the file has (None: it has none)."""
    encoder = build_encoder(arch, 1, stem, image_size)
    state = checkpoint.plain_names(state, path, encoder.state_dict())
    place = head_name(encoder)
    weight = state.get(_last_weight(state, place))
    if weight is None or weight.dim() != 2:
        return encoder, state, None
    mlp = f"{place}.2.weight" in state
    bias = _last_weight(state, place).replace("weight", "bias") in state
    set_head(encoder, nn.Linear(feature_dim(encoder), weight.shape[0], bias=bias))
    if mlp:
        add_mlp(encoder)
    return encoder, state, "mlp" if mlp else "linear"


def _load(
    encoder: nn.Module, head: str | None, state: Tensors, path, name: str, looks: str
) -> tuple[list[str], list[str]]:
    """Load all of it or raise BadInput; returns the names used and the names left.

    name: of the network. looks: words on what the tensors look like.
    """
    own = encoder.state_dict()
    place = head_name(encoder) + "."
    own = {name: t for name, t in own.items() if head or not name.startswith(place)}
    # files of older torch lack it
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in state and name not in optional]
    extra = [name for name in state if name not in own]
    auxiliary = [name for name in extra if name.startswith(_AUXILIARY)]
    unknown = [name for name in extra if name not in auxiliary]
    shapes = [
        f"{name} {list(state[name].shape)} in place of {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or unknown or shapes:
        kinds = {"missing": missing, "not known to it": unknown, "of another shape": shapes}
        wrong = "; ".join(
            f"{len(names)} {kind}: {checkpoint.some(names)}"
            for kind, names in kinds.items()
            if names
        )
        raise BadInput(
            f"'{path}' does not fit {name}: {wrong}{looks}; give the -a and --stem it was trained"
            " with"
        )
    used = {name: state[name] for name in own if name in state}
    shape = like({name: own[name] for name in used})
    require(used, shape, f"cannot use the weights in {files.named('', path)}", cure=EARLIER)
    encoder.load_state_dict(used, strict=False)
    return list(used), auxiliary
