"""What a round of mining leaves: its record in the run folder, and its line on the screen.

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
    """[A] int64, ascending: all images, or ANCHORS of them.

    They depend on M alone, so that rounds and runs can be compared.
    """
    order = torch.randperm(M, generator=torch.Generator().manual_seed(0))
    return order[:ANCHORS].sort().values


def nearest_of_sample(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """features [M, C] unit rows -> anchors [A], their nearest images [A, k], cosines [A, k]."""
    M = len(features)
    anchors = sample_anchors(M).to(features.device)
    cosine, near = topk(features[anchors], features, min(NEAR, M - 1), exclude=anchors)
    return anchors, near, cosine


@torch.no_grad()
def round_record(
    features: Tensor, positives: PositiveSets, miner, before: PositiveSets
) -> dict[str, Tensor]:
    """The record of a round, tensors on the CPU. It holds no labels: its readers look them up.

    features [M, C]: unit rows the round was mined from; before: the sets it started from,
    positives: those it left.

      offsets [M + 1] int64      the sets, as `PositiveSets` has them
      members [E] int32
      sureness [E] float32
      cosine [E] float16         of the two ends of each edge in these features
      features [M, C] float16    where they fit into FEATURE_BYTES; otherwise:
      anchors [A] int32          `sample_anchors`
      near [A, k] int32          their nearest images
      near_cosine [A, k] float16
      ranked [A, 100] int32      where the miner can rank images past the end of a set
                                 (`miner.ranking`): for each of `sample_anchors` the first ones
      score [A] float16          and the score of its best proxy
      labels_used []             only where the miner was shown the labels

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
    ranking = None
    if hasattr(miner, "ranking"):
        anchors = sample_anchors(M).to(features.device)
        ranking = miner.ranking(features, before, anchors, min(RANKED, M - 1))
    if ranking is not None:
        score, ranked, _ = ranking
        record |= {"ranked": ranked.int(), "score": score.half()}
    if getattr(miner, "report", {}).get("labels_used"):
        record["labels_used"] = torch.tensor(True)
    return {name: x.detach().cpu().contiguous() for name, x in record.items()}


def require_record(content: dict, path, M: int | None = None) -> None:
    """Raise BadInput unless the content of a file is a `round_record`, of M images if known."""
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
    together = "features or the nearest of a sample, and a score for each ranking"
    whole = Holds(sets._replace(shape={**sets.shape, **rest}), _goes_together, together)
    known = {} if M is None else {"M": M}
    require(content, whole, f"cannot read the round in {named('', path)}", known)


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
    """{"precision_ranked": {size: share}}: how precise the miner's own ranking is at set sizes, as
    in the paper's Figure 3; empty without a ranking.

    labels [M], below 0 where unknown. Only `sample_anchors` are ranked.
    """
    if "ranked" not in record:
        return {}
    anchors = sample_anchors(len(labels))
    same = same_label(labels.cpu(), anchors[:, None], record["ranked"].long())  # [A, 100]
    share = lambda size: float(same[:, :size].nanmean().nan_to_num())
    return {"precision_ranked": {str(size): share(size) for size in sizes}}


def one_line(report: dict) -> str:
    """A round's report as one line for the screen: sets, GAN, precision where known, costs."""
    if not report:
        return "no mining"
    parts = [_sets(report)]
    if "loss_D" in report:
        parts.append(_gan(report))
    parts += _precision(report)
    parts.append(f"{report['seconds']:.1f} s, peak {report['peak_memory_gib']:.1f} GiB")
    if report["why"]:
        parts.append(report["why"])
    return "; ".join(parts)


def _sets(report: dict) -> str:
    text = (
        f"{report['miner']}: {report['mean_size']:.2f} positives an image,"
        f" {100 * report['coverage']:.1f} % have any, worst in-degree {report['worst_in_degree']},"
        f" +{report['edges_added']} -{report['edges_dropped']} edges"
    )
    if "recall" in report:
        text += f", recall {report['recall']:.3f} of the approximate search"
    return text


def _gan(report: dict) -> str:
    cosines = "/".join(f"{report[f'cos_{x}']:.2f}" for x in ("anchor", "positive", "negative"))
    return (
        f"D {report['loss_D']:.2f} G {report['loss_G']:.2f} score {report['score']:.2f},"
        f" proxy to a/p/n {cosines}, hub {100 * report['hub']:.2f} %,"
        f" distinct {100 * report['distinct']:.0f} %, {report['iterations']} iterations"
    )


def _precision(report: dict) -> list[str]:
    """Of the sets and of both baselines by labels, where there are any; then the estimates."""
    known = lambda name: report.get(name) is not None
    parts = []
    if known("precision"):
        beside = {"own nearest": "precision_own_nearest", "all pairs": "precision_all_pairs"}
        others = [f"{what} {report[name]:.3f}" for what, name in beside.items() if known(name)]
        text = f" ({', '.join(others)})" if others else ""
        parts.append(f"precision {report['precision']:.3f}{text}")
    if known("precision_estimate"):
        estimate = f"{report['precision_estimate']:.2f} estimated without labels"
        parts.append(f"{estimate}, at most {report['precision_at_most']:.2f}")
    elif known("precision_at_most"):
        most = f"at most {report['precision_at_most']:.2f}"
        parts.append(f"{most} by the estimate without labels")
    if report.get("labels_used"):
        parts.append(
            f"LABELS WERE USED (--research-labels), right ones {report['right']}, wrong ones"
            f" {report['wrong']}"
        )
    return parts
