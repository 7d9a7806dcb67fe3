"""A detector from its first batch to results.json, and its checkpoint.

N: images of this rank's share of a batch.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco_isl import dist
from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.evaluation import results
from moco_isl.evaluation.detection import model as detectors
from moco_isl.evaluation.detection import picture
from moco_isl.evaluation.detection.batches import Reading, Sample, scaled
from moco_isl.evaluation.detection.boxes import BoxedImages
from moco_isl.evaluation.detection.scoring import Found, score
from moco_isl.evaluation.probing import Remaining
from moco_isl.files import shown
from moco_isl.run import checkpoint, ranks
from moco_isl.run.folder import RunFolder
from moco_isl.run.meters import Averages, Clock
from moco_isl.run.ranks import say
from moco_isl.run.signals import Stop
from moco_isl.schema import COUNT, EARLIER, Number, like, require
from moco_isl.training import fast, resume, state
from moco_isl.training.engine import autocast

_WARMUP_FROM = 0.001  # of the learning rate, detectron2's
_PRECISE = -1  # the epoch of the images that batch norm is measured on: none of the training


@dataclass(frozen=True)
class Schedule:
    """SGD as detectron2 has it: a linear warm-up, then a tenth at each of the steps."""

    iterations: int
    batch_size: int
    lr: float
    steps: list[int]
    warmup: int

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration, from 0 on."""
        rate = self.lr * 0.1 ** sum(iteration >= step for step in self.steps)
        if iteration >= self.warmup:
            return rate
        return rate * (_WARMUP_FROM + (1 - _WARMUP_FROM) * iteration / self.warmup)


