"""Features of the splits of a labelled data set: taken once, each image exactly once, kept in a
file, used again.

Letters: M images of a split, C numbers of a layer.
"""

import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moco_isl import data, dist, files
from moco_isl.data.datasets import ImagesInMemory
from moco_isl.data.loaders import refuse
from moco_isl.encoders import extract_features
from moco_isl.errors import BadInput, RunFailed
from moco_isl.files import named, shown
from moco_isl.run import checkpoint
from moco_isl.schema import COUNT, Number, read_json, require
from moco_isl.schema import Tensor as TensorOf

LOOKED_AT = 10_000  # files of a data set whose sizes tell it from another with the same names


@dataclass
class Split:
    """features: layer -> [M, C]; labels int64 [M], on the same device."""

    features: dict[str, torch.Tensor]
    labels: torch.Tensor


def labelled(name: str, root: str | None, split: str, download: bool = False):
    """The split of a data set, with labels and classes.

    Raises BadInput where it has none, or a single class.
    """
    dataset = data.build_dataset(name, root, split, download)
    if dataset.labels is None:
        raise BadInput(
            f"the {split} images in '{root}' have no labels ({dataset.layout.unlabelled}): expected"
            f" a folder a class, as in {split}/dog/1.jpg"
        )
    return dataset


def side(asked: int, info: dict, dataset) -> int:
    """The side of the images to be judged: as asked for, else that of the training (see
    `load_backbone`), else what fits the images.
    """
    return asked or info["args"].get("image_size") or data.native_size(dataset)


