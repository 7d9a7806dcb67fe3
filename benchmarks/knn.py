"""Weighted kNN at the size of ImageNet: seconds and peak memory of searching and voting, on random unit features.

python benchmarks/knn.py                  on a GPU: 1,281,167 images, 50,000 queries, 128-d and 2,048-d
python benchmarks/knn.py --device cpu     50,000 images, 10,000 queries

Peak memory is what the search adds to the features themselves.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from moco_isl.evaluation.features import table
from moco_isl.evaluation.knn import knn_grid

CLASSES = 1000


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, help="rows of the bank, M (default: 1,281,167; 50,000 on a CPU)")
    parser.add_argument("--queries", type=int, help="default: 50,000; 10,000 on a CPU")
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument(
        "--half", action="store_true", help="features in half precision; neighbours found are compared in float32"
    )
    parser.add_argument(
        "--repeat", type=int, default=3, metavar="n", help="runs after a warm-up; the median counts (default: 3)"
    )
    parser.add_argument("--out", metavar="FILE.json")
    return parser


def unit_rows(n: int, dim: int, device: torch.device, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.empty(n, dim, device=device, dtype=dtype)
    for part in rows.split(65536):
        part.copy_(F.normalize(torch.randn(len(part), dim, device=device, generator=generator), dim=1))
    return rows


def peak_bytes(device: torch.device, reset: bool = False) -> int | None:
    """Most memory held since the last reset, now being the start of the next; None where the system does not tell."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
            peak = torch.cuda.memory_allocated(device)
        return peak
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark of resident memory starts anew
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    except OSError:
        return None


def measure(M: int, Q: int, dim: int, k: int, device: torch.device, dtype: torch.dtype, repeat: int) -> dict:
    bank, queries = unit_rows(M, dim, device, dtype, 0), unit_rows(Q, dim, device, dtype, 1)
    labels = torch.randint(CLASSES, (M,), generator=torch.Generator().manual_seed(2)).to(device)
    before = peak_bytes(device, reset=True)
    knn_grid(queries[:1024], bank, labels, [k], [0.1], CLASSES)
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        knn_grid(queries, bank, labels, [k], [0.1], CLASSES)[k, 0.1].sum().item()  # .item() waits for the device
        seconds.append(time.perf_counter() - start)
    median = sorted(seconds)[len(seconds) // 2]
    peak = peak_bytes(device)
    return {
        "images": M,
        "queries": Q,
        "dim": dim,
        "dtype": str(dtype).removeprefix("torch."),
        "k": k,
        "seconds": median,
        "all_seconds": seconds,
        "peak_mib": None if peak is None else (peak - before) / 2**20,
        "features_mib": (bank.nbytes + queries.nbytes) / 2**20,
    }


def main() -> None:
    args = get_parser().parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    M, Q = args.images or (1_281_167 if gpu else 50_000), args.queries or (50_000 if gpu else 10_000)
    dtype = (torch.float16 if gpu else torch.bfloat16) if args.half else torch.float32
    rows = []
    for dim in args.dims:
        rows.append(measure(M, Q, dim, args.k, device, dtype, args.repeat))
    hardware = torch.cuda.get_device_name(device) if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{hardware}, torch {torch.__version__}, median of {args.repeat}")
    shown = ["images", "queries", "dim", "dtype", "k", "seconds", "peak_mib", "features_mib"]
    print(table(shown, [[row[name] for name in shown] for row in rows]))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(
                {"command": sys.argv, "hardware": hardware, "torch": torch.__version__, "rows": rows}, file, indent=1
            )


if __name__ == "__main__":
    main()
