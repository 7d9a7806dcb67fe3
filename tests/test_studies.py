"""The studies: their sweeps are flags that the scripts take, one judge makes their tables, and
break-even is found where it was planted.
"""

import json
import random
import statistics
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import main_moco_isl
from launch import options, sweep
from moco_isl import data, schema
from moco_isl.data.label_list import read_labels
from moco_isl.errors import BadInput
from moco_isl.evaluation.subject import fingerprint
from moco_isl.report.verdict import breakeven_of, read_breakeven
from moco_isl.training.options import check_args
from studies import breakeven, demo, figures, judge, letters
from studies.breakeven import bootstrap, closer, crossing, monotone
from studies.figures import HERE, Judge

SWEEPS = sorted(path for path in HERE.glob("*.yaml") if not path.name.startswith("flags_"))

# ---------------------------------------------------------------- break-even


@pytest.mark.parametrize("seed", range(5))
def test_monotone_is_the_nearest_rising_sequence(seed):
    """By the formula max over j <= i of min over k >= i of the mean from j to k."""
    draw = random.Random(seed)
    y = [draw.gauss(i / 3, 1) for i in range(8)]
    expected = [
        max(min(statistics.fmean(y[j : k + 1]) for k in range(i, 8)) for j in range(i + 1))
        for i in range(8)
    ]
    assert monotone(y) == pytest.approx(expected)


def planted(at, slope=20.0, noise=0.0, seeds=3, precisions=(0.65, 0.8, 0.95)):
    draw = random.Random(1)
    return {p: [slope * (p - at) + draw.gauss(0, noise) for _ in range(seeds)] for p in precisions}


@pytest.mark.parametrize("at", [0.66, 0.72, 0.8, 0.94])
def test_a_planted_crossing_is_found(at):
    assert crossing(planted(at)) == (pytest.approx(at), "")
    assert bootstrap(planted(at)) == (pytest.approx(at), pytest.approx(at))
    noisy = planted(at, noise=0.5)
    low, high = bootstrap(noisy)
    assert low <= crossing(noisy)[0] <= high and low < at + 0.03 and high > at - 0.03


def test_beyond_the_ends_there_is_a_bound():
    assert crossing(planted(0.3)) == (0.65, "at most") and crossing(planted(0.99)) == (
        0.95,
        "above",
    )
    assert crossing({0.65: [1.0], 0.8: [-3.0], 0.95: [-1.0]}) == (
        0.95,
        "above",
    ), "no crossing where more precision is seen to hurt"


def test_closer_halves_what_is_unknown():
    gains, tried = planted(0.7), []
    while (p := closer(gains)) is not None:
        tried.append(p)
        gains |= planted(0.7, precisions=[p])
    assert tried == [0.725, 0.688] and 0.688 < crossing(gains)[0] < 0.725
    assert closer(planted(0.3)) == 0.45 and closer(planted(0.99)) == 0.975


@pytest.mark.parametrize("right", ["near", "uniform"])
def test_break_evens_on_the_page_are_those_of_the_gains_on_the_page(right, tmp_path):
    read = lambda name: json.loads((HERE / "results" / f"{name}-cpu.json").read_text())["rows"]
    gains = read(f"breakeven-digits-right-{right}-gains")
    found = breakeven.evens_table("x", {}, gains, torch.device("cpu")).rows
    assert found == read(f"breakeven-digits-right-{right}")
    breakeven.draw(gains, tmp_path / "breakeven.svg")
    xml.etree.ElementTree.parse(tmp_path / "breakeven.svg")


# ---------------------------------------------------------------- sweeps and their judge


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_a_study_is_flags_that_the_script_takes(file, monkeypatch):
    monkeypatch.chdir(HERE.parent)
    plan = sweep.read_plan(file)
    schema.require(plan["judge"], judge.PART, "judge")
    rows = {run.row for run in judge.runs_of(plan, Path("x"))}
    assert set(plan["judge"].get("over", [])) <= rows
    for settings in plan["points"].values():
        flags = sweep.flags_of("pretrain", {**settings, "init": None, "device": "cpu"})
        args = options.parse_script("pretrain", flags, 1, 1, check=False)
        args.download = args.dataset == "cifar10"  # CIFAR stands for a folder
        args.data = str(HERE) if args.data == "TINY100" else args.data
        check_args(args)
        first = file.parent / f"{settings.get('init', '').partition('/')[2].partition('/')[0]}.yaml"
        assert "init" not in settings or first in SWEEPS


def small_study(tmp_path, points: list[dict], seeds=(0,), **part) -> Path:
    """A sweep of runs of one epoch over 437 digits; they have ended."""
    base = {"config": str(HERE / "flags_digits.yaml"), "epochs": 1, "knn-holdout": 1000}
    base |= {"moco-dim": 16, "moco-k": 128, "device": "cpu"}
    file = tmp_path / "study.yaml"
    file.write_text(
        yaml.safe_dump({"base": base, "points": points, "seeds": list(seeds), "judge": part})
    )
    for name, settings in sweep.read_plan(file)["points"].items():  # as sweep.main, in one process
        flags = sweep.flags_of("pretrain", settings)
        assert main_moco_isl.main([*flags, "--out", str(tmp_path / "runs" / name)]) == 0
    return file


