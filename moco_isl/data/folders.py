"""The images and classes in a folder, what is left out, and warnings about what looks wrong.

Each real folder is read once, however many links lead to it. Files are not opened.
"""

import contextlib
import heapq
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moco_isl.errors import BadInput

# torchvision's, which would take a second to import
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def _kinds_of_images() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(endings of files that are images, formats they may have in PIL's names)."""
    endings = IMG_EXTENSIONS
    formats = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
    try:
        import pillow_heif  # installed by the extra heif
    except ImportError:
        return endings, formats
    pillow_heif.register_heif_opener()
    return (*endings, ".heic", ".heif"), (*formats, "HEIF")


ENDINGS, FORMATS = _kinds_of_images()
# images that the user can convert
_OTHER_IMAGES = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".psd", ".raw", ".tga")
_SPLIT = re.compile(
    r"(train|training|val|valid|validation|test|testing)([-_ ]?(set|split|data|images))?\d*", re.I
)
_ROOT = -1  # stands for the class of images that lie directly in the folder
_NAMED = 5  # names that a message lists


@dataclass
class Layout:
    """What a folder of images, or another source, holds, in words.

    unlabelled: why its images have no labels; '' where they have. parts: of several sources, a line
    each.
    """

    summary: str
    unlabelled: str = ""
    warnings: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)


@dataclass
class Found:
    """The images found in a folder, sorted.

    classes: names of the folders directly in it. images: (position of the class or -1, folder,
    names of the images directly in that folder). skipped: what was left out -> how often.
    """

    root: str
    classes: list[str]
    images: list[tuple[int, str, list[str]]]
    skipped: Counter[str]

    def counts(self) -> Counter:
        """The number of images of each class; of -1 those directly in the folder."""
        counts = Counter()
        for owner, _, names in self.images:
            counts[owner] += len(names)
        return counts

    def paths(self) -> list[str]:
        return [os.path.join(folder, name) for _, folder, names in self.images for name in names]

    def labels(self) -> list[int]:
        """Position of its class for each of `paths`."""
        return [owner for owner, _, names in self.images for _ in names]

    def parts(self) -> dict[int, set[str]]:
        """For each class with images the folders directly in it that hold some; '' for itself."""
        parts = {}
        for owner, folder, _ in self.images:
            if owner != _ROOT:
                below = os.path.relpath(folder, os.path.join(self.root, self.classes[owner]))
                parts.setdefault(owner, set()).add("" if below == "." else below.split(os.sep)[0])
        return parts


def is_split_name(name: str) -> bool:
    """Whether a folder's name is usual for a split, such as Training, valid or test_set."""
    return _SPLIT.fullmatch(name) is not None


def has_image(folder: str | os.PathLike) -> bool:
    """Whether an image lies directly in a folder; False where it may not be read."""
    try:
        with os.scandir(folder) as entries:
            return any(_is_image(entry.name) for entry in entries)
    except OSError:
        return False


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


@contextlib.contextmanager
def arrays_too(wanted: bool) -> Iterator[None]:
    """Files of numpy count as images for what looks for images meanwhile, if wanted."""
    global ENDINGS
    before = ENDINGS
    ENDINGS = (*ENDINGS, ".npy") if wanted else ENDINGS
    try:
        yield
    finally:
        ENDINGS = before


def class_names(root: str) -> list[str]:
    """The names of the class folders in a folder, sorted. Raises BadInput."""
    return [name for name, _, _ in _Reading(root).class_folders()]


def find_images(root: str) -> Found:
    """The images in a folder, at any depth, without hidden files and folders.

    Real folders are read first, then links to folders, those nearest to the root first. A link to a
    folder that has been read is left out. Directly in the root it raises BadInput, since it would
    be a second name of a class.
    """
    reading = _Reading(root)
    classes = reading.class_folders()  # [(name, path, whether it is a link)]
    for owner, (_, path, is_link) in enumerate(classes):
        if not is_link:
            reading.read_tree(path, owner)
        else:
            heapq.heappush(reading.links, (0, path, owner))
    while reading.links:
        depth, path, owner = heapq.heappop(reading.links)
        known = reading.reader_of(path)
        if known is None:
            reading.read_tree(path, owner)
        elif depth == 0:
            raise BadInput(
                f"the class folder {path!r} is a link into the class {classes[known][0]!r}:"
                " expected the images of each class in a folder of its own; remove the link"
            )
        else:
            reading.skipped["repeated folder"] += 1
    return Found(root, [name for name, _, _ in classes], sorted(reading.images), reading.skipped)


