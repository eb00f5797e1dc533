"""Pixels of any depth and number of channels, read as the file has them, on one scale.

Shapes: C channels, H x W pixels.
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor

from util.data.images import (
    UPRIGHT,
    BadImage,
    NotPillows,
    channels_first,
    content_of,
    import_tifffile,
    is_deep,
    orientation,
    to_8_bits,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # TIFF's
GREY = np.float32([0.299, 0.587, 0.114])  # of RGB, as Pillow's
ALPHA = ("LA", "RGBA", "La", "RGBa")  # modes of Pillow's with alpha
# What makes an array upright, by EXIF orientation.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr, 3: partial(np.rot90, k=2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: partial(np.rot90, k=-1), 7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: np.rot90,
}  # fmt: skip


@dataclass(frozen=True)
class Pixels:
    """What the pixels of a run's files become.

    Args:
        in_chans: C. Grey files become RGB for 3, and RGB ones grey for 1; alpha is dropped unless
            it is one of the C channels.
        pages: of a file with several: `first`, or as `channels`.
        scale: the values that become 0 and 1, or `dtype`: the ends of each file's own integer type.
            None: 8 bits, of all files, which Pillow decodes.
        mean, std: of each channel on that scale, to normalise by.
    """

    in_chans: int = 3
    pages: str = "first"
    scale: tuple[float, float] | str | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @classmethod
    def of(cls, args: argparse.Namespace | dict[str, Any]) -> "Pixels":
        """Those that flags describe, once they are resolved by `settle_pixels`."""
        flags = args if isinstance(args, dict) else vars(args)
        chans, scale = flags.get("in_chans") or 3, flags.get("pixel_range")
        if chans not in (1, 3) or flags.get("pages") == "channels":
            scale = scale or "dtype"
        mean = flags.get("pixel_mean") or (IMAGENET_MEAN if chans == 3 else (0.5,) * chans)
        std = flags.get("pixel_std") or (IMAGENET_STD if chans == 3 else (0.25,) * chans)
        scale = tuple(scale) if isinstance(scale, list) else scale
        return cls(chans, flags.get("pages") or "first", scale, tuple(mean), tuple(std))

    @property
    def has_colours(self) -> bool:
        """Whether saturation, hue and grey mean anything."""
        return self.in_chans == 3

    @property
    def mode(self) -> str:
        """Pillow's name for what it decodes."""
        return "L" if self.in_chans == 1 else "RGB"

    def load(self, image: Image.Image | NotPillows) -> Image.Image | Tensor:
        """An image of 8 bits and `mode`, or else a tensor as `decode`'s.

        Raises:
            BadImage: the file is broken, or has another number of channels.
        """
        return to_8_bits(image, self.mode) if self.scale is None else self.decode(image)

    def decode(self, image: Image.Image | NotPillows, shrink: int = 1) -> Tensor:
        """Upright pixels [C, H, W]: uint8 where all files have 8 bits, else float32 in 0 .. 255.

        Args, raises: as `load`, and as `to_8_bits`.
        """
        if self.scale is None:
            array = np.array(to_8_bits(image, self.mode, shrink))
            return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)
        array, kind = read_array(image, self.pages)
        given = isinstance(self.scale, tuple) and array.dtype.kind != "b"
        low, high = self.scale if given else dtype_range(array)
        values = (array.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
        values = np.nan_to_num(values, nan=0.0).clip(0, 255)
        values = fit_channels(values, kind, self.in_chans)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

    def as_tensor(self, image: Image.Image | Tensor) -> Tensor:
        """What `load` returns, as `decode` would: [C, H, W] in 0 .. 255."""
        return image if isinstance(image, Tensor) else TF.pil_to_tensor(image)

    def finish(self, images: Tensor, device: torch.device) -> Tensor:
        """The model's input [N, C, H, W] on a device, from a batch of `as_tensor`'s."""
        images = images.to(device, non_blocking=True) / 255
        # Not `TF.normalize`, for which the host would wait for a GPU.
        for channel, mean, std in zip(images.unbind(1), self.mean, self.std, strict=True):
            channel.sub_(mean).div_(std)
        return images

    def normalise(self, image: Image.Image | Tensor) -> Tensor:
        """The model's input [C, H, W] from what `load` returns; the last step of a transform."""
        scaled = image / 255 if isinstance(image, Tensor) else TF.to_tensor(image)
        return TF.normalize(scaled, self.mean, self.std)


RGB = Pixels()  # of 8 bits


def dtype_range(array: np.ndarray) -> tuple[float, float]:
    """The ends of an unsigned integer type.

    Raises:
        BadImage: signed and floating-point pixels have no known range.
    """
    if array.dtype.kind == "b":
        return 0.0, 1.0
    if array.dtype.kind != "u":
        why = f"{array.dtype} pixels have no known range: --pixel_range LOW HIGH, or auto"
        raise BadImage(why)
    return 0.0, float(np.iinfo(array.dtype).max)


def fit_channels(array: np.ndarray, kind: str, in_chans: int) -> np.ndarray:
    """[H, W, C] of the channels that the model takes.

    Args:
        kind: `read_array`'s.
    Raises:
        BadImage: there are others.
    """
    found = array.shape[2]
    array = without_alpha(array, kind, in_chans)
    if array.shape[2] == in_chans:
        return array
    if in_chans == 1 and array.shape[2] == 3 and kind != "bands":
        return (array @ GREY)[..., None]
    if in_chans == 3 and array.shape[2] == 1:
        return array.repeat(3, axis=2)
    raise BadImage(f"{found} channels, not {in_chans}: --in_chans {found} reads them")


def without_alpha(array: np.ndarray, kind: str, in_chans: int) -> np.ndarray:
    """What `read_array` returns, but alpha only where it is one of the model's channels."""
    return array[..., :-1] if kind == "alpha" and array.shape[2] != in_chans else array


def read_array(image: Image.Image | NotPillows, pages: str = "first") -> tuple[np.ndarray, str]:
    """A file's own values [H, W, C], upright, and what its channels are.

    Returns:
        Values of the file's type; and "colour" (grey or RGB), "alpha" (these and alpha), "bands".
    Raises:
        BadImage: the file is broken, or its format needs a library that is not there.
    """
    try:
        array, kind = _read(image, pages)
        turn = TURNS.get(orientation(image))
        return (turn(array) if turn else array), kind
    except BadImage:
        raise
    except Exception as error:  # readers raise all kinds for broken files
        raise BadImage(error) from None


def _read(image: Image.Image | NotPillows, pages: str) -> tuple[np.ndarray, str]:
    source = content_of(image)
    if isinstance(image, NotPillows) and image.format == "NPY":
        array = channels_last(np.asarray(image.open()))
        return array, "colour" if array.shape[2] in (1, 3) else "bands"
    if image.format == "TIFF" and source and (pages == "channels" or not pillow_keeps(image)):
        return _read_tiff(source, pages)
    if image.format == "PPM" and is_deep(image) and image.mode == "RGB":
        raise BadImage("16 bits of each colour are not read from this format; PNG and TIFF are")
    if pages == "channels" and getattr(image, "n_frames", 1) > 1:
        frames = [image.seek(i) or np.array(image.convert("L")) for i in range(image.n_frames)]
        return np.stack(frames, axis=2), "bands"
    if image.format == "PNG" and source and is_deep(image) and not image.mode.startswith("I"):
        return _read_png(source)  # Pillow would halve the bits of RGB
    image.load()
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode not in ("1", "L", "F", "RGB", *ALPHA) and not image.mode.startswith("I"):
        image = image.convert("RGB")
    array = np.asarray(image)
    if image.mode == "I":  # a PGM's or PNG's 16 bits
        array = array.clip(0, 65535)
    if image.mode.startswith("I"):
        array = array.astype(np.uint16)
    return array.reshape(*array.shape[:2], -1), "alpha" if image.mode in ALPHA else "colour"


def pillow_keeps(image: Image.Image | NotPillows) -> bool:
    """Whether Pillow reads all values of a TIFF: of 8 bits, grey of 16 bits, floating."""
    if isinstance(image, NotPillows):
        return False
    deep = image.mode.startswith("I;16") or image.mode == "F"
    deep &= image.tag_v2.get(PHOTOMETRIC) != WHITE_IS_ZERO and orientation(image) == UPRIGHT
    return not is_deep(image) or deep


def _read_png(source: str | BytesIO) -> tuple[np.ndarray, str]:
    from torchvision.io import ImageReadMode, decode_image

    content = np.fromfile(source, np.uint8) if isinstance(source, str) else source.getbuffer()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another package will have this one day
        array = decode_image(torch.from_numpy(np.array(content)), ImageReadMode.UNCHANGED)
        array = array.permute(1, 2, 0).numpy()
    return array, "colour" if array.shape[2] in (1, 3) else "alpha"


def _read_tiff(source: str | BytesIO, pages: str) -> tuple[np.ndarray, str]:
    with import_tifffile().TiffFile(source) as file:
        first = file.pages[0]
        chosen = file.pages if pages == "channels" else [first]
        try:
            planes = [channels_last(page.asarray(), page.axes) for page in chosen]
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            raise BadImage("this TIFF's compression needs pip install imagecodecs") from None
        if first.photometric.name == "MINISWHITE" and first.dtype.kind == "u":
            planes = [np.iinfo(plane.dtype).max - plane for plane in planes]
        if len(planes) > 1:
            return np.concatenate(planes, axis=2), "bands"
        if planes[0].shape[2] == 1 or first.photometric.name == "RGB":
            extra = [int(kind) for kind in getattr(first, "extrasamples", ())]
            if not extra:
                return planes[0], "colour"
            if len(extra) == 1 and extra[0] in (1, 2):  # alpha, by the standard
                return planes[0], "alpha"
        return planes[0], "bands"


def channels_last(array: np.ndarray, axes: str = "") -> np.ndarray:
    """[H, W, C] of an array whose channels stand first, last, or nowhere."""
    if array.ndim == 2:
        return array[..., None]
    return np.moveaxis(array, 0, -1) if channels_first(array.shape, axes) else array
