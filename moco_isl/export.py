"""Write the backbone of a checkpoint for another library, and check the result.

python -m moco_isl.export FILE --to LIBRARY --out OUT
"""

import argparse
import copy
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moco_isl import __version__, files
from moco_isl.data.sets import SETS
from moco_isl.data.transforms import SMALL
from moco_isl.encoders import (
    BACKBONE,
    CIFAR_SIDE,
    Taps,
    backbone_shapes,
    evaluating,
    feature_dim,
    head_name,
    on_meta,
    require_side,
    set_head,
)
from moco_isl.errors import BadInput, RunFailed, first_line, missing_package
from moco_isl.evaluation.results import read_results
from moco_isl.evaluation.subject import fingerprint
from moco_isl.options import opt
from moco_isl.run import checkpoint, exits, flags
from moco_isl.run.backbone import LARGEST_SIDE, EncoderOptions, describe, load_backbone
from moco_isl.run.logs import read_facts
from moco_isl.run.naming import from_detectron2, to_detectron2
from moco_isl.run.weights import run_file, weights_file

Tensors = dict[str, torch.Tensor]
TOLERANCE = 1e-5
ONNX_TOLERANCE = 1e-4  # onnxruntime fuses and orders sums otherwise
ONNX_LARGEST = 2**31 - 2**20  # bytes of weights in one ONNX file, which is one protobuf
_DETECTRON2 = ("resnet18", "resnet34", "resnet50", "resnet101")
_ALTERNATIVE = "use --to safetensors and build the network with moco_isl.encoders.build_encoder"


@dataclass(kw_only=True)
class ExportOptions:
    """What is not read from the file."""

    image_size: int | None = opt(
        None,
        low=1,
        high=LARGEST_SIDE,
        metavar="S",
        help="side of the images that the written network takes (as in training)",
    )


@dataclass(frozen=True)
class Backbone:
    """What is exported: an encoder, and its tensors without the head.

    info: see `load_backbone`. side, channels: of the images. mean, std: how they are normalised.
    card: see `model_card`.
    """

    encoder: nn.Module
    state: Tensors
    info: dict
    side: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    card: dict[str, str]

    @property
    def name(self) -> str:
        """The name of the network in the library that has it."""
        return self.info["arch"].removeprefix("timm:")


def export(
    path: str | Path,
    to: str,
    out: str | Path,
    *,
    key_encoder: bool = False,
    arch: str | None = None,
    stem: str | None = None,
    image_size: int | None = None,
    results: list[str] = (),
) -> list[str]:
    """Write the backbone in `path` for the library `to` into `out`; returns lines to print.

    path, key_encoder, arch, stem: see `load_backbone`. image_size: side of the images; None: as in
    training. results: results.json files of main_knn.py and main_lincls.py, for the model card.
    What was written is read again as the library does, and must give the same backbone output on
    fixed tensors of 1 and 3 images, to 1e-5 (ONNX: 1e-4); detectron2's names are mapped back and
    the tensors compared. Only then it gets its name: `out` is whole and compared, or not there.
    Raises BadInput where the library has no such network, RunFailed on a difference.
    """
    path = run_file(path)
    out = Path(out)
    _check_out(path, to, out)
    has_card = to in ("safetensors", "hf", "onnx") or (to, out.suffix) == ("timm", ".safetensors")
    if results and not has_card:
        raise BadInput(
            "--results go into the model card of safetensors: use --to safetensors, --to hf, or"
            " --to timm with --out FILE.safetensors"
        )
    encoder, info = load_backbone(path, arch, stem, key_encoder, image_size)
    card = model_card(path, info, results) if has_card else {}
    backbone = _backbone(encoder, info, image_size, card)
    write, note = _FORMS[to](backbone, out)
    checkpoint.require_writable(out, "--out")
    _write(backbone, to, write, out)
    count = len(backbone.state)
    if to == "detectron2":  # its norms do not count batches
        count = sum(not name.endswith("num_batches_tracked") for name in backbone.state)
    proof = "same output on fixed tensors"
    if to == "detectron2":
        proof = "names mapped back: equal tensors"
    return [
        describe(info),
        f"=> wrote '{out}' for {to}: {count} tensors, without the head; {proof}",
        *note,
    ]


