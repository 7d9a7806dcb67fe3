"""Resume a run as if it had never stopped.

Here is which file a run starts from, which flags may change meanwhile, and all that a run keeps in
order to go on.
"""

import argparse
import hashlib
import random
from collections.abc import Container
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from moco_isl import data, dist, files
from moco_isl.errors import BadInput
from moco_isl.objectives.base import Objective
from moco_isl.options import dashed, typed_flags
from moco_isl.run import checkpoint, ranks, weights
from moco_isl.run.backbone import flags_known
from moco_isl.run.flags import Given
from moco_isl.run.folder import RunFolder, flags_of_unsaved, newest
from moco_isl.run.meters import Averages
from moco_isl.training.engine import Position, learning_rate
from moco_isl.training.fast import load_optimizer
from moco_isl.training.options import MAY_CHANGE, OF_A_START, default_flags
from moco_isl.training.state import require_flags, require_start


def check_same(
    saved: dict,
    now: dict,
    otherwise: str = "start a new run with --init and another --out",
    *,
    epochs: int | None = None,
    may_change: Container[str] = MAY_CHANGE,
) -> None:
    """Raise BadInput where flags of the saved run and of this one differ and are not among those
    that `may_change`.

    It names both values of each, and what to do `otherwise`. --epochs may grow where what the saved
    run has done stays as it was. epochs: how many it has begun (None: all).
    """
    changed = [
        name
        for name in saved
        if name not in may_change and name in now and saved[name] != now[name]
    ]
    why = ""
    if "epochs" in changed and now["epochs"] > (saved["epochs"] or 0):
        begun = saved["epochs"] or 0 if epochs is None else epochs
        why = _what_more_epochs_change(saved, now, begun)
        if not why:
            changed.remove("epochs")
    if changed:
        pairs = ", ".join(
            f"--{dashed(name)} was {saved[name]!r} and is now {now[name]!r}" for name in changed
        )
        pairs += f" ({why})" if why else ""
        raise BadInput(
            f"cannot resume with other settings: {pairs}. Give the same flags, or {otherwise}"
        )


def _what_more_epochs_change(saved: dict, now: dict, epochs: int) -> str:
    """What the new --epochs would have changed in the part that is already trained; '' for nothing.

    It compares the learning rates of the first `epochs` epochs, and the schedule of mining.
    """
    for epoch in range(epochs):
        before, after = (_relative_rate(epoch, flags) for flags in (saved, now))
        if before != after:
            return (
                f"epoch {epoch} would have been trained at {after / before:.3g} times its learning"
                " rate"
            )
    rounds = saved.get("isl_rounds", 1)
    length = (saved["epochs"] or 0) // rounds
    longer = now["epochs"] // rounds
    mines = saved.get("miner", "none") != "none"
    if rounds > 1 and mines and saved.get("isl_every") == length != longer:
        return (
            f"it mines every {length} epochs, between its rounds of training, which would have"
            f" {longer} epochs"
        )
    return ""


