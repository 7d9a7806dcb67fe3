"""A picture of what was detected on some test images, beside the truth."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from moco_isl import files
from moco_isl.errors import RunFailed
from moco_isl.evaluation.detection.boxes import BoxedImages
from moco_isl.evaluation.detection.scoring import Found
from moco_isl.files import short

NAME = "detections.png"
SHOWN = 10  # images
SURE = 0.5  # the least score that is drawn
_CELL = 384  # pixels of an image's longer side
_GAP = 16
_COLUMNS = 5
_HEAD = 36
_TRUTH, _FOUND, _PAPER, _INK = "#2ecc71", "#ff7f2a", "#ffffff", "#222222"


def rows_shown(M: int) -> list[int]:
    """Which images are shown: some, spread evenly."""
    n = min(SHOWN, M)
    return [i * M // n for i in range(n)]


def draw(images: BoxedImages, found: dict[int, Found], folder: Path) -> Path:
    """Write the picture into a folder; found: by image. Raises RunFailed."""
    cells = [_cell(images, i, found.get(i)) for i in rows_shown(len(images))]
    columns = min(_COLUMNS, len(cells))
    lines = -(-len(cells) // columns)
    width = columns * (_CELL + _GAP) + _GAP
    height = _HEAD + lines * (_CELL + _GAP)
    page = Image.new("RGB", (width, height), _PAPER)
    _legend(ImageDraw.Draw(page))
    for k, cell in enumerate(cells):
        x = _GAP + k % columns * (_CELL + _GAP)
        y = _HEAD + k // columns * (_CELL + _GAP)
        page.paste(cell, (x + (_CELL - cell.width) // 2, y + (_CELL - cell.height) // 2))
    path = folder / NAME
    temporary = path.with_name(path.name + files.TEMPORARY)
    try:
        with files.replacing(path, temporary):
            page.save(temporary, format="PNG")
    except OSError as error:
        raise RunFailed(f"cannot write {files.named('', path)}: {error.strerror}") from error
    return path


def _cell(images: BoxedImages, i: int, found: Found | None) -> Image.Image:
    """An image at the size of a cell, with its boxes, and their names on top."""
    picture = images.open(i)
    scale = _CELL / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    way = Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.BILINEAR
    picture = picture.resize(size, way)
    on = ImageDraw.Draw(picture)
    row = images.rows[i]
    at = lambda box: [x * scale for x in box]
    truth = [(at(box), images.classes[k]) for box, k in zip(row.boxes.tolist(), row.labels)]
    sure = zip(found.boxes, found.labels, found.scores) if found else ()
    sure = [
        (at(box), f"{images.classes[k]} {score:.2f}") for box, k, score in sure if score >= SURE
    ]
    for box, _ in sure:
        on.rectangle(box, outline=_FOUND, width=3)
    for (x1, y1, x2, y2), _ in truth:
        corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]
        for a, b in zip(corners, corners[1:]):
            _dashes(on, a, b, _TRUTH)
    for box, text in truth:
        _label(on, text, _TRUTH, box[0], box[3])
    for box, text in reversed(sure):  # the surest lies on top
        _label(on, text, _FOUND, box[0], box[1], above=True)
    return picture


def _label(
    on: ImageDraw.ImageDraw, text: str, colour: str, x: float, y: float, above: bool = False
) -> None:
    """A text on a patch of a colour below a point, or above it, within the picture."""
    font = ImageFont.load_default(14)
    text = short(text, 24)
    _, _, right, bottom = font.getbbox(text)
    width, height = right + 6, bottom + 4
    most = on.im.size
    x = min(max(0, x), max(0, most[0] - width))
    y = max(0, y - height) if above else max(0, min(y, most[1] - height))
    on.rectangle((x, y, x + width, y + height), fill=colour)
    on.text((x + 3, y + 2), text, fill=_INK, font=font)


def _dashes(on: ImageDraw.ImageDraw, a: tuple, b: tuple, colour: str, dash: float = 7) -> None:
    length = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1e-6)
    at = lambda t: tuple(p + (q - p) * min(t / length, 1) for p, q in zip(a, b))
    for k in range(0, int(length / dash) + 1, 2):
        on.line((at(k * dash), at((k + 1) * dash)), fill=colour, width=3)


def _legend(on: ImageDraw.ImageDraw) -> None:
    font = ImageFont.load_default(16)
    x = _GAP
    for colour, dashed, text in (
        (_TRUTH, True, "the truth, dashed"),
        (_FOUND, False, f"detected, with a score of {SURE} or more"),
    ):
        if dashed:
            _dashes(on, (x, 18), (x + 40, 18), colour)
        else:
            on.line(((x, 18), (x + 40, 18)), fill=colour, width=3)
        on.text((x + 50, 8), text, fill=_INK, font=font)
        x += 80 + font.getlength(text)
