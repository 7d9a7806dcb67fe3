"""How a script ends: one line and an exit code for whatever went wrong."""

import errno
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed
import torch.multiprocessing

from moco_isl import dist, files
from moco_isl.data import workers
from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.run import environment
from moco_isl.run.environment import BadEnvironment
from moco_isl.run.flags import short

KEYBOARD = 130  # what a shell makes of a process that Ctrl-C ended


def exit_code(
    script: Callable,
    argv: list[str] | None = None,
    stop: Callable[[], bool] | None = None,
    lost: int = RunFailed.exit_code,
) -> int:
    """Run script(argv, stop); what a user did wrong, a failed run and an interruption become one
    line on stderr and an exit code.

    lost: the exit code where the run failed because another rank is gone.
    """
    files.print_any_name()
    try:
        script(argv, stop)
        return 0
    except (BadInput, RunFailed, Interrupted) as error:
        # a stop, and what is wrong before the ranks meet, is known to all of them; of what goes
        # wrong later only who is to say it has the text
        own = (
            isinstance(error, (RunFailed, BadEnvironment))
            or isinstance(error, BadInput)
            and dist.active()
        )
        if str(error) and (own or environment.is_first()):
            _say("=> interrupted" if isinstance(error, Interrupted) else "error", error)
        return error.exit_code
    except KeyboardInterrupt:
        _say(
            "=> interrupted",
            "at once, without saving; --resume auto goes on from the last checkpoint",
        )
        return KEYBOARD
    except Exception as error:
        if _lost_a_rank(error):
            if lost == RunFailed.exit_code:
                _say(
                    "error",
                    f"rank {os.environ.get('RANK', '?')} lost another rank, which has ended: see"
                    " what that one said. Resume with --resume auto",
                )
            return lost
        if not (text := _in_words(error)):
            raise
        _say("error", text)
        return RunFailed.exit_code


def _say(word: str, text) -> None:
    print(f"{word}: {files.shown(str(text))}", file=sys.stderr, flush=True)


def _lost_a_rank(error: Exception) -> bool:
    text = str(error)
    return dist.active() and (
        isinstance(error, torch.distributed.DistError)
        or "Connection closed by peer" in text
        or "Connection reset by peer" in text
        or "gloo" in text
    )


OF_A_PATH = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}


def _in_words(error: Exception) -> str:
    """What befell the machine, and not the program, in a line; '' for anything else, which deserves
    its traceback.
    """
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            f"the GPU's memory is full ({text}): use a smaller --batch-size, --amp bf16, or more"
            " GPUs"
        )
    if (
        isinstance(error, MemoryError)
        or "t allocate memory" in text
        or "Storage size calculation overflowed" in text
    ):
        return (
            f"the memory is full ({short(text, 200)}): use a smaller --batch-size, --moco-k or"
            " --moco-dim"
        )
    if words := workers.befell(error):
        return words
    if isinstance(error, OSError) and error.errno in OF_A_PATH:
        where = f" '{files.shown(error.filename)}'" if error.filename else ""
        return f"a file or folder{where} cannot be used: {error.strerror}; {files.cure(error)}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{error.strerror}; the last checkpoint is whole. Free some space, then resume with"
            " --resume auto"
        )
    return ""
