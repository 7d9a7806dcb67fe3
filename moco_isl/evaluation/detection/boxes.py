"""Images with boxes around their objects, in Pascal VOC's layout or in COCO's, read and checked.

Boxes are (x1, y1, x2, y2) in pixels, x2 and y2 behind the last pixel. n: objects of an image, M:
images of a split.
"""

import difflib
import json
import os
import re
import xml.etree.ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from moco_isl import files
from moco_isl.data import decode
from moco_isl.errors import BadInput
from moco_isl.files import named, short

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike"
    " person pottedplant sheep sofa train tvmonitor"
).split()
VOC_PARTS = ("Annotations", "ImageSets", "JPEGImages")
EXPECTED = (
    "expected VOCdevkit with VOC2007 and VOC2012, one such folder (Annotations, JPEGImages,"
    " ImageSets/Main), or COCO's annotations/instances_NAME.json beside its images"
)
_OVER = 1.0  # pixels by which a box may overstep its image: it is cut off


@dataclass
class Boxed:
    """An image and its objects.

    image: where it is, a file's path. boxes float32 [n, 4], labels int64 [n] from 0 on. difficult
    bool [n]: VOC's, which evaluation passes over. crowd bool [n]: COCO's regions of many objects,
    which are not trained on either.
    """

    image: str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray


@dataclass
class BoxedImages:
    """A split: M images and the names of the classes. source: what it is, in messages."""

    rows: list[Boxed]
    classes: list[str]
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, i: int) -> Image.Image:
        """Image i as RGB. Raises what PIL raises on a file that it cannot read."""
        return decode(self.rows[i].image)

    def path(self, i: int) -> str:
        return self.rows[i].image

    @property
    def objects(self) -> int:
        return sum(len(row.boxes) for row in self.rows)

    def part(self, rows: Sequence[int]) -> "BoxedImages":
        """The same split with these of its images."""
        return type(self)([self.rows[i] for i in rows], self.classes, self.source)

    def at_most(self, n: int) -> "BoxedImages":
        """n of the images, spread evenly over the split; 0: all."""
        M = len(self)
        return self.part([i * M // n for i in range(n)]) if 0 < n < M else self

    def with_objects(self) -> "BoxedImages":
        """The images that have an object to train on."""
        return self.part([i for i, row in enumerate(self.rows) if not row.crowd.all()])


def read(
    root: str, split: str | None, train: BoxedImages | None = None, most_bad: int = 0
) -> BoxedImages:
    """A split of the data in a folder. Raises BadInput with what is wrong.

    split: see `DetectionOptions.train`; None: what MoCo trains on, or tests on where `train` is
    given. train: the split that says the classes. most_bad: so many boxes without an area, or
    outside of their image, are left out.
    """
    if files.kind(root, "--data") != "folder":
        raise BadInput(f"{named('--data', root)} is no folder: {EXPECTED}; or --data digits")
    given = Split(Path(root), split, "--test" if train else "--train", train, most_bad)
    found = (
        _read_coco(given) if _is_coco(given.root, split) else _read_voc(given, *_voc_folders(given))
    )
    if not found.rows:
        raise BadInput(f"{found.source} names no image: expected some; choose another {given.flag}")
    return found


@dataclass
class Split:
    """What is to be read, and the boxes that were found to be bad."""

    root: Path
    name: str | None
    flag: str  # that names the split
    train: BoxedImages | None
    most_bad: int
    bad: list[str] = field(default_factory=list)

    def label(self, name: str, known: dict[str, int], where: str) -> int:
        """The number of a class. Raises BadInput where it is not known."""
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            of = "of VOC's 20 classes" if list(known) == VOC_CLASSES else "a class of --train"
            raise BadInput(f"{where}: '{short(name)}' is not {of}{hint}; correct the name")
        return known[name]

    def box(self, box: list[float], width: int, height: int, where: str) -> list[float] | None:
        """The box, cut to its image; None where it is bad. Raises BadInput past --max-bad-boxes."""
        x1, y1, x2, y2 = box
        fault = ""
        if not all(np.isfinite(box)) or x2 <= x1 or y2 <= y1:
            fault = "has no area"
        elif min(x1, y1) < -_OVER or x2 > width + _OVER or y2 > height + _OVER:
            fault = f"lies outside of its image of {width} x {height} pixels"
        cut = [max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))]
        if not fault and (cut[2] <= cut[0] or cut[3] <= cut[1]):
            fault = "has no area inside of its image"
        if not fault:
            return cut
        self.bad.append(f"{where}: box {' '.join(f'{x:g}' for x in box)} {fault}")
        return None

    def require_sound(self) -> None:
        """Raise BadInput where there are more bad boxes than are left out."""
        if len(self.bad) > self.most_bad:
            n = len(self.bad)
            raise BadInput(
                f"{self.bad[0]} (the first of {n} bad boxes): correct {'it' if n == 1 else 'them'},"
                f" or leave {'it' if n == 1 else 'them'} out with --max-bad-boxes {n}"
            )


