"""What a user wants to know first, in plain words: did the mining of this run help or hurt?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moco_isl.commands import as_typed
from moco_isl.mining.rounds import NOTHING_SURE
from moco_isl.report.outcome import Change, changes, find_twin
from moco_isl.report.runs import Run
from moco_isl.schema import Holds, Number, read_json

# Precision alone does not decide: sets of 0.77 to 0.82, 150 wide, were worth most on the digits,
# sets of 0.50 cost on letters. Above this one, mining was seen to pay.
HIGH = 0.9
NEAR = 0.02  # precisions this close to a break-even are not told from it
LABELS_USED = "labels were used"
PLAIN = {  # what a run of an objective is where nothing is mined
    "queue": "plain MoCo",
    "bank": "plain instance discrimination",
    "deepcluster": "DeepCluster, which has clusters in place of sets",
    "rotnet": "RotNet, which compares no images",
}
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


def judge(run: Run, runs: Sequence[Run] = (), table: dict | None = None) -> Verdict:
    """The verdict on a run, in two sentences at most: what came out first, precision second.

    runs: those given with it; one of them may be its twin without mining (`outcome.find_twin`).
    table: see `read_breakeven`. Of a run whose positives are drawn from labels it says so first.
    """
    verdict = _judge(run, runs, table)
    if run.flags.get("research_labels"):
        verdict.text = f"Research, {LABELS_USED}: {verdict.text}"
    elif run.rounds and (checked := run.rounds[-1].report.get("labels_checked")):
        verdict.text = f"With the labels of {checked} images (--isl-check): {verdict.text}"
    return verdict


def _judge(run: Run, runs: Sequence[Run], table: dict | None) -> Verdict:
    if not run.rounds:
        if run.flags.get("miner", "none") == "none":
            plain = PLAIN.get(run.flags.get("objective", "queue"), "without mined positives")
            return Verdict("open", f"Nothing was mined: this run is {plain}.")
        return Verdict("open", "Nothing was mined yet: the first round is still to come.")
    last = run.rounds[-1].report
    sets = _sets(last)
    twin = find_twin(run, runs)
    changed = changes(run, twin) if twin else []
    if changed:
        tone, text = _outcome(changed)
        return Verdict(tone, f"{text} against the same epochs without it ({twin.name}). {sets}.")
    tone, expected = _expectation(run, last, table)
    todo = "to see, run the same with --miner none and give both runs"
    if twin:
        todo = (
            f"to see, judge it and {twin.name} with {as_typed('python main_knn.py')} --out RUN/knn"
        )
    return Verdict(tone, f"{sets}. {expected}; {todo}.")


def _outcome(changed: Sequence[Change]) -> tuple[str, str]:
    """Tone and words for changes, at least one."""
    points = ", ".join(map(str, changed))
    sides = {change.beyond_chance for change in changed} - {0}
    if not sides:
        return "open", f"Mining changed no more than chance may: {points} points"
    if len(sides) > 1:
        return "open", f"Mining helped in one figure and hurt in another: {points} points"
    if 1 in sides:
        return "good", f"Mining helped: {points} points"
    return "bad", f"Mining hurt: {points} points"


def _sets(last: dict) -> str:
    """How right and how wide the sets of the last round are."""
    because = f": {last['why'].partition(':')[0]}" if last.get("why") else ""
    if not last.get("edges"):
        return f"The last round left no positives{because}"
    estimate, most = estimates(last)
    wide = f"{last['mean_size']:.0f} an image"
    if (precision := _precision(last)) is not None:
        text = f"{_of_100(precision)} mined pairs are right, {wide}"
    elif estimate is not None and last.get("labels_checked"):
        text = f"By labelled images {_of_100(estimate)} mined pairs are right, {wide}"
    elif estimate is not None:
        text = f"An estimate without labels calls {_of_100(estimate)} mined pairs right, {wide}"
    elif most is not None:
        text = f"An estimate without labels calls at most {_of_100(most)} mined pairs right, {wide}"
    else:
        text = f"Sets hold {wide}; how many pairs are right needs labels (--labels)"
    refused = "" if last.get("accepted", True) else f"; the last round added nothing{because}"
    return text + refused


def _of_100(precision: float) -> str:
    if 0.995 <= precision < 1:
        return "more than 99 of 100"
    return f"{100 * precision:.0f} of 100"


def _precision(last: dict) -> float | None:
    """The precision by labels; None where there is none."""
    precision = last.get("precision")
    return None if precision is None or math.isnan(precision) else precision


def _expectation(run: Run, last: dict, table: dict | None) -> tuple[str, str]:
    """Tone and words where no outcome is known: no estimate without labels is enough for either."""
    precision = _precision(last)
    if not last.get("edges"):
        # with --isl-trust an empty round is an answer, without it a failure
        tone = "open" if str(last.get("why")).startswith(NOTHING_SURE) else "bad"
        return tone, "Expect no gain from it"
    if precision is None:
        return "open", "Whether mining helps is open"
    even = breakeven_of(table, run.flags.get("isl_loss", ""), last["mean_size"])
    measured = "" if even is None else f" (break-even measured at {even:.2f})"
    if precision > (HIGH if even is None else even + NEAR):
        return "good", f"Expect a gain{measured}"
    if even is None:
        return "open", "Whether mining helps is open"
    if precision >= even - NEAR:
        return "open", f"Expect little change{measured}"
    return "bad", f"Expect a loss{measured}"


def estimates(report: dict) -> tuple[float | None, float | None]:
    """The share of a round's pairs that is right, by an estimate: the likely one, and at most.

    The estimate is that of --isl-check, or a guess without labels. None where there is none.
    """
    return report.get("precision_estimate"), report.get("precision_at_most")
