"""A probe put together: classifiers on an encoder, their optimizer, what is judged, what is said of
it.
"""

import os
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco_isl import dist
from moco_isl.encoders import BACKBONE, evaluating, get_head, head_name, stage_names
from moco_isl.errors import BadInput
from moco_isl.evaluation import features, linear
from moco_isl.evaluation.knn import few_shot
from moco_isl.run import checkpoint
from moco_isl.run.checkpoint import PREFIX
from moco_isl.training.engine import Position, learning_rate


class Probe:
    """Classifiers on layers of a frozen encoder, or with layers None the whole network, and their
    optimizer.

    layers: as `encoders.Taps` has them, or ["all"]. lrs: one classifier of each layer for each.
    size: side of the images. amp: of the encoder. reading: transform, batch_size and workers for
    passes over a split. Attributes: model (names and keys of the classifiers), optimizer, frozen
    (None for the whole network), dims.
    """

    def __init__(
        self,
        encoder: nn.Module,
        layers: list[str] | None,
        *,
        lrs: list[float],
        classes: int,
        size: int,
        device: torch.device,
        amp: torch.dtype | None,
        momentum: float,
        weight_decay: float,
        reading: dict,
    ):
        self.encoder = encoder.to(device)
        self.device = device
        self.amp = amp
        self.reading = reading
        self.layers = self.frozen = None
        # of passes over a split; may raise Interrupted
        self.watch: Callable[[Iterable, int], Iterable] | None = None
        self._taken: dict = {}  # data set -> its features: a frozen encoder gives them once
        self.dims: dict[str, int] = {}
        if layers is None:
            self.model = linear.Whole(encoder, lrs[0], classes)
        else:
            wanted = (
                [*stage_names(encoder), BACKBONE]
                if layers == ["all"]
                else list(dict.fromkeys(layers))
            )
            self.frozen = linear.Frozen(encoder)
            self.layers = linear.Layers(encoder, wanted, amp).eval()
            self.dims = self.layers.sizes(size, device)
            self.model = linear.Heads(self.dims, lrs, classes)
        self.model.to(device)
        self.optimizer = torch.optim.SGD(
            self.model.groups(), lrs[0], momentum=momentum, weight_decay=weight_decay
        )
        self.parallel = self.model
        if dist.world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=ids)

    # ---- training

    def answer(self, x) -> dict[str, torch.Tensor]:
        """Logits of every classifier, for images or for features that were taken before."""
        return self._answer(x, self.parallel)

    def _answer(self, x, model: nn.Module) -> dict[str, torch.Tensor]:
        if self.layers is not None:
            return model(self.layers(x) if isinstance(x, torch.Tensor) else x)
        with torch.autocast(
            self.device.type, dtype=self.amp or torch.bfloat16, enabled=self.amp is not None
        ):
            logits = model(x)
        return {name: z.float() for name, z in logits.items()}

    def parameters(self) -> list[list[nn.Parameter]]:
        """What is trained, in the groups of the optimizer."""
        return [group["params"] for group in self.optimizer.param_groups]

    def start_epoch(self, epoch: int, epochs: int, schedule: list[int]) -> None:
        for group, (_, lr) in zip(self.optimizer.param_groups, self.model.keys):
            group["lr"] = learning_rate(epoch, lr=lr, epochs=epochs, cos=False, schedule=schedule)
        self.model.train()

    # ---- judging

    def take(self, dataset) -> features.Split:
        """Features of a split, without augmentation, taken once.

        Raises BadInput where they do not fit into memory.
        """
        if dataset in self._taken:
            return self._taken[dataset]
        numbers = sum(self.dims.values())
        free = free_bytes(self.device)
        need = 4 * numbers * len(dataset)
        if need > 0.8 * free:
            raise BadInput(
                f"{numbers} numbers for each of {len(dataset)} images take {need / 2**30:.1f} GiB,"
                f" {free / 2**30:.1f} are free on {self.device}: name fewer --layers, or do without"
                " --cache-features"
            )
        self._taken[dataset] = self._take(self.layers, dataset)
        return self._taken[dataset]

    def _take(self, layers: nn.Module, dataset) -> features.Split:
        return features.take(
            layers, dataset, device=self.device, normalize=False, watch=self.watch, **self.reading
        )

    def judged(self, dataset):
        """A split to be judged: by features taken once if the encoder is frozen and they fit
        easily, else by images.
        """
        fits = dataset in self._taken or 16 * len(dataset) * sum(self.dims.values()) < free_bytes(
            self.device
        )
        if self.layers is not None and fits:
            return linear.JudgedFeatures(self.take(dataset))
        return linear.JudgedImages(dataset, self.device, **self.reading)

    def judge(self, judged) -> dict[str, dict[str, float]]:
        """name -> {"top1", "top5"} in per cent of every classifier on a split."""
        with evaluating(self.model):
            return linear.judge(
                lambda x: self._answer(x, self.model), judged, self.model.names, self.device
            )

    def few_labels(self, train, val, shots: list[int], draws: int, seed: int) -> list[dict]:
        """Accuracy of the nearest mean of few labelled images a class, on the backbone; mean and
        spread of draws.
        """
        backbone = (
            self.layers
            if BACKBONE in self.dims
            else linear.Layers(self.encoder, [BACKBONE], self.amp)
        )
        splits = [self._taken.get(d) if BACKBONE in self.dims else None for d in (train, val)]
        splits = [split or self._take(backbone, d) for split, d in zip(splits, (train, val))]
        unit = [F.normalize(s.features[BACKBONE], dim=1) for s in splits]
        truth = [s.labels for s in splits]
        rows = []
        for n in shots:
            mean, spread = few_shot(unit[0], truth[0], unit[1], truth[1], n, draws, seed)
            rows.append({"shots": n, "top1": 100 * mean, "std": 100 * spread, "draws": draws})
        return rows

    # ---- files

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The network under MoCo's names: the backbone, and where there is but one classifier, on
        it, that as head.
        """
        place = head_name(self.encoder) + "."
        state = {
            n: t
            for n, t in self.encoder.state_dict().items()
            if self.layers is None or not n.startswith(place)
        }
        if self.layers is not None and [layer for layer, _ in self.model.keys] == [BACKBONE]:
            state |= {place + n: t for n, t in self.model.linear[0].state_dict().items()}
        return {PREFIX + n: t for n, t in state.items()}

    def exploded(self) -> list[str]:
        """The names of what no training can go on from (see `checkpoint.exploded`); none while any
        classifier is sound, for a classifier that fails harms no other.
        """
        moved = self.optimizer.state
        found = []
        for name, group in zip(self.model.names, self.optimizer.param_groups):
            params = {
                str(i): {"weight": p.detach(), **moved.get(p, {})}
                for i, p in enumerate(group["params"])
            }
            broken = checkpoint.exploded(
                {name: params, "buffers": dict(self.model.named_buffers())}
            )
            if not broken:
                return []
            found += broken
        return found

    def take_over_head(self, head: nn.Linear | None, path: str) -> None:
        """Use the classifier of a file that MoCo's own probe (or a supervised training) wrote.

        Raises BadInput.
        """
        mine = get_head(self.encoder) if self.layers is None else self.model.linear[0]
        if head is None or head.weight.shape != mine.weight.shape or len(self.model.keys) > 1:
            has = (
                "no classifier"
                if head is None
                else f"one of {head.out_features} classes on {head.in_features} numbers"
            )
            raise BadInput(
                f"'{path}' cannot be gone on with: it has {has}, here are {len(self.model.keys)} of"
                f" {mine.out_features} classes on {mine.in_features}; give the --layers and --lr it"
                " was trained with"
            )
        mine.load_state_dict(head.state_dict())


def free_bytes(device: torch.device) -> float:
    """Memory that is free on the device, in bytes; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return float("inf")


