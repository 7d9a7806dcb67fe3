"""`ISL`, the objective for a training loop of your own.

    model = MoCo(torchvision.models.resnet50, mlp=True)
    isl = ISL(model, num_images=len(dataset))
    for epoch in range(epochs):
        if epoch >= 100 and epoch % 20 == 0:  # a young encoder mines its own mistakes
            print(isl.mine(model, dataset, AverageMiner()))
        for (im_q, im_k), index in loader:
            loss = isl(im_q, im_k, index)

A step: `objectives/queue.py`. A round: `objectives/base.py` and `mining/rounds.py`.
Letters: M images, C feature dimension, S side of a view.
"""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn
from torch.utils.data import Dataset

from moco_isl import data, dist
from moco_isl.encoders import evaluating
from moco_isl.errors import BadInput, first_line
from moco_isl.loader import WithIndex
from moco_isl.mining.record import RoundReport, in_percent
from moco_isl.objectives import OBJECTIVES
from moco_isl.objectives.base import Objective
from moco_isl.training import engine, reading
from moco_isl.training.health import ALIKE


def ISL(model: nn.Module, num_images: int, **options) -> Objective:
    """The objective that goes around a model, with `mine` for a round of mining.

    Around a `MoCo` it is the queue objective, which is MoCo v2 while its `active` is False. Around
    an `Instance` it is the bank objective, a softmax over all images. In a process group it wraps
    the model in DistributedDataParallel itself, and queue and bank become those of rank 0.

    model: bare, neither wrapped nor compiled. num_images: M; `index` of a batch counts in 0 ..
    M - 1. options: the fields of `QueueObjective` or `BankObjective`.
    Raises BadInput for what cannot work.
    """
    objective = _objective_around(model)
    unknown = sorted(options.keys() - objective.options())
    if unknown:
        raise BadInput(
            f"ISL({type(model).__name__}, ...) has no option {', '.join(unknown)}: expected some of"
            f" {', '.join(sorted(objective.options()))}"
        )
    return objective(model, num_images, **options)


@dataclass
class Mined(RoundReport):
    """What `isl.mine` did: the figures of a RoundReport. `str` says them in a few plain lines.

    images: M. mean_cosine: between the features of all images; 1 where all look alike.
    """

    images: int = 0
    mean_cosine: float = 0.0

    def __str__(self) -> str:
        if not self.miner:
            return "Nothing was mined: this miner finds no positives."
        lines = [
            f"Round {self.round} by {self.miner}: {self.mean_size:.1f} positives an image;"
            f" {100 * self.coverage:.0f} % of {self.images:,} images have any."
        ]
        lines += self._right()
        lines.append(
            f"  {self.edges_added:,} positives came in and {self.edges_dropped:,} went, in"
            f" {self.seconds:.1f} s."
        )
        if found := self.trouble():
            lines.append(f"  {found[0].upper()}{found[1:]}.")
        return "\n".join(lines)

    def _right(self) -> list[str]:
        """Lines on the share of right positives: by labels, and by an estimate."""
        lines = []
        if self.precision is not None:
            beside = self.precision_own_nearest
            own = f" ({in_percent(beside)} % of as many own nearest)" if beside is not None else ""
            lines.append(f"  Right by the labels: {in_percent(self.precision)} %{own}.")
        share, most = self.precision_estimate, self.precision_at_most
        if self.precision_at_least is not None:
            lines.append(
                f"  Right by {self.labels_checked} labelled images: {in_percent(share)} %"
                f" ({in_percent(self.precision_at_least)} to {in_percent(most)} %)."
            )
        elif share is not None:
            lines.append(
                f"  Right by the estimate without labels: {in_percent(share)} to"
                f" {in_percent(most)} %."
            )
        elif self.precision is None and most is not None:
            lines.append(f"  Right by the estimate without labels: at most {in_percent(most)} %.")
        return lines

    def trouble(self) -> str:
        """Why a round was refused or added nothing; '' where it went well."""
        if not self.accepted:
            return f"the round was refused, and the sets stay as they were: {self.why}"
        if self.why or (self.miner and not self.edges):
            return self.why or "the miner found no pairs"
        return ""


