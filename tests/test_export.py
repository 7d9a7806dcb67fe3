"""Every library reads what we export, and answers as ours; MoCo's own probe reads our files."""

import dataclasses
import errno
import json
import sys
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from safetensors import safe_open

import main_moco_isl
from moco_isl import export
from moco_isl.builder import MoCo
from moco_isl.encoders import BACKBONE, Taps, build_encoder
from moco_isl.evaluation.subject import fingerprint
from moco_isl.run.backbone import load_backbone


def write_moco(path, arch, stem="imagenet", mlp=True):
    torch.manual_seed(0)
    model = MoCo(partial(build_encoder, arch, stem=stem), dim=16, K=32, mlp=mlp)
    with torch.no_grad():
        for p in model.encoder_k.parameters():
            p.mul_(0.9)
        for name, t in model.named_buffers():
            if "running" in name:
                t.add_(0.1 * torch.rand_like(t))  # not so far that all features are zero
    state = {f"module.{n}": t for n, t in model.state_dict().items()}
    torch.save(
        {
            "epoch": 7,
            "arch": arch,
            "state_dict": state,
            "args": {"dataset": "cifar10", "miner": "gan"},
        },
        path,
    )
    return model.eval()


@pytest.fixture(scope="module")
def moco_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "moco.pth.tar"
    return path, write_moco(path, "resnet18")


def run(*argv):
    return export.main([str(a) for a in argv])


@torch.no_grad()
def backbone(encoder, side=64):
    seen = []
    handle = encoder.fc.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    encoder.eval()(images(side))
    handle.remove()
    return seen[0]


def images(side=64):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("key", [False, True])
def test_torchvision_misses_exactly_the_classifier(moco_file, tmp_path, key, capsys):
    path, model = moco_file
    assert (
        run(
            path,
            "--to",
            "torchvision",
            "--out",
            tmp_path / "sub" / "tv.pth",
            *(["--key"] if key else []),
        )
        == 0
    )
    assert ("encoder_k" if key else "encoder_q") in capsys.readouterr().out
    theirs = torchvision.models.resnet18()
    answer = theirs.load_state_dict(
        torch.load(tmp_path / "sub" / "tv.pth", weights_only=True), strict=False
    )
    assert set(answer.missing_keys) == {"fc.weight", "fc.bias"} and answer.unexpected_keys == []
    wanted = backbone(model.encoder_k if key else model.encoder_q)
    assert torch.allclose(backbone(theirs), wanted, atol=1e-5)
    assert not torch.allclose(backbone(torchvision.models.resnet18()), wanted, atol=1e-1)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timm_loads_strictly(moco_file, tmp_path, suffix):
    path, model = moco_file
    out = tmp_path / f"timm.{suffix}"
    assert run(path, "--to", "timm", "--out", out) == 0
    theirs = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(out)).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(images()), backbone(model.encoder_q), atol=1e-5)
    if suffix == "pth":
        state = torch.load(out, weights_only=True)["state_dict"]
        timm.create_model("resnet18", num_classes=0).load_state_dict(state, strict=True)


def test_a_timm_encoder_goes_back_to_timm(tmp_path):
    encoder = build_encoder("timm:resnet10t", 16)
    torch.save({"arch": "timm:resnet10t", "state_dict": encoder.state_dict()}, tmp_path / "own.pth")
    assert run(tmp_path / "own.pth", "--to", "timm", "--out", tmp_path / "timm.pth") == 0
    theirs = timm.create_model(
        "resnet10t", num_classes=0, checkpoint_path=str(tmp_path / "timm.pth")
    ).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(images()), backbone(encoder), atol=1e-5)


