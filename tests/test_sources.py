"""The same real images from a folder, a list, several folders, tar shards, Hugging Face data sets
and a function: equal pixels, names, labels and losses; resumed and on two ranks too.
"""

import csv
import io
import json
import os
import pickle
import re
import shlex
import shutil
import sys
import tarfile
from pathlib import Path

import datasets as hf
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

import main_knn
import main_lincls
import main_moco_isl
from launch import sweep
from moco_isl import data
from moco_isl.data import label_list, shards, sources
from moco_isl.errors import BadInput
from moco_isl.run import checkpoint
from moco_isl.training import resume
from tests.runs import Kill, Running, differences, metrics, run
from tests.test_bad_input import ask

SPLITS = {"train": 120, "val": 60}
FLAGS = (
    "-a digits --mlp --moco-dim 16 --moco-k 32 --moco-t 0.1 --moco-m 0.9 --image-size 16 -b 30"
    " -j 0 --seed 1 --lr 0.1 --cos --device cpu -p 1 --epochs 2 --isl-start 1 --isl-every 1"
    " --miner knn --isl-budget 3"
).split()


def png(image: torch.Tensor) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def digits() -> dict[str, list[tuple[str, str, bytes]]]:
    """(class, name, PNG) of some digits of each split, in the order of a folder of classes."""
    found = {}
    for split, n in SPLITS.items():
        whole = data.build_dataset("digits", split=split)
        rows = [(str(int(whole.labels[i])), f"{i:04}", png(whole.images[i])) for i in range(n)]
        found[split] = sorted(rows)
    return found


