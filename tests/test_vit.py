"""MoCo v3's parts for vision transformers: predictor, frozen patches, AdamW, warm-up.

Letters: N batch, C feature dimension, K queue length, M images.
"""

import copy
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import main_moco_isl
from moco_isl import export
from moco_isl.builder import MoCo
from moco_isl.encoders import BACKBONE, Taps, build_encoder, freeze_patches, split_batch_norm
from moco_isl.errors import BadInput
from moco_isl.isl import ISL
from moco_isl.objectives.queue import build_predictor
from moco_isl.run import checkpoint
from moco_isl.run.backbone import load_backbone
from moco_isl.training.engine import learning_rate
from tests.ranks import run_ranks
from tests.runs import differences, photos

M, N, C, K, T, SIDE, HIDDEN = 12, 6, 8, 12, 0.2, 8, 16
ROOT = Path(__file__).parent.parent
PATCHES = "patch_embed.proj"
# 437 images, 7 steps an epoch, of a transformer of four patches
RUN = (
    "--dataset digits -a timm:test_vit --image-size 32 --mlp --moco-dim 16 --moco-k 128"
    " --moco-t 0.2 --moco-m 0.9 --knn-holdout 1000 -b 64 -j 0 --seed 1 --cos --device cpu"
    " --optimizer adamw --lr 1e-3 --wd 0.1 --warmup-epochs 1 --epochs 2 --symmetric"
    f" --predictor {HIDDEN} --stop-grad-conv1"
).split()


def main(*argv):
    return main_moco_isl.main([*RUN, *map(str, argv)])


def last(out):
    return checkpoint.load(out / "checkpoint_last.pth.tar")


def tiny(num_classes):
    """An encoder without batch norm."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 10), nn.Linear(10, num_classes))


def images(n, seed):
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def around_tiny(**options):
    torch.manual_seed(1)
    return ISL(MoCo(tiny, C, K, m=0.9, T=T), M, active=False, predictor=HIDDEN, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two epochs."""
    out = tmp_path_factory.mktemp("vit") / "whole"
    assert main("--out", out) == 0
    return out


# ---- the predictor


def batch_norm(rows):
    """Each column of rows [N, C] less its mean, over its deviation, value by value."""
    columns = []
    for column in zip(*rows):
        mean = sum(column) / len(column)
        variance = sum((x - mean) ** 2 for x in column) / len(column)
        columns.append([(x - mean) / math.sqrt(variance + 1e-5) for x in column])
    return [list(row) for row in zip(*columns)]


def unit(row):
    length = math.sqrt(sum(x * x for x in row))
    return [x / length for x in row]


def predicted(predictor, rows):
    """q of the query encoder's rows [N, C] by MoCo v3's equations, value by value."""
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    first, second = (predictor[i].weight.tolist() for i in (0, 3))
    hidden = batch_norm([[dot(w, row) for w in first] for row in rows])
    hidden = [[max(0.0, x) for x in row] for row in hidden]
    return [unit(row) for row in batch_norm([[dot(w, row) for w in second] for row in hidden])]


@pytest.mark.parametrize("symmetric", [False, True])
def test_loss_is_that_of_predicted_queries_and_plain_keys(symmetric):
    isl = around_tiny(symmetric=symmetric)
    model, one, two = isl.model, images(N, 2), images(N, 3)
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    queue = model.queue.t().tolist()
    truth = 0.0
    with torch.no_grad():
        moved = copy.deepcopy(model.encoder_k)
        for k, q in zip(moved.parameters(), model.encoder_q.parameters()):
            k.copy_(0.9 * k + 0.1 * q)
        for im_q, im_k in [(one, two), (two, one)][: 1 + symmetric]:
            q = predicted(isl.predict, model.encoder_q(im_q).tolist())
            k = [unit(row) for row in moved(im_k).tolist()]
            for a, b in zip(q, k):
                logits = [dot(a, b) / T, *(dot(a, other) / T for other in queue)]
                truth += (math.log(sum(map(math.exp, logits))) - logits[0]) / N
    assert isl(one, two, torch.arange(N)).item() == pytest.approx(truth, abs=1e-4)


