"""The shapes of all that a checkpoint of ours holds beside the weights.

A file is compared with them once, when it is read and before it is used. `resume.Parts.state`
writes the file of a pretraining; `evaluation.probing` has that of a probe. An objective and a miner
have the shape of their own state, `state_shape`, next to their `state_dict`. `checkpoint.match`
checks the weights.

Letters: M images, C feature dimension.
"""

import argparse
import random

import torch
from torch import nn

from moco_isl.bank import QueueSlots
from moco_isl.errors import BadInput
from moco_isl.files import named
from moco_isl.schema import COUNT, EARLIER, LARGEST, Holds, Number, Tensor, require

ANEW = f"{EARLIER}, or start a new run from its weights with --init"
SMALLEST = torch.finfo(torch.float32).tiny

# ---- checks of any file, before flags, images and network are known


POSITION = {
    "epoch": COUNT,
    "step": COUNT,
    "total": COUNT,
    "metrics_size": COUNT,
    ...: object,
}
BEGUN = {
    **POSITION,
    "state": {"round?": COUNT, ...: object},
    "num_images?": Number(1, LARGEST, whole=True),
    "images?": str,
    "labels?": str,
}
START = {
    "epoch?": object,
    "args?": object,
    "isl?": BEGUN,
    "probe?": POSITION,
    ...: object,
}
OURS = {**START, "epoch": COUNT, "arch": str, "args": dict}


def where(path) -> str:
    return f"cannot read the state in {named('', path)}"


def require_start(content: dict, path, resume: bool) -> None:
    """Check the parts of a file to start from that are read first. Raises BadInput."""
    shape = START
    if "isl" in content or "probe" in content:
        shape = OURS
    elif resume:
        shape = {**START, "epoch?": COUNT}
    require(content, shape, where(path), cure=_cure(content) if resume else EARLIER)


def _cure(content: dict) -> str:
    """What to do with a file that no run can go on from: it is damaged, or of another version."""
    return ANEW if "isl" in content else EARLIER


def require_flags(
    content: dict,
    path,
    parser: argparse.ArgumentParser,
    known: tuple[str, ...] = (),
) -> None:
    """Check the flags (`args`) in a file of ours against the script's parser. Raises BadInput.

    The file's epoch is checked against the run that they describe. A file of an earlier version
    may lack flags, but not the number of epochs, the batch, and those `known`, which are never
    None.
    """
    shape = flags_shape(parser)
    shape |= {name: shape.pop(f"{name}?")[0] for name in known}
    for name in ("epochs", "batch_size"):
        shape.pop(f"{name}?", None)
        shape[name] = Number(1, LARGEST, whole=True)
    by_name = lambda flags: all(isinstance(name, str) for name in flags)
    texts = Holds(shape, by_name, "flags by name")
    cure = _cure(content)
    require(content["args"], texts, f"cannot read the flags in {named('', path)}", cure=cure)
    epoch = content["epoch"]
    epochs = content["args"]["epochs"]
    if epoch > epochs:
        raise BadInput(
            f"{where(path)}: epoch is {epoch}, and its own --epochs are {epochs}; {cure}"
        )


def flags_shape(parser: argparse.ArgumentParser, optional: set[str] | None = None) -> dict:
    """The shape of `vars` of a parser's flags.

    A flag that was not given is None, and there may be flags that the parser does not know.
    optional: flags that need not be there; None: all of them. Flags of one choice of another flag,
    such as a miner's, are always optional: only that choice has them.
    """

    def one(action: argparse.Action):
        if action.nargs == 0:
            return bool
        if action.choices:
            return set(action.choices)
        if action.type in (int, float):
            kind = Number(-LARGEST - 1, LARGEST, whole=True) if action.type is int else float
            return [kind] if action.nargs in ("*", "+") else kind
        several = action.nargs in ("*", "+")
        if several and not action.option_strings:
            return (str, [str])  # see `options.one_or_more`
        # a word with a meaning of its own, such as a list of numbers
        if action.type not in (None, str) and not several:
            return (str, [Number(-LARGEST - 1, LARGEST, whole=True)])
        return [str] if several else str

    actions = [a for a in parser._actions if a.default is not argparse.SUPPRESS]
    free = lambda a: optional is None or a.dest in optional or hasattr(a, "owners")
    return {a.dest + "?" * free(a): (one(a), None) for a in actions} | {...: object}


# ---- generators and means of every rank


def _cpu_generator(x: torch.Tensor) -> bool:
    torch.Generator().set_state(x.cpu())
    return x.dtype == torch.uint8


def _gpu_generator(x: torch.Tensor) -> bool:
    if torch.cuda.is_available():
        torch.Generator("cuda").set_state(x.cpu())
    return x.dtype == torch.uint8


def _python_generator(x: tuple) -> bool:
    version, words, gauss = x
    random.Random().setstate(x)
    return (
        version == 3
        and all(0 <= word < 2**32 for word in words)
        and (gauss is None or isinstance(gauss, float))
    )


def _go_together(averages: dict) -> bool:
    names = averages["names"]
    sums = averages["sums"]
    read = averages["read"]
    if sums is None or read is None:
        return sums is read and not names
    return (
        "loss" in names
        and len(names) == len(set(names)) == len(sums) - 1 == len(read) - 1
        and 0 <= read[-1] <= sums[-1] < float("inf")
    )


ANY = Number(finite=False)  # the mean of a classifier whose loss is not finite
AVERAGES = Holds(
    {"names": [str], "sums": ([ANY], None), "read": ([ANY], None)},
    _go_together,
    "as many sums as names, and how many images",
)
RANK = {
    "torch": Holds(Tensor("int", (None,)), _cpu_generator, "the state of torch's generator"),
    "python": Holds(list, _python_generator, "the state of Python's generator"),
    "cuda?": Holds(Tensor("int", (None,)), _gpu_generator, "the state of a GPU's generator"),
    "averages": AVERAGES,
}
RANKS = Holds([RANK], len, "one state a rank or more")


