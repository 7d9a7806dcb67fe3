"""Write the backbone of a checkpoint for another library, and check the result.

python -m moco_isl.export FILE --to LIBRARY --out FILE
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from moco_isl import __version__, files
from moco_isl.encoders import (
    BACKBONE,
    Taps,
    backbone_shapes,
    evaluating,
    head_name,
    is_resnet,
    on_meta,
)
from moco_isl.errors import BadInput, RunFailed
from moco_isl.evaluation.results import read_results
from moco_isl.evaluation.subject import fingerprint
from moco_isl.run import checkpoint, exits, flags
from moco_isl.run.backbone import EncoderOptions, describe, load_backbone
from moco_isl.run.logs import read_facts
from moco_isl.run.naming import from_detectron2, to_detectron2
from moco_isl.run.weights import run_file, weights_file

Tensors = dict[str, torch.Tensor]
TOLERANCE = 1e-5
_DETECTRON2 = ("resnet18", "resnet34", "resnet50", "resnet101")
_ALTERNATIVE = "use --to safetensors and build the network with moco_isl.encoders.build_encoder"


def export(
    path: str | Path,
    to: str,
    out: str | Path,
    *,
    key_encoder: bool = False,
    arch: str | None = None,
    stem: str | None = None,
    results: list[str] = (),
) -> list[str]:
    """Write the backbone in `path` for the library `to` into `out`; returns lines to print.

    path, key_encoder, arch, stem: see `load_backbone`. results: results.json files of main_knn.py
    and main_lincls.py, for the model card of safetensors. What was written is read again as the
    library does, and must give the same backbone output on a fixed tensor, to 1e-5; detectron2's
    names are mapped back and the tensors compared. Raises BadInput where the library has no such
    network, RunFailed on a difference.
    """
    path = run_file(path)
    out = Path(out)
    _check_out(path, to, out)
    has_card = to == "safetensors" or (to == "timm" and out.suffix == ".safetensors")
    if results and not has_card:
        raise BadInput(
            "--results go into the model card of safetensors: use --to safetensors, or --to timm"
            " with --out FILE.safetensors"
        )
    encoder, info = load_backbone(path, arch, stem, key_encoder)
    place = head_name(encoder) + "."
    state = {
        name: t.contiguous()
        for name, t in encoder.state_dict().items()
        if not name.startswith(place)
    }
    if to == "detectron2":  # its norms do not count batches
        state = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    write, note = _FORMS[to](state, info, out, model_card(path, info, results) if has_card else {})
    checkpoint.require_writable(out, "--out")
    try:
        _compare(encoder, info, write())
    except BaseException:  # a file that was not compared must not stay
        out.unlink(missing_ok=True)
        raise
    proof = "same output on a fixed tensor"
    if to == "detectron2":
        proof = "names mapped back: equal tensors"
    return [
        describe(info),
        f"=> wrote '{out}' for {to}: {len(state)} tensors, without the head; {proof}",
        *note,
    ]


def _check_out(path: Path, to: str, out: Path) -> None:
    """Raise BadInput where `out` is there, or its ending stands for another kind of file."""
    found = files.kind(out, "--out")
    if found == "folder":
        raise BadInput(f"--out '{out}' is a folder: name the file to write")
    if found and files.kind(path) and out.samefile(path):
        raise BadInput(f"--out '{out}' is the file to read: name the file to write")
    if found:
        raise BadInput(
            f"--out '{out}' is there already and is not written over: name another file, or remove"
            " that one first"
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


# ---- one function for each library ---------------------------------------------------------------
# It checks that the library has the network, and returns (write, lines to print). write() writes
# the file and returns the backbone that the library reads from it.

Form = tuple[Callable[[], nn.Module], list[str]]


def _torchvision(state: Tensors, info: dict, out: Path, card: dict[str, str]) -> Form:
    import torchvision

    name = info["arch"].removeprefix("timm:")
    known = name in torchvision.models.list_models(module=torchvision.models)
    build = lambda: torchvision.models.get_model(name, weights=None)
    _require(known and _same_shapes(build, state), info, "torchvision")

    def write() -> nn.Module:
        checkpoint.save(state, out)
        model = build()
        answer = model.load_state_dict(torch.load(out, weights_only=True), strict=False)
        place = head_name(model) + "."
        if answer.unexpected_keys or not all(n.startswith(place) for n in answer.missing_keys):
            raise RunFailed(f"torchvision's {name} does not take '{out}': {answer}")
        return Taps(model, [BACKBONE])

    how = f"torchvision.models.{name}().load_state_dict(torch.load('{out}'), strict=False)"
    return write, [f"=> read it by {how}; it misses exactly the classifier"]


def _timm(state: Tensors, info: dict, out: Path, card: dict[str, str]) -> Form:
    try:
        import timm
    except ImportError:
        raise BadInput(
            "--to timm needs the package timm to check what it writes: pip install timm"
        ) from None
    name = info["arch"].removeprefix("timm:")
    known = timm.is_model(name)
    channels = {} if info["channels"] == 3 else {"in_chans": info["channels"]}
    build = lambda: timm.create_model(name, num_classes=0, **channels)
    _require(known and _same_shapes(build, state, whole=True), info, "timm")

    def write() -> nn.Module:
        if out.suffix == ".safetensors":
            checkpoint.save_safetensors(state, out, card)
        else:
            checkpoint.save({"arch": f"timm:{name}", "state_dict": state}, out)
        with files.utf8_name(out) as known:
            return timm.create_model(name, num_classes=0, checkpoint_path=str(known), **channels)

    more = "".join(f", {key}={value}" for key, value in channels.items())
    return write, [
        f"=> read it by timm.create_model('{name}', num_classes=0, checkpoint_path='{out}'{more})"
    ]


def _safetensors(state: Tensors, info: dict, out: Path, card: dict[str, str]) -> Form:
    def write() -> nn.Module:
        checkpoint.save_safetensors(state, out, card)
        return Taps(load_backbone(out)[0], [BACKBONE])

    return write, [
        f"=> read it by moco_isl.run.backbone.load_backbone('{out}'), or any reader of safetensors"
    ]


def _detectron2(state: Tensors, info: dict, out: Path, card: dict[str, str]) -> Form:
    known = info["arch"].removeprefix("timm:") in _DETECTRON2 and info["stem"] != "cifar"
    _require(known and info["channels"] == 3, info, "detectron2")

    def write() -> nn.Module:
        content = {
            "model": to_detectron2(state),
            "__author__": "moco_isl",
            "matching_heuristics": True,
        }
        checkpoint.save(content, out)
        back = from_detectron2(torch.load(out, weights_only=True)["model"])
        same = lambda: all(torch.equal(back[name], t) for name, t in state.items())
        if back.keys() != state.keys() or not same():
            raise RunFailed(f"the names in '{out}' do not map back to the backbone's")
        return Taps(load_backbone(out)[0], [BACKBONE])

    settings = (
        "INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675, 116.280, 103.530], MODEL.PIXEL_STD [58.395,"
        " 57.120, 57.375]"
    )
    return write, [f"=> MODEL.WEIGHTS {out}, with {settings}, MODEL.RESNETS.STRIDE_IN_1X1 False"]


_FORMS = {
    "torchvision": _torchvision,
    "timm": _timm,
    "safetensors": _safetensors,
    "detectron2": _detectron2,
}


def _require(has_it: bool, info: dict, library: str) -> None:
    if not has_it:
        channels = "" if info["channels"] == 3 else f" and {info['channels']} channels"
        raise BadInput(
            f"{library} has no network of the shape of {info['arch']} with stem"
            f" {info['stem']}{channels}: {_ALTERNATIVE}"
        )


def _same_shapes(build: Callable[[], nn.Module], state: Tensors, whole: bool = False) -> bool:
    """Whether the library's network, without its classifier, has these names and shapes.

    whole: it has no classifier.
    """
    model = on_meta(build)
    shapes = lambda tensors: {name: t.shape for name, t in tensors.items()}
    return shapes(state) == (shapes(model.state_dict()) if whole else backbone_shapes(model))


@torch.no_grad()
def _compare(encoder: nn.Module, info: dict, read_again: nn.Module) -> None:
    """Raise RunFailed where the network that was read again gives another output.

    Both get the same fixed tensor.
    """
    side = info["image_size"] or getattr(encoder, "pretrained_cfg", {}).get("input_size", [224])[-1]
    if is_resnet(encoder) or info["stem"] == "cifar":
        side = 64
    shape = (1, info["channels"], side, side)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with evaluating(encoder), evaluating(read_again):
        ours = Taps(encoder, [BACKBONE])(images)[BACKBONE]
        theirs = read_again(images)
        theirs = theirs[BACKBONE] if isinstance(theirs, dict) else theirs
    difference = (ours - theirs).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, ours.abs().max().item()):
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
        **{name: json.dumps(args[name]) for name in ("bits", "mean", "std") if args.get(name)},
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
    out = "the file to write; none that is there is written over"
    add("--out", required=True, metavar="FILE", help=out)
    parser.add_options("encoder", EncoderOptions)
    given = {"type": _results, "default": [], "metavar": "results.json"}
    add("--results", nargs="+", help="for the model card of safetensors", **given)
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
    of = {"key_encoder": args.key, "arch": args.arch, "stem": args.stem}
    for line in export(args.file, args.to, args.out, results=args.results, **of):
        print(files.shown(line))


if __name__ == "__main__":
    sys.exit(main())
