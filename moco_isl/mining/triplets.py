"""Triplets of images: anchor, one of its positives, a hard negative (method.md, Eq. 1).

Letters: M images, C feature dimension, N anchors of a batch, S candidates of a draw, E directed edges of the sets.
"""

import torch

from moco_isl.errors import BadInput
from moco_isl.mining.positives import PositiveSets

Tensor = torch.Tensor

TRIPLETS = 5  # an anchor, each with its own draw of candidates
_POOL = 4096  # candidates of a draw, at most


class TripletSampler:
    """Draws positives and negatives for batches of anchors.

    The candidates of a draw are a window of one shuffled order of all images: S different images, and where an image
    stands in the window is arithmetic, so an anchor's positives are struck out without a table of N x M. Windows at
    `spread` offsets do not overlap, so five triplets of an anchor never share a negative.
    Every shape depends on N, M and the sets alone: a draw can be captured into a CUDA graph.

    features [M, C] unit rows. Raises BadInput where M or the sets leave no negatives.
    """

    def __init__(self, features: Tensor, positives: PositiveSets, batch: int, generator: torch.Generator):
        M, device = len(features), features.device
        self.M, self.features, self.positives, self.generator = M, features, positives, generator
        self.pool = min(_POOL, M // TRIPLETS)  # S
        largest = positives.sizes().sort(descending=True).values[:batch]
        if self.pool < 3 or int(largest[0]) > self.pool - 3:
            raise BadInput(f"mining with {M} images and up to {int(largest[0])} positives an image leaves no negatives "
                           f"among {self.pool} candidates: take more images or a smaller budget")
        # The CPU may read how many positives a batch has; a graph needs a bound that holds for every batch.
        self.capacity = None if device.type == "cpu" else int(largest.sum())
        self.order = torch.empty(M, dtype=torch.int64, device=device)
        self.place = torch.empty_like(self.order)  # place[order[i]] = i
        self.shuffle()

    def shuffle(self) -> None:
        """A new order, in place."""
        self.order.copy_(torch.randperm(self.M, generator=self.generator, device=self.generator.device))
        self.place[self.order] = torch.arange(self.M, device=self.order.device)

    def spread(self, start: int) -> list[int]:
        """Offsets of five windows that do not overlap."""
        return [(start + t * self.M // TRIPLETS) % self.M for t in range(TRIPLETS)]

    def draw_positives(self, anchors: Tensor, u: Tensor) -> Tensor:
        """anchors [N], u [N] uniform in [0, 1) -> a member of each anchor's set [N]; the anchor while its set is empty."""
        sets = self.positives
        if not sets.num_edges:
            return anchors
        first = sets.offsets[anchors]
        size = sets.offsets[anchors + 1] - first
        slot = torch.minimum((u * size).long(), size - 1)
        return torch.where(size > 0, sets.members[(first + slot).clamp(min=0)].long(), anchors)

    def draw_negatives(self, anchors: Tensor, offset: Tensor | int) -> Tensor:
        """anchors [N] -> the most similar of the S candidates at `offset` [N], never the anchor nor a positive of it."""
        window = (torch.arange(self.pool, device=anchors.device) + offset) % self.M
        candidates = self.order[window]  # [S]
        scores = self.features[anchors] @ self.features[candidates].T  # [N, S]
        row, image = self._forbidden(anchors)
        # The last candidate is given up: everything forbidden that stands outside the window lands on it.
        slot = ((self.place[image] - offset) % self.M).clamp(max=self.pool - 1)
        scores[:, -1] = -torch.inf
        scores[row, slot] = -torch.inf
        return candidates[scores.argmax(1)]

    def _forbidden(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (row of anchors, image): every anchor with itself and with each of its positives."""
        rows = torch.arange(len(anchors), device=anchors.device)
        sets = self.positives
        if not sets.num_edges:
            return rows, anchors
        first = sets.offsets[anchors]
        size = sets.offsets[anchors + 1] - first
        end = size.cumsum(0)
        flat = torch.arange(int(end[-1]) if self.capacity is None else self.capacity, device=anchors.device)
        row = torch.searchsorted(end, flat, right=True).clamp(max=len(anchors) - 1)
        edge = first[row] + flat - (end - size)[row]
        image = torch.where(flat < end[-1], sets.members[edge.clamp(max=sets.num_edges - 1)].long(), anchors[row])
        return torch.cat([rows, row]), torch.cat([anchors, image])
