"""Data sets: what is read from which files, what works, and what a user is told when it cannot."""

import os
import pickle
import shutil
import struct
import sys
import types
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from moco_isl.data import (
    SETS,
    bands,
    build_dataset,
    datasets,
    decode,
    describe,
    eval_loader,
    folders,
    get_eval_transform,
    holdout,
    load_into_memory,
    names_below,
    native_size,
)
from moco_isl.errors import BadInput
from moco_isl.evaluation.subject import labelled


def save(path, colour=(200, 30, 90), size=(12, 10), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


@pytest.fixture
def tree(tmp_path):
    for split, classes in (("train", ("cat", "dog", "owl")), ("val", ("dog", "owl"))):
        for c in classes:
            for i in range(3):
                save(tmp_path / split / c / f"{i}.png", (i, len(c), 0))
    save(tmp_path / "train" / "cat" / "deeper" / "still" / "9.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    return tmp_path


# ---------------------------------------------------------------- digits


def test_digits_are_the_files_in_file_order():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits()
    train, val = build_dataset("digits"), build_dataset("digits", split="val")
    assert (len(train), len(val)) == (1437, 360)
    assert torch.equal(torch.cat([train.labels, val.labels]), torch.from_numpy(load_digits.target))
    images = torch.cat([train.images, val.images])  # [1797, 3, 16, 16]
    assert (
        images.dtype == torch.uint8
        and torch.equal(images[:, 0], images[:, 1])
        and torch.equal(images[:, 0], images[:, 2])
    )
    small = torch.from_numpy(load_digits.images).float() * 255 / 16
    # the corners of a bilinear doubling are the corners of the original
    corner = images[:, 0, ::15, ::15].float()
    assert (corner - small[:, ::7, ::7]).abs().max() <= 0.5
    assert (images[:, 0].float().mean((1, 2)) - small.mean((1, 2))).abs().max() < 8
    image, label = train[3]
    assert torch.equal(image, train.images[3]) and label == 3 and train.path(3) == "digits/train[3]"
    assert train.classes == list("0123456789") and train.size_hint == 16


# ---------------------------------------------------------------- folders


def test_folder_is_read_as_imagefolder_does(tree):
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert IMG_EXTENSIONS == folders.IMG_EXTENSIONS
    ours, theirs = build_dataset("folder", tree), ImageFolder(tree / "train")
    assert [(ours.path(i), int(ours.labels[i])) for i in range(len(ours))] == theirs.samples
    assert (
        ours.classes == theirs.classes == ["cat", "dog", "owl"]
        and ours.size_hint is None
        and len(ours) == 10
    )
    for i in range(len(ours)):
        assert ours[i][0].tobytes() == theirs[i][0].tobytes() and ours[i][1] == theirs[i][1]


def test_folders_in_folders_come_in_the_order_of_their_paths(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in (
        "cat/b",
        "cat/a/b/1",
        "cat/a-b/2",
        "cat/a/c",
        "cat/a.b/3",
        "cat-2/a",
        "Cat/z",
        "cat/a/b/0",
        "cat/A/9",
    ):
        save(tmp_path / f"{name}.png")
    ours = build_dataset("folder", tmp_path)
    assert [(ours.path(i), int(ours.labels[i])) for i in range(len(ours))] == ImageFolder(
        tmp_path
    ).samples


def test_val_is_numbered_by_the_classes_of_train(tree):
    val = build_dataset("folder", tree, "val")
    assert val.classes == ["cat", "dog", "owl"] and val.labels.tolist() == [1, 1, 1, 2, 2, 2]


def test_flat_folder_has_no_labels(tmp_path):
    for name in ("b.png", "a.JPG", "c.bmp", ".hidden.png"):
        save(tmp_path / name)
    flat = build_dataset("folder", tmp_path)
    assert [flat.path(i) for i in range(len(flat))] == [
        str(tmp_path / n) for n in ("a.JPG", "b.png", "c.bmp")
    ]
    assert flat.labels is None and flat.classes is None and flat[0][1] == -1


def test_flat_train_and_class_folders_without_train(tmp_path, tree):
    save(tmp_path / "flat" / "train" / "a.png")
    assert build_dataset("folder", tmp_path / "flat").labels is None
    assert build_dataset("folder", tree / "train").classes == ["cat", "dog", "owl"]


def test_images_beside_class_folders_are_used_too_and_then_none_has_a_label(tree):
    before = build_dataset("folder", tree)
    save(tree / "train" / "stray.png")
    now = build_dataset("folder", tree)
    assert (
        names_below(now) == ["stray.png", *names_below(before)]
        and now.labels is None
        and now.classes is None
    )
    assert describe(train=now).splitlines()[1:] == [
        "=> warning: train: 1 of 11 lie beside the class folders: all are used, and none has a"
        f" label; expected '{tree}/train/<class>/<image>' where there are classes"
    ]
    with pytest.raises(
        BadInput,
        match=r"have no labels \(1 of 11 lie beside the class folders\): expected a folder a class",
    ):
        labelled("folder", tree, "train")


def test_hidden_files_and_folders_are_no_images_and_no_classes(tree):
    before = {split: build_dataset("folder", tree, split) for split in ("train", "val")}
    for split in before:
        (tree / split / ".Trash").mkdir()
        (tree / split / ".Trash" / "1.png").write_bytes(b"no image")
        (tree / split / "dog" / "._1.png").write_bytes(b"what a desktop leaves beside an image")
        save(tree / split / "dog" / ".thumbnails" / "1.png")
    for split, dataset in before.items():
        now = build_dataset("folder", tree, split)
        assert [now.path(i) for i in range(len(now))] == [
            dataset.path(i) for i in range(len(dataset))
        ]
        assert torch.equal(now.labels, dataset.labels) and now.classes == dataset.classes == [
            "cat",
            "dog",
            "owl",
        ]


@pytest.mark.parametrize("target", ["loop", "gone"])
def test_a_link_that_leads_nowhere_in_place_of_a_class_is_refused(tree, target):
    (tree / "train" / "loop").symlink_to(target)
    with pytest.raises(BadInput, match="cannot read '.*loop': .*; expected a folder of images"):
        build_dataset("folder", tree)


def as_before(tree, images, labels, repeated):
    """The tree's images and labels are those of before, and so many folders are said to be
    repeated.
    """
    now = build_dataset("folder", tree)
    assert (
        names_below(now) == images
        and now.labels.tolist() == labels
        and now.classes == ["cat", "dog", "owl"]
    )
    assert (
        f"skipped {repeated + 1}: " in now.layout.summary
        and f"{repeated} repeated folder" in now.layout.summary
    )


def test_each_real_folder_is_read_once_whatever_links_lead_to_it(tree):
    before = build_dataset("folder", tree)
    images, labels, train = names_below(before), before.labels.tolist(), tree / "train"
    (train / "train").symlink_to(train)  # `ln -s train` run twice
    as_before(tree, images, labels, 1)
    (train / "cat" / "dogs").symlink_to("../dog")  # two classes linked to each other
    (train / "dog" / "cats").symlink_to("../cat")
    as_before(tree, images, labels, 3)
    (train / "cat" / "1").symlink_to(".")  # two self-links
    (train / "cat" / "2").symlink_to(".")
    (train / "up").symlink_to("..")  # not a way to the images of val
    as_before(tree, images, labels, 6)
    assert build_dataset("folder", tree, "val").labels.tolist() == [1, 1, 1, 2, 2, 2]


def test_a_class_folder_may_be_a_link_and_wins_against_links_deeper_down(tree, tmp_path_factory):
    away = tmp_path_factory.mktemp("away")
    save(away / "dog" / "sub" / "7.png")
    shutil.rmtree(tree / "train" / "dog")
    (tree / "train" / "dog").symlink_to(away / "dog")
    (tree / "train" / "cat" / "a").symlink_to(away / "dog")  # sorted before it
    now = build_dataset("folder", tree)
    assert now.labels.tolist() == [0] * 4 + [1] + [2] * 3 and now.path(4) == str(
        tree / "train" / "dog" / "sub" / "7.png"
    )


@pytest.mark.parametrize("target", ["dog", "cat/deeper"])
def test_a_class_that_is_a_link_into_another_is_refused(tree, target):
    (tree / "train" / "animal").symlink_to(target)
    with pytest.raises(
        BadInput,
        match=(
            f"train/animal' is a link into the class '{target[:3]}': expected .*; remove the link"
        ),
    ):
        build_dataset("folder", tree)


def test_links_to_single_images_are_images(tree):
    (tree / "train" / "dog" / "0b.png").symlink_to("0.png")
    assert names_below(build_dataset("folder", tree))[4:7] == [
        "dog/0.png",
        "dog/0b.png",
        "dog/1.png",
    ]


@pytest.mark.parametrize("folder", ["train", "train/dog", "train/cat/deeper/still"])
def test_a_folder_that_cannot_be_read_is_refused(tree, monkeypatch, folder):
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(tree / folder):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        BadInput, match=f"cannot read '.*{folder}': Permission denied; expected .* make it readable"
    ):
        build_dataset("folder", tree)


@pytest.fixture
def without_heif(monkeypatch):
    """As if pillow-heif were not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    endings, formats = folders._kinds_of_images()
    monkeypatch.setattr(folders, "ENDINGS", endings)
    monkeypatch.setattr(folders, "FORMATS", formats)


def test_what_is_skipped_is_counted_by_ending(tree, without_heif):
    for i in range(11):
        (tree / "train" / "owl" / f"{i}.HEIC").touch()
    for name in ("train/1.gif", "train/dog/.DS_Store", "train/dog/README", "train/dog/x.\nodd"):
        (tree / name).touch()
    (tree / "train" / "dog" / "link").symlink_to("nowhere")
    (tree / "train" / "empty").mkdir()
    assert (
        describe(train=build_dataset("folder", tree), val=build_dataset("folder", tree, "val"))
        == "=> train: 10 images, 3 classes and 1 class folder without images ('empty'); skipped 17:"
        " 11 .heic, 1 .gif, 1 .txt, 1 broken link, 1 hidden, 2 others; convert them, or pip"
        " install 'moco_isl[heif]'\n=> val: 6 images, 2 classes"
    )
    assert describe(train=build_dataset("digits")) == "=> train: 1437 images, 10 classes"
    for path in (tree / "train").rglob("*.png"):
        path.unlink()
    with pytest.raises(BadInput, match="no images in .*; skipped 17: 11 .heic, "):
        build_dataset("folder", tree)


def test_images_are_counted_once_however_many_classes_there_are(tree, monkeypatch):
    """Counting them a class took minutes for the 21,841 classes of ImageNet-21k."""
    counts, counted = folders.Found.counts, []
    monkeypatch.setattr(
        folders.Found, "counts", lambda found: counted.append(found.root) or counts(found)
    )
    assert build_dataset("folder", tree).layout.summary.startswith("10 images, 3 classes")
    assert counted == [str(tree / "train")]


def test_with_pillow_heif_photos_of_phones_are_images(monkeypatch):
    registered = []
    fake = types.SimpleNamespace(register_heif_opener=lambda: registered.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    endings, formats = folders._kinds_of_images()
    assert (
        registered
        and endings[-2:] == (".heic", ".heif")
        and formats[-1] == "HEIF"
        and {".jpg", ".webp"} < set(endings)
    )
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert folders._kinds_of_images()[1] == ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")


def test_splits_that_would_be_classes_are_refused(tmp_path):
    for split in ("Training", "Testing"):
        for name in ("cat", "ship"):
            save(tmp_path / split / name / "1.png")
    with pytest.raises(
        BadInput, match="'Testing', 'Training', which look like splits, .* such as '.*/Training'$"
    ):
        build_dataset("folder", tmp_path)
    assert build_dataset("folder", tmp_path / "Training").classes == ["cat", "ship"]
    (tmp_path / "Training").rename(tmp_path / "train")
    assert f"'Testing' beside train/ in '{tmp_path}' is not read" in describe(
        train=build_dataset("folder", tmp_path)
    )
    with pytest.raises(BadInput, match="val is missing, and it holds 'Testing'; expected"):
        build_dataset("folder", tmp_path, "val")


def test_classes_beside_one_that_is_named_train_are_said_not_to_be_read(tmp_path):
    for name in ("bus", "car", "train"):
        save(tmp_path / "all" / name / "1.png")
    (tmp_path / "all" / "notes").mkdir()
    assert "'bus', 'car' beside train/ in " in describe(
        train=build_dataset("folder", tmp_path / "all")
    )
    (tmp_path / "all").rename(tmp_path / "train")
    dataset = build_dataset("folder", tmp_path)
    assert dataset.classes == ["bus", "car", "notes", "train"] and "not read" not in describe(
        train=dataset
    )


def test_a_val_that_is_train_is_named(tree):
    shutil.rmtree(tree / "val")
    (tree / "val").symlink_to("train")
    said = describe(train=build_dataset("folder", tree), val=build_dataset("folder", tree, "val"))
    assert (
        said.count("warning") == 1
        and "=> warning: val: val/ is a link to train/, so each image" in said
    )


def test_splits_among_or_inside_of_classes_are_named(tree):
    save(tree / "train" / "Test" / "1.png")
    save(tree / "train" / "owl" / "valid" / "1.png")
    now = build_dataset("folder", tree)
    assert now.labels.tolist() == [0] + [1] * 4 + [2] * 3 + [3] * 4
    assert "=> warning: train: 'Test', 'owl/valid' look like splits" in describe(train=now)


@pytest.mark.parametrize(
    "name, looks",
    [
        ("TRAIN", True),
        ("training_set", True),
        ("val2017", True),
        ("test-images", True),
        ("Validation", True),
    ]
    + [(name, False) for name in ("trains", "protest", "contest", "valley", "tester", "dog")],
)
def test_names_of_splits(name, looks):
    assert folders.is_split_name(name) == looks


def test_one_class_is_no_label(tmp_path):
    for name in ("cat", "ship"):
        save(tmp_path / "train" / "images" / name / "1.png")
    one = build_dataset("folder", tmp_path)
    assert one.labels is None and one.classes is None and len(one) == 2
    found = "all lie in one class folder, 'images', which holds only folders ('cat', 'ship')"
    assert (
        describe(train=one)
        == f"=> train: 2 images, 1 class\n=> warning: train: {found}: nothing can be judged by one"
        f" class, so they count as without labels; expected '{tmp_path}/train/<class>/<image>'"
        " where there are classes"
    )
    with pytest.raises(BadInput) as error:
        labelled("folder", tmp_path, "train")
    assert f"have no labels ({found}): expected a folder a class" in str(error.value)
    save(tmp_path / "train" / "other" / "1.png")
    two = describe(train=build_dataset("folder", tmp_path))
    assert (
        "=> warning: train: 1 of 2 classes hold only folders, such as 'images' ('cat', 'ship'),"
        " whose images count" in two
    )


def test_a_val_split_of_one_class_keeps_its_label(tree):
    shutil.rmtree(tree / "val" / "dog")
    assert labelled("folder", tree, "val").labels.tolist() == [2, 2, 2]


def test_a_flat_train_beside_classes_in_val(tmp_path):
    save(tmp_path / "train" / "1.png")
    save(tmp_path / "val" / "a" / "1.png")
    save(tmp_path / "val" / "b" / "1.png")
    assert build_dataset("folder", tmp_path, "val").labels.tolist() == [0, 1]


def test_a_path_that_no_folder_can_have_is_told_in_one_line(tmp_path):
    with pytest.raises(BadInput, match="cannot read .*: File name too long; expected a folder"):
        build_dataset("folder", tmp_path / ("x" * 300))


def test_names_beyond_ascii_work(tmp_path):
    save(tmp_path / "train" / "Äpfel" / "grün é.png")
    assert build_dataset("folder", tmp_path).path(0).endswith("Äpfel/grün é.png")


def bad_folder_cases(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words" / "a").mkdir(parents=True)
    (tmp_path / "words" / "a" / "x.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    save(tmp_path / "only_train" / "train" / "a" / "x.png")
    save(tmp_path / "only_val" / "val" / "a" / "x.png")
    save(tmp_path / "strange" / "train" / "a" / "x.png")
    save(tmp_path / "strange" / "val" / "b" / "x.png")
    return [
        ("nowhere", "train", "no such folder"),
        ("empty", "train", "no images in"),
        ("words", "train", "no images in"),
        ("file", "train", "not a folder"),
        ("only_train", "val", "no validation images"),
        ("only_val", "train", "no training images"),
        ("strange", "val", "a class that train lacks: 'b'"),
        ("empty", "val", "no validation images"),
    ]


def test_bad_folders_are_told_in_one_line(tmp_path):
    for folder, split, message in bad_folder_cases(tmp_path):
        with pytest.raises(BadInput) as error:
            build_dataset("folder", tmp_path / folder, split)
        text = str(error.value)
        assert message in text and "expected" in text and "\n" not in text and folder in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("imagenet", "x"), "no data set named 'imagenet'"),
        (("folder", None), "give DIR"),
        (("folder", "x", "test"), "no split named 'test'"),
    ],
)
def test_bad_names(arguments, message):
    with pytest.raises(BadInput, match=message):
        build_dataset(*arguments)


# ---------------------------------------------------------------- kinds of files

GREY16 = np.linspace(0, 65535, 12 * 10).astype(np.uint16).reshape(10, 12)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    Image.fromarray(GREY16).save(tmp_path / f"x.{suffix}")
    got = np.asarray(decode(tmp_path / f"x.{suffix}"))
    assert got.shape == (10, 12, 3) and (got == np.round(GREY16 / 257.0)[..., None]).all()


@pytest.mark.parametrize(
    "values, top",
    [
        (GREY16.astype(np.int32), 65535),
        ((GREY16 / 65535).astype(np.float32), 1),
        ((GREY16 / 257).astype(np.float32), 255),
    ],
)
def test_tiffs_of_integers_and_floats_are_scaled(tmp_path, values, top):
    Image.fromarray(values).save(tmp_path / "x.tif")
    got = np.asarray(decode(tmp_path / "x.tif"))[..., 0]
    assert np.abs(got - values / top * 255.0).max() <= 0.51


def decoded(values, path):
    """Grey values 0..255 [h, w] of a TIFF with these values, and why its range is no sure thing."""
    Image.fromarray(values).save(path)
    said = []
    grey = np.asarray(decode(path, unclear=said.append))[..., 0]
    pixels, _ = datasets.decode_pixels(str(path), min, said.append)
    assert (
        np.array_equal(pixels[0].numpy(), grey) and said[: len(said) // 2] == said[len(said) // 2 :]
    )
    return grey, said[: len(said) // 2]


@pytest.mark.parametrize("top", [1, 255, 65535])
@pytest.mark.parametrize(
    "value, becomes",
    [
        (1.0001, 255),
        (2.0, 255),
        (1e9, 255),
        (np.inf, 255),
        (-1.0, 0),
        (-1e9, 0),
        (-np.inf, 0),
        (np.nan, 0),
    ],
)
def test_one_pixel_does_not_decide_on_the_range_of_floats(tmp_path, top, value, becomes):
    values = (GREY16 / 65535 * top).astype(np.float32)
    want = np.floor(values / top * 255.0 + 0.5)
    values[3, 4], want[3, 4] = value * top, becomes
    got, said = decoded(values, tmp_path / "x.tif")
    assert np.abs(got - want).max() <= 1 and got[3, 4] == becomes
    unclear = np.isfinite(value) and value != 1.0001
    assert len(said) == unclear and (
        not unclear
        or said[0].endswith(
            f": 0..{top} is taken as black to white; convert to 8 or 16 bits to choose yourself"
        )
    )


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_of_twelve_bits_are_said_to_come_out_dark(tmp_path, kind):
    values = (GREY16 // 16).astype(kind)
    got, said = decoded(values, tmp_path / "x.tif")
    assert got.max() <= 16 and len(said) == 1 and "0..65535 is taken as black to white" in said[0]
    assert decoded(np.zeros((10, 12), kind), tmp_path / "x.tif")[1] == []


@pytest.mark.parametrize("top, value", [(255, 100_000), (65535, 2**31 - 1), (65535, -(2**31))])
def test_one_pixel_does_not_decide_on_the_range_of_integers(tmp_path, top, value):
    values = np.linspace(0, top, 120).astype(np.int32).reshape(10, 12)
    want = np.floor(values / top * 255 + 0.5)
    values[3, 4], want[3, 4] = value, 255 * (value > 0)
    got, said = decoded(values, tmp_path / "x.tif")
    assert (
        np.array_equal(got, want)
        and len(said) == 1
        and f"reach from {values.min():g} to {values.max():g}: 0..{top} is" in said[0]
    )


@pytest.mark.parametrize("kind", [np.int32, np.float32])
@pytest.mark.parametrize(
    "low, high", [(-1000, 3000), (-5_000_000, 20_000_000), (0, 20_000_000), (-90, -10)]
)
def test_other_ranges_are_those_of_the_values_but_the_outermost(tmp_path, kind, low, high):
    values = np.linspace(low, high, 120).astype(kind).reshape(10, 12)
    inner = np.sort(values.ravel()).astype(np.float64)[2:-2]  # 1 % of 120, and one
    darkest = min(inner[0], 0)
    want = np.floor(((values - darkest) / (inner[-1] - darkest)).clip(0, 1) * 255 + 0.5)
    got, said = decoded(values, tmp_path / "x.tif")
    assert np.abs(got - want).max() <= 1 and got.max() == 255 and len(said) == 1


def range_by_sorting(values, tops):
    ordered = sorted(float(v) for v in values if np.isfinite(v))
    few = 1 + (len(ordered) - 1) // 100
    inner = ordered[few:-few] or ordered[:1]
    low, high = inner[0], inner[-1]
    for top in tops:
        if high <= 1.05 * top:
            return (0, top) if low >= -0.05 * max(high, 0) else (min(low, 0), high)
    return min(low, 0), high


def test_the_range_equals_that_by_sorting():
    rng = np.random.default_rng(0)
    for n in (3, 4, 99, 100, 101, 102, 250, 1000):
        for scale in (0.9, 1.04, 200, 60_000, 1e6):
            for shift in (0, -0.04, -0.5):
                values = (rng.random(n) + shift) * scale
                values[rng.integers(n, size=2)] = (np.nan, 10 * scale)
                low, high, _ = bands.value_range(values, (1, 255, 65535))
                wanted = range_by_sorting(values, (1, 255, 65535))
                assert (low, high) == wanted or wanted[0] == wanted[1] == low == high - 1, (
                    n,
                    scale,
                    shift,
                )


def test_unsigned_integers_of_32_bits_are_not_taken_for_negative_ones(tmp_path):
    values = np.linspace(0, 2**32 - 1, 120).astype(np.uint32).reshape(10, 12)
    Image.fromarray(values.view(np.int32)).save(tmp_path / "x.tif")
    content = (tmp_path / "x.tif").read_bytes()
    signed = struct.pack("<HHIHH", 339, 3, 1, 2, 0)  # SampleFormat, the tag that tells them apart
    assert content.count(signed) == 1
    (tmp_path / "x.tif").write_bytes(
        content.replace(signed, struct.pack("<HHIHH", 339, 3, 1, 1, 0))
    )
    got = np.asarray(decode(tmp_path / "x.tif", unclear=lambda _: None))[..., 0].ravel()
    assert (np.diff(got.astype(int)) >= 0).all() and got[0] == 0 and got[-1] == 255


def test_an_image_without_a_finite_value_is_unreadable(tmp_path):
    Image.fromarray(np.full((10, 12), np.nan, dtype=np.float32)).save(tmp_path / "0.tif")
    save(tmp_path / "1.png")
    assert load_into_memory(build_dataset("folder", tmp_path)).unreadable == [0]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unclear_range_is_said_once_a_data_set(tmp_path, capfd, workers):
    for i in range(6):
        Image.fromarray(np.full((10, 12), -5.0 - i, dtype=np.float32)).save(tmp_path / f"{i}.tif")
    dataset = build_dataset("folder", tmp_path)
    loader = eval_loader(
        dataset, transform=get_eval_transform("folder", 8), batch_size=2, workers=workers
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # in a worker too
        warnings.showwarning = lambda message, *_: os.write(2, str(message).encode())
        list(loader)
        loader.close()
        dataset.image(5)
    text = capfd.readouterr().err
    assert (
        text.count("values reach from") == 1
        and "0.tif': values reach from -5 to -5: -5..-4 is taken" in text
    )


def test_big_endian_sixteen_bits(tmp_path):
    Image.frombytes("I;16B", (12, 10), GREY16.astype(">u2").tobytes()).save(tmp_path / "x.tif")
    assert (np.asarray(decode(tmp_path / "x.tif"))[..., 0] == np.round(GREY16 / 257.0)).all()


@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGBA", "P", "PA"])
def test_grey_alpha_and_palette(tmp_path, mode):
    colour = Image.new("RGB", (12, 10), (200, 30, 90))
    image = colour.convert("P", palette=Image.Palette.ADAPTIVE) if mode in ("P", "PA") else colour
    path = tmp_path / ("x.tif" if mode == "PA" else "x.png")
    image.convert(mode).save(path)
    got = decode(path)
    assert got.mode == "RGB" and got.size == (12, 10)
    if mode in ("RGBA", "P", "PA"):
        assert got.tobytes() == colour.tobytes()
    elif mode != "1":
        assert got.tobytes() == colour.convert("L").convert("RGB").tobytes()


def test_cmyk(tmp_path):
    Image.new("CMYK", (12, 10), (0, 200, 100, 20)).save(tmp_path / "x.jpg")
    want = np.asarray(Image.new("CMYK", (1, 1), (0, 200, 100, 20)).convert("RGB")).astype(int)
    assert np.abs(np.asarray(decode(tmp_path / "x.jpg")).astype(int) - want).max() <= 3


def test_palette_with_transparency_keeps_its_colours_and_warns_not(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 30, 90])
    image.save(tmp_path / "x.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(tmp_path / "x.png").getpixel((0, 0)) == (200, 30, 90)


def test_orientation_tag_is_left_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    save(tmp_path / "x.jpg", exif=exif)
    assert decode(tmp_path / "x.jpg").size == (12, 10)


def test_large_jpegs_may_be_decoded_smaller_but_not_below(tmp_path):
    path = save(tmp_path / "x.jpg", size=(1000, 640))
    assert decode(path).size == (1000, 640)
    assert (
        decode(path, 300).size == (500, 320)
        and decode(path, 321).size == (1000, 640)
        and decode(path, 100).size == (250, 160)
    )


def png_chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def hostile(folder):
    """Files with the ending of an image that must not be opened, or not to the end."""
    os.mkfifo(folder / "1_pipe.jpg")
    (folder / "2_device.jpg").symlink_to("/dev/zero")
    (folder / "3_folder.jpg").symlink_to(folder.parent)
    (folder / "4_postscript.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 10\n%%EndComments\n"
    )
    Image.new("RGB", (12, 10)).save(folder / "5_gif.jpg", format="GIF")
    header = png_chunk(
        b"IHDR", struct.pack(">IIBBBBB", 1 << 15, 1 << 15, 8, 2, 0, 0, 0)
    )  # of a thousand million pixels
    (folder / "6_bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    )


def test_what_is_no_image_inside_is_unreadable_and_nothing_is_run_or_waited_for(
    tmp_path, monkeypatch
):
    run = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: run.append(True))
    save(tmp_path / "a" / "0.png")
    hostile(tmp_path / "a")
    dataset = build_dataset("folder", tmp_path / "a")
    assert len(dataset) == 7 and native_size(dataset) == 10
    for i in range(1, 7):
        with pytest.raises((OSError, Image.DecompressionBombError)):
            dataset.pixels(i, min)
    assert load_into_memory(dataset).unreadable == [1, 2, 3, 4, 5, 6] and not run


def test_a_file_of_a_terabyte_is_not_read_to_its_end(tmp_path):
    """Its holes take no room on the disk, and would in memory."""
    path = save(tmp_path / "x.jpg", size=(64, 48), quality=95)
    want = np.asarray(decode(path))
    os.truncate(path, 1 << 40)
    pixels, full = datasets.decode_pixels(str(path), min)
    assert (
        full == (48, 64)
        and np.array_equal(pixels.permute(1, 2, 0).numpy(), want)
        and np.array_equal(np.asarray(decode(path)), want)
    )


# ---------------------------------------------------------------- torchvision's sets


def fake_cifar(root, name):
    folder = root / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = {
        "cifar10": [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"],
        "cifar100": ["train", "test"],
    }[name]
    for file in files:
        labels = [0, 1, 2]
        batch = {
            "data": rng.integers(0, 256, (3, 3072), dtype=np.uint8),
            "labels" if name == "cifar10" else "fine_labels": labels,
        }
        (folder / file).write_bytes(pickle.dumps(batch))
    key = "label_names" if name == "cifar10" else "fine_label_names"
    (folder / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(
        pickle.dumps({key: ["a", "b", "c"]})
    )
    return pickle.loads((folder / files[-1]).read_bytes())


@pytest.mark.parametrize("name, M", [("cifar10", 15), ("cifar100", 3)])
def test_cifar_is_held_in_memory(tmp_path, monkeypatch, name, M):
    test = fake_cifar(tmp_path, name)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    train, val = build_dataset(name, tmp_path), build_dataset(name, tmp_path, "val")
    assert (
        train.images.shape == (M, 3, 32, 32)
        and train.images.dtype == torch.uint8
        and val.labels.tolist() == [0, 1, 2]
    )
    assert np.array_equal(val.images.numpy().reshape(3, -1), test["data"]) and val.classes == [
        "a",
        "b",
        "c",
    ]


def test_svhn_is_held_in_memory(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    X = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    for split in ("train", "test"):
        scipy_io.savemat(
            tmp_path / f"{split}_32x32.mat", {"X": X, "y": np.array([[1], [10], [3], [10]])}
        )
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    svhn = build_dataset("svhn", tmp_path, "val")
    assert np.array_equal(
        svhn.images.numpy(), X.transpose(3, 2, 0, 1)
    ) and svhn.labels.tolist() == [1, 0, 3, 0]
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(BadInput, match="pip install scipy"):
        build_dataset("svhn", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_missing_set_names_the_download_flag(tmp_path, name):
    with pytest.raises(BadInput, match="add --download") as error:
        build_dataset(name, tmp_path)
    assert str(tmp_path) in str(error.value) and "download=True" not in str(error.value)


def test_failed_download_is_told_in_one_line(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(BadInput, match="could not download cifar10 .*no route to host"):
        build_dataset("cifar10", tmp_path, download=True)


# ---------------------------------------------------------------- helpers


@pytest.mark.parametrize("in_memory", [True, False])
def test_holdout_is_disjoint_seeded_and_keeps_names(tree, in_memory):
    whole = build_dataset("folder", tree)
    if in_memory:
        whole = load_into_memory(whole)
    rest, held = holdout(whole, 4, seed=1)
    again, other = holdout(whole, 4, seed=1)[1], holdout(whole, 4, seed=2)[1]
    names = [[part.path(i) for i in range(len(part))] for part in (rest, held, again, other)]
    assert (len(rest), len(held)) == (6, 4) and set(names[0]) | set(names[1]) == {
        whole.path(i) for i in range(10)
    }
    assert names[1] == names[2] != names[3] and rest.classes == whole.classes
    labels = {whole.path(i): int(whole.labels[i]) for i in range(10)}
    for part in (rest, held):
        assert (
            [labels[part.path(i)] for i in range(len(part))]
            == part.labels.tolist()
            == [part[i][1] for i in range(len(part))]
        )
    for i in range(4):
        assert np.array_equal(np.asarray(held[i][0]), np.asarray(again[i][0]))


def test_holdout_of_everything_is_refused():
    with pytest.raises(BadInput, match="cannot hold out 360 of 360"):
        holdout(build_dataset("digits", split="val"), 360, 0)


def test_native_size_is_that_of_small_images_and_mocos_for_others(tmp_path):
    for i in range(5):
        save(tmp_path / "small" / f"{i}.png", size=(40, 30 + i))
        save(tmp_path / "large" / f"{i}.png", size=(400, 65 + i))
    (tmp_path / "small" / "0.png").write_bytes(b"broken")
    # upper median of 31, 32, 33, 34
    assert native_size(build_dataset("folder", tmp_path / "small")) == 33
    assert native_size(build_dataset("folder", tmp_path / "large")) == 224
    assert native_size(build_dataset("digits")) == 16


def test_native_size_of_nothing_readable(tmp_path):
    (tmp_path / "0.png").write_bytes(b"broken")
    with pytest.raises(BadInput, match="none of 1 images could be read"):
        native_size(build_dataset("folder", tmp_path))


def test_load_into_memory_equals_the_files_and_fills_in_for_broken_ones(tree):
    files = build_dataset("folder", tree)
    for i in (2, 9):
        open(files.path(i), "wb").close()
    held = load_into_memory(files)
    assert (
        held.unreadable == [2, 9] and held.labels is files.labels and held.path(9) == files.path(9)
    )
    for i in range(10):
        want = np.asarray(files[{2: 3, 9: 0}.get(i, i)][0]).transpose(2, 0, 1)
        assert np.array_equal(held.images[i].numpy(), want)
    assert holdout(held, 5, 0)[0].unreadable == [
        i for i, row in enumerate(holdout(held, 5, 0)[0].source.rows.tolist()) if row in (2, 9)
    ]


def test_load_into_memory_refuses_what_does_not_fit(tree):
    files = build_dataset("folder", tree)
    with pytest.raises(BadInput, match="images take"):
        load_into_memory(files, limit_bytes=100)
    save(tree / "train" / "owl" / "2.png", size=(12, 11))
    with pytest.raises(BadInput, match="expected 10x12, .*owl.2.png has 11x12"):
        load_into_memory(build_dataset("folder", tree))


def test_names_are_all_known():
    assert tuple(SETS) == ("folder", "cifar10", "cifar100", "svhn", "digits")
