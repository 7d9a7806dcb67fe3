"""Files of every origin are read into the right encoder, and what does not fit is said."""

import argparse
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from moco_isl.builder import MoCo
from moco_isl.encoders import build_encoder, get_head
from moco_isl.errors import BadInput
from moco_isl.evaluation.backbone import describe, load_backbone, looks_like, to_detectron2


def moco(arch, mlp=True, dim=16, size=32):
    torch.manual_seed(0)
    model = MoCo(partial(build_encoder, arch, image_size=size), dim=dim, K=32, mlp=mlp)
    for p in model.encoder_k.parameters():
        p.data.mul_(0.5)
    return model


def prefixed(state, prefix="module."):
    return {prefix + name: tensor for name, tensor in state.items()}


def same(encoder, state):
    own = encoder.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


@pytest.mark.parametrize(
    "arch,size,stem", [("resnet18w16", 32, "cifar"), ("resnet18w16", 224, "imagenet"), ("digits", 16, "auto")]
)
@pytest.mark.parametrize("mlp", [True, False])
@pytest.mark.parametrize("wrapped,says", [("module.", True), ("", False)])
def test_moco_training_files(tmp_path, arch, size, stem, mlp, wrapped, says):
    model = moco(arch, mlp, size=size)
    content = {"epoch": 5, "state_dict": prefixed(model.state_dict(), wrapped), "optimizer": {"state": {}}}
    if says:
        content |= {"arch": arch, "args": {"stem": "auto", "mlp": mlp, "dataset": "cifar10"}}
    torch.save(content, tmp_path / "file.pth.tar")
    encoder, info = load_backbone(tmp_path / "file.pth.tar")
    assert same(encoder, model.encoder_q.state_dict())
    assert (info["arch"], info["stem"], info["head"], info["dim"]) == (arch, stem, "mlp" if mlp else "linear", 16)
    assert info["epoch"] == 5 and len(info["used"]) == len(model.encoder_q.state_dict())
    assert {"queue", "queue_ptr", "optimizer"} <= set(info["left"])
    said = describe(info)
    assert f"all {len(info['used'])} tensors of encoder_q" in said and f"{len(info['used'])} of encoder_k" in said
    key, info = load_backbone(tmp_path / "file.pth.tar", key_encoder=True)
    assert same(key, model.encoder_k.state_dict()) and info["part"] == "encoder_k"


def test_mocos_published_file_has_the_query_encoder_alone(tmp_path):
    model = moco("resnet50", size=224, dim=128)
    state = prefixed(model.encoder_q.state_dict(), "module.encoder_q.")
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state}, tmp_path / "moco_v2_200ep_pretrain.pth.tar")
    encoder, info = load_backbone(tmp_path / "moco_v2_200ep_pretrain.pth.tar")
    assert same(encoder, model.encoder_q.state_dict()) and info["arch"] == "resnet50" and info["left"] == []
    with pytest.raises(BadInput, match="no key encoder"):
        load_backbone(tmp_path / "moco_v2_200ep_pretrain.pth.tar", key_encoder=True)


@pytest.mark.parametrize("arch", ["resnet34", "resnext50_32x4d"])
def test_torchvision_state_dicts(tmp_path, arch):
    model = torchvision.models.get_model(arch, weights=None)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    encoder, info = load_backbone(tmp_path / "bare.pth")
    assert (info["arch"], info["stem"], info["head"], info["dim"]) == (arch, "imagenet", "linear", 1000)
    assert same(encoder, model.state_dict())


def test_every_resnet_is_known_by_its_tensors():
    names = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d"]
    names += ["resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2", "resnet18w16", "resnet50w32"]
    with torch.device("meta"):
        for name in names:
            for stem in ("imagenet", "cifar"):
                assert looks_like(build_encoder(name, stem=stem).state_dict()) == (name, stem)
        assert looks_like(build_encoder("vgg11").state_dict()) == (None, None)


def test_files_without_a_head_and_from_before_batches_were_counted(tmp_path):
    model = torchvision.models.resnet18()
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("fc.") and "num_batches" not in n}
    torch.save({"model": state}, tmp_path / "old.pth")
    encoder, info = load_backbone(tmp_path / "old.pth")
    assert info["head"] is None and info["dim"] is None and "no head" in describe(info)
    assert torch.equal(encoder.layer4[1].conv2.weight, model.layer4[1].conv2.weight)


