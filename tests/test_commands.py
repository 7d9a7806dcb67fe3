"""The commands: `moco-isl NAME`, how they are named in messages, and the help of each."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moco_isl import __main__, __version__, commands
from moco_isl.commands import COMMANDS

ROOT = Path(__file__).parent.parent
HEAVY = ["torchvision", "timm", "matplotlib", "sklearn", "jinja2", "pyarrow"]

# the help of every command, in one interpreter: torch is imported once
HELP_OF_EACH = f"""
import contextlib, io, json, sys
from moco_isl.__main__ import COMMANDS, main
said = {{}}
for name in COMMANDS:
    sys.argv = ["moco-isl", name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = main()
        except SystemExit as end:
            code = end.code
    said[name] = code, out.getvalue()
print(json.dumps([said, [name for name in {HEAVY} if name in sys.modules]]))
"""


@pytest.fixture(scope="module", params=[80, 120])
def help_of_each(request):
    """(columns, {command: (exit code, its help)}, heavy packages that were imported for it)."""
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_EACH],
        env={"COLUMNS": str(request.param), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return request.param, *json.loads(done.stdout)


def test_help_is_short_and_fits_the_screen(help_of_each):
    columns, said, heavy = help_of_each
    assert heavy == [], "packages that take a second each"
    for name, (code, text) in said.items():
        assert not code and text.startswith(f"usage: moco-isl {name} "), name
        lines = text.splitlines()
        assert [line for line in lines if len(line) > columns] == [], name
        assert sum(line.startswith("  -") for line in lines) < 45, name
        known = [command.script for command in COMMANDS.values()]
        assert not [script for script in known if script in text], name


def test_a_command_is_run_by_its_module(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["/usr/bin/moco-isl", "knn", "--bad"])
    assert __main__.main() == 2
    assert capsys.readouterr().err.startswith("error: no flag --bad")
    with pytest.raises(SystemExit) as end:
        __main__.main(["pretrain", "--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"moco_isl {__version__}\n"


@pytest.mark.parametrize("flags", [[], ["--help"], ["-h"]])
def test_all_commands_are_listed(flags, capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main(flags)
    assert end.value.code == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, command in COMMANDS.items():
        assert [name, *command.what.split()] in lines
        place = command.script.split()[-1]
        module = place.replace(".", "/")
        assert any((ROOT / f).is_file() for f in (place, module + ".py", module + "/__main__.py"))
        assert callable(importlib.import_module(command.module).main)


@pytest.mark.parametrize(
    "name, words",
    [("pretrian", "did you mean pretrain?"), ("rep\udcff", "did you mean report?"), ("x", "knn,")],
)
def test_an_unknown_command_is_one_line(name, words, capsys):
    assert __main__.main([name, "--out", "x"]) == 2
    found = capsys.readouterr()
    assert not found.out and found.err.count("\n") == 1 and words in found.err


def test_the_page_has_all_commands():
    rows = re.findall(
        r"^\| `moco-isl (\w+)` \| `(.*)` \|$", (ROOT / "docs/moco.md").read_text(), re.M
    )
    assert dict(rows) == {name: command.script for name, command in COMMANDS.items()}


def test_commands_are_named_as_they_are_typed(monkeypatch, tmp_path):
    text = "judge it: python main_knn.py --k 5, python -m moco_isl.report RUN"
    subcommands = "judge it: moco-isl knn --k 5, moco-isl report RUN"
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr("sys.argv", ["main_knn.py"])  # in this checkout
    assert commands.as_typed(text) == text
    assert commands.typed("knn") == "python ../main_knn.py"
    assert commands.typed("report") == "python -m moco_isl.report"
    assert commands.prog("python main_knn.py") == "main_knn.py"
    assert commands.prog("python launch/submit.py") == "submit.py"
    for started in ("/home/x/bin/moco-isl", "/home/x/moco_isl/__main__.py"):
        monkeypatch.setattr("sys.argv", [started, "knn"])
        assert commands.as_typed(text) == subcommands
        assert commands.typed("status") == "moco-isl status"
        assert commands.prog("python main_knn.py") == "moco-isl knn"
    # where pip has put the package, a script keeps its name, and others are sub-commands
    monkeypatch.setattr("sys.argv", ["/home/x/bin/main_knn"])
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    assert commands.as_typed(text) == subcommands
    assert commands.prog("python main_knn.py") == "main_knn"
    assert commands.typed("submit") == "moco-isl submit"
