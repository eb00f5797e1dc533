"""Image files: opened and decoded alike for every purpose, and told from what is none."""

import os
import stat
import warnings
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# By content, whatever the name says. Pillow knows more, among them EPS, which it lets run programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# How to turn an image upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LYING = (5, 6, 7, 8)  # orientations whose width is the upright image's height

# What Pillow has to say of odd files; it would come once from every loader process.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """A file that is no image, or a broken one, or too large to be decoded."""

    def __init__(self, error: Exception | str):
        line = (str(error) or type(error).__name__).splitlines()[0]
        super().__init__(line)


def open_image(file: str | BinaryIO) -> Image.Image:
    """An image that is not decoded yet.

    Raises:
        BadImage: no image, or of more pixels than Pillow decodes (179 million).
    """
    try:
        if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):
            raise BadImage("no regular file")  # a pipe would be waited for
        return Image.open(file, formats=FORMATS)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("of no known format") from None
    except Exception as error:  # of any class: Pillow's readers meet garbage unprepared
        raise BadImage(error) from None


def orientation(image: Image.Image) -> int:
    """An image's EXIF orientation, 1 (upright) where it has none that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # garbage again, which leaves the pixels as good as they were
        return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height once the image is turned upright."""
    return image.size[::-1] if orientation(image) in LYING else image.size


def to_rgb(image: Image.Image, shrink: int = 1) -> Image.Image:
    """Decodes an image: RGB of 8 bits, upright, without alpha.

    16 bits are scaled to 8; what is transparent gets the colour that the file gives it.

    Args:
        shrink: a JPEG is decoded at the scale of 1, 1/2, 1/4, 1/8 that makes it at least 1/shrink.
    Raises:
        BadImage: the file is broken, or of pixels without a known range.
    """
    turn = TURNS.get(orientation(image))
    try:
        if shrink > 1:
            width, height = image.size
            image.draft("RGB", (width // shrink, height // shrink))  # nothing but a JPEG obeys
        image.load()
        if image.mode.startswith("I"):  # I;16 and its kin, or I, which holds a PGM's 16 bits
            values = np.asarray(image).clip(0, 65535).astype(np.uint32)
            image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if image.mode != "RGB":
            image = image.convert("RGB")
        return image if turn is None else image.transpose(turn)
    except Exception as error:
        raise BadImage(error) from None
