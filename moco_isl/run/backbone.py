"""The encoder in a file: ours, MoCo's, DINO's, torchvision's, timm's, transformers', detectron2's.

`weights.read` says where it may lie. Architecture and stem are read from the file where it says
them or its tensors show them. A file that does not fit raises an error that names the tensors, so
that no random encoder is judged.
"""

import argparse
import contextlib
import importlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from moco_isl import files
from moco_isl.builder import add_mlp
from moco_isl.encoders import (
    STEMS,
    backbone_shapes,
    build_encoder,
    channels_of,
    encoder_names,
    feature_dim,
    first_convolution,
    get_head,
    head_name,
    on_meta,
    set_head,
)
from moco_isl.errors import BadInput
from moco_isl.options import opt
from moco_isl.run import checkpoint, naming, weights
from moco_isl.run.naming import Tensors, looks_like
from moco_isl.schema import COUNT, EARLIER, Number, like, require

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


@dataclass
class Weights:
    """One encoder's tensors in a file, before any network is built.

    arch, stem: its network, as asked for, as the file says or as the tensors show. side: of the
    images that its positions are for, None of most networks. tensors: by torchvision's and timm's
    names. part: which encoder it is. left: names of what else is in the file. epoch, args and
    metadata: see `load_backbone`.
    """

    path: str
    arch: str
    stem: str
    side: int | None
    tensors: Tensors
    part: str
    left: list[str]
    epoch: int | None
    args: dict
    metadata: dict[str, str]

    @property
    def looks(self) -> str:
        """What the tensors look like, in words for an error; '' where they show nothing."""
        shown, stem = looks_like(self.tensors)
        return f"; it looks like {shown}{f' with stem {stem}' if stem else ''}" if shown else ""


def find_encoder(
    path: str | Path,
    content: dict,
    arch: str | None = None,
    stem: str | None = None,
    key_encoder: bool = False,
) -> Weights:
    """The encoder in the content of a file, and what is known about it. Raises BadInput.

    content: of `weights.read` or `checkpoint.load`. Everything else: see `load_backbone`.
    """
    state, left, under = _state_dict(content, path)
    if "isl" in content or "probe" in content:  # a file of ours must have these entries
        require(
            content,
            {"epoch": COUNT, "args": _TRAINED_ON, ...: object},
            f"cannot read {files.named('', path)}",
            cure=EARLIER,
        )
    metadata = content.get("metadata")
    metadata = metadata if _fits(metadata, {...: str}) else {}
    said = metadata.get("arch") or content.get("arch")
    known = arch or (_known_here(said) if isinstance(said, str) else None)
    state, part, more = _one_encoder(state, known, key_encoder, path)
    state = naming.known_names(state)
    shown, shown_stem = looks_like(state)
    name = known or shown
    if name is None:
        raise BadInput(
            f"'{path}' does not say its architecture and {checkpoint.some(state)} do not show it:"
            " give it with -a"
        )
    if stem in (None, "auto"):
        stem = shown_stem if shown_stem and name.startswith(_STEMMED) else "auto"
    return Weights(
        path=str(path),
        arch=name,
        stem=stem,
        side=_side(naming.side_shown(state)),
        tensors=state,
        part=".".join(filter(None, (under, part))) or "the encoder",
        left=left + more,
        epoch=content.get("epoch") if _fits(content.get("epoch"), int) else None,
        args=_args(content, metadata),
        metadata=metadata,
    )


def load_backbone(
    path: str | Path,
    arch: str | None = None,
    stem: str | None = None,
    key_encoder: bool = False,
    image_size: int | None = None,
    content: dict | None = None,
) -> tuple[nn.Module, dict]:
    """The encoder in a file, on the CPU, and what is known about it. Never executes a pickle.

    path: a file, a run's folder or a Hugging Face folder, see `weights.read`. arch, stem: as for
    `build_encoder`; None (or stem "auto") reads them from the file. key_encoder: MoCo's other one.
    image_size: side of the images, for networks that are built for one; None reads it from the
    file. Positions of a vision transformer for another side are interpolated as its library does.
    content: what is at the path, where that has been read.

    Names of wrappers are left out (`checkpoint.plain_names`). An encoder below a prefix is found,
    such as Lightning's "model.backbone.", and of DINO's two the teacher.

    info: arch, stem, channels (of an image), head ("linear", "mlp", or None: the file has none, and
    the encoder's is random), dim (numbers of the output), feature_dim, image_size (the side it is
    built for, None if unknown), positions (the side that they were for, where they are
    interpolated), part (which encoder), used and left (names of tensors), epoch, args (flags of the
    run that wrote it, {} if unknown; image_size is a whole number), metadata (of safetensors).
    Raises BadInput for a file that cannot be read or does not fit.
    """
    path = weights.run_file(path)
    content = weights.read(path) if content is None else content
    found = find_encoder(path, content, arch, stem, key_encoder)
    side = image_size or found.side or found.args.get("image_size")
    encoder = build_encoder(found.arch, 1, found.stem, side)
    channels = _channels_shown(encoder, found)
    if channels != channels_of(encoder):
        encoder = build_encoder(found.arch, 1, found.stem, side, channels)
    head = give_head(encoder, found)
    used, left = fit(encoder, found, with_head=bool(head))
    encoder.load_state_dict(used, strict=False)
    return encoder, information(found, encoder, used, left, head, side)


