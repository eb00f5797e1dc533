"""Image files: opened and decoded in one way everywhere; what is no image is refused."""

import os
import re
import stat
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

# Read by content. Pillow knows more formats, such as EPS, for which it runs programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
UPRIGHT = 1  # EXIF orientation
ORIENTATION, SAMPLES, SAMPLE_FORMAT = 274, 277, 339  # TIFF's tags
SIDEWAYS = (5, 6, 7, 8)  # orientations whose width is the upright image's height

# Pillow's warnings about odd files; each loader process would repeat them.
warnings.filterwarnings("ignore", module=r"PIL\.")


TIFFS = (".tif", ".tiff")


class BadImage(Exception):
    """A file that is not an image, is broken, or is too large to be decoded."""

    def __init__(self, error: Exception | str):
        line = (str(error) or type(error).__name__).splitlines()[0]
        super().__init__(line)


class NotPillows:
    """A file that Pillow does not read: an array of NumPy's, or a TIFF of many channels.

    Attributes:
        format, size: as of Pillow's images.
        source: its path or its bytes.
        orientation: EXIF's.
    Raises:
        BadImage: what is in it is no image.
    """

    def __init__(self, source: str | BytesIO, name: str):
        self.source, self.format = source, "NPY" if name.lower().endswith(".npy") else "TIFF"
        self.orientation = UPRIGHT
        if self.format == "NPY":
            array, axes = self.open(), ""
            shape, kind = array.shape, array.dtype.kind
        else:
            with import_tifffile().TiffFile(content_of(self)) as file:
                page = file.pages[0]
                shape, axes, kind = page.shape, page.axes, page.dtype.kind
                if ORIENTATION in page.tags:
                    self.orientation = int(page.tags[ORIENTATION].value)
        if len(shape) not in (2, 3) or 0 in shape or kind not in "buif":
            raise BadImage(f"an array of shape {list(shape)} and kind {kind} is no image")
        height, width = shape[1:] if channels_first(shape, axes) else shape[:2]
        self.size = width, height

    def open(self) -> np.ndarray:
        """The array, of which only what is used will be read."""
        mode = "r" if isinstance(self.source, str) else None
        return np.load(content_of(self), mmap_mode=mode, allow_pickle=False)


def content_of(image: Image.Image | NotPillows) -> str | BytesIO | None:
    """The path that an image was opened from, or its bytes, from their start; None if unknown."""
    source = getattr(image, "source", None) or getattr(image, "filename", None) or None
    return BytesIO(source.getvalue()) if isinstance(source, BytesIO) else source


def channels_first(shape: tuple[int, ...], axes: str = "") -> bool:
    """Whether an array is [C, H, W], by tifffile's axes, or where C is its shortest side."""
    return axes.startswith("S") if axes else len(shape) == 3 and shape[0] < min(shape[1:])


def import_tifffile() -> ModuleType:
    """Raises BadImage where it is not installed."""
    try:
        import tifffile
    except ImportError:
        raise BadImage("this TIFF needs a library: pip install tifffile") from None
    return tifffile


def is_deep(image: Image.Image | NotPillows) -> bool:
    """Whether a file that is not decoded yet has more than 8 bits, or more than Pillow reads."""
    if isinstance(image, NotPillows):
        return True
    if not hasattr(image, "deep"):
        read_as = str([tile[3] for tile in getattr(image, "tile", ())])
        image.deep = image.mode.startswith(("I", "F")) or ";16" in read_as or ";12" in read_as
        if image.format == "TIFF":  # bands that Pillow would drop, and signed ones
            samples, formats = image.tag_v2.get(SAMPLES, 1), image.tag_v2.get(SAMPLE_FORMAT, (1,))
            image.deep |= samples > len(image.getbands()) or set(formats) - {1} != set()
        elif image.format == "PPM":
            image.deep |= any(int(n) > 255 for n in re.findall(r"\d+", read_as))
    return image.deep


def has_pages(image: Image.Image | NotPillows) -> bool:
    """Whether a file has several frames or pages, good or broken; it may no longer be at the first.

    A phone's photo, which holds small copies of itself, has one.
    """
    try:
        return image.format != "MPO" and getattr(image, "n_frames", 1) > 1
    except Exception:  # readers raise all kinds where what follows the first is broken
        return True


