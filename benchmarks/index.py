"""The 10 nearest of every image, exactly and by the approximate index of --isl-index ivf.

Measured are seconds, memory and recall.

    python -m benchmarks.index                          100,000 and 1,000,000 unit rows of a
                                                        mixture, C = 128
    python -m benchmarks.index features.safetensors     and as many grown from the features [n, C]
                                                        of real images

Mixture: 100 rows around each of M / 100 random centres (`benchmarks.mining.synthetic`). Grown: a
row lies between a real row and one of its 10 nearest, with noise of length 0.3, and so has the
crowds of real features at any size. Seconds of ivf are those of all M queries: building (k-means,
lists, the choice of nprobe) and searching, in blocks as a round does it. Exact search is timed on a
sample of queries and multiplied. Recall is that of the same sample, which is not the one that chose
nprobe. Memory is the most that is held beyond the features.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import common
from benchmarks.knn import peak_bytes
from benchmarks.mining import load_features, synthetic
from moco_isl.errors import BadInput, missing_package
from moco_isl.mining.rounds import block_size
from moco_isl.ops.ivf import IVF, installed
from moco_isl.ops.neighbors import topk

K = 10
DIM = 128
COLUMNS = [
    ("features", "features"),
    ("M", "M"),
    ("search", "search"),
    ("cpu", "CPU s"),
    ("wall", "wall s"),
    ("build", "of it building, CPU s"),
    ("recall", "recall at 10"),
    ("lists", "lists"),
    ("nprobe", "nprobe"),
    ("memory_gib", "GiB"),
    ("queries", "queries timed"),
    ("n", "n"),
]


def grown(features: torch.Tensor, M: int) -> torch.Tensor:
    """features [n, C] unit rows -> M unit rows between each and one of its nearest, with noise."""
    n, C = features.shape
    g = torch.Generator().manual_seed(0)
    _, near = topk(features, features, K, torch.arange(n))
    rows = torch.empty(M, C)
    for i in range(0, M, 1 << 16):
        own = torch.arange(i, min(M, i + (1 << 16))) % n
        other = near[own, torch.randint(K, (len(own),), generator=g)]
        weight = torch.rand(len(own), 1, generator=g)
        noise = 0.3 / C**0.5 * torch.randn(len(own), C, generator=g)
        rows[i : i + len(own)] = F.normalize(
            torch.lerp(features[own], features[other], weight) + noise, dim=1
        )
    return rows


def seconds(fn: Callable[[], object], device: torch.device) -> tuple[object, float, float]:
    """What fn() returns, its seconds of CPU time of all threads, and of the wall."""
    common.synchronize(device)
    cpu = time.process_time()
    wall = time.perf_counter()
    found = fn()
    common.synchronize(device)
    return found, time.process_time() - cpu, time.perf_counter() - wall


def in_blocks(rows: torch.Tensor, bank: torch.Tensor | IVF, number: int) -> torch.Tensor:
    """The nearest [number, K] of the first rows, asked for in blocks as a round does."""
    anchors = torch.arange(number, device=rows.device)
    return torch.cat(
        [topk(rows[part], bank, K, part)[1] for part in anchors.split(block_size(len(rows)))]
    )


def measure(
    result: common.Result, name: str, rows: torch.Tensor, sample: int, repeats: int
) -> None:
    """Two rows of the table: exact and ivf."""
    M = len(rows)
    device = rows.device
    generator = torch.Generator().manual_seed(1)  # the index draws by 0
    chosen = torch.randperm(M, generator=generator)[:sample].to(device)
    before = peak_bytes(device, reset=True)
    times = []
    for _ in range(repeats):
        (least, _), cpu, wall = seconds(lambda: topk(rows[chosen], rows, K, chosen), device)
        times.append((cpu * M / sample, wall * M / sample))
    cpu, wall = map(statistics.median, zip(*times))
    row = {"features": name, "M": M, "n": repeats}
    result.add(
        {
            **row,
            "search": "exact",
            "cpu": cpu,
            "wall": wall,
            "recall": 1.0,
            "memory_gib": held(device, before),
            "queries": f"{sample:,}, multiplied",
        }
    )

    before = peak_bytes(device, reset=True)
    times = []
    for _ in range(repeats):
        index = None  # the one before is freed first: two would be two copies
        index, build_cpu, build_wall = seconds(lambda: IVF(rows), device)
        near, cpu, wall = seconds(lambda: in_blocks(rows, index, M), device)
        times.append((build_cpu + cpu, build_wall + wall, build_cpu))
    cpu, wall, build = map(statistics.median, zip(*times))
    cosine = (rows[chosen, None] * rows[near[chosen]]).sum(2)
    recall = float((cosine >= least[:, -1:] - 1e-6).double().mean())
    result.add(
        {
            **row,
            "search": "ivf",
            "cpu": cpu,
            "wall": wall,
            "build": build,
            "recall": round(recall, 3),
            "lists": index.lists,
            "nprobe": index.nprobe,
            "memory_gib": held(device, before),
            "queries": f"{M:,}",
        }
    )


def held(device: torch.device, before: int | None) -> float | None:
    """GiB at most since `before` was read."""
    return None if before is None else max(0, peak_bytes(device) - before) / 2**30


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.set_defaults(repeats=1)
    parser.add_argument(
        "file", nargs="?", help="safetensors file with features [n, C] of real images"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000], metavar="M")
    parser.add_argument(
        "--queries", type=int, default=2000, metavar="n", help="sample of the exact search (2,000)"
    )
    args = parser.parse_args(argv)
    common.begin(args)
    if args.quick:
        args.sizes = [2000]
        args.queries = 200
    try:
        if not installed():
            raise missing_package("this", "faiss", "'moco_isl[faiss]'")
        real = load_features(args.file, "cpu")[0] if args.file else None
    except BadInput as error:
        print(f"benchmarks.index: {error}", file=sys.stderr)
        return error.exit_code
    title = "The 10 nearest of every image, exactly and by an approximate index"
    result = common.Result("index", title, args.device, COLUMNS)
    try:
        for M in args.sizes:
            kinds = {"mixture": lambda M=M: synthetic(M, DIM, "cpu", torch.float32, 0)[0]}
            if real is not None:
                kinds["grown from real ones"] = lambda M=M: grown(real, M)
            for kind, rows_of in kinds.items():
                rows = rows_of().to(args.device)
                measure(result, kind, rows, min(args.queries, M), args.repeats)
    finally:  # what was measured before an error is not lost
        result.note(
            "CPU s: of all threads. The wall's seconds depend on what else the machine did; the two"
            " columns of the exact search are of a sample of queries, multiplied."
        )
        common.end(args, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
