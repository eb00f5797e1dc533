"""One pretraining epoch: forward, combined loss, metrics; `util.epoch` runs the steps."""

import argparse

import torch
from torch import Tensor

from loss_contrastive import nt_xent
from util.epoch import Training, run_epoch


def total_loss(parts: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Tensor]:
    """The weighted sum `loss` and its terms, scalars, from a model's output.

    total = weight_mae ((1 - weight_noise) reconstruction + weight_noise noise)
            + weight_simclr contrastive; without noise prediction
    total = weight_mae reconstruction + weight_simclr contrastive. A term that the objective leaves
    out is not computed and not returned.
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


def train_one_epoch(training: Training, epoch: int) -> dict[str, float]:
    """Trains for one epoch and returns its mean metrics over all ranks; raises as `run_epoch`.

    Args:
        training: its loader gives ([view 1, view 2], label) batches, views [N, C, H, W] on the
            device; its args are main_pretrain.py's.
    """
    args = training.args

    def losses(batch: tuple[list[Tensor], Tensor]) -> dict[str, Tensor]:
        views, _ = batch
        with training.precision.autocast():
            parts = training.model(torch.cat(views), mask_ratio=args.mask_ratio)
        return total_loss(parts, args)

    return run_epoch(training, epoch, losses, _terms)


def _terms(window: dict[str, float]) -> list[str]:
    """What the console shows of the losses."""
    words = [f"loss {window['loss']:.4f}"]
    if "reconstruction" in window:
        words.append(f"reconstruction {window['reconstruction']:.4f}")
    if "noise" in window:
        words.append(f"noise {window['noise']:.5f} (zero {window['noise_zero']:.5f})")
    if "contrastive" in window:
        words.append(
            f"contrastive {window['contrastive']:.3f} (top-1 {window['contrastive_top1']:.1%})"
        )
    return words
