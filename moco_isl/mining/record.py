"""What a round of mining leaves in the run folder for whoever looks later: the report, and studies
of the mining.

Letters: M images, C feature dimension, E directed edges of the sets, A anchors looked at, k
neighbours.
"""

import torch

from moco_isl.files import named
from moco_isl.mining.edges import pair_cosines
from moco_isl.mining.positives import PositiveSets, same_label
from moco_isl.ops.neighbors import topk
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


def one_line(report: dict) -> str:
    """A round's report as one line for the screen, with the precision of the sets and of both
    baselines where somebody judged them.
    """
    if not report:
        return "no mining"
    text = (
        f"{report['miner']}: {report['mean_size']:.2f} positives an image,"
        f" {100 * report['coverage']:.1f} % have any, worst in-degree {report['worst_in_degree']},"
        f" +{report['edges_added']} -{report['edges_dropped']} edges"
    )
    if "recall" in report:
        text += f", recall {report['recall']:.3f} of the approximate search"
    if "loss_D" in report:
        cosines = [report[f"cos_{x}"] for x in ("anchor", "positive", "negative")]
        text += (
            f"; D {report['loss_D']:.2f} G {report['loss_G']:.2f} score {report['score']:.2f},"
            f" proxy to a/p/n {'/'.join(f'{x:.2f}' for x in cosines)},"
            f" hub {100 * report['hub']:.2f} %, distinct {100 * report['distinct']:.0f} %,"
            f" {report['iterations']} iterations"
        )
    if report.get("precision") is not None:
        text += f"; precision {report['precision']:.3f}"
        if report.get("precision_own_nearest") is not None:
            text += f" (own nearest {report['precision_own_nearest']:.3f}"
            if report.get("precision_all_pairs") is not None:
                text += f", all pairs {report['precision_all_pairs']:.3f}"
            text += ")"
    if report.get("precision_estimate") is not None:
        text += (
            f"; {report['precision_estimate']:.2f} estimated without labels, at most"
            f" {report['precision_at_most']:.2f}"
        )
    elif report.get("precision_at_most") is not None:
        text += f"; at most {report['precision_at_most']:.2f} by the estimate without labels"
    if report.get("labels_used"):
        text += (
            f"; LABELS WERE USED (--research-labels), right ones {report['right']}, wrong ones"
            f" {report['wrong']}"
        )
    text += f"; {report['seconds']:.1f} s, peak {report['peak_memory_gib']:.1f} GiB"
    return text + (f"; {report['why']}" if report["why"] else "")
