"""The two-view augmentation (SimCLR, Chen et al. 2020, as in the public CAN release)."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image

from util.datasets import IMAGENET_MEAN, IMAGENET_STD


class TwoCropTransform:
    """Two independent draws of one random transform."""

    def __init__(self, transform: Callable):
        self.transform = transform

    def __call__(self, image: Any) -> list:
        return [self.transform(image), self.transform(image)]


class GaussianBlur:
    """Blurs by a Gaussian whose sigma, in pixels, is uniform in a range; kernel of 3 sigma."""

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0)):
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = torch.empty(1).uniform_(*self.sigma).item()
        # no kernel may reach past the image's reflected border
        radius = min(math.ceil(3 * sigma), min(image.size) - 1)
        return TF.gaussian_blur(image, 2 * radius + 1, sigma)


def pretrain_transform(input_size: int) -> TwoCropTransform:
    """From a PIL image to two views [3, input_size, input_size], normalised."""
    return TwoCropTransform(
        T.Compose(
            [
                T.RandomResizedCrop(input_size, scale=(0.2, 1.0)),
                T.RandomHorizontalFlip(),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.RandomApply([GaussianBlur((0.1, 2.0))], p=0.5),
                T.ToTensor(),
                T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
    )
