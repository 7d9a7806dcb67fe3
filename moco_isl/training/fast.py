"""The fast path: the flags that --fast stands for, and its parts that have no flag of their own.

No part changes the method: tests/test_fast.py compares each with the plain path.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moco_isl import encoders
from moco_isl.data.augment import BatchAugmentation, BatchViews
from moco_isl.encoders import AMP_TYPES
from moco_isl.options import opt

# Graphs that torch.compile keeps of one function. With its default of 8, the fifth MoCo of a
# process would run uncompiled.
GRAPHS = 64


@dataclass(kw_only=True)
class SpeedOptions:
    """What makes a step fast; None: as `defaults` says."""

    fast: bool = opt(
        False,
        help="all that makes a step fast: --on-device, --channels-last, a fused optimizer and loss"
        " and, on a GPU, TF32, --amp bf16 and --compile; each can be taken back, as in --fast"
        " --no-compile",
    )
    amp: str | None = opt(
        None,
        choices=AMP_TYPES,
        help="half precision in the network; bf16 on any recent GPU, or a CPU with instructions for"
        " it; fp16 on a GPU (off unless --fast says so)",
    )
    channels_last: bool | None = opt(
        None,
        rare=True,
        help="memory format that convolutions like: faster on a CPU, and on a GPU with --amp",
    )
    compile: bool | None = opt(
        None,
        may_change=True,
        rare=True,
        help="torch.compile the encoders and what is augmented on the device: a minute at the"
        " start, faster steps",
    )
    on_device: bool | None = opt(
        None,
        rare=True,
        help="augment on the device: small images are held there whole, of photos the workers only"
        " decode and crop",
    )


def defaults(fast: bool, cuda: bool) -> dict[str, object]:
    """Values of the flags that --fast decides where they were not given.

    On a CPU half precision pays only where there are instructions for it, and compiling needs a C++
    compiler: there both stay off unless asked for.
    """
    return {
        "amp": "bf16" if fast and cuda else "off",
        "channels_last": fast,
        "compile": fast and cuda,
        "on_device": fast,
    }


@contextmanager
def numerics(fast: bool, device: torch.device) -> Iterator[None]:
    """CUDA's settings for training: convolutions chosen by trial, as in MoCo; fast: TF32 too.

    Only training uses them: mining and evaluation compare float32 features in full precision.
    """
    if device.type != "cuda":
        yield
        return
    precision = torch.get_float32_matmul_precision()
    by_trial = torch.backends.cudnn.benchmark
    if fast:
        torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = by_trial


def sgd(
    parameters, lr: float, momentum: float, weight_decay: float, fused: bool
) -> torch.optim.SGD:
    """MoCo's optimizer; fused: one kernel for all parameters (CUDA)."""
    return torch.optim.SGD(
        parameters, lr, momentum=momentum, weight_decay=weight_decay, fused=fused or None
    )


def adamw(parameters, lr: float, weight_decay: float, fused: bool) -> torch.optim.AdamW:
    """MoCo v3's optimizer of vision transformers; fused: one kernel for all parameters (CUDA)."""
    return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=fused or None)


@torch.no_grad()
def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the moments of a state that `training.state.require_optimizer` has checked.

    Rates and the like stay those of the flags. The moments get the memory layout of the parameters:
    files of MoCo hold contiguous ones, and a fused kernel that walks through both in the order of
    their memory would pair a channels-last parameter with other entries' moments, or refuse.
    """
    pairs = zip(optimizer.state_dict()["param_groups"], state["param_groups"])
    groups = [{**own, "params": saved["params"]} for own, saved in pairs]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            is_moment = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if is_moment and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def count_batches_at_once(model: torch.nn.Module) -> None:
    """`encoders.count_batches_at_once` for every encoder of a model of builder.py."""
    for encoder in encoders_of(model):
        encoders.count_batches_at_once(encoder)


def encoders_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The query encoder of a model of builder.py and, of a MoCo, its key encoder."""
    return [child for name, child in model.named_children() if name in ("encoder_q", "encoder_k")]


def compiled(
    fn: Callable, wanted: Callable[[torch.Tensor], bool], options: dict | None = None
) -> Callable:
    """fn, compiled for the calls whose first argument is `wanted`; other calls run it as it is.

    Each new shape, such as that of a last, smaller batch, would take a minute of compiling. Equal
    networks of one process share what was compiled for the first. options: torch.compile's, for
    inductor.
    """
    from torch._dynamo import config  # takes seconds to import

    # the second is its name before torch 2.7
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(GRAPHS, getattr(config, limit)))
    graph = torch.compile(fn, dynamic=False, options=options)

    @functools.wraps(fn)
    def run(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return (graph if wanted(x) else fn)(x, *rest)

    return run


def compile_encoders(model: torch.nn.Module, batch: int, options: dict | None = None) -> None:
    """Compile a model's encoders for training steps of `batch` images on this rank.

    model: that of any objective, whose state-dict keys stay. options: torch.compile's,
    for inductor.
    """
    shown = batch * model.shown_of_an_image
    for encoder in encoders_of(model):
        wanted = lambda x, encoder=encoder: encoder.training and len(x) == shown
        encoder.forward = compiled(encoder.forward, wanted, options)


def compile_augmentation(
    augmentation: Callable, views: int, device: torch.device, options: dict | None = None
) -> None:
    """Compile the part of an augmentation that runs on the device; others stay as they are.

    On CUDA it is compiled for `views` views at once, on a CPU for one photo at a time. options:
    torch.compile's, for inductor.
    """
    if not isinstance(augmentation, BatchViews):
        return
    is_photo = isinstance(augmentation, BatchAugmentation)
    if device.type == "cuda":
        names = ["numbers", "apply"]
        if is_photo:
            last = ["blur_rows", "blur_columns"] if augmentation.blur else ["normalize"]
            names = ["numbers", "crop", "plan", "colour", *last]
        for name in names:
            plain = getattr(augmentation, name)
            setattr(augmentation, name, compiled(plain, lambda x: len(x) == views, options))
    elif is_photo:
        alone = lambda x: len(x) == 1
        augmentation.adjust = tuple(compiled(fn, alone, options) for fn in augmentation.adjust)
        augmentation.shifts = compiled(augmentation.shifts, alone, options)