class _Reading:
    """What has been read of a folder so far."""

    def __init__(self, root: str):
        self.root = root
        self.images: list[tuple[int, str, list[str]]] = []  # as in Found, in the order of reading
        self.skipped: Counter[str] = Counter()
        # a heap of links to folders, still to be read: depth, path, class
        self.links: list[tuple[int, str, int]] = []
        # (device, inode) of a folder -> the class it was read for
        self.readers: dict[tuple[int, int], int] = {}
        folder = Path(os.path.realpath(root))
        for above in (folder, *folder.parents):  # a link to one of them goes round in a circle
            self.readers[_identity(str(above))] = _ROOT

    def reader_of(self, folder: str) -> int | None:
        """The class that a folder has been read for, if any."""
        return self.readers.get(_identity(folder))

    def class_folders(self) -> list[tuple[str, str, bool]]:
        """(name, path, is a link) of the folders in the root, sorted.

        Images beside them go into .images.
        """
        real, links = self.read_folder(self.root, _ROOT)
        classes = [(os.path.basename(path), path, False) for path in real]
        for path in links:
            if self.reader_of(path) is None:
                classes.append((os.path.basename(path), path, True))
            else:
                self.skipped["repeated folder"] += 1
        return sorted(classes)

    def read_tree(self, top: str, owner: int) -> None:
        """Read a folder and the real folders below it for a class; links go into .links."""
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            identity = _identity(folder)
            if identity in self.readers:
                self.skipped["repeated folder"] += 1
                continue
            self.readers[identity] = owner
            real, links = self.read_folder(folder, owner)
            waiting += real
            for link in links:
                heapq.heappush(self.links, (link.count(os.sep), link, owner))

    def read_folder(self, folder: str, owner: int) -> tuple[list[str], list[str]]:
        """Note the images directly in a folder; (its real folders, its links to folders), paths."""
        real = []
        links = []
        images = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):  # desktops leave ._1.jpg and the like
                        self.skipped["hidden"] += 1
                    elif entry.is_dir(follow_symlinks=False):
                        real.append(entry.path)
                    elif _is_image(entry.name):  # a link too; reading it shows what it is
                        images.append(entry.name)
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        links.append(entry.path)
                    else:
                        self.skipped[_why_skipped(entry, owner)] += 1
        except OSError as error:
            raise _cannot_read(error, folder) from None
        if images:
            self.images.append((owner, folder, sorted(images)))
        return real, links


def _why_skipped(entry: os.DirEntry, owner: int) -> str:
    """What a message calls a file that is no image.

    Raises OSError for a broken link in the root, where it may stand for a class.
    """
    if entry.is_symlink() and not os.path.exists(entry.path):
        if owner == _ROOT:
            os.stat(entry.path)
        return "broken link"
    ending = os.path.splitext(entry.name)[1].lower()
    if not ending:
        return "without an ending"
    return ending if ending.isprintable() and len(ending) <= 10 else "with a strange ending"


def _identity(folder: str) -> tuple[int, int]:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise _cannot_read(error, folder) from None
    return found.st_dev, found.st_ino


def _cannot_read(error: OSError, folder: str) -> BadInput:
    what = f"cannot read {(error.filename or folder)!r}: {error.strerror}"
    return BadInput(f"{what}; expected a folder of images; make it readable, or move it away")


# ---------------------------------------------------------------- what it looks like


