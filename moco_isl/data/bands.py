"""Images of any number of channels, with all their bits: what is in a file as floats in [0, 1].

A file may be anything that PIL reads, a TIFF of several bands or pages (tifffile), a PNG of 16 bits
a channel (torchvision), or an array of numpy (.npy). Letters: c channels, H x W pixels.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT, SAMPLESPERPIXEL

from moco_isl.data import folders
from moco_isl.errors import BadInput, missing_package

GREY = (0.2989, 0.587, 0.114)  # red, green, blue in grey: ITU-R 601, as torchvision rounds it
_NUMPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SIGNED = 2  # of SAMPLEFORMAT
Unclear = Callable[[str], None]


def read_bands(
    file: BinaryIO, channels: int, at_least: int | None = None, unclear: Unclear = warnings.warn
) -> torch.Tensor:
    """The image in an opened file: float32 [channels, H, W] in [0, 1].

    Values of 8 bits are divided by 255, those of 16 bits by 65,535; of other kinds `value_range`
    finds the range. at_least: see `datasets.decode`. unclear(why): called where that is a guess.
    Raises BadInput where the file has another number of channels or needs a package, and what the
    libraries raise on a file that they cannot read.
    """
    start = file.read(len(_NUMPY))
    file.seek(0)
    if start == _NUMPY:
        return fit(_scaled(_from_array(file, channels), unclear), channels)
    try:
        image = Image.open(file, formats=folders.FORMATS)
    except Image.UnidentifiedImageError:
        if start[:4] not in _TIFF:
            raise
        image = None  # of a kind that PIL does not know
    if image is None or _needs_tifffile(image):
        file.seek(0)
        return fit(_scaled(_from_tiff(file), unclear), channels)
    if _is_deep_png(image):
        file.seek(0)
        values = _from_deep_png(file.read())
    else:
        values = _from_pil(image, at_least)
    return fit(_scaled(values, unclear), channels, has_alpha=len(values) in (2, 4))


def to_channels(image: Image.Image | torch.Tensor, channels: int) -> torch.Tensor:
    """An image of PIL, or a tensor [c, H, W], as `read_bands` gives those of files.

    A tensor is uint8, or floats in [0, 1]. Raises ValueError for others.
    """
    if isinstance(image, Image.Image):
        values = _from_pil(image, None)
        return fit(_scaled(values, warnings.warn), channels, has_alpha=len(values) in (2, 4))
    require_range(image)
    image = fit(image.cpu(), channels)
    return image.float() if image.is_floating_point() else image / 255


def require_range(image: torch.Tensor) -> None:
    """Raise ValueError unless a tensor is uint8, or floats in [0, 1]."""
    if image.dtype == torch.uint8:
        return
    low, high = image.min().item(), image.max().item()
    if not image.is_floating_point() or not 0 <= low <= high <= 1:
        raise ValueError(f"a tensor of {image.dtype} from {low:g} to {high:g}")


def fit(images: torch.Tensor, channels: int, has_alpha: bool = False) -> torch.Tensor:
    """Images [..., c, H, W] with as many channels as wanted.

    Grey is repeated to RGB, RGB becomes grey, and has_alpha: a last channel that says how opaque a
    pixel is goes where it is not wanted. Raises BadInput for any other number.
    """
    found = images.shape[-3]
    if found == channels:
        return images
    if has_alpha and channels in (1, 3):
        return fit(images[..., :-1, :, :], channels)
    if (found, channels) == (1, 3):
        return images.expand(*images.shape[:-3], 3, -1, -1)
    if (found, channels) == (3, 1):
        r, g, b = images.float().unbind(-3)
        grey = (GREY[0] * r + GREY[1] * g + GREY[2] * b).unsqueeze(-3)
        return grey if images.is_floating_point() else grey.round().to(images.dtype)
    raise BadInput(
        f"it has {found} channels, and {channels} are expected: give --channels {found}, or images"
        f" of {channels}"
    )


# ---- what is in a file, with its own values [c, H, W] --------------------------------------------


def _from_pil(image: Image.Image, at_least: int | None) -> np.ndarray:
    if at_least and image.format == "JPEG":
        image.draft(image.mode, (at_least, at_least))
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image)[None]
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode not in ("L", "LA", "RGB", "RGBA"):  # such as CMYK, which are no four bands
        image = image.convert("RGB")
    values = np.asarray(image)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _deep_grey(image: Image.Image) -> np.ndarray:
    """The values [H, W] of a grey image of 16 or 32 bits, in the type that its file says."""
    values = np.asarray(image)
    tags = image.tag_v2 if image.format == "TIFF" else {}
    # PIL holds all of these as signed 32 bits, and all of PNG and PPM are of 16
    bits = tags.get(BITSPERSAMPLE, (16,))[0]
    signed = tags.get(SAMPLEFORMAT, (1,))[0] == _SIGNED
    if image.mode == "I" and not signed:
        return values.view(np.uint32) if bits == 32 else values.astype(np.uint16)
    return values


def _needs_tifffile(image: Image.Image) -> bool:
    """Whether PIL would lose bits, bands or pages of a TIFF."""
    if image.format != "TIFF":
        return False
    several = image.tag_v2.get(SAMPLESPERPIXEL, 1) > 1
    deep = max(image.tag_v2.get(BITSPERSAMPLE, (1,))) > 8
    return several and deep or image.n_frames > 1


def _from_tiff(file: BinaryIO) -> np.ndarray:
    """The first series of a TIFF: its bands, and its pages of one size."""
    what = "a TIFF of several bands or pages"
    try:
        import tifffile
    except ImportError:
        raise missing_package(what, "tifffile", "'moco_isl[tiff]'") from None
    with tifffile.TiffFile(io.BytesIO(file.read())) as tiff:  # it asks files for their names
        series = tiff.series[0]
        try:
            values = series.asarray()
        except Exception as error:  # its type differs between versions
            if "imagecodecs" not in str(error):
                raise
            raise missing_package(
                f"{what} that is compressed so", "imagecodecs", "'moco_isl[tiff]'"
            ) from None
    y, x = series.axes.index("Y"), series.axes.index("X")
    values = np.moveaxis(values, (y, x), (-2, -1))
    return values.reshape(-1, *values.shape[-2:])


def _is_deep_png(image: Image.Image) -> bool:
    """Whether it is a PNG of 16 bits in several channels, of which PIL keeps 8."""
    return image.format == "PNG" and image.tile[0][3] in ("LA;16B", "RGB;16B", "RGBA;16B")


def _from_deep_png(content: bytes) -> np.ndarray:
    try:
        from torchvision.io import ImageReadMode, decode_png

        content = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        found = decode_png(content, ImageReadMode.UNCHANGED)
    except ImportError:
        found = None
    if found is None or found.dtype != torch.uint16:
        raise BadInput(
            "a PNG of 16 bits in several channels is read by torchvision from 0.21 on: update it,"
            " or convert the image to TIFF"
        )
    return found.numpy()


def _from_array(file: BinaryIO, channels: int) -> np.ndarray:
    """An array [H, W], [H, W, c] or [c, H, W] of numpy as [c, H, W].

    The channels are the axis, last or first, that has as many entries as are wanted, the last where
    both have; else the shorter of the two.
    """
    values = np.load(file, allow_pickle=False)
    if values.ndim == 2:
        return values[None]
    if values.ndim != 3 or 0 in values.shape:
        raise BadInput(
            f"it is an array of shape {values.shape}: expected [H, W], [H, W, channels] or"
            " [channels, H, W]"
        )
    first, last = values.shape[0], values.shape[-1]
    is_last = last == channels or (first != channels and last <= first)
    return values.transpose(2, 0, 1) if is_last else values


# ---- values to [0, 1] ----------------------------------------------------------------------------


def _scaled(values: np.ndarray, unclear: Unclear) -> torch.Tensor:
    """Values [c, H, W] of any type as float32 in [0, 1]; NaN becomes 0."""
    kind, bytes_each = values.dtype.kind, values.dtype.itemsize
    if kind not in "buif":
        raise BadInput(f"its values are {values.dtype}: expected whole numbers or floats")
    fixed = {("b", 1): 1, ("u", 1): 255, ("u", 2): 65535}
    if kind == "i" and bytes_each == 2 and values.min() >= 0:
        fixed["i", 2] = 65535  # 16 bits, written by a program that knows signed numbers alone
    top = fixed.get((kind, bytes_each))
    if top:
        return torch.from_numpy(values.astype(np.float32)).div_(top)
    values = values.astype(np.float64)
    low, high = assumed_range(values, (1, 255, 65535) if kind == "f" else (255, 65535), unclear)
    values = np.nan_to_num(values.clip(low, high), nan=low)
    return torch.from_numpy(((values - low) / (high - low)).astype(np.float32))


def assumed_range(
    values: np.ndarray, tops: Sequence[float], unclear: Unclear
) -> tuple[float, float]:
    """(low, high) of `value_range`; unclear(why) is called where they are a guess."""
    low, high, why = value_range(values, tops)
    if why:
        unclear(
            f"{why}: {low:g}..{high:g} is taken as black to white; convert to 8 or 16 bits to"
            " choose yourself"
        )
    return low, high


def value_range(values: np.ndarray, tops: Sequence[float]) -> tuple[float, float, str]:
    """The range of the values of an image whose scale is not known: (low, high, doubt).

    doubt: why the range is a guess; '' where it is certain.
    The highest and the lowest 1 % of the values do not decide, nor do those that are not finite.
    Where the others lie between 0 and one of `tops`, the range is 0 to the first such top; else it
    is that of the others, from 0 where none of them is negative. Values up to 5 % beyond a bound,
    which sharpening leaves, count as within it. The range is certain where all finite values lie
    between 0 and the top and some lie above an eighth of it, or where all are 0. Raises ValueError
    where no value is finite.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        raise ValueError("no value of the image is finite")
    few = 1 + (len(values) - 1) // 100  # how many do not count at each end: at least one
    last = max(len(values) - 1 - few, 0)
    first = min(few, last)
    ordered = np.partition(values, (first, last))
    low = ordered[first]
    high = ordered[last]
    least = values.min()
    most = values.max()
    top = next((top for top in tops if high <= 1.05 * top), None)
    if top is not None and low >= -0.05 * max(high, 0):
        dark = 0 < most < top / 8  # nearly black on that range: perhaps 12 bits
        sure = least >= -0.05 * top and most <= 1.05 * top and not dark
        return 0.0, float(top), "" if sure else f"values reach from {least:g} to {most:g}"
    low = min(low, 0.0)
    return (
        float(low),
        float(high if high > low else low + 1),
        f"values reach from {least:g} to {most:g}",
    )
