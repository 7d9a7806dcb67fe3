"""Check the content of a file that may be damaged or written by hand against a shape.

A shape is one of:

    int, float, str, bool, dict, list, object     a value of that type; float means a finite number,
                                                  and takes whole ones
    None                                          nothing (null)
    Number(low, high, whole, finite)              a number from low to high
    Tensor(kind, dims, low, high, finite)         a tensor, see the class
    Holds(shape, test, expected)                  what the shape takes, if test(value) is true
    {"a", "b"}                                    one of these values
    (shape, shape)                                what one of these takes
    [shape]                                       a list of any length
    {"name": shape, "name?": shape, ...: shape}   an object: a name with `?` may be left out, and
                                                  `...` stands for all other names
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
from moco_isl.files import short

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
LARGEST = 2**63 - 1  # the largest count in a file
EARLIER = "take another file, such as an earlier checkpoint"  # the cure for a damaged file
DEEP = 50  # levels of nesting; our own files have no more than ten
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
        low = f" from {self.low:g}" if self.low >= -LARGEST else ""
        high = f" to {self.high:g}" if self.high < LARGEST else ""
        return WORDS[int if self.whole else float] + low + high


COUNT = Number(0, LARGEST, whole=True)


class Tensor(NamedTuple):
    """A dense tensor.

    kind: "float", "int" or "bool".
    dims: for each dimension its size, None for any, or a letter, which stands for one size in the
        whole file; "M+1" is one more than the size that M stands for.
    low, high: bounds of the values, both included; high may be a letter: below that size.
    finite: False takes NaN and infinities too.
    """

    kind: str
    dims: tuple[int | str | None, ...]
    low: float | None = None
    high: float | str | None = None
    finite: bool = True

    def __str__(self) -> str:
        dims = ", ".join("any" if dim is None else str(dim) for dim in self.dims)
        return f"a tensor of {self.kind}s [{dims}]"


class Holds(NamedTuple):
    """What `shape` takes, if test(value) is true; a test that raises counts as false.

    expected: words for what the test asks.
    """

    shape: object
    test: Callable[[object], bool]
    expected: str


def like(state: "dict[str, torch.Tensor]") -> dict[str, Tensor]:
    """The shape of state dicts with these names, kinds and sizes; a variance is not negative."""

    def one(name: str, tensor: "torch.Tensor") -> Tensor:
        kind = next(kind for kind, dtypes in DTYPES.items() if _dtype(tensor) in dtypes)
        return Tensor(kind, tuple(tensor.shape), low=0 if name.endswith("running_var") else None)

    return {name: one(name, tensor) for name, tensor in state.items()}


def require(value, shape, where: str, sizes: dict[str, int] | None = None, cure: str = "") -> None:
    """Raise BadInput unless `value` has the shape; the message begins with `where`.

    sizes: what letters of tensors stand for; those that it lacks are taken from the file and added.
    cure: what the user can do.
    """
    fault = _fault(value, shape, "", {} if sizes is None else sizes, 0)
    if fault:
        raise BadInput(f"{where}: {fault}{cure and f'; {cure}'}")


def read_json(path: str | os.PathLike, shape, flag: str = "", expected: str = "JSON"):
    """The content of a JSON file that has the shape. flag: what gave the path. Raises BadInput."""
    where = f"cannot read {files.named(flag, path)}"
    content = parse_json(files.read_text(path, flag, expected), where, expected)
    require(content, shape, where)
    return content


def parse_json(text: str, where: str, expected: str = "JSON"):
    """json.loads that refuses a name twice in one object.

    Raises BadInput, which begins with `where`.
    """
    try:
        return json.loads(text, object_pairs_hook=_once_each)
    except RecursionError as error:
        raise BadInput(f"{where}: it goes too deep; expected {expected}") from error
    except ValueError as error:  # no JSON, or a number of more digits than Python reads
        reason = short(getattr(error, "msg", None) or str(error))
        raise BadInput(f"{where}: {reason}; expected {expected}") from error


def _once_each(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in an object")
    return found


# ---- what is wrong with a value: '' where nothing is ---------------------------------------------


def _fault(value, shape, name: str, sizes: dict[str, int], depth: int) -> str:
    """What is wrong with a value; name: its place in the file, such as "bank.rows"."""
    if depth > DEEP:
        return f"{short(name)} goes deeper than {DEEP} levels"
    if isinstance(shape, Tensor):
        return _tensor_fault(value, shape, name, sizes)
    if isinstance(shape, Number):
        return "" if _is_number(value, shape) else _wrong(value, name, str(shape))
    if isinstance(shape, Holds):
        return _fault(value, shape.shape, name, sizes, depth) or _test_fault(value, shape, name)
    if isinstance(shape, tuple):
        return _choice_fault(value, shape, name, sizes, depth)
    if isinstance(shape, (set, frozenset)):
        known = any(type(one) is type(value) and one == value for one in shape)
        return "" if known else _wrong(value, name, f"one of {_words(shape)}")
    if isinstance(shape, list):
        if not isinstance(value, (list, tuple)):
            return _wrong(value, name, WORDS[list])
        items = ((f"{name}[{i}]", item, shape[0]) for i, item in enumerate(value))
        return _first_fault(items, sizes, depth)
    if isinstance(shape, dict):
        return _object_fault(value, shape, name, sizes, depth)
    return "" if _has_type(value, shape) else _wrong(value, name, _words(shape))


def _first_fault(items, sizes: dict[str, int], depth: int) -> str:
    """The first fault among (name, value, shape)."""
    faults = (_fault(value, shape, name, sizes, depth + 1) for name, value, shape in items)
    return next(filter(None, faults), "")


def _choice_fault(value, shapes: tuple, name: str, sizes: dict[str, int], depth: int) -> str:
    faults = []
    for shape in shapes:
        found = dict(sizes)  # a shape that does not fit must not settle any letter
        faults.append(_fault(value, shape, name, found, depth))
        if not faults[-1]:
            sizes.update(found)
            return ""
    nested = [isinstance(shape, (Tensor, Holds, dict, list)) for shape in shapes]
    if value is not None and sum(nested) == len(shapes) - (None in shapes) == 1:
        return faults[nested.index(True)]  # the only other choice is None: say what is wrong inside
    return _wrong(value, name, " or ".join(_words(shape) for shape in shapes))


def _test_fault(value, shape: Holds, name: str) -> str:
    try:
        fits = shape.test(value)
    except Exception:  # a test that calls a library on a wrong value may raise anything
        fits = False
    return "" if fits else f"{_it(name)} is damaged: expected {shape.expected}"


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
            return f"{_it(name)} has no {_repr.repr(plain)}"
    rest = [key for key in value if key not in known]
    if rest and ... not in shape:
        names = short(", ".join(str(key).removesuffix("?") for key in shape))
        return f"{short(_inner(name, rest[0]))} is unknown: expected {names or 'nothing here'}"
    if rest:
        known |= dict.fromkeys(rest, shape[...])
    items = ((_inner(name, key), value[key], inner) for key, inner in known.items())
    return _first_fault(items, sizes, depth)


def _tensor_fault(value, shape: Tensor, name: str, sizes: dict[str, int]) -> str:
    fits = _is_dense(value) and _dtype(value) in DTYPES[shape.kind]
    if not fits or value.ndim != len(shape.dims):
        return _wrong(value, name, str(shape))
    for size, dim in zip(value.shape, shape.dims):
        if not isinstance(dim, str):
            if dim is not None and size != dim:
                return _wrong(value, name, str(shape))
            continue
        letter = dim.removesuffix("+1")
        more = int(dim.endswith("+1"))
        stands_for = sizes.setdefault(letter, size - more)
        if size != stands_for + more or stands_for < 0:
            return _wrong(value, name, f"{shape}, with {letter} = {stands_for}")
    if value.numel() == 0:
        return ""
    stored = value.untyped_storage().nbytes()
    fixed = all(isinstance(dim, int) for dim in shape.dims)
    if stored < value.numel() * value.element_size() and not fixed:
        given = f"{stored} bytes as {list(value.shape)}"
        return f"{_it(name)} repeats {given}: expected all values"
    if shape.finite and shape.kind == "float" and not value.isfinite().all():
        return f"{_it(name)} holds values that are not finite"
    high = sizes[shape.high] - 1 if isinstance(shape.high, str) else shape.high
    if shape.low is not None and value.min() < shape.low:
        return f"{_it(name)} holds {value.min().item():g}: expected at least {shape.low:g}"
    if high is not None and value.max() > high:
        return f"{_it(name)} holds {value.max().item():g}: expected at most {high:g}"
    return ""


def _is_number(value, shape: Number) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if shape.whole:
        return isinstance(value, int) and shape.low <= value <= shape.high
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer of more digits than a float has
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


# ---- tensors, where torch may not be loaded ------------------------------------------------------


def _is_tensor(value) -> bool:
    """Whether a value is a tensor; without loading torch, which takes seconds.

    Where nobody has loaded torch, as in the launcher's commands, nothing is a tensor.
    """
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_dense(value) -> bool:
    """Whether a value is a plain tensor with its numbers in memory."""
    if not _is_tensor(value) or value.is_nested or value.is_quantized or value.is_meta:
        return False
    torch = sys.modules["torch"]
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided


def _dtype(tensor: "torch.Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


# ---- words ---------------------------------------------------------------------------------------


def _words(shape) -> str:
    """What a shape expects, in words."""
    if isinstance(shape, (list, dict)):
        return WORDS[type(shape)]
    if isinstance(shape, Holds):
        return _words(shape.shape)
    if isinstance(shape, (set, frozenset)):
        return ", ".join(sorted(map(str, shape)))
    if shape is None or isinstance(shape, type):
        return WORDS.get(shape, str(shape))
    return str(shape)


def _wrong(value, name: str, expected: str) -> str:
    given = _tensor_words(value) if _is_tensor(value) else _shown(value)
    return f"{_it(name)} is {short(given)}: expected {expected}"


def _tensor_words(value: "torch.Tensor") -> str:
    if value.is_nested:
        return "a nested tensor"
    words = f"a tensor of {_dtype(value)} {list(value.shape)}"
    if _is_dense(value):
        return words
    return words + (" without its numbers" if value.is_meta else " that is not dense")


def _it(name: str) -> str:
    """The name of a place in the file, for the beginning of a sentence."""
    return short(name) or "it"


def _inner(name: str, key) -> str:
    key = key if isinstance(key, str) else _shown(key)
    return f"{name}.{key}" if name else key


def _shown(value) -> str:
    try:
        return _repr.repr(value)
    except Exception:  # an integer of more digits than Python writes, an object of a library
        return f"a value of type {type(value).__name__}"