def loses_bits(image: Image.Image) -> bool:
    """Whether an AVIF or a JPEG 2000 of colours has more than the 8 bits that Pillow reads."""
    content = content_of(image)
    with open(content, "rb") if isinstance(content, str) else content or BytesIO() as file:
        head = file.read(4096)
    for name, place, bits in (  # where their headers tell it
        (b"av1C", 6, lambda byte: 10 if byte & 0x40 else 8),
        (b"ihdr", 14, lambda byte: (byte & 0x7F) + 1),
        (b"\xff\x4f\xff\x51", 42, lambda byte: (byte & 0x7F) + 1),
    ):
        at = head.find(name) + place
        if place <= at < len(head):
            return bits(head[at]) > 8
    return False


def open_image(file: str | BytesIO, name: str = "") -> Image.Image | NotPillows:
    """An image that is not decoded yet.

    Args:
        file: its path or its bytes.
        name: of the file, if only its bytes are given; what Pillow does not read is told by it.
    Raises:
        BadImage: no image, or one of more pixels than Pillow decodes (179 million).
    """
    named = (file if isinstance(file, str) else name).lower()
    try:
        if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):
            raise BadImage("not a regular file")  # reading a pipe would block
        if named.endswith(".npy"):
            return NotPillows(file, named)
        image = Image.open(file, formats=FORMATS)
        image.source = file
        is_deep(image)  # which some files only tell before they are decoded
        sideways = image.format == "TIFF" and orientation(image) != UPRIGHT
        if sideways and isinstance(file, str):  # Pillow scrambles those that it maps into memory
            deep, image = image.deep, Image.open(BytesIO(Path(file).read_bytes()), formats=FORMATS)
            image.deep, image.source = deep, file  # not loaded: its orientation would be lost
        return image
    except BadImage:
        raise
    except UnidentifiedImageError:
        if named.endswith(TIFFS):
            try:
                return NotPillows(file, named)
            except BadImage:  # without the library
                raise
            except Exception:
                pass
        raise BadImage("unknown format") from None
    except Exception as error:  # Pillow's readers raise all kinds for broken files
        raise BadImage(error) from None


def orientation(image: Image.Image | NotPillows) -> int:
    """An image's EXIF orientation; `UPRIGHT` if it has none that can be read."""
    if isinstance(image, NotPillows):
        return image.orientation
    try:
        return image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    except Exception:  # broken EXIF; the pixels may still be fine
        return UPRIGHT


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the image once it is turned upright."""
    if getattr(image, "format", "") == "TIFF" and not isinstance(image, NotPillows):
        return image.size  # Pillow has turned it already
    return image.size[::-1] if orientation(image) in SIDEWAYS else image.size


def to_8_bits(image: Image.Image | NotPillows, mode: str = "RGB", shrink: int = 1) -> Image.Image:
    """Decodes an image: RGB, or grey for mode "L", of 8 bits, upright, without alpha.

    16 bits are scaled to 8; transparent pixels get the colour that the file gives them.

    Args:
        shrink: a JPEG is decoded at the smallest scale of 1, 1/2, 1/4, 1/8 not below 1/shrink.
    Raises:
        BadImage: the file is broken, or its pixels have no known range.
    """
    if isinstance(image, NotPillows):
        raise BadImage("not of 8 bits, as others are: --pixel_range dtype reads them all")
    try:
        if shrink > 1:
            size = [max(1, side // shrink) for side in image.size]
            image.draft(mode, size)  # affects only JPEGs
        image.load()
        if orientation(image) != UPRIGHT:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # I;16 and its kin, or I, which holds a PGM's 16 bits
            values = np.asarray(image).clip(0, 65535).astype(np.uint32)
            image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        return image if image.mode == mode else image.convert(mode)
    except Exception as error:
        raise BadImage(error) from None


def read_image(
    dataset: Dataset, index: int, transform: Callable[[Image.Image], Any]
) -> tuple[Any, int]:
    """A transformed image and its label; the transform decodes it.

    Raises:
        BadImage: the file is not a readable image.
    """
    try:
        image, label = dataset[index]
    except Exception as error:  # torchvision's own datasets open, and some decode, in here
        raise BadImage(error) from None
    return transform(image), label
