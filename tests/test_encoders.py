"""Encoders by name, heads, layers, batch norm in splits, features of a data set."""

import copy
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moco_isl.builder import add_mlp
from moco_isl.encoders import (
    NO_LINEAR_HEAD,
    SplitBatchNorm,
    Taps,
    as_in_library,
    build_encoder,
    count_batches_at_once,
    encoder_names,
    evaluating,
    extract_features,
    extract_views,
    feature_dim,
    get_head,
    head_name,
    on_meta,
    set_head,
    split_batch_norm,
)
from moco_isl.errors import BadInput, RunFailed
from tests.ranks import run_ranks

# name, stem, image side, backbone numbers, shapes of the stages' outputs (channels, side)
NETS = [
    ("resnet18", "imagenet", 64, 512, [(64, 16), (64, 16), (128, 8), (256, 4), (512, 2)]),
    ("resnet18", "auto", 32, 512, [(64, 32), (64, 32), (128, 16), (256, 8), (512, 4)]),
    ("resnet50", "cifar", 32, 2048, [(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)]),
    ("resnet18w16", "auto", 32, 128, [(16, 32), (16, 32), (32, 16), (64, 8), (128, 4)]),
    ("resnet50w32", "imagenet", 64, 1024, [(32, 16), (128, 16), (256, 8), (512, 4), (1024, 2)]),
    ("alexnet", "auto", 32, 1024, [(64, 32), (192, 16), (384, 8), (256, 8), (256, 8)]),
    ("alexnet", "auto", 224, 4096, [(96, 55), (256, 27), (384, 13), (384, 13), (256, 13)]),
    ("digits", "auto", 16, 128, [(32, 16), (64, 8), (128, 4)]),
    ("mobilenet_v3_small", "auto", 32, 1024, []),
    ("regnet_y_400mf", "auto", 32, 440, []),
    ("vit_b_16", "auto", 16, 768, []),
    ("timm:resnet10t", "auto", 32, 512, [(64, 8), (64, 8), (128, 4), (256, 2), (512, 1)]),
    ("timm:vit_tiny_patch16_224", "auto", 32, 192, []),
]


@pytest.mark.parametrize("name,stem,side,dim,stages", NETS)
def test_shapes_layers_and_the_head(name, stem, side, dim, stages):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    encoder = build_encoder(name, num_classes=7, stem=stem, image_size=side).eval()
    layers = [f"conv{i + 1}" for i in range(len(stages))]
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        out = Taps(encoder, [*layers, "backbone", "output"])(images)
        assert [tuple(out[layer].shape[1:]) for layer in layers] == [(c, s, s) for c, s in stages]
        assert out["backbone"].shape == (2, dim) and out["output"].shape == (2, 7)
        assert feature_dim(encoder) == dim
        head = get_head(encoder)
        # the head is what comes after the backbone
        assert torch.equal(head(out["backbone"]), out["output"])
        place = head_name(encoder)
        set_head(encoder, nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), head))  # as MoCo v2 does
        assert head_name(encoder) == place and get_head(encoder) is head
        assert feature_dim(encoder) == dim
        mlp = Taps(encoder, ["backbone"])(images)
        assert torch.equal(mlp["backbone"], out["backbone"])
        set_head(encoder, nn.Linear(dim, 3))
        assert encoder(images).shape == (2, 3)


def test_every_classifier_of_torchvision_is_built_or_refused_by_name(undrawn):
    promised = encoder_names()
    assert not {*NO_LINEAR_HEAD} & {*promised}
    for name in promised:
        encoder = on_meta(lambda: build_encoder(name, 8))
        head, width = get_head(encoder), feature_dim(encoder)
        assert (head.in_features, head.out_features) == (width, 8), name
        on_meta(lambda: add_mlp(encoder))
        assert get_head(encoder) is head and feature_dim(encoder) == width, name
        hidden = encoder.get_submodule(head_name(encoder))
        shapes = [tuple(x.weight.shape) for x in hidden if isinstance(x, nn.Linear)]
        assert shapes == [(width, width), (8, width)], name
        assert all(x.is_meta for x in encoder.state_dict().values()), name
    for name in set(torchvision.models.list_models(module=torchvision.models)) - {*promised}:
        with pytest.raises(BadInput, match=f"^{name} ends in no linear classifier"):
            build_encoder(name)


