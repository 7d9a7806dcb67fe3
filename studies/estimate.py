"""How far off are the estimates of precision without labels (moco_isl/mining/estimate.py)?

They are compared with the truth, over sets of 1 to 50 positives an image by four rules.

    python -m studies.estimate digits FILE.safetensors ...     features [M, C] and labels [M];
                                                               digits: see studies/miners.py
    python -m studies.estimate --run FILE.pth.tar cifar10 DIR  a checkpoint and its images, of which
                                                               there are views too; may be repeated

Rules: each image's own nearest, all pairs by cosine, shared neighbours, neighbourhood means (see
studies/miners.py). An error is of one set of pairs, in points: the estimate's mean over 2,000 of
them less the share of them that is right. The estimates are by halves of the features (an upper
bound) and, where there are images, by two augmented views of each. Labels judge and choose nothing.
"""

import statistics
import sys
from pathlib import Path

import torch

from benchmarks import common
from moco_isl.errors import BadInput
from moco_isl.mining.estimate import Views, by_halves, by_views
from moco_isl.mining.positives import same_label
from studies import miners
from studies.figures import Result

SIZES = [1, 2, 5, 10, 20, 50]
SAMPLE = 2000


def sets(features: torch.Tensor) -> dict[str, miners.Pairs]:
    """Name of a set -> pairs a, b: up to SAMPLE of it, drawn."""
    lists = miners.Lists(features)
    M, K = lists.near.shape
    ranked = {
        "all pairs": lists.by_cosine(),
        "shared neighbours": lists.by_shared(),
        "neighbourhood means": lists.by_means(50),
    }
    draw = torch.Generator().manual_seed(0)
    found = {}
    for size in (size for size in SIZES if size <= K):
        a = torch.randint(M, (SAMPLE,), generator=draw)
        place = torch.randint(size, (SAMPLE,), generator=draw)
        found[f"own nearest, {size}"] = lists.anchors[a], lists.near[a, place]
        for name, (a, b) in ranked.items():
            if (n := round(size * M / 2)) <= len(a):
                at = torch.randperm(n, generator=draw)[:SAMPLE].to(a.device)
                found[f"{name}, {size}"] = a[at], b[at]
    return found


def errors(
    features: torch.Tensor, labels: torch.Tensor, views: Views | None = None
) -> dict[str, dict[str, float]]:
    """Name of a set -> share of it that is right ("truth"), and the errors of the estimates.

    An error ("halves", "views") is the estimate less the truth; all in per cent.
    """
    found = {}
    for name, (a, b) in sets(features).items():
        truth = float(same_label(labels, a, b).nanmean())
        guesses = {
            "halves": by_halves(features, a, b),
            **({} if views is None else {"views": by_views(views, a, b)}),
        }
        found[name] = {
            "truth": 100 * truth,
            **{by: 100 * (float(guess.mean()) - truth) for by, guess in guesses.items()},
        }
    return found


def sources(args) -> dict[str, miners.Source]:
    found = {}
    for file in args.files:
        if file == "digits":
            digits = miners.of_digits(args.seeds, args.device, args.sweeps)
            found |= {f"digits, seed {seed}": source for seed, source in enumerate(digits)}
        else:
            found[Path(file).stem.removeprefix("features_")] = miners.from_file(
                file, args.device, 1000 if args.quick else None
            )[0]
    for file, dataset, *root in args.run:
        found[f"{Path(file).resolve().parent.name}, {dataset}"] = miners.of_checkpoint(
            Path(file), dataset, *root or [None], args.device
        )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument(
        "files",
        metavar="FILE|digits",
        nargs="*",
        help="safetensors files with features [M, C] and labels [M]",
    )
    parser.add_argument(
        "--run",
        nargs="+",
        action="append",
        default=[],
        metavar="X",
        help="a checkpoint, the name of its data set and where that is",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of the digits (3)")
    parser.add_argument(
        "--sweeps", type=Path, default=Path("runs"), help="where the digits' sweeps have run (runs)"
    )
    args = parser.parse_args(argv)
    common.begin(args)
    columns = [("of", "features"), ("M", "images"), ("truth", "truth, %")]
    for by in ("views", "halves"):
        columns += [
            (f"{by}_mean", f"by {by}: mean error"),
            (f"{by}_size", f"by {by}: of |error|"),
            (f"{by}_range", f"by {by}: least to most"),
        ]
    title = "The estimates without labels, less the truth, in points"
    result = Result("estimate", title, args.device, [*columns, ("n", "sets")])
    try:
        if wrong := [run for run in args.run if not 2 <= len(run) <= 3]:
            raise BadInput(
                f"--run {' '.join(wrong[0])}: expected a checkpoint, the name of its data set and,"
                " but for digits, where that is"
            )
        for name, source in sources(args).items():
            found = errors(source.features, source.labels, source.views)
            truth = [x["truth"] for x in found.values()]
            row = {
                "of": name,
                "M": len(source.labels),
                "truth": f"{min(truth):.0f} to {max(truth):.0f}",
                "n": len(found),
            }
            for by in ("views", "halves"):
                if off := [x[by] for x in found.values() if by in x]:
                    row |= {
                        f"{by}_mean": f"{statistics.fmean(off):+.1f}",
                        f"{by}_size": f"{statistics.fmean(map(abs, off)):.1f}",
                        f"{by}_range": f"{min(off):+.1f} to {max(off):+.1f}",
                    }
            result.add(row)
    except BadInput as error:
        print(f"studies.estimate: {error}", file=sys.stderr)
        return error.exit_code
    result.note(
        "The constants were fitted to labels: by views on seed 0 of the digits, by halves there and"
        " on moco_resnet18w32; the others had no part in it. Files of features have no views."
    )
    common.end(args, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
