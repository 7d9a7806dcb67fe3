"""How far sets of positives reach, which is what they teach beside how right they are.

The nearest images of all are nearly copies: sets of them are right, and teach little.

Letters: M images, C feature dimension, A anchors, N anchors of a block, E directed edges of the
anchors, e those of a block, W columns of a piece.
"""

import torch

from moco_isl import dist
from moco_isl.errors import Interrupted
from moco_isl.mining.positives import PositiveSets, same_label
from moco_isl.mining.record import anchor_order
from moco_isl.ops.neighbors import Tick

Tensor = torch.Tensor

ANCHORS = 1024  # images whose positives stand for all
BLOCK = 64  # anchors at a time
COLUMNS = 65536  # images that they are compared with at a time
TIE = 1e-6  # cosines this close are equal: products differ by their order of summing


@torch.no_grad()
def reach(features: Tensor, positives: PositiveSets, tick: Tick | None = None) -> float | None:
    """The median rank of the positives among all images, as a share of M; None without positives.

    An image's positives are ranked among all other images by cosine of features [M, C], unit rows;
    1 is the most similar, and equal ones have the best of their ranks. So each image's own 10
    nearest of 1,000 have a reach of 0.005. The positives of up to ANCHORS images stand for all: the
    first that have any, in an order that depends on M alone.

    All ranks call it together. Rank 0 counts, and all get its answer, or Interrupted where tick
    raised it there.
    """
    found = None
    stopped = False
    if dist.is_main() and positives.num_edges:
        order = anchor_order(positives.num_images).to(positives.device)
        anchors = order[positives.sizes()[order] > 0][:ANCHORS]
        try:
            ranks = ranks_of_positives(features, positives, anchors, tick)
            found = float(ranks.median()) / positives.num_images
        except Interrupted:
            stopped = True
    found, stopped = dist.broadcast_object((found, stopped))
    if stopped:
        raise Interrupted("mining was interrupted")
    return found


def ranks_of_positives(
    features: Tensor, positives: PositiveSets, anchors: Tensor, tick: Tick | None = None
) -> Tensor:
    """[E] int64: ranks of the positives of anchors [A] as `reach` has them, set behind set."""
    sizes = positives.sizes()
    parts = [torch.zeros(0, dtype=torch.int64, device=features.device)]
    for block in anchors.split(BLOCK):
        size = sizes[block]  # [N]
        row = torch.arange(len(block), device=size.device).repeat_interleave(size)  # [e]
        place = torch.arange(len(row), device=size.device) - (size.cumsum(0) - size)[row]
        members = positives.members[positives.offsets[block][row] + place].long()  # [e]
        q = features[block].float()  # [N, C]
        cosine = (q[row] * features[members].float()).sum(1)  # [e]
        parts.append(1 + _more_similar(q, features, block, row, cosine + TIE, tick))
    return torch.cat(parts)


def _more_similar(
    q: Tensor, features: Tensor, own: Tensor, row: Tensor, bound: Tensor, tick: Tick | None
) -> Tensor:
    """[e] int64: how many features, but for its own, have a cosine with q[row[i]] above bound[i].

    q [N, C] are the features of the images own [N]; row [e], rising, and bound [e].
    """
    lowest = bound.new_full((len(q),), torch.inf).scatter_reduce(0, row, bound, "amin")  # [N]
    count = torch.zeros_like(row)
    for j in range(0, len(features), COLUMNS):
        if tick is not None:
            tick()
        scores = q @ features[j : j + COLUMNS].float().T  # [N, W]
        here = ((own >= j) & (own < j + scores.shape[1])).nonzero().squeeze(1)
        scores[here, own[here] - j] = -torch.inf
        at, column = (scores > lowest[:, None]).nonzero(as_tuple=True)
        # one rising key for all rows, for cosines differ by 2 at most: row by row, best first
        found = (4.0 * at - scores[at, column].double()).sort().values
        in_row = torch.bincount(at, minlength=len(q))
        count += torch.searchsorted(found, 4.0 * row - bound.double())
        count -= (in_row.cumsum(0) - in_row)[row]  # those of the rows before
    return count


def same_class_found(positives: PositiveSets, labels: Tensor) -> float | None:
    """The share of all directed pairs of one class, labels [M], that stand in the sets.

    Images of a label below 0 are left out; None where no two images are of one class.
    """
    labels = labels.to(positives.device)
    pairs = sum(n * (n - 1) for n in torch.bincount(labels[labels >= 0]).tolist())
    right = same_label(labels, positives.sources(), positives.members).nansum(dtype=torch.float64)
    return float(right) / pairs if pairs else None