class _Mines:
    """What ISL puts on top of an objective: a whole round of mining in a call."""

    _images = (None, None)  # the last data set given, and as ours are read

    def mine(
        self,
        model: nn.Module,
        dataset: Dataset,
        miner,
        *,
        size: int | None = None,
        batch_size: int = 256,
        workers: int = 0,
        aug_plus: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
    ) -> Mined:
        """Mine once: encode all images in order, and replace the positives by what `miner` finds.

        model: the one that this ISL is around, whose key encoder is taken where it has one; or an
        encoder with as many outputs. dataset: the M images without augmentation, one of
        `data.build_dataset` or any Dataset whose items are an image; (image, label); or a dict with
        an image (PIL images, or tensors [c, H, W] of uint8 or of floats in [0, 1]). Labels serve to
        print how many positives are right. miner: of `moco_isl.miners`, or your own; one that
        estimates what is right gets two augmented views of every image.

        size: S; None: the images' own up to 64 pixels, else 224. aug_plus: the views are MoCo v2's,
        or MoCo v1's. mean, std: as your loop normalises; None: the data set's own, ImageNet's for
        any Dataset. seed: of views and miner. batch_size: images at a time, workers: processes that
        read them; no set depends on them, but for rounding.

        In a process group all ranks call this, each encodes its share, and the sets are equal.
        Warns where the encoder looks untrained, all features are alike, the round was refused or
        found nothing, or an image cannot be read. Raises BadInput for what cannot work, and
        RunFailed where features are not finite; then nothing has changed.
        """
        encoder = self._encoder_of(model)
        self._check_miner(miner)
        for name, value, least in (
            ("size", size, 1),
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
        ):
            if value is not None and not (isinstance(value, Integral) and value >= least):
                raise BadInput(f"{name} is {value!r}: expected a whole number of {least} or more")
        reader = reading.open_passes(
            self._own(dataset),
            encoder,
            self.device,
            size=size,
            batch_size=batch_size,
            workers=workers,
            aug_plus=aug_plus,
            mean=mean,
            std=std,
            seed=seed,
        )
        self._check_outputs(encoder, reader)
        features = reader.features(encoder)  # [M, C]
        wants_views = getattr(miner, "wants_views", False)
        views = reader.views(encoder, self.round) if wants_views else None
        report = engine.mine_round(self, miner, features, reader.labels, seed, reader.stop, views)
        center = features.float().mean(dim=0)
        found = Mined(**vars(report), images=reader.M, mean_cosine=float(center @ center))
        unreadable = {
            i: name for part in dist.gather_objects(reader.unreadable) for i, name in part.items()
        }
        if dist.is_main():
            for line in self._notes(encoder, found, unreadable):
                warnings.warn(line, stacklevel=2)
        return found

    def _own(self, dataset: Dataset) -> Dataset:
        """The data set as ours are read; the last one is kept. Raises BadInput."""
        if isinstance(dataset, WithIndex):
            dataset = dataset.dataset
        if self._images[0] is not dataset:
            self._images = dataset, data.own_images(dataset)
        M = len(self._images[1])
        if M != self.num_images:
            raise BadInput(
                f"the data set holds {M} images, and this ISL counts {self.num_images}: expected"
                " the images that the loop trains on, in the order that `index` counts"
            )
        return self._images[1]

    def _encoder_of(self, model: nn.Module) -> nn.Module:
        """The encoder that is meant by a model. Raises BadInput."""
        if not isinstance(model, nn.Module):
            raise BadInput(
                f"mine(...) was given a {type(model).__name__} as model: expected the model that"
                " this ISL is around, or an encoder; the order is mine(model, dataset, miner)"
            )
        bare = _bare(model)
        encoder = self.encoder if bare is self.model else bare
        for name in ("encoder_k", "encoder_q"):  # of another MoCo, or Instance
            encoder = getattr(encoder, name, encoder)
        where = {parameter.device for parameter in encoder.parameters()} - {self.device}
        if where:
            raise BadInput(
                f"the encoder is on {where.pop()}, and this ISL on {self.device}: expected both on"
                " one device"
            )
        return encoder

    def _check_miner(self, miner) -> None:
        """Raise BadInput for what is no miner, and where nothing can be mined for."""
        if not self.mined:
            raise BadInput(
                f"ISL around a {type(self.model).__name__} has no use for positives: expected it"
                " around a MoCo or an Instance"
            )
        if isinstance(miner, type):
            raise BadInput(f"the miner is a class: expected an object, {miner.__name__}()")
        if not hasattr(miner, "mine"):
            raise BadInput(
                f"the miner is a {type(miner).__name__}: expected one of moco_isl.miners, such as"
                " moco_isl.miners.average.AverageMiner()"
            )

    def _check_outputs(self, encoder: nn.Module, reader: reading.Reader) -> None:
        """Raise BadInput unless the encoder gives C numbers for an image as the reader has it."""
        shape = 1, reader.settings.pixels.channels, reader.images.side, reader.images.side
        try:
            with evaluating(encoder), torch.no_grad():
                out = encoder(torch.zeros(shape, device=self.device))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise BadInput(
                f"the encoder does not take images of {shape[1]} channels and {shape[2]} pixels"
                f" ({first_line(error).rstrip('.')}): give mine(..., size=S) as in the training"
            ) from error
        C = self.model.dim
        if not isinstance(out, torch.Tensor) or out.shape != (1, C):
            gives = list(out.shape[1:]) if isinstance(out, torch.Tensor) else type(out).__name__
            raise BadInput(
                f"the encoder gives {gives} for an image: expected [{C}], as the model of this ISL"
                " with its head"
            )

    def _notes(self, encoder: nn.Module, found: Mined, unreadable: dict[int, str]) -> list[str]:
        """What is worth a warning."""
        notes = []
        if self._untrained(encoder):
            notes.append(
                "this encoder has taken no step: its nearest images are alike in their pixels at"
                " most; train it first, or load weights"
            )
        elif found.mean_cosine > ALIKE:
            notes.append(
                f"all features are alike (mean cosine {found.mean_cosine:.3f}): the encoder has"
                " collapsed, or has only begun to learn, and what is mined means little"
            )
        if found.trouble():
            notes.append(f"{found.miner}: {found.trouble()}")
        if unreadable:
            i = min(unreadable)
            notes.append(
                f"{len(unreadable)} images cannot be read, {unreadable[i]} for one: the next that"
                " can stands in for each"
            )
        return notes

    def _untrained(self, encoder: nn.Module) -> bool:
        """Whether nothing shows that an encoder was ever trained: steps, batch norms, the queue."""
        ours = encoder is self.encoder or encoder is getattr(self.model, "encoder_q", None)
        if ours and self.begun:
            return False
        averages = [x for name, x in encoder.named_buffers() if name.endswith("running_mean")]
        if averages:
            return not any(bool(x.any()) for x in averages)
        return ours and self.has_queue and not self._keys()

    def _keys(self) -> int:
        """How many keys of images the queue of the model holds."""
        held = self.slots.held
        found = self.slots.count_held(self.model.queue, self.model.queue_ptr)
        self.slots.held = held  # as it was: weights may still be loaded
        return found


