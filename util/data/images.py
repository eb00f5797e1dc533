"""Image files: opened and decoded in one way everywhere; what is no image is refused."""

import os
import stat
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

# Read by content. Pillow knows more formats, such as EPS, for which it runs programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
UPRIGHT = 1  # EXIF orientation
SIDEWAYS = (5, 6, 7, 8)  # orientations whose width is the upright image's height

# Pillow's warnings about odd files; each loader process would repeat them.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """A file that is not an image, is broken, or is too large to be decoded."""

    def __init__(self, error: Exception | str):
        line = (str(error) or type(error).__name__).splitlines()[0]
        super().__init__(line)


def open_image(file: str | BinaryIO) -> Image.Image:
    """An image that is not decoded yet.

    Raises:
        BadImage: no image, or one of more pixels than Pillow decodes (179 million).
    """
    try:
        if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):
            raise BadImage("not a regular file")  # reading a pipe would block
        return Image.open(file, formats=FORMATS)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("unknown format") from None
    except Exception as error:  # Pillow's readers raise all kinds for broken files
        raise BadImage(error) from None


def orientation(image: Image.Image) -> int:
    """An image's EXIF orientation; `UPRIGHT` if it has none that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    except Exception:  # broken EXIF; the pixels may still be fine
        return UPRIGHT


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the image once it is turned upright."""
    return image.size[::-1] if orientation(image) in SIDEWAYS else image.size


def to_rgb(image: Image.Image, shrink: int = 1) -> Image.Image:
    """Decodes an image: RGB of 8 bits, upright, without alpha.

    16 bits are scaled to 8; transparent pixels get the colour that the file gives them.

    Args:
        shrink: a JPEG is decoded at the smallest scale of 1, 1/2, 1/4, 1/8 not below 1/shrink.
    Raises:
        BadImage: the file is broken, or its pixels have no known range.
    """
    try:
        if shrink > 1:
            width, height = image.size
            image.draft("RGB", (width // shrink, height // shrink))  # affects only JPEGs
        image.load()
        if orientation(image) != UPRIGHT:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # I;16 and its kin, or I, which holds a PGM's 16 bits
            values = np.asarray(image).clip(0, 65535).astype(np.uint32)
            image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise BadImage(error) from None


def decode(image: Image.Image, shrink: int = 1) -> Tensor:
    """An image's pixels, uint8 [3, H, W], upright; arguments as for `to_rgb`."""
    return torch.from_numpy(np.array(to_rgb(image, shrink))).permute(2, 0, 1)


def read_image(
    dataset: Dataset, index: int, transform: Callable[[Image.Image], Any]
) -> tuple[Any, int]:
    """A transformed RGB image and its label.

    A transform with `decodes` set gets the image before it is decoded.

    Raises:
        BadImage: the file is not a readable image.
    """
    try:
        image, label = dataset[index]
    except Exception as error:  # torchvision's own datasets open, and some decode, in here
        raise BadImage(error) from None
    return transform(image if getattr(transform, "decodes", False) else to_rgb(image)), label


def name_of(dataset: Dataset, index: int) -> str:
    """An image's file if the dataset names it, else its number."""
    return dataset.samples[index][0] if hasattr(dataset, "samples") else f"image {index}"