# ---- what is said --------------------------------------------------------------------------------


def traps(
    info: dict, *, batch_size: int, lr_given: bool, mlp: bool | None, dataset: str, size: int
) -> list[str]:
    """Warnings about what makes linear numbers lower than published ones; info: as `load_backbone`
    gives it.
    """
    found = []
    if batch_size != 256 and not lr_given:
        found.append(
            f"the learning rate of 30 is for batch 256, here it is {batch_size}: "
            f"linear scaling gives --lr {30 * batch_size / 256:g}"
        )
    if mlp is not None:
        found += _head_differs(info, "--mlp says", mlp)
    return found + strange(info, dataset=dataset, size=size)


def strange(info: dict, *, dataset: str, size: int) -> list[str]:
    """Warnings about a file that is judged on other images than it was trained on, or is not what
    its own flags say.
    """
    found = _head_differs(info, "the file's own flags say", info["args"].get("mlp"))
    trained = info["args"]
    if trained.get("dataset", dataset) != dataset:
        found.append(
            f"trained on {trained['dataset']}, judged on {dataset}: images are normalised by"
            f" {dataset}'s statistics"
        )
    if trained.get("image_size", size) != size:
        found.append(f"trained on images of side {trained['image_size']}, judged on side {size}")
    return found


def _head_differs(info: dict, who: str, says: bool | None) -> list[str]:
    if not isinstance(says, bool) or not info["head"] or says == (info["head"] == "mlp"):
        return []
    wanted, has = ("an MLP head", "a linear one") if says else ("no MLP head", "an MLP one")
    return [f"{who} {wanted}, but the file has {has}: is it the file you mean?"]


