"""The folder of a run: one run at a time, nothing overwritten, nothing left of a start that failed,
whole files on a full disk.
"""

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from moco_isl.errors import BadInput, RunFailed
from moco_isl.run import checkpoint
from moco_isl.run.folder import RunFolder, check_folder, flags_of_unsaved, held, newest, numbered
from moco_isl.training import resume
from tests.runs import Running, differences, run
from tests.test_bad_input import RUN as FLAGS
from tests.test_bad_input import ask, somebody_else_in

STATE = {"epoch": 1, "x": torch.zeros(3)}


def names(path):
    return sorted(p.name for p in path.iterdir())


def begun(path, **options):
    folder = RunFolder(path, **{"resume": False, **options})
    folder.begin({"lr": 1}, 0)
    return folder


def test_a_second_run_is_refused_and_leaves_the_first_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunFolder("busy", resume=False).close()
    assert not (tmp_path / "busy").exists()  # nothing came of it
    with somebody_else_in("busy"):
        for resumed in (False, True):
            with pytest.raises(BadInput, match="'busy' is in use by a run that is alive"):
                RunFolder("busy", resume=resumed)
        assert names(tmp_path / "busy") == [".lock"]
    RunFolder("busy", resume=True).close()


def test_the_lock_is_held_through_all_that_a_run_does(tmp_path):
    """A process that closes any descriptor of the file would let go of it."""
    try_lock = (
        "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    )
    folder = begun(tmp_path)
    folder.log(kind="step")
    look = (
        lambda: flags_of_unsaved(tmp_path),
        lambda: folder.save(STATE, 0),
        lambda: check_folder(tmp_path, True),
        lambda: folder.open_metrics(0),
    )
    for act in look:
        act()
        tried = subprocess.run(
            [sys.executable, "-S", "-c", try_lock, str(tmp_path / ".lock")],
            capture_output=True,
            text=True,
        )
        assert tried.returncode and "BlockingIOError" in tried.stderr
    folder.close()


def test_a_failed_start_takes_away_only_what_it_made(tmp_path):
    (tmp_path / "old").mkdir()
    RunFolder(tmp_path / "old" / "a" / "b", resume=False).close()
    assert names(tmp_path / "old") == []
    RunFolder(tmp_path / "old", resume=False).close()
    assert names(tmp_path) == ["old"] and names(tmp_path / "old") == []
    begun(tmp_path / "old" / "a" / "b").close()
    assert names(tmp_path / "old" / "a" / "b") == [".lock", "args.json", "metrics.jsonl"]


def test_a_folder_with_a_run_is_refused_unless_resumed(tmp_path):
    folder = begun(tmp_path)
    assert held(tmp_path) == ""  # nothing is in it that could be lost
    folder.log(kind="step")
    folder.close()
    with pytest.raises(
        BadInput, match="holds a run already .metrics.jsonl.*--resume auto.*another --out"
    ):
        RunFolder(tmp_path, resume=False)
    RunFolder(tmp_path, resume=True).close()


def test_metrics_go_on_after_what_the_checkpoint_knows(tmp_path, capsys):
    folder = begun(tmp_path)
    folder.log(kind="step", step=1)
    size = folder.metrics_size()
    folder.log(kind="step", step=2)
    folder.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "st')  # killed in the middle of a line
    folder = RunFolder(tmp_path, resume=True)
    folder.begin({}, size)
    folder.log(kind="step", step=2, tensor=torch.ones(2))
    folder.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"kind": "step", "step": 1},
        {"kind": "step", "step": 2, "tensor": [1.0, 1.0]},
    ]
    assert capsys.readouterr().out == ""
    folder = RunFolder(tmp_path, resume=True)
    folder.begin({}, 10_000)
    folder.close()
    assert "metrics.jsonl is shorter than it was" in capsys.readouterr().out


def test_args_tell_of_every_start(tmp_path):
    for start in range(3):
        folder = RunFolder(tmp_path, resume=True)
        folder.begin({"workers": start}, 0)
        folder.log(kind="step")
        folder.close()
    facts = json.loads((tmp_path / "args.json").read_text())
    assert facts["args"] == {"workers": 2} and [
        earlier["args"]["workers"] for earlier in facts["earlier"]
    ] == [0, 1]