@pytest.fixture(scope="module")
def place(digits, tmp_path_factory) -> Path:
    """A folder in which these images lie in every way."""
    root = tmp_path_factory.mktemp("sources")
    for split, rows in digits.items():
        for label, name, content in rows:
            file = root / "folder" / split / label / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        paths = [f"{split}/{label}/{name}.png" for label, name, _ in rows]
        (root / "folder" / f"{split}.txt").write_text("# images\n" + "\n".join(paths) + "\n\n")
        with open(root / "folder" / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("id", "File", "Label")])
            table = [(i, path, row[0]) for i, (path, row) in enumerate(zip(paths, rows))]
            csv.writer(file).writerows(table)
        write_shards(root / "shards", split, rows)
        columns = {
            "id": list(range(len(rows))),
            "picture": [{"bytes": content, "path": None} for _, _, content in rows],
            "label": [int(label) for label, _, _ in rows],
        }
        kinds = {
            "id": hf.Value("int64"),
            "picture": hf.Image(),
            "label": hf.ClassLabel(names=[str(d) for d in range(10)]),
        }
        table = hf.Dataset.from_dict(columns, hf.Features(kinds))
        name = {"train": "train", "val": "validation"}[split]
        (root / "parquet" / "data").mkdir(parents=True, exist_ok=True)
        for i in range(2):
            part = table.shard(2, i, contiguous=True)
            part.to_parquet(root / "parquet" / "data" / f"{name}-{i:05}-of-00002.parquet")
        table.save_to_disk(root / "saved" / name)
        (root / "arrow").mkdir(exist_ok=True)
        arrow = next((root / "saved" / name).glob("*.arrow"))
        shutil.copy(arrow, root / "arrow" / f"{name}.arrow")
    (root / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    return root


def write_shards(folder: Path, split: str, rows: list, n: int = 50, **more) -> None:
    folder.mkdir(exist_ok=True)
    for start in range(0, len(rows), n):
        with webdataset.TarWriter(str(folder / f"{split}-{start // n:04}.tar")) as tar:
            for label, name, content in rows[start : start + n]:
                tar.write({"__key__": f"{label}/{name}", "png": content, "cls": int(label), **more})


# the ways that the same images in the same order are named, and whether they have labels
KINDS = {
    "folder": (["folder"], True),
    "text": (["folder/train.txt"], False),
    "csv": (["folder/train.csv"], True),
    "several": ([f"folder/train/{d}" for d in range(10)], False),
    "shards": (["shards"], True),
    "pattern": (["shards/train-{0000..0002}.tar"], True),
    "expanded": ([f"shards/train-{i:04}.tar" for i in range(3)], True),
    "parquet": (["parquet"], True),
    "parquet files": (["parquet/data/train-*.parquet"], True),
    "saved": (["saved"], True),
    "arrow": (["arrow/train.arrow"], True),
}


@pytest.fixture(autouse=True)
def inside(place, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(place)
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", place / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_has_the_same_images(place, digits, kind, tmp_path):
    dirs, labelled = KINDS[kind]
    for split in SPLITS if kind != "several" else ["train"]:
        dataset = data.build_dataset("folder", dirs, split)
        copy = pickle.loads(pickle.dumps(dataset))  # as a spawned worker has it
        assert len(dataset) == len(digits[split])
        names = data.names_below(dataset)
        assert len(set(names)) == len(names) and not any(name.startswith("/") for name in names)
        assert data.names_below(data.holdout(dataset, 5, 0)[0]) == [
            names[i] for i in data.holdout(dataset, 5, 0)[0].rows
        ]
        for i, (label, _, content) in enumerate(digits[split]):
            expected = data.decode(io.BytesIO(content))
            for one in (dataset, copy):
                assert one.image(i).tobytes() == expected.tobytes()
                pixels, full = one.pixels(i, min)
                assert torch.equal(pixels, one_tensor(expected)) and full == (16, 16)
            if labelled:
                assert dataset.classes[dataset.labels[i]] == label
        assert (dataset.labels is not None) == labelled
        assert data.native_size(dataset) == 16
        said = data.describe(train=dataset)
        assert said.startswith(f"=> train: {len(dataset)} images"), said
        assert "warning" not in said and ("10 classes" in said) == labelled, said


def one_tensor(image: Image.Image) -> torch.Tensor:
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3).permute(2, 0, 1)


def test_jpegs_in_shards_are_decoded_as_those_of_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(3):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            coarse.resize((320, 240)).save(tmp_path / "photos" / f"{i}.jpg")
            tar.write({"__key__": str(i), "jpg": (tmp_path / "photos" / f"{i}.jpg").read_bytes()})
    photos, packed = (data.build_dataset("folder", tmp_path / name) for name in ("photos", "a.tar"))
    for i in range(3):
        for least in (240, 120, 30):  # of its full size through torchvision, smaller ones by PIL
            one, other = (x.pixels(i, lambda W, H: least) for x in (photos, packed))
            assert torch.equal(one[0], other[0]) and one[1] == other[1] == (240, 320)
            assert (min(one[0].shape[1:]) < 240) == (least < 240)
        assert photos.image(i, 30).tobytes() == packed.image(i, 30).tobytes()
    assert data.native_size(packed) == 224


# ---- runs --------------------------------------------------------------------------------------


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out) if line["kind"] == "step"]


@pytest.fixture(scope="module")
def from_folder(place, tmp_path_factory) -> Path:
    """A run on the folder: 8 steps and a round."""
    out = tmp_path_factory.mktemp("runs") / "folder"
    assert main_moco_isl.main([str(place / "folder"), *FLAGS, "--out", str(out)]) == 0
    assert len(losses(out)) == 8
    return out


