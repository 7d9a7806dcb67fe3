"""Mining over 1, 2 and 4 gloo ranks of this machine: seconds a round, and whether sets are equal.

    python -m benchmarks.mining_ranks [--images 20000] [--repeats 3]

One thread a rank. Features are unit rows around M / 50 random centres. Beside the wall's seconds
stand the CPU seconds of the busiest rank: what a rank has to do, also where ranks outnumber the
cores and wait for each other.
"""

import argparse
import os
import statistics
import time

import torch
import torch.nn.functional as F

from moco_isl.miners.knn import KNNMiner
from moco_isl.mining.positives import PositiveSets
from tests.ranks import run_ranks


def features_of(M: int, C: int = 128) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(M // 50, C, generator=g)
    return F.normalize(
        centres[torch.randint(len(centres), (M,), generator=g)]
        + 0.7 * torch.randn(M, C, generator=g),
        dim=1,
    )


def one_round(
    rank: int, world: int, M: int, repeats: int
) -> tuple[list[float], list[float], int, int]:
    """Seconds and CPU seconds of each round on this rank, number of edges, checksum of the sets."""
    torch.set_num_threads(1)
    features = features_of(M)
    wall = []
    cpu = []
    for _ in range(repeats):
        start = time.perf_counter()
        worked = time.process_time()
        sets = KNNMiner(k=10, budget=5).mine(
            features, PositiveSets.empty(M, "cpu"), torch.Generator().manual_seed(1)
        )
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - worked)
    return (
        wall,
        cpu,
        sets.num_edges,
        int((sets.members.long() * torch.arange(1, sets.num_edges + 1)).sum()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(
        f"M = {args.images}, C = 128, k 10, budget 5; {os.cpu_count()} cores; median (least to"
        f" most) of {args.repeats}"
    )
    first = None
    for world in (1, 2, 4):
        results = run_ranks(world, one_round, args.images, args.repeats, timeout=900)
        sets = {tuple(found) for *_, found in [(r[0], r[1], r[2:]) for r in results]}
        first = first or sets
        same = "equal" if sets == first and len(sets) == 1 else "DIFFER"
        wall, cpu = ([max(values) for values in zip(*(r[i] for r in results))] for i in (0, 1))
        print(
            f"{world} ranks: {spread(wall)} s a round, {spread(cpu)} CPU seconds of the busiest"
            f" rank, sets {same}"
        )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
