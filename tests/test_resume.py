"""A resumed run is the unbroken one, bit for bit: killed anywhere, stopped anywhere, with other
workers; and what may not be resumed is refused.
"""

import contextlib
import io
import itertools
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch

import main_moco_isl
from moco_isl import pretraining
from moco_isl.errors import BadInput
from moco_isl.miners import find_miner
from moco_isl.miners import gan as gan_miner
from moco_isl.mining import gan_training
from moco_isl.options import flags_of
from moco_isl.run import checkpoint
from moco_isl.run.folder import numbered
from moco_isl.run.meters import Averages
from moco_isl.run.signals import Stop
from moco_isl.training import resume
from tests.kill_and_resume import SETTINGS, setting
from tests.ranks import run_ranks
from tests.runs import DIGITS, Kill, Running, differences, metrics, photos, random_kill, run
from tests.test_bad_input import RUN as FLAGS
from tests.test_bad_input import ask

# ---- killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, stage, rank",
    [
        ("one process", "epoch", 0),
        ("one process", "GAN", 0),
        ("one process", "mining", 0),
        ("one process", "save", 0),
        ("two workers", "epoch", 0),
        ("two workers", "save", 0),
        ("two ranks", "epoch", 1),
        ("two ranks", "mining", 0),
        ("few saves", "epoch", 0),
    ],
)
def test_killed_and_resumed_it_equals_the_unbroken_run(name, stage, rank):
    way, draw = setting(name), random.Random(f"{name} {stage}")
    assert way.kill(random_kill(draw, way.seconds, stage), rank)[0] == []


def test_the_comparison_sees_a_bit_and_a_line(tmp_path):
    other, whole = tmp_path / "other", setting("one process").whole
    shutil.copytree(whole, other)
    assert differences(whole, other) == []
    content = checkpoint.load(other / "checkpoint_last.pth.tar")
    content["state_dict"]["module.queue"].view(torch.int32)[3, 5] ^= 1
    checkpoint.save(content, other / "checkpoint_last.pth.tar")
    (other / "rounds" / "round_0001.pt").unlink()
    lines = (other / "metrics.jsonl").read_text().splitlines(True)
    (other / "metrics.jsonl").write_text("".join([*lines[:4], lines[3], *lines[4:]]))
    assert differences(whole, other) == [
        "only one has rounds/round_0001.pt",
        "checkpoint_last.pth.tar.state_dict.module.queue",
        f"metrics.jsonl, line 5 of {len(lines)} and {len(lines) + 1}",
    ]


def test_few_saves_go_back_to_the_last_one(tmp_path):
    """Killed as epoch 5 begins, a run that has saved after epoch 3 trains epoch 4 again, and its
    lines are there once.
    """
    way, out = setting("few saves"), tmp_path / "out"
    assert [p.name for p in numbered(way.whole)] == [
        "checkpoint_0005.pth.tar",
        "checkpoint_0006.pth.tar",
    ]
    Running([*way.argv, "--out", out], tmp_path / "log", kill=(0, Kill("epoch", 6, 0))).codes()
    before = metrics(out)
    assert checkpoint.load(out / "checkpoint_last.pth.tar")["epoch"] == 4 and any(
        line["kind"] == "epoch" and line["epoch"] == 4 for line in before
    )
    assert [p.name for p in numbered(out)] == ["checkpoint_0001.pth.tar", "checkpoint_0003.pth.tar"]
    run([*way.argv, "--out", out, "--resume", "auto"], tmp_path / "log")
    assert differences(way.whole, out) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_the_runs_compared_have_something_to_lose(name):
    """Positives, warm networks, moving statistics, a round and a kNN in their lines: otherwise they
    would be equal too easily.
    """
    way = setting(name)
    kinds = [line["kind"] for line in metrics(way.whole)]
    assert (
        kinds.count("round") == 2
        and kinds.count("epoch") == (7 if name == "few saves" else 3)
        and kinds.count("step") >= 9
    )
    ours = checkpoint.load(way.whole / "checkpoint_last.pth.tar")["isl"]
    assert (
        len(ours["state"]["positives"]["members"]) > 10
        and ours["miner"]["networks"]["G"]
        and len(ours["rng"]) == way.ranks
    )


