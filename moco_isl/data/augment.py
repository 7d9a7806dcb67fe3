"""Augmentation of a whole batch on its device, every image by its own draws.

Letters: N images of a batch, c channels, H x W pixels, S side of a view. Images are floats in
[0, 1], [N, c, H, W]; a factor is [N]. Where c is not 3 there is no hue, saturation or grey. Each
operation equals torchvision's in value, a whole view equals torchvision's in distribution. On a GPU
the host looks at no value: nothing waits for the device, and torch.compile makes one graph.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from moco_isl.data.bands import GREY
from moco_isl.data.draws import columns, numbers, starts

_CACHE = 1 << 18  # floats that stay in a CPU's cache, one MiB
Channels = tuple[float, ...]  # one number a channel


def _spread(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x [N] with as many dimensions as `like` [N, ...], so that both broadcast."""
    return x.view(-1, *[1] * (like.dim() - 1))


def between(u: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """u in [0, 1) moved to [low, high)."""
    return low + (high - low) * u


# ---------------------------------------------------------------- geometry


def crop_boxes(
    u: torch.Tensor, H: int, W: int, scale: tuple[float, float], tries: int = 10
) -> torch.Tensor:
    """RandomResizedCrop's boxes: u [N, 2 tries + 2] -> [N, 4], whole (top, left, height, width).

    The first of `tries` shapes that fits; if none does, the central one of the nearest allowed
    ratio.
    """
    area = H * W * between(u[:, :tries], *scale)  # [N, tries]
    ratio = torch.exp(between(u[:, tries : 2 * tries], math.log(3 / 4), math.log(4 / 3)))
    w = torch.sqrt(area * ratio).round()
    h = torch.sqrt(area / ratio).round()
    fits = (w > 0) & (w <= W) & (h > 0) & (h <= H)
    first = fits.int().argmax(1, keepdim=True)
    w, h, found = (x.gather(1, first)[:, 0] for x in (w, h, fits))
    last_h, last_w = _central_shape(H, W)
    w = torch.where(found, w, float(last_w))
    h = torch.where(found, h, float(last_h))
    top = torch.where(found, (u[:, 2 * tries] * (H - h + 1)).floor(), (H - last_h) // 2)
    left = torch.where(found, (u[:, 2 * tries + 1] * (W - w + 1)).floor(), (W - last_w) // 2)
    return torch.stack([top, left, h, w], 1)


def crop_box(
    draw: Callable[[int], float], H: int, W: int, scale: tuple[float, float], tries: int = 10
) -> tuple[int, int, int, int]:
    """One box of `crop_boxes`, computed on the host: draw(j) is what column j of u holds.

    Rounding may differ by a pixel.
    """
    for i in range(tries):
        area = H * W * (scale[0] + (scale[1] - scale[0]) * draw(i))
        ratio = math.exp(math.log(3 / 4) + math.log(16 / 9) * draw(tries + i))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= W and 0 < h <= H:
            return int(draw(2 * tries) * (H - h + 1)), int(draw(2 * tries + 1) * (W - w + 1)), h, w
    h, w = _central_shape(H, W)
    return (H - h) // 2, (W - w) // 2, h, w


def _central_shape(H: int, W: int) -> tuple[int, int]:
    """(height, width) of the largest box whose ratio is allowed, 3/4 to 4/3."""
    w = min(W, round(H * 4 / 3)) if W / H > 4 / 3 else W
    h = min(H, round(W * 4 / 3)) if W / H < 3 / 4 else H
    return h, w


def _resize_weights(start: torch.Tensor, length: torch.Tensor, full: int, S: int) -> torch.Tensor:
    """Bilinear, antialiased resize of pixels [start, start + length) to S: matrices [N, S, full].

    An output pixel weighs input pixels by a triangle, which falls to 0 at a distance of one step
    between output pixels, or of one input pixel if that is more, as PIL and torchvision do.
    """
    step = (length / S)[:, None, None]
    place = torch.arange(S, device=start.device)[:, None] + 0.5
    centre = start[:, None, None] + place * step  # [N, S, 1]
    pixel = torch.arange(full, device=start.device)  # [full]
    weight = (1 - (pixel + 0.5 - centre).abs() / step.clamp(min=1)).clamp(min=0)
    inside = (pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weight = weight * inside
    return weight / weight.sum(2, keepdim=True)


def resized_crop(
    images: torch.Tensor, boxes: torch.Tensor, flip: torch.Tensor, S: int
) -> torch.Tensor:
    """Cut out boxes [N, 4], resize to S x S, and mirror where flip [N] is true.

    Takes two matrix products an image.
    """
    top, left, h, w = boxes.unbind(1)
    rows = _resize_weights(top, h, images.shape[2], S)  # [N, S, H]
    columns = _resize_weights(left, w, images.shape[3], S)  # [N, S, W]
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    rows, columns = (x.to(images.dtype)[:, None] for x in (rows, columns))
    return rows @ images @ columns.transpose(2, 3)


def blur_kernel(sigma: torch.Tensor, reach: int = 6) -> torch.Tensor:
    """Weights [N, 2 reach + 1] of a Gaussian of sigma [N] pixels, at most 2; 0 does not blur."""
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None].clamp(min=1e-3)) ** 2)
    return kernel / kernel.sum(1, keepdim=True)


def repeat_border(images: torch.Tensor, reach: int, dim: int) -> torch.Tensor:
    """images with `reach` copies of the outermost pixels added at both ends of dim 2 or 3."""
    first = images.narrow(dim, 0, 1)
    last = images.narrow(dim, images.shape[dim] - 1, 1)
    size = [reach if d == dim else -1 for d in range(4)]
    return torch.cat([first.expand(size), images, last.expand(size)], dim)


def weighted_shifts(padded: torch.Tensor, kernel: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum of shifted copies along dim 2 or 3, weighted by the image's row of kernel [N, taps].

    The result is taps - 1 pixels shorter.
    """
    taps = kernel.shape[1]
    weights = kernel.to(padded.dtype)
    length = padded.shape[dim] - taps + 1
    total = padded.narrow(dim, 0, length) * _spread(weights[:, 0], padded)
    for i in range(1, taps):
        total = total.addcmul_(padded.narrow(dim, i, length), _spread(weights[:, i], padded))
    return total


def blur_along(images: torch.Tensor, kernel: torch.Tensor, dim: int) -> torch.Tensor:
    """Blur along dim 2 or 3 by a kernel of `blur_kernel`; borders are repeated."""
    return weighted_shifts(repeat_border(images, kernel.shape[1] // 2, dim), kernel, dim)


# ---------------------------------------------------------------- colour


Planes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # red, green, blue, [N, H, W] each


def _grey_of(planes: Planes) -> torch.Tensor:
    """[N, H, W] from three planes of that shape."""
    r, g, b = planes
    return GREY[0] * r + GREY[1] * g + GREY[2] * b


def grey(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] -> [N, 1, H, W]."""
    return _grey_of(images.unbind(1))[:, None]


def blend(images: torch.Tensor, other: torch.Tensor | float, factor: torch.Tensor) -> torch.Tensor:
    """The images [N, ...] where factor [N] is 1, the other where it is 0; clamped to [0, 1]."""
    factor = _spread(factor, images).to(images.dtype)
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend(images, 0.0, factor)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Of RGB about the mean of the grey image; of other channels each about its own mean."""
    if images.shape[1] == 3:
        return blend(images, grey(images).mean((1, 2, 3), keepdim=True), factor)
    return blend(images, images.mean((2, 3), keepdim=True), factor)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend(images, grey(images), factor)


def adjust_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turn the hue by shift [N], in turns."""
    r, g, b = images.unbind(1)
    return torch.stack(_turn_hue((r, g, b), images.amax(1), images.amin(1), shift), 1)


def _turn_hue(planes: Planes, top: torch.Tensor, low: torch.Tensor, shift: torch.Tensor) -> Planes:
    """Convert images to HSV, turn the hue, and convert them back.

    top, low [N, H, W]: the largest and smallest of the planes.

    A pixel of hue h (0 to 6) has in red, green and blue the values
    top - (top - low) clamp(min(k, 4 - k), 0, 1) with k = h + 5, h + 3 and h + 1, modulo 6. The
    remainder is taken in turns by floor, which vectorises.
    """
    r, g, b = planes
    chroma = top - low
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    hue = torch.where(top == r, (g - b) / safe, hue)
    hue = hue / 6 + shift.to(r.dtype)[:, None, None]
    turned = []
    for phase in (5, 3, 1):
        k = hue + phase / 6
        k = 6 * (k - k.floor())
        turned.append(top - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return tuple(turned)


ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def _jitter_step(
    planes: Planes, step: torch.Tensor, factors: torch.Tensor, mean: torch.Tensor
) -> Planes:
    """Apply one operation of ADJUST to each image: that of number step [N].

    The first three are one blend: with black, with `mean` [N, 1, 1], the mean grey that contrast
    needs, or with the grey image.
    """
    r, g, b = planes
    chosen = factors.gather(1, step[:, None])[:, 0]
    other = torch.where(_spread(step == 2, r), _grey_of(planes), mean)
    other = torch.where(_spread(step == 0, r), 0, other)
    top = torch.maximum(torch.maximum(r, g), b)
    low = torch.minimum(torch.minimum(r, g), b)
    turned = _turn_hue(planes, top, low, torch.where(step == 3, chosen, 0))
    is_hue = _spread(step == 3, r)
    return tuple(torch.where(is_hue, t, blend(x, other, chosen)) for t, x in zip(turned, planes))


def _jitter_at_once(planes: Planes, factors: torch.Tensor, order: torch.Tensor) -> Planes:
    """The colour jitter of a batch whose values the host does not look at.

    factors [N, 4]: brightness, contrast, saturation (1 changes nothing), hue (0 changes nothing).
    order [N, 4]: the operations in their turns.

    Each pixel depends on itself alone, but for the mean grey that contrast needs. That is found
    first, by the operations before contrast. Compiled, these are two passes over the images, one
    that reads and one that writes. The channels stay apart throughout: joined after every turn,
    each turn would be a launch of its own.
    """
    due = (order == 1).int().argmax(1)  # [N], the turn of contrast
    before = planes
    none = torch.zeros_like(planes[0][:, :1, :1])
    for turn in range(3):
        stepped = _jitter_step(before, order[:, turn], factors, none)
        is_before = _spread(turn < due, planes[0])
        before = tuple(torch.where(is_before, x, y) for x, y in zip(stepped, before))
    mean = _grey_of(before).mean((1, 2), keepdim=True)
    for turn in range(4):
        planes = _jitter_step(planes, order[:, turn], factors, mean)
    return planes


def _light_at_once(
    images: torch.Tensor, factors: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """As `_jitter_at_once` for images [N, c, H, W] of other channels: brightness and contrast."""
    turns = order.argsort(1)  # [N, 4], the turn of each operation
    is_first = _spread(turns[:, 0] < turns[:, 1], images)  # brightness, before contrast
    images = torch.where(is_first, adjust_brightness(images, factors[:, 0]), images)
    images = adjust_contrast(images, factors[:, 1])
    return torch.where(is_first, images, adjust_brightness(images, factors[:, 0]))


def _jitter_by_rows(
    images, factors, order: list[list[int]], idle: list[bool], adjust=ADJUST
) -> torch.Tensor:
    """As `_jitter_at_once`, but each operation runs on those images alone that it changes.

    It is for devices where the host reads values at no cost. idle: whether an image stays as it is.
    """
    for turn in zip(*order):
        for step, operation in enumerate(adjust):
            rows = [i for i, due in enumerate(turn) if due == step and not idle[i]]
            if rows:
                images = _on_rows(images, rows, operation, factors[:, step])
    return images


def _which(flags: list[bool]) -> list[int]:
    return [i for i, flag in enumerate(flags) if flag]


def _on_rows(
    images: torch.Tensor, rows: list[int], operation, *factors: torch.Tensor
) -> torch.Tensor:
    """images with operation(images, *factors) done on the rows given."""
    if not rows:
        return images
    if len(rows) == len(images):
        return operation(images, *factors)
    changed = operation(images[rows], *(factor[rows] for factor in factors))
    return images.index_copy(0, torch.tensor(rows), changed)


def _looks_are_free(images: torch.Tensor) -> bool:
    return images.device.type == "cpu" and not torch.compiler.is_compiling()


# ---------------------------------------------------------------- recipes


class BatchViews:
    """Views of a batch from counted draws.

    A subclass says how many draws a view takes, and what it makes of them.
    """

    draws: int

    def __init__(self, mean: Channels, std: Channels, size: int, dtype=torch.float32):
        self.mean = mean
        self.std = std
        self.size = size
        self.dtype = dtype
        self.numbers = numbers  # a compiler may stand in for it

    def views(
        self, images: torch.Tensor, seed: int, epoch: int, index: torch.Tensor, views: int = 2
    ) -> tuple[torch.Tensor, ...]:
        """images [N, c, H, W], index int64 [N] -> (im_q, im_k, ...), [N, c, S, S] each."""
        start = torch.cat([starts(seed, epoch, index, view) for view in range(views)])
        u = self.draw(start)  # [views * N, draws]
        return self.apply(torch.cat([images] * views), u).chunk(views)

    def draw(self, start: torch.Tensor) -> torch.Tensor:
        """The draws of each view from its `draws.starts`: int64 [N] -> float32 [N, draws]."""
        return self.numbers(start, columns(self.draws, start.device))

    def apply(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """One view, normalised: images [N, c, H, W], u [N, draws] -> [N, c, S, S].

        The images are uint8, or floats in [0, 1]. A function of its arguments alone.
        """
        raise NotImplementedError

    def _floats(self, images: torch.Tensor) -> torch.Tensor:
        return images if images.is_floating_point() else (images / 255).to(self.dtype)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        planes = zip(images.unbind(1), self.mean, self.std)
        return torch.stack([(plane - mean) / std for plane, mean, std in planes], 1)


class BatchAugmentation(BatchViews):
    """MoCo v2's augmentation (aug_plus) or MoCo v1's; blur: half of the views, sigma 0.1 to 2.

    `crop` and `finish` may run in two places: workers crop photos, and the device does the rest.
    Of other channels than 3, one number of mean and std each, the jitter is brightness and contrast
    alone, and none becomes grey.
    """

    draws = (
        22 + 1 + 4 + 4 + 1 + 1 + 2
    )  # box, flip, jitter's order, its factors, jitter?, grey?, blur

    def __init__(
        self,
        mean: Channels,
        std: Channels,
        size: int,
        aug_plus: bool,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.5,
        blur: bool = False,
        dtype=torch.float32,
    ):
        super().__init__(mean, std, size, dtype)
        self.aug_plus = aug_plus
        self.scale = scale
        self.flip = flip
        self.blur = blur
        self.is_rgb = len(mean) == 3
        # a compiler may stand in for each of them, and for `shifts`
        self.adjust = ADJUST if self.is_rgb else ADJUST[:2]
        self.shifts = weighted_shifts
        std = torch.tensor(std, dtype=dtype).view(1, -1, 1, 1)
        self._affine = 1 / std, -torch.tensor(mean, dtype=dtype).view(1, -1, 1, 1) / std

    def apply(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.finish(self.crop(images, u), u)

    # -------- cut out, resize, mirror

    def crop(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """[N, c, H, W], uint8 or floats -> [N, c, S, S] in [0, 1]: cut out, resized, mirrored.

        It mirrors here and not at the end, since no later step tells left from right.
        """
        boxes = crop_boxes(u[:, :22], *images.shape[2:], self.scale)
        images = images.to(self.dtype) / (1 if images.is_floating_point() else 255)
        return resized_crop(images, boxes, u[:, 22] < self.flip, self.size).clamp(0, 1)

    def box(self, draw: Callable[[int], float], H: int, W: int) -> tuple[tuple, bool]:
        """What `crop` does to an image whose draws are draw(0), draw(1), ...: (box, is mirrored).

        The box is (top, left, height, width).
        """
        return crop_box(draw, H, W, self.scale), draw(22) < self.flip

    def crop_one(
        self, image: torch.Tensor, box: tuple, mirror: bool, full: tuple[int, int]
    ) -> torch.Tensor:
        """[c, h, w] -> [c, S, S], of the same type.

        box: in pixels of the full size (H, W), which the image may have been decoded smaller than.
        """
        down, across = image.shape[1] / full[0], image.shape[2] / full[1]
        top = round(box[0] * down)
        left = round(box[1] * across)
        h = max(round(box[2] * down), 1)
        w = max(round(box[3] * across), 1)
        part = image[None, :, top : top + h, left : left + w]
        view = F.interpolate(part, (self.size, self.size), mode="bilinear", antialias=True)[0]
        return view.flip(2) if mirror else view

    # -------- jitter, grey, blur, normalise

    def finish(self, crops: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """The rest of a view [N, c, S, S] from its crop: floats in [0, 1], or uint8 of workers."""
        plan = self.plan(u)
        if _looks_are_free(crops):
            return self._finish_by_rows(crops, *plan)
        factors, order, _, to_grey, kernel, _ = plan
        images = self.colour(crops, factors, order, to_grey)
        if not self.blur:
            return self.normalize(images)
        return self.blur_columns(self.blur_rows(images, kernel), kernel)

    def plan(self, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the draws decide: factors, order, jittered, to_grey, kernel, blurred.

        factors and order [N, 4]: see `_jitter_at_once`; jittered, to_grey, blurred: bool [N];
        kernel [N, 13]: of the blur.
        """
        order, factors, jitter, to_grey, blur = u[:, 23:].split((4, 4, 1, 1, 2), 1)
        hue = 0.1 if self.aug_plus else 0.4
        jittered = jitter < (0.8 if self.aug_plus else 1.0)
        strengths = torch.where(jittered, between(factors[:, :3], 0.6, 1.4), 1)
        turns = torch.where(jittered, between(factors[:, 3:], -hue, hue), 0)
        factors = torch.cat([strengths, turns], 1)
        blurred = blur[:, 0] < 0.5
        kernel = blur_kernel(torch.where(blurred, between(blur[:, 1], 0.1, 2.0), 0))
        return factors, order.argsort(1), jittered[:, 0], to_grey[:, 0] < 0.2, kernel, blurred

    # The compiler sees `colour`, `blur_rows` and `blur_columns` one by one: fused with the second,
    # the first blur would be done 13 times.

    def colour(
        self, crops: torch.Tensor, factors: torch.Tensor, order: torch.Tensor, to_grey: torch.Tensor
    ) -> torch.Tensor:
        """Jitter and grey, in the order of MoCo v2 or v1: [N, c, S, S]."""
        if not self.is_rgb:
            return _light_at_once(self._floats(crops), factors, order)
        planes = self._floats(crops).unbind(1)
        if self.aug_plus:
            planes = _jitter_at_once(planes, factors, order)
        alike = _grey_of(planes)
        to_grey = _spread(to_grey, planes[0])
        planes = tuple(torch.where(to_grey, alike, x) for x in planes)
        if not self.aug_plus:
            planes = _jitter_at_once(planes, factors, order)
        return torch.stack(planes, 1)

    def blur_rows(self, images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        return blur_along(images, kernel, 3)

    def blur_columns(self, images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        return self.normalize(blur_along(images, kernel, 2))

    # -------- the same on a CPU: a few images at a time, each operation on its images alone

    def _finish_by_rows(
        self, crops: torch.Tensor, factors, order, jittered, to_grey, kernel, blurred
    ) -> torch.Tensor:
        order, idle, to_grey, blurred = (x.tolist() for x in (order, ~jittered, to_grey, blurred))
        scale, shift = self._affine
        done = torch.empty(crops.shape, dtype=self.dtype)
        few = max(1, _CACHE // crops[0].numel())
        for i in range(0, len(crops), few):
            here = slice(i, i + few)
            jitter = factors[here], order[here], idle[here], self.adjust
            images = self._floats(crops[here])
            if self.aug_plus:
                images = _jitter_by_rows(images, *jitter)
            if self.is_rgb:
                images = _on_rows(images, _which(to_grey[here]), lambda x: grey(x).expand_as(x))
            if not self.aug_plus:
                images = _jitter_by_rows(images, *jitter)
            if self.blur:
                images = _on_rows(images, _which(blurred[here]), self._blur, kernel[here])
            torch.addcmul(shift, images, scale, out=done[here])  # `normalize` in one pass
        return done

    def _blur(self, images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        for dim in (3, 2):
            images = self.shifts(repeat_border(images, kernel.shape[1] // 2, dim), kernel, dim)
        return images


class CropAugmentation(BatchAugmentation):
    """A random crop, mirrored or not, and nothing else."""

    draws = 22 + 1  # box, flip

    def __init__(
        self,
        mean: Channels,
        std: Channels,
        size: int,
        scale: tuple[float, float],
        flip: float = 0.5,
        dtype=torch.float32,
    ):
        super().__init__(mean, std, size, False, scale, flip, dtype=dtype)

    def finish(self, crops: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.normalize(self._floats(crops))


class DigitAugmentation(BatchViews):
    """Grey digits: turned, scaled, moved a little, brightness, contrast, noise.

    They are not mirrored, because a mirrored 2 is not a 2.
    """

    def __init__(
        self,
        mean: Channels,
        std: Channels,
        size: int,
        turn: float = 15.0,
        zoom: tuple[float, float] = (0.8, 1.2),
        move: float = 0.1,
        contrast: float = 0.4,
        brightness: float = 0.2,
        noise: float = 0.15,
        dtype=torch.float32,
    ):
        super().__init__(mean, std, size, dtype)
        self.turn = math.radians(turn)
        self.zoom = zoom
        self.move = move  # a share of the image's side
        self.contrast = contrast
        self.brightness = brightness
        self.noise = noise  # standard deviation
        self.draws = 6 + size * size

    def apply(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        images = self._floats(images[:, :1])  # the channels are equal: one will do
        angle = between(u[:, 0], -self.turn, self.turn)
        zoom = between(u[:, 1], *self.zoom)
        cos = torch.cos(angle) / zoom
        sin = torch.sin(angle) / zoom
        # grid_sample's image is 2 wide
        x, y = (between(u[:, i], -2 * self.move, 2 * self.move) for i in (2, 3))
        theta = torch.stack([cos, -sin, x, sin, cos, y], 1).view(-1, 2, 3).to(self.dtype)
        grid = F.affine_grid(theta, [len(images), 1, self.size, self.size], align_corners=False)
        images = F.grid_sample(images, grid, align_corners=False)  # bilinear, zeros outside
        factor = between(u[:, 4], 1 - self.contrast, 1 + self.contrast)
        images = images * _spread(factor, images).to(self.dtype)
        shift = between(u[:, 5], -self.brightness, self.brightness)
        images = images + _spread(shift, images).to(self.dtype)
        # uniform: as good as Gaussian here, and cheaper
        noise = between(u[:, 6:], -1, 1) * (self.noise * 3**0.5)
        images = images + noise.view_as(images).to(self.dtype)
        return self.normalize(images.expand(-1, len(self.mean), -1, -1))
