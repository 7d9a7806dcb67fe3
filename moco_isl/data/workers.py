"""Processes that read images: they leave signals to their parent, end for sure, and never leave it
waiting for a batch that they could not send.
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
# exit code of a worker that could not send a batch, for a reason of its own, which it has printed
NOT_SENT = 70
# what opening an image may raise that is not the image's fault
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def quiet(_worker: int) -> None:
    """Set up a worker: it takes no signals, and ends where it cannot hand over a batch.

    Stop signals reach the whole process group; the parent decides what they mean and ends its
    workers itself. When the parent dies without a word, torch's own watch ends a worker within
    seconds. torch has set one thread a worker already.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(
        _end_instead_of_losing_a_batch
    )


def _end_instead_of_losing_a_batch(error: Exception, _batch) -> None:
    """For multiprocessing's thread that sends batches.

    It would print the error and go on without the batch, for which the parent would wait.
    """
    code = next((code for code in _TROUBLES if _is(code, error)), NOT_SENT)
    if code == NOT_SENT:
        traceback.print_exception(error)
    os._exit(code)


def befell(error: BaseException, codes: tuple[int | None, ...] | None = None) -> str:
    """What to say where the machine ran out of something that workers need, or ended one; '' for
    any other error.

    torch raises the news that a worker has ended wherever it finds this process, in the loop over
    batches or in the midst of a step. codes: the workers' exit codes, given by the loop over
    batches alone.
    """
    for code, words in _TROUBLES.items():
        if code in (codes or ()) or _is(code, error):
            return words()
    found = (
        re.match(r"DataLoader worker \(pid(?:\(s\))? (\d+)", str(error))
        if isinstance(error, RuntimeError)
        else None
    )
    if found:  # an error inside of a worker comes without a pid
        return (
            f"a process that reads images was ended from outside (pid {found[1]}): the memory may"
            f" have run out; use fewer --workers, {RESUME}"
        )
    if codes is not None and isinstance(error, (ConnectionError, EOFError)):
        return (
            "a process that reads images could not hand over a batch: it was ended from outside,"
            " or the memory or the number of open files (ulimit -n) has run out; use fewer"
            f" --workers, {RESUME}"
        )
    # semaphores lie there too
    if codes is not None and getattr(error, "errno", None) == errno.ENOSPC:
        return _shared_memory_is_full()
    return ""


def _is(code: int, error: BaseException) -> bool:
    """Whether an error, or that of a worker in its text, says that the machine ran out of what
    `code` stands for.
    """
    text = str(error)
    if re.match(rf"DataLoader worker .* exit code {code}\b", text):
        return True
    if code == errno.ENOSPC:
        shared = "shared memory" in text or "/torch_" in text
        full = any(
            words in text
            for words in ("Bus error", "No space left", "unable to", "Cannot allocate")
        )
        return isinstance(error, RuntimeError) and shared and full
    if code == errno.EMFILE:
        of_system = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
        return of_system or "Too many open files" in text or "ancdata" in text
    return False


def _shared_memory_is_full() -> str:
    size = (
        f", {shutil.disk_usage('/dev/shm').total / 2**20:.3g} MiB in all"
        if os.path.isdir("/dev/shm")
        else ""
    )
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
    return (
        "a process that reads images could not hand over a batch: see its error above, mend that,"
        f" {RESUME}"
    )


# exit codes of workers: what to say
_TROUBLES = {
    errno.EMFILE: _too_many_files,
    errno.ENOSPC: _shared_memory_is_full,
    NOT_SENT: _could_not_send,
}


def end(holder: list[DataLoader]) -> None:
    """End the workers of a DataLoader for sure: they ignore SIGTERM, with which multiprocessing
    would do it at exit.
    """
    while holder:
        # torch has no public way to end workers kept over epochs
        iterator = getattr(holder.pop(), "_iterator", None)
        if iterator is not None:
            workers = list(iterator._workers)
            _past_news(iterator._shutdown_workers)
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                _past_news(worker.join)


def _past_news(end: Callable[[], None]) -> None:
    """end(), whatever torch tells meanwhile: the news that a worker was ended may arrive as late as
    here.
    """
    try:
        end()
    except RuntimeError as error:
        if not befell(error):
            raise


def exit_codes(loader: DataLoader) -> tuple[int | None, ...]:
    """Of the workers of a loader that has them."""
    iterator = getattr(loader, "_iterator", None)
    return tuple(worker.exitcode for worker in getattr(iterator, "_workers", ()))
