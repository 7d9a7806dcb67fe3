"""Files of every origin are read into the right encoder, and what does not fit is said."""

import argparse
import dataclasses
import io
import pickle
import re
import sys
import types
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from moco_isl.builder import MoCo
from moco_isl.encoders import BACKBONE, Taps, build_encoder, get_head, on_meta
from moco_isl.errors import BadInput
from moco_isl.evaluation.subject import Subject
from moco_isl.run import checkpoint
from moco_isl.run.backbone import describe, load_backbone
from moco_isl.run.naming import looks_like, to_detectron2


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


def thin_transformers(monkeypatch):
    """torchvision's vision transformers with one layer of 16 numbers: larger ones take long."""
    module = torchvision.models.vision_transformer
    whole = torchvision.models.vision_transformer._vision_transformer
    thin = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    monkeypatch.setattr(
        module, "_vision_transformer", lambda **options: whole(**{**options, **thin})
    )


@pytest.mark.parametrize(
    "arch,size,stem",
    [("resnet18w16", 32, "cifar"), ("resnet18w16", 224, "imagenet"), ("digits", 16, "auto")],
)
@pytest.mark.parametrize("mlp", [True, False])
@pytest.mark.parametrize("wrapped,says", [("module.", True), ("", False)])
def test_moco_training_files(tmp_path, arch, size, stem, mlp, wrapped, says):
    model = moco(arch, mlp, size=size)
    content = {
        "epoch": 5,
        "state_dict": prefixed(model.state_dict(), wrapped),
        "optimizer": {"state": {}},
    }
    if says:
        content |= {"arch": arch, "args": {"stem": "auto", "mlp": mlp, "dataset": "cifar10"}}
    torch.save(content, tmp_path / "file.pth.tar")
    encoder, info = load_backbone(tmp_path / "file.pth.tar")
    assert same(encoder, model.encoder_q.state_dict())
    assert (info["arch"], info["stem"], info["head"], info["dim"]) == (
        arch,
        stem,
        "mlp" if mlp else "linear",
        16,
    )
    assert info["epoch"] == 5 and len(info["used"]) == len(model.encoder_q.state_dict())
    assert {"queue", "queue_ptr", "optimizer"} <= set(info["left"])
    said = describe(info)
    assert (
        f"all {len(info['used'])} tensors of encoder_q" in said
        and f"{len(info['used'])} of encoder_k" in said
    )
    key, info = load_backbone(tmp_path / "file.pth.tar", key_encoder=True)
    assert same(key, model.encoder_k.state_dict()) and info["part"] == "encoder_k"


def test_mocos_published_file_has_the_query_encoder_alone(tmp_path):
    model = moco("resnet50w16", size=224, dim=128)
    state = prefixed(model.encoder_q.state_dict(), "module.encoder_q.")
    torch.save(
        {"epoch": 200, "arch": "resnet50w16", "state_dict": state},
        tmp_path / "moco_v2_200ep_pretrain.pth.tar",
    )
    encoder, info = load_backbone(tmp_path / "moco_v2_200ep_pretrain.pth.tar")
    assert (
        same(encoder, model.encoder_q.state_dict())
        and info["arch"] == "resnet50w16"
        and info["left"] == []
    )
    with pytest.raises(BadInput, match="no key encoder"):
        load_backbone(tmp_path / "moco_v2_200ep_pretrain.pth.tar", key_encoder=True)


@pytest.mark.parametrize("arch", ["resnet34", "resnext50_32x4d"])
def test_torchvision_state_dicts(tmp_path, arch):
    model = torchvision.models.get_model(arch, weights=None)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    encoder, info = load_backbone(tmp_path / "bare.pth")
    assert (info["arch"], info["stem"], info["head"], info["dim"]) == (
        arch,
        "imagenet",
        "linear",
        1000,
    )
    assert same(encoder, model.state_dict())