def position_shape(steps: int | None, epoch: int) -> dict:
    """The shape of a position in an epoch of so many steps, None if that is unknown."""
    steps = LARGEST if steps is None else steps
    return {
        "epoch": {epoch},
        "step": Number(0, steps, whole=True),
        "total": Number(0, min(LARGEST, (epoch + 1) * steps), whole=True),
    }


STEPS_AGREE = "means of an epoch that has begun, and no more steps in it than in all"


def steps_agree(ours: dict) -> bool:
    """Whether the counts of steps in the state of a run agree with each other.

    Every rank must have averages where an epoch has begun, and no more steps may be taken in it
    than in all.
    """
    counted = all(rank["averages"]["sums"] is not None for rank in ours["rng"])
    return ours["step"] <= ours["total"] and (counted or not ours["step"])


# ---- a pretraining


def require_state(
    content: dict,
    path,
    *,
    isl,
    parameters: list[nn.Parameter],
    miner: dict,
    M: int,
    batch_size: int,
    optimizer: str,
    momentum: float,
    fp16: bool,
) -> None:
    """Check a pretraining file of ours against the run that is to go on from it. Raises BadInput.

    `require_start` has checked the file before. isl, miner: the shape that `state_shape` of either
    gives. parameters: those of the optimizer, on any device. Everything else follows from the run's
    flags.
    """
    steps = -(-M // batch_size)
    epoch = content["epoch"]
    ours = {
        "state": isl,
        "miner": miner,
        "scaler": _scaler(fp16),
        "rng": RANKS,
        **position_shape(steps, epoch),
        "num_images": {M},
        "images": str,
        "labels?": str,
        "metrics_size": COUNT,
    }
    ours = Holds(ours, steps_agree, STEPS_AGREE)
    rounds_fit = lambda ours: ours["state"].get("round", 0) <= epoch + 1
    ours = Holds(ours, rounds_fit, "a round an epoch at most")
    whole = {**OURS, "state_dict": dict, "optimizer": dict, "isl": ours}
    require(content, whole, where(path), {"M": M}, ANEW)
    # with fp16 the first steps may all have been left out, until the scaler's scale fits
    adamw = optimizer == "adamw"
    moved = bool((momentum or adamw) and content["isl"]["total"] and not fp16)
    require_optimizer(content["optimizer"], path, [parameters], moved, adamw=adamw)


def require_queue(content: dict, path, model: nn.Module, M: int | None) -> None:
    """Check what a file of ours says of its queue's keys against the MoCo that starts from it.

    M: how many images, where the file was trained on the same; else None. Raises BadInput.
    """
    shape = {
        "isl": {"state": {"slots?": QueueSlots.state_shape(model.K), ...: object}, ...: object},
        ...: object,
    }
    require(content, shape, where(path), {} if M is None else {"M": M}, EARLIER)


def _scaler(enabled: bool) -> dict:
    fixed = torch.amp.GradScaler("cpu", enabled=enabled).state_dict()
    varies = {
        "scale": Number(SMALLEST),
        "_growth_tracker": Number(0, fixed.get("growth_interval", 0), whole=True),
    }
    return {name: varies.get(name, {value}) for name, value in fixed.items()}


def require_optimizer(
    saved: dict,
    path,
    groups: list[list[nn.Parameter]],
    moved: bool = False,
    finite: bool = True,
    adamw: bool = False,
) -> None:
    """Check the state of an SGD, ours or MoCo's, against the parameters it is for. Raises BadInput.

    moved: it must have momentum. adamw: it is that of an AdamW. finite: see `schema.Tensor`. As in
    torch's files, parameters may be named by any numbers, in the order in which the groups list
    them.
    """
    numbers = Number(whole=True)
    at = f"cannot read the optimizer in {named('', path)}"
    require(
        saved,
        {"state": dict, "param_groups": [{"params": [numbers], ...: object}], ...: object},
        at,
        cure=EARLIER,
    )
    given = [group["params"] for group in saved["param_groups"]]
    order = [number for group in given for number in group]
    if list(map(len, given)) != list(map(len, groups)) or len(set(order)) < len(order):
        raise BadInput(
            f"{at}: it is for other parameters ({_counts(given)}): expected {_counts(groups)};"
            f" {EARLIER}"
        )
    shapes = dict(zip(order, (tuple(p.shape) for group in groups for p in group)))
    kept = _of_adamw if adamw else _of_sgd
    require(
        saved["state"],
        {n: kept(shape, finite) for n, shape in shapes.items() if n in saved["state"]},
        at,
        cure=EARLIER,
    )
    name = "exp_avg" if adamw else "momentum_buffer"
    if moved and not any(kept.get(name) is not None for kept in saved["state"].values()):
        raise BadInput(
            f"{at}: it has no momentum, and steps were taken: expected that of the parameters;"
            f" {EARLIER}"
        )


def _of_sgd(dims: tuple[int, ...], finite: bool) -> dict:
    """What SGD keeps of a parameter."""
    return {"momentum_buffer?": (Tensor("float", dims, finite=finite), None)}


def _of_adamw(dims: tuple[int, ...], finite: bool) -> dict:
    """What AdamW keeps of a parameter."""
    return {
        "step": Tensor("float", (), low=0),
        "exp_avg": Tensor("float", dims, finite=finite),
        "exp_avg_sq": Tensor("float", dims, low=0, finite=finite),
    }


def _counts(groups: list) -> str:
    return " + ".join(str(len(group)) for group in groups) or "none"
