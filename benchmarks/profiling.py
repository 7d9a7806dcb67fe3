"""Where the time of a step goes: its three largest kinds of work.

On a CPU these are operations, on a GPU kernels, grouped by what they do.
"""

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import common

COLUMNS = [
    ("form", "form"),
    ("what", "what"),
    ("ms", "ms a step"),
    ("share", "% of all"),
    ("largest", "largest of them"),
]
# kernels by name, the first that fits; those of a compiler carry the operations they join
KINDS = [
    ("joined by the compiler", r"^triton_"),
    ("our fused kernels", r"_softmax_kernel|_bits_kernel|_maxima_kernel"),
    ("copies and layouts", r"nchw|nhwc|[Cc]opy|Mem(cpy|set)|transpose"),
    ("batch norm", r"[Bb]atch_?[Nn]orm|\bbn_"),
    ("optimizer and averages", r"multi_tensor|foreach|[Ff]used_?(sgd|adam)"),
    ("sorting and top k", r"[Ss]ort|[Tt]op_?[Kk]|bitonic"),
    ("softmax and loss", r"[Ss]oft_?[Mm]ax|nll_loss|logsumexp"),
    ("convolutions and products", r"conv|gemm|cutlass|xmma|wgrad|dgrad|fprop|nvjet|cudnn|implicit"),
    ("sums", r"reduce"),
    ("one operation an element", r"elementwise|vectorized|pool"),
]

# of the timeline, with kernels of their own inside
RANGE = re.compile(r"ProfilerStep|## |Torch-Compiled|CompiledFunction|Optimizer\.")


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), "other")


def costs(turn: Callable[[], object], device: torch.device) -> dict[str, dict[str, float]]:
    """Kind -> name -> ms of one turn."""
    gpu = device.type == "cuda"
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    ) as seen:
        turn()
        common.synchronize(device)
    kinds = defaultdict(dict)
    for event in seen.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if gpu != on_gpu or RANGE.match(event.key):
            continue
        spent = (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3
        if spent > 0:
            kinds[kind_of(event.key) if gpu else event.key][event.key] = spent
    return kinds


def result_of(
    name: str,
    title: str,
    turns: dict[str, Callable],
    steps: int,
    device: torch.device,
    most: int = 3,
) -> common.Result:
    result = common.Result(f"profile-{name}", f"Largest costs of a step: {title}", device, COLUMNS)
    for form, turn in turns.items():
        kinds = costs(turn, device)
        total = sum(sum(parts.values()) for parts in kinds.values())
        for kind, parts in sorted(kinds.items(), key=lambda item: -sum(item[1].values()))[:most]:
            spent = sum(parts.values())
            largest = max(parts, key=parts.get)
            result.add(
                {
                    "form": form,
                    "what": kind,
                    "ms": spent / steps,
                    "share": 100 * spent / total,
                    "largest": largest[:70] if len(parts) > 1 else None,
                }
            )
    result.note(
        "torch.profiler over one turn; "
        + (
            "time of kernels on the GPU, put together by their names"
            if device.type == "cuda"
            else "CPU time of operations by themselves"
        )
    )
    return result