def test_every_resnet_is_known_by_its_tensors(undrawn):
    names = [
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "resnext101_32x8d",
    ]
    names += [
        "resnext101_64x4d",
        "wide_resnet50_2",
        "wide_resnet101_2",
        "resnet18w16",
        "resnet50w32",
    ]
    with torch.device("meta"):
        for name in names:
            for stem in ("imagenet", "cifar"):
                assert looks_like(build_encoder(name, stem=stem).state_dict()) == (name, stem)
        assert looks_like(build_encoder("vgg11").state_dict()) == (None, None)


def test_files_without_a_head_and_from_before_batches_were_counted(tmp_path):
    model = torchvision.models.resnet18()
    state = {
        n: t
        for n, t in model.state_dict().items()
        if not n.startswith("fc.") and "num_batches" not in n
    }
    torch.save({"model": state}, tmp_path / "old.pth")
    encoder, info = load_backbone(tmp_path / "old.pth")
    assert info["head"] is None and info["dim"] is None and "no head" in describe(info)
    assert torch.equal(encoder.layer4[1].conv2.weight, model.layer4[1].conv2.weight)


def test_timm_state_dicts(tmp_path):
    timm = pytest.importorskip("timm")
    for name, needs_arch in (("resnet18", False), ("convnext_atto", True)):
        model = timm.create_model(name, num_classes=10)
        torch.save(model.state_dict(), tmp_path / "timm.pth")
        if needs_arch:
            with pytest.raises(BadInput, match="give it with -a"):
                load_backbone(tmp_path / "timm.pth")
        encoder, info = load_backbone(tmp_path / "timm.pth", arch=f"timm:{name}")
        assert (
            same(encoder, model.state_dict())
            and get_head(encoder).out_features == info["dim"] == 10
        )


def test_plain_transformers_are_known_by_their_tensors():
    """The networks that DINO and DINOv2 publish, and torchvision's."""
    names = [f"vit_{size}_patch16_224" for size in ("tiny", "small", "base")]
    names += ["vit_small_patch8_224", "vit_base_patch8_224", "vit_base_patch32_224"]
    for size in ("small", "large"):
        names += [f"vit_{size}_patch14_dinov2", f"vit_{size}_patch14_reg4_dinov2"]
    names = [f"timm:{name}" for name in names] + ["vit_b_16", "vit_b_32", "vit_h_14"]
    for name in names:
        assert looks_like(on_meta(lambda: build_encoder(name)).state_dict()) == (name, None)
    for other in ("vit_tiny_r_s16_p8_224", "swin_tiny_patch4_window7_224", "vit_giant_patch14_224"):
        state = on_meta(lambda: build_encoder(f"timm:{other}")).state_dict()
        assert looks_like(state) == (None, None), other


@pytest.mark.parametrize("registers, chunked", [(False, True), (True, False)])
def test_dinov2s_files_as_its_code_writes_them(tmp_path, registers, chunked):
    """The hub's bare file, and the teacher of a training, whose blocks lie in chunks."""
    timm = pytest.importorskip("timm")
    name = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    model = timm.create_model(name, num_classes=0, img_size=28).eval()
    torch.nn.init.normal_(model.cls_token)
    state = model.state_dict()
    if registers:  # positions of the patches alone in timm, and of the class token too in DINOv2's
        own = torch.randn(1, 1, 384)
        state["pos_embed"] = torch.cat([own, state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - own
        state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 384)
    if chunked:
        at = lambda n: re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 4}.{m[1]}", n)
        state = prefixed({at(n): t for n, t in state.items()}, "backbone.")
        state = {"teacher": {**state, "dino_head.mlp.0.weight": torch.zeros(2, 2)}}
    torch.save(state, tmp_path / "d.pth")
    encoder, info = load_backbone(tmp_path / "d.pth")
    assert info["arch"] == f"timm:{name}" and info["image_size"] == 28
    images = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        ours = Taps(encoder.eval(), [BACKBONE])(images)[BACKBONE]
        assert torch.allclose(ours, model(images), atol=1e-5)
    assert ("dino_head" in describe(info)) == chunked


