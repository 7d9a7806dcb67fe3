"""Weighted kNN and few-label accuracy against loops, closed forms and another library."""

import json
import math
import os
import random
import re
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image

import main_knn
from moco_isl import data
from moco_isl.builder import MoCo
from moco_isl.encoders import build_encoder
from moco_isl.errors import BadInput
from moco_isl.evaluation import features as features_file
from moco_isl.evaluation import knn
from tests.ranks import run_ranks
from tests.runs import _same


def features(n, dim, seed):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def knn_by_loops(queries, bank, labels, k, T, leave_one_out=False):
    predictions = []
    for i, q in enumerate(queries.tolist()):
        sims = [
            (sum(a * b for a, b in zip(q, row)), j)
            for j, row in enumerate(bank.tolist())
            if not (leave_one_out and i == j)
        ]
        votes = {}
        for sim, j in sorted(sims, reverse=True)[:k]:
            votes[labels[j].item()] = votes.get(labels[j].item(), 0.0) + math.exp(sim / T)
        predictions.append(max(votes, key=votes.get))
    return torch.tensor(predictions)


@pytest.mark.parametrize("k,T", [(1, 0.1), (7, 0.1), (20, 0.07), (60, 1.0)])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_equals_the_loops(k, T, leave_one_out):
    bank, labels = features(61, 6, 0), torch.arange(61) * 7 % 5
    queries = bank if leave_one_out else features(23, 6, 1)
    expected = knn_by_loops(queries, bank, labels, k, T, leave_one_out)
    assert len(expected.unique()) > 1
    assert torch.equal(
        knn.weighted_knn(queries, bank, labels, k, T, leave_one_out=leave_one_out), expected
    )


def test_chunks_change_nothing():
    bank, queries = features(500, 8, 0), features(100, 8, 1)
    labels = torch.randint(0, 4, (500,), generator=torch.Generator().manual_seed(2))
    whole = knn.nearest(queries, bank, 30)
    for chunk in (1, 64, 10_000):
        sim, row = knn.nearest(queries, bank, 30, chunk=chunk)
        assert torch.equal(row, whole[1]) and torch.allclose(sim, whole[0], atol=1e-6)
    whole_loo = knn_by_loops(bank[:50], bank[:50], labels[:50], 5, 0.1, leave_one_out=True)
    assert torch.equal(
        knn.weighted_knn(bank[:50], bank[:50], labels[:50], 5, 0.1, chunk=1, leave_one_out=True),
        whole_loo,
    )


def test_equals_lightly():
    knn_predict = pytest.importorskip("lightly.utils.benchmarking").knn_predict
    bank, queries = features(1000, 32, 0), features(300, 32, 1)
    labels = torch.randint(0, 10, (1000,), generator=torch.Generator().manual_seed(2))
    for k, T in ((200, 0.1), (20, 0.07)):
        theirs = knn_predict(
            queries, bank.T.contiguous(), labels, num_classes=10, knn_k=k, knn_t=T
        )[:, 0]
        assert torch.equal(knn.weighted_knn(queries, bank, labels, k, T), theirs)


def test_grid_is_every_pair_and_a_tiny_temperature_does_not_overflow():
    bank, queries = features(80, 8, 0), features(40, 8, 1)
    labels = torch.arange(80) % 3
    grid = knn.knn_grid(queries, bank, labels, [1, 5, 20], [0.1, 0.5])
    assert set(grid) == {(k, T) for k in (1, 5, 20) for T in (0.1, 0.5)}
    for (k, T), predictions in grid.items():
        assert torch.equal(predictions, knn.weighted_knn(queries, bank, labels, k, T))
    # the nearest alone decides
    assert torch.equal(knn.weighted_knn(queries, bank, labels, 20, T=1e-4), grid[1, 0.1])


def test_the_weight_decides_not_the_count():
    bank = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]), dim=1)
    query, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1, 1])
    # one vote of exp(1 / T) against two of exp(0.7071 / T): equal at T = 0.2929 / ln 2 = 0.4226
    assert knn.weighted_knn(query, bank, labels, 3, T=0.41).item() == 0
    assert knn.weighted_knn(query, bank, labels, 3, T=0.43).item() == 1


@pytest.mark.parametrize(
    "arguments", [{"k": 0}, {"k": 11}, {"k": 10, "leave_one_out": True}, {"k": 1, "T": 0.0}]
)
def test_a_bad_k_or_temperature_is_said(arguments):
    bank = features(10, 4, 0)
    with pytest.raises(BadInput):
        knn.weighted_knn(bank, bank, torch.arange(10) % 2, **arguments)


