"""What a user wants to know first, in plain words: does the mining of this run help or hurt?"""

import math
from dataclasses import dataclass
from pathlib import Path

from moco_isl.mining.rounds import NOTHING_SURE
from moco_isl.report.runs import Run
from moco_isl.schema import Holds, Number, read_json

# Measured on CIFAR-10 and on the digits: a third of the positives wrong cost 2 to 5 points of kNN,
# one in ten wrong paid.
HURTS, HELPS = 0.70, 0.90
NEAR = 0.02  # precisions this close to a bound are not told from it
LABELS_USED = "labels were used"
_PRECISION = Number(0, 1)


@dataclass
class Verdict:
    tone: str  # good, bad or open
    text: str


def read_breakeven(path: Path) -> dict:
    """Read the precision from which mined positives help. Raises BadInput.

    The file has {loss form: precision} or {loss form: {mean set size: precision}}; the answer has
    the second form.
    """
    sizes = Holds(
        {...: _PRECISION},
        lambda sizes: all(0 < float(size) < math.inf for size in sizes),
        "set sizes above 0",
    )
    example = 'JSON like {"meanlog": {"5": 0.84}, "logsum": 0.7}'
    content = read_json(path, {...: (_PRECISION, sizes)}, "--breakeven", example)
    return {
        form: {float(size): p for size, p in v.items()} if isinstance(v, dict) else {1.0: v}
        for form, v in content.items()
    }


def breakeven_of(table: dict | None, form: str, size: float) -> float | None:
    """The break-even of this loss form at the nearest set size that was measured."""
    sizes = (table or {}).get(form)
    if not sizes or not size:
        return None
    return sizes[min(sizes, key=lambda s: abs(math.log(max(s, 1e-9)) - math.log(size)))]


def judge(run: Run, table: dict | None = None) -> Verdict:
    """The verdict on a run; by the last round's precision where the run's own log has one.

    Of a run whose positives are drawn from labels it says so first.
    """
    verdict = _judge(run, table)
    if run.flags.get("research_labels"):
        text = (
            f"Research: {LABELS_USED} to draw the positives of this run, so what it reaches is no"
            f" result without labels. {verdict.text}"
        )
        return Verdict(verdict.tone, text)
    return verdict


def _judge(run: Run, table: dict | None) -> Verdict:
    if not run.rounds:
        if run.flags.get("miner", "none") == "none":
            return Verdict("open", "Nothing was mined: this run is plain MoCo.")
        return Verdict("open", "Nothing was mined yet: the first round is still to come.")
    last = run.rounds[-1].report
    if not last.get("edges"):
        # with --isl-trust an empty round is an answer, without it a failure
        tone = "open" if str(last.get("why")).startswith(NOTHING_SURE) else "bad"
        because = _because(last)
        text = f"The last round left no positives at all{because}: training went on without any."
        return Verdict(tone, text)
    refused = "" if run.rounds[-1].accepted else f" The last round added nothing{_because(last)}."
    breakeven = breakeven_of(table, run.flags.get("isl_loss", ""), last["mean_size"])
    known = last.get("precision") is not None and not math.isnan(last["precision"])
    tone, text = _with_labels(last, breakeven) if known else _without_labels(last, breakeven)
    return Verdict(tone, text + refused)


def _because(report: dict) -> str:
    return f" ({report['why']})" if report.get("why") else ""


def _with_labels(last: dict, breakeven: float | None) -> tuple[str, str]:
    precision = last["precision"]
    own = last.get("precision_own_nearest")
    pairs = last.get("precision_all_pairs")
    gap = 100 * (precision - own) if own is not None else 0.0
    text = f"{100 * precision:.0f} of 100 mined pairs are right"
    if own is not None:
        text = f"Mined pairs are {_compared(gap)} each image's own nearest neighbours at equal size"
        text += f" ({100 * precision:.1f} % and {100 * own:.1f} %)"
        if pairs is not None:
            text += (
                f", and {_compared(100 * (precision - pairs))} all pairs ranked by similarity"
                f" ({100 * pairs:.1f} %)"
            )
    tone, consequence = _consequence(precision, gap, breakeven)
    return tone, f"{text}: with {_wrong(precision)}, {consequence}."


