"""Probes for a grid of learning rates at once, as DINOv2's evaluation has (Oquab et al. 2023).

Shapes: N images, D feature width, K classes, R learning rates, G = 2 R heads: the first R on the
cls token, the others on the mean over patches.
"""

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from util.features import CHUNK
from util.predictions import Tally, count

RATES = tuple(np.logspace(-2, 1, 13).tolist())  # --blr, over three decades
POOLS = ("cls", "pooled")
HELD_OUT = 0.1  # of the training images, by which a head is chosen
EPS = 1e-6  # of the standardisation, the probe's own


class GridHeads(nn.Module):
    """[N, 2 D] features, cls and pooled -> [G, N, K] logits.

    The learning rate of a head's weights W is that of the optimizer times the head's own r: it
    trains V, where W = sqrt(r) V, by plain SGD, whose weight decay is `loss`'s.

    Attributes:
        chosen: the head that was best on held-out images; -1 before.
    """

    def __init__(self, width: int, classes: int):
        super().__init__()
        heads = len(POOLS) * len(RATES)
        self.norm = nn.BatchNorm1d(2 * width, affine=False, eps=EPS)
        scale = torch.tensor(RATES * len(POOLS)).sqrt()
        self.register_buffer("scale", scale)
        self.register_buffer("chosen", torch.tensor(-1))
        start = trunc_normal_(torch.empty(classes, width), std=0.01)  # the same of all heads
        self.weight = nn.Parameter(start / scale[:, None, None])
        self.bias = nn.Parameter(torch.zeros(heads, classes))

    @property
    def scaled(self) -> Tensor:
        """W [G, K, D]."""
        return self.weight * self.scale[:, None, None]

    def forward(self, features: Tensor) -> Tensor:
        classes, width = self.weight.shape[1:]
        inputs = self.norm(features.float()).view(-1, len(POOLS), width)
        inputs = inputs.transpose(0, 1)  # [2, N, D]
        matrix = self.scaled.view(len(POOLS), -1, width)
        logits = inputs @ matrix.transpose(1, 2)  # [2, N, R K]
        logits = logits.unflatten(2, (-1, classes)).transpose(1, 2).flatten(0, 1)
        return logits + (self.bias * self.scale[:, None])[:, None]

    def loss(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None = None, decay: float = 0.0
    ) -> Tensor:
        """The sum of all heads' mean cross-entropies: each trains as if it were alone.

        Args:
            decay: of all W, and of no bias; its gradient is V's, as if W had an optimizer's.
        """
        repeated = labels.repeat(len(logits))
        losses = F.cross_entropy(logits.flatten(0, 1).float(), repeated, weights, reduction="none")
        total = losses.view(len(logits), -1).mean(dim=1).sum()
        if decay:
            total = total + decay / 2 * self.scaled.square().sum()
        return total

    @torch.no_grad()
    def accuracies(self, features: Tensor, labels: Tensor) -> Tensor:
        """[G], in percent, of a dataset's features."""
        was_training = self.training
        self.eval()
        right = sum(
            (self(some.to(labels.device)).argmax(dim=2) == answers).sum(dim=1)
            for some, answers in zip(features.split(CHUNK), labels.split(CHUNK), strict=True)
        )
        self.train(was_training)
        return 100 * right / len(labels)

    @torch.no_grad()
    def tally(self, features: Tensor, labels: Tensor) -> Tally:
        """Counts of the chosen head on a dataset's features."""
        self.eval()
        parts = (some.to(labels.device) for some in features.split(CHUNK))
        chosen = int(self.chosen)
        logits = torch.cat([self(part)[chosen] for part in parts]).float()
        self.train()
        return Tally.of(count(logits, labels))

    @staticmethod
    def name(head: int) -> str:
        """Such as `pooled 0.1`."""
        return f"{POOLS[head // len(RATES)]} {RATES[head % len(RATES)]:.3g}"


def both_pools(vit: nn.Module):
    """From images to [N, 2 D], cls and the mean over patches, of a frozen encoder."""

    def features(imgs: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = vit.forward_features(imgs)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)

    return features
