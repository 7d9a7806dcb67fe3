"""The paper's Figure 5: what LA and ISL hold as positives of the same images, round by round.

    python -m studies.figure5 digits
    python -m studies.figure5 cifar5k --data runs/images/cifar5k/train.csv

The picture shows some images with the surest of their positives in both runs, and their nearest in
the features of the last round. A frame is green around an image of the anchor's class, and red and
crossed around another. The table counts all positives. The likeness of two images is the cosine of
their pixels at 8 by 8, less the mean image. Labels frame and judge; they choose nothing.
"""

import sys

import torch

from benchmarks import common
from moco_isl import data
from moco_isl.encoders import SmallImages, extract_features
from moco_isl.errors import BadInput
from moco_isl.mining.estimate import pixel_rows
from moco_isl.mining.positives import PositiveSets, same_label
from moco_isl.report.grids import SHOWN, Album, Cell, Grid, build_grids
from moco_isl.report.runs import Run, read_run
from studies import paper
from studies.figures import Result
from studies.ink import GREEN, GREY, INK, RED

Tensor = torch.Tensor
ROWS = {"gan": "ISL", "cluster": "LA"}  # of the sweep
ANCHORS = 5
ROUNDS = 4  # rows of a picture
CLAIM = (
    "The paper: LA takes images that look alike for positives and mixes classes up; ISL finds those"
    " of the same meaning even where they look different."
)

# ---------------------------------------------------------------- the table


def figures(
    runs: dict[str, Run], labels: Tensor, pixels: Tensor
) -> dict[int, dict[tuple, float | None]]:
    """Of each round in which both left positives: `of_sets` of each, by row and figure.

    labels [M]; pixels [M, D]: unit rows.
    """
    found = {}
    for rounds in zip(*(run.rounds for run in runs.values())):
        records = [round_.load() for round_ in rounds]
        if None in records:
            raise BadInput(f"{rounds[records.index(None)].path} is gone: train that run again")
        sets = [record.sets for record in records]
        fewest = min(x.num_edges for x in sets)
        if not fewest:
            continue
        cells = found.setdefault(rounds[0].number, {})
        for row, round_, x in zip(runs, rounds, sets):
            own = round_.report.get("precision_own_nearest")
            cells |= {
                (row, key): value for key, value in of_sets(x, fewest, labels, pixels).items()
            }
            cells[row, "own"] = None if own is None else 100 * own
    return found


def of_sets(sets: PositiveSets, n: int, labels: Tensor, pixels: Tensor) -> dict[str, float | None]:
    """Mean number of positives, % right; of the n surest % right, and how alike the right ones are.

    Alike: 100 times the mean cosine of the pixels of an image and its right positives. None where
    there is no such pair.
    """
    a, b = sets.sources(), sets.members.long()
    right = same_label(labels, a, b)  # [E]: 1, 0, or NaN where a label is not known
    first = sets.sureness.sort(descending=True, stable=True).indices[:n]
    shown = first[right[first] == 1]
    alike = (pixels[a[shown]] * pixels[b[shown]]).sum(1).mean()
    found = {"right": right.nanmean(), "surest": right[first].nanmean(), "alike": alike}
    percent = {key: None if x.isnan() else 100 * float(x) for key, x in found.items()}
    return {"size": sets.mean_size, **percent}


def verdict(number: int, last: list[dict]) -> str:
    """Whether the claim holds in the round of this number, in a sentence. last: by seed."""
    keys = [(row, key) for row in ROWS for key in ("surest", "alike")]
    last = [cells for cells in last if all(cells[key] is not None for key in keys)]
    if not last:
        return f"The claim is not judged: in round {number} a miner has no pair known to be right."
    less = lambda key: [cells["gan", key] - cells["cluster", key] for cells in last]
    right, alike = less("surest"), less("alike")
    signs = (paper.told(right), -paper.told(alike))
    holds = 1 if signs == (1, 1) else 0 if 1 in signs and -1 not in signs else -1
    return (
        f"{paper.HOLDS[holds]}: in round {number} ISL's surest pairs have {paper.points(right)}"
        f" points of right ones over as many of LA's, and the right ones {paper.points(alike)}"
        f" points of likeness in their pixels (n = {len(right)})."
    )


def pixels_of(dataset) -> Tensor:
    """The pixels of a data set at 8 by 8, unit rows less the mean image."""
    size = data.native_size(dataset)
    transform = data.get_eval_transform("folder", size)
    loader = data.eval_loader(dataset, transform=transform, batch_size=512, device="cpu")
    try:
        small = extract_features(SmallImages(), loader, len(dataset), "cpu", normalize=False)
    finally:
        loader.close()
    return pixel_rows(small)


# ---------------------------------------------------------------- the picture


def grid_of(runs: dict[str, Run], album: Album) -> Grid:
    """ANCHORS images, drawn among those that both runs hold positives of at the end."""
    sizes = [run.rounds[-1].load().sets.sizes() for run in runs.values()]
    held = (torch.stack(sizes) > 0).all(0).nonzero()[:, 0]
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
    anchors = held[order[:ANCHORS]].sort().values.tolist()
    if not anchors:
        raise BadInput("no image has positives of both miners in their last rounds")
    chosen = {"random": anchors}
    return build_grids(list(runs.values()), album, ROUNDS + 1, chosen)[0]


CELL, GAP, LABEL, ANCHOR = 30, 4, 62, 76
COLUMN = LABEL + SHOWN * (CELL + GAP) + 10


