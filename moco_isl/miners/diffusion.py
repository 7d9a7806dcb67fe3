"""Affinity diffusion, after PAD (Huang et al. 2020): many short paths between images join them.

Letters: M images, C feature dimension, N anchors of a block, k neighbours, R images reached from an
anchor.
"""

from dataclasses import dataclass

import torch

from moco_isl import dist
from moco_isl.mining.edges import Edges
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import RoundMiner, over_blocks
from moco_isl.ops.neighbors import Tick, topk
from moco_isl.options import check_range, opt

Tensor = torch.Tensor

_REACH = 1024  # images that a walk goes on from, the likeliest ones
_TOGETHER = 1 << 22  # entries of one piece of walks


@dataclass(eq=False)
class DiffusionMiner(RoundMiner):
    """The pairs of highest diffused affinity in the graph of mutual k nearest neighbours.

    Affinity of mutual neighbours: max(cosine, 0); S is that over k, so that no row sums to more
    than 1. Diffused: F = sum over t = 1..steps of decay^(t-1) S^t, the walks of up to `steps`
    edges; exact as long as no more than 1,024 images are t edges away. Each image offers its
    `candidates` (None: see `offered`) highest F, an edge is as sure as its F, and the
    budget takes the surest of the data set.

    F is not divided by the images' own sums of affinities, as walks often are: two images with no
    neighbours but each other would then be the surest pair (seen on features of CIFAR-10, 10,000
    images, 5 positives an image: precision 0.52 in place of 0.65).
    """

    name = "diffusion"
    k: int = opt(
        20,
        "--isl-neighbors",
        low=1,
        metavar="k",
        help="nearest images of each in the graph",
    )
    steps: int = opt(
        2, "--isl-walk", low=1, metavar="n", help="edges of the longest walk through the graph"
    )
    candidates: int | None = None
    decay: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        check_range("DiffusionMiner: candidates", self.candidates, 1)
        check_range("DiffusionMiner: decay", self.decay, 0, 1, low_open=True)

    def find(
        self, features: Tensor, positives: PositiveSets, seed: int, tick: Tick | None
    ) -> tuple[Edges, str]:
        M, device = len(features), features.device
        k = min(self.k, M - 1)
        bank = self.searchable(features, tick)
        nearest = lambda anchors, number: topk(features[anchors], bank, k, anchors, tick=tick)
        # [M, k] each: in order
        _, cosine, near = (dist.all_gather_rows(x) for x in over_blocks(M, device, nearest, tick))
        mutual, S = mutual_graph(near, cosine)
        self.report.extra |= {
            "mutual": float(mutual.float().mean()),
            "alone": float((~mutual.any(1)).float().mean()),
        }

        keep = min(self.candidates or self.offered(M), M)

        def walk(anchors: Tensor, number: int) -> tuple[Tensor, Tensor]:
            pieces = anchors.split(max(1, _TOGETHER // (min(_REACH, k ** (self.steps - 1)) * k)))
            walked = [diffuse(piece, near, S, self.steps, self.decay, keep) for piece in pieces]
            return tuple(torch.cat(x) for x in zip(*walked))

        # [n], [n, candidates], [n, candidates]
        anchors, reached, F = over_blocks(M, device, walk, tick)
        found = F > 0
        any_found = int(dist.all_reduce_max(found.any().int()))
        alone = "no two images are mutual neighbours of positive cosine"
        self.report.why = "" if any_found else alone
        return Edges(anchors[:, None].expand_as(found)[found], reached[found], F[found]), ""


def mutual_graph(near: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Which of each image's k nearest have it among their own, and their affinities.

    near, cosine [M, k]: images and cosines of the k nearest. Returns mutual [M, k] bool, and
    S [M, k]: max(cosine, 0) / k of mutual neighbours, 0 elsewhere.
    """
    M, k = near.shape
    mutual = torch.empty_like(near, dtype=torch.bool)
    for column in range(k):  # [M, k] at a time, not [M, k, k]
        mutual[:, column] = (
            near[near[:, column]] == torch.arange(M, device=near.device)[:, None]
        ).any(1)
    return mutual, torch.where(mutual, cosine.clamp(min=0) / k, 0)


def diffuse(
    anchors: Tensor, near: Tensor, S: Tensor, steps: int, decay: float, keep: int
) -> tuple[Tensor, Tensor]:
    """Rows `anchors` [N] of F = sum of decay^(t-1) S^t: their `keep` highest entries.

    near, S: [M, k], row i holding the non-zero columns of S_i and their values. Returns images
    [N, keep] and F [N, keep]. The diagonal is left out; places without an image have F 0.
    """
    N = len(anchors)
    # row of S^0
    image = anchors[:, None]
    share = torch.ones(N, 1, device=S.device, dtype=S.dtype)
    images, shares = [], []
    for t in range(steps):
        share = (share[:, :, None] * S[image]).flatten(1)  # [N, R k]
        image = near[image].flatten(1)
        image, share = _merge(image, share, _REACH)
        images.append(image)
        shares.append(share * decay**t)
    image, share = torch.cat(images, 1), torch.cat(shares, 1)
    return _merge(image, torch.where(image == anchors[:, None], 0, share), keep, fill=True)


def _merge(image: Tensor, share: Tensor, keep: int, fill: bool = False) -> tuple[Tensor, Tensor]:
    """Each image of a row once, with its shares' sum: the `keep` highest, falling.

    image [N, R], share [N, R] >= 0. Equal sums are in the order of their images. Returns as many
    columns as are needed, or with `fill` exactly `keep`.
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
    image, width = image.gather(1, order), keep
    if not fill:
        width = min(keep, max(1, int((total > 0).sum(1).max())))
    elif image.shape[1] < keep:
        image, total = (torch.nn.functional.pad(x, (0, keep - x.shape[1])) for x in (image, total))
    return image[:, :width], total[:, :width]
