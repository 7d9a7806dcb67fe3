"""Part C: one MoCo v2, and equal continuations from it, one for each miner.

It is one process, so that images are decoded and networks compiled once.

One process: images are decoded once, networks compiled once.
"""

import math
import shutil
import statistics
import time
from pathlib import Path

from PIL import Image

import main_moco_isl
from benchmarks.pack.record import Context
from moco_isl import data
from moco_isl.errors import Interrupted
from moco_isl.ops.neighbors import searched_again
from moco_isl.run import checkpoint
from studies.breakeven import FORMS
from studies.figures import HERE, Judge, linear, metrics, of_round

MOCO = "MoCo v2"
MEANLOG, LOGSUM = (FORMS[form][1] for form in ("meanlog", "logsum"))
AVERAGE = ["--miner", "average", "--isl-trust", "0.01"]  # which takes views, and leaves all in
GAN = ["--miner", "gan", "--isl-candidates", "120", "--isl-radius", "0.2", "--isl-threshold", "0.3"]
ROWS = {  # title -> flags; a cut run has the first of them, which make a pair
    "+ none": ["--miner", "none"],
    "+ average with views, 100": [*AVERAGE, "--isl-budget", "100", *MEANLOG],
    "+ average with views, 10": [*AVERAGE, "--isl-budget", "10", *MEANLOG],
    "+ average with views, 100, Eq. 5 and hard positives": (
        [*AVERAGE, "--isl-budget", "100", *LOGSUM]
    ),
    "+ gan, 100": [*GAN, "--isl-budget", "100", *MEANLOG],
    "+ knn, 10": ["--miner", "knn", "--isl-budget", "10", *MEANLOG],
}
PLAN = {"science": [MOCO, *ROWS]}
MINED = ["--isl-max-share", "0.2", "--isl-max-positives", "128"]
CONFIG = ["--config", str(HERE / "flags_small_images.yaml")]
FULL = ["-j", "8", "--save-epochs", "50"]
QUICK = "-a resnet18w8 --moco-dim 32 --moco-k 128 -b 64 -j 0 --save-epochs 2".split()
QUICK_GAN = "--isl-gan-iters 40 --isl-gan-min-iters 40".split()
PROBE = "--cache-features --lr 3 10 30 100 --epochs 30 --schedule 18 24 -b 1024 -j 8".split()
QUICK_IMAGES = (20, 6)  # of a class, to train on and held out
MINING = 8  # seconds of a round, about
RESERVE = 0.3  # share of all the time that MoCo v2 leaves to the rows, however far it has come


class Science:
    """The runs of part C, and their judge."""

    def __init__(self, context: Context):
        self.context = context
        self.quick = context.quick
        self.device = context.device
        self.began = time.time()
        self.folder = context.work / "science"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.images = (
            few_images(context.data, self.folder / "images") if self.quick else context.data
        )
        self.cache = self.folder / "cache"
        self.epochs = (3, 2) if self.quick else (150, 20)
        self.k = 20 if self.quick else 200
        self.looked = False  # at how often the fused search is unsure of real features

    def flags(self) -> list[str]:
        own = QUICK if self.quick else FULL
        return [*self.where(), "--dataset", "folder", *CONFIG, "--seed", "0", *own]

    def where(self) -> list[str]:
        """The flags that training and probe share."""
        device = ["--device", self.device.type]
        return [str(self.images), *device, "--cache", str(self.cache)]

    def run(self, name: str, flags: list[str], until: float) -> tuple[Path, dict]:
        """Run the main script in <folder>/<name> until it ends or the clock says `until`.

        Returns its last checkpoint, and figures of its epochs and its last round. Raises
        RuntimeError where it failed.
        """
        out = self.folder / name
        code = main_moco_isl.main(
            [*self.flags(), *flags, "--out", str(out)], lambda: time.time() > until
        )
        if code not in (0, Interrupted.exit_code) or not (out / "checkpoint_last.pth.tar").exists():
            raise RuntimeError(f"{name} ended with exit code {code}: see its log")
        lines = metrics(out)
        rounds = [line for line in lines if line["kind"] == "round"]
        found = {
            "epochs": sum(line["kind"] == "epoch" for line in lines),
            **(of_round(rounds[-1]) | {"said": rounds[-1].get("why") or None} if rounds else {}),
        }
        if rates := [line["images_per_s"] for line in lines if line["kind"] == "step"]:
            found["last_images_per_s"] = statistics.median(rates[-5:])
            # the median: a pause or a busy GPU in some epochs changes nothing
            found["images_per_s"] = statistics.median(rates)
            found["seconds"] = found["epochs"] * self.M / found["images_per_s"]
        if code:
            found["said"] = "ended by the clock"
        return out / "checkpoint_last.pth.tar", found

    # ---- judging

    def decode(self) -> None:
        """Both splits, through the cache that the runs map."""
        self.judging = Judge(self.flags(), self.k, self.device)
        self.M = len(self.judging.splits[0])

    def judge(self, file: Path) -> dict:
        """Figures in per cent on held-out images, of the query encoder in a checkpoint.

        kNN and 1-shot are by its output, linear by its backbone.
        """
        train, val = self.judging.features(file)
        if not self.looked and (again := searched_again(val[0], train[0], self.k)) is not None:
            self.context.record.add(
                "note",
                f"{100 * again:.2f} % of {len(val[0]):,} real queries were searched again among"
                f" {self.M:,} images, k {self.k}",
            )
            self.looked = True
        probed = linear(file, self.where(), file.parent / "probe", PROBE)
        return {**self.judging.figures(train, val), "linear": probed}


