"""The paper's Figure 3: how right are the images that the GAN ranks first, over the epochs?

    python -m studies.figure3 digits
    python -m studies.figure3 cifar5k --data runs/images/cifar5k/train.csv

Of every round of a training mined by ISL's GAN: of an image's first 5, and first 50, the share that
are of its class. Geodesic: those nearest to the best proxy (Eq. 3) of the round's GAN. Euclidean:
those nearest to the image, in the same features. Threshold, radius and budget play no part. The
paper's two sizes are lost. Labels judge and choose nothing.
"""

import statistics
import sys

import torch

from benchmarks import common
from studies import paper
from studies.figures import Result
from studies.ink import BLUE, RED

SIZES = (5, 50)
MINED = "gan"  # the row of the sweep
CLAIM = (
    "The paper: both distances are about as precise in the small sets, and geodesic distance is"
    " significantly more precise in the large ones."
)
Figures = dict[int, dict[tuple[str, int], list[float]]]  # epoch -> (whose, size) -> % by seed


def figures(runs: list) -> Figures:
    """Precision in per cent of both rankings, of the rounds that no run's GAN collapsed in."""
    found: Figures = {}
    for run in runs:
        for report in run.lines("round"):
            if not report.get("precision_ranked") or not report.get("baselines"):
                continue
            own = dict(zip(report["baselines"]["sizes"], report["baselines"]["own_nearest"]))
            cells = found.setdefault(report["epoch"], {})
            for size in SIZES:
                shares = {"gan": report["precision_ranked"][f"{size}"], "own": own[size]}
                for whose, share in shares.items():
                    cells.setdefault((whose, size), []).append(100 * share)
    whole = {epoch: x for epoch, x in found.items() if len(x["own", SIZES[0]]) == len(runs)}
    return dict(sorted(whole.items()))


def differences(found: Figures, size: int) -> list[float]:
    """The GAN's precision less own nearest's, a mean over the rounds for each seed."""
    by_round = [
        [a - b for a, b in zip(cells["gan", size], cells["own", size])] for cells in found.values()
    ]
    return [statistics.fmean(seed) for seed in zip(*by_round)]


def verdict(found: Figures) -> str:
    """Whether the claim holds here, in a sentence."""
    small, large = (differences(found, size) for size in SIZES)
    alike = paper.told(small) == 0
    above = paper.told(large) == 1
    holds = 1 if above and alike else 0 if above or alike else -1
    return (
        f"{paper.HOLDS[holds]}: over {len(found)} rounds the precision of the GAN's ranking less"
        f" that of own nearest is {paper.points(large)} points at {SIZES[1]} an image, and"
        f" {paper.points(small)} at {SIZES[0]} (n = {len(large)})."
    )


def make(args) -> None:
    runs = paper.read_runs(args, "figure3")
    (trained,) = runs.train([MINED]).values()
    found = figures(trained)
    if not found:
        raise paper.RunFailed("the GAN collapsed in every round: there is no ranking to draw")
    names = {"gan": "geodesic", "own": "Euclidean"}
    columns = [("epoch", "after epoch")]
    for size in SIZES:
        columns += [(f"{whose}_{size}", f"{names[whose]}, {size}, %") for whose in names]
    title = f"Precision of mined positives over the epochs (Figure 3), {runs.name}"
    result = Result(f"figure3-{runs.name}", title, torch.device("cpu"), [*columns, ("n", "n")])
    for epoch, cells in found.items():
        shown = {f"{whose}_{size}": common.spread(x) for (whose, size), x in cells.items()}
        result.add({"epoch": epoch, "n": len(trained), **shown})
    result.note(CLAIM)
    result.note(verdict(found))
    print(f"  written: {result.write(args.out)}")
    with paper.drawn(runs.picture, len(SIZES), f"Figure 3 on {runs.name}", sharey=True) as panels:
        for axes, size in zip(panels, SIZES):
            for whose, colour in (("gan", BLUE), ("own", RED)):
                curve = {epoch: cells[whose, size] for epoch, cells in found.items()}
                label = {"gan": "geodesic: the GAN's ranking", "own": "Euclidean: own nearest"}
                paper.line(axes, curve, label[whose], colour)
            axes.set(title=f"the first {size} of an image", xlabel="epochs before the round")
        panels[0].set_ylabel("of the image's class, %")
        panels[0].legend(frameon=False)


def main(argv: list[str] | None = None) -> int:
    args = paper.get_parser(__doc__, "sweep_figures_3_5_").parse_args(argv)
    return paper.exit_code("figure3", lambda: make(args))


if __name__ == "__main__":
    sys.exit(main())
