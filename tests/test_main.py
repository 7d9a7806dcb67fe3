"""The main script end to end: on the embedded digits, and on folders of real images where they are
at hand.
"""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

import main_knn
import main_lincls
import main_moco_isl
from moco_isl import pretraining
from moco_isl.run import checkpoint
from tests.runs import photos

SMALL = (
    "--dataset digits -a digits --mlp --moco-dim 16 --moco-k 256 --moco-t 0.1 --moco-m 0.9 -b 128"
    " -j 0 --seed 1".split()
)


def run(out, *flags):
    assert main_moco_isl.main([*SMALL, "--out", str(out), *map(str, flags)]) == 0
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    return checkpoint.load(Path(out) / "checkpoint_last.pth.tar")["state_dict"]


def test_a_run_and_its_files(tmp_path):
    lines = run(tmp_path, "--epochs", 2, "--knn-every", 1, "-p", 5)
    assert {p.name for p in tmp_path.iterdir()} >= {
        "checkpoint_0000.pth.tar",
        "checkpoint_0001.pth.tar",
        "checkpoint_last.pth.tar",
        "metrics.jsonl",
        "args.json",
    }
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [0, 1] and all(
        10 < line["knn"] < 100 for line in epochs
    )
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [5, 10, 12] * 2
    assert set(steps[0]) >= {"loss", "isl", "acc1", "lr", "images_per_s", "data_time"}
    facts = json.loads((tmp_path / "args.json").read_text())
    assert facts["args"]["moco_k"] == 256 and facts["torch"] == torch.__version__
    content = torch.load(tmp_path / "checkpoint_last.pth.tar", weights_only=True)
    assert {"epoch", "arch", "state_dict", "optimizer"} <= set(content) and content["epoch"] == 2
    assert all(
        name.startswith(("module.encoder_q.", "module.encoder_k.", "module.queue"))
        for name in content["state_dict"]
    )


def test_the_seed_decides(tmp_path):
    once, again = run(tmp_path / "a", "--epochs", 1), run(tmp_path / "b", "--epochs", 1)
    other = run(tmp_path / "c", "--epochs", 1, "--seed", 2)
    assert (
        [line["loss"] for line in once]
        == [line["loss"] for line in again]
        != [line["loss"] for line in other]
    )


def test_mining_rounds_and_their_report(tmp_path, capsys):
    run(tmp_path / "moco", "--epochs", 1)
    before = weights(tmp_path / "moco")
    init = ["--init", tmp_path / "moco" / "checkpoint_last.pth.tar"]
    mined = "--epochs 3 --miner knn --isl-every 2 --isl-budget 4".split()
    lines = run(tmp_path / "isl", *init, *mined)
    rounds = [line for line in lines if line["kind"] == "round"]
    assert [line["epoch"] for line in rounds] == [0, 2]
    for line in rounds:
        assert line["mean_size"] == pytest.approx(4, abs=0.01)
        assert (
            0 < line["precision"] <= 1
            and 0 < line["precision_own_nearest"] <= 1
            and 0 < line["precision_all_pairs"] <= 1
        )
        assert line["baselines"]["sizes"][0] == 4 and {5.0, 50.0} <= set(line["baselines"]["sizes"])
    last = rounds[-1]
    assert (
        f"precision {last['precision']:.3f} (own nearest {last['precision_own_nearest']:.3f}, all"
        f" pairs {last['precision_all_pairs']:.3f})" in capsys.readouterr().out
    )
    assert any(line["hpe"] > 0 for line in lines if line["kind"] == "step")
    after = weights(tmp_path / "isl")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_labels_steer_nothing(tmp_path, monkeypatch):
    """The same run with shuffled labels writes the same weights."""
    flags = "--epochs 2 --miner knn --isl-start 1 --knn-every 1 --knn-holdout 1000".split()
    run(tmp_path / "true", *flags)
    build = pretraining.data.build_dataset

    def shuffled(*args, **options):
        dataset = build(*args, **options)
        dataset.labels = dataset.labels[
            torch.randperm(len(dataset.labels), generator=torch.Generator().manual_seed(0))
        ]
        return dataset

    monkeypatch.setattr(pretraining.data, "build_dataset", shuffled)
    run(tmp_path / "shuffled", *flags)
    mine, theirs = weights(tmp_path / "true"), weights(tmp_path / "shuffled")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    precision = [
        json.loads(line).get("precision")
        for out in ("true", "shuffled")
        for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()
    ]
    assert len({p for p in precision if p is not None}) == 2, (
        "the labels were looked at, for the log"
    )


