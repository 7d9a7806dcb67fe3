"""Features of all images, once each, in batches that a later start does not repeat.

A batch is always the same images, whatever the number of ranks and wherever a pass went on, so the
features are the same, bit for bit on a CPU.

Letters: M images, N of a batch, C features of an image.
"""

import contextlib
import fcntl
import json
import shutil
import time
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from moco_isl import data, dist, files
from moco_isl.data.datasets import GONE, ImagesInMemory, stat_of
from moco_isl.data.loaders import refuse
from moco_isl.embed.images import Images
from moco_isl.encoders import evaluating
from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.evaluation.features import finite
from moco_isl.run import checkpoint, ranks
from moco_isl.run.meters import Clock
from moco_isl.run.signals import Stop

SAVE_EVERY = 20.0  # seconds after which rows are saved
LOOKED_AT = 64  # images without files whose pixels tell them from others
_MOST_BYTES = 256 << 20  # of rows that are not saved yet


@dataclass(kw_only=True)
class Reading:
    """How images are read and features taken; normalize: unit rows. view: a `data` transform."""

    view: Callable
    batch_size: int
    workers: int
    device: torch.device
    normalize: bool
    amp: torch.dtype | None


# ---- rows on their way ---------------------------------------------------------------------------


class Rows:
    """Rows that this rank has taken: in memory, or in files of a hidden folder beside the result.

    folder: None for in memory. facts: what must be equal for a pass to go on, by words for it.
    Every rank makes one and calls the same methods. Raises BadInput on all ranks where the folder
    is of another pass or in use.
    """

    def __init__(self, folder: Path | None, facts: dict[str, object]):
        self.folder = folder
        self.tried = torch.zeros(0, dtype=torch.int64)  # positions done before, on all ranks
        self.at: list[torch.Tensor] = []
        self.rows: list[torch.Tensor] = []
        self.stats: list[torch.Tensor] = []  # size and time of the files, [n, 2] each
        self.bad: list[int] = []
        self._saved = time.monotonic()
        self._lock = None
        if folder is not None:
            tried = ranks.on_main(lambda: self._begin(json.loads(json.dumps(facts))))
            self.tried = dist.broadcast_object(tried)

    def _begin(self, facts: dict) -> torch.Tensor:
        """Hold the folder, and find what is done in it. Raises BadInput."""
        path = self.folder / "facts.json"
        where = files.named("", self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "a")
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{where} is in use by another pass that is alive: wait for it, or name another"
                " --out"
            ) from None
        except OSError as error:
            raise BadInput(f"{where} cannot be written: {error.strerror}") from error
        checkpoint.remove_stale(self.folder)
        parts = self._parts()
        found = json.loads(files.read_text(path)) if parts else facts
        for what in facts:
            if found.get(what) != facts[what]:
                held, here = (files.short(str(x.get(what))) for x in (found, facts))
                raise BadInput(
                    f"{where} is of a pass that did not end, with {what} {held}, and here it is"
                    f" {here}: give the command that began it, or remove that folder to begin anew"
                )
        files.write_text(json.dumps(facts, indent=1) + "\n", path)
        return torch.cat([self.tried, *(part[name] for part in parts for name in ("at", "bad"))])

    def _parts(self) -> list[dict[str, torch.Tensor]]:
        """What all ranks have saved: rows [n, C], at [n], stats [n, 2], and bad, positions that had
        no image.
        """
        found = []
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                found.append(load_file(path))
            except (SafetensorError, OSError) as error:
                raise BadInput(
                    f"{files.named('', path)} is damaged ({error}): remove it, and its images are"
                    " read again"
                ) from error
        return found

    def forget(self, images: Images) -> list[int]:
        """Drop what is saved of files that have changed since; returns their positions.

        To be called on rank 0 alone, before any rank saves.
        """
        changed = []
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else []:
            part = load_file(path)
            now = torch.tensor([images.stat(i) for i in part["at"].tolist()]).view(-1, 2)
            same = (now == part["stats"]).all(1)
            if not same.all():
                changed += part["at"][~same].tolist()
                part |= {name: part[name][same] for name in ("at", "rows", "stats")}
                checkpoint.save_safetensors(part, path, {})
        return changed

    def add(
        self, at: torch.Tensor, rows: torch.Tensor, stats: torch.Tensor, bad: list[int]
    ) -> None:
        """Add rows [n, C] of the images at [n]; those in `bad` are left out.

        stats [n, 2]: size and time of their files.
        """
        if bad:
            good = ~torch.isin(at, torch.tensor(bad))
            at, rows, stats = at[good], rows[good], stats[good]
            self.bad += bad
        self.at.append(at)
        self.rows.append(rows)
        self.stats.append(stats)
        held = sum(rows.nbytes for rows in self.rows)
        if time.monotonic() - self._saved > SAVE_EVERY or held > _MOST_BYTES:
            self.save()

    def save(self) -> None:
        """Write what was added since the last time, where there is a folder. Raises RunFailed."""
        if self.folder is None or not self.at:
            return
        part = {
            "at": torch.cat(self.at),
            "rows": torch.cat(self.rows),
            "stats": torch.cat(self.stats),
            "bad": torch.tensor(self.bad, dtype=torch.int64),
        }
        checkpoint.save_safetensors(part, self.folder / f"{uuid.uuid4().hex}.safetensors", {})
        self.at, self.rows, self.stats, self.bad = [], [], [], []
        self._saved = time.monotonic()

    def collect(self, M: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows [n, C] of the images that could be read, which they are: bool [M]) of all ranks.

        On the CPU of rank 0; other ranks may get no rows. device: that ranks exchange tensors on.
        """
        if self.folder is not None:
            self.save()
            ranks.together(lambda: None)  # wait until all ranks have saved
            parts = self._parts() if dist.is_main() else []
        else:
            C = max(dist.gather_objects(self.rows[0].shape[1] if self.rows else 0))
            part = {"at": torch.cat([self.tried, *self.at]), "rows": torch.zeros(0, C)}
            part["rows"] = torch.cat([part["rows"], *self.rows])
            parts = [{k: dist.all_gather_rows(x.to(device)).cpu() for k, x in part.items()}]
        readable = torch.zeros(M, dtype=torch.bool)
        rows = torch.empty(M, max((part["rows"].shape[1] for part in parts), default=0))
        for part in parts:
            readable[part["at"]] = True
            rows[part["at"]] = part["rows"]
        return rows if readable.all() else rows[readable], readable

    def close(self, done: bool) -> None:
        """Release the folder; done: all is written elsewhere, and it is removed."""
        if self._lock is not None:
            if done:
                shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()


# ---- the pass ------------------------------------------------------------------------------------


def take(
    net: nn.Module, images: Images, reading: Reading, rows: Rows, stop: Stop | None, progress
) -> list[int]:
    """Take the features of all images that `rows` does not have; each rank takes its share.

    net: images [N, 3, S, S] -> [N, C], on reading.device. What was taken is saved where the pass is
    stopped. Raises Interrupted on all ranks where one was asked to stop.
    """
    done = torch.zeros(len(images), dtype=torch.bool)
    done[rows.tried] = True
    again = ranks.on_main(lambda: [*rows.forget(images), *_readable_now(images, rows)])
    for i in dist.broadcast_object(again):
        done[i] = False
    progress.begin(int(done.sum()))
    try:
        for start, dataset in images.parts():
            batches = _batches_left(done[start : start + len(dataset)], reading.batch_size)
            mine = batches[slice(*dist.shard(len(batches)))]
            most = -(-len(batches) // dist.world_size())
            _take_some(net, dataset, mine, reading, rows, start, most, stop, progress)
    except (Interrupted, KeyboardInterrupt):
        rows.save()
        raise
    finally:
        progress.close()


def _readable_now(images: Images, rows: Rows) -> list[int]:
    """Images of an earlier start that could not be read then and can now."""
    found = []
    for part in rows._parts() if rows.folder else []:
        for i in part["bad"].tolist():
            dataset, own = images.find(i)
            with contextlib.suppress(Exception):  # PIL answers a broken file with almost any
                dataset.image(own)
                found.append(i)
    return found


def _batches_left(done: torch.Tensor, batch_size: int) -> list[torch.Tensor]:
    """Positions of the batches of a data set of which an image is not done: bool [M]."""
    batches = torch.arange(len(done)).split(batch_size)
    return [batch for batch in batches if not done[batch].all()]


def _take_some(
    net: nn.Module,
    dataset: Dataset,
    batches: list[torch.Tensor],
    reading: Reading,
    rows: Rows,
    start: int,
    most: int,
    stop: Stop | None,
    progress,
) -> None:
    """Take the features of these batches of one data set, whose first image has position `start`.

    most: batches of the rank with the most of them.
    """
    loader = data.eval_loader(
        dataset,
        transform=reading.view,
        batch_size=reading.batch_size,
        workers=min(reading.workers, len(batches)),
        device=reading.device,
        batches=batches,
    )
    device = reading.device.type
    half = torch.autocast(device, dtype=reading.amp) if reading.amp else contextlib.nullcontext()
    known = set()  # unreadable images that were named
    try:
        with evaluating(net):
            for images, index in stop.watch(loader, most) if stop else loader:
                progress.got_data()
                with torch.no_grad(), half:
                    found = net(images)  # [N, C]
                found = F.normalize(found.float(), dim=1) if reading.normalize else found.float()
                index = index.cpu()
                bad = sorted({i for i, _ in loader.bad_images()} & set(index.tolist()))
                for i in bad:
                    if i not in known:
                        progress.name_unreadable(dataset.path(i))
                known.update(bad)
                stats = torch.tensor([stat_of(dataset, i) for i in index.tolist()])  # [n, 2]
                rows.add(index + start, found.cpu(), stats, [i + start for i in bad])
                progress.step(len(index))
    finally:
        loader.close()


def check(images: Images, found: torch.Tensor, readable: torch.Tensor, most: int | None) -> None:
    """Check what `Rows.collect` gave. Raises RunFailed where more than `most` images (None: any
    number, but not all) are unreadable, and where features are not finite.
    """
    refuse(_Named(images), (~readable).nonzero()[:, 0].tolist(), most)
    if not finite(found):
        raise RunFailed(
            "features are not finite: this network overflows on these images; try --amp off or bf16"
        )


class _Named:
    """The images as `refuse` asks for them."""

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def path(self, i: int) -> str:
        dataset, own = self.images.find(i)
        return dataset.path(own)


def digest(images: Images) -> str:
    """Tells these images from others: by their names, and by pixels where they have no files.

    Of pixels that are not in memory, those of LOOKED_AT evenly spread images are looked at. Files
    are told by size and time, each by itself: see `Rows.forget`.
    """
    crc = zlib.crc32("\0".join(images.names()).encode())
    for dataset in images.splits.values():
        M = len(dataset)
        if isinstance(dataset, ImagesInMemory) and isinstance(dataset.source, str):
            crc = zlib.crc32(dataset.images.contiguous().numpy(), crc)
        elif M and stat_of(dataset, 0) == GONE:
            for i in range(0, M, max(1, M // LOOKED_AT)):
                with contextlib.suppress(Exception):  # a broken image is named when it is read
                    crc = zlib.crc32(np.asarray(dataset.image(i)).tobytes(), crc)
    return f"{len(images)} images ({crc:08x})"


def weights_of(net: nn.Module) -> str:
    """Tells the weights of a network from others."""
    crc = 0
    for name, tensor in net.state_dict().items():
        crc = zlib.crc32(name.encode(), crc)
        whole = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        crc = zlib.crc32(whole.numpy(), crc)
    return f"{crc:08x}"


# ---- what is seen of it --------------------------------------------------------------------------


class Progress:
    """How far the pass is: lines, a bar, or nothing ("off"). Only rank 0 shows anything.

    say: prints a line; unreadable images are named by the rank that finds them.
    """

    EVERY = 10.0  # seconds between two lines

    def __init__(self, style: str, M: int, say: Callable[[str], None]):
        self.style = style if dist.is_main() else "off"
        self.M = M
        self.say = say
        self.done = 0
        self.bar = None
        self.clock = Clock()

    def begin(self, done: int) -> None:
        self.done = done
        if done and self.style != "off":
            self.say(f"=> {done:,} of {self.M:,} images were done before")
        if self.style == "bar":
            from tqdm import tqdm

            self.bar = tqdm(total=self.M, initial=done, unit="img", dynamic_ncols=True)
        self.clock = Clock()

    def got_data(self) -> None:
        self.clock.got_data()

    def step(self, n: int) -> None:
        """Count n images, and as many of every other rank."""
        step = min(n * dist.world_size(), self.M - self.done)
        self.done += step
        self.clock.step_done(n)
        if self.bar is not None:
            self.bar.update(step)
        elif self.style == "lines" and time.perf_counter() - self.clock.start > self.EVERY:
            values = self.clock.read()
            left = (self.M - self.done) / max(values["images_per_s"], 1e-9)
            width = len(str(self.M))
            line = [
                f"Images: [{self.done:{width}d}/{self.M}]",
                f"Time {values['time']:6.3f}",
                f"Data {values['data_time']:6.3f}",
                f"{values['images_per_s']:.0f} img/s",
                f"{left:.0f} s left",
            ]
            print("\t".join(line), flush=True)

    def name_unreadable(self, path: str) -> None:
        line = f"=> warning: {files.shown(path)} cannot be read and is left out"
        if self.bar is not None:
            self.bar.clear()
        self.say(line)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
