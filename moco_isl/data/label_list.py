"""A list of a few labelled images, by which a round of mining measures its estimate.

Letters: M images.
"""

import os
import re

import torch
from torch.utils.data import Dataset

from moco_isl.data.datasets import names_below
from moco_isl.errors import BadInput
from moco_isl.files import named, read_text, short

FEWEST = 100  # images that a list has to name


def read_labels(path: str, images: Dataset, whole: Dataset, flag: str) -> torch.Tensor:
    """The labels [M] of `images` that a file names, -1 of all others.

    A line is the name of an image and its label, with a comma, a tab or a space between them; empty
    lines and those that begin with # are left out. A label is any text. A name is the path below
    the folder of the images, or the position of an image that has no file. whole: the data set that
    `images` are part of; names of its other images are allowed. Raises BadInput.
    """
    of = named(flag, path)
    text = read_text(path, flag, "a text file, a line an image: its name and its label")
    known = _by_name(whole)
    place = {name: i for i, name in enumerate(_names(images))}
    given: dict[str, str] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, label = _parts(line)
        if not label:
            raise BadInput(
                f"{of}, line {number}: '{short(line)}' has no label: expected the name of an image,"
                " a comma and its label"
            )
        image = _find(name, known)
        if image is None:
            raise BadInput(
                f"{of}, line {number}: no image is named '{short(name)}': expected a path such as"
                f" '{short(next(iter(known)))}'"
            )
        if given.setdefault(image, label) != label:
            raise BadInput(
                f"{of}, line {number}: '{short(name)}' has the labels '{short(given[image])}' and"
                f" '{short(label)}': expected one"
            )
    labels = {image: label for image, label in given.items() if image in place}
    if len(labels) < FEWEST:
        raise BadInput(
            f"{of} names {len(labels)} of the training images: expected at least {FEWEST}, drawn by"
            " chance; a few hundred measure well"
        )
    classes = {label: i for i, label in enumerate(sorted(set(labels.values())))}
    if len(classes) < 2:
        raise BadInput(f"{of} has one label alone, '{short(next(iter(classes)))}': expected two")
    found = torch.full((len(images),), -1)
    for image, label in labels.items():
        found[place[image]] = classes[label]
    return found


def _parts(line: str) -> tuple[str, str]:
    """(name, label) of a line; the label is what follows the last comma, tab or else space."""
    for mark in (",", "\t", " "):
        if mark in line:
            name, _, label = line.rpartition(mark)
            return name.strip().strip('"'), label.strip().strip('"')
    return line, ""


def _names(images: Dataset) -> list[str]:
    return [images.path(i) for i in range(len(images))]


def _by_name(images: Dataset) -> dict[str, str]:
    """Path of each image below the folder of all, or its position -> its whole path."""
    paths = _names(images)
    ends = [re.fullmatch(r"(.*)\[\d+\]", path) for path in (min(paths), max(paths))]
    if all(ends) and ends[0][1] == ends[1][1]:
        return {re.search(r"\[(\d+)\]$", path)[1]: path for path in paths}
    return dict(zip(names_below(images), paths))


def _find(name: str, known: dict[str, str]) -> str | None:
    """The whole path of an image by its name, which may have folders in front."""
    parts = os.path.normpath(name).split(os.sep)
    ends = (os.sep.join(parts[start:]) for start in range(len(parts)))
    return next((known[end] for end in ends if end in known), None)
