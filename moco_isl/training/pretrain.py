"""A pretraining run, in the order in which it goes: images, files, warnings, epochs, rounds, saves.

main_moco_isl.py chooses data set, model, objective and miner by the flags, and calls what is here.
Letters: C feature dimension, M images.
"""

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from moco_isl import dist, files
from moco_isl.builder import MoCo
from moco_isl.encoders import as_in_library, head_name, without_head
from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.mining.estimate import apart, effective_rank
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.record import precision_of_ranking, round_record
from moco_isl.objectives.base import Objective
from moco_isl.ops import ivf
from moco_isl.run import checkpoint, loggers, logs, ranks
from moco_isl.run.backbone import describe, into_start
from moco_isl.run.folder import RunFolder
from moco_isl.run.meters import Averages, Progress
from moco_isl.run.signals import Stop
from moco_isl.training import engine, fast, health, resume, state
from moco_isl.training.reading import Reader


@dataclass(frozen=True)
class Plan:
    """What a run does in which epoch; the fields are the flags of these names.

    mines: there is a miner.
    """

    mines: bool
    start_epoch: int
    epochs: int
    optimizer: str
    lr: float
    warmup_epochs: int
    momentum: float
    weight_decay: float
    cos: bool
    schedule: list[int]
    isl_rounds: int
    isl_start: int
    isl_every: int
    isl_from: str
    print_freq: int
    save_every: int
    save_epochs: int
    max_steps: int
    knn_every: int
    probe_every: int

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch."""
        return engine.learning_rate(
            epoch,
            lr=self.lr,
            epochs=self.epochs,
            cos=self.cos,
            schedule=self.schedule,
            rounds=self.isl_rounds,
            warmup=self.warmup_epochs,
        )

    def mined(self, epoch: int) -> bool:
        """Whether an epoch trains on mined positives."""
        return self.mines and epoch >= self.isl_start

    def rounds(self, epoch: int) -> int:
        """The number of the last round that is due up to the beginning of an epoch; 0: none."""
        return engine.rounds_until(epoch, self.isl_start, self.isl_every) if self.mines else 0


@dataclass(frozen=True)
class Numerics:
    """How the network computes; the fields are the flags of these names."""

    amp: str
    channels_last: bool
    compile: bool
    fast: bool

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.preserve_format


@dataclass(frozen=True)
class Judges:
    """What judges features by labels. The caller hands it in: evaluation imports training.

    knn: `evaluation.knn.weighted_knn`. probe: `evaluation.linear.probe_accuracy`.
    """

    knn: Callable[..., torch.Tensor]
    probe: Callable[..., float]


# ---- checks of the file, before anything is written


def check_file(
    start: resume.Start,
    content: dict,
    images: Dataset,
    model: nn.Module,
    *,
    isl_shape,
    parameters: list[nn.Parameter],
    miner_shape: dict,
    labels: str | None,
    batch_size: int,
    optimizer: str,
    momentum: float,
    fp16: bool,
    out: str,
    arch: str,
    stem: str,
) -> None:
    """Check the content of a start's file against the run that starts from it. Raises BadInput.

    Weights of any other kind than a MoCo file's become one of the query encoder alone (see
    `backbone.into_start`). images: those to train on. model: on any device. isl_shape, miner_shape:
    the `state_shape` of either. parameters: those of the optimizer, on any device. labels: see
    `resume.labels_of`. Everything else follows from the flags.
    """
    init = not start.goes_on
    if init:
        into_start(content, start.path, model.encoder_q, arch, stem)
    _, filled = checkpoint.match(model, content, start.path, init)
    ours = content.get("isl")
    names = resume.images_of(images)
    if start.goes_on and ours:
        _require_images(ours, len(images), names, labels, start.path)
        if start.in_place:
            logs.require_lines_after(Path(out), ours["metrics_size"], ours["total"], start.path)
        state.require_state(
            content,
            start.path,
            isl=isl_shape,
            parameters=parameters,
            miner=miner_shape,
            M=len(images),
            batch_size=batch_size,
            optimizer=optimizer,
            momentum=momentum,
            fp16=fp16,
        )
    elif ours and isinstance(model, MoCo) and "queue" not in filled:
        known = ours.get("images") == names
        state.require_queue(content, start.path, model, len(images) if known else None)
    elif start.goes_on and "optimizer" in content:
        state.require_optimizer(
            content["optimizer"], start.path, [parameters], adamw=optimizer == "adamw"
        )
    if broken := checkpoint.exploded(content):
        raise BadInput(
            f"'{start.path}' holds values that are not finite, or too large to be squared"
            f" ({checkpoint.some(broken)}): give an older file, or start anew with a lower --lr"
        )


def _require_images(ours: dict, M: int, names: str, labels: str | None, path: str) -> None:
    """Raise BadInput where a file of ours was trained on other images than the M of these names.

    Likewise where the labels of --isl-check were others.
    """
    cure = "give it the same ones, or start a new run with --init and another --out"
    if ours.get("num_images", M) != M:  # `require_state` reports a missing number
        raise BadInput(
            f"'{path}' was trained on {ours['num_images']} images, and now there are {M}: {cure}"
        )
    if ours.get("images", names) != names:
        raise BadInput(
            f"'{path}' was trained on as many images of other names, or in another order: what was"
            f" mined belongs to images by their place; {cure}"
        )
    if ours.get("labels", labels) != labels:
        raise BadInput(
            f"the list of --isl-check has other images or labels than when '{path}' was saved: give"
            " it as it was, or start a new run with --init and another --out"
        )


# ---- what is trained


def assemble(
    model: nn.Module, isl: Objective, miner, reader: Reader, plan: Plan, numerics: Numerics
) -> resume.Parts:
    """Put together all parts of a run whose state a checkpoint holds.

    model: on its device. isl: its objective. miner: see mining.rounds.Miner.
    """
    cuda = reader.device.type == "cuda"
    fused = numerics.fast and cuda
    if plan.optimizer == "adamw":
        optimizer = fast.adamw(isl.parameters(), plan.lr, plan.weight_decay, fused)
    else:
        optimizer = fast.sgd(isl.parameters(), plan.lr, plan.momentum, plan.weight_decay, fused)
    scaler = torch.amp.GradScaler(reader.device.type, enabled=numerics.amp == "fp16")
    if numerics.fast:
        fast.count_batches_at_once(model)
    if numerics.compile:
        fast.compile_encoders(model, reader.settings.batch_size // dist.world_size())
    names = resume.images_of(reader.images.train)
    position = engine.Position(epoch=plan.start_epoch)
    labels = resume.labels_of(miner)
    return resume.Parts(model, optimizer, scaler, isl, miner, names, position, labels)


# ---- what a run prints and writes


class Journal:
    """Prints what a run does, and logs it in metrics.jsonl and by the loggers.

    Every rank has a journal. Only rank 0 has a folder and loggers, and only its journal prints and
    writes. It is a context: at its end all is closed, and the loggers learn how the run ended.
    """

    def __init__(self, folder: RunFolder | None, progress: Progress, position: engine.Position):
        self.folder = folder
        self.progress = progress
        self.position = position
        self.loggers: list[loggers.Guarded] = []
        self.mean_cosine = math.inf  # between features at the end of the epoch before
        # effective rank of the features and `apart` of their views at the round before
        self.outcome: tuple[float, float | None] | None = None

    def say(self, line: str) -> None:
        self.progress.say(line)

    def log(self, **values) -> None:
        """Write one line into metrics.jsonl, and its numbers by the loggers."""
        if self.folder is not None:
            self.folder.log(**values)
        kind = values["kind"]
        numbers = {
            f"{kind}/{name}": value
            for name, value in values.items()
            if isinstance(value, (int, float)) and name not in ("epoch", "step", "total")
        }
        for logger in self.loggers:
            logger.log(numbers, self.position.total)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self.progress.close()
        how = loggers.FINISHED if kind is None else loggers.FAILED
        if kind is not None and issubclass(kind, (Interrupted, KeyboardInterrupt)):
            how = loggers.KILLED
        for logger in self.loggers:
            logger.close(how)
        if self.folder is not None:
            self.folder.close()


@dataclass
class Saver:
    """Writes the checkpoints of a run; every rank has to call it.

    folder: of rank 0, None elsewhere. flags: of the run, plain values. side: of a crop.
    """

    parts: resume.Parts
    folder: RunFolder | None
    flags: dict
    side: int
    device: torch.device

    def __call__(self, number: int | None = None) -> None:
        """Save checkpoint_last, and with a number checkpoint_<number> too."""
        position = self.parts.position
        generators = resume.rng_of_ranks(self.device, position.averages)

        def write() -> None:
            content = self.parts.state(self.flags, generators, self.folder.metrics_size())
            broken = checkpoint.exploded(content)
            self.folder.require_sound(broken, position.epoch, position.step)
            self.folder.save({**content, "image_size": self.side}, number)

        ranks.on_main(write)

    def last_good(self) -> str:
        """The file that holds what was saved last; '' where nothing was saved."""
        return self.folder.last_good() if self.folder else ""


# ---- the beginning


def begin(
    start: resume.Start,
    content: dict,
    parts: resume.Parts,
    reader: Reader,
    journal: Journal,
    save: Saver,
    log_to: str,
) -> None:
    """Load what the run starts from, and open its files. `content` is emptied."""
    metrics_size = 0
    logged = content.get("isl", {}).get("metrics_size", 0)
    if start.path:
        metrics_size = load(start, content, parts, reader, save.flags)
    content.clear()  # it is as large as the model and the bank
    total = parts.position.total if start.in_place else None
    opened = lambda: loggers.open_loggers(
        log_to, journal.folder.path, save.flags, total, journal.say
    )
    journal.loggers = ranks.on_main(opened) or []
    ranks.on_main(lambda: journal.folder.begin(save.flags, metrics_size))
    if start.goes_on and not start.in_place:
        save()  # so --resume auto finds all it needs in the folder, however early this run ends
    journal.progress.begin(parts.position.total)
    if start.path:
        journal.mean_cosine = parts.isl.mean_cosine()
    if start.goes_on:
        read = lambda: outcome_before(Path(start.path).parent, logged)
        journal.outcome = dist.broadcast_object(ranks.on_main(read))


def load(
    start: resume.Start,
    content: dict,
    parts: resume.Parts,
    reader: Reader,
    flags: dict,
) -> int | None:
    """Resume or initialise the parts of a run from a file.

    Returns how many bytes of metrics.jsonl to keep (None: all).
    """
    init = not start.goes_on
    filled = checkpoint.load_model(parts.model, content, start.path, init)
    epoch = resume.epoch_of(content)
    loaded = (
        f"=> loaded '{files.shown(start.path)}' (epoch {'unknown' if epoch is None else epoch})"
    )
    if "weights" in content:
        loaded = describe(content["weights"])
    ranks.say(loaded + "".join(f"; {_instead(content, part, parts.model)}" for part in filled))
    for line in start.says:
        ranks.say(line)
    if "queue" in filled:
        refill_queue(parts, reader)
        ranks.say(f"=> queue filled with features of {min(reader.M, parts.model.K)} images")
    if not start.goes_on:
        warn_of_labels(content, start.path)
        if "queue" not in filled:
            initialise(parts, content, flags["dataset"], reader.features)
        return 0
    if "isl" not in content:
        parts.position.epoch = epoch or flags["start_epoch"]
        if "optimizer" in content:
            fast.load_optimizer(parts.optimizer, content["optimizer"])
        else:
            ranks.say("=> it has no optimizer either: that one starts fresh")
        return None
    resume_exactly(content, start.path, parts, reader.device)
    return content["isl"]["metrics_size"] if start.in_place else 0


def _instead(content: dict, part: str, model: nn.Module) -> str:
    """Where a part of the model comes from that is not the file's, see `checkpoint.match`."""
    fills = {
        "head": "drawn anew",
        "encoder_k": "copied from encoder_q",
        "queue": "filled anew by one feature pass",
        "classifier": "drawn anew",
    }
    if "weights" in content:
        return f"{part} {fills[part]}"
    state = content.get("state_dict", content)
    place = f"encoder_q.{head_name(model.encoder_q)}" if part == "head" else part
    if any(f"{place}." in f"{name}." for name in state):
        return f"its {part} does not fit, and is {fills[part]}"
    return f"it has no {part}, which is {fills[part]}"


