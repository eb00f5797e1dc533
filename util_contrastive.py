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

from util.crop import Box, TorchCrop
from util.data.augment import AFTER, BEFORE, BLUR_RADIUS, IDENTITY, augment
from util.data.images import NotPillows, upright_size
from util.data.loader import to_device
from util.data.pixels import RGB, Pixels
from util.data.transforms import Turn, crop_ratio
from util.recipes import RECIPES
from util.sizes import Side, height_width

# The recipe: strengths are SimCLR's, as in the public CAN release.
CROP_SCALE = tuple(RECIPES["release"]["crop_scale"])  # share of the image's area
FLIP_P, JITTER_P, GREY_P, BLUR_PROB = 0.5, 0.8, 0.2, 0.5
JITTER_STRENGTH = RECIPES["release"]["jitter_strength"]
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
        order, *factors, h = jitter.get_params(*ranges)
        b, c, s = (1.0 if factor is None else factor for factor in factors)  # None: strength 0
        blends = {0: (b, 0.0, 0.0), 1: (c, 0.0, 1 - c), 2: (s, 1 - s, 0.0)}
        slot = before
        for operation in order.tolist():
            if operation == 3:
                hue, slot = h or 0.0, after
            else:
                slot.append(blends[operation])
    before += [IDENTITY] * (BEFORE - len(before))
    after += [IDENTITY] * (AFTER - 1 - len(after))
    after.append((0.0, 1.0, 0.0) if torch.rand(()).item() < GREY_P else IDENTITY)
    sigma = 0.0
    if torch.rand(()).item() < blur_prob:
        sigma = torch.empty(()).uniform_(*BLUR_SIGMA).item()
    return torch.tensor([v for blend in before + after for v in blend] + [hue, sigma])


UNCHANGED = torch.tensor((*IDENTITY * (BEFORE + AFTER), 0.0, 0.0))


def without_colours(parameters: Tensor) -> Tensor:
    """Parameters [23] without saturation, hue and greyscale, which only RGB has."""
    blends = parameters[:-2].unflatten(0, (-1, 3)).clone()
    blends[blends[:, 1] != 0] = torch.tensor(IDENTITY)
    return torch.cat([blends.flatten(), parameters.new_zeros(1), parameters[-1:]])


class TwoCrops:
    """Two views [C, H, W], float32, normalised, of an image, best one that is not decoded yet.

    Args:
        input_size: a side in pixels, or (H, W).
        defer: leave all but the cropping to `finish`, for whole batches. A view is then a crop
            [C, H, W], as `Pixels.decode` has it, and the parameters [23] drawn for it.
        blur_prob: how often a view is blurred.
        crop_scale: the range of a crop's share of the image's area.
        jitter_strength: of the colours; 1 is SimCLR's.
        pixels: of the files.
        level: `ssl` is SimCLR's augmentation; `weak` only crops, flips and turns; `none` shows the
            middle of the image, twice.
        flip, rotate90: --flip and --rotate90.
        compiled: on a GPU, compile what `finish` does.
    """

    def __init__(
        self,
        input_size: Side,
        defer: bool = False,
        blur_prob: float = BLUR_PROB,
        crop_scale: tuple[float, float] = CROP_SCALE,
        jitter_strength: float = JITTER_STRENGTH,
        pixels: Pixels = RGB,
        level: str = "ssl",
        flip: str | None = None,
        rotate90: bool = False,
        compiled: bool = False,
    ):
        self.compiled = compiled
        self.size, self.aspect = height_width(input_size), crop_ratio(input_size)
        self.defer, self.blur_prob = defer, blur_prob
        self.crop_scale, self.jitter = crop_scale, color_jitter(jitter_strength)
        self.pixels, self.level, self.rotate90 = pixels, level, rotate90
        self.flip = flip or ("none" if level == "none" else "horizontal")

    def __call__(
        self, image: Image.Image | NotPillows
    ) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
        width, height = upright_size(image)
        canvas = torch.empty(1, height, width, device="meta")  # a size, and no pixels
        boxes, parameters = [], []
        for _ in range(2):
            if self.level == "none":
                boxes.append(middle_box(height, width, self.size[1] / self.size[0]))
            else:
                boxes.append(TorchCrop.get_params(canvas, self.crop_scale, self.aspect))
            parameters.append(
                draw_parameters(self.blur_prob, self.jitter) if self.level == "ssl" else UNCHANGED
            )
        crops = [self._turned(crop) for crop in cut(image, boxes, self.size, self.pixels)]
        if not self.pixels.has_colours:
            parameters = list(map(without_colours, parameters))
        if self.defer:
            return list(zip(crops, parameters, strict=True))
        pairs = zip(crops, parameters, strict=True)
        return [self._augment(crop[None], drawn[None])[0] for crop, drawn in pairs]

    def _turned(self, crop: Tensor) -> Tensor:
        if self.flip != "none" and torch.rand(()) < FLIP_P:
            crop = crop.flip(-1)
        if self.flip == "both" and torch.rand(()) < FLIP_P:
            crop = crop.flip(-2)
        return Turn()(crop) if self.rotate90 else crop

    def _augment(self, crops: Tensor, parameters: Tensor) -> Tensor:
        mean, std = self.pixels.mean, self.pixels.std
        return augment(crops, parameters, mean, std, self.compiled)

    def finish(self, views: list, device: torch.device) -> list[Tensor]:
        """Two views [N, C, H, W] on the device, from a batch of what a call returns."""
        if not self.defer:
            return to_device(views, device)
        return [self._augment(to_device(crops, device), parameters) for crops, parameters in views]


def two_crops(args: Namespace) -> TwoCrops:
    """The views that main_pretrain.py's flags describe; batches of them are to be finished."""
    scale, jitter = tuple(args.crop_scale), args.jitter_strength
    others = {"flip": args.flip, "rotate90": args.rotate90, "compiled": args.compile}
    pixels = Pixels.of(args)
    return TwoCrops(
        args.input_size, True, args.blur_prob, scale, jitter, pixels, args.augment, **others
    )


def middle_box(height: int, width: int, aspect: float) -> Box:
    """Top, left, height and width of the largest box in the middle; aspect is width by height."""
    tall, wide = min(height, round(width / aspect)), min(width, round(height * aspect))
    tall, wide = max(tall, 1), max(wide, 1)
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def cut(
    image: Image.Image | NotPillows, boxes: list[Box], size: Side, pixels: Pixels = RGB
) -> list[Tensor]:
    """Crops [C, H, W] of a size, resized with antialiasing, as `Pixels.decode` has them.

    A JPEG that is not decoded yet is decoded at the smallest scale (1, 1/2, 1/4, 1/8) from which no
    crop has to be magnified.

    Args:
        boxes: (top, left, height, width) in pixels of the upright image.
    """
    width, height = upright_size(image)
    sizes = height_width(size)
    shrink = min(
        side // wanted for box in boxes for side, wanted in zip(box[2:], sizes, strict=True)
    )
    decoded = pixels.decode(image, shrink)[None]
    down, right = decoded.shape[2] / height, decoded.shape[3] / width

    crops = []
    for top, left, tall, wide in boxes:
        rows = slice(round(top * down), round((top + tall) * down))
        columns = slice(round(left * right), round((left + wide) * right))
        crop = decoded[:, :, rows, columns]
        crops.append(F.interpolate(crop, sizes, mode="bilinear", antialias=True)[0])
    return crops
