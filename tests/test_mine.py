"""moco_isl.mine: one round of mining by a trained encoder, without training."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import main_moco_isl
from moco_isl import data, mine
from moco_isl.__main__ import main
from moco_isl.encoders import build_encoder
from moco_isl.report.__main__ import main as report
from moco_isl.run.backbone import load_backbone
from tests.ranks import run_ranks

SEED = "1"
DIGITS = f"--dataset digits -j 0 --device cpu --seed {SEED}".split()
TRAINED = [
    *DIGITS,
    *"-a digits --mlp --moco-dim 32 --moco-k 256 -b 128 --moco-t 0.1 --aug-plus".split(),
    *"--save-epochs 100 -p 100".split(),
]


@pytest.fixture(scope="module")
def moco(tmp_path_factory):
    """A MoCo of six epochs on the digits."""
    out = tmp_path_factory.mktemp("moco")
    assert main_moco_isl.main([*TRAINED, "--epochs", "4", "--out", str(out)]) == 0
    return str(out / "checkpoint_last.pth.tar")


def rows(out) -> list[dict]:
    return [json.loads(line) for line in (out / mine.SETS).read_text().splitlines()]


def logged(out) -> dict:
    """What a run's log says of its round, but for time and memory."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (found,) = (line for line in lines if line["kind"] == "round")
    return {name: x for name, x in found.items() if name not in ("seconds", "peak_memory_gib")}


def record(out) -> dict:
    return torch.load(out / "rounds" / "round_0001.pt", weights_only=True)


@pytest.mark.parametrize(
    "miner", ["knn", "average --isl-budget auto", "entropy --isl-share 0.5 --moco-t 0.1"]
)
def test_it_mines_what_the_first_round_of_a_training_mines(moco, tmp_path, miner, capsys):
    trained, mined = tmp_path / "trained", tmp_path / "mined"
    once = f"--epochs 1 --max-steps 1 --init {moco} --miner {miner} --out {trained}".split()
    assert main_moco_isl.main([*TRAINED, *once]) == 0
    own = f"--miner {miner} -b 128 --out {mined}".split()
    assert mine.main([moco, *DIGITS, *own]) == 0
    theirs, ours = record(trained), record(mined)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
    assert logged(trained) == logged(mined)
    assert "positives an image" in capsys.readouterr().out.splitlines()[-3]


def test_the_sets_are_named_and_have_the_cosines_of_their_features(moco, tmp_path):
    assert mine.main([moco, *DIGITS, *"--miner knn --out".split(), str(tmp_path / "mined")]) == 0
    encoder, _ = load_backbone(moco, key_encoder=True)
    images = data.build_dataset("digits", None, "train")
    transform = data.get_eval_transform("digits")
    seen = torch.stack([transform(images[i][0]) for i in range(len(images))])
    with torch.no_grad():
        features = F.normalize(encoder.eval()(transform.normalize(seen)), dim=1)
    found = rows(tmp_path / "mined")
    place = {line["image"]: i for i, line in enumerate(found)}
    assert list(place) == data.names_below(images)
    asked = 0
    for i, line in enumerate(found):
        for name, similarity in zip(line["positives"], line["similarity"], strict=True):
            wanted = float(features[i] @ features[place[name]])
            assert abs(similarity - wanted) < 2e-4, (i, name)
            asked += 1
        assert line["image"] not in line["positives"]
        assert line["similarity"] == sorted(line["similarity"], reverse=True), "the surest first"
    assert asked == len(record(tmp_path / "mined")["members"])


def mine_on_rank(rank, world, flags) -> int:
    return mine.main(flags)


