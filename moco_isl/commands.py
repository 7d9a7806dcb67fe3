"""The commands: which module runs each, and how it is typed here."""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the checkout, or where pip has put the package


@dataclass(frozen=True)
class Command:
    """module: its main(argv) runs the command. script: how it is typed in a checkout."""

    module: str
    script: str
    what: str


def _of_package(name: str, what: str) -> Command:
    return Command(f"moco_isl.{name}", f"python -m moco_isl.{name}", what)


COMMANDS = {
    "pretrain": Command(
        "main_moco_isl",
        "python main_moco_isl.py",
        "pretrain an encoder without labels: MoCo v2, and ISL around it",
    ),
    "mine": _of_package("mine", "say which images go together, by a trained encoder"),
    "knn": Command("main_knn", "python main_knn.py", "judge it by weighted nearest neighbours"),
    "probe": Command(
        "main_lincls", "python main_lincls.py", "judge it by linear classifiers, or fine-tune it"
    ),
    "transfer": _of_package("transfer", "judge encoders on other data sets, in one table"),
    "detect": Command(
        "moco_isl.evaluation.detection.__main__",
        "python -m moco_isl.evaluation.detection",
        "judge it by object detection, with Faster R-CNN",
    ),
    "embed": Command(
        "moco_isl.embed.__main__",
        "python -m moco_isl.embed",
        "write the features of all images of a folder into a file",
    ),
    "export": _of_package("export", "write it for another library"),
    "report": Command(
        "moco_isl.report.__main__",
        "python -m moco_isl.report",
        "write a page about one run or several",
    ),
    "submit": Command(
        "launch.submit",
        "python launch/submit.py",
        "run pretrain, probe, knn or detect on a SLURM cluster",
    ),
    "status": Command("launch.status", "python launch/status.py", "what a submitted job is doing"),
    "sweep": Command("launch.sweep", "python launch/sweep.py", "run a command at many settings"),
}


def typed(name: str) -> str:
    """How a command is typed here, for messages that say what to do next."""
    way = COMMANDS[name].script
    if _by_subcommand():
        return f"moco-isl {name}"
    if way.endswith(".py"):
        return f"python {shlex.quote(os.path.relpath(ROOT / way.split()[1]))}"
    return way


def as_typed(text: str) -> str:
    """A text with its commands as they are typed here: it has them as in a checkout."""
    if _by_subcommand():
        for name, command in COMMANDS.items():
            text = text.replace(command.script, f"moco-isl {name}")
    return text


def prog(script: str) -> str:
    """The name that a parser gives its program; script: how that is typed in a checkout.

    A script that was started as such keeps the name it was started by.
    """
    if _started_by_moco_isl():
        return as_typed(script)
    if not script.endswith(".py"):
        return script
    name = Path(script.split()[1])
    started = Path(sys.argv[0])
    return started.name if started.stem == name.stem else name.name


def _by_subcommand() -> bool:
    """Whether commands are typed `moco-isl NAME`: where it was so, and outside a checkout."""
    return _started_by_moco_isl() or not (ROOT / "setup.py").is_file()


def _started_by_moco_isl() -> bool:
    """Whether this process, or the rank that started it, was started by the command `moco-isl`."""
    started = Path(sys.argv[0])
    return started.stem == "moco-isl" or started.parts[-2:] == ("moco_isl", "__main__.py")
