"""The paper's Figure 4: kNN by score threshold, radius and sampling times, one at a time.

    python -m studies.figure4 digits
    python -m studies.figure4 cifar10 --data CIFAR

Trains every point of the sweep with every seed, and draws three panels. kNN is as the runs logged
it last. The point that names all three settings is in the middle of each curve.
"""

import statistics
import sys

import torch

from benchmarks import common
from moco_isl.errors import BadInput
from studies import paper
from studies.figures import Result, of_round
from studies.ink import BLUE

FIVE = 5  # sampling times that the paper chose
PANELS = {  # setting -> heading, the paper's claim
    "isl-threshold": ("threshold", "The paper: a medium threshold is best."),
    "isl-radius": ("radius", "The paper: a medium radius is best."),
    "isl-triplets": (
        "sampling times",
        f"The paper: more sampling times are better, with little gain past {FIVE}.",
    ),
}
Curve = dict[float, list[float]]  # a setting's value -> kNN in per cent by seed


def figures(runs: dict[str, list]) -> dict[str, dict[float, list[dict]]]:
    """Setting -> value -> of each seed kNN and what its last round left."""
    found: dict[str, dict[float, list[dict]]] = {}
    for row in runs.values():
        for setting in PANELS:
            if setting not in row[0].settings:
                continue
            for run in row:
                knn = [line["knn"] for line in run.lines("epoch") if "knn" in line]
                rounds = run.lines("round")
                if not knn or not rounds:
                    raise BadInput(
                        f"{run.folder} has logged no kNN or no round of mining: expected both"
                        " (knn-every, and a miner)"
                    )
                of_value = found.setdefault(setting, {})
                cells = {"knn": knn[-1]} | of_round(rounds[-1])
                of_value.setdefault(float(run.settings[setting]), []).append(cells)
    for setting in PANELS:
        if len(found.get(setting, {})) < 3:
            raise BadInput(f"the sweep has fewer than three values of {setting}: expected more")
    return {setting: dict(sorted(found[setting].items())) for setting in PANELS}


def over(curve: Curve, a: float, b: float) -> list[float]:
    """By how many points a value is better than another, by seed."""
    return [x - y for x, y in zip(curve[a], curve[b])]


def of_the_medium(curve: Curve) -> str:
    """Whether the best value lies between both ends, in a sentence."""
    low, *between, high = sorted(curve)
    best = max(between, key=lambda x: statistics.fmean(curve[x]))
    pairs = [over(curve, best, end) for end in (low, high)]
    signs = [paper.told(x) for x in pairs]
    holds = 1 if signs == [1, 1] else 0 if 1 in signs and -1 not in signs else -1
    return (
        f"{paper.HOLDS[holds]}: {best:g}, the best between the ends, gives"
        f" {paper.points(pairs[0])} points over {low:g} and {paper.points(pairs[1])} over {high:g}"
        f" (n = {len(curve[best])})."
    )


def of_more(curve: Curve) -> str:
    """Whether more times are better, up to five and hardly beyond, in a sentence."""
    few, many = min(curve), max(curve)
    middle = min(curve, key=lambda x: abs(x - FIVE))
    rise, beyond = over(curve, middle, few), over(curve, many, middle)
    little = paper.told(beyond) < 1 or statistics.fmean(beyond) < statistics.fmean(rise) / 4
    holds = -1 if paper.told(rise) < 1 else 1 if little else 0
    return (
        f"{paper.HOLDS[holds]}: {middle:g} give {paper.points(rise)} points over {few:g}, and"
        f" {many:g} give {paper.points(beyond)} over {middle:g} (n = {len(curve[few])})."
    )


VERDICTS = dict(zip(PANELS, (of_the_medium, of_the_medium, of_more)))


def make(args) -> None:
    runs = paper.read_runs(args, "figure4")
    found = figures(runs.train())
    columns = [("setting", "setting"), ("value", "value"), ("knn", "kNN %")]
    columns += [("size", "set size"), ("precision", "precision"), ("n", "n")]
    title = f"kNN by threshold, radius and sampling times (Figure 4), {runs.name}"
    result = Result(f"figure4-{runs.name}", title, torch.device("cpu"), columns)
    curves: dict[str, Curve] = {}
    for setting, values in found.items():
        heading, claim = PANELS[setting]
        for value, seeds in values.items():
            curves.setdefault(setting, {})[value] = [x["knn"] for x in seeds]
            cells = {"setting": heading, "value": value, "n": len(seeds)}
            cells["knn"] = common.spread(curves[setting][value])
            cells["size"] = statistics.fmean(x["size"] for x in seeds)
            right = [x["precision"] for x in seeds if x["precision"] is not None]
            cells["precision"] = statistics.fmean(right) if right else None
            result.add(cells)
        result.note(claim)
        result.note(VERDICTS[setting](curves[setting]))
    print(f"  written: {result.write(args.out)}")
    with paper.drawn(runs.picture, 3, f"Figure 4 on {runs.name}", sharey=True) as panels:
        for axes, (setting, curve) in zip(panels, curves.items()):
            paper.line(axes, curve, "", BLUE)
            axes.set(xlabel=PANELS[setting][0])
        panels[0].set_ylabel("weighted kNN, %")


def main(argv: list[str] | None = None) -> int:
    args = paper.get_parser(__doc__, "sweep_figure4_").parse_args(argv)
    return paper.exit_code("figure4", lambda: make(args))


if __name__ == "__main__":
    sys.exit(main())
