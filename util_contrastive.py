"""The two-view augmentation (SimCLR, Chen et al. 2020, as in the public CAN release)."""

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor

from util.data.augment import AFTER, BEFORE, BLUR_RADIUS, IDENTITY, augment
from util.data.images import decode, upright_size
from util.data.loader import to_device

# The recipe: strengths are SimCLR's, as in the public CAN release.
CROP_SCALE = (0.2, 1.0)  # share of the image's area
CROP_ASPECT = (3 / 4, 4 / 3)  # width by height
FLIP_P, JITTER_P, GREY_P, BLUR_PROB = 0.5, 0.8, 0.2, 0.5
JITTER_STRENGTH = 0.5
JITTER = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue, at strength 1
BLUR_SIGMA = (0.1, 2.0)  # pixels


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
        radius = min(math.ceil(BLUR_RADIUS * sigma), min(image.size) - 1)
        return TF.gaussian_blur(image, 2 * radius + 1, sigma)


def color_jitter(strength: float = JITTER_STRENGTH) -> T.ColorJitter:
    """The recipe's colour jitter; strength 1 is SimCLR's."""
    return T.ColorJitter(*(strength * amount for amount in JITTER))


def draw_parameters(blur_prob: float = BLUR_PROB, jitter: T.ColorJitter | None = None) -> Tensor:
    """One view's parameters [23] for `augment`, from torch's random state, as torchvision draws."""
    jitter = jitter or color_jitter()
    before, after, hue = [], [], 0.0
    if torch.rand(()).item() < JITTER_P:
        ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
        order, b, c, s, h = jitter.get_params(*ranges)
        blends = {0: (b, 0.0, 0.0), 1: (c, 0.0, 1 - c), 2: (s, 1 - s, 0.0)}
        slot = before
        for operation in order.tolist():
            if operation == 3:
                hue, slot = h, after
            else:
                slot.append(blends[operation])
    before += [IDENTITY] * (BEFORE - len(before))
    after += [IDENTITY] * (AFTER - 1 - len(after))
    after.append((0.0, 1.0, 0.0) if torch.rand(()).item() < GREY_P else IDENTITY)
    sigma = 0.0
    if torch.rand(()).item() < blur_prob:
        sigma = torch.empty(()).uniform_(*BLUR_SIGMA).item()
    return torch.tensor([v for blend in before + after for v in blend] + [hue, sigma])


class TwoCrops:
    """Two views [3, S, S], float32, normalised, of a PIL image, best one that is not decoded yet.

    Args:
        input_size: S, in pixels.
        defer: leave all but the cropping to `finish`, for whole batches. A view is then a uint8
            crop [3, S, S] and the parameters [23] drawn for it.
        blur_prob: how often a view is blurred.
        crop_scale: the range of a crop's share of the image's area.
        jitter_strength: of the colours; 1 is SimCLR's.
    """

    decodes = True  # takes images that are not decoded yet

    def __init__(
        self,
        input_size: int,
        defer: bool = False,
        blur_prob: float = BLUR_PROB,
        crop_scale: tuple[float, float] = CROP_SCALE,
        jitter_strength: float = JITTER_STRENGTH,
    ):
        self.input_size, self.defer, self.blur_prob = input_size, defer, blur_prob
        self.crop_scale, self.jitter = crop_scale, color_jitter(jitter_strength)

    def __call__(self, image: Image.Image) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
        width, height = upright_size(image)
        canvas = torch.empty(1, height, width, device="meta")  # a size, and no pixels
        boxes, parameters = [], []
        for _ in range(2):
            boxes.append(T.RandomResizedCrop.get_params(canvas, self.crop_scale, CROP_ASPECT))
            parameters.append(draw_parameters(self.blur_prob, self.jitter))
        crops = cut(image, boxes, self.input_size)
        crops = [crop.flip(-1) if torch.rand(()) < FLIP_P else crop for crop in crops]
        if self.defer:
            return list(zip(crops, parameters, strict=True))
        return [augment(c[None], p[None])[0] for c, p in zip(crops, parameters, strict=True)]

    def finish(self, views: list, device: torch.device) -> list[Tensor]:
        """Two views [N, 3, S, S] on the device, from a batch of what a call returns."""
        if not self.defer:
            return to_device(views, device)
        return [augment(to_device(crops, device), parameters) for crops, parameters in views]


def two_crops(args: Namespace) -> TwoCrops:
    """The views that main_pretrain.py's flags describe; batches of them are to be finished."""
    scale, jitter = tuple(args.crop_scale), args.jitter_strength
    return TwoCrops(args.input_size, True, args.blur_prob, scale, jitter)


def cut(image: Image.Image, boxes: list[tuple[int, int, int, int]], size: int) -> list[Tensor]:
    """Crops, resized to uint8 [3, size, size] with antialiasing.

    A JPEG that is not decoded yet is decoded at the smallest scale (1, 1/2, 1/4, 1/8) from which no
    crop has to be magnified.

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