def _backbone(
    encoder: nn.Module, info: dict, image_size: int | None, card: dict[str, str]
) -> Backbone:
    """Raises BadInput where the encoder does not take images of `image_size`."""
    place = head_name(encoder) + "."
    state = {
        name: t.contiguous()
        for name, t in encoder.state_dict().items()
        if not name.startswith(place)
    }
    config = getattr(encoder, "pretrained_cfg", {})
    usual = CIFAR_SIDE // 2 if info["stem"] == "cifar" else config.get("input_size", [224])[-1]
    side = image_size or info["image_size"] or usual
    if image_size:
        require_side(encoder, info["arch"], image_size)
    first = next(t for t in state.values() if t.dim() == 4)  # the first convolution
    mean, std = normalisation(encoder, info, first.shape[1])
    shape = {"image_size": side} if image_size or info["image_size"] else {}
    more = {"mean": json.dumps(mean), "std": json.dumps(std)} | {
        k: str(v) for k, v in shape.items()
    }
    return Backbone(encoder, state, info, side, first.shape[1], mean, std, card | more)


def normalisation(
    encoder: nn.Module, info: dict, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the channels by which images were normalised in training.

    Those that the file says, or of the data set that it names; else those that timm knows of its
    network, else ImageNet's; of another number of channels than three ImageNet's average.
    """
    said = info["args"]
    row = SETS.get(said.get("dataset"))
    config = getattr(encoder, "pretrained_cfg", {})
    imagenet = SETS["folder"]
    known = [
        (said.get("mean"), said.get("std")),
        (row and row.mean, row and row.std),
        (config.get("mean"), config.get("std")),
        (imagenet.mean, imagenet.std),
    ]
    for mean, std in known:
        if mean and std and len(mean) == len(std) == channels:
            return tuple(mean), tuple(std)
    average = lambda values: (round(sum(values) / len(values), 3),) * channels
    return average(imagenet.mean), average(imagenet.std)


def _check_out(path: Path, to: str, out: Path) -> None:
    """Raise BadInput where `out` is there, or its ending stands for another kind of file."""
    what = "folder" if to == "hf" else "file"
    found = files.kind(out, "--out")
    if found == "folder" and to != "hf":
        raise BadInput(f"--out '{out}' is a folder: name the file to write")
    if found and files.kind(path) and out.samefile(path):
        raise BadInput(f"--out '{out}' is the file to read: name the {what} to write")
    if found:
        raise BadInput(
            f"--out '{out}' is there already and is not written over: name another {what}, or"
            " remove that one first"
        )
    if out.suffix == ".pkl" and to == "detectron2":
        raise BadInput(
            f"--out '{out}': detectron2 would open .pkl as a pickle, this is none; name it .pth"
        )
    if out.suffix == ".safetensors" and to in ("torchvision", "detectron2"):
        raise BadInput(
            f"--out '{out}': what {to} reads is a file of torch.save; name it .pth, or use --to"
            " safetensors"
        )
    if to == "onnx" and out.suffix != ".onnx":
        raise BadInput(f"--out '{out}': name an ONNX file .onnx, as its readers expect")
    if to == "hf" and out.suffix in (".pth", ".tar", ".onnx", ".safetensors"):
        raise BadInput(f"--out '{out}' is named as a file: --to hf writes a folder; name that")


def _write(backbone: Backbone, to: str, write: Callable[[Path], nn.Module], out: Path) -> None:
    """Write in a temporary folder beside `out`, compare, and only then give it its name."""
    room = out.with_name(out.name + files.TEMPORARY)
    shutil.rmtree(room, ignore_errors=True)  # of a process that was killed
    try:
        room.mkdir()
        place = room / out.name
        with files.replacing(out, place):
            _compare(backbone, write(place), ONNX_TOLERANCE if to == "onnx" else TOLERANCE)
            if files.kind(out):
                raise BadInput(f"--out '{out}' has come up meanwhile and is not written over")
    except OSError as error:
        raise RunFailed(f"cannot write '{out}': {error.strerror or error}") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


# ---- one function for each library ---------------------------------------------------------------
# It checks that the library has the network, and returns (write, lines to print). write(place)
# writes the file or folder at `place` and returns the backbone that the library reads from it.

Form = tuple[Callable[[Path], nn.Module], list[str]]


def _torchvision(backbone: Backbone, out: Path) -> Form:
    from torchvision import models

    name = backbone.name
    known = name in models.list_models(module=models)
    build = lambda: models.get_model(name, weights=None)
    _require(known and _same_shapes(build, backbone.state), backbone, "torchvision")

    def write(place: Path) -> nn.Module:
        checkpoint.save(backbone.state, place)
        model = build()
        answer = model.load_state_dict(torch.load(place, weights_only=True), strict=False)
        head = head_name(model) + "."
        if answer.unexpected_keys or not all(n.startswith(head) for n in answer.missing_keys):
            raise RunFailed(f"torchvision's {name} does not take '{out}': {answer}")
        return Taps(model, [BACKBONE])

    how = f"torchvision.models.{name}().load_state_dict(torch.load('{out}'), strict=False)"
    return write, [f"=> read it by {how}; it misses exactly the classifier"]


def _timm_options(backbone: Backbone, to: str) -> dict[str, int]:
    """What timm.create_model takes for this backbone beside its name. Raises BadInput."""
    try:
        import timm
    except ImportError as error:
        raise missing_package(f"--to {to}", "timm") from error
    name = backbone.name
    if not timm.is_model(name):
        _require(False, backbone, "timm")
    config = timm.models.get_pretrained_cfg(name)
    usual = config.input_size if config else (3, 224, 224)
    options = {}
    if config and config.fixed_input_size and backbone.side != usual[-1]:
        options["img_size"] = backbone.side
    if backbone.channels != usual[0]:
        options["in_chans"] = backbone.channels
    build = lambda: timm.create_model(name, num_classes=0, **options)
    _require(_same_shapes(build, backbone.state, whole=True), backbone, "timm")
    return options


def _timm(backbone: Backbone, out: Path) -> Form:
    options = _timm_options(backbone, "timm")
    import timm

    name = backbone.name

    def write(place: Path) -> nn.Module:
        if out.suffix == ".safetensors":
            checkpoint.save_safetensors(backbone.state, place, backbone.card)
        else:
            checkpoint.save({"arch": f"timm:{name}", "state_dict": backbone.state}, place)
        with files.utf8_name(place) as known:
            return timm.create_model(name, num_classes=0, checkpoint_path=str(known), **options)

    more = "".join(f", {key}={value}" for key, value in options.items())
    how = f"timm.create_model('{name}', num_classes=0{more}, checkpoint_path='{out}')"
    return write, [
        f"=> read it by model = {how}",
        "=> to train 10 classes: model.reset_classifier(10) after that; num_classes=10 in that call"
        " fails, because the file has no classifier",
    ]


def _hf(backbone: Backbone, out: Path) -> Form:
    options = _timm_options(backbone, "hf")
    import timm

    if tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 16):
        raise BadInput(
            f"--to hf needs timm 1.0.16 or newer, which reads such folders, and {timm.__version__}"
            " is installed: pip install -U timm"
        )
    name = backbone.name
    how = "timm.create_model('local-dir:{}', pretrained=True, num_classes={})".format

    def write(place: Path) -> nn.Module:
        model = timm.create_model(name, num_classes=0, **options)
        model.load_state_dict(backbone.state)
        model.pretrained_cfg = _pretrained_cfg(model, backbone)
        timm.models.save_for_hf(model, place, model_args=options, safe_serialization=True)
        # once more, with the card, which our own scripts read
        checkpoint.save_safetensors(backbone.state, place / "model.safetensors", backbone.card)
        files.write_text(_readme(backbone, how(out.name, 0)), place / "README.md")
        with files.utf8_name(place) as known:
            return timm.create_model(f"local-dir:{known}", pretrained=True, num_classes=0)

    return write, [
        f"=> read it by {how(out, 0)}; with pretrained=False its weights are random",
        f"=> to train 10 classes: {how(out, 10)}",
    ]


def _pretrained_cfg(model: nn.Module, backbone: Backbone) -> dict:
    """timm's words for the network and its images; nothing of the weights that timm has for it."""
    structure = ("architecture", "classifier", "first_conv", "pool_size", "fixed_input_size")
    config = {key: model.pretrained_cfg[key] for key in structure if key in model.pretrained_cfg}
    side = backbone.side
    return config | {
        "input_size": (backbone.channels, side, side),
        "mean": backbone.mean,
        "std": backbone.std,
        # as our own scripts take an image for its features
        "interpolation": "bilinear",
        "crop_pct": 1.0 if side <= SMALL else 0.875,
        "crop_mode": "center",
        "num_classes": 0,
    }


def _readme(backbone: Backbone, how: str) -> str:
    """The model card of a Hugging Face folder."""
    card = {key: value for key, value in backbone.card.items() if key != "format"}
    rows = "\n".join(f"| {key} | {files.shown(value)} |" for key, value in card.items())
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- image-feature-extraction
- self-supervised
---
# {backbone.name}, pretrained without labels by moco_isl

The backbone alone: {feature_dim(backbone.encoder)} features an image, no classifier.

```python
import timm
model = {how}.eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(image)[None])  # image: a PIL image; [1, {feature_dim(backbone.encoder)}]
```

| | |
|---|---|
{rows}
"""


def _onnx(backbone: Backbone, out: Path) -> Form:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise missing_package("--to onnx", error.name, "'moco_isl[onnx]'") from error
    if sum(t.numel() * t.element_size() for t in backbone.state.values()) > ONNX_LARGEST:
        raise BadInput(f"{backbone.info['arch']} has more than the 2 GiB that an ONNX file holds")

    def write(place: Path) -> nn.Module:
        _write_onnx(backbone, place)
        content = onnx.load(str(place))
        card = {key: value for key, value in backbone.card.items() if key != "format"}
        card["image_size"] = str(backbone.side)
        onnx.helper.set_model_props(content, {k: files.encodable(v) for k, v in card.items()})
        onnx.save(content, str(place))
        onnx.checker.check_model(str(place), full_check=True)
        return _Session(onnxruntime.InferenceSession(place, providers=["CPUExecutionProvider"]))

    side = backbone.side
    how = f"onnxruntime.InferenceSession('{out}').run(['features'], {{'images': images}})[0]"
    return write, [
        f"=> read it by {how}",
        f"=> images: float32 [N, {backbone.channels}, {side}, {side}], (x / 255 - mean) / std with"
        f" mean {list(backbone.mean)} and std {list(backbone.std)}; features: float32 [N,"
        f" {feature_dim(backbone.encoder)}]",
    ]


def _write_onnx(backbone: Backbone, place: Path) -> None:
    """Write the network by torch's own exporter, with any number of images. Raises RunFailed."""
    network = copy.deepcopy(backbone.encoder)
    set_head(network, nn.Identity())
    images = torch.zeros(2, backbone.channels, backbone.side, backbone.side)  # 1 would stay 1
    names = {"input_names": ["images"], "output_names": ["features"]}
    if _has_dynamo():
        dynamic = {"dynamic_shapes": ({0: torch.export.Dim("N")},)}
        how = {"dynamo": True, "external_data": False, "verbose": False, **dynamic}
    else:
        how = {"dynamic_axes": {"images": {0: "N"}, "features": {0: "N"}}}
    loud = logging.getLogger("torch.onnx")
    before = loud.level
    try:
        with evaluating(network), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing; the comparison is the proof
            loud.setLevel(logging.ERROR)
            torch.onnx.export(network, (images,), str(place), **names, **how)
    except OSError:
        raise
    except Exception as error:  # an exporter of a library may raise anything
        raise RunFailed(
            f"torch's ONNX exporter does not take {backbone.info['arch']}: {first_line(error)}"
        ) from error
    finally:
        loud.setLevel(before)


def _has_dynamo() -> bool:
    """Whether torch's own choice is the exporter that captures graphs, not the one that traces."""
    return torch.__version__ >= (2, 9)


class _Session(nn.Module):
    """An ONNX file as onnxruntime runs it: images [N, c, S, S] -> features [N, C]."""

    def __init__(self, session):
        super().__init__()
        self.session = session

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(["features"], {"images": images.numpy()})[0])


