"""docs/result.svg, the picture of README: python -m studies.readme_picture

Left: what each miner adds on the digits. Right: what positives of a known precision add, which says
when mining pays and when it costs. Every figure is a row of a file of results, mean and standard
deviation of n seeds, paired by seed.
"""

import io
import json
from pathlib import Path

from studies.ink import BLUE, GREY, INK, RED, style_of

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "result.svg"
SURE = "average,auto"
MINERS = {  # row of gain-digits -> as it is shown
    "knn,50": "own nearest, 50\n--miner knn",
    "gan,50": "the paper's GAN, 50\n--miner gan",
    SURE: "neighbourhood means\n--miner average\n--isl-budget auto",
}
LOSS = "mean of logs"
LIGHT = "#80ccff"


def rows(name: str) -> list[dict]:
    """The rows of a file of results, of benchmarks/ or of studies/."""
    (path,) = ROOT.glob(f"*/results/{name}-cpu.json")
    return json.loads(path.read_text())["rows"]


def mean_and_spread(text: str) -> tuple[float, float]:
    """The two numbers of "+5.1 ± 1.5"."""
    mean, spread = text.split(" ± ")
    return float(mean), float(spread)


def gains() -> dict[str, tuple[float, float]]:
    """Points of 1-shot accuracy that each miner adds to the same epochs without mining."""
    found = {row["row"]: row for row in rows("gain-digits")}
    return {row: mean_and_spread(found[row]["gain_one_shot"]) for row in MINERS}


def curves() -> dict[float, list[tuple[float, float, float]]]:
    """Positives an image -> (precision, points of 1-shot accuracy, their spread), rising."""
    found = {}
    for row in rows("breakeven-digits-right-near-gains"):
        if row["loss"] == LOSS:
            found.setdefault(row["size"], []).append(
                (row["precision"], *mean_and_spread(row["one_shot"]))
            )
    return {size: sorted(points) for size, points in found.items()}


GAINED = "points of 1-shot accuracy over\nas many epochs of MoCo v2 alone"


def draw_miners(axes) -> None:
    axes.set_title("What mining adds on 1,437 digits", loc="left")
    axes.set_ylabel(GAINED)
    for place, (mean, spread) in enumerate(gains().values()):
        axes.bar(place, mean, yerr=spread, width=0.5, color=LIGHT, ecolor=INK, capsize=4)
        axes.text(place, mean + spread + 0.25, f"{mean:+.1f} ± {spread:.1f}", ha="center")
    axes.set_xticks(range(len(MINERS)), MINERS.values(), fontsize=9)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)


def draw_curves(axes) -> None:
    axes.set_title("Right positives help, wrong ones cost", loc="left")
    axes.set_xlabel("share of the positives that are right")
    axes.set_ylabel(GAINED)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.text(0.565, 0.25, "they help", color=GREY)
    axes.text(0.565, -0.35, "they cost", color=GREY, va="top")
    for (size, points), colour, aside in zip(curves().items(), (GREY, RED, BLUE), (-1, 0, 1)):
        x, y, spread = zip(*points)
        x = [precision + 0.006 * aside for precision in x]  # so that no bar hides another
        axes.errorbar(x, y, spread, color=colour, marker="o", markersize=5, capsize=3)
        axes.annotate(
            f"{size:g} an image",
            (0.906, y[-1]),
            xytext=(8, 5 * aside - 4),
            textcoords="offset points",
            color=colour,
        )
    axes.set_xlim(0.56, 1.0)


def picture() -> str:
    import matplotlib
    from matplotlib.figure import Figure

    style = style_of("result", font_size=10.5, axes_titlesize=11.5, axes_titleweight="bold")
    with matplotlib.rc_context(style):
        # white on a dark page too: the ink is dark
        figure = Figure(figsize=(9.6, 4), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, wspace=0.02)
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        draw_miners(left)
        draw_curves(right)
        figure.savefig(page := io.StringIO(), format="svg", metadata={"Date": None})
    return page.getvalue()


if __name__ == "__main__":
    PICTURE.write_text(picture())
