"""DeepCluster (Caron et al. 2018), for comparison: which cluster of its features is an image in?

    model = DeepCluster(torchvision.models.resnet18, clusters=1000)
    isl = ISL(model, num_images=len(dataset))
    for epoch in range(epochs):
        features = extract_features(model.encoder_q, ordered, M, device, normalize=False)
        print(isl.recluster(features, optimizer))
        for view, index in DataLoader(views, batch_size=256, sampler=isl.order().tolist()):
            loss = isl(view, index)

`ordered` has all images without augmentation (`data.eval_loader`), `views` is `WithIndex`.
Letters: N batch, M images, D numbers that the backbone gives, C those after PCA, k clusters.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from moco_isl import dist
from moco_isl.encoders import feature_dim, take_head_off
from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.objectives.base import Objective, Parts
from moco_isl.ops.kmeans import kmeans_by_distance
from moco_isl.ops.neighbors import Tick
from moco_isl.options import check_value, opt
from moco_isl.schema import Holds, Number
from moco_isl.schema import Tensor as TensorOf

Tensor = torch.Tensor

IMAGES = 128  # of a cluster: 1,281,167 of ImageNet in 10,000
ITERATIONS = 20  # of k-means
FLAT = 1e-6  # a direction with less than this share of the largest variance is left out
_PIECE = 1 << 16  # images looked at at a time


class DeepCluster(nn.Module):
    """An encoder without a head, and a classifier of k clusters on what its backbone gives."""

    shown_of_an_image = 1

    def __init__(self, base_encoder: Callable[..., nn.Module], clusters: int):
        super().__init__()
        self.encoder_q = take_head_off(base_encoder(num_classes=1))
        self.dim = feature_dim(self.encoder_q)
        self.classifier = nn.Linear(self.dim, clusters)

    def encode(self, image: Tensor) -> Tensor:
        """Logits [N, k] of images [N, 3, S, S]."""
        return self.classifier(self.encoder_q(image))

    forward = encode


@dataclass
class Clustering:
    """What a clustering found. `str` gives its line for the screen."""

    kind: ClassVar[str] = "clusters"  # of its line in metrics.jsonl

    clusters: int
    used: int  # clusters that hold an image
    largest: float  # the share of all images that are in the largest
    refilled: int  # how often k-means began an empty cluster anew
    nmi: float | None  # with the clustering before, see `nmi`; None: there was none
    seconds: float
    nmi_labels: float | None = None  # with the labels; None: there are none

    def __str__(self) -> str:
        beside = {"the clustering before": self.nmi, "the labels": self.nmi_labels}
        found = [f"{x:.3f} with {other}" for other, x in beside.items() if x is not None]
        return (
            f"{self.used} of {self.clusters} clusters hold images, the largest"
            f" {100 * self.largest:.1f} % of them; {self.refilled} were refilled;"
            + (f" NMI {', '.join(found)};" if found else "")
            + f" {self.seconds:.1f} s"
        )


@dataclass(eq=False, repr=False, kw_only=True)
class DeepClusterObjective(Objective):
    """Cross-entropy with the number of an image's cluster, by clusters made before every epoch."""

    clusters: int | None = opt(
        None,
        "--dc-clusters",
        low=2,
        metavar="k",
        help="DeepCluster: clusters that k-means makes before every epoch (one for 128 images, as"
        " published for ImageNet; for few images, such as CIFAR-10, ten a class are more)",
    )
    components: int = opt(
        256,
        "--dc-pca",
        low=1,
        metavar="C",
        rare=True,
        help="DeepCluster: principal components of the features that are clustered, at most",
    )
    every: int = opt(
        1,
        "--dc-every",
        low=1,
        metavar="n",
        rare=True,
        help="DeepCluster: epochs from clustering to clustering (as many as have 200 steps, for a"
        " classifier that begins anew learns little in fewer)",
    )
    seed: int = 0

    around: ClassVar[type[nn.Module]] = DeepCluster
    follow: ClassVar[tuple[str, ...]] = ("dc_every",)
    has_head: ClassVar[bool] = False
    repeats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("clusters", "components", "every"):
            check_value(self, name)
        super().__post_init__()
        k = self.model.classifier.out_features
        if self.clusters not in (None, k) or k > self.num_images:
            raise BadInput(
                f"the model has {k} clusters: expected {self.clusters or 'fewer'}, of"
                f" {self.num_images} images"
            )
        self.clusters = k
        self.cluster = torch.zeros(self.num_images, dtype=torch.int64, device=self.device)  # [M]
        self.epoch = -1  # that the clusters are for; -1: there are none yet

    @staticmethod
    def build_model(base_encoder, *, num_images: int, clusters: int | None = None, **_):
        """clusters: None for one for IMAGES images. Raises BadInput for more than images."""
        if clusters is not None and clusters > num_images:
            raise BadInput(
                f"--dc-clusters {clusters} is more than the {num_images:,} images: expected fewer"
            )
        few = min(num_images, max(2, round(num_images / IMAGES)))
        return DeepCluster(base_encoder, clusters or few)

    @staticmethod
    def crop(side: int) -> tuple[float, float]:
        return (0.08, 1.0)

    def step(self, image: Tensor, *rest: Tensor) -> Parts:
        """image: [N, 3, S, S]. A second view is not looked at. Raises BadInput before `recluster`.

        acc1 says how well the classifier tells the clusters, in per cent.
        """
        if self.epoch < 0:
            raise BadInput(
                "there are no clusters yet: expected isl.recluster(features, optimizer) before"
                " every epoch"
            )
        logits = self.encode(image).float()  # [N, k]
        truth = self.cluster[rest[-1]]
        right = (logits.argmax(1) == truth).float().mean() * 100
        return {"loss": F.cross_entropy(logits, truth), "acc1": right}

    def begin_epoch(
        self,
        epoch: int,
        features: Callable[[], Tensor],
        optimizer: torch.optim.Optimizer,
        labels: Tensor | None,
        tick: Tick,
    ) -> Clustering | None:
        due = self.epoch < 0 or epoch % self.every == 0
        if not due or epoch == self.epoch:  # a run may have been saved after its clustering
            return None
        return self.recluster(features(), optimizer, tick, epoch, labels)

    @torch.no_grad()
    def recluster(
        self,
        features: Tensor,
        optimizer: torch.optim.Optimizer,
        tick: Tick | None = None,
        epoch: int | None = None,
        labels: Tensor | None = None,
    ) -> Clustering:
        """Cluster all images by their features, and begin the classifier anew; before every epoch.

        features [M, D]: what the backbone gives for the images without augmentation, not
        normalised, equal on all ranks. optimizer: it forgets what it has kept of the classifier.
        tick: called often, may raise to abandon this; then nothing has changed. epoch: that the
        clusters are for; None: the one after the last. labels [M], -1 where there is none: only
        reported on. All ranks call it. Raises BadInput for features of other images, and RunFailed
        where they are not finite.
        """
        begun = time.perf_counter()
        if features.shape != (self.num_images, self.model.dim):
            raise BadInput(
                f"features are of shape {list(features.shape)}: expected"
                f" {[self.num_images, self.model.dim]}, of the encoder without a head"
            )
        if not all(bool(part.isfinite().all()) for part in features.split(_PIECE)):
            text = (
                "the features that were to be clustered hold NaN or infinity: the encoder has"
                " diverged; start anew with a lower --lr or without --amp"
            )
            raise RunFailed(text if dist.is_main() else "")
        epoch = self.epoch + 1 if epoch is None else epoch
        cluster, refilled = self._clusters(features, self._generator(epoch, 0), tick)
        before = self.cluster if self.epoch >= 0 else None
        self.cluster = cluster
        self.epoch = self.turn = epoch
        self._begin_classifier(optimizer)
        size = cluster.bincount(minlength=self.clusters)
        return Clustering(
            clusters=self.clusters,
            used=int((size > 0).sum()),
            largest=int(size.max()) / self.num_images,
            refilled=refilled,
            nmi=None if before is None else nmi(before, cluster),
            seconds=time.perf_counter() - begun,
            nmi_labels=self._against(labels),
        )

    def _clusters(
        self, features: Tensor, generator: torch.Generator, tick: Tick | None
    ) -> tuple[Tensor, int]:
        """(cluster [M], how many were refilled): rank 0 finds them, and all ranks get them.

        All raise Interrupted where rank 0 was interrupted.
        """
        found = torch.zeros(self.num_images + 1, dtype=torch.int64, device=self.device)
        stopped = False
        if dist.is_main():
            try:
                rows = whitened(features.to(self.device), self.components)
                k = self.clusters
                cluster, _, refilled = kmeans_by_distance(rows, k, ITERATIONS, generator, tick)
                found[:-1] = cluster
                found[-1] = refilled
            except Interrupted:
                stopped = True
        dist.stop_mining_together(stopped, self.device)
        dist.broadcast(found)
        return found[:-1].clone(), int(found[-1])

    def _begin_classifier(self, optimizer: torch.optim.Optimizer) -> None:
        """Draw the classifier anew: the numbers of the clusters say nothing of those before."""
        classifier = self.model.classifier
        drawn = torch.randn(classifier.weight.shape, generator=self._generator(self.epoch, 1))
        classifier.weight.copy_(0.01 * drawn)
        classifier.bias.zero_()
        for parameter in classifier.parameters():
            optimizer.state.pop(parameter, None)

    def _against(self, labels: Tensor | None) -> float | None:
        if labels is None or not bool((labels >= 0).any()):
            return None
        known = labels >= 0
        return nmi(self.cluster[known], labels[known])

    def order(self) -> Tensor:
        """[M] int64 on the CPU: the images of this epoch, see `even_draws`."""
        return even_draws(self.cluster.cpu(), self._generator(self.turn, 2))

    def _generator(self, epoch: int, purpose: int) -> torch.Generator:
        seed = (self.seed * 1_000_003 + 3 * epoch + purpose) % 2**63
        return torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict:
        return {"cluster": self.cluster, "clustered": self.epoch}

    def load_state_dict(self, state: dict) -> None:
        self.cluster = state["cluster"].to(self.device)
        self.epoch = self.turn = state["clustered"]

    @classmethod
    def state_shape(cls, model: DeepCluster) -> dict | Holds:
        k = model.classifier.out_features
        return {
            "cluster": TensorOf("int", ("M",), low=0, high=k - 1),
            "clustered": Number(-1, whole=True),
        }


