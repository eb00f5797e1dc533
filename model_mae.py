"""The masked autoencoder of CAN: encoder, projection head, noise conditioning, decoder.

Shapes: N view-images, C channels, H x W pixels, p patch size, L = (H/p) (W/p) patches, K kept
patches, D encoder width, E decoder width.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loss_contrastive import projection_head
from util.errors import UserError
from util.recipes import Parts
from util.sizes import SIZES, height_width, image_size, size_of
from util.weights import NORM_LAYER, initialize_encoder, load_model, set_positions

POOLED = {"all": slice(None), "patches": slice(1, None), "cls": slice(1)}  # tokens to contrast
NOISE_EMBED_DIM = 128  # width of the release's sinusoidal embedding of the noise level
NOISE_TIME_SCALE = 1000.0  # noise levels as diffusion time steps 0 .. 1000 (Ho et al. 2020)


class MaskedAutoencoderViT(nn.Module):
    """One ViT encoder trained by contrast, reconstruction and noise prediction (CAN, figure 1).

    Parts that the objective leaves out (`contrastive`, `reconstruct`, `noise_loss` false) keep
    their parameters, so that the keys do not depend on it, but are frozen and not computed.

    Args:
        img_size: side of the images in pixels, or (H, W), multiples of `patch_size`.
        norm_pix_loss: reconstruct pixels normalised by each patch's own mean and variance.
        noise_loss: add noise to what the encoder sees, and predict it on visible patches.
        std: the largest noise level, in units of the normalised images.
        contrastive: compute the projected embedding.
        reconstruct: run the decoder; needed for reconstruction and for noise prediction.
        parts: what the two recipes of CAN choose differently.
    Raises:
        ValueError: img_size is not a multiple of patch_size, or std is negative.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        norm_pix_loss: bool = False,
        noise_loss: bool = False,
        std: float = 0.05,
        contrastive: bool = True,
        reconstruct: bool = True,
        parts: Parts = Parts(),  # noqa: B008 (frozen)
    ):
        super().__init__()
        if any(side % patch_size for side in height_width(img_size)):
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        if std < 0:
            raise ValueError(f"std {std} is negative")
        self.norm_pix_loss, self.noise_loss, self.std = norm_pix_loss, noise_loss, std
        self.contrastive, self.reconstruct, self.parts = contrastive, reconstruct, parts
        self.grad_checkpointing = False

        block = partial(Block, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
        self.patch_embed = PatchEmbed(height_width(img_size), patch_size, in_chans, embed_dim)
        tokens = 1 + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(block(embed_dim, num_heads) for _ in range(depth))
        self.norm = norm_layer(embed_dim)
        self.projection_head = projection_head(embed_dim, parts)
        level_dim = NOISE_EMBED_DIM if parts.noise_level_tokens == "visible" else embed_dim
        self.noise_pe_mlp = _mlp(level_dim, embed_dim, embed_dim)
        dim, heads = decoder_embed_dim, decoder_num_heads
        self.decoder_embed = nn.Linear(embed_dim, dim)
        mask_dim = dim if parts.mask_token_width == "decoder" else embed_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, mask_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(block(dim, heads) for _ in range(decoder_depth))
        self.decoder_norm = norm_layer(dim)
        self.decoder_pred = nn.Linear(dim, patch_size**2 * in_chans)

        self.initialize_weights()
        self._freeze_unused()

    def initialize_weights(self) -> None:
        """As in MAE, encoder (see `initialize_encoder`) and decoder alike."""
        initialize_encoder(self)
        nn.init.normal_(self.mask_token, std=0.02)
        set_positions(self.decoder_pos_embed, self.patch_embed.grid_size)

    def _freeze_unused(self) -> None:
        """DDP waits for the gradient of every parameter that is not frozen; these get none."""
        unused = []
        if not self.contrastive:
            unused.append("projection_head.")
        if not (self.noise_loss and self.reconstruct):
            unused.append("noise_pe_mlp.")
        if not self.reconstruct:
            unused += ["decoder_", "mask_token"]
        for name, parameter in self.named_parameters():
            if name.startswith(tuple(unused)):
                parameter.requires_grad_(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass, to save memory; timm's name."""
        self.grad_checkpointing = enable

    def patchify(self, imgs: Tensor) -> Tensor:
        """Images [N, C, H, W] as patches [N, L, p * p * C], channels last within a patch."""
        p = self.patch_embed.patch_size[0]
        n, c, height, width = imgs.shape
        patches = imgs.reshape(n, c, height // p, p, width // p, p)
        return patches.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * c)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches [N, L, p * p * C] as images [N, C, H, W]; the inverse of `patchify`."""
        p = self.patch_embed.patch_size[0]
        rows, columns = self.patch_embed.grid_size
        x = x.reshape(x.shape[0], rows, columns, p, p, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, rows * p, columns * p)

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Keeps a random `int(L (1 - mask_ratio))` of each row's tokens (MAE, section 3).

        Args:
            x: [N, L, D] of any width D.
        Returns:
            The kept tokens [N, K, D], the mask [N, L] (0 kept, 1 removed), and `ids_restore`
            [N, L]: where each patch stands in the shuffled order, whose first K are kept.
        """
        n, length, dim = x.shape
        keep = int(length * (1 - mask_ratio))
        scores = torch.rand(n, length, device=x.device)
        ids_shuffle = scores.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        kept = x.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, dim))
        return kept, (ids_restore >= keep).to(x.dtype), ids_restore

    def add_noise(self, imgs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adds Gaussian noise of a random level to each image; `imgs` is not changed.

        Returns:
            The noised images and the noise itself (sigma e) [N, C, H, W], and the level as a
            share of the largest, t = sigma / std ~ U(0, 1) [N].
        """
        level = torch.rand(imgs.shape[0], device=imgs.device)
        sigma = (self.std * level).view(-1, 1, 1, 1)
        noise = sigma * torch.randn_like(imgs)
        return imgs + noise, noise, level if self.std > 0 else torch.zeros_like(level)

    def _run(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes a random subset of the patches of images [N, C, H, W].

        Returns:
            The latent tokens [N, 1 + K, D], cls token first; mask and `ids_restore` [N, L].
        """
        x, mask, ids_restore = self.random_masking(self.patchify(x), mask_ratio)
        # Embeds only the kept patches, as a linear map of their pixels: the convolution's weight in
        # the patches' (row, column, channel) order.
        weight = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
        x = F.linear(x, weight, self.patch_embed.proj.bias)
        ids_keep = ids_restore.argsort(dim=1)[:, : x.shape[1], None]
        pos_embed = self.pos_embed[:, 1:].expand(x.shape[0], -1, -1)
        x = x + pos_embed.gather(1, ids_keep.expand(-1, -1, x.shape[2]))

        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        x = self._run(self.blocks, x)
        return self.norm(x), mask, ids_restore

    def features(self, imgs: Tensor) -> Tensor:
        """[N, D] of whole images [N, C, H, W]: cls, or the patches' mean if that is contrasted."""
        latent, _, _ = self.forward_encoder(imgs, mask_ratio=0.0)
        no_cls = self.contrastive and self.parts.pool == "patches"
        return latent[:, 1:].mean(dim=1) if no_cls else latent[:, 0]

    def forward_projection(self, latent: Tensor) -> Tensor:
        """Unit-length contrastive embeddings [N, 128], float32, of latent tokens [N, 1 + K, D]."""
        pooled = latent[:, POOLED[self.parts.pool]].mean(dim=1)
        return F.normalize(self.projection_head(pooled).float(), dim=-1)

    def forward_decoder(
        self, x: Tensor, ids_restore: Tensor, noise_level: Tensor | None = None
    ) -> Tensor:
        """Predicts all patches [N, L, p * p * C] from latent tokens [N, 1 + K, D].

        Args:
            noise_level: t in [0, 1] [N]; None where noise is not predicted.
        """
        told = None
        if noise_level is not None:
            width = self.noise_pe_mlp[0].in_features
            told = self.noise_pe_mlp(noise_level_embedding(noise_level, width))[:, None]
        if told is not None and self.parts.noise_level_tokens == "visible":
            x = x + told
        x = self.decoder_embed(x)

        n, length = ids_restore.shape
        embed = self.parts.mask_token_width == "encoder"
        mask_token = self.decoder_embed(self.mask_token) if embed else self.mask_token
        mask_tokens = mask_token.expand(n, length + 1 - x.shape[1], -1).to(x.dtype)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)
        if told is not None and self.parts.noise_level_tokens == "all":
            # As if added before `decoder_embed`, whatever the mask token's width.
            patches = patches + F.linear(told, self.decoder_embed.weight)
        patches = patches.gather(1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed

        x = self._run(self.decoder_blocks, x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    @staticmethod
    def patch_std(patches: Tensor) -> Tensor:
        """The deviation [N, L, 1] that `norm_pix_loss` divides patches [N, L, p * p * C] by."""
        return (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()

    def _normalised(self, patches: Tensor) -> Tensor:
        return (patches - patches.mean(dim=-1, keepdim=True)) / self.patch_std(patches)

    def forward_loss(
        self, imgs: Tensor, pred: Tensor, mask: Tensor, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses of a prediction [N, L, p * p * C] for clean images [N, C, H, W], in float32.

        Returns:
            `reconstruction`: squared error to the clean pixels, mean over removed patches. With
            `noise` [N, C, H, W] also `noise`: squared error to it, mean over visible patches, and
            `noise_zero`: the same for a prediction of zero, which a useful model must beat.
        """
        pred, target = pred.float(), self.patchify(imgs).float()
        if self.norm_pix_loss:
            target = self._normalised(target)
        losses = {"reconstruction": _mean_where(mask, (pred - target) ** 2)}
        if noise is not None:
            noise = self.patchify(noise).float()
            if self.parts.noise_target == "normalised":
                noise = self._normalised(noise)
            losses["noise"] = _mean_where(1 - mask, (pred - noise) ** 2)
            losses["noise_zero"] = _mean_where(1 - mask, noise**2)
        return losses

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> dict[str, Tensor]:
        """One pass over view-images [N, C, H, W], which are not changed.

        Returns:
            `mask` [N, L], and what the objective needs of: `embedding` [N, 128]; `pred`
            [N, L, p * p * C] and `reconstruction`; `noise` and `noise_zero` (scalars).
        """
        noise = level = None
        seen = imgs
        if self.noise_loss:
            seen, noise, level = self.add_noise(imgs)
        latent, mask, ids_restore = self.forward_encoder(seen, mask_ratio)
        parts = {"mask": mask}
        if self.contrastive:
            parts["embedding"] = self.forward_projection(latent)
        if self.reconstruct:
            parts["pred"] = self.forward_decoder(latent, ids_restore, level)
            parts.update(self.forward_loss(imgs, parts["pred"], mask, noise))
        return parts


def _mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))


def _mean_where(mask: Tensor, errors: Tensor) -> Tensor:
    """Mean of errors [N, L, d] over the patches whose mask [N, L] is 1."""
    return (errors.mean(dim=-1) * mask).sum() / mask.sum()


def noise_level_embedding(level: Tensor, dim: int = NOISE_EMBED_DIM) -> Tensor:
    """Sinusoidal embedding [N, dim] of noise levels t in [0, 1] [N]: sines, then cosines."""
    frequencies = 10000.0 ** (-torch.arange(dim // 2, device=level.device) / (dim // 2))
    angles = NOISE_TIME_SCALE * level[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


MODELS = {
    f"mae_vit_{name}": partial(MaskedAutoencoderViT, norm_layer=NORM_LAYER, **size._asdict())
    for name, size in SIZES.items()
}
globals().update(MODELS)  # for `from model_mae import mae_vit_base_patch16`


def build_model(args: argparse.Namespace) -> MaskedAutoencoderViT:
    """The model that main_pretrain.py's flags describe."""
    sizes = {"img_size": height_width(args.input_size), "patch_size": args.patch_size}
    return _build(args.model, vars(args), **sizes, in_chans=args.in_chans or 3)


def _build(name: str, flags: dict[str, Any], **sizes: Any) -> MaskedAutoencoderViT:
    """The model that flags describe; MAE's where there are none."""
    return MODELS[name](
        **sizes,
        norm_pix_loss=flags.get("norm_pix_loss", False),
        noise_loss=flags.get("noise_loss", False),
        std=flags.get("std", 0.05),
        contrastive=flags.get("weight_simclr", 0) > 0,
        reconstruct=flags.get("weight_mae", 1) > 0,
        parts=Parts.of(flags),
    )


def model_from_checkpoint(
    state: dict[str, Any], source: str | Path, norm_pix_loss: bool = False
) -> MaskedAutoencoderViT:
    """A pretraining checkpoint's model with its weights: ours, the CAN release's or MAE's.

    Args:
        state: what `util.run.checkpoint.load` returns; the flags in it decide, if it has any.
        norm_pix_loss: if they do not say.
    Raises:
        UserError: not a whole pretrained model of a known size.
    """
    weights = state["model"]
    name = f"mae_vit_{size_of(weights, source)}"
    if "decoder_pred.weight" not in weights:
        raise UserError(f"{source} is not a pretraining checkpoint: it has no decoder_pred.weight")
    flags = state.get("args", {})
    _, in_chans, patch, _ = weights["patch_embed.proj.weight"].shape
    sizes = {"img_size": image_size(weights, source, flags), "patch_size": patch}
    model = _build(name, {"norm_pix_loss": norm_pix_loss} | flags, **sizes, in_chans=in_chans)
    # MAE's own checkpoints lack these parts of CAN, and do not need them.
    absent = () if model.noise_loss else ("projection_head.", "noise_pe_mlp.")
    unused = {name: t for name, t in model.state_dict().items() if name.startswith(absent)}
    load_model(model, unused | weights, source)
    return model
