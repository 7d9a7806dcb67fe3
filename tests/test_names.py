"""Names that are not UTF-8 or hold a newline, through every command, on an ASCII terminal."""

import io
import json
import os
import sys

import pytest
from PIL import Image

import main_knn
import main_lincls
import main_moco_isl
from launch import status, submit, sweep
from moco_isl import __main__ as commands
from moco_isl import data, export, files
from moco_isl.report import __main__ as report

STRANGE = os.fsdecode(b"b\xff\n")
SHOWN = r"b\udcff\n"
SMALL = (
    "-a digits --image-size 16 --mlp --moco-dim 8 --moco-k 16 -b 4 -j 0 --seed 1 --device cpu"
    " --epochs 1 -p 1".split()
)


@pytest.fixture
def terminal(monkeypatch):
    """Runs a command in this process: (exit code, what it wrote to streams of strict ASCII)."""

    def run(main, *argv):
        options = {"encoding": "ascii", "errors": "strict", "write_through": True}
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), **options))
        code = main([os.fspath(x) for x in argv])
        said = sys.stdout.buffer.getvalue() + sys.stderr.buffer.getvalue()
        monkeypatch.undo()
        return code, said.decode("ascii")

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of images in which the folder's, the classes' and the files' names are strange."""
    place = tmp_path_factory.mktemp("names")
    for split, n in (("train", 4), ("val", 2)):
        for number, name in enumerate((STRANGE, "c" + STRANGE)):
            folder = place / STRANGE / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                image = Image.new("RGB", (20, 20), (100 * number, 40 * i, 9))
                image.save(folder / f"{i}{STRANGE}.png")
    return place


def test_every_command_takes_names_that_are_not_utf_8(place, terminal):
    images, run, again = place / STRANGE, place / f"run{STRANGE}", place / "again"
    checkpoint = run / "checkpoint_last.pth.tar"
    weights = place / f"w{STRANGE}.safetensors"
    results = place / f"knn{STRANGE}" / "results.json"
    page = place / f"page{STRANGE}.html"

    def works(main, *argv):
        code, said = terminal(main, *argv)
        assert code == 0, said
        return said

    mine = ["--miner", "knn", "--isl-start", "0", "--cache", place / f"cache{STRANGE}"]
    train = [main_moco_isl.main, images, *SMALL, *mine]
    assert f"run{SHOWN}" in works(*train, "--out", run)
    assert "already finished" in works(*train, "--out", run, "--resume", "auto")
    said = works(*train, "--init", checkpoint, "--out", again)
    assert f"run{SHOWN}/checkpoint_last" in said
    assert "decoded images from cache" in said  # it is mapped

    judge = ["--device", "cpu", "-j", "0", "--pretrained", checkpoint]
    kept = ["--features", place / f"f{STRANGE}.safetensors", "--out", results.parent]
    knn = [main_knn.main, images, *judge, "--k", "3", *kept]
    assert "features of 12 images" in works(*knn)
    assert f"from '{place}/f{SHOWN}.safetensors'" in works(*knn)
    probe = [main_lincls.main, images, *judge, "--cache-features", "-b", "4", "--seed", "1"]
    probe += ["--out", place / f"lin{STRANGE}"]
    assert f"lin{SHOWN}/results.json" in works(*probe, "--epochs", "1")
    works(*probe, "--epochs", "2", "--resume", "auto")

    # a file in UTF-8 holds the name with escapes
    assert json.loads(results.read_text())["pretrained"] == files.encodable(str(checkpoint))
    works(export.main, checkpoint, "--to", "safetensors", "--out", weights, "--results", results)
    judge[-1] = weights
    assert f"w{SHOWN}.safetensors" in works(main_knn.main, images, *judge, "--k", "3")
    works(report.main, run, again, "--labels", "--out", page)
    assert r"run" + r"b\udcff" in page.read_text(encoding="utf-8")


SCRIPTS = [main_moco_isl, main_knn, main_lincls, export, report, commands, submit, status, sweep]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_argument_is_said_in_one_line(script, terminal):
    code, said = terminal(script.main, STRANGE, "--quux" + STRANGE)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert said[:-1].isprintable(), said


def test_output_without_a_file_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    files.print_any_name()


def test_a_link_in_utf_8_to_a_file_whose_name_is_not(tmp_path):
    path = tmp_path / f"{STRANGE}.pth"
    path.write_text("x")
    with files.utf8_name(path) as name:
        str(name).encode()
        assert name.read_text() == "x" and name.suffix == ".pth"
    assert not name.exists() and path.exists()
    with files.utf8_name(tmp_path / "a.pth") as name:
        assert name == tmp_path / "a.pth"


def test_a_cache_of_a_folder_whose_name_is_as_long_as_can_be(tmp_path):
    folder = tmp_path / ("ä" * 127)
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    said = []
    dataset = data.build_dataset("folder", str(folder))
    for _ in range(2):
        data.hold_cached(dataset, tmp_path / "cache", 1, said.append)
    assert "kept in cache" in said[0] and "from cache" in said[1]
