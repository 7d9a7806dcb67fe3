"""A miner and a data set from a module of a user's own, through the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import main_knn
import main_lincls
import main_moco_isl
from moco_isl import mine, miners, transfer
from moco_isl.embed import command as embed
from moco_isl.errors import BadInput
from moco_isl.evaluation.detection import command as detection
from moco_isl.options import check_values, flags_of
from tests.runs import differences
from tests.test_bad_input import ask

TOY = '''
from dataclasses import dataclass

import torch

from moco_isl.data import DataSet, ImagesInMemory
from moco_isl.mining.edges import Edges
from moco_isl.mining.rounds import RoundMiner, over_blocks
from moco_isl.ops.neighbors import topk
from moco_isl.options import opt


def read(root, split, download):
    draw = torch.Generator().manual_seed(int(split == "val"))
    labels = torch.arange(60) % 3
    images = torch.randint(0, 80, (60, 3, 16, 16), generator=draw, dtype=torch.uint8)
    images[torch.arange(60), labels] += 150  # each class its own colour
    return ImagesInMemory(images, labels, ["red", "green", "blue"], f"toy/{split}")


toy = DataSet(read, size=16, mean=(0.4, 0.4, 0.4), std=(0.3, 0.3, 0.3), needs_dir=False)


@dataclass(eq=False)
class ToyMiner(RoundMiner):
    """Every image's neighbour at one place of its list."""

    name = "toy"
    place: int = opt(1, "--toy-place", low=1, high=9, help="which of the nearest is taken (1)")

    def find(self, features, positives, seed, tick):
        near = lambda anchors, _: topk(features[anchors], features, self.place, anchors, tick=tick)
        anchors, cosine, images = over_blocks(len(features), features.device, near, tick)
        self.report.extra["place"] = self.place
        return Edges(anchors, images[:, -1], cosine[:, -1]), ""


class Bare:
    pass


class Forgotten(RoundMiner):
    place: int = opt(1, help="nothing makes this class a dataclass")


class Idle(RoundMiner):
    """It has no find."""


class Keeps(ToyMiner):
    def state_dict(self):
        return {"n": 1}


def field(**fields):
    return dataclass(eq=False, kw_only=True)(type("Field", (ToyMiner,), fields))


Taken = field(epochs=opt(7, help="a flag of the run"), __annotations__={"epochs": int})
Short = field(steps=opt(3, "-a", "--steps", help="of --arch"), __annotations__={"steps": int})
Dashless = field(steps=opt(3, "steps", help="no dashes"), __annotations__={"steps": int})
Needs = field(__annotations__={"steps": int})
Strange = field(steps=opt(3, help="?"), __annotations__={"steps": "Nope"})


class Nothing(ToyMiner):
    def find(self, features, positives, seed, tick):
        return None


class Outside(ToyMiner):
    def find(self, features, positives, seed, tick):
        image = torch.arange(len(features))
        return Edges(image, image + 1, torch.ones(len(image))), ""


class Endless(ToyMiner):
    def find(self, features, positives, seed, tick):
        edges, why = super().find(features, positives, seed, tick)
        return Edges(edges.src, edges.dst, edges.sureness / 0), why


def pair(root, split, download):
    return ImagesInMemory(torch.zeros(20, 2, 16, 16, dtype=torch.uint8), None, None, "pair")


def misnamed(root, split, download):
    labels = torch.arange(20)
    return ImagesInMemory(torch.zeros(20, 3, 16, 16, dtype=torch.uint8), labels, ["a"], "misnamed")


def unlabelled(root, split, download):
    return ImagesInMemory(read(root, split, download).images, None, None, "unlabelled")


def half(root, split, download):
    """Every other image has no label."""
    whole = read(root, split, download)
    labels = whole.labels.clone()
    labels[::2] = -1
    return ImagesInMemory(whole.images, labels, whole.classes, "half")


def unknown(root, split, download):
    images = read(root, split, download).images
    return ImagesInMemory(images, torch.full((60,), -1), None, "unknown")


