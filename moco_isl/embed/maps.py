"""A map of the images: each one a point in the plane, similar ones near each other.

M: images on the map.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from moco_isl import files
from moco_isl.embed.features import Features
from moco_isl.errors import BadInput, RunFailed, missing_package

WAYS = {"tsne": "t-SNE", "umap": "UMAP"}
POINTS = ("auto", "dots", "thumbnails")
ENDINGS = (".png", ".svg", ".pdf")
FEWEST = 5  # images of which a map is drawn
_THUMBNAILS = 300  # images up to which they are drawn themselves
_NAMED = 20  # classes that a legend names
_INK = "#222222"
_FAINT = "#777777"
_OTHER = "#c8c8c8"


def check_map(path: Path, way: str, M: int, flag: str = "--map") -> None:
    """Raise BadInput where a map cannot be drawn: of so few images, or without a package."""
    if path.suffix not in ENDINGS:
        raise BadInput(
            f"{files.named(flag, path)} ends in '{files.shown(path.suffix)}': expected one of"
            f" {', '.join(ENDINGS)}"
        )
    if M < FEWEST:
        raise BadInput(f"{flag}: there are {M} images: expected at least {FEWEST} for a map")
    extra = "'moco_isl[embed]'"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing_package(flag, "matplotlib", extra) from None
    if way == "umap":
        try:
            import umap  # noqa: F401
        except ImportError:
            raise missing_package(f"{flag}-by umap", "umap-learn") from None
    else:
        try:
            import sklearn  # noqa: F401
        except ImportError:
            raise missing_package(flag, "scikit-learn", extra) from None


def draw(
    found: Features,
    path: Path,
    way: str = "tsne",
    points: str = "auto",
    most: int = 5000,
    image: Callable[[int], object] | None = None,
) -> None:
    """Draw a map into a file; the ending says the format. Raises RunFailed.

    way: tsne or umap. points: dots, coloured by class where there are any; thumbnails, as many as
    fit without covering each other; auto: thumbnails where the images are few. image(row) gives the
    picture of a row. most: of more images as many are drawn at random.
    """
    chosen = torch.arange(len(found))
    if len(found) > most:
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
        chosen = order[:most].sort().values
    place = layout(found.features[chosen], way)  # [M, 2]
    few = len(chosen) <= _THUMBNAILS
    thumbnails = image is not None and (points == "thumbnails" or (points == "auto" and few))
    figure = _figure(found, chosen, place, way, image if thumbnails else None)
    temporary = path.with_name(path.name + files.TEMPORARY)
    try:
        with files.replacing(path, temporary):
            figure.savefig(
                temporary, format=path.suffix[1:], dpi=150, metadata=_no_date(path.suffix)
            )
    except OSError as error:
        raise RunFailed(f"cannot write {files.named('', path)}: {error.strerror}") from error


def _no_date(suffix: str) -> dict:
    """The metadata by which equal maps are equal files."""
    return {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix, {})


def layout(features: torch.Tensor, way: str) -> np.ndarray:
    """Features [M, C] -> places in the unit square [M, 2]; by cosine, and the same every time."""
    rows = F.normalize(features, dim=1).numpy()
    M = len(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about their own defaults
        if way == "umap":
            import umap

            at = umap.UMAP(n_neighbors=min(15, M - 1), metric="cosine", random_state=0)
            init = {"init": "random"} if M < 20 else {}
            place = at.set_params(**init).fit_transform(rows)
        else:
            from sklearn.decomposition import PCA
            from sklearn.manifold import TSNE

            rows = PCA(min(50, *rows.shape), random_state=0).fit_transform(rows)
            at = TSNE(perplexity=min(30, (M - 1) / 3), init="random", random_state=0)
            if rows.shape[1] > 1:
                at.set_params(init="pca")
            place = at.fit_transform(rows)
    low, high = place.min(axis=0), place.max(axis=0)
    return (place - low) / np.maximum(high - low, 1e-12)


# ---- the picture ---------------------------------------------------------------------------------

SIDE = 7.0  # inches of the map's own square
_MARGIN = 0.25
_HEAD = 0.75  # inches above it, for two lines
_MARK = 0.45  # inches beside it for a dot of the legend
_LETTER = 0.092  # and for a letter


def _figure(found: Features, chosen: torch.Tensor, place: np.ndarray, way: str, image):
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = [found.class_names()[i] for i in chosen.tolist()]
    colours = colours_of(names, found.classes)
    legend = colours if 1 < len(colours) <= _NAMED else {}
    beside = _MARK + _LETTER * max(map(len, map(_label, legend))) if legend else 0
    width = SIDE + 2 * _MARGIN + beside
    height = SIDE + _HEAD + _MARGIN
    settings = {"font.family": "sans-serif", "svg.hashsalt": "map", "text.parse_math": False}
    with rc_context(settings):
        figure = Figure(figsize=(width, height), facecolor="white")
        box = (_MARGIN / width, _MARGIN / height, SIDE / width, SIDE / height)
        axes = figure.add_axes(box, facecolor="white")
        axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color("#dddddd")
        _dots(axes, place, names, colours, 0.35 if image else 0.85)
        if image:
            _pictures(axes, place, names, colours, chosen, image)
        left = _MARGIN / width
        top = lambda inches: 1 - inches / height
        title, rest = _words(found, len(chosen), way, colours, legend)
        figure.text(left, top(0.2), title, size=14, weight="bold", color=_INK, va="top")
        figure.text(left, top(0.5), rest, size=9.5, color=_FAINT, va="top")
        if legend:
            _legend(figure, legend, (SIDE + 1.3 * _MARGIN) / width, top(_HEAD))
    return figure


def _words(found: Features, drawn: int, way: str, colours: dict, legend: dict) -> tuple[str, str]:
    """The title, and a line below it."""
    M = len(found)
    of = f"{drawn:,} images" if drawn == M else f"{drawn:,} of {M:,} images, drawn at random"
    about = found.about
    source = Path(str(about.get("file") or "")).name
    words = [f"{about.get('layer')} of {files.short(source, 40)} ({about.get('arch')})"]
    if len(colours) > _NAMED:
        words.append(f"{len(colours)} classes, a colour each")
    return f"{WAYS[way]} of {of}", " · ".join(words)


def colours_of(names: list[str | None], classes: list[str] | None) -> dict[str | None, tuple]:
    """A colour for each class that occurs, in the order of the classes; grey where there is none.

    Up to 20 come from a palette of colours far apart, more are hues in a circle.
    """
    import matplotlib

    there = set(names)
    order = [name for name in classes or () if name in there]
    order += sorted(name for name in there - set(order) if name is not None)
    if len(order) <= 10:
        palette = list(matplotlib.colormaps["tab10"].colors)
        palette[7], palette[9] = palette[9], palette[7]  # grey last: it also stands for no class
    elif len(order) <= _NAMED:
        # the strong colours first
        palette = list(matplotlib.colormaps["tab20"].colors)
        palette = palette[::2] + palette[1::2]
    else:
        palette = [matplotlib.colormaps["hsv"](i / len(order)) for i in range(len(order))]
    found = dict(zip(order, palette))
    if None in there:
        found[None] = matplotlib.colors.to_rgb(_OTHER if order else "#3b6ea8")
    return found


def _dots(axes, place: np.ndarray, names: list, colours: dict, alpha: float) -> None:
    size = float(np.clip(22000 / len(place), 8, 70))  # square points
    axes.scatter(
        *place.T,
        s=size,
        c=[colours[name] for name in names],
        alpha=alpha,
        linewidths=0.3,
        edgecolors="white",
    )


def _pictures(axes, place: np.ndarray, names: list, colours: dict, chosen, image) -> None:
    """The images themselves where they cover no other, with a frame in the colour of the class."""
    from matplotlib.patches import Rectangle

    side = float(np.clip(0.62 / len(place) ** 0.5, 0.035, 0.1))  # of the map
    drawn = np.empty((0, 2))
    # in no order of theirs: the first class would take the room of the others
    for i in np.random.default_rng(0).permutation(len(place)):
        x, y = place[i]
        if len(drawn) and (np.abs(drawn - place[i]).max(axis=1) < 1.12 * side).any():
            continue
        pixels = _thumbnail(image(int(chosen[i])))
        if pixels is None:
            continue
        drawn = np.concatenate([drawn, place[i : i + 1]])
        h, w = np.array(pixels.shape[:2]) / max(pixels.shape[:2]) * side
        box = (x - w / 2, x + w / 2, y - h / 2, y + h / 2)
        axes.imshow(pixels, extent=box, zorder=3, interpolation="antialiased", aspect="auto")
        frame = {"fill": False, "linewidth": 1.6, "edgecolor": colours[names[i]], "zorder": 4}
        axes.add_patch(Rectangle((box[0], box[2]), w, h, **frame))
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))


def _thumbnail(picture) -> np.ndarray | None:
    """uint8 [h, w, 3] of a PIL image or a tensor [c, H, W], at most 128 pixels a side.

    Of more channels than three the first three are shown, of two the first.
    """
    from PIL import Image

    if picture is None:
        return None
    if isinstance(picture, torch.Tensor):
        shown = picture[:3] if len(picture) >= 3 else picture[:1].expand(3, -1, -1)
        shown = shown if shown.dtype == torch.uint8 else (255 * shown).to(torch.uint8)
        picture = Image.fromarray(shown.permute(1, 2, 0).cpu().numpy())
    picture = picture.convert("RGB")
    picture.thumbnail((128, 128))
    return np.asarray(picture)


def _legend(figure, colours: dict, x: float, y: float) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], marker="o", linestyle="", markersize=7.5, color=colour, label=_label(name))
        for name, colour in colours.items()
    ]
    figure.legend(
        handles=marks,
        loc="upper left",
        bbox_to_anchor=(x, y),
        frameon=False,
        labelcolor=_INK,
        fontsize=10,
        borderaxespad=0,
        handletextpad=0.3,
    )


def _label(name: str | None) -> str:
    return "no class" if name is None else files.short(name, 22)