def test_the_numbered_file_is_there_before_the_last_one_tells_of_it(tmp_path, monkeypatch):
    """Killed between the two, a resumed run would otherwise never write the numbered one."""
    folder = begun(tmp_path)
    monkeypatch.setattr(checkpoint, "copy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.save(STATE, 0)
    folder.close()
    assert names(tmp_path) == [".lock", "args.json", "checkpoint_0000.pth.tar", "metrics.jsonl"]
    assert newest(tmp_path).name == "checkpoint_0000.pth.tar"


def test_kept_are_the_last_ones_and_what_is_not_ours(tmp_path):
    folder = begun(tmp_path, keep=2)
    (tmp_path / "checkpoint_best.pth.tar").touch()
    for number in (8, 9998, 9999, 10000):
        folder.save({**STATE, "epoch": number + 1}, number)
    folder.save({**STATE, "epoch": 10001}, None)
    folder.close()
    assert [p.name for p in numbered(tmp_path)] == [
        "checkpoint_9999.pth.tar",
        "checkpoint_10000.pth.tar",
    ]
    assert (tmp_path / "checkpoint_best.pth.tar").exists()
    assert (
        checkpoint.load(newest(tmp_path))["epoch"] == 10001
        and checkpoint.load(numbered(tmp_path)[1])["epoch"] == 10001
    )
    newest(tmp_path).unlink()
    assert newest(tmp_path).name == "checkpoint_10000.pth.tar"


def test_a_refused_line_of_metrics_is_a_failed_run(tmp_path, monkeypatch):
    folder = begun(tmp_path)
    folder.save(STATE, None)

    class Full:
        def write(self, line):
            return 3

        close = lambda self: None

    folder._metrics.close()
    monkeypatch.setattr(folder, "_metrics", Full())
    with pytest.raises(
        RunFailed,
        match=(
            "cannot write .*metrics.jsonl: No space left on device; the last whole checkpoint is"
            " .*checkpoint_last.pth.tar. Free some space"
        ),
    ):
        folder.log(kind="step")
    folder.close()


# ---- two runs and one name -----------------------------------------------------------------------


def contents(path):
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


def another_run_takes(path, how):
    """The folder is moved or removed, and a run that saves and logs may begin under its name."""
    path.rename(path.with_name("moved")) if how.startswith("moved") else shutil.rmtree(path)
    if not how.endswith("another run's"):
        return None
    other = begun(path)
    other.save({**STATE, "epoch": 7}, 6)
    other.log(kind="step", loss=1.0)
    return other


WRITES = {
    "args.json": lambda folder: folder.write_args({"lr": 2}),
    "metrics.jsonl": lambda folder: folder.log(kind="step"),
    "their start": lambda folder: folder.open_metrics(0),
    "the last checkpoint": lambda folder: folder.save(STATE, None),
    "a numbered checkpoint": lambda folder: folder.save(STATE, 6),
    "a round": lambda folder: folder.save_round(1, STATE),
}


@pytest.mark.parametrize(
    "how", ["moved", "removed", "moved, another run's", "removed, another run's"]
)
def test_a_folder_that_another_run_may_have_is_not_written_into(tmp_path, how):
    out = tmp_path / "out"
    folder = begun(out)
    folder.save(STATE, 0)
    other = another_run_takes(out, how)
    before = contents(tmp_path)
    for what, write in WRITES.items():
        with pytest.raises(
            RunFailed,
            match="out is no longer the folder of this run: it was moved, removed or made anew",
        ) as error:
            write(folder)
        assert contents(tmp_path) == before and "\n" not in str(error.value), what
    folder.close()
    assert contents(tmp_path) == before
    if other:
        other.log(kind="step", loss=2.0)
        other.close()


def test_a_start_whose_folder_was_taken_removes_nothing_of_the_other_run(tmp_path):
    folder = RunFolder(tmp_path / "out", resume=False)
    other = another_run_takes(tmp_path / "out", "removed, another run's")
    before = contents(tmp_path)
    folder.close()
    other.close()
    assert contents(tmp_path) == before


def test_a_live_run_whose_folder_was_moved_ends_in_one_line(tmp_path):
    """Every file it writes: checkpoints, lines, rounds, TensorBoard's events."""
    out, asked = tmp_path / "out", itertools.count()

    def stop():
        if next(asked) == 4:
            another_run_takes(out, "moved, another run's").close()
            before.update(contents(out))
        return False

    before = {}
    code, _, err = ask(
        [*FLAGS, "--save-every", "1", "-p", "1", "--log", "tensorboard", "--out", str(out)], stop
    )
    assert (
        code == 3 and err.count("\n") == 1 and f"{out} is no longer the folder of this run" in err
    )
    assert (
        contents(out) == before
        and checkpoint.load(tmp_path / "moved" / "checkpoint_last.pth.tar")["isl"]["total"] == 4
    )


@pytest.mark.parametrize("there", ["nothing", "an older file"])
def test_what_another_run_has_saved_since_the_first_look_is_not_overwritten(
    tmp_path, monkeypatch, finished, there
):
    """Another run had the folder between the look for its checkpoint and the lock, and has
    ended.
    """
    out = tmp_path / "out"
    if there != "nothing":
        out.mkdir()
        shutil.copy(finished / "checkpoint_0000.pth.tar", out / "checkpoint_last.pth.tar")

    def late(*args):
        shutil.copytree(finished, out, dirs_exist_ok=True)
        return RunFolder(*args)

    monkeypatch.setattr(resume, "RunFolder", late)
    code, _, err = ask([*FLAGS, "--out", str(out), "--resume", "auto"])
    assert (
        code == 2
        and err.count("\n") == 1
        and "checkpoint_last.pth.tar while this one was starting: give the same command again"
        in err
    )
    assert contents(out) == contents(finished)


@pytest.mark.parametrize("flags", [[], ["--seed", "2"], ["--init", "{}/checkpoint_last.pth.tar"]])
def test_metrics_whose_checkpoints_are_gone_are_not_started_over(tmp_path, finished, flags):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for path in out.glob("checkpoint_*"):
        path.unlink()
    before = contents(out)
    argv = [
        *FLAGS,
        *(flag.format(finished) for flag in flags),
        "--out",
        str(out),
        "--resume",
        "auto",
    ]
    code, _, err = ask(argv)
    assert (
        code == 2
        and err.count("\n") == 1
        and "holds a run (metrics.jsonl) whose checkpoints are gone" in err
        and contents(out) == before
    )
    if not flags:  # and what is said to help does
        (out / "metrics.jsonl").unlink()
        assert ask([*argv, "--max-steps", "1"])[0] == 0


def test_a_damaged_tensor_is_found_before_anything_is_written(tmp_path, finished):
    """A first look checks no tensors: the file is read when the folder is held."""
    path = finished / "checkpoint_last.pth.tar"
    weight = checkpoint.load(path)["state_dict"]["module.encoder_q.fc.0.weight"]
    whole = path.read_bytes()
    place = whole.index(weight.numpy().tobytes())
    (tmp_path / "damaged").write_bytes(
        whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    )
    code, _, err = ask(
        [*FLAGS, "--init", str(tmp_path / "damaged"), "--out", str(tmp_path / "out")]
    )
    assert (
        code == 2
        and err.count("\n") == 1
        and "it is damaged (Bad CRC-32" in err
        and not (tmp_path / "out").exists()
    )


def test_a_run_without_a_checkpoint_yet_is_started_over_by_the_same_flags_only(tmp_path, finished):
    shutil.copy(finished / "args.json", tmp_path)
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(line for line in lines if json.loads(line)["epoch"] == 0)
    )
    before = contents(tmp_path)
    argv = [*FLAGS, "--out", str(tmp_path), "--resume", "auto", "--max-steps", "1"]
    code, _, err = ask([*argv, "--seed", "2"])
    assert (
        code == 2
        and "--seed was 1 and is now 2" in err
        and "would overwrite its metrics.jsonl" in err
        and contents(tmp_path) == before
    )
    seed = argv.index("--seed")
    assert ask(argv[:seed] + argv[seed + 2 :])[0] == 0  # the seed that was drawn is taken over
    assert json.loads((tmp_path / "args.json").read_text())["args"]["seed"] == 1
    for name in ("checkpoint_last.pth.tar", ".lock", "args.json"):
        (tmp_path / name).unlink()
    shutil.copy(finished / "metrics.jsonl", tmp_path)
    before = contents(tmp_path)
    code, _, err = ask(argv)
    assert (
        code == 2
        and "without the args.json that says which run it is" in err
        and contents(tmp_path) == before
    )


