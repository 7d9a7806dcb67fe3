"""What `pip install .` leaves: commands that start from any folder, and the files they need."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from moco_isl import __main__, __version__

ROOT = Path(__file__).parent.parent

# Each command as the system starts it, with its own folder first on the path, in one interpreter:
# torch is imported once
START_EACH = """
import contextlib, io, json, runpy, sys
from pathlib import Path
place, said = Path(sys.argv[1]), {}
sys.path.insert(0, str(place))
for script in sorted(place.iterdir()):
    for flag in ("--help", "--version"):
        sys.argv = [str(script), flag]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as end:
                said[f"{script.name} {flag}"] = (end.code, out.getvalue())
modules = ["main_moco_isl", "main_knn", "main_lincls", "moco_isl", "launch"]
print(json.dumps({"said": said, "files": [sys.modules[name].__file__ for name in modules]}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which pip has installed a copy of the sources, without what it depends on."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md"]:
        shutil.copy(path, source)
    for package in ("moco_isl", "launch"):
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-index",
        "--no-deps",
    ]
    options = ["--no-build-isolation", "--no-compile", "--target", str(target), str(source)]
    subprocess.run([*pip, *options], check=True, cwd=source)
    return target


def test_each_command_starts_from_another_folder(installed, tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    command = [sys.executable, "-c", START_EACH, str(installed / "bin")]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    said = found["said"]
    assert set(said) == {
        f"{name} {flag}" for name in __main__.COMMANDS for flag in ("--help", "--version")
    }
    for what, (code, text) in said.items():
        assert code in (0, None), what
        assert (
            text == f"moco_isl {__version__}\n"
            if what.endswith("--version")
            else "--version" in text
        ), what
    assert all(file.startswith(str(installed)) for file in found["files"]), (
        "the installed modules, not the checkout's"
    )
    assert not list(tmp_path.iterdir())


def test_no_command_hides_a_module(installed):
    """Python looks beside the script first: a script named like a module, with .py, imports
    itself.
    """
    assert sorted(p.name for p in (installed / "bin").iterdir()) == sorted(__main__.COMMANDS)
    (metadata,) = installed.glob("*.dist-info")
    for entry in PathDistribution(metadata).entry_points:
        assert not (installed / "bin" / f"{entry.module.split('.')[0]}.py").exists(), entry.name


@pytest.mark.parametrize("package", ["moco_isl", "launch"])
def test_all_files_of_a_package_are_installed(installed, package):
    there, here = (
        {p.relative_to(root) for p in (root / package).rglob("*.*") if "__pycache__" not in p.parts}
        for root in (installed, ROOT)
    )
    assert there == here


def test_the_list_of_commands(capsys):
    assert __main__.main([]) == 0
    out = capsys.readouterr().out
    for name, (way, what) in __main__.COMMANDS.items():
        assert any(
            line.split() == [*name.split(), *way.split(), *what.split()]
            for line in out.splitlines()
        )
    for way, _ in __main__.COMMANDS.values():
        place = way.split()[-1]
        assert (ROOT / place).is_file() or any(
            (ROOT / (place.replace(".", "/") + end)).is_file() for end in (".py", "/__main__.py")
        ), place
    assert __main__.main(["rep\udcff"]) == 2 and capsys.readouterr().err.count("\n") == 1