@pytest.mark.parametrize(
    "arch,stem,side",
    [("resnet18w16", "cifar", 32), ("alexnet", "cifar", 32), ("digits", "auto", 16)],
)
def test_safetensors_takes_every_network_and_carries_a_card(tmp_path, arch, stem, side):
    path, out = tmp_path / "moco.pth.tar", tmp_path / "model.safetensors"
    model = write_moco(path, arch, stem)
    (tmp_path / "args.json").write_text(
        json.dumps({"command": ["python", "main_moco_isl.py", "--miner", "gan"]})
    )
    knn, lin = tmp_path / "knn.json", tmp_path / "lin.json"
    knn.write_text(
        json.dumps({"results": [{"feature": "output", "k": 200, "T": 0.1, "top1": 81.5}]})
    )
    lin.write_text(json.dumps({"classifiers": [{"layer": "backbone", "lr": 30.0, "top1": 88.25}]}))
    assert run(path, "--to", "safetensors", "--out", out, "--results", knn, lin) == 0
    with safe_open(out, framework="pt") as file:
        card = file.metadata()
        assert not any(name.startswith("fc.") for name in file.keys())
    assert (card["arch"], card["dataset"], card["epochs"], card["miner"]) == (
        arch,
        "cifar10",
        "7",
        "gan",
    )
    assert card["command"] == "main_moco_isl.py --miner gan" and "moco_isl" in card["library"]
    assert (
        json.loads(card["knn"])[0]["top1"] == 81.5
        and json.loads(card["linear"])[0]["top1"] == 88.25
    )
    encoder, info = load_backbone(out)
    assert info["arch"] == arch and info["head"] is None and info["args"]["dataset"] == "cifar10"
    assert torch.allclose(backbone(encoder, side), backbone(model.encoder_q, side), atol=1e-5)


@pytest.mark.parametrize("arch,blocks", [("resnet18", (2, 2, 2, 2)), ("resnet50", (3, 4, 6, 3))])
def test_detectron2_has_the_names_its_resnets_expect(tmp_path, arch, blocks):
    path, out = tmp_path / "moco.pth.tar", tmp_path / "d2.pth"
    model = write_moco(path, arch, mlp=False)
    assert run(path, "--to", "detectron2", "--out", out) == 0
    content = torch.load(out, weights_only=True)
    assert content["matching_heuristics"] is True
    # the names of detectron2's modeling/backbone/resnet.py, written out
    convs = ["conv1", "conv2"] + (["conv3"] if arch == "resnet50" else [])
    units = ["stem.conv1"]
    for stage, count in enumerate(blocks, start=2):
        for block in range(count):
            units += [f"res{stage}.{block}.{conv}" for conv in convs]
        if stage > 2 or arch == "resnet50":
            units.append(f"res{stage}.0.shortcut")
    norm = ("weight", "bias", "running_mean", "running_var")
    expected = {f"{unit}.weight" for unit in units} | {
        f"{unit}.norm.{part}" for unit in units for part in norm
    }
    assert set(content["model"]) == expected
    # by hand: one of each kind
    own = model.encoder_q.state_dict()
    for theirs, ours in {
        "stem.conv1.norm.running_mean": "bn1.running_mean",
        "res2.1.conv2.weight": "layer1.1.conv2.weight",
        "res3.0.shortcut.weight": "layer2.0.downsample.0.weight",
        "res3.0.shortcut.norm.bias": "layer2.0.downsample.1.bias",
        "res5.1.conv1.norm.running_var": "layer4.1.bn1.running_var",
    }.items():
        assert torch.equal(content["model"][theirs], own[ours])
    encoder, info = load_backbone(out)
    assert info["arch"] == arch and torch.allclose(
        backbone(encoder), backbone(model.encoder_q), atol=1e-5
    )


@pytest.mark.parametrize(
    "arch,stem,to,out,said",
    [
        (
            "resnet18",
            "cifar",
            "torchvision",
            "x.pth",
            "torchvision has no network of the shape of resnet18 with stem cifar",
        ),
        (
            "resnet18",
            "cifar",
            "timm",
            "x.pth",
            "timm has no network of the shape of resnet18 with stem cifar",
        ),
        (
            "resnet18w16",
            "imagenet",
            "torchvision",
            "x.pth",
            "torchvision has no network of the shape of resnet18w16",
        ),
        (
            "resnet18w16",
            "imagenet",
            "timm",
            "x.pth",
            "timm has no network of the shape of resnet18w16",
        ),
        (
            "alexnet",
            "cifar",
            "torchvision",
            "x.pth",
            "torchvision has no network of the shape of alexnet",
        ),
        ("resnet18", "cifar", "detectron2", "x.pth", "detectron2 has no network"),
        ("resnet18", "imagenet", "detectron2", "x.pkl", "name it .pth"),
        ("digits", "auto", "safetensors", ".", "is a folder"),
        ("digits", "auto", "safetensors", "moco.pth.tar", "the file to read"),
        ("digits", "auto", "hf", "x", "timm has no network of the shape of digits"),
        ("resnet18", "cifar", "hf", "x", "timm has no network of the shape of resnet18"),
        ("digits", "auto", "hf", "x.safetensors", "--to hf writes a folder"),
        ("digits", "auto", "onnx", "x.pth", "name an ONNX file .onnx"),
    ],
)
def test_what_a_library_cannot_hold_is_said(tmp_path, capsys, arch, stem, to, out, said):
    encoder = build_encoder(arch, 8, stem=stem)
    torch.save({"arch": arch, "state_dict": encoder.state_dict()}, tmp_path / "moco.pth.tar")
    assert run(tmp_path / "moco.pth.tar", "--to", to, "--out", tmp_path / out) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["moco.pth.tar"]