@functools.cache
def _with_mine(kind: type[Objective]) -> type[Objective]:
    """The objective of that kind that has `mine`."""
    return type(f"Mining{kind.__name__}", (_Mines, kind), {"__module__": __name__})


def _objective_around(model: nn.Module) -> type[Objective]:
    """Raises BadInput for a model that is wrapped or unknown, and says how one is had."""
    for objective in OBJECTIVES.values():
        if isinstance(model, objective.around):
            return _with_mine(objective)
    inner = _bare(model)
    bare = type(inner).__name__
    if isinstance(inner, tuple(objective.around for objective in OBJECTIVES.values())):
        raise BadInput(
            f"ISL was given a {type(model).__name__} around a {bare}: expected the bare {bare}. ISL"
            " wraps it in DistributedDataParallel itself where there are ranks; to compile, give"
            " the bare model to moco_isl.training.fast.compile_encoders"
        )
    same = "moco_isl.builder.MoCo takes the same arguments and state dict"
    hint = same if bare == "MoCo" else "make one around your encoder"
    raise BadInput(
        f"ISL was given a {type(model).__module__}.{type(model).__name__}: expected a"
        f" moco_isl.builder.MoCo or a moco_isl.objectives.bank.Instance; {hint}"
    )


def _bare(model: nn.Module) -> nn.Module:
    """The module inside of DistributedDataParallel and torch.compile."""
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model
