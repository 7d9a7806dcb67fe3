"""Judge encoders on other data sets than they were trained on, in one table.

    python -m moco_isl.transfer runs/moco runs/isl --to cifar10:CIFAR flowers

By kNN, by a linear probe on features taken once, and by fine-tuning the whole
network, as `python main_knn.py` and `python main_lincls.py` do. The same command
again goes on, and judges nothing twice.
"""

import hashlib
import importlib
import json
import re
import shlex
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from moco_isl import data, files
from moco_isl.commands import COMMANDS
from moco_isl.encoders import AMP_TYPES, BACKBONE, build_encoder
from moco_isl.errors import BadInput
from moco_isl.evaluation.results import RESULTS, table
from moco_isl.evaluation.subject import fingerprint, identity, labelled
from moco_isl.options import opt
from moco_isl.run import checkpoint, environment, exits, flags
from moco_isl.run.backbone import load_backbone
from moco_isl.run.weights import weights_file
from moco_isl.schema import read_json

WAYS = {  # -> the command that judges so, its flags, its column
    "knn": ("knn", [], "kNN"),
    "linear": ("probe", ["--cache-features", "--lr", "1", "3", "10", "30"], "linear"),
    "finetune": ("probe", ["--finetune"], "fine-tuned"),
}
OURS = {"pretrained", "data", "dataset", "out", "resume", "seed", "features", "config", "evaluate"}


@dataclass(kw_only=True)
class TransferOptions:
    """Which encoders, on which images, judged how."""

    encoders: str | list[str] | None = opt(
        None,
        "encoders",
        metavar="FILE",
        several="*",
        help="what to judge: a checkpoint of ours or MoCo's, a run's folder, weights of a library",
    )
    to: list[str] = opt(
        [],
        several="*",
        metavar="DATA",
        help="data sets with train and val: DIR, or NAME:DIR with a name of --dataset, such as"
        " cifar10:DIR; digits alone",
    )
    by: list[str] = opt(
        list(WAYS), several="+", choices=tuple(WAYS), help="how to judge; finetune takes longest"
    )
    untrained: bool = opt(
        False, help="a row for the first FILE's network before any training, drawn by --seed"
    )
    out: str = opt("runs/transfer", metavar="DIR", help="results.json, and a folder for each run")
    knn: str = opt("", metavar="FLAGS", help='more flags of main_knn.py, as one text: "--k 20"')
    linear: str = opt(
        "", metavar="FLAGS", help='of main_lincls.py for the linear probe: "--epochs 50"'
    )
    finetune: str = opt(
        "", metavar="FLAGS", help='of main_lincls.py for fine-tuning: "--lr 0.03 --epochs 30"'
    )


@dataclass(kw_only=True)
class SharedOptions:
    """What is given to every run."""

    image_size: int = opt(
        0, low=0, high=4096, metavar="S", help="side of a crop in pixels (that of the training)"
    )
    cache: str | None = opt(None, metavar="DIR", help="keep small images decoded here")
    workers: int = opt(32, "-j", "--workers", low=0, help="loading workers, at most one a core")
    device: str = opt("auto", help="cuda, cpu, cuda:1, ...; auto: the GPU where there is one")
    amp: str = opt("off", choices=tuple(AMP_TYPES), help="half precision in the network")
    seed: int = opt(0, low=-(2**63), high=2**63 - 1, help="seed of the probes")


GROUPS: flags.Groups = {
    "what is judged, and how": (TransferOptions,),
    "of every run": (SharedOptions, flags.ConfigOptions),
}


def get_parser() -> flags.Parser:
    usage = "%(prog)s FILE [FILE ...] --to DATA [DATA ...] [flags]"
    parser = flags.Parser("python -m moco_isl.transfer", __doc__, usage=usage)
    parser.add_groups(GROUPS)
    return parser


def main(argv: list[str] | None = None, stop=None) -> int:
    """Run with flags argv; returns the exit code."""
    return exits.exit_code(run, argv, stop)


# ---- one run of the table ------------------------------------------------------------------------


@dataclass
class Target:
    """A data set to judge on, of a name of --dataset, and where it is."""

    given: str
    dataset: str
    root: str | None

    @cached_property
    def identity(self) -> str:
        """Tells its images and labels from others. Raises BadInput where it has none."""
        return identity(labelled(self.dataset, self.root, split) for split in ("train", "val"))

    def require(self) -> None:
        """Raise BadInput for images that cannot be read, or are not labelled."""
        assert self.identity

    @property
    def flags(self) -> list[str]:
        return [*([self.root] if self.root else []), "--dataset", self.dataset]


