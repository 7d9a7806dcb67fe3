"""The linear probe: classifiers against plain loops, MoCo's promises, resuming, ranks, traps."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import to_pil_image

import main_lincls
from moco_isl import data
from moco_isl.builder import MoCo
from moco_isl.data.draws import permutation
from moco_isl.encoders import build_encoder, get_head, set_head
from moco_isl.errors import RunFailed
from moco_isl.evaluation import linear, options, probe, probing
from moco_isl.evaluation.features import Split
from moco_isl.evaluation.knn import few_shot
from moco_isl.evaluation.subject import mismatches
from moco_isl.run import checkpoint
from moco_isl.run.backbone import load_backbone
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def moco_file(tmp_path_factory):
    """An untrained MoCo of the demo's network.

    Its batch norm has seen the images, so that random features are far above chance.
    """
    torch.manual_seed(0)
    model = MoCo(partial(build_encoder, "digits"), dim=16, K=32, mlp=True)
    images = data.get_eval_transform("digits", 16).normalize(
        data.build_dataset("digits").images[:400].clone()
    )
    with torch.no_grad():
        for _ in range(20):
            model.encoder_q(images)
    path = tmp_path_factory.mktemp("lincls") / "file.pth.tar"
    state = {f"module.{n}": t for n, t in model.state_dict().items()}
    torch.save(
        {
            "epoch": 3,
            "arch": "digits",
            "state_dict": state,
            "args": {"dataset": "digits", "mlp": True},
        },
        path,
    )
    return path


def flags_of(moco_file, out, *more):
    fixed = "--dataset digits --workers 0 --device cpu --seed 0 --out"
    return words("--pretrained", moco_file, fixed, out, *more)


def words(*flags):
    """argv of flags, of which one may be a text of several words."""
    return [word for flag in flags for word in str(flag).split() or [""]]


def run(moco_file, out, *more, **options):
    return main_lincls.main(flags_of(moco_file, out, *more), **options)


def works(*given, **options):
    assert run(*given, **options) == 0


def results(folder):
    return json.loads((folder / "results.json").read_text())


def last(folder):
    return torch.load(folder / "checkpoint_last.pth.tar", weights_only=True)


# ---- parts


def test_every_flag_of_moco_with_its_default():
    args = main_lincls.get_parser().parse_args(["DIR"])
    expected = {
        "data": "DIR",
        "epochs": 100,
        "start_epoch": 0,
        "batch_size": 256,
        "schedule": [60, 80],
        "momentum": 0.9,
        "weight_decay": 0.0,
        "print_freq": 10,
        "resume": "",
        "evaluate": False,
        "world_size": -1,
        "rank": -1,
        "dist_url": "tcp://224.66.41.62:23456",
        "dist_backend": "nccl",
        "seed": None,
        "gpu": None,
        "multiprocessing_distributed": False,
        "pretrained": "",
        "workers": 32,
    }
    assert {name: getattr(args, name) for name in expected} == expected
    # the command of MoCo's README, and the short and long spellings
    line = (
        "-a resnet50 --lr 30.0 --batch-size 256 --pretrained f.pth.tar --dist-url"
        " tcp://localhost:10001"
    )
    line += " --multiprocessing-distributed --world-size 1 --rank 0 DIR"
    args = main_lincls.get_parser().parse_args(line.split())
    assert (args.arch, args.lr, args.world_size, args.rank, args.data) == (
        "resnet50",
        [30.0],
        1,
        0,
        "DIR",
    )
    for line in (
        "--lr 30 DIR",
        "--lr 1 3 DIR -b 8",
        "--schedule 60 80 DIR",
        "--lr 1 --schedule 5 DIR",
    ):
        assert main_lincls.get_parser().parse_args(line.split()).data == "DIR", line
    args = main_lincls.get_parser().parse_args(
        "DIR -j 3 -b 8 --learning-rate 1 --weight-decay 2 -p 5 -e".split()
    )
    assert (args.workers, args.batch_size, args.lr, args.weight_decay) == (3, 8, [1.0], 2.0)
    assert args.print_freq == 5 and args.evaluate


@pytest.mark.parametrize(
    "c,h,side",
    [
        (96, 55, 10),
        (256, 27, 6),
        (384, 13, 5),
        (64, 56, 12),
        (2048, 7, 2),
        (512, 4, 4),
        (9999, 3, 1),
    ],
)
def test_layers_are_pooled_to_about_9000_numbers(c, h, side):
    x = torch.randn(2, c, h, h)
    assert linear.pool(x).shape == (2, c * side * side)
    assert torch.allclose(linear.pool(x), F.adaptive_avg_pool2d(x, side).flatten(1))
    assert torch.equal(linear.pool(x[:, :, 0, 0]), x[:, :, 0, 0])


def trained_by_loops(first, features, labels, lr, epochs, batch_size, seed):
    """A plain classifier, plain SGD, no DDP, no grouping."""
    model = nn.Linear(first.in_features, first.out_features)
    model.load_state_dict(first.state_dict())
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for epoch in range(epochs):
        order = permutation(seed, epoch, len(labels)).tolist()
        for i in range(0, len(order), batch_size):
            rows = order[i : i + batch_size]
            logits = model(features[rows])
            loss = -sum(F.log_softmax(z, dim=0)[y] for z, y in zip(logits, labels[rows])) / len(
                rows
            )
            for p, v, g in zip(
                model.parameters(), velocity, torch.autograd.grad(loss, list(model.parameters()))
            ):
                v.mul_(0.9).add_(g)
                p.data.sub_(lr * v)
    return model


class NoStop:
    def agreed(self):
        return False


def train_heads(heads, split, epochs, batch_size, seed):
    optimizer = torch.optim.SGD(heads.groups(), 1.0, momentum=0.9)
    source, position, seen = linear.CachedBatches(split, batch_size, seed), linear.Position(), []
    options = {
        "stop": NoStop(),
        "show": seen.append,
        "save": None,
        "last_good": str,
        "print_freq": 2,
    }
    for epoch in range(epochs):
        position.epoch, position.step = epoch, 0
        linear.train_one_epoch(heads, source, optimizer, position, **options)
    return seen


def test_classifiers_side_by_side_are_those_trained_alone():
    torch.manual_seed(0)
    labels = torch.arange(50) % 3
    split = Split(
        {"conv1": torch.randn(50, 4) + labels[:, None], "backbone": torch.randn(50, 6)}, labels
    )
    # one of them diverges, and the others train as if it were not there
    heads = linear.Heads({"conv1": 4, "backbone": 6}, [0.1, 1e38, 2.0], 3)
    first = {layer: heads.linear[i] for i, (layer, _) in enumerate(heads.keys)}
    expected = [
        trained_by_loops(first[layer], split.features[layer], labels, lr, 3, 16, seed=7)
        for layer, lr in heads.keys
    ]
    assert torch.equal(heads.linear[0].weight, heads.linear[1].weight)
    seen = train_heads(heads, split, 3, 16, seed=7)
    for (layer, lr), ours, theirs in zip(heads.keys, heads.linear, expected):
        if lr < 1e38:
            assert torch.allclose(ours.weight, theirs.weight, atol=1e-4), (layer, lr)
            assert torch.allclose(ours.bias, theirs.bias, atol=1e-4)
    assert not heads.linear[1].weight.isfinite().all()
    assert len(seen) == 3 * 2 and seen[-1]["acc1 conv1@0.1"] > seen[0]["acc1 conv1@0.1"]


def test_a_loss_that_is_nowhere_finite_ends_the_run():
    split = Split({"backbone": torch.randn(20, 4)}, torch.arange(20) % 2)
    with pytest.raises(RunFailed, match="not finite"):
        train_heads(linear.Heads({"backbone": 4}, [1e38], 2), split, 5, 5, seed=0)


def test_a_classifier_that_has_exploded_is_saved_beside_a_sound_one():
    encoder = build_encoder("digits", 4)
    options = {
        "classes": 3,
        "size": 16,
        "device": torch.device("cpu"),
        "amp": None,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "reading": {},
    }
    several = probe.Probe(encoder, ["backbone"], lrs=[1.0, 3.0], **options)
    several.model.linear[1].weight.data.fill_(float("nan"))
    assert several.exploded() == []
    several.optimizer.state[several.model.linear[0].bias]["momentum_buffer"] = torch.full(
        (3,), torch.inf
    )
    assert several.exploded() == ["backbone@1.1.momentum_buffer", "backbone@3.0.weight"]
    whole = probe.Probe(encoder, None, lrs=[1.0], **options)
    assert whole.exploded() == []
    encoder.conv2[1].running_var.fill_(float("nan"))
    assert whole.exploded() == ["buffers.encoder.conv2.1.running_var"]


def test_judging_is_counting():
    torch.manual_seed(0)
    split = Split({"backbone": torch.randn(101, 7)}, torch.randint(0, 12, (101,)))
    heads = linear.Heads({"backbone": 7}, [1.0], 12)
    found = linear.judge(
        heads, linear.JudgedFeatures(split, batch_size=8), heads.names, torch.device("cpu")
    )["backbone@1"]
    order = heads.linear[0](split.features["backbone"]).argsort(dim=1, descending=True).tolist()
    top1 = sum(row[0] == y for row, y in zip(order, split.labels.tolist()))
    top5 = sum(y in row[:5] for row, y in zip(order, split.labels.tolist()))
    assert found == {
        "top1": pytest.approx(100 * top1 / 101),
        "top5": pytest.approx(100 * top5 / 101),
    }


def test_a_backbone_that_moves_is_found_out():
    encoder = build_encoder("resnet18w16", image_size=32)
    frozen = linear.Frozen(encoder)
    assert "all 122 tensors of conv1, bn1, layer1, layer2, layer3, layer4, fc" in frozen.check(
        encoder
    )
    for part in (encoder.layer3[1].bn2.running_mean, encoder.conv1.weight):
        kept = part.detach().clone()
        part.data.view(-1)[0] += 1e-6
        with pytest.raises(RunFailed, match="moved"):
            frozen.check(encoder)
        part.data.copy_(kept)
    frozen.check(encoder)


def test_the_rate_is_chosen_on_held_out_images_not_on_val():
    names = ["conv1@0.1", "conv1@1", "conv1@10"]
    val = {n: {"top1": t, "top5": 90.0} for n, t in zip(names, (50.0, 40.0, 60.0))}
    held = {n: {"top1": t, "top5": 90.0} for n, t in zip(names, (30.0, 44.0, 44.0))}
    rows = probing.result_rows(names, val, held, {}, {"conv1": 8})
    # the best on held-out images; of two equal rates the lower one
    assert [row["chosen"] for row in rows] == [False, True, False]
    assert [row["top1"] for row in rows] == [50.0, 40.0, 60.0]


def test_traps_are_warned_of_and_only_those():
    info = {"head": "linear", "args": {"dataset": "cifar10", "mlp": False, "image_size": 32}}
    fine = {"batch_size": 256, "lr_given": False, "mlp": None}
    assert probing.traps(info, **fine) == []
    assert probing.traps(info, **{**fine, "batch_size": 2048, "lr_given": True}) == []
    same = {"dataset": "cifar10", "side": 32}
    assert mismatches(info, **same) == []
    for found, said in [
        (probing.traps(info, **{**fine, "batch_size": 2048}), "--lr 240"),
        (
            probing.traps(info, **{**fine, "mlp": True}),
            "--mlp says an MLP head, but the file has a linear one",
        ),
        (mismatches(info, **{**same, "dataset": "svhn"}), "trained on cifar10, judged on svhn"),
        (mismatches(info, **{**same, "side": 224}), "side 32, judged on side 224"),
        (mismatches({"head": "mlp", "args": {"mlp": False}}, **same), "own flags"),
    ]:
        assert len(found) == 1 and said in found[0]


# ---- the script, on the embedded digits


@pytest.fixture(scope="module")
def cached_run(moco_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("cached")
    code = run(
        moco_file,
        out,
        "--cache-features --lr 0.3 30 --epochs 6 --schedule 4 5 --layers all --shots 1,5",
    )
    assert code == 0
    return out


def test_layers_and_rates_in_one_cached_pass(moco_file, cached_run):
    found = results(cached_run)
    assert found["protocol"] == "cached features" and found["backbone_unchanged"]
    assert (found["train_images"], found["held_out"], found["val_images"]) == (1437 - 143, 143, 360)
    rows = found["classifiers"]
    assert [(r["layer"], r["dim"], r["lr"]) for r in rows] == [
        (layer, dim, lr)
        for layer, dim in (("conv1", 8192), ("conv2", 4096), ("conv3", 2048), ("backbone", 128))
        for lr in (0.3, 30)
    ]
    for layer in ("conv1", "conv2", "conv3", "backbone"):
        mine = [r for r in rows if r["layer"] == layer]
        (chosen,) = [r for r in mine if r["chosen"]]
        assert (
            chosen["held_out_top1"] == max(r["held_out_top1"] for r in mine) and chosen["top1"] > 40
        )
        assert all(
            r["top1"] <= r["best_top1_of_all_epochs"] and r["top1"] <= r["top5"] for r in mine
        )
    # the accuracy with few labels, computed here from the features
    encoder, _ = load_backbone(moco_file)
    seen, feats = [], {}
    get_head(encoder)
    encoder.fc.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    train, val = data.build_dataset("digits"), data.build_dataset("digits", split="val")
    rest, _ = data.holdout(train, 143, 0)
    with torch.no_grad():
        for name, dataset in (("train", rest), ("val", val)):
            encoder.eval()(data.get_eval_transform("digits", 16).normalize(dataset.images.clone()))
            feats[name] = F.normalize(seen.pop(), dim=1)
    for row in found["few_labels"]:
        mean, std = few_shot(
            feats["train"], rest.labels, feats["val"], val.labels, row["shots"], 20, seed=0
        )
        assert (row["top1"], row["std"]) == (
            pytest.approx(100 * mean, abs=0.2),
            pytest.approx(100 * std, abs=0.2),
        )


def test_evaluate_gives_the_numbers_of_the_run(moco_file, cached_run, tmp_path):
    works(moco_file, tmp_path, "-e", "--resume", cached_run / "checkpoint_last.pth.tar")
    before, after = results(cached_run)["classifiers"], results(tmp_path)["classifiers"]
    assert after == before


def test_evaluate_takes_the_held_out_images_and_the_protocol_from_the_file(cached_run, tmp_path):
    """With a seed of its own it would hold out images that were trained on, and choose by them."""
    flags = words("--dataset digits --device cpu --workers 0 --out", tmp_path, "-e --resume")
    assert main_lincls.main([*flags, str(cached_run / "checkpoint_last.pth.tar")]) == 0
    before, after = results(cached_run), results(tmp_path)
    same = ("classifiers", "protocol", "seed", "held_out", "train_images", "epochs", "batch_size")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


def test_evaluate_judges_the_encoder_that_was_probed(moco_file, tmp_path):
    content = torch.load(moco_file, weights_only=True)
    for name, t in content["state_dict"].items():
        if name.startswith("module.encoder_k.conv") and t.dim() == 4:
            t.neg_()
    torch.save(content, tmp_path / "two.pth.tar")
    works(tmp_path / "two.pth.tar", tmp_path / "a", "--key --cache-features --epochs 3 --lr 1")
    evaluate = ["-e", "--resume", tmp_path / "a" / "checkpoint_last.pth.tar"]
    # without --key: the file says which encoder it was
    works(tmp_path / "two.pth.tar", tmp_path / "b", *evaluate)
    flags = words("--dataset digits --device cpu --out", tmp_path / "c", *evaluate)
    assert main_lincls.main(flags) == 0
    first, *others = (results(tmp_path / name)["classifiers"][0]["top1"] for name in "abc")
    assert others == [first, first] and results(tmp_path / "b")["encoder"] == "key"


def test_each_file_is_read_once(moco_file, tmp_path, monkeypatch):
    read = []

    def noted(function, path_of):
        def call(*given, **options):
            read.append(path_of(*given))
            return function(*given, **options)

        return call

    load = noted(checkpoint.load, lambda path: str(path))
    monkeypatch.setattr(checkpoint, "load", load)
    build = noted(data.build_dataset, lambda name, root, split, download, *_: split)
    monkeypatch.setattr(data, "build_dataset", build)
    flags = ["--cache-features", "--lr", 1, "--resume", "auto"]
    works(moco_file, tmp_path, *flags, "--epochs", 1)
    assert sorted(read) == sorted([str(moco_file), "train", "val"])
    read.clear()
    saved = str(tmp_path / "checkpoint_last.pth.tar")
    works(moco_file, tmp_path, *flags, "--epochs", 2)
    assert sorted(read) == sorted([str(moco_file), saved, "train", "val"])


def test_evaluate_writes_over_no_run(moco_file, cached_run, capsys):
    before = (cached_run / "results.json").read_bytes()
    assert run(moco_file, cached_run, "-e", "--resume", cached_run / "checkpoint_last.pth.tar") == 2
    assert (
        "choose another --out" in capsys.readouterr().err
        and (cached_run / "results.json").read_bytes() == before
    )


def test_images_that_cannot_be_read_are_not_judged(tmp_path):
    root = folder_of_digits(tmp_path, {"train": "01", "val": "01"})
    broken = sorted((root / "val").rglob("*.png"))[2]
    broken.write_bytes(broken.read_bytes()[:60])
    dataset = data.build_dataset("folder", root, "val")
    transform = data.get_eval_transform("folder", 16)
    judged = linear.JudgedImages(
        dataset, torch.device("cpu"), max_bad_images=1, transform=transform, batch_size=2
    )
    seen = list(judged)
    whole = transform.normalize(torch.stack([transform(dataset.image(i)) for i in (0, 1, 3)]))
    assert torch.equal(torch.cat([labels for _, labels in seen]), torch.tensor([0, 0, 1]))
    assert torch.allclose(torch.cat([images for images, _ in seen]), whole, atol=1e-5)
    judged.max_bad_images = 0
    with pytest.raises(RunFailed, match="1 unreadable images.*--max-bad-images"):
        list(judged)


def test_mocos_protocol_end_to_end_and_its_file(moco_file, tmp_path, capsys):
    assert (
        run(moco_file, tmp_path, "--epochs", 3, "--schedule", 2, "--lr", 1, "--print-freq", 3) == 0
    )
    out = capsys.readouterr().out
    assert "used all 22 tensors of encoder_q" in out and "22 of encoder_k" in out
    assert out.count("sanity check passed: all 22 tensors of conv1, conv2, conv3, fc") == 2
    assert (
        re.search(r"Epoch: \[1\]\[6/6\]\tTime .*Loss .*Acc@1 .*Acc@5 .*left 0:00:\d\d", out)
        and " * Acc@1 " in out
    )
    (row,) = results(tmp_path)["classifiers"]
    assert (
        row["layer"] == "backbone"
        and row["held_out_top1"] is None
        and row["chosen"]
        and row["top1"] > 30
    )
    assert results(tmp_path)["train_images"] == 1437 and "MoCo's" in results(tmp_path)["protocol"]
    # the file is a classifier under MoCo's names, with the accuracy that was reported
    content = last(tmp_path)
    assert (
        content["epoch"] == 3
        and content["arch"] == "digits"
        and content["best_acc1"] == row["best_top1_of_all_epochs"]
    )
    net = build_encoder("digits", 10)
    net.load_state_dict({n.removeprefix("module."): t for n, t in content["state_dict"].items()})
    val = data.build_dataset("digits", split="val")
    with torch.no_grad():
        right = (
            net.eval()(data.get_eval_transform("digits", 16).normalize(val.images.clone())).argmax(
                1
            )
            == val.labels
        )
    assert row["top1"] == pytest.approx(100 * right.double().mean().item())
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [v["epoch"] for v in log if v["kind"] == "epoch"] == [0, 1, 2]
    # MoCo's own file lacks what this project adds, and can be evaluated, too
    moco_own = tmp_path / "checkpoint.pth.tar"
    torch.save(
        {k: content[k] for k in ("epoch", "arch", "state_dict", "best_acc1", "optimizer")}, moco_own
    )
    digits = "--dataset digits --workers 0 --device cpu --epochs 3"
    flags = words("-e --resume", moco_own, digits, "--out", tmp_path / "own")
    assert main_lincls.main(flags) == 0
    assert results(tmp_path / "own")["classifiers"][0]["top1"] == row["top1"]


class StopInTheSecondEpoch:
    def __init__(self, folder):
        self.log, self.asked = folder / "metrics.jsonl", 0

    def __call__(self):
        self.asked += self.log.exists() and '"kind": "epoch"' in self.log.read_text()
        return self.asked == 3


def test_a_stop_while_features_are_taken_is_an_interruption(moco_file, tmp_path, capsys):
    assert run(moco_file, tmp_path, "--cache-features", stop=lambda: True) == 75
    assert "Traceback" not in capsys.readouterr().err
    works(moco_file, tmp_path, "--cache-features", "--resume", "auto", "--epochs", 1)


@pytest.mark.parametrize("protocol", [[], ["--cache-features"], ["--finetune"]])
def test_a_run_stopped_in_an_epoch_ends_as_the_unbroken_one(moco_file, tmp_path, protocol):
    flags = [
        "--epochs 3 --schedule 2 --lr",
        *([0.01] if "--finetune" in protocol else [0.1, 1]),
        *protocol,
    ]
    works(moco_file, tmp_path / "whole", *flags)
    assert (
        run(moco_file, tmp_path / "parts", *flags, stop=StopInTheSecondEpoch(tmp_path / "parts"))
        == 75
    )
    assert (
        last(tmp_path / "parts")["probe"]["epoch"] == 1
        and last(tmp_path / "parts")["probe"]["step"] == 3
    )
    works(moco_file, tmp_path / "parts", *flags, "--resume", "auto")
    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert all(
        torch.equal(whole["probe"]["model"][n], t) for n, t in parts["probe"]["model"].items()
    )
    assert results(tmp_path / "whole")["classifiers"] == results(tmp_path / "parts")["classifiers"]
    kinds = ("epoch", "val", "loss")
    logs = [
        [json.loads(x) for x in (tmp_path / d / "metrics.jsonl").read_text().splitlines()]
        for d in ("whole", "parts")
    ]
    logs = [[{k: v[k] for k in kinds} for v in log if v["kind"] == "epoch"] for log in logs]
    assert logs[0] == logs[1] and len(logs[0]) == 3


def _main_on_a_rank(rank, world, argv):
    return main_lincls.main(argv)


@pytest.mark.parametrize("protocol", [[], ["--cache-features"]])
def test_two_ranks_equal_one_process(moco_file, tmp_path, protocol):
    # 1,436 images in batches of 64 give equal shares to two ranks
    flags = [
        "--holdout 1 --lr 0.01 0.1 --epochs 2 --batch-size 64 --layers conv3 backbone",
        *protocol,
    ]
    works(moco_file, tmp_path / "one", *flags)
    assert run_ranks(2, _main_on_a_rank, flags_of(moco_file, tmp_path / "two", *flags)) == [0, 0]
    one, two = (results(tmp_path / d)["classifiers"] for d in ("one", "two"))
    assert [r["top1"] for r in one] == pytest.approx([r["top1"] for r in two], abs=1e-6)
    one, two = (last(tmp_path / d)["probe"]["model"] for d in ("one", "two"))
    assert all(torch.allclose(one[n], two[n], rtol=1e-3, atol=1e-3) for n in one)


def test_finetuning_moves_the_backbone_and_learns(moco_file, tmp_path, capsys):
    assert (
        run(moco_file, tmp_path, "--finetune", "--epochs", 3, "--lr", 0.1, "--batch-size", 64) == 0
    )
    assert "sanity check" not in capsys.readouterr().out
    found = results(tmp_path)
    assert (
        found["protocol"] == "fine-tuning"
        and not found["backbone_unchanged"]
        and found["classifiers"][0]["top1"] > 50
    )
    before, _ = load_backbone(moco_file)
    after, info = load_backbone(tmp_path / "checkpoint_last.pth.tar")
    assert info["dim"] == 10 and not torch.equal(before.conv1[0].weight, after.conv1[0].weight)


# ---- bad input


def folder_of_digits(root, classes):
    """classes: split -> digits; two images of each."""
    dataset = data.build_dataset("digits", split="val")
    for split, digits in classes.items():
        for digit in digits:
            (root / split / digit).mkdir(parents=True)
            for i in (dataset.labels == int(digit)).nonzero()[:2, 0].tolist():
                to_pil_image(dataset[i][0]).save(root / split / digit / f"{i}.png")
    return root


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--pretrained", ""], "random weights are not probed"),
        (["--pretrained", "nowhere.pth"], "no file at 'nowhere.pth'"),
        (["-a", "resnet18"], "does not fit resnet18.*looks like digits"),
        (["--layers", "conv4"], "no layer 'conv4'; it has conv1, conv2, conv3, backbone"),
        (["--resume", "nowhere.pth"], "no file at --resume 'nowhere.pth'"),
        (["-e"], "name their file with --resume"),
        (["--lr", "-1"], "--lr -1.0 is out of range"),
        (["--epochs", "0"], "--epochs 0 is out of range"),
        (["--shots", "0"], "--shots 0 is out of range"),
        (["--shots", "one"], "--shots: 'one' is no list of whole numbers"),
        (["--shots", "142"], "142 shots asked, but class 8 has only 141"),
        (["--shots", "141", "--holdout", "400"], "141 shots asked"),
        (["--schedule", "-5"], "--schedule -5 is out of range"),
        (["--momentum", "2"], "--momentum 2.0 is out of range"),
        (["--seed", "1" + 20 * "0"], "--seed 1.* is out of range"),
        (["--start-epoch", "4", "--epochs", "4"], "--start-epoch 4 leaves nothing of --epochs 4"),
        (["--finetune", "--lr", "1", "2"], "--finetune trains one network"),
        (
            ["--finetune", "-b", "1"],
            "--finetune with --batch-size 1 leaves one image to each of 1 ranks",
        ),
        (["--learning-rat", "1"], "--learning-rat .did you mean --learning-rate"),
        (["--holdout", "1437"], "hold out 1437 of 1437"),
    ],
)
def test_bad_flags_are_one_line_and_code_2(moco_file, tmp_path, capsys, flags, said):
    assert run(moco_file, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_config_file_may_list_what_the_command_line_joins_by_commas(tmp_path):
    (tmp_path / "c.yaml").write_text("shots: [1, 5]\nlr: [1, 3]\ndata: photos\n")
    args = main_lincls.get_parser().parse_args(["--config", str(tmp_path / "c.yaml")])
    assert (args.shots, args.lr, args.data) == ([1, 5], [1, 3], "photos")


@pytest.mark.parametrize(
    "classes,said",
    [
        ({"train": "01"}, "no validation images"),
        ({"train": "01", "val": "02"}, "a class that train lacks: '2'"),
        ({"val": "01"}, "no training images"),
    ],
)
def test_splits_that_do_not_fit_are_said(moco_file, tmp_path, capsys, classes, said):
    root = folder_of_digits(tmp_path / "images", classes)
    assert run(moco_file, tmp_path / "out", "--dataset", "folder", root) == 2
    assert said in capsys.readouterr().err


def test_a_missing_class_in_val_keeps_labels_in_place(moco_file, tmp_path):
    root = folder_of_digits(tmp_path / "images", {"train": "0123", "val": "13"})
    works(
        moco_file,
        tmp_path / "out",
        "--dataset folder",
        root,
        "--image-size 16 --cache-features --epochs 30 --lr 1",
    )
    # the images of val are those of train
    assert results(tmp_path / "out")["classifiers"][0]["top1"] == 100


def test_other_settings_or_another_file_cannot_be_resumed(moco_file, cached_run, tmp_path, capsys):
    same = ["--cache-features --lr 0.3 30 --epochs 6 --schedule 4 5 --layers all --resume auto"]
    assert run(moco_file, cached_run, *same, "--momentum", 0.5) == 2
    assert "--momentum was 0.9 and is now 0.5" in capsys.readouterr().err
    assert options.MAY_CHANGE >= {"pretrained", "arch", "stem", "mlp", "shots", "draws", "workers"}
    assert not options.MAY_CHANGE & {*options.OF_THE_RUN, "epochs", "batch_size", "amp", "dataset"}
    other = tmp_path / "other.pth"
    encoder = build_encoder("digits", 4)
    torch.save(encoder.state_dict(), other)
    assert run(other, cached_run, *same) == 2
    assert "probes another file" in capsys.readouterr().err
    # nor a classifier of other classes
    set_head(encoder, nn.Linear(128, 7))
    torch.save({"epoch": 1, "state_dict": encoder.state_dict()}, other)
    assert run(moco_file, tmp_path / "out", "--resume", other) == 2
    assert "7 classes on 128 numbers" in capsys.readouterr().err
    assert run(moco_file, cached_run) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_other_images_and_other_classes_are_refused(moco_file, tmp_path, capsys):
    """As many images and classes of another folder: their labels mean other things."""
    folders = {
        name: folder_of_digits(tmp_path / name, {"train": digits, "val": digits})
        for name, digits in (("one", "01"), ("two", "23"))
    }
    same = folder_of_digits(tmp_path / "moved", {"train": "01", "val": "01"})
    changed = folder_of_digits(tmp_path / "changed", {"train": "01", "val": "01"})
    image = sorted((changed / "train").rglob("*.png"))[0]
    image.write_bytes(
        (
            changed / "train" / "1" / sorted(p.name for p in (changed / "train" / "1").iterdir())[0]
        ).read_bytes()
        + b"\0"
    )
    out = tmp_path / "out"
    flags = ["--dataset", "folder", "--image-size", 16, "--cache-features", "--lr", 1]
    works(moco_file, out, *flags, "--epochs", 1, folders["one"])
    last_file = out / "checkpoint_last.pth.tar"
    before = (out / "checkpoint_last.pth.tar").read_bytes()
    for folder, said in (
        (folders["two"], "know the classes 0, 1, and here they are 2, 3"),
        (changed, "trained on other images"),
    ):
        assert run(moco_file, out, *flags, "--epochs", 2, "--resume", "auto", folder) == 2
        assert said in capsys.readouterr().err and last_file.read_bytes() == before
    three = folder_of_digits(tmp_path / "three", {"train": "012", "val": "012"})
    for folder in (folders["two"], three):
        assert run(moco_file, tmp_path / "look", *flags, "-e", "--resume", last_file, folder) == 2
        assert "know the classes 0, 1" in capsys.readouterr().err
    # to evaluate them on other images of these classes is fine
    works(moco_file, tmp_path / "look", *flags, "-e", "--resume", last_file, changed)
    assert results(tmp_path / "look")["classifiers"][0]["best_top1_of_all_epochs"] is None
    # and to go on with the same images in another folder
    works(moco_file, out, *flags, "--epochs", 2, "--resume", "auto", same)
    assert run(moco_file, out, *flags, "--epochs", 2, "--resume", "auto", "-b", 8, same) == 2
    said = capsys.readouterr().err
    # this script has no --init
    assert "--batch-size was 256 and is now 8" in said and "--init" not in said


def test_a_run_in_the_folder_is_not_overwritten_by_another(
    moco_file, cached_run, tmp_path, capsys, monkeypatch
):
    """The other one goes on from another folder, finds no checkpoint, or has lost its folder."""
    same = "--cache-features --lr 0.3 30 --epochs 6 --schedule 4 5 --layers all".split()
    out = tmp_path / "out"
    shutil.copytree(cached_run, out)
    before = contents(out)
    assert run(moco_file, out, *same, "--resume", cached_run / "checkpoint_last.pth.tar") == 2
    assert "holds a run already" in capsys.readouterr().err and contents(out) == before

    def moved(*_):
        out.rename(tmp_path / "moved")
        shutil.copytree(cached_run, out)
        return "the table"

    with monkeypatch.context() as patched:
        patched.setattr(probing, "table", moved)
        assert run(moco_file, out, *same, "--resume", "auto") == 3
    assert (
        "is no longer the folder of this run" in capsys.readouterr().err and contents(out) == before
    )
    content = last(out)
    for tensor in content["probe"]["model"].values():
        tensor.fill_(float("nan"))
    # a run does not save such a file
    torch.save(content, out / "checkpoint_last.pth.tar")
    assert run(moco_file, out, *same, "--resume", "auto") == 2
    assert "holds classifiers that are not finite" in capsys.readouterr().err
    (out / "checkpoint_last.pth.tar").unlink()
    before = contents(out)
    assert run(moco_file, out, *same, "--resume", "auto", "--seed", 5) == 2
    assert "whose checkpoints are gone" in capsys.readouterr().err and contents(out) == before
    (out / ".lock").unlink()  # as if it had ended in its first epoch, and none had been saved yet
    (out / "metrics.jsonl").write_bytes(before["metrics.jsonl"].splitlines(keepends=True)[0])
    before = contents(out)
    assert run(moco_file, out, *same, "--resume", "auto", "--seed", 5) == 2
    assert (
        "--seed was 0 and is now 5" in capsys.readouterr().err
        and contents(out).items() <= before.items()
    )


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_pretraining_file_is_not_gone_on_with(moco_file, tmp_path, capsys):
    content = torch.load(moco_file, weights_only=True)
    ours = {"epoch": 0, "step": 0, "total": 0, "metrics_size": 0, "state": {}}
    content |= {"epoch": 0, "arch": "digits", "args": {}, "isl": ours}
    torch.save(content, tmp_path / "checkpoint_last.pth.tar")
    assert run(moco_file, tmp_path, "--resume", "auto") == 2
    assert (
        "is a pretraining file of main_moco_isl.py: judge it with --pretrained"
        in capsys.readouterr().err
    )
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_last.pth.tar"]


def test_an_older_file_of_the_same_folder_is_refused(moco_file, tmp_path, capsys):
    """Going on from it would overwrite what came after."""
    works(moco_file, tmp_path, "--cache-features", "--epochs", 1)
    shutil.copy(tmp_path / "checkpoint_last.pth.tar", tmp_path / "older.pth.tar")
    works(moco_file, tmp_path, "--cache-features", "--epochs", 2, "--resume", "auto")
    reached = (tmp_path / "checkpoint_last.pth.tar").read_bytes()
    assert (
        run(moco_file, tmp_path, "--cache-features --epochs 2 --resume", tmp_path / "older.pth.tar")
        == 2
    )
    assert (
        "is older than" in capsys.readouterr().err
        and (tmp_path / "checkpoint_last.pth.tar").read_bytes() == reached
    )
    # to evaluate it overwrites nothing
    works(moco_file, tmp_path / "look", "-e", "--resume", tmp_path / "older.pth.tar")