@pytest.mark.parametrize("kind", ["text", "several", "pattern", "parquet", "saved", "own"])
def test_a_run_has_the_losses_of_one_on_the_folder_bit_for_bit(
    kind, place, from_folder, own, tmp_path
):
    where = ["--dataset", "own_images:plain"] if kind == "own" else KINDS[kind][0]
    assert main_moco_isl.main([*where, *FLAGS, "--out", str(tmp_path / "out")]) == 0
    assert losses(tmp_path / "out") == losses(from_folder)
    one, other = (
        checkpoint.load(out / "checkpoint_last.pth.tar")["state_dict"]
        for out in (from_folder, tmp_path / "out")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_on_shards_that_is_killed_and_resumed_equals_an_unbroken_one_on_the_folder(
    place, from_folder, tmp_path
):
    argv = [place / "shards", *FLAGS, "--save-every", "3", "--out", tmp_path / "out"]
    argv[argv.index("-j") + 1] = "2"
    kill = Kill("save", 3, 60)  # of four: after 3, 4, 7 and 8 steps
    broken = Running(argv, tmp_path / "log", kill=(0, kill))
    assert broken.codes() == [-9], broken.said()
    run([*argv, "--resume", "auto"], tmp_path / "log")
    found = differences(from_folder, tmp_path / "out")
    assert [place for place in found if not place.endswith(".isl.images")] == []  # their names
    assert len(found) == 3


def test_two_ranks_read_the_shards_as_one(place, tmp_path):
    argv = [place / "shards", *FLAGS]
    argv = argv[: argv.index("--isl-start")]
    run([*argv, "--out", tmp_path / "two"], tmp_path / "log", ranks=2)
    run([place / "folder", *argv[1:], "--out", tmp_path / "one"], tmp_path / "log", ranks=2)
    assert losses(tmp_path / "two") == losses(tmp_path / "one") and len(losses(tmp_path / "two"))


def test_a_run_goes_on_where_the_images_have_moved_but_not_with_others(place, digits, tmp_path):
    argv = [*FLAGS, "--out", str(tmp_path / "out")]
    shutil.copytree(place / "shards", tmp_path / "here")
    assert ask([str(tmp_path / "here"), *argv, "--max-steps", "3"])[0] == 0
    (tmp_path / "here").rename(tmp_path / "there")
    code, _, err = ask([str(tmp_path / "there"), *argv, "--resume", "auto"])
    assert (code, err) == (0, "")
    digest = lambda path: resume.images_of(data.build_dataset("folder", path))
    assert digest(place / "shards") == digest(tmp_path / "there")
    (tmp_path / "there" / "train-0002.tar").unlink()
    code, _, err = ask([str(tmp_path / "there"), *argv, "--resume", "auto", "--epochs", "3"])
    assert code == 2 and err.count("\n") == 1


@pytest.mark.parametrize("kind", ["csv", "pattern", "parquet", "own"])
def test_knn_and_the_probe_judge_every_source_alike(kind, own, from_folder, judged, tmp_path):
    where = ["--dataset", "own_images:plain"] if kind == "own" else KINDS[kind][0]
    assert judge(from_folder, where, tmp_path) == judged


@pytest.fixture(scope="module")
def judged(place, from_folder, tmp_path_factory):
    return judge(from_folder, [str(place / "folder")], tmp_path_factory.mktemp("judged"))


def judge(run_folder: Path, where: list[str], out: Path) -> tuple:
    """What kNN and a probe say of a run, judged on these images."""
    flags = ["--pretrained", str(run_folder / "checkpoint_last.pth.tar"), *where, "-j", "0"]
    flags += ["--device", "cpu", "--out"]
    assert main_knn.main([*flags, str(out / "knn")]) == 0
    probe = "--epochs 1 -b 32 --lr 1 --seed 1 -p 9".split()
    assert main_lincls.main([*flags, str(out / "probe"), *probe]) == 0
    knn, probe = (json.loads((out / x / "results.json").read_text()) for x in ("knn", "probe"))
    assert (knn["protocol"], knn["queries"], probe["val_images"]) == ("val", 60, 60)
    return knn["results"], probe["classifiers"]


@pytest.mark.parametrize("kind", ["csv", "shards", "parquet", "two"])
def test_decoded_images_are_kept_and_decoded_anew_where_they_have_changed(
    kind, place, digits, tmp_path
):
    shutil.copytree(place / "shards", tmp_path / "shards")
    shutil.copytree(place / "folder", tmp_path / "folder")
    shutil.copytree(place / "parquet", tmp_path / "parquet")
    where = {"csv": "folder/train.csv"}.get(kind, kind)
    dirs = ["shards", "folder"] if kind == "two" else [where]
    dirs = [str(tmp_path / one) for one in dirs]
    open_it = lambda: data.build_dataset("folder", dirs)
    said = []
    held = data.hold_cached(open_it(), tmp_path / "cache", say=said.append)
    assert "decoded and kept" in said[-1]
    again = data.hold_cached(open_it(), tmp_path / "cache", say=said.append)
    assert "from cache" in said[-1] and torch.equal(held.images, again.images)
    assert data.names_below(again) == data.names_below(open_it())
    changed = {
        "csv": "folder/train/3/0003.png",
        "shards": "shards/train-0000.tar",
        "parquet": "parquet/data/train-00000-of-00002.parquet",
        "two": "shards/train-0000.tar",
    }
    os.utime(tmp_path / changed[kind], (1, 1))
    data.hold_cached(open_it(), tmp_path / "cache", say=said.append)
    assert "is stale" in said[-2] and "decoded and kept" in said[-1]


@pytest.mark.parametrize("kind", ["csv", "shards", "parquet", "two"])
def test_a_list_of_labels_names_images_of_every_source(kind, digits, tmp_path):
    dirs = ["shards", "folder/train.csv"] if kind == "two" else KINDS[kind][0]
    dataset = data.build_dataset("folder", dirs)
    rows = [row for _ in range(len(dataset) // 120) for row in digits["train"]]
    names = data.names_below(dataset)
    if kind == "parquet":
        names = [str(i) for i in range(len(names))]
    lines = [f"{name},{row[0]}" for name, row in zip(names, rows)]
    (tmp_path / "known.txt").write_text("\n".join(lines))
    train = data.holdout(dataset, 7, 0)[0]
    known = label_list.read_labels(str(tmp_path / "known.txt"), train, dataset, "--isl-check")
    assert known.tolist() == [int(rows[i][0]) for i in train.rows]


def test_unreadable_images_are_named_and_replaced(place, digits, tmp_path):
    rows = [(a, b, b"no image" if i == 7 else c) for i, (a, b, c) in enumerate(digits["train"])]
    write_shards(tmp_path / "broken", "train", rows)
    argv = [str(tmp_path / "broken"), *FLAGS, "--max-steps", "4"]
    code, out, err = ask([*argv, "--out", str(tmp_path / "a")])
    name = f"{tmp_path}/broken/train-0000.tar/{rows[7][0]}/{rows[7][1]}.png"
    assert code == 3 and name in err
    code, out, err = ask([*argv, "--out", str(tmp_path / "b"), "--max-bad-images", "1"])
    assert code == 0 and name in out


# ---- splits, names and labels ------------------------------------------------------------------


def test_the_split_of_a_file_is_read_off_its_name():
    for name, split in (
        ("train-0001.tar", "train"),
        ("data/validation-00000-of-00002.parquet", "validation"),
        ("cats_val2017.csv", "val"),
        ("Training.txt", "train"),
        ("trainer.txt", ""),
        ("latest.tar", ""),
        ("0001.tar", ""),
    ):
        assert sources.split_of(name) == split, name


def test_several_sources_have_names_that_differ_and_share_their_classes(digits, tmp_path):
    for place in ("x/photos", "y/photos", "z"):
        for label, name, content in digits["train"][:40]:
            file = tmp_path / place / label / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    shutil.rmtree(tmp_path / "y" / "photos" / "0")
    (tmp_path / "more.csv").write_text("path,label\nextra/1.png,10\nextra/2.png,9\n")
    (tmp_path / "extra").mkdir()
    for name in "12":
        (tmp_path / "extra" / f"{name}.png").write_bytes(digits["train"][0][2])
    dirs = [str(tmp_path / name) for name in ("x/photos", "y/photos", "z", "more.csv")]
    dataset = data.build_dataset("folder", dirs)
    names = [dataset.name(i) for i in range(len(dataset))]
    assert {name.rsplit("/", 2)[0] for name in names} == {
        "x/photos",
        "y/photos",
        f"{tmp_path.name}/z",
        f"{tmp_path.name}/more.csv",
    }
    assert dataset.classes == ["0", "1", "10", "2", "3", "9"]
    assert [dataset.classes[label] for label in dataset.labels[-2:]] == ["10", "9"]
    assert sources.distinct(["/a/x", "/b/y"]) == ["x", "y"]
    said = data.describe(train=dataset).splitlines()
    assert len(said) == 5 and said[0] == f"=> train: {len(dataset)} images of 4 sources, 6 classes"


def test_val_is_numbered_by_the_classes_of_train(digits, tmp_path):
    few = [row for row in digits["val"] if row[0] in "79"]
    write_shards(tmp_path / "a", "train", digits["train"])
    write_shards(tmp_path / "a", "val", few)
    val = data.build_dataset("folder", tmp_path / "a", "val")
    assert [val.classes[i] for i in val.labels] == [row[0] for row in few] and len(
        val.classes
    ) == 10
    seven = [row for row in digits["train"] if row[0] != "7"]
    write_shards(tmp_path / "b", "train", seven)
    write_shards(tmp_path / "b", "val", few)
    with pytest.raises(BadInput, match="has a label that train lacks: '7'"):
        data.build_dataset("folder", tmp_path / "b", "val")


def test_labels_of_json_and_of_some_images(digits, tmp_path):
    rows = digits["train"][:4]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for i, (_, name, content) in enumerate(rows):
            tar.write({"__key__": name, "jpg": content, "json": {"label": f"c{i % 2}"}})
        tar.write({"__key__": "text", "txt": "no image"})
    dataset = data.build_dataset("folder", tmp_path / "a.tar")
    assert [dataset.classes[i] for i in dataset.labels] == ["c0", "c1"] * 2
    assert "4 images, 2 classes; skipped 1: 1 .txt" in data.describe(train=dataset)
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("é" * 150 + ".png", "b.png", "b.cls", "b.seg.png"):  # one with a long header
            content = b"1" if name == "b.cls" else rows[0][2]
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    dataset = data.build_dataset("folder", tmp_path / "b.tar")
    assert dataset.labels is None and "1 of 2 images have no label" in data.describe(t=dataset)
    assert [dataset.image(i).size for i in range(2)] == [(16, 16)] * 2


def test_the_index_of_many_images_is_kept_as_long_as_the_tars_are_the_same(
    digits, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "_KEEP", 120)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shards(tmp_path / "shards", "train", digits["train"])

    def opened() -> tuple:
        shards._index.cache_clear()  # as in another process
        x = data.build_dataset("folder", tmp_path / "shards")
        return data.names_below(x), x.labels.tolist(), [x.open(i).read() for i in range(len(x))]

    first = opened()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "webdataset.tariterators", None)  # no header is read
        assert opened() == first
    (kept,) = (tmp_path / "cache" / "moco_isl").iterdir()
    kept.write_bytes(kept.read_bytes()[:500])
    assert opened() == first
    write_shards(tmp_path / "shards", "train", digits["train"][::-1])
    assert opened() != first and len(list(kept.parent.iterdir())) == 2


def test_images_beside_shards_are_the_data_set_and_it_is_said(place, tmp_path):
    shutil.copytree(place / "folder", tmp_path / "both")
    shutil.copy(place / "shards" / "train-0000.tar", tmp_path / "both")
    said = data.describe(train=data.build_dataset("folder", tmp_path / "both"))
    assert "=> train: 120 images" in said and "train-0000.tar' beside the images" in said


def test_a_data_set_of_several_folders_is_resumed_and_swept(tmp_path):
    assert sweep.flags_of("pretrain", {"data": ["a", "b"], "mlp": True}) == ["a", "b", "--mlp"]
    flags = ["folder/train/1", "folder/train/2", *FLAGS, "--out", str(tmp_path), "-b", "10"]
    assert ask([*flags, "--max-steps", "1"])[0] == 0
    code, out, err = ask([*flags, "--resume", "auto"])
    assert (code, err) == (0, "") and "26 images of 2 sources" in out


# ---- functions ---------------------------------------------------------------------------------

OWN = """
import io
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import ImageFolder

def plain(split):
    return ImageFolder(f"{PLACE}/folder/{split}")

def nothing():
    return None

class Items(Dataset):
    def __init__(self, *items):
        self.items = items
    def __len__(self):
        return len(self.items)
    def __getitem__(self, i):
        return self.items[i]() if callable(self.items[i]) else self.items[i]

IMAGE = Image.new("RGB", (16, 16), (9, 8, 7))

def dicts():
    return Items(*({"id": i, "image": IMAGE, "label": torch.tensor(i % 2)} for i in range(4)))

def tensors(split, root):
    flat = torch.full((3, 16, 16), 9, dtype=torch.uint8)
    return Items(flat, flat[:1], flat / 255, (flat, {"boxes": []})) if split == "train" else None

def normal():
    return Items(torch.randn(3, 16, 16))

def text():
    return Items("a path")

def empty():
    return Items()

def fails(split):
    raise RuntimeError("no network")

def odd(size):
    return None

def number():
    return 3

def changes():
    return Items(lambda: torch.rand(3, 16, 16))

class Stream(IterableDataset):
    def __iter__(self):
        yield IMAGE

def table(split):
    import datasets
    return datasets.load_from_disk(f"{PLACE}/saved/{dict(train='train', val='validation')[split]}")
"""


@pytest.fixture(scope="module")
def own(place, tmp_path_factory):
    """The module own_images can be imported."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_images.py").write_text(f"PLACE = {str(place)!r}\n{OWN}")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("own_images", None)


def test_what_a_function_returns_is_read_as_a_data_set(own, place, digits):
    for name in ("plain", "table"):
        for split in SPLITS:
            dataset = data.build_dataset(f"own_images:{name}", None, split)
            assert [dataset.classes[i] for i in dataset.labels] == [r[0] for r in digits[split]]
            expected = data.decode(io.BytesIO(digits[split][5][2]))
            assert dataset.image(5).tobytes() == expected.tobytes()
            assert torch.equal(dataset.pixels(5, min)[0], one_tensor(expected))
    dataset = data.build_dataset("own_images:dicts")
    assert dataset.labels.tolist() == [0, 1, 0, 1] and dataset.classes == ["0", "1"]
    assert "all 4 items were read for their labels" in data.describe(train=dataset)
    assert not data.has_val("own_images:dicts") and data.has_val("own_images:plain")
    dataset = data.build_dataset("own_images:tensors", place)
    assert dataset.labels is None
    assert all(dataset.image(i).getextrema() == ((9, 9),) * 3 for i in range(4))
    said = data.describe(train=data.build_dataset("own_images:changes"))
    assert "item 0 differs from one read to the next" in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--dataset own_images:nothing", "has no train split"),
        ("--dataset own_images:normal", "item 0 is no image: a tensor of torch.float32 from -"),
        ("--dataset own_images:text", "item 0 is no image: it is a str without one"),
        ("--dataset own_images:empty", "own_images:empty: no images for train"),
        ("--dataset own_images:fails", "ends with RuntimeError: no network"),
        ("--dataset own_images:odd", "needs 'size': expected a function of split"),
        ("--dataset own_images:number", "returns a int: expected a torch Dataset"),
        ("--dataset own_images:Stream", "a stream has no positions"),
        ("--dataset own_images:IMAGE", "is a Image: expected a row"),
        ("--dataset own_images:plain folder", "needs no DIR, and DIR is 'folder'"),
        ("--dataset own_images:tensors", "needs a DIR"),
        ("--dataset own_images:plain --cache c", "are not read from files"),
        ("folder/train.csv folder/train.csv", "twice: expected each source once"),
        ("folder folder/train/3", "several of the sources hold"),
        ("--dataset cifar10 folder shards", "lies in one folder, and DIR names 2"),
        ("s3://bucket/train-{0..9}.tar", "is a stream, which has no positions"),
        ("shards/none-*.tar", "no file matches 'shards/none-*.tar'"),
        ("shards/train-{0000..0003}.tar", "no file matches 'shards/train-0003.tar'"),
        ("bad/a.tar.gz", "is compressed, so its images can only be read one after another"),
        ("bad/cut.tar", "is damaged, or no tar: unexpected end of data"),
        ("bad/header.tar", "is damaged at byte 1024"),
        ("bad/text.tar", "is damaged, or no tar"),
        ("bad/words.tar", "no images in 'bad/words.tar' (1 tar)"),
        ("bad/twice.tar", "has 1 image more than once"),
        ("bad/mixed", "holds tar shards and tables"),
        ("bad/empty.txt", "names no image: expected a path a line"),
        ("bad/gone.txt", "names 2 of 3 images that are not there, 'bad/gone1.png' for one"),
        ("bad/labelled.txt", "'3' looks like a label: labels need a .csv with path,label"),
        ("bad/twice.txt", "names 1 image more than once"),
        ("bad/columns.csv", "has no column of paths: its header is 'id,label'"),
        ("bad/cells.csv", "has 1 row without a path"),
        ("bad/x.parquet", "cannot be read as a Hugging Face data set"),
        ("bad/plain.parquet", "has no column of images, but id, label"),
        ("bad/nowhere.txt", "no such file: bad/nowhere.txt"),
    ],
)
def test_bad_input_is_one_line(argv, words, own, bad, tmp_path):
    code, _, err = ask([*argv.split(), *FLAGS, "--out", str(tmp_path / "out")])
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert words in err and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def bad(place, digits) -> None:
    """Files that are wrong, in the folder bad."""
    folder = place / "bad"
    folder.mkdir()
    whole = (place / "shards" / "train-0000.tar").read_bytes()
    for name, content in {
        "a.tar.gz": b"",
        "cut.tar": whole[: len(whole) // 2 // 512 * 512 - 100],
        "text.tar": b"no tar" * 1000,
        "x.parquet": b"no table",
        "empty.txt": b"# nothing\n",
        "gone.txt": b"../folder/train/3/0003.png\ngone1.png\ngone2.png\n",
        "labelled.txt": b"../folder/train/3/0003.png 3\n",
        "twice.txt": b"../folder/train/3/0003.png\n../folder/train//3/0003.png\n",
        "columns.csv": b"id,label\n1,2\n",
        "cells.csv": b"path,label\n../folder/train/3/0003.png,1\n,2\n",
    }.items():
        (folder / name).write_bytes(content)
    with webdataset.TarWriter(str(folder / "words.tar")) as tar:
        tar.write({"__key__": "a", "txt": "word"})
    with tarfile.open(folder / "twice.tar", "w") as tar:
        for name in ("a.png", "b.png", "a.png"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    with tarfile.open(folder / "header.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("a.png", "b.png"):
            member = tarfile.TarInfo(name)
            member.size = 300
            tar.addfile(member, io.BytesIO(bytes(300)))
    with open(folder / "header.tar", "r+b") as file:
        file.seek(1024)
        file.write(b"damage")
    hf.Dataset.from_dict({"id": [1, 2], "label": ["a", "b"]}).to_parquet(folder / "plain.parquet")
    (folder / "mixed").mkdir()
    for name in ("words.tar", "plain.parquet"):
        shutil.copy(folder / name, folder / "mixed")


def test_a_missing_library_names_its_extra(monkeypatch, tmp_path):
    for name, where, extra in (
        ("webdataset.tariterators", "shards", "'moco_isl[webdataset]'"),
        ("datasets", "parquet", "'moco_isl[hf]'"),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        shutil.copytree(where, tmp_path / where)
        with pytest.raises(BadInput, match="pip install") as error:
            data.build_dataset("folder", tmp_path / where)
        assert extra in str(error.value)


# ---- the page ----------------------------------------------------------------------------------


def test_the_commands_of_the_page_run(place, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    text = page.split("## Other sources")[1].split("## Named data sets")[0]
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.split("\n")
    ]
    (module,) = re.findall(r"```python\n(.*?)```", text, re.S)
    for name, source in {
        "photos": "folder",
        "more": "folder/train/3",
        "scans": "folder/val",
        "shards": "shards",
        "flowers": "parquet",
    }.items():
        shutil.copytree(place / source, tmp_path / name)
    scans = [str(p.relative_to(tmp_path / "scans")) for p in (tmp_path / "scans").rglob("*.png")]
    (tmp_path / "scans" / "all.txt").write_text("\n".join(sorted(scans)))
    (tmp_path / "my_images.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    ran = 0
    for line in filter(None, lines):
        program, script, *argv = shlex.split(line)
        assert (program, script, argv[:3]) == (
            "python",
            "main_moco_isl.py",
            ["-a", "resnet50", "--mlp"],
        )
        flags = [*argv[3:], *FLAGS, "--max-steps", "1", "--out", f"out{ran}"]
        code, out, err = ask(flags)
        assert (code, err) == (0, "") and "=> train: " in out, line
        ran += 1
    assert ran == 7
