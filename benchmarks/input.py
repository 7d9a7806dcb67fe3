"""From photos in JPEG files to two views: images a second and core.

The published PIL pipeline and others take turns in one process.

    python -m benchmarks.input [--photos DIR]     DIR: any folder of JPEGs; default: imagenette_mini
                                                  in MOCO_ISL_DATA, else drawn pictures

One thread, no workers, and CPU time of everything: images/s are those of a core. "worker's part" is
what is left on the CPU where a GPU finishes the views. Photos of 224 px as they are, and the same
enlarged to about 500 px.
"""

import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from benchmarks import common
from benchmarks.published import MEAN, STD, published_pipeline
from moco_isl import data
from moco_isl.data.draws import uniforms
from moco_isl.training.fast import compile_augmentation

CPU = torch.device("cpu")
BATCH = 32


def find_photos(given: str | None, folder: Path, n: int) -> list[Path]:
    """n JPEGs: of the folder given, of MOCO_ISL_DATA, or drawn with the spectrum of photos."""
    root = Path(given) if given else Path(os.environ.get("MOCO_ISL_DATA", "/nonexistent"))
    packed = root / "imagenette_mini.tar.gz"
    if packed.is_file():
        with tarfile.open(packed) as tar:
            tar.extractall(folder / "unpacked", filter="data")
        root = folder / "unpacked"
    if (root / "imagenette_mini").is_dir():
        root = root / "imagenette_mini"
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if found:
        return [found[i * len(found) // n] for i in range(min(n, len(found)))]
    rng = np.random.default_rng(0)
    frequency = np.fft.fftfreq(224)
    falling = 1 / np.maximum(np.hypot(frequency[:, None], frequency[None]), 1 / 224)
    noise = lambda: np.fft.ifft2(np.fft.fft2(rng.standard_normal((224, 224))) * falling).real
    for i in range(n):
        x = np.stack([noise() for _ in range(3)], 2)
        pixels = (128 + 50 * (x - x.mean()) / x.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.jpg", quality=85)
    return sorted(folder.glob("*.jpg"))


def enlarged(photos: list[Path], folder: Path) -> list[Path]:
    """The same photos with 500 x 375 pixels, upright or not."""
    folder.mkdir()
    for i, path in enumerate(photos):
        size = (500, 375) if i % 2 else (375, 500)
        image = Image.open(path).convert("RGB").resize(size, Image.BICUBIC)
        image.save(folder / f"{i:03}.jpg", quality=90)
    return sorted(folder.glob("*.jpg"))


def candidates(photos: list[Path], note: Callable[[str], None], compiles: bool) -> dict:
    """Name -> a call that makes two views of every photo.

    compiles: with the compiled form, whose first call takes a minute.
    """
    pil = published_pipeline()

    def by_files(read, transform) -> None:
        """Read photos as a DataLoader without workers does: two views an image, then batches."""
        for start in range(0, len(photos), BATCH):
            views = []
            for path in photos[start : start + BATCH]:
                image = read(path)
                views.append((transform(image), transform(image)))
            torch.utils.data.default_collate(views)

    def read_pil(path: Path) -> Image.Image:
        with Image.open(path) as image:
            return image.convert("RGB")

    tensors = v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=(0.2, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def read_tensor(path: Path) -> torch.Tensor:
        return torchvision.io.decode_jpeg(
            torchvision.io.read_file(str(path)), torchvision.io.ImageReadMode.RGB
        )

    plain, fast, compiled = (_loader(photos, on_device) for on_device in (False, True, True))
    compile_augmentation(compiled.augmentation, 2, CPU)

    def run(loader) -> None:
        for _ in loader.epoch(0):
            pass

    calls = {
        "published: PIL": lambda: by_files(read_pil, pil),
        "torchvision v2 on tensors": lambda: by_files(read_tensor, tensors),
        "ours, plain: PIL": lambda: run(plain),
        "ours, fast, all on the CPU": lambda: run(fast),
        "ours, fast, worker's part": lambda: [
            torch.utils.data.default_collate(crops) for crops in _crops(fast, len(photos))
        ],
    }
    if compiles:
        try:
            run(compiled)
            calls["ours, fast, all on the CPU, compiled"] = lambda: run(compiled)
        except Exception as error:  # there may be no C++ compiler, or one that cannot do it
            note(f"the compiled form is left out: {type(error).__name__}")
    if (kornia := _kornia(fast, len(photos))) is not None:
        calls["ours to the crop, then kornia, on the CPU"] = kornia
    return calls


def _loader(photos: list[Path], on_device: bool):
    dataset = data.ImageFiles([str(path) for path in photos], None, None)
    augmentation = data.get_augmentation("folder", aug_plus=True, size=224, on_device=on_device)
    return data.train_loader(
        dataset, augmentation=augmentation, batch_size=min(BATCH, len(photos)), seed=0
    )


def _crops(loader, n: int):
    """Batches of what a worker makes of photos."""
    return (
        [loader._loader.dataset[0, i] for i in range(start, min(start + BATCH, n))]
        for start in range(0, n, BATCH)
    )


def _kornia(loader, n: int):
    try:
        import kornia.augmentation as K
    except ImportError:
        return None
    rest = K.AugmentationSequential(
        K.ColorJiggle(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.5),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )

    def run() -> None:
        for crops in _crops(loader, n):
            for view in torch.utils.data.default_collate(crops)[:2]:
                rest(view / 255)

    return run


def on_gpu(result: common.Result, photos: list[Path], device: torch.device, repeats: int) -> None:
    """What the device has to do for 256 photos, and decoding on it, where torchvision can."""
    augmentation = data.get_augmentation("folder", aug_plus=True, size=224, on_device=True)
    crops = torch.randint(0, 256, (512, 3, 224, 224), dtype=torch.uint8, device=device)
    u = uniforms(0, 0, torch.arange(512, device=device), 0, augmentation.draws)
    finish = lambda: augmentation.finish(crops, u)
    timing = common.timed(finish, device, repeats, inner=5)
    result.add(timing.row("finish 2 x 256 views on the device"))
    compile_augmentation(augmentation, 512, device)
    timing = common.timed(finish, device, repeats, warmup=3, inner=20)
    result.add(timing.row("the same, compiled"))
    files = [torchvision.io.read_file(str(path)) for path in photos]
    try:
        torchvision.io.decode_jpeg(files[:2], device=device)
    except (RuntimeError, TypeError) as error:
        result.note(f"no decoding on the device: {str(error).splitlines()[0]}")
        return
    decode = lambda: torchvision.io.decode_jpeg(files, device=device)
    row = common.timed(decode, device, repeats).row(f"decode {len(files)} photos on the device")
    result.add(row | {"images_per_s": len(files) / row["value"] * 1e3})


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--photos", metavar="DIR")
    parser.add_argument(
        "--images", type=int, default=64, metavar="n", help="photos of each size (64)"
    )
    args = parser.parse_args(argv)
    common.begin(args)
    torch.set_num_threads(1)
    n = 2 if args.quick else args.images
    on_host = args.device.type == "cuda"  # a CPU beside a GPU has a file of its own
    result = common.Result(
        "input-host" if on_host else "input",
        "JPEG photos to two views of 224 px, CPU time an image, one core",
        CPU,
    )
    with tempfile.TemporaryDirectory() as folder:
        small = find_photos(args.photos, Path(folder), n)
        for size, photos in (("224 px", small), ("500 px", enlarged(small, Path(folder) / "500"))):
            # beside a GPU nobody finishes views on the CPU
            calls = candidates(photos, result.note, not args.quick and not on_host)
            for name, timing in common.in_turns(calls, CPU, args.repeats, cpu_time=True).items():
                timing = common.Timing([seconds / len(photos) for seconds in timing.seconds])
                row = timing.row(f"{size}, {name}", images_per_s=1 / timing.median)
                published = f"{size}, published: PIL"
                if name.startswith("ours, fast"):
                    row["bar"] = result[published]["value"] / 3
                result.add(row, of=None if row["what"] == published else published)
        what = "drawn pictures" if small[0].parent == Path(folder) else "photos"
        result.note(
            f"{len(small)} {what} of each size; all calls in turns in one process, one thread; bar:"
            " a third of the published time"
        )
        common.end(args, result)
        if on_host:
            result = common.Result("input", "Views finished on the device", args.device)
            try:
                on_gpu(result, small, args.device, args.repeats)
            finally:  # what was measured before an error is not lost
                common.end(args, result)


if __name__ == "__main__":
    main()
