"""What is judged: the encoder in a file, and the labelled images that it is judged on."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from moco_isl import data
from moco_isl.data.datasets import ImagesInMemory, stat_of
from moco_isl.encoders import AMP_TYPES, channels_of, require_side
from moco_isl.errors import BadInput
from moco_isl.options import listed, opt
from moco_isl.run import checkpoint, ranks
from moco_isl.run.backbone import load_backbone
from moco_isl.run.weights import weights_file
from moco_isl.training import resume
from moco_isl.training.state import require_start

LOOKED_AT = 10_000  # files whose sizes go into `identity`


class ReadOnce:
    """Base of a dataclass that keeps what it has read of files, by names with an underscore.

    A copy in another process has none of that, and reads for itself.
    """

    def __getstate__(self) -> dict:
        read = {f.name: None for f in fields(self) if f.name.startswith("_")}
        return {f.name: getattr(self, f.name) for f in fields(self)} | read


@dataclass
class Resumed(ReadOnce):
    """The file that a probe goes on with, read once in a process; its content is {} for none."""

    start: resume.Start
    _content: dict | None = None

    @property
    def path(self) -> str | None:
        return self.start.path

    @property
    def content(self) -> dict:
        """What is in the file. Raises BadInput."""
        if self._content is None:
            self._content = {}
            if self.path:
                content = checkpoint.load(self.path)
                require_start(content, self.path, resume=True)
                self._content = content
        return self._content

    @property
    def is_ours(self) -> bool:
        """Whether it is a file of main_lincls.py, not of MoCo's."""
        return "probe" in self.content

    def let_go(self) -> None:
        """Free the memory of what has been read."""
        self._content = None


@dataclass(kw_only=True)
class SubjectOptions:
    """Which file is judged, and how its network computes."""

    pretrained: str = opt(
        "",
        metavar="FILE",
        may_change=True,
        help="what to judge: a checkpoint of ours or MoCo's, a run's folder, weights of torchvision"
        " or timm, DINO's or DINOv2's (.safetensors too), or a Hugging Face folder",
    )
    amp: str = opt(
        "off",
        choices=AMP_TYPES,
        help="half precision in the network; bf16 on any recent GPU",
    )


@dataclass
class Subject(ReadOnce):
    """An encoder in a file and the images to judge it on, each read once in a process.

    path, arch, stem, key_encoder: see `load_backbone`. dataset, root, download: see
    `data.build_dataset`. image_size: 0 for that of the training. needs_val: whether a data set
    without a val split is an error. resumed: the file at `path`, where that is gone on with. asked:
    what the flags say of the pixels.
    """

    path: str
    arch: str | None
    stem: str
    key_encoder: bool
    dataset: str
    root: str | list[str] | None
    download: bool
    image_size: int
    needs_val: bool = True
    resumed: Resumed | None = None
    asked: data.Pixels = data.Pixels(None, None, None, None)

    @cached_property
    def _loaded(self) -> tuple[nn.Module, dict]:
        return load_backbone(
            self.path,
            self.arch,
            self.stem,
            self.key_encoder,
            self.image_size or None,
            content=self.resumed and self.resumed.content,
        )

    @property
    def encoder(self) -> nn.Module:
        return self._loaded[0]

    @property
    def info(self) -> dict:
        """What is known about the encoder, see `load_backbone`."""
        return self._loaded[1]

    @cached_property
    def sha256(self) -> str:
        return fingerprint(weights_file(self.path))

    @cached_property
    def _format(self) -> data.Pixels:
        """Channels and bits as the encoder takes them, mean and std as the flags or the file say.

        Raises BadInput where the flags ask for other channels.
        """
        if not self.path:
            return replace(data.RGB, **{name: x for name, x in vars(self.asked).items() if x})
        return format_of(self.encoder, self.info, self.asked)

    @cached_property
    def pixels(self) -> data.Pixels:
        """What the numbers of the images are; mean and std are measured where nobody says them."""
        return data.settled(self._format, self.dataset, self.splits["train"], ranks.say)

    @cached_property
    def splits(self) -> dict:
        """Data sets by name: train, and val."""
        has_val = self.needs_val or data.has_val(self.dataset, self.root)
        names = ("train", "val") if has_val else ("train",)
        pixels = (self._format.channels, self._format.bits)
        return {
            name: labelled(self.dataset, self.root, name, self.download, *pixels) for name in names
        }

    @cached_property
    def side(self) -> int:
        """The side of the images: as asked for, else that of the training, else as they are."""
        trained = self.info["args"].get("image_size")
        return self.image_size or trained or data.native_size(self.splits["train"])

    @cached_property
    def origin(self) -> dict:
        """What a checkpoint of a probe says of encoder and images: see `probing.ORIGIN`."""
        train = self.splits["train"]
        return {
            "sha256": self.sha256,
            "classes": train.classes,
            "data_sha256": identity([train]),
        }

    def require_fit(self) -> None:
        """Raise BadInput for what cannot be read, and for images that the encoder does not take."""
        require_side(self.encoder, self.info["arch"], self.side)

    def hold_cached(self, folder: str | None, workers: int) -> None:
        """Replace images by decoded ones that a folder keeps, if any (see `data.hold_cached`)."""
        if folder is not None:
            self.splits = {
                name: data.hold_cached(dataset, folder, workers, ranks.say)
                for name, dataset in self.splits.items()
            }

    def mismatches(self) -> list[str]:
        return mismatches(self.info, dataset=self.dataset, side=self.side)


