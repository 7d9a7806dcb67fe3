"""RotNet: four positions by loops, its loss, its ranks, a run that is resumed, its files."""

import json
import math

import pytest
import torch

import main_knn
import main_moco_isl
from moco_isl import pretraining
from moco_isl.data.augment import CropAugmentation
from moco_isl.errors import BadInput
from moco_isl.isl import ISL
from moco_isl.objectives.rotnet import Rotation, RotationObjective
from moco_isl.run.backbone import load_backbone
from moco_isl.run.signals import Never
from moco_isl.training import resume
from tests.ranks import run_ranks
from tests.test_builder import images, tiny


def build(batch=6):
    torch.manual_seed(0)
    return ISL(Rotation(tiny), batch)


def turned_by_loops(image, quarters):
    """[3, S, S] turned counter-clockwise: what was at (row, column) goes to (S - 1 - column,
    row).
    """
    S = image.shape[1]
    for _ in range(quarters):
        turned = torch.empty_like(image)
        for row in range(S):
            for column in range(S):
                turned[:, S - 1 - column, row] = image[:, row, column]
        image = turned
    return image


def test_loss_equals_loops():
    rotations, batch = build(), images(3, 0)
    model, total, right = rotations.model, 0, 0
    for image in batch:
        for quarters in range(4):
            features = model.encoder_q(turned_by_loops(image, quarters)[None])
            logits = model.classifier(features)[0].double()
            total = total - logits[quarters] + torch.log(sum(torch.exp(x) for x in logits))
            right += int(logits.argmax()) == quarters
    assert rotations(batch, torch.arange(3)).item() == pytest.approx(total.item() / 12, abs=1e-6)
    assert rotations.parts["acc1"].item() == pytest.approx(100 * right / 12)


def test_an_image_without_a_direction_costs_log_4():
    rotations = build()
    even = torch.ones(2, 3, 4, 4)
    rotations(even, torch.arange(2)).backward()
    assert rotations.model.encoder_q[1].weight.grad.norm() > 0
    with torch.no_grad():
        rotations.model.classifier.weight.zero_(), rotations.model.classifier.bias.zero_()
    assert rotations(even, torch.arange(2)).item() == pytest.approx(math.log(4))


def two_steps(rank, world):
    rotations = build()
    optimizer = torch.optim.SGD(rotations.model.parameters(), 0.5)
    share = slice(rank * 6 // world, (rank + 1) * 6 // world)
    for step in range(2):
        loss = rotations(images(6, step)[share], torch.arange(6)[share])
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    return torch.cat([p.detach().flatten() for p in rotations.model.parameters()])


def test_two_ranks_are_one():
    alone = two_steps(0, 1)
    for weights in run_ranks(2, two_steps):
        assert torch.allclose(weights, alone, atol=1e-6)


@pytest.mark.long
def test_a_run_learns_and_resumes(tmp_path):
    def run(*flags):
        common = (
            "--dataset digits -a digits -b 128 -j 0 --seed 1 --objective rotnet"
            " --knn-holdout 1000 -p 100 --lr 0.1 --knn-every 4".split()
        )
        assert main_moco_isl.main([*common, *flags]) == 0

    run("--epochs", "4", "--out", str(tmp_path / "whole"))
    run("--epochs", "4", "--out", str(tmp_path / "parts"), "--max-steps", "6")
    run("--epochs", "4", "--out", str(tmp_path / "parts"), "--resume", "auto")
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint_last.pth.tar", weights_only=True)["state_dict"]
        for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert {name.split(".")[1] for name in whole} == {"encoder_q", "classifier"}
    assert not any(".fc." in name for name in whole), "the classifier is on the backbone"
    assert whole["module.classifier.weight"].shape == (4, 128)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    epochs = [
        json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in epochs if line["kind"] == "epoch"]
    assert losses[-1] < losses[0] - 0.1
    assert [line["knn"] > 20 for line in epochs if "knn" in line] == [True]
    file = str(tmp_path / "whole" / "checkpoint_last.pth.tar")
    backbone, info = load_backbone(file)
    assert info["head"] is None and info["feature_dim"] == 128
    assert torch.equal(backbone.conv1[0].weight, whole["module.encoder_q.conv1.0.weight"])
    assert main_knn.main(["--pretrained", file, "--dataset", "digits", "-j", "0"]) == 0


def test_its_views_are_crops_and_flips_unless_others_are_asked_for():
    def augmentation(*flags):
        args = pretraining.get_parser().parse_args(
            ["--dataset", "tests.test_rotation:pictures", "--on-device", "-b", "8", "-a", "digits"]
            + ["-j", "0", "--seed", "0", "--objective", *flags]
        )
        pretraining.check_args(args)
        stop = Never()
        start = resume.Start()
        cpu = torch.device("cpu")
        return pretraining.get_ready(args, start, {}, None, cpu, stop)[0].augmentation

    plain = augmentation("rotnet")
    assert isinstance(plain, CropAugmentation) and plain.scale == (49 / 64, 1.0)
    assert RotationObjective.crop(side=224) == (0.08, 1.0)
    assert augmentation("deepcluster").scale == (0.08, 1.0)
    for flags in (("rotnet", "--aug-plus"), ("bank",), ("queue", "--moco-k", "16")):
        assert not isinstance(augmentation(*flags), CropAugmentation)


def pictures(split):
    pixels = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return list(pixels)


def test_positives_are_refused():
    args = pretraining.options.get_parser("").parse_args(
        "--dataset digits --objective rotnet --miner knn".split()
    )
    with pytest.raises(BadInput, match="rotnet"):
        pretraining.check_args(args)