def resume_exactly(content: dict, path: str, parts: resume.Parts, device: torch.device) -> None:
    """Take up all of a file of ours, and print where the run will not go on bit for bit.

    Raises RunFailed where the ranks have read different files.
    """
    same = parts.restore(content, device)
    if len(set(dist.gather_objects((parts.position.epoch, parts.position.step)))) > 1:
        raise RunFailed(
            f"the ranks read different states out of '{path}': a shared file system that lags"
            " behind? Start again"
        )
    if not same:
        ranks.say(
            f"=> '{files.shown(path)}' was saved by {len(content['isl']['rng'])} ranks, here are"
            f" {dist.world_size()}: going on, but not bit for bit"
        )


def warn_of_labels(content: dict, path: str) -> None:
    flags = content.get("args")
    if not isinstance(flags, dict):
        return
    used = ["--research-labels"] if flags.get("research_labels") is True else []
    used += ["--isl-check"] if flags.get("isl_check") else []
    if used:
        ranks.say(
            f"=> warning: labels were used in the training of '{files.shown(path)}'"
            f" ({', '.join(used)}), and so in what is made of it here"
        )


def initialise(
    parts: resume.Parts,
    content: dict,
    dataset: str,
    features: Callable[[nn.Module], torch.Tensor],
) -> None:
    """Begin a new run from the file of another: its objective takes over what it can use.

    features(encoder): a pass over all images -> [M, C] unit rows.
    """
    ours = content.get("isl", {})
    flags = content.get("args", {})
    same_images = bool(ours) and ours.get("images") == parts.images
    same_images = same_images and flags.get("dataset") == dataset
    parts.isl.start_from(ours.get("state", {}), same_images, features)


