"""The two-view augmentation (SimCLR, Chen et al. 2020, as in the public CAN release)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor

from util.augment import (
    BLUR_P,
    BLUR_SIGMA,
    GREY_P,
    JITTER,
    JITTER_P,
    augment,
    draw_parameters,
)
from util.datasets import IMAGENET_MEAN, IMAGENET_STD
from util.loader import to_device

CROP_AREA = (0.2, 1.0)  # share of the image's area
CROP_ASPECT = (3 / 4, 4 / 3)  # width by height
FLIP_P = 0.5


class TwoCropTransform:
    """Two independent draws of one random transform."""

    def __init__(self, transform: Callable):
        self.transform = transform

    def __call__(self, image: Any) -> list:
        return [self.transform(image), self.transform(image)]


class GaussianBlur:
    """Blurs by a Gaussian whose sigma, in pixels, is uniform in a range; kernel of 3 sigma."""

    def __init__(self, sigma: tuple[float, float] = BLUR_SIGMA):
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = torch.empty(1).uniform_(*self.sigma).item()
        # no kernel may reach past the image's reflected border
        radius = min(math.ceil(3 * sigma), min(image.size) - 1)
        return TF.gaussian_blur(image, 2 * radius + 1, sigma)


def pil_transform(input_size: int) -> TwoCropTransform:
    """The augmentation as torchvision's transforms of a PIL image spell it.

    What `TwoCrops` equals in distribution, several times as fast; for comparison.
    """
    return TwoCropTransform(
        T.Compose(
            [
                T.RandomResizedCrop(input_size, scale=CROP_AREA, ratio=CROP_ASPECT),
                T.RandomHorizontalFlip(FLIP_P),
                T.RandomApply([JITTER], p=JITTER_P),
                T.RandomGrayscale(p=GREY_P),
                T.RandomApply([GaussianBlur()], p=BLUR_P),
                T.ToTensor(),
                T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
    )


class TwoCrops:
    """From a PIL image, best not yet decoded, to two views [3, S, S], float32, normalised.

    Args:
        input_size: S, in pixels.
        defer: leave all but the cutting to `finish`, for batches on a GPU. A view is then a uint8
            crop [3, S, S] and the parameters [23] drawn for it.
    """

    decodes = True  # wants images as their files hold them

    def __init__(self, input_size: int, defer: bool = False):
        self.input_size, self.defer = input_size, defer

    def __call__(self, image: Image.Image) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
        boxes, parameters = [], []
        for _ in range(2):
            boxes.append(T.RandomResizedCrop.get_params(image, CROP_AREA, CROP_ASPECT))
            parameters.append(draw_parameters())
        crops = cut(image, boxes, self.input_size)
        crops = [crop.flip(-1) if torch.rand(()) < FLIP_P else crop for crop in crops]
        if self.defer:
            return list(zip(crops, parameters, strict=True))
        return [augment(c[None], p[None])[0] for c, p in zip(crops, parameters, strict=True)]

    def finish(self, views: list, device: torch.device) -> list[Tensor]:
        """Two views [N, 3, S, S] on the device, from batches of what a call returns."""
        if not self.defer:
            return to_device(views, device)
        return [augment(to_device(crops, device), parameters) for crops, parameters in views]


def pretrain_transform(input_size: int, device: torch.device | None = None) -> TwoCrops:
    """Two views, augmented on the device if that is a GPU, else where the transform is called."""
    return TwoCrops(input_size, defer=device is not None and device.type == "cuda")


def cut(image: Image.Image, boxes: list[tuple[int, int, int, int]], size: int) -> list[Tensor]:
    """Crops, resized to uint8 [3, size, size] with antialiasing.

    A JPEG that is not decoded yet is decoded at the smallest scale (1, 1/2, 1/4, 1/8) that no crop
    has to be magnified from.

    Args:
        boxes: (top, left, height, width) in pixels.
    """
    width, height = image.size
    shrink = min(side // size for box in boxes for side in box[2:])
    pixels = decode(image, shrink)[None]
    down, right = pixels.shape[2] / height, pixels.shape[3] / width

    crops = []
    for top, left, tall, wide in boxes:
        rows = slice(round(top * down), round((top + tall) * down))
        columns = slice(round(left * right), round((left + wide) * right))
        crop = pixels[:, :, rows, columns]
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0])
    return crops


def decode(image: Image.Image, shrink: int = 1) -> Tensor:
    """An image's pixels, uint8 [3, H, W]; a JPEG's at 1/2, 1/4, 1/8 where `shrink` is as much.

    Raises:
        OSError: the file is broken.
    """
    if shrink > 1:
        width, height = image.size
        image.draft("RGB", (width // shrink, height // shrink))  # nothing but a JPEG obeys
    if image.mode != "RGB":
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
