"""Multiply-adds of one forward pass per image (two views): CAN, MAE and SimCLR.

    python benchmarks/flops.py

Counted by torch on tensors without storage. The paper says that SimCLR costs 70 % more than CAN.
"""

import torch
from common import table
from torch.utils.flop_counter import FlopCounterMode

from model_mae import MODELS

OBJECTIVES = {  # constructor arguments, mask ratio
    "CAN": ({"noise_loss": True}, 0.5),
    "MAE": ({"contrastive": False}, 0.75),
    "SimCLR": ({"reconstruct": False}, 0.0),
}


def forward_flops(model: str, objective: str, side: int = 224) -> int:
    """Floating-point operations of one image's two views, `side` pixels; a multiply-add is two."""
    parts, mask_ratio = OBJECTIVES[objective]
    with torch.device("meta"):
        network = MODELS[model](img_size=side, **parts)
        views = torch.empty(2, 3, side, side)
        with FlopCounterMode(display=False) as counter:
            network(views, mask_ratio=mask_ratio)
    return counter.get_total_flops()


def main() -> None:
    rows = []
    for size in ("base_patch16", "large_patch16"):
        flops = {name: forward_flops(f"mae_vit_{size}", name) for name in OBJECTIVES}
        gmacs = [f"{value / 2e9:.1f}" for value in flops.values()]
        rows.append([size, *gmacs, f"{flops['SimCLR'] / flops['CAN']:.2f}"])
    table(["GMACs per image", *OBJECTIVES, "SimCLR / CAN"], rows)


if __name__ == "__main__":
    main()
