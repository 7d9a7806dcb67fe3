"""A linear probe from its first batch to results.json, and its checkpoint."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import nn

from moco_isl import data, dist
from moco_isl.errors import BadInput
from moco_isl.evaluation import linear, results
from moco_isl.evaluation.probe import Probe
from moco_isl.evaluation.subject import Resumed, Subject, head_mismatch
from moco_isl.files import shown
from moco_isl.options import opt
from moco_isl.run import checkpoint, ranks
from moco_isl.run.folder import RunFolder
from moco_isl.run.ranks import say
from moco_isl.run.signals import Stop
from moco_isl.schema import COUNT, EARLIER, Holds, Number, like, require
from moco_isl.training import engine, fast, resume, state
from moco_isl.training.options import TrainingOptions

MOCO_LR, FINETUNE_LR = 30.0, 0.01


@dataclass(kw_only=True)
class ProbeTrainingOptions(TrainingOptions):
    """MoCo's flags of the training of a classifier; those of a pretraining that are not here have
    its default.
    """

    epochs: int = opt(100, low=1, help="number of total epochs to run")
    batch_size: int = opt(
        256,
        "-b",
        "--batch-size",
        low=1,
        help="mini-batch size, the total of all GPUs on all nodes",
    )
    lr: list[float] | None = opt(
        None,
        "--lr",
        "--learning-rate",
        low=0,
        several="+",
        help=f"initial learning rate ({MOCO_LR:g}; {FINETUNE_LR:g} with --finetune), or several,"
        " trained side by side: the best is chosen on images held out of train",
    )
    schedule: list[int] = opt(
        [60, 80],
        low=0,
        several="*",
        help="learning rate schedule (when to drop lr by 10x)",
    )
    weight_decay: float = opt(0.0, "--wd", "--weight-decay", low=0, help="weight decay")
    evaluate: bool = opt(
        False,
        "-e",
        "--evaluate",
        may_change=True,
        help="evaluate the classifiers of --resume on the validation set",
    )
    mlp: bool | None = opt(
        None,
        may_change=True,
        help="warn if the file's head is not MoCo v2's MLP (--no-mlp: if it is); not needed",
    )
    out: str | None = opt(
        None, metavar="DIR", may_change=True, help="folder of the run (runs/<time>-lincls)"
    )


class Images(NamedTuple):
    """The images of a probe.

    train: to train on. held: taken out of train, to choose among learning rates by; None: none.
    val: to judge on.
    """

    train: object
    held: object | None
    val: object


class Probing:
    """Trains and judges a `Probe` of a subject, and writes its files.

    first_epoch: where a probe begins that goes on from no file. flags: `args` of the checkpoint.
    folder: of rank 0; None on the others, and where nothing is trained. Attributes: position, best
    (per cent on val of each classifier in its best epoch), batch_size and seconds of the training.
    """

    def __init__(
        self,
        probe: Probe,
        subject: Subject,
        images: Images,
        seed: int,
        first_epoch: int,
        flags: dict,
        folder: RunFolder | None,
        stop: Stop,
    ):
        self.probe = probe
        self.subject = subject
        self.images = images
        self.seed = seed
        self.first_epoch = first_epoch
        self.flags = flags
        self.folder = folder
        self.stop = stop
        self.position = engine.Position(epoch=first_epoch)
        self.best: dict[str, float] = {}
        self.batch_size: int | None = None
        self.seconds = 0.0

    # ---- going on

    def restore(self, resumed: Resumed, head: nn.Linear | None, evaluate: bool) -> None:
        """Take up the state in a file of ours or of MoCo's own probe. Raises BadInput.

        head: the classifier in the file. evaluate: the optimizer is not needed.
        """
        content, path = resumed.content, resumed.path
        if resumed.is_ours:
            self._restore_ours(content, path)
        else:
            self.probe.take_over_head(head, path)
            self.position.epoch = content.get("epoch", self.first_epoch)
            if "optimizer" in content:
                state.require_optimizer(content["optimizer"], path, self.probe.parameters())
        if "optimizer" in content and not evaluate:
            fast.load_optimizer(self.probe.optimizer, content["optimizer"])
        if self.probe.exploded():
            raise BadInput(
                f"'{shown(path)}' holds classifiers that are not finite: give an older file, or"
                " start anew with a lower --lr"
            )
        at = self.position
        say(f"=> loaded '{shown(path)}' (epoch {at.epoch}, step {at.step})")

    def _restore_ours(self, content: dict, path: str) -> None:
        ours = content["probe"]
        same_images = ours["data_sha256"] == self.subject.origin["data_sha256"]
        M = len(self.images.train) if same_images else None
        model = self.probe.model
        require_probe(content, path, model, self.probe.parameters(), M)
        model.load_state_dict(ours["model"])
        self.batch_size = content["args"]["batch_size"]
        self.position = engine.Position(ours["epoch"], ours["step"], ours["total"])
        self.best = ours["best"] if same_images else {}
        resume.restore_rng(ours["rng"], self.probe.device, self.position.averages)

    def save(self) -> None:
        """Write checkpoint_last: MoCo's keys, and what an exact resume needs. All ranks call it."""
        generators = resume.rng_of_ranks(self.probe.device, self.position.averages)
        ranks.on_main(lambda: self._write(generators))

    def _write(self, generators: list[dict]) -> None:
        at = self.position
        self.folder.require_sound(self.probe.exploded(), at.epoch, at.step)
        ours = {
            "model": self.probe.model.state_dict(),
            "best": self.best,
            "rng": generators,
            "epoch": at.epoch,
            "step": at.step,
            "total": at.total,
            **self.subject.origin,
            "metrics_size": self.folder.metrics_size(),
        }
        content = {
            "epoch": at.epoch,
            "arch": self.subject.info["arch"],
            "state_dict": self.probe.state_dict(),
            "best_acc1": max(self.best.values(), default=0.0),
            "optimizer": self.probe.optimizer.state_dict(),
            "args": self.flags,
            "probe": ours,
        }
        self.folder.save(content, None)

    # ---- training

    def train(
        self,
        *,
        epochs: int,
        batch_size: int,
        cache_features: bool,
        schedule: list[int],
        print_freq: int,
    ) -> None:
        """Train from `position` to the end of the last epoch, and judge on val after each epoch."""
        start = time.perf_counter()
        self.batch_size = batch_size
        at = self.position
        source = self.batches(batch_size, cache_features)
        steps = len(source)
        val = self.probe.judged(self.images.val)
        clock = Remaining(epochs * steps, at.epoch * steps + at.step)

        def show(values: dict) -> None:
            left = clock.left(at.epoch * steps + at.step)
            say(step_line(at, steps, values, self.probe.model.names, left))
            self.log(kind="step", epoch=at.epoch, step=at.step, **values)

        for epoch in range(at.epoch, epochs):
            self.probe.start_epoch(epoch, epochs, schedule)
            linear.train_one_epoch(
                self.probe.answer,
                source,
                self.probe.optimizer,
                at,
                stop=self.stop,
                show=show,
                save=self.save,
                last_good=self.last_good,
                print_freq=print_freq,
            )
            self.end_epoch(self.probe.judge(val))
        source.close()
        val.close()
        self.seconds = time.perf_counter() - start

    def batches(self, batch_size: int, cache_features: bool):
        """Batches to train on: augmented images, or features that are taken once."""
        train = self.images.train
        if cache_features:
            say(
                "=> features are taken once, without augmentation: not MoCo's protocol, in which"
                " every epoch sees new crops"
            )
            return linear.CachedBatches(self.probe.take(train), batch_size, self.seed)
        loader = data.train_loader(
            train,
            augmentation=linear.probe_augmentation(
                self.subject.dataset, self.subject.side, self.subject.pixels
            ),
            batch_size=batch_size,
            seed=self.seed,
            device=self.probe.device,
            workers=self.probe.reading["workers"],
            max_bad_images=self.probe.reading["max_bad_images"],
            views=1,
        )
        return linear.AugmentedBatches(loader, train.labels.to(self.probe.device))

    def end_epoch(self, found: dict[str, dict[str, float]]) -> None:
        """Print and log the accuracy of every classifier on val; save. MoCo's sanity check once."""
        at = self.position
        name = max(found, key=lambda name: found[name]["top1"])
        best = f" (best: {name})" if len(found) > 1 else ""
        say(f" * Acc@1 {found[name]['top1']:.3f} Acc@5 {found[name]['top5']:.3f}{best}")
        self.best = {
            name: max(self.best.get(name, 0.0), row["top1"]) for name, row in found.items()
        }
        self.log(kind="epoch", epoch=at.epoch, val=found, **at.averages.epoch())
        if at.epoch == self.first_epoch:
            self.check_sanity()
        at.epoch += 1
        at.step = 0
        at.averages = engine.Averages()
        self.save()

    def check_sanity(self) -> None:
        """Say that the frozen backbone has not moved. Raises RunFailed where it has."""
        if self.probe.frozen:
            say(self.probe.frozen.check(self.probe.encoder))

    def log(self, **values) -> None:
        if self.folder is not None:
            self.folder.log(**values)

    def last_good(self) -> str:
        """The path of the checkpoint that was saved last; '' where there is none."""
        return self.folder.last_good() if self.folder else ""

    # ---- the result

    def finish(self, out: str, facts: dict, *, shots: list[int], draws: int) -> None:
        """Make MoCo's sanity check, print the table of all classifiers, and write results.json.

        out: the folder of results.json. facts: further entries of results.json. shots, draws: see
        `Probe.few_labels`.
        """
        train, held, val = self.images
        judge = lambda dataset: self.probe.judge(self.probe.judged(dataset))
        self.check_sanity()
        held_out = judge(held) if held is not None else None
        names = self.probe.model.names
        rows = result_rows(names, judge(val), held_out, self.best, self.probe.dims)
        few = self.probe.few_labels(train, val, shots, draws, self.seed) if shots else []
        say(table(rows, few))
        facts = {
            "pretrained": self.subject.path,
            "sha256": self.subject.sha256,
            **{name: self.subject.info[name] for name in ("arch", "stem", "epoch")},
            "dataset": self.subject.dataset,
            "data": self.subject.root,
            **facts,
            "epochs": self.position.epoch,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "train_images": len(train),
            "held_out": len(held) if held is not None else 0,
            "val_images": len(val),
            "seconds": self.seconds,
            "backbone_unchanged": bool(self.probe.frozen),
            "classifiers": rows,
            "few_labels": few,
        }
        if self.folder is not None:
            self.folder.require_held()
        if dist.is_main():
            print("\n".join(results.write_results(out, "classifiers", facts)))