def information(
    found: Weights, encoder: nn.Module, used: Tensors, left: list[str], head: str | None, side
) -> dict:
    """The `info` of `load_backbone`.

    side: of the images that the encoder is built for. head: "" where there is one and it is left.
    """
    interpolated = found.side and naming.side_shown(used) != found.side
    return {
        "path": found.path,
        "arch": found.arch,
        "stem": found.stem,
        "channels": channels_of(encoder),
        "head": head,
        "dim": used[_last_weight(used, head_name(encoder))].shape[0] if head else None,
        "feature_dim": feature_dim(encoder),
        "image_size": side,
        "positions": found.side if interpolated else None,
        "part": found.part,
        "used": list(used),
        "left": found.left + left,
        "epoch": found.epoch,
        "args": found.args,
        "metadata": found.metadata,
    }


def _known_here(said: str) -> str:
    """An architecture's name as `build_encoder` has it: timm's own files leave out "timm:"."""
    if said in encoder_names() or ":" in said:
        return said
    import timm

    return f"timm:{said}" if timm.is_model(said) else said


# flags that are looked at, as files of ours hold them; a flag of another file counts if it fits
_TRAINED_ON = {
    "dataset?": (str, None),
    "mlp?": (bool, None),
    "objective?": str,
    "miner?": str,
    "epochs?": COUNT,
    "research_labels?": bool,
    "image_size?": (COUNT, None),
    "bits?": (COUNT, None),
    "mean?": ([float], None),
    "std?": ([float], None),
    ...: object,
}


def _fits(value, shape) -> bool:
    try:
        require(value, shape, "")
    except BadInput:
        return False
    return True


def flags_known(content: dict, path: str | Path, arch: str | None, stem: str | None) -> dict:
    """The flags of a pretraining, by name in args.json, that a file of any kind knows.

    Those of the network, and of a file of ours the temperature and the side of its images. arch,
    stem: where they are given; the rest is what they would be of that network. Raises BadInput.
    """
    found = find_encoder(path, content, arch, stem)
    known = {"arch": found.arch, "stem": found.stem}
    encoder = on_meta(lambda: build_encoder(found.arch, 1, found.stem, found.side))
    channels = _channels_shown(encoder, found)
    if channels != channels_of(encoder):
        known["channels"] = channels
    if not checkpoint.is_moco(content):
        return known
    args = content["args"] if "isl" in content else {}
    if args.get("bits") is not None and _fits(args["bits"], COUNT):
        known["bits"] = args["bits"]
    head = give_head(encoder, found)
    dim = get_head(encoder).out_features
    if head and args.get("moco_dim", dim) == dim:  # no head of another kind, such as RotNet's
        known |= {"mlp": head == "mlp", "moco_dim": dim}
    queue = checkpoint.plain_names(content.get("state_dict", content), path).get("queue")
    if queue is not None and queue.dim() == 2:
        known["moco_k"] = queue.shape[1]
    if _fits(args.get("moco_t"), Number(0)):
        known["moco_t"] = args["moco_t"]
    if "isl" in content and _side(content.get("image_size")):
        known["image_size"] = content["image_size"]
    return known