def science(context: Context) -> None:
    study = Science(context)
    start = None
    need = math.inf
    judging = 0.0
    with context.row("science", MOCO) as row:
        study.decode()
        until = context.until - RESERVE * (context.until - study.began)
        start, found = study.run("moco", ["--epochs", str(study.epochs[0]), "--lr", "0.06"], until)
        row |= found
        began = time.time()
        row |= study.judge(start)
        judging = time.time() - began
        need = study.epochs[1] * study.M / found["last_images_per_s"] + judging + MINING
    if start is None:
        return
    keep_encoder(start, context.record.out / "encoder_fp16.pth.tar")
    for number, (title, flags) in enumerate(ROWS.items()):
        if context.left() < 1.15 * need and not study.quick:
            context.record.add(
                "note",
                f"science: {title} was not begun: it takes some {need:.0f} s, and"
                f" {context.left():.0f} s were left",
            )
            continue
        with context.row("science", title) as row:
            mining = [] if title == "+ none" else MINED
            if study.quick and "gan" in flags:
                mining = [*mining, *QUICK_GAN]
            go_on = ["--init", str(start), "--epochs", str(study.epochs[1]), "--lr", "0.02"]
            file, found = study.run(
                f"row{number}", [*go_on, *flags, *mining], context.until - 1.5 * judging
            )
            row |= found
            row |= study.judge(file)
        context.record.archive(context.work)


# ---------------------------------------------------------------- pieces


def keep_encoder(file: Path, out: Path) -> None:
    """The query encoder of a checkpoint in half precision, under MoCo's names."""
    content = checkpoint.load(file)
    mine = {
        name: x.half() if x.is_floating_point() else x
        for name, x in content["state_dict"].items()
        if "encoder_q" in name
    }
    checkpoint.save({"epoch": content["epoch"], "arch": content["arch"], "state_dict": mine}, out)


def few_images(source: Path | None, folder: Path) -> Path:
    """A folder with a few images a class, of another folder or of the digits: for rehearsals."""
    if source is not None:
        for split, most in zip(("train", "val"), QUICK_IMAGES):
            for kind in sorted(path for path in (source / split).iterdir() if path.is_dir()):
                (folder / split / kind.name).mkdir(parents=True, exist_ok=True)
                for path in sorted(kind.iterdir())[:most]:
                    shutil.copy(path, folder / split / kind.name)
        return folder
    for split, most in zip(("train", "val"), QUICK_IMAGES):
        digits = data.build_dataset("digits", split=split)
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True, exist_ok=True)
            for i in (digits.labels == label).nonzero()[:most, 0].tolist():
                image = Image.fromarray(digits.images[i].permute(1, 2, 0).numpy())
                image.save(folder / split / str(label) / f"{i:04}.png")
    return folder