@dataclass
class Cell:
    """An encoder judged on a data set in one way. name: of the encoder; flags: of its script."""

    name: str
    sha256: str
    target: Target
    way: str
    flags: list[str]
    how: list[str]  # those of them that its figure depends on
    folder: Path  # of the encoder on this data set

    @property
    def out(self) -> Path:
        """The folder of its run: another one where its file, images or flags have changed."""
        what = json.dumps([self.sha256, self.target.identity, self.how])
        return self.folder / f"{self.way}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"

    @property
    def script(self):
        return importlib.import_module(COMMANDS[WAYS[self.way][0]].module)

    @property
    def argv(self) -> list[str]:
        """All flags of its script."""
        resumes = [] if self.way == "knn" else ["--resume", "auto"]
        return [*self.target.flags, *self.flags, "--out", str(self.out), *resumes]

    @property
    def key(self) -> dict:
        """What its figure depends on."""
        return {
            "encoder": self.name,
            "to": self.target.given,
            "by": self.way,
            "flags": self.flags,
            "sha256": self.sha256,
            "data_sha256": self.target.identity,
        }

    def judge(self, stop) -> dict:
        """Run its script; its row of results.json."""
        self.script.run(self.argv, stop)
        facts = json.loads((self.out / RESULTS).read_text())
        if self.way == "knn":
            found = next(row for row in facts["results"] if row["feature"] == BACKBONE)
            chosen = {"k": found["k"], "T": found["T"]}
        else:
            found = next(row for row in facts["classifiers"] if row["chosen"])
            chosen = {"lr": found["lr"]}
        return {**self.key, "epoch": facts["epoch"], **chosen, "top1": found["top1"]}


def named(path: str) -> str:
    """A path as the name of one folder."""
    return re.sub(r"[^\w.=,+-]+", "_", path).strip("._")[-150:] or "_"


# ---- before any of them runs ---------------------------------------------------------------------


def targets_of(texts: list[str]) -> list[Target]:
    """The data sets that --to names. Raises BadInput."""
    found = []
    for text in texts:
        name, colon, root = text.partition(":")
        flags.check(
            text not in data.SETS or not data.SETS[text].needs_dir or bool(files.kind(text)),
            f"--to {text} does not say where its images are: expected {text}:DIR",
        )
        if name in data.SETS and (colon or not data.SETS[name].needs_dir):
            target = Target(text, name, root or None)
        elif colon and not files.kind(text):
            target = Target(text, text, None)  # my.module:function
        else:
            target = Target(text, "folder", text)
        target.require()
        found.append(target)
    return found


