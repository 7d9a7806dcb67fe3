"""Grids of images: the same anchors with their positives over the rounds (the paper's Figure 5).

Several runs stand side by side.

Letters: M images, E directed edges.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from moco_isl.data.datasets import SMALL
from moco_isl.report.runs import Record, Run

Tensor = torch.Tensor

ANCHORS = 6  # anchors in a grid
SHOWN = 8  # positives of an anchor
PHOTO = 96  # side of a thumbnail of a photo


@dataclass
class Cell:
    """An image of a grid. wrong: whether its class differs from the anchor's; None: not known."""

    index: int
    source: str
    text: str
    wrong: bool | None = None


@dataclass
class Row:
    """Positives of an anchor after a round, or (round None) its nearest images."""

    round: int | None
    cells: list[Cell]
    size: int  # how many positives the whole set has


@dataclass
class Grid:
    """anchors: (its image, for every run its rows in the order of its rounds)."""

    title: str
    text: str
    runs: list[str]
    anchors: list[tuple[Cell, list[list[Row]]]] = field(default_factory=list)


class Album:
    """Images of a data set as data URIs, each made once.

    labels: those to show and to judge by, or None.
    """

    def __init__(self, dataset, labels: Tensor | None):
        self.dataset, self.labels = dataset, labels
        self._made: dict[int, str] = {}

    def cell(self, i: int, anchor: int | None = None, text: str = "") -> Cell:
        parts, wrong = [f"image {i}"], None
        if self.labels is not None and (label := int(self.labels[i])) >= 0:
            classes = self.dataset.classes
            parts.append(f"class {classes[label] if classes else label}")
            if anchor is not None and int(self.labels[anchor]) >= 0:
                wrong = label != int(self.labels[anchor])
        return Cell(i, self.source(i), ", ".join([*parts, *([text] if text else [])]), wrong)

    def source(self, i: int) -> str:
        if i not in self._made:
            self._made[i] = data_uri(self.dataset, i)
        return self._made[i]


def data_uri(dataset, i: int) -> str:
    """Image i: as it is (PNG) up to 64 pixels, otherwise its middle square as a thumbnail (JPEG).

    A grey square stands for an image that cannot be read.
    """
    try:
        image = dataset.image(i)
    except Exception:  # PIL answers a broken file with almost any exception
        image = Image.new("RGB", (32, 32), (128, 128, 128))
    if isinstance(image, Tensor):
        image = Image.fromarray(np.ascontiguousarray(_shown(image).permute(1, 2, 0).numpy()))
    buffer = io.BytesIO()
    small = max(image.size) <= SMALL
    if small:
        image.save(buffer, "PNG", optimize=True)
    else:
        side = min(image.size)
        left = (image.width - side) // 2
        top = (image.height - side) // 2
        square = (left, top, left + side, top + side)
        thumbnail = image.resize((PHOTO, PHOTO), Image.Resampling.LANCZOS, square)
        thumbnail.save(buffer, "JPEG", quality=80)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _shown(image: Tensor) -> Tensor:
    """An image [c, H, W] as RGB to look at, uint8 [3, H, W].

    Of RGB of 8 bits it is the image; of any other its first three channels, or of less than three
    the first, from the least to the largest value of each.
    """
    if image.dtype == torch.uint8 and len(image) == 3:
        return image
    image = image[: 3 if len(image) > 2 else 1].float()
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    image = (image - low) / (high - low).clamp(min=1e-9) * 255
    return image.round().to(torch.uint8).expand(3, -1, -1)


def choose(record: Record, labels: Tensor | None, n: int = ANCHORS) -> dict[str, list[int]]:
    """Anchors of each grid by this round's sets: random, surest, least, and with labels mistakes.

    A grid without any is left out.
    """
    sets = record.sets
    src, dst = sets.sources(), sets.members.long()
    with_any = record.anchors[sets.sizes()[record.anchors] > 0]
    shuffled = with_any[torch.randperm(len(with_any), generator=torch.Generator().manual_seed(0))]
    chosen = {
        "random": shuffled[:n].sort().values.tolist(),
        "surest": _walk(src, dst, sets.sureness, n),
        "least": _walk(src, dst, -sets.sureness, n),
    }
    if labels is not None:
        wrong = (labels[src] != labels[dst]) & (labels[src] >= 0) & (labels[dst] >= 0)
        chosen["mistakes"] = _walk(src[wrong], dst[wrong], sets.sureness[wrong], n)
    return {kind: anchors for kind, anchors in chosen.items() if anchors}


