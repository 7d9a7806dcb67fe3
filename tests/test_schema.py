"""Shapes of what files hold: a fault is one line with its place, value and what was expected."""

import math

import pytest
import torch

from moco_isl.errors import BadInput
from moco_isl.schema import Holds, Number, Tensor, like, require

SETS = {
    "offsets": Tensor("int", ("n",), low=0),
    "members": Tensor("int", ("E",), low=0, high="M"),
    "sureness?": Tensor("float", ("E",)),
}


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
        ({3: [], "x": 1}, {3: list, "x?": int}),
        (math.nan, Number(0, finite=False)),
        (torch.full((2,), math.inf), Tensor("float", (2,), finite=False)),
        (torch.zeros(2).half(), Tensor("float", (2,))),
        ({"a": torch.zeros(5), "b": 3}, {"a": Tensor("float", ("M+1",)), "b": Number(0, 4)}),
        ([1, 2], Holds([int], lambda x: sum(x) == 3, "a sum of 3")),
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
        ({"a": 1}, {}, "a is unknown: expected nothing here"),
        ([], {"a": int}, "it is []: expected names with values"),
        ("x" * 99, int, f"it is '{'x' * 56}...: expected a whole number"),
        (
            torch.zeros(1).expand(10**12),
            Tensor("float", ("E",)),
            "it repeats 4 bytes as [1000000000000]: expected all values",
        ),
        (
            torch.zeros(0),
            Tensor("float", ("M+1",)),
            "it is a tensor of float32 [0]: expected a tensor of floats [M+1], with M = -1",
        ),
        (10**400, float, f"it is 1{'0' * 56}...: expected a number"),
        ({"x?": 1}, {"x?": int}, "x? is unknown: expected x"),
        ({"3": 1}, {3: int}, "it has no 3"),
        ([1, "x"], Holds([int], sum, "a sum"), "[1] is 'x': expected a whole number"),
        ([], Holds([int], len, "one or more"), "it is damaged: expected one or more"),
        (None, Holds(object, len, "one or more"), "it is damaged: expected one or more"),
        ({"a": "x"}, ({"a": int}, None), "a is 'x': expected a whole number"),
        (None, Tensor("float", (None,)), "it is None: expected a tensor of floats [any]"),
    ],
)
def test_what_does_not_fit_is_said(value, shape, said):
    assert fault(value, shape) == said


@pytest.mark.parametrize(
    "value, words",
    [
        (torch.zeros(2, 4), "a tensor of float32 [2, 4]"),
        (torch.zeros(2).int(), "a tensor of int32 [2]"),
        (torch.zeros(2).to_sparse(), "a tensor of float32 [2] that is not dense"),
        (torch.zeros(2, device="meta"), "a tensor of float32 [2] without its numbers"),
        (torch.zeros(2).cfloat(), "a tensor of complex64 [2]"),
        (torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged), "a nested tensor"),
    ],
)
def test_another_tensor_is_said(value, words):
    said = f"it is {words}: expected a tensor of floats [2]"
    assert fault(value, Tensor("float", (2,))) == said


def test_a_number_of_more_digits_than_python_writes_is_said():
    assert fault(10**5000, float) == "it is a value of type int: expected a number"


def test_letters_of_tensors_stand_for_one_size_in_a_file():
    members, sureness = torch.tensor([0, 4]), torch.zeros(2)
    good = {"offsets": torch.tensor([0, 2]), "members": members, "sureness": sureness}
    require(good, SETS, "x", {"M": 5})
    assert fault(good, SETS, {"M": 4}) == "members holds 4: expected at most 3"
    for change, said in (
        ({"members": members - 1}, "members holds -1: expected at least 0"),
        (
            {"sureness": torch.zeros(3)},
            "sureness is a tensor of float32 [3]: expected a tensor of floats [E], with E = 2",
        ),
        ({"sureness": sureness / 0}, "sureness holds values that are not finite"),
    ):
        assert fault({**good, **change}, SETS, {"M": 5}) == said


def test_what_never_ends_has_an_end():
    endless = []
    endless.append(endless)
    shape = []
    shape.append(shape)
    assert fault(endless, shape).endswith("goes deeper than 50 levels")


def test_a_shape_that_did_not_fit_leaves_no_size_behind():
    ints, floats = Tensor("int", ("n",)), Tensor("float", ("n",))
    sizes = {}
    require(torch.zeros(3), (ints, Tensor("float", ("n", None)), floats), "x", sizes)
    assert sizes == {"n": 3}
    shape = {"a": (ints, Tensor("float", (None,))), "b": floats}
    require({"b": torch.zeros(2), "a": torch.zeros(3)}, shape, "x")


def test_a_state_dict_is_like_that_of_an_equal_module():
    shape = like(torch.nn.BatchNorm1d(3).state_dict())
    state = torch.nn.BatchNorm1d(3).state_dict()
    require(state, shape, "x")
    for change, said in (
        (
            {"running_var": torch.tensor([1.0, -1.0, 0.0])},
            "running_var holds -1: expected at least 0",
        ),
        ({"weight": torch.ones(3).int()}, "weight is a tensor of int32 [3]: expected a tensor of"),
        ({"num_batches_tracked": torch.zeros(())}, "num_batches_tracked is a tensor of float32 []"),
    ):
        assert fault({**state, **change}, shape).startswith(said)
