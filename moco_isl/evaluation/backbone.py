"""An encoder out of a file of whatever origin: ours, MoCo's, torchvision's, timm's, detectron2's names, safetensors.

Architecture and stem are read from the file where it says them or its tensors show them. Whatever does not fit is an
error that says which names and what the file looks like: nobody should judge an encoder that was never loaded.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moco_isl import checkpoint, files
from moco_isl.builder import add_mlp
from moco_isl.encoders import build_encoder, feature_dim, head_name, set_head
from moco_isl.errors import BadInput

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
_STEMMED = ("resnet", "resnext", "wide_resnet", "alexnet")  # names of the architectures that come with either stem
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # extra classifiers of torchvision's Inceptions, which no one probes


def load_backbone(
    path: str | Path,
    arch: str | None = None,
    stem: str | None = None,
    key_encoder: bool = False,
    image_size: int | None = None,
) -> tuple[nn.Module, dict]:
    """The encoder in a file, on the CPU, and what is known about it. Never executes a pickle.

    arch, stem: as for `build_encoder`; None (or stem "auto") reads them from the file. key_encoder: MoCo's other one.
    info: arch, stem, head ("linear", "mlp" or None where the file has none: the encoder's is random then), dim
    (numbers of the output), feature_dim, part (which encoder), used and left (names of tensors), epoch, args (those of
    the run that wrote it, {} if unknown), results. Raises BadInput for what is unreadable and what does not fit.
    """
    content, metadata = read_file(path)
    state, left = _state_dict(content, path)
    state, part, more = _one_encoder(state, key_encoder, path)
    state = from_detectron2(state)
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    said = metadata.get("arch") or content.get("arch")
    shown, shown_stem = looks_like(state)
    name = arch or (said if isinstance(said, str) else None) or shown
    if name is None:
        raise BadInput(f"'{path}' does not say its architecture and {checkpoint.some(state)} do not show it: give it with -a")
    built_stem = (
        stem if stem not in (None, "auto") else shown_stem if shown_stem and name.startswith(_STEMMED) else "auto"
    )
    encoder, head = _with_head(name, built_stem, state, image_size or args.get("image_size") or None)
    used, extra = _load(encoder, head, state, path, f"{name} with stem {built_stem}", shown, shown_stem)
    info = {
        "path": str(path),
        "arch": name,
        "stem": built_stem,
        "head": head,
        "dim": state[_last_weight(state, head_name(encoder))].shape[0] if head else None,
        "feature_dim": feature_dim(encoder),
        "part": part,
        "used": used,
        "left": left + more + extra,
        "epoch": content.get("epoch") if isinstance(content.get("epoch"), int) else None,
        "args": args or {key: value for key, value in metadata.items() if key in ("dataset", "image_size")},
        "results": content.get("results", {}),
    }
    return encoder, info


def describe(info: dict) -> str:
    """What was loaded, in one line: tensors used, tensors left."""
    head = f"{info['head']} head to {info['dim']}" if info["head"] else "no head"
    epoch = f", epoch {info['epoch']}" if info["epoch"] is not None else ""
    left = Counter(re.split(r"[.:]", name)[0] for name in info["left"])
    left = "; left " + ", ".join(f"{n} of {part}" if n > 1 else part for part, n in left.items()) if left else ""
    return (
        f"=> loaded '{files.shown(info['path'])}' ({info['arch']}, stem {info['stem']}, {head}{epoch}): "
        f"used all {len(info['used'])} tensors of {info['part']}{left}"
    )


# ---- reading -------------------------------------------------------------------------------------------------------


def read_file(path: str | Path) -> tuple[dict, dict[str, str]]:
    """(content, safetensors' metadata) of a file of tensors. Raises BadInput."""
    path = Path(path)
    if path.is_file() and (path.suffix == ".safetensors" or checkpoint.is_safetensors(path)):
        from safetensors import SafetensorError, safe_open

        try:
            with files.utf8_name(path) as known, safe_open(known, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise BadInput(f"cannot read '{path}' as safetensors: {error}; is it cut off, or of another kind?") from error
    # Beside tensors, training files of others hold their parsed arguments and numpy's scalars: plain data, both
    scalar = np.float64(0).__reduce__()[0]
    plain = [argparse.Namespace, np.dtype, scalar, *{type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "b1")}]
    if old_name := getattr(torch.serialization, "safe_globals", None):
        plain.append((scalar, "numpy.core.multiarray.scalar"))
        with old_name(plain):
            return checkpoint.load(path), {}
    return checkpoint.load(path), {}


def _state_dict(content: dict, path: str | Path) -> tuple[Tensors, list[str]]:
    """The tensors of the model by name, prefixes of wrappers removed, and the names of what is beside them."""
    for key in ("state_dict", "model", None):
        state = content.get(key) if key else content
        if isinstance(state, dict) and any(isinstance(v, torch.Tensor) for v in state.values()):
            break
    else:
        raise BadInput(
            f"'{path}' holds no tensors but {checkpoint.some(content) or 'nothing'}: expected a state dict, bare or under state_dict or model"
        )
    left = (
        []
        if state is content
        else [k for k, v in content.items() if isinstance(v, (dict, torch.Tensor)) and v is not state]
    )
    left = [k for k in left if k not in ("args", "results")]
    tensors = {
        name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors, left


def _one_encoder(state: Tensors, key_encoder: bool, path: str | Path) -> tuple[Tensors, str, list[str]]:
    """(tensors, its name, names left) of the wanted encoder of a MoCo file, or of the one that is there."""
    moco = any(name.startswith("encoder_q.") for name in state)
    if not moco and not key_encoder:
        return state, "the encoder", []
    prefix = "encoder_k." if key_encoder else "encoder_q."
    chosen = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    if not chosen:
        raise BadInput(f"'{path}' has no key encoder (encoder_k.*), only {checkpoint.some(state)}: use the query encoder")
    return chosen, prefix[:-1], [name for name in state if not name.startswith(prefix)]


# ---- names -----------------------------------------------------------------------------------------------------------

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
    """The way back; tensors under any other names come back as they are."""
    return (
        _rename(state, _FROM_DETECTRON2) if "stem.conv1.weight" in state and "res2.0.conv1.weight" in state else state
    )


def looks_like(state: Tensors) -> tuple[str | None, str | None]:
    """(architecture, stem) that names and shapes show, each None where they do not."""
    shape = {name: tuple(t.shape) for name, t in state.items()}
    if "fc6.0.weight" in shape and "conv5.0.weight" in shape:
        return "alexnet", "cifar" if shape["conv1.0.weight"][2] == 3 else "imagenet"
    if shape.get("conv1.0.weight") == (32, 3, 3, 3) and shape.get("conv3.0.weight") == (128, 64, 3, 3):
        return "digits", "auto"
    if "layer1.0.conv1.weight" not in shape or len(shape.get("conv1.weight", ())) != 4:
        return None, None
    blocks = tuple(len({n.split(".")[1] for n in shape if n.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in shape
    stem = {3: "cifar", 7: "imagenet"}.get(shape["conv1.weight"][2])
    depth, width = _DEPTHS.get((bottleneck, blocks)), shape["conv1.weight"][0]
    if depth is None:
        return None, stem
    middle, inner = shape["layer1.0.conv2.weight"][:2]
    if bottleneck and middle != width:
        return _GROUPED.get((depth, middle // inner, middle)), stem
    return f"resnet{depth}" + (f"w{width}" if width != 64 else ""), stem


# ---- loading ---------------------------------------------------------------------------------------------------------


def _last_weight(state: Tensors, head: str) -> str:
    return f"{head}.2.weight" if f"{head}.2.weight" in state else f"{head}.weight"


def _with_head(arch: str, stem: str, state: Tensors, image_size: int | None) -> tuple[nn.Module, str | None]:
    """The network with the head the file has (None: it has none)."""
    encoder = build_encoder(arch, 1, stem, image_size)
    place = head_name(encoder)
    weight = state.get(_last_weight(state, place))
    if weight is None or weight.dim() != 2:
        return encoder, None
    mlp = f"{place}.2.weight" in state
    bias = _last_weight(state, place).replace("weight", "bias") in state
    set_head(encoder, nn.Linear(feature_dim(encoder), weight.shape[0], bias=bias))
    if mlp:
        add_mlp(encoder)
    return encoder, "mlp" if mlp else "linear"


def _load(
    encoder: nn.Module,
    head: str | None,
    state: Tensors,
    path,
    wanted_name: str,
    shown: str | None,
    shown_stem: str | None,
) -> tuple[list[str], list[str]]:
    """Load all of it or raise BadInput; returns the names used and the names left."""
    own = encoder.state_dict()
    place = head_name(encoder) + "."
    own = {name: t for name, t in own.items() if head or not name.startswith(place)}
    optional = {name for name in own if name.endswith("num_batches_tracked")}  # files from before it existed lack it
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
        kinds = (("missing", missing), ("not known to it", unknown), ("of another shape", shapes))
        looks = f"; it looks like {shown}" + (f" with stem {shown_stem}" if shown_stem else "") if shown else ""
        raise BadInput(
            f"'{path}' does not fit {wanted_name}: "
            + "; ".join(f"{len(names)} {kind}: {checkpoint.some(names)}" for kind, names in kinds if names)
            + f"{looks}; give the -a and --stem it was trained with"
        )
    broken = [name for name in own if name in state and not state[name].float().isfinite().all()]
    if broken:
        raise BadInput(f"'{path}' holds weights that are not finite: {checkpoint.some(broken)}; take an earlier checkpoint")
    used = [name for name in own if name in state]
    encoder.load_state_dict({name: state[name] for name in used}, strict=False)
    return used, auxiliary