def _relative_rate(epoch: int, flags: dict) -> float:
    """The learning rate of an epoch as a share of --lr."""
    return learning_rate(
        epoch,
        lr=1.0,
        epochs=flags["epochs"],
        cos=flags.get("cos", False),
        schedule=flags.get("schedule") or [],
        rounds=flags.get("isl_rounds") or 1,
        warmup=flags.get("warmup_epochs") or 0,
    )


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    path: a file or a Hugging Face folder, None: nothing. goes_on: the run is resumed, not only
    initialised. in_place: the run in the folder is the one that is resumed. seen: a stamp of the
    newest checkpoint in that folder, to notice a later one. unsaved: the flags of the run in that
    folder, where it ended before its first checkpoint. says: lines on the flags that were taken
    from the file.
    """

    path: str | None = None
    goes_on: bool = False
    in_place: bool = False
    seen: tuple = ()
    unsaved: dict = field(default_factory=dict)
    says: tuple[str, ...] = ()


def find_start(
    resume: str, init: str | None, out: str | None, flags: dict | None = None
) -> tuple[Start, dict]:
    """Find the file that --resume or --init names, and read it: the only time that it is read.

    --resume is a file, a run's folder, "auto" or "". out: None for a folder that is yet to be made.
    flags: the shape of a run's flags, see `state.flags_shape`; None: any. Raises BadInput where the
    file cannot be read, and where going on from it would overwrite what the run in `out` has
    reached since. Call `require_unchanged` once the folder is held: another run may have used it
    since.
    """
    if resume not in ("", "auto") and init:
        raise BadInput("--resume goes on with a run, --init starts one: give only one of them")
    last = None
    if out is not None:
        files.require_folder(out, "--out")
        last = newest(out)
    auto = resume == "auto"
    seen = _stamp(last)
    if auto and last is not None:
        return Start(str(last), True, True, seen), _read(str(last), "resume")
    init = _found(init, "init") if init else init
    if auto:
        unsaved = flags_of_unsaved(out, flags)
        return Start(init, False, True, seen, unsaved), _read(init, "init") if init else {}
    if not resume:
        return Start(init), _read(init, "init") if init else {}
    resume = _found(resume, "resume")
    content = _read(resume, "resume")
    there = out is not None and Path(out).exists()
    in_place = there and Path(resume).resolve().parent.samefile(out)
    if in_place and last is not None and not last.samefile(resume):
        _require_newest(content, resume, last)
    return Start(resume, True, in_place, seen), content


def read(start: Start) -> dict:
    """What is in the file of a start that another rank has found. Raises BadInput."""
    return _read(start.path, "resume" if start.goes_on else "init")


def _found(path: str, flag: str) -> str:
    """The path, or the newest checkpoint of the run in a folder. Raises BadInput for nothing."""
    if not files.kind(path, f"--{flag}"):
        raise BadInput(
            f"no file at --{flag} '{path}': expected a checkpoint; check the path (nothing was"
            " started)"
        )
    return str(weights.run_file(path))


def _read(path: str, flag: str) -> dict:
    content = checkpoint.load(path) if flag == "resume" else weights.read(path)
    require_start(content, path, flag == "resume")
    return content


def _require_newest(content: dict, path: str, last: Path) -> None:
    """Raise BadInput where a run's last file has gone further than the one to be resumed."""
    there = checkpoint.load(last, mmap=True)
    require_start(there, last, True)
    if _reached(content) < _reached(there):
        at = "epoch {}, {} steps".format
        raise BadInput(
            f"--resume '{path}' ({at(*_reached(content))}) is older than {last}"
            f" ({at(*_reached(there))}), and going on from it would overwrite what came after: use"
            " --resume auto, or choose another --out"
        )


def _stamp(path: Path | None) -> tuple:
    if path is None:
        return ()
    found = path.stat()
    return path.name, found.st_ino, found.st_size, found.st_mtime_ns


def saved_flags(start: Start, content: dict, parser: argparse.ArgumentParser) -> dict:
    """The flags of the pretraining that a start goes on with; {} where it begins a new one.

    content: of its file. Raises BadInput for a file of another script, and for flags that are not
    those of the parser.
    """
    if "probe" in content:
        raise BadInput(
            f"'{start.path}' is a linear probe of main_lincls.py: expected a pretraining file, such"
            " as the one it was trained on"
        )
    if not start.goes_on or "isl" not in content:
        return start.unsaved
    require_flags(content, start.path, parser)
    return content["args"]


