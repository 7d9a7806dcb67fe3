"""What a file that somebody may have damaged or written by hand must hold: said as a shape, checked once, where the file is read.

A shape is one of

  int, float, str, bool, dict, list, object   a value of that type; float takes whole numbers and means a finite one
  None                                        nothing (null)
  Number(low, high, whole)                    a finite number from low to high
  Tensor(kind, dims, low, high)               a tensor: see there
  {"a", "b"}                                  one of these values
  (shape, shape)                              what one of these takes
  [shape]                                     a list of any length
  {"name": shape, "name?": shape, ...: shape} an object: `?` may be left out, `...` stands for all other names
"""

import math
from typing import NamedTuple

import torch

from moco_isl import files
from moco_isl.errors import BadInput

WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "names with values",
    list: "a list",
    None: "nothing",
}
DEEP = 50  # levels; a file of ours has no more than five


class Number(NamedTuple):
    """A finite number from low to high, both included. whole: without a fraction."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False

    def __str__(self) -> str:
        word = WORDS[int] if self.whole else WORDS[float]
        low = f" from {self.low:g}" if self.low > -math.inf else ""
        return word + low + (f" to {self.high:g}" if self.high < math.inf else "")


class Tensor(NamedTuple):
    """A dense tensor. kind: "float" (finite values), "int" or "bool". dims: a size, None for any, or a letter, which stands for
    one size in the whole file. low, high: what the values lie between, both included; high may be a letter: below that size."""

    kind: str
    dims: tuple[int | str | None, ...]
    low: float | None = None
    high: float | str | None = None

    def __str__(self) -> str:
        return f"a tensor of {self.kind}s [{', '.join('any' if d is None else str(d) for d in self.dims)}]"


def require(value, shape, where: str, sizes: dict[str, int] | None = None) -> None:
    """Raise BadInput that begins with `where` (such as "cannot read 'args.json'") unless `value` has the shape.

    sizes: what the letters of tensors stand for; those that are not in it are found in the file and added.
    """
    fault = _fault(value, shape, "", {} if sizes is None else sizes, 0)
    if fault:
        raise BadInput(f"{where}: {fault}")


def _fault(value, shape, name: str, sizes: dict[str, int], depth: int) -> str:
    """What is wrong with a value, '' if nothing is."""
    if depth > DEEP:
        return f"{name} goes deeper than {DEEP} levels"
    if isinstance(shape, Tensor):
        return _tensor_fault(value, shape, name, sizes)
    if isinstance(shape, Number):
        ok = _is_number(value) and shape.low <= value <= shape.high and (not shape.whole or isinstance(value, int))
        return "" if ok else _wrong(value, name, str(shape))
    if isinstance(shape, tuple):
        faults = [_fault(value, one, name, sizes, depth) for one in shape]
        return "" if "" in faults else _wrong(value, name, " or ".join(_words(one) for one in shape))
    if isinstance(shape, (set, frozenset)):
        known = [one for one in shape if type(one) is type(value) and one == value]
        return "" if known else _wrong(value, name, f"one of {', '.join(sorted(map(str, shape)))}")
    if isinstance(shape, list):
        if not isinstance(value, (list, tuple)):
            return _wrong(value, name, WORDS[list])
        return _first(_fault(one, shape[0], f"{name}[{i}]", sizes, depth + 1) for i, one in enumerate(value))
    if isinstance(shape, dict):
        return _object_fault(value, shape, name, sizes, depth)
    return "" if _has_type(value, shape) else _wrong(value, name, _words(shape))


def _object_fault(value, shape: dict, name: str, sizes: dict[str, int], depth: int) -> str:
    if not isinstance(value, dict):
        return _wrong(value, name, WORDS[dict])
    must = [key for key in shape if key is not ... and not key.endswith("?")]
    missing = [key for key in must if key not in value]
    if missing:
        return f"{name + ' has' if name else 'it has'} no {missing[0]!r}"

    def fault(key) -> str:
        inner = f"{name}.{key}" if name else str(key)
        for known in (key, f"{key}?", ...):
            if known in shape:
                return _fault(value[key], shape[known], inner, sizes, depth + 1)
        return f"{_short(inner)} is unknown: expected {', '.join(k.rstrip('?') for k in shape)}"

    return _first(fault(key) for key in value)


def _tensor_fault(value, shape: Tensor, name: str, sizes: dict[str, int]) -> str:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return _wrong(value, name, str(shape))
    kind = "bool" if value.dtype == torch.bool else "float" if value.is_floating_point() else "int"
    if kind != shape.kind or value.is_complex() or value.ndim != len(shape.dims):
        return _wrong(value, name, str(shape))
    for size, dim in zip(value.shape, shape.dims):
        expected = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
        if expected is not None and size != expected:
            return _wrong(value, name, f"{shape}, with {dim} = {expected}" if isinstance(dim, str) else str(shape))
    if value.numel() == 0:
        return ""
    if kind == "float" and not value.isfinite().all():
        return f"{name} holds values that are not finite"
    high = sizes[shape.high] - 1 if isinstance(shape.high, str) else shape.high
    if shape.low is not None and value.min() < shape.low:
        return f"{name} holds {value.min().item():g}: expected at least {shape.low:g}"
    if high is not None and value.max() > high:
        return f"{name} holds {value.max().item():g}: expected at most {high:g}"
    return ""


def _first(faults) -> str:
    return next((fault for fault in faults if fault), "")


def _is_number(value) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _has_type(value, kind) -> bool:
    if kind is None:
        return value is None
    if kind is float:
        return _is_number(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _words(shape) -> str:
    if isinstance(shape, (list, dict)):
        return WORDS[type(shape)]
    if isinstance(shape, (set, frozenset)):
        return ", ".join(sorted(map(str, shape)))
    try:
        return WORDS.get(shape, str(shape))
    except TypeError:
        return str(shape)


def _wrong(value, name: str, expected: str) -> str:
    if isinstance(value, torch.Tensor):
        given = f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    else:
        given = _short(repr(value))
    return f"{_short(name) or 'it'} is {given}: expected {expected}"


def _short(text: str) -> str:
    text = files.shown(text)
    return text if len(text) <= 60 else f"{text[:57]}..."