def into_start(content: dict, path: str | Path, encoder: nn.Module, arch: str, stem: str) -> None:
    """Make of the content of any file one that `checkpoint.match` takes to start a training from.

    It becomes a MoCo file of the query encoder alone, with what it was in "weights", the `info` of
    `load_backbone`. A MoCo file stays as it is where its backbone fits. encoder: the query encoder,
    on any device; arch, stem: its own. Raises BadInput.
    """
    moco = checkpoint.is_moco(content)
    found = find_encoder(path, content, arch, stem)
    place = head_name(encoder) + "."
    backbone = {n: t for n, t in encoder.state_dict().items() if not n.startswith(place)}
    state = checkpoint.plain_names(found.tensors, path, encoder.state_dict())
    if moco and all(n in state and state[n].shape == t.shape for n, t in backbone.items()):
        return
    used, left = fit(encoder, found, with_head=False)
    taken = dict(used)
    if moco:  # its head goes with it
        taken |= {n: state[n] for n in left if n.startswith(place)}
        left = [n for n in left if not n.startswith(place)]
    side = _side(naming.side_shown(used))
    info = information(found, encoder, used, left, "", side)
    kept = {name: content[name] for name in ("epoch", "args", "isl") if name in content}
    content.clear()
    content.update(kept, arch=found.arch, weights=info)
    content["state_dict"] = {f"encoder_q.{name}": tensor for name, tensor in taken.items()}


def describe(info: dict) -> str:
    """What was loaded, in one line: tensors used, tensors left."""
    head = f", {info['head']} head to {info['dim']}" if info["head"] else ""
    head = ", no head" if info["head"] is None else head
    epoch = f", epoch {info['epoch']}" if info["epoch"] is not None else ""
    parts = Counter(re.split(r"[.:]", files.shown(str(name)))[0] for name in info["left"])
    left = ", ".join(f"{n} of {part}" if n > 1 else part for part, n in parts.items())
    left = left and f"; left {left}"
    if info["positions"]:
        left += f"; positions of side {info['positions']} interpolated to side {info['image_size']}"
    return (
        f"=> loaded '{files.shown(info['path'])}' ({info['arch']}, stem {info['stem']}"
        f"{head}{epoch}): used all {len(info['used'])} tensors of {info['part']}{left}"
    )


# ---- reading -------------------------------------------------------------------------------------


def _args(content: dict, metadata: dict[str, str]) -> dict:
    """The flags of the run that wrote a file, {} if unknown; image_size as a whole number."""
    args = content.get("args")
    if isinstance(args, (argparse.Namespace, SimpleNamespace)):
        args = vars(args)
    if not isinstance(args, dict) or not args:
        args = {key: metadata[key] for key in ("dataset", "image_size") if key in metadata}
        args |= _pixels_in(metadata)
    # files of ours have both, and the flag may be 0
    side = _side(args.get("image_size")) or _side(content.get("image_size"))
    args = {**args, "image_size": side}
    return {
        name: files.shown(value) if isinstance(value, str) else value
        for name, value in args.items()
        if _fits({name: value}, _TRAINED_ON) and (name != "image_size" or value)
    }


def _pixels_in(metadata: dict[str, str]) -> dict:
    """bits, mean and std as the model card of `moco_isl.export` has them: JSON."""
    found = {}
    for name in ("bits", "mean", "std"):
        with contextlib.suppress(KeyError, ValueError):
            found[name] = json.loads(metadata[name])
    return found


def _channels_shown(encoder: nn.Module, found: Weights) -> int:
    """How many channels of an image the first convolution in a file takes."""
    first = first_convolution(encoder)
    state = checkpoint.plain_names(found.tensors, found.path, encoder.state_dict())
    weight = state.get(f"{first[0]}.weight") if first else None
    is_one = weight is not None and weight.dim() == 4
    return weight.shape[1] * first[1].groups if is_one else channels_of(encoder)


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


