"""Linear classifiers on a frozen encoder, one for each layer and learning rate, trained together.

Letters: N batch of this rank, M images of a split, C numbers of a layer.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from moco_isl import data, dist
from moco_isl.data.draws import permutation
from moco_isl.encoders import Taps, channels_of, evaluating, feature_dim, get_head, set_head
from moco_isl.errors import Interrupted, RunFailed
from moco_isl.evaluation.features import Split, unreadable
from moco_isl.run import checkpoint
from moco_isl.run.meters import Clock, require_finite
from moco_isl.run.signals import Stop
from moco_isl.training.engine import Position

WHOLE = "whole network"
# about how many numbers a layer has after pooling: AlexNet probes use 96 x 10 x 10, 256 x 6 x 6
# and 384 x 5 x 5
NUMBERS = 9216

# images or features -> logits [N, classes] of every classifier
Answer = Callable[[object], dict[str, torch.Tensor]]


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """The context in which the network computes in this type of half precision; None: float32."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


# ---- layers --------------------------------------------------------------------------------------


def pool(x: torch.Tensor) -> torch.Tensor:
    """[N, C] as it is; [N, c, h, w] averaged over a grid of cells, to about NUMBERS a row."""
    if x.dim() == 2:
        return x
    side = max(1, round((NUMBERS / x.shape[1]) ** 0.5))
    return F.adaptive_avg_pool2d(x, (min(side, x.shape[2]), min(side, x.shape[3]))).flatten(1)


class Layers(nn.Module):
    """A frozen encoder: images [N, c, S, S] -> {layer: [N, C] float32}."""

    def __init__(self, encoder: nn.Module, layers: Iterable[str], amp: torch.dtype | None = None):
        super().__init__()
        self.taps = Taps(encoder.requires_grad_(False), layers)
        self.amp = amp

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        with autocast(images.device, self.amp):
            seen = self.taps(images)
        return {layer: pool(x).float() for layer, x in seen.items()}

    def sizes(self, side: int, device: torch.device) -> dict[str, int]:
        """Numbers of each layer for images of this side."""
        with evaluating(self):
            channels = channels_of(self.taps.encoder)
            found = self(torch.zeros(1, channels, side, side, device=device))
        return {layer: x.shape[1] for layer, x in found.items()}


class Frozen:
    """A copy of all weights and running statistics of an encoder, to prove that none changes."""

    def __init__(self, encoder: nn.Module):
        self.before = {name: t.detach().cpu().clone() for name, t in encoder.state_dict().items()}

    def check(self, encoder: nn.Module) -> str:
        """A line that says what was compared. Raises RunFailed naming what moved."""
        now = encoder.state_dict()
        moved = [name for name, t in self.before.items() if not torch.equal(t, now[name].cpu())]
        if moved:
            raise RunFailed(f"the frozen backbone has moved: {checkpoint.some(moved)}; no result")
        parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in self.before))
        return f"=> sanity check passed: all {len(now)} tensors of {parts} are those of the file"


# ---- classifiers ---------------------------------------------------------------------------------


class Heads(nn.Module):
    """One linear classifier for each layer and learning rate.

    {layer: [N, C]} -> {"layer@lr": logits [N, classes]}. The classifiers of a layer start equal, so
    that they differ by their learning rate alone.
    """

    def __init__(self, sizes: dict[str, int], lrs: Iterable[float], classes: int):
        super().__init__()
        lrs = list(lrs)
        self.keys = [(layer, lr) for layer in sizes for lr in lrs]
        self.names = [f"{layer}@{lr:.12g}" for layer, lr in self.keys]
        first = {}
        for layer, numbers in sizes.items():
            first[layer] = nn.Linear(numbers, classes)
            nn.init.normal_(first[layer].weight, std=0.01)
            nn.init.zeros_(first[layer].bias)
        self.linear = nn.ModuleList(nn.Linear(sizes[layer], classes) for layer, _ in self.keys)
        for (layer, _), linear in zip(self.keys, self.linear):
            linear.load_state_dict(first[layer].state_dict())

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: linear(features[key[0]])
            for name, key, linear in zip(self.names, self.keys, self.linear)
        }

    def groups(self) -> list[dict]:
        """Parameters for an optimizer, each classifier with its own learning rate."""
        return [
            {"params": linear.parameters(), "lr": lr}
            for (_, lr), linear in zip(self.keys, self.linear)
        ]


