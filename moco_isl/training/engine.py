"""One epoch of training, and one round of mining, on parts that a script has put together.

Letters: N batch (of this rank), C feature dimension, M images, P positives of an image after
padding.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from moco_isl import dist
from moco_isl.encoders import AMP_TYPES
from moco_isl.errors import Interrupted, RunFailed
from moco_isl.mining.baselines import baselines
from moco_isl.mining.positives import same_label
from moco_isl.mining.reach import same_class_found
from moco_isl.mining.record import RoundReport, sample_anchors
from moco_isl.objectives.base import Objective
from moco_isl.run.meters import Averages, Clock, Progress, require_finite
from moco_isl.run.signals import Stop


@dataclass
class Position:
    """Where a run is: before step `step` of epoch `epoch`, after `total` steps in all.

    averages: of the steps of this epoch.
    """

    epoch: int = 0
    step: int = 0
    total: int = 0
    averages: Averages = field(default_factory=Averages)


def learning_rate(
    epoch: int,
    *,
    lr: float,
    epochs: int,
    cos: bool,
    schedule: list[int],
    rounds: int = 1,
    warmup: int = 0,
) -> float:
    """MoCo's learning rate of an epoch.

    It falls by half a cosine over the run, or is multiplied by 0.1 at every epoch of the schedule.
    Before the cosine it rises over `warmup` epochs, by equal steps, to lr.
    With several rounds the epochs are divided evenly, and the schedule starts anew in each.
    """
    length = math.ceil(epochs / rounds)
    epoch = epoch % length
    if epoch < warmup:
        return lr * (epoch + 1) / warmup
    if cos:
        return lr * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (length - warmup)))
    return lr * 0.1 ** sum(epoch >= milestone for milestone in schedule)


def rounds_until(epoch: int, start: int, every: int) -> int:
    """How many rounds of mining the schedule has up to the beginning of an epoch.

    One is before epoch `start`, and then one every `every` epochs.
    """
    return max(0, 1 + (epoch - start) // every)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The context in which the network computes in `amp`: off, bf16 or fp16."""
    return torch.autocast(device.type, dtype=AMP_TYPES[amp], enabled=amp != "off")


def to_network(
    image: torch.Tensor, device: torch.device, amp: str = "off", channels_last: bool = False
) -> torch.Tensor:
    """Bring images [N, 3, S, S] to the network's device in one copy.

    They get the type that autocast would give them and the network's memory format.
    """
    dtype = AMP_TYPES[amp] or image.dtype
    layout = torch.channels_last if channels_last else torch.preserve_format
    return image.to(device, dtype, non_blocking=True, memory_format=layout)


def train_one_epoch(
    isl: Objective,
    loader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    position: Position,
    *,
    device: torch.device,
    stop: Stop,
    progress: Progress,
    log: Callable[..., None],
    save: Callable[[], None],
    last_good: Callable[[], str],
    amp: str = "off",
    channels_last: bool = False,
    print_freq: int = 10,
    save_every: int = 0,
    max_steps: int = 0,
) -> bool:
    """Train from `position` to the end of its epoch; returns False when max_steps ended the run.

    loader: see `data.train_loader`. log(**values) writes a line of metrics, save() a checkpoint;
    neither is called between a step's backward pass and its end. Raises Interrupted after saving,
    when any rank was asked to stop, and RunFailed at a non-finite loss.
    """
    isl.model.train()
    epoch = position.epoch
    averages = position.averages
    clock = Clock()
    lr = optimizer.param_groups[0]["lr"]

    def report() -> None:
        require_finite(averages, epoch, last_good())
        values = {**averages.interval(), "lr": lr, **clock.read(), **_memory(device)}
        progress.report(epoch, position.step, values)
        progress.name_unreadable(loader.bad_images())
        log(kind="step", epoch=epoch, step=position.step, total=position.total, **values)

    for images, index in loader.epoch(epoch, position.step, isl.order()):
        clock.got_data()
        images = [to_network(x, device, amp, channels_last) for x in images]  # 2 x [N, 3, S, S]
        index = index.to(device, non_blocking=True)  # [N]
        with autocast(device, amp):
            loss = isl(*images, index)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        averages.add(isl.parts, len(index), position.step)
        position.step += 1
        position.total += 1
        clock.step_done(len(index))
        progress.step(epoch)
        if position.step % print_freq == 0 or position.step == len(loader):
            report()
        ends = 0 < max_steps <= position.total
        saves = save_every > 0 and position.total % save_every == 0
        stopped = stop.agreed()
        if stopped or ends or saves:
            require_finite(averages, epoch, last_good())
        if ends and not stopped:
            return False
        if stopped or saves:
            save()
        if stopped:
            at = f"epoch {epoch}, step {position.step} of {len(loader)}"
            raise Interrupted(f"saved at {at}: go on with --resume auto")
    return True


