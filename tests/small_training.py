"""Whole steps of the training loop on random images, small enough for a test: each objective, plain
and fast, on any device.
"""

import torch
import torch.nn.functional as F

from moco_isl import builder
from moco_isl.encoders import build_encoder
from moco_isl.isl import ISL
from moco_isl.mining.positives import PositiveSets
from moco_isl.objectives.bank import Instance
from moco_isl.run.meters import Progress
from moco_isl.run.signals import Stop
from moco_isl.training import engine, fast

M, N, SIDE = 64, 16, 16  # images, of a batch, pixels
OBJECTIVES = {
    "MoCo": ("queue", False, 0.5),
    "ISL": ("queue", True, 0.5),
    "Instance": ("bank", False, 0.0),
    "bank": ("bank", True, 0.5),
}


def unit(n, C, seed):
    return F.normalize(torch.randn(n, C, generator=torch.Generator().manual_seed(seed)), dim=1)


class Images:
    """A loader of M random images as normalised views, four steps an epoch."""

    def __init__(self, device="cpu"):
        g = torch.Generator().manual_seed(0)
        self.steps = [
            (
                torch.randn(2, N, 3, SIDE, SIDE, generator=g).to(device),
                (torch.arange(N) + i * N).to(device),
            )
            for i in range(4)
        ]

    def __len__(self):
        return len(self.steps)

    def epoch(self, epoch, start_step=0, order=None):
        return ((tuple(views), index) for views, index in self.steps)

    def bad_images(self):
        return []


def front(name, is_fast, device="cpu"):
    """An ISL around a small ResNet; sets of two for the first 40 images, none for the others."""
    objective, mined, hpe = OBJECTIVES[name]
    encoder = lambda num_classes: build_encoder("resnet18w16", num_classes, image_size=SIDE)
    torch.manual_seed(0)
    model = (
        builder.MoCo(encoder, 16, 64, 0.9, 0.2, mlp=True)
        if objective == "queue"
        else Instance(encoder, 16, 0.2)
    ).to(device)
    isl = ISL(model, M, P=4, hpe=hpe, active=mined or objective == "bank", fast=is_fast)
    if mined:
        src = torch.arange(40, device=device)
        isl.positives = PositiveSets.from_edges(M, src, (src + 1) % 40)
        isl.bank.fill(unit(M, 16, 7).to(device))
    return isl


def train(
    isl,
    is_fast,
    *,
    amp="off",
    channels_last=False,
    print_freq=1,
    steps=None,
    device="cpu",
    epochs=1,
):
    """The losses of the loop's lines; steps: appends the number of the step that is being taken."""
    found, position = [], engine.Position()
    optimizer = fast.sgd(isl.model.parameters(), 0.05, 0.9, 1e-4, is_fast and device != "cpu")
    watched = isl

    class Watched:
        model, parts = isl.model, property(lambda self: watched.parts)
        order = isl.order

        def __call__(self, *batch):
            if steps is not None:
                steps.append(position.step)
            return watched(*batch)

    class Silent(Progress):
        def report(self, epoch, step, values):
            found.append(values["loss"])

    for epoch in range(epochs):
        position.epoch, position.step = epoch, 0
        engine.train_one_epoch(
            Watched(),
            Images(device),
            optimizer,
            torch.amp.GradScaler(enabled=False),
            position,
            device=torch.device(device),
            stop=Stop(lambda: False),
            progress=Silent("lines", 1, 4),
            log=lambda **_: None,
            save=lambda: None,
            last_good=lambda: "",
            amp=amp,
            channels_last=channels_last,
            print_freq=print_freq,
        )
    return found
