"""The three ways a run ends early, each with its exit code, and how an error becomes one line.

Library code raises these; only the scripts turn them into a line on stderr and an exit code.
"""


class BadInput(ValueError):
    """What the user gave cannot work. One line: what was wrong, what was expected, what to do."""

    exit_code = 2


class RunFailed(RuntimeError):
    """The run itself failed: a non-finite loss, a full disk, too many broken images."""

    exit_code = 3


class Interrupted(Exception):
    """The run was asked to stop; what was reached is saved and can be resumed."""

    exit_code = 75


def first_line(error: BaseException) -> str:
    """The first line of what an error says; the name of its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def missing_package(who: str, package: str, install: str = "") -> BadInput:
    """The error for a package that is not installed; install: what pip installs, if another name.

    who: what needs the package, such as "--to timm".
    """
    return BadInput(f"{who} needs the package {package}: pip install {install or package}")