def test_positions_are_interpolated_as_torchvision_does(tmp_path, monkeypatch):
    thin_transformers(monkeypatch)
    model = build_encoder("vit_b_16", 10, image_size=48)
    torch.save({"arch": "vit_b_16", "state_dict": model.state_dict()}, tmp_path / "v.pth")
    encoder, info = load_backbone(tmp_path / "v.pth", image_size=32)
    expected = torchvision.models.vision_transformer.interpolate_embeddings(
        32, 16, model.state_dict()
    )
    assert same(encoder, expected) and (info["positions"], info["image_size"]) == (48, 32)
    assert describe(info).endswith("; positions of side 48 interpolated to side 32")


def test_resnets_of_transformers(tmp_path):
    """By the names that transformers writes, from torchvision's."""
    model = torchvision.models.resnet50()
    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"downsample\.0\.", "shortcut.convolution.", name)
        name = re.sub(r"downsample\.1\.", "shortcut.normalization.", name)
        name = re.sub(r"^conv1\.", "embedder.embedder.convolution.", name)
        name = re.sub(r"^bn1\.", "embedder.embedder.normalization.", name)
        for own, theirs in (("conv", "convolution"), ("bn", "normalization")):
            at = lambda m: f".layer.{int(m[1]) - 1}.{theirs}."
            name = re.sub(rf"\.{own}(\d)\.", at, name)
        name = re.sub(r"^layer(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.", name)
        if not name.startswith("fc."):
            state[f"resnet.{name}"] = tensor
    torch.save(state | {"classifier.1.bias": torch.zeros(2)}, tmp_path / "r.bin")
    encoder, info = load_backbone(tmp_path / "r.bin")
    assert (info["arch"], info["stem"], info["part"]) == ("resnet50", "imagenet", "resnet")
    own = encoder.state_dict()
    assert all(torch.equal(own[n], t) for n, t in model.state_dict().items() if n[:3] != "fc.")
    assert len(info["used"]) == len(state) == len(own) - 2


def test_safetensors_under_any_name_with_and_without_metadata(tmp_path):
    model = build_encoder("alexnet", 10, image_size=32)
    save_file(
        model.state_dict(),
        tmp_path / "a.safetensors",
        metadata={"arch": "alexnet", "dataset": "cifar10"},
    )
    save_file(model.state_dict(), tmp_path / "b.bin")
    for name in ("a.safetensors", "b.bin"):
        encoder, info = load_backbone(tmp_path / name)
        assert same(encoder, model.state_dict()) and (info["arch"], info["stem"]) == (
            "alexnet",
            "cifar",
        )


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
    assert all(torch.equal(encoder.state_dict()[n], state[n]) for n in state) and len(
        info["used"]
    ) == len(state)


# ---- names that wrappers put in, at any place: both readers leave them out


