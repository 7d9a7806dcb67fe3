"""How far off are the estimates of precision (moco_isl/mining/estimate.py)?

They are compared with the truth, on the list of pairs that --miner average --isl-budget auto ranks.

    python -m studies.estimate --run FILE.pth.tar digits --run FILE.pth.tar folder DIR
                                        checkpoints, each with its data set and where that is
    python -m studies.estimate FILE.safetensors ...
                                        features [M, C], labels [M]; first, second [M, C] of two
                                        views and pixels [M, D], see `mining.estimate.Views`
    --save DIR                          keep what --run has made as such files

A row is an encoder and a number of its images, drawn. Per cent right at 5, 20 and 50 an image; what
is guessed without labels, from the lower guess to the highest; what --isl-budget auto would keep by
it; and the error of --isl-check, with 300 and with 500 labelled images drawn ten times: the root of
the mean square at 50 an image and at the widest. Labels judge and choose nothing but --isl-check's.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks import common
from moco_isl.errors import BadInput
from moco_isl.miners.average import AverageMiner
from moco_isl.mining.estimate import Views, by_check, guess, widest
from moco_isl.mining.positives import PositiveSets, same_label
from moco_isl.mining.rounds import AUTO
from studies import miners
from studies.figures import Result

Tensor = torch.Tensor
SIZES = (5, 20, 50)
IMAGES = (500, 1000, 2500)  # drawn of a data set; all where there are fewer
LABELLED = (300, 500)
DRAWS = 10


class Ranked(AverageMiner):
    """Keeps the list of pairs, surest first, that a round has ranked."""

    def _trusted(self, features, views, a, b, tick) -> int:
        self.list = a, b
        return len(a)


def part(source: miners.Source, M: int) -> miners.Source:
    """M of its images, drawn; all where there are no more."""
    if M >= len(source.labels):
        return source
    order = torch.randperm(len(source.labels), generator=torch.Generator().manual_seed(0))
    rows = order[:M].sort().values.to(source.labels.device)
    views = source.views and Views(*(x[rows] for x in source.views))
    return miners.Source(source.features[rows], source.labels[rows], views=views)


def ranked(source: miners.Source) -> tuple[Tensor, Tensor]:
    """The pairs [U], [U] of the widest sets that --isl-budget auto looks at."""
    miner = Ranked(budget="auto")
    sets = PositiveSets.empty(len(source.labels), source.features.device)
    miner.mine(source.features, sets, torch.Generator().manual_seed(0), views=source.views)
    return miner.list


def row(source: miners.Source) -> dict:
    """The figures of a table's row, shares in per cent and errors in points."""
    M = len(source.labels)
    a, b = ranked(source)
    found = guess(source.features, source.views, a, b)
    right = same_label(source.labels, a, b)
    truth = lambda number: 100 * float(right[:number].nanmean())
    last = lambda number: max(int((found.at < number).sum()) - 1, 0)
    numbers = [n for size in SIZES if (n := round(size * M / 2)) <= len(a)]
    shown = lambda values: ", ".join(f"{x:.0f}" for x in values)
    cells = {
        "M": M,
        "truth": shown(map(truth, numbers)),
        "low": shown(100 * float(found.share[last(n)]) for n in numbers),
        "most": shown(100 * float(found.most[last(n)]) for n in numbers),
        "kept": "cannot tell" if found.doubt else "nothing sure",
    }
    number = 0 if found.doubt else widest(found.share, found.at, len(a), AUTO)
    if number:
        off = 100 * float(found.share[last(number)]) - truth(number)
        cells["kept"] = f"{2 * number / M:.0f} an image, {truth(number):.0f} right, {off:+.0f}"
    for count in (n for n in LABELLED if n <= M // 2):
        errors = [check_errors(source.labels, a, b, right, count, seed) for seed in range(DRAWS)]
        rms = torch.tensor(errors).square().nanmean(0).sqrt()
        cells[f"by_{count}"] = f"{rms[0]:.1f}, {rms[1]:.1f}"
    return cells


def check_errors(
    labels: Tensor, a: Tensor, b: Tensor, right: Tensor, count: int, seed: int
) -> list[float]:
    """Errors of --isl-check at 50 an image and at the widest, in points; NaN where it is unsure."""
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    known = torch.full_like(labels, -1)
    known[drawn] = labels[drawn]
    errors = []
    for number in (min(len(a), round(50 * len(labels) / 2)), len(a)):
        found = by_check(known, a[:number], b[:number])
        off = float("nan")
        if not found.doubt:
            off = 100 * (float(found.share[-1]) - float(right[:number].nanmean()))
        errors.append(off)
    return errors


def of_file(file: str, device: torch.device) -> miners.Source:
    """What a safetensors file holds. Raises BadInput."""
    try:
        content = {name: x.to(device) for name, x in load_file(file).items()}
        views = None
        if "first" in content:
            views = Views(content["first"], content["second"], content.get("pixels"))
        return miners.Source(content["features"].float(), content["labels"].long(), views=views)
    except (OSError, KeyError, ValueError) as error:
        raise BadInput(f"{file}: {error}; expected safetensors with features and labels") from error


def save(source: miners.Source, file: Path) -> None:
    content = {"features": source.features, "labels": source.labels, **source.views._asdict()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.cpu().contiguous() for name, x in content.items()}, file)


def get_parser() -> argparse.ArgumentParser:
    parser = common.parser(__doc__)
    parser.add_argument("files", metavar="FILE", nargs="*", help="safetensors, see above")
    parser.add_argument(
        "--run",
        nargs="+",
        action="append",
        default=[],
        metavar="X",
        help="a checkpoint, the name of its data set and where that is",
    )
    parser.add_argument("--name", default="", help="of the table, where there are several")
    parser.add_argument("--save", type=Path, metavar="DIR", help="keep features of --run there")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    common.begin(args)
    columns = [
        ("of", "encoder"),
        ("M", "images"),
        ("truth", "right at 5, 20, 50, %"),
        ("low", "lower guess"),
        ("most", "highest guess"),
        ("kept", "kept by auto, and the guess's error"),
        *((f"by_{n}", f"--isl-check, {n}: error at 50, widest") for n in LABELLED),
    ]
    name = f"estimate-{args.name}" if args.name else "estimate"
    title = f"The estimates of precision beside the truth{args.name and ', '}{args.name}"
    result = Result(name, title, args.device, columns)
    result.note(
        "A guess counts pairs with a fifth of their neighbours in common. The fifth was chosen on"
        " the digits, by encoders of 11 and of 60 epochs, the floor of 500 images and 2 % on them"
        " and on the photos, the pixels without colour on the photos. Files of bare features have"
        " no views."
    )
    try:
        if wrong := [run for run in args.run if not 2 <= len(run) <= 3]:
            raise BadInput(
                f"--run {' '.join(wrong[0])}: expected a checkpoint, the name of its data set and,"
                " but for digits, where that is"
            )
        jobs = {Path(file).stem: (of_file, file, args.device) for file in args.files}
        for file, dataset, *root in args.run:
            name = f"{Path(file).resolve().parent.name}-{Path(file).name.split('.')[0]}"
            root = root[0] if root else None
            jobs[name] = miners.of_checkpoint, Path(file), dataset, root, args.device
        for name, (open_, *what) in jobs.items():
            source = open_(*what)
            if args.save and source.views is not None:
                save(source, args.save / f"{name}.safetensors")
            for M in sorted({min(M, len(source.labels)) for M in IMAGES}):
                result.add({"of": name, **row(part(source, M))})
            common.end(args, result)  # what there is, should a later one fail
    except BadInput as error:
        print(f"studies.estimate: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
