"""Scenes to detect objects in with nothing at hand: the embedded digits at random places and sizes.

A scene is grey, with noise, and holds one to four digits of different sizes and strengths that
hardly overlap; its boxes are those of the ink. The scenes to train on are made of the digits of
train, those to test on of the digits of val, which other people have written. Scene i is a function
of the seed and i. S: side of a scene.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from moco_isl import data
from moco_isl.data.draws import uniforms
from moco_isl.evaluation.detection.boxes import Boxed, BoxedImages

NAME = "digits"
S = 64
TRAIN, TEST = 600, 200  # scenes
SEED = 0  # of the scenes: every run sees the same
_SIDES = (14, 30)  # of a digit, in pixels, with the margin that its image has
_MOST = 4  # digits of a scene
_TRIES = 8  # places that are tried for a digit; it is left out where none is free
_INK = 0.25  # of the full strength: darker pixels do not belong to a digit's box
_OVERLAP = 0.1  # of the smaller one of two boxes


@dataclass
class Scenes(BoxedImages):
    """Scenes in memory; `image` of a row is its number. pixels uint8 [M, S, S]."""

    pixels: np.ndarray | None = None

    def open(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[int(self.rows[i].image)]).convert("RGB")

    def path(self, i: int) -> str:
        return f"scene {self.rows[i].image} of {self.source}"

    def part(self, rows) -> "Scenes":
        return Scenes([self.rows[i] for i in rows], self.classes, self.source, self.pixels)


def make_scenes(split: str, n: int, seed: int = SEED) -> Scenes:
    """n scenes of the digits of a split, train or val."""
    digits = data.build_dataset(NAME, None, split)
    images = digits.images[:, 0].float() / 255  # [M, 16, 16]
    draws = uniforms(seed, 0, torch.arange(n), int(split == "val"), 1 + _MOST * (3 + 2 * _TRIES))
    noise = torch.Generator().manual_seed(seed * 2 + (split == "val"))
    rows = []
    scenes = torch.rand(n, S, S, generator=noise) * 0.25
    for i in range(n):
        objects = _compose(scenes[i], images, draws[i].tolist())
        boxes, chosen = zip(*objects)
        labels = digits.labels[list(chosen)].numpy()
        none = np.zeros(len(labels), dtype=bool)
        rows.append(Boxed(str(i), S, S, np.array(boxes, np.float32), labels, none, none))
    pixels = (scenes.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Scenes(rows, digits.classes, f"{NAME}/{split}", pixels)


def _compose(scene: torch.Tensor, images: torch.Tensor, u: list[float]) -> list[tuple]:
    """Draw digits into a scene [S, S]; (box, row of the digit) of each. u: draws in [0, 1)."""
    count = 1 + int(u[0] * _MOST)
    placed: list[tuple] = []
    for k in range(count):
        of, size, strength, *places = u[1 + k * (3 + 2 * _TRIES) :][: 3 + 2 * _TRIES]
        row = int(of * len(images))
        side = int(_SIDES[0] + size * (_SIDES[1] - _SIDES[0] + 1))
        digit = F.interpolate(images[row][None, None], size=(side, side), mode="bilinear")[0, 0]
        ink = (digit > _INK).nonzero()  # (y, x) of each pixel
        (top, left), (bottom, right) = ink.min(0).values.tolist(), ink.max(0).values.tolist()
        for x, y in zip(places[::2], places[1::2]):
            x, y = int(x * (S - side + 1)), int(y * (S - side + 1))
            box = (x + left, y + top, x + right + 1, y + bottom + 1)
            if all(_shared(box, other) < _OVERLAP for other, _ in placed):
                here = scene[y : y + side, x : x + side]
                torch.maximum(here, digit * (0.5 + 0.5 * strength), out=here)
                placed.append((box, row))
                break
    return placed


def _shared(a: tuple, b: tuple) -> float:
    """The area that two boxes share, as a part of the smaller one."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    return width * height / min(area(a), area(b))