def few_shot_by_loops(train, train_labels, test, test_labels, drawn):
    right = 0
    for x, y in zip(test, test_labels.tolist()):
        means = {c: train[rows].mean(dim=0) for c, rows in drawn.items()}
        right += max(means, key=lambda c: F.cosine_similarity(x, means[c], dim=0).item()) == y
    return right / len(test)


def test_few_shot_equals_the_loops():
    train, test = features(60, 5, 0), features(50, 5, 1)
    # classes 0, 2, 4
    train_labels = torch.arange(60) * 11 % 3 * 2
    test_labels = torch.arange(50) % 3 * 2
    mean, spread = knn.few_shot(train, train_labels, test, test_labels, shots=4, draws=3, seed=5)
    generator, expected = torch.Generator().manual_seed(5), []
    for _ in range(3):
        rows = knn.draw_shots(train_labels, 4, generator)
        assert all(len(set(r.tolist())) == 4 for r in rows)
        assert [train_labels[r].unique().tolist() for r in rows] == [[0], [2], [4]]
        drawn = dict(zip((0, 2, 4), rows))
        expected.append(few_shot_by_loops(train, train_labels, test, test_labels, drawn))
    assert mean == pytest.approx(sum(expected) / 3)
    assert spread == pytest.approx(torch.tensor(expected).std().item(), abs=1e-6)
    assert spread > 0


def test_few_shot_of_separated_classes_is_perfect_and_too_few_images_are_said():
    labels = torch.arange(40) % 4
    rows = F.one_hot(labels).float()
    assert knn.few_shot(rows, labels, rows, labels, shots=2) == (1.0, 0.0)
    with pytest.raises(BadInput, match="11 shots.*only 10"):
        knn.few_shot(rows, labels, rows, labels, shots=11)


# ---- the script, on the embedded digits


@pytest.fixture(scope="module")
def moco_file(tmp_path_factory):
    """An untrained MoCo of the demo's network: enough to hold the script to the loops."""
    torch.manual_seed(0)
    model = MoCo(partial(build_encoder, "digits"), dim=16, K=32, mlp=True)
    path = tmp_path_factory.mktemp("knn") / "file.pth.tar"
    torch.save(
        {
            "epoch": 3,
            "arch": "digits",
            "state_dict": {f"module.{n}": t for n, t in model.state_dict().items()},
        },
        path,
    )
    return path, model


def run_main(*argv):
    """argv: flags, of which one may be a text of several words."""
    given = (*argv, "--workers 0 --device cpu")
    return main_knn.main([word for flag in given for word in str(flag).split()])


def works(*argv):
    assert run_main(*argv) == 0


def results(folder):
    return json.loads((folder / "results.json").read_text())


def digit_features(model, split):
    dataset = data.build_dataset("digits", split=split)
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    x = data.get_eval_transform("digits", 16).normalize(images)
    seen = {}
    with torch.no_grad():
        model.eval()
        model.encoder_q.fc.register_forward_pre_hook(
            lambda m, inputs: seen.update(backbone=inputs[0])
        )
        out = model.encoder_q(x)
    return {
        "output": F.normalize(out, dim=1),
        "backbone": F.normalize(seen["backbone"], dim=1),
    }, dataset.labels


def test_script_reports_both_features_and_uses_kept_ones(moco_file, tmp_path, capsys):
    path, model = moco_file
    kept = tmp_path / "kept.safetensors"
    flags = ["--pretrained", path, "--dataset digits --k 1 20 --T 0.1 0.5 --features", kept]
    works(*flags, "--out", tmp_path / "a")
    found = results(tmp_path / "a")
    train, labels = digit_features(model, "train")
    val, truth = digit_features(model, "val")
    assert (found["M"], found["queries"], found["protocol"]) == (1437, 360, "val")
    assert {(r["feature"], r["dim"]) for r in found["results"]} == {
        ("output", 16),
        ("backbone", 128),
    }
    assert len(found["results"]) == 2 * 2 * 2
    for r in found["results"]:
        predicted = knn.weighted_knn(val[r["feature"]], train[r["feature"]], labels, r["k"], r["T"])
        assert r["top1"] == pytest.approx(
            100 * (predicted == truth).double().mean().item(), abs=0.3
        )
    assert found["results"][0]["top1"] > 50  # random features of digits are far above chance
    capsys.readouterr()
    # again from the file: the same numbers, without encoder or images
    works("--features", kept, "--k", 1, 20, "--T", 0.1, 0.5, "--out", tmp_path / "b")
    assert results(tmp_path / "b")["results"] == found["results"]
    assert "used all" not in capsys.readouterr().out
    # features of another file are refused
    other = tmp_path / "other.pth"
    torch.save(build_encoder("digits").state_dict(), other)
    assert run_main("--pretrained", other, "--dataset", "digits", "--features", kept) == 2
    assert "sha256" in capsys.readouterr().err


