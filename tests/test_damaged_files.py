"""Every file that we read, damaged at random: a reader refuses it in one printable line, or takes
it, and then what it took can be used.

python -m tests.test_damaged_files --seeds 20      more of the same, with other seeds
"""

import argparse
import contextlib
import io
import json
import math
import random
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import main_knn
import main_lincls
import main_moco_isl
from launch import report as launch_report
from launch import tables
from moco_isl import pretraining
from moco_isl.encoders import build_encoder
from moco_isl.errors import BadInput
from moco_isl.evaluation import features, probe, probing
from moco_isl.evaluation.results import read_results as read_figures
from moco_isl.evaluation.subject import mismatches
from moco_isl.export import main as export_main
from moco_isl.isl import ISL
from moco_isl.miners import gan as gan_miner
from moco_isl.miners.entropy import EntropyMiner
from moco_isl.miners.gan import GANMiner
from moco_isl.miners.none import NoMiner
from moco_isl.miners.oracle import OracleMiner
from moco_isl.mining import gan_training
from moco_isl.mining.rounds import RoundMiner
from moco_isl.report import grids, outcome, page, runs, sections, verdict
from moco_isl.report.__main__ import main as report_main
from moco_isl.run import checkpoint
from moco_isl.run.backbone import describe, load_backbone
from moco_isl.training import engine, fast, pretrain, resume, state
from tests.runs import photos
from tests.small_training import unit

TRIES = 200  # a reader
M, C = 40, 8
BASE = (
    f"-a digits --image-size 16 --mlp --moco-dim {C} --moco-k 16 -b 16 -j 0 --seed 1 --lr 0.1"
    " --device cpu -p 1 --epochs 3 --amp fp16 --isl-start 1 --isl-every 1 --max-steps 7"
).split()
GAN = (
    "--miner gan --isl-gan-iters 8 --isl-gan-min-iters 4 --isl-threshold 0 --isl-radius 2"
    " --isl-radius-mode fixed --isl-max-share 0.05"
).split()
FLAGS = [*BASE, *GAN]


# ---- damage --------------------------------------------------------------------------------------

HUGE = 10**400
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    0.5,
    -0.5,
    2**31,
    2**63,
    -(2**70),
    HUGE,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "a\nb\x1b[31m\udcff",
    "1",
    [],
    {},
    [1],
    [None],
    {"a": 1},
    {1: 2},
    (),
    b"x",
    {"a": {"b": [{}]}},
]


def odd_tensors(x: torch.Tensor, draw: random.Random) -> list:
    """Tensors that are nearly x: of other values, sizes, kinds and layouts."""
    if not storable(x):  # one that was changed before
        return VALUES
    floating, dense = x.is_floating_point(), x.detach().clone()
    changed = [
        dense[:-1] if dense.ndim else dense[None],
        dense[None],
        dense.flatten(),
        torch.cat([dense, dense]) if dense.ndim else dense,
        dense.double(),
        dense.to(torch.int64),
        dense.bool(),
        dense.half(),
        dense.to(torch.complex64),
        dense.to("meta"),
        dense.to_sparse() if dense.ndim else dense.bool(),
        torch.quantize_per_tensor(dense.float(), 0.1, 0, torch.quint8),
        dense.new_zeros(0),
        dense[..., None].expand(*dense.shape, 10**9),
        dense.float() - 1000 if floating else dense.long() - 1000,
        dense.float() * 1e30,
        -dense.float(),
        dense.to(torch.bfloat16),
        dense.to(torch.uint8),
        dense.tolist(),
        dense.flatten()[:1].expand(10**11),
    ]
    if dense.numel():
        at = draw.randrange(dense.numel())
        values = [math.nan, math.inf, 1e30, -1.0] if floating else [-1, -2, 10**6, 2**31 - 1, 0, 17]
        one = dense.double() if floating else dense.long()
        one.flatten()[at : at + 1] = draw.choice(values)
        changed += [one if not floating else one.float()] * 6
    return changed


