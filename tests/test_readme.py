"""README: its size, its commands and Python run on tiny data, its figures and defaults are true."""

import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import torch

import main_moco_isl
from moco_isl import data
from moco_isl.encoders import extract_features
from moco_isl.evaluation.knn import weighted_knn
from studies import readme_picture as result
from tests.runs import photos

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NOT_RUN = {"pip install '.[report,embed]'": "an installation; tests/test_installed.py tries one"}
SMALLER = {  # what is written -> what is run; -j 0: no worker that imports torch again
    "--out runs/moco\n": "--epochs 1 -j 0 --out runs/moco\n",
    "--lr 0.01": "--lr 0.01 --epochs 1 -j 0",
    "main_knn.py photos": "main_knn.py photos -j 0",
}
NUMBERS = 10  # measured ones, which README prints bold


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def section(title):
    return re.search(rf"^## {title}.*?\n(.*?)(?=^## )", README, re.M | re.S)[1]


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 100
    assert len(README.split()) <= 1500


def test_lists_have_their_length():
    highlights = re.findall(r"^- (.*(?:\n  .*)*)", section("Highlights"), re.M)
    assert len(highlights) == 8 and all(len(line.split()) <= 12 for line in highlights)
    assert len(re.findall(r"^\d\. ", section("When mining helps"), re.M)) == 5
    (python,) = blocks("python")
    assert len(python.splitlines()) <= 25


def test_flags_have_the_defaults_of_the_parser():
    parser = main_moco_isl.get_parser()
    defaults = vars(parser.parse_args(["--miner", "average"])) | vars(parser.parse_args([]))
    rows = re.findall(r"^\| `(--\S+)` \| (\S+) \|", section("Ten flags"), re.M)
    assert len(rows) == 10
    for flag, said in rows:
        default = defaults[parser._option_string_actions[flag].dest]
        if isinstance(default, list):
            (default,) = default
        texts = {None: "none", "": "none", False: "off", 5.0: "5"}
        assert texts.get(default, str(default)) == said, flag


def test_figures_are_those_of_the_results():
    found = {row["row"]: row for row in result.rows("gain-digits")}[result.SURE]
    rows = result.rows("breakeven-digits-right-near")
    breakevens = sorted(row["knn"].split()[0] for row in rows)
    bold = re.findall(r"\*\*([-+]?\d.*?)\*\*", README)
    assert len(bold) <= NUMBERS
    assert bold[:4] == [
        found["gain_one_shot"],
        found["gain_knn"],
        breakevens[0],
        breakevens[-1],
    ]


def test_python_runs(capsys):
    """The loop as it stands: it mines from a trained encoder, and teaches more than it starts with.

    An encoder that has taken no step has a kNN of 0.79 here.
    """
    torch.manual_seed(0)
    (python,) = blocks("python")
    given = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as isl.mine warns of an encoder without training
        exec(python, given)
    isl, model, train = given["isl"], given["model"], given["images"]
    assert isl.round == 1 and isl.positives.mean_size > 4
    assert capsys.readouterr().out.startswith("Round 1 by average: 5.0 positives an image; ")

    def features(dataset):
        crops = data.get_eval_transform("digits")
        loader = data.eval_loader(dataset, transform=crops, batch_size=256)
        return extract_features(model.encoder_k, loader, len(dataset), "cpu")

    val = data.build_dataset("digits", split="val")
    found = weighted_knn(features(val), features(train), train.labels, k=20, T=0.07)
    assert (found == val.labels).float().mean() > 0.83


def place(folder):
    """A folder in which the commands start as in a checkout, with a few photos of two classes."""
    for name in ("main_moco_isl.py", "main_knn.py", "launch"):
        (folder / name).symlink_to(ROOT / name)
    for split, n in (("train", 6), ("val", 2)):
        for kind in ("cat", "dog"):
            photos(folder / kind / split, n)
            target = folder / "photos" / split / kind
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / kind / split / "train").rename(target)


def run(command, monkeypatch):
    """A command in this process, which has torch imported already; its exit code."""
    start, *rest = shlex.split(command)
    assert start == "python"
    by = runpy.run_path
    if rest[0] == "-m":
        by = runpy.run_module
        del rest[0]
        monkeypatch.delitem(sys.modules, f"{rest[0]}.__main__", raising=False)  # imported by tests
    monkeypatch.setattr(sys, "argv", rest)
    with pytest.raises(SystemExit) as end:
        by(rest[0], run_name="__main__")
    return end.value.code


def test_commands_run(tmp_path, monkeypatch, capsys):
    place(tmp_path)
    monkeypatch.chdir(tmp_path)
    ran = [block for block in blocks("bash") if block.strip() not in NOT_RUN]
    assert ran
    for block in ran:
        for written, smaller in SMALLER.items():
            assert written in block
            block = block.replace(written, smaller)
        for command in block.replace("\\\n", "").splitlines():
            assert run(command, monkeypatch) in (0, None), capsys.readouterr()
    assert (tmp_path / "runs" / "moco" / "report.html").exists()
    said = capsys.readouterr().out
    assert "average:" in said and "backbone" in said
