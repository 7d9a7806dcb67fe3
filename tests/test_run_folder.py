"""The folder of a run: one run at a time, nothing overwritten, nothing left of a start that failed, whole files on a full disk."""

import ctypes
import json
import os
import shutil

import pytest
import torch

from moco_isl import checkpoint
from moco_isl.errors import BadInput, RunFailed
from moco_isl.training.run_folder import RunFolder, held, newest, numbered
from tests.runs import DIGITS, Running, differences, run
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
        for resume in (False, True):
            with pytest.raises(BadInput, match="'busy' is in use by a run that is alive"):
                RunFolder("busy", resume=resume)
        assert names(tmp_path / "busy") == [".lock"]
    RunFolder("busy", resume=True).close()


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
    with pytest.raises(BadInput, match="holds a run already .metrics.jsonl.*--resume auto.*another --out"):
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
        {"kind": "step", "step": 1}, {"kind": "step", "step": 2, "tensor": [1.0, 1.0]}]  # fmt: skip
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
    assert facts["args"] == {"workers": 2} and [earlier["args"]["workers"] for earlier in facts["earlier"]] == [0, 1]


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
    assert [p.name for p in numbered(tmp_path)] == ["checkpoint_9999.pth.tar", "checkpoint_10000.pth.tar"]
    assert (tmp_path / "checkpoint_best.pth.tar").exists()
    assert checkpoint.load(newest(tmp_path))["epoch"] == 10001 and checkpoint.load(numbered(tmp_path)[1])["epoch"] == 10001
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
    with pytest.raises(RunFailed, match="cannot write .*metrics.jsonl: No space left on device; the last whole checkpoint is .*checkpoint_last.pth.tar. Free some space"):
        folder.log(kind="step")
    folder.close()


# ---- full disks, by real runs ----------------------------------------------------------------------------------------

FLAGS = [*DIGITS, "--epochs", "2"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    assert ask([*FLAGS, "--out", str(out)])[0] == 0
    return out


def test_a_limit_on_files_leaves_the_last_checkpoint_whole(tmp_path, unbroken):
    out, log = tmp_path / "out", tmp_path / "log"
    assert ask([*FLAGS, "--out", str(out), "--max-steps", "3"])[0] == 0
    before = (out / "checkpoint_last.pth.tar").read_bytes()
    full = Running([*FLAGS, "--out", out, "--resume", "auto"], log, largest_file=len(before) // 2)
    assert full.codes() == [3] and f"File too large; the last whole checkpoint is {out}/checkpoint_last.pth.tar" in full.said()
    assert (out / "checkpoint_last.pth.tar").read_bytes() == before and not list(out.glob("*" + checkpoint.TEMPORARY))
    run([*FLAGS, "--out", out, "--resume", "auto"], log)
    assert differences(unbroken, out) == []


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


def test_a_full_disk_leaves_the_last_checkpoint_whole(small_disk, tmp_path, unbroken):
    out = small_disk / "out"
    assert ask([*FLAGS, "--out", str(out), "--max-steps", "3"])[0] == 0
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(free - 50_000))
    before = (out / "checkpoint_last.pth.tar").read_bytes()
    code, _, err = ask([*FLAGS, "--out", str(out), "--resume", "auto"])
    assert code == 3 and err.count("\n") == 1 and "No space left on device; the last whole checkpoint is" in err
    assert (out / "checkpoint_last.pth.tar").read_bytes() == before
    (small_disk / "other").unlink()
    assert ask([*FLAGS, "--out", str(out), "--resume", "auto"])[0] == 0
    assert differences(unbroken, out) == []


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
        assert code == 2 and f"--out '{path}/out' cannot be written: no permission in {path}" in err and err.count("\n") == 1
    finally:
        libc.umount2(str(path).encode(), 2)
        path.chmod(0o700)
