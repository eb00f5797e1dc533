"""One pretraining epoch: forward pass and combined loss; `util.run.training` makes the steps."""

import argparse

import torch
from torch import Tensor

from loss_contrastive import nt_xent
from util.run.training import Training


def total_loss(parts: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Tensor]:
    """The weighted sum `loss` and its terms, scalars, from a model's output.

    total = weight_mae ((1 - weight_noise) reconstruction + weight_noise noise)
            + weight_simclr contrastive; without noise prediction
    total = weight_mae reconstruction + weight_simclr contrastive. Terms that the objective leaves
    out are neither computed nor returned.
    """
    names = ("reconstruction", "noise", "noise_zero")
    terms = {name: parts[name] for name in names if name in parts}
    total = 0.0
    if "reconstruction" in parts:
        total = parts["reconstruction"]
        if "noise" in parts:
            total = torch.lerp(total, parts["noise"], args.weight_noise)
        total = args.weight_mae * total
    if "embedding" in parts:
        terms["contrastive"], terms["contrastive_top1"] = nt_xent(
            parts["embedding"], global_negatives=not args.local_negatives
        )
        total = total + args.weight_simclr * terms["contrastive"]
    return {"loss": total, **terms}


def train_one_epoch(training: Training, args: argparse.Namespace, epoch: int) -> dict[str, float]:
    """Trains for one epoch and returns its mean metrics over all ranks.

    Args:
        training: its loader gives ([view 1, view 2], label) batches, views [N, C, H, W] on the
            device.
        args: main_pretrain.py's.
    Raises:
        UserError, Stopped: as `Training.batches`.
    """
    for views, _ in training.batches(epoch):
        with training.precision.autocast():
            parts = training.model(torch.cat(views), mask_ratio=args.mask_ratio)
        training.backward(total_loss(parts, args))
    return training.means()