def mine_round(
    isl: Objective,
    miner,
    features: torch.Tensor,
    labels: torch.Tensor | None,
    seed: int,
    stop: Stop,
    views: tuple[torch.Tensor, torch.Tensor] | None = None,
    sizes: tuple[int, ...] = (5, 50),
    number: int | None = None,
) -> RoundReport:
    """One round of mining on features [M, C] (unit rows, equal on all ranks); returns its report.

    views 2 x [M, C]: of two random augmentations of every image, unit rows; None: there are none.
    number: of the round, from 1 on; None: the one after the last.
    labels [M]: on the features' device, -1: none. They are looked at after the mining: the report
    then has the precision of the sets, of each image's own nearest at equal size, and of all pairs
    ranked at equal total.
    Raises Interrupted when asked to stop, and RunFailed where features are not finite: then nothing
    has changed.
    """
    start = time.perf_counter()
    number = isl.round + 1 if number is None else number
    # a function of seed and round: a resumed round is the same
    rng = torch.Generator().manual_seed((seed * 1_000_003 + number - 1) % 2**63)
    if not all(
        bool(rows.isfinite().all()) for rows in (features, *(views or ())) if rows is not None
    ):
        text = (
            f"the features from which round {number} was to be mined hold NaN or infinity: the"
            " encoder has diverged, or the file it started from had; start anew with a lower --lr"
            " or without --amp"
        )
        raise RunFailed(text if dist.is_main() else "")
    report = isl.mine_features(features, miner, rng, stop.tick, views, number)
    seconds = time.perf_counter() - start
    report = replace(report, round=isl.round, seconds=seconds, **_memory(features.device))
    if labels is None:
        return report
    if (surest := getattr(miner, "surest", None)) is not None:
        right = same_label(labels, *surest).nanmean()
        report = replace(report, precision_surest=None if right.isnan() else float(right))
    sampled = report.recall is not None
    return replace(report, **judge_positives(isl, features, labels, sizes, sampled))


def judge_positives(
    isl: Objective,
    features: torch.Tensor,
    labels: torch.Tensor,
    sizes: tuple[int, ...],
    sampled: bool = False,
) -> dict:
    """Precision of the sets, and of both baselines at the sets' mean size and at `sizes`.

    Beside it the share of the pairs of one class that the sets hold.
    Returns fields of RoundReport, the sets' precision alone on ranks other than 0.
    sampled: the round searched approximately, because an exact search of all images takes too long.
    Own nearest is then that of 4,096 images, searched exactly, and all pairs are left out.
    """
    mean = isl.positives.mean_size
    mined = isl.positives.num_edges > 0
    precision = isl.positives.precision(labels) if mined else None
    if not dist.is_main() or len(features) < 2:
        return {"precision": precision}
    at = sorted({*sizes, mean} - {0})
    anchors = sample_anchors(len(features)).to(features.device) if sampled else None
    found = baselines(features, labels, at, pairs=not sampled, anchors=anchors)
    at_mean = lambda rule: found[rule][at.index(mean)] if mean and rule in found else None
    return {
        "same_class_found": same_class_found(isl.positives, labels) if mined else None,
        "precision": precision,
        "precision_own_nearest": at_mean("own_nearest"),
        "precision_all_pairs": at_mean("all_pairs"),
        "baselines": found,
    }


def _memory(device: torch.device) -> dict[str, float]:
    """Peak memory of the GPU so far, in GiB; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
