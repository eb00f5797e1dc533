"""A checkpoint's encoder as timm's own ViT: for export, embeddings and pictures.

Shapes: N images, C channels, H x W pixels, L patches, D width.
"""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from util.errors import UserError
from util.recipes import trains_patches
from util.sizes import SIZES, Side, check_patches, height_width, image_size, size_of
from util.weights import check_same, encoder_part, fit_input


def timm_arguments(weights: dict[str, Tensor], source: str, flags: dict[str, Any]) -> dict:
    """The arguments of `timm.create_model` for an encoder's weights, trained with flags.

    Raises:
        UserError: they are of no size in `SIZES`, or have no position embeddings.
    """
    name = size_of(weights, source)
    _, in_chans, patch, _ = weights["patch_embed.proj.weight"].shape
    height, width = image_size(weights, source, flags)
    arguments = {"model_name": f"vit_{name}_224", "num_classes": 0}
    if not timm.is_model(arguments["model_name"]):
        stock = SIZES["tiny_patch16"].encoder()
        arguments["model_name"] = "vit_tiny_patch16_224"
        arguments |= {k: v for k, v in SIZES[name].encoder().items() if v != stock[k]}
    if patch != arguments.get("patch_size", SIZES[name].patch_size):
        arguments["patch_size"] = patch
    if (height, width) != (224, 224):
        arguments["img_size"] = height if height == width else (height, width)
    if in_chans != 3:
        arguments["in_chans"] = in_chans
    if "fc_norm.weight" in weights:
        arguments["global_pool"] = "avg"
    elif trains_patches(flags):  # pretrained, or a probe's
        arguments |= {"global_pool": "avg", "fc_norm": False}
    return arguments


class Encoder(nn.Module):
    """Images [N, C, H, W] -> cls [N, D] and the mean over patches [N, D].

    Args:
        state: `load_published`'s, of any checkpoint.
        source: where it comes from, for messages.
        input_size: other than it was trained with; positions are resized.
    Raises:
        UserError: no encoder of a known size.
    """

    def __init__(self, state: dict[str, Any], source: str, input_size: Side | None = None):
        super().__init__()
        flags = state.get("args", {})
        weights, _ = encoder_part(state["model"])
        arguments = timm_arguments(weights, source, flags)
        if input_size:
            arguments["img_size"] = height_width(input_size)
            try:
                check_patches(input_size, weights["patch_embed.proj.weight"].shape[-1])
            except ValueError as error:
                raise UserError(str(error)) from None
        self.vit = timm.create_model(**arguments)
        fit_input(self.vit, weights, source, flags)
        check_same(self.vit.state_dict(), weights, source)
        self.vit.load_state_dict(weights)
        self.eval()

    def tokens(self, imgs: Tensor) -> Tensor:
        """[N, 1 + L, D], after the encoder's last norm, if it has one there."""
        return self.vit.forward_features(imgs)

    @torch.no_grad()
    def forward(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.tokens(imgs)
        # One that was fine-tuned with pooling normalises after it.
        return tuple(self.vit.fc_norm(part) for part in (tokens[:, 0], tokens[:, 1:].mean(dim=1)))
