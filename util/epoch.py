"""One epoch of any training: schedule, accumulation of gradients, steps, metrics."""

import argparse
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from util.distributed import get_rank
from util.finite import GRADIENT, FiniteCheck
from util.loader import DeviceLoader
from util.logs import RunLog, console_line
from util.lr_sched import adjust_learning_rate
from util.misc import MetricLogger, seed_all
from util.precision import Precision
from util.run import Run

logger = logging.getLogger(__name__)

PRINT_FREQ = 20  # optimiser steps between console lines


@dataclass
class Training:
    """What trains, on what, and where its state and metrics go.

    Args:
        loader: as many batches as fill whole optimiser steps; its sampler wants `set_epoch`.
        args: accum_iter, seed, epochs, skip_nonfinite, and what the learning rate's schedule needs.
        run: says which steps are done already, and saves within the epoch.
    """

    model: DistributedDataParallel
    loader: DeviceLoader
    optimizer: torch.optim.Optimizer
    precision: Precision
    args: argparse.Namespace
    run: Run
    log: RunLog
    finite: FiniteCheck = field(init=False)

    def __post_init__(self):
        self.finite = FiniteCheck(self.args.skip_nonfinite, self.precision.scaler.is_enabled())


def run_epoch(
    training: Training,
    epoch: int,
    losses: Callable[[Any], dict[str, Tensor]],
    words: Callable[[dict[str, float]], list[str]],
    clip_grad: float | None = None,
) -> dict[str, float]:
    """Trains for one epoch and returns its mean metrics over all ranks.

    Args:
        losses: of a batch, the scalar to minimise as `loss`, and others to report.
        words: what the console shows of a window's metrics.
        clip_grad: the largest gradient norm, beyond which gradients are scaled down.
    Raises:
        UserError: a loss or gradient is not finite, once too often, or too many images are not
            readable; on every rank.
        Stopped: on request, after saving.
    """
    model, loader, optimizer = training.model, training.loader, training.optimizer
    args, run, log, finite = training.args, training.run, training.log, training.finite
    device, scaler = training.precision.device, training.precision.scaler
    model.train()
    steps = len(loader) // args.accum_iter
    metrics = MetricLogger()
    steps_done = run.begin_epoch(epoch, metrics, loader, steps)
    if steps_done == steps:  # TensorBoard begins anew with the last step: see `RunLog`
        log.scalars(_tags(metrics.last), (epoch + 1) * steps)
    loader.sampler.set_epoch(epoch, steps_done)
    begin = time.perf_counter()

    def fit_to_save() -> None:
        finite.settle()
        finite.weights(place, model)
        loader.report_bad()

    for index, batch in enumerate(metrics.watch(loader), start=steps_done * args.accum_iter):
        step, part = divmod(index, args.accum_iter)
        if part == 0:
            lr = adjust_learning_rate(optimizer, epoch + step / steps, args)
            means = {}
            buffers = [b.clone() for b in model.buffers()] if args.skip_nonfinite else []
        seed_all(args.seed, epoch, index, get_rank())

        complete = part + 1 == args.accum_iter
        with contextlib.nullcontext() if complete else model.no_sync():
            values = losses(batch)
            scaler.scale(values["loss"] / args.accum_iter).backward()
        for name, value in values.items():
            means[name] = means.get(name, 0) + value.detach().float() / args.accum_iter
        if not complete:
            continue

        scaler.unscale_(optimizer)
        parameters = [p for p in model.parameters() if p.grad is not None]
        grad_norm = get_total_norm([p.grad for p in parameters], foreach=True)
        if clip_grad is not None:
            clip_grads_with_norm_(parameters, clip_grad, grad_norm, foreach=True)
        place = f"epoch {epoch}, step {step + 1}, lr {lr:.3g}"
        if finite.step(place, means | {GRADIENT: grad_norm}):
            scaler.step(optimizer)
            metrics.update(loader.batch_size * args.accum_iter, **means)
        else:  # the forward pass may have spoilt BatchNorm's statistics
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        scaler.update()
        optimizer.zero_grad()

        if (step + 1) % PRINT_FREQ == 0 or step + 1 == steps:
            fit_to_save()
            if window := metrics.window():
                window |= {"grad_norm": grad_norm.item(), "lr": lr}
                metrics.last = window
                log.scalars(_tags(window), epoch * steps + step + 1)
                per_step = (time.perf_counter() - begin) / (step + 1 - steps_done)
                left = per_step * ((args.epochs - epoch) * steps - step - 1)
                shown = f"epoch {epoch} [{step + 1:{len(str(steps))}}/{steps}]"
                logger.info(console_line(shown, left, words(window), window, device))
        run.after_step(fit_to_save)

    # The last step's, also for a run that stopped after it and has none to make here.
    lr = adjust_learning_rate(optimizer, epoch + (steps - 1) / steps, args)
    return metrics.epoch() | {"lr": lr}


def _tags(window: dict[str, float]) -> dict[str, float]:
    """TensorBoard's names: noise prediction stands beside the value of predicting zero."""
    losses = ("loss", "reconstruction", "contrastive", "noise", "noise_zero")
    return {f"{'loss' if name in losses else 'train'}/{name}": v for name, v in window.items()}