def test_a_network_for_another_stem_or_side_is_not_the_librarys(undrawn):
    for name, side, same in [
        ("resnet18", 224, True),
        ("resnet18", 32, False),
        ("vit_b_16", 224, True),
        ("vit_b_16", 32, False),
        ("regnet_y_400mf", 32, True),
        ("alexnet", 224, False),
        ("digits", 16, True),
        ("resnet18w16", 32, True),
    ]:
        encoder = on_meta(lambda: build_encoder(name, 8, image_size=side))
        assert as_in_library(encoder, name) == same, (name, side)
        on_meta(lambda: add_mlp(encoder))
        assert as_in_library(encoder, name) == same, (name, side)


@pytest.mark.parametrize("name, side", [("vit_b_16", 20), ("vit_h_14", 32)])
def test_a_side_that_a_network_cannot_have_is_said(name, side):
    said = f"{name} cannot be built for images of side {side} .*: give the --image-size it was made"
    with pytest.raises(BadInput, match=said):
        on_meta(lambda: build_encoder(name, 8, image_size=side))


def test_a_network_of_timms_that_is_no_classifier_is_said(monkeypatch):
    """As timm's encoders of Gemma and Qwen: they refuse a number of classes, or have no head."""
    timm = pytest.importorskip("timm")
    said = "timm:resnet10t cannot be built as a classifier .*: choose another architecture"
    no_head = AttributeError("Encoder has no attribute `head`")
    for error in (AssertionError(), no_head, TypeError("no num_classes")):
        monkeypatch.setattr(timm, "create_model", Mock(side_effect=error))
        with pytest.raises(BadInput, match=said):
            build_encoder("timm:resnet10t")
    headless = nn.Sequential(nn.Conv2d(3, 8, 3))
    headless.pretrained_cfg = {"classifier": "head"}
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: headless)
    with pytest.raises(BadInput, match="timm:resnet10t ends in no linear classifier"):
        build_encoder("timm:resnet10t")


def test_torchvision_nets_are_torchvisions():
    ours = build_encoder("resnet18", 10, stem="imagenet")
    theirs = torchvision.models.resnet18(num_classes=10)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))
    full = build_encoder("resnet18w64", 10, stem="imagenet")  # width 64 is the full network
    full.load_state_dict(theirs.state_dict())
    assert torch.equal(full.eval()(images), theirs(images))


@pytest.mark.parametrize(
    "name,stem,said",
    [
        ("resnet19", "auto", "resnet18"),
        ("Resnet50", "auto", "resnet50"),
        ("qwxyz", "auto", "timm:<name>"),
        ("timm:vit_b_16", "auto", "torchvision has one of this name: use vit_b_16"),
        ("timm:resnet10t0", "auto", "nearest: .*timm:resnet10t"),
        ("timm:resnet1", "auto", "timm:resnet"),
        ("resnet18", "cifra", "cifar"),
        ("mobilenet_v3_small", "cifar", "no cifar stem"),
        ("squeezenet1_0", "auto", "no linear classifier"),
    ],
)
def test_what_cannot_be_built_is_said(name, stem, said):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(BadInput, match=said):
        build_encoder(name, stem=stem)


@pytest.mark.parametrize("name", ["resnet10t", "ResNet10t", "vit_tiny_patch16_224"])
def test_a_name_that_only_timm_has_is_suggested(name):
    pytest.importorskip("timm")
    said = f"unknown architecture '{name}'; timm has one of this name: use timm:{name.lower()}$"
    with pytest.raises(BadInput, match=said):
        build_encoder(name)


def test_a_layer_that_is_not_there_is_said():
    with pytest.raises(BadInput, match="conv4.*conv1, conv2, conv3, backbone"):
        Taps(build_encoder("digits"), ["conv4"])


