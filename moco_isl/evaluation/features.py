"""Features of the splits of a labelled data set: taken once, each image exactly once, kept in a file, used again.

Letters: M images of a split, C numbers of a layer.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moco_isl import checkpoint, data, dist
from moco_isl.encoders import extract_features
from moco_isl.errors import BadInput, RunFailed


@dataclass
class Split:
    """features: layer -> [M, C]; labels int64 [M], on the same device."""

    features: dict[str, torch.Tensor]
    labels: torch.Tensor


def labelled(name: str, root: str | None, split: str, download: bool = False):
    """The split of a data set, with labels and classes. Raises BadInput where it has none."""
    dataset = data.build_dataset(name, root, split, download)
    if dataset.labels is None:
        raise BadInput(
            f"the {split} images in '{root}' have no labels: expected a folder a class, as in {split}/dog/1.jpg"
        )
    return dataset


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
) -> Split:
    """Features of a data set by an encoder that answers with a dict (`encoders.Taps`); each rank takes its share.

    watch(batches, most a rank): gives the batches on, and may end the pass on all ranks (`signals.Stop.watch`).
    """
    M = len(dataset)
    loader = data.eval_loader(
        dataset, transform=transform, batch_size=batch_size, workers=workers, device=device, shard=dist.shard(M)
    )
    most = -(-M // dist.world_size())  # images of the rank with the most of them
    batches = watch(loader, -(-most // batch_size)) if watch is not None else loader
    try:
        features = extract_features(encoder, batches, M, device, normalize=normalize, amp=amp)
        for _, path in loader.bad_images():
            print(f"=> warning: {path} cannot be read; the next image stands in for it", flush=True)
    finally:
        loader.close()
    return Split(features, dataset.labels.to(device))


def fingerprint(path: str | Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def save(path: str | Path, splits: dict[str, Split], metadata: dict[str, str]) -> None:
    """Keep the features of all splits in one safetensors file, whole or not at all. Raises RunFailed."""
    from safetensors.torch import save_file

    tensors = {f"{name}.{layer}": t.cpu().contiguous() for name, s in splits.items() for layer, t in s.features.items()}
    tensors |= {f"{name}.labels": s.labels.cpu() for name, s in splits.items()}
    path = Path(path)
    temporary = path.with_name(path.name + checkpoint.TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(path)
    except Exception as error:  # safetensors has an error of its own for a full disk
        temporary.unlink(missing_ok=True)
        raise RunFailed(f"cannot write features to '{path}': {error}") from error


def load(path: str | Path, expected: dict[str, str], device: torch.device) -> tuple[dict[str, Split], dict[str, str]]:
    """(splits, metadata) of a file that `save` wrote. Raises BadInput if it is none, or not of what `expected` says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"cannot read features from '{path}': {error}; remove it to have them taken anew") from error
    names = sorted({name.partition(".")[0] for name in tensors})
    if "train" not in names or any(f"{name}.labels" not in tensors for name in names):
        raise BadInput(f"'{path}' holds no features of this project's; remove it, or give --features another name")
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise BadInput(
                f"'{path}' holds features with {key} {metadata.get(key)}, here it is {value}: "
                "remove it to have them taken anew, or give --features another name"
            )
    splits = {}
    for name in names:
        rows = {n.removeprefix(f"{name}."): t.to(device) for n, t in tensors.items() if n.startswith(f"{name}.")}
        splits[name] = Split(labels=rows.pop("labels"), features=rows)
    return splits, metadata


def write_json(path: str | Path, results: dict) -> Path:
    """Write results, with the command that made them; returns the path. Raises RunFailed."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"command": sys.argv, **results}, indent=1) + "\n")
    except OSError as error:
        raise RunFailed(f"cannot write '{path}': {error.strerror}") from error
    return path


def accuracy(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    """Per cent of equal entries."""
    return 100 * (predictions == labels).double().mean().item()


def table(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    """Columns of text, right-aligned but for the first; floats with two decimals."""
    cells = [[f"{c:.2f}" if isinstance(c, float) else "" if c is None else str(c) for c in row] for row in rows]
    cells.insert(0, list(header))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in cells
    )
