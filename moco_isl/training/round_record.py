"""What a round of mining leaves in the run folder for whoever looks later: the report, and studies
of the mining.

Letters: M images, C feature dimension, E directed edges of the sets, A anchors looked at, k
neighbours.
"""

import torch

from moco_isl.files import named
from moco_isl.mining.edges import pair_cosines
from moco_isl.mining.neighbors import topk
from moco_isl.mining.positives import PositiveSets, same_label
from moco_isl.schema import Holds, require
from moco_isl.schema import Tensor as TensorOf

Tensor = torch.Tensor

# features are kept whole up to this size in half precision: 16,384 images at C = 128
FEATURE_BYTES = 4 << 20
ANCHORS = 4096  # what stands for all images where they are more
NEAR = 512  # nearest images of an anchor
RANKED = 100  # the largest set a report asks about


def sample_anchors(M: int) -> Tensor:
    """[A] int64, ascending: all images, or 4,096 drawn from them; of M alone, so that rounds and
    runs can be compared.
    """
    order = torch.randperm(M, generator=torch.Generator().manual_seed(0))
    return order[:ANCHORS].sort().values


def nearest_of_sample(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """features [M, C] unit rows -> anchors [A], their nearest images [A, k] and cosines [A, k], the
    nearest first.
    """
    M = len(features)
    anchors = sample_anchors(M).to(features.device)
    cosine, near = topk(features[anchors], features, min(NEAR, M - 1), exclude=anchors)
    return anchors, near, cosine


@torch.no_grad()
def round_record(
    features: Tensor, positives: PositiveSets, miner, before: PositiveSets
) -> dict[str, Tensor]:
    """The record of a round, tensors on the CPU. It holds no labels: they are looked up where it is
    read.

    features [M, C]: unit rows the round was mined from; before: the sets it started from,
    positives: those it left.

      offsets [M + 1] int64, members [E] int32, sureness [E] float32   the sets, as `PositiveSets`
                                                                       has them cosine [E] float16
                                                                       of the two ends of each edge
                                                                       in these features features
                                                                       [M, C] float16
                                                                       where they fit into
                                                                       FEATURE_BYTES, otherwise
                                                                       anchors [A] int32, near [A,
                                                                       k] int32, near_cosine [A, k]
                                                                       float16 the nearest images of
                                                                       `sample_anchors` ranked [A,
                                                                       100] int32, score [A] float16
                                                                       where the miner can rank
                                                                       images for an anchor past the
                                                                       end of its set
                                                                       (`miner.ranking`), for
                                                                       `sample_anchors` labels_used
                                                                       []
                                                                       only where the miner was
                                                                       shown the labels

    10 bytes an edge, 8 an image, and at most 15 MB more.
    """
    M = len(features)
    record = {
        "offsets": positives.offsets,
        "members": positives.members.int(),
        "sureness": positives.sureness,
        "cosine": pair_cosines(features, positives.sources(), positives.members.long()).half(),
    }
    if features.numel() * 2 <= FEATURE_BYTES:
        record["features"] = features.half()
    else:
        anchors, near, cosine = nearest_of_sample(features)
        record |= {"anchors": anchors.int(), "near": near.int(), "near_cosine": cosine.half()}
    rank = getattr(miner, "ranking", None)
    ranking = (
        rank(features, before, sample_anchors(M).to(features.device), min(RANKED, M - 1))
        if rank
        else None
    )
    if ranking is not None:
        score, ranked, _ = ranking
        record |= {"ranked": ranked.int(), "score": score.half()}
    if getattr(miner, "report", {}).get("labels_used"):
        record["labels_used"] = torch.tensor(True)
    return {name: x.detach().cpu().contiguous() for name, x in record.items()}


def require_record(content: dict, path, M: int | None = None) -> None:
    """Hold what a file says of a round against the form that `round_record` gives it.

    M: images, if known. Raises BadInput.
    """
    sets = PositiveSets.state_shape("sureness", "cosine")
    rest = {
        "features?": TensorOf("float", ("M", None)),
        "anchors?": TensorOf("int", ("A",), low=0, high="M"),
        "near?": TensorOf("int", ("A", "k"), low=0, high="M"),
        "near_cosine?": TensorOf("float", ("A", "k")),
        "ranked?": TensorOf("int", ("R", None), low=0, high="M"),
        "score?": TensorOf("float", ("R",)),
        "labels_used?": TensorOf("bool", ()),
    }
    whole = Holds(
        sets._replace(shape={**sets.shape, **rest}),
        _goes_together,
        "features or the nearest of a sample, and a score for each ranking",
    )
    require(
        content, whole, f"cannot read the round in {named('', path)}", {} if M is None else {"M": M}
    )


def _goes_together(content: dict) -> bool:
    sample = sample_anchors(len(content["offsets"]) - 1)
    lists = [name in content for name in ("anchors", "near", "near_cosine")]
    if all(lists):
        known = "features" not in content and torch.equal(content["anchors"].long(), sample)
    else:
        known = "features" in content and not any(lists)
    ranked = ("ranked" in content) == ("score" in content)
    return known and ranked and len(content.get("score", sample)) == len(sample)


def precision_of_ranking(
    record: dict[str, Tensor], labels: Tensor, sizes: tuple[int, ...] = (5, 50)
) -> dict[str, dict[str, float]]:
    """Precision of the miner's own ranking at set sizes, {"precision_ranked": {size: share}}, as
    the paper's Figure 3; empty without a ranking.

    labels [M], below 0 where unknown; over `sample_anchors` alone.
    """
    if "ranked" not in record:
        return {}
    anchors, labels = sample_anchors(len(labels)), labels.cpu()
    same = same_label(labels, anchors[:, None], record["ranked"].long())  # [A, 100]
    return {
        "precision_ranked": {
            str(size): float(same[:, :size].nanmean().nan_to_num()) for size in sizes
        }
    }