def rewritten(state, *rules):
    def new(name):
        for old, with_wrapper in rules:
            name = name.replace(old, with_wrapper)
        return name

    return {new(name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "rules",
    [
        [("encoder_", "module.encoder_")],
        [("encoder_", "_orig_mod.module.encoder_")],
        [("encoder_q.", "encoder_q._orig_mod.")],
        [("encoder_", "module.encoder_"), ("_q.", "_q.module.")],
        [("layer1.0.", "layer1._orig_mod.0._checkpoint_wrapped_module.")],
        [("encoder_", "model.encoder_"), ("queue", "model.queue")],
        [("fc.", "_fsdp_wrapped_module.fc.")],
    ],
)
def test_names_of_wrappers_are_left_out_by_both_readers(tmp_path, rules):
    model, other = moco("resnet18w16"), moco("resnet18w16")
    torch.nn.init.normal_(other.encoder_q.conv1.weight)
    torch.save({"state_dict": rewritten(model.state_dict(), *rules)}, tmp_path / "file.pth")
    encoder, info = load_backbone(tmp_path / "file.pth")
    assert same(encoder, model.encoder_q.state_dict()) and info["part"] == "encoder_q"
    assert checkpoint.load_model(other, checkpoint.load(tmp_path / "file.pth"), "file.pth") == []
    assert same(other, model.state_dict())


def test_a_bare_state_dict_with_wrappers_inside(tmp_path):
    model = build_encoder("resnet18w16", 10, image_size=32)
    torch.save(
        rewritten(model.state_dict(), ("layer2.", "module.layer2._orig_mod.")),
        tmp_path / "bare.pth",
    )
    assert same(load_backbone(tmp_path / "bare.pth")[0], model.state_dict())


def test_two_tensors_of_one_name_are_an_error(tmp_path):
    model = moco("digits", size=16)
    state = {**model.state_dict(), "encoder_q.module.fc.0.weight": torch.zeros(128, 128)}
    torch.save({"state_dict": state}, tmp_path / "two.pth")
    for reads in (
        load_backbone,
        lambda path: checkpoint.load_model(model, checkpoint.load(path), path),
    ):
        with pytest.raises(
            BadInput,
            match=(
                "two.pth' holds two tensors for encoder_q.fc.0.weight, one of them as"
                " encoder_q.module.fc.0.weight"
            ),
        ):
            reads(tmp_path / "two.pth")


def test_a_networks_own_module_is_no_wrapper(tmp_path):
    """As in timm's iFormer: its blocks have a layer named `module`."""
    timm = pytest.importorskip("timm")
    if not timm.is_model("iformer_t"):
        pytest.skip("this timm has no iFormer")
    model = MoCo(partial(build_encoder, "timm:iformer_t"), dim=8, K=8)
    assert any(".module." in name for name in model.encoder_q.state_dict())
    torch.save(
        {"arch": "timm:iformer_t", "state_dict": checkpoint.model_state(model)}, tmp_path / "i.pth"
    )
    assert same(load_backbone(tmp_path / "i.pth")[0], model.encoder_q.state_dict())
    assert checkpoint.load_model(model, checkpoint.load(tmp_path / "i.pth"), "i.pth") == []


# ---- an encoder below a prefix, as in Lightning's files


@pytest.mark.parametrize("prefix", ["model.backbone.", "net."])
def test_the_one_encoder_below_a_prefix_is_taken(tmp_path, prefix):
    model = build_encoder("resnet18w16", 10, image_size=32)
    rest = {"criterion.weight": torch.zeros(3), f"{prefix[:-1]}_ema": torch.zeros(2)}
    torch.save(
        {
            "epoch": 3,
            "pytorch-lightning_version": "2.1",
            "state_dict": prefixed(model.state_dict(), prefix) | rest,
        },
        tmp_path / "l.ckpt",
    )
    for arch in (None, "resnet18w16"):
        encoder, info = load_backbone(tmp_path / "l.ckpt", arch)
        assert (
            same(encoder, model.state_dict())
            and info["part"] == prefix[:-1]
            and info["left"] == list(rest)
        )
    assert f"of {prefix[:-1]}; left criterion" in describe(info)


def test_any_architecture_is_found_below_a_prefix_by_its_names(tmp_path):
    model = torchvision.models.mobilenet_v3_small(num_classes=4)
    torch.save({"state_dict": prefixed(model.state_dict(), "model.backbone.")}, tmp_path / "l.ckpt")
    with pytest.raises(
        BadInput,
        match="does not say its architecture and model.backbone.features.*: give it with -a",
    ):
        load_backbone(tmp_path / "l.ckpt")
    encoder, info = load_backbone(tmp_path / "l.ckpt", "mobilenet_v3_small")
    assert same(encoder, model.state_dict()) and info["part"] == "model.backbone"


def test_two_encoders_below_prefixes_are_named(tmp_path):
    model = build_encoder("resnet18w16", 10, image_size=32)
    torch.save(
        {
            "state_dict": (
                prefixed(model.state_dict(), "student.") | prefixed(model.state_dict(), "teacher.")
            )
        },
        tmp_path / "l.ckpt",
    )
    for arch in (None, "resnet18w16"):
        with pytest.raises(
            BadInput,
            match=(
                "holds 2 encoders, named student.*, teacher.*: save the one you mean alone, as in"
                " torch.save"
            ),
        ) as error:
            load_backbone(tmp_path / "l.ckpt", arch)
    state = torch.load(tmp_path / "l.ckpt")["state_dict"]
    cure = str(error.value).partition("torch.save(")[2].removesuffix(", FILE)")
    torch.save(eval(cure, {"state": state}), tmp_path / "cured.pth")
    assert same(load_backbone(tmp_path / "cured.pth")[0], model.state_dict())


# ---- plain data beside the tensors


def as_lightning_has_it(monkeypatch):
    """The class of the dicts in which older Lightnings keep hyperparameters."""
    kind = type("AttributeDict", (dict,), {"__module__": "pytorch_lightning.utilities.parsing"})
    module = types.ModuleType(kind.__module__)
    module.AttributeDict = kind
    for name in ("pytorch_lightning", "pytorch_lightning.utilities"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, kind.__module__, module)
    return kind


def test_plain_data_of_other_trainers_is_read_by_both_readers(tmp_path, monkeypatch):
    model = moco("digits", size=16)
    rows = np.arange(6.0).reshape(2, 3)
    plain = {
        "args": argparse.Namespace(
            dataset="digits", out=Path("/a/b"), more=types.SimpleNamespace(lr=0.1)
        ),
        "hyper_parameters": as_lightning_has_it(monkeypatch)(lr=np.float32(0.5)),
        "numbers": [
            np.float64(3.5),
            np.int64(-7),
            np.bool_(True),
            np.float16(0.25),
            np.str_("text"),
            np.complex64(1 + 2j),
        ],
        "arrays": [
            rows,
            np.asfortranarray(rows),
            rows.astype(">i2"),
            np.array(["a", "bc"]),
            np.array([1, "b"], dtype=object),
            rows[:0],
        ],
        "others": [torch.Size([3]), torch.float16, {1, 2}, PureWindowsPath("c:/x")],
        "epoch": np.int64(4),
    }
    content = {"state_dict": prefixed(model.state_dict()), "arch": "digits", **plain}
    torch.save(content, tmp_path / "new.pth")
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    # as numpy 1 and before writes it
    old = buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert (old == buffer.getvalue()) == (np.__version__ < "2")
    (tmp_path / "old.pth").write_bytes(old)
    before = set(torch.serialization.get_safe_globals())
    for name in ("new.pth", "old.pth"):
        encoder, info = load_backbone(tmp_path / name)
        assert (
            same(encoder, model.encoder_q.state_dict())
            and info["args"]["dataset"] == "digits"
            and info["epoch"] == 4
        )
        assert checkpoint.load_model(model, (read := checkpoint.load(tmp_path / name)), name) == []
        assert (
            read["args"].out == PurePosixPath("/a/b")
            and read["args"].more.lr == 0.1
            and read["hyper_parameters"] == {"lr": 0.5}
        )
        assert read["numbers"] == [3.5, -7, True, 0.25, "text", 1 + 2j]
        for array, expected in zip(read["arrays"], plain["arrays"]):
            assert np.array_equal(np.array(array.values, dtype=expected.dtype), expected)
        assert read["others"] == plain["others"]
    # nobody else's torch.load allows more than before
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    "said, side",
    [
        (32, 32),
        ("32", 32),
        ("32x32", 32),
        ("(32, 32)", 32),
        ((32, 32), 32),
        ([3, 32, 32], 32),
        (np.int64(32), 32),
        (32.0, 32),
        ("32.0", 32),
        ((32, 48), None),
        ("small", None),
        (None, None),
        (0, None),
        (-3, None),
        (True, None),
        (float("nan"), None),
        (10**400, None),
        (5000, None),
        ({}, None),
        ([], None),
    ],
)
def test_of_an_image_size_whatever_is_a_number_is_used_and_the_flag_wins(tmp_path, said, side):
    model = build_encoder("digits", 10)
    for kind in (dict, argparse.Namespace):
        torch.save(
            {"state_dict": model.state_dict(), "args": kind(image_size=said, dataset="mine")},
            tmp_path / "a.pth",
        )
        info = load_backbone(tmp_path / "a.pth")[1]
        assert info["args"].get("image_size") == side and info["args"]["dataset"] == "mine"
    save_file(
        model.state_dict(),
        tmp_path / "a.safetensors",
        metadata={"arch": "digits", "image_size": str(said)[:99]},
    )
    assert load_backbone(tmp_path / "a.safetensors")[1]["args"].get("image_size") == side
    judged = Subject(tmp_path / "a.safetensors", None, "auto", False, "digits", None, False, 64)
    assert judged.side == 64
    judged = dataclasses.replace(judged, image_size=0)
    assert judged.side == (side or 16)