def svg(grid: Grid, title: str) -> str:
    """The grid as an SVG: dark ink on white, on a dark page too."""
    cells = [anchor for anchor, _ in grid.anchors]
    cells += [
        x for _, columns in grid.anchors for rows in columns for row in rows for x in row.cells
    ]
    images = {cell.index: cell.source for cell in cells}  # each once
    parts = [text(10, 24, title, "b")]
    for i, name in enumerate(ROWS.values()):
        parts.append(text(ANCHOR + i * COLUMN + LABEL, 48, name, "b"))
    y = 60
    for anchor, columns in grid.anchors:
        parts.append(f'<line x1="10" x2="{ANCHOR + 2 * COLUMN}" y1="{y - 5}" y2="{y - 5}"/>')
        parts.append(picture(anchor, 10, y + 2, 52))
        for i, rows in enumerate(columns):
            x = ANCHOR + i * COLUMN
            for j, row in enumerate(rows):
                top = y + j * (CELL + GAP)
                name = "nearest" if row.round is None else f"round {row.round}"
                parts.append(text(x, top + CELL / 2 + 4, name))
                if not row.cells:
                    parts.append(text(x + LABEL, top + CELL / 2 + 4, "none"))
                for k, cell in enumerate(row.cells):
                    parts.append(picture(cell, x + LABEL + k * (CELL + GAP), top, CELL))
        y += max(map(len, columns)) * (CELL + GAP) + 12
    width = ANCHOR + 2 * COLUMN + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}"'
        f' height="{y}"><title>Figure 5 {paper.MARK}</title><style>text {{ font: 12px sans-serif;'
        f" fill: {INK} }} .b {{ font-weight: bold }} line {{ stroke: #d0d7de }}"
        " image { image-rendering: pixelated } rect, path { fill: none; stroke-width: 2 }"
        f" .right {{ stroke: {GREEN} }} .wrong {{ stroke: {RED} }}"
        f" .unknown {{ stroke: {GREY} }}</style>"
        f'<path d="M0 0H{width}V{y}H0Z" style="fill: white"/>\n'
        + "\n".join([*map(symbol, *zip(*images.items())), *parts])
        + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'


def symbol(index: int, source: str) -> str:
    """An image that `picture` shows by its number, at any size."""
    image = f'<image width="1" height="1" preserveAspectRatio="none" href="{source}"/>'
    return f'<symbol id="i{index}" viewBox="0 0 1 1">{image}</symbol>'


def picture(cell: Cell, x: int, y: int, side: int) -> str:
    """An image with its frame; a wrong one is crossed in a corner too."""
    kind = {True: "wrong", False: "right", None: "unknown"}[cell.wrong]
    end = f' width="{side}" height="{side}"'
    cross = f'<path class="wrong" d="M{x + side - 9} {y}L{x + side} {y + 9}"/>' * bool(cell.wrong)
    return (
        f'<use x="{x}" y="{y}"{end} href="#i{cell.index}"/>'
        f'<rect class="{kind}" x="{x}" y="{y}"{end}/>{cross}'
    )


# ---------------------------------------------------------------- the command


def make(args) -> None:
    runs = paper.read_runs(args, "figure5")
    trained = runs.train(list(ROWS))
    if missing := [row for row in ROWS if row not in trained]:
        raise BadInput(f"the sweep has no points {' and '.join(missing)}: expected {list(ROWS)}")
    read = {row: [read_run(run.folder, row) for run in trained[row]] for row in ROWS}
    dataset = read["gan"][0].dataset()
    if dataset.labels is None:
        raise BadInput("the images have no labels to frame them by: expected a folder a class")
    pixels = pixels_of(dataset)
    by_seed = [
        figures(dict(zip(ROWS, both)), dataset.labels, pixels)
        for both in zip(*(read[row] for row in ROWS))
    ]
    headings = {"size": "positives", "right": "right %", "own": "own nearest %"}
    headings |= {"surest": "surest, right %", "alike": "likeness"}
    columns = [("round", "round")]
    for row, name in ROWS.items():
        columns += [(f"{row}_{key}", f"{name}: {heading}") for key, heading in headings.items()]
    title = f"What ISL and LA hold as positives, round by round (Figure 5), {runs.name}"
    result = Result(f"figure5-{runs.name}", title, torch.device("cpu"), [*columns, ("n", "n")])
    in_all = set.intersection(*map(set, by_seed))
    if not in_all:
        raise BadInput("in no round both miners found positives: there is nothing to compare")
    for number in sorted(in_all):
        cells = {"round": number, "n": len(by_seed)}
        for row in ROWS:
            for key in headings:
                values = [x[number][row, key] for x in by_seed if x[number][row, key] is not None]
                cells[f"{row}_{key}"] = common.spread(values) if values else None
        result.add(cells)
    last = max(in_all)
    result.note(CLAIM)
    result.note(verdict(last, [x[last] for x in by_seed]))
    result.note(
        "Right: of the anchor's class. Own nearest: as many of each image's own nearest, in the"
        " features of the same round. Surest: as many pairs of both miners, the surest first."
        " Likeness: 100 times the mean cosine of the pixels of their right pairs, at 8 by 8."
    )
    print(f"  written: {result.write(args.out)}")
    grid = grid_of({row: read[row][0] for row in ROWS}, Album(dataset, dataset.labels))
    paper.write(svg(grid, f"Figure 5 on {runs.name}"), runs.picture)


def main(argv: list[str] | None = None) -> int:
    args = paper.get_parser(__doc__, "sweep_figures_3_5_").parse_args(argv)
    return paper.exit_code("figure5", lambda: make(args))


if __name__ == "__main__":
    sys.exit(main())
