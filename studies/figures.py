"""How good an encoder is, by labels of held-out images: weighted kNN, 1-shot, a linear probe.

The labels are used only to judge.

Labels judge here, and steer nothing. Letters: M images, C feature dimension, k neighbours.
"""

import contextlib
import io
import json
from pathlib import Path

import torch

import main_lincls
import main_moco_isl
from benchmarks import common
from moco_isl import data
from moco_isl.encoders import extract_features, take_head_off
from moco_isl.errors import BadInput
from moco_isl.evaluation.knn import few_shot, nearest, vote
from moco_isl.evaluation.subject import fingerprint
from moco_isl.run import devices
from moco_isl.run.backbone import load_backbone

HERE = Path(__file__).parent
PROBE = ["--cache-features", *"--lr 1 3 10 30 --epochs 100 --schedule 60 80 -j 0".split()]
Features = tuple[torch.Tensor, torch.Tensor]  # unit rows [M, C] and labels [M]

ROUND = {  # column -> its heading, and the name in the line of the last round
    "size": ("set size", "mean_size"),
    "reach": ("reach", "reach"),
    "found": ("same-class found", "same_class_found"),
    "precision": ("precision", "precision"),
    "own_nearest": ("own nearest", "precision_own_nearest"),
    "all_pairs": ("all pairs", "precision_all_pairs"),
    "estimate": ("estimated", "precision_estimate"),
    "most": ("at most", "precision_at_most"),
    "hub": ("worst in-degree", "worst_in_degree"),
}


class Result(common.Result):
    """A table that goes into studies/results."""

    folder = HERE / "results"


class Judge:
    """Figures in per cent: the train images are the bank, the held-out ones the queries.

    flags: those of main_moco_isl.py that say which images; k: neighbours of kNN. Raises BadInput
    for images without labels.
    """

    def __init__(self, flags: list[str], k: int, device: torch.device | str):
        args = main_moco_isl.get_parser().parse_args(flags)
        self.k = k
        self.device = torch.device(device)
        self.dataset = args.dataset
        self.splits = [
            data.build_dataset(args.dataset, args.data, split, args.download)
            for split in ("train", "val")
        ]
        if any(split.labels is None for split in self.splits):
            raise BadInput(
                f"the images in {args.data} have no labels: expected train/ and val/ with a folder"
                " a class"
            )
        if args.cache is not None:
            workers = devices.usable_workers(args.workers, 1)
            self.splits = [data.hold_cached(split, args.cache, workers) for split in self.splits]
        self.size = args.image_size or data.native_size(self.splits[0])

    def __call__(self, file: Path | str) -> dict[str, float]:
        """Figures of the query encoder in a checkpoint, by its output."""
        return self.figures(*self.features(file))

    def features(self, file: Path | str) -> list[Features]:
        """What the query encoder in a checkpoint makes of the train and of the held-out images.

        Of a file without a head, such as RotNet's, that is what its backbone gives.
        """
        encoder, info = load_backbone(file, image_size=self.size)
        if info["head"] is None:
            take_head_off(encoder)
        return self.features_by(encoder)

    def features_by(self, encoder: torch.nn.Module) -> list[Features]:
        return [self._features(encoder.to(self.device), split) for split in self.splits]

    @torch.no_grad()
    def _features(self, encoder: torch.nn.Module, split) -> Features:
        transform = data.get_eval_transform(self.dataset, self.size)
        loader = data.eval_loader(split, transform=transform, batch_size=512, device=self.device)
        try:
            rows = extract_features(encoder, loader, len(split), self.device)
        finally:
            loader.close()
        return rows, split.labels.to(self.device)

    def figures(self, train: Features, val: Features) -> dict[str, float]:
        """kNN, 1-shot, and how many of a query's nearest images have its label."""
        bank, labels = train
        queries, truth = val
        similarity, near = nearest(queries, bank, min(self.k, len(bank)))
        found = vote(similarity, labels[near], 0.1, int(labels.max()) + 1)
        one_shot, _ = few_shot(bank, labels, queries, truth, shots=1, draws=20, seed=0)
        return {
            "knn": 100 * float((found == truth).float().mean()),
            "one_shot": 100 * one_shot,
            "near": 100 * float((labels[near] == truth[:, None]).float().mean()),
        }


def linear(file: Path, images: list[str], out: Path, probe: list[str] = PROBE) -> float:
    """Accuracy in per cent of main_lincls.py on the frozen backbone.

    Its learning rate is chosen on images held out of train. images: flags that say which images,
    and the device. out: the probe's folder; a probe that has ended there is not run again. Raises
    BadInput where the probe fails, and where the one in `out` is of another state of the file.
    """
    if not (out / "results.json").exists():
        flags = [*images, *probe, "--pretrained", str(file), "-p", "1000", "--seed", "0"]
        with contextlib.redirect_stdout(io.StringIO()):
            code = main_lincls.main([*flags, "--out", str(out), "--resume", "auto"])
        if code:
            raise BadInput(f"the probe of {file} ended with exit code {code}")
    rows = results_of(out, file)["classifiers"]
    return next(row["top1"] for row in rows if row["chosen"])


def results_of(folder: Path, file: Path | str) -> dict:
    """results.json of a folder in which a file was judged. Raises BadInput where it has changed."""
    found = json.loads((folder / "results.json").read_text())
    if found.get("sha256") != fingerprint(file):
        raise BadInput(f"{folder} is of an earlier state of {file}: remove that folder")
    return found


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def of_round(line: dict) -> dict:
    """What a table may show of a round, by the keys of `ROUND`; line: of metrics.jsonl."""
    return {key: line.get(name) for key, (_, name) in ROUND.items()}