def test_bank_objective_and_held_out_knn(tmp_path):
    lines = run(
        tmp_path,
        "--objective",
        "bank",
        "--miner",
        "knn",
        "--epochs",
        2,
        "--isl-start",
        1,
        "--knn-every",
        2,
        "--knn-holdout",
        100,
    )
    assert [line["kind"] for line in lines].count("round") == 1 and "knn" in lines[-1]
    assert not any("encoder_k" in name or "queue" in name for name in weights(tmp_path))


@pytest.mark.parametrize(
    "flags",
    [
        ["--symmetric"],
        ["--bn-splits", 2],
        ["--channels-last"],
        ["--amp", "bf16"],
        ["--no-mlp"],
        ["--isl-loss", "meanlog"],
        ["--isl-own", "0.5"],
    ],
)
def test_options_change_the_run(tmp_path, flags):
    common = ["--epochs", 1, "--max-steps", 3, "--miner", "knn", "--isl-start", 0]
    plain, changed = run(tmp_path / "plain", *common), run(tmp_path / "changed", *common, *flags)
    last = [lines[-1]["loss"] if "loss" in lines[-1] else None for lines in (plain, changed)]
    if flags != ["--channels-last"]:  # that one only changes the memory, so at most the last bits
        assert weights_differ(tmp_path / "plain", tmp_path / "changed"), last


def weights_differ(a, b):
    mine, theirs = weights(a), weights(b)
    return mine.keys() != theirs.keys() or any(
        not torch.equal(mine[name], theirs[name]) for name in mine
    )


def test_a_stripped_moco_file_is_filled_in(tmp_path, capsys):
    """What MoCo publishes: the query encoder alone."""
    run(tmp_path / "moco", "--epochs", 1)
    content = checkpoint.load(tmp_path / "moco" / "checkpoint_last.pth.tar")
    kept = {name: value for name, value in content["state_dict"].items() if "encoder_q" in name}
    checkpoint.save(
        {"epoch": 200, "arch": "digits", "state_dict": kept}, tmp_path / "stripped.pth.tar"
    )
    capsys.readouterr()
    run(
        tmp_path / "go_on",
        "--init",
        tmp_path / "stripped.pth.tar",
        "--epochs",
        1,
        "--max-steps",
        1,
        "--lr",
        0,
    )
    said = capsys.readouterr().out
    assert "it has no encoder_k" in said and "it has no queue" in said and "queue filled" in said
    after = weights(tmp_path / "go_on")
    for name, value in kept.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(after[name], value) and torch.allclose(
                after[name.replace("encoder_q", "encoder_k")], value
            )


def test_a_start_from_a_file_of_the_same_images_knows_whose_the_keys_are(tmp_path):
    """The queue has 256 slots, of which one step writes 128; of other images nothing is known."""
    run(tmp_path / "moco", "--epochs", 1, "--max-steps", 3)
    file = tmp_path / "moco" / "checkpoint_last.pth.tar"
    before = checkpoint.load(file)["isl"]["state"]["slots"]
    ptr = int(weights(tmp_path / "moco")["module.queue_ptr"])
    kept = (torch.arange(128) + ptr + 128) % 256
    for name, flags in (("same", []), ("other", ["--knn-holdout", 1])):
        run(tmp_path / name, "--init", file, "--epochs", 1, "--max-steps", 1, *flags)
        after = checkpoint.load(tmp_path / name / "checkpoint_last.pth.tar")["isl"]["state"][
            "slots"
        ]
        wanted = before["owner"][kept] if name == "same" else torch.full((128,), -1)
        assert torch.equal(after["owner"][kept], wanted) and after["held"] in (None, 256)


# ---- real photos, where they are at hand ---------------------------------------------------------


