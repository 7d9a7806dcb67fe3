"""Augmentation of a batch against torchvision: operations by value, the whole in distribution."""

import math
import re
import shutil

import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

from moco_isl.data import augment, build_dataset, get_augmentation
from moco_isl.data.augment import BatchAugmentation, DigitAugmentation
from moco_isl.data.draws import columns, numbers, seeded, starts, uniform, uniforms
from moco_isl.errors import BadInput
from moco_isl.loader import GaussianBlur

IDENTITY = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def pictures(n, side, seed=0):
    """Smooth random colour pictures, uint8 [n, 3, side, side], with some grey, some black."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 5, 5, generator=g)
    x[0] = x[0, :1]
    x[1, :, :2] = 0
    x = torch.nn.functional.interpolate(x, size=(side, side), mode="bicubic")
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def images():
    return pictures(6, 24).float() / 255


# ---------------------------------------------------------------- operations by value


@pytest.mark.parametrize("S", [24, 9, 40])
def test_resized_crop_is_torchvisions(images, S):
    boxes = [[0, 0, 24, 24], [3, 5, 12, 17], [10, 0, 14, 11], [0, 13, 24, 11]]
    boxes = torch.tensor([*boxes, [23, 23, 1, 1], [2, 2, 20, 20]])
    flip = torch.tensor([False, True, False, True, False, True])
    got = augment.resized_crop(images, boxes.float(), flip, S)
    for image, (top, left, h, w), mirrored, mine in zip(images, boxes.tolist(), flip, got):
        want = TF.resized_crop(image, top, left, h, w, [S, S], antialias=True)
        torch.testing.assert_close(mine, TF.hflip(want) if mirrored else want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_operation_is_torchvisions(images, name):
    factors = [-0.5, -0.1, 0, 0.07, 0.5, 0.33] if name == "hue" else [0, 0.6, 1, 1.4, 2, 0.9]
    got = getattr(augment, f"adjust_{name}")(images, torch.tensor(factors))
    for image, factor, mine in zip(images, factors, got):
        want = getattr(TF, f"adjust_{name}")(image, factor)
        torch.testing.assert_close(mine, want, atol=2e-5, rtol=0)


def test_grey_is_torchvisions(images):
    torch.testing.assert_close(augment.grey(images), TF.rgb_to_grayscale(images))


def test_jitter_applies_the_four_in_each_images_own_order(images):
    factors = torch.tensor([0.7, 1.3, 0.6, 0.1]).repeat(6, 1)
    order = torch.tensor(
        [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1], [3, 0, 1, 2], [1, 2, 0, 3]]
    )
    steps = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    by_rows = augment._jitter_by_rows(images, factors, order.tolist(), [False] * 6)
    at_once = torch.stack(augment._jitter_at_once(images.unbind(1), factors, order), 1)
    for image, turn, one, other in zip(images, order.tolist(), by_rows, at_once):
        for step in turn:
            image = steps[step](image, factors[0, step].item())
        torch.testing.assert_close(one, image, atol=5e-5, rtol=0)
        torch.testing.assert_close(other, image, atol=5e-5, rtol=0)


def gaussian_blur(images, sigma):
    """Blur by sigma [N] pixels, with the kernel and the passes of the augmentation."""
    kernel = augment.blur_kernel(sigma)
    return augment.blur_along(augment.blur_along(images, kernel, 3), kernel, 2)


def test_blur_is_torchvisions_inside_and_repeats_the_border(images):
    sigma = torch.tensor([0.0, 0.1, 0.5, 1.0, 1.5, 2.0])
    got = gaussian_blur(images, sigma)
    torch.testing.assert_close(got[0], images[0], atol=1e-6, rtol=0)
    for image, s, mine in zip(images[1:], sigma[1:].tolist(), got[1:]):
        padded = torch.nn.functional.pad(image[None], (6, 6, 6, 6), mode="replicate")[0]
        want = TF.gaussian_blur(padded, 13, s)[:, 6:-6, 6:-6]
        torch.testing.assert_close(mine, want, atol=2e-6, rtol=0)


def test_blur_is_near_pils(images):
    pil = [TF.to_pil_image(image) for image in images]
    got = gaussian_blur(images, torch.full((6,), 1.5))
    for image, mine in zip(pil, got):
        want = TF.to_tensor(image.filter(ImageFilter.GaussianBlur(1.5)))
        assert (mine - want).abs().max() < 0.03  # PIL blurs by three boxes, in 8 bits


# ---------------------------------------------------------------- draws of boxes


@pytest.mark.parametrize("H, W", [(32, 32), (40, 24)])
def test_boxes_are_distributed_as_torchvisions(H, W):
    n = 8000
    mine = augment.crop_boxes(uniforms(0, 0, torch.arange(n), 0, 22), H, W, (0.2, 1.0))
    torch.manual_seed(0)
    image = torch.zeros(3, H, W)
    theirs = torch.tensor(
        [T.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    ).float()
    assert (mine == mine.round()).all() and (mine >= 0).all()
    assert (mine[:, 0] + mine[:, 2] <= H).all() and (mine[:, 1] + mine[:, 3] <= W).all()
    for a, b in (
        (mine, theirs),
        (mine**2, theirs**2),
        (mine[:, :2] * mine[:, 2:], theirs[:, :2] * theirs[:, 2:]),
        (mine[:, 2:3] * mine[:, 3:], theirs[:, 2:3] * theirs[:, 3:]),
    ):
        error = ((a.var(0) + b.var(0)) / n).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize("H, W", [(10, 200), (200, 10)])
def test_box_of_a_shape_that_never_fits_is_central(H, W):
    box = augment.crop_boxes(uniforms(0, 0, torch.arange(5), 0, 22), H, W, (1.0, 1.0))
    want = T.RandomResizedCrop.get_params(torch.zeros(3, H, W), [1.0, 1.0], [3 / 4, 4 / 3])
    assert (box == torch.tensor(want)).all()


# ---------------------------------------------------------------- recipes


def reference_pipeline(aug_plus, size, blur, flip=0.5):
    """MoCo's, written with torchvision."""
    jitter = T.ColorJitter(0.4, 0.4, 0.4, 0.1 if aug_plus else 0.4)
    grey = T.RandomGrayscale(0.2)
    colour = [T.RandomApply([jitter], 0.8), grey] if aug_plus else [grey, jitter]
    blur = [T.RandomApply([GaussianBlur((0.1, 2.0))], 0.5)] if blur else []
    crop = T.RandomResizedCrop(size, (0.2, 1.0))
    return T.Compose([crop, *colour, *blur, T.RandomHorizontalFlip(flip), T.ToTensor()])