def _safetensors(backbone: Backbone, out: Path) -> Form:
    def write(place: Path) -> nn.Module:
        checkpoint.save_safetensors(backbone.state, place, backbone.card)
        return Taps(load_backbone(place)[0], [BACKBONE])

    return write, [
        f"=> read it by moco_isl.run.backbone.load_backbone('{out}'), or any reader of safetensors"
    ]


def _detectron2(backbone: Backbone, out: Path) -> Form:
    known = backbone.name in _DETECTRON2 and backbone.info["stem"] != "cifar"
    _require(known and backbone.channels == 3, backbone, "detectron2")
    # its norms do not count batches
    state = {n: t for n, t in backbone.state.items() if not n.endswith("num_batches_tracked")}

    def write(place: Path) -> nn.Module:
        content = {
            "model": to_detectron2(state),
            "__author__": "moco_isl",
            "matching_heuristics": True,
        }
        checkpoint.save(content, place)
        back = from_detectron2(torch.load(place, weights_only=True)["model"])
        same = lambda: all(torch.equal(back[name], t) for name, t in state.items())
        if back.keys() != state.keys() or not same():
            raise RunFailed(f"the names in '{out}' do not map back to the backbone's")
        return Taps(load_backbone(place)[0], [BACKBONE])

    settings = (
        "INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675, 116.280, 103.530], MODEL.PIXEL_STD [58.395,"
        " 57.120, 57.375]"
    )
    return write, [f"=> MODEL.WEIGHTS {out}, with {settings}, MODEL.RESNETS.STRIDE_IN_1X1 False"]


