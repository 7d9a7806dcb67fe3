"""Which rounds of mining a run has, wherever it starts, and what hangs on their number."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

import main_moco_isl
from moco_isl.run import checkpoint
from moco_isl.training.engine import rounds_until
from tests.runs import differences
from tests.test_bad_input import ask

# 97 images, two steps an epoch
SMALL = (
    "--dataset digits -a digits --moco-dim 16 --moco-t 0.1 --knn-holdout 1340 -b 64 -j 0 --seed 1"
    " -p 100 --device cpu --objective bank --isl-hpe 0 --miner entropy"
    " --isl-share 0.15 --isl-budget 0.2 0.4 0.6 0.8 1 --isl-neighbors 5"
).split()
LATE = [*SMALL, "--epochs", "9", "--isl-start", "0", "--isl-every", "2"]


def rounds(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "round"]


def test_rounds_until_equals_a_count():
    for start, every, epoch in itertools.product((0, 1, 4), (1, 2, 3), range(9)):
        assert rounds_until(epoch, start, every) == sum(
            (e - start) % every == 0 for e in range(start, epoch + 1)
        )


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    out = tmp_path_factory.mktemp("late") / "out"
    code, _, err = ask([*LATE, "--start-epoch", "5", "--out", str(out)])
    assert (code, err) == (0, "")
    return out


def test_a_late_start_mines_once_and_then_by_the_schedule(late):
    """Rounds are due before epochs 0, 2, 4, 6 and 8.

    Budget and share are those of a round's number: the n-th budget, and 0.15 n.
    """
    found = rounds(late)
    assert [(line["epoch"], line["round"]) for line in found] == [(5, 3), (6, 4), (8, 5)]
    assert [line["share"] for line in found] == pytest.approx([0.45, 0.6, 0.75])
    assert [line["mean_size"] for line in found] == pytest.approx([0.6, 0.8, 1.0], abs=0.02)
    assert sorted(path.name for path in (late / "rounds").iterdir()) == [
        f"round_000{n}.pt" for n in (3, 4, 5)
    ]


@pytest.mark.parametrize("polls", [7, 12])
def test_a_late_start_that_is_stopped_goes_on_as_if_it_had_not_been(late, tmp_path, polls):
    """In its first round, and in the round that is next in the schedule."""
    asked, out = itertools.count(), tmp_path / "out"
    flags = [*LATE, "--start-epoch", "5", "--out", str(out)]
    assert main_moco_isl.main(flags, lambda: next(asked) >= polls) == 75
    assert ask([*flags, "--resume", "auto"])[0] == 0
    assert differences(late, out) == []


def test_a_file_of_moco_with_an_epoch_is_a_late_start_too(late, tmp_path):
    content = checkpoint.load(late / "checkpoint_0005.pth.tar")
    checkpoint.save(
        {"epoch": 7, "arch": "digits", "state_dict": content["state_dict"]},
        tmp_path / "moco.pth.tar",
    )
    assert (
        ask([*LATE, "--resume", str(tmp_path / "moco.pth.tar"), "--out", str(tmp_path / "out")])[0]
        == 0
    )
    assert [(line["epoch"], line["round"]) for line in rounds(tmp_path / "out")] == [(7, 4), (8, 5)]


def test_a_run_of_two_rounds_takes_more_epochs_until_they_would_change_its_past(tmp_path):
    """A tenth from the fourth epoch of a round on: of 8 epochs 3 and 7 train slowly, of 16 epochs 3
    to 7 do, so that 4 is the first to differ.
    """
    flags = [
        *SMALL[: SMALL.index("--miner")],
        "--isl-rounds",
        "2",
        "--schedule",
        "3",
        "--out",
        str(tmp_path / "out"),
    ]
    for steps, code, epochs in ((8, 0, "8"), (9, 0, "8"), (16, 2, "16")):
        found = ask([*flags, "--epochs", epochs, "--max-steps", str(steps), "--resume", "auto"])
        assert found[0] == code
    assert (
        "--epochs was 8 and is now 16 (epoch 4 would have been trained at 0.1 times its learning"
        " rate)" in found[2]
    )
    shutil.copy(tmp_path / "out" / "checkpoint_0003.pth.tar", tmp_path / "early.pth.tar")
    assert (
        ask(
            [
                *flags[:-1],
                str(tmp_path / "other"),
                "--epochs",
                "16",
                "--max-steps",
                "9",
                "--resume",
                str(tmp_path / "early.pth.tar"),
            ]
        )[0]
        == 0
    )
