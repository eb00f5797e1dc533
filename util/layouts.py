"""The layouts in which people publish a ViT's weights, and how they become ours (and timm's)."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.errors import UserError

logger = logging.getLogger(__name__)

PATCHES, CLS = (
    "patch_embed.proj.weight",
    "cls_token",
)  # by which an encoder of ours or timm's is known
HUGGING_FACE = "embeddings.patch_embeddings.projection.weight"
# Where files keep their weights, the best first: DINO's and iBOT's teacher is the better encoder.
CONTAINERS = ("model", "state_dict", "teacher", "student", "model_ema", "state_dict_ema", "module")
# Of several encoders the first is taken: one of no such name, or the average that trains a student.
COPIES = ("teacher", "student", "momentum", "target", "ema")
KNOWN = (
    "ours, the CAN release's, MAE's, timm's; DINO's, iBOT's, MoCo v3's, Lightning's; and "
    "Hugging Face's ViT and ViTMAE"
)
# Parts that change what an encoder computes, and that ours does not have.
FOREIGN = {
    "ls1.gamma": "LayerScale",
    "dist_token": "a distillation token",
    "embeddings.distillation_token": "a distillation token",
    "layer_scale1": "LayerScale",
    "reg_token": "register tokens",
    "register_tokens": "register tokens",
    "relative_position_bias_table": "relative positions",
    "mlp.w12.weight": "SwiGLU blocks",
    "attn.q_norm.weight": "normalised queries",
}
# Hugging Face's names, in the order of replacing; queries, keys and values are joined afterwards.
NAMES = (
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.layer|layers)\.", "blocks."),
    (r"^decoder\.decoder_(?:layers|encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.query."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.key."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.value."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
NOT_OURS = ("pooler.",)  # of Hugging Face's ViTModel, after the encoder


def find_weights(state: Any) -> dict[str, Tensor] | None:
    """The tensors by name in what a file holds, alone or in one of `CONTAINERS`; None if none."""
    if not isinstance(state, dict):
        return None
    for found in (state, *(state.get(name) for name in CONTAINERS)):
        empty = not isinstance(found, dict) or (not found and found is not state.get("model"))
        pairs = [(None, None)] if empty else found.items()
        if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in pairs):
            return found
    return None


def to_ours(weights: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """An encoder's weights, and what else of ours there is, under our names.

    Raises:
        UserError: there is no encoder of a known layout, or it has parts that ours lacks.
    """
    for mark, convert in ((PATCHES, dict), (HUGGING_FACE, from_hugging_face)):
        prefixes = [name.removesuffix(mark) for name in weights if name.endswith(mark)]
        if mark == HUGGING_FACE:
            prefixes = [prefix.removesuffix("vit.") for prefix in prefixes]
        if prefixes:
            return _check(_below(weights, prefixes, source, convert), source)
    found = ", ".join(list(weights)[:3])
    raise UserError(f"{source} holds no encoder: it has {found}, ...; known are {KNOWN}")


def _below(
    weights: dict[str, Tensor], prefixes: list[str], source: str | Path, convert: Callable
) -> dict[str, Tensor]:
    """What stands below the best of an encoder's prefixes; the rest is told."""
    prefixes.sort(key=lambda prefix: (_rank(prefix), len(prefix)))
    prefix, *others = prefixes
    mocos = prefix.endswith(("base_encoder.", "momentum_encoder."))
    if mocos and weights[f"{prefix}{PATCHES}"].shape[0] == 384:
        raise UserError(
            f"{source}: MoCo v3's small ViT has 12 heads, which these models do not have"
        )
    ours = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    if prefix or others:
        also = f", not {', '.join(others)}" if others else ""
        beside = len(weights) - len(ours)
        logger.info(
            f"{source}: the encoder is {prefix or 'the top'}{also}; {beside} tensors beside"
        )
    return convert(ours)


def settle_grid(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of `--blr auto`, whose head is a grid of heads, as one of the chosen head."""
    model = state["model"]
    if "head.chosen" not in model or model["head.chosen"] < 0:
        return state
    head, (heads, _, width) = int(model["head.chosen"]), model["head.weight"].shape
    pool, scale = head // (heads // 2), model["head.scale"][head]
    part = slice(pool * width, (pool + 1) * width)
    kept = {name: tensor for name, tensor in model.items() if not name.startswith("head.")}
    kept |= {f"head.0.running_{k}": model[f"head.norm.running_{k}"][part] for k in ("mean", "var")}
    kept["head.0.num_batches_tracked"] = model["head.norm.num_batches_tracked"]
    kept |= {f"head.1.{kind}": model[f"head.{kind}"][head] * scale for kind in ("weight", "bias")}
    flags = state.get("args", {}) | {"global_pool": bool(pool)}
    return state | {"model": kept, "args": flags}


def _rank(prefix: str) -> int:
    words = re.split(r"[._]", prefix)
    return max((rank for rank, copy in enumerate(COPIES, start=1) if copy in words), default=0)


def from_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of ViTModel, ViTMAEModel, ViTMAEForPreTraining, ViTForImageClassification."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        if not name.startswith(NOT_OURS):
            renamed[name] = tensor
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [
            renamed.pop(name.replace("query", part), None) for part in ("query", "key", "value")
        ]
        if any(part is None for part in parts):
            raise UserError(f"{name}: without keys or values of its own, which these models have")
        renamed[name.replace("query", "qkv")] = torch.cat(parts)
    return renamed


def to_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse, of an encoder alone, as ViTModel has it."""
    reverse = (
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^norm\.", "layernorm."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^blocks\.", "encoder.layer."),
    )
    found = {}
    for name, tensor in weights.items():
        for pattern, theirs in reverse:
            name = re.sub(pattern, theirs, name)
        if ".attn.qkv." not in name:
            found[name] = tensor
            continue
        for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            found[name.replace("attn.qkv", f"attention.attention.{part}")] = piece
    return found


def _check(weights: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    for name in weights:
        for part, what in FOREIGN.items():
            if name == part or name.endswith(f".{part}"):
                raise UserError(f"{source} has {what} ({name}), which these models do not have")
    return weights