_FORMS = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _hf,
    "onnx": _onnx,
    "safetensors": _safetensors,
    "detectron2": _detectron2,
}


def _require(has_it: bool, backbone: Backbone, library: str) -> None:
    if not has_it:
        channels = "" if backbone.channels == 3 else f" and {backbone.channels} channels"
        raise BadInput(
            f"{library} has no network of the shape of {backbone.info['arch']} with stem"
            f" {backbone.info['stem']}{channels}: {_ALTERNATIVE}"
        )


def _same_shapes(build: Callable[[], nn.Module], state: Tensors, whole: bool = False) -> bool:
    """Whether the library's network, without its classifier, has these names and shapes.

    whole: it has no classifier.
    """
    model = on_meta(build)
    shapes = lambda tensors: {name: t.shape for name, t in tensors.items()}
    return shapes(state) == (shapes(model.state_dict()) if whole else backbone_shapes(model))


@torch.no_grad()
def _compare(backbone: Backbone, read_again: nn.Module, tolerance: float) -> None:
    """Raise RunFailed where the network that was read again gives another output.

    Both get the same fixed tensors, of 1 and of 3 images.
    """
    side = backbone.side
    generator = torch.Generator().manual_seed(0)
    taps = Taps(backbone.encoder, [BACKBONE])
    for N in (1, 3):
        images = torch.randn(N, backbone.channels, side, side, generator=generator)
        with evaluating(backbone.encoder), evaluating(read_again):
            ours = taps(images)[BACKBONE]
            theirs = read_again(images)
            theirs = theirs[BACKBONE] if isinstance(theirs, dict) else theirs
        difference = (ours - theirs).abs().max().item()
        if not difference <= tolerance * max(1.0, ours.abs().max().item()):
            raise RunFailed(
                f"what was written differs from the checkpoint: output by {difference:g} on a fixed"
                " tensor"
            )