@pytest.fixture(scope="session")
def shared_images(tmp_path_factory):
    """A function: a part of one of the shared sets, as a folder data set."""
    root = os.environ.get("MOCO_ISL_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("MOCO_ISL_DATA names no folder with the shared images")

    def part(name, archive, train, val):
        out, counts = tmp_path_factory.mktemp("shared"), {}
        with tarfile.open(Path(root) / archive) as tar:
            for member in tar:
                split_class = tuple(member.name.split("/")[1:3])
                limit = (
                    {"train": train, "val": val}.get(split_class[0], 0) if member.isfile() else 0
                )
                counts[split_class] = counts.get(split_class, 0) + 1 if limit else 0
                if limit and counts[split_class] <= limit:
                    tar.extract(member, out, filter="data")
        return out / name

    return part


def test_photos(tmp_path, shared_images):
    folder = shared_images("imagenette_mini", "imagenette_mini.tar.gz", 2, 1)
    flags = (
        "-a resnet18 --image-size 112 --mlp --moco-k 64 --moco-t 0.2 --aug-plus --cos -b 10 -j 2"
        " --epochs 1 --seed 0 --miner knn --isl-start 0 --knn-every 1".split()
    )
    assert main_moco_isl.main([*flags, "--out", str(tmp_path / "out"), str(folder)]) == 0
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["kind"] for line in lines] == ["round", "step", "epoch"] and lines[-1]["loss"] > 0
    assert weights(tmp_path / "out")["module.encoder_q.conv1.weight"].shape[-1] == 7


def test_small_photos_take_the_small_stem(tmp_path, shared_images):
    folder = shared_images("cifar10", "cifar10_jpeg.tar.gz", 20, 1)
    flags = "-a resnet18w16 --mlp --moco-k 128 -b 64 -j 0 --epochs 1 --max-steps 2 --seed 0".split()
    assert main_moco_isl.main([*flags, "--out", str(tmp_path / "out"), str(folder)]) == 0
    assert weights(tmp_path / "out")["module.encoder_q.conv1.weight"].shape[-1] == 3


def test_flags_that_change_nothing_are_said(tmp_path, capsys):
    run(tmp_path / "a", "--epochs", 1, "--max-steps", 1, "--isl-budget", 3, "--isl-keep")
    assert (
        "without --miner nothing is mined, and --isl-budget, --isl-keep changes nothing"
        in capsys.readouterr().out
    )
    run(tmp_path / "b", "--epochs", 1, "--max-steps", 1, "--miner", "knn", "--isl-start", 5)
    assert (
        "--isl-start 5 is past the last epoch of --epochs 1: nothing will be mined"
        in capsys.readouterr().out
    )
    run(tmp_path / "c", "--epochs", 1, "--max-steps", 1)
    assert "warning" not in capsys.readouterr().out


def test_features_all_alike_are_said(tmp_path, capsys):
    """A rate that no encoder survives: the softmax over all images then sees one point, and its
    loss stays that of chance.
    """
    few = "--knn-holdout 900 -b 64".split()
    run(tmp_path / "far", "--epochs", 6, "--objective", "bank", "--lr", 1, *few)
    assert "epoch 5: all features are alike (mean cosine 0.999)" in capsys.readouterr().out
    lines = run(tmp_path / "near", "--epochs", 3, "--moco-m", 0.99, "--moco-dim", 64)
    assert (
        "all features are alike" not in capsys.readouterr().out
        and 0 < [x for x in lines if x["kind"] == "epoch"][-1]["mean_cosine"] < 0.9
    )


def test_one_class_is_trained_on_but_never_judged_by(tmp_path, capsys):
    argv = photos(tmp_path / "set", 8)
    (tmp_path / "set" / "train").rename(tmp_path / "images")
    for split in ("train", "val"):
        for name in ("cat", "ship"):
            shutil.copytree(tmp_path / "images", tmp_path / "set" / split / "images" / name)
    assert (
        main_moco_isl.main(
            [*argv, "--knn-every", "1", "--epochs", "1", "--out", str(tmp_path / "run")]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "=> train: 16 images, 1 class\n=> warning: train: all lie in one class folder, 'images',"
        " which holds only folders" in said
    )
    assert "--knn-every without labels: nothing to judge by" in said and "weighted kNN" not in said
    for judge in (main_knn, main_lincls):
        pretrained = ["--pretrained", str(tmp_path / "run" / "checkpoint_last.pth.tar")]
        assert (
            judge.main([*pretrained, argv[0], "--device", "cpu", "--out", str(tmp_path / "judged")])
            == 2
        )
        assert (
            "have no labels (all lie in one class folder, 'images', which holds only"
            in capsys.readouterr().err
        )
