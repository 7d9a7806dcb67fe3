"""Plain data beside the tensors in files of other trainers, read without running code of the file.

`torch.load(weights_only=True)` refuses every class it has not been told of. Here it is told of
argparse's namespaces, numpy's numbers and arrays, paths, and Lightning's dicts. Only the namespaces
are read as themselves: numpy's own unpickling trusts the file with addresses in memory. Stand-ins
read the others: a number becomes Python's, an array an `Array`, a path a pure path.
"""

import argparse
import types
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np
import torch


@contextmanager
def allowed():
    """During the block `torch.load(weights_only=True)` also reads the data listed in `_KNOWN`."""
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals(_KNOWN)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


class NumberType:
    """Stands for numpy.dtype: the code of a type of numbers ("f8") or text ("U5"), and its order.

    order: of the bytes, "<", ">" or "=" for this machine's.
    """

    def __init__(self, code: str, *_: object):
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def read(self, raw: bytes) -> np.ndarray:
        """The numbers [n] in these bytes; ValueError for types other than numbers and texts."""
        if not isinstance(self.code, str) or np.dtype(self.code).kind not in "biufcSU":
            raise ValueError(f"{self.code!r} is no type of numbers")
        return np.frombuffer(raw, np.dtype(self.code).newbyteorder(self.order))


class Array:
    """Stands for numpy.ndarray. values: numpy's array, or for an array of any objects a list."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, number_type, by_columns, raw = state
        if isinstance(raw, list):
            self.values = raw
        else:
            self.values = number_type.read(raw).reshape(shape, order="F" if by_columns else "C")


class Dict:
    """Stands for a library's kind of dict; becomes Python's."""

    def __new__(cls, *_: object) -> dict:
        return {}


def _number(number_type: NumberType, raw: bytes) -> bool | int | float | complex | str | bytes:
    return number_type.read(raw)[0].item()


def _empty_array(kind: type, *_: object) -> object:
    return kind()


def _no_bytes(*_: object) -> bytes:
    """Empty bytes, which pickles write as a call of bytes()."""
    return b""


def _bytes(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")


def _posix_path(*parts: str) -> PurePosixPath:
    return PurePosixPath(*parts)


def _windows_path(*parts: str) -> PureWindowsPath:
    return PureWindowsPath(*parts)


def _known_as(module: str, name: str, stand_in: Callable) -> Callable:
    """A copy of `stand_in` under the name that files use, which torch 2.4 and 2.5 look up on it."""
    if isinstance(stand_in, type):
        again = type(name, (stand_in,), {})
    else:
        again = types.FunctionType(stand_in.__code__, stand_in.__globals__)
    again.__module__ = module
    again.__name__ = again.__qualname__ = name
    return again


_STAND_INS = {
    ("builtins",): {"bytes": _no_bytes},
    ("_codecs",): {"encode": _bytes},  # torch 2.4 does not know it by itself
    ("numpy",): {"dtype": NumberType, "ndarray": Array},
    ("numpy.core.multiarray", "numpy._core.multiarray"): {
        "scalar": _number,
        "_reconstruct": _empty_array,
    },
    ("pathlib", "pathlib._local"): {
        "PosixPath": _posix_path,
        "PurePosixPath": _posix_path,
        "WindowsPath": _windows_path,
        "PureWindowsPath": _windows_path,
    },
    ("pytorch_lightning.utilities.parsing",): {"AttributeDict": Dict},
    ("lightning_fabric.utilities.data", "lightning.fabric.utilities.data"): {"AttributeDict": Dict},
}
_KNOWN = [
    argparse.Namespace,
    types.SimpleNamespace,
    set,  # torch 2.4 does not know it by itself
]
for modules, names in _STAND_INS.items():
    for module in modules:
        _KNOWN += [_known_as(module, name, stand_in) for name, stand_in in names.items()]
