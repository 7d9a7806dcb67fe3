"""Scenarios run side by side while pytest collects their outcomes one by one, and the table of what
happened.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.lab import GAN, KNN, SINGLE, Lab

AT_ONCE = 4  # most of a scenario is waiting for SLURM, and two ranks import torch the rest


@dataclass
class Scenario:
    # (lab, board) -> (what happened, losses equal or not: True, or None where no run completes)
    run: Callable
    smoke: bool
    alone: bool

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def title(self) -> str:
        return self.run.__doc__.strip()


SCENARIOS: dict[str, Scenario] = {}


def scenario(smoke: bool = False, alone: bool = False) -> Callable:
    """Register a scenario.

    smoke: one of the six of .ci/run; alone: it disturbs the nodes and runs after all others.
    """

    def register(run: Callable) -> Callable:
        SCENARIOS[run.__name__] = Scenario(run, smoke, alone)
        return run

    return register


class Board:
    """Runs the chosen scenarios on one cluster."""

    def __init__(self, cluster: Cluster, folder: Path, names: list[str]):
        self.cluster, self.folder, self.rows = cluster, folder, {}
        self.pool = ThreadPoolExecutor(AT_ONCE)
        self.last = ThreadPoolExecutor(1)
        self.references = {
            kind: self.pool.submit(self._reference, kind, flags)
            for kind, flags in self._needed(names).items()
        }
        self.results: dict[str, Future] = {
            n: self.pool.submit(self._timed, n) for n in names if not SCENARIOS[n].alone
        }
        together = list(self.results.values())
        for name in names:
            if SCENARIOS[name].alone:
                self.results[name] = self.last.submit(self._after, together, name)

    def _needed(self, names: list[str]) -> dict[str, list[str]]:
        needed = {"knn": KNN}
        needed |= {"gan": GAN} if any("gan" in name for name in names) else {}
        return needed | ({"single": SINGLE} if any("debug" in name for name in names) else {})

    def _reference(self, kind: str, flags: list[str]):
        """An unbroken run of two ranks on two nodes (single: of one)."""
        lab = Lab(self.cluster, self.folder / f"reference_{kind}")
        nodes = ["--gpus-per-node", "0", "--timeout", "20"] if kind == "single" else None
        job = lab.submit("--partition", "debug", flags=flags, **({"nodes": nodes} if nodes else {}))
        said = job.end()
        return job, said

    def reference(self, kind: str = "knn") -> Path:
        return self.references[kind].result()[0].folder

    def _after(self, others: list[Future], name: str):
        for other in others:
            other.exception()
        return self._timed(name)

    def _timed(self, name: str) -> None:
        start = time.monotonic()
        row = ["failed", None]
        try:
            row = list(SCENARIOS[name].run(Lab(self.cluster, self.folder / name), self))
        finally:
            self.rows[name] = [SCENARIOS[name].title, *row, time.monotonic() - start]

    def result(self, name: str) -> None:
        """Wait for a scenario; raises what it raised."""
        self.results[name].result()

    def table(self) -> str:
        equal = {True: "equal", None: "-"}
        lines = ["| scenario | what happened | seconds | losses and weights |", "|---|---|---|---|"]
        for name in SCENARIOS:
            if name in self.rows:
                title, what, same, seconds = self.rows[name]
                lines.append(
                    f"| {title} | {what} | {seconds:.0f} |"
                    f" {equal[same] if what != 'failed' else 'failed'} |"
                )
        return "\n".join(lines)

    def close(self) -> None:
        for future in self.results.values():
            future.cancel()
        self.pool.shutdown(wait=True)
        self.last.shutdown(wait=True)
