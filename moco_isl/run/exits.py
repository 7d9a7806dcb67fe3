"""How a script ends: one line and an exit code for whatever went wrong."""

import errno
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed

from moco_isl import dist, files
from moco_isl.data import workers
from moco_isl.errors import BadInput, Interrupted, RunFailed, first_line
from moco_isl.run import environment, signals
from moco_isl.run.environment import BadEnvironment

KEYBOARD = 130  # the exit code that a shell gives a process that Ctrl-C ended
OF_A_PATH = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}


def exit_code(
    script: Callable,
    argv: list[str] | None = None,
    stop: Callable[[], bool] | None = None,
    lost: int = RunFailed.exit_code,
) -> int:
    """Run script(argv, stop) and return its exit code; what went wrong becomes a line on stderr.

    lost: the exit code where the run failed because another rank is gone. Errors that neither the
    user nor the machine caused are raised.
    """
    signals.open_standard_streams()
    files.print_any_name()
    try:
        script(argv, stop)
        return 0
    except (BadInput, RunFailed, Interrupted) as error:
        if str(error) and _is_ours_to_say(error):
            _say("=> interrupted" if isinstance(error, Interrupted) else "error", error)
        return error.exit_code
    except KeyboardInterrupt:
        how = "at once, without saving; --resume auto goes on from the last checkpoint"
        _say("=> interrupted", how)
        return KEYBOARD
    except Exception as error:
        if _lost_a_rank(error):
            if lost == RunFailed.exit_code:
                who = f"rank {os.environ.get('RANK', '?')} lost another rank, which has ended"
                _say("error", f"{who}: see what that one said. Resume with --resume auto")
            return lost
        text = _machine_trouble(error)
        if not text:
            raise
        _say("error", text)
        return RunFailed.exit_code


def _is_ours_to_say(error: Exception) -> bool:
    """Whether this rank prints the error: rank 0 prints what all ranks know.

    All ranks know of a stop, and of bad input that is found before they have met. Of a later error
    only the rank that is to print it has the text.
    """
    if isinstance(error, (RunFailed, BadEnvironment)) or environment.is_first():
        return True
    return isinstance(error, BadInput) and dist.active()


def _say(word: str, text) -> None:
    print(f"{word}: {files.shown(str(text))}", file=sys.stderr, flush=True)


def _lost_a_rank(error: Exception) -> bool:
    if not dist.active():
        return False
    signs = ("Connection closed by peer", "Connection reset by peer", "gloo")
    return isinstance(error, torch.distributed.DistError) or any(x in str(error) for x in signs)


def _machine_trouble(error: Exception) -> str:
    """What the machine ran out of or refused, in a line; '' for errors that deserve a traceback."""
    text = files.short(first_line(error), 200)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        cure = "use a smaller --batch-size, --amp bf16, or more GPUs"
        return f"the GPU's memory is full ({text}): {cure}"
    signs = ("t allocate memory", "Storage size calculation overflowed")
    if isinstance(error, MemoryError) or any(x in str(error) for x in signs):
        cure = "use a smaller --batch-size, --moco-k or --moco-dim"
        return f"the memory is full ({text}): {cure}"
    if words := workers.trouble(error):
        return words
    if not isinstance(error, OSError):
        return ""
    if error.errno in OF_A_PATH:
        where = f" '{files.shown(error.filename)}'" if error.filename else ""
        return f"a file or folder{where} cannot be used: {error.strerror}; {files.cure(error)}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        how = "Free some space, then resume with --resume auto"
        return f"{error.strerror}; the last checkpoint is whole. {how}"
    return ""
