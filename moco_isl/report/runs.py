"""A run folder read back: its flags, metrics, rounds of mining, and the images it was trained on.

Letters: M images, E directed edges of the sets, A anchors looked at, k neighbours.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from moco_isl import data, files
from moco_isl.errors import BadInput
from moco_isl.mining.positives import PositiveSets
from moco_isl.mining.record import nearest_of_sample, require_record, sample_anchors
from moco_isl.options import listed
from moco_isl.run import checkpoint
from moco_isl.run.logs import read_facts, read_metrics
from moco_isl.training.options import get_parser
from moco_isl.training.state import flags_shape

Tensor = torch.Tensor


class Record:
    """What a round left in the run folder; `mining.record` says what its file holds."""

    def __init__(self, content: dict[str, Tensor]):
        members = content["members"]
        self.sets = PositiveSets.from_state({**content, "weights": torch.ones(len(members))})
        self.cosine = content["cosine"].float()  # [E] similarity of an edge's ends
        # [A, k] the miner's own ranking of `anchors`
        self.ranked = content["ranked"].long() if "ranked" in content else None
        self.score = content["score"].float() if "score" in content else None  # [A]
        self._content = content

    @property
    def M(self) -> int:
        return self.sets.num_images

    @cached_property
    def anchors(self) -> Tensor:
        """[A] the images whose neighbours are known."""
        if "anchors" in self._content:
            return self._content["anchors"].long()
        return sample_anchors(self.M)

    @cached_property
    def nearest(self) -> tuple[Tensor, Tensor]:
        """Nearest images of the anchors [A, k] and their cosines [A, k], the nearest first."""
        if "near" in self._content:
            return self._content["near"].long(), self._content["near_cosine"].float()
        _, near, cosine = nearest_of_sample(self._content["features"].float())
        return near, cosine


@dataclass
class Round:
    """A round of mining: its line in metrics.jsonl, and the file beside it if there is one."""

    report: dict
    path: Path
    M: int | None = None  # images, where it is known from elsewhere

    @property
    def number(self) -> int:
        return self.report["round"]

    @property
    def epoch(self) -> int:
        """Epochs done before it."""
        return self.report["epoch"]

    @property
    def accepted(self) -> bool:
        return bool(self.report.get("accepted", True))

    def load(self) -> Record | None:
        """The record; None where the round left none. Large: load it, use it, let it go."""
        if not files.kind(self.path):
            return None
        content = checkpoint.load(self.path)
        require_record(content, self.path, self.M)
        return Record(content)


@dataclass
class Run:
    """A run folder."""

    path: Path
    name: str
    flags: dict  # the resolved flags in args.json
    facts: dict  # what else args.json holds
    steps: list[dict]  # lines of metrics.jsonl
    epochs: list[dict]
    rounds: list[Round]
    clusterings: list[dict] = field(default_factory=list)  # of --objective deepcluster

    @property
    def images(self) -> tuple:
        """What tells whether two runs counted their images alike."""
        roots = listed(self.flags.get("data"))
        held_out = self.flags.get("knn_holdout") or 0
        return (
            self.flags.get("dataset"),
            tuple(map(os.path.realpath, roots)),
            held_out,
            self.flags.get("seed") if held_out else None,
        )

    def num_images(self) -> int | None:
        """M, as the last round that left a record says it.

        The other rounds must say the same when they are loaded.
        """
        recorded = [round_ for round_ in reversed(self.rounds) if files.kind(round_.path)]
        record = recorded[0].load() if recorded else None
        for round_ in self.rounds:
            round_.M = record.M if record else None
        return record.M if record else None

    def dataset(self, root: str | list[str] | None = None, M: int | None = None):
        """The images it was trained on, in the order that its sets count.

        root: where they lie, if not where they lay; M: how many there are. Raises BadInput where
        they are gone, or not those.
        """
        flags = self.flags
        root = root or flags.get("data")
        if flags["dataset"] == "digits":
            root = None
        try:
            pixels = (flags.get("channels") or 3, flags.get("bits") or 8)
            dataset = data.build_dataset(flags["dataset"], root, "train", False, *pixels)
        except BadInput as error:
            raise BadInput(
                f"the images of run '{self.path}' cannot be read: {error}. Say where they lie now"
                " with --data DIR"
            ) from error
        if flags.get("knn_holdout"):
            dataset, _ = data.holdout(dataset, flags["knn_holdout"], flags["seed"])
        if M is not None and len(dataset) != M:
            where = " ".join(listed(root)) or flags["dataset"]
            raise BadInput(
                f"run '{self.path}' mined {M} images, but {where} holds {len(dataset)}: expected"
                " the images it was trained on; say where they lie with --data DIR"
            )
        return dataset


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders, each with a name of its own. Raises BadInput."""
    paths = [Path(path) for path in paths]
    for path in paths:
        files.kind(path, "RUN")  # raises where nobody can look at it
    return [read_run(path, name) for path, name in zip(paths, _names(paths))]


def read_run(path: Path, name: str) -> Run:
    expected = (
        "expected the --out folder of a run of main_moco_isl.py, with args.json and metrics.jsonl"
    )
    if files.kind(path, "RUN") != "folder":
        raise BadInput(f"no such run: '{path}'; {expected}")
    for file in ("metrics.jsonl", "args.json"):
        if not files.kind(path / file):
            raise BadInput(f"'{path}' holds no run: {file} is missing; {expected}")
        files.require_file(path / file)
    parser = get_parser("")
    optional = {action.dest for action in parser._actions} - {"dataset"}
    facts = read_facts(path, flags_shape(parser, optional))
    lines = read_metrics(path)
    if not lines or "args" not in facts:
        raise BadInput(
            f"{files.named('', path)} holds a run that has logged nothing yet: let it run for"
            " --print-freq steps at least"
        )
    of_kind = lambda kind: [line for line in lines if line["kind"] == kind]
    rounds = [
        Round(line, path / "rounds" / f"round_{line['round']:04d}.pt") for line in of_kind("round")
    ]
    steps, epochs, clusterings = map(of_kind, ("step", "epoch", "clusters"))
    return Run(path, name, facts.pop("args"), facts, steps, epochs, rounds, clusterings)


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    names = shortest_ends([path.resolve() for path in paths])
    if names is None:
        raise BadInput(f"the run '{paths[0]}' is named twice: name each run once")
    return names


def shortest_ends(paths: Sequence[Path], least: int = 1) -> list[str] | None:
    """The shortest ends, of `least` parts or more, that tell paths apart; None: two are one."""
    parts = [path.parts for path in paths]
    for length in range(least, max(map(len, parts), default=1) + least):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return None