def test_results_of_another_file_do_not_go_into_the_card(moco_file, tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps({"sha256": "0" * 64, "results": []}))
    out = tmp_path / "x.safetensors"
    assert (
        run(moco_file[0], "--to", "safetensors", "--out", out, "--results", tmp_path / "r.json")
        == 2
    )
    assert "is not of main_knn.py or main_lincls.py" in capsys.readouterr().err and not out.exists()


def test_no_file_is_written_over(moco_file, tmp_path, capsys):
    out = tmp_path / "checkpoint_0199.pth.tar"
    out.write_bytes(b"days of training")
    assert run(moco_file[0], "--to", "torchvision", "--out", out) == 2
    assert "is there already" in capsys.readouterr().err and out.read_bytes() == b"days of training"


@pytest.mark.parametrize("to", ["torchvision", "safetensors"])
def test_a_place_that_cannot_be_written_is_said(moco_file, tmp_path, capsys, to):
    (tmp_path / "file").write_text("")
    assert run(moco_file[0], "--to", to, "--out", tmp_path / "file" / "x.pth") == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and error.count("\n") == 1


@pytest.mark.parametrize("to", ["torchvision", "detectron2"])
def test_a_name_by_which_the_file_would_be_misread_is_refused(moco_file, tmp_path, capsys, to):
    assert run(moco_file[0], "--to", to, "--out", tmp_path / "x.safetensors") == 2
    assert "name it .pth" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_results_of_the_file_are_found_among_earlier_ones(moco_file, tmp_path):
    ours = {
        "sha256": fingerprint(moco_file[0]),
        "encoder": "query",
        "dataset": "digits",
        "results": [{"top1": 50.0}],
    }
    newer = {
        "sha256": "0" * 64,
        "encoder": "query",
        "dataset": "digits",
        "results": [{"top1": 99.0}],
        "earlier": [{}, ours],
    }
    (tmp_path / "r.json").write_text(json.dumps(newer))
    out = tmp_path / "x.safetensors"
    assert (
        run(moco_file[0], "--to", "safetensors", "--out", out, "--results", tmp_path / "r.json")
        == 0
    )
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["knn"]) == [{"dataset": "digits", "top1": 50.0}]


def test_a_file_that_is_not_what_it_should_be_does_not_stay(
    moco_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    assert run(moco_file[0], "--to", "torchvision", "--out", tmp_path / "tv.pth") == 3
    assert "differs from the checkpoint" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_results_that_would_go_nowhere_are_refused(moco_file, tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps({"results": []}))
    assert (
        run(
            moco_file[0],
            "--to",
            "torchvision",
            "--out",
            tmp_path / "x.pth",
            "--results",
            tmp_path / "r.json",
        )
        == 2
    )
    assert "--to safetensors" in capsys.readouterr().err


def test_the_card_tells_what_was_judged_where_and_never_of_the_other_encoder(
    moco_file, tmp_path, capsys
):
    rows = {"a": [{"k": 1, "top1": 60.0}], "b": [{"k": 1, "top1": 70.0}]}
    for name, results in rows.items():
        facts = {"encoder": "query", "dataset": name, "protocol": "val", "results": results}
        (tmp_path / f"{name}.json").write_text(json.dumps(facts))
    files = ["--results", tmp_path / "a.json", tmp_path / "b.json"]
    assert (
        run(moco_file[0], "--to", "safetensors", "--out", tmp_path / "q.safetensors", *files) == 0
    )
    with safe_open(tmp_path / "q.safetensors", framework="pt") as file:
        card = json.loads(file.metadata()["knn"])
    assert [(row["dataset"], row["protocol"], row["top1"]) for row in card] == [
        ("a", "val", 60.0),
        ("b", "val", 70.0),
    ]
    assert (
        run(
            moco_file[0],
            "--key",
            "--to",
            "safetensors",
            "--out",
            tmp_path / "k.safetensors",
            *files,
        )
        == 2
    )
    assert "of the query encoder, and the key encoder is exported" in capsys.readouterr().err


def test_whoever_may_read_other_new_files_may_read_an_export(moco_file, tmp_path):
    assert run(moco_file[0], "--to", "safetensors", "--out", tmp_path / "x.safetensors") == 0
    (tmp_path / "other").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_detectron2_takes_a_timm_resnet_and_the_tensors_are_counted(tmp_path, capsys):
    torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), tmp_path / "t.pth")
    assert (
        run(
            tmp_path / "t.pth",
            "-a",
            "timm:resnet18",
            "--to",
            "detectron2",
            "--out",
            tmp_path / "d.pth",
        )
        == 0
    )
    written = torch.load(tmp_path / "d.pth", weights_only=True)["model"]
    assert f"{len(written)} tensors" in capsys.readouterr().out


