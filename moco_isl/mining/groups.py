"""Groups of images, clusters or subgraphs, and the pairs that stand together in them.

Letters: M images, C feature dimension, N anchors, H groupings, R others that share a group.
"""

from collections.abc import Callable, Sequence

import torch

from moco_isl.errors import RunFailed
from moco_isl.ops.neighbors import Tick

Tensor = torch.Tensor
_TOGETHER = 1 << 26  # numbers of one piece of rows that are compared
_PAIRS = 500_000_000  # more of them do not fit


class Groups:
    """Who stands together in groups [H, M]: the group of each image in each of H groupings."""

    def __init__(self, group: Tensor):
        self.group = group
        self.order = group.argsort(dim=1, stable=True)  # [H, M], images by their group
        size = [own.bincount() for own in group]
        self.size = size
        self.first = [own.cumsum(0) - own for own in size]  # where a group begins in `order`

    def others(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """The images that share a group with each of anchors [N]: [N, R] each, most shared first.

        Returns images, equally shared ones in their order, and in how many groupings they do; 0 is
        padding.
        """
        images, shared = [], []
        for h, own in enumerate(self.group):
            size = self.size[h][own[anchors]][:, None]  # [N, 1]
            place = torch.arange(int(size.max()), device=anchors.device)
            at = self.first[h][own[anchors]][:, None] + torch.minimum(place, size - 1)
            image = self.order[h][at]
            images.append(image)
            shared.append(((place < size) & (image != anchors[:, None])).float())
        return merged(torch.cat(images, dim=1), torch.cat(shared, dim=1))

    def edges(
        self, features: Tensor, anchors: Tensor, most: int | None = None, tick: Tick | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Edges from anchors [N] to those in their groups: src, dst, shared and cosine, [n] each.

        features [M, C]. Of each anchor the `most` most shared, among equals the most similar; None:
        all. tick: called between pieces, may raise Interrupted.
        """
        R = sum(int(size.max()) for size in self.size)
        pieces = anchors.split(max(1, _TOGETHER // (R * features.shape[1])))
        return over_pieces(pieces, lambda piece: self._edges(features, piece, most), tick)

    def _edges(self, features: Tensor, anchors: Tensor, most: int | None) -> tuple[Tensor, ...]:
        image, shared = self.others(anchors)  # [N, R] each
        own, rows = features[anchors].float(), features[image].float()  # [N, C], [N, R, C]
        cosine = torch.einsum("nc,nrc->nr", own, rows)
        # |cosine| <= 1, so it only orders equals
        rank_by = (shared + cosine / 4).masked_fill(shared == 0, -torch.inf)
        at = rank_by.sort(dim=1, descending=True, stable=True).indices[:, :most]
        image, shared, cosine = (x.gather(1, at) for x in (image, shared, cosine))
        found = shared > 0
        src = anchors[:, None].expand_as(found)[found]
        return src, image[found], shared[found], cosine[found]

    def require_pairs(self, cure: str) -> None:
        """Raise RunFailed where all groups join more pairs than can be held; cure: what to do."""
        pairs = sum(int(size.double().square().sum()) for size in self.size)
        if pairs > _PAIRS:
            largest = max(int(size.max()) for size in self.size)
            raise RunFailed(
                f"the largest of the groups has {largest} images, and all groups join {pairs:.1e}"
                f" pairs: expected at most {_PAIRS:.0e}; {cure}"
            )


def over_pieces(
    pieces: Sequence[Tensor], work: Callable[[Tensor], tuple[Tensor, ...]], tick: Tick | None
) -> tuple[Tensor, ...]:
    """Join what `work` gives for each piece. tick: called before each, may raise Interrupted."""
    parts = []
    for piece in pieces:
        if tick is not None:
            tick()
        parts.append(work(piece))
    return tuple(torch.cat(x) for x in zip(*parts))


def merged(image: Tensor, share: Tensor, keep: int | None = None) -> tuple[Tensor, Tensor]:
    """Each image of a row once, with its shares' sum: the `keep` highest, falling; None: all.

    image [N, R], share [N, R] >= 0. Equal sums are in the order of their images. Returns as many
    columns as are needed.
    """
    image, order = image.sort(dim=1)
    share = share.gather(1, order)
    first = torch.ones_like(image, dtype=torch.bool)
    torch.ne(image[:, 1:], image[:, :-1], out=first[:, 1:])
    place = first.cumsum(1) - 1  # [N, R] which distinct image of the row
    total = torch.zeros_like(share).scatter_add_(1, place, share)
    # after a row's last distinct image: image 0 with share 0
    image = torch.zeros_like(image).scatter_(1, place, image)
    total, order = total.sort(dim=1, descending=True, stable=True)
    width = max(1, int((total > 0).sum(1).max()))
    if keep is not None:
        width = min(keep, width)
    return image.gather(1, order)[:, :width], total[:, :width]
