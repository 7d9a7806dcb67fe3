"""The studies of the paper's Figures 3, 4 and 5: tables and pictures of small real runs, and
sentences that turn with the numbers.
"""

import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

import main_moco_isl
from launch import options, sweep
from moco_isl import data
from moco_isl.miners import gan as gan_miner
from moco_isl.mining import gan_training
from moco_isl.mining.positives import PositiveSets
from moco_isl.report.grids import Cell, Grid, Row
from moco_isl.report.runs import read_run
from moco_isl.training.options import check_args
from studies import figure3, figure4, figure5, paper, subset
from studies.figures import HERE

ROOT = HERE.parent
RECIPES = sorted(paper.RECIPES.glob("sweep_figure*.yaml"))
DIGITS = {
    "config": str(HERE / "flags_digits.yaml"),
    "objective": "bank",
    "mlp": False,
    "moco-dim": 16,
    "knn-holdout": 1000,
    "knn-every": 1,
    "isl-start": 1,
    "isl-every": 1,
    "epochs": 3,
    "momentum": 0,
    "lr": 0.03,
    "isl-budget": [2, 4],
    "device": "cpu",
}
SHORT = {"miner": "gan", "isl-gan-iters": 30, "isl-gan-min-iters": 20}
SHORT |= {"isl-radius-mode": "fixed", "isl-radius": 2, "isl-threshold": 0}


