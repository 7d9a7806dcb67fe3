"""Shapes of what files hold: what fits passes, what does not is one line that names the place, the value and what was expected."""

import math

import pytest
import torch

from moco_isl.errors import BadInput
from moco_isl.schema import Number, Tensor, require

SETS = {"offsets": Tensor("int", ("n",), low=0), "members": Tensor("int", ("E",), low=0, high="M"), "sureness?": Tensor("float", ("E",))}


def fault(value, shape, sizes=None):
    with pytest.raises(BadInput) as caught:
        require(value, shape, "cannot read 'x'", sizes)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("cannot read 'x': ")


@pytest.mark.parametrize(
    "value, shape",
    [
        (3, int),
        (3, float),
        (0.5, float),
        (True, bool),
        (None, (int, None)),
        ("cos", {"cos", "step"}),
        ([1, 2], [int]),
        ((1, 2), [int]),
        ([], [int]),
        ({"a": 1}, {"a": int, "b?": str}),
        ({"a": 1, "c": [{}]}, {"a": int, ...: object}),
        (7, Number(0, 7, whole=True)),
        (10**400, int),
        (torch.zeros(2, 3), Tensor("float", (2, None))),
        (torch.zeros(0), Tensor("float", ("E",), low=1)),
    ],
)
def test_what_fits_passes(value, shape):
    require(value, shape, "x")


@pytest.mark.parametrize(
    "value, shape, said",
    [
        (True, int, "it is True: expected a whole number"),
        ("3", float, "it is '3': expected a number"),
        (math.nan, float, "it is nan: expected a number"),
        (math.inf, Number(0), "it is inf: expected a number from 0"),
        (8, Number(0, 7, whole=True), "it is 8: expected a whole number from 0 to 7"),
        (1.5, Number(whole=True), "it is 1.5: expected a whole number"),
        (0, {False}, "it is 0: expected one of False"),
        ("x", (int, None), "it is 'x': expected a whole number or nothing"),
        ([1, "x"], [int], "[1] is 'x': expected a whole number"),
        ("ab", [str], "it is 'ab': expected a list"),
        ({}, {"a": int}, "it has no 'a'"),
        ({"a": {"b": "x"}}, {"a": {"b": int}}, "a.b is 'x': expected a whole number"),
        ({"a": {}}, {"a": {"b": int}}, "a has no 'b'"),
        ({"a": 1, "z\n": 1}, {"a": int}, "z\\n is unknown: expected a"),
        ([], {"a": int}, "it is []: expected names with values"),
        ("x" * 99, int, f"it is '{'x' * 56}...: expected a whole number"),
        (torch.zeros(2, 4), Tensor("float", (2, 3)), "it is a tensor of float32 [2, 4]: expected a tensor of floats [2, 3]"),
        (torch.zeros(2).int(), Tensor("float", (2,)), "it is a tensor of int32 [2]: expected a tensor of floats [2]"),
        (torch.zeros(2).to_sparse(), Tensor("float", (2,)), "it is a tensor of float32 [2]: expected a tensor of floats [2]"),
        (None, Tensor("float", (None,)), "it is None: expected a tensor of floats [any]"),
    ],
)
def test_what_does_not_fit_is_said(value, shape, said):
    assert fault(value, shape) == said


def test_letters_of_tensors_stand_for_one_size_in_a_file():
    members, sureness = torch.tensor([0, 4]), torch.zeros(2)
    good = {"offsets": torch.tensor([0, 2]), "members": members, "sureness": sureness}
    require(good, SETS, "x", {"M": 5})
    assert fault(good, SETS, {"M": 4}) == "members holds 4: expected at most 3"
    assert fault({**good, "members": members - 1}, SETS, {"M": 5}) == "members holds -1: expected at least 0"
    assert fault({**good, "sureness": torch.zeros(3)}, SETS, {"M": 5}) == (
        "sureness is a tensor of float32 [3]: expected a tensor of floats [E], with E = 2"
    )
    assert fault({**good, "sureness": sureness / 0}, SETS, {"M": 5}) == "sureness holds values that are not finite"


def test_what_never_ends_has_an_end():
    endless = []
    endless.append(endless)
    shape = []
    shape.append(shape)
    assert fault(endless, shape).endswith("goes deeper than 50 levels")
