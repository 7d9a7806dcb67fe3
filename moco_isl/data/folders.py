"""What lies in a folder of images: which files are images, which of its folders are classes, what
is left out and why.

Each real folder is read once, whichever links lead to it, and no file is looked at beyond its entry
in the folder.
"""

import heapq
import os
import re
from collections import Counter
from dataclasses import dataclass, field

from torchvision.datasets.folder import IMG_EXTENSIONS

from moco_isl.errors import BadInput


def _kinds_of_images() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(endings of the files that are images, the formats that such files may have, in PIL's
    names)
    """
    endings = IMG_EXTENSIONS
    formats = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
    try:
        import pillow_heif  # the extra heif
    except ImportError:
        return endings, formats
    pillow_heif.register_heif_opener()
    return (*endings, ".heic", ".heif"), (*formats, "HEIF")


ENDINGS, FORMATS = _kinds_of_images()
# can be converted
_OTHER_IMAGES = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".psd", ".raw", ".tga")
_SPLIT = re.compile(
    r"(train|training|val|valid|validation|test|testing)([-_ ]?(set|split|data|images))?\d*", re.I
)
_ROOT = -1  # in place of a class: directly in the folder
_NAMED = 5  # of a longer list in a message so many are named


@dataclass
class Layout:
    """What a folder of images holds, in words.

    unlabelled: why its images have no labels ('': they have).
    """

    summary: str
    unlabelled: str = ""
    warnings: list[str] = field(default_factory=list)


@dataclass
class Found:
    """classes: names of the folders directly in a folder. images: (position of the class or -1,
    folder, names of the images directly in that folder); all sorted. skipped: what was left out ->
    how often.
    """

    root: str
    classes: list[str]
    images: list[tuple[int, str, list[str]]]
    skipped: Counter[str]

    def counts(self) -> Counter:
        """How many images each class has; under -1 those directly in the folder."""
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
        """For each class with images: the folders directly in it that hold images; '' where it
        holds some itself.
        """
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
            return any(
                entry.name.lower().endswith(ENDINGS) and not entry.name.startswith(".")
                for entry in entries
            )
    except OSError:
        return False


def class_names(root: str) -> list[str]:
    """The names of the class folders in a folder, sorted. Raises BadInput."""
    return [name for name, _, _ in _Reading(root).class_folders()]


def find_images(root: str) -> Found:
    """The images in a folder, at any depth. Hidden files and folders are left out.

    Real folders are read first, then links to folders, those nearest to the root first. A link to a
    folder that is read already is left out; directly in the root it is refused, for it would be a
    second name of a class. Raises BadInput.
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
        # (device, inode) of a folder -> the class that it is read for
        self.readers: dict[tuple[int, int], int] = {}
        above = os.path.realpath(root)
        while above != os.path.dirname(above):
            self.readers[_identity(above)] = _ROOT  # a link to one of them goes round in a circle
            above = os.path.dirname(above)
        self.readers[_identity(above)] = _ROOT

    def reader_of(self, folder: str) -> int | None:
        """The class that a folder is read for already, if any."""
        return self.readers.get(_identity(folder))

    def class_folders(self) -> list[tuple[str, str, bool]]:
        """(name, path, whether it is a link) of the folders in the root, sorted; notes the images
        beside them.
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
        """Read a folder and the real folders below it for a class; links to folders are kept for
        later.
        """
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
        """Note the images directly in a folder; returns the paths of real folders, and of links to
        folders, in it.
        """
        real = []
        links = []
        images = []
        skipped = self.skipped
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith("."):  # desktops leave such as ._1.jpg beside each image
                        skipped["hidden"] += 1
                    elif entry.is_dir(follow_symlinks=False):
                        real.append(entry.path)
                    elif name.lower().endswith(
                        ENDINGS
                    ):  # whatever it is: what cannot be read is named when it is asked for
                        images.append(name)
                    elif not entry.is_symlink():
                        skipped[_ending(name)] += 1
                    elif os.path.isdir(entry.path):
                        links.append(entry.path)
                    elif os.path.exists(entry.path):
                        skipped[_ending(name)] += 1
                    elif owner == _ROOT:
                        os.stat(entry.path)  # raises: it may stand for a class
                    else:
                        skipped["broken link"] += 1
        except OSError as error:
            raise _cannot_read(error, folder) from None
        if images:
            self.images.append((owner, folder, sorted(images)))
        return real, links


def _identity(folder: str) -> tuple[int, int]:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise _cannot_read(error, folder) from None
    return found.st_dev, found.st_ino


def _cannot_read(error: OSError, folder: str) -> BadInput:
    return BadInput(
        f"cannot read {(error.filename or folder)!r}: {error.strerror}; expected a folder of"
        " images; make it readable, or move it away"
    )


def _ending(name: str) -> str:
    ending = os.path.splitext(name)[1].lower()
    if not ending:
        return "without an ending"
    return ending if ending.isprintable() and len(ending) <= 10 else "with a strange ending"


# ---------------------------------------------------------------- what it looks like


def layout_of(found: Found, numbered_by: list[str] | None = None) -> Layout:
    """What was found, in words; numbered_by: the classes of train, where these images are numbered
    by them.

    Raises BadInput where all folders look like splits.
    """
    counts, parts = found.counts(), found.parts()
    beside = counts[_ROOT]
    names = [found.classes[owner] for owner in sorted(counts) if owner != _ROOT]
    merged = {
        found.classes[owner]: sorted(inner)
        for owner, inner in parts.items()
        if "" not in inner and len(inner) > 1
    }
    expected = f"expected {os.path.join(found.root, '<class>', '<image>')!r}"
    if len(names) > 1 and all(map(is_split_name, names)):
        train = next((name for name in names if name.lower().startswith("train")), names[0])
        raise BadInput(
            f"{found.root!r} holds {some(names)}, which look like splits, not classes: expected"
            " train/ and val/ with a folder a class; rename them, or give one alone, such as"
            f" {os.path.join(found.root, train)!r}"
        )
    layout = Layout(_summary(found, counts))
    if not names:
        layout.unlabelled = "they lie in no class folders"
    elif beside:
        layout.unlabelled = f"{beside} of {counts.total()} lie beside the class folders"
        layout.warnings.append(
            f"{layout.unlabelled}: all are used, and none has a label; {expected} where there are"
            " classes"
        )
    elif len(names) == len(numbered_by or names) == 1:
        layout.unlabelled = f"all lie in one class folder, {names[0]!r}" + (
            f", which holds only folders ({some(merged[names[0]])})" if merged else ""
        )
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
    looks = [name for name in names if is_split_name(name)]
    looks += [
        f"{found.classes[owner]}/{name}"
        for owner in sorted(parts)
        for name in sorted(parts[owner])
        if is_split_name(name)
    ]
    if looks:
        layout.warnings.append(
            f"{some(looks)} look like splits, and the images of all of them are used here;"
            f" {expected}"
        )
    return layout


def _summary(found: Found, counts: Counter) -> str:
    empty = [name for i, name in enumerate(found.classes) if i not in counts]
    classes = len(found.classes) - len(empty)
    text = f"{_many(counts.total(), 'image')}, {_many(classes, 'class')}"
    if classes and empty:
        text += f" and {_many(len(empty), 'class folder')} without images ({some(empty)})"
    return text + skipped_words(found.skipped)


def skipped_words(skipped: Counter[str]) -> str:
    """'; skipped 12: 11 .heic, 1 .gif; ...', with what can be done about them; '' where nothing was
    skipped.
    """
    if not skipped:
        return ""
    kinds = sorted(skipped.items(), key=lambda kind: (-kind[1], kind[0]))
    words = [
        _many(n, what) if what in ("broken link", "repeated folder") else f"{n} {what}"
        for what, n in kinds[:_NAMED]
    ]
    if rest := sum(n for _, n in kinds[_NAMED:]):
        words.append(f"{rest} others")
    advice = ""
    if any(ending in skipped for ending in _OTHER_IMAGES):
        heif = any(ending in skipped for ending in (".heic", ".heif"))
        advice = "; convert them, or install pillow-heif" if heif else "; convert them"
    return f"; skipped {skipped.total()}: {', '.join(words)}{advice}"


def _many(n: int, what: str) -> str:
    """'1 class', '2 classes', '2 links'."""
    if n == 1:
        return f"1 {what}"
    return f"{n} {what}{'es' if what.endswith('s') else 's'}"


def some(names: list[str]) -> str:
    """The names, quoted; of a long list the first."""
    return ", ".join(map(repr, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")
