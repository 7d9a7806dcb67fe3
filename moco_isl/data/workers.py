"""Processes that read images: they ignore signals, end for sure, and never block their parent.

Where a worker cannot hand over a batch, it ends with an exit code that says why, and the parent
turns that into a line with a cure.
"""

import errno
import multiprocessing.queues
import os
import re
import shutil
import signal
import traceback
from collections.abc import Callable

from torch.utils.data import DataLoader

RESUME = "then resume with --resume auto"
NOT_SENT = 70  # exit code of a worker that could not send a batch and has printed why
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # not the fault of an image


def quiet(_worker: int) -> None:
    """Set up a worker: it ignores signals, and ends where it cannot hand over a batch.

    Stop signals reach the whole process group; the parent decides what they mean and ends its
    workers itself. Where the parent dies, torch's own watch ends a worker within seconds.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    feeder = multiprocessing.queues.Queue
    feeder._on_queue_feeder_error = staticmethod(_end_instead_of_losing_a_batch)


def _end_instead_of_losing_a_batch(error: Exception, _batch) -> None:
    """End the worker, in place of multiprocessing's own handler.

    That one prints the error and drops the batch, for which the parent would wait for ever.
    """
    code = next((code for code in _TROUBLES if _is(code, error)), NOT_SENT)
    if code == NOT_SENT:
        traceback.print_exception(error)
    os._exit(code)


# ---- what to say ---------------------------------------------------------------------------------


def trouble(error: BaseException, codes: tuple[int | None, ...] | None = None) -> str:
    """What the machine ran out of, or that it ended a worker, in a line; '' for any other error.

    codes: the workers' exit codes, which only the loop over batches knows. torch also raises the
    news of a worker's end in the midst of a step, wherever it finds this process.
    """
    for code, words in _TROUBLES.items():
        if code in (codes or ()) or _is(code, error):
            return words()
    # errors that were raised inside a worker come without a pid
    ended = re.match(r"DataLoader worker \(pid(?:\(s\))? (\d+)", str(error))
    if ended and isinstance(error, RuntimeError):
        who = f"a process that reads images was ended from outside (pid {ended[1]})"
        return f"{who}: the memory may have run out; use fewer --workers, {RESUME}"
    if codes is None:
        return ""
    if isinstance(error, (ConnectionError, EOFError)):
        return (
            f"{_NO_BATCH}: it was ended from outside, or the memory or the number of open files"
            f" (ulimit -n) has run out; use fewer --workers, {RESUME}"
        )
    if getattr(error, "errno", None) == errno.ENOSPC:  # semaphores lie in the shared memory too
        return _shared_memory_is_full()
    return ""


def _is(code: int, error: BaseException) -> bool:
    """Whether an error says what `code` stands for: as a worker's exit code, or in its text."""
    text = str(error)
    if re.match(rf"DataLoader worker .* exit code {code}\b", text):
        return True
    if code == errno.ENOSPC:
        shared = "shared memory" in text or "/torch_" in text
        signs = ("Bus error", "No space left", "unable to", "Cannot allocate")
        return isinstance(error, RuntimeError) and shared and any(x in text for x in signs)
    if code == errno.EMFILE:
        of_system = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
        return of_system or "Too many open files" in text or "ancdata" in text
    return False


def _shared_memory_is_full() -> str:
    size = ""
    if os.path.isdir("/dev/shm"):
        size = f", {shutil.disk_usage('/dev/shm').total / 2**20:.3g} MiB in all"
    return (
        f"the shared memory (/dev/shm{size}) is full, through which processes hand over images:"
        " give a container more of it (docker run --shm-size=8g), or use fewer --workers (-j; 0"
        f" needs none) or a smaller --batch-size (-b), {RESUME}"
    )


def _too_many_files() -> str:
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"too many files are open (at most {most} may be): allow more (ulimit -n 65536; docker run"
        f" --ulimit nofile=65536), or use fewer --workers (-j), {RESUME}"
    )


def _could_not_send() -> str:
    return f"{_NO_BATCH}: see its error above, correct that, {RESUME}"


_NO_BATCH = "a process that reads images could not hand over a batch"
_TROUBLES = {  # exit code of a worker -> what to say
    errno.EMFILE: _too_many_files,
    errno.ENOSPC: _shared_memory_is_full,
    NOT_SENT: _could_not_send,
}


# ---- the end of workers --------------------------------------------------------------------------


def end(holder: list[DataLoader]) -> None:
    """End the workers of the DataLoaders in a list, which is emptied.

    multiprocessing would send SIGTERM at exit, which workers ignore. torch has no public way to end
    workers kept over epochs.
    """
    while holder:
        iterator = getattr(holder.pop(), "_iterator", None)
        if iterator is not None:
            workers = list(iterator._workers)
            _past_news(iterator._shutdown_workers)
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                _past_news(worker.join)


def _past_news(end: Callable[[], None]) -> None:
    """Call end(), and ignore torch's late error that a worker was ended."""
    try:
        end()
    except RuntimeError as error:
        if not trouble(error):
            raise


def exit_codes(loader: DataLoader) -> tuple[int | None, ...]:
    """The exit codes of a loader's workers, None for those that run; () where it has none."""
    iterator = getattr(loader, "_iterator", None)
    return tuple(worker.exitcode for worker in getattr(iterator, "_workers", ()))
