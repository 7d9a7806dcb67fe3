"""The floor of a training step: no implementation takes less time.

It counts the step's products at the rate of a large one (of matrices or a convolution, whichever is
faster) and its bytes at the rate of a copy. Both rates are measured in the same process.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import convolution_rate, copy_rate, matmul_rate

aten = torch.ops.aten
PRODUCTS = (
    aten.convolution,
    aten.convolution_backward,
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
)
# in float32: SGD reads a parameter, its gradient and its momentum and writes two of them; the key's
# average reads two and writes one
BYTES_OF_PARAMETER = 4 * (5 + 3)


class Elements(TorchDispatchMode):
    """Counts the elements that convolutions and matrix products inside read and write."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.count += sum(
                x.numel() for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)
            )
        return out


def work_of(step: Callable[[], object]) -> tuple[int, int]:
    """FLOPs of one call, and elements that its products read and write.

    What lies between products (batch norm, ReLU, augmentation) counts nothing.
    """
    elements = Elements()
    with FlopCounterMode(display=False) as flops, elements:
        step()
    return flops.get_total_flops(), elements.count


def floor_rows(
    step: Callable[[], object], parameters: int, dtype: torch.dtype, device: torch.device
) -> list[dict]:
    """Two rows in ms. parameters: of one encoder. dtype: in which the products are taken."""
    flops, elements = work_of(step)
    moved = elements * dtype.itemsize + parameters * BYTES_OF_PARAMETER
    rate = max(matmul_rate(device, dtype), convolution_rate(device, dtype))
    copied = copy_rate(device)
    name = str(dtype).removeprefix("torch.")
    return [
        {
            "what": f"floor: {flops / 1e12:.3g} TFLOP at {rate / 1e12:.3g} TFLOP/s ({name})",
            "value": flops / rate * 1e3,
            "unit": "ms",
        },
        {
            "what": f"floor: {moved / 1e9:.3g} GB at {copied / 1e9:.3g} GB/s",
            "value": moved / copied * 1e3,
            "unit": "ms",
        },
    ]