def test_an_args_json_of_somebody_else_stays(tmp_path):
    (tmp_path / "args.json").write_text('{"args": [1]}')
    for resumed in (False, True):
        with pytest.raises(
            BadInput, match="args.json' is there already and is none of this command's files"
        ):
            RunFolder(tmp_path, resumed)
    assert (
        names(tmp_path) == ["args.json"] and (tmp_path / "args.json").read_text() == '{"args": [1]}'
    )


def test_a_lock_file_of_somebody_else_keeps_what_is_in_it(tmp_path):
    (tmp_path / ".lock").write_text("theirs")
    folder = begun(tmp_path)
    folder.save(STATE, 0)
    folder.close()
    assert (tmp_path / ".lock").read_text() == "theirs"


@pytest.mark.parametrize("flags", [[], ["--resume", "auto"]])
def test_a_name_that_no_folder_can_have_is_one_line(tmp_path, flags):
    code, _, err = ask([*FLAGS, *flags, "--out", str(tmp_path / ("x" * 300))])
    assert code == 2 and "File name too long; choose a shorter name" in err and err.count("\n") == 1


def test_rounds_are_a_run_too(tmp_path):
    begun(tmp_path).save_round(1, STATE)
    with pytest.raises(BadInput, match="holds a run already .rounds/round_0001.pt"):
        RunFolder(tmp_path, resume=False)


