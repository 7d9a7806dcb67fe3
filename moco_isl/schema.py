"""What a file that somebody may have damaged or written by hand must hold: said as a shape, checked
once, where the file is read.

A shape is one of

  int, float, str, bool, dict, list, object   a value of that type; float takes whole numbers and
  means a finite one None                                        nothing (null)
  Number(low, high, whole, finite)            a number from low to high
  Tensor(kind, dims, low, high, finite)       a tensor: see there
  Holds(shape, test, expected)                what the shape takes, if test(value) is true
  {"a", "b"}                                  one of these values
  (shape, shape)                              what one of these takes
  [shape]                                     a list of any length
  {"name": shape, "name?": shape, ...: shape} an object: `?` may be left out, `...` stands for all
  other names
"""

import json
import math
import os
import reprlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from moco_isl import files
from moco_isl.errors import BadInput

if TYPE_CHECKING:
    import torch

WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "names with values",
    list: "a list",
    None: "nothing",
}
DTYPES = {
    "float": {"float16", "bfloat16", "float32", "float64"},
    "int": {"uint8", "int8", "int16", "int32", "int64"},
    "bool": {"bool"},
}
LARGEST = 2**63 - 1  # of a count in a file
EARLIER = "take another file, such as an earlier checkpoint"  # what to do about a damaged one
DEEP = 50  # levels; a file of ours has no more than ten
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 200


class Number(NamedTuple):
    """A number from low to high, both included.

    whole: without a fraction. finite: False takes NaN and infinities too.
    """

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    finite: bool = True

    def __str__(self) -> str:
        word = WORDS[int] if self.whole else WORDS[float]
        low = f" from {self.low:g}" if self.low >= -LARGEST else ""
        return word + low + (f" to {self.high:g}" if self.high < LARGEST else "")


COUNT = Number(0, LARGEST, whole=True)


class Tensor(NamedTuple):
    """A dense tensor. kind: "float", "int" or "bool". dims: a size, None for any, or a letter,
    which stands for one size in the whole file; "M+1" is one more than that of M. low, high: what
    the values lie between, both included; high may be a letter: below that size. finite: False
    takes NaN and infinities too.
    """

    kind: str
    dims: tuple[int | str | None, ...]
    low: float | None = None
    high: float | str | None = None
    finite: bool = True

    def __str__(self) -> str:
        return (
            f"a tensor of {self.kind}s"
            f" [{', '.join('any' if d is None else str(d) for d in self.dims)}]"
        )


class Holds(NamedTuple):
    """What `shape` takes, if test(value) is true; a test that raises says no.

    expected: words for it.
    """

    shape: object
    test: Callable[[object], bool]
    expected: str


def like(state: "dict[str, torch.Tensor]") -> dict[str, Tensor]:
    """The shape of a state dict with the names, kinds and sizes of this one; a variance is not
    negative.
    """

    def one(name: str, tensor: "torch.Tensor") -> Tensor:
        kind = next(kind for kind, dtypes in DTYPES.items() if _dtype(tensor) in dtypes)
        return Tensor(kind, tuple(tensor.shape), low=0 if name.endswith("running_var") else None)

    return {name: one(name, tensor) for name, tensor in state.items()}


def require(value, shape, where: str, sizes: dict[str, int] | None = None, cure: str = "") -> None:
    """Raise BadInput that begins with `where` (such as "cannot read 'args.json'") unless `value`
    has the shape.

    sizes: what the letters of tensors stand for; those that are not in it are found in the file and
    added. cure: what to do.
    """
    fault = _fault(value, shape, "", {} if sizes is None else sizes, 0)
    if fault:
        raise BadInput(f"{where}: {fault}{cure and f'; {cure}'}")


def read_json(path: str | os.PathLike, shape, flag: str = "", expected: str = "JSON"):
    """What is in a JSON file and has the shape. flag: what named the path. Raises BadInput."""
    where = f"cannot read {files.named(flag, path)}"
    content = parse_json(files.read_text(path, flag, expected), where, expected)
    require(content, shape, where)
    return content


