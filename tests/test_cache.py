"""The cache of decoded images: it gives what the files hold, or they are decoded anew."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import main_knn
import main_lincls
from moco_isl import data
from moco_isl.data import cache
from moco_isl.errors import BadInput
from moco_isl.evaluation.subject import identity
from tests.runs import SERVER, Running, differences, photos, run
from tests.test_bad_input import ask


def draw(path: Path, seed: int, side: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """12 images of two classes, of which the 3rd and the last cannot be read."""
    for i in range(12):
        path = tmp_path / "set" / "train" / "ab"[i // 6] / f"{i:02}.png"
        draw(path, i)
        if i in (2, 11):
            path.write_bytes(b"broken")
    return tmp_path / "set"


class Held:
    """What hold_cached gives of a folder, and what it says."""

    def __init__(self, folder, where, split="train"):
        self.said = []
        self.files = data.build_dataset("folder", folder, split)
        self.dataset = data.hold_cached(self.files, where, 2, self.said.append)
        self.images = getattr(self.dataset, "images", None)

    def equals_the_files(self) -> bool:
        decoded = data.load_into_memory(self.files)
        same_names = self.dataset.unreadable == decoded.unreadable
        return same_names and torch.equal(self.images, decoded.images)


def file_in(where: Path) -> Path:
    (path,) = where.iterdir()
    return path


def never(*_, **__):
    raise AssertionError("decoded anew")


# ---- what it gives -------------------------------------------------------------------------------


def test_mapped_images_equal_decoded_ones(folder, tmp_path, monkeypatch):
    where = tmp_path / "new" / "cache"
    first = Held(folder, where)
    assert first.equals_the_files() and "12 images decoded and kept in cache" in first.said[0]
    monkeypatch.setattr(cache, "load_into_memory", never)
    again = Held(folder, where)
    assert again.said == [f"=> 12 decoded images from cache {file_in(where)}"]
    assert again.equals_the_files() and again.dataset.unreadable == [2, 11]
    assert again.dataset.labels.tolist() == [0] * 6 + [1] * 6
    assert again.dataset.classes == ["a", "b"]
    assert again.dataset.path(3) == str(folder / "train" / "a" / "03.png")


@pytest.mark.filterwarnings("error")
def test_what_is_written_into_mapped_images_stays_out_of_the_file(folder, tmp_path):
    Held(folder, tmp_path / "cache")
    before = file_in(tmp_path / "cache").read_bytes()
    held = Held(folder, tmp_path / "cache")
    on_device = held.dataset.images_on("cpu")
    assert torch.equal(on_device[torch.tensor([3, 1])], held.images[[3, 1]])
    assert held.images.to(torch.float32).sum() > 0
    held.images.zero_()
    assert file_in(tmp_path / "cache").read_bytes() == before
    assert Held(folder, tmp_path / "cache").equals_the_files()


def test_images_held_out_equal_those_held_out_of_the_files(folder, tmp_path):
    """Also where an image cannot be read: the next one of its own part stands in for it."""
    for seed in range(8):
        held = Held(folder, tmp_path / "cache")
        parts = data.holdout(held.dataset, 5, seed)
        for ours, files in zip(parts, data.holdout(held.files, 5, seed)):
            decoded = data.load_into_memory(files)
            assert torch.equal(ours.images, decoded.images)
            assert ours.unreadable == decoded.unreadable
            assert list(map(ours.path, range(len(ours)))) == list(
                map(files.path, range(len(files)))
            )
            assert torch.equal(ours.labels, files.labels)


@pytest.mark.parametrize("on_device", [False, True])
def test_loaders_give_the_same_batches_and_name_the_same_broken_images(folder, tmp_path, on_device):
    held = Held(folder, tmp_path / "cache")
    plain = data.load_into_memory(held.files) if on_device else held.files
    augmentation = data.get_augmentation("folder", aug_plus=True, size=16, on_device=on_device)
    options = {"augmentation": augmentation, "batch_size": 4, "seed": 0, "max_bad_images": 2}
    transform = data.get_eval_transform("folder", 20)
    got, bad = [], []
    for dataset in (plain, held.dataset):
        loader = data.train_loader(dataset, **options)
        crops = data.eval_loader(dataset, transform=transform, batch_size=5)
        views = [torch.stack(views) for views, _ in loader.epoch(0)]
        got.append([*views, *(images for images, _ in crops)])
        bad += [[i for i, _ in one.bad_images()] for one in (loader, crops)]
    assert all(torch.equal(*pair) for pair in zip(*got)) and bad == [[2, 11]] * 4


def test_data_is_told_apart_as_by_its_files(folder, tmp_path):
    held = Held(folder, tmp_path / "cache")
    assert identity([held.dataset]) == identity([held.files])


# ---- when it is not used -------------------------------------------------------------------------


def touch(folder: Path) -> None:
    os.utime(folder / "train" / "a" / "01.png", ns=(1, 1))


def rewrite(folder: Path) -> None:
    draw(folder / "train" / "a" / "01.png", 99)


def rename(folder: Path) -> None:
    (folder / "train" / "a" / "01.png").rename(folder / "train" / "a" / "010.png")


def add(folder: Path) -> None:
    draw(folder / "train" / "b" / "99.png", 99)


def remove(folder: Path) -> None:
    (folder / "train" / "a" / "01.png").unlink()
    (folder / "train" / "a" / "04.png").unlink()


def repair(folder: Path) -> None:
    draw(folder / "train" / "a" / "02.png", 2)


@pytest.mark.parametrize(
    "change, words",
    [
        (touch, "1 of 12 images changed"),
        (rewrite, "1 of 12 images changed"),
        (rename, "1 of 12 images changed, 1 are gone"),
        (add, "1 of 13 images changed"),
        (remove, "0 of 10 images changed, 2 are gone"),
        (repair, "1 of 12 images changed"),
    ],
)
def test_a_stale_cache_is_decoded_anew(folder, tmp_path, change, words):
    where = tmp_path / "cache"
    Held(folder, where)
    change(folder)
    held = Held(folder, where)
    assert held.said[0] == f"=> cache {where} is stale ({words}): decoding anew"
    assert held.equals_the_files()
    assert len(Held(folder, where).said) == 1 and Held(folder, where).equals_the_files()


def test_another_decoder_decodes_anew(folder, tmp_path, monkeypatch):
    Held(folder, tmp_path / "cache")
    monkeypatch.setattr(cache, "DECODER", "Pillow 99")
    assert "is stale (it was decoded by Pillow " in Held(folder, tmp_path / "cache").said[0]
    assert len(Held(folder, tmp_path / "cache").said) == 1


def cut(content: bytes) -> bytes:
    return content[:-500]


def flip(content: bytes) -> bytes:
    """One bit in the pixels of an image."""
    return content[:3000] + bytes([content[3000] ^ 1]) + content[3001:]


@pytest.mark.parametrize("damage", [cut, flip, lambda _: b"", lambda _: b"not a cache\n" * 100])
def test_a_damaged_cache_is_decoded_anew(folder, tmp_path, damage):
    Held(folder, tmp_path / "cache")
    path = file_in(tmp_path / "cache")
    path.write_bytes(damage(path.read_bytes()))
    held = Held(folder, tmp_path / "cache")
    assert held.said[0] == f"=> cache {tmp_path / 'cache'} is damaged: decoding anew"
    assert held.equals_the_files()
    assert len(Held(folder, tmp_path / "cache").said) == 1


def test_a_cache_folder_holds_several_sets_and_splits(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    rewrite(other)
    shutil.copytree(other / "train", other / "val")
    splits = [(folder, "train"), (other, "train"), (other, "val")]
    for root, split in splits:
        Held(root, tmp_path / "cache", split)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    for root, split in splits:
        held = Held(root, tmp_path / "cache", split)
        assert len(held.said) == 1 and held.equals_the_files()


@pytest.mark.parametrize(
    "sides, words",
    [
        ((80, 80), "are larger than 64 pixels and stay in their files"),
        ((16, 20), "--cache keeps nothing: images to be held in memory must have one size"),
    ],
)
def test_images_that_are_not_kept_stay_in_their_files_and_it_is_said(tmp_path, sides, words):
    for i, side in enumerate(sides):
        draw(tmp_path / "set" / f"{i}.png", i, side)
    held = Held(tmp_path / "set", tmp_path / "cache")
    assert held.dataset is held.files and words in held.said[0]
    assert not list((tmp_path / "cache").glob("*"))


# ---- writing -------------------------------------------------------------------------------------


def test_what_is_interrupted_leaves_nothing_and_what_was_killed_is_removed(
    folder, tmp_path, monkeypatch
):
    where = tmp_path / "cache"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        Held(folder, where)
    assert list(where.iterdir()) == []
    Held(folder, where)
    path = file_in(where)
    path.with_name(f"{path.name}.1234{cache.TEMPORARY}").touch()
    touch(folder)
    Held(folder, where)
    assert file_in(where) == path


def test_no_room_is_bad_input_before_anything_is_decoded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "load_into_memory", never)
    usage = SimpleNamespace(free=12 * 3 * 16 * 16 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BadInput, match="has 0.0 GiB free, and the decoded images take"):
        Held(folder, tmp_path / "cache")


def test_a_folder_that_takes_no_file_is_bad_input_but_a_full_cache_there_is_used(
    folder, tmp_path, monkeypatch
):
    Held(folder, tmp_path / "cache")

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.tempfile, "TemporaryFile", refuse)
    assert len(Held(folder, tmp_path / "cache").said) == 1
    touch(folder)
    said = "cache' cannot be written: Permission denied; expected a folder"
    with pytest.raises(BadInput, match=said):
        Held(folder, tmp_path / "cache")


def _hold(folder: str, where: str, ready, results) -> None:
    ready.wait(60)
    held = Held(folder, where)
    results.put((held.equals_the_files(), any("decoded and kept" in line for line in held.said)))


def test_processes_that_start_at_once_decode_once(folder, tmp_path):
    ready, results = SERVER.Event(), SERVER.Queue()
    args = (str(folder), str(tmp_path / "cache"), ready, results)
    processes = [SERVER.Process(target=_hold, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    ready.set()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [equal for equal, _ in found] == [True] * 3 and sum(decoded for _, decoded in found) == 1
    file_in(tmp_path / "cache")


def test_without_locks_each_writes_a_whole_file(folder, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(cache.fcntl, "flock", no_locks)
    assert Held(folder, tmp_path / "cache").equals_the_files()
    assert len(Held(folder, tmp_path / "cache").said) == 1


# ---- the scripts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--on-device"]])
def test_runs_with_and_without_are_equal_and_one_goes_on_with_the_other(tmp_path, flags):
    argv = [*photos(tmp_path / "photos", 20, side=16), *flags]
    argv += "--knn-holdout 5 --epochs 2 --max-bad-images 1".split()
    (tmp_path / "photos" / "train" / "07.jpg").write_bytes(b"broken")
    cached = [*argv, "--cache", str(tmp_path / "cache")]
    for out, command in {"plain": argv, "cold": cached, "warm": cached}.items():
        code, said, err = ask([*command, "--out", str(tmp_path / out)])
        assert (code, err) == (0, "") and said.count("07.jpg cannot be read") == 1, said
    assert "=> 20 decoded images from cache" in said
    for out in ("cold", "warm"):
        assert differences(tmp_path / "plain", tmp_path / out) == []
    assert ask([*argv, "--max-steps", "5", "--out", str(tmp_path / "half")])[0] == 0
    assert ask([*cached, "--out", str(tmp_path / "half"), "--resume", "auto"])[0] == 0
    assert differences(tmp_path / "plain", tmp_path / "half") == []


def test_two_ranks_share_a_cache(tmp_path):
    argv = [*photos(tmp_path / "photos", 16, side=16), "--on-device", "--epochs", 1]
    run([*argv, "--out", tmp_path / "plain"], tmp_path / "log", ranks=2)
    argv += ["--cache", tmp_path / "cache", "--out", tmp_path / "cached"]
    run(argv, tmp_path / "log", ranks=2)
    assert differences(tmp_path / "plain", tmp_path / "cached") == []
    assert file_in(tmp_path / "cache")


def test_a_disk_that_is_full_in_the_end_costs_the_cache_and_not_the_run(tmp_path):
    argv = photos(tmp_path / "photos", 200, side=64)
    argv += "--on-device --image-size 16 --max-steps 1".split()
    argv += ["--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    running = Running(argv, tmp_path / "log", largest_file=2_000_000)
    assert running.codes() == [0] and "=> warning: cannot write " in running.said(), running.said()
    assert "File too large; going on with the images in memory" in running.said()
    assert list((tmp_path / "cache").iterdir()) == []


def test_both_evaluations_take_the_cache(tmp_path, capsys):
    for i in range(24):
        draw(tmp_path / "set" / ("train" if i < 16 else "val") / "ab"[i % 2] / f"{i:02}.png", i)
    folder, out = str(tmp_path / "set"), tmp_path / "run"
    train = [folder, *photos(tmp_path / "photos", 8)[1:], "--max-steps", "1", "--out", str(out)]
    assert ask(train)[0] == 0
    judge = [folder, "--pretrained", str(out / "checkpoint_last.pth.tar")]
    judge += ["--device", "cpu", "-j", "0"]
    knn = [*judge, "--k", "3"]
    cached = ["--cache", str(tmp_path / "cache")]

    def said(*beginnings):
        """What was printed, and the lines of it that begin so."""
        text = capsys.readouterr().out
        return text, [line for line in text.splitlines() if line.startswith(beginnings)]

    said()
    tables = []
    for flags in ([], cached, cached):
        kept = ["--features", str(tmp_path / "features.safetensors")]
        assert main_knn.main([*knn, *flags, *kept]) == 0
        text, table = said("output", "backbone")
        tables.append(table)
        assert ("=> --cache: no image is read" in text) == bool(flags)
    assert tables[0] == tables[1] == tables[2] and not (tmp_path / "cache").exists()
    tables = []
    for name, flags in {"plain": [], "cold": cached, "warm": cached}.items():
        probe = [*judge, "--epochs", "2", "-b", "4", "--seed", "1", "--out", str(tmp_path / name)]
        assert main_lincls.main([*probe, *flags]) == 0
        assert main_knn.main([*knn, *flags]) == 0
        text, table = said(" *", "output", "backbone")
        tables.append(table)
        # once each
        assert text.count("=> train: 16 images, 2 classes\n=> val: 8 images, 2 classes\n") == 2
    assert tables[0] == tables[1] == tables[2] and "=> 8 decoded images from cache" in text