def _walk(src: Tensor, dst: Tensor, value: Tensor, n: int) -> list[int]:
    """The first n sources by falling value, but none that stood in an earlier pair.

    A pair and its way back would show the same images.
    """
    best = value.sort(descending=True, stable=True).indices[:2000]
    chosen, seen = [], set()
    for a, b in zip(src[best].tolist(), dst[best].tolist()):
        if a not in seen and b not in seen:
            chosen.append(a)
        seen |= {a, b}
        if len(chosen) == n:
            break
    return chosen


def build_grids(
    runs: Sequence[Run],
    album: Album,
    rounds_shown: int = 4,
    chosen: dict[str, list[int]] | None = None,
) -> list[Grid]:
    """Grids of runs that count the same images.

    chosen: the anchors of each grid, by the names of TITLES; None: by the first run with a round.
    """
    recorded = {run.name: [r for r in run.rounds if r.path.exists()] for run in runs}
    runs = [run for run in runs if recorded[run.name]]
    if not runs:
        return []
    if chosen is None:
        first = recorded[runs[0].name]
        choosing = [round_ for round_ in first if round_.accepted] or first
        chosen = choose(choosing[-1].load(), album.labels)
    names = [run.name for run in runs]
    grids = {
        kind: Grid(*TITLES[kind], names, [(album.cell(i), []) for i in anchors])
        for kind, anchors in chosen.items()
    }
    for run in runs:
        rows = {kind: [[] for _ in anchors] for kind, anchors in chosen.items()}
        shown = pick(recorded[run.name], rounds_shown - (len(runs) > 1))
        for round_ in shown:
            record = round_.load()
            for kind, anchors in chosen.items():
                for i, anchor in enumerate(anchors):
                    rows[kind][i].append(positives_row(record, anchor, round_.number, kind, album))
                    if round_ is shown[-1] and (row := nearest_row(record, anchor, album)):
                        rows[kind][i].append(row)
        for kind, grid in grids.items():
            for (_, columns), of_anchor in zip(grid.anchors, rows[kind]):
                columns.append(of_anchor)
    return list(grids.values())


TITLES = {
    "random": (
        "Random images",
        "Drawn among the images that have positives; the surest positives first.",
    ),
    "surest": (
        "The surest pairs",
        "The pairs that the miner was surest of in its last round; the surest positives first.",
    ),
    "least": (
        "The least sure pairs",
        "The pairs that only just got in; the least sure positives first.",
    ),
    "mistakes": (
        "The worst mistakes",
        "The wrong pairs that the miner was surest of; wrong positives first.",
    ),
}


def pick(items: Sequence, n: int) -> list:
    """At most n of them, evenly spread, with the first and the last."""
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def positives_row(record: Record, anchor: int, number: int, kind: str, album: Album) -> Row:
    """The positives of an anchor in a round, in the order that the grid asks for."""
    edges = list(range(int(record.sets.offsets[anchor]), int(record.sets.offsets[anchor + 1])))
    size, members = len(edges), record.sets.members
    if kind == "least":
        edges = edges[::-1]
    if kind == "mistakes":
        # stable: the surest first in either half
        edges.sort(key=lambda e: int(album.labels[members[e]]) == int(album.labels[anchor]))
    text = lambda e: f"cosine {record.cosine[e]:.2f}, sureness {record.sets.sureness[e]:.2f}"
    return Row(number, [album.cell(int(members[e]), anchor, text(e)) for e in edges[:SHOWN]], size)


def nearest_row(record: Record, anchor: int, album: Album) -> Row | None:
    """The nearest images of an anchor, for comparison; None where they are not known."""
    at = int(torch.searchsorted(record.anchors, anchor))
    if at == len(record.anchors) or int(record.anchors[at]) != anchor:
        return None
    near, cosine = (x[at, :SHOWN].tolist() for x in record.nearest)
    return Row(
        None, [album.cell(i, anchor, f"cosine {c:.2f}") for i, c in zip(near, cosine)], len(near)
    )