# ---- batch norm in splits


def split_by_loops(x, splits, bn):
    """Each part through a BatchNorm of its own; running statistics averaged."""
    parts = [copy.deepcopy(bn) for _ in range(splits)]
    out = torch.empty_like(x)
    for s, part in enumerate(parts):
        out[s::splits] = part(x[s::splits])
    mean = torch.stack([p.running_mean for p in parts]).mean(0)
    var = torch.stack([p.running_var for p in parts]).mean(0)
    return out, mean, var


@pytest.mark.parametrize("n,splits,used", [(8, 4, 4), (8, 8, 8), (9, 4, 3), (7, 4, 1), (12, 8, 6)])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_split_batch_norm_equals_the_loops(n, splits, used, momentum, layout):
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(5, momentum=momentum)
    nn.init.normal_(bn.weight), nn.init.normal_(bn.bias)
    split = split_batch_norm(copy.deepcopy(bn), splits)
    assert isinstance(split, SplitBatchNorm) and split.state_dict().keys() == bn.state_dict().keys()
    x = torch.randn(n, 5, 3, 3).to(memory_format=layout).requires_grad_()
    expected, mean, var = split_by_loops(x, used, bn)
    out = split(x)
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(split.running_mean, mean, atol=1e-6)
    assert torch.allclose(split.running_var, var, atol=1e-6)
    assert split.num_batches_tracked == 1
    assert out.is_contiguous(memory_format=layout)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), x)[0]
    assert torch.allclose(ours, torch.autograd.grad((expected * weight).sum(), x)[0], atol=1e-5)
    split.eval(), bn.eval()
    bn.load_state_dict(split.state_dict())
    assert torch.equal(split(x), bn(x))


def test_one_part_of_a_vector_has_no_variance():
    x = torch.randn(4, 3)
    split, bn = SplitBatchNorm(3, num_splits=4), nn.BatchNorm1d(3)
    out, _, _ = split_by_loops(x, 2, bn)  # four parts would hold one row each
    assert torch.allclose(split(x), out, atol=1e-6)