@pytest.mark.parametrize(
    "arch, positions",
    [("vit_b_16", "encoder.pos_embedding"), ("timm:vit_tiny_patch16_224", "pos_embed")],
)
def test_a_transformers_side_is_read_off_its_positions(tmp_path, monkeypatch, arch, positions):
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    thin_transformers(monkeypatch)
    for side in (16, 48):
        model = build_encoder(arch, 10, image_size=side)
        assert model.state_dict()[positions].shape[1] == 1 + (side // 16) ** 2
        torch.save(
            {"arch": arch, "state_dict": model.state_dict(), "args": {"image_size": 0}},
            tmp_path / "v.pth",
        )
        encoder, info = load_backbone(tmp_path / "v.pth")
        assert same(encoder, model.state_dict()) and info["image_size"] == side


# ---- what does not fit


@pytest.mark.parametrize(
    "options,said",
    [
        (
            {"arch": "resnet18"},
            "another shape: conv1.weight.*looks like resnet18w16 with stem cifar",
        ),
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


def test_a_deeper_network_is_not_cut_short(tmp_path, undrawn):
    # holds every name of a resnet50
    torch.save(torchvision.models.resnet101().state_dict(), tmp_path / "deep.pth")
    with pytest.raises(
        BadInput, match="not known to it: layer3.6.conv1.weight.*looks like resnet101"
    ):
        load_backbone(tmp_path / "deep.pth", arch="resnet50")


def test_weights_that_are_not_finite_are_an_error(tmp_path):
    state = build_encoder("digits", 10).state_dict()
    state["conv2.0.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(BadInput, match="conv2.0.weight holds values that are not finite"):
        load_backbone(tmp_path / "nan.pth")


class Evil:
    def __reduce__(self):
        return print, ("executed",)


class Pointer:
    """An array of objects that claims to hold bytes, which numpy's own unpickling trusts.

    It takes the bytes for addresses.
    """

    def __reduce__(self):
        empty, args, _ = np.zeros(0).__reduce__()
        return empty, args, (1, (1,), Kind(), False, b"A" * 8)


class Kind:
    def __reduce__(self):
        return np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0)


def test_no_array_makes_addresses_of_bytes(tmp_path):
    torch.save(
        {"state_dict": build_encoder("digits").state_dict(), "args": Pointer()},
        tmp_path / "pointer.pth",
    )
    with pytest.raises(BadInput, match="pointer.pth"):
        load_backbone(tmp_path / "pointer.pth")


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