# ---- ONNX and Hugging Face folders


def small_vit(path, side=32):
    """A file of ours with a small ViT for images of that side, and its query encoder."""
    torch.manual_seed(0)
    encoder = lambda num_classes: build_encoder("timm:test_vit", num_classes, image_size=side)
    model = MoCo(encoder, dim=16, K=32, mlp=True)
    state = {f"module.{n}": t for n, t in model.state_dict().items()}
    args = {"dataset": "cifar10", "image_size": side}
    content = {"epoch": 7, "arch": "timm:test_vit", "state_dict": state, "args": args}
    torch.save(content, path)
    return model.encoder_q.eval()


@torch.no_grad()
def features(encoder, x):
    found = Taps(encoder.eval(), [BACKBONE])(x)[BACKBONE]
    assert found.abs().max() > 0.1 and (len(x) == 1 or found.std(0).max() > 0.01)
    return found


def said_to_run(text, start):
    """What the line of the command that begins so says to write."""
    return next(line for line in text.splitlines() if line.startswith(start)).removeprefix(start)


@pytest.mark.parametrize(
    "arch,dynamo",
    [("resnet18", False), ("timm:test_vit", True), ("timm:test_vit", False), ("digits", True)],
)
def test_onnx_takes_any_batch_and_answers_as_ours(tmp_path, capsys, monkeypatch, arch, dynamo):
    if dynamo and not export._has_dynamo():
        pytest.skip("an older torch")
    monkeypatch.setattr(export, "_has_dynamo", lambda: dynamo)
    path, out = tmp_path / "moco.pth.tar", tmp_path / "backbone.onnx"
    if arch == "timm:test_vit":
        encoder, size = small_vit(path), []
    else:
        encoder, size = write_moco(path, arch).encoder_q, ["--image-size", 24]
    side = 24 if size else 32
    assert run(path, "--to", "onnx", "--out", out, *size) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backbone.onnx", "moco.pth.tar"]
    how = said_to_run(capsys.readouterr().out, "=> read it by ")
    for N in (1, 3, 8):
        x = torch.randn(N, 3, side, side, generator=torch.Generator().manual_seed(N))
        theirs = eval(how, {"onnxruntime": onnxruntime, "images": x.numpy()})
        ours = features(encoder, x)
        assert theirs.shape == ours.shape and theirs.dtype == np.float32
        assert np.allclose(theirs, ours, atol=1e-4 * max(1, float(ours.abs().max())))
    session = onnxruntime.InferenceSession(out)
    (given,), (got,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape[1:], got.name) == ("images", [3, side, side], "features")
    card = session.get_modelmeta().custom_metadata_map
    assert card["arch"] == arch and card["image_size"] == str(side)
    assert card["source_sha256"] == fingerprint(path)
    assert json.loads(card["mean"]) == [0.4914, 0.4822, 0.4465]
    assert json.loads(card["std"]) == [0.2023, 0.1994, 0.2010]


def test_an_onnx_file_that_answers_otherwise_does_not_stay(
    moco_file, tmp_path, monkeypatch, capsys
):
    def other(backbone, place):
        plain(dataclasses.replace(backbone, encoder=build_encoder("resnet18", 16)), place)

    plain = export._write_onnx
    monkeypatch.setattr(export, "_write_onnx", other)
    monkeypatch.setattr(export, "_has_dynamo", lambda: False)  # the faster of both
    out = tmp_path / "x.onnx"
    assert run(moco_file[0], "--to", "onnx", "--out", out, "--image-size", 32) == 3
    assert "differs from the checkpoint" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arch", ["resnet18", "timm:test_vit"])