class Counted(TorchDispatchMode):
    """Operations by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["resnet18w8", "alexnet", "resnet18w8 in splits"])
def test_batches_counted_at_once_are_those_counted_one_by_one(name):
    arch, _, in_splits = name.partition(" ")
    torch.manual_seed(0)
    plain = split_batch_norm(build_encoder(arch, 8, image_size=32), 2 if in_splits else 1)
    if arch == "resnet18w8":
        plain.layer1[0].bn1.momentum = None  # this one uses its count
        plain.layer2.eval()  # and these are frozen
    counting = count_batches_at_once(copy.deepcopy(plain))
    assert list(counting.state_dict()) == list(plain.state_dict())
    for n in (4, 4, 3):
        x = torch.randn(n, 3, 32, 32)
        assert torch.equal(counting(x), plain(x))
    with evaluating(counting), evaluating(plain):
        assert torch.equal(counting(x), plain(x))
    copied = copy.deepcopy(counting)
    copied(x), plain(x)
    for found in (copied.state_dict(), build_encoder_like(copied, arch, in_splits).state_dict()):
        assert all(torch.equal(found[key], value) for key, value in plain.state_dict().items())
    counts = [key for key in counting.state_dict() if "num_b" in key and "layer2" not in key]
    for key in counts:
        assert not torch.equal(copied.state_dict()[key], counting.state_dict()[key])
    with Counted() as one_by_one:
        plain(x)
    with Counted() as at_once:
        counting(x)
    norms = [m for m in plain.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    own = arch == "resnet18w8"  # then one counts by itself
    counted = sum(m.training for m in norms) - own
    assert one_by_one.names.count("add_") - at_once.names.count("add_") == counted
    assert at_once.names.count("_foreach_add_") == 1


def build_encoder_like(encoder, arch, in_splits):
    """A plain encoder with the state of a counting one."""
    plain = split_batch_norm(build_encoder(arch, 8, image_size=32), 2 if in_splits else 1)
    plain.load_state_dict(encoder.state_dict())
    return plain


def test_split_batch_norm_converts_a_whole_encoder():
    encoder = build_encoder("alexnet", 8, image_size=32)
    before = copy.deepcopy(encoder.state_dict())
    converted = split_batch_norm(encoder, 4)
    assert not any(type(m) in (nn.BatchNorm1d, nn.BatchNorm2d) for m in converted.modules())
    after = converted.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    converted(torch.randn(8, 3, 32, 32)).sum().backward()
    plain = build_encoder("digits")
    assert split_batch_norm(plain, 1) is plain and isinstance(plain.conv1[1], nn.BatchNorm2d)
    with pytest.raises(BadInput, match="SyncBatchNorm"):
        split_batch_norm(nn.Sequential(nn.SyncBatchNorm(3)), 2)


# ---- features of a data set


def batches(images, order, size):
    return [(images[order[i : i + size]], order[i : i + size]) for i in range(0, len(order), size)]


def test_features_come_by_index_and_the_mode_is_restored():
    torch.manual_seed(0)
    encoder, images = build_encoder("digits", 6), torch.randn(23, 3, 16, 16)
    encoder.conv2.eval()  # a mixed mode is restored as it was
    modes = [m.training for m in encoder.modules()]
    stats = copy.deepcopy(encoder.state_dict())
    loader = batches(images, torch.randperm(23), 5)
    features = extract_features(encoder, loader, 23, "cpu")
    raw = extract_features(encoder, loader, 23, "cpu", normalize=False)
    taps = Taps(encoder, ["backbone", "output"])
    both = extract_features(taps, loader, 23, "cpu", normalize=False)
    assert [m.training for m in encoder.modules()] == modes
    assert all(torch.equal(v, stats[k]) for k, v in encoder.state_dict().items())
    with torch.no_grad():
        expected = copy.deepcopy(encoder).eval()(images)
    assert torch.allclose(raw, expected, atol=1e-6)
    assert torch.allclose(features, F.normalize(expected, dim=1), atol=1e-6)
    assert torch.equal(both["output"], raw) and both["backbone"].shape == (23, 128)
    half = extract_features(encoder, loader, 23, "cpu", amp=torch.bfloat16)
    assert half.dtype == torch.float32 and 0 < (half - features).abs().max() < 0.05


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 3, 3]])
def test_a_missing_or_doubled_image_is_an_error(order):
    loader = batches(torch.randn(4, 3, 16, 16), torch.tensor(order), 2)
    with pytest.raises(RunFailed, match="exactly once"):
        extract_features(build_encoder("digits"), loader, 4, "cpu")


def _ranked_features(rank, world, images, shares):
    torch.manual_seed(0)
    encoder = build_encoder("digits", 6)
    return extract_features(encoder, batches(images, shares[rank], 4), len(images), "cpu")


def test_two_ranks_give_the_features_of_one():
    images = torch.randn(11, 3, 16, 16)
    alone = _ranked_features(0, 1, images, [torch.arange(11)])
    for shares in ([torch.arange(5), torch.arange(5, 11)], [torch.arange(11), torch.arange(0)]):
        for features in run_ranks(2, _ranked_features, images, shares):
            assert torch.allclose(features, alone, atol=1e-6)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_two_views_are_two_passes_and_made_outside_of_autocast(amp):
    encoder, views, seen = build_encoder("digits", 6), torch.randn(2, 9, 3, 16, 16), []

    def loader():
        for index in torch.arange(9).split(4):
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            yield (views[0][index], views[1][index]), index

    found = extract_views(encoder, loader(), 9, "cpu", amp=amp)
    assert seen == [(False, True)] * 3 and not found[0].requires_grad
    for view, features in zip(views, found):
        alone = extract_features(encoder, batches(view, torch.arange(9), 4), 9, "cpu", amp=amp)
        torch.testing.assert_close(features, alone, atol=1e-2 if amp else 1e-5, rtol=0)
