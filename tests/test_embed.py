"""Features out: every format, ranks and resume to the bit, nearest others against loops, the map,
the command and the call from Python.
"""

import csv
import hashlib
import inspect
import io
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import moco_isl
from moco_isl import data
from moco_isl.builder import MoCo
from moco_isl.embed import Backbone, command, maps, rows
from moco_isl.embed.images import images_of
from moco_isl.embed.job import EmbedOptions
from moco_isl.encoders import Taps, build_encoder, evaluating, extract_features
from moco_isl.errors import BadInput, RunFailed
from moco_isl.run.backbone import load_backbone
from tests.ranks import run_ranks
from tests.runs import SERVER

ROOT = Path(__file__).parent.parent
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def moco_file(tmp_path_factory):
    """An untrained MoCo of the demo's network, as if it had been trained on folders at side 16."""
    torch.manual_seed(0)
    model = MoCo(partial(build_encoder, "digits"), dim=16, K=32, mlp=True)
    path = tmp_path_factory.mktemp("embed") / "moco.pth.tar"
    content = {
        "epoch": 3,
        "arch": "digits",
        "state_dict": {f"module.{n}": t for n, t in model.state_dict().items()},
        "args": {"dataset": "folder", "image_size": 16, "mlp": True},
    }
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 PNGs of two classes in train/ and 8 in val/, and one that is no image in broken/."""
    root = tmp_path_factory.mktemp("photos")
    dataset = data.build_dataset("digits", split="val")
    for i in range(32):
        folder = root / "photos" / ("train" if i < 24 else "val") / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(dataset[i][0]).save(folder / f"{i}.png")
    flat = root / "broken"
    flat.mkdir()
    for i in range(12):
        to_pil_image(dataset[i][0]).save(flat / f"{i:02}.png")
    (flat / "03.png").write_text("no image")
    return root


def run(*argv, stop=None):
    """argv: flags, of which one may be a text of several words."""
    words = [word for flag in (*argv, "-j 0 --device cpu") for word in str(flag).split()]
    return command.main(words, stop)


def expected(path, dataset="digits", batch_size=256, layer="backbone", statistics="folder"):
    """Features of the two splits by `extract_features`, as the training's own code takes them."""
    encoder, _ = load_backbone(path)
    view = data.get_eval_transform(statistics, 16)
    found = []
    for split in ("train", "val"):
        images = data.build_dataset(dataset, split=split)
        loader = data.eval_loader(images, transform=view, batch_size=batch_size)
        bank = extract_features(
            Taps(encoder, [layer]), loader, len(images), "cpu", normalize=False
        )[layer]
        found.append(bank.mean(dim=(2, 3)) if bank.dim() == 4 else bank)
    return torch.cat(found)


# ---- files ---------------------------------------------------------------------------------------


def read_parquet(path):
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"moco_isl"])
    lists = lambda name: np.stack(table[name].to_numpy())
    assert "fixed_size_list<" in str(table.schema.field("feature").type).replace("element: ", "")
    return {
        "names": table["name"].to_pylist(),
        "features": lists("feature"),
        "labels": table["label"].to_pylist(),
        "classes": table["class"].to_pylist(),
        "nearest": table["nearest"].to_pylist(),
        "similarity": lists("nearest_similarity"),
    }, about


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    of = lambda row, stem: [v for k, v in row.items() if re.fullmatch(stem + r"\d+", k)]
    floats = lambda stem: np.array([of(row, stem) for row in lines], np.float32)
    return {
        "names": [row["name"] for row in lines],
        "features": floats("f"),
        "labels": [int(row["label"]) for row in lines],
        "classes": [row["class"] for row in lines],
        "nearest": [of(row, "nearest") for row in lines],
        "similarity": floats("nearest_similarity"),
    }, json.loads(path.with_name(path.name + ".json").read_text())