def more_flags(way: str, text: str) -> list[str]:
    """What --knn, --linear or --finetune adds. Raises BadInput."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise BadInput(
            f"--{way} '{files.short(text)}': {error}; expected flags as one text"
        ) from None
    script = importlib.import_module(COMMANDS[WAYS[way][0]].module)
    try:
        args = script.get_parser().parse_args(words)
    except BadInput as error:
        raise BadInput(f"--{way}: {error}") from None
    for name in ("layers", "k", "T"):
        values = getattr(args, name, None)
        several = isinstance(values, list) and (len(values) > 1 or "all" in values)
        flags.check(
            name not in args.given or not several,
            f"--{way} has several --{name}, and the table has one column for it: give one",
        )
    taken = sorted(args.given & (OURS | set(flags_of_all())))
    if taken:
        name = taken[0].replace("_", "-")
        raise BadInput(
            f"--{way} has {name}, which is the same for all runs: give it beside --{way} where"
            " there is such a flag, or leave it off"
        )
    return words


def flags_of_all() -> list[str]:
    """The flags that every run is given, by their names in a Namespace."""
    return [name for name in vars(SharedOptions()) if name != "seed"]


def cells_of(args, encoders: dict[str, Path], targets: list[Target]) -> list[Cell]:
    """Every run of the table, checked. encoders: name -> file. Raises BadInput."""
    amp = ["--amp", args.amp]
    size = ["--image-size", str(args.image_size)] if args.image_size else []
    shared = ["--device", args.device, *amp, "--workers", str(args.workers), *size]
    shared += ["--cache", args.cache] if args.cache else []
    ways = list(dict.fromkeys(args.by))
    more = {way: more_flags(way, getattr(args, way)) for way in ways}
    cells = []
    for name, path in encoders.items():
        sha256 = fingerprint(weights_file(path))
        for target in targets:
            for way in ways:
                seed = [] if way == "knn" else ["--seed", str(args.seed)]
                own = [*WAYS[way][1], *seed, *more[way]]
                given = ["--pretrained", str(path), *shared, *own]
                folder = Path(args.out) / named(name) / named(target.given)
                cells.append(Cell(name, sha256, target, way, given, [*amp, *size, *own], folder))
    places = {(cell.folder, cell.way) for cell in cells}
    flags.check(len(places) == len(cells), "FILE or --to names one thing twice: name each once")
    return cells


def draw_untrained(file: str, path: Path, seed: int) -> None:
    """Write the network of a file as it is before any training, drawn by the seed."""
    _, info = load_backbone(file)
    torch.manual_seed(seed)
    network = build_encoder(info["arch"], 128, info["stem"], info["image_size"], info["channels"])
    state = {f"module.encoder_q.{name}": x for name, x in network.state_dict().items()}
    known = ("image_size", "bits", "mean", "std")
    kept = {name: info["args"][name] for name in known if info["args"].get(name)}
    content = {"epoch": 0, "arch": info["arch"], "state_dict": state, "args": kept}
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or not _same(checkpoint.load(path), content):
        checkpoint.save(content, path)


def _same(before: dict, now: dict) -> bool:
    tensors = [before.get("state_dict", {}), now["state_dict"]]
    return (
        all(before.get(name) == now[name] for name in ("arch", "args"))
        and tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(tensors[0][name], x) for name, x in tensors[1].items())
    )


# ---- the table -----------------------------------------------------------------------------------


def run(argv: list[str] | None, stop) -> None:
    args = get_parser().parse_args(argv)
    flags.check_ranges(args, TransferOptions, SharedOptions)
    check_given(args)
    out = Path(args.out)
    done = {_key(row): row for row in read_own(out)}
    encoders = {path: Path(path) for path in encoders_of(args)}
    targets = targets_of(args.to)  # before anything is written
    if args.untrained:
        path = out / f"untrained,seed={args.seed}.pth.tar"
        draw_untrained(next(iter(encoders)), path, args.seed)
        encoders[path.name.removesuffix(".pth.tar")] = path
    cells = cells_of(args, encoders, targets)
    left = [cell for cell in cells if _key(cell.key) not in done]
    for cell in left:
        cell.script.prepare(cell.argv)
    for number, cell in enumerate(left, 1):
        where = f"{files.shown(cell.name)} on {files.shown(cell.target.given)}"
        print(f"=> run {number} of {len(left)}: {where}, {WAYS[cell.way][2]}", flush=True)
        row = cell.judge(stop)
        done[_key(row)] = row
        # read again: another process may have added rows meanwhile
        write([*(x for x in read_own(out) if not _replaced(x, row)), row], out)
    print(as_text(cells, done))
    print(f"=> {files.shown(out / RESULTS)}")


def check_given(args) -> None:
    """Raise BadInput for flags that are missing, and for a process that is one of several."""
    place = environment.ranks()
    flags.check(
        place is None or place.world == 1,
        "moco_isl.transfer is one process: start it without torchrun; for fine-tuning on several"
        ' GPUs give --finetune="--multiprocessing-distributed"',
    )
    flags.check(encoders_of(args), "nothing to judge: give one FILE or several")
    flags.check(args.to, "no images to judge on: give --to DIR, or --to cifar10:DIR")
    for way in WAYS:
        if way not in args.by and getattr(args, way):
            print(f"=> --{way} does nothing here: --by leaves it out")
    files.require_folder(args.out, "--out")


def encoders_of(args) -> list[str]:
    """FILE as a list, each once."""
    given = args.encoders or []
    return list(dict.fromkeys([given] if isinstance(given, str) else given))


def as_text(cells: list[Cell], done: dict[str, dict]) -> str:
    """A row an encoder and data set, a column a way to judge."""
    ways = list(dict.fromkeys(cell.way for cell in cells))
    rows: dict[tuple, list] = {}
    for cell in cells:
        found = done[_key(cell.key)]
        at = (files.shown(cell.name), files.shown(cell.target.given), str(found["epoch"]))
        rows.setdefault(at, []).append(found["top1"])
    header = ["encoder", "judged on", "epoch", *(WAYS[way][2] for way in ways)]
    return table(header, [[*at, *figures] for at, figures in rows.items()])


SHAPE = {
    "transfer": [
        {
            "encoder": str,
            "to": str,
            "by": set(WAYS),
            "flags": [str],
            "sha256": str,
            "data_sha256": str,
            "epoch": (int, str, None),
            "top1": float,
            ...: object,
        }
    ],
    ...: object,
}


def read_own(out: Path) -> list[dict]:
    """The rows of results.json in --out, [] where there is none. Raises BadInput."""
    found: list[dict] = []

    def is_own(path: Path) -> bool:
        try:
            found.extend(read_json(path, SHAPE)["transfer"])
        except BadInput:
            return False
        return True

    files.require_ours(out / RESULTS, is_own, "--out")
    return found


def write(rows: list[dict], out: Path) -> None:
    facts = {"command": sys.argv, "transfer": rows}
    files.write_text(json.dumps(facts, indent=1) + "\n", out / RESULTS)


def _key(row: dict) -> str:
    names = ("encoder", "to", "by", "flags", "sha256", "data_sha256")
    return json.dumps([row[name] for name in names])


def _replaced(row: dict, by: dict) -> bool:
    """Whether a new row stands in the place of an older one."""
    return all(row[name] == by[name] for name in ("encoder", "to", "by"))


if __name__ == "__main__":
    sys.exit(main())
