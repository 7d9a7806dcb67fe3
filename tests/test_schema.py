"""Shapes of what files hold: what fits passes, what does not is one line that names the place, the
value and what was expected.
"""

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
            torch.zeros(2, 4),
            Tensor("float", (2, 3)),
            "it is a tensor of float32 [2, 4]: expected a tensor of floats [2, 3]",
        ),
        (
            torch.zeros(2).int(),
            Tensor("float", (2,)),
            "it is a tensor of int32 [2]: expected a tensor of floats [2]",
        ),
        (
            torch.zeros(2).to_sparse(),
            Tensor("float", (2,)),
            "it is a tensor of float32 [2] that is not dense: expected a tensor of floats [2]",
        ),
        (
            torch.zeros(2, device="meta"),
            Tensor("float", (2,)),
            "it is a tensor of float32 [2] without its numbers: expected a tensor of floats [2]",
        ),
        (
            torch.zeros(2).cfloat(),
            Tensor("float", (2,)),
            "it is a tensor of complex64 [2]: expected a tensor of floats [2]",
        ),
        (
            torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged),
            Tensor("float", (2,)),
            "it is a nested tensor: expected a tensor of floats [2]",
        ),
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
        pytest.param(
            10**5000,
            float,
            "it is a value of type int: expected a number",
            id="more digits than Python writes",
        ),
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


def test_letters_of_tensors_stand_for_one_size_in_a_file():
    members, sureness = torch.tensor([0, 4]), torch.zeros(2)
    good = {"offsets": torch.tensor([0, 2]), "members": members, "sureness": sureness}
    require(good, SETS, "x", {"M": 5})
    assert fault(good, SETS, {"M": 4}) == "members holds 4: expected at most 3"
    assert (
        fault({**good, "members": members - 1}, SETS, {"M": 5})
        == "members holds -1: expected at least 0"
    )
    assert (
        fault({**good, "sureness": torch.zeros(3)}, SETS, {"M": 5})
        == "sureness is a tensor of float32 [3]: expected a tensor of floats [E], with E = 2"
    )
    assert (
        fault({**good, "sureness": sureness / 0}, SETS, {"M": 5})
        == "sureness holds values that are not finite"
    )


def test_what_never_ends_has_an_end():
    endless = []
    endless.append(endless)
    shape = []
    shape.append(shape)
    assert fault(endless, shape).endswith("goes deeper than 50 levels")


def test_a_shape_that_did_not_fit_leaves_no_size_behind():
    require(
        torch.zeros(3),
        (Tensor("int", ("n",)), Tensor("float", ("n", None)), Tensor("float", ("n",))),
        "x",
        sizes := {},
    )
    assert sizes == {"n": 3}
    require(
        {"b": torch.zeros(2), "a": torch.zeros(3)},
        {"a": (Tensor("int", ("n",)), Tensor("float", (None,))), "b": Tensor("float", ("n",))},
        "x",
    )


def test_a_state_dict_is_like_that_of_an_equal_module():
    shape, state = like(torch.nn.BatchNorm1d(3).state_dict()), torch.nn.BatchNorm1d(3).state_dict()
    require(state, shape, "x")
    assert (
        fault({**state, "running_var": torch.tensor([1.0, -1.0, 0.0])}, shape)
        == "running_var holds -1: expected at least 0"
    )
    assert (
        fault({**state, "weight": torch.ones(3).int()}, shape)
        == "weight is a tensor of int32 [3]: expected a tensor of floats [3]"
    )
    assert fault({**state, "num_batches_tracked": torch.zeros(())}, shape).startswith(
        "num_batches_tracked is a tensor of float32 []"
    )
