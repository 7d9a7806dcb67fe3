"""Averages that stay on the device until they are read, and how they are shown."""

import sys
import time

import torch
from tqdm import tqdm

from moco_isl import dist, files
from moco_isl.errors import RunFailed


class Averages:
    """Running means of the parts of the loss, since the last reading and over the epoch.

    The first step with a loss that is not finite is remembered. Adding never waits for the device.
    The state goes into checkpoints, so that a resumed epoch ends with the means of the whole epoch.
    """

    def __init__(self):
        self.names: list[str] = []
        self.sums = self.read = None  # [parts + 1] float64 each, the last entry counts images
        self.bad_step = None  # scalar, -1: none so far

    def add(self, parts: dict[str, torch.Tensor], n: int, step: int) -> None:
        """Add the parts of the loss of one step over n images; each is a scalar."""
        values = torch.stack([value.double() for value in parts.values()])
        if self.sums is None or self.names != list(parts):
            self.names = list(parts)
            self.sums = values.new_zeros(len(parts) + 1)
            self.read = self.sums.clone()
        if self.bad_step is None:
            self.bad_step = torch.full((), -1, dtype=torch.int64, device=values.device)
        self.sums += torch.cat([values * n, values.new_full((1,), n)])
        self.bad_step = torch.where(
            (self.bad_step < 0) & ~torch.isfinite(parts["loss"]), step, self.bad_step
        )

    def first_bad_step(self) -> int:
        return -1 if self.bad_step is None else int(self.bad_step)

    def interval(self) -> dict[str, float]:
        """Means since the last call, over the images of this rank."""
        fresh = self.sums - self.read
        self.read = self.sums.clone()
        return dict(zip(self.names, (fresh[:-1] / fresh[-1]).tolist()))

    def epoch(self) -> dict[str, float]:
        """Means over the epoch so far, over the images of all ranks."""
        sums = dist.all_reduce_sum(self.sums.clone())
        return dict(zip(self.names, (sums[:-1] / sums[-1]).tolist()))

    def state_dict(self) -> dict:
        """The sums of this rank as plain values."""
        plain = lambda x: None if x is None else x.tolist()
        return {"names": self.names, "sums": plain(self.sums), "read": plain(self.read)}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Load what `state_dict` gave, onto a device."""
        self.names = state["names"]
        self.sums = self.read = None
        if state["sums"] is not None:
            self.sums = torch.tensor(state["sums"], dtype=torch.float64, device=device)
            self.read = torch.tensor(state["read"], dtype=torch.float64, device=device)


def duration(seconds: float) -> str:
    """Seconds in words: 58 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


class Clock:
    """Seconds a step, and of them seconds waiting for data, since the last reading."""

    def __init__(self):
        self.steps = 0
        self.images = 0
        self.data = 0.0
        self.start = self.mark = time.perf_counter()

    def got_data(self) -> None:
        self.data += time.perf_counter() - self.mark

    def step_done(self, images: int) -> None:
        self.steps += 1
        self.images += images
        self.mark = time.perf_counter()

    def read(self) -> dict[str, float]:
        """time and data_time: seconds a step; images_per_s: of all ranks."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        steps = max(self.steps, 1)
        reading = {
            "time": seconds / steps,
            "data_time": self.data / steps,
            "images_per_s": self.images * dist.world_size() / seconds,
        }
        self.__init__()
        return reading


class Progress:
    """What a user sees of the steps: MoCo's lines, or one bar over the whole run.

    Only rank 0 shows anything.
    """

    def __init__(self, style: str, epochs: int, steps: int):
        self.style = style
        self.epochs = epochs
        self.steps = steps
        self.bar = None
        self._named: set[int] = set()  # unreadable images

    def begin(self, done: int) -> None:
        """Begin to show the steps; `done` of them were taken before this start."""
        if self.style == "bar" and dist.is_main():
            self.bar = tqdm(
                total=self.epochs * self.steps,
                initial=done,
                unit="step",
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=0.2,
            )

    def step(self, epoch: int) -> None:
        if self.bar is not None:
            self.bar.set_description_str(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
            self.bar.update()

    def report(self, epoch: int, step: int, values: dict[str, float]) -> None:
        """Print a line like MoCo's, or show the loss in the bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {values['loss']:.3f}", refresh=False)
        elif dist.is_main():
            width = len(str(self.steps))
            line = [
                f"Epoch: [{epoch}][{step:{width}d}/{self.steps}]",
                f"Time {values['time']:6.3f}",
                f"Data {values['data_time']:6.3f}",
            ]
            line.append(f"Loss {values['loss']:.4e}")
            if values.get("hpe"):
                line.append(f"HPE {values['hpe']:.3e}")
            if "acc1" in values:
                line.append(f"Acc@1 {values['acc1']:6.2f}")
            line += [f"lr {values['lr']:.3e}", f"{values['images_per_s']:.0f} img/s"]
            print("\t".join(line), flush=True)

    def say(self, line: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        if dist.is_main():
            self._print(line)

    def _print(self, line: str) -> None:
        if self.bar is None:
            print(line, flush=True)
        else:
            tqdm.write(line, file=sys.stdout)

    def name_unreadable(self, found: list[tuple[int, str]]) -> None:
        """Print a line for each unreadable image (index, path) when it is found for the first time.

        Every rank prints its own.

        Every rank says its own.
        """
        for index, path in found:
            if index not in self._named:
                self._named.add(index)
                name = files.shown(path)
                self._print(f"=> warning: {name} cannot be read; the next image stands in for it")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def require_finite(averages: Averages, epoch: int, last_good: str) -> None:
    """Raise RunFailed on all ranks if a loss of this epoch was not finite on any rank.

    The message names the step and `last_good`, the last good file ('': there is none).
    """
    bad = averages.first_bad_step()
    worst = int(dist.all_reduce_max(torch.tensor(bad, device=averages.sums.device)))
    if worst < 0:
        return
    text = f"the loss was not finite at epoch {epoch}, step {worst}; {start_anew(last_good)}"
    raise RunFailed(text if dist.is_main() else "")


def start_anew(last_good: str) -> str:
    """What to do after an explosion, in words. last_good: a file, '': there is none."""
    if last_good:
        return (
            f"the last good file is {last_good}: start anew from it with --init, a lower --lr or"
            " without --amp"
        )
    return "nothing had been saved yet: start anew with a lower --lr or without --amp"
