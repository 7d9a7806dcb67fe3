"""Paths of any kind, refused in one line, and files that are written whole or not at all."""

import os
import stat
import subprocess
import sys

import pytest

from moco_isl import files
from moco_isl.errors import BadInput

STRANGE = os.fsdecode(b"b\xff\n.txt")


def line(fn, *args):
    with pytest.raises(BadInput) as caught:
        fn(*args)
    str(caught.value).encode("utf-8")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_names_are_shown_such_that_any_terminal_takes_them():
    assert files.shown(STRANGE) == files.shown(os.fsencode(STRANGE)) == r"b\udcff\n.txt"
    assert files.shown("küche/ä b.jpg") == "küche/ä b.jpg"


def test_what_is_at_a_path(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    os.symlink(tmp_path / "file", tmp_path / "link")
    os.symlink(tmp_path / "gone", tmp_path / "dead")
    kinds = {"pipe": "other", "file": "file", "link": "file", "dead": "", ".": "folder"}
    for name, kind in {**kinds, "file/below": ""}.items():
        assert files.kind(tmp_path / name) == kind, name


def test_a_path_that_nobody_can_look_at_is_one_line(tmp_path, monkeypatch):
    os.symlink("round", tmp_path / "round")
    assert "File name too long; choose a shorter name" in line(files.kind, "x" * 300, "--out")
    assert "null byte" in line(files.kind, "a\0b")
    assert "--out" in line(files.kind, tmp_path / "round", "--out")
    for check in (files.require_folder, files.require_file):
        assert "File name too long" in line(check, "x" * 300, "--out")
    monkeypatch.setattr(os, "stat", refuse)
    cure = "ask its owner for permission, or choose another path"
    want = f"--resume 'a' cannot be looked at: Permission denied; {cure}"
    assert line(files.kind, "a", "--resume") == want


def test_only_a_regular_file_that_may_be_read_is_taken(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("a")
    assert files.require_file(tmp_path / "file") == tmp_path / "file"
    said = line(files.require_file, tmp_path / "pipe", "--init", "a checkpoint")
    assert "is a pipe or a device: expected a checkpoint" in said
    assert "is a folder: expected a file" in line(files.require_file, tmp_path)
    said = line(files.require_file, tmp_path / "none")
    assert "no such file; expected a file; check the path" in said
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be read: no permission" in line(files.require_file, tmp_path / "file")


def test_text_is_read_whole_and_as_utf_8(tmp_path):
    (tmp_path / STRANGE).write_bytes(b"\xff")
    (tmp_path / "long").write_text("ab")
    assert files.read_text(tmp_path / "long") == "ab"
    assert "has more than 1 bytes" in line(files.read_text, tmp_path / "long", "", "a list", 1)
    said = line(files.read_text, tmp_path / STRANGE, "", "a list")
    assert r"b\udcff\n.txt' is not UTF-8 text: expected a list" in said


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / ("x" * 255)  # as long as a name can be
    files.write_text("old", path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    files.write_text(STRANGE, path)
    assert path.read_text() == "b\\udcff\n.txt"
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError):
        files.write_text("new", path)
    assert path.read_text() == "b\\udcff\n.txt" and len(os.listdir(tmp_path)) == 1


def test_only_a_file_of_ours_is_written_over(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("ours")

    def begins(path):
        return path.read_text().startswith("our")

    for path in (tmp_path / "file", tmp_path / "none", tmp_path / "none" / "below"):
        files.require_ours(path, begins)
    (tmp_path / "file").write_text("theirs")
    assert "--out" in line(files.require_ours, tmp_path / "file", begins, "--out")
    said = line(files.require_ours, tmp_path / "file", begins)
    assert "none of this command's files, so it is not written over: choose" in said
    assert "is a folder" in line(files.require_ours, tmp_path, begins)
    for path in (tmp_path / "pipe", "/dev/null"):
        assert "is a pipe or a device" in line(files.require_ours, path, begins)
    said = line(files.require_ours, tmp_path / "file", refuse)
    assert "cannot be read (Permission denied)" in said


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


TORN = """
import signal, sys, torch
from pathlib import Path
from moco_isl import files

def news(*_):
    raise RuntimeError("news")

signal.signal(signal.SIGALRM, news)
path, temporary = Path("file.pth"), Path("file.tmp")
content = {str(i): torch.arange(3000.0) for i in range(20)}
files.write(content, path, temporary)
torn = 0
for i in range(150):
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4 + 2e-5 * i)
        files.write(content, path, temporary)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except RuntimeError as error:
        assert str(error) == "news", error
        torn += 1
    assert len(torch.load(path)) == 20 and not temporary.exists()
assert torn
"""


def test_a_write_is_not_torn_by_what_a_handler_of_a_signal_raises(tmp_path):
    """A handler may raise at any moment, as torch's does when a worker has ended.

    torch's writer would then end the process, or raise an error of its own.
    """
    command = [sys.executable, "-c", TORN]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
