"""Triplets of images for Eq. 1: anchor, one of its positives, a hard negative.

Letters: M images, C feature dimension, N anchors of a batch, S candidates of a draw, B batches
drawn at once.
"""

import torch

from moco_isl.errors import BadInput
from moco_isl.mining.positives import PositiveSets

Tensor = torch.Tensor

_POOL = 4096  # candidates of a draw, at most


def pool_size(M: int, triplets: int) -> int:
    """S, candidates of a draw among M images, of which an anchor has so many triplets."""
    return min(_POOL, M // max(4, triplets))


def largest_set(M: int, triplets: int) -> int:
    """Positives that an image of M may have: more could leave no negative among a draw's S."""
    return pool_size(M, triplets) - 3


class TripletSampler:
    """Draws positives and negatives for batches of anchors.

    The candidates of a draw are a window of one shuffled order of all images: S different images.
    The place of an image in the window is computed, so an anchor's positives are struck out
    without a table of N x M. The windows of `spread` do not overlap, so the triplets of an anchor
    never share a negative. Every shape depends on N, M and the sets alone, so that a CUDA graph can
    hold a draw.
    """

    def __init__(
        self,
        features: Tensor,
        positives: PositiveSets,
        batch: int,
        generator: torch.Generator,
        triplets: int = 5,
        search: Tensor | None = None,
        own_row: bool = False,
    ):
        """features [M, C] unit rows.

        batch: the most anchors a call will have, all different, over all batches drawn at once.
        generator: on the CPU or on the features' device. triplets: of an anchor. search [M, C]: a
        copy of the features in another dtype, in which the hardest negative is looked for. own_row:
        the positive of a triplet is the anchor itself, as the published code has it.
        Raises BadInput where images are so few, or sets so large, that no negative may be left.
        """
        self.M = len(features)
        device = features.device
        self.search = features if search is None else search
        self.positives = positives
        self.generator = generator
        self.triplets = triplets
        self.own_row = own_row
        self.pool = pool_size(self.M, triplets)  # S
        sizes = positives.sizes().sort(descending=True).values[:batch]
        largest = int(sizes[0])
        if self.pool < 4 or largest > largest_set(self.M, triplets):
            raise BadInput(
                f"{self.M} images with up to {largest} positives an image leave no negatives among"
                f" the {self.pool} candidates of a draw: mine more images, or with a smaller budget"
            )
        # How many positives a batch has: a graph needs a bound that holds for every batch, the CPU
        # counts (None).
        self.capacity = None if device.type == "cpu" else int(sizes.sum())
        self.order = torch.empty(self.M, dtype=torch.int64, device=device)
        self.place = torch.empty_like(self.order)  # place[order[i]] = i
        self.slots = torch.arange(self.pool, device=device)  # the places of a window
        self.shuffle()

    def shuffle(self) -> None:
        """A new order, in place."""
        generator = self.generator
        self.order.copy_(torch.randperm(self.M, generator=generator, device=generator.device))
        self.place[self.order] = torch.arange(self.M, device=self.order.device)

    def spread(self, start: int) -> list[int]:
        """Offsets of one window a triplet; the windows do not overlap."""
        return [(start + t * self.M // self.triplets) % self.M for t in range(self.triplets)]

    def candidates(self, offset: Tensor | int) -> Tensor:
        """offset, an int or [1] -> the candidates of that draw, images [S]; [B, 1] -> [B, S].

        The last of them is never drawn, see `score_candidates`.
        """
        return self.order[(self.slots + offset) % self.M]

    def draw_positives(self, anchors: Tensor, u: Tensor) -> Tensor:
        """Draw a member of each anchor's set [N], or the anchor itself where the set is empty.

        anchors [N], u [N] uniform in [0, 1). Both may have any other shape.
        """
        sets = self.positives
        if self.own_row or not sets.num_edges:
            return anchors
        first, size = self._sets_of(anchors)
        slot = torch.minimum((u * size).long(), size - 1)
        edge = (first + slot).clamp(0, sets.num_edges - 1)
        return torch.where(size > 0, sets.members[edge].long(), anchors)

    def draw_negatives(self, anchors: Tensor, offset: Tensor | int) -> Tensor:
        """The candidate at `offset` that is most similar to each anchor [N].

        It is never the anchor nor one of its positives. For several batches at once: anchors [B,
        N], offset [B, 1] -> [B, N].
        """
        candidates, scores = self.score_candidates(anchors, offset)
        return candidates.gather(-1, scores.max(-1).indices)  # argmax is slow in bfloat16

    def score_candidates(self, anchors: Tensor, offset: Tensor | int) -> tuple[Tensor, Tensor]:
        """The candidates at `offset` [S] and their similarity to each anchor [N, S].

        The similarity is -inf where a candidate may not be a negative. For several batches at once:
        anchors [B, N], offset [B, 1] -> [B, S], [B, N, S].
        """
        candidates = self.candidates(offset)
        scores = self.search[anchors] @ self.search[candidates].mT  # [B, N, S]
        row, image = self._forbidden(anchors.flatten())
        if isinstance(offset, Tensor):
            offset = offset.expand(anchors.shape).flatten()[row]
        # Forbidden images outside the window are all set on the last candidate, which is given up.
        slot = ((self.place[image] - offset) % self.M).clamp(max=self.pool - 1)
        scores[..., -1].fill_(-torch.inf)
        scores.view(-1).index_fill_(0, row * self.pool + slot, -torch.inf)
        return candidates, scores

    def _sets_of(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """anchors [N] -> where the set of each begins among the members [N], and its size [N]."""
        first = self.positives.offsets[anchors]
        return first, self.positives.offsets[anchors + 1] - first

    def _forbidden(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (row of anchors, image) of every anchor with itself and each of its positives."""
        rows = torch.arange(len(anchors), device=anchors.device)
        sets = self.positives
        if not sets.num_edges:
            return rows, anchors
        first, size = self._sets_of(anchors)
        end = size.cumsum(0)
        count = int(end[-1]) if self.capacity is None else self.capacity
        flat = torch.arange(count, device=anchors.device)
        row = torch.searchsorted(end, flat, right=True).clamp(max=len(anchors) - 1)
        edge = (first[row] + flat - (end - size)[row]).clamp(max=sets.num_edges - 1)
        image = torch.where(flat < end[-1], sets.members[edge].long(), anchors[row])
        return torch.cat([rows, row]), torch.cat([anchors, image])


def training_search(features: Tensor) -> Tensor:
    """The copy of features [M, C] in which training looks for hard negatives.

    It is bfloat16 on CPUs that multiply it natively: in float32 the search is half of an
    iteration's time, and a negative within 0.005 of the hardest is as hard.
    """
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return features.bfloat16() if features.device.type == "cpu" and native() else features