def places(value, at=()):
    """The ways to everything inside a value, itself too."""
    yield at
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, (list, tuple)) and len(value) < 100
        else ()
    )
    for key, one in inside:
        yield from places(one, (*at, key))


def replaced(value, at: tuple, new):
    """A copy with what lies at a place replaced by new(it, its key, the copy it lies in); what is
    elsewhere is the same object.
    """
    key, copied = at[0], dict(value) if isinstance(value, dict) else list(value)
    if len(at) == 1:
        new(copied, key)
    else:
        copied[key] = replaced(copied[key], at[1:], new)
    return tuple(copied) if isinstance(value, tuple) else copied


def damaged(value, draw: random.Random):
    """A value with one to three things in it changed."""
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        ways = [at for at in places(value) if at]
        deep = max(map(len, ways))
        # the few at the top as often as the many below
        at = draw.choice([way for way in ways if len(way) == draw.randint(1, deep)] or ways)

        def change(inside, key):
            kind = draw.choice(
                [
                    "drop",
                    "rename",
                    "value",
                    "value",
                    "value",
                    "near",
                    "near",
                    "near",
                    "swap",
                    "wrap",
                    "add",
                ]
            )
            x = inside[key]
            if kind == "drop":
                del inside[key]
            elif kind == "rename" and isinstance(inside, dict):
                inside[
                    draw.choice([f"{key}?", f"{key}\n", str(key).upper(), 10**9, "module.", ""])
                ] = inside.pop(key)
            elif kind == "add" and isinstance(inside, dict):
                inside[draw.choice(["new", "a\nb", 99, "epoch", "isl", "probe"])] = draw.choice(
                    VALUES
                )
            elif kind == "add":
                inside.append(x)
            elif kind == "swap":
                other = draw.choice(
                    list(inside) if isinstance(inside, dict) else range(len(inside))
                )
                inside[key], inside[other] = inside[other], inside[key]
            elif kind == "wrap":
                inside[key] = draw.choice([[x], {"x": x}, (x, x)])
            elif kind == "near" and isinstance(x, torch.Tensor):
                inside[key] = draw.choice(odd_tensors(x, draw))
            elif kind == "near" and isinstance(x, (int, float)):
                inside[key] = draw.choice(
                    [x + 1, x - 1, -x, x * 1000, float(x) if abs(x) < 1e9 else x, str(x), bool(x)]
                )
            elif kind == "near" and isinstance(x, str):
                inside[key] = draw.choice([x + "\n", x[:-1], x * 200, x.upper()])
            else:
                inside[key] = draw.choice(VALUES)

        value = replaced(value, at, change)
        if not value:
            return value
    return value


def damaged_text(text: str, draw: random.Random) -> bytes:
    """A text of JSON objects, one a line or one in all: changed as an object, or byte by byte."""
    lines = text.splitlines(keepends=True)
    one = len(lines) > 1 and text[:2] == "{\n"
    row = draw.randrange(len(lines))
    kind = draw.choice(
        ["object"] * 6 + ["cut", "byte", "twice", "bytes", "deep", "digits", "lines"]
    )
    if kind == "object":
        whole = json.loads(text if one else lines[row])
        try:
            new = json.dumps(damaged(whole, draw), default=str, skipkeys=True)
        except ValueError:  # more digits than Python writes
            new = "9" * 5000
        return (new if one else "".join([*lines[:row], new + "\n", *lines[row + 1 :]])).encode(
            errors="surrogatepass"
        )
    raw = text.encode()
    at = draw.randrange(len(raw))
    return {
        "cut": raw[:at],
        "byte": raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :],
        "twice": (
            text.replace(
                "{", '{"kind": "step", "kind": "epoch", "args": {}, "args": {}, ', 1
            ).encode()
        ),
        "bytes": raw[:at] + b"\xff\x00\x1b" + raw[at:],
        "deep": b"[" * 100_000 + b"\n",
        "digits": text.replace("1", "9" * 5000, 1).encode(),
        "lines": "".join(draw.sample(lines, len(lines))).encode(),
    }[kind]