def _state_dict(content: dict, path: str | Path) -> tuple[Tensors, list[str], str]:
    """(tensors of the model by their plain names, names of what else is in the file, network).

    network: "teacher" or "student" where the file holds DINO's two, else "".
    """
    for key in ("state_dict", "model", "teacher", "student", None):
        state = content.get(key) if key else content
        if isinstance(state, dict) and any(isinstance(v, torch.Tensor) for v in state.values()):
            break
    else:
        raise BadInput(
            f"'{path}' holds no tensors but {checkpoint.some(content) or 'nothing'}: expected a"
            " state dict, bare or under state_dict, model or teacher"
        )
    beside = {} if state is content else content
    left = [
        key
        for key, value in beside.items()
        if isinstance(value, (dict, torch.Tensor))
        and value is not state
        and key not in ("args", "metadata")
    ]
    tensors = {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    network = key if key in ("teacher", "student") else ""
    return checkpoint.plain_names(tensors, path), left, network


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
    return chosen, prefix[:-1], left


def _below(state: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _prefix(state: Tensors, arch: str | None, path: str | Path) -> str:
    """What the names of the encoder begin with: "" in a bare state dict, such as "model.backbone.".

    Raises BadInput where there are several encoders.
    """
    found = []
    if arch is not None:
        own = backbone_shapes(on_meta(lambda: build_encoder(arch, 1)))
        own = [
            name
            for name in checkpoint.plain_names(own, path)
            if not name.endswith("num_batches_tracked")
        ]
        found = {name.removesuffix(own[0]) for name in state if f".{name}".endswith(f".{own[0]}")}
        found = [prefix for prefix in found if all(prefix + name in state for name in own)]
    if not found:
        found = {
            name.removesuffix(end)
            for name in state
            for end in naming.ANCHORS
            if f".{name}".endswith(f".{end}")
        }
        shows = lambda prefix: looks_like(naming.known_names(_below(state, prefix)))[0]
        found = [prefix for prefix in found if arch or shows(prefix)]
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


# ---- loading -------------------------------------------------------------------------------------


def _last_weight(state: Tensors, head: str) -> str:
    return f"{head}.2.weight" if f"{head}.2.weight" in state else f"{head}.weight"


def give_head(encoder: nn.Module, found: Weights) -> str | None:
    """Give the encoder the kind of head that the file has: "linear" or "mlp", None for none."""
    place = head_name(encoder)
    weight = found.tensors.get(_last_weight(found.tensors, place))
    if weight is None or weight.dim() != 2:
        return None
    mlp = f"{place}.2.weight" in found.tensors
    bias = _last_weight(found.tensors, place).replace("weight", "bias") in found.tensors
    set_head(encoder, nn.Linear(feature_dim(encoder), weight.shape[0], bias=bias))
    if mlp:
        add_mlp(encoder)
    return "mlp" if mlp else "linear"


def fit(encoder: nn.Module, found: Weights, with_head: bool) -> tuple[Tensors, list[str]]:
    """The tensors for all of an encoder by its own names, and the names of those left.

    Where they do not fit as they are, they are converted as the network's library does when it
    loads a file: positions of another side are interpolated, other names of its own are changed.
    encoder: on any device. with_head: the head too; else it is left. Raises BadInput where
    anything is missing or not known.
    """
    state = checkpoint.plain_names(found.tensors, found.path, encoder.state_dict())
    wrong = _misfit(encoder, state, with_head)
    if wrong:
        converted = _converted(encoder, found.arch, state)
        if _misfit(encoder, converted, with_head):
            raise BadInput(
                f"'{found.path}' does not fit {found.arch} with stem {found.stem}: {wrong}"
                f"{found.looks}; give the -a and --stem it was trained with"
            )
        state = converted
    own = _wanted(encoder, with_head)
    used = {name: state[name] for name in own if name in state}
    shape = like({name: own[name] for name in used})
    require(used, shape, f"cannot use the weights in {files.named('', found.path)}", cure=EARLIER)
    return used, [name for name in state if name not in used]


def _wanted(encoder: nn.Module, with_head: bool) -> Tensors:
    place = head_name(encoder) + "."
    own = encoder.state_dict()
    return {name: t for name, t in own.items() if with_head or not name.startswith(place)}


def _misfit(encoder: nn.Module, state: Tensors, with_head: bool) -> str:
    """What is missing in a state, not known to the encoder or of another shape; '' for nothing."""
    own = _wanted(encoder, with_head)
    left = (*_AUXILIARY, *([] if with_head else [head_name(encoder) + "."]))
    kinds = {
        # files of older torch lack the count of batches
        "missing": [n for n in own if n not in state and not n.endswith("num_batches_tracked")],
        "not known to it": [n for n in state if n not in own and not n.startswith(left)],
        "of another shape": [
            f"{name} {list(state[name].shape)} in place of {list(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    return "; ".join(
        f"{len(names)} {kind}: {checkpoint.some(names)}" for kind, names in kinds.items() if names
    )


def _converted(encoder: nn.Module, arch: str, state: Tensors) -> Tensors:
    """The state as the library of this architecture would convert it, or unchanged."""
    try:
        if arch.startswith("timm:"):
            import timm

            module = timm.models.model_entrypoint(arch.removeprefix("timm:")).__module__
            convert = getattr(importlib.import_module(module), "checkpoint_filter_fn", None)
            return convert(dict(state), encoder) if convert else state
        from torchvision.models.vision_transformer import (
            VisionTransformer,
            interpolate_embeddings,
        )

        if isinstance(encoder, VisionTransformer):
            return interpolate_embeddings(encoder.image_size, encoder.patch_size, dict(state))
    except Exception:  # of tensors that are no such network's, the library may raise anything
        pass
    return state
