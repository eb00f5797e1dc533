"""Transforms of one image at a time, for evaluation, probing and fine-tuning.

Each takes an image as `open_image` returns it, decoded or not, and ends with the model's input
[C, H, W], normalised; the probe's with pixels, a quarter of the bytes, for the device to normalise.
"""

import argparse
import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor

from util.crop import Box, RandomResizedCrop, TorchCrop, at_least_one_pixel
from util.data.pixels import RGB, Pixels
from util.errors import UserError
from util.sizes import Side, height_width

logger = logging.getLogger(__name__)

BICUBIC = T.InterpolationMode.BICUBIC
CROP_ASPECT = (3 / 4, 4 / 3)  # width by height, of crops for square inputs
CROP_SCALE = (0.08, 1.0)  # share of the image's area, of timm's and torchvision's crops


def eval_transform(
    input_size: Side, crop: float | None = None, pixels: Pixels = RGB, resize: str = "crop"
) -> T.Compose:
    """Without augmentation.

    Args:
        input_size: a side in pixels, or (H, W).
        crop: the centre crop's size as a share of the resized image's; None for MAE's, 224/256 up
            to 224 pixels, 1 for larger ones.
        resize: what fits other shapes to the input's: `crop` cuts off what stands over, `squash`
            changes the aspect, `pad` adds grey (the mean) at two sides.
    """
    height, width = height_width(input_size)
    if resize == "squash":
        steps = [T.Resize((height, width), BICUBIC)]
    elif resize == "pad":
        return T.Compose([pixels.load, Fit(height, width), pixels.normalise, Pad(height, width)])
    else:
        crop = crop or (224 / 256 if max(height, width) <= 224 else 1.0)
        tall, wide = int(height / crop), int(width / crop)
        cover = T.Resize(tall, BICUBIC) if height == width else Fit(tall, wide, max)
        middle = Middle(max(height / width, width / height))
        steps = [middle, cover, T.CenterCrop((height, width))]
    return T.Compose([pixels.load, *steps, pixels.normalise])


def eval_transform_of(args: argparse.Namespace, crop: float | None = None) -> T.Compose:
    """The one that flags describe."""
    return eval_transform(args.input_size, crop, Pixels.of(args), args.resize)


class Middle:
    """Where the centre crop of a strip lies; resizing all of a very long one would fill memory.

    Args:
        aspect: of the input, its longer side by its shorter.
    """

    def __init__(self, aspect: float):
        self.aspect = aspect

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        _, height, width = TF.get_dimensions(image)
        longest = math.ceil(16 * self.aspect * min(height, width))
        return TF.center_crop(image, [min(height, longest), min(width, longest)])


class Fit:
    """Resizes, with the same aspect, to the largest size within H x W; for `max`, to cover it."""

    def __init__(self, height: int, width: int, choose: Callable = min):
        self.height, self.width, self.choose = height, width, choose

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        _, height, width = TF.get_dimensions(image)
        scale = self.choose(self.height / height, self.width / width)
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        return TF.resize(image, size, BICUBIC, antialias=True)


class Pad:
    """Adds zeros, the mean of normalised pixels, around a tensor [C, h, w] until it is H x W."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width

    def __call__(self, image: Tensor) -> Tensor:
        down, right = self.height - image.shape[1], self.width - image.shape[2]
        return F.pad(image, (right // 2, right - right // 2, down // 2, down - down // 2))


class Turn:
    """Turns by a random multiple of 90 degrees; of 180 where the image is no square."""

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        _, height, width = TF.get_dimensions(image)
        turns = torch.randint(4, ()).item() if height == width else 2 * torch.randint(2, ()).item()
        if isinstance(image, Tensor):
            return torch.rot90(image, turns, (-2, -1))
        return image.rotate(90 * turns)


def crop_ratio(input_size: Side) -> tuple[float, float]:
    """The range of a random crop's width by its height, for an input size."""
    height, width = height_width(input_size)
    return tuple(ratio * (width / height) for ratio in CROP_ASPECT)