class Tuning:
    """Trains a detector on boxed images and judges it on others.

    origin: what a file to go on with has to agree on. flags: `args` of the checkpoint. folder: of
    rank 0, None on the others. Attributes: iteration, that comes next, and seconds of the training.
    """

    def __init__(
        self,
        model: nn.Module,
        images: dict[str, BoxedImages],
        reading: Reading,
        schedule: Schedule,
        *,
        momentum: float,
        weight_decay: float,
        amp: str,
        origin: dict,
        flags: dict,
        folder: RunFolder | None,
        stop: Stop,
    ):
        self.images = images
        self.reading = reading
        self.schedule = schedule
        self.device = reading.device
        self.amp = amp
        self.origin = origin
        self.flags = flags
        self.folder = folder
        self.stop = stop
        self.model = model.to(self.device)
        self.answer = self.model
        if dist.world_size() > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.answer = DistributedDataParallel(self.model, device_ids=ids)
        groups = detectors.groups(self.model, weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=schedule.lr, momentum=momentum)
        self.iteration = 0
        self.averages = Averages()
        self.seconds = 0.0

    # ---- going on

    def restore(self, content: dict, path: str) -> None:
        """Take up the state in a file of ours. Raises BadInput."""
        require_detector(content, path, self.model, self.schedule.iterations, self.origin)
        ours = content["detector"]
        self.model.load_state_dict(ours["model"])
        groups = [group["params"] for group in self.optimizer.param_groups]
        state.require_optimizer(content["optimizer"], path, groups)
        fast.load_optimizer(self.optimizer, content["optimizer"])
        self.iteration = ours["total"]
        resume.restore_rng(ours["rng"], self.device, self.averages)
        say(f"=> loaded '{shown(path)}' (iteration {self.iteration})")

    def save(self) -> None:
        """Write checkpoint_last: what an exact resume needs. All ranks call it."""
        generators = resume.rng_of_ranks(self.device, self.averages)
        ranks.on_main(lambda: self._write(generators))

    def _write(self, generators: list[dict]) -> None:
        weights = self.model.state_dict()
        self.folder.require_sound(checkpoint.exploded(weights), 0, self.iteration)
        ours = {
            "model": weights,
            "rng": generators,
            "epoch": 0,
            "step": self.iteration,
            "total": self.iteration,
            **self.origin,
            "metrics_size": self.folder.metrics_size(),
        }
        content = {
            "epoch": self.iteration,
            "arch": self.flags["arch"],
            "optimizer": self.optimizer.state_dict(),
            "args": self.flags,
            "detector": ours,
        }
        self.folder.save(content, None)

    # ---- training

    def train(self, *, print_freq: int, save_every: int) -> None:
        """Train from `iteration` to the last one. Raises Interrupted once it is asked to stop."""
        start = time.perf_counter()
        plan = self.schedule
        batches = self.reading.train(
            self.images["train"], plan.batch_size, self.iteration, plan.iterations
        )
        left = Remaining(plan.iterations, self.iteration)
        clock = Clock()
        self.model.train()
        for samples in batches:
            clock.got_data()
            for group in self.optimizer.param_groups:
                group["lr"] = plan.rate(self.iteration)
            self.averages.add(self.step(samples), len(samples), self.iteration)
            self.iteration += 1
            clock.step_done(len(samples))
            ends = self.iteration == plan.iterations
            if self.iteration % print_freq == 0 or ends:
                self.require_finite()
                self.show(self.averages.interval() | clock.read(), left.left(self.iteration))
            stopped = self.stop.agreed()
            if stopped or ends or self.iteration % save_every == 0:
                self.require_finite()
                self.save()
            if stopped:
                at = f"iteration {self.iteration} of {plan.iterations}"
                raise Interrupted(f"saved at {at}: go on with --resume auto")
        batches.close()
        self.seconds = time.perf_counter() - start

    def step(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """One step on this rank's share of a batch; the parts of the loss."""
        parts = self.losses(samples, self.answer)
        loss = sum(parts.values())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()} | {name: x.detach() for name, x in parts.items()}

    def losses(self, samples: list[Sample], answer: nn.Module) -> dict[str, torch.Tensor]:
        """torchvision's four: of the class and the box of a region, and of a proposal."""
        detectors.set_keys(self.model, [sample.key for sample in samples])
        # class 0 is torchvision's background
        targets = [{"boxes": one.boxes, "labels": one.labels + 1} for one in samples]
        with autocast(self.device, self.amp):
            return answer([one.image.float() / 255 for one in samples], targets)

    def require_finite(self) -> None:
        """Raise RunFailed on all ranks where a loss was not finite on any."""
        bad = torch.tensor(self.averages.first_bad_step(), device=self.device)
        worst = int(dist.all_reduce_max(bad))
        if worst >= 0:
            last = self.folder.last_good() if self.folder else ""
            what = f"the last whole checkpoint is {last}; " if last else ""
            text = f"the loss was not finite at iteration {worst}; {what}start anew with a lower"
            raise RunFailed(f"{text} --lr, a longer --warmup or without --amp")

    def show(self, values: dict[str, float], left: str) -> None:
        """Print a line about the iterations since the last one, and log it."""
        total = self.schedule.iterations
        rate = self.optimizer.param_groups[0]["lr"]
        words = {
            "class": "loss_classifier",
            "box": "loss_box_reg",
            "object": "loss_objectness",
            "proposal": "loss_rpn_box_reg",
        }
        parts = " ".join(f"{word} {values[name]:.3f}" for word, name in words.items())
        line = [
            f"Iteration: [{self.iteration:{len(str(total))}d}/{total}]",
            f"Time {values['time']:6.3f}",
            f"Data {values['data_time']:6.3f}",
            f"Loss {values['loss']:.4e} ({parts})",
            f"lr {rate:.3e}",
            f"{values['images_per_s']:.0f} img/s",
            f"left {left}",
        ]
        say("\t".join(line))
        if self.folder is not None:
            self.folder.log(kind="step", step=self.iteration, lr=rate, **values)

    # ---- judging

    @torch.no_grad()
    def measure_bn(self, n: int) -> None:
        """Measure the statistics of batch norm anew, over n batches (MoCo's PRECISE_BN).

        In training they are means over the last few batches, of weights that have moved since.
        Frozen ones stay. n: 0 for none.
        """
        norms = [
            module
            for module in self.model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        if not n or not norms:
            return
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a mean over all batches
        self.model.train()
        batches = self.reading.train(
            self.images["train"], self.schedule.batch_size, 0, n, epoch=_PRECISE
        )
        for samples in self.stop.watch(batches, n):
            self.losses(samples, self.model)  # DDP would give all ranks the statistics of one
        batches.close()
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            for mean in (norm.running_mean, norm.running_var):
                mean.copy_(dist.all_reduce_sum(mean.clone()) / dist.world_size())

    @torch.no_grad()
    def detect(self) -> list[Found] | None:
        """What is detected in every test image; None on every rank but 0."""
        images = self.images["test"]
        self.model.eval()
        batches = self.reading.test(images)
        most = -(-len(images) // dist.world_size())
        shares = dist.gather_objects(list(self._detect(self.stop.watch(batches, most))))
        batches.close()
        return sum(shares, []) if dist.is_main() else None

    def _detect(self, batches: Iterator[list[Sample]]) -> Iterator[Found]:
        for (sample,) in batches:
            with autocast(self.device, self.amp):
                (out,) = self.model([sample.image.float() / 255])
            row = self.images["test"].rows[sample.index]
            size = sample.image.shape[2], sample.image.shape[1]
            boxes = scaled(out["boxes"].float(), size, (row.width, row.height))
            labels, scores = (out["labels"] - 1).tolist(), out["scores"].float().tolist()
            yield Found(sample.index, boxes.tolist(), labels, scores)

    def judge(self, out: str, facts: dict, precise_bn: int) -> None:
        """Detect on the test images, print the table, write results.json and the picture."""
        self.measure_bn(precise_bn)
        found = self.detect()
        ranks.on_main(lambda: self._conclude(Path(out), found, facts))

    def _conclude(self, out: Path, found: list[Found], facts: dict) -> None:
        images = self.images["test"]
        scores = score(images, found)
        say(table(scores))
        facts = {
            **facts,
            "iterations": self.iteration,
            "train_images": len(self.images["train"]),
            "test_images": len(images),
            "seconds": self.seconds,
            **scores,
        }
        self.folder.require_held()
        self.folder.log(kind="result", step=self.iteration, **{x: scores[x] for x in AP})
        path = picture.draw(images, {one.index: one for one in found}, out)
        say(f"=> written to {shown(path)}")
        for line in results.write_results(out, "classes", facts):
            say(line)


AP = ("AP", "AP50", "AP75")


def table(scores: dict) -> str:
    """The classes in lines, and their mean."""
    rows = [[row["class"], row["objects"], *(row[x] for x in AP)] for row in scores["classes"]]
    objects = sum(row["objects"] for row in scores["classes"])
    rows.append(["all", objects, *(scores[x] for x in AP)])
    return results.table(["class", "objects", *AP], rows)


# ---- the file to go on with ----------------------------------------------------------------------

ORIGIN = {"sha256": str, "classes": [str], "data_sha256": str}


def require_detector(
    content: dict, path: str, model: nn.Module, iterations: int, origin: dict
) -> None:
    """Raise BadInput unless a detector can take the state in a file of ours."""
    where = state.where(path)
    ours = {
        "model": dict(like(model.state_dict())),
        "rng": state.RANKS,
        "epoch": {0},
        "step": COUNT,
        "total": Number(0, iterations, whole=True),
        **ORIGIN,
        "metrics_size": COUNT,
    }
    shape = {"epoch": COUNT, "arch": str, "args": dict, "optimizer": dict, "detector": ours}
    require(content, shape, where, cure=EARLIER)
    words = {
        "sha256": "was trained from another FILE",
        "classes": "knows other classes than those of --data",
        "data_sha256": "was trained on other images than those of --data",
    }
    for name, what in words.items():
        if content["detector"][name] != origin[name]:
            raise BadInput(f"'{shown(path)}' {what}: give the same, or choose another --out")
