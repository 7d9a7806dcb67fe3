"""The zone in between: images too near to be negatives and too doubtful to be positives.

Letters: M images, C feature dimension, n nearest.
"""

from collections.abc import Callable

import torch

from moco_isl.mining.edges import Edges
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.rounds import gather_edges, over_blocks
from moco_isl.ops.neighbors import Tick, topk

Tensor = torch.Tensor


@torch.no_grad()
def in_between(
    features: Tensor,
    positives: PositiveSets,
    n: int,
    tick: Tick | None = None,
    searchable: Callable | None = None,
) -> PositiveSets:
    """Of every image those of its n nearest by features [M, C] (unit rows) that are not in its set
    of positives; equal on all ranks.

    What to leave out of its negatives without pulling at it, as in the elimination of Huynh et al.,
    2022 (False negative cancellation). searchable: of the round's miner (`RoundMiner.searchable`),
    which may index the features; None: they are searched exactly. Raises Interrupted on every rank
    where tick raised it on one.
    """
    M, device = len(features), features.device
    # which multiplies half precision slowly
    features = features.float() if device.type == "cpu" else features
    n = min(n, M - 1)
    bank = searchable(features, tick) if searchable else features
    anchors, cosine, near = over_blocks(
        M, device, lambda rows, _: topk(features[rows], bank, n, rows, tick=tick), tick
    )
    found = gather_edges(Edges(anchors.repeat_interleave(n), near.flatten(), cosine.flatten()))
    src, dst = found.src.long(), found.dst.long()
    doubtful = ~torch.isin(src * M + dst, positives.sources() * M + positives.members.long())
    return PositiveSets.from_edges(
        M, src[doubtful], dst[doubtful], symmetric=False, sureness=found.sureness[doubtful]
    )
