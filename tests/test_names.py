"""Names that are not UTF-8, or hold a line's end, through every command, on a terminal that takes
nothing but ASCII.
"""

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
    """Run a command in this process and answer with its exit code and what it wrote, to a stdout
    and stderr of strict ASCII.
    """

    def run(main, *argv):
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(
                sys,
                name,
                io.TextIOWrapper(
                    io.BytesIO(), encoding="ascii", errors="strict", write_through=True
                ),
            )
        code = main([os.fspath(x) for x in argv])
        said = sys.stdout.buffer.getvalue() + sys.stderr.buffer.getvalue()
        monkeypatch.undo()
        return code, said.decode("ascii")

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of images in which each name is strange: the folder's, the classes' and the
    files'.
    """
    place = tmp_path_factory.mktemp("names")
    for split, n in (("train", 4), ("val", 2)):
        for number, name in enumerate((STRANGE, "c" + STRANGE)):
            folder = place / STRANGE / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (20, 20), (100 * number, 40 * i, 9)).save(
                    folder / f"{i}{STRANGE}.png"
                )
    return place


def test_every_command_takes_names_that_are_not_utf_8(place, terminal):
    images, run = place / STRANGE, place / f"run{STRANGE}"
    checkpoint = run / "checkpoint_last.pth.tar"
    kept = place / f"f{STRANGE}.safetensors"
    weights = place / f"w{STRANGE}.safetensors"
    judge, cache = ["--device", "cpu", "-j", "0"], place / f"cache{STRANGE}"
    mine = ["--miner", "knn", "--isl-start", "0", "--cache", cache]

    def works(main, *argv):
        code, said = terminal(main, *argv)
        assert code == 0, said
        return said

    assert f"run{SHOWN}" in works(main_moco_isl.main, images, *SMALL, *mine, "--out", run)
    assert "already finished" in works(
        main_moco_isl.main, images, *SMALL, *mine, "--out", run, "--resume", "auto"
    )
    again = works(
        main_moco_isl.main, images, *SMALL, *mine, "--init", checkpoint, "--out", place / "again"
    )
    assert f"run{SHOWN}/checkpoint_last" in again and "decoded images from cache" in again, (
        "the cache is mapped"
    )
    knn = [
        main_knn.main,
        images,
        "--pretrained",
        checkpoint,
        *judge,
        "--k",
        "3",
        "--features",
        kept,
        "--out",
        place / f"knn{STRANGE}",
    ]
    assert "features of 12 images" in works(*knn)
    assert f"from '{place}/f{SHOWN}.safetensors'" in works(*knn)
    probe = [
        images,
        "--pretrained",
        checkpoint,
        *judge,
        "--cache-features",
        "-b",
        "4",
        "--seed",
        "1",
        "--out",
        place / f"lin{STRANGE}",
    ]
    assert f"lin{SHOWN}/results.json" in works(main_lincls.main, *probe, "--epochs", "1")
    works(main_lincls.main, *probe, "--epochs", "2", "--resume", "auto")
    results = place / f"knn{STRANGE}" / "results.json"
    assert json.loads(results.read_text())["pretrained"] == files.encodable(str(checkpoint)), (
        "as the features' file says"
    )
    works(export.main, checkpoint, "--to", "safetensors", "--out", weights, "--results", results)
    assert f"w{SHOWN}.safetensors" in works(
        main_knn.main, images, "--pretrained", weights, *judge, "--k", "3"
    )
    works(report.main, run, place / "again", "--labels", "--out", place / f"page{STRANGE}.html")
    page = (place / f"page{STRANGE}.html").read_text(encoding="utf-8")
    assert r"run" + r"b\udcff" in page


@pytest.mark.parametrize(
    "main",
    [
        main_moco_isl.main,
        main_knn.main,
        main_lincls.main,
        export.main,
        report.main,
        commands.main,
        submit.main,
        status.main,
        sweep.main,
    ],
)
def test_a_wrong_argument_is_said_in_one_line(main, terminal):
    code, said = terminal(main, STRANGE, "--quux" + STRANGE)
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
    for _ in range(2):
        data.hold_cached(
            data.build_dataset("folder", str(folder)), tmp_path / "cache", 1, said.append
        )
    assert "kept in cache" in said[0] and "from cache" in said[1]
