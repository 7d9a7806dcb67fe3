"""Triplets of images: anchor, one of its positives, a hard negative (method.md, Eq. 1).

Letters: M images, C feature dimension, N anchors of a batch, S candidates of a draw, E directed
edges of the sets, B batches drawn at once.
"""

import torch

from moco_isl.errors import BadInput
from moco_isl.mining.positives import PositiveSets

Tensor = torch.Tensor

_POOL = 4096  # candidates of a draw, at most


class TripletSampler:
    """Draws positives and negatives for batches of anchors.

    The candidates of a draw are a window of one shuffled order of all images: S different images,
    and where an image stands in the window is arithmetic, so an anchor's positives are struck out
    without a table of N x M. The windows of `spread` do not overlap, so the triplets of one anchor
    never share a negative. Every shape depends on N, M and the sets alone: a draw can be captured
    into a CUDA graph.
    """

    def __init__(
        self,
        features: Tensor,
        positives: PositiveSets,
        batch: int,
        generator: torch.Generator,
        triplets: int = 5,
        search: Tensor | None = None,
    ):
        """features [M, C] unit rows; generator: on the CPU or the features' device; triplets of an
        anchor.

        search [M, C]: a copy in another dtype, in which the hardest negative is looked for. `batch`
        is the most anchors a call will have, of all batches drawn at once, all of them different.
        Raises BadInput where there are too few images, or sets so large that no negative may be
        left.
        """
        self.M, device = len(features), features.device
        self.search = features if search is None else search
        self.positives = positives
        self.generator = generator
        self.triplets = triplets
        self.pool = min(_POOL, self.M // max(4, triplets))  # S
        largest = positives.sizes().sort(descending=True).values[:batch]
        if self.pool < 3 or int(largest[0]) > self.pool - 3:
            raise BadInput(
                f"{self.M} images with up to {int(largest[0])} positives an image leave no"
                f" negatives among the {self.pool} candidates of a draw: mine more images, or with"
                " a smaller budget"
            )
        # The CPU may ask how many positives a batch has; a graph needs a bound that holds for every
        # batch.
        self.capacity = None if device.type == "cpu" else int(largest.sum())
        self.order = torch.empty(self.M, dtype=torch.int64, device=device)
        self.place = torch.empty_like(self.order)  # place[order[i]] = i
        self.slots = torch.arange(self.pool, device=device)  # of a window
        self.shuffle()

    def shuffle(self) -> None:
        """A new order, in place."""
        self.order.copy_(
            torch.randperm(self.M, generator=self.generator, device=self.generator.device)
        )
        self.place[self.order] = torch.arange(self.M, device=self.order.device)

    def spread(self, start: int) -> list[int]:
        """Offsets of one window a triplet; the windows do not overlap."""
        return [(start + t * self.M // self.triplets) % self.M for t in range(self.triplets)]

    def candidates(self, offset: Tensor | int) -> Tensor:
        """[S] images that may be negatives in the draw at `offset` (an int, or [1]); the last is
        given up, see below. offset [B, 1]: [B, S].
        """
        return self.order[(self.slots + offset) % self.M]

    def draw_positives(self, anchors: Tensor, u: Tensor) -> Tensor:
        """anchors [N], u [N] uniform in [0, 1) -> a member of each anchor's set [N]; the anchor
        while its set is empty. Both may have any other shape.
        """
        sets = self.positives
        if not sets.num_edges:
            return anchors
        first = sets.offsets[anchors]
        size = sets.offsets[anchors + 1] - first
        slot = torch.minimum((u * size).long(), size - 1)
        edge = (first + slot).clamp(0, sets.num_edges - 1)
        return torch.where(size > 0, sets.members[edge].long(), anchors)

    def draw_negatives(self, anchors: Tensor, offset: Tensor | int) -> Tensor:
        """anchors [N] -> the most similar of the candidates at `offset` [N], never the anchor nor a
        positive of it. Of several batches at once: anchors [B, N], offset [B, 1] -> [B, N].
        """
        candidates, scores = self.score_candidates(anchors, offset)
        return candidates.gather(-1, scores.max(-1).indices)  # argmax is slow in bfloat16

    def score_candidates(self, anchors: Tensor, offset: Tensor | int) -> tuple[Tensor, Tensor]:
        """anchors [N] -> the candidates at `offset` [S] and how similar each is to each anchor [N,
        S], -inf where it may be no negative. Of several batches at once: anchors [B, N], offset [B,
        1] -> [B, S], [B, N, S].
        """
        candidates = self.candidates(offset)
        scores = self.search[anchors] @ self.search[candidates].mT  # [B, N, S]
        row, image = self._forbidden(anchors.flatten())
        if isinstance(offset, Tensor):
            offset = offset.expand(anchors.shape).flatten()[row]
        # The last candidate is given up: everything forbidden that stands outside the window lands
        # on it.
        slot = ((self.place[image] - offset) % self.M).clamp(max=self.pool - 1)
        scores[..., -1].fill_(-torch.inf)
        scores.view(-1).index_fill_(0, row * self.pool + slot, -torch.inf)
        return candidates, scores

    def _forbidden(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (row of anchors, image): every anchor with itself and with each of its
        positives.
        """
        rows = torch.arange(len(anchors), device=anchors.device)
        sets = self.positives
        if not sets.num_edges:
            return rows, anchors
        first = sets.offsets[anchors]
        size = sets.offsets[anchors + 1] - first
        end = size.cumsum(0)
        flat = torch.arange(
            int(end[-1]) if self.capacity is None else self.capacity, device=anchors.device
        )
        row = torch.searchsorted(end, flat, right=True).clamp(max=len(anchors) - 1)
        edge = (first[row] + flat - (end - size)[row]).clamp(max=sets.num_edges - 1)
        image = torch.where(flat < end[-1], sets.members[edge].long(), anchors[row])
        return torch.cat([rows, row]), torch.cat([anchors, image])


def training_search(features: Tensor) -> Tensor:
    """The copy of features [M, C] in which training looks for hard negatives: bfloat16 on CPUs that
    multiply it natively (the search is half of an iteration's time in float32, and a negative
    within 0.005 of the hardest is as hard).
    """
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return features.bfloat16() if features.device.type == "cpu" and native() else features