def parse_json(text: str, where: str, expected: str = "JSON"):
    """json.loads; raises BadInput that begins with `where` for what is none, and for a name that
    stands twice in an object.
    """
    try:
        return json.loads(text, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:  # ValueError: also more digits than Python reads
        reason = (
            "it goes too deep"
            if isinstance(error, RecursionError)
            else _short(getattr(error, "msg", None) or str(error))
        )
        raise BadInput(f"{where}: {reason}; expected {expected}") from error


def _once_each(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"{next(name for name in names if names.count(name) > 1)!r} stands twice in an object"
        )
    return found


def _fault(value, shape, name: str, sizes: dict[str, int], depth: int) -> str:
    """What is wrong with a value, '' if nothing is."""
    if depth > DEEP:
        return f"{_short(name)} goes deeper than {DEEP} levels"
    if isinstance(shape, Tensor):
        return _tensor_fault(value, shape, name, sizes)
    if isinstance(shape, Number):
        return "" if _is_number(value, shape) else _wrong(value, name, str(shape))
    if isinstance(shape, Holds):
        return _fault(value, shape.shape, name, sizes, depth) or _test_fault(value, shape, name)
    if isinstance(shape, tuple):
        return _choice_fault(value, shape, name, sizes, depth)
    if isinstance(shape, (set, frozenset)):
        known = [one for one in shape if type(one) is type(value) and one == value]
        return "" if known else _wrong(value, name, f"one of {', '.join(sorted(map(str, shape)))}")
    if isinstance(shape, list):
        if not isinstance(value, (list, tuple)):
            return _wrong(value, name, WORDS[list])
        return _first(
            _fault(one, shape[0], f"{name}[{i}]", sizes, depth + 1) for i, one in enumerate(value)
        )
    if isinstance(shape, dict):
        return _object_fault(value, shape, name, sizes, depth)
    return "" if _has_type(value, shape) else _wrong(value, name, _words(shape))


def _choice_fault(value, shapes: tuple, name: str, sizes: dict[str, int], depth: int) -> str:
    faults = []
    for shape in shapes:
        found = dict(sizes)  # letters of a shape that does not fit stand for nothing
        faults.append(_fault(value, shape, name, found, depth))
        if not faults[-1]:
            sizes.update(found)
            return ""
    inside = [
        fault
        for fault, shape in zip(faults, shapes)
        if isinstance(shape, (Tensor, Holds, dict, list))
    ]
    if value is not None and len(inside) == len(shapes) - (None in shapes) == 1:
        return inside[0]
    return _wrong(value, name, " or ".join(_words(shape) for shape in shapes))


def _test_fault(value, shape: Holds, name: str) -> str:
    try:
        fits = shape.test(value)
    except Exception:  # what the test calls may answer a wrong value with anything
        fits = False
    return "" if fits else f"{_short(name) or 'it'} is damaged: expected {shape.expected}"


def _object_fault(value, shape: dict, name: str, sizes: dict[str, int], depth: int) -> str:
    if not isinstance(value, dict):
        return _wrong(value, name, WORDS[dict])
    known = {}
    for key, inner in shape.items():
        optional = isinstance(key, str) and key.endswith("?")
        plain = key.removesuffix("?") if optional else key
        if plain in value:
            known[plain] = inner
        elif key is not ... and not optional:
            return f"{_short(name) + ' has' if name else 'it has'} no {_repr.repr(plain)}"
    rest = [key for key in value if key not in known]
    if rest and ... not in shape:
        names = ", ".join(str(key).removesuffix("?") for key in shape)
        return (
            f"{_short(_inner(name, rest[0]))} is unknown: expected"
            f" {_short(names) or 'nothing here'}"
        )
    if rest:
        known |= dict.fromkeys(rest, shape[...])
    return _first(
        _fault(value[key], one, _inner(name, key), sizes, depth + 1) for key, one in known.items()
    )


def _tensor_fault(value, shape: Tensor, name: str, sizes: dict[str, int]) -> str:
    if (
        not _is_dense(value)
        or _dtype(value) not in DTYPES[shape.kind]
        or value.ndim != len(shape.dims)
    ):
        return _wrong(value, name, str(shape))
    for size, dim in zip(value.shape, shape.dims):
        letter, more = (
            (dim.removesuffix("+1"), dim.endswith("+1")) if isinstance(dim, str) else (None, 0)
        )
        expected = sizes.setdefault(letter, size - more) + more if letter else dim
        if expected is not None and (size != expected or expected < more):
            return _wrong(
                value, name, f"{shape}, with {letter} = {sizes[letter]}" if letter else str(shape)
            )
    if value.numel() == 0:
        return ""
    if value.untyped_storage().nbytes() < value.numel() * value.element_size() and not all(
        isinstance(d, int) for d in shape.dims
    ):
        return (
            f"{_short(name) or 'it'} repeats {value.untyped_storage().nbytes()} bytes as"
            f" {list(value.shape)}: expected all values"
        )
    if shape.finite and shape.kind == "float" and not value.isfinite().all():
        return f"{_short(name) or 'it'} holds values that are not finite"
    high = sizes[shape.high] - 1 if isinstance(shape.high, str) else shape.high
    if shape.low is not None and value.min() < shape.low:
        return (
            f"{_short(name) or 'it'} holds {value.min().item():g}: expected at least {shape.low:g}"
        )
    if high is not None and value.max() > high:
        return f"{_short(name) or 'it'} holds {value.max().item():g}: expected at most {high:g}"
    return ""


def _is_dense(value) -> bool:
    """Whether a value is a plain tensor with its numbers in memory."""
    if not _is_tensor(value) or value.is_nested or value.is_quantized or value.is_meta:
        return False
    torch = sys.modules["torch"]
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided


def _is_tensor(value) -> bool:
    """Where nobody has loaded torch nothing is a tensor: the launcher's commands are spared the
    seconds that loading it takes.
    """
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _dtype(tensor: "torch.Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _first(faults) -> str:
    return next((fault for fault in faults if fault), "")


def _is_number(value, shape: Number) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if shape.whole:
        return isinstance(value, int) and shape.low <= value <= shape.high
    try:
        finite = math.isfinite(value)
    except OverflowError:  # more digits than a float has
        return False
    return shape.low <= value <= shape.high if finite else not shape.finite


def _has_type(value, kind) -> bool:
    if kind is None:
        return value is None
    if kind is float:
        return _is_number(value, Number())
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, (list, tuple) if kind is list else kind)


def _words(shape) -> str:
    if isinstance(shape, (list, dict)):
        return WORDS[type(shape)]
    if isinstance(shape, Holds):
        return _words(shape.shape)
    if isinstance(shape, (set, frozenset)):
        return ", ".join(sorted(map(str, shape)))
    try:
        return WORDS.get(shape, str(shape))
    except TypeError:
        return str(shape)


def _wrong(value, name: str, expected: str) -> str:
    if _is_tensor(value):
        given = _tensor_words(value)
    else:
        given = _shown(value)
    return f"{_short(name) or 'it'} is {_short(given)}: expected {expected}"


def _tensor_words(value: "torch.Tensor") -> str:
    if value.is_nested:
        return "a nested tensor"
    odd = (
        ""
        if _is_dense(value)
        else " without its numbers"
        if value.is_meta
        else " that is not dense"
    )
    return f"a tensor of {_dtype(value)} {list(value.shape)}{odd}"


def _inner(name: str, key) -> str:
    key = key if isinstance(key, str) else _shown(key)
    return f"{name}.{key}" if name else key


def _shown(value) -> str:
    try:
        return _repr.repr(value)
    except Exception:  # an integer of more digits than Python writes, an object of a library
        return f"a value of type {type(value).__name__}"


def _short(text: str) -> str:
    text = files.shown(text)
    return text if len(text) <= 60 else f"{text[:57]}..."
