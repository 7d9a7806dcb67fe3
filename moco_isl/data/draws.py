"""Random numbers as a function of (seed, epoch, index, view), without a generator to save.

Any number of workers or ranks, and a run resumed in the middle of an epoch, draw the same numbers
for the same image. The hash is SplitMix64 (Steele, Lea, Flood 2014): 64-bit counters, multiplied
and shifted until every bit of the input changes every bit of the output. int64 arithmetic wraps
around on CPU and CUDA alike, so the numbers are equal on both.
"""

import functools
import random
from collections.abc import Callable

import torch

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the step of the counter
_MULTIPLY = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_64 = (1 << 64) - 1


def _signed(x: int) -> int:
    """The int64 with the bits of the 64-bit number x."""
    return x - (1 << 64) if x >> 63 else x


def _mix_int(x: int) -> int:
    """`_mix` of one Python integer, unsigned 64 bits."""
    x &= _64
    x = ((x ^ (x >> 30)) * _MULTIPLY[0]) & _64
    x = ((x ^ (x >> 27)) * _MULTIPLY[1]) & _64
    return x ^ (x >> 31)


def hash64(*parts: int) -> int:
    """A 64-bit number from any integers."""
    state = 0
    for part in parts:
        state = _mix_int(state + part + _GOLDEN)
    return state


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    # an int64 shift repeats the sign bit; the mask clears those bits
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function on int64."""
    x = (x ^ _shift(x, 30)) * _signed(_MULTIPLY[0])
    x = (x ^ _shift(x, 27)) * _signed(_MULTIPLY[1])
    return x ^ _shift(x, 31)


def uniforms(seed: int, epoch: int, index: torch.Tensor, view: int, n: int) -> torch.Tensor:
    """n draws for every image, on the device of index: int64 [N] -> float32 [N, n] in [0, 1).

    Row i depends on (seed, epoch, index[i], view) alone; column j does not depend on n.
    """
    return numbers(starts(seed, epoch, index, view), columns(n, index.device))


def starts(seed: int, epoch: int, index: torch.Tensor, view: int) -> torch.Tensor:
    """The number that the draws of each image start from, for `numbers`: int64 [N]."""
    return index + _signed(hash64(seed, epoch, view))


@functools.cache
def columns(n: int, device: torch.device) -> torch.Tensor:
    """The numbers that tell an image's n draws apart, for `numbers`: int64 [n]."""
    return torch.arange(1, n + 1, device=device) * _signed(_GOLDEN)


def numbers(start: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """The draws: start int64 [N], column int64 [n] -> float32 [N, n] in [0, 1).

    A function of tensors alone, to be compiled. `columns` is no part of it: a compiler takes arange
    times a number for arithmetic of indices, which does not wrap around.
    """
    mixed = _mix(_mix(start)[:, None] + column)  # [N, n]
    return _shift(mixed, 40).float() * 2.0**-24  # the upper 24 bits, as many as a float32 holds


def uniform(seed: int, epoch: int, index: int, view: int) -> Callable[[int], float]:
    """One image's row of `uniforms`, a column at a time, for a worker that needs few of them."""
    row = _mix_int(index + hash64(seed, epoch, view))
    return lambda j: (_mix_int(row + (j + 1) * _GOLDEN) >> 40) * 2.0**-24


class seeded:
    """A block with torch's and Python's generators seeded by (seed, epoch, index, view).

    After the block they are as before. Of torch's only the CPU generator is touched: workers run
    this, and must not start CUDA.
    """

    def __init__(self, seed: int, epoch: int, index: int, view: int):
        self.seed = hash64(seed, epoch, index, view)

    def __enter__(self) -> None:
        self.before = torch.default_generator.get_state(), random.getstate()
        torch.default_generator.manual_seed(_signed(self.seed))
        random.seed(self.seed)

    def __exit__(self, *_) -> None:
        torch.default_generator.set_state(self.before[0])
        random.setstate(self.before[1])


def counted(order: torch.Tensor, M: int) -> torch.Tensor:
    """The draws of an order in which images repeat: int64 [n] -> image + M x (comings before).

    So each coming of an image has draws of its own, and the image is the draw modulo M.
    """
    place = order.argsort(stable=True)
    images = order[place]
    before = torch.arange(len(order)) - torch.searchsorted(images, images)
    return order.index_add(0, place, M * before)


def permutation(seed: int, epoch: int, M: int) -> torch.Tensor:
    """The order of the images in an epoch: int64 [M], a function of (seed, epoch)."""
    generator = torch.Generator().manual_seed(_signed(hash64(seed, epoch)))
    return torch.randperm(M, generator=generator)