def read_arrays(arrays, names, classes):
    return {
        "names": names,
        "features": arrays["features"],
        "labels": arrays["labels"].tolist(),
        "classes": [classes[i] for i in arrays["labels"]],
        "nearest": [[names[j] for j in row] for row in arrays["nearest"]],
        "similarity": arrays["nearest_similarity"],
    }


def read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        names = file["names"].tolist()
        about = json.loads(str(file["about"]))
        return read_arrays(file, names, file["classes"].tolist()), about


def read_safetensors(path):
    with safe_open(path, framework="np") as file:
        about = {name: json.loads(text) for name, text in file.metadata().items()}
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    names = bytes(arrays["names"]).decode().split("\n")
    return read_arrays(arrays, names, about.pop("classes")), about


READERS = {
    "parquet": read_parquet,
    "csv": read_csv,
    "npz": read_npz,
    "safetensors": read_safetensors,
}


@pytest.fixture(scope="module")
def written(moco_file, tmp_path_factory):
    """What each format holds of the digits: (content, about), by ending."""
    folder = tmp_path_factory.mktemp("written")
    found = {}
    for ending, read in READERS.items():
        path = folder / f"new/{ending}.{ending}"
        assert run(moco_file, "--dataset digits --nearest 3 --out", path) == 0
        found[ending] = read(path)
    left = {p.name for p in (folder / "new").iterdir()}
    assert left == {*(f"{e}.{e}" for e in READERS), "csv.csv.json"}, "no parts stay"
    return found


@pytest.mark.parametrize("ending", READERS)
def test_every_format_holds_the_features_bit_for_bit(moco_file, written, ending):
    content, about = written[ending]
    assert content["features"].dtype == np.float32
    assert np.array_equal(content["features"], expected(moco_file).numpy())
    labels = [data.build_dataset("digits", split=s).labels for s in ("train", "val")]
    assert content["labels"] == torch.cat(labels).tolist()
    assert content["classes"] == [str(i) for i in content["labels"]]
    assert content["names"][0] == "digits/train[0]" and content["names"][-1] == "digits/val[359]"
    assert about["arch"] == "digits" and about["layer"] == "backbone" and about["image_size"] == 16
    assert about["normalized"] is False and len(about["sha256"]) == 64 and not about["left_out"]


def test_nearest_others_equal_loops(written):
    content, _ = written["npz"]
    unit = content["features"].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    names = content["names"]
    for i in range(0, len(names), 97):
        cosines = [(-float(unit[i] @ unit[j]), j) for j in range(len(names)) if j != i]
        best = sorted(cosines)[:3]
        assert content["similarity"][i] == pytest.approx([-c for c, _ in best], abs=1e-5)
        for name, (cosine, _) in zip(content["nearest"][i], best):
            j = names.index(name)
            assert j != i and unit[i] @ unit[j] == pytest.approx(-cosine, abs=1e-5)
    for other in ("parquet", "csv", "safetensors"):
        assert written[other][0]["nearest"] == content["nearest"]
        assert np.array_equal(written[other][0]["similarity"], content["similarity"])


@pytest.mark.parametrize("layer", ["output", "conv2"])
def test_layers_and_unit_rows(moco_file, tmp_path, layer):
    flags = [moco_file, "--dataset digits --split val -b 50 --layer", layer]
    assert run(*flags, "--out", tmp_path / "a.npz") == 0
    found = np.load(tmp_path / "a.npz")["features"]
    assert np.array_equal(found, expected(moco_file, batch_size=50, layer=layer)[-360:].numpy())
    assert run(*flags, "--normalize --out", tmp_path / "b.npz") == 0
    unit = np.load(tmp_path / "b.npz")["features"]
    assert np.array_equal(unit, F.normalize(torch.from_numpy(found), dim=1).numpy())


