"""The model sizes, one table for `mae_vit_*` (model_mae) and `vit_*` (model_vit)."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from util.errors import UserError

Side = int | Sequence[int]  # of square images in pixels, or (H, W)


class Size(NamedTuple):
    """Widths are in channels, `patch_size` in pixels; `decoder_*` belong to pretraining alone."""

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int

    def encoder(self) -> dict[str, int]:
        """The constructor arguments of the encoder."""
        return {k: v for k, v in self._asdict().items() if not k.startswith("decoder_")}


# Base, large and huge are MAE's (He et al. 2022) with its decoder, 8 blocks of width 512; tiny and
# small are DeiT's encoders (Touvron et al. 2021) with decoders that stay lighter than the encoder.
# Nano learns something on a CPU in minutes: for the quick start and tests.
SIZES = {
    "nano_patch4": Size(4, 96, 4, 3, 64, 1, 4),
    "tiny_patch4": Size(4, 192, 12, 3, 128, 4, 4),
    "tiny_patch16": Size(16, 192, 12, 3, 128, 4, 4),
    "small_patch16": Size(16, 384, 12, 6, 256, 8, 8),
    "base_patch16": Size(16, 768, 12, 12, 512, 8, 16),
    "large_patch16": Size(16, 1024, 24, 16, 512, 8, 16),
    "huge_patch14": Size(14, 1280, 32, 16, 512, 8, 16),
}


def size_name(model: str) -> str:
    """The key in `SIZES` of a model's full name, `mae_vit_<size>` or `vit_<size>`."""
    return model.removeprefix("mae_").removeprefix("vit_")


def patch_size(model: str) -> int:
    """Patch size in pixels of a model by its full name, where `--patch_size` gives no other."""
    return SIZES[size_name(model)].patch_size


def height_width(side: Side) -> tuple[int, int]:
    """(H, W) in pixels of `--input_size`."""
    return (side, side) if isinstance(side, int) else tuple(side)


def check_patches(side: Side, patch: int, model: str = "") -> None:
    """Raises ValueError where patches do not fill images of `--input_size`."""
    sides = height_width(side)
    if any(length % patch for length in sides):
        given = " ".join(map(str, dict.fromkeys(sides)))
        words = f"--input_size {given} is not a multiple of the patch size {patch}"
        raise ValueError(words + (f" of {model}" if model else ""))


def size_of(weights: dict[str, Any], source: str | Path) -> str:
    """The key in `SIZES` of an encoder's tensors, by their shapes; of any patch size.

    Raises:
        UserError: they are no encoder's, or of no known size.
    """
    try:
        embed_dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
    except (KeyError, ValueError):
        raise UserError(f"{source} holds no encoder of CAN or MAE") from None
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    fits = [k for k, size in SIZES.items() if (size.embed_dim, size.depth) == (embed_dim, depth)]
    if not fits:
        found = f"width {embed_dim}, depth {depth}"
        raise UserError(f"{source} has an unknown size: {found}; known are {', '.join(SIZES)}")
    return next((name for name in fits if SIZES[name].patch_size == patch), fits[0])


def image_size(
    weights: dict[str, Any], source: str | Path, flags: dict[str, Any] | None = None
) -> tuple[int, int]:
    """(H, W) in pixels of the images that an encoder's position embeddings are for.

    Args:
        flags: that it was trained with, if known; without them the images are taken for squares.
    Raises:
        UserError: it has none, or none of a square.
    """
    positions = weights.get("pos_embed")
    if positions is None or positions.ndim != 3 or positions.shape[1] < 2:
        raise UserError(f"{source} has no usable pos_embed")
    patch, patches = weights["patch_embed.proj.weight"].shape[-1], positions.shape[1] - 1
    with contextlib.suppress(KeyError, TypeError, ValueError):
        height, width = height_width(flags["input_size"])
        if (height // patch) * (width // patch) == patches:
            return height, width
    side = math.isqrt(patches) * patch
    return side, side
