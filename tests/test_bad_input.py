"""Everything a user can get wrong, and what goes wrong under way.

Each ends with one line that says what is wrong, what was expected and what to do, and with its exit
code. `python -m tests.test_bad_input` writes docs/bad_input.md, the list of them, to which the
tests hold what the script says.
"""

import contextlib
import io
import itertools
import os
import pickle
import re
import shutil
import signal
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import main_moco_isl
from moco_isl import builder
from moco_isl.data import folders
from moco_isl.encoders import build_encoder
from moco_isl.run import checkpoint
from moco_isl.run.folder import RunFolder
from moco_isl.training import engine
from tests.runs import DIGITS, SERVER, Running, photos

LIST = Path(__file__).parent.parent / "docs" / "bad_input.md"
SMALL = DIGITS[2:]  # without the data set
RUN = [*DIGITS, "--epochs", "2"]
OUT = ["--out", "new"]
ORACLE = ["--miner", "oracle", "--research-labels"]
PHOTOS = [
    "--image-size",
    "16",
    *"-a digits --mlp --moco-dim 16 --moco-k 16 -b 2 -j 0 --seed 1 --device cpu --epochs 1".split(),
]


class Evil:
    """What would make a file if somebody unpickled it."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def make_place() -> None:
    """The current folder becomes one in which everything that can be wrong is there."""
    main_moco_isl.main([*RUN, "--out", "run", "--seed", "1"])
    main_moco_isl.main([*RUN, "--out", "busy", "--max-steps", "3"])
    photos(Path("photos"), 6)
    photos(Path("one"), 1)
    for folder in ("empty", "only_val/val/a", "unreadable"):
        Path(folder).mkdir(parents=True)
    for folder in ("splits/Training", "splits/Testing", "twice/train/cat"):
        shutil.copytree("photos/train", folder)
    Path("twice/train/kitty").symlink_to("cat")
    for name in ("text.txt", "text.tar", "text.tar.gz", "text.parquet"):
        Path(name).write_text("not a checkpoint\n")
    Path("list.txt").write_text("photos/train/00.jpg\nphotos/gone.jpg\n")
    Path("table.csv").write_text("id,label\n1,cat\n")
    Path("unreadable/a.jpg").write_text("no image")
    Path("nothing.pth").touch()
    for folder in ("bert", "settings"):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text('{"model_type": "bert"}')
    torch.save({"word.weight": torch.zeros(3, 4)}, "bert/pytorch_model.bin")
    os.mkfifo("pipe")
    Path("pickle.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"state_dict": Evil()}, "code.pth")
    whole = Path("run/checkpoint_last.pth.tar").read_bytes()
    Path("cut.pth").write_bytes(whole[: len(whole) // 2])
    Path("damaged.pth").write_bytes(whole[:9999] + bytes([whole[9999] ^ 1]) + whole[10_000:])
    for folder in ("gone", "begun", "theirs"):
        shutil.copytree("run", folder, ignore=shutil.ignore_patterns("checkpoint_*"))
    first = Path("begun/metrics.jsonl").read_text().splitlines(keepends=True)[0]
    Path("begun/metrics.jsonl").write_text(first)
    Path("begun/.lock").write_text("")  # as if nothing had been saved yet
    Path("theirs/metrics.jsonl").unlink()
    Path("theirs/args.json").write_text("{}")
    torch.save(torch.zeros(3), "tensor.pth")
    checkpoint.save(
        {
            "epoch": 1,
            "arch": "digits",
            "state_dict": {},
            "args": {},
            "probe": {"epoch": 1, "step": 0, "total": 3, "metrics_size": 0},
        },
        "probe.pth",
    )
    torch.save({"state_dict": torch.nn.Conv2d(3, 4, 3).state_dict()}, "bare.pth")
    damage_states(Path("run/checkpoint_0000.pth.tar"))
    other = builder.MoCo(
        lambda num_classes: build_encoder("resnet18w16", num_classes, "cifar"), 16, 128, mlp=True
    )
    checkpoint.save(
        {"epoch": 1, "arch": "resnet18w16", "state_dict": checkpoint.model_state(other)},
        "resnet.pth",
    )
    for name, text in {
        "unknown": "lerning-rate: 1",
        "list": "- a",
        "broken": "a: b: c",
        "switch": "cos: very",
        "choice": "miner: gam",
        "aliases": "arch: &a digits\nout: *a",
        "twice": "lr: 1\nlr: 2",
    }.items():
        Path(f"{name}.yaml").write_text(text)


def damage_states(whole: Path) -> None:
    """Files like a run's, each with one thing in it that is wrong; and a folder whose metrics are
    not those of its checkpoint.
    """

    def save(name: str, at: str, value) -> None:
        content = inside = checkpoint.load(whole)
        *way, last = at.split("/")
        for key in way:
            inside = inside[key]
        inside.pop(last) if value is None else inside.update({last: value})
        checkpoint.save(content, f"{name}.pth")

    save("no_bank", "isl/state/bank", None)
    save("no_flags", "args", None)
    save("odd_flag", "args/seed", "one")
    save("far", "isl/step", 999)
    save("no_state", "isl/rng", [])
    save("pointer", "state_dict/module.queue_ptr", torch.tensor([128]))
    save("whole", "state_dict/module.encoder_q.fc.2.bias", torch.zeros(16, dtype=torch.int64))
    save("nan", "state_dict/module.encoder_q.fc.2.bias", torch.full((16,), torch.nan))
    save("momentum", "optimizer/param_groups", [{"params": [0]}])
    save("owner", "isl/state/slots/owner", torch.full((128,), 437))
    shutil.copytree("run", "mixed")
    save("mixed", "isl/metrics_size", 0)
    for name in ("checkpoint_0001.pth.tar", "checkpoint_0000.pth.tar"):
        Path("mixed", name).unlink()
    Path("mixed.pth").replace("mixed/checkpoint_last.pth.tar")


DATA = [
    ("no data set named", [*SMALL, *OUT]),
    ("an empty text", ["", *SMALL, *OUT]),
    ("no such folder", ["nowhere", *SMALL, *OUT]),
    ("a file for a folder", ["pickle.pth", *SMALL, *OUT]),
    ("a folder without images", ["empty", *SMALL, *OUT]),
    ("a folder of which no image can be read", ["unreadable", *SMALL, *OUT, "--knn-holdout", "0"]),
    ("val/ without train/", ["only_val", *SMALL, *OUT]),
    ("splits in place of classes", ["splits", *SMALL, *OUT]),
    ("a class that is a link to another", ["twice", *SMALL, *OUT]),
    ("a list of images that are not there", ["list.txt", *SMALL, *OUT]),
    ("a table without a column of paths", ["table.csv", *SMALL, *OUT]),
    ("a tar that is none", ["text.tar", *SMALL, *OUT]),
    ("a compressed tar", ["text.tar.gz", *SMALL, *OUT]),
    ("a stream", ["s3://bucket/train.tar", *SMALL, *OUT]),
    ("a table of parquet that is none", ["text.parquet", *SMALL, *OUT]),
    ("two data sets", ["photos", *RUN, *OUT]),
    ("a folder twice", ["photos", *SMALL, *OUT, "photos"]),
    ("an unknown data set", [*SMALL, "--dataset", "digit", *OUT]),
    ("a torchvision set that is not there", ["empty", *SMALL, "--dataset", "cifar10", *OUT]),
    ("nothing to download", [*RUN, *OUT, "--download"]),
    ("a cache for images that need no decoding", [*RUN, *OUT, "--cache", "cache"]),
    ("a cache that is a file", ["photos", *PHOTOS, *OUT, "--cache", "text.txt"]),
    ("a cache in a file", ["photos", *PHOTOS, *OUT, "--cache", "text.txt/cache"]),
    ("photos of other channels", ["photos", *PHOTOS, *OUT, "--channels", "4"]),
    ("images in memory of other channels", [*RUN, *OUT, "--channels", "4"]),
    ("bits that no image has", [*RUN, *OUT, "--bits", "12"]),
    ("a mean without its std", [*RUN, *OUT, "--mean", "0.5", "0.5", "0.5"]),
    ("a mean of other channels", [*RUN, *OUT, "--mean", "0.5", "--std", "0.2"]),
    ("one image, and a miner", ["one", *PHOTOS, *OUT, "--miner", "knn"]),
    (
        "one image left, and a miner",
        ["photos", *PHOTOS, *OUT, "--miner", "knn", "--knn-holdout", "5"],
    ),
    ("all images held out", [*RUN, *OUT, "--knn-holdout", "1437"]),
]
NUMBERS = [
    (f"{flag} {value}", [*RUN, *OUT, flag, value])
    for flag, value in [
        ("--epochs", "0"),
        ("--epochs", "ten"),
        ("--epochs", "1.5"),
        ("-b", "0"),
        ("-b", "-64"),
        ("--lr", "-1"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--lr", "fast"),
        ("--wd", "-1"),
        ("--momentum", "2"),
        ("--moco-t", "0"),
        ("--moco-m", "1.5"),
        ("--moco-k", "0"),
        ("--moco-dim", "0"),
        ("--bn-splits", "0"),
        ("--workers", "-1"),
        ("-p", "0"),
        ("--keep", "0"),
        ("--image-size", "5000"),
        ("--max-bad-images", "-1"),
        ("--save-every", "-1"),
        ("--save-epochs", "0"),
        ("--isl-budget", "0"),
        ("--isl-max-share", "2"),
        ("--isl-bank-mix", "0"),
        ("--isl-hpe", "-1"),
        ("--isl-every", "0"),
        ("--start-epoch", "2"),
        ("--nproc-per-node", "-1"),
        ("--dist-timeout", "0"),
        ("--schedule", "-3"),
        ("--seed", "99999999999999999999"),
    ]
]
NUMBERS += [
    (f"{flag} {value}", [*RUN, *OUT, *miner, flag, value])
    for miner, flag, value in [
        (["--miner", "gan"], "--isl-threshold", "2"),
        (["--miner", "gan"], "--isl-radius", "-1"),
        (ORACLE, "--oracle-precision", "2"),
        (ORACLE, "--oracle-size", "0"),
    ]
]
TOGETHER = [
    ("splits that do not divide the batch", [*RUN, *OUT, "--bn-splits", "3"]),
    (
        "ranks that do not divide the batch",
        [*RUN, *OUT, "--multiprocessing-distributed", "--nproc-per-node", "3"],
    ),
    (
        "a batch of one image a rank",
        [*RUN, *OUT, "-b", "2", "--multiprocessing-distributed", "--nproc-per-node", "2"],
    ),
    ("a single image", [*RUN, *OUT, "--knn-holdout", "1436"]),
    (
        "a batch larger than what splits leave",
        [*RUN, *OUT, "-b", "2000", "--moco-k", "4000", "--bn-splits", "2000"],
    ),
    ("a queue smaller than the batch", [*RUN, *OUT, "--moco-k", "32"]),
    (
        "a queue smaller than the keys of a symmetric step",
        [*RUN, *OUT, "--moco-k", "64", "--symmetric"],
    ),
    ("symmetric with the bank", [*RUN, *OUT, "--objective", "bank", "--symmetric"]),
    ("a predictor with the bank", [*RUN, *OUT, "--objective", "bank", "--predictor", "8"]),
    (
        "more clusters than images",
        [*RUN, *OUT, "--objective", "deepcluster", "--dc-clusters", "5000"],
    ),
    ("clusters for another objective", [*RUN, *OUT, "--dc-clusters", "10"]),
    ("positives for DeepCluster", [*RUN, *OUT, "--objective", "deepcluster", "--miner", "knn"]),
    ("momentum for AdamW", [*RUN, *OUT, "--optimizer", "adamw", "--momentum", "0.5"]),
    ("a warm-up without an end", [*RUN, *OUT, "--warmup-epochs", "100"]),
    ("patches of a network that has none", [*RUN, *OUT, "--stop-grad-conv1"]),
    (
        "a minimum above the cap",
        [*RUN, *OUT, "--miner", "gan", "--isl-gan-iters", "10", "--isl-gan-min-iters", "20"],
    ),
    ("a flag of another miner", [*RUN, *OUT, "--miner", "knn", "--isl-walk", "3"]),
    ("a miner of nowhere", [*RUN, *OUT, "--miner", "nowhere:Miner"]),
    ("an oracle that was not allowed the labels", [*RUN, *OUT, "--miner", "oracle"]),
    (
        "labels allowed to a miner that needs none",
        [*RUN, *OUT, "--miner", "knn", "--research-labels"],
    ),
    ("a bound that is none", [*RUN, *OUT, "--miner", "knn", "--isl-trust", "sure"]),
    (
        "as wide as is sure, by no estimate",
        [*RUN, *OUT, "--miner", "knn", "--isl-budget", "auto", "--isl-trust", "off"],
    ),
    ("a width beside auto", [*RUN, *OUT, "--miner", "knn", "--isl-budget", "auto", "5"]),
    (
        "sets that stay, of a miner that makes them anew",
        [*RUN, *OUT, "--miner", "entropy", "--isl-keep"],
    ),
    (
        "a bank that holds nothing yet",
        [*RUN, *OUT, *"--objective bank --miner knn --isl-start 0 --isl-from bank".split()],
    ),
    ("LA's loss without a bank", [*RUN, *OUT, "--miner", "cluster", "--isl-loss", "local"]),
    ("crops of the digits, which have their own", [*RUN, *OUT, "--crop-min", "0.1"]),
    ("a background without LA's loss", [*RUN, *OUT, "--isl-background", "10"]),
    ("no list to check by", [*RUN, *OUT, "--miner", "knn", "--isl-check", "nowhere.csv"]),
    (
        "an oracle that is to keep its sets",
        [*RUN, *OUT, *ORACLE, "--isl-keep"],
    ),
    (
        "an oracle by an index",
        [*RUN, *OUT, *ORACLE, "--isl-index", "auto"],
    ),
    (
        "an oracle asked for more than the labels make",
        [*RUN, *OUT, *ORACLE, "--oracle-size", "100"],
    ),
    (
        "an oracle where no image has a label",
        ["photos", *PHOTOS, *OUT, *ORACLE],
    ),
]
FLAGS = [
    ("an unknown flag, nearly right", [*RUN, *OUT, "--epohcs", "3"]),
    ("an unknown flag", [*RUN, *OUT, "--quux=3"]),
    ("a flag without its value", [*RUN, *OUT, "--lr"]),
    ("a value that is no choice", [*RUN, *OUT, "--miner", "gam"]),
    ("an index that is none", [*RUN, *OUT, "--miner", "knn", "--isl-index", "hnsw"]),
    ("an unknown architecture, nearly right", [*RUN, *OUT, "-a", "resnet51"]),
    ("an unknown architecture", [*RUN, *OUT, "-a", "quux"]),
    ("an architecture that only timm has", [*RUN, *OUT, "-a", "resnet10t"]),
    ("an architecture without a linear classifier", [*RUN, *OUT, "-a", "squeezenet1_0"]),
    ("an architecture that is for larger images", [*RUN, *OUT, "-a", "vit_b_32"]),
    ("an unknown timm architecture", [*RUN, *OUT, "-a", "timm:resnet51"]),
    ("no config file", [*RUN, *OUT, "--config", "nowhere.yaml"]),
    ("a config with an unknown name", [*RUN, *OUT, "--config", "unknown.yaml"]),
    ("a config that is a list", [*RUN, *OUT, "--config", "list.yaml"]),
    ("a config that is no YAML", [*RUN, *OUT, "--config", "broken.yaml"]),
    ("a config that is no text", [*RUN, *OUT, "--config", "code.pth"]),
    ("a config with a wrong switch", [*RUN, *OUT, "--config", "switch.yaml"]),
    ("a config with a wrong choice", [*RUN, *OUT, "--config", "choice.yaml"]),
    ("a config with aliases", [*RUN, *OUT, "--config", "aliases.yaml"]),
    ("a config that names a flag twice", [*RUN, *OUT, "--config", "twice.yaml"]),
    (
        "an architecture that images this small cannot pass",
        [*RUN, *OUT, "-a", "alexnet", "--stem", "imagenet"],
    ),
    ("an unknown device", [*RUN, *OUT, "--device", "gpu"]),
    ("a device that torch knows", [*RUN, *OUT, "--device", "meta"]),
    ("processes for one process", [*RUN, *OUT, "--nproc-per-node", "2"]),
    ("nodes without a rank", [*RUN, *OUT, "--world-size", "2"]),
    ("nodes without a place to meet", [*RUN, *OUT, "--world-size", "2", "--rank", "0"]),
]
FILES = [
    (f"--{flag} {what}", [*RUN, *OUT, f"--{flag}", path])
    for flag in ("resume", "init")
    for what, path in [
        ("to nothing", "nowhere.pth"),
        ("to a folder", "photos"),
        ("to an empty folder", "empty"),
        ("to text", "text.txt"),
        ("to a pickle", "pickle.pth"),
        ("to a file with code in it", "code.pth"),
        ("to an empty file", "nothing.pth"),
        ("to half a file", "cut.pth"),
        ("to a tensor", "tensor.pth"),
        ("to bare encoder weights", "bare.pth"),
        ("to another architecture", "resnet.pth"),
        ("to a linear probe", "probe.pth"),
        ("to a file with a bit flipped", "damaged.pth"),
        ("to a pipe", "pipe"),
    ]
] + [
    (
        "another architecture than the file's",
        [*RUN, *OUT, "--init", "run/checkpoint_last.pth.tar", "-a", "resnet18w16"],
    ),
    ("--init to a Hugging Face folder of no image model", [*RUN, *OUT, "--init", "bert"]),
    ("--init to a Hugging Face folder without weights", [*RUN, *OUT, "--init", "settings"]),
    *[
        (f"--{flag} to {what}", [*RUN, *OUT, f"--{flag}", f"{name}.pth"])
        for what, name, flags in [
            ("a state without its bank", "no_bank", ["resume"]),
            ("a file without its flags", "no_flags", ["resume", "init"]),
            ("a flag of another kind", "odd_flag", ["resume"]),
            ("a step past the end of its epoch", "far", ["resume"]),
            ("no state of a generator", "no_state", ["resume"]),
            ("a pointer past the queue", "pointer", ["resume", "init"]),
            ("weights that are whole numbers", "whole", ["resume", "init"]),
            ("weights that are not finite", "nan", ["resume", "init"]),
            ("an optimizer of another network", "momentum", ["resume"]),
            ("a queue of other images", "owner", ["resume"]),
        ]
        for flag in flags
    ],
    ("metrics of another run", [*RUN, "--out", "mixed", "--resume", "auto"]),
    (
        "--resume and --init",
        [
            *RUN,
            *OUT,
            "--resume",
            "run/checkpoint_last.pth.tar",
            "--init",
            "run/checkpoint_last.pth.tar",
        ],
    ),
    ("--resume auto without --out", [*RUN, "--resume", "auto"]),
    (
        "a resumed file with nothing left to do",
        [*RUN, *OUT, "--resume", "run/checkpoint_last.pth.tar"],
    ),
    *[
        (f"resumed with another {what}", [*RUN, "--out", "run", "--resume", "auto", *flags])
        for what, flags in [
            ("architecture", ["-a", "resnet18w16"]),
            ("batch", ["-b", "32"]),
            ("K", ["--moco-k", "256"]),
            ("schedule", ["--schedule", "1"]),
            ("length", ["--epochs", "3"]),
            ("rate, and seed", ["--lr", "0.2", "--seed", "5"]),
            ("hold-out", ["--knn-holdout", "999"]),
        ]
    ],
]
FOLDERS = [
    ("--out holds a run", [*RUN, "--out", "run"]),
    (
        "--out holds another run than the file's",
        [*RUN, "--out", "busy", "--resume", "run/checkpoint_0000.pth.tar"],
    ),
    (
        "the file is older than its run",
        [*RUN, "--out", "run", "--resume", "run/checkpoint_0000.pth.tar"],
    ),
    ("--out is a file", [*RUN, "--out", "text.txt"]),
    ("--out is in a file", [*RUN, "--out", "text.txt/new"]),
    ("--out holds a run whose checkpoints are gone", [*RUN, "--out", "gone", "--resume", "auto"]),
    (
        "--out holds another run, of which nothing was saved yet",
        [*RUN, "--out", "begun", "--resume", "auto", "--seed", "5"],
    ),
    ("--out holds an args.json of somebody else", [*RUN, "--out", "theirs"]),
    ("--out is in use", [*RUN, "--out", "busy", "--resume", "auto"]),
]
CASES = {
    "Data": DATA,
    "Numbers": NUMBERS,
    "Numbers that do not go together": TOGETHER,
    "Flags": FLAGS,
    "Files to start from": FILES,
    "The run's folder": FOLDERS,
}
# in no list: elsewhere it is there
CPU_ONLY = ("a GPU that is not there", [*RUN, *OUT, "--device", "cuda"])


def ask(argv: list[str], stop=None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the main script in this process."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = main_moco_isl.main(argv, stop)
    return code, out.getvalue(), err.getvalue()


def files() -> dict[str, tuple[int, int]]:
    """Everything under the current folder, with size and time."""
    return {
        str(p): ((s := p.lstat()).st_size, s.st_mtime_ns) for p in Path().rglob("*") if p.is_file()
    } | {str(p): (0, 0) for p in Path().rglob("*") if p.is_dir()}


def _hold(folder: str, here: str, ready, done) -> None:
    os.chdir(here)
    held = RunFolder(folder, resume=True)
    ready.set()
    done.wait(60)
    held.close()


@contextlib.contextmanager
def somebody_else_in(folder: str):
    ready, done = SERVER.Event(), SERVER.Event()
    process = SERVER.Process(target=_hold, args=(folder, os.getcwd(), ready, done))
    process.start()
    assert ready.wait(60)
    yield
    done.set()
    process.join()


def answer(what: str, argv: list[str]) -> tuple[int, str, str]:
    with somebody_else_in("busy") if "in use" in what else contextlib.nullcontext():
        return ask(argv)


@contextlib.contextmanager
def a_place():
    """A folder in which everything that can be wrong is there, as the current one.

    There is no pillow-heif: whether it is installed would change messages.
    """
    before = Path.cwd()
    without_heif = mock.patch.object(folders, "ENDINGS", folders.IMG_EXTENSIONS)
    with tempfile.TemporaryDirectory() as folder, without_heif:
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                make_place()
            yield
        finally:
            os.chdir(before)


@pytest.fixture(scope="module")
def place():
    with a_place():
        yield


def shown(argv: list[str]) -> str:
    """Flags without those that are right."""
    given = " ".join(x if x else "''" for x in argv)
    for part, short in ((RUN, "..."), (SMALL, "..."), (OUT, ""), (PHOTOS, "...")):
        given = given.replace(" ".join(part), short)
    return " ".join(given.split())


def _cell(text) -> str:
    return str(text).replace("|", "\\|")


def listed() -> dict[str, list[str]]:
    """docs/bad_input.md as it stands: what -> [flags, exit code, message]."""
    rows = [
        re.split(r" (?<!\\)\| ", line.removeprefix("| ").removesuffix(" |"))
        for line in LIST.read_text().splitlines()
        if line.startswith("| ")
    ]
    return {row[0]: row[1:] for row in rows if row[0] != "what"}


def hold_to_list(what: str, argv: list[str], code: int, err: str) -> None:
    """What was just said is what docs/bad_input.md says of it."""
    assert listed().get(what) == [_cell(x) for x in (f"`{shown(argv)}`", code, err.strip())], (
        "python -m tests.test_bad_input writes the list anew"
    )


@pytest.mark.parametrize(
    "what, argv", [pytest.param(*case, id=case[0]) for case in [*sum(CASES.values(), []), CPU_ONLY]]
)
def test_bad_input_is_one_line_and_leaves_nothing(place, what, argv):
    if what == CPU_ONLY[0] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = files()
    code, out, err = answer(what, argv)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 600, err
    assert "Traceback" not in err and "usage" not in err
    assert all(line.startswith("=> ") for line in out.splitlines()), out
    assert files() == before
    if what != CPU_ONLY[0]:
        hold_to_list(what, argv, code, err)


SAID = {  # what is named: the wrong thing, what was expected, what to do
    "no such folder": "nowhere; expected a folder",
    "splits in place of classes": (
        "'Testing', 'Training', which look like splits, not classes: expected train/ and val/"
    ),
    "a class that is a link to another": "'twice/train/kitty' is a link into the class 'cat'",
    "two data sets": "'photos'",
    "a cache for images that need no decoding": "digits are not read from files: leave it off",
    "a folder twice": "DIR names 'photos' twice",
    "a list of images that are not there": "names 1 of 2 images that are not there",
    "a stream": "has no positions",
    "a cache in a file": "text.txt is a file; expected a folder",
    "a torchvision set that is not there": "--download",
    "--epochs ten": "ten: expected a whole number",
    "--lr nan": "--lr nan is out of range: expected at least 0",
    "--moco-m 1.5": "expected at least 0 and at most 1",
    "splits that do not divide the batch": "--batch-size 64 does not divide into 1 ranks x 3",
    "ranks that do not divide the batch": "--batch-size 64 does not divide into 3 ranks",
    "a batch of one image a rank": (
        "leaves one image to each of 2 ranks, and batch norm needs two: use at least 4"
    ),
    "a single image": (
        "too few images (1) for 1 (ranks x splits): expected at least 2; use more images"
    ),
    "a queue smaller than the batch": "--moco-k 32 is smaller than the 64 keys",
    "a queue smaller than the keys of a symmetric step": "--moco-k 64 is smaller than the 128 keys",
    "more clusters than images": "--dc-clusters 5000 is more than the ",
    "positives for DeepCluster": "--objective deepcluster has no use for positives",
    "a flag of another miner": "--isl-walk is a flag of --miner diffusion, and --miner is knn",
    "an oracle that was not allowed the labels": "add --research-labels",
    "an oracle where no image has a label": "photos has none: expected a folder a class",
    "an unknown flag, nearly right": "--epohcs (did you mean --epochs?)",
    "a value that is no choice": "--miner gam: expected one of none, ",
    "an unknown architecture, nearly right": "resnet50",
    "an architecture that only timm has": "use timm:resnet10t",
    "an architecture without a linear classifier": "squeezenet1_0 ends in no linear classifier",
    "an architecture that is for larger images": "vit_b_32 cannot be built for images of side 16",
    "a config with an unknown name": "lerning-rate",
    "--resume to nothing": "no file at --resume 'nowhere.pth'",
    "--resume to a folder": "'photos' is a folder: expected a checkpoint file",
    "--init to a folder": "neither a run's nor one of Hugging Face with config.json: expected one",
    "--resume to text": "'text.txt': it is a text file; expected a checkpoint",
    "--init to a file with code in it": (
        "it holds a pickled posix.system, and pickles are not executed"
    ),
    "--init to half a file": "cut off or damaged",
    "--resume to another architecture": "(arch resnet18w16) does not fit this model: missing ",
    "another architecture than the file's": "does not fit resnet18w16 with stem auto: ",
    "--init to a Hugging Face folder of no image model": "is of model_type bert: expected timm's",
    "resumed with another architecture": "--arch was 'digits' and is now 'resnet18w16'",
    "resumed with another batch": "--batch-size was 64 and is now 32",
    "resumed with another K": "--moco-k was 128 and is now 256",
    "resumed with another schedule": "--schedule was [120, 160] and is now [1]",
    "resumed with another length": "--epochs was 2 and is now 3",
    "resumed with another rate, and seed": "--lr was 0.1 and is now 0.2, --seed was 1 and is now 5",
    "the file is older than its run": (
        "is older than run/checkpoint_last.pth.tar (epoch 2, 14 steps)"
    ),
    "--out is in use": "in use by a run that is alive",
}


def test_the_messages_name_what_matters():
    rows = listed()
    for what, words in SAID.items():
        assert words in rows[what][2], (what, rows[what][2])
    assert list(rows) == [case[0] for case in [*sum(CASES.values(), []), *UNDERWAY, *KILLED]]


def test_nothing_was_executed(place):
    assert not list(Path().rglob("executed"))
    with open("pickle.pth", "rb") as file:  # the trap is armed
        pickle.load(file)
    assert Path("executed").exists()
    Path("executed").unlink()


# ---- under way -----------------------------------------------------------------------------------

UNDERWAY = [
    ("the loss is not finite", [*RUN, *OUT, "--lr", "1e30", "-p", "1"]),
    ("a truncated image", ["broken", *PHOTOS, *OUT]),
    ("more of them than allowed", ["broken2", *PHOTOS, *OUT, "--max-bad-images", "1"]),
]
KILLED = [
    ("a full disk (here: files may only be so large)", [*RUN, *OUT]),
    (
        "a process that reads images is killed",
        ["photos", *PHOTOS, *OUT, "-j", "1", "--epochs", "1000"],
    ),
    ("one of two ranks is killed", [*RUN, *OUT, "--epochs", "1000"]),
]


def break_photos() -> None:
    for name, numbers in {"broken": (2,), "broken2": (2, 4)}.items():
        if not Path(name).exists():
            photos(Path(name), 6)
            for i in numbers:
                path = Path(name, "train", f"{i:02}.jpg")
                path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("what, argv", [pytest.param(*case, id=case[0]) for case in UNDERWAY])
def test_what_goes_wrong_under_way(place, what, argv):
    break_photos()
    code, _, err = ask(argv)
    assert code == 3 and err.startswith("error: ") and err.count("\n") == 1
    hold_to_list(what, argv, code, err)
    shutil.rmtree("new")


def kill_something(what: str, argv: list[str]) -> tuple[int, str]:
    """(exit code, stderr) of a real process to which this happens; of rank 0 of two, where rank 1
    is killed.
    """
    run = Running(
        argv,
        Path("log"),
        ranks=2 if "ranks" in what else 1,
        largest_file=60_000 if "disk" in what else None,
    )
    if "disk" not in what:
        run.wait_for("Epoch: [0]")
        os.kill(run.children()[0] if "reads" in what else run.processes[1].pid, signal.SIGKILL)
    code, said = run.codes(timeout=60)[0], run.said()
    for path in (Path("log"), Path("new")):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    return code, re.sub(
        r"pid \d+",
        "pid N",
        "".join(line for line in said.splitlines(True) if not re.match("=> |Epoch:", line)),
    )


@pytest.mark.parametrize("what, argv", [pytest.param(*case, id=case[0]) for case in KILLED])
def test_what_ends_a_run_from_outside(place, what, argv):
    code, err = kill_something(what, argv)
    assert code == 3 and err.startswith("error: ") and err.count("\n") == 1, err
    hold_to_list(what, argv, code, err)


def test_the_last_good_file_is_named_and_stays(place, tmp_path, monkeypatch):
    """A loss that turns bad in a run that has saved: the file named is the one to go on from."""
    argv, last = [*RUN, "--out", str(tmp_path)], tmp_path / "checkpoint_last.pth.tar"
    ask([*argv, "--max-steps", "5"])
    good = last.read_bytes()
    views = itertools.count()  # two a step; those of the first are looked at
    with monkeypatch.context() as patched:
        patched.setattr(
            engine, "to_network", lambda image, *_: image * torch.nan if next(views) > 1 else image
        )
        code, _, err = ask([*argv, "--resume", "auto"])
    assert (
        code == 3
        and "not finite at epoch 0, step 6" in err
        and f"the last good file is {last}" in err
    )
    assert last.read_bytes() == good
    content = checkpoint.load(last)
    content["state_dict"]["module.encoder_q.fc.0.weight"].fill_(torch.nan)
    checkpoint.save(content, last)  # as files were saved before that was looked at
    bad = last.read_bytes()
    code, _, err = ask([*argv, "--resume", "auto"])
    assert (
        code == 2
        and f"'{last}': encoder_q.fc.0.weight holds values that are not finite" in err
        and last.read_bytes() == bad
    )


@pytest.mark.parametrize("workers", ["0", "2"])
def test_broken_images_are_named_once_and_skipped(place, tmp_path, workers):
    break_photos()
    code, out, err = ask(
        [
            "broken2",
            *PHOTOS,
            "--epochs",
            "2",
            "--max-bad-images",
            "2",
            "-p",
            "1",
            "-j",
            workers,
            "--out",
            str(tmp_path),
        ]
    )
    assert code == 0 and not err
    named = sorted(line for line in out.splitlines() if "cannot be read" in line)
    assert named == [
        f"=> warning: broken2/train/{i:02}.jpg cannot be read; the next image stands in for it"
        for i in (2, 4)
    ]


def test_images_of_all_kinds_work(tmp_path):
    folder = tmp_path / "kinds" / "train"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20), dtype=np.uint8)
    folder.mkdir(parents=True)
    grey = Image.fromarray(pixels)
    images = {
        "grey": grey,
        "rgba": grey.convert("RGBA"),
        "palette": grey.convert("P"),
        "two_bytes": Image.fromarray(pixels.astype(np.uint16) * 257),
        "one_bit": grey.convert("1"),
    }
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    grey.convert("RGB").save(folder / "rgb.jpg")
    grey.convert("CMYK").save(folder / "cmyk.jpg")
    code, out, err = ask([str(tmp_path / "kinds"), *PHOTOS, "--out", str(tmp_path / "out")])
    assert (code, err) == (0, "") and "cannot be read" not in out and "=> 7 images" in out


def test_a_queue_longer_than_the_data_set_is_only_warned_of(tmp_path):
    code, out, err = ask([*RUN, "--moco-k", "1000", "--max-steps", "1", "--out", str(tmp_path)])
    assert (code, err) == (0, "")
    assert (
        "=> warning: the queue (1000) is longer than the data set (437): 2.3 of its keys are an"
        " image's own; --moco-k 128 would suit it" in out
    )
    code, out, _ = ask(
        [*RUN, "--moco-k", "128", "--max-steps", "1", "--out", str(tmp_path / "suits")]
    )
    assert code == 0 and "longer than the data set" not in out


# ---- the list ------------------------------------------------------------------------------------

HEAD = """# What goes wrong, and what is said

Written by `python -m tests.test_bad_input`, which tries all of it; the tests hold this list to
what the main script says. Bad input ends with exit code 2 before anything is written or started, a
run that fails under way with 3. `...` stands for the flags that are right: a small run on the
digits.
"""


def as_markdown() -> str:
    def row(what: str, argv: list[str]) -> str:
        code, err = (
            kill_something(what, argv) if (what, argv) in KILLED else answer(what, argv)[::2]
        )
        shutil.rmtree("new", ignore_errors=True)
        return f"| {' | '.join(map(_cell, (what, f'`{shown(argv)}`', code, err.strip())))} |"

    break_photos()
    lines = [HEAD]
    for heading, cases in {**CASES, "Under way": [*UNDERWAY, *KILLED]}.items():
        lines += [
            f"## {heading}\n",
            "| what | flags | exit code | message |",
            "|---|---|---|---|",
            *(row(*case) for case in cases),
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    with a_place():
        text = as_markdown()
    LIST.write_text(text)
