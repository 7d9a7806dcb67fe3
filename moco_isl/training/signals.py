"""Signals only set a flag; the loop looks at it between steps, and the ranks agree on when."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed

from moco_isl import dist
from moco_isl.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Stop:
    """A context in which SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C ask the run to stop at the next step.

    asked: a launcher's own question, instead of signal handlers. A second Ctrl-C ends the process at once, as usual. Signals that were
    blocked until here, as in a process just spawned, are let in.
    """

    def __init__(self, asked: Callable[[], bool] | None = None):
        self._asked, self._flag, self._old = asked, False, {}
        # beside NCCL a CPU group, so that asking needs no word from the GPU
        nccl = dist.active() and torch.distributed.get_backend() == "nccl"
        self._group = torch.distributed.new_group(backend="gloo") if nccl else None

    def __enter__(self) -> "Stop":
        if self._asked is None and threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._handle) for number in SIGNALS}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self._flag and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._flag and dist.is_main():  # print is not safe inside a handler
            os.write(1, f"=> {signal.Signals(number).name}: saving and leaving at the next step\n".encode())
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
        """The batches, asking before each: raises Interrupted on all ranks at once. most: how many the rank with the most of them has."""
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
        """For long work on one rank: raises Interrupted once this rank was asked."""
        if self.here():
            raise Interrupted("asked to stop")