def judged(tmp_path, file: Path) -> dict[str, dict]:
    """Name -> table that the judge wrote."""
    flags = ["--job-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert judge.main([str(file), *flags, "--device", "cpu"]) == 0
    tables = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    return {table["name"]: table for table in tables}


def test_the_table_of_a_study(tmp_path, monkeypatch):
    (tmp_path / "even.json").write_text('{"logsum": {"5": 0.43, "20": 0.9}}')
    points = [
        {"name": "none", "miner": "none"},
        {"name": "knn", "miner": "knn", "isl-start": 0, "isl-budget": 4, "isl-loss": "logsum"},
    ]
    even = str(tmp_path / "even.json")
    shown = ["knn", "one_shot", "near"]
    file = small_study(tmp_path, points, (0, 1), figures=shown, over=["none"], breakeven=even)
    none, knn = judged(tmp_path, file)["study"]["rows"]
    assert (none["row"], none["n"], knn["row"], knn["n"]) == ("none", 2, "knn", 2)
    assert "gain_knn" not in none and "size" not in none and knn["breakeven"] == 0.43
    kept = {
        row: [
            json.loads((tmp_path / "runs" / f"{row},seed={seed}" / "judged.json").read_text())
            for seed in (0, 1)
        ]
        for row in ("none", "knn")
    }
    values = [x["one_shot"] for x in kept["knn"]]
    assert knn["one_shot"] == f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
    pairs = [a["one_shot"] - b["one_shot"] for a, b in zip(kept["knn"], kept["none"])]
    assert knn["gain_one_shot"].startswith(f"{statistics.fmean(pairs):+.1f} ± ")
    line = (tmp_path / "runs" / "knn,seed=1" / "metrics.jsonl").read_text()
    assert '"kind": "round"' in line and 0 < knn["precision"] < 1 and knn["seconds"] > 0
    plan = sweep.read_plan(file)
    runs = judge.runs_of(plan, tmp_path / "runs")
    for name, value in (("isl-budget", "5"), ("init", "x.pth"), ("data", "photos")):
        settings = {**runs[-1].settings, name: value}
        with pytest.raises(BadInput, match=f"ended with --{name} .* is asked: give another --job"):
            replace(runs[-1], settings=settings).ended()
    assert not replace(runs[-1], settings={**runs[-1].settings, "epochs": "2"}).ended()
    monkeypatch.setattr(Judge, "features", lambda *_: pytest.fail("judged twice"))
    assert judged(tmp_path, file)["study"]["rows"] == [none, knn]
    (tmp_path / "runs" / "knn,seed=1" / "checkpoint_last.pth.tar").unlink()
    table = judged(tmp_path, file)["study"]
    assert table["rows"][1]["n"] == 1 and "1 runs have not ended: knn,seed=1" in table["notes"][-1]


def test_a_study_of_an_oracle_has_gains_and_break_evens(tmp_path):
    mined = {"miner": "oracle", "research-labels": True, "isl-start": 0}
    mined |= {"isl-loss": "meanlog", "isl-hpe": 0, "oracle-size": 5}
    points = [{"name": "none", "miner": "none"}]
    points += [{**mined, "name": f"p{p}", "oracle-precision": p} for p in (0.5, 0.95)]
    file = small_study(tmp_path, points, figures=["knn", "one_shot", "near"], title="digits")
    tables = judged(tmp_path, file)
    assert set(tables) == {"study", "study-gains"}
    rows = tables["study-gains"]["rows"]
    assert [row.get("precision") for row in rows] == [None, 0.5, 0.95]
    read = lambda name: json.loads((tmp_path / "runs" / name / "judged.json").read_text())["knn"]
    assert rows[2]["knn_gains"] == [pytest.approx(read("p0.95,seed=0") - read("none,seed=0"))]
    assert "Labels were used" in tables["study"]["notes"][0]
    table = read_breakeven(tmp_path / "runs" / "breakeven.json")
    assert breakeven_of(table, "meanlog", 4.0) is not None
    xml.etree.ElementTree.parse(tmp_path / "runs" / "breakeven.svg")


def test_a_gain_needs_the_figure_of_both_rows():
    found = {"none": {"0": {"logged": None}, "1": {"logged": 80.0}}}
    found["knn"] = {"0": {"logged": 90.0}, "1": {"logged": 85.0}}
    part = {"figures": ["logged"], "over": ["none"]}
    rows = judge.table("x", part, found, torch.device("cpu")).rows
    assert rows[1]["gain_logged"] == "+5.0"


def test_a_linear_figure_is_of_the_file_as_it_is(tmp_path):
    file, out = tmp_path / "file.pth.tar", tmp_path / "linear"
    out.mkdir()
    file.write_bytes(b"now")
    found = {"sha256": fingerprint(file), "classifiers": [{"chosen": True, "top1": 70.0}]}
    (out / "results.json").write_text(json.dumps(found))
    assert figures.linear(file, [], out) == 70
    file.write_bytes(b"later")
    with pytest.raises(BadInput, match="of an earlier state of .*file.pth.tar: remove that folder"):
        figures.linear(file, [], out)


def test_what_cannot_be_judged_is_one_line(tmp_path, capsys):
    file = tmp_path / "study.yaml"
    file.write_text("base: {dataset: digits}\npoints: [{name: a}]\nseeds: [0]\n")
    assert judge.main([str(file), "--job-dir", str(tmp_path / "runs")]) == 2
    assert "no run in" in capsys.readouterr().err
    file.write_text("points: [{name: a}]\njudge: {figures: [top1]}\n")
    assert judge.main([str(file)]) == 2
    said = capsys.readouterr().err
    assert "judge: figures[0] is 'top1'" in said and said.count("\n") == 1


@pytest.mark.long
def test_the_demo_prints_a_row_a_run_and_what_mining_added(tmp_path, monkeypatch, capsys):
    """make demo, of one epoch a run, without a terminal."""
    monkeypatch.setattr(demo, "OUT", tmp_path / "demo")
    short = ["--epochs", "1", "--device", "cpu"]
    for name in ("PRETRAIN", "CONTINUE"):
        monkeypatch.setattr(demo, name, short)
    mined = "--isl-start 0 --isl-budget 4".split()
    quick = {
        demo.PAPER: ("gan", ["--miner", "gan", *mined, "--isl-gan-iters", "20"]),
        demo.MINED: ("recommended", ["--miner", "knn", *mined]),
        demo.PLAIN: ("none", ["--miner", "none"]),
    }
    monkeypatch.setattr(demo, "CONTINUATIONS", quick)
    monkeypatch.setattr("sys.argv", ["demo"])
    demo.main()
    said, progress = capsys.readouterr()
    assert progress == ""
    first, rest = said.split("\nUCI digits")
    assert len(first.splitlines()) == 4, "a line a run"
    lines = rest[rest.index("kNN %") :].splitlines()[1:7]
    assert [line[:20].strip() for line in lines] == demo.ROWS
    assert lines[0].split()[2:] == ["94.2", "62.7"], "pixels are no encoder's"
    (seed,) = json.loads((tmp_path / "demo" / "table.json").read_text())["seeds"]
    assert seed[demo.MINED]["size"] > 0
    added = [f"{seed[demo.MINED][key] - seed[demo.PLAIN][key]:.1f}" for key in ("one_shot", "knn")]
    assert rest.splitlines()[-2] == (
        f"Mining added {added[0]} points of 1-shot and {added[1]} of kNN to equal epochs (n = 1)."
    )
    page = tmp_path / "demo" / "report.html"
    assert rest.splitlines()[-1].startswith(f"=> {page}")
    assert "against the same epochs without it (none-0)" in page.read_text()


def test_the_demo_says_over_seeds_what_mining_added():
    row = lambda shot, knn: {"one_shot": shot, "knn": knn}
    seeds = [
        {demo.MINED: row(80.0, 95.0), demo.PLAIN: row(61.0, 96.0)},
        {demo.MINED: row(82.0, 94.0), demo.PLAIN: row(61.0, 94.5)},
    ]
    assert demo.sentence(seeds) == (
        "Mining added 20.0 ± 1.4 points of 1-shot and -0.8 ± 0.4 of kNN to equal epochs (n = 2)."
    )


def test_the_demo_names_the_run_that_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "OUT", tmp_path / "demo")
    monkeypatch.setattr(demo, "PRETRAIN", ["--epochs", "0"])
    monkeypatch.setattr("sys.argv", ["demo"])
    with pytest.raises(SystemExit) as end:
        demo.main()
    assert "moco-0 ended with exit code 2: error: --epochs" in end.value.code