def format_of(encoder: nn.Module, info: dict, asked: data.Pixels) -> data.Pixels:
    """Channels and bits as an encoder takes them, mean and std as `asked` or its file say.

    info: see `load_backbone`. Raises BadInput where other channels are asked for.
    """
    said = info["args"]
    takes = channels_of(encoder)
    if asked.channels not in (None, takes):
        raise BadInput(
            f"'{info['path']}' takes images of {takes} channels, and --channels is"
            f" {asked.channels}: leave it off"
        )
    found = data.Pixels(takes, asked.bits or said.get("bits") or 8, asked.mean, asked.std)
    if asked.mean is None and len(said.get("mean") or ()) == takes:
        found = replace(found, mean=said["mean"], std=said["std"])
    return found


def labelled(
    name: str,
    root: str | list[str] | None,
    split: str,
    download: bool = False,
    channels: int = 3,
    bits: int = 8,
):
    """A split of a data set, with labels and classes.

    Raises BadInput where it has none, or not of all its images.
    """
    dataset = data.build_dataset(name, root, split, download, channels, bits)
    if dataset.labels is None:
        why = f" ({dataset.layout.unlabelled})" if hasattr(dataset, "layout") else ""
        raise BadInput(
            f"the {split} images in '{' '.join(listed(root)) or name}' have no labels{why}:"
            f" expected a folder a class, as in {split}/dog/1.jpg"
        )
    unknown = int((dataset.labels < 0).sum())
    if unknown:
        raise BadInput(
            f"{unknown} of the {len(dataset)} {split} images in '{' '.join(listed(root)) or name}'"
            " have no label (-1): expected one for every train and val image; leave those without"
            " out of the data set"
        )
    return dataset


def fingerprint(path: str | Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def identity(splits: Iterable) -> str:
    """A sha256 that tells these data sets from others.

    It covers labels and class names. Of files it covers the names below their folder, and the sizes
    of up to LOOKED_AT of them; of other images in memory the pixels.
    """
    digest = hashlib.sha256()
    for dataset in splits:
        digest.update(f"{len(dataset)} {dataset.classes}".encode())
        digest.update(dataset.labels.numpy())
        if isinstance(dataset, ImagesInMemory) and isinstance(dataset.source, str):
            digest.update(dataset.images.contiguous().numpy())
            continue
        digest.update("\0".join(data.names_below(dataset)).encode(errors="surrogateescape"))
        for i in range(0, len(dataset), -(-len(dataset) // LOOKED_AT)):
            digest.update(b"%d " % stat_of(dataset, i)[0])
    return digest.hexdigest()


# ---- warnings ------------------------------------------------------------------------------------


def mismatches(info: dict, *, dataset: str, side: int) -> list[str]:
    """Warnings about a file that was trained on other images, or that its own flags contradict.

    info: see `load_backbone`.
    """
    trained = info["args"]
    found = head_mismatch(info, "the file's own flags say", trained.get("mlp"))
    if trained.get("dataset", dataset) != dataset and not trained.get("mean"):
        found.append(
            f"trained on {trained['dataset']}, judged on {dataset}: images are normalised by"
            f" {dataset}'s statistics"
        )
    if trained.get("image_size", side) != side:
        found.append(f"trained on images of side {trained['image_size']}, judged on side {side}")
    return found


def head_mismatch(info: dict, who: str, mlp: bool | None) -> list[str]:
    """A warning where a file has another head than an MLP (mlp) or a linear layer (not mlp)."""
    if not isinstance(mlp, bool) or not info["head"] or mlp == (info["head"] == "mlp"):
        return []
    wanted = "an MLP head" if mlp else "no MLP head"
    has = "a linear one" if mlp else "an MLP one"
    return [f"{who} {wanted}, but the file has {has}: is it the file you mean?"]