def test_script_leaves_one_out_where_there_is_no_val(moco_file, tmp_path, capsys):
    path, model = moco_file
    dataset = data.build_dataset("digits", split="val")
    for i in range(60):
        folder = tmp_path / "images" / "train" / dataset.classes[dataset.labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(dataset[i][0]).save(folder / f"{i:03d}.png")
    flags = ["--pretrained", path, tmp_path / "images", "--image-size", 16, "--k", 3, 200]
    works(*flags, "--out", tmp_path / "out", "--features", tmp_path / "kept.safetensors")
    found = results(tmp_path / "out")
    assert found["protocol"].startswith("leave-one-out") and found["M"] == found["queries"] == 60
    assert {r["k"] for r in found["results"]} == {3, 59} and "59 instead" in capsys.readouterr().out
    kept = load_file(tmp_path / "kept.safetensors")
    for r in found["results"]:
        bank, labels = kept[f"train.{r['feature']}"], kept["train.labels"]
        predicted = knn_by_loops(bank, bank, labels, r["k"], 0.1, leave_one_out=True)
        assert r["top1"] == pytest.approx(100 * (predicted == labels).double().mean().item())


def folder_of_digits(root, change=lambda image: image, n=40):
    """n images in train and in val, with a folder a class."""
    dataset = data.build_dataset("digits", split="val")
    for i in range(2 * n):
        folder = root / ("train" if i < n else "val") / dataset.classes[dataset.labels[i % n]]
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(change(dataset[i][0])).save(folder / f"{i:03d}.png")
    return root


def test_kept_features_are_used_only_for_what_they_are_of(moco_file, tmp_path, capsys):
    one = folder_of_digits(tmp_path / "one")
    two = folder_of_digits(tmp_path / "two", lambda x: (x // 2).flip(2))
    names = [sorted(str(p.relative_to(root)) for p in root.rglob("*.png")) for root in (one, two)]
    assert names[0] == names[1]
    kept, flags = tmp_path / "kept.safetensors", ["--image-size", 16, "--k", 3]
    works("--pretrained", moco_file[0], one, "--features", kept, *flags, "--out", tmp_path / "out")
    works("--pretrained", moco_file[0], one, "--features", kept, "--k 3 --out", tmp_path / "again")
    assert results(tmp_path / "out")["results"] == results(tmp_path / "again")["results"]
    before = kept.read_bytes()
    for other, said in [
        ([two], "of other data"),
        (["--pretrained", moco_file[0], two], "of other data"),
        ([one / "train"], "of other data"),
        (["--dataset", "digits"], "with dataset folder, here it is digits"),
        (["nowhere"], "no such folder"),
        (["--key"], "of the encoder query, here it is key"),
        (["-a", "resnet18"], "with arch digits"),
        (["--amp", "bf16"], "with amp off"),
        (["--image-size", 32], "with image_size 16"),
    ]:
        capsys.readouterr()
        assert run_main("--features", kept, *other) == 2, other
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    "harm",
    [
        lambda t: t.update({"train.labels": t["train.labels"][:-1].clone()}),
        lambda t: t.pop("val.output"),
        lambda t: t.update({"val.backbone": t["val.backbone"][:, :5].clone()}),
        lambda t: t["train.backbone"][3].fill_(float("nan")),
    ],
)
def test_features_that_do_not_belong_together_are_refused(moco_file, tmp_path, capsys, harm):
    kept = tmp_path / "kept.safetensors"
    works("--pretrained", moco_file[0], "--dataset", "digits", "--features", kept, "--k", 1)
    tensors = load_file(kept)
    harm(tensors)
    save_file(tensors, kept)
    capsys.readouterr()
    assert run_main("--features", kept, "--k", 1) == 2
    assert "holds no labels and finite features" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_ends_it_or_is_left_out(moco_file, tmp_path, capsys):
    root = folder_of_digits(tmp_path / "images")
    flags = ["--pretrained", moco_file[0], root, "--k", 1, "--out", tmp_path / "out"]
    broken = sorted((root / "val").rglob("*.png"))[7]
    broken.write_bytes(broken.read_bytes()[:60])
    assert run_main(*flags) == 3
    error = capsys.readouterr().err
    assert str(broken) in error and "--max-bad-images" in error and error.count("\n") == 1
    works(*flags, "--max-bad-images", 1)
    assert f"{broken} cannot be read and is left out" in capsys.readouterr().out
    found = results(tmp_path / "out")
    argv = [str(a) for a in (*flags[:-1], tmp_path / "two", "--workers", 0, "--device", "cpu")]
    assert run_ranks(2, _main_on_a_rank, [*argv, "--max-bad-images", "1"]) == [0, 0]
    assert run_ranks(2, _main_on_a_rank, argv) == [3, 3]
    assert results(tmp_path / "two")["results"] == found["results"]
    broken.unlink()  # the same as if it had never been there
    works(*flags)
    assert (results(tmp_path / "out")["results"], found["queries"]) == (found["results"], 39)


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(moco_file, tmp_path, capsys):
    root = folder_of_digits(tmp_path / "images", n=4)
    link = sorted((root / "train").rglob("*.png"))[0].with_name("a.png")
    link.symlink_to("nowhere.png")
    assert run_main("--pretrained", moco_file[0], root) == 3
    error = capsys.readouterr().err
    assert str(link) in error and error.count("\n") == 1


def test_one_image_has_no_other_to_be_judged_by(moco_file, tmp_path, capsys):
    root = folder_of_digits(tmp_path / "images", n=2)
    sorted((root / "train").rglob("*.png"))[0].write_bytes(b"no image")
    assert run_main("--pretrained", moco_file[0], root / "train", "--max-bad-images", 1) == 2
    assert "no other to judge it by" in capsys.readouterr().err


def test_what_cannot_be_written_and_what_another_script_wrote_is_said_before_the_work(
    moco_file, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "results.json").write_text('{"classifiers": []}')
    for flags, said in [
        (["--features", tmp_path / "file" / "x"], "cannot be written"),
        (["--out", tmp_path / "file"], "is a file"),
        (
            ["--out", tmp_path / "probe"],
            "is none of this command's files, so it is not written over",
        ),
    ]:
        assert run_main("--pretrained", moco_file[0], "--dataset", "digits", *flags) == 2
        caught = capsys.readouterr()
        assert said in caught.err and caught.err.count("\n") == 1 and "used all" not in caught.out
    assert (tmp_path / "probe" / "results.json").read_text() == '{"classifiers": []}'


@pytest.fixture(scope="module")
def two_kept(moco_file, tmp_path_factory):
    """Features of two checkpoints on the same few digits, as files."""
    folder = tmp_path_factory.mktemp("kept")
    root = folder_of_digits(folder / "images", n=10)
    content = torch.load(moco_file[0], weights_only=True)
    torch.save({**content, "epoch": 9}, folder / "two.pth.tar")
    for name, path in (("one", moco_file[0]), ("two", folder / "two.pth.tar")):
        works("--pretrained", path, root, "--k 1 --features", folder / f"{name}.safetensors")
    return folder


def test_results_of_another_checkpoint_or_command_are_kept(two_kept, tmp_path, monkeypatch, capsys):
    def judged(name, *flags):
        monkeypatch.setattr(sys, "argv", ["main_knn.py", name, *map(str, flags)])
        capsys.readouterr()
        assert (
            run_main("--features", two_kept / f"{name}.safetensors", *flags, "--out", tmp_path) == 0
        )
        return results(tmp_path), capsys.readouterr().out

    first, said = judged("one", "--k", 1)
    assert "earlier" not in first and "kept" not in said.splitlines()[-1]
    assert judged("one", "--k", 1)[0] == first  # the same again
    second, said = judged("two", "--k", 1)
    assert second["epoch"] == "9" and second["earlier"] == [first]
    assert (
        f"=> the results of '{first['pretrained']}' that '{tmp_path}/results.json' held are kept in"
        ' it, under "earlier"' in said
    )
    third, _ = judged("two", "--k", 1, 5)
    assert len(third["results"]) == 2 * len(second["results"])
    assert third["earlier"] == [
        first,
        {name: value for name, value in second.items() if name != "earlier"},
    ]


def test_results_are_written_whole_and_over_nobody_elses(two_kept, tmp_path, monkeypatch, capsys):
    flags = ["--features", two_kept / "one.safetensors", "--k", 1, "--out", tmp_path]
    path = tmp_path / "results.json"
    works(*flags)
    whole = path.read_text()
    with monkeypatch.context() as patched:
        patched.setattr(
            os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        assert run_main(*flags) == 3
    assert (
        "No space left on device" in capsys.readouterr().err
        and path.read_text() == whole
        and os.listdir(tmp_path) == ["results.json"]
    )
    for other in (
        "[1]",
        "{}",
        "somebody's notes",
        '{"results": {}}',
        '{"results": [], "earlier": 3}',
        whole[: len(whole) // 2],
    ):
        path.write_text(other)
        assert run_main(*flags) == 2
        assert (
            "none of this command's files" in capsys.readouterr().err and path.read_text() == other
        )


def test_damaged_features_are_refused(two_kept, tmp_path, capsys):
    whole, draw = (two_kept / "one.safetensors").read_bytes(), random.Random(0)
    kept = tmp_path / "kept.safetensors"
    for place in [draw.randrange(len(whole)) for _ in range(40)]:
        kept.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
        )
        with pytest.raises(BadInput, match="damaged|cannot read features|holds no features"):
            features_file.load(kept, {}, torch.device("cpu"))


def test_features_are_kept_over_nothing_but_the_same(two_kept, tmp_path):
    path = tmp_path / "kept.safetensors"
    splits, facts = features_file.load(two_kept / "one.safetensors", {}, torch.device("cpu"))
    for _ in range(2):
        features_file.save(path, splits, facts)
        assert _same(load_file(path), load_file(two_kept / "one.safetensors"), "") == []
        assert features_file.load(path, {}, torch.device("cpu"))[1] == facts
    for there in ((two_kept / "two.safetensors").read_bytes(), b"notes"):
        path.write_bytes(there)
        with pytest.raises(BadInput, match="is not written over"):
            features_file.save(path, splits, facts)
        assert path.read_bytes() == there


def test_images_that_do_not_fit_the_network_are_said(tmp_path, capsys):
    pytest.importorskip("timm")
    arch = "timm:vit_tiny_patch16_224"
    torch.save(build_encoder(arch, 8).state_dict(), tmp_path / "vit.pth")
    assert run_main("--pretrained", tmp_path / "vit.pth", "-a", arch, "--dataset", "digits") == 2
    error = capsys.readouterr().err
    assert (
        f"{arch} does not take images of side 16" in error
        and "--image-size" in error
        and error.count("\n") == 1
    )


def test_a_file_trained_on_other_images_is_warned_of(moco_file, tmp_path, capsys):
    content = torch.load(moco_file[0], weights_only=True)
    torch.save(
        {**content, "args": {"dataset": "cifar10", "image_size": 32}}, tmp_path / "file.pth.tar"
    )
    works("--pretrained", tmp_path / "file.pth.tar", "--dataset digits --image-size 16 --k 1")
    out = capsys.readouterr().out
    assert "trained on cifar10, judged on digits" in out and "side 32, judged on side 16" in out


def _main_on_a_rank(rank, world, argv):
    return main_knn.main(argv)


def test_two_ranks_equal_one_process(moco_file, tmp_path):
    flags = [
        "--pretrained",
        str(moco_file[0]),
        "--dataset",
        "digits",
        "--k",
        "5",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    assert main_knn.main([*flags, "--out", str(tmp_path / "one")]) == 0
    assert run_ranks(
        2, _main_on_a_rank, [*flags, "--out", str(tmp_path / "two"), "--batch-size", "100"]
    ) == [0, 0]
    assert results(tmp_path / "one")["results"] == results(tmp_path / "two")["results"]


@pytest.mark.parametrize(
    "flags,said",
    [
        ([], "no encoder"),
        (["--pretrained", "nowhere.pth"], "no file at 'nowhere.pth'"),
        (["--pretrained", "FILE", "-a", "resnet18"], "does not fit resnet18.*looks like digits"),
        (["--pretrained", "FILE", "--k", "0"], "--k 0 is out of range"),
        (["--pretrained", "FILE", "--T", "0"], "--T 0.0 is out of range"),
        (["--pretrained", "FILE", "--neighbours", "3"], "no flag --neighbours"),
        (["--pretrained", "FILE", "--dataset", "folder"], "needs a DIR"),
        (["--pretrained", "FILE", "--dataset", "folder", "nowhere"], "no such folder: nowhere"),
        (["--features", "FILE"], "cannot read features"),
        (["--features", "FOLDER"], "is a folder"),
    ],
)
def test_bad_input_is_one_line_and_code_2(moco_file, tmp_path, capsys, flags, said):
    flags = [{"FILE": str(moco_file[0]), "FOLDER": str(tmp_path)}.get(f, f) for f in flags]
    assert run_main(*(["--dataset", "digits"] if "--dataset" not in flags else []), *flags) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1