@torch.no_grad()
def whitened(features: Tensor, components: int) -> Tensor:
    """[M, C] float32 unit rows: features [M, D] in their principal directions, each of variance 1.

    C is `components`, or as many directions as there are if these are fewer: at most D and M - 1.
    """
    M, D = features.shape
    mean = sum(part.double().sum(0) for part in features.split(_PIECE)) / M  # [D]
    centred = lambda part: part.float() - mean.float()
    scatter = torch.zeros(D, D, dtype=torch.float64, device=features.device)
    for part in features.split(_PIECE):
        rows = centred(part)
        scatter += (rows.T @ rows).double()
    variance, direction = torch.linalg.eigh(scatter / max(M - 1, 1))  # rising
    there = int((variance > FLAT * variance[-1].clamp(min=1e-30)).sum())
    C = max(1, min(components, there, M - 1))
    scaled = direction[:, -C:] / variance[-C:].clamp(min=1e-30).sqrt()  # [D, C]
    scaled = scaled.float()
    return torch.cat(
        [F.normalize(centred(part) @ scaled, dim=1) for part in features.split(_PIECE)]
    )


def even_draws(cluster: Tensor, generator: torch.Generator) -> Tensor:
    """[M] int64: draws of M images in random order, equally many of each cluster that has any.

    cluster [M] int64 on the CPU. Equally: but for one. A cluster of no more images than its draws
    is drawn from with repetition, as published; of a larger one none comes twice, and some do not
    come.
    """
    M = len(cluster)
    size = cluster.bincount()  # [k]
    used = size.nonzero().squeeze(1)
    draws = torch.full_like(used, M // len(used))
    draws[torch.randperm(len(used), generator=generator)[: M % len(used)]] += 1
    # the images cluster by cluster, in random order within each
    shuffled = torch.randperm(M, generator=generator)
    images = shuffled[cluster[shuffled].argsort(stable=True)]
    first = (size.cumsum(0) - size)[used]
    size = size[used]
    of = torch.arange(len(used)).repeat_interleave(draws)  # [M]: the cluster of each draw
    place = torch.arange(M) - (draws.cumsum(0) - draws)[of]
    anywhere = torch.rand(M, dtype=torch.float64, generator=generator) * size[of]
    place = torch.where((draws < size)[of], place, anywhere.long())
    return images[first[of] + place][torch.randperm(M, generator=generator)]


def nmi(a: Tensor, b: Tensor) -> float:
    """Normalised mutual information of two clusterings [M] int64: I(a; b) / sqrt(H(a) H(b)).

    1 where they are the same but for the numbers of the clusters, 0 where neither tells anything of
    the other. 1 too where both are one cluster.
    """
    pairs = torch.stack([a, b], dim=1)
    both, of_a, of_b = (x.unique(dim=0, return_counts=True)[1] for x in (pairs, a, b))
    H, H_a, H_b = (float(torch.special.entr(n.double() / len(a)).sum()) for n in (both, of_a, of_b))
    if not H_a or not H_b:
        return float(H == 0)
    return (H_a + H_b - H) / (H_a * H_b) ** 0.5