def flips(flip: str | None, rotate90: bool) -> list:
    """The transforms of --flip and --rotate90."""
    steps = [T.RandomHorizontalFlip()] if flip != "none" else []
    steps += [T.RandomVerticalFlip()] if flip == "both" else []
    return [*steps, Turn()] if rotate90 else steps


def probe_transform(
    input_size: Side, pixels: Pixels = RGB, flip: str | None = None, rotate90: bool = False
) -> T.Compose:
    """The linear probe's weak augmentation; not normalised, see `Pixels.finish`."""
    size, ratio = height_width(input_size), crop_ratio(input_size)
    crop = RandomResizedCrop(size, ratio=ratio, interpolation=BICUBIC)
    return T.Compose([pixels.load, crop, *flips(flip, rotate90), pixels.as_tensor])


def probe_transform_of(args: argparse.Namespace) -> T.Compose:
    """The one that flags describe."""
    return probe_transform(args.input_size, Pixels.of(args), args.flip, args.rotate90)


def build_transform(is_train: bool, args: argparse.Namespace) -> T.Compose:
    """Fine-tuning's transform: timm's, patched; of RGB of 8 bits.

    Of other images only crops, flips, turns and erasing, without timm's policies.

    Args:
        args: input_size, resize and what `Pixels.of` takes; for training also color_jitter, aa,
            reprob, remode, recount, flip, rotate90.
    Raises:
        UserError: --aa is not a timm policy, or its numbers do not work.
    """
    pixels = Pixels.of(args)
    if not is_train:
        return eval_transform_of(args)
    if pixels.scale is not None or pixels.in_chans != 3:
        if args.aa or args.color_jitter:
            logger.info("--aa and --color_jitter are for RGB of 8 bits: not used for these images")
        size, ratio = height_width(args.input_size), crop_ratio(args.input_size)
        crop = TorchCrop(size, CROP_SCALE, ratio, interpolation=BICUBIC)
        erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device="cpu")
        steps = [crop, *flips(args.flip, args.rotate90), pixels.normalise, erase]
        return T.Compose([pixels.load, *steps])
    crop, *steps = _timm_transform(args, pixels).transforms
    turn = [Turn()] if args.rotate90 else []
    return T.Compose([pixels.load, crop, *turn, *steps])


def _timm_transform(args: argparse.Namespace, pixels: Pixels) -> T.Compose:
    """timm's for training, which has been tried; raises as `build_transform`."""
    try:
        transform = create_transform(
            height_width(args.input_size),
            is_training=True,
            ratio=crop_ratio(args.input_size),
            hflip=0.5 if args.flip != "none" else 0.0,
            vflip=0.5 if args.flip == "both" else 0.0,
            color_jitter=args.color_jitter,
            auto_augment=args.aa or None,
            interpolation="bicubic",
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            mean=pixels.mean,
            std=pixels.std,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"--aa {args.aa} is not a timm policy: {error}") from None
    for step in transform.transforms:
        if isinstance(step, RandomResizedCropAndInterpolation):
            step.get_params = _crop_params
        for op in itertools.chain(getattr(step, "ops", []), *getattr(step, "policy", [])):
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
    try:
        transform(Image.new("RGB", height_width(args.input_size)))
    except Exception as error:  # of any class: timm checks a policy's numbers when it uses them
        raise UserError(f"--aa {args.aa} does not work: {error or type(error).__name__}") from None
    return transform


def _crop_params(image: Image.Image, *ranges: Any) -> Box:
    box = RandomResizedCropAndInterpolation.get_params(image, *ranges)
    return at_least_one_pixel(image, box)


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    # At the ends of its scale timm asks for 0 bits, a black image, which newer Pillow refuses.
    return posterize(image, max(bits, 1), **kwargs)
