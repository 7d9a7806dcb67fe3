"""Images of 1, 3, 4 and 6 channels, of 8 and 16 bits: decoded, augmented, trained on and judged."""

import io
import re
import shlex
import shutil
import struct
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
import tifffile
import torch
from PIL import Image
from torchvision.transforms import functional as TF

import main_knn
import main_lincls
import main_moco_isl
from moco_isl import data, encoders, export, pretraining
from moco_isl.data import augment, bands, cache, datasets, folders, transforms
from moco_isl.errors import BadInput
from moco_isl.report import grids
from moco_isl.run import checkpoint
from tests.ranks import run_ranks
from tests.runs import differences
from tests.test_bad_input import ask

RAMP = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)
DOCS = Path(__file__).parent.parent / "docs"


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits: values uint16 [H, W, 2 or 3 or 4]."""
    H, W, c = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    kind = {2: 4, 3: 2, 4: 6}[c]

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = struct.pack(">IIBBBBB", W, H, 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def read(content: bytes, channels: int, said=None) -> torch.Tensor:
    unclear = (lambda why: said.append(why)) if said is not None else pytest.fail
    return bands.read_bands(io.BytesIO(content), channels, unclear=unclear)


def encoded(image, kind: str, **more) -> bytes:
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, image)
    elif kind == "tifffile":
        tifffile.imwrite(buffer, image, **more)
    else:
        Image.fromarray(image).save(buffer, kind, **more)
    return buffer.getvalue()


# ---- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "npy", "tifffile"])
def test_a_ramp_of_16_bits_keeps_all_its_values(kind):
    found = read(encoded(RAMP, kind), 1)
    assert found.shape == (1, 256, 256) and found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(RAMP.astype(np.float32))[None] / 65535)
    assert np.array_equal((found[0].double() * 65535).round().numpy(), RAMP)


@pytest.mark.parametrize("c", [2, 3, 4])
def test_a_png_of_16_bits_keeps_them_in_each_channel(c):
    values = np.stack([np.roll(RAMP[:7], i, 1) for i in range(c)], 2)
    found = read(deep_png(values), c)
    assert np.array_equal((found.double() * 65535).round().numpy(), values.transpose(2, 0, 1))


def test_where_torchvision_reads_no_16_bits_a_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    with pytest.raises(BadInput, match="torchvision from 0.21 on: update it, or convert"):
        read(deep_png(RAMP[:4, :4, None].repeat(3, 2)), 3)


BANDS = np.random.default_rng(0).integers(0, 60_000, (6, 9, 12), dtype=np.uint16)


@pytest.mark.parametrize(
    "content",
    [
        encoded(BANDS, "npy"),
        encoded(BANDS.transpose(1, 2, 0), "npy"),
        encoded(BANDS, "tifffile", photometric="minisblack"),  # pages
        encoded(BANDS, "tifffile", photometric="minisblack", planarconfig="separate"),
        encoded(
            BANDS.transpose(1, 2, 0),
            "tifffile",
            photometric="minisblack",
            planarconfig="contig",
            compression="zlib",
        ),
        encoded(BANDS[:, None, :, :], "tifffile", photometric="minisblack", bigtiff=True),
        encoded(BANDS.astype(">u2"), "npy"),
    ],
)
def test_bands_and_pages_are_channels(content):
    found = read(content, 6)
    assert np.array_equal((found.double() * 65535).round().numpy(), BANDS)


def test_an_array_as_wide_as_it_has_channels_has_them_last():
    values = np.arange(64, dtype=np.uint8).reshape(4, 4, 4)
    assert np.array_equal(read(encoded(values, "npy"), 4) * 255, values.transpose(2, 0, 1))


def test_8_bits_are_divided_by_255():
    rgba = np.random.default_rng(1).integers(0, 256, (5, 6, 4), dtype=np.uint8)
    for content in (encoded(rgba, "PNG"), encoded(rgba, "TIFF"), encoded(rgba, "npy")):
        assert torch.equal(read(content, 4), torch.from_numpy(rgba).permute(2, 0, 1) / 255)
    assert torch.equal(read(encoded(rgba, "PNG"), 3), read(encoded(rgba[..., :3], "PNG"), 3))
    opaque = rgba > 127
    expected = torch.from_numpy(opaque).permute(2, 0, 1).float()
    assert torch.equal(read(encoded(opaque, "npy"), 4), expected)


def test_grey_becomes_rgb_and_rgb_grey():
    rgb = np.random.default_rng(1).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    weights = np.array([0.2989, 0.587, 0.114])
    assert np.allclose(read(encoded(rgb, "PNG"), 1)[0], rgb @ weights / 255, atol=1e-6)
    grey = read(encoded(RAMP, "PNG"), 3)
    assert grey.shape == (3, 256, 256) and torch.equal(grey[0], grey[2])
    alpha = np.stack([RAMP[:4], RAMP[4:8]], 2)
    assert torch.equal(read(deep_png(alpha), 1), read(deep_png(alpha), 2)[:1])
    for mode, c in (("1", 1), ("CMYK", 3), ("P", 3)):
        buffer = io.BytesIO()
        Image.fromarray(rgb).convert(mode).save(buffer, "TIFF")
        expected = TF.to_tensor(Image.open(buffer).convert("RGB" if c == 3 else "L"))
        assert torch.allclose(read(buffer.getvalue(), c), expected)


def test_other_types_are_scaled_by_the_range_that_they_seem_to_have():
    values = np.linspace(0, 1, 300, dtype=np.float32).reshape(3, 10, 10)
    assert np.allclose(read(encoded(values, "npy"), 3), values)
    assert np.allclose(
        read(encoded((values * 255).astype(np.int64), "npy"), 3), values, atol=1 / 255
    )
    signed = (values * 30_000).astype(np.int16)
    assert np.allclose(read(encoded(signed, "npy"), 3), signed / 65535)
    said = []
    found = read(encoded(signed - 9000, "npy"), 3, said)
    assert found.min() == 0 and found.max() == 1 and "-9000 to 21000" in said[0]
    broken = values.copy()
    broken[0, 0, 0] = np.nan
    assert np.isfinite(read(encoded(broken, "npy"), 3)).all()


@pytest.mark.parametrize(
    "content, channels, words",
    [
        (encoded(BANDS, "npy"), 4, "it has 6 channels, and 4 are expected: give --channels 6"),
        (encoded(BANDS, "npy"), 3, "it has 6 channels"),
        (encoded(RAMP[:4], "PNG"), 4, "it has 1 channels"),
        (encoded(np.zeros((2, 3, 4, 5)), "npy"), 3, r"an array of shape \(2, 3, 4, 5\)"),
        (encoded(np.zeros((4, 5), complex), "npy"), 1, "its values are complex128"),
    ],
)
def test_what_does_not_fit_is_a_line(content, channels, words):
    with pytest.raises(BadInput, match=words):
        read(content, channels)


def test_an_array_with_code_in_it_is_not_read():
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    with pytest.raises(ValueError, match="allow_pickle"):
        read(encoded(np.array([[Evil()]]), "npy"), 1)


def test_a_missing_library_names_its_install_command(monkeypatch):
    content = encoded(BANDS, "tifffile", photometric="minisblack")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(
        BadInput, match=r"needs the package tifffile: pip install 'moco_isl\[tiff\]'"
    ):
        read(content, 6)
    assert torch.equal(read(encoded(RAMP, "TIFF"), 1), read(encoded(RAMP, "PNG"), 1))  # PIL does
    monkeypatch.undo()

    def asarray(series):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", asarray)
    with pytest.raises(BadInput, match=r"imagecodecs: pip install 'moco_isl\[tiff\]'"):
        read(content, 6)


def test_rgb_of_8_bits_is_read_as_before(tmp_path):
    rgb = np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", rgb)
    images = data.build_dataset("folder", tmp_path)
    assert len(images) == 1 and isinstance(images.image(0), Image.Image)
    assert "skipped 1: 1 .npy; --channels reads .npy" in images.layout.summary
    assert len(data.build_dataset("folder", tmp_path, channels=3, bits=16)) == 2


# ---- data sets -----------------------------------------------------------------------------------


def place(folder: Path, c: int, n: int = 24) -> Path:
    """A folder of n digits of 16 pixels in two classes, as images of c channels."""
    digits = data.build_dataset("digits")
    for i in range(n):
        target = folder / "train" / str(i % 2)
        target.mkdir(parents=True, exist_ok=True)
        row = (digits.labels == i % 2).nonzero()[i, 0]
        grey = digits.images[row, 0].numpy().astype(np.uint16) * 16  # 12 bits
        many = np.stack([np.roll(grey, k, 0) + 7 * k for k in range(c)])
        if c == 1:
            Image.fromarray(grey).save(target / f"{i:02}.png")
        elif c == 4:
            Image.fromarray((many >> 4).astype(np.uint8).transpose(1, 2, 0)).save(
                target / f"{i:02}.png"
            )
        elif c == 3 or i % 2:
            kind = {"photometric": "rgb"} if c == 3 else {"photometric": "minisblack"}
            whole = many.transpose(1, 2, 0) if c == 3 else many
            tifffile.imwrite(target / f"{i:02}.tif", whole, compression="zlib", **kind)
        else:
            np.save(target / f"{i:02}.npy", many)
    return folder


def test_a_data_set_in_memory_has_the_channels_asked_for():
    rgb = data.build_dataset("digits")
    grey = data.build_dataset("digits", channels=1)
    assert grey.images.shape == (1437, 1, 16, 16) and torch.equal(
        grey.images[:, 0], rgb.images[:, 1]
    )
    assert data.build_dataset("digits").images.shape[1] == 3
    with pytest.raises(BadInput, match=r"digits/train\[0\]: it has 3 channels, and 4 are expected"):
        data.build_dataset("digits", channels=4)


def test_floats_in_memory_need_16_bits():
    images = torch.rand(4, 3, 8, 8)
    held = data.ImagesInMemory(images, None, None, "mine")
    with pytest.raises(BadInput, match="the images of mine are floats: add --bits 16"):
        datasets.with_channels(held)
    assert datasets.with_channels(held, 3, 16) is held
    with pytest.raises(BadInput, match="images are torch.float64"):
        data.ImagesInMemory(images.double(), None, None, "mine")


def test_other_channels_in_files_are_refused_before_anything_else(tmp_path):
    place(tmp_path, 6, 4)
    with pytest.raises(BadInput, match=r"train/0/00.npy: it has 6 channels, and 5 .*--channels 6"):
        data.build_dataset("folder", tmp_path, channels=5)
    images = data.build_dataset("folder", tmp_path, channels=6)
    for i in (0, 1):  # they change once the run has begun
        np.save(images.path(i), np.zeros((3, 16, 16), np.uint8))
    Path(images.path(2)).write_text("no image")
    transform = data.get_eval_transform("folder", 16, data.Pixels(6, 8, [0.5] * 6, [0.2] * 6))
    loader = data.eval_loader(images, transform=transform, batch_size=4)
    with pytest.warns(UserWarning, match="00.npy': it has 3 channels, and 6 are expected") as said:
        ((found, _),) = loader
    assert len(said) == 1 and found.shape == (4, 6, 16, 16)
    assert [i for i, _ in loader.bad_images()] == [0, 1, 2]


def test_a_tiff_of_several_bands_names_the_flag_that_reads_it(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(encoded(BANDS.transpose(1, 2, 0), "tifffile", planarconfig="contig"))
    with pytest.raises(BadInput, match="a.tif for one.*; a TIFF of several bands needs --channels"):
        data.native_size(data.build_dataset("folder", tmp_path))
    assert data.build_dataset("folder", tmp_path, channels=6).image(0).shape == BANDS.shape


def test_a_data_set_that_gives_rgb_alone_says_so():
    class Own(torch.utils.data.Dataset):
        pass

    with pytest.raises(BadInput, match="a Own gives RGB of 8 bits alone"):
        datasets.with_channels(Own(), 4, 8)


@pytest.mark.parametrize("c", [1, 6])
def test_memory_and_cache_hold_what_the_files_hold(tmp_path, c):
    images = data.build_dataset("folder", place(tmp_path / "in", c, 6), channels=c)
    held = data.load_into_memory(images)
    said = []
    for _ in range(2):
        cached = data.hold_cached(images, tmp_path / "cache", 1, said.append)
        assert torch.equal(cached.images, held.images) and held.images.dtype == torch.float32
    assert "kept in cache" in said[0] and "from cache" in said[1]
    other = data.build_dataset("folder", tmp_path / "in", channels=c)
    other.channels = c + 1
    (name,) = (file.name for file in (tmp_path / "cache").glob("*.images"))
    assert name == cache.cache_file(images, "").name != cache.cache_file(other, "").name


def test_headers_and_shards_of_a_part_know_their_size(tmp_path):
    images = data.build_dataset("folder", place(tmp_path, 6, 6), channels=6)
    rest, held_out = data.holdout(images, 2, 0)
    assert data.native_size(rest) == 16 and held_out.image(0).shape == (6, 16, 16)


# ---- mean and std --------------------------------------------------------------------------------


def test_mean_and_std_are_those_of_numpy(tmp_path):
    images = data.build_dataset("folder", place(tmp_path, 6, 10), channels=6)
    mean, std, line = data.measure(images)
    every = np.concatenate(
        [(images.image(i).double() * 65535).round().numpy().reshape(6, -1) for i in range(10)], 1
    )
    assert np.allclose(mean, every.mean(1) / 65535, rtol=1e-5)
    assert np.allclose(std, every.std(1) / 65535, rtol=1e-5)
    assert "measured on 10 images" in line
    grey = data.build_dataset("digits", channels=1)
    small = data.ImagesInMemory(grey.images[:200], None, None, "x")
    mean, std, _ = data.measure(small)
    values = small.images.numpy() / 255
    assert np.allclose((mean[0], std[0]), (values.mean(), values.std()), rtol=1e-5)


def test_unreadable_images_do_not_count_and_a_flat_channel_gets_std_1(tmp_path):
    values = np.zeros((4, 4, 4), np.uint8)
    values[..., 3] = 255
    values[..., 0] = np.arange(16).reshape(4, 4)
    Image.fromarray(values).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    mean, std, line = data.measure(data.build_dataset("folder", tmp_path, channels=4))
    assert (
        mean[1:] == [0, 0, 1]
        and std[1:] == [1, 1, 1]
        and std[0] == pytest.approx(np.arange(16).std() / 255, rel=1e-5)
    )
    assert "on 1 images; channel 2 3 4 has one value everywhere, and its std counts as 1" in line
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadInput, match="none of 1 images could be read"):
        data.measure(data.build_dataset("folder", tmp_path, channels=4))


def test_rows_and_flags_say_mean_and_std():
    rgb, grey = data.RGB, data.Pixels(1, 8, None, None)
    assert rgb.are_known("folder") and not grey.are_known("folder")
    deep = data.Pixels(3, 16, None, None)
    assert not deep.are_known("folder") and deep.are_known("cifar10")
    assert data.Pixels(4, 8, [0.5] * 4, [0.2] * 4).are_known("folder")
    row = data.DataSet(None, size=16, mean=(0.5,), std=(0.2,), needs_dir=False)
    assert grey.numbers(row) == ((0.5,), (0.2,))
    for bad in ({"mean": (), "std": ()}, {"mean": (0.5,) * 4, "std": (0.2,) * 3}):
        with pytest.raises(BadInput, match="a number for each channel"):
            data.DataSet(None, size=16, **bad)


# ---- augmentation --------------------------------------------------------------------------------


def constant(values, side=16):
    return torch.tensor(values)[:, None, None].expand(-1, side, side).contiguous()


@pytest.mark.parametrize("aug_plus", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("size", [16, 80])
def test_a_constant_image_is_only_made_brighter_or_darker(aug_plus, on_device, size):
    """Crop, flip and blur leave it; contrast is about its own mean; brightness is one factor."""
    values = [0.1, 0.2, 0.05, 0.4, 0.3]
    pixels = data.Pixels(5, 8, [0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1])
    augmentation = data.get_augmentation(
        "folder", aug_plus=aug_plus, size=size, on_device=on_device, pixels=pixels
    )
    image = constant(values, 96)
    torch.manual_seed(0)
    factors = []
    for i in range(12):
        if on_device:
            view, _ = (x[0] for x in augmentation.views(image[None], 0, 0, torch.tensor([i])))
        else:
            view = augmentation(image)
        assert view.shape == (5, size, size)
        std, mean = (torch.tensor(x)[:, None, None] for x in (pixels.std, pixels.mean))
        seen = view * std + mean
        assert torch.allclose(seen, seen[:, :1, :1].expand_as(seen), atol=1e-5)
        factor = seen[:, 0, 0] / torch.tensor(values)
        assert torch.allclose(factor, factor[:1].expand(5), rtol=1e-3)
        factors.append(factor[0].item())
    assert min(factors) < 0.9 and max(factors) > 1.1 and all(0.59 < f < 1.41 for f in factors)


def test_contrast_and_brightness_are_torchvisions_on_grey():
    x = torch.rand(3, 1, 8, 8)
    factor = torch.tensor([0.6, 1.0, 1.4])
    for ours, theirs in (
        (augment.adjust_brightness, TF.adjust_brightness),
        (augment.adjust_contrast, TF.adjust_contrast),
    ):
        expected = torch.stack([theirs(image, f.item()) for image, f in zip(x, factor)])
        assert torch.allclose(ours(x, factor), expected, atol=1e-6)


def test_rows_and_the_whole_batch_augment_alike():
    augmentation = augment.BatchAugmentation((0.3,) * 4, (0.2,) * 4, 80, aug_plus=True, blur=True)
    crops = torch.rand(9, 4, 80, 80)
    u = torch.rand(9, augmentation.draws)
    factors, order, _, to_grey, kernel, _ = augmentation.plan(u)
    whole = augmentation.colour(crops, factors, order, to_grey)
    whole = augmentation.blur_columns(augmentation.blur_rows(whole, kernel), kernel)
    assert torch.allclose(augmentation.finish(crops, u), whole, atol=1e-5)


def test_uint8_and_floats_of_the_same_values_give_the_same_views():
    augmentation = augment.BatchAugmentation((0.3,) * 3, (0.2,) * 3, 16, aug_plus=True)
    whole = torch.randint(0, 256, (5, 3, 20, 20), dtype=torch.uint8)
    index = torch.arange(5)
    views = (augmentation.views(x, 1, 2, index)[0] for x in (whole, whole / 255))
    assert torch.allclose(*views, atol=1e-6)


def test_a_view_to_take_features_from_is_normalised_once():
    pixels = data.Pixels(2, 8, [0.25, 0.5], [0.5, 0.25])
    transform = data.get_eval_transform("folder", 16, pixels)
    images = torch.rand(6, 2, 16, 16)
    mean, std = (torch.tensor(x)[:, None, None] for x in (pixels.mean, pixels.std))
    expected = (images - mean) / std
    for x, label in ((images, "floats"), ((images * 255).byte(), "bytes")):
        held = data.ImagesInMemory(x, None, None, label)
        ((found, _),) = data.eval_loader(held, transform=transform, batch_size=6)
        assert torch.allclose(found, expected, atol=1e-5 if label == "floats" else 0.02)
        assert torch.equal(held.images, x)
    assert torch.equal(transform(images[0]), images[0])
    smaller = transform(torch.rand(2, 32, 48))
    assert smaller.shape == (2, 16, 16) and smaller.dtype == torch.float32


def test_a_line_says_what_is_left_out():
    assert transforms.left_out(data.RGB) == ""
    line = transforms.left_out(data.Pixels(4, 8, None, None))
    assert line.startswith("=> 4 channels: brightness and contrast are jittered; hue, saturation")


# ---- encoders ------------------------------------------------------------------------------------

ARCHS = ["resnet18", "resnet18w16", "alexnet", "digits", "densenet121", "vit_b_16", "swin_t"]


@pytest.mark.parametrize(
    "arch", [*ARCHS, "inception_v3", "timm:resnet10t", "timm:vit_tiny_patch16_224"]
)
def test_the_first_convolution_alone_changes(arch, undrawn):
    build = lambda c: encoders.on_meta(lambda: encoders.build_encoder(arch, 8, channels=c))
    rgb, wide = ({n: t.shape for n, t in build(c).state_dict().items()} for c in (3, 5))
    changed = [name for name in rgb if rgb[name] != wide[name]]
    assert len(changed) == 1 and rgb.keys() == wide.keys()
    assert wide[changed[0]] == (rgb[changed[0]][0], 5, *rgb[changed[0]][2:])
    assert encoders.channels_of(build(5)) == 5


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_it_is_initialised_as_the_library_does(stem):
    torch.manual_seed(0)
    conv = encoders.build_encoder("resnet18", 8, stem, channels=12).conv1
    fan_out = conv.out_channels * conv.kernel_size[0] ** 2
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert conv.bias is None


def test_rgb_draws_the_same_weights_as_before():
    torch.manual_seed(0)
    ours = encoders.build_encoder("resnet18", 8).state_dict()
    torch.manual_seed(0)
    from torchvision.models import resnet18

    assert all(torch.equal(t, ours[n]) for n, t in resnet18(num_classes=8).state_dict().items())


# ---- whole runs ----------------------------------------------------------------------------------

FLAGS = (
    "-a digits --mlp --moco-dim 16 --moco-k 16 --moco-t 0.1 --moco-m 0.9 --aug-plus -b 8 -j 0"
    " --seed 1 --lr 0.1 --cos --device cpu -p 1 --epochs 2 --miner knn --isl-start 1 --isl-every 1"
    " --knn-every 1"
).split()


@pytest.mark.parametrize(
    "c, more",
    [(1, []), (1, ["--on-device"]), (3, ["--bits", "16"]), (4, ["--symmetric"]), (6, [])],
)
def test_a_run_mines_is_resumed_and_judged(tmp_path, c, more, capsys):
    folder = place(tmp_path / "in", c)
    flags = [*FLAGS, "--channels", str(c), *more]
    code, said, errors = ask([str(folder), *flags, "--out", str(tmp_path / "whole")])
    assert code == 0, errors
    assert "measured on 24 images" in said and "precision" in said
    assert ("brightness and contrast are jittered" in said) == (c != 3)
    cut = [str(folder), *FLAGS, *more, "--out", str(tmp_path / "cut"), "--resume", "auto"]
    assert ask([*cut, "--channels", str(c), "--max-steps", "2"])[0] == 0
    code, said, errors = ask(cut)  # neither channels nor mean are given again, or measured
    assert code == 0 and "measured" not in said, errors
    assert differences(tmp_path / "whole", tmp_path / "cut") == []
    last = tmp_path / "whole" / "checkpoint_last.pth.tar"
    args = checkpoint.load(last)["args"]
    assert args["channels"] == c and len(args["mean"]) == len(args["std"]) == c
    capsys.readouterr()
    judge = ["--pretrained", str(last), "-j", "0", "--device", "cpu"]
    assert main_knn.main([*judge, "--k", "3", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "24 queries" in said and "measured" not in said
    assert main_knn.main([*judge, "--channels", str(c + 1), str(folder)]) == 2
    assert f"takes images of {c} channels, and --channels is {c + 1}" in capsys.readouterr().err
    shutil.copytree(folder / "train", folder / "val")
    probe = [*judge, "--epochs", "1", "-b", "8", "--lr", "1", str(folder), "--out"]
    assert main_lincls.main([*probe, str(tmp_path / "cached"), "--cache-features"]) == 0
    assert main_lincls.main([*probe, str(tmp_path / "probe")]) == 0
    capsys.readouterr()
    last = str(tmp_path / "probe/checkpoint_last.pth.tar")
    again = ["-e", "--resume", last, "-j", "0", "--device", "cpu", str(folder)]
    assert main_lincls.main(again) == 0 and "measured" not in capsys.readouterr().out
    assert checkpoint.load(last)["args"]["mean"] == args["mean"]


def test_the_digits_are_grey_too(tmp_path):
    run = "--dataset digits --channels 1".split()
    code, said, errors = ask([*run, *FLAGS, "--out", str(tmp_path / "a"), "--max-steps", "2"])
    assert code == 0 and "jittered" not in said, errors  # they have an augmentation of their own


def test_mean_and_std_may_be_given(tmp_path):
    folder = place(tmp_path / "in", 1, 16)
    run = [str(folder), *FLAGS, "--channels", "1", "--out", str(tmp_path / "a"), "--max-steps", "1"]
    code, said, _ = ask([*run, "--mean", "0.03", "--std", "0.02"])
    assert code == 0 and "measured" not in said
    args = checkpoint.load(tmp_path / "a/checkpoint_last.pth.tar")["args"]
    assert args["mean"] == [0.03] and args["std"] == [0.02]


def test_a_run_of_rgb_says_nothing_of_mean_and_std(finished):
    args = checkpoint.load(finished / "checkpoint_last.pth.tar")["args"]
    assert args["mean"] is None and args["std"] is None
    assert (args["channels"], args["bits"]) == (3, 8)


def measured(rank, world, folder):
    args = main_moco_isl.get_parser().parse_args([folder, *FLAGS, "--channels", "6"])
    args.bits, args.knn_holdout = 8, 4
    pretraining.settle_pixels(args)
    return args.mean, args.std


def test_two_ranks_measure_what_one_measures(tmp_path):
    folder = str(place(tmp_path, 6))
    one = measured(0, 1, folder)
    assert run_ranks(2, measured, folder) == [one, one]


# ---- out again -----------------------------------------------------------------------------------


def trained(path: Path, arch: str, c: int) -> Path:
    """A file as a run of c channels saves it, of random weights."""
    torch.manual_seed(0)
    encoder = encoders.build_encoder(arch, 8, "imagenet", channels=c)
    content = {
        "arch": arch,
        "state_dict": {f"module.encoder_q.{n}": t for n, t in encoder.state_dict().items()},
        "args": {"mean": [0.1] * c, "std": [0.2] * c, "bits": 8, "image_size": 64},
    }
    torch.save(content, path)
    return path


def test_export_keeps_the_channels_or_refuses(tmp_path):
    path = trained(tmp_path / "a.pth", "resnet18", 4)
    for to in ("torchvision", "detectron2"):
        with pytest.raises(BadInput, match="resnet18 with stem imagenet and 4 channels: use --to"):
            export.export(path, to, tmp_path / "b.pth")
    export.export(path, "safetensors", tmp_path / "b.safetensors")
    encoder, info = export.load_backbone(tmp_path / "b.safetensors")
    assert info["channels"] == encoders.channels_of(encoder) == 4
    assert info["args"]["mean"] == [0.1] * 4 and info["args"]["std"] == [0.2] * 4
    lines = export.export(
        trained(tmp_path / "c.pth", "timm:resnet10t", 4), "timm", tmp_path / "d.pth"
    )
    (command,) = re.findall(r"timm.create_model\((.*)\)", "\n".join(lines))
    assert "in_chans=4" in command
    import timm

    assert encoders.channels_of(eval(f"timm.create_model({command})", {"timm": timm})) == 4


def test_pictures_of_bands_use_the_range_of_each():
    image = torch.stack([torch.linspace(a, b, 64).view(8, 8) for a, b in ((0, 0.1), (0.5, 0.6))])
    shown = grids._shown(image)
    assert shown.shape == (3, 8, 8) and (shown.min(), shown.max()) == (0, 255)
    assert torch.equal(shown[0], shown[2])
    assert len(grids._shown(torch.rand(6, 8, 8))) == 3
    rgb = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    assert grids._shown(rgb) is rgb
    held = data.ImagesInMemory(torch.rand(2, 5, 8, 8), None, None, "x")
    assert grids.data_uri(held, 1).startswith("data:image/png")


# ---- flags, HEIC, docs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--bits 12", "--bits 12: expected 8 or 16"),
        ("--mean 0.5 0.5 0.5", "--mean goes with --std: give both"),
        ("--channels 2 --mean 0.5 --std 0.5", "--mean has 1 numbers, and --channels is 2"),
        ("--mean 123.7 116.3 103.5 --std 58 57 57", "--mean 123.7 is out of range"),
        ("--channels 0", "--channels 0 is out of range"),
        ("--channels 4", "digits/train[0]: it has 3 channels"),
    ],
)
def test_flags_that_cannot_be_are_one_line(flags, words):
    code, _, said = ask(["--dataset", "digits", *FLAGS, *flags.split(), "--out", "new"])
    assert code == 2 and words in said and said.count("\n") == 1, said


def test_heic_is_read(tmp_path):
    rgb = np.zeros((64, 48, 3), np.uint8)
    rgb[:32] = (200, 30, 60)
    pillow_heif.from_pillow(Image.fromarray(rgb)).save(tmp_path / "a.HEIC", quality=90)
    images = data.build_dataset("folder", tmp_path)
    found = np.asarray(images.image(0)).astype(int)
    assert found.shape == rgb.shape and np.abs(found - rgb).mean() < 4
    assert folders.FORMATS[-1] == "HEIF"
    assert data.build_dataset("folder", tmp_path, channels=1).image(0).shape == (1, 64, 48)


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    page = (DOCS / "data.md").read_text()
    section = re.search(r"^## Channels and 16 bits\n(.*?)(?=^## )", page, re.M | re.S)[1]
    (block,) = re.findall(r"^```bash\n(.*?)^```", section, re.M | re.S)
    place(tmp_path / "xrays", 1)
    place(tmp_path / "fields", 6)
    monkeypatch.chdir(tmp_path)
    scripts = {"main_moco_isl.py": main_moco_isl, "main_knn.py": main_knn}
    smaller = "-j 0 --device cpu".split()
    tiny = "-a resnet18w16 -b 8 --moco-k 16 --epochs 1 --image-size 16".split()
    for command in block.replace("\\\n", "").splitlines():
        python, script, *flags = shlex.split(command)
        more = tiny if script == "main_moco_isl.py" else []
        assert python == "python" and scripts[script].main([*flags, *smaller, *more]) == 0
    assert "measured on 24 images" in capsys.readouterr().out


def test_nothing_warns_of_a_read_only_array():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(encoded(RAMP, "PNG"), 1)
        read(encoded(RAMP.astype(np.uint8), "PNG"), 1)


# ---- other sources -------------------------------------------------------------------------------


def six_bands(split):
    return [(torch.from_numpy(BANDS.astype(np.float32) / 65535) * (i + 1) / 9, i) for i in range(8)]


def test_lists_shards_and_functions_give_channels_too(tmp_path, monkeypatch):
    folder = place(tmp_path / "in", 6, 6)
    images = data.build_dataset("folder", folder, channels=6)
    names = [images.path(i) for i in range(6)]
    (tmp_path / "train.txt").write_text("\n".join(names))
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for i, name in enumerate(names):
            tar.add(name, f"{i}{Path(name).suffix}")
    for source in ("train.txt", "train.tar"):
        found = data.build_dataset("folder", tmp_path / source, channels=6)
        assert len(found) == 6
        assert all(torch.equal(found.image(i), images.image(i)) for i in range(6))
        assert len(data.build_dataset("folder", tmp_path / source)) == 3  # arrays are none in RGB
    monkeypatch.setitem(sys.modules, "own_bands", sys.modules[__name__])
    found = data.build_dataset("own_bands:six_bands", channels=6)
    pixels, full = found.pixels(8 - 1, lambda W, H: 1)
    assert torch.equal(pixels, six_bands("train")[7][0]) and full == (9, 12)
    with pytest.raises(BadInput, match=r"six_bands/train\[0\]: it has 6 channels"):
        data.build_dataset("own_bands:six_bands")
    assert data.measure(found)[0] == pytest.approx(
        [x / 2 for x in (BANDS.mean((1, 2)) / 65535).tolist()], rel=1e-4
    )