# ---- whole files, and who reads them -------------------------------------------------------------


class Place:
    """A run with a round of mining, a probe, features and results, made once by the scripts; what
    is in their files.
    """

    def __init__(self, folder: Path):
        self.folder, self.run = folder, folder / "run"
        photos(folder / "flat", M)
        for split in ("train", "val"):
            for i, path in enumerate(sorted((folder / "flat" / "train").iterdir())):
                target = folder / "labelled" / split / "ab"[i % 2] / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        before, let_through = (gan_training.collapse, gan_miner.collapse), lambda *_: ""
        gan_training.collapse = gan_miner.collapse = let_through
        try:
            assert (
                quietly(
                    main_moco_isl.main,
                    [str(folder / "labelled"), *FLAGS, "--amp", "off", "--out", str(self.run)],
                )
                == 0
            )
        finally:
            gan_training.collapse, gan_miner.collapse = before
        last = self.run / "checkpoint_last.pth.tar"
        self.content = checkpoint.load(last)
        # a CPU takes a second for a step in half precision: what that leaves is put in here
        self.content["args"]["amp"], self.content["isl"]["scaler"] = (
            "fp16",
            torch.amp.GradScaler("cpu").state_dict(),
        )
        assert (
            self.content["isl"]["miner"]["networks"]
            and self.content["isl"]["scaler"]
            and self.content["isl"]["step"] == 1
        )
        self.record = checkpoint.load(self.run / "rounds" / "round_0001.pt")
        self.probing = [
            str(folder / "labelled"),
            *f"--pretrained {last} --image-size 16 -b 8 -j 0 --device cpu --epochs 2 --lr 1 3"
            " --holdout 2 --seed 1".split(),
        ]
        assert quietly(main_lincls.main, [*self.probing, "--out", str(folder / "probe")]) == 0
        self.probe = checkpoint.load(folder / "probe" / "checkpoint_last.pth.tar")
        self.results = (folder / "probe" / "results.json").read_text()
        self.labels = torch.arange(M) % 2
        rows = {"output": unit(M, 4, 0), "backbone": unit(M, 6, 1)}
        self.splits = {
            f"{split}.{layer}": x
            for split in ("train", "val")
            for layer, x in {**rows, "labels": self.labels}.items()
        }


def quietly(function, *args):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args)


@contextlib.contextmanager
def in_place_of_files(content):
    """checkpoint.load gives this content, whatever is asked for."""
    before, checkpoint.load = checkpoint.load, lambda path, **options: content
    try:
        if not isinstance(content, dict):
            raise BadInput("not a dict: `checkpoint.load` refuses it")
        yield
    finally:
        checkpoint.load = before


def read_resume(place: Place, draw: random.Random) -> None:
    flag = draw.choice(["--resume", "--resume", "--resume", "--init"])
    argv = [
        str(place.folder / "labelled"),
        *FLAGS,
        "--max-steps",
        "8",
        "--out",
        str(place.folder / "new"),
        flag,
        str(place.run / "checkpoint_last.pth.tar"),
    ]
    content = damaged(place.content, draw)
    with in_place_of_files(content):
        args = main_moco_isl.get_parser().parse_args(argv)
        start, taken, _ = pretraining.check_start(args)
        resume.finished(start, taken, args.epochs, args.max_steps)
        images, model = pretraining.prepare(args, start, taken)
        checkpoint.load_model(model, content, start.path)
        optimizer = fast.sgd(model.parameters(), 0.1, 0.9, 1e-4, False)
        isl = ISL(model, M)
        parts = resume.Parts(
            model,
            optimizer,
            torch.amp.GradScaler("cpu"),
            isl,
            pretraining.build_miner(args, None),
            resume.images_of(images.train),
            engine.Position(),
        )
        if flag == "--resume" and "isl" in content:
            parts.restore(content, torch.device("cpu"))
            everyone = torch.arange(M)
            positives, weight = isl.positives.lookup(everyone, 4)
            isl.bank.lookup(positives)
            isl.slots.absent(positives, weight > 0)
        elif flag == "--init":
            pretrain.initialise(parts, content, args.dataset, None)
        elif flag == "--resume" and "optimizer" in content:
            fast.load_optimizer(optimizer, content["optimizer"])