# ---- the model card ------------------------------------------------------------------------------


def model_card(path: Path, info: dict, results: list[str]) -> dict[str, str]:
    """What is known about a checkpoint, as safetensors' metadata: texts by name."""
    args = info["args"]
    command = None
    if (path.parent / "args.json").is_file():
        command = " ".join(read_facts(path.parent).get("command", [])[1:])
    card = {
        "format": "pt",
        "library": f"moco_isl {__version__}",
        "arch": info["arch"],
        "stem": info["stem"],
        "encoder": info["part"],
        "dataset": args.get("dataset"),
        "image_size": info["image_size"],
        "epochs": info["epoch"],
        "objective": args.get("objective"),
        "miner": args.get("miner"),
        "command": command,
        "source_sha256": fingerprint(weights_file(path)),
    }
    judged = {key: info["metadata"][key] for key in ("knn", "linear") if key in info["metadata"]}
    rows_of = {}
    for name in results:
        found = _of_checkpoint(read_results(name, "--results"), card["source_sha256"])
        rows = found.get("classifiers", found.get("results"))
        if rows is None or found.get("sha256") not in (None, card["source_sha256"]):
            raise BadInput(
                f"--results '{name}' is not of main_knn.py or main_lincls.py on '{path}'"
            )
        wanted = "key" if info["part"] == "encoder_k" else "query"
        if found.get("encoder", wanted) != wanted:
            raise BadInput(
                f"--results '{name}' is of the {found['encoder']} encoder, and the {wanted} encoder"
                " is exported: give or drop --key"
            )
        where = {key: found[key] for key in ("dataset", "protocol") if key in found}
        kind = "linear" if "classifiers" in found else "knn"
        rows_of.setdefault(kind, []).extend({**where, **row} for row in rows)
    card |= judged | {kind: json.dumps(rows) for kind, rows in rows_of.items()}
    return {key: str(value) for key, value in card.items() if value is not None}


