"""A probe: classifiers on an encoder with their optimizer, how they are judged and saved."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco_isl import dist
from moco_isl.encoders import BACKBONE, OUTPUT, evaluating, get_head, head_name, stage_names
from moco_isl.errors import BadInput
from moco_isl.evaluation import features, linear
from moco_isl.evaluation.knn import few_shot
from moco_isl.files import short
from moco_isl.options import opt
from moco_isl.run import checkpoint
from moco_isl.run.checkpoint import PREFIX
from moco_isl.training.engine import learning_rate


def layer(text: str) -> str:
    """The name of a layer, or "all". Raises BadInput."""
    if not re.fullmatch(rf"all|{BACKBONE}|{OUTPUT}|conv\d", text):
        raise BadInput(
            f"'{short(text)}' is no layer: expected backbone, output, conv1 ... conv5, or all"
        )
    return text


@dataclass(kw_only=True)
class ProbeOptions:
    """What is trained, and on what."""

    layers: list[str] = opt(
        [BACKBONE],
        several="+",
        parse=layer,
        metavar="LAYER",
        help="backbone (MoCo's), output, conv1 ... conv5 (of a ResNet its stem and four stages), or"
        " all; one classifier for each, on about 9,000 numbers",
    )
    cache_features: bool = opt(
        False,
        help="train on features taken once, without augmentation: fast, not MoCo's protocol",
    )
    finetune: bool = opt(False, help="train the whole network from the checkpoint")
    holdout: int = opt(
        0,
        low=0,
        metavar="n",
        help="images of train to choose among several --lr by; 0: a tenth, at most 10,000",
    )


def layer_names(encoder: nn.Module, asked: Iterable[str]) -> list[str]:
    """The layers of a probe, each once; "all" stands for every stage and the backbone."""
    asked = list(dict.fromkeys(asked))
    return [*stage_names(encoder), BACKBONE] if "all" in asked else asked


class Probe:
    """Classifiers on layers of a frozen encoder, or the whole network, and their optimizer.

    layers: as `layer_names` has them; None for the whole network. lrs: each layer gets a classifier
    for each of them. size: side of the images. amp: of the encoder. reading: transform, batch_size,
    workers and max_bad_images for passes over a split. watch: may end such a pass.

    Attributes: model (see its names and keys), optimizer, frozen (None for the whole network), dims
    (numbers of each layer).
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
        watch: features.Watch | None = None,
    ):
        self.encoder = encoder.to(device)
        self.device = device
        self.amp = amp
        self.reading = reading
        self.watch = watch
        self.layers = self.frozen = None
        self.dims: dict[str, int] = {}
        self._taken: dict = {}  # data set -> its features, which a frozen encoder gives once
        if layers is None:
            self.model = linear.Whole(encoder, lrs[0], classes)
        else:
            self.frozen = linear.Frozen(encoder)
            self.layers = linear.Layers(encoder, layers, amp).eval()
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
        with linear.autocast(self.device, self.amp):
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
        """Features of a data set, without augmentation, taken once.

        Raises BadInput where they do not fit into memory.
        """
        if dataset not in self._taken:
            free = free_bytes(self.device)
            need = self._bytes(dataset)
            if need > 0.8 * free:
                raise BadInput(
                    f"{sum(self.dims.values())} numbers for each of {len(dataset)} images take"
                    f" {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free on {self.device}: name"
                    " fewer --layers, or leave out --cache-features"
                )
            self._taken[dataset] = self._take(self.layers, dataset)
        return self._taken[dataset]

    def _bytes(self, dataset) -> int:
        return 4 * sum(self.dims.values()) * len(dataset)

    def _take(self, layers: nn.Module, dataset) -> features.Split:
        options = {"device": self.device, "normalize": False, "watch": self.watch, **self.reading}
        return features.take(layers, dataset, **options)

    def judged(self, dataset) -> linear.JudgedFeatures | linear.JudgedImages:
        """Batches of a data set for `judge`.

        They are features taken once where the encoder is frozen and a quarter of the free memory
        holds them, and otherwise images.
        """
        fits = dataset in self._taken or 4 * self._bytes(dataset) < free_bytes(self.device)
        if self.layers is not None and fits:
            return linear.JudgedFeatures(self.take(dataset))
        return linear.JudgedImages(dataset, self.device, **self.reading)

    def judge(self, judged) -> dict[str, dict[str, float]]:
        """name -> {"top1", "top5"} in per cent of every classifier."""
        answer = lambda x: self._answer(x, self.model)
        with evaluating(self.model):
            return linear.judge(answer, judged, self.model.names, self.device)

    def few_labels(self, train, val, shots: list[int], draws: int, seed: int) -> list[dict]:
        """Accuracy on val with few labelled images a class, see `knn.few_shot`: a row for each."""
        layers, taken = self.layers, self._taken
        if BACKBONE not in self.dims:
            layers, taken = linear.Layers(self.encoder, [BACKBONE], self.amp), {}
        splits = [taken.get(dataset) or self._take(layers, dataset) for dataset in (train, val)]
        (x, labels), (val_x, val_labels) = (
            (F.normalize(split.features[BACKBONE], dim=1), split.labels) for split in splits
        )
        rows = []
        for n in shots:
            mean, spread = few_shot(x, labels, val_x, val_labels, n, draws, seed)
            rows.append({"shots": n, "top1": 100 * mean, "std": 100 * spread, "draws": draws})
        return rows

    # ---- files

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The network under MoCo's names: the backbone, and as its head the classifier on it.

        Of several classifiers none is the head.
        """
        head = head_name(self.encoder) + "."
        state = self.encoder.state_dict()
        if self.layers is not None:
            state = {n: t for n, t in state.items() if not n.startswith(head)}
            if [layer for layer, _ in self.model.keys] == [BACKBONE]:
                state |= {head + n: t for n, t in self.model.linear[0].state_dict().items()}
        return {PREFIX + n: t for n, t in state.items()}

    def exploded(self) -> list[str]:
        """Names of tensors from which no training can go on (see `checkpoint.exploded`).

        There are none while any classifier is sound: one that fails does not harm the others.
        """
        found = []
        for name, group in zip(self.model.names, self.optimizer.param_groups):
            params = {
                str(i): {"weight": p.detach(), **self.optimizer.state.get(p, {})}
                for i, p in enumerate(group["params"])
            }
            buffers = dict(self.model.named_buffers())
            broken = checkpoint.exploded({name: params, "buffers": buffers})
            if not broken:
                return []
            found += broken
        return found

    def take_over_head(self, head: nn.Linear | None, path: str) -> None:
        """Use the classifier of a file of MoCo's own probe, or of a supervised training.

        Raises BadInput where it does not fit.
        """
        mine = get_head(self.encoder) if self.layers is None else self.model.linear[0]
        if head is None or head.weight.shape != mine.weight.shape or len(self.model.keys) > 1:
            has = "no classifier"
            if head is not None:
                has = f"one of {head.out_features} classes on {head.in_features} numbers"
            raise BadInput(
                f"cannot go on with '{path}': it has {has}, here are {len(self.model.keys)} of"
                f" {mine.out_features} classes on {mine.in_features}; give the --layers and --lr it"
                " was trained with"
            )
        mine.load_state_dict(head.state_dict())


def free_bytes(device: torch.device) -> float:
    """Free memory of the device, in bytes; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return float("inf")