@torch.no_grad()
def refill_queue(parts: resume.Parts, reader: Reader) -> None:
    """Fill the queue from one feature pass of the key encoder.

    The images are random; where the queue is longer than the data set, each comes several times.
    """
    model = parts.model
    try:
        rows = reader.features(model.encoder_k)  # [M, C]
    except Interrupted:
        raise Interrupted(
            "before the first step, so there was nothing to save: give the same command again"
        ) from None
    generator = torch.Generator().manual_seed(reader.settings.seed)
    order = torch.randperm(reader.M, generator=generator).to(reader.device)
    begin = int(model.queue_ptr)
    while begin < model.K:
        chosen = order[: model.K - begin]
        parts.isl.slots.write(model.enqueue(rows[chosen]), chosen)
        begin += len(chosen)


# ---- what a user should know before the first step


def warnings(
    parts: resume.Parts,
    reader: Reader,
    plan: Plan,
    *,
    arch: str,
    stem: str,
    research_labels: bool,
    idle: list[str],
) -> list[str]:
    """What a run of these settings does that its user may not expect; each is one line.

    idle: flags that were given and change nothing.
    """
    M = reader.M
    model = parts.model
    lines = []
    if research_labels:
        lines.append(
            "warning: --research-labels: the positives of this run are drawn from the labels; what"
            " it reaches is no result without labels"
        )
    if isinstance(model, MoCo) and model.K > M:
        step = reader.settings.batch_size * parts.isl.directions
        suits = max(step, 2 ** ((M // 2).bit_length() - 1))
        lines.append(
            f"warning: the queue ({model.K}) is longer than the data set ({M}): {model.K / M:.1f}"
            f" of its keys are an image's own"
            + (f"; --moco-k {suits} would suit it" if suits < model.K else "")
        )
    if not as_in_library(model.encoder_q, arch):
        library = "timm" if arch.startswith("timm:") else "torchvision"
        pixels = reader.settings.pixels
        channels = "" if pixels.channels == 3 else f", {pixels.channels} channels"
        lines.append(
            f"warning: {library} has no {arch.removeprefix('timm:')} of this shape (--stem {stem},"
            f" side {reader.images.side}{channels}), and cannot read what is trained here: its"
            " backbone goes to safetensors and to this project's own scripts"
        )
    if plan.knn_every and (reader.labels is None or not (reader.labels >= 0).any()):
        lines.append("warning: --knn-every without labels: nothing to judge by")
    if idle:
        lines.append(
            f"warning: without --miner nothing is mined, and {', '.join(idle)} changes nothing"
        )
    exact = plan.mines and not research_labels and getattr(parts.miner, "index", "") == "exact"
    if exact and parts.miner.searches and ivf.wins(M, reader.device):
        lines.append(
            f"{M} images are searched exactly, which takes a time that grows with their square:"
            " --isl-index ivf would be faster"
        )
    if plan.mines and plan.isl_start >= plan.epochs:
        lines.append(
            f"warning: --isl-start {plan.isl_start} is past the last epoch of --epochs"
            f" {plan.epochs}: nothing will be mined"
        )
    return lines


# ---- the epochs


def train(
    parts: resume.Parts,
    reader: Reader,
    plan: Plan,
    numerics: Numerics,
    journal: Journal,
    save: Saver,
    stop: Stop,
    judges: Judges,
) -> None:
    """Train to the end of the plan, with the rounds of mining and the saves that are due.

    It starts at the position of the parts. Raises Interrupted after saving, when any rank was asked
    to stop, and RunFailed where the run cannot go on.
    """
    isl = parts.isl
    position = parts.position
    journal.say(
        f"=> {reader.M} images, {len(reader.loader)} steps an epoch, {dist.world_size()} x"
        f" {reader.device}, seed {reader.settings.seed}, files in {files.shown(save.flags['out'])}"
    )
    for epoch in range(position.epoch, plan.epochs):
        for group in parts.optimizer.param_groups:
            group["lr"] = plan.rate(epoch)
        isl.turn = epoch
        isl.active = plan.mined(epoch)
        # a late start has missed rounds, and makes up for the last of them
        number = plan.rounds(epoch)
        if position.step == 0 and isl.round < number:
            mine(parts, reader, plan, journal, save, stop, epoch, number)
        if position.step == 0:
            begin_epoch(parts, reader, journal, save, stop, epoch)
        with fast.numerics(numerics.fast, reader.device):
            finished = engine.train_one_epoch(
                isl,
                reader.loader,
                parts.optimizer,
                parts.scaler,
                position,
                device=reader.device,
                stop=stop,
                progress=journal.progress,
                log=journal.log,
                save=save,
                last_good=save.last_good,
                amp=numerics.amp,
                channels_last=numerics.channels_last,
                print_freq=plan.print_freq,
                save_every=plan.save_every,
                max_steps=plan.max_steps,
            )
        if not finished:
            save()
            return
        end_of_epoch(parts, reader, plan, journal, save, judges)
    if plan.mines and journal.outcome is not None and journal.outcome[1] is not None:
        with contextlib.suppress(Interrupted):  # all is saved already
            features = features_to_mine(isl, reader, plan)
            views = reader.views(isl.encoder, plan.epochs)
            say_outcome(journal, effective_rank(features), apart(views))


def mine(
    parts: resume.Parts,
    reader: Reader,
    plan: Plan,
    journal: Journal,
    save: Saver,
    stop: Stop,
    epoch: int,
    number: int,
) -> None:
    """Mine the plan's round of this number, before an epoch. Raises Interrupted after saving."""
    isl = parts.isl
    miner = parts.miner
    before = isl.positives
    miner_before = copy.deepcopy(miner.state_dict())
    generators = resume.rng_of_ranks(reader.device)
    try:
        features = features_to_mine(isl, reader, plan)  # [M, C]
        views = reader.views(isl.encoder, epoch) if miner.wants_views else None  # 2 x [M, C]
        report = engine.mine_round(
            isl, miner, features, reader.labels, reader.settings.seed, stop, views, number=number
        )
    except Interrupted:  # all is put back as it was before the round
        miner.load_state_dict(miner_before)
        resume.restore_rng(generators, reader.device)
        save()
        raise Interrupted(
            f"saved before the mining of epoch {epoch}: go on with --resume auto"
        ) from None
    keep = lambda: keep_round(parts, features, before, reader.labels, journal.folder)
    report.precision_ranked = ranks.on_main(keep)
    journal.say(f"=> {report}")
    say_outcome(journal, report.effective_rank, report.apart)
    journal.log(kind="round", epoch=epoch, **report.figures())
    save()


def features_to_mine(isl: Objective, reader: Reader, plan: Plan) -> torch.Tensor:
    """[M, C]: the features that a round mines from, see --isl-from."""
    if plan.isl_from == "bank" and isl.bank.filled:
        return isl.bank.rows
    return reader.features(isl.encoder)


def begin_epoch(
    parts: resume.Parts, reader: Reader, journal: Journal, save: Saver, stop: Stop, epoch: int
) -> None:
    """Let the objective get ready for an epoch. Raises Interrupted after saving."""
    isl = parts.isl
    features = lambda: reader.features(isl.encoder, normalize=False)  # [M, D]
    try:
        report = isl.begin_epoch(epoch, features, parts.optimizer, reader.labels, stop.tick)
    except Interrupted:
        save()
        raise Interrupted(f"saved before epoch {epoch}: go on with --resume auto") from None
    if report is not None:
        journal.say(f"=> epoch {epoch}: {report}")
        known = {name: value for name, value in vars(report).items() if value is not None}
        journal.log(kind=report.kind, epoch=epoch, **known)


def outcome_before(folder: Path, size: int) -> tuple[float, float | None] | None:
    """What the last round in a folder's metrics.jsonl says of the features, see `say_outcome`.

    size: bytes that were logged when the run was saved. None where the file does not tell.
    """
    last = logs.last_round(folder, size)
    rank, between = (last.get(name) for name in ("effective_rank", "apart"))
    return None if rank is None else (rank, between)


def say_outcome(journal: Journal, rank: float | None, between: float | None) -> None:
    """Say what the epochs since the round before have done to the features, without labels.

    rank, between: their `effective_rank` and how far `apart` their views are; None: not known.
    """
    before = journal.outcome
    journal.outcome = None if rank is None else (rank, between)
    if before is None or None in (rank, between, before[1]):
        return
    journal.say(
        f"=> since the round before: effective rank {before[0]:.1f} to {rank:.1f}, other images"
        f" between two views of one {100 * before[1]:.2f} % to {100 * between:.2f} %"
    )
    if rank < 0.95 * before[0] and between > max(1.25 * before[1], before[1] + 0.005):
        journal.say(
            "=> warning: the features lost directions and know an image less well than before: the"
            " positives may do harm; compare with as many epochs of --miner none"
        )


def keep_round(
    parts: resume.Parts,
    features: torch.Tensor,
    before: PositiveSets,
    labels: torch.Tensor | None,
    folder: RunFolder,
) -> dict[str, float] | None:
    """Write the record of a round, and return the precision of the miner's own ranking.

    There is a precision only where there are labels. features [M, C]: what was mined from. before:
    the sets with which the round began.
    """
    record = round_record(features, parts.isl.positives, parts.miner, before)
    folder.save_round(parts.isl.round, record)
    return None if labels is None else precision_of_ranking(record, labels)


def end_of_epoch(
    parts: resume.Parts,
    reader: Reader,
    plan: Plan,
    journal: Journal,
    save: Saver,
    judges: Judges,
) -> None:
    """Finish an epoch: a look at its features, kNN, probe and checkpoint where they are due."""
    position = parts.position
    epoch = position.epoch
    values = position.averages.epoch()
    mean_cosine = parts.isl.mean_cosine()
    if mean_cosine is not None:
        values["mean_cosine"] = mean_cosine
    values |= look(parts, reader, journal, values)
    try:
        values |= judge_epoch(parts.model.encoder_q, reader, plan, epoch, judges)
    except Interrupted:
        save()
        raise Interrupted(f"saved at the end of epoch {epoch}: go on with --resume auto") from None
    for name, words in (("knn", "weighted kNN"), ("probe", "linear probe of the backbone")):
        if name in values:
            journal.say(f"=> epoch {epoch}: {words} {values[name]:.2f} %")
    journal.log(kind="epoch", epoch=epoch, total=position.total, **values)
    position.epoch = epoch + 1
    position.step = 0
    position.averages = Averages()
    if (epoch + 1) % plan.save_epochs == 0 or epoch + 1 == plan.epochs:
        save(epoch)


@torch.no_grad()
def look(parts: resume.Parts, reader: Reader, journal: Journal, values: dict) -> dict[str, float]:
    """Say what the features and the loss of an epoch look like; returns figures for its log.

    values: means of the epoch. Nothing is computed on ranks other than 0, which print nothing.
    """
    isl = parts.isl
    features = isl.recent_features()  # [n, C]
    if features is None or len(features) < 2 or not dist.is_main():
        return {}
    found = health.figures_of(features)
    counts = isl.negatives()
    epoch = parts.position.epoch
    line = f"=> epoch {epoch}: {health.words(found, values, features.shape[1])}"
    words = [health.alike(values.get("mean_cosine"), journal.mean_cosine)]
    if counts is not None and len(features) >= counts[0]:
        band = health.band_of(*counts, parts.model.T, features.shape[1])
        loss = values["isl"] / isl.directions
        found |= {"loss_low": isl.directions * band.low, "loss_high": isl.directions * band.high}
        steps = parts.position.total - counts[0] // (reader.settings.batch_size * isl.directions)
        line += f"; loss {loss:.2f}, normal is {band.low:.2f} to {band.high:.2f}"
        words.append(health.word_of(band.place(loss), steps, len(reader.loader)))
    journal.mean_cosine = values.get("mean_cosine", journal.mean_cosine)
    journal.say(line)
    for word in filter(None, words):
        journal.say(f"=> warning: epoch {epoch}: {word}")
    return found


def judge_epoch(
    encoder: nn.Module, reader: Reader, plan: Plan, epoch: int, judges: Judges
) -> dict[str, float]:
    """Accuracy in per cent of kNN and of a linear probe where they are due after an epoch."""
    due = lambda every: every and reader.labels is not None and (epoch + 1) % every == 0
    found = {}
    if due(plan.knn_every):
        knn = knn_accuracy(reader, encoder, judges.knn)
        found |= {} if knn is None else {"knn": knn}
    if due(plan.probe_every):
        found["probe"] = probe_accuracy(reader, encoder, judges.probe)
    return found


def probe_accuracy(reader: Reader, encoder: nn.Module, judge: Callable[..., float]) -> float:
    """Accuracy in per cent of a linear probe of the backbone on the images held out."""
    held_out = reader.images.held_out
    with without_head(encoder):
        features = reader.features(encoder)  # [M, C]
        queries = reader.features(encoder, held_out)
    truth = held_out.labels.to(reader.device)
    fit = lambda: judge(features, reader.labels, queries, truth)
    return dist.broadcast_object(ranks.on_main(fit))


def with_labels(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [M, C] and labels [M] of the images whose label is known, not below 0."""
    known = labels >= 0
    return (features, labels) if known.all() else (features[known], labels[known])


def knn_accuracy(
    reader: Reader, encoder: nn.Module, judge: Callable[..., torch.Tensor]
) -> float | None:
    """Accuracy in per cent of weighted kNN (k 200, T 0.1) by the encoder's features.

    The images held out are classified, or each training image by all others where none are held
    out. Images without a label neither vote nor count; None where none is left. judge:
    `evaluation.knn.weighted_knn`. The caller hands it in because evaluation imports training.
    """
    held_out = reader.images.held_out
    bank, labels = with_labels(reader.features(encoder), reader.labels)
    queries, truth = bank, labels
    if held_out is not None:
        features = reader.features(encoder, held_out)
        queries, truth = with_labels(features, held_out.labels.to(reader.device))
    alone = held_out is None
    k = min(200, len(bank) - alone)
    if k < 1 or not len(queries):
        return None
    found = judge(queries, bank, labels, k=k, T=0.1, leave_one_out=alone)
    return (found == truth).float().mean().item() * 100
