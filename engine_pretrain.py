"""One pretraining epoch: schedule, forward, combined loss, backward, metrics."""

import argparse
import contextlib
import logging
import math
import time

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader

from loss_contrastive import nt_xent
from util.checkpoint import Run
from util.errors import UserError
from util.logs import RunLog, console_line
from util.lr_sched import adjust_learning_rate
from util.misc import MetricLogger, get_rank, seed_all
from util.precision import Precision

logger = logging.getLogger(__name__)

PRINT_FREQ = 20  # optimiser steps between console lines


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
    """Trains for one epoch and returns its mean metrics over all ranks.

    Args:
        loader: of ([view 1, view 2], label) batches, as many as fill whole optimiser steps.
        args: main_pretrain.py's.
        run: says which steps are done already, and saves within the epoch.
    Raises:
        UserError: a metric is not finite; on every rank at the same step.
        Stopped: on request, after saving.
    """
    model.train()
    device, scaler = precision.device, precision.scaler
    steps = len(loader) // args.accum_iter
    metrics = MetricLogger()
    steps_done = run.begin_epoch(metrics)
    loader.sampler.set_epoch(epoch, steps_done)
    begin = time.perf_counter()

    for index, (views, _) in enumerate(metrics.watch(loader), start=steps_done * args.accum_iter):
        step, part = divmod(index, args.accum_iter)
        if part == 0:
            lr = adjust_learning_rate(optimizer, epoch + step / steps, args)
        seed_all(args.seed, epoch, index, get_rank())
        imgs = torch.cat([view.to(device, non_blocking=True) for view in views])

        complete = part + 1 == args.accum_iter
        with contextlib.nullcontext() if complete else model.no_sync():
            with precision.autocast():
                parts = model(imgs, mask_ratio=args.mask_ratio)
            losses = total_loss(parts, args)
            scaler.scale(losses["loss"] / args.accum_iter).backward()
        metrics.update(len(views[0]), **losses)
        if not complete:
            continue

        scaler.unscale_(optimizer)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        grad_norm = get_total_norm(gradients, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        if (step + 1) % PRINT_FREQ == 0 or step + 1 == steps:
            window = metrics.window() | {"grad_norm": grad_norm.item(), "lr": lr}
            _check_finite(window, epoch, step)
            log.scalars(_tags(window), epoch * steps + step + 1)
            per_step = (time.perf_counter() - begin) / (step + 1 - steps_done)
            left = per_step * ((args.epochs - epoch) * steps - step - 1)
            place = f"epoch {epoch} [{step + 1:{len(str(steps))}}/{steps}]"
            logger.info(console_line(place, left, _terms(window), window, device))
        run.after_step(epoch, step + 1, metrics)

    return metrics.epoch() | {"lr": lr}


def _check_finite(window: dict[str, float], epoch: int, step: int) -> None:
    # The means are over all ranks, and so the same on all: they stop together.
    for name, value in window.items():
        if not math.isfinite(value) and name != "grad_norm":  # fp16 may overflow now and then
            raise UserError(
                f"{name} is {value} at epoch {epoch}, step {step + 1}, "
                f"lr {window['lr']:.3g}; the last checkpoint is from before"
            )


def _tags(window: dict[str, float]) -> dict[str, float]:
    """TensorBoard's names: noise prediction stands beside the value of predicting zero."""
    losses = ("loss", "reconstruction", "contrastive", "noise", "noise_zero")
    return {f"{'loss' if name in losses else 'train'}/{name}": v for name, v in window.items()}


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