def test_the_predictor_learns_and_the_key_encoder_has_none():
    isl = around_tiny()
    isl(images(N, 2), images(N, 3), torch.arange(N)).backward()
    learns = [*isl.model.encoder_q.parameters(), *isl.predict.parameters()]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learns)
    assert all(p.grad is None for p in isl.model.encoder_k.parameters())
    assert [id(p) for p in isl.parameters()] == [
        id(p) for p in (*isl.model.parameters(), *isl.predict.parameters())
    ]
    assert isl.model.state_dict().keys() == MoCo(tiny, C, K).state_dict().keys()


def _two_ranks(rank, world):
    isl = around_tiny()
    optimizer = torch.optim.SGD(isl.parameters(), 0.1)
    found = []
    for step in range(3):
        # of the batch of both ranks every second image: a part as SplitBatchNorm counts them
        mine = slice(rank, None, 2)
        loss = isl(images(N, step)[mine], images(N, 9 + step)[mine], torch.arange(N)[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found, isl.model.encoder_q.state_dict(), isl.state_dict()["predictor"]


def test_two_ranks_equal_one_process_whose_predictor_takes_two_parts():
    isl = around_tiny()
    split_batch_norm(isl.predict, 2)
    optimizer = torch.optim.SGD(isl.parameters(), 0.1)
    truth = []
    for step in range(3):
        loss = isl(images(N, step), images(N, 9 + step), torch.arange(N))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        truth.append(loss.item())
        # the ranks' keys come into the queue rank by rank
        order = [*range(0, N, 2), *range(1, N, 2)]
        slots = torch.arange(step * N, step * N + N) % K
        isl.model.queue[:, slots] = isl.model.queue[:, slots[order]]
    (first, state, beside), (second, state_2, beside_2) = run_ranks(2, _two_ranks)
    assert [(a + b) / 2 for a, b in zip(first, second)] == pytest.approx(truth, abs=1e-5)
    for name, value in isl.model.encoder_q.state_dict().items():
        assert torch.equal(state[name], state_2[name])
        assert torch.allclose(state[name], value, atol=1e-5), name
    for name, value in isl.predict.named_parameters():
        assert torch.equal(beside[name], beside_2[name])
        assert torch.allclose(beside[name], value, atol=1e-5), name


def test_a_wrapped_encode_and_a_predictor_are_refused():
    with pytest.raises(BadInput, match="expected only one of them"):
        around_tiny(encode=lambda *_, **__: None)


# ---- frozen patches, AdamW, warm-up


def test_only_the_projection_of_patches_stays_as_it_was_drawn(whole, tmp_path):
    assert main("--out", tmp_path, "--max-steps", 1) == 0
    early, late = last(tmp_path)["state_dict"], last(whole)["state_dict"]
    frozen = {n for n in early if torch.equal(early[n], late[n])}
    of_patches = {f"module.encoder_{x}.{PATCHES}.{end}" for x in "qk" for end in ("weight", "bias")}
    assert frozen == of_patches
    weights = [late[f"module.encoder_{x}.{PATCHES}.weight"] for x in "qk"]
    assert torch.equal(*weights)


def test_without_the_flag_the_patches_train(whole, tmp_path):
    assert main("--out", tmp_path, "--no-stop-grad-conv1", "--max-steps", 1) == 0
    name = f"module.encoder_q.{PATCHES}.weight"
    assert not torch.equal(last(tmp_path)["state_dict"][name], last(whole)["state_dict"][name])


@pytest.mark.parametrize("arch", ["timm:test_vit", "vit_b_16"])
def test_patches_of_timm_and_torchvision_are_found(arch):
    encoder = freeze_patches(build_encoder(arch, 8, image_size=32), arch)
    still = {n for n, p in encoder.named_parameters() if not p.requires_grad}
    start = PATCHES if arch.startswith("timm:") else "conv_proj"
    assert still == {f"{start}.weight", f"{start}.bias"}


def test_adamw_moves_what_learns_and_keeps_its_state_in_the_file(whole):
    content = last(whole)
    encoder = lambda num_classes: build_encoder("timm:test_vit", num_classes, image_size=32)
    model = MoCo(encoder, 16, mlp=True)
    names = [name for name, _ in model.named_parameters()]
    predictor = build_predictor(16, HIDDEN)
    names += [f"predictor.{name}" for name, _ in predictor.named_parameters()]
    (group,) = content["optimizer"]["param_groups"]
    assert len(group["params"]) == len(names) and group["weight_decay"] == 0.1
    moved = {names[i] for i in content["optimizer"]["state"]}
    assert moved == {
        name for name in names if not name.startswith("encoder_k.") and PATCHES not in name
    }
    state = content["optimizer"]["state"]
    assert all(kept["step"] == 14 and kept["exp_avg_sq"].min() >= 0 for kept in state.values())
    assert content["isl"]["state"]["predictor"].keys() == predictor.state_dict().keys()
    assert not [name for name in content["state_dict"] if "predict" in name]


def test_the_rate_rises_by_equal_steps_and_then_falls_by_half_a_cosine():
    rates = [learning_rate(e, lr=2.0, epochs=8, cos=True, schedule=[], warmup=4) for e in range(8)]
    fall = [1 + math.cos(math.pi * x / 4) for x in range(4)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, *fall])
    steps = [
        learning_rate(e, lr=1.0, epochs=6, cos=False, schedule=[4], warmup=2) for e in range(6)
    ]
    assert steps == pytest.approx([0.5, 1, 1, 1, 0.1, 0.1])
    again = [
        learning_rate(e, lr=1.0, epochs=6, cos=True, schedule=[], rounds=2, warmup=1)
        for e in range(6)
    ]
    assert again[:3] == again[3:] and again[0] == 1.0


# ---- resume, --init, export


def test_stopped_and_resumed_it_equals_the_unbroken_run(whole, tmp_path):
    out = tmp_path / "out"
    assert main("--out", out, "--max-steps", 3) == 0
    assert main("--out", out, "--resume", "auto") == 0
    assert differences(whole, out) == []


def test_init_takes_the_predictor_where_it_fits(whole, tmp_path):
    file = whole / "checkpoint_last.pth.tar"
    saved = last(whole)["isl"]["state"]["predictor"]
    for hidden, name in ((HIDDEN, "same"), (2 * HIDDEN, "other"), (0, "none")):
        flags = ["--init", file, "--predictor", hidden, "--lr", 0, "--wd", 0, "--max-steps", 1]
        assert main("--out", tmp_path / name, *flags) == 0
        found = last(tmp_path / name)["isl"]["state"].get("predictor")
        if name == "same":
            assert torch.equal(found["0.weight"], saved["0.weight"])
        elif name == "other":
            assert found["0.weight"].shape == (2 * HIDDEN, 16)
        else:
            assert found is None


def test_what_was_trained_goes_to_timm(whole, tmp_path):
    file, out = whole / "checkpoint_last.pth.tar", tmp_path / "folder"
    assert export.main([str(file), "--to", "hf", "--out", str(out)]) == 0
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    encoder = load_backbone(file)[0].eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = Taps(encoder, [BACKBONE])(x)[BACKBONE]
        assert F.normalize(ours - ours.mean(0)).abs().max() > 0  # images are told apart
        assert torch.allclose(theirs(x), ours, atol=1e-5)
    assert timm.data.resolve_model_data_config(theirs)["input_size"] == (3, 32, 32)


# ---- the pages


def blocks(page, title, language=""):
    """The blocks of code of a section of a page in docs/."""
    text = (ROOT / "docs" / page).read_text()
    section = re.search(rf"^## {title}\n(.*?)(?=^## )", text, re.M | re.S)[1]
    found = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.M | re.S)
    return [block for word, block in found if word == language]


