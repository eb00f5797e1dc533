"""Learning rates that fall from the head to the stem (ELECTRA, Clark et al. 2020; BEiT)."""

from collections.abc import Container

from torch import nn


def param_groups_lrd(
    model: nn.Module,
    weight_decay: float = 0.05,
    no_weight_decay_list: Container[str] = (),
    layer_decay: float = 0.75,
) -> list[dict]:
    """Parameter groups with `lr_scale` = layer_decay ** (layers between them and the head).

    timm's own groups put the final norm with the last block; MAE puts it with the head.

    Args:
        model: a ViT with `blocks`; its frozen parameters are left out.
        no_weight_decay_list: names that are not decayed, besides parameters of one dimension.
    """
    last = len(model.blocks) + 1
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = get_layer_id_for_vit(name, last)
        decays = parameter.ndim > 1 and name not in no_weight_decay_list
        decay = weight_decay if decays else 0.0
        group = {"lr_scale": layer_decay ** (last - layer), "weight_decay": decay, "params": []}
        groups.setdefault((layer, decays), group)["params"].append(parameter)
    return list(groups.values())


def get_layer_id_for_vit(name: str, num_layers: int) -> int:
    """0 for tokens, positions and patch embedding, 1, 2, ... for blocks, num_layers above them."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return num_layers