@torch.no_grad()
def identity(splits: Iterable) -> str:
    """What tells data from other data, in short: the labels; of files, decoded or not, the names
    below their folder and the sizes of up to LOOKED_AT, spread over them; of other images in memory
    the pixels.
    """
    digest = hashlib.sha256()
    for dataset in splits:
        digest.update(f"{len(dataset)} {dataset.classes}".encode())
        digest.update(dataset.labels.numpy())
        if isinstance(dataset, ImagesInMemory) and isinstance(dataset.source, str):
            digest.update(dataset.images.contiguous().numpy())
            continue
        digest.update("\0".join(data.names_below(dataset)).encode(errors="surrogateescape"))
        for path in map(dataset.path, range(0, len(dataset), -(-len(dataset) // LOOKED_AT))):
            digest.update(b"%d " % (os.path.getsize(path) if os.path.exists(path) else -1))
    return digest.hexdigest()


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
    watch: Callable[[Iterable, int], Iterable] | None = None,
    max_bad_images: int | None = None,
) -> Split:
    """Features of a data set by an encoder that answers with a dict (`encoders.Taps`); each rank
    takes its share.

    watch(batches, most a rank): gives the batches on, and may end the pass on all ranks
    (`signals.Stop.watch`). Images that cannot be read are named and left out; of more than
    max_bad_images (None: any number), or of features that are not finite, RunFailed is raised on
    all ranks, with its text on the first.
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
        if dist.is_main():
            for i in bad:
                print(
                    f"=> warning: {files.shown(dataset.path(i))} cannot be read and is left out",
                    flush=True,
                )
        kept = torch.ones(M, dtype=torch.bool, device=device).index_fill_(
            0, torch.tensor(bad, device=device), False
        )
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
    """Positions of the images that an `eval_loader` could not read on any rank, to be asked by all
    of them after a pass. Raises RunFailed.
    """
    bad = sorted(
        {i for found in dist.gather_objects([i for i, _ in loader.bad_images()]) for i in found}
    )
    try:
        refuse(dataset, bad, most)
    except RunFailed as error:
        raise RunFailed(str(error) if dist.is_main() else "") from error
    return bad


def finite(rows: torch.Tensor) -> bool:
    """Whether all numbers of [M, ...] features are finite, without a second copy of them."""
    return bool(rows.flatten(1).sum(dim=1).isfinite().all())


def fingerprint(path: str | Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _sha256(file)
        )


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def save(path: str | Path, splits: dict[str, Split], metadata: dict[str, str]) -> None:
    """Keep the features of all splits in one safetensors file, whole or not at all, with a check
    sum of all that is in it.

    Raises RunFailed, and BadInput where meanwhile another file has come to `path` that is not of
    the same features.
    """
    tensors = {
        f"{name}.{layer}": t.cpu().contiguous()
        for name, s in splits.items()
        for layer, t in s.features.items()
    }
    tensors |= {f"{name}.labels": s.labels.cpu() for name, s in splits.items()}
    metadata = {name: files.encodable(value) for name, value in metadata.items()}
    metadata |= {"crc32": _check_sum(tensors, metadata)}
    files.require_ours(path, lambda there: _metadata(there) == metadata, "--features")
    checkpoint.save_safetensors(tensors, path, metadata)


def _check_sum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """Of names, values and metadata; safetensors has none."""
    found = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(
            tensor.contiguous().flatten().view(torch.uint8).numpy(),
            zlib.crc32(name.encode(), found),
        )
    return str(found)


def _metadata(path: Path) -> dict[str, str] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with files.utf8_name(path) as known, safe_open(known, framework="pt") as file:
            return file.metadata()
    except (SafetensorError, OSError):
        return None


def load(
    path: str | Path, expected: dict[str, str], device: torch.device
) -> tuple[dict[str, Split], dict[str, str]]:
    """(splits, metadata) of a file that `save` wrote.

    Raises BadInput if it is none, or not of what `expected` says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with files.utf8_name(path) as known, safe_open(known, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"cannot read features from '{path}': {error}; if they were cut off, remove it to have"
            " them taken anew, else give --features another name"
        ) from error
    check_sum = metadata.pop("crc32", None)  # files of earlier versions have none
    if check_sum is not None and check_sum != _check_sum(tensors, metadata):
        raise BadInput(
            f"'{path}' is damaged: its check sum is not that of its features; remove it to have"
            " them taken anew, or give --features another name"
        )
    splits: dict[str, Split] = {}
    where = (
        f"{named('--features', path)} holds no labels and finite features of this project's (remove"
        " it, or give another name)"
    )
    for name in sorted({name.partition(".")[0] for name in tensors}):
        rows = {
            n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")
        }
        splits[name] = Split(labels=rows.pop("labels", None), features=rows)
    _require_splits(splits, where)
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise BadInput(
                f"'{path}' holds features {_NAMES.get(key, f'with {key}')}"
                f" {shown(str(metadata.get(key)))[:12]}, here it is {value[:12]}: remove it to have"
                " them taken anew, or give --features another name"
            )
    for split in splits.values():
        split.labels = split.labels.to(device)
        split.features = {n: t.to(device, torch.float32) for n, t in split.features.items()}
    return splits, metadata


# words for keys
_NAMES = {
    "sha256": "of a checkpoint with sha256",
    "data_sha256": "of other data, with fingerprint",
    "encoder": "of the encoder",
}


def _require_splits(splits: dict[str, Split], where: str) -> None:
    """Labels of each split, and the same layers of as many finite rows of the same numbers in all.

    Raises BadInput.
    """
    dims = {}  # what the letter of a layer stands for: the same in all splits
    layers = sorted(splits["train"].features) if "train" in splits else []
    letters = {layer: chr(ord("a") + i) for i, layer in enumerate(layers)}
    # of unit length
    rows = lambda split, letter: TensorOf("float", (split, letter), low=-1.01, high=1.01)
    split = lambda name: {
        "labels": TensorOf("int", (name,), low=0, high=10**6),
        **{layer: rows(name, c) for layer, c in letters.items()},
    }
    held = {name: {"labels": s.labels, **s.features} for name, s in splits.items()}
    require(held, {"train": split("M"), "val?": split("Q")}, where, dims)
    if not layers or not len(splits["train"].labels):
        raise BadInput(f"{where}: it is empty")


_PERCENT = Number(0, 100)
_ROW = {"dim?": (COUNT, None), "top1": _PERCENT}
_KNN = {"feature?": str, "k?": COUNT, "T?": float, **_ROW}
_LINEAR = {
    "layer?": str,
    "lr?": float,
    "top5?": _PERCENT,
    "held_out_top1?": (_PERCENT, None),
    "best_top1_of_all_epochs?": (_PERCENT, None),
    "chosen?": bool,
    **_ROW,
}
_SHAPE = {
    "results?": [_KNN],
    "classifiers?": [_LINEAR],
    "sha256?": str,
    "encoder?": {"key", "query"},
    "dataset?": str,
    "protocol?": str,
    "earlier?": [dict],
    ...: object,
}


def read_results(path: str | Path, flag: str = "") -> dict:
    """results.json of main_knn.py or main_lincls.py. Raises BadInput."""
    return read_json(path, _SHAPE, flag, "results.json of main_knn.py or main_lincls.py")


# ---- results.json --------------------------------------------------------------------------------

RESULTS = "results.json"
HEAD = '{\n "command": ['  # how the file begins, also one that an older version left half-written
MEASURED = ("results", "classifiers", "few_labels", "seconds", "earlier")


def require_own(folder: str | Path, rows: str) -> None:
    """Raise BadInput where the results.json of `folder` is not one with results under `rows`:
    another script's, or anybody's.
    """
    files.require_ours(Path(folder) / RESULTS, lambda path: _read(path, rows) is not None, "--out")


def _read(path: Path, rows: str) -> dict | None:
    """What is in a results.json of ours; {} if it was cut off, None for any other file."""
    try:
        text = files.read_text(path)
        found = json.loads(text)
    except BadInput:
        return None
    except (ValueError, RecursionError):
        return {} if text[: len(HEAD)] == HEAD[: len(text)] else None
    earlier = found.get("earlier", []) if isinstance(found, dict) else None
    return found if isinstance(earlier, list) and isinstance(found.get(rows), list) else None


def write_results(folder: str | Path, rows: str, results: dict) -> list[str]:
    """Write results.json, whole or not at all, with the command that made it; returns what is to be
    said.

    rows: the name in `results` under which the figures are. Figures that are there already are
    replaced where all else is the same (command, checkpoint, data); the others are kept under
    `earlier`, the first ones first. A file that was cut off is kept as results.json.torn. Raises
    BadInput for a results.json of somebody else, RunFailed where it cannot be written.
    """
    path, said = Path(folder) / RESULTS, []
    results = {"command": sys.argv, **results}
    require_own(folder, rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = _read(path, rows) if path.exists() else None
        if before == {}:
            torn = path.with_name(f"{RESULTS}.torn")
            os.replace(path, torn)
            said.append(
                f"=> warning: '{path}' had been cut off and cannot be read; it is now '{torn.name}'"
            )
        elif before is not None:
            earlier = before.pop("earlier", [])
            if _setting(before) != _setting(json.loads(json.dumps(results))):
                earlier.append(before)
                said.append(
                    f"=> the results of '{before.get('pretrained')}' that '{path}' held are kept in"
                    ' it, under "earlier"'
                )
            results |= {"earlier": earlier} if earlier else {}
        files.write_text(json.dumps(results, indent=1) + "\n", path)
    except OSError as error:
        raise RunFailed(f"cannot write '{path}': {error.strerror}") from error
    return [files.shown(line) for line in (*said, f"=> written to {path}")]


def _setting(results: dict) -> dict:
    """All but what was measured."""
    return {name: value for name, value in results.items() if name not in MEASURED}


def accuracy(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    """Per cent of equal entries."""
    return 100 * (predictions == labels).double().mean().item()


def table(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    """Columns of text, right-aligned but for the first; floats with two decimals."""
    cells = [
        [f"{c:.2f}" if isinstance(c, float) else "" if c is None else str(c) for c in row]
        for row in rows
    ]
    cells.insert(0, list(header))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        for row in cells
    )