@pytest.mark.long
def test_commands_of_the_pages_run(tmp_path, monkeypatch):
    photos(tmp_path / "DIR", n=16)
    monkeypatch.chdir(tmp_path)
    (command,) = blocks("moco.md", "Vision transformers")
    command = command.replace("\\\n", " ")
    small = ["--epochs", "3", "-b", "8", "-j", "0", "--moco-k", "16", "--device", "cpu"]
    assert main_moco_isl.main([*shlex.split(command)[2:], *small]) == 0
    assert last(Path("runs/vit"))["isl"]["state"]["predictor"]["0.weight"].shape == (256, 64)
    # of a ResNet, as the page says
    encoder = build_encoder("resnet18", 8)
    Path("runs/isl").mkdir()
    content = {"arch": "resnet18", "state_dict": encoder.state_dict()}
    torch.save(content, "runs/isl/checkpoint_last.pth.tar")
    (commands,) = blocks("evaluate.md", "Other libraries")
    for line in commands.splitlines():
        assert export.main([*shlex.split(line)[3:]]) == 0
    names = {"image": Image.new("RGB", (300, 200)), "images": np.zeros((2, 3, 224, 224), "f")}
    python = blocks("evaluate.md", "Other libraries", "python")
    assert len(python) == 3
    for block in python:
        exec(block, names)
        names.setdefault("of_timm", names.get("features"))
    assert names["of_timm"].shape == (1, 512) and names["features"].shape == (2, 512)
    assert names["model"].num_classes == 10


