"""Weighted nearest neighbours and few-label accuracy on unit features.

Letters: M images in the bank, Q queries, C feature dimension, k neighbours, T temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moco_isl import dist
from moco_isl.errors import BadInput
from moco_isl.evaluation.features import Split
from moco_isl.files import short
from moco_isl.ops.neighbors import topk
from moco_isl.options import default_of, opt
from moco_isl.run.ranks import say


@torch.no_grad()
def nearest(
    queries: torch.Tensor,
    bank: torch.Tensor,
    k: int,
    chunk: int | None = None,
    exclude: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(similarity [Q, k] float32, row [Q, k]) of the k most similar bank rows of each query.

    The most similar comes first. queries [Q, C] and bank [M, C] are on one device. exclude [Q]: a
    row that the query may not find (itself). chunk: about how many similarities are held at a time.
    Raises BadInput where the bank has fewer than k rows to give.
    """
    most = len(bank) - (exclude is not None)
    if not 1 <= k <= most:
        without = " less the image itself" if exclude is not None else ""
        raise BadInput(
            f"k {k} neighbours in a bank of {len(bank)} images{without}: choose 1 to {most}"
        )
    return topk(queries, bank, k, exclude=exclude, bytes_limit=4 * chunk if chunk else None)


@torch.no_grad()
def vote(
    similarity: torch.Tensor, neighbour_labels: torch.Tensor, T: float, num_classes: int
) -> torch.Tensor:
    """The class with the largest sum of exp(sim / T) over its neighbours: two [Q, k] -> [Q]."""
    predictions = torch.empty(len(similarity), dtype=torch.int64, device=similarity.device)
    rows = max(1, 2**24 // num_classes)
    for start in range(0, len(similarity), rows):
        sim = similarity[start : start + rows]
        labels = neighbour_labels[start : start + rows]
        # divided by the largest weight of the row: no vote changes, and none overflows
        weight = ((sim - sim[:, :1]) / T).exp()
        votes = torch.zeros(len(sim), num_classes, device=sim.device)  # [rows, classes]
        votes.scatter_add_(1, labels, weight)
        predictions[start : start + rows] = votes.argmax(dim=1)
    return predictions


def knn_grid(
    queries: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    ks: Sequence[int],
    Ts: Sequence[float],
    num_classes: int | None = None,
    chunk: int | None = None,
    exclude: torch.Tensor | None = None,
) -> dict[tuple[int, float], torch.Tensor]:
    """(k, T) -> predicted labels [Q], for every pair, from one search for the largest k.

    exclude [Q]: a bank row that the query may not find. The rest as `weighted_knn`.
    """
    if min(Ts) <= 0:
        raise BadInput(f"T {min(Ts)} must be above 0")
    if min(ks) < 1:
        raise BadInput(f"k {min(ks)} must be 1 or more")
    labels = labels.to(bank.device)
    similarity, row = nearest(queries, bank, max(ks), chunk, exclude)
    found = labels[row]  # [Q, k]
    classes = num_classes or int(labels.max()) + 1
    return {(k, T): vote(similarity[:, :k], found[:, :k], T, classes) for k in ks for T in Ts}


def weighted_knn(
    queries: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    k: int = 200,
    T: float = 0.1,
    num_classes: int | None = None,
    chunk: int | None = None,
    leave_one_out: bool = False,
) -> torch.Tensor:
    """Predicted labels [Q]: each of the k nearest bank rows votes for its own label.

    The weight of a vote is exp(similarity / T). queries [Q, C] and bank [M, C] are unit rows;
    labels [M]. chunk: see `nearest`. leave_one_out: the queries are the bank, and no image votes
    for itself. Raises BadInput for a k that the bank cannot give, and for a T of 0 or less.
    """
    if leave_one_out and len(queries) != len(bank):
        raise ValueError("leave_one_out means that the queries are the bank")
    own = torch.arange(len(bank), device=bank.device) if leave_one_out else None
    return knn_grid(queries, bank, labels, [k], [T], num_classes, chunk, own)[k, T]


@dataclass(kw_only=True)
class NeighbourOptions:
    """How neighbours vote."""

    k: list[int] = opt(
        [default_of(weighted_knn, "k")],
        low=1,
        several="+",
        help="neighbours that vote; several are judged in one pass",
    )
    T: list[float] = opt(
        [default_of(weighted_knn, "T")],
        low=0,
        low_open=True,
        several="+",
        help="temperature of a vote's weight exp(similarity / T)",
    )


def judge(splits: dict[str, Split], ks: Sequence[int], Ts: Sequence[float]) -> list[dict]:
    """A row with the accuracy in per cent of every feature, k and T; the same on all ranks.

    The queries are the images of val; without a val split each image of train is judged by all
    others. Each rank searches for its share of them. A k above the number of images is lowered,
    which is printed. Raises BadInput where there is no other image.
    """
    train = splits["train"]
    leave_one_out = "val" not in splits
    queries = train if leave_one_out else splits["val"]
    most = len(train.labels) - leave_one_out
    if most < 1:
        raise BadInput(
            "there is one image and no other to judge it by: expected more of them, or a val split"
        )
    if max(ks) > most:
        say(f"=> k {max(ks)} is more than the {most} images there are: {most} instead")
        ks = sorted({min(k, most) for k in ks})
    start, stop = dist.shard(len(queries.labels))
    own = torch.arange(start, stop, device=queries.labels.device) if leave_one_out else None
    classes = int(torch.cat([train.labels, queries.labels]).max()) + 1
    rows = []
    for layer in sorted(train.features, reverse=True):  # output, then backbone
        bank = train.features[layer]  # [M, C]
        mine = queries.features[layer][start:stop]
        grid = knn_grid(mine, bank, train.labels, ks, Ts, classes, exclude=own)
        for (k, T), predicted in grid.items():
            right = dist.all_gather_rows(predicted) == queries.labels  # [Q]
            top1 = 100 * right.double().mean().item()
            rows.append({"feature": layer, "dim": bank.shape[1], "k": k, "T": T, "top1": top1})
    return rows


@torch.no_grad()
def few_shot(
    train_feats: torch.Tensor,
    train_labels: torch.Tensor,
    test_feats: torch.Tensor,
    test_labels: torch.Tensor,
    shots: int = 1,
    draws: int = 20,
    seed: int = 0,
) -> tuple[float, float]:
    """Accuracy with `shots` labelled images a class: (mean, standard deviation) over the draws.

    A test image takes the class with the most similar mean of drawn images. With one shot that is
    the class of the nearest labelled image. Features [M, C] and [Q, C] are unit rows. Raises
    BadInput where a class has fewer than `shots` images.
    """
    if shots < 1 or draws < 1:
        raise BadInput(f"shots {shots} and draws {draws} must be 1 or more")
    device = train_feats.device
    generator = torch.Generator().manual_seed(seed)
    train_labels = train_labels.to(device)
    test_labels = test_labels.to(device)
    accuracy = []
    for _ in range(draws):
        drawn = draw_shots(train_labels, shots, generator)  # [classes, shots]
        prototypes = F.normalize(train_feats[drawn].float().mean(dim=1), dim=1)  # [classes, C]
        nearest_class = (test_feats.float() @ prototypes.T).argmax(dim=1)
        predicted = train_labels[drawn[nearest_class, 0]]
        accuracy.append((predicted == test_labels).double().mean().item())
    spread = torch.tensor(accuracy).std().item() if draws > 1 else 0.0
    return sum(accuracy) / draws, spread


def whole_numbers(text: str) -> list[int]:
    """[1, 5, 10] of the text 1,5,10. Raises BadInput."""
    try:
        return [int(n) for n in text.split(",") if n]
    except ValueError:
        raise BadInput(
            f"'{short(text)}' is no list of whole numbers: expected such as 1,5,10"
        ) from None


@dataclass(kw_only=True)
class FewLabelsOptions:
    """How often the accuracy with few labels is taken, and with how many. A resumed run may change
    it: nothing is trained.
    """

    shots: list[int] = opt(
        [],
        low=1,
        parse=whole_numbers,
        metavar="n,n",
        may_change=True,
        help="also the accuracy with so many labelled images a class, e.g. 1,5,10",
    )
    draws: int = opt(
        default_of(few_shot, "draws"),
        low=1,
        metavar="n",
        may_change=True,
        help="draws of labelled images for --shots",
    )


def require_shots(labels: torch.Tensor, shots: int) -> None:
    """Raise BadInput where a class that occurs has fewer than `shots` images."""
    classes, counts = labels.unique(return_counts=True)
    smallest = counts.argmin()
    if counts[smallest] < shots:
        raise BadInput(
            f"{shots} shots asked, but class {classes[smallest].item()} has only"
            f" {counts[smallest].item()} images: ask for at most as many"
        )


def draw_shots(labels: torch.Tensor, shots: int, generator: torch.Generator) -> torch.Tensor:
    """Positions [classes, shots] of different random images of each class, classes in order."""
    require_shots(labels, shots)
    counts = labels.unique(return_counts=True)[1]
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    # shuffled within each class, classes one after the other
    order = order[labels[order].argsort(stable=True)]
    return order[(counts.cumsum(0) - counts)[:, None] + torch.arange(shots, device=labels.device)]
