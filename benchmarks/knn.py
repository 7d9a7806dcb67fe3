"""Weighted kNN at the size of ImageNet, on random unit features.

Measured are seconds and peak memory of searching and voting.

    python -m benchmarks.knn                  on a GPU: 1,281,167 images, 50,000 queries, 128-d and
                                              2,048-d
    python -m benchmarks.knn --device cpu     50,000 images, 10,000 queries

Peak memory is what the search adds to the features. "Searched again" is the share of queries whose
neighbours the kernel's float16 scores could not tell from others, so that they were searched a
second time, plainly; it is empty without the kernel.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import common
from moco_isl.evaluation.knn import knn_grid
from moco_isl.ops.neighbors import searched_again

CLASSES = 1000
COLUMNS = [
    ("images", "images"),
    ("queries", "queries"),
    ("dim", "dim"),
    ("dtype", "type"),
    ("k", "k"),
    ("seconds", "s, median"),
    ("spread", "least to most"),
    ("n", "n"),
    ("again_percent", "searched again, %"),
    ("peak_mib", "MiB at most"),
    ("features_mib", "MiB of the features"),
]


def unit_rows(
    n: int, dim: int, device: torch.device, dtype: torch.dtype, seed: int
) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.empty(n, dim, device=device, dtype=dtype)
    for part in rows.split(65536):
        part.copy_(
            F.normalize(torch.randn(len(part), dim, device=device, generator=generator), dim=1)
        )
    return rows


def peak_bytes(device: torch.device, reset: bool = False) -> int | None:
    """Most memory held since the last reset; None where the system does not tell.

    reset: start anew, from what is held now.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
            peak = torch.cuda.memory_allocated(device)
        return peak
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    except OSError:
        return None


def measure(
    M: int, Q: int, dim: int, k: int, device: torch.device, dtype: torch.dtype, repeat: int
) -> dict:
    bank = unit_rows(M, dim, device, dtype, 0)
    queries = unit_rows(Q, dim, device, dtype, 1)
    labels = torch.randint(CLASSES, (M,), generator=torch.Generator().manual_seed(2)).to(device)
    before = peak_bytes(device, reset=True)
    knn_grid(queries[:1024], bank, labels, [k], [0.1], CLASSES)
    timing = common.timed(
        lambda: knn_grid(queries, bank, labels, [k], [0.1], CLASSES),
        device,
        repeat,
        warmup=0,
        cpu_time=common.by_cpu_time(device),
    )
    peak = peak_bytes(device)
    again = searched_again(queries, bank, k)
    return {
        "images": M,
        "queries": Q,
        "dim": dim,
        "dtype": str(dtype).removeprefix("torch."),
        "k": k,
        "seconds": timing.median,
        "spread": f"{common.short(min(timing.seconds))} to {common.short(max(timing.seconds))}",
        "n": repeat,
        "again_percent": None if again is None else 100 * again,
        "peak_mib": None if peak is None else (peak - before) / 2**20,
        "features_mib": (bank.nbytes + queries.nbytes) / 2**20,
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--images", type=int, help="rows of the bank, M (default: 1,281,167; 50,000 on a CPU)"
    )
    parser.add_argument("--queries", type=int, help="default: 50,000; 10,000 on a CPU")
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument(
        "--half",
        action="store_true",
        help="features in half precision; neighbours found are compared in float32",
    )
    args = parser.parse_args(argv)
    common.begin(args)
    gpu = args.device.type == "cuda"
    M = args.images or (1_281_167 if gpu else 50_000)
    Q = args.queries or (50_000 if gpu else 10_000)
    if args.quick:
        M = 400
        Q = 20
        args.dims = args.dims[:1]
        args.k = 10
    half = torch.float16 if gpu else torch.bfloat16
    dtype = half if args.half else torch.float32
    result = common.Result("knn", "Weighted kNN, searching and voting", args.device, COLUMNS)
    try:
        for dim in args.dims:
            result.add(measure(M, Q, dim, args.k, args.device, dtype, args.repeats))
    finally:  # what was measured before an error is not lost
        if common.by_cpu_time(args.device):
            result.note(common.BY_CPU_TIME)
        common.end(args, result)


if __name__ == "__main__":
    main()
