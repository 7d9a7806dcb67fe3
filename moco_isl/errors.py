"""The three ways a run ends early, each with its exit code.

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
