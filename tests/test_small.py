"""Small data sets: which flags follow the number of images, what a run says of it, and the three
commands at its end, which run as they stand.
"""

import json
import math
import shlex
import sys

import pytest
import torch

import main_knn
import main_moco_isl
import moco_isl
from moco_isl.errors import BadInput
from moco_isl.report import __main__ as report
from moco_isl.run import checkpoint
from moco_isl.run.meters import duration
from moco_isl.training import options, small
from tests.runs import photos

MOCO = {"batch_size": 256, "lr": 0.03, "moco_k": 65536, "moco_m": 0.999, "dc_every": 1}
ALL = set(MOCO) - {"dc_every"}


@pytest.mark.parametrize("x, power", [(0.2, 1), (1, 1), (2, 2), (3.9, 2), (4, 4), (718, 512)])
def test_powers_of_two(x, power):
    assert small.power_of_two(x) == power


@pytest.mark.parametrize(
    "M, found",
    [
        (1_281_167, {}),  # ImageNet: MoCo's own
        (131_072, {}),
        (131_071, {"moco_k": 32768}),
        (51_200, {"moco_k": 16384}),  # 200 steps an epoch
        (20_000, {"moco_k": 8192, "moco_m": 0.997}),
        (1_437, {"batch_size": 64, "lr": 0.0075, "moco_k": 512, "moco_m": 0.99}),
        (20, {"batch_size": 32, "lr": 0.00375, "moco_k": 32, "moco_m": 0.99}),
    ],
)
def test_flags_follow_the_number_of_images(M, found):
    assert small.suited(M, MOCO, ALL) == pytest.approx(found)