def read_probe(place: Place, draw: random.Random) -> None:
    content = damaged(place.probe, draw)
    with in_place_of_files(content):
        flags = argparse.Namespace(out="new", evaluate=True, resume="x")
        resumed = main_lincls.find_start(flags)
        taken = resumed.content
        trained = probe.Probe(
            build_encoder("digits", 10),
            ["backbone"],
            lrs=[1.0, 3.0],
            classes=2,
            size=16,
            device=torch.device("cpu"),
            amp=None,
            momentum=0.9,
            weight_decay=0.0,
            reading={},
        )
        if resumed.is_ours:
            probing.require_origin(resumed, place.probe["probe"], file="", images="")
            probing.require_probe(taken, "x", trained.model, trained.parameters(), M - 2)
            trained.model.load_state_dict(taken["probe"]["model"])
            resume.restore_rng(
                taken["probe"]["rng"], torch.device("cpu"), probing.engine.Position().averages
            )
        else:
            state.require_optimizer(
                taken["optimizer"] if "optimizer" in taken else {"state": {}, "param_groups": []},
                "x",
                trained.parameters(),
            )
        if "optimizer" in taken:
            fast.load_optimizer(trained.optimizer, taken["optimizer"])


def read_backbone(place: Place, draw: random.Random) -> None:
    content = damaged(draw.choice([place.content, place.probe, place.content["state_dict"]]), draw)
    with in_place_of_files(content):
        encoder, info = load_backbone(
            place.run / "checkpoint_last.pth.tar", key_encoder=draw.random() < 0.2
        )
        encoder(torch.zeros(2, 3, 16, 16))
        one_line(describe(info))
        for line in mismatches(
            {**info, "args": {**info["args"], "image_size": 16}}, dataset="digits", side=16
        ):
            one_line(line)


def read_features(place: Place, draw: random.Random) -> None:
    path = place.folder / "kept.safetensors"
    tensors = {
        str(n): t.contiguous() for n, t in damaged(place.splits, draw).items() if storable(t)
    }
    save_file(
        {n: t.clone() for n, t in tensors.items()},
        path,
        metadata={"data": "a\nb"} if draw.random() < 0.5 else None,
    )
    if draw.random() < 0.3:
        raw = path.read_bytes()
        path.write_bytes(
            raw[: draw.randrange(len(raw))]
            if draw.random() < 0.5
            else bytes(b ^ (draw.random() < 0.01) for b in raw)
        )
    splits, _ = features.load(path, {}, torch.device("cpu"))
    for split in splits.values():
        for layer, x in split.features.items():
            assert (
                (x @ splits["train"].features[layer].T).isfinite().all()
                and len(x) == len(split.labels)
                and split.labels.min() >= 0
            )


def storable(x) -> bool:
    return (
        isinstance(x, torch.Tensor)
        and x.layout == torch.strided
        and not (x.is_meta or x.is_quantized)
        and 0 < x.numel() < 10**6
    )


def read_record(place: Place, draw: random.Random) -> None:
    content = damaged(place.record, draw)
    with in_place_of_files(content):
        round_ = runs.Round(
            {"round": 1, "epoch": 1, "mean_size": 1.0, "coverage": 0.5},
            place.run / "rounds" / "round_0001.pt",
            M,
        )
        sections.mined(round_, place.labels, 2)
        grids.choose(round_.load(), place.labels)