settings = {"size": 16, "mean": (0.4,) * 3, "std": (0.3,) * 3, "needs_dir": False}
pair_row = DataSet(pair, **settings)
misnamed_row = DataSet(misnamed, **settings)
unlabelled_row = DataSet(unlabelled, **settings)
half_row = DataSet(half, **settings)
unknown_row = DataSet(unknown, **settings)
'''
LEAVES = "raise SystemExit(5)"
RUN = (
    "--dataset toy_module:toy --miner toy_module:ToyMiner -a digits --moco-dim 16 --moco-k 32 -b 20"
    " -j 0 --seed 0 --device cpu -p 1 --epochs 2 --isl-start 1 --isl-every 1"
).split()


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    """The module, in the folder that the script is started in."""
    (tmp_path / "toy_module.py").write_text(TOY)
    (tmp_path / "leaves.py").write_text(LEAVES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("toy_module", None)


def rounds(out) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "round"]


def test_a_miner_and_a_data_set_of_ones_own_run_resume_and_are_judged(tmp_path):
    place = ["--toy-place", "2"]
    assert ask([*RUN, *place, "--out", "whole"])[0] == 0
    (line,) = rounds(tmp_path / "whole")
    assert line["miner"] == "toy" and line["place"] == 2 and line["precision"] > 0.9
    flags = json.loads((tmp_path / "whole" / "args.json").read_text())["args"]
    assert flags["toy_place"] == 2 and flags["miner"] == "toy_module:ToyMiner"
    assert not {"isl_share", "oracle_size"} & flags.keys(), "flags of other miners are not there"

    assert ask([*RUN, *place, "--out", "parts", "--max-steps", "4"])[0] == 0
    code, _, said = ask([*RUN, "--toy-place", "3", "--out", "parts", "--resume", "auto"])
    assert code == 2 and "--toy-place was 2 and is now 3" in said
    assert ask([*RUN, *place, "--out", "parts", "--resume", "auto"])[0] == 0
    assert differences(tmp_path / "whole", tmp_path / "parts") == []

    file = "whole/checkpoint_last.pth.tar"
    judge = f"--dataset toy_module:toy -j 0 --device cpu --k 5 --out judged --pretrained {file}"
    assert main_knn.main(judge.split()) == 0
    assert '"top1": 100.0' in (tmp_path / "judged" / "results.json").read_text()


def test_images_without_a_label_neither_vote_nor_count(tmp_path, capsys):
    flags = [*RUN[4:], "--dataset", "toy_module:half_row", "--knn-every", "1", "--out", "run"]
    assert ask(flags)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["knn"] for line in lines if line["kind"] == "epoch"][-1] > 90
    judge = "--dataset toy_module:half_row -j 0 --device cpu --pretrained"
    for script in (main_knn, main_lincls):
        flags = [*judge.split(), "run/checkpoint_last.pth.tar", "--out", "judged"]
        assert script.main(flags) == 2
        said = capsys.readouterr().err
        assert "30 of the 60 train images in 'toy_module:half_row' have no label (-1)" in said
    assert not (tmp_path / "judged").exists()


def test_without_any_known_label_nothing_is_judged(tmp_path):
    flags = ["--dataset", "toy_module:unknown_row", "--knn-every", "1", "--out", "run"]
    code, said, _ = ask([*RUN[4:], *flags])
    assert code == 0 and "--knn-every without labels: nothing to judge by" in said
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if line["kind"] == "epoch"]
    assert not any("knn" in line for line in lines)


def test_a_plug_ins_flags_come_from_a_config_too(tmp_path):
    (tmp_path / "run.yaml").write_text("miner: toy_module:ToyMiner\ntoy-place: 4\n")
    args = main_moco_isl.get_parser().parse_args(["--config", "run.yaml"])
    assert args.toy_place == 4
    args = main_moco_isl.get_parser().parse_args(["--config", "run.yaml", "--toy-place=5"])
    assert args.toy_place == 5
    args = main_moco_isl.get_parser().parse_args(["--config", "run.yaml", "--miner", "none"])
    assert args.miner == "none" and "toy_place" not in args, "a baseline beside a recipe"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--miner toy_module:Absent", "toy_module has no 'Absent'; expected module:name"),
        ("--miner leaves:Miner", "--miner leaves:Miner: 5; expected module:name"),
        ("--miner toy_module:Idle", "finds nothing: expected a method find("),
        ("--miner toy_module:Keeps", "expected state_shape(dim) beside state_dict"),
        ("--miner toy_module:Taken", "its field epochs would be --epochs, and the script has"),
        ("--miner toy_module:Short", "its field steps would be --steps, and the script has"),
        ("--miner toy_module:Dashless", "expected a name that begins with --"),
        ("--miner toy_module:Needs", "has the field steps without a default"),
        ("--miner toy_module:Strange", "has a field that cannot be a flag"),
        (
            "--dataset toy_module:pair_row",
            "pair[0]: it has 2 channels, and 3 are expected: give --channels 2",
        ),
        ("--dataset toy_module:misnamed_row", "labels go up to 19, and there are 1 classes"),
        ("--miner nowhere:Miner", "No module named 'nowhere'; expected module:name"),
        ("--miner toy_module:Bare", "is no miner: expected a class made from"),
        ("--miner toy_module:Forgotten", "put @dataclass(eq=False) before the class"),
        ("--miner toy_module:ToyMiner --toy-place 10", "--toy-place 10 is out of range"),
        ("--miner knn --toy-place 2", "no flag --toy-place"),
        ("--dataset toy_module:read", "needs 'download': expected a function of split"),
        ("--dataset toy_module:tay", "toy_module has no 'tay'"),
        ("--dataset toys", "--dataset toys: expected one of folder,"),
        ("--dataset toy_module:toy DIR", "two data sets are named"),
        ("--dataset toy_module:toy --download", "--download works for"),
        ("--miner knn --isl-share 0.5", "--isl-share is a flag of --miner entropy, and"),
        ("--isl-walk 3", "--isl-walk is a flag of --miner diffusion, and --miner is none"),
    ],
)
def test_what_cannot_be_is_one_line(flags, words):
    given = flags if "--dataset" in flags else f"--dataset digits {flags}"
    code, _, said = ask([*RUN[4:], "--out", "new", *given.split()])
    assert code == 2 and words in said and said.count("\n") == 1, said


@pytest.mark.parametrize(
    "miner, words",
    [
        ("Nothing", "the miner toy found a NoneType in place of pairs"),
        ("Outside", "the miner toy found pairs of no images"),
        ("Endless", "the miner toy gave pairs a sureness that is not finite"),
    ],
)
def test_pairs_that_are_none_are_one_line(miner, words, tmp_path):
    flags = [*RUN, "--miner", f"toy_module:{miner}", "--out", "new"]
    code, _, said = ask(flags)
    assert code == 3 and words in said and said.count("\n") == 1, said
    assert (tmp_path / "new" / "checkpoint_last.pth.tar").exists()


def test_a_data_set_without_labels_trains():
    flags = [*RUN[4:], "--dataset", "toy_module:unlabelled_row", "--epochs", "1", "--out", "new"]
    assert ask(flags)[0] == 0


def test_a_config_whose_miner_is_gone_is_overruled_by_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("miner: nowhere:Miner\n")
    args = main_moco_isl.get_parser().parse_args(["--config", "run.yaml", "--miner", "knn"])
    assert args.miner == "knn"


def test_help_shows_the_flags_of_the_chosen_miner(capsys):
    shown = {}
    own = "--miner=toy_module:ToyMiner --help"
    for line in ("--help", "--miner gan --help", own, "--help-all"):
        with pytest.raises(SystemExit):
            main_moco_isl.get_parser().parse_args(line.split())
        shown[line] = capsys.readouterr().out
    plain, gan, toy, everything = shown.values()
    listed = [line for line in plain.splitlines() if line.startswith("  -")]
    assert len(listed) < 45
    for word, where in {
        "--isl-radius ": [gan, everything],
        "--toy-place": [toy],
        "--isl-neighbors": [everything],
        "--oracle-size": [everything],
        "--save-every": [everything],
        "--moco-k": [plain, gan, toy, everything],
        "--isl-trust": [plain, gan, toy, everything],
    }.items():
        assert [text for text in shown.values() if word in text] == where, word


def test_every_miner_says_no_in_its_own_words():
    """A miner of a user's own loop is held to the ranges of the flags."""
    for kind in miners.MINERS.values():
        for name, flag in flags_of(kind).items():
            if flag.low is None or "labels" in kind.__dict__.get("__dataclass_fields__", {}):
                continue
            with pytest.raises(BadInput, match=f"{kind.__name__}: {name} .* out of range"):
                kind(**{name: flag.low - 1})
    check_values(miners.GANMiner(radius=2, budget=[0.5, 1]))


def test_a_miner_keeps_its_budget_of_each_round():
    miner = miners.KNNMiner(budget=(0.5, 1.5))
    assert miner.rules.budget == 0.5 and miner.most(100) == 2
    budgets = []
    for number in (1, 2, 3):
        miner.begin(number)
        budgets.append(miner.rules.budget)
    assert budgets == [0.5, 1.5, 1.5]
    first, second = miners.KNNMiner(), miners.KNNMiner()
    first.budget.append(9)
    assert second.budget == ["5"]
    assert miners.KNNMiner(budget=None).rules.budget is None


SCRIPTS = [main_moco_isl, main_lincls, main_knn, detection, mine, transfer, embed]


def test_the_page_of_flags_is_that_of_the_fields(tmp_path):
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "moco_isl.flags_page", str(tmp_path / "flags.md")]
    subprocess.run(command, check=True, cwd=root)
    fresh = (tmp_path / "flags.md").read_text()
    assert (root / "docs" / "flags.md").read_text() == fresh, f"run {' '.join(command[1:3])}"
    tables = fresh.count("\n### ")
    assert fresh.count("\n## ") == len(SCRIPTS) and tables == 9 + 7 + 3 + 2 + 3 + 3 + 2 + 2
    for script in SCRIPTS:
        for action in script.get_parser()._actions:
            named = action.option_strings[:1] if hasattr(action, "flag") else []
            assert all(f"`{name}`" in fresh for name in named), script
    assert "timm:&lt;name>" in fresh, "a browser takes <name> for HTML"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_each_flag_of_the_parser_is_a_field(script):
    parser = script.get_parser()
    actions = [a for a in parser._actions if a.dest not in ("help", "help_all", "version")]
    assert all(action.flag.dest == action.dest for action in actions)
    assert all(a.default == a.flag.default for a in actions if not hasattr(a, "owners"))