def test_two_ranks_find_the_sets_of_one(moco, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [moco, *DIGITS, *"--miner knn --isl-budget 2".split(), "--out"]
    torch.set_num_threads(1)
    assert mine.main([*flags, str(one)]) == 0
    assert run_ranks(2, mine_on_rank, [*flags, str(two)]) == [0, 0]
    assert [line["positives"] for line in rows(one)] == [line["positives"] for line in rows(two)]
    assert sum(len(line["positives"]) for line in rows(two)) > 2000


@pytest.fixture
def photos(tmp_path):
    """A folder of 24 small photos without labels."""
    g = torch.Generator().manual_seed(0)
    for i in range(24):
        file = tmp_path / "photos" / f"é {i:02}.png"
        file.parent.mkdir(exist_ok=True)
        pixels = torch.randint(256, (16, 16, 3), generator=g, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(file)
    return tmp_path / "photos"


def test_weights_without_a_head_mine_by_their_backbone(photos, tmp_path, monkeypatch, capsys):
    """Names are those below DIR, and the report shows what was mined."""
    encoder = build_encoder("resnet18w16", 4, "cifar")
    state = {name: x for name, x in encoder.state_dict().items() if not name.startswith("fc.")}
    torch.save({"arch": "resnet18w16", "state_dict": state}, tmp_path / "weights.pth")
    monkeypatch.chdir(tmp_path)
    flags = "weights.pth --miner knn -j 0 --device cpu --out mined photos"
    assert mine.main(flags.split()) == 0
    said = capsys.readouterr().out
    assert "24 images" in said and "precision" not in said
    found = rows(tmp_path / "mined")
    names = {p.name for p in photos.glob("*.png")}
    assert {line["image"] for line in found} == names
    assert {name for line in found for name in line["positives"]} <= names
    assert record(tmp_path / "mined")["features"].shape == (24, 128), "of the backbone"
    assert "python -m moco_isl.report mined" in said
    assert report(["mined"]) == 0 and (tmp_path / "mined" / "report.html").exists()


def test_the_commands_of_the_page_run(moco, photos, tmp_path, monkeypatch):
    """docs/evaluate.md, of the digits' encoder and 24 photos in place of one's own."""
    text = (Path(mine.__file__).parent.parent / "docs" / "evaluate.md").read_text()
    block = text.split("## Mine without training")[1].split("```")[1]
    monkeypatch.chdir(tmp_path)
    Path("runs/moco").mkdir(parents=True)
    shutil.copy(moco, "runs/moco")
    for command in block.strip().splitlines():
        assert main([*command.split()[1:], *(["-j", "0"] if " mine " in command else [])]) == 0
    assert len(rows(tmp_path / "runs" / "mined")) == 24
    assert Path("runs/mined/report.html").exists()


def test_nothing_is_written_without_a_folder_to_keep_it(moco, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert mine.main([moco, *DIGITS, "--miner", "knn"]) == 0
    assert "positives an image" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_miner_of_ones_own_mines(moco, tmp_path, monkeypatch):
    (tmp_path / "next_one.py").write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from moco_isl.mining.edges import Edges\n"
        "from moco_isl.mining.rounds import RoundMiner\n"
        "from moco_isl.options import opt\n"
        "@dataclass(eq=False)\n"
        "class Next(RoundMiner):\n"
        "    step: int = opt(1, '--next-step', help='which one')\n"
        "    def find(self, features, positives, seed, tick):\n"
        "        a = torch.arange(len(features))\n"
        "        return Edges(a, (a + self.step) % len(a), torch.ones(len(a))), ''\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    flags = "--miner next_one:Next --next-step 3 --isl-budget 2 --out mined".split()
    assert mine.main([moco, *DIGITS, *flags]) == 0
    M = len(rows(tmp_path / "mined"))
    assert all(
        set(line["positives"]) == {f"train[{j % M}]" for j in (i - 3, i + 3)}
        for i, line in enumerate(rows(tmp_path / "mined"))
    )


def test_stopped_it_writes_nothing(moco, tmp_path, capsys):
    out = tmp_path / "mined"
    assert mine.main([moco, *DIGITS, "--out", str(out)], stop=lambda: True) == 75
    assert "nothing was written: give the same command again" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "no encoder: give FILE"),
        (["absent.pth", *DIGITS], "no file at 'absent.pth': expected a checkpoint"),
        (["MOCO"], "--dataset folder needs a DIR"),
        (["MOCO", "nowhere"], "nowhere"),
        (["MOCO", *DIGITS, "--miner", "none"], "--miner none: expected one of knn,"),
        (["MOCO", *DIGITS, "--miner", "oracle"], "--miner oracle: expected one of knn,"),
        (["MOCO", *DIGITS, "--miner", "no.module:X"], "expected module:name"),
        (
            ["MOCO", *DIGITS, "--miner", "moco_isl.miners.oracle:OracleMiner"],
            "mines nothing from features: expected one of knn,",
        ),
        (["MOCO", *DIGITS, "--isl-radius", "0.2"], "--isl-radius is a flag of --miner gan"),
        (["MOCO", *DIGITS, "--isl-check", "absent.txt"], "absent.txt"),
        (["MOCO", *DIGITS, "-b", "1"], "--batch-size 1 is out of range"),
        (["BARE", *DIGITS, "--layer", "output"], "has no head, and a random one says nothing"),
        (["BARE", *DIGITS, "--key"], "has no key encoder"),
        (["MOCO", *DIGITS, "--out", "held"], "holds a run already"),
        (["MOCO", *DIGITS, "--out", "theirs"], "positives.jsonl"),
    ],
)
def test_bad_input_is_one_line_before_any_work(flags, words, moco, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    encoder = build_encoder("digits", 4)
    state = {name: x for name, x in encoder.state_dict().items() if not name.startswith("fc.")}
    torch.save({"arch": "digits", "state_dict": state}, "bare.pth")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "metrics.jsonl").write_text('{"kind": "step"}\n')
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / mine.SETS).write_text("mine\n")
    before = sorted(tmp_path.rglob("*"))
    flags = [{"MOCO": moco, "BARE": "bare.pth"}.get(word, word) for word in flags]
    assert mine.main(flags) == 2
    found = capsys.readouterr()
    assert not found.out and found.err.count("\n") == 1 and words in found.err
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "theirs" / mine.SETS).read_text() == "mine\n"