def read_a_run(place: Place, draw: random.Random) -> None:
    folder = place.folder / "read"
    (folder / "rounds").mkdir(parents=True, exist_ok=True)
    which = draw.choice(["metrics.jsonl", "metrics.jsonl", "args.json"])
    for name in ("metrics.jsonl", "args.json"):
        text = (place.run / name).read_text()
        (folder / name).write_bytes(damaged_text(text, draw) if name == which else text.encode())
    for value in {
        **launch_report.progress(str(folder)),
        **launch_report.last_round(str(folder)),
    }.values():
        assert value is None or isinstance(value, (int, float)) and not isinstance(value, bool)
    run = runs.read_run(folder, "read")
    one_line(verdict.judge(run, [run]).text)
    page._facts(run), page._row(run)
    (
        sections.training_charts(run),
        sections.mining_charts(run, []),
        sections.compared_training([run]),
    )


def read_results(place: Place, draw: random.Random) -> None:
    (place.folder / "results.json").write_bytes(damaged_text(place.results, draw))
    tables.results("lincls", place.folder)
    run = runs.Run(place.folder, "run", {}, {}, [], [{}], [])
    assert all(0 <= accuracy <= 100 for accuracy in outcome.reached(run).values())
    found = read_figures(place.folder / "results.json")
    max((row["top1"] for row in found.get("results", found.get("classifiers", []))), default=0)


def read_breakeven(place: Place, draw: random.Random) -> None:
    path = place.folder / "breakeven.json"
    path.write_bytes(damaged_text('{"meanlog": {"5": 0.84, "20": 0.8}, "logsum": 0.7}\n', draw))
    table = verdict.read_breakeven(path)
    for form in ("meanlog", "logsum"):
        assert 0 <= (verdict.breakeven_of(table, form, 3) or 0) <= 1


# ---- whole scripts -------------------------------------------------------------------------------


