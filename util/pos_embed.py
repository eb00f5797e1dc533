"""Sine-cosine position embeddings, in MAE's channel order.

Shapes: D channels, H x W grid of patches, L = H * W.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def get_1d_sincos_pos_embed_from_grid(embed_dim: int, pos: np.ndarray) -> np.ndarray:
    """[M, D] embeddings of M positions: D/2 sines, then D/2 cosines (Vaswani et al. 2017)."""
    omega = 10000.0 ** (-np.arange(embed_dim // 2) / (embed_dim / 2))
    angles = np.outer(pos, omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def get_2d_sincos_pos_embed(
    embed_dim: int, grid_size: int | tuple[int, int], cls_token: bool = False
) -> np.ndarray:
    """[L, D] position embeddings of a grid, row by row, or [1 + L, D] with zeros for a cls token.

    The first half of the channels holds the column, the second the row, as in MAE (timm's own
    2-D embedding orders them otherwise, so that released checkpoints would not match it).

    Args:
        grid_size: (H, W) in patches; one number for a square.
    Raises:
        ValueError: embed_dim is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim {embed_dim} is not a multiple of 4")
    height, width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    row, column = np.indices((height, width)).reshape(2, -1)
    embedding = np.concatenate(
        [get_1d_sincos_pos_embed_from_grid(embed_dim // 2, pos) for pos in (column, row)], axis=1
    )
    return np.concatenate([np.zeros((1, embed_dim)), embedding]) if cls_token else embedding


def interpolate_pos_embed(
    model: nn.Module, checkpoint_model: dict[str, Tensor], old_grid: tuple[int, int] | None = None
) -> None:
    """Resizes a checkpoint's `pos_embed` to the model's grid; bicubic, as in MAE.

    Args:
        model: has `pos_embed` [1, 1 + L, D] and `patch_embed.grid_size`.
        checkpoint_model: changed in place; left alone where its `pos_embed` is not of `old_grid`.
        old_grid: (H, W) in patches; None for a square.
    """
    positions = checkpoint_model.get("pos_embed")
    new_grid = tuple(model.patch_embed.grid_size)
    if positions is None or positions.ndim != 3:
        return
    side = math.isqrt(max(positions.shape[1] - 1, 0))
    old_grid = old_grid or (side, side)
    if positions.shape == model.pos_embed.shape and old_grid == new_grid:
        return
    if side > 0 and 1 + math.prod(old_grid) == positions.shape[1]:
        # timm's 1.0.26 has a function for it that keeps what has as many patches in another shape.
        patches = positions[:, 1:].float().unflatten(1, old_grid).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, new_grid, mode="bicubic", align_corners=False)
        patches = patches.flatten(2).transpose(1, 2).to(positions.dtype)
        checkpoint_model["pos_embed"] = torch.cat([positions[:, :1], patches], dim=1)
