"""Layer-wise adaptive rate scaling (You et al. 2017), as MoCo v3 and MAE use it for probes."""

from collections.abc import Iterable

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose step for a weight is proportional to the weight's own norm.

    Parameters of one dimension or none (biases, norms) are neither rescaled nor decayed.

    Args:
        trust_coefficient: a step's norm as a share of the weight's, at learning rate 1.
    Attributes:
        found_inf: a scalar that is 1 if the next step must be left out, as torch's fused optimizers
            have it; None for never.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults | {"trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, update: Tensor, group: dict) -> None:
        if p.ndim > 1:
            update = update.add(p, alpha=group["weight_decay"])
            weight_norm, update_norm = p.norm(), update.norm()
            trust = group["trust_coefficient"] * weight_norm / update_norm
            update = update * trust.where((weight_norm > 0) & (update_norm > 0), 1.0)
        state = self.state[p]
        if "mu" not in state:
            state["mu"] = torch.zeros_like(p)
        mu = state["mu"] * group["momentum"] + update
        moved = p.add(mu, alpha=-group["lr"])
        if self.found_inf is not None:
            left_out = self.found_inf > 0
            mu, moved = state["mu"].where(left_out, mu), p.where(left_out, moved)
        state["mu"].copy_(mu)
        p.copy_(moved)
