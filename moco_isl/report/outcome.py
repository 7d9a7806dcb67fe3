"""What a run reached, and what its mining changed: its figures beside those of its twin.

The twin of a run is the same training without mining.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from moco_isl import files
from moco_isl.evaluation.results import RESULTS, read_results
from moco_isl.report.runs import Run
from moco_isl.training.options import default_flags

# flags in which a run and its twin agree, beside images and number of epochs
SAME = (
    *("arch", "stem", "objective", "init", "symmetric", "mlp", "bn_splits", "predictor"),
    *("image_size", "channels", "bits", "mean", "std", "aug_plus", "crop_min"),
    *("optimizer", "lr", "warmup_epochs", "cos", "schedule", "momentum", "weight_decay"),
    *("isl_rounds", "batch_size", "stop_grad_conv1"),
    *("moco_dim", "moco_k", "moco_m", "moco_t"),
)
# points that chance alone makes between two runs
NOISE, NOISE_OF_SHOTS = 1.0, 3.0


@dataclass
class Change:
    """Points by which a run differs from its twin in a figure: "kNN", "linear" or "n-shot"."""

    figure: str
    points: float

    @property
    def beyond_chance(self) -> int:
        """1 for more, -1 for less, 0 where chance alone may be the reason."""
        noise = NOISE_OF_SHOTS if self.figure.endswith("shot") else NOISE
        return 0 if abs(self.points) <= noise else 1 if self.points > 0 else -1

    def __str__(self) -> str:
        points = f"{self.points:+.1f}".replace("-0.0", "+0.0").replace("-", "−")
        return f"{self.figure} {points}"


def find_twin(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run among these that differs from this one in nothing but that it did not mine.

    Of several the one with the same seed, else the first; None where there is none.
    """
    twins = [other for other in runs if not other.rounds and _alike(run, other)]
    same_seed = [other for other in twins if other.flags.get("seed") == run.flags.get("seed")]
    return next(iter(same_seed + twins), None)


def _alike(run: Run, other: Run) -> bool:
    if other.images != run.images or len(other.epochs) != len(run.epochs):
        return False
    ours, theirs = ({**_defaults(), **x.flags} for x in (run, other))
    return all(ours.get(name) == theirs.get(name) for name in SAME)


@cache
def _defaults() -> dict:
    """Of flags that a run of an earlier version does not know; it was trained with them."""
    return {**default_flags("none"), "channels": 3, "bits": 8}


def changes(run: Run, twin: Run) -> list[Change]:
    """A change for each figure that both have, measured in the same way; by name."""
    ours, theirs = reached(run), reached(twin)
    found = {}
    for (figure, *how), accuracy in ours.items():
        other = theirs.get((figure, *how))
        if other is not None and figure not in found:
            found[figure] = Change(figure, accuracy - other)
    return [found[figure] for figure in sorted(found)]


def reached(run: Run) -> dict[tuple, float]:
    """(figure, how it was measured) -> accuracy in per cent.

    They stand in results.json of main_lincls.py and main_knn.py, in the run's folder or a folder in
    it, if they are of the run's last epoch; and in the run's own log. Raises BadInput for damaged
    files.
    """
    found = {}
    for path in sorted([run.path / RESULTS, *run.path.glob(f"*/{RESULTS}")]):
        if files.kind(path) == "file":
            found |= dict(_figures(read_results(path), len(run.epochs)))
    logged = [line for line in run.epochs if "knn" in line]
    if logged:
        found["kNN", "logged", logged[-1]["epoch"]] = logged[-1]["knn"]
    return found


def _figures(results: dict, epochs: int) -> Iterator[tuple[tuple, float]]:
    """What stands in a results.json. Of several layers the last comes first."""
    if str(results.get("epoch")) != str(epochs):
        return
    how = tuple(results.get(name) for name in ("dataset", "protocol", "encoder"))
    for row in results.get("few_labels", [])[:1]:
        yield (f"{row['shots']}-shot", *how), row["top1"]
    for row in results.get("results", []):
        yield ("kNN", *how, *(row.get(name) for name in ("feature", "k", "T"))), row["top1"]
    for row in reversed(results.get("classifiers", [])):
        if row.get("chosen"):
            yield ("linear", *how, row.get("layer")), row["top1"]
