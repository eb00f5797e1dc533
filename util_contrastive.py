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
    BLUR_PROB,
    BLUR_SIGMA,
    GREY_P,
    JITTER,
    JITTER_P,
    augment,
    draw_parameters,
)
from util.datasets import IMAGENET_MEAN, IMAGENET_STD
from util.images import to_rgb, upright_size
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
                T.RandomApply([GaussianBlur()], p=BLUR_PROB),
                T.ToTensor(),
                T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
    )


class TwoCrops:
    """From a PIL image, best not yet decoded, to two views [3, S, S], float32, normalised.

    Args:
        input_size: S, in pixels.
        defer: leave all but the cutting to `finish`, for whole batches. A view is then a uint8
            crop [3, S, S] and the parameters [23] drawn for it.
        blur_prob: how often a view is blurred.
    """

    decodes = True  # wants images as their files hold them

    def __init__(self, input_size: int, defer: bool = False, blur_prob: float = BLUR_PROB):
        self.input_size, self.defer, self.blur_prob = input_size, defer, blur_prob

    def __call__(self, image: Image.Image) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
        width, height = upright_size(image)
        canvas = torch.empty(1, height, width, device="meta")  # a size, and no pixels
        boxes, parameters = [], []
        for _ in range(2):
            boxes.append(T.RandomResizedCrop.get_params(canvas, CROP_AREA, CROP_ASPECT))
            parameters.append(draw_parameters(self.blur_prob))
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


def pretrain_transform(
    input_size: int, device: torch.device | None = None, blur_prob: float = BLUR_PROB
) -> TwoCrops:
    """Two views; for a device, `finish` augments batches of them there."""
    return TwoCrops(input_size, device is not None, blur_prob)


def cut(image: Image.Image, boxes: list[tuple[int, int, int, int]], size: int) -> list[Tensor]:
    """Crops, resized to uint8 [3, size, size] with antialiasing.

    A JPEG that is not decoded yet is decoded at the smallest scale (1, 1/2, 1/4, 1/8) that no crop
    has to be magnified from.

    Args:
        boxes: (top, left, height, width) in pixels of the upright image.
    """
    width, height = upright_size(image)
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
    """An image's pixels, uint8 [3, H, W], upright; a JPEG's shrunk as by `to_rgb`."""
    return torch.from_numpy(np.array(to_rgb(image, shrink))).permute(2, 0, 1)
