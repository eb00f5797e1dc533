"""The downstream ViT, on timm's, with the parameter names of pretraining's encoder.

Shapes: N images, C channels, H x W pixels, D encoder width.
"""

import argparse
from functools import partial
from typing import Any

import timm.models.vision_transformer
import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from util.sizes import SIZES, height_width, size_name
from util.weights import NORM_LAYER, initialize_encoder


class VisionTransformer(timm.models.vision_transformer.VisionTransformer):
    """Classifies the cls token, or the mean patch token.

    Args:
        global_pool: classify the mean over patches (without cls) instead of the cls token.
        fc_norm: normalise after pooling, with a norm of its own, instead of before it; None: if
            `global_pool`, as in MAE's fine-tuning.
        **kwargs: timm's.
    """

    def __init__(self, global_pool: bool = False, fc_norm: bool | None = None, **kwargs):
        kwargs.setdefault("norm_layer", NORM_LAYER)
        pool = "avg" if global_pool else "token"
        super().__init__(global_pool=pool, fc_norm=fc_norm, **kwargs)
        initialize_encoder(self)

    def features(self, imgs: Tensor) -> Tensor:
        """What the head classifies, [N, D], of images [N, C, H, W]."""
        return self.forward_head(self.forward_features(imgs), pre_logits=True)


class LinearProbe(VisionTransformer):
    """A frozen encoder and a linear classifier; uses the pretrained norm, with `global_pool` too.

    The features are standardised by a BatchNorm without parameters (MAE, appendix A.1).
    """

    def __init__(self, num_classes: int, **kwargs):
        super().__init__(num_classes=0, fc_norm=False, **kwargs)
        self.requires_grad_(False)
        self.head = nn.Sequential(
            nn.BatchNorm1d(self.embed_dim, affine=False, eps=1e-6),
            nn.Linear(self.embed_dim, num_classes),
        )
        _initialize_head(self.head[1], std=0.01)
        self.train()

    @torch.no_grad()
    def features(self, imgs: Tensor) -> Tensor:
        return super().features(imgs)

    def forward(self, imgs: Tensor) -> Tensor:
        return self.head(self.features(imgs))

    def train(self, mode: bool = True) -> "LinearProbe":
        """Sets the head's mode; the encoder stays in evaluation mode."""
        super().train(False)
        self.head.train(mode)
        self.training = mode
        return self


def _initialize_head(head: nn.Linear, std: float) -> None:
    trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)


MODELS = {
    f"vit_{name}": partial(VisionTransformer, **size.encoder()) for name, size in SIZES.items()
}
globals().update(MODELS)  # for `from model_vit import vit_base_patch16`


def input_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What flags say of a model's input."""
    sizes = {"img_size": height_width(args.input_size), "patch_size": args.patch_size}
    return sizes | {"in_chans": args.in_chans or 3}


def build_model(args: argparse.Namespace, num_classes: int) -> VisionTransformer:
    """The classifier that main_finetune.py's flags describe."""
    model = MODELS[args.model](
        **input_arguments(args),
        global_pool=args.global_pool,
        drop_path_rate=args.drop_path,
        num_classes=num_classes,
    )
    _initialize_head(model.head, std=2e-5)
    return model


def build_probe(args: argparse.Namespace, num_classes: int) -> LinearProbe:
    """The probe that main_linprobe.py's flags describe."""
    return LinearProbe(
        **SIZES[size_name(args.model)].encoder() | input_arguments(args),
        global_pool=args.global_pool,
        num_classes=num_classes,
    )