def figures(views):
    """Figures of views [n, 3, S, S] -> [n, figures].

    Brightness, contrast, colour, detail, left against right.
    """
    half = views.shape[3] // 2
    detail = (views[..., 1:] - views[..., :-1]).abs().mean((1, 2, 3))
    colour = (views.amax(1) - views.amin(1)).mean((1, 2))
    left = views[..., :half].mean((1, 2, 3)) - views[..., half:].mean((1, 2, 3))
    bright, contrast = views.mean((1, 2, 3)), views.std((1, 2, 3))
    dull = (colour < 0.02).float()
    found = [bright**2, contrast, detail, detail**2, colour, colour**2, dull, left, left**2]
    return torch.stack([*views.mean((2, 3)).T, *found, *views.std((2, 3)).T], 1)


@pytest.mark.parametrize("crop", [None, (0.5, 0.9)])
def test_the_least_crop_may_be_chosen(crop):
    """MoCo's is 0.2 of the area; an objective with crops of its own keeps their largest."""
    usual, most = (0.2, 1.0) if crop is None else crop
    for least, want in [(None, usual), (0.08, 0.08)]:
        how = {"aug_plus": True, "size": 32, "crop": crop, "crop_min": least}
        on_device = get_augmentation("folder", on_device=True, **how)
        one_by_one = get_augmentation("folder", **how)
        assert on_device.scale == (want, most)
        assert one_by_one.steps.transforms[0].scale == (want, most)
        if crop is None:  # the shorter side of the smallest crop still has 32 pixels
            side = one_by_one.smallest * (want * 3 / 4) ** 0.5
            assert side == pytest.approx(32, abs=0.5)
    with pytest.raises(BadInput, match="--crop-min: digits has an augmentation of its own"):
        get_augmentation("digits", aug_plus=True, crop_min=0.1)