def _of_checkpoint(results: dict, sha256: str) -> dict:
    """The newest results of this checkpoint in a results.json; else the newest of any."""
    for found in [results, *reversed(results.get("earlier", []))]:
        if found.get("sha256") == sha256:
            return found
    return results


# ---- the command ---------------------------------------------------------------------------------


def get_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m moco_isl.export", description=__doc__)
    add = parser.add_argument
    add("file", metavar="FILE", help="checkpoint of ours or MoCo's, or a state dict")
    add("--to", required=True, choices=_FORMS, help="the library to write for")
    out = "the file to write, with --to hf the folder; none that is there is written over"
    add("--out", required=True, metavar="OUT", help=out)
    parser.add_options("encoder", EncoderOptions)
    parser.add_options("images", ExportOptions)
    given = {"type": _results, "default": [], "metavar": "results.json"}
    add("--results", nargs="+", help="for the model card", **given)
    return parser


def _results(text: str) -> str:
    if not text.endswith(".json"):  # so that a FILE behind these is not taken for one of them
        raise argparse.ArgumentTypeError(
            f"'{files.short(text)}' is no .json file: expected a results.json of main_knn.py or"
            " main_lincls.py"
        )
    return text


def main(argv: list[str] | None = None, stop=None) -> int:
    """Run with flags argv; returns the exit code."""
    return exits.exit_code(run, argv, stop)


def run(argv: list[str] | None, stop) -> None:
    args = get_parser().parse_args(argv)
    flags.check_ranges(args, ExportOptions)
    of = {"key_encoder": args.key, "arch": args.arch, "stem": args.stem}
    of["image_size"] = args.image_size
    for line in export(args.file, args.to, args.out, results=args.results, **of):
        print(files.shown(line))


if __name__ == "__main__":
    sys.exit(main())