class Whole(nn.Module):
    """The whole network with a fresh classifier as its head.

    Images [N, c, S, S] -> {"whole network@lr": logits [N, classes]}.
    """

    def __init__(self, encoder: nn.Module, lr: float, classes: int):
        super().__init__()
        set_head(encoder, nn.Linear(feature_dim(encoder), classes))
        nn.init.normal_(get_head(encoder).weight, std=0.01)
        nn.init.zeros_(get_head(encoder).bias)
        self.encoder = encoder
        self.keys = [(WHOLE, lr)]
        self.names = [f"{WHOLE}@{lr:.12g}"]

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.names[0]: self.encoder(images)}

    def groups(self) -> list[dict]:
        return [{"params": self.encoder.parameters(), "lr": self.keys[0][1]}]


# ---- where batches come from: (input, labels [N], size of the batch over all ranks) --------------


def probe_augmentation(name: str, size: int, pixels: data.Pixels = data.RGB):
    """MoCo's augmentation for a linear probe: a random crop of 8 % to 100 % of the image, a flip.

    Digits and house numbers are not flipped.
    """
    return data.get_augmentation(name, aug_plus=False, size=size, pixels=pixels, crop=(0.08, 1.0))


class AugmentedBatches:
    """Batches of augmented images, each drawn by (seed, epoch, index)."""

    def __init__(self, loader, labels: torch.Tensor):
        self.loader = loader
        self.labels = labels

    def __len__(self) -> int:
        return len(self.loader)

    def batches(
        self, epoch: int, start_step: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        for (images,), index in self.loader.epoch(epoch, start_step):
            yield images, self.labels[index], len(index) * dist.world_size()

    def close(self) -> None:
        self.loader.close()


class CachedBatches:
    """Batches of features that were taken once.

    An epoch has every image, whatever the number of ranks.
    """

    def __init__(self, split: Split, batch_size: int, seed: int):
        self.split = split
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        return -(-len(self.split.labels) // self.batch_size)

    def batches(
        self, epoch: int, start_step: int
    ) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor, int]]:
        features, labels = self.split.features, self.split.labels
        order = permutation(self.seed, epoch, len(labels)).to(labels.device)
        for rows in order.split(self.batch_size)[start_step:]:
            start, stop = dist.shard(len(rows))
            mine = rows[start:stop]
            yield {layer: x[mine] for layer, x in features.items()}, labels[mine], len(rows)

    def close(self) -> None:
        """Nothing to end."""


class JudgedImages:
    """A split to be judged: iterates (images, labels), each image exactly once over all ranks."""

    def __init__(self, dataset, device: torch.device, max_bad_images: int | None = None, **options):
        self.dataset = dataset
        self.max_bad_images = max_bad_images
        shard = dist.shard(len(dataset))
        self.loader = data.eval_loader(dataset, shard=shard, device=device, **options)
        self.labels = dataset.labels.to(device)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images that cannot be read are left out.

        Raises RunFailed past max_bad_images (None: any number).
        """
        for images, index in self.loader:
            bad = [i for i, _ in self.loader.bad_images()]
            if bad:
                kept = ~torch.isin(index, torch.tensor(bad, device=index.device))
                images, index = images[kept], index[kept]
            if len(index):
                yield images, self.labels[index]
        unreadable(self.loader, self.dataset, self.max_bad_images)

    def close(self) -> None:
        self.loader.close()


class JudgedFeatures:
    """A split to be judged by features taken once: iterates ({layer: [n, C]}, labels)."""

    def __init__(self, split: Split, batch_size: int = 4096):
        self.split = split
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        features, labels = self.split.features, self.split.labels
        start, stop = dist.shard(len(labels))
        for first in range(start, stop, self.batch_size):
            rows = slice(first, min(first + self.batch_size, stop))
            yield {layer: x[rows] for layer, x in features.items()}, labels[rows]

    def close(self) -> None:
        """Nothing to end."""


# ---- training and judging ------------------------------------------------------------------------


def hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many of N labels are the first, and among the first five, of logits [N, classes].

    Returns float64 [2].
    """
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [N, 5]
    return torch.stack([top[:, 0].sum(), top.sum()]).double()


