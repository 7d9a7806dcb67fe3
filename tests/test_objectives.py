"""What a script asks of an objective, and that a new one is a class and a line of OBJECTIVES."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn as nn

from moco_isl.bank import QueueSlots
from moco_isl.builder import MoCo
from moco_isl.isl import ISL
from moco_isl.objectives import OBJECTIVES
from moco_isl.objectives.base import Objective
from moco_isl.schema import require
from tests import small_training
from tests.test_builder import C, K, M, images, tiny


def build(name, **options):
    torch.manual_seed(0)
    kind = OBJECTIVES[name]
    model = kind.build_model(tiny, dim=C, K=K, m=0.9, T=0.2, mlp=False, num_images=M)
    return kind(model, M, **options)


@pytest.mark.parametrize(
    ("name", "views", "mined", "has_queue", "encoder"),
    [
        ("queue", 2, True, True, "encoder_k"),
        ("bank", 2, True, False, "encoder_q"),
        ("rotnet", 1, False, False, "encoder_q"),
        ("deepcluster", 1, False, False, "encoder_q"),
    ],
)
def test_each_objective_says_what_it_is(name, views, mined, has_queue, encoder):
    kind, isl = OBJECTIVES[name], build(name)
    assert (kind.views(hpe=0.5), kind.mined, kind.has_queue) == (views, mined, has_queue)
    assert isl.encoder is getattr(isl.model, encoder)
    around = ISL(isl.model, M)
    assert isinstance(around, kind) and hasattr(around, "mine")
    batch = [images(6, view) for view in range(views)]
    optimizer = torch.optim.SGD(isl.parameters(), 0.1)
    features = lambda: isl.encoder(images(M, 0)).detach()
    isl.begin_epoch(0, features, optimizer, None, lambda: None)
    assert isl(*batch, torch.arange(6)).isfinite() and "loss" in isl.parts
    assert (isl.order() is None) == (name != "deepcluster")
    require(isl.state_dict(), kind.state_shape(isl.model), "cannot read it", {"M": M})
    cosine = isl.mean_cosine()
    assert -1 <= cosine <= 1 if mined else cosine is None


def test_options_are_those_that_an_objective_has():
    shared = {"P", "form", "hpe", "own", "bank_mix", "bank_dtype", "active", "fast", "encode"}
    shared |= {"variant"}
    assert OBJECTIVES["queue"].options() == shared | {"mask", "symmetric", "predictor"}
    assert OBJECTIVES["bank"].options() == shared | {"seed", "background"}
    assert OBJECTIVES["rotnet"].options() == {"fast", "encode"}
    own = {"clusters", "components", "every", "seed"}
    assert OBJECTIVES["deepcluster"].options() == {"fast", "encode"} | own


def test_a_new_run_takes_up_what_a_file_says_of_queue_or_bank():
    features = lambda encoder: torch.ones(M, C)
    other = QueueSlots(M, K)
    other.write(torch.arange(5), torch.arange(5))
    other.held = 5
    for same in (True, False):
        queue = build("queue")
        queue.start_from({"slots": other.state_dict()}, same, features)
        assert queue.slots.held == 5 and torch.equal(queue.slots.owner, other.owner) is same
    queue = build("queue")
    queue.start_from({}, False, features)
    assert queue.slots.held is None and not queue.bank.filled, "a file of MoCo's: to be counted"
    bank = build("bank")
    bank.start_from({}, False, features)
    assert torch.equal(bank.bank.rows, torch.ones(M, C))


class Mean(nn.Module):
    shown_of_an_image = 1

    def __init__(self, encoder_q):
        super().__init__()
        self.encoder_q = encoder_q

    def encode(self, image):
        return self.encoder_q(image)


@dataclass(eq=False, repr=False, kw_only=True)
class Still(Objective):
    """Features are to keep still: the sum of their squares."""

    weight: float = 1.0

    around: ClassVar[type[nn.Module]] = Mean

    def step(self, image, *rest):
        return {"loss": self.weight * self.encode(image).square().sum(1).mean()}


def test_a_toy_objective_trains_by_its_class_and_a_line(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "still", Still)
    side = small_training.SIDE
    torch.manual_seed(0)
    model = Mean(nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, 4)))
    isl = ISL(model, small_training.M, weight=1e-3)
    assert isinstance(isl, Still) and not isinstance(model, MoCo)
    losses = small_training.train(isl, False, epochs=3)
    assert losses[-1] < losses[0]