def test_a_file_of_mocos_keeps_the_metrics_beside_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    checkpoint.save(STATE, tmp_path / "checkpoint_0000.pth.tar")
    folder = RunFolder(tmp_path, resume=True)
    folder.begin({}, None)
    folder.log(kind="step")
    folder.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{}\n{"kind": "step"}\n'


# ---- full disks, by real runs --------------------------------------------------------------------


def test_a_limit_on_files_leaves_the_last_checkpoint_whole(tmp_path, finished):
    out, log = tmp_path / "out", tmp_path / "log"
    assert ask([*FLAGS, "--out", str(out), "--max-steps", "3"])[0] == 0
    before = (out / "checkpoint_last.pth.tar").read_bytes()
    full = Running([*FLAGS, "--out", out, "--resume", "auto"], log, largest_file=len(before) // 2)
    assert (
        full.codes() == [3]
        and f"File too large; the last whole checkpoint is {out}/checkpoint_last.pth.tar"
        in full.said()
    )
    assert (out / "checkpoint_last.pth.tar").read_bytes() == before and not list(
        out.glob("*" + checkpoint.TEMPORARY)
    )
    run([*FLAGS, "--out", out, "--resume", "auto"], log)
    assert differences(finished, out) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 6 MB; skips where none can be made."""
    path = tmp_path / "disk"
    path.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, b"size=6m"):
        pytest.skip(f"cannot mount a small disk here: {os.strerror(ctypes.get_errno())}")
    yield path
    libc.umount2(str(path).encode(), 2)


def test_a_full_disk_leaves_the_last_checkpoint_whole(small_disk, tmp_path, finished):
    out = small_disk / "out"
    assert ask([*FLAGS, "--out", str(out), "--max-steps", "3"])[0] == 0
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(free - 50_000))
    before = (out / "checkpoint_last.pth.tar").read_bytes()
    code, _, err = ask([*FLAGS, "--out", str(out), "--resume", "auto"])
    assert (
        code == 3
        and err.count("\n") == 1
        and "No space left on device; the last whole checkpoint is" in err
    )
    assert (out / "checkpoint_last.pth.tar").read_bytes() == before
    (small_disk / "other").unlink()
    assert ask([*FLAGS, "--out", str(out), "--resume", "auto"])[0] == 0
    assert differences(finished, out) == []


def test_a_folder_that_may_not_be_written(tmp_path):
    """A disk mounted for reading only: true for root as well."""
    path = tmp_path / "disk"
    path.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 1, b"size=100k"):  # 1: MS_RDONLY
        if os.geteuid() == 0:
            pytest.skip("cannot mount a disk here, and root may write everywhere")
        path.chmod(0o500)
    try:
        code, _, err = ask([*FLAGS, "--out", str(path / "out")])
        assert (
            code == 2
            and f"--out '{path}/out' cannot be written: no permission in {path}" in err
            and err.count("\n") == 1
        )
    finally:
        libc.umount2(str(path).encode(), 2)
        path.chmod(0o700)


@pytest.mark.parametrize(
    "args",
    [
        {"epochs": "x"},
        {"epochs": None, "cos": False},
        {"epochs": 0.5},
        {"schedule": {"a": 1}},
        {"seed": "x"},
        "[",
    ],
)
def test_odd_flags_of_a_run_without_a_checkpoint_are_one_line(tmp_path, args):
    text = (
        json.dumps({"version": "0.1.0", "args": args}) if isinstance(args, dict) else args * 100_000
    )
    (tmp_path / "args.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "epoch": 0}\n')
    before = contents(tmp_path)
    code, _, err = ask([*FLAGS, "--out", str(tmp_path), "--resume", "auto"])
    assert code == 2 and err.count("\n") == 1 and contents(tmp_path) == before
