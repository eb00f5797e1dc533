"""Transforms of one image at a time, for evaluation, probing and fine-tuning."""

import argparse
import itertools
from typing import Any

import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from timm.data.transforms import RandomResizedCropAndInterpolation

from util.crop import RandomResizedCrop
from util.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TO_TENSOR = (T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD))


def eval_transform(input_size: int, crop: float | None = None) -> T.Compose:
    """From a PIL image to [3, input_size, input_size]: resized, centre crop, normalised.

    Args:
        crop: the crop's side as a share of the resized image's shorter side; None for MAE's,
            224/256 up to 224 pixels, 1 for larger ones.
    """
    if crop is None:
        crop = 224 / 256 if input_size <= 224 else 1.0
    resize = T.Resize(int(input_size / crop), T.InterpolationMode.BICUBIC)
    return T.Compose([_middle, resize, T.CenterCrop(input_size), *TO_TENSOR])


def _middle(image: Image.Image) -> Image.Image:
    # The centre crop of a strip lies in here; resizing all of a very long one would fill memory.
    longest = 16 * min(image.size)
    return TF.center_crop(image, [min(side, longest) for side in image.size[::-1]])


def probe_transform(input_size: int) -> T.Compose:
    """The linear probe's weak augmentation, from a PIL image to [3, input_size, input_size]."""
    crop = RandomResizedCrop(input_size, interpolation=T.InterpolationMode.BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(), *TO_TENSOR])


def build_transform(is_train: bool, args: argparse.Namespace) -> T.Compose:
    """Fine-tuning's transform, from a PIL image to [3, input_size, input_size]: timm's, patched.

    Args:
        args: input_size; for training also color_jitter, aa, reprob, remode, recount.
    Raises:
        UserError: --aa is not a timm policy, or its numbers do not work.
    """
    if not is_train:
        return eval_transform(args.input_size)
    try:
        transform = create_transform(
            args.input_size,
            is_training=True,
            color_jitter=args.color_jitter,
            auto_augment=args.aa or None,
            interpolation="bicubic",
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
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
        transform(Image.new("RGB", (args.input_size, args.input_size)))
    except Exception as error:  # of any class: timm checks a policy's numbers when it uses them
        raise UserError(f"--aa {args.aa} does not work: {error or type(error).__name__}") from None
    return transform


def _crop_params(image: Image.Image, *ranges: Any) -> tuple[int, int, int, int]:
    # timm's, which rounds a crop of very few pixels to none.
    top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, *ranges)
    return min(top, image.height - 1), min(left, image.width - 1), max(height, 1), max(width, 1)


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    # At the ends of its scale timm asks for 0 bits, a black image, which newer Pillow refuses.
    return posterize(image, max(bits, 1), **kwargs)
