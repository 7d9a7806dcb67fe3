"""Charts as inline SVG, drawn by matplotlib and coloured by the page's CSS variables.

So they follow the page's light and dark scheme.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

INCHES = (4.7, 3.0)
BOX = (0.155, 0.14, 0.825, 0.84)  # of the axes in every chart, so that they line up
# colours that no chart uses otherwise, each of which stands for a CSS variable
NAMES = ("fg", "muted", "grid", "bad", "c1", "c2", "c3", "c4", "c5", "c6")
STAND_IN = {name: f"#01{i:02x}fe" for i, name in enumerate(NAMES)}
STEPS = [1, 2, 2.5, 5, 10]  # between the ticks of an axis
DASHES = {"-": "solid", "--": "dashed", ":": "dotted"}
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": STAND_IN["muted"],
    "axes.labelcolor": STAND_IN["muted"],
    "xtick.color": STAND_IN["muted"],
    "ytick.color": STAND_IN["muted"],
    "text.color": STAND_IN["fg"],
    "axes.grid": True,
    "grid.color": STAND_IN["grid"],
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.linewidth": 0.8,
    "axes.labelsize": 9.5,
}


@dataclass
class Line:
    """x and y of equal length; None and NaN in y leave a gap."""

    x: Sequence[float]
    y: Sequence[float | None]
    label: str = ""
    colour: str = "c1"
    style: str = "-"
    alpha: float = 1.0
    dots: bool | None = None  # None: where there are few points
    steps: str = ""  # "mid": each value holds around its x; "post": from its x on


@dataclass
class Chart:
    title: str
    svg: str
    legend: list[dict] = field(default_factory=list)  # label, colour, style, alpha
    note: str = ""

    def inline(self, number: int) -> Markup:
        """The SVG element; `number`, this chart's own, makes its ids differ from other charts'."""
        svg = re.sub(r'\bid="', f'id="f{number}-', self.svg)
        svg = re.sub(r"url\(#", f"url(#f{number}-", svg)
        return Markup(re.sub(r'xlink:href="#', f'href="#f{number}-', svg))


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    marks: Sequence[tuple[float, bool]] = (),
    x_sizes: bool = False,
    note: str = "",
    percent: bool = False,
    whole_x: bool = False,
    whole_y: bool = False,
) -> Chart | None:
    """A chart of lines, or None where there is nothing to draw.

    marks: vertical lines at (x, refused). x_sizes: a logarithmic axis for set sizes of 1 to 100.
    percent: y holds shares, shown as per cent.
    """
    lines = [line for line in lines if any(_finite(y) for y in line.y)]
    if not lines:
        return None
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=INCHES)
        axes = figure.add_axes(BOX)
        for x, refused in marks:
            colour = STAND_IN["bad" if refused else "muted"]
            axes.axvline(x, color=colour, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        for i, line in enumerate(lines):
            _draw(axes, line, 100 if percent else 1, zorder=3 - i / len(lines))  # the first on top
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _scale(axes, x_sizes, whole_x, whole_y)
        svg = _to_svg(figure, title)
    legend = [
        _entry(line.label, line.colour, DASHES[line.style], line.alpha)
        for line in lines
        if line.label
    ]
    if any(not refused for _, refused in marks):
        legend.append(_entry("round of mining", "muted", "dotted"))
    if any(refused for _, refused in marks):
        legend.append(_entry("refused round", "bad", "dotted"))
    return Chart(title, svg, legend, note)


def _entry(label: str, colour: str, style: str, alpha: float = 1) -> dict:
    return {"label": label, "colour": colour, "style": style, "alpha": alpha}


def _finite(y) -> bool:
    return y is not None and math.isfinite(y)


def _draw(axes, line: Line, factor: float, zorder: float) -> None:
    x = list(line.x)
    y = [factor * v if _finite(v) else math.nan for v in line.y]
    dots = line.dots if line.dots is not None else sum(map(_finite, line.y)) <= 20
    axes.plot(
        x,
        y,
        color=STAND_IN[line.colour],
        linestyle=line.style,
        linewidth=1.8,
        alpha=line.alpha,
        zorder=zorder,
        marker="o" if dots else None,
        markersize=4,
        markeredgewidth=0,
        drawstyle=f"steps-{line.steps}" if line.steps else "default",
        solid_capstyle="round",
    )


def _scale(axes, x_sizes: bool, whole_x: bool, whole_y: bool) -> None:
    axes.margins(x=0.03)
    axes.tick_params(length=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=whole_y))
    low, high = axes.get_ylim()
    if high - low < 1e-9 * max(abs(high), 1e-12):  # a flat line
        axes.set_ylim(low - 0.5 * abs(low) - 1e-3, high + 0.5 * abs(high) + 1e-3)
    if x_sizes:
        axes.set_xscale("log")
        axes.set_xlim(left=min(1.0, axes.get_xlim()[0]))
        axes.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        whole = whole_x or axes.get_xlabel() == "epochs"
        low, high = axes.get_xlim()
        if whole and high - low < 1:  # a single point: room for whole numbers beside it
            axes.set_xlim(round((low + high) / 2) - 1, round((low + high) / 2) + 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS, integer=whole))


def _to_svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element, sized by the box it stands in, its colours CSS variables."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.S)
    svg = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = f'<svg {box} role="img" aria-label="{Markup.escape(title)}">' + svg[svg.index(">") + 1 :]
    for name, colour in STAND_IN.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
