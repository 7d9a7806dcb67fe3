"""Augmentation of a whole batch on its device, every image by its own draws.

Letters: N images of a batch, H x W pixels, S side of a view. Images are floats in [0, 1], [N, 3, H,
W]; a factor is [N]. The operations are torchvision's in value, the whole is torchvision's in
distribution. Nothing here depends on the data's values on the host: no synchronisation, one graph
for torch.compile.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from moco_isl.data.draws import columns, numbers, starts

_CACHE = 1 << 18  # floats, one MiB
_GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision rounds it


def _by_image(x: torch.Tensor) -> torch.Tensor:
    return x[:, None, None, None]


def _spread(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x [N] with as many dimensions as `like` [N, ...]."""
    return x.view(-1, *[1] * (like.dim() - 1))


def between(u: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * u


# ---------------------------------------------------------------- geometry


def crop_boxes(
    u: torch.Tensor, H: int, W: int, scale: tuple[float, float], tries: int = 10
) -> torch.Tensor:
    """RandomResizedCrop's boxes: u [N, 2 tries + 2] -> [N, 4] (top, left, height, width), whole
    pixels.

    The first of ten shapes that fits; if none does, the central one with the nearest allowed ratio.
    """
    area = H * W * between(u[:, :tries], *scale)  # [N, tries]
    ratio = torch.exp(between(u[:, tries : 2 * tries], math.log(3 / 4), math.log(4 / 3)))
    w = torch.sqrt(area * ratio).round()
    h = torch.sqrt(area / ratio).round()
    fits = (w > 0) & (w <= W) & (h > 0) & (h <= H)
    first = fits.int().argmax(1, keepdim=True)
    w, h, found = (x.gather(1, first)[:, 0] for x in (w, h, fits))
    last_w = min(W, round(H * 4 / 3)) if W / H > 4 / 3 else W
    last_h = min(H, round(W * 4 / 3)) if W / H < 3 / 4 else H
    w = torch.where(found, w, float(last_w))
    h = torch.where(found, h, float(last_h))
    top = torch.where(found, (u[:, 2 * tries] * (H - h + 1)).floor(), (H - last_h) // 2)
    left = torch.where(found, (u[:, 2 * tries + 1] * (W - w + 1)).floor(), (W - last_w) // 2)
    return torch.stack([top, left, h, w], 1)


def crop_box(
    draw: Callable[[int], float], H: int, W: int, scale: tuple[float, float], tries: int = 10
) -> tuple:
    """One box of `crop_boxes`, on the host: draw(j) is what stands in column j of u.

    Rounding may differ by a pixel.
    """
    for i in range(tries):
        area = H * W * (scale[0] + (scale[1] - scale[0]) * draw(i))
        ratio = math.exp(math.log(3 / 4) + math.log(16 / 9) * draw(tries + i))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= W and 0 < h <= H:
            return int(draw(2 * tries) * (H - h + 1)), int(draw(2 * tries + 1) * (W - w + 1)), h, w
    w = min(W, round(H * 4 / 3)) if W / H > 4 / 3 else W
    h = min(H, round(W * 4 / 3)) if W / H < 3 / 4 else H
    return (H - h) // 2, (W - w) // 2, h, w


def _resize_weights(start: torch.Tensor, length: torch.Tensor, full: int, S: int) -> torch.Tensor:
    """Bilinear, antialiased resize of the pixels [start, start + length) to S, as a matrix an
    image: [N, S, full].

    A triangle as wide as the step between two output pixels, one input pixel at least: what PIL and
    torchvision's antialias compute.
    """
    step = (length / S)[:, None, None]
    # [N, S, 1]
    centre = start[:, None, None] + (torch.arange(S, device=start.device)[:, None] + 0.5) * step
    pixel = torch.arange(full, device=start.device)  # [full]
    weight = (1 - (pixel + 0.5 - centre).abs() / step.clamp(min=1)).clamp(min=0)
    inside = (pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weight = weight * inside
    return weight / weight.sum(2, keepdim=True)


def resized_crop(
    images: torch.Tensor, boxes: torch.Tensor, flip: torch.Tensor, S: int
) -> torch.Tensor:
    """Cut out boxes [N, 4], resize to S x S, mirror where flip [N] is true: two matrix products an
    image.
    """
    top, left, h, w = boxes.unbind(1)
    rows = _resize_weights(top, h, images.shape[2], S)  # [N, S, H]
    columns = _resize_weights(left, w, images.shape[3], S)  # [N, S, W]
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    rows = rows.to(images.dtype)
    columns = columns.to(images.dtype)
    return rows[:, None] @ images @ columns.transpose(1, 2)[:, None]


def blur_kernel(sigma: torch.Tensor, reach: int = 6) -> torch.Tensor:
    """[N, 2 reach + 1] weights of a Gaussian of sigma [N] pixels, at most 2; 0: not at all."""
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None].clamp(min=1e-3)) ** 2)
    return kernel / kernel.sum(1, keepdim=True)


def repeat_border(images: torch.Tensor, reach: int, dim: int) -> torch.Tensor:
    """`reach` more pixels at both ends of dim 2 or 3, copies of the last ones."""
    first = images.narrow(dim, 0, 1)
    last = images.narrow(dim, images.shape[dim] - 1, 1)
    size = [reach if d == dim else -1 for d in range(4)]
    return torch.cat([first.expand(size), images, last.expand(size)], dim)


def weighted_shifts(padded: torch.Tensor, kernel: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum of shifted copies along dim 2 or 3, those of each image by its own kernel [N, taps]; taps
    - 1 pixels shorter.
    """
    taps, weights = kernel.shape[1], kernel.to(padded.dtype)
    length = padded.shape[dim] - taps + 1
    total = padded.narrow(dim, 0, length) * _by_image(weights[:, 0])
    for i in range(1, taps):
        total = total.addcmul_(padded.narrow(dim, i, length), _by_image(weights[:, i]))
    return total


def blur_along(images: torch.Tensor, kernel: torch.Tensor, dim: int) -> torch.Tensor:
    return weighted_shifts(repeat_border(images, kernel.shape[1] // 2, dim), kernel, dim)


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur by sigma [N] pixels (0: not at all), at most 2; borders repeated."""
    kernel = blur_kernel(sigma)
    return blur_along(blur_along(images, kernel, 3), kernel, 2)


# ---------------------------------------------------------------- colour


Planes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # red, green, blue, [N, H, W] each


def _grey_of(planes: Planes) -> torch.Tensor:
    """[N, H, W] from three planes of that shape."""
    r, g, b = planes
    return _GREY[0] * r + _GREY[1] * g + _GREY[2] * b


def grey(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] -> [N, 1, H, W]"""
    return _grey_of(images.unbind(1))[:, None]


def blend(images: torch.Tensor, other: torch.Tensor | float, factor: torch.Tensor) -> torch.Tensor:
    """factor 1: the images; 0: the other; clamped to [0, 1]. images [N, ...], factor [N]."""
    factor = _spread(factor, images).to(images.dtype)
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend(images, 0.0, factor)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend(images, grey(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend(images, grey(images), factor)


def adjust_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turn the hue by shift [N], in turns."""
    r, g, b = images.unbind(1)
    return torch.stack(_turn_hue((r, g, b), images.amax(1), images.amin(1), shift), 1)


def _turn_hue(planes: Planes, top: torch.Tensor, low: torch.Tensor, shift: torch.Tensor) -> Planes:
    """HSV and back, without ever writing S and V down. top, low [N, H, W]: the largest and smallest
    of the planes.

    A pixel of hue h (0 to 6) has in red, green, blue top - (top - low) clamp(min(k, 4 - k), 0, 1),
    k = (h + 5, 3, 1) mod 6. The remainder is taken of turns, by floor, which vectorises.
    """
    r, g, b = planes
    chroma = top - low
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(
        top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
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
    """The step-th operation on each image: step [N]; mean [N, 1, 1] is what contrast blends with.

    The first three are one blend, with black, with the mean grey or with the grey image.
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
    """As `colour_jitter`, without a look at the values: each pixel by itself, but for the mean that
    contrast needs.

    That one is found first, by doing what comes before contrast: compiled, these are two passes,
    one that reads the images and one that writes them anew. The channels stay apart throughout:
    joined after every turn, each turn would be a launch of its own.
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


def _jitter_by_rows(
    images, factors, order: list[list[int]], idle: list[bool], adjust=ADJUST
) -> torch.Tensor:
    """As `colour_jitter`, where a look at the values costs nothing: each operation on the images
    that are due for it.

    idle: images that stay as they are.
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
    """images with operation(images, *factors) done on some of them."""
    if not rows:
        return images
    if len(rows) == len(images):
        return operation(images, *factors)
    return images.index_copy(
        0, torch.tensor(rows), operation(images[rows], *(f[rows] for f in factors))
    )


def _looks_are_free(images: torch.Tensor) -> bool:
    return images.device.type == "cpu" and not torch.compiler.is_compiling()


def colour_jitter(images: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """factors [N, 4]: brightness, contrast, saturation (1: as it is), hue (0: as it is); order [N,
    4]: their turns.
    """
    if _looks_are_free(images):
        return _jitter_by_rows(images, factors, order.tolist(), [False] * len(images))
    return torch.stack(_jitter_at_once(images.unbind(1), factors, order), 1)


# ---------------------------------------------------------------- recipes


class BatchViews:
    """Views of a batch by counted draws: a subclass says how many numbers a view takes, and what it
    makes of them.
    """

    draws: int

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: int,
        dtype: torch.dtype = torch.float32,
    ):
        self.mean = mean
        self.std = std
        self.size = size
        self.dtype = dtype
        self.numbers = numbers  # a compiler may stand in for it

    def views(
        self, images: torch.Tensor, seed: int, epoch: int, index: torch.Tensor, views: int = 2
    ) -> tuple[torch.Tensor, ...]:
        """images uint8 [N, 3, H, W], index int64 [N] -> (im_q, im_k) or more, normalised, [N, 3, S,
        S] each.
        """
        # [views * N, draws]
        u = self.draw(torch.cat([starts(seed, epoch, index, view) for view in range(views)]))
        return self.apply(torch.cat([images] * views), u).chunk(views)

    def draw(self, start: torch.Tensor) -> torch.Tensor:
        """The draws of each view from its `draws.starts`: int64 [N] -> float32 [N, draws] in [0,
        1).
        """
        return self.numbers(start, columns(self.draws, start.device))

    def apply(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """One view: images uint8 [N, 3, H, W], u [N, draws] -> [N, 3, S, S], a function of its
        arguments alone.
        """
        raise NotImplementedError

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [(images[:, c] - m) / s for c, (m, s) in enumerate(zip(self.mean, self.std))], 1
        )


class BatchAugmentation(BatchViews):
    """MoCo v2's augmentation (aug_plus) or MoCo v1's; with blur, sigma 0.1 to 2 for half of the
    views.

    `crop` and `finish` may be done in two places: of photos the workers crop, and the device does
    the rest.
    """

    # box, flip, jitter's order and factors, jitter at all, grey at all, blur
    draws = 22 + 1 + 4 + 4 + 1 + 1 + 2

    def __init__(
        self,
        mean,
        std,
        size: int,
        aug_plus: bool,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.5,
        blur: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(mean, std, size, dtype)
        self.aug_plus = aug_plus
        self.scale = scale
        self.flip = flip
        self.blur = blur
        # a compiler may stand in for each
        self.adjust = ADJUST
        self.shifts = weighted_shifts
        std = torch.tensor(std, dtype=dtype).view(1, 3, 1, 1)
        self._affine = 1 / std, -torch.tensor(mean, dtype=dtype).view(1, 3, 1, 1) / std

    def apply(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.finish(self.crop(images, u), u)

    def crop(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] -> [N, 3, S, S] in [0, 1]: cut out, resized, mirrored."""
        boxes = crop_boxes(u[:, :22], images.shape[2], images.shape[3], self.scale)
        # mirrored here and not at the end: every later step treats the left as the right
        return resized_crop(
            images.to(self.dtype) / 255, boxes, u[:, 22] < self.flip, self.size
        ).clamp(0, 1)

    def box(self, draw: Callable[[int], float], H: int, W: int) -> tuple[tuple, bool]:
        """`crop` of one image whose draws are draw(0), draw(1), ...: its box (top, left, height,
        width), and if to mirror.
        """
        return crop_box(draw, H, W, self.scale), draw(22) < self.flip

    def crop_one(
        self, image: torch.Tensor, box: tuple, mirror: bool, full: tuple[int, int]
    ) -> torch.Tensor:
        """uint8 [3, h, w] -> uint8 [3, S, S].

        box: in pixels of the image's full size (H, W), which h, w may be a part of.
        """
        scales = (image.shape[1] / full[0], image.shape[2] / full[1]) * 2
        top, left, h, w = (
            max(round(x * scale), i // 2) for i, (x, scale) in enumerate(zip(box, scales))
        )
        part = image[None, :, top : top + h, left : left + w]
        view = F.interpolate(part, (self.size, self.size), mode="bilinear", antialias=True)[0]
        return view.flip(2) if mirror else view

    def finish(self, crops: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """The rest of a view, [N, 3, S, S], from its crop: floats in [0, 1], or uint8 if the crop
        was made elsewhere.
        """
        factors, order, jittered, to_grey, kernel, blurred = self.plan(u)
        if _looks_are_free(crops):
            few = max(1, _CACHE // crops[0].numel())  # images at a time, that stay in a CPU's cache
            order = order.tolist()
            idle = (~jittered).tolist()
            to_grey = to_grey.tolist()
            blurred = blurred.tolist()
            done = torch.empty(crops.shape, dtype=self.dtype)
            for i in range(0, len(crops), few):
                here = slice(i, i + few)
                images = self._by_rows(
                    crops[here], factors[here], order[here], idle[here], to_grey[here]
                )
                if self.blur:
                    images = _on_rows(images, _which(blurred[here]), self._blur, kernel[here])
                self._normalize_into(done[here], images)
            return done
        images = self.colour(crops, factors, order, to_grey)
        return (
            self.blur_columns(self.blur_rows(images, kernel), kernel)
            if self.blur
            else self.normalize(images)
        )

    def plan(self, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """factors [N, 4], order [N, 4], see `colour_jitter`; [N] each: jittered at all, to grey;
        kernel [N, 13], blurred [N].
        """
        order, factors, jitter, to_grey, blur = u[:, 23:].split((4, 4, 1, 1, 2), 1)
        hue = 0.1 if self.aug_plus else 0.4
        jittered = jitter < (0.8 if self.aug_plus else 1.0)
        strengths = torch.where(jittered, between(factors[:, :3], 0.6, 1.4), 1)
        turns = torch.where(jittered, between(factors[:, 3:], -hue, hue), 0)
        blurred = blur[:, 0] < 0.5
        kernel = blur_kernel(torch.where(blurred, between(blur[:, 1], 0.1, 2.0), 0))
        return (
            torch.cat([strengths, turns], 1),
            order.argsort(1),
            jittered[:, 0],
            to_grey[:, 0] < 0.2,
            kernel,
            blurred,
        )

    # Steps that a compiler is to see one by one: fused with the second, the first blur would be
    # done 13 times.

    def colour(
        self, crops: torch.Tensor, factors: torch.Tensor, order: torch.Tensor, to_grey: torch.Tensor
    ) -> torch.Tensor:
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

    def _floats(self, crops: torch.Tensor) -> torch.Tensor:
        return crops if crops.is_floating_point() else (crops / 255).to(self.dtype)

    def _by_rows(self, crops, factors, order, idle, to_grey) -> torch.Tensor:
        """As `colour`, on few images and each operation on those alone that are due for it."""
        images, greys = self._floats(crops), _which(to_grey)
        if self.aug_plus:
            images = _jitter_by_rows(images, factors, order, idle, self.adjust)
        images = _on_rows(images, greys, lambda x: grey(x).expand_as(x))
        return (
            images if self.aug_plus else _jitter_by_rows(images, factors, order, idle, self.adjust)
        )

    def _normalize_into(self, done: torch.Tensor, images: torch.Tensor) -> None:
        """`normalize` in one pass over memory that is there already."""
        scale, shift = self._affine
        torch.addcmul(shift, images, scale, out=done)

    def _blur(self, images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        for dim in (3, 2):
            images = self.shifts(repeat_border(images, kernel.shape[1] // 2, dim), kernel, dim)
        return images


class DigitAugmentation(BatchViews):
    """Grey digits: turned, scaled, moved a little, brightness, contrast, noise; no flip, a mirrored
    2 is no 2.
    """

    def __init__(
        self,
        mean,
        std,
        size: int,
        turn: float = 15.0,
        zoom: tuple[float, float] = (0.8, 1.2),
        move: float = 0.1,
        contrast: float = 0.4,
        brightness: float = 0.2,
        noise: float = 0.15,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(mean, std, size, dtype)
        self.turn = math.radians(turn)
        self.zoom = zoom
        self.move = move  # of the image's side
        self.contrast = contrast
        self.brightness = brightness
        self.noise = noise  # standard deviation
        self.draws = 6 + size * size

    def apply(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        # three equal channels: one is enough until the end
        images = images[:, :1].to(self.dtype) / 255
        angle = between(u[:, 0], -self.turn, self.turn)
        zoom = between(u[:, 1], *self.zoom)
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        # grid_sample's image is 2 wide
        x, y = (between(u[:, i], -2 * self.move, 2 * self.move) for i in (2, 3))
        theta = torch.stack([cos, -sin, x, sin, cos, y], 1).view(-1, 2, 3).to(self.dtype)
        grid = F.affine_grid(theta, [len(images), 1, self.size, self.size], align_corners=False)
        images = F.grid_sample(
            images, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        images = images * _by_image(between(u[:, 4], 1 - self.contrast, 1 + self.contrast)).to(
            self.dtype
        )
        images = images + _by_image(between(u[:, 5], -self.brightness, self.brightness)).to(
            self.dtype
        )
        # uniform: as good as Gaussian here, and cheaper
        noise = between(u[:, 6:], -1, 1) * (self.noise * 3**0.5)
        images = images + noise.view_as(images).to(self.dtype)
        return self.normalize(images.expand(-1, 3, -1, -1))
