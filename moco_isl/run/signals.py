"""Stop a run at its next step.

A signal sets a flag, the loop reads it between steps, and the ranks agree on when to stop.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed

from moco_isl import dist
from moco_isl.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


def caught() -> list[signal.Signals]:
    """The SIGNALS that are caught: all, except a SIGHUP that this process was told to ignore.

    nohup does so, for one.
    """
    return [
        number
        for number in SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    ]


def open_standard_streams() -> None:
    """Put /dev/null where this process was started with a standard stream closed.

    Otherwise the next file to be opened, such as metrics.jsonl, gets its number, and all that is
    said goes into that file.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # the lowest free number, so this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def say(line: str) -> None:
    """Print a line from a signal handler, where `print` is not safe.

    Where the terminal is gone, all that comes later goes to /dev/null.
    """
    if sys.stdout is None:  # closed from the start
        return
    try:
        os.write(1, f"{line}\n".encode())
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


class Stop:
    """A context in which a signal asks the run to stop at the next step.

    The signals are SIGTERM, SIGUSR1, SIGUSR2, SIGHUP (the terminal is gone) and Ctrl-C. A second
    Ctrl-C ends the process at once.
    asked: a launcher's own function that says whether to stop; it replaces the signal handlers.
    Signals that were blocked until here, as in a process just spawned, are let in.
    """

    def __init__(self, asked: Callable[[], bool] | None = None):
        self._asked = asked
        self._flag = False
        self._old = {}
        # a CPU group beside NCCL's, so that asking does not wait for the GPU
        nccl = dist.active() and torch.distributed.get_backend() == "nccl"
        self._group = torch.distributed.new_group(backend="gloo") if nccl else None

    def __enter__(self) -> "Stop":
        if self._asked is None and threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._handle) for number in caught()}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self._flag and number == signal.SIGINT:
            raise KeyboardInterrupt
        # at SIGHUP every rank prints: so `say` finds out whether the rank's terminal is still there
        if not self._flag and (dist.is_main() or number == signal.SIGHUP):
            say(f"=> {signal.Signals(number).name}: saving and leaving at the next step")
        self._flag = True

    def here(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._asked() if self._asked is not None else self._flag

    def agreed(self) -> bool:
        """Whether any rank was asked: the same answer on all ranks. Every rank has to call it."""
        if dist.world_size() == 1:
            return self.here()
        flag = torch.tensor([int(self.here())])
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def watch(self, batches: Iterable, most: int) -> Iterator:
        """The batches; before each, Interrupted is raised on all ranks if one was asked to stop.

        most: the largest number of batches that a rank has.

        most: how many the rank with the most of them has.
        """
        asked = 0
        for batch in batches:
            self._leave_if_agreed()
            asked += 1
            yield batch
        for _ in range(asked, most):
            self._leave_if_agreed()

    def _leave_if_agreed(self) -> None:
        if self.agreed():
            raise Interrupted("asked to stop")

    def tick(self) -> None:
        """Raise Interrupted once this rank was asked to stop; for long work on one rank."""
        if self.here():
            raise Interrupted("asked to stop")


class Never(Stop):
    """Nobody asks to stop: for a call in a program of a user's own, whose Ctrl-C is Python's."""

    def __init__(self):
        """No group of ranks is made, since there is nothing to agree on."""

    def __enter__(self) -> "Never":
        return self

    def __exit__(self, *_) -> None:
        pass

    def here(self) -> bool:
        return False

    def agreed(self) -> bool:
        return False
