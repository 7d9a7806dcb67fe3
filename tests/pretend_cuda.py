"""A CPU that passes for a CUDA device, for tests of what a GPU alone would run.

Tensors "on" it are computed by the CPU and say `cuda:0`.

    with pretending() as seen: ...
    with pretending_with_kernels() as seen: ...     the fused kernels too

Inside, what a GPU would refuse is refused: operations on tensors of two devices, a generator of
another device, `numpy()`. `seen.waits` names the calls for which the host would wait for the
device; while a CUDA graph is captured they are refused. What a GPU alone can tell stays open:
kernels, what autocast does to each operation there, streams.
"""

import contextlib
import functools
import types
from collections.abc import Iterator
from unittest import mock

import torch

# which looks through torch.cuda when it is imported: before anything stands in for a part of it
import torch._dynamo
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from moco_isl.mining import gan_training
from moco_isl.mining.gan_training import Trainer
from moco_isl.ops import fused, softmax

CUDA = torch.device("cuda", 0)
T = torch.Tensor
READS = {
    "item",
    "tolist",
    "__int__",
    "__float__",
    "__bool__",
    "__index__",
    "nonzero",
    "masked_select",
    "unique",
    "unique_consecutive",
    "equal",
    "allclose",
    "bincount",
    "repeat_interleave",
}
# tensors of two devices
MAY_MIX = {
    "copy_",
    "to",
    "cpu",
    "cuda",
    "__set__",
    "__get__",
    "data_ptr",
    "type",
    "is_same_size",
    "has_torch_function",
}


class OnCuda(torch.Tensor):
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __deepcopy__(self, memo):
        return self.detach().clone()

    def __reduce_ex__(self, protocol):
        return self.cpu().__reduce_ex__(protocol)


class Generator(torch.Generator):
    """Draws by the CPU whatever its device."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.on = torch.device(device)
        return made

    device = property(
        lambda self: torch.device(self.on.type, 0) if self.on.type == "cuda" else self.on
    )

    def manual_seed(self, seed: int) -> "Generator":
        super().manual_seed(seed)
        return self


class Pretend(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.capturing = False

    def wait(self, name: str) -> None:
        self.waits.append(name)
        if self.capturing:
            raise RuntimeError(f"{name} while a CUDA graph is captured")

    def __torch_function__(self, func, _, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, T)]
        on = any(isinstance(x, OnCuda) for x in tensors)
        if on and name in ("numpy", "__array__"):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the"
                " tensor to host memory first."
            )
        target = on
        if func in (T.to, T.cpu, T.cuda):
            return self._move(name, *args, **kwargs)
        if func is torch._has_compatible_shallow_copy_type:
            return len({isinstance(x, OnCuda) for x in tensors}) == 1
        if (device := kwargs.get("device")) is not None:
            target, kwargs["device"] = torch.device(device).type == "cuda", "cpu"
        # in place
        elif name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], T):
            target = isinstance(args[0], OnCuda)
        kwargs.pop("pin_memory", None)
        generator = kwargs.get("generator")
        if isinstance(generator, Generator) and (generator.on.type == "cuda") != target:
            raise RuntimeError(
                f"{name}: expected a generator of the tensor's device, got one of"
                f" {generator.on.type}"
            )
        if on:
            self._same_device(name, tensors, args)
            by_mask = name in ("__getitem__", "__setitem__") and _by_mask(args[1])
            # how many there will be
            known = name == "repeat_interleave" and (
                "output_size" in kwargs or isinstance(args[1], int)
            )
            if (name in READS or by_mask) and not known:
                self.wait(name)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        if isinstance(out, OnCuda) and not target:
            return torch.Tensor.as_subclass(out, torch.Tensor)
        return (
            tree_map(lambda x: x.as_subclass(OnCuda) if type(x) is torch.Tensor else x, out)
            if target
            else out
        )

    def _move(
        self,
        name: str,
        x: T,
        *args,
        device=None,
        dtype=None,
        non_blocking=False,
        copy=False,
        memory_format=torch.preserve_format,
    ) -> T:
        """`to`, `cpu` and `cuda`."""
        device = {"cpu": "cpu", "cuda": "cuda"}.get(name, device)
        for given in args:
            device = (
                given
                if isinstance(given, (str, torch.device))
                else given.device
                if isinstance(given, T)
                else device
            )
            dtype = (
                given
                if isinstance(given, torch.dtype)
                else given.dtype
                if isinstance(given, T)
                else dtype
            )
        was = isinstance(x, OnCuda)
        now = was if device is None else torch.device(device).type == "cuda"
        if was and not now:
            self.wait(name)
        with torch._C.DisableTorchFunctionSubclass():
            out = x.to(dtype=dtype or x.dtype, copy=copy or now != was, memory_format=memory_format)
            return out.as_subclass(OnCuda if now else T) if now != isinstance(out, OnCuda) else out

    def _same_device(self, name: str, tensors: list[T], args: tuple) -> None:
        if name in MAY_MIX:
            return
        strangers = [
            x
            for x in tensors
            if not isinstance(x, OnCuda) and not (x.dim() == 0 and name not in ("cat", "stack"))
        ]
        # indices may lie on the CPU; so may values, copied to a slice
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], OnCuda):
            by_tensor = any(isinstance(x, T) for x in tree_leaves(args[1]))
            strangers = [
                x for x in strangers if name == "__setitem__" and x is args[2] and by_tensor
            ]
        if strangers:
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found at least two"
                " devices, cuda:0 and cpu"
            )


def _by_mask(index) -> bool:
    return any(
        isinstance(x, T) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(index)
    )


class Autocast(torch.autocast):
    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class Graph:
    """Stands for torch.cuda.CUDAGraph, but cannot record: a test says what `replay` does."""

    replay = None

    def register_generator_state(self, generator) -> None:
        assert generator.device == CUDA


class Event:
    def __init__(self, *_, **__): ...
    def record(self, *_): ...
    def synchronize(self): ...
    def query(self):
        return True


def _cuda(seen: Pretend) -> dict:
    """torch.cuda's functions, of a machine with one H200."""
    nothing = lambda *_, **__: None
    stream = types.SimpleNamespace(
        wait_stream=nothing, synchronize=nothing, is_capturing=lambda: seen.capturing
    )

    @contextlib.contextmanager
    def graph(*_, **__):
        seen.capturing = True
        try:
            yield
        finally:
            seen.capturing = False

    properties = types.SimpleNamespace(
        multi_processor_count=132, total_memory=141 << 30, name="NVIDIA H200"
    )
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "empty_cache": nothing,
        "synchronize": nothing,
        "max_memory_allocated": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": nothing,
        "mem_get_info": lambda *_: (1 << 30, 1 << 30),
        "get_device_name": lambda *_: "NVIDIA H200",
        "get_device_properties": lambda *_: properties,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "Event": Event,
        "current_stream": lambda *_: stream,
        "Stream": lambda *_, **__: stream,
        "stream": lambda *_: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": graph,
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: seen.capturing,
    }