def test_without_the_extra_packages_the_demo_says_the_command(monkeypatch, capsys):
    monkeypatch.setattr(demo, "report", lambda flags: 2)
    demo.write_report()
    said = capsys.readouterr().out
    assert "python -m moco_isl.report runs/demo/recommended-0 runs/demo/gan-0" in said


def test_letters_are_drawn_alike_each_time_and_their_list_is_read(tmp_path, capsys, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setattr(letters, "NUMBERS", {"train": 12, "val": 2})
    fonts = ["--fonts", str(Path(matplotlib.get_data_path()) / "fonts" / "ttf")]
    for out in ("a", "b"):
        assert letters.main([str(tmp_path / out), *fonts, "--check", "110"]) == 0
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 10 * 14 + 3
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    images = data.build_dataset("folder", str(tmp_path / "a"), "train")
    known = read_labels(str(tmp_path / "a" / "check_1.txt"), images, images, "--isl-check")
    assert int((known >= 0).sum()) == 110
    assert torch.equal(known[known >= 0], images.labels[known >= 0])
    capsys.readouterr()
    assert letters.main([str(tmp_path / "a")]) == 2
    assert letters.main([str(tmp_path / "c"), "--fonts", str(tmp_path)]) == 2
    assert letters.main([str(tmp_path / "c"), *fonts, "--check", "121"]) == 2
    assert capsys.readouterr().err.count("expected") == 3 and not (tmp_path / "c").exists()
