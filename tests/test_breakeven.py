"""The break-even study: its crossing against brute force and planted lines, its runs made once, its
files in the forms that others read.
"""

import json
import random
import statistics
import xml.etree.ElementTree
from pathlib import Path

import pytest

import main_moco_isl
from benchmarks import breakeven, gain
from benchmarks.breakeven import bootstrap, closer, crossing, monotone
from moco_isl.report.verdict import breakeven_of, read_breakeven
from moco_isl.training.options import check_args


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


def test_the_cifar_form_gives_flags_that_the_script_takes():
    args = breakeven.get_parser().parse_args(
        ["--dataset", "cifar10", "somewhere", "--device", "cpu", "--flags", "-b 256"]
    )
    setting = breakeven.setting(args)
    for point in (
        breakeven.Point(1),
        *(breakeven.Point(1, form, 2, 0.8) for form in breakeven.FORMS),
    ):
        flags = main_moco_isl.get_parser().parse_args(
            [*setting.common, *setting.go_on, *point.flags("near", "near", 20), "--seed", "1"]
        )
        check_args(flags)
        assert (flags.dataset, flags.data, flags.arch, flags.batch_size) == (
            "cifar10",
            "somewhere",
            "resnet18w32",
            256,
        )
        assert flags.research_labels == (point.form is not None)
        assert getattr(flags, "oracle_right", None) == (None if point.form is None else "near")


def written(folder, name):
    return next(
        found
        for path in folder.glob("*.json")
        if (found := json.loads(path.read_text()))["name"] == name
    )


def test_a_study_is_made_once_and_goes_on(tmp_path, monkeypatch):
    command = [
        "--quick",
        "--seeds",
        "1",
        "--device",
        "cpu",
        "--folder",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path),
        "--flags",
        "--knn-holdout 1000",
    ]
    assert breakeven.main([*command, "--minutes", "0"]) == 75 and not list(tmp_path.glob("*.json"))
    assert breakeven.main(command) == 0
    assert sorted(p.name for p in (tmp_path / "runs").glob("*-0*.json")) == [
        "meanlog-size5-precision0.5-0-right-near.json",
        "meanlog-size5-precision0.95-0-right-near.json",
        "none-0.json",
        "start-0.json",
    ]
    table = read_breakeven(tmp_path / "runs" / "breakeven.json")
    assert breakeven_of(table, "meanlog", 4.0) is not None
    xml.etree.ElementTree.parse(tmp_path / "runs" / "breakeven.svg")
    result = written(tmp_path, "breakeven-digits-right-near-gains")
    row = next(row for row in result["rows"] if row["precision"] == 0.95)
    point, none = (
        json.loads((tmp_path / "runs" / f"{name}.json").read_text())
        for name in ("meanlog-size5-precision0.95-0-right-near", "none-0")
    )
    assert (
        row["knn_gains"] == [pytest.approx(point["knn"] - none["knn"])]
        and "--research-labels" in point["flags"]
    )
    assert "Labels were used" in written(tmp_path, "breakeven-digits-right-near")["notes"][0]
    monkeypatch.setattr(
        main_moco_isl, "main", lambda *_: pytest.fail("a run that has ended was run again")
    )
    again = tmp_path / "again"
    assert breakeven.main([*command[:-4], "--out", str(again), *command[-2:]]) == 0
    assert written(again, "breakeven-digits-right-near-gains")["rows"] == result["rows"]
    assert breakeven.main([*command, "--every", "7"]) == 2, "other flags under the same name"
    assert Path(tmp_path / "runs" / "start-0" / "checkpoint_last.pth.tar").exists()


def test_gains_have_a_row_each_beside_their_break_even(tmp_path):
    command = [
        "--quick",
        "--seeds",
        "1",
        "--device",
        "cpu",
        "--folder",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path),
        "--flags",
        "--knn-holdout 1000",
    ]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "breakeven.json").write_text('{"meanlog": {"5": 0.43, "20": 0.9}}')
    assert gain.main([*command, "--rows", "own nearest (knn)"]) == 0
    rows = written(tmp_path, "gain-digits")["rows"]
    assert [row["row"] for row in rows] == ["no mining", "own nearest (knn)"]
    assert rows[0]["gain"] is None and rows[0]["breakeven"] is None
    figures = [json.loads((tmp_path / "runs" / f"gain{i}-0.json").read_text()) for i in (0, 1)]
    assert float(rows[1]["gain"]) == pytest.approx(figures[1]["knn"] - figures[0]["knn"], abs=0.051)
    assert (rows[1]["size"], rows[1]["breakeven"]) == ("10.00", "0.90") and float(
        rows[1]["precision"]
    ) == pytest.approx(figures[1]["rounds"][-1]["precision"], abs=0.006)
    assert 10 < float(rows[1]["linear"]) <= 100
    assert (
        gain.main(["--dataset", "cifar10", "--device", "cpu", "--folder", str(tmp_path / "no")])
        == 2
    )


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_rows_of_the_gain_are_flags_that_the_script_takes(dataset):
    args = breakeven.shared_parser("").parse_args(
        ["--dataset", dataset, *(["somewhere"] if dataset != "digits" else []), "--device", "cpu"]
    )
    setting = breakeven.setting(args)
    for title, row in gain.rows_of(args).items():
        flags = main_moco_isl.get_parser().parse_args(
            [*setting.common, *setting.go_on, *row, "--seed", "1"]
        )
        check_args(flags)
        assert (flags.isl_budget, flags.isl_loss) == (
            ([10], "meanlog") if dataset == "digits" else ([5], "logsum")
        ) or title == "no mining"


def test_right_positives_from_anywhere_have_runs_and_results_of_their_own(tmp_path):
    command = [
        "--quick",
        "--seeds",
        "1",
        "--device",
        "cpu",
        "--folder",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path),
        "--flags",
        "--knn-holdout 1000",
    ]
    assert breakeven.main([*command, "--right", "uniform"]) == 0
    assert sorted(p.name for p in (tmp_path / "runs").glob("*-0*.json")) == [
        "meanlog-size5-precision0.5-0-right-uniform.json",
        "meanlog-size5-precision0.95-0-right-uniform.json",
        "none-0.json",
        "start-0.json",
    ]
    assert "right ones: uniform" in written(tmp_path, "breakeven-digits-right-uniform")["notes"][0]
    assert (tmp_path / "runs" / "breakeven-right-uniform.json").exists() and not (
        tmp_path / "runs" / "breakeven.json"
    ).exists()
    flags = json.loads(
        (tmp_path / "runs" / "meanlog-size5-precision0.5-0-right-uniform.json").read_text()
    )["flags"]
    assert flags[flags.index("--oracle-right") + 1] == "uniform"