@pytest.mark.parametrize("aug_plus, blur", [(True, False), (True, True), (False, False)])
def test_whole_is_distributed_as_torchvisions(aug_plus, blur):
    n, side = 800, 16
    image = pictures(8, side, seed=3)[2:]
    image[..., : side // 2] //= 2  # left and right differ: a flip shows
    which = torch.arange(n) % len(image)
    pil = [TF.to_pil_image(x) for x in image]
    pipeline = reference_pipeline(aug_plus, side, blur)
    theirs = []
    for i in range(n):
        with seeded(0, 0, i, 0):
            theirs.append(pipeline(pil[which[i]]))
    theirs = figures(torch.stack(theirs))
    mine = BatchAugmentation(*IDENTITY, size=side, aug_plus=aug_plus, blur=blur)
    views = torch.cat(mine.views(image[which], 1, 0, torch.arange(n)))
    assert -1e-5 <= views.min() and views.max() <= 1 + 1e-5
    mine = figures(views)
    error = (mine.var(0) / len(mine) + theirs.var(0) / n).sqrt()
    difference = (mine.mean(0) - theirs.mean(0)).abs()
    assert (difference < 5 * error + 0.002).all()  # PIL rounds to 8 bits at every step


def one_view(image, u, aug_plus, size, flip):
    """One image's view with torchvision: image [3, H, W] in [0, 1], its draws u [35]."""
    box = [int(x) for x in augment.crop_boxes(u[None, :22], *image.shape[1:], (0.2, 1.0))[0]]
    image = TF.resized_crop(image, *box, [size, size], antialias=True)
    if u[22] < flip:
        image = TF.hflip(image)
    steps = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    hue = 0.1 if aug_plus else 0.4
    factors = [0.6 + 0.8 * u[27 + i].item() for i in range(3)] + [hue * (2 * u[30].item() - 1)]
    if not aug_plus and u[32] < 0.2:
        image = TF.rgb_to_grayscale(image, 3)
    if not aug_plus or u[31] < 0.8:
        for step in sorted(range(4), key=lambda i: u[23 + i]):
            image = steps[step](image, factors[step])
    if aug_plus and u[32] < 0.2:
        image = TF.rgb_to_grayscale(image, 3)
    if aug_plus and u[33] < 0.5:
        padded = torch.nn.functional.pad(image[None], (6, 6, 6, 6), mode="replicate")[0]
        image = TF.gaussian_blur(padded, 13, 0.1 + 1.9 * u[34].item())[:, 6:-6, 6:-6]
    return image


@pytest.mark.parametrize("aug_plus, flip", [(True, 0.5), (False, 0.5), (True, 0.0)])
def test_whole_is_torchvisions_operation_by_operation(aug_plus, flip):
    image = pictures(150, 16, seed=5)
    augmentation = BatchAugmentation(
        *IDENTITY, size=12, aug_plus=aug_plus, flip=flip, blur=aug_plus
    )
    u = uniforms(0, 0, torch.arange(150), 0, augmentation.draws)
    got = augmentation.apply(image, u)
    want = torch.stack([one_view(x / 255, draws, aug_plus, 12, flip) for x, draws in zip(image, u)])
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


def test_pil_augmentation_is_mocos():
    image = Image.fromarray(pictures(3, 40)[2].permute(1, 2, 0).numpy())
    for aug_plus in (True, False):
        for size in (32, 224):
            mine = get_augmentation("folder", aug_plus=aug_plus, size=size)
            theirs = reference_pipeline(aug_plus, size, blur=aug_plus and size == 224)
            for i in range(4):
                with seeded(0, 0, i, 0):
                    got = mine(image)
                with seeded(0, 0, i, 0):
                    want = TF.normalize(theirs(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
                torch.testing.assert_close(mine.normalize(got[None])[0], want, atol=1e-5, rtol=1e-5)


def test_views_do_not_depend_on_the_batch():
    image = pictures(8, 16)
    for augmentation in (
        BatchAugmentation(*IDENTITY, size=16, aug_plus=True, blur=True),
        DigitAugmentation(*IDENTITY, size=16),
    ):
        index = torch.tensor([3, 0, 7, 2])
        whole = augmentation.views(image[index], 5, 2, index)
        alone = augmentation.views(image[index[1:2]], 5, 2, index[1:2])
        for a, b in zip(whole, alone):
            torch.testing.assert_close(a[1:2], b, atol=1e-6, rtol=0)
        assert (whole[0] - whole[1]).abs().max() > 0.05  # the two views differ
        other = augmentation.views(image[index], 5, 3, index)
        assert (whole[0] - other[0]).abs().max() > 0.05  # so do two epochs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(dtype):
    image, index = pictures(8, 16), torch.arange(8)
    for make in (
        lambda **k: BatchAugmentation(*IDENTITY, size=16, aug_plus=True, **k),
        lambda **k: DigitAugmentation(*IDENTITY, size=16, **k),
    ):
        exact = make().views(image, 0, 0, index)[0]
        half = make(dtype=dtype).views(image, 0, 0, index)[0]
        assert half.dtype == dtype
        assert (exact - half.float()).abs().mean() < (0.003 if dtype == torch.float16 else 0.02)


@pytest.mark.parametrize("name", ["batch", "digits"])
def test_compiles_to_one_graph(name):
    augmentation = BatchAugmentation(*IDENTITY, size=16, aug_plus=True, blur=True)
    if name == "digits":
        augmentation = DigitAugmentation(*IDENTITY, size=16)
    image = pictures(4, 16)
    u = uniforms(0, 0, torch.arange(4), 0, augmentation.draws)
    compiled = torch.compile(augmentation.apply, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image, u), augmentation.apply(image, u), atol=1e-6, rtol=0)


@pytest.mark.long
def test_colour_compiles_to_three_passes():
    """Each pass is a launch on a GPU; the compiler joins the loops of its CPU code alike."""
    augmentation = BatchAugmentation(*IDENTITY, size=16, aug_plus=True, blur=True)
    crops = pictures(4, 16)
    u = uniforms(0, 0, torch.arange(4), 0, augmentation.draws)
    factors, order, _, to_grey, _, _ = augmentation.plan(u)
    found, passes = compiled_on_cpu(augmentation.colour, crops, factors, order, to_grey)
    assert passes <= 3
    plain = augmentation.colour(crops, factors, order, to_grey)
    torch.testing.assert_close(found, plain, atol=2e-6, rtol=0)


@pytest.mark.long
def test_compiled_draws_are_the_same_bits():
    """So are those of the host: workers crop by some of the draws, the device uses the others."""
    augmentation = BatchAugmentation(*IDENTITY, size=16, aug_plus=True, blur=True)
    index = torch.tensor([0, 1, 2, 1_281_166, 2**40])
    n = augmentation.draws
    keys = [(0, 0, 0), (5, 3, 1), (2**62, 199, 1)]  # seed, epoch, view
    start = torch.cat([starts(seed, epoch, index, view) for seed, epoch, view in keys])
    found, passes = compiled_on_cpu(numbers, start, columns(n, start.device))
    assert passes == 1
    plain = torch.cat([uniforms(seed, epoch, index, view, n) for seed, epoch, view in keys])
    assert torch.equal(found, plain)
    hosts = [uniform(seed, epoch, i, view) for seed, epoch, view in keys for i in index.tolist()]
    assert found.tolist() == [[draw(j) for j in range(n)] for draw in hosts]


def test_a_compiled_plan_decides_as_the_plain_one():
    """What is decided, and the order, are equal; factors and kernels are within rounding."""
    augmentation = BatchAugmentation(*IDENTITY, size=16, aug_plus=True, blur=True)
    u = uniforms(0, 0, torch.arange(500), 0, augmentation.draws)
    found, _ = compiled_on_cpu(augmentation.plan, u)
    wanted = augmentation.plan(u)
    for at in (1, 2, 3, 5):
        assert torch.equal(found[at], wanted[at])
    torch.testing.assert_close(found[0], wanted[0], atol=2e-7, rtol=0)
    torch.testing.assert_close(found[4], wanted[4], atol=1e-6, rtol=0)


def compiled_on_cpu(fn, *args):
    """(what fn, compiled anew, returns; the number of loops over images in its C++ code)."""
    torch._dynamo.reset()
    try:
        with inductor.patch(force_disable_caches=True):  # a cached graph has no code
            found, code = run_and_get_code(torch.compile(fn, dynamic=False, fullgraph=True), *args)
    except Exception as error:
        if shutil.which("g++") or shutil.which("clang++"):
            raise
        pytest.skip(f"needs a C++ compiler: {type(error).__name__}")
    loops = re.findall(r"for\s*\(\s*(?:int64_t|long) x0=", "".join(code))
    assert loops, "the compiler writes its loops in another way"
    return found, len(loops)


def test_digit_without_turn_zoom_and_noise_is_the_digit():
    digits = build_dataset("digits", split="val").images[:5]
    options = {"turn": 0, "zoom": (1, 1), "move": 0, "contrast": 0, "brightness": 0, "noise": 0}
    still = DigitAugmentation(*IDENTITY, size=16, **options)
    found = still.views(digits, 0, 0, torch.arange(5))[0]
    torch.testing.assert_close(found, digits / 255, atol=1e-5, rtol=0)


def test_digit_turn_zoom_and_move_are_torchvisions_affine():
    digits = build_dataset("digits", split="val").images[:4]
    digits = torch.nn.functional.pad(digits, (4, 4, 4, 4))
    u = torch.full((4, 6 + 24 * 24), 0.5)
    u[:, 0] = torch.tensor([0.0, 1.0, 0.5, 0.8])  # degrees: -20, 20, 0, 12
    u[:, 1] = torch.tensor([0.0, 0.5, 1.0, 0.25])  # zoom: 0.8, 1, 1.2, 0.9
    options = {"turn": 20, "zoom": (0.8, 1.2), "move": 0.1, "noise": 0}
    augmentation = DigitAugmentation(*IDENTITY, size=24, **options)
    got = augmentation.apply(digits, u)
    for image, mine, degrees, zoom in zip(digits, got, (-20, 20, 0, 12), (0.8, 1.0, 1.2, 0.9)):
        mode = TF.InterpolationMode.BILINEAR
        want = TF.affine(image / 255, -degrees, [0, 0], zoom, [0.0], interpolation=mode)
        torch.testing.assert_close(mine, want, atol=1e-4, rtol=0)
    u[:, :2] = torch.tensor([0.5, 0.5])
    u[:, 2] = 0.5 + 1 / 24 / 0.2  # one pixel along x
    u[:, 3] = 0.5 - 2 / 24 / 0.2  # two back along y
    moved = augmentation.apply(digits, u)
    torch.testing.assert_close(moved[:, :, 2:, :-1], digits[:, :, :-2, 1:] / 255, atol=1e-4, rtol=0)


def test_digit_noise_has_the_deviation_asked_for():
    blank = torch.zeros(64, 3, 16, 16, dtype=torch.uint8)
    noisy = DigitAugmentation(*IDENTITY, size=16, brightness=0, noise=0.1).views(
        blank, 0, 0, torch.arange(64)
    )[0]
    assert abs(noisy[:, 0].std().item() - 0.1) < 5 * 0.1 / math.sqrt(2 * 64 * 256)
    assert torch.equal(noisy[:, 0], noisy[:, 2])