# ---- bad input


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--predictor", "8"], "--predictor was 16 and is now 8"),
        (["--optimizer", "sgd"], "--optimizer was 'adamw' and is now 'sgd'"),
        (["--no-stop-grad-conv1"], "--stop-grad-conv1 was True and is now False"),
        (["--warmup-epochs", "0"], "--warmup-epochs was 1 and is now 0"),
    ],
)
def test_a_resumed_run_keeps_its_recipe(whole, capsys, flags, said):
    assert main("--out", whole, "--resume", "auto", *flags, "--epochs", 3) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage,said",
    [
        (lambda c: c["isl"]["state"].pop("predictor"), "has no 'predictor'"),
        (
            lambda c: c["isl"]["state"]["predictor"].update({"0.weight": torch.zeros(3, 16)}),
            "predictor.0.weight is a tensor",
        ),
        (lambda c: c["optimizer"]["state"].clear(), "it has no momentum, and steps were taken"),
        (
            lambda c: next(iter(c["optimizer"]["state"].values())).pop("exp_avg_sq"),
            "has no 'exp_avg_sq'",
        ),
        (
            lambda c: next(iter(c["optimizer"]["state"].values()))["exp_avg_sq"].sub_(1),
            "expected at least 0",
        ),
    ],
)
def test_a_damaged_file_is_said_in_one_line(whole, tmp_path, capsys, damage, said):
    content = last(whole)
    damage(content)
    content["epoch"] = content["isl"]["epoch"] = 1
    content["isl"]["total"] = 7
    checkpoint.save(content, tmp_path / "x.pth.tar")
    argv = ["--out", tmp_path / "out", "--resume", tmp_path / "x.pth.tar"]
    assert main(*argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_file_of_sgd_is_no_state_of_adamw(tmp_path, capsys):
    """MoCo's own training file: its flags are not known, so they are not compared."""
    sgd = ["--optimizer", "sgd", "--predictor", 0, "--lr", 0.01, "--max-steps", 1]
    assert main("--out", tmp_path / "a", *sgd) == 0
    content = last(tmp_path / "a")
    del content["isl"], content["args"]
    content["epoch"] = 1
    checkpoint.save(content, tmp_path / "moco.pth.tar")
    argv = ["--out", tmp_path / "b", "--resume", tmp_path / "moco.pth.tar", "--predictor", 0]
    assert main(*argv) == 2
    assert "has no 'step'" in capsys.readouterr().err