def train_one_epoch(
    answer: Answer,
    source: AugmentedBatches | CachedBatches,
    optimizer: torch.optim.Optimizer,
    position: Position,
    *,
    stop: Stop,
    show: Callable[[dict], None],
    save: Callable[[], None],
    last_good: Callable[[], str],
    print_freq: int,
) -> None:
    """Train every classifier from `position` to the end of its epoch.

    answer: over several ranks it is that of a DistributedDataParallel. show(values) gets the means
    since the last call. A classifier whose loss is not finite does not harm the others; RunFailed
    is raised when no loss is finite. Raises Interrupted after `save` when any rank was asked to
    stop.
    """
    clock = Clock()
    averages = position.averages
    for x, labels, total in source.batches(position.epoch, position.step):
        clock.got_data()
        logits = answer(x)  # {name: [N, classes]}
        losses = {name: F.cross_entropy(z, labels, reduction="sum") for name, z in logits.items()}
        optimizer.zero_grad(set_to_none=True)
        # DDP takes the mean over ranks, whose shares of a batch may differ by one image
        (sum(losses.values()) * (dist.world_size() / total)).backward()
        optimizer.step()

        averages.add(_parts(logits, losses, labels), len(labels), position.step)
        position.step += 1
        position.total += 1
        clock.step_done(len(labels))
        if position.step % print_freq == 0 or position.step == len(source):
            require_finite(averages, position.epoch, last_good())
            show({**averages.interval(), **clock.read()})
        if stop.agreed():
            save()
            raise Interrupted(
                f"saved at epoch {position.epoch}, step {position.step} of {len(source)}: go on"
                " with --resume auto"
            )


@torch.no_grad()
def _parts(
    logits: dict[str, torch.Tensor], losses: dict[str, torch.Tensor], labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Means over a batch of every classifier; "loss" is the lowest finite one.

    losses: sums over the batch.
    """
    n = max(len(labels), 1)
    parts = {}
    for name, z in logits.items():
        parts[f"loss {name}"] = losses[name].detach() / n
        parts[f"acc1 {name}"], parts[f"acc5 {name}"] = 100 * hits(z, labels) / n
    every = torch.stack([parts[f"loss {name}"] for name in logits])
    parts["loss"] = torch.where(every.isfinite(), every, torch.inf).min()
    return parts


@torch.no_grad()
def judge(
    answer: Answer, source: Iterable, names: Iterable[str], device: torch.device
) -> dict[str, dict[str, float]]:
    """name -> {"top1", "top5"} in per cent of every classifier, over the images of all ranks."""
    names = list(names)
    right = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    count = torch.zeros(1, device=device).double()
    for x, labels in source:
        logits = answer(x)
        for i, name in enumerate(names):
            right[i] += hits(logits[name], labels)
        count += len(labels)
    percent = 100 * dist.all_reduce_sum(right) / dist.all_reduce_sum(count)
    return {name: {"top1": row[0], "top5": row[1]} for name, row in zip(names, percent.tolist())}


# ---- while an encoder is trained -----------------------------------------------------------------

_MOST_FITTED = 1 << 16  # images that `probe_accuracy` fits


def probe_accuracy(
    features: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, truth: torch.Tensor
) -> float:
    """Accuracy in per cent on queries [Q, C] of a linear classifier fitted to features [M, C].

    labels [M], truth [Q]: from 0 on, -1 for none. The classifier is a softmax regression on
    features that are centred and scaled to a spread of 1, with a weight decay of 1e-4, fitted by
    L-BFGS; of many images evenly spread ones are fitted. NaN where nothing has a label.
    """
    features, labels = features[labels >= 0], labels[labels >= 0]
    queries, truth = queries[truth >= 0], truth[truth >= 0]
    if not len(features) or not len(queries):
        return float("nan")
    step = -(-len(features) // _MOST_FITTED)
    features, labels = features[::step].float(), labels[::step]
    mean, spread = features.mean(0), features.std(0).clamp(min=1e-6)
    x = (features - mean) / spread
    classes = int(max(labels.max(), truth.max())) + 1
    W = torch.zeros(classes, x.shape[1] + 1, device=x.device, requires_grad=True)
    score = lambda x: F.linear(x, W[:, :-1], W[:, -1])
    optimizer = torch.optim.LBFGS([W], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(score(x), labels) + 1e-4 / 2 * W[:, :-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        found = score((queries.float() - mean) / spread).argmax(1)
    return 100 * (found == truth).float().mean().item()