@contextlib.contextmanager
def pretending() -> Iterator[Pretend]:
    """`torch.compile` leaves functions as they are inside."""
    seen = Pretend()
    with contextlib.ExitStack() as stack:
        for name, stands in _cuda(seen).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stands))
        for name, stands in {
            "Generator": Generator,
            "autocast": Autocast,
            "compile": lambda fn, **_: fn,
        }.items():
            stack.enter_context(mock.patch.object(torch, name, stands))
        if hasattr(torch, "accelerator"):  # since torch 2.6; Adam asks it
            stack.enter_context(
                mock.patch.object(torch.accelerator, "current_stream", torch.cuda.current_stream)
            )
        stack.enter_context(seen)
        yield seen


class Kernels:
    """What the kernels of kernels.py compute, in plain operations."""

    GROUP = 64

    @staticmethod
    def softmax_pass(f, rows, T, absent=None):
        assert not torch.is_autocast_enabled("cpu"), (
            "autocast would join the shares in half precision"
        )
        return softmax.softmax_pass(f, rows.half().float(), T, absent)

    @staticmethod
    def group_maxima(q, bank):
        assert q.dtype == bank.dtype == torch.float16 and q.is_contiguous() and bank.is_contiguous()
        scores = F.pad(q.float() @ bank.float().T, (0, -len(bank) % 64), value=-torch.inf)
        return scores.view(len(q), -1, 64).amax(2).T.contiguous()

    @staticmethod
    def rescore(q, bank, groups):
        at = (groups[:, :, None] * 64 + torch.arange(64, device=bank.device)).flatten(1)
        scores = torch.einsum("nc,nkc->nk", q.float(), bank[at.clamp(max=len(bank) - 1)].float())
        return scores.masked_fill(at >= len(bank), -torch.inf)


def _captured(capture):
    """`Trainer.capture` with graphs that can be replayed.

    A real capture takes no step: what this one did is undone.
    """

    def run(trainer, iterations: int) -> None:
        before = trainer.state()
        drawn = trainer.generator.get_state()
        cursor = trainer.cursor.clone()
        losses = trainer.losses.clone()
        capture(trainer, iterations)
        trainer.load(before)
        trainer.generator.set_state(drawn)
        trainer.cursor.copy_(cursor), trainer.losses.copy_(losses)
        trainer.graphs[iterations].replay = functools.partial(trainer.step, iterations)

    return run


@contextlib.contextmanager
def pretending_with_kernels() -> Iterator[Pretend]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Trainer, "capture", _captured(Trainer.capture)))
        same = lambda features: features  # a CPU would search in bfloat16
        stack.enter_context(mock.patch.object(gan_training, "training_search", same))
        stack.enter_context(mock.patch.object(fused, "_seen_to_work", lambda device, C: Kernels))
        gan_training._compiled.cache_clear()  # inside, functions are not really compiled
        stack.callback(gan_training._compiled.cache_clear)
        yield stack.enter_context(pretending())
