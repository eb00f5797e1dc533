"""The model sizes, one table for `mae_vit_*` (model_mae) and `vit_*` (model_vit)."""

from typing import NamedTuple


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
SIZES = {
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
    """Patch size in pixels of a model by its full name."""
    return SIZES[size_name(model)].patch_size