def said(main, *argv) -> str:
    """What a script says on stderr of bad input."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        assert main([str(x) for x in argv]) == 2
    one_line(err.getvalue().removesuffix("\n"))
    return err.getvalue()


def test_the_report_names_the_file_and_the_place_in_it(place, tmp_path):
    shutil.copytree(place.run, tmp_path / "run")
    for change, words in [
        ({"members": place.record["members"] + M}, "members holds"),
        ({"cosine": place.record["cosine"][:-1]}, "cosine is a tensor of float16"),
        ({"offsets": place.record["offsets"].flip(0)}, "it is damaged: expected offsets that rise"),
    ]:
        checkpoint.save({**place.record, **change}, tmp_path / "run" / "rounds" / "round_0001.pt")
        text = said(report_main, tmp_path / "run", "--labels")
        assert f"cannot read the round in '{tmp_path}/run/rounds/round_0001.pt': {words}" in text
    lines = (place.run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for line, words in [
        (
            '{"kind": "round", "epoch": 1, "round": "../x", "mean_size": 1, "coverage": 1}',
            "round is '../x': expected a whole number",
        ),
        ("\x00", "Expecting value"),
        ("[]", "it is []: expected names with values"),
        (
            '{"kind": "step", "epoch": 1, "step": true, "lr": 1, "loss": 2}',
            "step is True: expected a whole number",
        ),
        ('{"kind": "step", "kind": "epoch"}', "'kind' stands twice"),
        (
            '{"kind": "epoch", "epoch": 1, "loss": 1e999, "knn": ' + "9" * 5000 + "}",
            "Exceeds the limit",
        ),
    ]:
        (tmp_path / "run" / "metrics.jsonl").write_text(lines[0] + line + "\n")
        assert f"metrics.jsonl', line 2: {words}" in said(report_main, tmp_path / "run"), line
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"\xff\n")
    assert "is not UTF-8 text" in said(report_main, tmp_path / "run")


def test_two_runs_of_other_images_are_not_laid_over_each_other(place, tmp_path):
    shutil.copytree(place.run, tmp_path / "run")
    fewer = {
        name: x[: M - 1] if name in ("features", "ranked", "score") else x
        for name, x in place.record.items()
    }
    fewer |= {
        "ranked": fewer["ranked"].clamp(max=M - 2),
        "offsets": torch.zeros(M, dtype=torch.int64),
        **{name: place.record[name][:0] for name in ("members", "sureness", "cosine")},
    }
    for path in (tmp_path / "run" / "rounds").iterdir():
        checkpoint.save(fewer, path)
    assert f"mined {M - 1} images, and another run of the same data {M}" in said(
        report_main, place.run, tmp_path / "run", "--out", tmp_path / "x.html"
    )


def test_a_probe_names_what_is_wrong_with_its_file(place, tmp_path):
    argv, path = [*place.probing, "--epochs", "3"], tmp_path / "checkpoint_last.pth.tar"
    for change, words in [
        (
            {"probe": {**place.probe["probe"], "step": 99}},
            "probe.step is 99: expected a whole number from 0 to 5",
        ),
        (
            {"probe": {**place.probe["probe"], "best": {"x": 101.0}}},
            "probe.best.x is 101.0: expected a number from 0 to 100",
        ),
        ({"args": {**place.probe["args"], "lr": "1"}}, "lr is '1': expected a list"),
        ({"args": {}}, "it has no 'lr'"),
        (
            {"optimizer": {"state": {}, "param_groups": []}},
            "it is for other parameters (none): expected 2 + 2",
        ),
        ({"epoch": -1}, "epoch is -1: expected a whole number from 0"),
        ({"epoch": 3}, "epoch is 3, and its own --epochs are 2"),
    ]:
        checkpoint.save({**place.probe, **change}, path)
        assert words in said(
            main_lincls.main, *argv, "--resume", path, "--out", tmp_path / "new"
        ), words
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("script", ["main_knn", "export"])
def test_weights_of_another_kind_are_not_used(place, tmp_path, script):
    path = tmp_path / "x.pth"
    for name, value, words in [
        (
            "encoder_q.conv1.0.weight",
            torch.ones(32, 3, 3, 3, dtype=torch.int64),
            "conv1.0.weight is a tensor of int64 [32, 3, 3, 3]: expected a tensor of floats",
        ),
        ("encoder_q.conv1.0.weight", torch.ones(32, 3, 3, 3).to("meta"), "without its numbers"),
        (
            "encoder_q.conv1.1.running_var",
            -torch.ones(32),
            "conv1.1.running_var holds -1: expected at least 0",
        ),
    ]:
        torch.save(
            {
                **place.content,
                "state_dict": {**place.content["state_dict"], f"module.{name}": value},
            },
            path,
        )
        if script == "export":
            text = said(
                export_main, path, "--to", "safetensors", "--out", tmp_path / "out.safetensors"
            )
        else:
            text = said(
                main_knn.main,
                place.folder / "labelled",
                "--pretrained",
                path,
                "-j",
                0,
                "--device",
                "cpu",
            )
        assert words in text


@pytest.mark.parametrize(
    "miner", ["knn", "gan", "entropy", "diffusion", "cluster", "average", "oracle"]
)
def test_one_image_is_refused_whatever_the_miner(place, tmp_path, miner):
    images = place.folder / "labelled" / "train"
    shutil.copytree(
        images,
        tmp_path / "one" / "train",
        ignore=lambda _, names: [n for n in names if n not in ("a", "00.jpg")],
    )
    flags = [
        *BASE,
        "--miner",
        miner,
        *(["--research-labels"] if miner == "oracle" else []),
        "-b",
        2,
        "--out",
        tmp_path / "new",
    ]
    said(main_moco_isl.main, tmp_path / "one", *flags)
    shutil.copy(images / "b" / "01.jpg", tmp_path / "one" / "train" / "a")
    said(main_moco_isl.main, tmp_path / "one", *flags, "--knn-holdout", 1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "flags",
    [
        f"--objective bank {' '.join(GAN)}",
        "--objective rotnet --miner none",
        "--objective deepcluster --miner none",
        "--symmetric --miner cluster --isl-half-bank --moco-k 32",
        "--miner oracle --research-labels --oracle-size 2 --momentum 0",
        "--miner entropy",
    ],
)
def test_what_a_run_saves_it_can_go_on_from(place, tmp_path, flags):
    """After a round and in the middle of an epoch: the shapes are those of what is written,
    whatever the run keeps.
    """
    argv = [
        str(place.folder / "labelled"),
        *BASE,
        "--amp",
        "off",
        *flags.split(),
        "--out",
        str(tmp_path),
    ]
    for steps in (4, 5):
        assert (
            quietly(main_moco_isl.main, [*argv, "--max-steps", str(steps), "--resume", "auto"]) == 0
        )
    assert checkpoint.load(tmp_path / "checkpoint_last.pth.tar")["isl"]["total"] == 5


def test_a_miner_that_keeps_a_state_says_its_shape():
    kinds = {NoMiner, *subclasses(RoundMiner)}
    kinds = {kind for kind in kinds if kind.__module__.startswith("moco_isl.")}
    assert {EntropyMiner, GANMiner, OracleMiner} <= kinds
    assert [
        kind for kind in kinds if ("state_dict" in vars(kind)) != ("state_shape" in vars(kind))
    ] == []


def subclasses(kind: type) -> set[type]:
    return {one for below in kind.__subclasses__() for one in {below, *subclasses(below)}}


def test_rates_are_the_flags_and_not_the_files(place):
    """A file of MoCo's may name its parameters by any numbers; what it says of rates is not taken
    over.
    """
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = fast.sgd([parameter], 0.5, 0.9, 1e-4, False)
    saved = {
        "state": {139: {"momentum_buffer": torch.arange(3.0)}},
        "param_groups": [{"params": [139], "lr": "x", "momentum": -1, "nesterov": True}],
    }
    state.require_optimizer(saved, "x", [[parameter]])
    fast.load_optimizer(optimizer, saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.5, 0.9, False)
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == [0, 1, 2]


READERS = [
    read_resume,
    read_probe,
    read_backbone,
    read_features,
    read_record,
    read_a_run,
    read_results,
    read_breakeven,
]


def one_line(text: str) -> None:
    assert text.isprintable() and len(text) < 1500, text


def plotted(title, lines, *_, **__):
    """What matplotlib would ask of a chart's lines."""
    for line in lines:
        assert len(line.x) == len(line.y) and all(
            y is None or abs(y) <= 1e100 or not math.isfinite(y) for y in line.y
        )


def try_all(reader, place: Place, seed: int, tries: int = TRIES) -> int:
    """Read so many damaged files; how many were refused."""
    before, sections.line_chart, refused = sections.line_chart, plotted, 0
    try:
        for number in range(tries):
            try:
                quietly(reader, place, random.Random(f"{seed} {number}"))
            except BadInput as error:
                refused += 1
                one_line(str(error))
            except Exception as error:
                raise AssertionError(
                    f"{reader.__name__}, seed {seed}, try {number}: {type(error).__name__}: {error}"
                ) from error
    finally:
        sections.line_chart = before
    return refused


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("damaged"))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_in_a_line_or_can_be_used(place, reader):
    assert TRIES // 4 < try_all(reader, place, seed=0) < TRIES


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--reader", default="")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        whole = Place(Path(folder))
        for one in READERS:
            if flags.reader in one.__name__:
                for seed in range(flags.first, flags.first + flags.seeds):
                    try:
                        print(one.__name__, seed, try_all(one, whole, seed), flush=True)
                    except AssertionError as error:
                        print("FAILED", str(error)[:300], flush=True)
