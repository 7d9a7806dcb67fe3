"""What an installed wheel leaves: commands that start from any folder, and the files they need."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from moco_isl import __version__
from moco_isl.commands import COMMANDS

ROOT = Path(__file__).parent.parent
SCRIPTS = {"main_moco_isl", "main_knn", "main_lincls", "moco-isl"}
PACKAGES = ("moco_isl", "launch")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md"]:
        shutil.copy(path, source)
    unwanted = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=unwanted)
    build = [sys.executable, *"-m build --wheel --no-isolation --outdir".split(), str(target)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = target.iterdir()
    return found


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """The folder of programs of a new environment with the wheel in it.

    It finds the packages of this one, but not this checkout, which may be installed here too.
    """
    place = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    pip = f"{sys.executable} -m pip --disable-pip-version-check --python {place / 'bin' / 'python'}"
    install = "install --quiet --no-index --no-deps".split()
    subprocess.run([*pip.split(), *install, str(wheel)], check=True)
    (site,) = place.glob("lib/python*/site-packages")
    # a line of a .pth file adds a folder, but not what the .pth files in there would add
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin"


@pytest.fixture
def run(fresh, tmp_path, monkeypatch):
    """run(command): what an installed command printed, started in an empty folder."""
    kept = {name: x for name, x in os.environ.items() if not name.startswith("PYTHON")}

    def started(command: str, code: int = 0) -> str:
        name, *flags = command.split()
        done = subprocess.run(
            [str(fresh / name), *flags], cwd=tmp_path, env=kept, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return started


def test_all_files_of_the_packages_are_in_the_wheel(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {f"{name}.py" for name in SCRIPTS - {"moco-isl"}}
    for package in PACKAGES:
        paths = (ROOT / package).rglob("*.*")
        wanted |= {str(p.relative_to(ROOT)) for p in paths if "__pycache__" not in p.parts}
    assert files == wanted


def test_each_program_starts_and_hides_no_module(fresh, run):
    """Python looks beside a program first: one named like a module, with .py, imports itself."""
    programs = {p.name for p in fresh.iterdir() if "moco_isl" in p.read_text(errors="ignore")[:400]}
    assert {*SCRIPTS} <= {p.name for p in fresh.iterdir()}
    assert not [name for name in programs if name.endswith(".py")]
    for name in sorted(SCRIPTS):
        assert run(f"{name} --version") == f"moco_isl {__version__}\n"


@pytest.mark.long
def test_a_first_try_from_the_wheel(run, fresh, tmp_path):
    """Every command's help, and a way from no data at all to a report and an export."""
    (tmp_path / "where.py").write_text(
        "import moco_isl, launch, main_knn\n"
        "print(moco_isl.__file__, launch.__file__, main_knn.__file__)\n"
    )
    assert all(place.startswith(str(fresh.parent)) for place in run("python where.py").split())
    for name in COMMANDS:
        assert run(f"moco-isl {name} --help").startswith(f"usage: moco-isl {name} "), name
    assert run("main_knn --help").startswith("usage: main_knn ")

    on = "--dataset digits -j 0 --device cpu"
    small = "-a digits --mlp --moco-dim 32 --moco-k 256 -b 128 --seed 1"
    run(f"moco-isl pretrain {on} {small} --epochs 1 --max-steps 4 -p 2 --out runs/a")
    file = "runs/a/checkpoint_last.pth.tar"
    command = json.loads((tmp_path / "runs/a/args.json").read_text())["command"]
    assert command[1:3] == [str(fresh / "moco-isl"), "pretrain"]
    assert "backbone" in run(f"moco-isl knn {on} --pretrained {file} --k 5")
    said = run(f"moco-isl mine {file} {on} --miner knn --out runs/mined")
    assert "precision" in said and "moco-isl report runs/mined" in said
    probe = "--cache-features --lr 1 --epochs 1 --schedule --out runs/a/probe"
    assert "digits" in run(f"moco-isl probe {on} --pretrained {file} {probe}")
    assert "report.html" in run("moco-isl report runs/a runs/mined")
    assert "same output" in run(f"moco-isl export {file} --to safetensors --out a.safetensors")
    dry = run("moco-isl submit pretrain --dry-run -- --dataset digits -a digits --moco-k 512")
    assert "# nothing was submitted" in dry
    assert "# ---- main_moco_isl, " in dry
    assert run("moco-isl sweep absent.yaml", code=2).count("\n") == 1
