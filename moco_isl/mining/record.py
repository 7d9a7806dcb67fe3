"""What a round of mining leaves: its report, and its record in the run folder.

Letters: M images, C feature dimension, E directed edges of the sets, A anchors looked at, k
neighbours.
"""

from dataclasses import dataclass, field

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


@dataclass
class RoundReport:
    """What a round of mining did and cost. `str` gives its line for the screen.

    None: not known. Edges are directed: a pair has two.
    """

    miner: str = ""  # its name; empty: nothing was mined
    round: int | None = None  # its number, from 1 on
    accepted: bool = True  # False: refused, and the sets are those of before
    why: str = ""  # why it was refused, or found nothing
    edges_found: int = 0
    edges_added: int = 0
    edges_dropped: int = 0
    edges: int = 0  # of the sets that it left, as the next three
    mean_size: float = 0.0  # positives an image
    coverage: float = 0.0  # share of the images that have any
    worst_in_degree: int = 0  # sets that the most popular image is in
    recall: float | None = None  # of the approximate search; None: the search was exact
    reach: float | None = None  # of the sets, see `reach.reach`; None: they are empty
    same_class_found: float | None = None  # the share of all pairs of one class that the sets hold
    # the precision of the sets, which is the share of right positives:
    precision_estimate: float | None = None  # by --isl-check, or the lower of the guesses
    precision_at_least: float | None = None  # by --isl-check, two standard deviations less
    precision_at_most: float | None = None  # and more; or at most so much, guessed without labels
    doubt: str | None = None  # why no estimate can be told
    labels_checked: int | None = None  # labelled images of --isl-check; None: there are none
    precision_surest: float | None = None  # of the surest pairs of a round that added none
    effective_rank: float | None = None  # see `estimate.effective_rank`
    apart: float | None = None  # see `estimate.apart`
    precision: float | None = None  # by the labels
    precision_own_nearest: float | None = None  # of each image's own nearest, at the same mean size
    precision_all_pairs: float | None = None  # of the most similar of all pairs, as many
    baselines: dict[str, list[float]] | None = None  # see `baselines`; None: there are no labels
    precision_ranked: dict[str, float] | None = None  # see `precision_of_ranking`
    seconds: float = 0.0
    peak_memory_gib: float = 0.0  # of the process so far; on a GPU, of the GPU
    memory_gib: float | None = None  # of the GPU so far
    extra: dict = field(default_factory=dict)  # the miner's own figures, plain values for JSON

    def figures(self) -> dict:
        """What metrics.jsonl holds of the round, with the miner's own figures among the others.

        What is not known is left out, but for reach and precision of the sets: these are null.
        """
        asked = ["reach", "precision_estimate", "precision_at_most"]
        if self.baselines is not None:
            asked += ["same_class_found"]
            asked += ["precision", "precision_own_nearest", "precision_all_pairs"]
        found = {name: value for name, value in vars(self).items() if value is not None}
        del found["extra"]
        return self.extra | dict.fromkeys(asked) | found

    def __str__(self) -> str:
        """One line: sets, their reach, GAN, precision where known, costs."""
        if not self.miner:
            return "no mining"
        parts = [self._sets()]
        if self.reach is not None:
            parts.append(self._reach())
        if "loss_D" in self.extra:
            parts.append(self._gan())
        parts += self._precision()
        if "labels_used" in self.extra:
            kinds = f"right ones {self.extra['right']}, wrong ones {self.extra['wrong']}"
            parts.append(f"LABELS WERE USED (--research-labels), {kinds}")
        parts.append(f"{self.seconds:.1f} s, peak {self.peak_memory_gib:.1f} GiB")
        if self.why:
            parts.append(self.why)
        return "; ".join(parts)

    def _sets(self) -> str:
        text = (
            f"{self.miner}: {self.mean_size:.2f} positives an image,"
            f" {100 * self.coverage:.1f} % have any, worst in-degree {self.worst_in_degree},"
            f" +{self.edges_added} -{self.edges_dropped} edges"
        )
        if self.recall is not None:
            text += f", recall {self.recall:.3f} of the approximate search"
        return text

    def _reach(self) -> str:
        text = f"reach {in_percent(self.reach)} % of all images"
        if self.same_class_found is not None:
            text += f", {in_percent(self.same_class_found)} % of the same-class pairs found"
        return text

    def _gan(self) -> str:
        gan = self.extra
        cosines = "/".join(f"{gan[f'cos_{x}']:.2f}" for x in ("anchor", "positive", "negative"))
        return (
            f"D {gan['loss_D']:.2f} G {gan['loss_G']:.2f} score {gan['score']:.2f},"
            f" proxy to a/p/n {cosines}, hub {100 * gan['hub']:.2f} %,"
            f" distinct {100 * gan['distinct']:.0f} %, {gan['iterations']} iterations"
        )

    def _precision(self) -> list[str]:
        """Of the sets and of both baselines by labels, where there are any; then the estimates."""
        parts = []
        if self.precision is not None:
            beside = [("own nearest", self.precision_own_nearest)]
            beside += [("all pairs", self.precision_all_pairs)]
            others = [f"{what} {share:.3f}" for what, share in beside if share is not None]
            text = f" ({', '.join(others)})" if others else ""
            parts.append(f"precision {self.precision:.3f}{text}")
        if self.precision_surest is not None:
            parts.append(f"precision {self.precision_surest:.3f} of the surest pairs, not added")
        share, most = self.precision_estimate, self.precision_at_most
        if self.precision_at_least is not None:
            parts.append(
                f"{share:.2f} by the labelled images ({self.precision_at_least:.2f} to {most:.2f})"
            )
        elif share is not None:
            parts.append(f"{share:.2f} to {most:.2f} by the estimate without labels")
        elif self.doubt:
            parts.append(f"no estimate: {self.doubt}")
        elif most is not None:
            parts.append(f"at most {most:.2f} by the estimate without labels")
        if self.labels_checked is not None:
            parts.append(f"LABELS OF {self.labels_checked} IMAGES WERE USED (--isl-check)")
        return parts


def in_percent(share: float) -> str:
    """A share in per cent, to one digit behind the point; two digits of what is below 1 %."""
    value = 100 * share
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def anchor_order(M: int) -> Tensor:
    """[M] int64: the order in which images are taken where a few stand for all.

    It depends on M alone, so that rounds and runs can be compared.
    """
    return torch.randperm(M, generator=torch.Generator().manual_seed(0))


def sample_anchors(M: int) -> Tensor:
    """[A] int64, ascending: all images, or the first ANCHORS of `anchor_order`."""
    return anchor_order(M)[:ANCHORS].sort().values


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
      labels_checked []          only of --isl-check: how many labelled images there were

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
    if getattr(miner, "uses_labels", False):
        record["labels_used"] = torch.tensor(True)
    if (known := getattr(miner, "known", None)) is not None:
        record["labels_checked"] = (known >= 0).sum()
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
        "labels_checked?": TensorOf("int", (), low=0),
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
) -> dict[str, float] | None:
    """{size: precision} of the miner's own ranking, as in the paper's Figure 3.

    None without a ranking. labels [M], below 0 where unknown. Only `sample_anchors` are ranked.
    """
    if "ranked" not in record:
        return None
    anchors = sample_anchors(len(labels))
    same = same_label(labels.cpu(), anchors[:, None], record["ranked"].long())  # [A, 100]
    share = lambda size: float(same[:, :size].nanmean().nan_to_num())
    return {str(size): share(size) for size in sizes}
