"""Each path that a command takes, and whatever can be there: one line, and no wait for a pipe."""

import errno
import os
import signal

import pytest

import main_knn
import main_lincls
import main_moco_isl
from moco_isl import export
from moco_isl.report import __main__ as report
from moco_isl.run import exits
from tests.runs import DIGITS, photos

TRAIN = [*DIGITS, "--epochs", "1"]
PHOTOS = TRAIN[2:]  # of a DIR
JUDGE = ["--dataset", "digits", "--device", "cpu", "-j", "0"]
FILE = "run/checkpoint_last.pth.tar"
NEW = ["--out", "new"]
KNN = [*JUDGE, "--pretrained", FILE]
PROBE = [*JUDGE, "--cache-features", "--epochs", "1"]
PROBE_FILE = [*PROBE, "--pretrained", FILE]
EXPORT = ["--to", "safetensors", "--out"]
MAINS = {
    "main_moco_isl": main_moco_isl.main,
    "main_knn": main_knn.main,
    "main_lincls": main_lincls.main,
    "export": export.main,
    "report": report.main,
}
ARGV = {  # a command and the path it takes -> its arguments, X standing for the path
    "main_moco_isl DIR": ["X", *PHOTOS, *NEW],
    "main_moco_isl --out": [*TRAIN, "--out", "X"],
    "main_moco_isl --out, --resume auto": [*TRAIN, "--out", "X", "--resume", "auto"],
    "main_moco_isl --resume": [*TRAIN, *NEW, "--resume", "X"],
    "main_moco_isl --init": [*TRAIN, *NEW, "--init", "X"],
    "main_moco_isl --config": [*TRAIN, *NEW, "--config", "X"],
    "main_moco_isl --cache": ["photos", *PHOTOS, *NEW, "--cache", "X"],
    "main_knn DIR": ["X", *JUDGE[2:], "--pretrained", FILE],
    "main_knn --pretrained": [*JUDGE, "--pretrained", "X"],
    "main_knn --features": [*KNN, "--features", "X"],
    "main_knn --features alone": [*JUDGE[2:], "--features", "X"],
    "main_knn --out": [*KNN, "--out", "X"],
    "main_lincls DIR": ["X", *PROBE[2:], *NEW, "--pretrained", FILE],
    "main_lincls --pretrained": [*PROBE, *NEW, "--pretrained", "X"],
    "main_lincls --resume": [*PROBE_FILE, *NEW, "--resume", "X"],
    "main_lincls -e --resume": [*PROBE, *NEW, "-e", "--resume", "X"],
    "main_lincls --out": [*PROBE_FILE, "--out", "X"],
    "main_lincls --out, --resume auto": [*PROBE_FILE, "--out", "X", "--resume", "auto"],
    "export FILE": ["X", *EXPORT, "new"],
    "export --out": [FILE, *EXPORT, "X"],
    "report RUN": ["X"],
    "report --out": ["run", "--out", "X"],
    "report --breakeven": ["run", *NEW, "--breakeven", "X"],
}


def ask(takes: str, path: str) -> int:
    """The exit code of a command of ARGV with this path."""
    return MAINS[takes.split()[0]]([path if x == "X" else x for x in ARGV[takes]])


NOWHERE = {  # no path that anything can be at
    "too long a name": "x" * 300,
    "too long a name of a folder": "x" * 300 + "/a",
    "too long in all": "/".join(["x" * 200] * 25),
    "a zero byte": "a\0b",
    "links in a circle": "loop",
    "a folder behind links in a circle": "loop/a",
    "in a locked folder": "locked/a",
    "a pipe": "pipe",
}
NEW_FOLDER = ("--out", "--out, --resume auto", "--cache")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which a run is, and what no command can use."""
    before, place = os.getcwd(), tmp_path_factory.mktemp("paths")
    os.chdir(place)
    assert main_moco_isl.main([*TRAIN, "--out", "run", "--max-steps", "2"]) == 0
    photos(place / "photos", 2)
    os.symlink("loop", "loop")
    os.mkfifo("pipe")
    os.mkdir("locked")
    yield place
    os.chdir(before)


@pytest.fixture
def locked(monkeypatch):
    """As somebody else's folder of mode 700: nothing in it can be looked at, not even by root."""
    real = os.stat

    def stat(path, *args, **options):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith("locked/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)


@pytest.fixture(autouse=True)
def no_wait():
    """Whoever opens a pipe waits for its other end for ever: then the test fails."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("takes", ARGV)
def test_a_path_where_nothing_can_be_is_said_in_one_line(place, locked, capsys, takes):
    for what, path in NOWHERE.items():
        assert ask(takes, path) == 2, what
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, (what, said)
        assert "locked" not in path or "ermission" in said, said
        assert not os.path.exists("new")


FILES = [name for name in ARGV if not name.endswith((*NEW_FOLDER, "DIR"))]


@pytest.mark.parametrize("takes", FILES)
def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder(place, capsys, takes):
    assert ask(takes, "pipe" if takes == "report RUN" else "photos") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_empty_text_is_no_folder(place, capsys):
    for name in ("DIR", "--cache"):
        assert ask(f"main_moco_isl {name}", "") == 2
        assert f"{name} is an empty text" in capsys.readouterr().err


def test_a_run_in_a_folder_that_may_only_be_looked_at(place, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0)
    folders = {"main_moco_isl --out, --resume auto": "run", "main_lincls --out": "new"}
    for takes, path in {**folders, "report --out": "new.html"}.items():
        assert ask(takes, path) == 2
        assert "cannot be written: no permission in" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.R_OK == 0)
    pretrained = ("main_moco_isl --init", "main_knn --pretrained", "main_lincls --resume")
    for takes in (*pretrained, "export FILE"):
        assert ask(takes, FILE) == 2
        assert "cannot be read: no permission; expected a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("number", sorted(exits.OF_A_PATH))
def test_what_a_file_system_refuses_under_way_is_one_line(capsys, number):
    def script(argv, stop):
        raise OSError(number, os.strerror(number), "a\nb")

    assert exits.exit_code(script) == 3
    said = capsys.readouterr().err
    what = r"error: a file or folder 'a\nb' cannot be used: "
    assert said.startswith(what + os.strerror(number)) and said.count("\n") == 1
