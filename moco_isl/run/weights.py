"""Where weights lie: a file of torch or safetensors, a run's folder, a Hugging Face folder.

No pickle is ever executed.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from moco_isl import files, schema
from moco_isl.encoders import on_meta
from moco_isl.errors import BadInput
from moco_isl.run import checkpoint
from moco_isl.run.folder import newest

HF_FILES = ("model.safetensors", "pytorch_model.bin")  # looked for in this order
# model_type in a config.json of transformers -> what else it must say that tensors do not show
_TRANSFORMERS = {
    "vit": {"hidden_act": "gelu"},
    "dinov2": {"hidden_act": "gelu"},
    "dinov2_with_registers": {"hidden_act": "gelu"},
    "resnet": {"hidden_act": "relu", "downsample_in_bottleneck": False},
}
# arguments of timm's networks that the reader sets for itself
_SET_HERE = ("img_size", "in_chans", "num_classes")


def run_file(path: str | Path) -> Path:
    """The newest checkpoint of the run in a folder; any other path as it is. Raises BadInput."""
    found = files.kind(path) == "folder" and newest(path)
    return found or Path(path)


def weights_file(path: str | Path) -> Path:
    """The one file that holds the weights at a path. Raises BadInput where there is none.

    Of a run's folder it is the newest checkpoint, of a Hugging Face folder model.safetensors or
    pytorch_model.bin.
    """
    path = run_file(path)
    if files.kind(path) != "folder":
        return checkpoint.require_file(path)
    if not (path / "config.json").is_file():
        inside = sorted(p.name for p in path.glob("*.pth*"))
        hint = f"; it holds {', '.join(inside[-3:])}: name one of them" if inside else ""
        raise BadInput(
            f"'{path}' is a folder, and neither a run's nor one of Hugging Face with config.json:"
            f" expected one of them, or a checkpoint file{hint}"
        )
    for name in HF_FILES:
        if (path / name).is_file():
            return checkpoint.require_file(path / name)
    shards = " (weights in several files are not read: save them as one)"
    several = any(path.glob("*.index.json"))
    raise BadInput(
        f"'{path}' has a config.json, and neither {' nor '.join(HF_FILES)}: expected one of them"
        f"{shards if several else ''}"
    )


def read(path: str | Path) -> dict:
    """The content of the weights at a path, as `checkpoint.load` gives it. Raises BadInput.

    Of safetensors: {"state_dict": tensors, "metadata": texts by name}. Of a Hugging Face folder
    its card's "metadata" stays, and "arch" and "args" (mean, std and side of its images) are added
    where its config.json says them.
    """
    path = Path(path)
    file = weights_file(path)
    content = _read_file(file)
    if files.kind(path) != "folder" or file.name not in HF_FILES:
        return content
    config = schema.read_json(path / "config.json", {...: object}, expected="a model's settings")
    state = content.get("state_dict", content)
    beside = {"metadata": content["metadata"]} if "metadata" in content else {}
    return {"state_dict": state, **beside, **_named(config, path), **_of_images(config)}


def _of_images(config: dict) -> dict:
    """{"args": mean, std and image_size} as timm's config.json says them, {} where it does not."""
    said = config.get("pretrained_cfg")
    if not isinstance(said, dict):
        return {}
    found = {}
    for name in ("mean", "std"):
        values = said.get(name)
        if isinstance(values, list) and all(isinstance(x, int | float) for x in values):
            found[name] = [float(x) for x in values]
    size = said.get("input_size")
    if isinstance(size, list) and len(size) == 3 and size[1] == size[2]:
        found["image_size"] = size[2]
    return {"args": found} if found else {}


def _read_file(path: Path) -> dict:
    if path.suffix != ".safetensors" and not checkpoint.is_safetensors(path):
        return checkpoint.load(path)
    try:
        with files.utf8_name(path) as known, safe_open(known, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return {"state_dict": tensors, "metadata": file.metadata() or {}}
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"cannot read '{path}' as safetensors: {error}; is it cut off, or of another kind?"
        ) from error


def _changes_nothing(name: str, more: dict) -> bool:
    """Whether timm's network of a name is the same one with these arguments."""
    import timm

    def written(**given) -> str:
        network = on_meta(lambda: timm.create_model(name, num_classes=0, **given))
        return f"{network} {getattr(network, 'global_pool', '')}"

    try:
        return written(**more) == written()
    except Exception:  # an argument that timm does not know, or a value that it cannot use
        return False


def _named(config: dict, path: Path) -> dict[str, str]:
    """{"arch": name} where a config.json says which network its weights are for, else {}.

    Raises BadInput for networks that are not timm's or torchvision's own.
    """
    where = f"'{path}/config.json'"
    if "architecture" in config:  # timm's
        schema.require(config, {"architecture": str, "model_args?": dict, ...: object}, where)
        name = config["architecture"]
        more = {n: x for n, x in config.get("model_args", {}).items() if n not in _SET_HERE}
        if more and not _changes_nothing(name, more):
            raise BadInput(
                f"{where}: model_args {files.short(str(more))} make another network than timm's"
                f" {files.short(name)}: expected those of its own"
            )
        return {"arch": f"timm:{name}"}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _TRANSFORMERS:
        named = f"is of model_type {files.short(str(kind))}" if kind else "names no architecture"
        raise BadInput(
            f"{where} {named}: expected timm's architecture, or model_type"
            f" {', '.join(_TRANSFORMERS)} of transformers; of another network save timm's or"
            " torchvision's state dict, and give its file with -a"
        )
    expected = dict(_TRANSFORMERS[kind])
    if kind != "resnet" and isinstance(config.get("hidden_size"), int):
        expected["num_attention_heads"] = config["hidden_size"] // 64
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise BadInput(
                f"{where}: {name} is {files.short(str(config[name]))}: expected {value}, as timm's"
                f" and torchvision's {kind} have it; other networks of transformers are not read"
            )
    return {}