# ---- stopped -------------------------------------------------------------------------------------


def after(polls: int):
    """A launcher's stop that says yes from the (polls + 1)-th question on."""
    asked = itertools.count()
    return lambda: next(asked) >= polls


def test_stopped_over_and_over_with_other_workers(tmp_path):
    """After a few polls, wherever they fall: in steps, feature passes, GAN training, mining;
    workers come and go.
    """
    way, codes, said = setting("two workers"), [], ""
    polls = itertools.cycle([1, 3, 30, 2, 5, 150])
    while not codes or codes[-1] == 75:
        code = _main(
            [
                *way.argv,
                "-j",
                str(len(codes) % 3 // 2),
                "--save-every",
                "0",
                "--out",
                str(tmp_path / "out"),
                "--resume",
                "auto",
            ],
            after(next(polls)),
        )
        codes.append(code[0])
        said += code[2]
        assert len(codes) < 40
    assert codes[-1] == 0 and len(codes) > 4 and differences(way.whole, tmp_path / "out") == []
    assert "saved before the mining of epoch" in said and "saved at epoch" in said


@pytest.mark.parametrize(
    "objective, polls, place",
    [
        ("queue", 8, "saved at the end of epoch 0"),
        ("queue", 20, "saved at the end of epoch 0"),
        ("bank", 4, "saved at epoch 0, step 5 of 7"),
        ("bank", 7 + 23 + 3, "saved before the mining of epoch 1"),
    ],
)
def test_stopped_once_in_knn_and_in_the_bank(tmp_path, objective, polls, place):
    """An epoch of 7 steps, then kNN: a pass over 437 images and one over the 1,000 held out, which
    is 7 + 16 polls.
    """
    flags = [
        *DIGITS,
        "--epochs",
        2,
        "--knn-every",
        1,
        "--objective",
        objective,
        "--miner",
        "knn",
        "--isl-start",
        1,
    ]
    assert _main([*flags, "--out", tmp_path / "whole"], None)[0] == 0
    code, _, err = _main([*flags, "--out", tmp_path / "out"], after(polls))
    assert code == 75 and place in err
    assert _main([*flags, "--out", tmp_path / "out", "--resume", "auto"], None)[0] == 0
    assert differences(tmp_path / "whole", tmp_path / "out") == []


def _main(argv, stop):
    before = gan_training.collapse, gan_miner.collapse
    # as in the processes that it is compared with
    gan_training.collapse = gan_miner.collapse = lambda *_: ""
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            return main_moco_isl.main([str(x) for x in argv], stop), out.getvalue(), err.getvalue()
    finally:
        gan_training.collapse, gan_miner.collapse = before


# ---- where nothing may be lost -------------------------------------------------------------------


def files(path):
    return {
        p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(path).iterdir() if p.is_file()
    }


@pytest.mark.parametrize(
    "flags",
    [
        ["--resume", "auto"],
        ["--resume", "{}/checkpoint_last.pth.tar"],
        ["--resume", "auto", "-j", "1", "--print-freq", "7"],
    ],
)
def test_a_finished_run_stays_as_it_is(finished, flags):
    before = files(finished)
    code, out, err = ask(
        [*FLAGS, "--out", str(finished), *(flag.format(finished) for flag in flags)]
    )
    assert (code, err, out) == (0, "", "=> already finished: epoch 2 of 2\n")
    assert files(finished) == before


def test_steps_that_were_all_taken_are_enough(tmp_path):
    flags = [*FLAGS, "--max-steps", "3", "--out", str(tmp_path)]
    assert ask(flags)[0] == 0
    before = files(tmp_path)
    code, out, _ = ask([*flags, "--resume", "auto"])
    assert (
        code == 0
        and "already finished: 3 steps of --max-steps 3" in out
        and files(tmp_path) == before
    )


def test_killed_before_the_first_checkpoint_it_starts_anew(finished, tmp_path):
    """A folder with lines of metrics and nothing else."""
    (tmp_path / "metrics.jsonl").write_bytes((finished / "metrics.jsonl").read_bytes()[:500])
    shutil.copy(finished / "args.json", tmp_path)
    assert ask([*FLAGS, "--out", str(tmp_path)])[0] == 2
    assert ask([*FLAGS, "--out", str(tmp_path), "--resume", "auto"])[0] == 0
    assert differences(finished, tmp_path) == []


def test_another_folder_goes_on_from_a_file_and_leaves_its_own_alone(finished, tmp_path):
    before = files(finished)
    code, out, err = ask(
        [
            *FLAGS,
            "--out",
            str(tmp_path / "new"),
            "--resume",
            str(finished / "checkpoint_0000.pth.tar"),
        ]
    )
    assert (code, err) == (0, "") and files(finished) == before
    lines = metrics(finished)
    assert metrics(tmp_path / "new") == lines[[line["kind"] for line in lines].index("epoch") + 1 :]
    # the first epoch is missing here, but not in the last checkpoint:
    assert differences(finished, tmp_path / "new") != []
    last = [
        checkpoint.load(out / "checkpoint_last.pth.tar")["state_dict"]
        for out in (finished, tmp_path / "new")
    ]
    assert all(torch.equal(x, last[1][name]) for name, x in last[0].items())


def test_without_the_last_file_the_numbered_one_is_gone_on_with(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    for name in ("checkpoint_last.pth.tar", "checkpoint_0001.pth.tar"):
        (tmp_path / "out" / name).unlink()
    assert ask([*FLAGS, "--out", str(tmp_path / "out"), "--resume", "auto"])[0] == 0
    assert differences(finished, tmp_path / "out") == []


def test_a_file_of_the_folder_itself_is_gone_on_with_if_it_is_the_newest(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    out = tmp_path / "out"
    shutil.copy(out / "checkpoint_0000.pth.tar", out / "checkpoint_last.pth.tar")
    for older in ("checkpoint_last.pth.tar", "checkpoint_0000.pth.tar"):
        assert ask([*FLAGS, "--out", str(out), "--resume", str(out / older)])[0] == 0
        assert differences(finished, out) == []
        before = files(out)
        assert (
            ask([*FLAGS, "--out", str(out), "--resume", str(out / "checkpoint_0000.pth.tar")])[0]
            == 2
            and files(out) == before
        )
        shutil.copy(out / "checkpoint_0000.pth.tar", out / "checkpoint_last.pth.tar")


def test_saves_after_every_nth_epoch_and_the_last(tmp_path):
    """How often may change on a resume: nothing of the training depends on it."""
    flags = [*DIGITS, "--epochs", "5", "--out", str(tmp_path / "out")]

    def saved() -> list[str]:
        return [p.name.removeprefix("checkpoint_")[:4] for p in numbered(tmp_path / "out")]

    assert ask([*flags, "--save-epochs", "10", "--max-steps", "20"])[0] == 0
    assert (
        saved() == []
        and checkpoint.load(tmp_path / "out" / "checkpoint_last.pth.tar")["isl"]["step"] == 6
    )
    assert ask([*flags, "--save-epochs", "2", "--resume", "auto"])[0] == 0 and saved() == [
        "0003",
        "0004",
    ]
    assert (
        ask([*DIGITS, "--epochs", "5", "--save-epochs", "7", "--out", str(tmp_path / "other")])[0]
        == 0
    )
    assert metrics(tmp_path / "out") == metrics(tmp_path / "other") and names(
        tmp_path / "other"
    ) == ["checkpoint_0004.pth.tar", "checkpoint_last.pth.tar"]


def names(out: Path) -> list[str]:
    return sorted(p.name for p in out.glob("checkpoint_*"))


def test_a_run_that_goes_on_from_a_file_elsewhere_can_be_resumed_from_its_first_step(
    finished, tmp_path
):
    """However seldom it saves: a launcher gives --resume auto as soon as there is a checkpoint."""
    flags = [*FLAGS, "--save-epochs", "10", "--out", str(tmp_path / "new")]
    argv = [*flags, "--resume", str(finished / "checkpoint_0000.pth.tar")]
    assert Running(argv, tmp_path / "log", kill=(0, Kill("epoch", 1, 0))).codes() == [-9]
    assert names(tmp_path / "new") == ["checkpoint_last.pth.tar"]
    assert ask([*flags, "--resume", "auto"])[0] == 0
    lines = metrics(finished)
    assert metrics(tmp_path / "new") == lines[[line["kind"] for line in lines].index("epoch") + 1 :]


# ---- what may change, and what may not -----------------------------------------------------------


def test_a_drawn_seed_is_taken_over(tmp_path):
    flags = FLAGS[: FLAGS.index("--seed")] + FLAGS[FLAGS.index("--seed") + 2 :]
    assert ask([*flags, "--max-steps", "2", "--out", str(tmp_path)])[0] == 0
    seed = json.loads((tmp_path / "args.json").read_text())["args"]["seed"]
    code, out, err = ask([*flags, "--max-steps", "4", "--out", str(tmp_path), "--resume", "auto"])
    assert (code, err) == (0, "") and f"seed {seed}," in out


def test_the_same_command_starts_from_a_file_and_goes_on_with_the_run(finished, tmp_path):
    """--init with --resume auto, as a launcher gives it at every start; without --init the defaults
    that hang on it are kept too.
    """
    flags = [*FLAGS, "--out", str(tmp_path), "--miner", "knn"]
    both = [*flags, "--init", str(finished / "checkpoint_last.pth.tar"), "--resume", "auto"]
    code, out, _ = ask([*both, "--max-steps", "2"])
    assert code == 0 and "knn: " in out and "(epoch 2)" in out
    code, out, _ = ask([*both, "--max-steps", "4"])
    assert (
        code == 0
        and f"=> loaded '{tmp_path}/checkpoint_last.pth.tar' (epoch 0)" in out
        and "knn: " not in out
    )
    assert ask([*flags, "--resume", "auto", "--max-steps", "5"])[0] == 0


def test_what_may_change_and_what_may_not():
    saved = {
        "lr": 0.1,
        "epochs": 5,
        "cos": False,
        "arch": "a",
        "workers": 2,
        "print_freq": 10,
        "device": "cpu",
        "data": "here",
        "gone": 1,
    }
    resume.check_same(
        saved, {**saved, "workers": 0, "print_freq": 1, "device": "cuda", "data": "there", "new": 3}
    )
    resume.check_same(
        saved, {name: value for name, value in saved.items() if name != "gone"} | {"epochs": 9}
    )
    for name, value in {"lr": 0.2, "epochs": 4, "cos": True, "arch": "b"}.items():
        with pytest.raises(BadInput, match=f"--{name} was {saved[name]!r} and is now {value!r}"):
            resume.check_same(saved, {**saved, name: value})
    # half a cosine over 9 is another schedule
    with pytest.raises(BadInput, match="--epochs was 5 and is now 9"):
        resume.check_same({**saved, "cos": True}, {**saved, "cos": True, "epochs": 9})


@pytest.mark.parametrize(
    "flags",
    [
        {"schedule": [3], "isl_rounds": 2, "cos": False},
        {"schedule": [], "isl_rounds": 1, "cos": True},
        {"schedule": [2, 5], "isl_rounds": 4, "cos": False},
        {"schedule": [3, 6], "isl_rounds": 1, "cos": False},
        {"schedule": [3, 6]},
    ],
)
def test_more_epochs_are_taken_where_those_begun_keep_their_learning_rate(flags):
    """Written out: by the round's length, a tenth at each milestone or half a cosine.

    The last flags are those of a linear probe.
    """

    def rate(epoch, epochs):
        length = epochs // flags.get("isl_rounds", 1)
        at = epoch % length
        return (
            0.5 + 0.5 * math.cos(math.pi * at / length)
            if flags.get("cos")
            else 0.1 ** len([m for m in flags["schedule"] if m <= at])
        )

    first = next((e for e in range(8) if rate(e, 8) != rate(e, 16)), 8)
    assert first == {2: 4, 4: 2}.get(flags.get("isl_rounds"), 1 if flags.get("cos") else 8)
    for begun in range(9):
        if begun <= first:
            resume.check_same({**flags, "epochs": 8}, {**flags, "epochs": 16}, epochs=begun)
            continue
        with pytest.raises(
            BadInput,
            match=(
                f"--epochs was 8 and is now 16 .epoch {first} would have been trained at .* its"
                " learning rate"
            ),
        ):
            resume.check_same({**flags, "epochs": 8}, {**flags, "epochs": 16}, epochs=begun)
    with pytest.raises(BadInput, match="--epochs was 16 and is now 8"):
        resume.check_same({**flags, "epochs": 16}, {**flags, "epochs": 8}, epochs=0)


def test_a_run_whose_scaler_has_left_out_all_steps_goes_on(tmp_path):
    """As those of float16 often do at first: there is no momentum yet."""
    flags = [
        *DIGITS,
        "--knn-holdout",
        "1421",
        "-b",
        "8",
        "--amp",
        "fp16",
        "--epochs",
        "1",
        "--out",
        str(tmp_path),
        "--resume",
        "auto",
        "--max-steps",
    ]
    assert ask([*flags, "1"])[0] == 0
    content = checkpoint.load(tmp_path / "checkpoint_last.pth.tar")
    content["optimizer"]["state"] = {}
    checkpoint.save(content, tmp_path / "checkpoint_last.pth.tar")
    assert ask([*flags, "2"])[0] == 0


def test_more_epochs_are_refused_where_mining_would_no_longer_lie_between_rounds():
    """Every 4 epochs, of a schedule that would begin anew every 6."""
    flags = {
        "isl_rounds": 2,
        "isl_start": 4,
        "isl_every": 4,
        "miner": "knn",
        "schedule": [3],
        "epochs": 8,
    }
    with pytest.raises(
        BadInput,
        match="is now 12 .it mines every 4 epochs, between its rounds .* would have 6 epochs",
    ):
        resume.check_same(flags, {**flags, "epochs": 12}, epochs=1)
    for other in ({"miner": "none"}, {"isl_every": 3}, {"isl_rounds": 1}):
        resume.check_same({**flags, **other}, {**flags, **other, "epochs": 12}, epochs=1)


def test_another_number_of_ranks_goes_on_and_says_so(finished, tmp_path):
    flags = [*FLAGS, "--out", tmp_path / "out", "--resume", "auto"]
    assert ask([*map(str, flags), "--max-steps", "3"])[0] == 0
    running = Running([*flags, "--max-steps", "9"], tmp_path / "log", ranks=2)
    assert (
        running.codes() == [0, 0]
        and "was saved by 1 ranks, here are 2: going on, but not bit for bit" in running.said()
    )
    lines = [line for line in metrics(tmp_path / "out") if line["kind"] == "epoch"]
    assert len(lines) == 1 and lines[0]["total"] == 7 and 0 < lines[0]["loss"] < 20


def test_other_images_are_refused(tmp_path):
    flags = [*photos(tmp_path / "photos", 8), "--epochs", "3", "--out", str(tmp_path / "out")]
    assert ask([*flags, "--max-steps", "1"])[0] == 0
    (tmp_path / "photos" / "train" / "07.jpg").unlink()
    code, _, err = ask([*flags, "--resume", "auto"])
    assert code == 2 and "was trained on 8 images, and now there are 7" in err
    # in another place
    (tmp_path / "photos" / "train" / "06.jpg").rename(tmp_path / "photos" / "train" / "00a.jpg")
    shutil.copy(tmp_path / "photos" / "train" / "05.jpg", tmp_path / "photos" / "train" / "06.jpg")
    code, _, err = ask([*flags, "--resume", "auto"])
    assert code == 2 and "as many images of other names, or in another order" in err


def test_images_that_moved_as_a_whole_are_the_same(tmp_path):
    flags = [*photos(tmp_path / "photos", 8), "--epochs", "3", "--out", str(tmp_path / "out")]
    assert ask([*flags, "--max-steps", "1"])[0] == 0
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    flags = [
        flag.replace(str(tmp_path / "photos"), str(tmp_path / "elsewhere"))
        for flag in map(str, flags)
    ]
    assert ask([*flags, "--resume", "auto", "--max-steps", "2"])[0] == 0


# ---- the parts -----------------------------------------------------------------------------------


def test_generators_come_back():
    states = resume.rng_of_ranks(torch.device("cpu"))
    drawn = torch.rand(3), random.random()
    torch.manual_seed(0), random.seed(0)
    assert resume.restore_rng(states, torch.device("cpu"))
    assert torch.equal(torch.rand(3), drawn[0]) and random.random() == drawn[1]
    assert not resume.restore_rng(states * 2, torch.device("cpu"))


def _ranks_keep_their_own(rank, world):
    torch.manual_seed(rank)
    averages, again = Averages(), Averages()
    for step in range(3):
        averages.add({"loss": torch.tensor(float(step + 10 * rank))}, 4, step)
        if step == 1:
            averages.interval()
    states = resume.rng_of_ranks(torch.device("cpu"), averages)
    drawn = torch.rand(2)
    torch.manual_seed(99)
    assert resume.restore_rng(states, torch.device("cpu"), again) and torch.equal(
        torch.rand(2), drawn
    )
    return again.interval(), again.epoch(), averages.epoch()


def test_each_rank_keeps_its_generators_and_averages():
    for rank, (interval, epoch, want) in enumerate(run_ranks(2, _ranks_keep_their_own)):
        assert interval == {"loss": 2.0 + 10 * rank} and epoch == want == {"loss": 6.0}


def test_flags_that_were_not_given_are_those_of_the_run():
    """Not those of its start; those of its miner too, as the file has them or by default."""
    flags = main_moco_isl.get_parser().parse_args("--isl-start 3 --lr 0.03".split())
    saved = {"seed": 3, "isl_every": 2, "isl_start": 1, "out": "x", "other": 1, "lr": 9.0}
    saved |= {"miner": "diffusion", "isl_walk": 7, "mlp": True, "device": "cuda", "max_steps": 5}
    before = vars(flags).copy()
    taken = resume.take_over(flags, saved)
    assert taken == {"miner": "diffusion", "isl_walk": 7, "mlp": True}
    changed = {name: x for name, x in vars(flags).items() if before.get(name, ...) != x}
    own = {flag.dest: flag.default for flag in flags_of(find_miner("diffusion")).values()}
    new = {name: x for name, x in own.items() if name not in before}
    assert changed == new | taken | {"seed": 3, "isl_every": 2} and len(new) > 1


def test_a_file_of_an_earlier_version_was_trained_by_the_defaults_it_lacks(finished, tmp_path):
    """It goes on bit for bit, and another value of such a flag is refused as of any other."""
    file = tmp_path / "older" / "checkpoint_last.pth.tar"
    shutil.copytree(finished, file.parent)
    content = checkpoint.load(finished / "checkpoint_0000.pth.tar")
    for name in ("isl_hpe", "momentum", "print_freq", "isl_start"):
        del content["args"][name]
    checkpoint.save(content, file)
    flags = [*FLAGS, "--out", str(file.parent), "--resume", "auto"]
    for other in (["--momentum", "0.5"], ["--isl-hpe", "1"]):
        code, _, err = ask([*flags, *other])
        assert code == 2 and f"{other[0]} was " in err
    code, out, err = ask(flags)
    assert (code, err) == (0, "") and "does not say --isl-hpe 0.5 --momentum 0.9: these" in out
    assert differences(finished, file.parent) == []


@pytest.mark.parametrize("way", ["--resume FOLDER", "--resume auto --out FOLDER"])
def test_a_run_goes_on_by_the_name_of_its_folder_alone(finished, tmp_path, way):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("checkpoint_last.pth.tar", "checkpoint_0001.pth.tar"):
        (out / name).unlink()
    code, said, err = ask([*way.replace("FOLDER", str(out)).split(), "--device", "cpu"])
    assert (code, err) == (0, "") and "--moco-k 128" in said and "--dataset digits" in said
    assert differences(finished, out) == []
    code, _, err = ask(["--resume", str(out), "--lr", "0.2", "--device", "cpu"])
    assert code == 2 and "--lr was 0.1 and is now 0.2" in err


def test_a_folder_elsewhere_begins_in_its_own(finished, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "checkpoint_0000.pth.tar", tmp_path / "run")
    before = files(tmp_path / "run")
    argv = ["--resume", str(tmp_path / "run"), "--out", str(tmp_path / "new"), "--device", "cpu"]
    assert ask(argv)[0] == 0 and files(tmp_path / "run") == before
    assert metrics(tmp_path / "new")[-1] == metrics(finished)[-1]


@pytest.mark.parametrize(
    "entry, words",
    [
        ("args/epochs", "cannot read the flags in '{}': it has no 'epochs'"),
        ("isl/images", "cannot read the state in '{}': isl has no 'images'"),
        ("isl/state/slots/held", "cannot read the state in '{}': isl.state.slots has no 'held'"),
    ],
)
def test_what_a_file_of_another_version_lacks_is_said_in_a_line(finished, tmp_path, entry, words):
    """And its weights can be trained on, as the line says."""
    file = tmp_path / "other.pth.tar"
    content = inside = checkpoint.load(finished / "checkpoint_0000.pth.tar")
    *way, last = entry.split("/")
    for key in way:
        inside = inside[key]
    del inside[last]
    checkpoint.save(content, file)
    out = tmp_path / "out"
    code, _, err = ask([*FLAGS, "--resume", str(file), "--out", str(out)])
    assert code == 2 and not out.exists()
    assert err == (
        f"error: {words.format(file)}; take another file, such as an earlier checkpoint, or start"
        " a new run from its weights with --init\n"
    )
    if last != "held":
        argv = [*FLAGS, "--init", str(file), "--out", str(out), "--max-steps", "1"]
        assert ask(argv)[0] == 0


# ---- how often a file is read --------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch):
    """The files that were read so far by this process."""
    paths, load = [], checkpoint.load

    def counted(path, *args, **options):
        paths.append(str(path))
        return load(path, *args, **options)

    monkeypatch.setattr(checkpoint, "load", counted)
    return paths


@pytest.mark.parametrize("way", ["--resume auto", "--resume FILE", "--init FILE", "elsewhere"])
def test_a_start_reads_its_file_once(finished, tmp_path, loads, way):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "checkpoint_last.pth.tar").unlink()
    (out / "checkpoint_0001.pth.tar").unlink()
    file = str(out / "checkpoint_0000.pth.tar")
    target = tmp_path / "new" if way in ("--init FILE", "elsewhere") else out
    flag = way.replace("elsewhere", "--resume FILE").replace("FILE", file).split()
    assert ask([*FLAGS, *flag, "--out", str(target), "--max-steps", "30"])[0] == 0
    assert loads == [file]


def test_a_parent_of_ranks_reads_the_file_once_and_each_rank_once(
    finished, tmp_path, loads, monkeypatch
):
    given = []
    monkeypatch.setattr(pretraining.ranks, "launch", lambda *args: given.append(args))
    file = str(finished / "checkpoint_0000.pth.tar")
    argv = [*FLAGS, "--multiprocessing-distributed", "--nproc-per-node", "2"]
    argv += ["--resume", file, "--out", str(tmp_path / "new")]
    assert ask(argv)[0] == 0
    [(_, args, _, start, content, whole)] = given
    assert whole is None, "images are not sent to the ranks"
    assert loads == [file] and content == {}, "large tensors are not sent to the ranks"
    with Stop(lambda: False) as stop:
        reader, _ = pretraining.get_ready(args, start, content, None, torch.device("cpu"), stop)
    reader.close()
    assert loads == [file, file] and content["isl"]
