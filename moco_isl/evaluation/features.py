"""Features of the splits of a labelled data set: taken once, and kept in a file for later.

Letters: M images of a split, C numbers of a layer.
"""

import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from moco_isl import data, dist, files
from moco_isl.data.loaders import refuse
from moco_isl.encoders import extract_features
from moco_isl.errors import BadInput, RunFailed
from moco_isl.files import named, shown
from moco_isl.options import opt
from moco_isl.run import checkpoint, ranks
from moco_isl.schema import Tensor, require

Watch = Callable[[Iterable, int], Iterable]  # see `signals.Stop.watch`


@dataclass
class Split:
    """features: layer -> [M, C]; labels int64 [M], on the same device."""

    features: dict[str, torch.Tensor]
    labels: torch.Tensor


@dataclass(kw_only=True)
class FeatureOptions:
    """How features are taken, and where they are kept."""

    batch_size: int = opt(256, "-b", "--batch-size", low=1, help="images at a time on each rank")
    features: str | None = opt(
        None,
        metavar="FILE.safetensors",
        help="keep the features in this file, or use those that are in it",
    )


def take(
    encoder: nn.Module,
    dataset,
    *,
    transform,
    batch_size: int,
    workers: int,
    device: torch.device,
    normalize: bool,
    amp: torch.dtype | None = None,
    watch: Watch | None = None,
    max_bad_images: int | None = None,
) -> Split:
    """Features of a data set, each image once; each rank reads its share, and gets all of them.

    encoder: answers with a dict (`encoders.Taps`). watch: may end the pass on all ranks. Images
    that cannot be read are named and left out. Raises RunFailed on all ranks where there are more
    than max_bad_images of those (None: any number), and where features are not finite.
    """
    M = len(dataset)
    loader = data.eval_loader(
        dataset,
        transform=transform,
        batch_size=batch_size,
        workers=workers,
        device=device,
        shard=dist.shard(M),
    )
    most = -(-M // dist.world_size())  # images of the rank with the most of them
    batches = watch(loader, -(-most // batch_size)) if watch is not None else loader
    try:
        features = extract_features(encoder, batches, M, device, normalize=normalize, amp=amp)
        bad = unreadable(loader, dataset, max_bad_images)
    finally:
        loader.close()
    split = Split(features, dataset.labels.to(device))
    if bad:
        for i in bad:
            ranks.say(f"=> warning: {shown(dataset.path(i))} cannot be read and is left out")
        kept = torch.ones(M, dtype=torch.bool)
        kept[bad] = False
        kept = kept.to(device)
        split = Split({layer: x[kept] for layer, x in features.items()}, split.labels[kept])
    for layer, x in split.features.items():
        if not finite(x):
            text = (
                f"features of {layer} are not finite: this network overflows on these images; try"
                " --amp off or bf16"
            )
            raise RunFailed(text if dist.is_main() else "")
    return split


def unreadable(loader, dataset, most: int | None) -> list[int]:
    """Positions of the images that an `eval_loader` could not read, over all ranks.

    All ranks call it, after a pass. Raises RunFailed on all of them where there are more than
    `most`.
    """
    found = dist.gather_objects([i for i, _ in loader.bad_images()])
    bad = sorted({i for of_rank in found for i in of_rank})
    try:
        refuse(dataset, bad, most)
    except RunFailed as error:
        raise RunFailed(str(error) if dist.is_main() else "") from error
    return bad


def finite(rows: torch.Tensor) -> bool:
    """Whether all numbers of [M, ...] features are finite, without a second copy of them."""
    return bool(rows.flatten(1).sum(dim=1).isfinite().all())


# ---- kept in a file ------------------------------------------------------------------------------


def save(path: str | Path, splits: dict[str, Split], metadata: dict[str, str]) -> None:
    """Keep the features of all splits in one safetensors file, whole or not at all.

    A check sum of all that is in it is added. Raises RunFailed where it cannot be written, and
    BadInput where `path` has become a file of other features meanwhile.
    """
    tensors = {}
    for name, split in splits.items():
        tensors[f"{name}.labels"] = split.labels.cpu()
        for layer, rows in split.features.items():
            tensors[f"{name}.{layer}"] = rows.cpu().contiguous()
    metadata = {name: files.encodable(value) for name, value in metadata.items()}
    metadata |= {"crc32": check_sum(tensors, metadata)}
    files.require_ours(path, lambda there: _metadata(there) == metadata, "--features")
    checkpoint.save_safetensors(tensors, path, metadata)


def check_sum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """The CRC-32 of names, values and metadata; safetensors has none of its own."""
    crc = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy(), crc)
    return str(crc)


def _metadata(path: Path) -> dict[str, str] | None:
    try:
        with files.utf8_name(path) as known, safe_open(known, framework="pt") as file:
            return file.metadata()
    except (SafetensorError, OSError):
        return None


def load(
    path: str | Path, expected: dict[str, str], device: torch.device
) -> tuple[dict[str, Split], dict[str, str]]:
    """(splits, metadata) of a file that `save` wrote.

    Raises BadInput where it is none, is damaged, or has other metadata than `expected`.
    """
    cure = "remove it to have them taken anew, or give --features another name"
    try:
        with files.utf8_name(path) as known, safe_open(known, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"cannot read features from '{path}': {error}; {cure}") from error
    said = metadata.pop("crc32", None)
    if said is not None and said != check_sum(tensors, metadata):
        raise BadInput(f"'{path}' is damaged: its check sum is not that of its features; {cure}")
    splits: dict[str, Split] = {}
    for name, tensor in tensors.items():
        split, _, layer = name.partition(".")
        splits.setdefault(split, Split({}, None)).features[layer] = tensor
    for split in splits.values():
        split.labels = split.features.pop("labels", None)
    _require_splits(
        splits, f"{named('--features', path)} holds no labels and finite features", cure
    )
    for key, value in expected.items():
        if metadata.get(key) != value:
            what = _WORDS.get(key, f"with {key}")
            held = shown(str(metadata.get(key)))[:12]
            raise BadInput(
                f"'{path}' holds features {what} {held}, here it is {value[:12]}: {cure}"
            )
    for split in splits.values():
        split.labels = split.labels.to(device)
        split.features = {n: t.to(device, torch.float32) for n, t in split.features.items()}
    return splits, metadata


_WORDS = {  # for keys of the metadata
    "sha256": "of a checkpoint with sha256",
    "data_sha256": "of other data, with fingerprint",
    "encoder": "of the encoder",
}


def _require_splits(splits: dict[str, Split], where: str, cure: str) -> None:
    """Raise BadInput unless train and val have labels and the same layers, of finite unit rows."""
    layers = sorted(splits["train"].features) if "train" in splits else []
    letters = {layer: chr(ord("a") + i) for i, layer in enumerate(layers)}  # C of each layer

    def shape(images: str) -> dict:
        rows = {layer: Tensor("float", (images, c), -1.01, 1.01) for layer, c in letters.items()}
        return {"labels": Tensor("int", (images,), 0, 10**6), **rows}

    held = {name: {"labels": s.labels, **s.features} for name, s in splits.items()}
    require(held, {"train": shape("M"), "val?": shape("Q")}, where, cure=cure)
    if not layers or not len(splits["train"].labels):
        raise BadInput(f"{where}: it is empty; {cure}")