def layout_of(found: Found, numbered_by: list[str] | None = None) -> Layout:
    """What was found, in words.

    numbered_by: the classes of train, where they number these images. Raises BadInput where all
    folders look like splits.
    """
    counts = found.counts()
    parts = found.parts()
    names = [found.classes[owner] for owner in sorted(counts) if owner != _ROOT]
    if len(names) > 1 and all(map(is_split_name, names)):
        raise _only_splits(found.root, names)
    merged = {  # classes whose images all lie in folders of their own -> these folders
        found.classes[owner]: sorted(inner)
        for owner, inner in parts.items()
        if "" not in inner and len(inner) > 1
    }
    expected = f"expected {os.path.join(found.root, '<class>', '<image>')!r}"
    layout = Layout(_summary(found, counts))
    if not names:
        layout.unlabelled = "they lie in no class folders"
    elif counts[_ROOT]:
        layout.unlabelled = f"{counts[_ROOT]} of {counts.total()} lie beside the class folders"
        what = f"{layout.unlabelled}: all are used, and none has a label"
        layout.warnings.append(f"{what}; {expected} where there are classes")
    elif len(names) == len(numbered_by or names) == 1:
        layout.unlabelled = f"all lie in one class folder, {names[0]!r}"
        if merged:
            layout.unlabelled += f", which holds only folders ({some(merged[names[0]])})"
        layout.warnings.append(
            f"{layout.unlabelled}: nothing can be judged by one class, so they count as without"
            f" labels; {expected} where there are classes"
        )
    if merged and len(names) > 1:
        name = min(merged)
        layout.warnings.append(
            f"{len(merged)} of {len(names)} classes hold only folders, such as {name!r}"
            f" ({some(merged[name])}), whose images count as one class; {expected}"
        )
    inner = [f"{found.classes[o]}/{name}" for o in sorted(parts) for name in sorted(parts[o])]
    looks = [path for path in (*names, *inner) if is_split_name(os.path.basename(path))]
    if looks:
        what = f"{some(looks)} look like splits, and the images of all of them are used here"
        layout.warnings.append(f"{what}; {expected}")
    return layout


def _only_splits(root: str, names: list[str]) -> BadInput:
    train = next((name for name in names if name.lower().startswith("train")), names[0])
    return BadInput(
        f"{root!r} holds {some(names)}, which look like splits, not classes: expected train/ and"
        " val/ with a folder a class; rename them, or give one alone, such as"
        f" {os.path.join(root, train)!r}"
    )


def _summary(found: Found, counts: Counter) -> str:
    empty = [name for i, name in enumerate(found.classes) if i not in counts]
    classes = len(found.classes) - len(empty)
    text = f"{many(counts.total(), 'image')}, {many(classes, 'class')}"
    if classes and empty:
        text += f" and {many(len(empty), 'class folder')} without images ({some(empty)})"
    return text + skipped_words(found.skipped)


def skipped_words(skipped: Counter[str]) -> str:
    """'; skipped 12: 11 .heic, 1 .gif', and what can be done; '' where nothing was skipped."""
    if not skipped:
        return ""
    kinds = sorted(skipped.items(), key=lambda kind: (-kind[1], kind[0]))
    counted = ("broken link", "repeated folder")
    words = [many(n, what) if what in counted else f"{n} {what}" for what, n in kinds[:_NAMED]]
    rest = sum(n for _, n in kinds[_NAMED:])
    if rest:
        words.append(f"{rest} others")
    advice = ""
    if not skipped.keys().isdisjoint(_OTHER_IMAGES):
        advice = "; convert them"
    if ".npy" in skipped:
        advice += "; --channels reads .npy"
    if not skipped.keys().isdisjoint((".heic", ".heif")):
        advice += ", or pip install 'moco_isl[heif]'"
    return f"; skipped {skipped.total()}: {', '.join(words)}{advice}"


def many(n: int, what: str) -> str:
    """'1 class', '2 classes', '2 links'."""
    ending = "es" if what.endswith("s") else "s"
    return f"1 {what}" if n == 1 else f"{n} {what}{ending}"


def some(names: list[str]) -> str:
    """The names, quoted; of a long list the first."""
    return ", ".join(map(repr, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")
