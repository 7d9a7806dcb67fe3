"""The fast path: equal to the plain one, piece by piece, and the same for any number of workers and ranks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from moco_isl.data import augment, build_dataset, get_augmentation, hold_small, train_loader
from moco_isl.data.augment import BatchAugmentation
from moco_isl.data.datasets import ImagesInMemory, decode, decode_pixels
from moco_isl.data.draws import uniform, uniforms

# ---------------------------------------------------------------- photos: workers crop, the device does the rest


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine JPEGs of several sizes, and beside them a grey one, a PNG and a broken one."""
    root = tmp_path_factory.mktemp("photos") / "train"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate([(60, 40), (40, 60), (50, 50), (200, 150), (150, 200), (30, 90), (64, 48), (33, 35), (128, 128)]):
        x = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        x.save(root / f"{i}.jpg", quality=95)
    x.convert("L").save(root / "grey.jpg")
    x.save(root / "picture.png")
    (root / "zbroken.jpg").write_bytes((root / "0.jpg").read_bytes()[:300])
    return root.parent


def photo_loader(root, workers=0, size=16, **options):
    augmentation = get_augmentation("folder", aug_plus=True, size=size, on_device=True)
    return train_loader(build_dataset("folder", root), augmentation=augmentation, batch_size=4, seed=3, workers=workers, max_bad_images=1, **options)


def batches(loader, epoch, start=0):
    return [(*views, index) for views, index in loader.epoch(epoch, start)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other))


def test_draws_on_the_host_are_those_on_the_device():
    u = uniforms(5, 3, torch.arange(50), 1, 35)
    for i in range(50):
        draw = uniform(5, 3, i, 1)
        assert [draw(j) for j in range(35)] == u[i].tolist()


@pytest.mark.parametrize(("H", "W"), [(224, 224), (375, 500), (33, 300), (300, 20)])
def test_a_box_on_the_host_is_that_on_the_device(H, W):
    u = uniforms(1, 0, torch.arange(500), 0, 22)
    boxes = augment.crop_boxes(u, H, W, (0.2, 1.0))
    mine = torch.tensor([augment.crop_box(uniform(1, 0, i, 0), H, W, (0.2, 1.0)) for i in range(500)])
    assert (boxes != mine).any(1).sum() <= 1  # float32 and float64 may round one apart


def test_decoding_to_pixels_is_pils(photos):
    for path in sorted((photos / "train").iterdir()):
        if path.stem == "zbroken":
            with pytest.raises((OSError, RuntimeError)):
                decode_pixels(str(path), lambda W, H: min(W, H))
            continue
        pixels, full = decode_pixels(str(path), lambda W, H: min(W, H))
        want = np.asarray(decode(str(path)))
        assert full == want.shape[:2] and np.array_equal(pixels.permute(1, 2, 0).numpy(), want)
    small, full = decode_pixels(str(photos / "train" / "3.jpg"), lambda W, H: 70)
    assert full == (150, 200) and small.shape[1:] == (75, 100)


def test_crops_of_photos_are_those_of_images_in_memory(photos):
    """Within rounding to 8 bits, once a direction; near where a photo is decoded smaller."""
    loader = photo_loader(photos, size=12)
    dataset, augmentation = loader.reader.dataset, loader.augmentation
    reduced = 0
    for i in range(len(dataset) - 1):  # the last one is broken
        image = torch.from_numpy(np.array(dataset.image(i))).permute(2, 0, 1)
        u = uniforms(3, 1, torch.tensor([i]), 0, augmentation.draws), uniforms(3, 1, torch.tensor([i]), 1, augmentation.draws)
        want = [augmentation.crop(image[None], draws)[0] * 255 for draws in u]
        smallest = min(side for draws in u for side in augment.crop_boxes(draws[:, :22], *image.shape[1:], (0.2, 1.0))[0, 2:].tolist())
        scaled = dataset.path(i).endswith(".jpg") and smallest >= 36
        reduced += scaled
        for mine, theirs in zip(loader._loader.dataset[1, i][:2], want):
            off = (mine - theirs).abs()
            assert off.max() <= 1.01 if not scaled else off.mean() < 12, dataset.path(i)  # of 255; 12 pixels of noise
    assert 2 <= reduced <= 5


def test_finished_crops_are_the_views(photos):
    loader = photo_loader(photos)
    for (im_q, im_k), index in loader.epoch(1):
        crops = [loader._loader.dataset[1, i] for i in index.tolist()]
        for view, mine in enumerate((im_q, im_k)):
            u = uniforms(3, 1, index, view, loader.augmentation.draws)
            assert torch.equal(mine, loader.augmentation.finish(torch.stack([crop[view] for crop in crops]), u))


def test_photos_are_the_same_for_any_workers_and_starts(photos):
    plain, several = photo_loader(photos), photo_loader(photos, workers=2)
    try:
        whole = batches(plain, 1)
        assert [len(b[2]) for b in whole] == [4, 4, 4] and whole[0][0].shape == (4, 3, 16, 16)
        assert same(batches(several, 1), whole)
        assert same(batches(several, 1, start=2), whole[2:]) and not same(batches(plain, 0), whole)
        assert [path.endswith("zbroken.jpg") for _, path in several.bad_images()] == [True]
    finally:
        several.close()
    assert len(batches(photo_loader(photos, views=1), 0)[0]) == 2


def test_small_images_of_one_size_are_held_others_stay(photos, tmp_path):
    for i in range(3):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / f"{i}.png")
    held = hold_small(build_dataset("folder", tmp_path))
    assert isinstance(held, ImagesInMemory) and held.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    dataset = build_dataset("folder", photos)
    assert hold_small(dataset) is dataset


# ---------------------------------------------------------------- augmentation


@pytest.mark.parametrize("aug_plus", [True, False])
def test_augmentation_at_once_equals_it_by_rows(aug_plus, monkeypatch):
    """What a GPU runs, all images through all operations, against what a CPU runs, each image through its own."""
    augmentation = BatchAugmentation((0.4, 0.5, 0.6), (0.2, 0.3, 0.1), size=14, aug_plus=aug_plus, blur=True)
    crops = torch.randint(0, 256, (40, 3, 14, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    u = uniforms(0, 0, torch.arange(40), 0, augmentation.draws)
    with monkeypatch.context() as context:
        context.setattr(augment, "_looks_are_free", lambda images: False)
        at_once = augmentation.finish(crops, u)
    torch.testing.assert_close(augmentation.finish(crops, u), at_once, atol=2e-5, rtol=0)
    alone = torch.cat([augmentation.finish(crops[i : i + 1], u[i : i + 1]) for i in range(40)])
    torch.testing.assert_close(augmentation.finish(crops, u), alone, atol=1e-6, rtol=0)