def test_a_hugging_face_folder_is_read_by_timm(tmp_path, capsys, arch):
    path, out = tmp_path / "moco.pth.tar", tmp_path / "folder"
    if arch == "resnet18":
        encoder, side = write_moco(path, arch).encoder_q, 224
    else:
        encoder, side = small_vit(path), 32
    assert run(path, "--to", "hf", "--out", out) == 0
    said = capsys.readouterr().out
    model = eval(said_to_run(said, "=> read it by ").split(";")[0], {"timm": timm}).eval()
    x = images(side)
    assert torch.allclose(model(x), features(encoder, x), atol=1e-5)
    with torch.no_grad():
        judged = eval(said_to_run(said, "=> to train 10 classes: "), {"timm": timm}).eval()
        assert judged(x).shape == (2, 10)
        assert torch.allclose(
            judged.forward_head(judged.forward_features(x), pre_logits=True), model(x), atol=1e-5
        )
    # what timm takes an image by: the numbers of the training, none of timm's own weights
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, side, side)
    assert list(config["mean"]) == [0.4914, 0.4822, 0.4465]
    assert list(config["std"]) == [0.2023, 0.1994, 0.2010]
    assert config["crop_pct"] == (1.0 if side == 32 else 0.875)
    whole = json.loads((out / "config.json").read_text())
    assert whole["architecture"] == arch.removeprefix("timm:") and whole["num_classes"] == 0
    assert whole["num_features"] == model.num_features
    assert not {"tag", "url", "hf_hub_id", "license", "origin_url"} & set(whole["pretrained_cfg"])
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    modes = {p.stat().st_mode for p in out.iterdir()}
    assert len(modes) == 1  # of all alike: whoever may read one may read the others
    readme = (out / "README.md").read_text()
    assert readme.startswith("---\nlibrary_name: timm\n") and fingerprint(path) in readme
    own, info = load_backbone(out / "model.safetensors")
    assert info["arch"] == arch and torch.allclose(features(own, x), model(x), atol=1e-5)


def test_the_way_to_ten_classes_that_is_said_for_timm_works_and_the_other_does_not(
    moco_file, tmp_path, capsys
):
    out = tmp_path / "backbone.pth"
    assert run(moco_file[0], "--to", "timm", "--out", out) == 0
    said = capsys.readouterr().out
    names = {"timm": timm}
    exec(said_to_run(said, "=> read it by "), names)
    wanted = names["model"].eval()(images())
    said_to_run(said, "=> to train 10 classes: model.reset_classifier(10)")
    names["model"].reset_classifier(10)
    assert names["model"](images()).shape == (2, 10)
    assert torch.equal(names["model"].forward_features(images()).mean((2, 3)), wanted)
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model("resnet18", num_classes=10, checkpoint_path=str(out))


def test_a_vit_for_small_images_goes_to_timm_with_its_size(tmp_path, capsys):
    encoder, out = small_vit(tmp_path / "moco.pth.tar"), tmp_path / "vit.safetensors"
    assert run(tmp_path / "moco.pth.tar", "--to", "timm", "--out", out) == 0
    names = {"timm": timm}
    exec(said_to_run(capsys.readouterr().out, "=> read it by "), names)
    x = images(32)
    assert torch.allclose(names["model"].eval()(x), features(encoder, x), atol=1e-5)


