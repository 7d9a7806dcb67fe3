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
    unwanted = shutil.ignore_patterns("__pycache__")
    for package in ("moco_isl", "launch"):
        shutil.copytree(ROOT / package, source / package, ignore=unwanted)
    pip = f"{sys.executable} -m pip install --quiet --disable-pip-version-check".split()
    options = "--no-index --no-deps --no-build-isolation --no-compile --target".split()
    subprocess.run([*pip, *options, str(target), str(source)], check=True, cwd=source)
    return target


def test_each_command_starts_from_another_folder(installed, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = kept | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", START_EACH, str(installed / "bin")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    said = found["said"]
    flags = ("--help", "--version")
    assert set(said) == {f"{name} {flag}" for name in __main__.COMMANDS for flag in flags}
    for what, (code, text) in said.items():
        assert code in (0, None), what
        if what.endswith("--version"):
            assert text == f"moco_isl {__version__}\n", what
        else:
            assert "--version" in text, what
    assert all(file.startswith(str(installed)) for file in found["files"]), "not the checkout's"
    assert not list(tmp_path.iterdir())


def test_no_command_hides_a_module(installed):
    """Python looks beside the script first: one named like a module, with .py, imports itself."""
    assert sorted(p.name for p in (installed / "bin").iterdir()) == sorted(__main__.COMMANDS)
    (metadata,) = installed.glob("*.dist-info")
    for entry in PathDistribution(metadata).entry_points:
        assert not (installed / "bin" / f"{entry.module.split('.')[0]}.py").exists(), entry.name


@pytest.mark.parametrize("package", ["moco_isl", "launch"])
def test_all_files_of_a_package_are_installed(installed, package):
    def files_in(root):
        paths = (root / package).rglob("*.*")
        return {path.relative_to(root) for path in paths if "__pycache__" not in path.parts}

    assert files_in(installed) == files_in(ROOT)


def test_the_list_of_commands(capsys):
    assert __main__.main([]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, (way, what) in __main__.COMMANDS.items():
        assert [name, *way.split(), *what.split()] in lines
        place = way.split()[-1]
        module = place.replace(".", "/")
        assert any((ROOT / f).is_file() for f in (place, module + ".py", module + "/__main__.py"))
    assert __main__.main(["rep\udcff"]) == 2 and capsys.readouterr().err.count("\n") == 1