def hold_out(subject: Subject, n: int, rates: int, seed: int) -> Images:
    """The images of a subject, n of train held out.

    n = 0: a tenth, at most 10,000, where there are several learning rates to choose among.
    """
    train = subject.splits["train"]
    n = n or (min(len(train) // 10, 10_000) if rates > 1 else 0)
    rest, held = data.holdout(train, n, seed) if n else (train, None)
    return Images(rest, held, subject.splits["val"])


def traps(info: dict, batch_size: int, lr_given: bool, mlp: bool | None) -> list[str]:
    """Warnings of flags that make linear numbers lower than published ones.

    info: see `load_backbone`. mlp: of --mlp.
    """
    found = []
    if batch_size != 256 and not lr_given:
        found.append(
            f"the learning rate of 30 is for batch 256, here it is {batch_size}: linear scaling"
            f" gives --lr {30 * batch_size / 256:g}"
        )
    if mlp is not None:
        found += head_mismatch(info, "--mlp says", mlp)
    return found


# ---- the file to go on with ----------------------------------------------------------------------

ORIGIN = {"sha256": str, "classes": [str], "data_sha256": str}


def require_origin(resumed: Resumed, here: dict, *, file: str, images: str) -> None:
    """Raise BadInput where a file of ours was trained on other things than `here` says.

    here: see `Subject.origin`. file, images: as the flags name them; '' where the encoder, or the
    images, may be others.
    """
    path = resumed.path
    shape = {"probe": {**ORIGIN, ...: object}, ...: object}
    require(resumed.content, shape, state.where(path), cure=EARLIER)
    ours = resumed.content["probe"]
    if file and ours["sha256"] != here["sha256"]:
        raise BadInput(
            f"'{path}' probes another file than --pretrained '{file}': give that one, or choose"
            " another --out"
        )
    if ours["classes"] != here["classes"]:
        raise BadInput(
            f"the classifiers of '{path}' know the classes {checkpoint.some(ours['classes'])}, and"
            f" here they are {checkpoint.some(here['classes'])}: judge them on images of the same"
            " classes, in folders of the same names"
        )
    if images and ours["data_sha256"] != here["data_sha256"]:
        raise BadInput(
            f"'{path}' was trained on other images than those of {images}: give the same, or choose"
            " another --out"
        )


def require_probe(
    content: dict, path: str, model: nn.Module, groups: list[list[nn.Parameter]], M: int | None
) -> None:
    """Raise BadInput unless the probe can take the state in a file of ours.

    The file has passed `state.require_start` and `state.require_flags`. model: the classifiers, or
    the whole network; some of them may have diverged. groups: of the optimizer. M: images it was
    trained on, None if unknown.
    """
    percent = Number(0, 100)
    steps = -(-M // content["args"]["batch_size"]) if M is not None else None
    network = {name: t._replace(finite=False) for name, t in like(model.state_dict()).items()}
    ours = {
        "model": network,
        "best": {...: percent},
        "rng": state.RANKS,
        **state.position_shape(steps, content["epoch"]),
        **ORIGIN,
        "metrics_size": COUNT,
    }
    shape = {
        **state.OURS,
        "state_dict": dict,
        "optimizer": dict,
        "best_acc1": percent,
        "probe": Holds(ours, state.steps_agree, state.STEPS_AGREE),
    }
    require(content, shape, state.where(path), cure=EARLIER)
    state.require_optimizer(content["optimizer"], path, groups, finite=False)


def metrics_size(resumed: Resumed, out: str | Path) -> int | None:
    """How many bytes of metrics.jsonl in `out` are kept (None: all)."""
    if not resumed.path:
        return 0
    if not resumed.is_ours:
        return None
    in_out = Path(resumed.path).resolve().parent == Path(out).resolve()
    return resumed.content["probe"]["metrics_size"] if in_out else 0


# ---- what is printed -----------------------------------------------------------------------------


class Remaining:
    """Time left of a run of `steps` steps, from the pace since this process began at `done`."""

    def __init__(self, steps: int, done: int):
        self.steps = steps
        self.done = done
        self.start = time.perf_counter()

    def left(self, now: int) -> str:
        pace = (time.perf_counter() - self.start) / max(now - self.done, 1)
        seconds = round(pace * (self.steps - now))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def step_line(at: engine.Position, steps: int, values: dict, names: list[str], left: str) -> str:
    """MoCo's line, for the classifier that is best on these steps, with the time left."""
    best = max(names, key=lambda name: values[f"acc1 {name}"])
    line = [
        f"Epoch: [{at.epoch}][{at.step:{len(str(steps))}d}/{steps}]",
        f"Time {values['time']:6.3f}",
        f"Data {values['data_time']:6.3f}",
        f"Loss {values[f'loss {best}']:.4e}",
        f"Acc@1 {values[f'acc1 {best}']:6.2f}",
        f"Acc@5 {values[f'acc5 {best}']:6.2f}",
        f"left {left}",
    ]
    return "\t".join(line + [f"(best: {best})"] * (len(names) > 1))


def result_rows(
    names: list[str],
    val: dict[str, dict],
    held: dict[str, dict] | None,
    best: dict[str, float],
    dims: dict[str, int],
) -> list[dict]:
    """A row for each classifier; "chosen" marks the best learning rate of each layer.

    It is chosen on the held-out images, the lower one of two equal. A layer with one rate needs no
    held-out images.
    """
    rows = []
    for name in names:
        layer, lr = name.rsplit("@", 1)
        row = {
            "layer": layer,
            "dim": dims.get(layer),
            "lr": float(lr),
            "held_out_top1": held[name]["top1"] if held else None,
        }
        rows.append({**row, **val[name], "best_top1_of_all_epochs": best.get(name)})
    for layer in dict.fromkeys(row["layer"] for row in rows):
        mine = [row for row in rows if row["layer"] == layer]
        chosen = max(mine, key=lambda row: (row["held_out_top1"] or 0.0, -row["lr"]))
        for row in mine:
            row["chosen"] = row is chosen
    return rows


def table(rows: list[dict], few: list[dict]) -> str:
    """Results as text: a line for each classifier, * at the learning rate chosen."""
    columns = {
        "layer": "layer",
        "numbers": "dim",
        "lr": "lr",
        "held out": "held_out_top1",
        "top-1": "top1",
        "top-5": "top5",
        "best epoch": "best_top1_of_all_epochs",
    }
    held = any(row["held_out_top1"] is not None for row in rows)
    if not held:
        del columns["held out"]
    body = []
    for row in rows:
        cells = [row[key] if key != "lr" else f"{row['lr']:g}" for key in columns.values()]
        body.append([*cells, "*" if held and row["chosen"] else ""])
    lines = [results.table([*columns, ""], body)]
    lines += [
        f"{row['shots']} labelled images a class: {row['top1']:.2f} +- {row['std']:.2f}"
        f" ({row['draws']} draws, nearest class mean)"
        for row in few
    ]
    return "\n".join(lines)