def _boxed(image: str, size: tuple[int, int], objects: list[tuple]) -> Boxed:
    """objects: (box, label, difficult, crowd) of each."""
    boxes, labels, difficult, crowd = zip(*objects) if objects else ((), (), (), ())
    return Boxed(
        image,
        *size,
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(difficult, dtype=bool),
        np.array(crowd, dtype=bool),
    )


class _Images:
    """Which image files are in a folder; its names are listed once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = set(os.listdir(folder)) if folder.is_dir() else set()

    def require(self, name: str, where: str) -> str:
        path = self.folder / name
        try:
            is_there = name in self.names or ("/" in name and path.is_file())
        except OSError:  # a name that is too long
            is_there = False
        if not is_there:
            raise BadInput(f"{where}: its image {named('', path)} is missing: expected all images")
        return str(path)


# ---- Pascal VOC ----------------------------------------------------------------------------------


def _voc_folders(given: Split) -> tuple[list[Path], str]:
    """The folders of a split, and its set, such as trainval. Raises BadInput."""
    there = {
        path.resolve().name: path
        for base in (given.root, given.root / "VOCdevkit")
        for path in (base, *(sorted(base.iterdir()) if base.is_dir() else ()))
        if path.is_dir() and any((path / part).is_dir() for part in VOC_PARTS)
    }
    if not there:
        raise BadInput(f"{named('--data', given.root)} holds no data set known here: {EXPECTED}")
    default = "test" if given.train else "trainval"
    if len(there) > 1:
        default = f"2007:{default}" if given.train else f"2007+2012:{default}"
    years, _, of = (given.name or default).rpartition(":")
    if not years and len(there) > 1:
        raise BadInput(
            f"{given.flag} {short(of)} names no folder, and there are {', '.join(sorted(there))}:"
            f" write it as in {default}"
        )
    folders = []
    for year in years.split("+") if years else there:
        path = there.get(year) or there.get(f"VOC{year}")
        if path is None:
            asked = given.flag if given.name else f"{given.flag}, by default {default},"
            raise BadInput(
                f"{asked} names {short(year)}, and {named('--data', given.root)} has"
                f" {', '.join(sorted(there))}: name the folders there are, as in 2007:{of}"
            )
        folders.append(path)
    return folders, of


def _read_voc(given: Split, folders: list[Path], of: str) -> BoxedImages:
    source = "+".join(folder.name for folder in folders) + f":{of}"
    found = []  # (image, size, [(box, name, difficult)], file)
    for folder in folders:
        for part in VOC_PARTS:
            if not (folder / part).is_dir():
                raise BadInput(f"{named('--data', folder)} has no folder {part}: {EXPECTED}")
        images = _Images(folder / "JPEGImages")
        for name in _voc_names(folder, of, given.flag):
            found.append(_voc_image(given, folder, name, images))
    given.require_sound()
    if given.train:
        classes = given.train.classes
    elif all(re.fullmatch(r"VOC20\d\d", folder.name) for folder in folders):
        classes = VOC_CLASSES
    else:
        classes = sorted({name for *_, objects, _ in found for _, name, _ in objects})
    known = {name: i for i, name in enumerate(classes)}
    rows = []
    for image, size, objects, file in found:
        number = lambda name: given.label(name, known, named("", file))
        rows.append(_boxed(image, size, [(b, number(n), hard, False) for b, n, hard in objects]))
    return BoxedImages(rows, list(classes), source)


def _voc_names(folder: Path, of: str, flag: str) -> list[str]:
    """The names of the images of a set."""
    sets = folder / "ImageSets" / "Main"
    path = sets / f"{of}.txt"
    if not path.is_file():
        there = sorted(p.stem for p in sets.glob("*.txt") if "_" not in p.stem)
        raise BadInput(
            f"{named('', path)} is missing: expected the list of the images of {flag};"
            f" there {'are ' + ', '.join(there) if there else 'is none'}"
        )
    lines = files.read_text(path, expected="a list of images").split("\n")
    return [line.split()[0] for line in lines if line.strip()]


def _voc_image(given: Split, folder: Path, name: str, images: _Images) -> tuple:
    """(image, (width, height), [(box, class's name, difficult)], file) of one annotation."""
    path = folder / "Annotations" / f"{name}.xml"
    where = named("", path)
    try:
        root = xml.etree.ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise BadInput(f"{where} is missing: expected an annotation for each image") from None
    except (xml.etree.ElementTree.ParseError, LookupError, ValueError, OSError) as error:
        raise BadInput(f"{where} cannot be read ({error}): expected VOC's XML") from error
    usual = f"{name}.jpg"
    other = root.findtext("filename") or usual  # of many tools' files it is no name of a file
    image = images.require(usual if usual in images.names else other, where)
    try:
        size = int(root.findtext("size/width") or 0), int(root.findtext("size/height") or 0)
        size = size if min(size) > 0 else _size_of(image, where)
        objects = []
        for one in root.iter("object"):
            at = [float(one.find("bndbox").findtext(x)) for x in ("xmin", "ymin", "xmax", "ymax")]
            # VOC counts pixels from 1, and the last one belongs to the box
            box = given.box([at[0] - 1, at[1] - 1, at[2], at[3]], *size, where)
            if box is not None:
                hard = (one.findtext("difficult") or "0").strip() == "1"
                objects.append((box, (one.findtext("name") or "").strip(), hard))
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"{where} has an object without a bndbox of four numbers, or a size that is none:"
            " expected VOC's XML"
        ) from error
    return image, size, objects, path


def _size_of(path: str, where: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # PIL answers a broken file with almost any exception
        raise BadInput(f"{where}: its image {named('', path)} cannot be read") from error


# ---- COCO ----------------------------------------------------------------------------------------


def _is_coco(root: Path, split: str | None) -> bool:
    if split and split.endswith(".json"):
        return True
    return any((root / "annotations").glob("*.json")) and not (root / "ImageSets").is_dir()


def _read_coco(given: Split) -> BoxedImages:
    name = given.name or ("val2017" if given.train else "train2017")
    of = name if name.endswith(".json") else f"annotations/instances_{name}.json"
    path = given.root / of
    where = named("", path)
    content = _coco_json(path, given.flag)
    try:
        categories = {one["id"]: str(one["name"]) for one in content["categories"]}
        images = {one["id"]: one for one in content["images"]}
        sizes = {i: (int(one["width"]), int(one["height"])) for i, one in images.items()}
        names = {i: str(one["file_name"]) for i, one in images.items()}
    except KeyError as error:
        raise BadInput(
            f"{where} has an image or a category without its {error}: expected COCO's format"
        ) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise BadInput(
            f"{where} has an image or a category whose id, size or name is none ({error}): expected"
            " COCO's format"
        ) from error
    for what, found in (("images", images), ("categories", categories)):
        if len(found) < len(content[what]):
            raise BadInput(f"{where} has two {what} of one id: expected an id of its own for each")
    if len(set(categories.values())) < len(categories):
        raise BadInput(f"{where} has two categories of one name: expected different names")
    classes = given.train.classes if given.train else list(dict.fromkeys(categories.values()))
    known = {name: i for i, name in enumerate(classes)}
    numbers = {i: given.label(name, known, where) for i, name in categories.items()}
    objects: dict = {i: [] for i in images}
    for k, one in enumerate(content["annotations"]):
        at = f"{where}, annotation {k}"
        try:
            i, category = one["image_id"], one["category_id"]
            hash((i, category))
            if isinstance(one["bbox"], str):
                raise ValueError("a text")
            x, y, w, h = map(float, one["bbox"])
            crowd = bool(one.get("iscrowd", 0))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BadInput(
                f"{at}, has no image_id, category_id or bbox of four numbers: expected COCO's"
                " format"
            ) from error
        if i not in images:
            raise BadInput(f"{at}: image_id {short(str(i))} is not among its images; correct it")
        if category not in numbers:
            raise BadInput(
                f"{at}: category_id {short(str(category))} is not among its {len(numbers)}"
                " categories; correct it"
            )
        box = given.box([x, y, x + w, y + h], *sizes[i], at)
        if box is not None:
            objects[i].append((box, numbers[category], False, crowd))
    given.require_sound()
    there = _coco_folder(given.root, path, name, next(iter(names.values()), ""))
    file = lambda i: there.require(names[i], where)
    rows = [_boxed(file(i), sizes[i], objects[i]) for i in images]
    return BoxedImages(rows, classes, of)


def _coco_json(path: Path, flag: str) -> dict:
    expected = "the annotations of COCO: images, annotations, categories"
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.json"))
        raise BadInput(
            f"{flag}: {named('', path)} is missing: expected {expected};"
            f" there {'are ' + ', '.join(there[:4]) if there else 'is no .json'}"
        )
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"{named('', path)} cannot be read ({error}): expected {expected}"
        ) from error
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(x), list) for x in parts):
        raise BadInput(f"{named('', path)} is no such file: expected {expected}")
    return content


def _coco_folder(root: Path, path: Path, name: str, first: str) -> _Images:
    """The folder of a split's images: the first one that has the first image."""
    stem = Path(name).stem.removeprefix("instances_")
    folders = [root / stem, root / "images" / stem, root / "images", path.parent, root]
    found = next((folder for folder in folders if (folder / first).is_file()), folders[0])
    return _Images(found)
