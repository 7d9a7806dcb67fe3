"""The colours and the style of the pictures in docs: dark ink on white, on a dark page too."""

INK = "#1f2328"
GREY = "#6e7781"
BLUE = "#0969da"
RED = "#cf222e"
GREEN = "#1a7f37"


def style_of(salt: str, **more) -> dict:
    """matplotlib's settings for an SVG; the same salt makes the same names in it. more: others."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GREY,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    } | {name.replace("_", "."): value for name, value in more.items()}
