"""MoCo v1's and v2's augmentation, and the view of an image that features are taken from.

A transform returns uint8 [3, S, S], S being the side of a view. Its `normalize` makes floats of a
whole batch on the device, so that workers hand over a quarter of the bytes. Images of other
channels than RGB's, or of more bits, are float32 [c, S, S] in [0, 1] throughout.
"""

import torch

from moco_isl.data.augment import BatchAugmentation, CropAugmentation
from moco_isl.data.datasets import SMALL
from moco_isl.data.pixels import RGB, Pixels
from moco_isl.data.sets import DataSet, find_set
from moco_isl.errors import BadInput
from moco_isl.loader import GaussianBlur

CROP_MIN = 0.2  # of MoCo's crops, as a share of the image's area


def _side(row: DataSet, size: int | None) -> int:
    size = row.size if size is None else size
    if size < 8:
        raise BadInput(f"views of {size} pixels: expected a side of 8 or more; give a larger size")
    return size


class Normalize:
    """uint8 [N, c, S, S] -> float32, (x / 255 - mean) / std by channel; floats are x / 1."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        self.mean = mean
        self.std = std

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        top = 1 if images.is_floating_point() else 255
        images = images.to(torch.float32, copy=True)
        # channel by channel: a tensor of constants would be copied to the device in every step
        for channel, (mean, std) in enumerate(zip(self.mean, self.std)):
            images[:, channel].mul_(1 / (top * std)).sub_(mean / std)
        return images


class ImageTransform:
    """PIL image or uint8 tensor [3, H, W] -> uint8 [3, S, S]; `normalize` makes floats of a batch.

    Of other pixels than RGB of 8 bits a tensor [c, H, W] -> float32 [c, S, S] in [0, 1].
    smallest: side down to which an image may be decoded smaller with nothing lost.
    unchanged: side of square images that the steps leave as they are.
    """

    def __init__(
        self,
        steps: list,
        name: str,
        smallest: int | None = None,
        unchanged: int | None = None,
        pixels: Pixels = RGB,
    ):
        from torchvision import transforms as T  # on demand: it takes a second

        self.pixels = pixels
        self.steps = T.Compose([*steps, T.PILToTensor()] if pixels.is_rgb else steps)
        self.normalize = Normalize(*pixels.numbers(find_set(name)))
        self.smallest = smallest
        self.unchanged = unchanged

    def __call__(self, image) -> torch.Tensor:
        if not self.pixels.is_rgb:
            return self.steps(_floats(image))
        if isinstance(image, torch.Tensor):
            from torchvision.transforms.functional import to_pil_image

            image = to_pil_image(image)
        return self.steps(image)


def _floats(image: torch.Tensor) -> torch.Tensor:
    """An image [c, H, W], uint8 or floats, as floats in [0, 1]."""
    return image if image.is_floating_point() else image / 255


class OneByOne:
    """A BatchAugmentation of single images in a worker: [c, H, W] -> normalised float32 [c, S, S].

    The draws come from torch's generator.
    """

    def __init__(self, augmentation: BatchAugmentation):
        self.augmentation = augmentation

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        u = torch.rand(1, self.augmentation.draws)
        H, W = image.shape[1:]
        box, mirror = self.augmentation.box(lambda i: u[0, i].item(), H, W)
        crop = self.augmentation.crop_one(_floats(image), box, mirror, (H, W))
        return self.augmentation.finish(crop[None], u)[0]


def left_out(pixels: Pixels) -> str:
    """A line on the parts of the augmentation that need RGB; '' where there are three channels."""
    if pixels.channels == 3:
        return ""
    number = f"{pixels.channels} channels" if pixels.channels > 1 else "1 channel"
    what = "brightness and contrast are jittered; hue, saturation and grey need RGB"
    return f"=> {number}: {what} and are left out"


def get_augmentation(
    name: str,
    *,
    aug_plus: bool,
    size: int | None = None,
    on_device: bool | None = None,
    pixels: Pixels = RGB,
    crop: tuple[float, float] | None = None,
    crop_min: float | None = None,
):
    """MoCo v2's augmentation with aug_plus, else MoCo v1's; or with `crop` crops and flips alone.

    size: side of the views, by default the data set's own. on_device: a BatchAugmentation in place
    of PIL's; a data set whose row has an augmentation of its own always takes that. Views up to 64
    pixels are not blurred. pixels: other than RGB of 8 bits are augmented by a BatchAugmentation,
    in the workers or on the device. crop: the least and the largest share of an image's area that
    a crop has; its ratio of sides is 3/4 to 4/3. crop_min: the least share; None for MoCo's 0.2, or
    that of `crop`. Raises BadInput.
    """
    from torchvision import transforms as T

    row = find_set(name)
    size = _side(row, size)
    mean, std = pixels.numbers(row)
    if row.augmentation is not None:
        if crop_min is not None:
            raise BadInput(f"--crop-min: {name} has an augmentation of its own; leave it off")
        return row.augmentation(mean, std, size=size)
    flip = 0.5 if row.flip else 0.0
    if crop is not None:
        scale = (crop[0] if crop_min is None else crop_min, crop[1])
        if on_device:
            return CropAugmentation(mean, std, size, scale, flip)
        steps = [T.RandomResizedCrop(size, scale=scale), T.RandomHorizontalFlip(flip)]
        return ImageTransform(steps, name, pixels=pixels)
    scale = (CROP_MIN if crop_min is None else crop_min, 1.0)
    if on_device or not pixels.is_rgb:
        blur = aug_plus and size > SMALL
        options = {"size": size, "aug_plus": aug_plus, "scale": scale, "flip": flip, "blur": blur}
        augmentation = BatchAugmentation(mean, std, **options)
        return augmentation if on_device else OneByOne(augmentation)
    crop = T.RandomResizedCrop(size, scale=scale)
    grey = T.RandomGrayscale(p=0.2)
    flip = T.RandomHorizontalFlip(flip)
    if aug_plus:
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)  # not strengthened
        blur = [T.RandomApply([GaussianBlur((0.1, 2.0))], p=0.5)] if size > SMALL else []
        steps = [crop, jitter, grey, *blur, flip]
    else:
        steps = [crop, grey, T.ColorJitter(0.4, 0.4, 0.4, 0.4), flip]
    # The smallest crop has a ratio of 3 to 4: of 0.2 of the area its shorter side is 0.387 of the
    # geometric mean of the image's sides.
    smallest = round(size / (scale[0] * 3 / 4) ** 0.5)
    return ImageTransform(steps, name, smallest=smallest, pixels=pixels)


def get_eval_transform(name: str, size: int | None = None, pixels: Pixels = RGB) -> ImageTransform:
    """The view that features are taken from: the centre (224 of 256), or small images whole.

    Raises BadInput.
    """
    from torchvision import transforms as T

    size = _side(find_set(name), size)
    if size <= SMALL:
        steps = [T.Resize(size), T.CenterCrop(size)]
        return ImageTransform(steps, name, unchanged=size, pixels=pixels)
    steps = [T.Resize(round(size * 8 / 7)), T.CenterCrop(size)]
    return ImageTransform(steps, name, pixels=pixels)
