"""One pretraining epoch: forward, combined loss, metrics; `util.epoch` runs the steps."""

import argparse

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from loss_contrastive import nt_xent
from util.checkpoint import Run
from util.epoch import run_epoch
from util.logs import RunLog
from util.precision import Precision


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


def train_one_epoch(
    model: DistributedDataParallel,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    epoch: int,
    args: argparse.Namespace,
    run: Run,
    log: RunLog,
) -> dict[str, float]:
    """Trains for one epoch and returns its mean metrics over all ranks; raises as `run_epoch`.

    Args:
        loader: of ([view 1, view 2], label) batches, as many as fill whole optimiser steps.
        args: main_pretrain.py's.
        run: says which steps are done already, and saves within the epoch.
    """

    def losses(batch: tuple[list[Tensor], Tensor]) -> dict[str, Tensor]:
        views, _ = batch
        imgs = torch.cat([view.to(precision.device, non_blocking=True) for view in views])
        with precision.autocast():
            parts = model(imgs, mask_ratio=args.mask_ratio)
        return total_loss(parts, args)

    return run_epoch(model, loader, optimizer, precision, epoch, args, run, log, losses, _terms)


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