@pytest.fixture
def from_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a sweep of ISL and LA on 437 digits, the folder in which its runs have ended)."""
    folder = tmp_path_factory.mktemp("figures")
    points = [{"name": "gan", **SHORT}, {"name": "cluster", "miner": "cluster"}]
    return train(folder, points, seeds=[0])


def train(folder: Path, points: list[dict], seeds: list[int]) -> tuple[Path, Path]:
    """Train a sweep in this process, as studies/paper.py has it trained in others."""
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({"base": DIGITS, "points": points, "seeds": seeds}))
    with pytest.MonkeyPatch.context() as patch:
        for module in (gan_miner, gan_training):  # a GAN as short as these collapses
            patch.setattr(module, "collapse", lambda *_: "")
        for name, settings in sweep.read_plan(file)["points"].items():
            flags = sweep.flags_of("pretrain", settings)
            assert main_moco_isl.main([*flags, "--out", str(folder / "runs" / name)]) == 0
    return file, folder / "runs"


def flags_of(trained, tmp_path: Path) -> list[str]:
    file, folder = trained
    picture = ["--picture", str(tmp_path / "docs" / "x.svg")]
    return [str(file), "--job-dir", str(folder), *picture, "--out", str(tmp_path / "out")]


def table(tmp_path: Path) -> dict:
    (path,) = (tmp_path / "out").glob("*.json")
    return json.loads(path.read_text())


def words(path: Path) -> list[str]:
    """The texts of an SVG."""
    root = xml.etree.ElementTree.parse(path).getroot()
    return ["".join(x.itertext()).strip() for x in root.iter() if x.tag.endswith("}text")]


# ---------------------------------------------------------------- their runs


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_is_flags_that_the_script_takes(file, from_root):
    plan = sweep.read_plan(file)
    for settings in plan["points"].values():
        flags = sweep.flags_of("pretrain", {**settings, "device": "cpu"})
        args = options.parse_script("pretrain", flags, 1, 1, check=False)
        assert args.objective == "bank", "the paper's own setting"
        args.download = args.dataset == "cifar10"  # CIFAR stands for a folder
        args.data = str(HERE) if args.data == "CIFAR5K" else args.data
        check_args(args)


def test_what_has_ended_is_not_trained_again_and_the_rest_is(trained, tmp_path, monkeypatch):
    args = paper.get_parser("", "sweep_figure4_").parse_args(flags_of(trained, tmp_path))
    asked = []
    monkeypatch.setattr(sweep, "run_here", lambda *given: asked.append(given) or 0)
    runs = paper.read_runs(args, "x")
    assert set(runs.train()) == {"gan", "cluster"} and asked == []
    lines = runs.all[0].folder / "metrics.jsonl"
    text = lines.read_text()
    try:
        lines.write_text("\n".join(text.splitlines()[:-1]) + "\n")
        runs.train(["cluster"])
        assert asked == []
        runs.train()
        ((script, left, folder),) = asked
        assert script == "pretrain" and list(left) == ["gan,seed=0"] and folder == trained[1]
        monkeypatch.setattr(sweep, "run_here", lambda *_: 1)
        with pytest.raises(paper.RunFailed, match="not all runs"):
            runs.train()
    finally:
        lines.write_text(text)


def test_the_images_may_be_named(from_root, tmp_path):
    parser = paper.get_parser("", "sweep_figure4_")
    flags = ["cifar10", "--data", str(tmp_path), "--job-dir", str(tmp_path / "runs")]
    with pytest.raises(paper.BadInput, match="cifar10 is not in"):
        main = paper.read_runs(parser.parse_args(flags), "x").all[0].flags
        data.build_dataset("cifar10", main[0], "train")
    assert main[0] == str(tmp_path)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["letters"], "no runs 'letters': expected cifar10, cifar5k, digits or SWEEP.yaml"),
        (["none.yaml"], "none.yaml"),
        (["digits", "--picture", "README.md"], "is none of this command's files"),
        (["knn.yaml"], "expected a sweep of pretrainings"),
        (["bad.yaml"], "--lr"),
    ],
)
def test_bad_input_is_one_line_before_any_run(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("days of work")
    (tmp_path / "knn.yaml").write_text("script: knn\npoints: [{name: a, dataset: digits}]\n")
    (tmp_path / "bad.yaml").write_text("points: [{name: gan, dataset: digits, lr: -1}]\n")
    flags = [word.replace("digits", str(ROOT / RECIPES[-1])) for word in flags]
    (tmp_path / "studies").symlink_to(HERE)
    assert figure3.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("studies.figure3: ") and said in error and error.count("\n") == 1
    assert (tmp_path / "README.md").read_text() == "days of work"
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- differences


@pytest.mark.parametrize(
    "pairs, sign", [([2.0, 1.0, 1.5], 1), ([-2.0, -1.0], -1), ([2.0, -1.5], 0), ([1.1], 1)]
)
def test_a_difference_is_told_where_it_is_beyond_the_spread(pairs, sign):
    assert paper.told(pairs) == sign
    assert paper.told([-x for x in pairs]) == -sign
    assert paper.told([0.9]) == 0, "of a single seed less than a point is nothing"


# ---------------------------------------------------------------- Figure 3


def rankings(gan5, own5, gan50, own50) -> figure3.Figures:
    """Two rounds of two seeds around these figures."""
    at = {("gan", 5): gan5, ("own", 5): own5, ("gan", 50): gan50, ("own", 50): own50}
    cells = {key: [x - 0.1, x + 0.1] for key, x in at.items()}
    return {5: cells, 10: {key: [x + 5 for x in values] for key, values in cells.items()}}


@pytest.mark.parametrize(
    "figures, begins, says",
    [
        ((90, 90, 80, 70), "The claim holds here", "+10.0 ± 0.0 points at 50 an image"),
        ((90, 95, 80, 70), "The claim holds in part", "and -5.0 ± 0.0 at 5 (n = 2)"),
        ((90, 90, 70, 80), "The claim holds in part", "-10.0 ± 0.0 points at 50 an image"),
        ((85, 90, 70, 80), "Not so here", "over 2 rounds"),
    ],
)
def test_the_sentence_of_figure_3(figures, begins, says):
    sentence = figure3.verdict(rankings(*figures))
    assert sentence.startswith(begins) and says in sentence


def test_figure_3_of_a_run(trained, tmp_path):
    assert figure3.main(flags_of(trained, tmp_path)) == 0
    found = table(tmp_path)
    lines = (trained[1] / "gan,seed=0" / "metrics.jsonl").read_text().splitlines()
    rounds = [x for x in map(json.loads, lines) if x["kind"] == "round"]
    assert [row["epoch"] for row in found["rows"]] == [x["epoch"] for x in rounds] == [1, 2]
    for row, report in zip(found["rows"], rounds):
        assert row["gan_50"] == f"{100 * report['precision_ranked']['50']:.1f}"
        own = dict(zip(report["baselines"]["sizes"], report["baselines"]["own_nearest"]))
        assert row["own_5"] == f"{100 * own[5]:.1f}" and row["n"] == 1
    assert found["name"] == "figure3-small"
    assert found["notes"][0] == figure3.CLAIM and "over 2 rounds" in found["notes"][1]
    assert {"the first 5 of an image", "Euclidean: own nearest"} <= set(
        words(tmp_path / "docs/x.svg")
    )
    assert figure3.main(flags_of(trained, tmp_path)) == 0, "over its own picture"


def test_a_round_that_collapsed_in_one_seed_is_left_out():
    class Rounds:
        def __init__(self, *ranked):
            self.ranked = ranked

        def lines(self, kind):
            near = {"sizes": [3.0, 5.0, 50.0], "own_nearest": [1.0, 0.9, 0.8]}
            for i, x in enumerate(self.ranked):
                found = {"precision_ranked": {"5": x, "50": x}} if x else {}
                yield {"epoch": 5 * i, "baselines": near, **found}

    found = figure3.figures([Rounds(0.5, None, 0.25), Rounds(0.75, 0.5, 0.5)])
    assert list(found) == [0, 10] and found[10]["gan", 50] == [25, 50]
    assert figure3.differences(found, 5) == [37.5 - 90, 62.5 - 90]


# ---------------------------------------------------------------- Figure 4


def curve(**values) -> figure4.Curve:
    """kNN of three seeds at each value; x1_5 stands for 1.5."""
    number = lambda name: float(name[1:].replace("_", "."))
    return {number(name): [x - 0.1, x, x + 0.1] for name, x in values.items()}


@pytest.mark.parametrize(
    "found, begins",
    [
        (curve(x0_3=90, x0_5=95, x0_9=92), "The claim holds here: 0.5"),
        (curve(x0_3=90, x0_5=95, x0_7=96, x0_9=95.99), "The claim holds in part here: 0.7"),
        (curve(x0_3=90, x0_5=95, x0_9=97), "Not so here: 0.5"),
        (curve(x0_3=90, x0_5=90, x0_9=90), "Not so here"),
    ],
)
def test_the_sentence_of_a_medium_value(found, begins):
    # a common shift of a seed is no spread of the pairs: let each have its own
    noisy = {
        x: [v + 0.2 * ((i * 7 + j) % 3 - 1) for j, v in enumerate(values)]
        for i, (x, values) in enumerate(found.items())
    }
    assert figure4.of_the_medium(noisy).startswith(begins)


@pytest.mark.parametrize(
    "found, begins",
    [
        (curve(x1=90, x5=95, x10=95.1), "The claim holds here: 5 give +5.0"),
        (curve(x1=90, x5=95, x10=99), "The claim holds in part here"),
        (curve(x1=95, x5=90, x10=90), "Not so here: 5 give -5.0"),
        (curve(x1=95, x5=95, x10=99), "Not so here"),
    ],
)
def test_the_sentence_of_sampling_times(found, begins):
    assert figure4.of_more(found).startswith(begins)


@pytest.mark.long
def test_figure_4_of_runs(tmp_path):
    middle = {"isl-threshold": 0.1, "isl-radius": 1.0, "isl-triplets": 2}
    short = {**SHORT, **middle, "epochs": 2}
    points = [{"name": "middle", **short}]
    for setting, ends in (("threshold", (0, 0.9)), ("radius", (0.5, 2)), ("triplets", (1, 3))):
        for value in ends:
            of_sweep = {key: x for key, x in short.items() if key not in middle}
            points.append({"name": f"{setting}{value}", **of_sweep, f"isl-{setting}": value})
    file, folder = train(tmp_path, points, seeds=[0])
    flags = flags_of((file, folder), tmp_path)
    assert figure4.main(flags) == 0
    found = table(tmp_path)
    values = {}
    for row in found["rows"]:
        values.setdefault(row["setting"], []).append(row["value"])
    assert values == {
        "threshold": [0, 0.1, 0.9],
        "radius": [0.5, 1, 2],
        "sampling times": [1, 2, 3],
    }
    at = {(row["setting"], row["value"]): row for row in found["rows"]}
    last = [
        json.loads(x) for x in (folder / "radius2,seed=0/metrics.jsonl").read_text().splitlines()
    ]
    knn = [x["knn"] for x in last if x["kind"] == "epoch"][-1]
    assert at["radius", 2]["knn"] == f"{knn:.1f}"
    same = [at[key]["knn"] for key in (("threshold", 0.1), ("radius", 1), ("sampling times", 2))]
    assert len(set(same)) == 1, "the middle stands in each curve"
    assert len(found["notes"]) == 6 and found["notes"][0].startswith("The paper: ")
    assert {"threshold", "radius", "sampling times"} <= set(words(tmp_path / "docs" / "x.svg"))


def test_a_sweep_of_too_few_values_is_said(trained, tmp_path, capsys):
    assert figure4.main(flags_of(trained, tmp_path)) == 2
    assert "fewer than three values of isl-threshold" in capsys.readouterr().err


# ---------------------------------------------------------------- Figure 5


@pytest.mark.parametrize(
    "right, alike, begins",
    [
        (5, -5, "The claim holds here: in round 3 ISL's surest"),
        (5, 0, "The claim holds in part"),
        (0, -5, "The claim holds in part"),
        (5, 5, "Not so here"),
        (-5, -5, "Not so here"),
    ],
)
def test_the_sentence_of_figure_5(right, alike, begins):
    cells = lambda a, b, shift: {
        ("cluster", "surest"): 80 + shift,
        ("cluster", "alike"): 50 + shift,
        ("gan", "surest"): 80 + a,
        ("gan", "alike"): 50 + b,
    }
    assert figure5.verdict(3, [cells(right, alike, x) for x in (-0.1, 0.1)]).startswith(begins)


def test_the_surest_pairs_of_sets_are_judged():
    """Four images, two classes; the surest pair of each is right, the second wrong."""
    a, b = torch.tensor([0, 0, 2, 2]), torch.tensor([1, 2, 3, 0])
    sets = PositiveSets.from_edges(
        4, a, b, sureness=torch.tensor([0.9, 0.1, 0.8, 0.2]), symmetric=False
    )
    labels = torch.tensor([0, 0, 1, 1])
    pixels = F.normalize(torch.tensor([[1.0, 0], [1, 1], [0, 1], [0, 1]]), dim=1)
    found = figure5.of_sets(sets, 2, labels, pixels)
    assert found["right"] == 50 and found["surest"] == 100 and found["size"] == 1
    assert found["alike"] == pytest.approx(100 * (2**-0.5 + 1) / 2)
    assert figure5.of_sets(sets, 4, labels, pixels)["surest"] == 50
    unknown = torch.tensor([0, 0, -1, 1])  # one pair is left whose labels are known
    assert figure5.of_sets(sets, 4, unknown, pixels)["right"] == 100
    none = figure5.of_sets(sets, 4, torch.arange(4), pixels)
    assert none["right"] == 0 and none["alike"] is None
    assert figure5.of_sets(sets, 4, torch.full((4,), -1), pixels)["surest"] is None
    cells = {(row, key): none[key] for row in ("gan", "cluster") for key in none}
    assert figure5.verdict(2, [cells, cells]).startswith("The claim is not judged: in round 2")


def test_ctrl_c_says_how_to_go_on(capsys):
    def make():
        raise KeyboardInterrupt

    assert paper.exit_code("figure3", make) == 75
    assert "=> interrupted: the same command goes on" in capsys.readouterr().err


def test_figure_5_of_two_runs(trained, tmp_path):
    assert figure5.main(flags_of(trained, tmp_path)) == 0
    found = table(tmp_path)
    run = read_run(trained[1] / "gan,seed=0", "gan")
    dataset = run.dataset()
    row = found["rows"][-1]
    sets = run.rounds[row["round"] - 1].load().sets
    right = total = 0
    assert sets.num_images == 437
    for i in range(437):
        for j in sets.members[sets.offsets[i] : sets.offsets[i + 1]].tolist():
            right += int(dataset.labels[i] == dataset.labels[j])
            total += 1
    assert (
        row["gan_right"] == f"{100 * right / total:.1f}" and row["gan_size"] == f"{total / 437:.1f}"
    )
    assert "cluster_right" in row and -100 <= float(row["gan_alike"]) <= 100
    picture = (tmp_path / "docs" / "x.svg").read_text()
    xml.etree.ElementTree.fromstring(picture)
    assert {"ISL", "LA", "round 2", "nearest"} <= set(words(tmp_path / "docs" / "x.svg"))
    frames = re.findall(r'<rect class="(\w+)"', picture)
    anchors = figure5.ANCHORS
    shown = re.findall(r'<use [^>]*href="#i(\d+)"', picture)
    made = re.findall(r'<symbol id="i(\d+)"', picture)
    assert len(frames) == len(shown) > 4 * anchors and sorted(made) == sorted(set(shown))
    assert frames.count("unknown") == anchors, "an anchor is neither right nor wrong"
    assert picture.count('<path class="wrong"') == frames.count("wrong")


def test_alikeness_is_the_cosine_of_the_small_pixels():
    images = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)
    dataset = data.ImagesInMemory(images, torch.zeros(6).long(), ["a"], "x")
    mean = torch.tensor(data.SETS["folder"].mean).view(3, 1, 1)
    std = torch.tensor(data.SETS["folder"].std).view(3, 1, 1)
    rows = []
    for image in images:
        x = (image / 255 - mean) / std
        small = torch.stack(
            [
                torch.stack(
                    [
                        c[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean()
                        for i in range(8)
                        for j in range(8)
                    ]
                )
                for c in x
            ]
        )
        rows.append((small - small.mean(1, keepdim=True)).flatten())
    rows = torch.stack(rows)
    rows -= rows.mean(0)
    expected = rows / rows.norm(dim=1, keepdim=True)
    assert torch.allclose(figure5.pixels_of(dataset), expected, atol=1e-4)


def test_a_set_without_members_is_none_and_a_wrong_image_is_crossed():
    cell = lambda wrong: Cell(1, "data:image/png;base64,AA==", "", wrong)
    rows = [Row(1, [], 0), Row(2, [cell(True), cell(False), cell(None)], 3)]
    grid = Grid("", "", ["gan", "cluster"], [(cell(None), [rows, rows])])
    picture = figure5.svg(grid, "t")
    assert picture.count(">none</text>") == 2 and picture.count('<path class="wrong"') == 2


# ---------------------------------------------------------------- images, and the page


def test_a_subset_is_the_first_images_of_every_class(tmp_path, capsys):
    for split, n in (("train", 5), ("val", 3)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.png")
    flags = [str(tmp_path / "images"), str(tmp_path / "small")]
    assert subset.main([*flags, "--train", "3", "--val", "2"]) == 0
    assert "6 images to train on, 4 to judge by" in capsys.readouterr().out
    train, val = (
        data.build_dataset("folder", str(tmp_path / "small" / "train.csv"), split)
        for split in ("train", "val")
    )
    assert [Path(train.path(i)).name for i in range(6)] == ["0.png", "1.png", "2.png"] * 2
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and train.classes == val.classes
    assert len(val) == 4
    assert subset.main([*flags, "--train", "3", "--val", "2"]) == 2
    assert subset.main([flags[0], str(tmp_path / "more"), "--train", "6"]) == 2
    assert subset.main([flags[0], str(tmp_path / "more"), "--train", "0"]) == 2
    said = capsys.readouterr().err
    assert "exists: expected a new folder" in said and "class cat has 5 images" in said
    assert "0 images a class: expected 1 or more" in said
    assert not (tmp_path / "more").exists()


def test_the_page_says_what_the_tables_say():
    """docs/figures.md: every claim and verdict is that of a file of results."""
    page = " ".join((ROOT / "docs" / "figures.md").read_text().split())
    found = sorted((HERE / "results").glob("figure[345]-*.json"))
    assert {"figure3-digits-cpu", "figure4-digits-cpu", "figure5-digits-cpu"} <= {
        path.stem for path in found
    }
    for path in found:
        for note in json.loads(path.read_text())["notes"]:
            if note.startswith(("The paper", *paper.HOLDS.values())):
                assert note in page, f"{path.name}: {note}"