def _compared(points: float) -> str:
    n = round(abs(points))
    if n == 0:
        return "as precise as"
    return f"{n} point{'s' * (n > 1)} {'more' if points > 0 else 'less'} precise than"


def _wrong(precision: float) -> str:
    wrong = 100 * (1 - precision)
    return f"{wrong:.0f} of 100 wrong" if wrong >= 0.95 else "fewer than 1 of 100 wrong"


def _consequence(precision: float, gap: float, breakeven: float | None) -> tuple[str, str]:
    if breakeven is not None:
        measured = f"the break-even measured for this loss is {breakeven:.2f}"
        if abs(precision - breakeven) <= NEAR:
            return "open", f"training on them will change little; {measured}"
        if precision > breakeven:
            return "good", f"training on them should help; {measured}"
        return "bad", f"training on them will likely hurt; {measured}"
    if precision < HURTS:
        return "bad", "training on them will likely hurt"
    if precision >= HELPS:
        return "good", "training on them should help"
    if gap <= -3:
        return "bad", "training on them will likely do worse than on plain nearest neighbours"
    seen = f"below {HURTS:.2f} mining was seen to cost accuracy, from {HELPS:.2f} on it paid"
    return "open", f"whether they help is open: {seen}"


def _without_labels(last: dict, breakeven: float | None) -> tuple[str, str]:
    tone = "open"
    text = (
        f"{100 * last['coverage']:.0f} % of the images have positives, {last['mean_size']:.1f} each"
        " on average over all. How many of them are right needs labels: add --labels where there"
        " are any, or look at the images below."
    )
    estimate, most = estimates(last)
    if estimate is not None:
        found, consequence = _consequence(estimate, 0.0, breakeven)
        tone = found if found == "good" else "open"  # the estimate may be too low
        text += (
            f" By the estimate without labels {100 * estimate:.0f} of 100 pairs are right (too few"
            f" where the encoder is young): if so, {consequence}."
        )
    elif most is not None:
        text += (
            f" By the estimate without labels at most {100 * most:.0f} of 100 pairs are right; on a"
            " weak encoder it was 35 points too high (--isl-trust makes a better one)."
        )
    if (distinct := last.get("distinct")) is not None and distinct < 0.3:
        text += (
            f" The proxies are crowded: only {100 * distinct:.0f} % of them have a nearest image of"
            " their own."
        )
    return tone, text


def estimates(report: dict) -> tuple[float | None, float | None]:
    """The share of a round's pairs that is right, estimated without labels: by two views, at most.

    None where there is no such estimate.
    """
    return report.get("precision_estimate"), report.get("precision_at_most")


def gains(runs: list[Run]) -> list[str]:
    """A line for every run that mined and has a counterpart without mining, see `_comparable`."""
    lines = []
    for run in (run for run in runs if run.rounds):
        plain = next((other for other in runs if _comparable(run, other)), None)
        if plain is None:
            continue
        gap = _last_knn(run) - _last_knn(plain)
        compared = "the same as"
        if abs(gap) >= 0.05:
            compared = f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}"
        text = f"{run.name} ends at {_last_knn(run):.1f} % kNN, {compared} {plain.name}"
        lines.append(f"{text}, which mined nothing. One run each: a point or less may be chance.")
    return lines


def _comparable(run: Run, plain: Run) -> bool:
    """Whether a run without mining differs from this one in nothing else, and both logged kNN."""
    if plain.rounds or plain.images != run.images or len(plain.epochs) != len(run.epochs):
        return False
    same = ("arch", "init", "lr", "batch_size")
    if any(plain.flags.get(name) != run.flags.get(name) for name in same):
        return False
    return _last_knn(plain) is not None and _last_knn(run) is not None


def _last_knn(run: Run) -> float | None:
    return next((line["knn"] for line in reversed(run.epochs) if "knn" in line), None)
