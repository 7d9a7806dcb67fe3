"""Kill runs at random moments in all their stages, resume them, and compare what they leave with
what an unbroken run leaves, bit for bit.

    python -m tests.kill_and_resume --kills 30 [--seed 0] [--keep DIR]

Settings: one process; two loading workers on a folder of JPEGs, and batch norm in two parts,
between which keys are shuffled (compared with an unbroken run without workers); two gloo ranks, of
which one is killed; one process that saves after few of its epochs and keeps two numbered files.
Each run is killed once, in an epoch, in GAN training, in mining or in a save, and then goes on with
--resume auto.
"""

import argparse
import atexit
import functools
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.runs import DIGITS, MINED, STAGES, Kill, Running, differences, photos, random_kill, run

LENGTH = ["--epochs", 3, "--isl-start", 1, "--knn-every", 2, "--save-every", 3, "-p", 1]

# saved at the rounds before epochs 1 and 6, and after epochs 1, 3, 5 and 6, of which the last two
# are kept
FEW_SAVES = [
    "--epochs",
    7,
    "--isl-start",
    1,
    "--isl-every",
    5,
    "--knn-every",
    2,
    "-p",
    1,
    "--save-epochs",
    2,
    "--keep",
    2,
]


class Setting:
    """A way to run, and what it leaves unbroken."""

    def __init__(self, name: str, root: Path, argv: list, unbroken: list, ranks: int = 1):
        self.name = name
        self.root = root / name.replace(" ", "_")
        self.argv = argv
        self.ranks = ranks
        self.count = 0
        self.root.mkdir()
        self.whole, times = self.root / "whole", self.root / "seconds.json"
        run([*unbroken, "--out", self.whole], self.root / "whole.log", ranks=ranks, times=times)
        self.seconds: dict[str, list[float]] = json.loads(times.read_text())

    def kill(self, kill: Kill, rank: int = 0) -> tuple[list[str], float]:
        """(differences, seconds in which the other ranks ended)"""
        self.count += 1
        out, log = self.root / f"{self.count}", self.root / f"{self.count}.log"
        broken = Running([*self.argv, "--out", out], log, ranks=self.ranks, kill=(rank, kill))
        broken.processes[rank].join(120)
        start = time.monotonic()
        codes = broken.codes()
        waited = time.monotonic() - start
        assert codes[rank] == -9, f"{kill} did not happen: {codes}\n{broken.said()}"
        assert all(code == 3 for other, code in enumerate(codes) if other != rank), (
            f"{codes}\n{broken.said()}"
        )
        run([*self.argv, "--out", out, "--resume", "auto"], log, ranks=self.ranks)
        found = differences(self.whole, out)
        if not found:
            shutil.rmtree(out)
        return found, waited


SETTINGS = ("one process", "two workers", "two ranks", "few saves")


def make_setting(name: str, root: Path) -> Setting:
    if name == "two workers":
        flags = [*photos(root / "photos"), *MINED, *LENGTH, "--bn-splits", 2]
        return Setting(name, root, [*flags, "-j", 2], flags)
    flags = [*DIGITS, *MINED, *(FEW_SAVES if name == "few saves" else LENGTH)]
    return Setting(name, root, flags, flags, ranks=2 if name == "two ranks" else 1)


@functools.cache
def setting(name: str) -> Setting:
    """One for all tests of a session; its folder goes with the process."""
    root = Path(tempfile.mkdtemp(prefix="kill_and_resume_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return make_setting(name, root)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument(
        "--seed", type=int, default=None, help="of the moments; drawn and printed by default"
    )
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for the runs; those that differ stay there (default: a temporary one)",
    )
    args = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    draw, root = random.Random(seed), args.keep or Path(tempfile.mkdtemp(prefix="kill_and_resume_"))
    root.mkdir(exist_ok=True)
    start, ways = time.monotonic(), [make_setting(name, root) for name in SETTINGS]
    print(
        f"{args.kills} kills, seed {seed}, in {root}\n\n| killed in | moment | setting | equal"
        " |\n|---|---|---|---|",
        flush=True,
    )
    tally: dict[tuple[str, str], list[bool]] = {}
    for i in range(args.kills):
        way, stage = ways[i % len(ways)], list(STAGES)[i // len(ways) % len(STAGES)]
        rank = draw.randrange(way.ranks) if stage == "epoch" else 0  # GAN and files are rank 0's
        kill = random_kill(draw, way.seconds, stage)
        found, waited = way.kill(kill, rank)
        other = f", the other rank ended after {waited:.1f} s" if way.ranks > 1 else ""
        print(
            f"| {stage} | call {kill.call}, {kill.after * 1000:.0f} ms |"
            f" {way.name}{f', rank {rank}{other}' if way.ranks > 1 else ''} |"
            f" {'yes' if not found else '; '.join(found[:3])} |",
            flush=True,
        )
        tally.setdefault((stage, way.name), []).append(not found)
    good = sum(map(sum, tally.values()))
    print(f"\n| killed in | {' | '.join(way.name for way in ways)} |\n|---|{'---|' * len(ways)}")
    for stage in STAGES:
        cells = (tally.get((stage, way.name), []) for way in ways)
        print(f"| {stage} | {' | '.join(f'{sum(cell)} of {len(cell)}' for cell in cells)} |")
    print(f"\n{good} of {args.kills} equal the unbroken run, in {time.monotonic() - start:.0f} s")
    if good == args.kills and not args.keep:
        shutil.rmtree(root)
    return 0 if good == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
