"""How an encoder's weights begin, in pretraining and where it is trained from scratch."""

from functools import partial

import torch
from torch import nn

from util.pos_embed import get_2d_sincos_pos_embed

NORM_LAYER = partial(nn.LayerNorm, eps=1e-6)  # MAE's, of encoder and decoder


def initialize_encoder(model: nn.Module) -> None:
    """MAE's: Xavier-uniform linear layers (the patch embedding too), cls token of std 0.02.

    Args:
        model: has `patch_embed`, `cls_token` and `pos_embed`; all of its linear layers are set.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.data.flatten(1))
    nn.init.normal_(model.cls_token, std=0.02)
    set_positions(model.pos_embed, model.patch_embed.grid_size)


def set_positions(embedding: nn.Parameter, grid_size: tuple[int, int]) -> None:
    """Fills [1, 1 + L, D] with the sine-cosine position embeddings."""
    values = get_2d_sincos_pos_embed(embedding.shape[-1], grid_size, cls_token=True)
    embedding.data.copy_(torch.from_numpy(values))