def test_a_hugging_face_folder_keeps_the_statistics_of_the_training(tmp_path):
    import moco_isl

    torch.manual_seed(0)
    encoder = build_encoder("resnet18", 8, "imagenet")
    said = {"mean": [0.2, 0.3, 0.4], "std": [0.1, 0.2, 0.3], "image_size": 32}
    state = {f"module.encoder_q.{n}": t for n, t in encoder.state_dict().items()}
    torch.save({"arch": "resnet18", "state_dict": state, "args": said}, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", "--to", "hf", "--out", tmp_path / "hf") == 0
    ours, theirs = (moco_isl.load_backbone(tmp_path / name) for name in ("a.pth", "hf"))
    assert str(ours.transform) == str(theirs.transform) and "mean=(0.2, 0.3, 0.4)" in str(
        theirs.transform
    )


def test_a_side_that_the_network_does_not_take_is_said(tmp_path, capsys):
    path, out = tmp_path / "alexnet.pth", tmp_path / "x.onnx"
    content = {"arch": "alexnet", "state_dict": build_encoder("alexnet", 16).state_dict()}
    torch.save(content, path)
    assert run(path, "--to", "onnx", "--out", out, "--image-size", 16) == 2
    error = capsys.readouterr().err
    assert "does not take images of side 16" in error and error.count("\n") == 1
    assert not out.exists()


def test_positions_of_a_vit_are_stretched_for_another_side(tmp_path):
    path, out = tmp_path / "moco.pth.tar", tmp_path / "x.onnx"
    small_vit(path)
    assert run(path, "--to", "onnx", "--out", out, "--image-size", 64) == 0
    session = onnxruntime.InferenceSession(out)
    theirs = session.run(["features"], {"images": images(64).numpy()})[0]
    ours = features(load_backbone(path, image_size=64)[0], images(64))
    assert np.allclose(theirs, ours, atol=1e-4)


@pytest.mark.parametrize(
    "arch,args,channels,mean",
    [
        ("digits", {"dataset": "cifar10"}, 3, (0.4914, 0.4822, 0.4465)),
        ("digits", {"dataset": "cifar10", "mean": [0.1, 0.2], "std": [1.0, 2.0]}, 2, (0.1, 0.2)),
        ("digits", {}, 3, (0.485, 0.456, 0.406)),
        ("digits", {}, 1, (0.449,)),
        ("timm:vit_tiny_patch16_224", {"dataset": "own.module:row"}, 3, (0.5, 0.5, 0.5)),
        ("timm:vit_tiny_patch16_224", {"dataset": "folder"}, 3, (0.485, 0.456, 0.406)),
    ],
)
def test_mean_and_std_are_those_of_the_training_where_they_are_known(arch, args, channels, mean):
    encoder = build_encoder(arch, 8)
    found = export.normalisation(encoder, {"args": args}, channels)
    assert found[0] == mean and len(found[1]) == channels


@pytest.mark.parametrize("to,name", [("hf", "folder"), ("onnx", "x.onnx")])
def test_nothing_is_written_over_and_nothing_half_stays(moco_file, tmp_path, monkeypatch, to, name):
    out = tmp_path / name
    out.mkdir()
    (out / "mine").write_text("days of work")
    assert run(moco_file[0], "--to", to, "--out", out) == 2
    assert [p.name for p in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    out.rmdir()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "_readme", full)
    monkeypatch.setattr(onnx.checker, "check_model", full)
    monkeypatch.setattr(export, "_has_dynamo", lambda: False)
    assert run(moco_file[0], "--to", to, "--out", out, "--image-size", 32) == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(
    moco_file, tmp_path, monkeypatch, capsys, missing
):
    monkeypatch.setitem(sys.modules, missing, None)
    assert run(moco_file[0], "--to", "onnx", "--out", tmp_path / "x.onnx") == 2
    error = capsys.readouterr().err
    assert missing in error and "pip install 'moco_isl[onnx]'" in error and error.count("\n") == 1


# ---- the other way: MoCo's own main_lincls.py reads what main_moco_isl.py writes


@pytest.mark.parametrize("mlp", [False, True])
def test_mocos_own_probe_reads_our_pretraining_file(tmp_path, mlp):
    argv = [
        "--dataset",
        "digits",
        "-a",
        "resnet18",
        "--stem",
        "imagenet",
        "--image-size",
        "32",
        "--moco-k",
        "64",
        "--batch-size",
        "32",
    ]
    argv += [
        "--moco-dim",
        "16",
        "--max-steps",
        "1",
        "--epochs",
        "1",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--seed",
        "0",
    ]
    assert main_moco_isl.main([*argv, "--out", str(tmp_path), *(["--mlp"] if mlp else [])]) == 0
    content = torch.load(
        tmp_path / "checkpoint_last.pth.tar", map_location="cpu", weights_only=True
    )
    # what that script does: keep module.encoder_q.* but its fc, remove the prefix, and assert what
    # is then missing
    start = "module.encoder_q."
    kept = {
        n.removeprefix(start): t for n, t in content["state_dict"].items() if n.startswith(start)
    }
    kept = {n: t for n, t in kept.items() if not n.startswith("fc")}
    model = torchvision.models.resnet18()
    required = {f"{start}{n}" for n in model.state_dict() if n not in ("fc.weight", "fc.bias")}
    assert required <= set(content["state_dict"])
    answer = model.load_state_dict(kept, strict=False)
    assert set(answer.missing_keys) == {"fc.weight", "fc.bias"} and answer.unexpected_keys == []
    assert content["arch"] == "resnet18" and {"epoch", "arch", "state_dict", "optimizer"} <= set(
        content
    )
