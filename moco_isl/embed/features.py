"""Features with their names, and the files they are written into.

Letters: M images, C features of an image, k nearest others.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from moco_isl import files
from moco_isl.errors import BadInput, RunFailed, missing_package

_NAMED = 8  # classes that __str__ names


@dataclass(repr=False)
class Features:
    """What `moco_isl.embed` gives: a row for each image that could be read.

    names: of the images. features: float32 [M, C]. labels: int64 [M], -1 for none, or None.
    classes: a name for each label, or None. nearest: int64 [M, k], the rows of each image's most
    similar others, the most similar first; similarity: float32 [M, k], their cosines; both None
    where they were not asked for. about: where all of it comes from, plain values.
    """

    names: list[str]
    features: torch.Tensor
    labels: torch.Tensor | None = None
    classes: list[str] | None = None
    nearest: torch.Tensor | None = None
    similarity: torch.Tensor | None = None
    about: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def class_names(self) -> list[str | None]:
        """The name of each image's class, None for none."""
        if self.labels is None:
            return [None] * len(self)
        names = self.classes or []
        text = lambda i: names[i] if i < len(names) else str(i)
        return [None if i < 0 else text(i) for i in self.labels.tolist()]

    def __str__(self) -> str:
        about = self.about
        lines = [
            f"{len(self):,} images, {self.features.shape[1]} features each: {about.get('layer')} of"
            f" {about.get('file')} ({about.get('arch')}, {about.get('image_size')} pixels)"
        ]
        if self.labels is not None:
            counts = Counter(name for name in self.class_names() if name is not None)
            shown = [f"{name} {n:,}" for name, n in list(counts.items())[:_NAMED]]
            more = ", ..." if len(counts) > _NAMED else ""
            lines.append(f"{len(counts)} classes: {', '.join(shown)}{more}")
        if self.nearest is not None:
            lines.append(f"the {self.nearest.shape[1]} nearest others of each image")
        if left := about.get("left_out"):
            lines.append(f"{len(left)} unreadable images are left out: {', '.join(left[:3])}")
        return "\n".join(lines)

    __repr__ = __str__


# ---- files ---------------------------------------------------------------------------------------


def check_out(path: Path, flag: str = "--out") -> None:
    """Raise BadInput unless the file can be written: by its ending, and nothing is there."""
    if path.suffix not in _WRITERS:
        raise BadInput(
            f"{files.named(flag, path)} ends in '{files.shown(path.suffix)}': expected one of"
            f" {', '.join(_WRITERS)}"
        )
    for written in (path, *_beside(path)):
        require_new(written, flag)
    if path.suffix == ".parquet":
        _pyarrow()


def require_new(path: Path, flag: str) -> None:
    """Raise BadInput where something is at the path."""
    found = files.kind(path, flag)
    if found == "folder":
        raise BadInput(f"{files.named(flag, path)} is a folder: name the file to write")
    if found:
        raise BadInput(
            f"{files.named(flag, path)} is there already and is not written over: name another"
            " file, or remove it first"
        )


def _beside(path: Path) -> list[Path]:
    """What is written beside a file: what is known about a CSV, which has no room for it."""
    return [path.with_name(path.name + ".json")] if path.suffix == ".csv" else []


def write(found: Features, path: Path) -> None:
    """Write the features, whole or not at all; the ending says the format. Raises RunFailed."""
    temporary = path.with_name(path.name + files.TEMPORARY)
    try:
        for beside in _beside(path):
            files.write_text(json.dumps(found.about, indent=1) + "\n", beside)
        with files.replacing(path, temporary):
            _WRITERS[path.suffix](found, temporary)
    except Exception as error:  # the libraries have errors of their own for a full disk
        raise RunFailed(f"cannot write {files.named('', path)}: {error}") from error


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_package("--out FILE.parquet", "pyarrow", "'moco_isl[embed]'") from None
    return pyarrow


def _parquet(found: Features, path: Path) -> None:
    """Columns name, label, class, feature, nearest (names), nearest_similarity."""
    pa = _pyarrow()
    lists = lambda values, n: pa.FixedSizeListArray.from_arrays(pa.array(values), n)
    columns = {"name": pa.array(found.names, pa.string())}
    if found.labels is not None:
        labels = found.labels.numpy()
        columns["label"] = pa.array(labels, mask=labels < 0)
        columns["class"] = pa.array(found.class_names(), pa.string())
    C = found.features.shape[1]
    columns["feature"] = lists(found.features.numpy().ravel(), C)
    if found.nearest is not None:
        k = found.nearest.shape[1]
        names = np.array(found.names, object)[found.nearest.numpy().ravel()]
        columns["nearest"] = lists(pa.array(names, pa.string()), k)
        columns["nearest_similarity"] = lists(found.similarity.numpy().ravel(), k)
    table = pa.table(columns, metadata={"moco_isl": json.dumps(found.about)})
    pa.parquet.write_table(table, path)


def _csv(found: Features, path: Path) -> None:
    """Columns name, label, class, f0 ..., nearest1 ... (names), nearest_similarity1 ..."""
    C = found.features.shape[1]
    k = 0 if found.nearest is None else found.nearest.shape[1]
    header = ["name", *([] if found.labels is None else ["label", "class"])]
    header += [f"f{i}" for i in range(C)]
    header += [f"nearest{i + 1}" for i in range(k)]
    header += [f"nearest_similarity{i + 1}" for i in range(k)]
    classes = found.class_names()
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(header)
        for i, name in enumerate(found.names):
            row = [name]
            if found.labels is not None:
                label = int(found.labels[i])
                row += ["" if label < 0 else label, classes[i]]
            row += list(map(str, found.features[i].numpy()))  # the shortest that reads as the same
            if k:
                row += [found.names[j] for j in found.nearest[i].tolist()]
                row += list(map(str, found.similarity[i].numpy()))
            rows.writerow(row)


def _npz(found: Features, path: Path) -> None:
    """Arrays names, features, labels, classes, nearest (rows), nearest_similarity, about (JSON)."""
    arrays = {"names": np.array(found.names, str), "features": found.features.numpy()}
    arrays |= {name: tensor.numpy() for name, tensor in _more(found).items()}
    if found.classes is not None:
        arrays["classes"] = np.array(found.classes, str)
    arrays["about"] = np.array(json.dumps(found.about))
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def _safetensors(found: Features, path: Path) -> None:
    """As npz; names are bytes, one a line; classes and the rest are in the metadata, as JSON."""
    from safetensors.torch import save_file

    names = bytearray("\n".join(found.names).encode())
    tensors = {
        "names": torch.frombuffer(names, dtype=torch.uint8),
        "features": found.features.contiguous(),
        **_more(found),
    }
    about = {name: json.dumps(value) for name, value in found.about.items()}
    about |= {"classes": json.dumps(found.classes)} if found.classes is not None else {}
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=about)
    path.chmod(mode)  # the library makes files that only their owner may read


def _more(found: Features) -> dict[str, torch.Tensor]:
    more = {
        "labels": found.labels,
        "nearest": found.nearest,
        "nearest_similarity": found.similarity,
    }
    return {name: tensor.contiguous() for name, tensor in more.items() if tensor is not None}


_WRITERS: dict[str, Callable[[Features, Path], None]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".npz": _npz,
    ".safetensors": _safetensors,
}