def test_timm_state_dicts(tmp_path):
    timm = pytest.importorskip("timm")
    for name, needs_arch in (("resnet18", False), ("vit_tiny_patch16_224", True)):
        model = timm.create_model(name, num_classes=10)
        torch.save(model.state_dict(), tmp_path / "timm.pth")
        if needs_arch:
            with pytest.raises(BadInput, match="give it with -a"):
                load_backbone(tmp_path / "timm.pth")
        encoder, info = load_backbone(tmp_path / "timm.pth", arch=f"timm:{name}")
        assert same(encoder, model.state_dict()) and get_head(encoder).out_features == info["dim"] == 10


def test_safetensors_under_any_name_with_and_without_metadata(tmp_path):
    model = build_encoder("alexnet", 10, image_size=32)
    save_file(model.state_dict(), tmp_path / "a.safetensors", metadata={"arch": "alexnet", "dataset": "cifar10"})
    save_file(model.state_dict(), tmp_path / "b.bin")
    for name in ("a.safetensors", "b.bin"):
        encoder, info = load_backbone(tmp_path / name)
        assert same(encoder, model.state_dict()) and (info["arch"], info["stem"]) == ("alexnet", "cifar")


def test_detectron2_names(tmp_path):
    model = torchvision.models.resnet50()
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("fc.")}
    renamed = to_detectron2(state)
    assert {
        "stem.conv1.weight",
        "stem.conv1.norm.bias",
        "res2.0.shortcut.norm.running_mean",
        "res5.2.conv3.weight",
    } <= set(renamed)
    torch.save({"model": renamed}, tmp_path / "d2.pth")
    encoder, info = load_backbone(tmp_path / "d2.pth")
    assert all(torch.equal(encoder.state_dict()[n], state[n]) for n in state) and len(info["used"]) == len(state)


def test_plain_data_of_other_trainers_is_read(tmp_path):
    model = build_encoder("digits", 10)
    content = {"state_dict": model.state_dict(), "args": argparse.Namespace(dataset="digits"), "best": np.float64(3.5)}
    torch.save(content, tmp_path / "others.pth")
    encoder, info = load_backbone(tmp_path / "others.pth")
    assert same(encoder, model.state_dict()) and info["args"]["dataset"] == "digits"


# ---- what does not fit


@pytest.mark.parametrize(
    "options,said",
    [
        ({"arch": "resnet18"}, "another shape: conv1.weight.*looks like resnet18w16 with stem cifar"),
        ({"arch": "resnet34w16"}, "missing: layer1.2.conv1.weight"),
        ({"stem": "imagenet"}, r"conv1.weight \[16, 3, 3, 3\] in place of \[16, 3, 7, 7\]"),
        ({"arch": "digits"}, "does not fit digits.*looks like resnet18w16"),
        ({"arch": "resnet19"}, "nearest: resnet18"),
    ],
)
def test_a_wrong_architecture_is_an_error(tmp_path, options, said):
    torch.save({"state_dict": prefixed(moco("resnet18w16").state_dict())}, tmp_path / "file.pth")
    with pytest.raises(BadInput, match=said):
        load_backbone(tmp_path / "file.pth", **options)


def test_a_deeper_network_is_not_cut_short(tmp_path):
    torch.save(torchvision.models.resnet101().state_dict(), tmp_path / "deep.pth")  # holds every name of a resnet50
    with pytest.raises(BadInput, match="not known to it: layer3.6.conv1.weight.*looks like resnet101"):
        load_backbone(tmp_path / "deep.pth", arch="resnet50")


def test_weights_that_are_not_finite_are_an_error(tmp_path):
    state = build_encoder("digits", 10).state_dict()
    state["conv2.0.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(BadInput, match="not finite: conv2.0.weight"):
        load_backbone(tmp_path / "nan.pth")


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_unreadable_files_are_an_error_and_nothing_is_executed(tmp_path, capsys):
    (tmp_path / "text.pth").write_text("not a checkpoint\n")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("not a checkpoint\n")
    (tmp_path / "pickle.pkl").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    torch.save(torchvision.models.resnet18(), tmp_path / "module.pth")
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "nothing.pth")
    whole = tmp_path / "whole.pth"
    torch.save(build_encoder("digits").state_dict(), whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:-5000])
    names = [
        "text.pth",
        "empty.pth",
        "text.safetensors",
        "pickle.pkl",
        "evil.pth",
        "module.pth",
        "nothing.pth",
        "cut.pth",
    ]
    for name in [*names, "not_there.pth", "."]:
        with pytest.raises(BadInput) as error:
            load_backbone(tmp_path / name)
        assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out