@pytest.mark.parametrize("M", [5, 63, 64, 700, 5119, 5120, 40_000, 90_000])
def test_what_follows_keeps_to_its_rules(M):
    flags = MOCO | small.suited(M, MOCO, ALL)
    B, K, m = flags["batch_size"], flags["moco_k"], flags["moco_m"]
    assert 32 <= B <= 256 and (M // B >= 20 or B == 32)
    assert flags["lr"] / B == pytest.approx(0.03 / 256)
    assert K <= max(M / 2, B) and math.log2(K).is_integer()
    assert 1 / (1 - m) <= max(5 * (M // B), 100) + 1e-6 and 0.99 <= m <= 0.999


def test_flags_that_are_given_stay_and_the_others_follow_them():
    found = small.suited(1437, MOCO, {"moco_k", "moco_m", "lr"})  # -b 256 was given
    assert found == {"moco_k": 512, "moco_m": 0.99}
    assert small.suited(1437, MOCO, set()) == {}


@pytest.mark.parametrize(
    ("M", "batch", "every"),
    [(1_281_167, 256, 1), (51_200, 256, 1), (50_000, 256, 2), (1437, 64, 10), (20, 32, 200)],
)
def test_clusters_stay_for_200_steps(M, batch, every):
    values = MOCO | {"batch_size": batch}
    found = small.suited(M, values, {"dc_every"}).get("dc_every", 1)
    assert found == every and found * max(M // batch, 1) >= 200
    assert small.suited(M, values | {"dc_every": 500}, {"dc_every"}) == {}


def test_a_batch_that_does_not_divide_into_the_ranks_stays():
    assert "batch_size" not in small.suited(1437, MOCO, ALL, parts=3)
    assert "batch_size" not in small.suited(1437, MOCO, ALL, parts=64)  # one image a rank
    assert small.suited(1437, MOCO, ALL, parts=32)["batch_size"] == 64
    assert small.suited(100, MOCO, ALL, views=2)["moco_k"] == 64  # two keys of 32 images


def parsed(*argv):
    args = options.get_parser("").parse_args(list(argv))
    args.world = 1
    return args


def test_a_line_names_what_was_set():
    args = parsed("--dataset", "digits", "-b", "128")
    line = options.suit(args, 1437)
    assert (args.batch_size, args.lr, args.moco_k, args.moco_m) == (128, 0.03, 512, 0.99)
    assert line.startswith("1,437 images: --moco-k 512, --moco-m 0.99 suit them better")
    assert options.suit(parsed("--dataset", "digits"), 2_000_000) == ""


def test_the_queue_s_flags_are_left_to_the_queue():
    args = parsed("--dataset", "digits", "--objective", "bank")
    options.suit(args, 1437)
    assert (args.batch_size, args.moco_k, args.moco_m) == (64, 65536, 0.999)


def test_few_images_get_a_plain_sentence():
    assert small.what_to_expect(1000) == ""
    assert small.what_to_expect(999).startswith("999 images are few to learn from")


@pytest.mark.parametrize(
    "seconds, words",
    [(0.2, "0 s"), (58.4, "58 s"), (60, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


# ---------------------------------------------------------------- runs

DIGITS = "--dataset digits -a digits --mlp --moco-dim 16 --moco-t 0.1 -j 0 --device cpu".split()


def test_a_run_says_what_follows_and_a_resumed_one_keeps_it(tmp_path, capfd):
    out = tmp_path / "out"
    flags = [*DIGITS, "--knn-holdout", "1000", "--epochs", "2", "--out", str(out)]
    assert main_moco_isl.main([*flags, "--max-steps", "3"]) == 0
    said = capfd.readouterr().out
    line = "=> 437 images: --batch-size 32, --lr 0.00375, --moco-k 128, --moco-m 0.99 suit"
    assert line in said and "=> 437 images are few to learn from without labels" in said
    saved = checkpoint.load(out / "checkpoint_last.pth.tar")
    assert saved["args"]["batch_size"] == 32
    assert saved["state_dict"]["module.queue"].shape == (16, 128)
    assert "notes" not in saved["args"]
    assert main_moco_isl.main([*flags, "--resume", "auto"]) == 0
    said = capfd.readouterr().out
    assert "suit them better" not in said
    assert checkpoint.load(out / "checkpoint_last.pth.tar")["args"]["batch_size"] == 32


def test_a_run_from_a_small_one_s_file_needs_no_flags_either(tmp_path, capfd):
    """K and batch follow the new run's images before they are compared with each other."""
    few = [*DIGITS, "--knn-holdout", "1400", "--epochs", "1"]
    assert main_moco_isl.main([*few, "--out", str(tmp_path / "few")]) == 0
    start = ["--init", str(tmp_path / "few"), "--miner", "knn"]
    assert main_moco_isl.main([*few, *start, "--out", str(tmp_path / "again")]) == 0
    more = [*DIGITS, "--epochs", "1", *start, "--out", str(tmp_path / "more"), "--max-steps", "1"]
    capfd.readouterr()
    assert main_moco_isl.main(more) == 0
    said = capfd.readouterr().out
    assert "--moco-k 512" in said and "ended by --max-steps 1" in said and "next:" not in said
    flags = json.loads((tmp_path / "more" / "args.json").read_text())["args"]
    assert (flags["moco_k"], flags["batch_size"]) == (512, 64)


def commands_after(said):
    """The argv of the commands that stand behind "next:"."""
    lines = said[said.index("; next:\n") :].splitlines()[1:4]
    return [shlex.split(line) for line in lines]


def run_command(argv, cwd, monkeypatch):
    """Run a printed `python SCRIPT ...` in this process; returns its exit code."""
    monkeypatch.chdir(cwd)
    known = {"main_knn.py": main_knn.main, "main_moco_isl.py": main_moco_isl.main}
    if argv[1] == "-m":
        assert argv[2] == "moco_isl.report"
        return report.main(argv[3:])
    return known[argv[1].rpartition("/")[2]]([*argv[2:], "-j", "0", "--device", "cpu"])


def test_a_run_ends_with_three_commands_that_run(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main_moco_isl.py"])
    monkeypatch.chdir(tmp_path)
    flags = [*DIGITS, "--knn-holdout", "700", "--epochs", "1", "--cos", "--out", "a run"]
    assert main_moco_isl.main(flags) == 0
    said = capfd.readouterr().out
    assert "; checkpoint a run/checkpoint_last.pth.tar; next:\n" in said
    found = commands_after(said)
    assert len(found) == 3
    for argv in found:
        assert argv[0] == "python"
        assert run_command(argv, tmp_path, monkeypatch) == 0, argv
    flags = json.loads((tmp_path / "a run-mined" / "args.json").read_text())["args"]
    assert (flags["miner"], flags["isl_budget"], flags["cos"]) == ("average", ["auto"], True)
    assert (flags["mlp"], flags["moco_dim"], flags["moco_t"]) == (True, 16, 0.1)


def test_whole_numbers_of_the_next_command_stay_whole():
    """A queue of a million keys is not typed as 1.04858e+06."""
    args = parsed("--dataset", "digits", "--out", "x", "--moco-k", str(2**20), "--epochs", "3")
    args.channels, args.bits = 3, 8  # as a run fills them in
    *_, mine = options.next_commands(args, labelled=True)
    again = options.get_parser("").parse_args(shlex.split(mine)[2:])
    assert (again.moco_k, again.epochs) == (2**20, 3)


def test_without_labels_features_come_next(tmp_path):
    args = parsed(str(tmp_path), "--out", "x", "--miner", "knn")
    judge, look, more = options.next_commands(args, labelled=False)
    assert "embed" in judge and judge.endswith("--out features.parquet")
    assert "report" in look and "export" in more and "--to safetensors" in more


# ---------------------------------------------------------------- moco_isl.pretrain


def test_pretrain_is_the_script_with_the_same_flags(tmp_path):
    flags = {"mlp": True, "moco_dim": 16, "moco_t": 0.1, "epochs": 2, "seed": 1, "workers": 0}
    run = moco_isl.pretrain(
        dataset="digits", arch="digits", out=tmp_path / "a", knn_holdout=900, device="cpu", **flags
    )
    argv = [*DIGITS, "--epochs", "2", "--seed", "1", "--knn-holdout", "900"]
    assert main_moco_isl.main([*argv, "--out", str(tmp_path / "b")]) == 0
    a, b = (checkpoint.load(tmp_path / x / "checkpoint_last.pth.tar") for x in "ab")
    assert all(torch.equal(t, b["state_dict"][n]) for n, t in a["state_dict"].items())
    assert run.checkpoint == tmp_path / "a" / "checkpoint_last.pth.tar"
    assert len(run.epochs) == 2 and not run.rounds
    assert str(run).startswith(f"{tmp_path / 'a'}: 2 epochs, loss {run.epochs[-1]['loss']:.2f}")


def test_pretrain_takes_several_folders_and_switches(tmp_path):
    flags = photos(tmp_path / "one", 12)
    photos(tmp_path / "two", 14)
    run = moco_isl.pretrain(
        [tmp_path / "one", tmp_path / "two"],
        out=tmp_path / "out",
        arch=flags[flags.index("-a") + 1],
        batch_size=8,
        epochs=1,
        max_steps=1,
        workers=0,
        image_size=16,
        aug_plus=True,
        cos=False,
    )
    assert "checkpoint" in str(run) and (tmp_path / "out" / "args.json").is_file()


@pytest.mark.parametrize(
    "given, said",
    [
        ({"dataset": "digits", "epoch": 3}, r"no flag named 'epoch' \(did you mean"),
        ({"dataset": "digits", "epochs": "many"}, "epochs"),
        ({"dataset": "digits", "mlp": "perhaps"}, "is a switch: expected true or false"),
        ({"data": "nowhere"}, "no such folder"),
    ],
)
def test_pretrain_raises_what_the_script_says(tmp_path, given, said):
    with pytest.raises(BadInput, match=said):
        moco_isl.pretrain(out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
