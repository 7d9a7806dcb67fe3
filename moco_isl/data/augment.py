"""Augmentation of a whole batch on its device, every image by its own draws.

Letters: N images of a batch, H x W pixels, S side of a view. Images are floats in [0, 1], [N, 3, H, W]; a factor is
[N]. The operations are torchvision's in value, the whole is torchvision's in distribution. Nothing here depends on the
data's values on the host: no synchronisation, one graph for torch.compile.
"""

import math

import torch
import torch.nn.functional as F

from moco_isl.data.draws import uniforms

_GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision rounds it


def _by_image(x: torch.Tensor) -> torch.Tensor:
    return x[:, None, None, None]


def between(u: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * u


# ---------------------------------------------------------------- geometry


def crop_boxes(u: torch.Tensor, H: int, W: int, scale: tuple[float, float], tries: int = 10) -> torch.Tensor:
    """RandomResizedCrop's boxes: u [N, 2 tries + 2] -> [N, 4] (top, left, height, width), whole pixels.

    The first of ten shapes that fits; if none does, the central one with the nearest allowed ratio.
    """
    area = H * W * between(u[:, :tries], *scale)  # [N, tries]
    ratio = torch.exp(between(u[:, tries : 2 * tries], math.log(3 / 4), math.log(4 / 3)))
    w, h = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    fits = (w > 0) & (w <= W) & (h > 0) & (h <= H)
    first = fits.int().argmax(1, keepdim=True)
    w, h, found = (x.gather(1, first)[:, 0] for x in (w, h, fits))
    last_w = min(W, round(H * 4 / 3)) if W / H > 4 / 3 else W
    last_h = min(H, round(W * 4 / 3)) if W / H < 3 / 4 else H
    w, h = torch.where(found, w, float(last_w)), torch.where(found, h, float(last_h))
    top = torch.where(found, (u[:, 2 * tries] * (H - h + 1)).floor(), (H - last_h) // 2)
    left = torch.where(found, (u[:, 2 * tries + 1] * (W - w + 1)).floor(), (W - last_w) // 2)
    return torch.stack([top, left, h, w], 1)


def _resize_weights(start: torch.Tensor, length: torch.Tensor, full: int, S: int) -> torch.Tensor:
    """Bilinear, antialiased resize of the pixels [start, start + length) to S, as a matrix an image: [N, S, full].

    A triangle as wide as the step between two output pixels, one input pixel at least: what PIL and torchvision's
    antialias compute.
    """
    step = (length / S)[:, None, None]
    centre = start[:, None, None] + (torch.arange(S, device=start.device)[:, None] + 0.5) * step  # [N, S, 1]
    pixel = torch.arange(full, device=start.device)  # [full]
    weight = (1 - (pixel + 0.5 - centre).abs() / step.clamp(min=1)).clamp(min=0)
    inside = (pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weight = weight * inside
    return weight / weight.sum(2, keepdim=True)


def resized_crop(images: torch.Tensor, boxes: torch.Tensor, flip: torch.Tensor, S: int) -> torch.Tensor:
    """Cut out boxes [N, 4], resize to S x S, mirror where flip [N] is true: two matrix products an image."""
    top, left, h, w = boxes.unbind(1)
    rows = _resize_weights(top, h, images.shape[2], S)  # [N, S, H]
    columns = _resize_weights(left, w, images.shape[3], S)  # [N, S, W]
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    rows, columns = rows.to(images.dtype), columns.to(images.dtype)
    return rows[:, None] @ images @ columns.transpose(1, 2)[:, None]


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur by sigma [N] pixels (0: not at all), at most 2; square images, borders repeated; a matrix an image."""
    S, reach = images.shape[2], 6  # 3 of the largest sigma
    offset = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None].clamp(min=1e-3)) ** 2)  # [N, 2 reach + 1]
    kernel = kernel / kernel.sum(1, keepdim=True)
    pixel = torch.arange(S, device=images.device)
    source = (pixel[:, None] + offset).clamp(0, S - 1)  # [S, 2 reach + 1]
    shifts = (source[:, :, None] == pixel).to(images.dtype)  # [S, 2 reach + 1, S]
    matrix = torch.einsum("nr,irj->nij", kernel.to(images.dtype), shifts)[:, None]  # [N, 1, S, S]
    return matrix @ images @ matrix.transpose(2, 3)


# ---------------------------------------------------------------- colour


def grey(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] -> [N, 1, H, W]"""
    r, g, b = images.unbind(1)
    return (_GREY[0] * r + _GREY[1] * g + _GREY[2] * b)[:, None]


def blend(images: torch.Tensor, other: torch.Tensor | float, factor: torch.Tensor) -> torch.Tensor:
    """factor 1: the images; 0: the other; clamped to [0, 1]."""
    factor = _by_image(factor).to(images.dtype)
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend(images, 0.0, factor)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend(images, grey(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend(images, grey(images), factor)


def adjust_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turn the hue by shift [N], in turns: HSV and back, without ever writing S and V down.

    With top and low the largest and smallest channel, a pixel of hue h (0 to 6) has in red, green, blue
    top - (top - low) clamp(min(k, 4 - k), 0, 1), k = (h + 5, 3, 1) mod 6.
    """
    r, g, b = images.unbind(1)
    top, low = images.amax(1), images.amin(1)  # [N, H, W]
    chroma = top - low
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = hue + 6 * shift.to(images.dtype)[:, None, None]
    channels = []
    for phase in (5, 3, 1):
        k = torch.remainder(hue + phase, 6)
        channels.append(top - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def _hue_where(images: torch.Tensor, shift: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        # the dearest step: on a CPU, where a look at the values costs nothing, only for the rows that need it
        rows = here.nonzero()[:, 0]
        return images.index_copy(0, rows, adjust_hue(images[rows], shift[rows]))
    return torch.where(_by_image(here), adjust_hue(images, shift), images)


def colour_jitter(images: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """factors [N, 4]: brightness, contrast, saturation (1: as it is), hue (0: as it is); order [N, 4]: their turns.

    The first three are one blend, with black, with the mean grey or with the grey image.
    """
    for step in order.unbind(1):
        chosen = factors.gather(1, step[:, None])[:, 0]
        tone = grey(images)
        other = torch.where(_by_image(step == 2), tone, tone.mean((1, 2, 3), keepdim=True))
        other = torch.where(_by_image(step == 0), 0, other)
        is_hue = step == 3
        blended = blend(images, other, torch.where(is_hue, 1, chosen))
        images = _hue_where(blended, torch.where(is_hue, chosen, 0), is_hue)
    return images


# ---------------------------------------------------------------- recipes


class BatchViews:
    """Views of a batch by counted draws: a subclass says how many numbers a view takes, and what it makes of them."""

    draws: int

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], size: int, dtype: torch.dtype = torch.float32):
        self.mean = mean
        self.std = std
        self.size = size
        self.dtype = dtype

    def views(
        self, images: torch.Tensor, seed: int, epoch: int, index: torch.Tensor, views: int = 2
    ) -> tuple[torch.Tensor, ...]:
        """images uint8 [N, 3, H, W], index int64 [N] -> (im_q, im_k) or more, normalised, [N, 3, S, S] each."""
        u = torch.cat([uniforms(seed, epoch, index, view, self.draws) for view in range(views)])  # [views * N, draws]
        return self.apply(torch.cat([images] * views), u).chunk(views)

    def apply(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """One view: images uint8 [N, 3, H, W], u [N, draws] -> [N, 3, S, S], a function of its arguments alone."""
        raise NotImplementedError

    def _normalize(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([(images[:, c] - m) / s for c, (m, s) in enumerate(zip(self.mean, self.std))], 1)


class BatchAugmentation(BatchViews):
    """MoCo v2's augmentation (aug_plus) or MoCo v1's; with blur, sigma 0.1 to 2 for half of the views."""

    draws = 22 + 1 + 4 + 4 + 1 + 1 + 2  # box, flip, jitter's order and factors, jitter at all, grey at all, blur

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

    def apply(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        box, flip, order, factors, jitter, to_grey, blur = u.split((22, 1, 4, 4, 1, 1, 2), 1)
        boxes = crop_boxes(box, images.shape[2], images.shape[3], self.scale)
        images = images.to(self.dtype) / 255
        # flipped here and not at the end: every later step treats the left as the right
        images = resized_crop(images, boxes, flip[:, 0] < self.flip, self.size).clamp(0, 1)
        hue = 0.1 if self.aug_plus else 0.4
        jittered = jitter < (0.8 if self.aug_plus else 1.0)
        strengths = torch.where(jittered, between(factors[:, :3], 0.6, 1.4), 1)
        turns = torch.where(jittered, between(factors[:, 3:], -hue, hue), 0)
        factors = torch.cat([strengths, turns], 1)
        if self.aug_plus:
            images = colour_jitter(images, factors, order.argsort(1))
            images = torch.where(_by_image(to_grey[:, 0] < 0.2), grey(images), images)
        else:
            images = torch.where(_by_image(to_grey[:, 0] < 0.2), grey(images), images)
            images = colour_jitter(images, factors, order.argsort(1))
        if self.blur:
            images = gaussian_blur(images, torch.where(blur[:, 0] < 0.5, between(blur[:, 1], 0.1, 2.0), 0))
        return self._normalize(images)


class DigitAugmentation(BatchViews):
    """Grey digits: turned, scaled, moved a little, brightness, contrast, noise; no flip, a mirrored 2 is no 2."""

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
        images = images[:, :1].to(self.dtype) / 255  # three equal channels: one is enough until the end
        angle = between(u[:, 0], -self.turn, self.turn)
        zoom = between(u[:, 1], *self.zoom)
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        x, y = (between(u[:, i], -2 * self.move, 2 * self.move) for i in (2, 3))  # grid_sample's image is 2 wide
        theta = torch.stack([cos, -sin, x, sin, cos, y], 1).view(-1, 2, 3).to(self.dtype)
        grid = F.affine_grid(theta, [len(images), 1, self.size, self.size], align_corners=False)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        images = images * _by_image(between(u[:, 4], 1 - self.contrast, 1 + self.contrast)).to(self.dtype)
        images = images + _by_image(between(u[:, 5], -self.brightness, self.brightness)).to(self.dtype)
        noise = between(u[:, 6:], -1, 1) * (self.noise * 3**0.5)  # uniform: as good as Gaussian here, and cheaper
        images = images + noise.view_as(images).to(self.dtype)
        return self._normalize(images.expand(-1, 3, -1, -1))