def test_a_folder_has_names_labels_and_splits(moco_file, photos, tmp_path, capsys):
    folder = photos / "photos"
    names = {}
    for split in ("all", "train", "val"):
        assert run(moco_file, folder, "--split", split, "--out", tmp_path / f"{split}.csv") == 0
        with open(tmp_path / f"{split}.csv") as file:
            lines = list(csv.DictReader(file))
        names[split] = [row["name"] for row in lines]
        assert all(row["class"] == row["name"].split("/")[1] for row in lines)
        assert all(row["label"] == str(int(row["class"] == "dog")) for row in lines)
    assert names["all"] == names["train"] + names["val"] and len(names["val"]) == 8
    assert names["train"][:2] == ["train/cat/0.png", "train/cat/10.png"]
    # without labels there are no columns of them
    assert run(moco_file, folder / "val" / "cat", "--out", tmp_path / "flat.csv") == 0
    header = (tmp_path / "flat.csv").read_text().splitlines()[0]
    assert header.startswith("name,f0,f1,")
    assert "wrote" in capsys.readouterr().out


class Own(torch.utils.data.Dataset):
    """Somebody else's data set: items are (image, label)."""

    classes = ["cat", "dog"]

    def __init__(self, paths):
        self.paths = paths
        self.targets = [self.classes.index(path.parent.name) for path in paths]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return Image.open(self.paths[i]), self.targets[i]


def test_every_source_gives_the_same_rows(moco_file, photos, tmp_path):
    folder = photos / "photos" / "train"
    whole = moco_isl.embed(moco_file, folder, device="cpu")
    paths = [folder / name for name in whole.names]
    lines = [f"{path},{path.parent.name}" for path in paths]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines, ""]))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for path in paths:
            name = f"{path.parent.name}-{path.stem}"
            tar.add(path, f"{name}.png")
            label = tarfile.TarInfo(f"{name}.cls")
            label.size = len(path.parent.name)
            tar.addfile(label, io.BytesIO(path.parent.name.encode()))
    for what, first in (
        (tmp_path / "list.csv", str(paths[0])),
        (tmp_path / "shard.tar", "shard.tar/cat-0.png"),
        ([folder / "cat", folder / "dog"], "cat/0.png"),
        (Own(paths), "images/train[0]"),
    ):
        found = moco_isl.embed(moco_file, what, device="cpu")
        assert found.names[0] == first and len(set(found.names)) == 24
        assert torch.equal(found.features, whole.features), what
        several = isinstance(what, list)  # a folder a source, not a class
        assert several or torch.equal(found.labels, whole.labels)
    flags = [moco_file, "--out", tmp_path / "a.npz", folder / "cat", folder / "dog"]
    assert run(*flags) == 0
    assert np.array_equal(np.load(tmp_path / "a.npz")["features"], whole.features)


def test_images_of_five_channels_are_normalised_by_what_is_measured(tmp_path, capsys):
    torch.manual_seed(0)
    model = MoCo(partial(build_encoder, "digits", channels=5), dim=16, K=32, mlp=True)
    content = {
        "epoch": 1,
        "arch": "digits",
        "state_dict": {f"module.{n}": t for n, t in model.state_dict().items()},
        "args": {"dataset": "folder", "image_size": 16},
    }
    torch.save(content, tmp_path / "a.pth")
    images = np.random.default_rng(0).random((6, 16, 16, 5), np.float32)
    (tmp_path / "bands").mkdir()
    for i, image in enumerate(images):
        np.save(tmp_path / "bands" / f"{i}.npy", image)
    flags = [tmp_path / "a.pth", tmp_path / "bands", "--out"]
    assert run(*flags, tmp_path / "a.npz", "--map", tmp_path / "a.png") == 0
    assert "measured on 6 images" in capsys.readouterr().out
    found = torch.from_numpy(np.load(tmp_path / "a.npz")["features"])
    backbone = moco_isl.load_backbone(tmp_path / "a.pth")
    x = torch.from_numpy(images).permute(0, 3, 1, 2)  # [6, 5, 16, 16]
    dims = {"dim": (0, 2, 3), "keepdim": True}
    with torch.no_grad():
        by_hand = backbone((x - x.mean(**dims)) / x.std(**dims, unbiased=False))
    assert torch.allclose(found, by_hand, atol=1e-3)
    other = moco_isl.embed(backbone, x, device="cpu").features
    assert torch.allclose(found, other, atol=1e-4)
    with pytest.raises(BadInput, match="mean and std of its 5"):
        backbone.transform  # noqa: B018
    assert run(*flags, tmp_path / "b.npz", "--channels 3") == 2
    assert "takes images of 5 channels" in capsys.readouterr().err