def settle_flags(
    flags: Given, start: Start, content: dict, parser: argparse.ArgumentParser
) -> Start:
    """Give flags that were neither typed nor in a config the values that the start's file knows.

    Of a run that goes on these are all but those `OF_A_START`; of any other file those of the
    network. A file of an earlier version of ours lacks flags: the default of each is what it was
    trained with, and is added to its own. Returns the start, with the lines that say so. Raises
    BadInput for flags in the file that are not those of the parser.
    """
    saved = saved_flags(start, content, parser)
    lines = []
    if saved and not start.unsaved:
        defaults = default_flags(saved.get("miner", "none"))
        lacks = {n: x for n, x in defaults.items() if n not in saved and x is not None}
        content["args"] = saved = {**saved, **lacks}
        if lacks := {n: x for n, x in lacks.items() if n not in MAY_CHANGE}:
            lines.append(
                f"=> '{files.shown(start.path)}' does not say {_typed(lacks)}: these defaults are"
                " taken for what it was trained with"
            )
    elif start.path and not saved:
        of = {name: getattr(flags, name) for name in ("arch", "stem") if name in flags.given}
        saved = flags_known(content, start.path, of.get("arch"), of.get("stem"))
        if not start.goes_on:  # a new run has its own images, and its queue follows their number
            saved.pop("moco_k", None)
    taken = take_over(flags, saved)
    if taken:
        lines.append(f"=> flags of '{files.shown(start.path or flags.out)}': {_typed(taken)}")
    return replace(start, says=tuple(lines))


def take_over(flags: Given, saved: dict) -> dict:
    """Set the flags that were not given to what was saved; returns those that it made differ.

    They differ from their defaults. A flag without a default that the run filled in, such as a
    drawn seed, is set too, and not returned.
    """
    miner = flags.miner if "miner" in flags.given else saved.get("miner", flags.miner)
    taken = {}
    for name, default in default_flags(miner).items():
        if name in flags.given or name in OF_A_START:
            continue
        value = saved.get(name, getattr(flags, name, default))
        setattr(flags, name, value)
        if default is not None and value != default and name in saved:
            taken[name] = value
    return taken


def _typed(flags: dict) -> str:
    """Flags as they would be typed."""
    return files.shown(" ".join(typed_flags(dict(sorted(flags.items())))))


def check_flags(start: Start, content: dict, now: dict) -> None:
    """Raise BadInput where flags of the resumed run differ from `now` and may not."""
    check_unsaved(start, now)
    ours = content.get("isl")
    if start.goes_on and ours:
        begun = ours["epoch"] + bool(ours["step"])
        check_same(content["args"], now, epochs=begun)


def check_unsaved(start: Start, now: dict, may_change: Container[str] = MAY_CHANGE) -> None:
    """Raise BadInput where this run would overwrite one that ended before its first checkpoint.

    It would where that run had other values of flags that are not in `may_change`.
    """
    check_same(
        start.unsaved,
        now,
        "choose another --out: that run ended before its first checkpoint, and starting anew would"
        " overwrite its metrics.jsonl",
        may_change=may_change,
    )


def require_unchanged(start: Start, out: str) -> None:
    """Raise BadInput where another run was in `out` since `find_start` looked.

    To be asked when the folder is held.
    """
    if not start.in_place:
        return
    if _stamp(newest(out)) != start.seen:
        raise BadInput(
            f"--out '{out}': another run has saved {newest(out) or 'and removed checkpoints'} while"
            " this one was starting: give the same command again"
        )
    if flags_of_unsaved(out) != start.unsaved:
        raise BadInput(
            f"--out '{out}': another run was in it while this one was starting: give the same"
            " command again"
        )


def take_folder(out: str, start: Start, keep: int | None = None) -> RunFolder | None:
    """The run's folder, held from now on; None on every rank but 0.

    Raises BadInput where another run has it, or has written there since `find_start` looked.
    """

    def take() -> RunFolder:
        folder = RunFolder(out, start.in_place, keep)
        try:
            require_unchanged(start, out)
        except BadInput:
            folder.close()
            raise
        return folder

    return ranks.on_main(take)


def epoch_of(content: dict) -> int | None:
    """The epoch that comes next after a file; None where the file does not say."""
    epoch = content.get("epoch")
    return epoch if isinstance(epoch, int) and not isinstance(epoch, bool) else None