def result_rows(
    names: list[str],
    val: dict[str, dict],
    held: dict[str, dict] | None,
    best: dict[str, float],
    dims: dict[str, int],
) -> list[dict]:
    """One row for each classifier; "chosen" marks the best learning rate of each layer on the
    held-out images.

    Ties go to the lower rate. With a single rate a layer there is nothing to choose, and nothing
    need be held out.
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


class Remaining:
    """Time left of a run, from the pace since this process began."""

    def __init__(self, steps: int, done: int):
        self.steps = steps
        self.done = done
        self.start = time.perf_counter()

    def __call__(self, now: int) -> str:
        pace = (time.perf_counter() - self.start) / max(now - self.done, 1)
        seconds = round(pace * (self.steps - now))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def step_line(position: Position, steps: int, values: dict, names: list[str], left: str) -> str:
    """A line like MoCo's, of the classifier that is best on these steps, with the time left of the
    run.
    """
    best = max(names, key=lambda name: values[f"acc1 {name}"])
    line = [f"Epoch: [{position.epoch}][{position.step:{len(str(steps))}d}/{steps}]"]
    line += [
        f"Time {values['time']:6.3f}",
        f"Data {values['data_time']:6.3f}",
        f"Loss {values[f'loss {best}']:.4e}",
    ]
    line += [
        f"Acc@1 {values[f'acc1 {best}']:6.2f}",
        f"Acc@5 {values[f'acc5 {best}']:6.2f}",
        f"left {left}",
    ]
    return "\t".join(line + ([f"(best: {best})"] if len(names) > 1 else []))


def table(rows: list[dict], few: list[dict]) -> str:
    """Results as a table; * marks the learning rate chosen."""
    held = any(row["held_out_top1"] is not None for row in rows)
    header = [
        "layer",
        "numbers",
        "lr",
        *(["held out"] if held else []),
        "top-1",
        "top-5",
        "best epoch",
    ]
    body = [
        [
            r["layer"],
            r["dim"],
            f"{r['lr']:g}",
            *([r["held_out_top1"]] if held else []),
            r["top1"],
            r["top5"],
        ]
        + [r["best_top1_of_all_epochs"], *(["*"] if held and r["chosen"] else [""])]
        for r in rows
    ]
    lines = [features.table([*header, ""], body)]
    for r in few:
        what = f"({r['draws']} draws, nearest class mean)"
        lines.append(
            f"{r['shots']} labelled images a class: {r['top1']:.2f} +- {r['std']:.2f} {what}"
        )
    return "\n".join(lines)