def test_a_runs_folder_is_a_backbone(finished, tmp_path):
    flags = "--dataset digits --split val --out"
    file = finished / "checkpoint_last.pth.tar"
    assert run(finished, flags, tmp_path / "a.npz") == 0
    assert run(file, flags, tmp_path / "b.npz") == 0
    one, other = (np.load(tmp_path / name) for name in ("a.npz", "b.npz"))
    assert np.array_equal(one["features"], other["features"])
    about = json.loads(str(one["about"]))
    assert about["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert about["statistics"] == "digits"


# ---- ranks, resume, images that cannot be read ---------------------------------------------------


def same_files(a, b):
    return a.read_bytes() == b.read_bytes()


def _on_a_rank(rank, world, file, commands):
    codes = [command.main(argv) for argv in commands]
    found = moco_isl.embed(file, None, dataset="digits", split="val", device="cpu", batch_size=100)
    return codes, None if found is None else found.features


def test_two_ranks_equal_one_also_where_one_was_stopped(moco_file, tmp_path, capsys):
    flags = f"{moco_file} --dataset digits -b 100 --nearest 2 -j 0 --device cpu --out ".split()
    calls = [0]

    def stop():
        calls[0] += 1
        return calls[0] > 5

    stopped = [*flags, str(tmp_path / "stopped.npz")]
    assert command.main(stopped, stop) == 75
    assert "the same command goes on" in capsys.readouterr().err
    whole = [*flags, str(tmp_path / "one.npz")]
    two = [*flags, str(tmp_path / "two.npz")]
    (codes, val), (others, other) = run_ranks(2, _on_a_rank, str(moco_file), [two, stopped])
    assert codes == others == [0, 0] and other is None
    assert command.main(whole) == 0
    assert same_files(tmp_path / "one.npz", tmp_path / "two.npz")
    assert same_files(tmp_path / "one.npz", tmp_path / "stopped.npz")
    assert np.array_equal(val, np.load(tmp_path / "one.npz")["features"][-360:])


def test_what_a_rank_that_is_started_here_gets_can_travel(moco_file):
    argv = [str(moco_file), "--dataset", "digits", "--out", "a.npz"]
    asked = command.Asked(command.get_parser().parse_args(argv))
    copy = pickle.loads(pickle.dumps(asked))
    assert len(asked.job.images) == len(copy.job.images) == 1797
    assert len(pickle.dumps(asked)) < 5000, "neither weights nor images"


def _killed(argv, after):
    rows.SAVE_EVERY = -1.0  # every batch
    save, calls = rows.Rows.save, [0]

    def counted(self):
        save(self)
        calls[0] += 1
        if calls[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)

    rows.Rows.save = counted
    command.main(argv)


def test_a_killed_pass_goes_on_and_equals_the_unbroken_one(moco_file, tmp_path, capsys):
    flags = f"{moco_file} --dataset digits -b 100 --nearest 2 -j 0 --device cpu --out ".split()
    out = tmp_path / "killed.parquet"
    process = SERVER.Process(target=_killed, args=([*flags, str(out)], 7))
    process.start()
    process.join(60)
    parts = tmp_path / ".killed.parquet.parts"
    assert process.exitcode == -signal.SIGKILL and not out.exists()
    assert len(list(parts.glob("*.safetensors"))) == 7
    # another command does not go on with it, and leaves it
    before = sorted(parts.iterdir())
    assert command.main([*flags, str(out), "--layer", "output"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "layer backbone, and here it is output" in error
    assert sorted(parts.iterdir()) == before
    # the same one does
    assert command.main([*flags, str(out)]) == 0
    assert "=> 700 of 1,797 images were done before" in capsys.readouterr().out
    assert command.main([*flags, str(tmp_path / "whole.parquet")]) == 0
    assert same_files(out, tmp_path / "whole.parquet") and not parts.exists()


def test_a_signal_saves_and_leaves_with_75(moco_file, tmp_path, monkeypatch, capfd):
    add, calls = rows.Rows.add, [0]

    def counted(self, *given):
        add(self, *given)
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(rows.Rows, "add", counted)
    assert run(moco_file, "--dataset digits -b 9 --out", tmp_path / "a.npz") == 75
    assert "SIGTERM" in capfd.readouterr().out and not (tmp_path / "a.npz").exists()
    (part,) = (tmp_path / ".a.npz.parts").glob("*.safetensors")
    assert len(load_file(part)["at"]) == 27


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_pass_that_is_alive_is_left_alone(moco_file, tmp_path, capsys):
    lock = tmp_path / ".a.npz.parts" / "lock"
    lock.parent.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        assert run(moco_file, "--dataset digits --out", tmp_path / "a.npz") == 2
        assert "in use by another pass" in capsys.readouterr().err
        other.stdin.close()
    assert run(moco_file, "--dataset digits --out", tmp_path / "a.npz") == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_and_left_out(moco_file, photos, tmp_path, capsys, workers):
    flags = [str(moco_file), str(photos / "broken"), "--device", "cpu", "-j", str(workers)]
    out = tmp_path / "a.npz"
    assert command.main([*flags, "--out", str(out)]) == 3
    error = capsys.readouterr().err
    assert "03.png" in error and "--max-bad-images" in error and not out.exists()
    assert command.main([*flags, "--out", str(out), "--max-bad-images", "1"]) == 0
    file = np.load(out)
    names = file["names"].tolist()
    assert names == [f"{i:02}.png" for i in range(12) if i != 3]
    assert json.loads(str(file["about"]))["left_out"] == ["03.png"]
    other = moco_isl.embed(moco_file, [photos / "broken" / name for name in names], device="cpu")
    assert np.allclose(file["features"], other.features.numpy(), atol=1e-5)


def test_an_image_that_was_repaired_is_read_again(moco_file, photos, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in (photos / "broken").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert run(moco_file, folder, "-b 2 --out", tmp_path / "a.npz") == 3
    Image.new("RGB", (16, 16), "red").save(folder / "03.png")
    capsys.readouterr()
    assert run(moco_file, folder, "-b 2 --out", tmp_path / "a.npz") == 0
    assert "11 of 12 images were done before" in capsys.readouterr().out
    assert run(moco_file, folder, "-b 2 --out", tmp_path / "b.npz") == 0
    assert same_files(tmp_path / "a.npz", tmp_path / "b.npz")


# ---- the map -------------------------------------------------------------------------------------


def test_rows_that_are_kept_are_of_the_files_that_are_there_now(moco_file, tmp_path, capsys):
    """Two folders of the same names: what an ended pass has of one is not taken for the other."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(6):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    (tmp_path / "a" / "3.png").write_bytes(b"no image")
    flags = ["--device", "cpu", "-j", "0", "-b", "2"]
    out = tmp_path / "x.npz"
    assert command.main([str(moco_file), str(tmp_path / "a"), *flags, "--out", str(out)]) == 3
    assert command.main([str(moco_file), str(tmp_path / "b"), *flags, "--out", str(out)]) == 0
    fresh = tmp_path / "y.npz"
    assert command.main([str(moco_file), str(tmp_path / "b"), *flags, "--out", str(fresh)]) == 0
    x, y = (np.load(file)["features"] for file in (out, fresh))
    assert np.array_equal(x, y)


def test_images_without_files_are_told_apart_by_their_pixels(moco_file):
    one, two = ([torch.full((3, 16, 16), v, dtype=torch.uint8)] for v in (10, 20))
    digests = {rows.digest(images_of(images)) for images in (one, two, one)}
    assert len(digests) == 2


def picture(path):
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB"))


def colours(pixels):
    return {tuple(rgb) for rgb in pixels.flatten(1).T.unique(dim=0).tolist()}


def test_the_map_is_drawn_with_the_colours_of_the_classes(moco_file, photos, tmp_path):
    flags = [moco_file, photos / "photos", "--out"]
    assert run(*flags, tmp_path / "a.npz", "--map", tmp_path / "a.png", "--map-points dots") == 0
    pixels = picture(tmp_path / "a.png")
    assert pixels.shape[1] == 1200 and pixels.shape[2] > 1125  # 8 inches, and a legend
    assert (pixels != 255).any(dim=0).float().mean() > 0.005
    assert {(31, 119, 180), (255, 127, 14)} <= colours(pixels), "blue and orange of the legend"
    assert run(*flags, tmp_path / "b.npz", "--map", tmp_path / "b.png") == 0
    thumbnails = picture(tmp_path / "b.png")
    ink = lambda pixels: (pixels != 255).any(dim=0).float().mean()
    assert thumbnails.shape == pixels.shape and ink(thumbnails) > 3 * ink(pixels)
    # again: the same picture
    assert run(*flags, tmp_path / "c.npz", "--map", tmp_path / "c.png") == 0
    assert same_files(tmp_path / "b.png", tmp_path / "c.png")


def test_a_map_of_some_images_says_so(moco_file, tmp_path):
    flags = [moco_file, "--dataset digits --split val --map-images 40 --map", tmp_path / "a.svg"]
    assert run(*flags, "--out", tmp_path / "a.npz") == 0
    svg = (tmp_path / "a.svg").read_text()
    assert "40 of 360 images, drawn at random" in svg
    assert svg.count("<use ") >= 40


def test_similar_images_lie_near_each_other():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 16, generator=generator)
    label = torch.arange(60) % 3
    features = centres[label] + 0.05 * torch.randn(60, 16, generator=generator)
    place = torch.from_numpy(maps.layout(features, "tsne"))
    assert place.min() == 0 and place.max() == 1
    distance = torch.cdist(place, place).fill_diagonal_(9)
    assert (label[distance.argmin(dim=1)] == label).all()


def test_colours_are_apart_and_more_classes_are_hues():
    names = [f"c{i}" for i in range(30)]
    for n in (2, 10, 20, 30):
        found = maps.colours_of([*names[:n], None], names)
        assert (
            list(found) == [*names[:n], None] and len({tuple(c) for c in found.values()}) == n + 1
        )


# ---- from Python ---------------------------------------------------------------------------------


def test_importing_the_package_imports_no_torch():
    code = "import sys, moco_isl; assert 'torch' not in sys.modules; print(dir(moco_isl))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "'embed'" in done.stdout and "'load_backbone'" in done.stdout
    with pytest.raises(AttributeError, match="nothing"):
        moco_isl.nothing  # noqa: B018


def test_the_backbone_is_a_module(moco_file):
    backbone = moco_isl.load_backbone(moco_file)
    assert isinstance(backbone, torch.nn.Module) and not backbone.training
    assert backbone.info["arch"] == "digits" and backbone.info["epoch"] == 3
    dataset = data.build_dataset("digits", split="val")
    image = to_pil_image(dataset[0][0]).convert("L").resize((40, 40))
    x = backbone.transform(image)
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    small = pil_to_tensor(image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))
    assert torch.allclose(x, (small / 255 - mean) / std, atol=1e-5)
    assert "size=16" in repr(backbone.transform)
    encoder, _ = load_backbone(moco_file)
    with torch.no_grad(), evaluating(encoder):
        taps = Taps(encoder, ["backbone"])
        assert torch.equal(backbone(x[None]), taps(x[None])["backbone"])
    key = moco_isl.load_backbone(moco_file, key=True)
    assert key.info["part"] == "encoder_k"
    assert backbone.to(torch.float64)(x[None].double()).dtype == torch.float64


def test_command_and_python_give_equal_numbers(moco_file, photos, tmp_path):
    folder = photos / "photos"
    assert run(moco_file, folder, "--nearest 2 --out", tmp_path / "a.npz") == 0
    file = np.load(tmp_path / "a.npz")
    backbone = moco_isl.load_backbone(moco_file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = moco_isl.embed(backbone, folder, tmp_path / "b.npz", nearest=2, device="cpu")
    assert same_files(tmp_path / "a.npz", tmp_path / "b.npz")
    assert np.array_equal(found.features, file["features"]) and found.classes == ["cat", "dog"]
    assert found.names == file["names"].tolist() and len(found) == 32
    assert np.array_equal(found.nearest, file["nearest"])
    assert str(found).splitlines() == [
        f"32 images, 128 features each: backbone of {moco_file} (digits, 16 pixels)",
        "2 classes: cat 16, dog 16",
        "the 2 nearest others of each image",
    ]
    # by hand
    images = [Image.open(folder / name) for name in found.names]
    x = torch.stack([backbone.transform(image) for image in images])
    with torch.no_grad():
        assert torch.allclose(backbone(x), found.features, atol=1e-5)
    # the same images in other forms; labels are those of a data set that has them
    train = found.features[:24]
    pixels = torch.stack([pil_to_tensor(image) for image in images[:24]])
    for given in (
        images[:24],
        [str(folder / name) for name in found.names[:24]],
        pixels,
        data.build_dataset("folder", folder, "train"),
        [(image, 1) for image in images[:24]],
    ):
        other = moco_isl.embed(backbone, given, device="cpu")
        assert torch.allclose(other.features, train, atol=1e-5), type(given)
    assert not any(p.is_cuda for p in backbone.parameters())
    heads = len(backbone.encoder.fc._forward_pre_hooks)
    moco_isl.embed(backbone, pixels, layer="output", device="cpu")
    assert len(backbone.encoder.fc._forward_pre_hooks) == heads, "the encoder is left as it was"


def test_what_a_caller_from_python_gets_wrong(moco_file, photos):
    backbone = moco_isl.load_backbone(moco_file)
    embed = partial(moco_isl.embed, device="cpu")
    for given, said in (
        (torch.zeros(2, 3, 8, 8), "uint8"),
        ([], "empty"),
        (7, "expected a folder"),
        (photos / "nowhere", "no such folder"),
    ):
        with pytest.raises(BadInput, match=said):
            embed(backbone, given)
    with pytest.raises(BadInput, match="load_backbone"):
        embed(torch.nn.Linear(2, 2), photos / "photos")
    with pytest.raises(BadInput, match="layer"):
        embed(backbone, photos / "photos", layer="conv9")
    with pytest.warns(UserWarning, match="03.png"):
        assert len(embed(backbone, photos / "broken")) == 11
    with pytest.raises(RunFailed, match="expected at most 0"), pytest.warns(UserWarning):
        embed(backbone, photos / "broken", max_bad_images=0)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, said",
    [
        ("", "no encoder"),
        ("FILE PHOTOS", "no --out"),
        ("FILE --out a.npz", "no data"),
        ("FILE PHOTOS --out a.txt", ".parquet, .csv, .npz, .safetensors"),
        ("FILE PHOTOS --out there.npz", "is not written over"),
        ("FILE PHOTOS --out side.csv", "side.csv.json' is there already"),
        ("FILE PHOTOS --out there.npz/a.npz", "cannot be written"),
        ("FILE PHOTOS --out folder.npz", "is a folder"),
        ("FILE PHOTOS --out a.npz --map there.png", "is not written over"),
        ("FILE PHOTOS --out a.npz --map a.jpg", ".png, .svg, .pdf"),
        ("FILE PHOTOS --out a.npz --nearest 32", "an image has 31 others"),
        ("FILE PHOTOS --out a.npz --nearest -1", "out of range"),
        ("FILE PHOTOS --out a.npz --layer conv9", "expected one of backbone"),
        ("FILE PHOTOS --out a.npz -b 0", "out of range"),
        ("FILE PHOTOS --out a.npz --split test", "expected one of all"),
        ("FILE PHOTOS --out a.npz --image-size 7", "8 or more"),
        ("FILE PHOTOS/val --out a.npz --split val", "no validation images"),
        ("FILE PHOTOS/val/dog/25.png --out a.npz", "not a folder"),
        ("bare.pth PHOTOS --out a.npz --layer output", "has no head"),
        ("nowhere.pth PHOTOS --out a.npz", "no file at"),
        ("FILE PHOTOS --out a.npz --device cuda:99", "no CUDA device is visible"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    moco_file, photos, tmp_path, monkeypatch, capsys, flags, said
):
    if "cuda" in flags and torch.cuda.is_available():
        said = "GPU 99"
    monkeypatch.chdir(tmp_path)
    for name in ("there.npz", "there.png", "side.csv.json"):
        Path(name).write_text("mine")
    Path("folder.npz").mkdir()
    encoder = build_encoder("digits")
    torch.save({n: t for n, t in encoder.state_dict().items() if "fc." not in n}, "bare.pth")
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    flags = flags.replace("FILE", str(moco_file)).replace("PHOTOS", str(photos / "photos"))
    if flags and "cuda" not in flags:
        flags += " -j 0 --device cpu"
    assert command.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "package, flags",
    [
        ("pyarrow", "--out a.parquet"),
        ("sklearn", "--out a.npz --map a.png"),
        ("matplotlib", "--out a.npz --map a.png"),
        ("umap", "--out a.npz --map a.png --map-by umap"),
    ],
)
def test_a_package_that_is_missing_is_named(moco_file, monkeypatch, capsys, package, flags):
    monkeypatch.setitem(sys.modules, package, None)
    assert run(moco_file, "--dataset digits", flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install" in error
    assert ("umap-learn" if package == "umap" else "'moco_isl[embed]'") in error


def test_features_that_are_not_finite_are_refused(tmp_path, capsys):
    encoder = build_encoder("digits")
    with torch.no_grad():
        next(encoder.parameters()).mul_(1e38)
        encoder.conv1[1].running_var.fill_(1e-30)
    torch.save(encoder.state_dict(), tmp_path / "big.pth")
    assert run(tmp_path / "big.pth", "--dataset digits --out", tmp_path / "a.npz") == 3
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "a.npz").exists()


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_runs(moco_file, photos, tmp_path, monkeypatch):
    """Its commands and its Python, in the order of the page."""
    monkeypatch.chdir(tmp_path)
    Path("runs/isl").mkdir(parents=True)
    Path("runs/isl/checkpoint_last.pth.tar").write_bytes(moco_file.read_bytes())
    Path("photos").symlink_to(photos / "photos")
    page = (ROOT / "docs" / "features.md").read_text()
    names, ran = {}, 0
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.M | re.S):
        if language == "python":
            exec(block, names)
            assert names["features"].shape[1:] == (128,) if "features" in names else True
            continue
        for line in block.splitlines():
            start = "python -m moco_isl.embed "
            assert line.startswith(start), line
            assert run(*shlex.split(line.removeprefix(start))) == 0
            ran += 1
    assert ran == 5 and Path("map.png").stat().st_size > 10_000
    assert isinstance(names["backbone"], Backbone) and len(names["found"]) == 32


def test_every_option_of_python_is_a_flag():
    """And has its default."""
    given = inspect.signature(moco_isl.embed).parameters
    defaults = vars(command.get_parser().parse_args([]))
    for name in vars(EmbedOptions()):
        if name not in ("file", "out", "progress"):
            assert given[name].default == defaults[name], name
