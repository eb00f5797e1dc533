"""An encoder's weights: how they are initialised, and how they are loaded from a checkpoint."""

import argparse
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from util.distributed import is_main_process
from util.errors import UserError
from util.pos_embed import get_2d_sincos_pos_embed, interpolate_pos_embed
from util.recipes import Parts, shown, trains_patches
from util.sizes import image_size

logger = logging.getLogger(__name__)

NORM_LAYER = partial(nn.LayerNorm, eps=1e-6)  # MAE's, in encoder and decoder

FIXED = ("decoder_pos_embed",)  # sine-cosine, of the grid
# What a checkpoint may hold besides the encoder, by the beginnings of names.
OTHER_PARTS = {
    "decoder": ("decoder_", "mask_token"),
    "projection head": ("projection_head.",),
    "noise conditioning": ("noise_pe_mlp.",),
    "classifier": ("head.",),
}


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


def load_model(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Loads all of a model's tensors.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape; names the first.
    """
    check_same(model.state_dict(), weights, source)
    model.load_state_dict(weights)


def check_same(own: dict[str, Tensor], weights: dict[str, Tensor], source: str | Path) -> None:
    """Raises UserError unless names, shapes and kinds match and all weights are finite."""
    other = f"{source} is of another architecture"
    for name, tensor in own.items():
        if name not in weights:
            raise UserError(f"{other}: it has no {name}")
        found = weights[name]
        if found.shape != tensor.shape:
            patches = name == "patch_embed.proj.weight" and found.ndim == 4
            fits = patches and found.shape[:2] == tensor.shape[:2]
            hint = f"; --patch_size {found.shape[-1]} takes them" if fits else ""
            shapes = f"{name} is {list(found.shape)}, not {list(tensor.shape)}"
            raise UserError(f"{other}: {shapes}{hint}")
        if found.is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{source} is damaged: {name} is {found.dtype}, not {tensor.dtype}")
        if not found.float().isfinite().all():
            raise UserError(f"{source} contains non-finite values in {name} (NaN or infinite)")
    if unexpected := [name for name in weights if name not in own]:
        raise UserError(f"{other}: unexpected tensor {unexpected[0]}")


def encoder_part(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The encoder's tensors, and the number of tensors of each other part."""
    encoder, others = {}, {}
    for name, tensor in weights.items():
        for part, beginnings in OTHER_PARTS.items():
            if name.startswith(beginnings):
                others[part] = others.get(part, 0) + 1
                break
        else:
            encoder[name] = tensor
    return encoder, others


def load_encoder(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str | Path,
    flags: dict[str, Any] | None = None,
    tell: bool = True,
) -> None:
    """Loads all of a downstream ViT except its `head`, and logs what was used and what was not.

    If the model has an `fc_norm` and the pretrained weights have none, it stays new and their
    `norm` is dropped, as in MAE; and the other way round.

    Args:
        weights: `load_published`'s "model".
        source: where they come from, for messages.
        flags: that they were trained with, if known: those of images that are not square.
    Raises:
        UserError: a tensor of the encoder is missing or of another shape, or the weights hold an
            unexpected one; names the first.
    """
    encoder, unused = encoder_part(weights)
    wanted = {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}
    new = ["head", *_leave_norms(wanted, encoder, unused)]
    new += fit_input(model, encoder, source, flags)
    check_same(wanted, encoder, source)
    model.load_state_dict(model.state_dict() | encoder)
    if tell:
        _tell("encoder", len(encoder), source, unused, new)


def start_from(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str | Path,
    flags: dict[str, Any] | None = None,
) -> None:
    """Loads what fits into a pretraining model: the encoder, and each other part that is whole.

    Position embeddings that do not depend on the images stay the model's own. As `load_encoder`.
    """
    encoder, others = encoder_part(weights)
    own, unused = model.state_dict(), {}
    wanted, _ = encoder_part(own)
    new = _leave_norms(wanted, encoder, unused)
    new += fit_input(model, encoder, source, flags)
    check_same(wanted, encoder, source)
    loaded = dict(encoder)
    for part, beginnings in OTHER_PARTS.items():
        ours = {n: t for n, t in own.items() if n.startswith(beginnings) and n not in FIXED}
        if ours and all(n in weights and weights[n].shape == t.shape for n, t in ours.items()):
            check_same(ours, theirs := {name: weights[name] for name in ours}, source)
            loaded |= theirs
        else:
            new += [part] * bool(ours)
            unused |= {part: others[part]} if part in others else {}
    model.load_state_dict(own | loaded)
    _tell("start", len(loaded), source, unused, new)
    if flags and model.reconstruct and "decoder_pred.weight" in loaded:
        _tell_targets(model, flags, source)


def _tell_targets(model: nn.Module, flags: dict[str, Any], source: str | Path) -> None:
    """Says where a decoder that is loaded has learnt to predict other things than it will."""
    targets = {"norm_pix_loss": (flags.get("norm_pix_loss", False), model.norm_pix_loss)}
    if model.noise_loss and flags.get("noise_loss"):
        targets["noise_target"] = (Parts.of(flags).noise_target, model.parts.noise_target)
    for name, (before, now) in targets.items():
        if before != now:
            words = f"the decoder of {source} was trained with --{name} {shown(before)}"
            logger.info(f"{words}, here it is {shown(now)}")


def warn_of_pooling(args: argparse.Namespace, flags: dict[str, Any], source: str | Path) -> None:
    """Says that `--cls_token` reads what the weights, of a run with these flags, did not train."""
    reads_cls = not args.global_pool and not getattr(args, "grid", False)
    if trains_patches(flags) and reads_cls and is_main_process():
        logger.warning(
            f"warning: {source} was trained by the mean over patches, not by the cls token, which "
            "is read here: --global_pool reads that mean"
        )


def _leave_norms(
    wanted: dict[str, Tensor], encoder: dict[str, Tensor], unused: dict[str, int]
) -> list[str]:
    """Takes both norms out where one of model and weights pools before its own, the other after.

    Returns:
        The model's, which stays new; [] where they are alike.
    """
    for ours, theirs in (("fc_norm", "norm"), ("norm", "fc_norm")):
        missing, left = wanted.keys() - encoder.keys(), encoder.keys() - wanted.keys()
        if f"{ours}.weight" in missing and f"{theirs}.weight" in left:
            for kind in ("weight", "bias"):
                del wanted[f"{ours}.{kind}"], encoder[f"{theirs}.{kind}"]
            unused[theirs] = 2
            return [ours]
    return []


def fit_input(
    model: nn.Module,
    encoder: dict[str, Tensor],
    source: str | Path,
    flags: dict[str, Any] | None = None,
) -> list[str]:
    """Resizes positions to the model's grid, and sums or repeats channels as timm does.

    Args:
        encoder: changed in place.
    Returns:
        What was done, in words.
    """
    positions, patches = encoder.get("pos_embed"), encoder.get("patch_embed.proj.weight")
    done, grid = [], None
    if positions is None or patches is None or patches.ndim != 4:
        return done
    if flags:
        patch = patches.shape[-1]
        grid = tuple(side // patch for side in image_size(encoder, source, flags))
    interpolate_pos_embed(model, encoder, grid)
    if encoder["pos_embed"] is not positions:
        side = math.isqrt(positions.shape[1] - 1)
        old, new = grid or (side, side), model.patch_embed.grid_size
        done.append("pos_embed, resized from {} x {} to {} x {} patches".format(*old, *new))
    found, wanted = patches.shape[1], model.patch_embed.proj.in_channels
    if found == 3 != wanted:
        encoder["patch_embed.proj.weight"] = adapt_input_conv(wanted, patches)
        done.append(f"patch_embed, adapted from 3 channels to {wanted}")
    return done


def _tell(
    what: str, count: int, source: str | Path, unused: dict[str, int], new: list[str]
) -> None:
    left = ", ".join(f"{part} ({number})" for part, number in unused.items()) or "nothing"
    added = ", ".join(new) or "nothing"
    logger.info(f"{what}: {count} tensors of {source}; not used: {left}; new: {added}")
