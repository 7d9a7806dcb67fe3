"""How far off is the estimate without labels (moco_isl/mining/estimate.py)? Beside the truth, over sets of 1 to 50 positives an image by four rules.

    python -m benchmarks.estimate digits FILE.safetensors ...      features [M, C] and labels [M]; digits: a converged MoCo v2 a seed

Rules: each image's own nearest, all pairs by cosine, shared neighbours, neighbourhood means (see benchmarks.miners). An error is of one set of
pairs, in points: the estimate's mean over 2,000 of them less the share of them that is right. Labels judge and choose nothing.
"""

import statistics
import sys
from pathlib import Path

import torch

from benchmarks import common, miners
from moco_isl.errors import BadInput
from moco_isl.mining.estimate import pair_precision
from moco_isl.mining.positives import same_label

SIZES, SAMPLE = [1, 2, 5, 10, 20, 50], 2000


def sets(features: torch.Tensor) -> dict[str, miners.Pairs]:
    """Name of a set -> pairs a, b: up to SAMPLE of it, drawn."""
    lists = miners.Lists(features)
    M, K = lists.near.shape
    ranked = {"all pairs": lists.by_cosine(), "shared neighbours": lists.by_shared(), "neighbourhood means": lists.by_means(50)}
    draw, found = torch.Generator().manual_seed(0), {}
    for size in (size for size in SIZES if size <= K):
        a, place = torch.randint(M, (SAMPLE,), generator=draw), torch.randint(size, (SAMPLE,), generator=draw)
        found[f"own nearest, {size}"] = lists.anchors[a], lists.near[a, place]
        for name, (a, b) in ranked.items():
            if (n := round(size * M / 2)) <= len(a):
                at = torch.randperm(n, generator=draw)[:SAMPLE].to(a.device)
                found[f"{name}, {size}"] = a[at], b[at]
    return found


def errors(features: torch.Tensor, labels: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Name of a set -> what is right of it, and the estimate less that, both in per cent."""
    found = {}
    for name, (a, b) in sets(features).items():
        truth, guess = float(same_label(labels, a, b).nanmean()), float(pair_precision(features, a, b).mean())
        found[name] = 100 * truth, 100 * (guess - truth)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("files", metavar="FILE|digits", nargs="+", help="safetensors files with features [M, C] and labels [M]")
    parser.add_argument("--seeds", type=int, default=3, help="of the digits (3)")
    parser.add_argument("--starts", type=Path, default=Path("runs/breakeven/digits-20"), help="folder with the digits' converged runs, made where they are not there")
    args = parser.parse_args(argv)
    common.begin(args)
    result = common.Result("estimate", "The estimate without labels, less the truth, in points", args.device, [
        ("of", "features"), ("M", "images"), ("truth", "truth, %"), ("mean", "mean error"), ("size", "mean of |error|"), ("least", "least"), ("most", "most"), ("n", "sets")])  # fmt: skip
    try:
        for file in args.files:
            if file == "digits":
                sources = miners.of_digits(1 if args.quick else args.seeds, args.device, args.starts, args.quick)
            else:
                sources = miners.from_file(file, args.device, 1000 if args.quick else None)
            for seed, source in enumerate(sources):
                found = errors(source.features, source.labels)
                truth, off = zip(*found.values())
                name = f"digits, seed {seed}" if file == "digits" else Path(file).stem.removeprefix("features_")
                result.add({"of": name, "M": len(source.labels), "truth": f"{min(truth):.0f} to {max(truth):.0f}", "mean": f"{statistics.fmean(off):+.1f}",
                            "size": f"{statistics.fmean(map(abs, off)):.1f}", "least": f"{min(off):+.1f}", "most": f"{max(off):+.1f}", "n": len(off), "sets": found})  # fmt: skip
    except BadInput as error:
        print(f"benchmarks.estimate: {error}", file=sys.stderr)
        return error.exit_code
    result.note("Its two constants were fitted to labels on moco_resnet18w32 and on seed 0 of the digits; it met the others for the first time here.")
    common.end(args, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
