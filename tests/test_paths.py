"""Each path that a command takes, and whatever a path can be: an answer in one line, and no wait
for a pipe.
"""

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
JUDGE = ["--dataset", "digits", "--device", "cpu", "-j", "0"]
PROBE = [*JUDGE, "--cache-features", "--epochs", "1"]
FILE = "run/checkpoint_last.pth.tar"
NEW = ["--out", "new"]

TAKES = {  # a path -> the command around it
    "main_moco_isl DIR": (main_moco_isl.main, lambda x: [x, *TRAIN[2:], *NEW]),
    "main_moco_isl --out": (main_moco_isl.main, lambda x: [*TRAIN, "--out", x]),
    "main_moco_isl --out, --resume auto": (
        main_moco_isl.main,
        lambda x: [*TRAIN, "--out", x, "--resume", "auto"],
    ),
    "main_moco_isl --resume": (main_moco_isl.main, lambda x: [*TRAIN, *NEW, "--resume", x]),
    "main_moco_isl --init": (main_moco_isl.main, lambda x: [*TRAIN, *NEW, "--init", x]),
    "main_moco_isl --config": (main_moco_isl.main, lambda x: [*TRAIN, *NEW, "--config", x]),
    "main_moco_isl --cache": (
        main_moco_isl.main,
        lambda x: ["photos", *TRAIN[2:], *NEW, "--cache", x],
    ),
    "main_knn DIR": (main_knn.main, lambda x: [x, *JUDGE[2:], "--pretrained", FILE]),
    "main_knn --pretrained": (main_knn.main, lambda x: [*JUDGE, "--pretrained", x]),
    "main_knn --features": (
        main_knn.main,
        lambda x: [*JUDGE, "--pretrained", FILE, "--features", x],
    ),
    "main_knn --features alone": (main_knn.main, lambda x: [*JUDGE[2:], "--features", x]),
    "main_knn --out": (main_knn.main, lambda x: [*JUDGE, "--pretrained", FILE, "--out", x]),
    "main_lincls DIR": (main_lincls.main, lambda x: [x, *PROBE[2:], *NEW, "--pretrained", FILE]),
    "main_lincls --pretrained": (main_lincls.main, lambda x: [*PROBE, *NEW, "--pretrained", x]),
    "main_lincls --resume": (
        main_lincls.main,
        lambda x: [*PROBE, *NEW, "--pretrained", FILE, "--resume", x],
    ),
    "main_lincls -e --resume": (main_lincls.main, lambda x: [*PROBE, *NEW, "-e", "--resume", x]),
    "main_lincls --out": (main_lincls.main, lambda x: [*PROBE, "--pretrained", FILE, "--out", x]),
    "main_lincls --out, --resume auto": (
        main_lincls.main,
        lambda x: [*PROBE, "--pretrained", FILE, "--out", x, "--resume", "auto"],
    ),
    "export FILE": (export.main, lambda x: [x, "--to", "safetensors", "--out", "new"]),
    "export --out": (export.main, lambda x: [FILE, "--to", "safetensors", "--out", x]),
    "report RUN": (report.main, lambda x: [x]),
    "report --out": (report.main, lambda x: ["run", "--out", x]),
    "report --breakeven": (report.main, lambda x: ["run", "--out", "new", "--breakeven", x]),
}

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


@pytest.mark.parametrize("takes", TAKES)
def test_a_path_where_nothing_can_be_is_said_in_one_line(place, locked, capsys, takes):
    main, argv = TAKES[takes]
    for what, path in NOWHERE.items():
        assert main(argv(path)) == 2, what
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, (what, said)
        assert "locked" not in path or "ermission" in said, said
        assert not os.path.exists("new")


@pytest.mark.parametrize(
    "takes", [name for name in TAKES if not name.endswith((*NEW_FOLDER, "DIR"))]
)
def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder(place, capsys, takes):
    main, argv = TAKES[takes]
    path = "pipe" if takes.startswith("report RUN") else "photos"
    assert main(argv(path)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_empty_text_is_no_folder(place, capsys):
    assert main_moco_isl.main(["", *TRAIN[2:], *NEW]) == 2
    assert "DIR is an empty text" in capsys.readouterr().err
    assert main_moco_isl.main(["photos", *TRAIN[2:], *NEW, "--cache", ""]) == 2
    assert "--cache is an empty text" in capsys.readouterr().err


def test_a_run_in_a_folder_that_may_only_be_looked_at(place, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0)
    for takes, path in (
        ("main_moco_isl --out, --resume auto", "run"),
        ("main_lincls --out", "new"),
        ("report --out", "new.html"),
    ):
        main, argv = TAKES[takes]
        assert main(argv(path)) == 2
        assert "cannot be written: no permission in" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.R_OK == 0)
    for takes in (
        "main_moco_isl --init",
        "main_knn --pretrained",
        "export FILE",
        "main_lincls --resume",
    ):
        main, argv = TAKES[takes]
        assert main(argv(FILE)) == 2
        assert "cannot be read: no permission; expected a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("number", sorted(exits.OF_A_PATH))
def test_what_a_file_system_refuses_under_way_is_one_line(capsys, number):
    def script(argv, stop):
        raise OSError(number, os.strerror(number), "a\nb")

    assert exits.exit_code(script) == 3
    said = capsys.readouterr().err
    assert (
        said.startswith(r"error: a file or folder 'a\nb' cannot be used: " + os.strerror(number))
        and said.count("\n") == 1
    )