def _reached(content: dict) -> tuple[int, int]:
    """(epoch, steps in all), to compare files of one run."""
    ours = content.get("isl") or content.get("probe") or {}
    return epoch_of(content) or 0, ours.get("total", 0)


def finished(start: Start, content: dict, epochs: int, max_steps: int) -> str:
    """How far the run to be resumed is, where nothing is left to do; '' otherwise.

    Raises BadInput where nothing is left to do and the file is not of the run in the folder.
    """
    epoch = epoch_of(content) or 0
    steps = content.get("isl", {}).get("total", 0)
    if not start.goes_on or epoch < epochs and not 0 < max_steps <= steps:
        return ""
    if start.in_place and epoch >= epochs:
        return f"epoch {epoch} of {epochs}"
    if start.in_place:
        return f"{steps} steps of --max-steps {max_steps}"
    more = f" or --max-steps {max_steps}" if max_steps else ""
    raise BadInput(
        f"'{start.path}' has been trained for {epoch} epochs ({steps} steps), which leaves nothing"
        f" to do: raise --epochs {epochs}{more}, or start anew from its weights with --init"
    )


def images_of(dataset) -> str:
    """A digest of the names of these images below their folder, in order; contents do not count."""
    names = "\0".join(data.names_below(dataset))
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def labels_of(miner) -> str | None:
    """A digest of the labels that --isl-check names; None where it names none."""
    known = getattr(miner, "known", None)
    return None if known is None else hashlib.sha256(str(known.tolist()).encode()).hexdigest()


def rng_of_ranks(device: torch.device, averages: Averages | None = None) -> list[dict]:
    """The states of the random generators of every rank, in rank order; all ranks get them.

    The state of the averages is among them, because it differs between the ranks too.
    """
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if averages is not None:
        state["averages"] = averages.state_dict()
    return dist.gather_objects(state)


def restore_rng(states: list[dict], device: torch.device, averages: Averages | None = None) -> bool:
    """Put this rank's generators, and its averages, back.

    Returns False where there are more or fewer ranks than when the states were saved: then the
    generators stay as they are, and all ranks take the averages of rank 0.
    """
    same = len(states) == dist.world_size()
    state = states[dist.rank() if same else 0]
    if averages is not None:
        averages.load_state_dict(state["averages"], device)
    if not same:
        return False
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    return True


@dataclass
class Parts:
    """What a checkpoint holds the state of."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    isl: Objective
    miner: object  # see mining.rounds.Miner
    images: str  # see images_of
    position: Position
    labels: str | None = None  # see labels_of

    def state(self, flags: dict, generators: list[dict], metrics_size: int) -> dict:
        """What a file holds: MoCo's keys, and what an exact resume needs.

        generators: of `rng_of_ranks`; metrics_size: bytes of metrics.jsonl by now.
        """
        ours = {
            "state": self.isl.state_dict(),
            "miner": self.miner.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": generators,
            "epoch": self.position.epoch,
            "step": self.position.step,
            "total": self.position.total,
            "num_images": self.isl.positives.num_images,
            "images": self.images,
            "metrics_size": metrics_size,
        }
        if self.labels is not None:
            ours["labels"] = self.labels
        return {
            "epoch": self.position.epoch,
            "arch": flags["arch"],
            "state_dict": checkpoint.model_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "args": flags,
            "isl": ours,
        }

    def restore(self, content: dict, device: torch.device) -> bool:
        """Take up everything but the model's state from a file of ours.

        Returns whether the run goes on bit for bit: it does not where the number of ranks has
        changed.
        """
        ours = content["isl"]
        load_optimizer(self.optimizer, content["optimizer"])
        self.isl.load_state_dict(ours["state"])
        self.miner.load_state_dict(ours["miner"])
        self.scaler.load_state_dict(ours["scaler"])
        self.position.epoch = ours["epoch"]
        self.position.step = ours["step"]
        self.position.total = ours["total"]
        return restore_rng(ours["rng"], device, self.position.averages)
