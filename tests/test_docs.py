"""The pages of docs/ and README: links lead somewhere, flags and files exist, the picture is true.

`make docs` builds the pages and finds broken links between them; here are the links and names that
it does not see.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

from moco_isl.commands import COMMANDS
from moco_isl.isl import ISL
from studies import readme_picture as result
from tests.runs import photos
from tests.test_builder import C, M, images, moco

ROOT = Path(__file__).parent.parent
WRITTEN = {"bad_input.md", "flags.md", "results.md"}  # by a program, or of what one wrote
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = [page for page in PAGES if page.name not in WRITTEN]
OTHERS = {  # flags of benchmarks, of detectron2 and of the example miner
    *("--minutes", "--images", "--repeats", "--quick", "--profile", "--rows", "--small", "--gan"),
    *("--num-gpus", "--config-file", "--eval-only", "--steps", "--widths", "--precisions"),
    *("--of", "--picture"),
}
by_name = pytest.mark.parametrize("page", OURS, ids=lambda page: page.name)


def prose(page):
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)", prose(page), re.M)
    words = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    return {re.sub(r"\s", "-", text) for text in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), f"{link}: there is no such file"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


def parsers():
    return [importlib.import_module(c.module).get_parser() for c in COMMANDS.values()]


@by_name
def test_every_flag_exists(page):
    known = {name for parser in parsers() for name in parser._option_string_actions}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text()))
    assert not named - known - OTHERS


@by_name
def test_every_file_exists(page):
    pattern = (
        r"\b(?:studies|launch|benchmarks|docs|moco_isl|tests)/[\w./*-]*\w\.(?:py|yaml|md|json)"
    )
    for name in re.findall(pattern, page.read_text()):
        assert any(ROOT.glob(name)), name


@by_name
def test_python_is_python(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        ast.parse(block)


def test_the_results_page_shows_both_pages():
    shown = re.findall(r'^--8<-- "(.*)"', (ROOT / "docs" / "results.md").read_text(), re.M)
    assert len(shown) == 2 and all((ROOT / name).is_file() for name in shown)


def test_the_picture_shows_the_results():
    picture = result.PICTURE.read_text()
    for mean, spread in result.gains().values():
        assert f"{mean:+.1f} ± {spread:.1f}" in picture
    for size in result.curves():
        assert f"{size:g} an image" in picture


SMALLER = {  # what the page of Python says -> what is run
    "side, mean, std = 224": "side, mean, std = 32",
    "batch_size=64": "batch_size=4",
    "epoch in range(300)": "epoch in range(3)",
    "epoch >= 200 and epoch % 20 == 0": "epoch == 1",
}


def test_the_python_page_runs(tmp_path, monkeypatch):
    """Two runs on the digits; a loop on a few photos; a miner and a data set of a user's own."""
    monkeypatch.chdir(tmp_path)
    for kind in ("cat", "dog"):
        photos(tmp_path / kind, 6)
        (tmp_path / "photos" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / kind / "train").rename(tmp_path / "photos" / "train" / kind)
    given = {
        "images": (255 * images(M, 0)).to(torch.uint8),
        "labels": torch.arange(M) % 2,
        "classes": ["even", "odd"],
    }
    page = (ROOT / "docs" / "python.md").read_text()
    for written, smaller in SMALLER.items():
        assert written in page
        page = page.replace(written, smaller)
    with pytest.warns(UserWarning, match="average: .*images are fewer than 500"):
        for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
            exec(block, given)
    assert given["loss"] > 0 and given["isl"].round == 3
    assert "images are fewer than 500" in given["miner"].report.why
    isl = ISL(moco(), M)
    features = torch.nn.functional.normalize(torch.rand(M, C), dim=1)
    isl.mine_features(features, given["MyMiner"](steps=2, budget=[2]))
    first = isl.positives.members[: isl.positives.offsets[1]]
    assert len(first) and set(first.tolist()) <= {1, 2, M - 1, M - 2}
    row = given["row"]
    assert len(row.open(None, "train", False)) == M and row.size == 32
