"""The training loop's machinery: schedule, accumulation, optimizer steps, checks and logs."""

import argparse
import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from util.data.loader import TrainLoader
from util.distributed import get_rank
from util.lr_sched import adjust_learning_rate
from util.misc import MetricLogger, seed_all
from util.peers import wait_for_device
from util.precision import Precision
from util.run.finite import GRADIENT, FiniteCheck
from util.run.logs import RunLog, console_line
from util.run.run import Run

logger = logging.getLogger(__name__)

# DDP's, of the patch embedding of grey images: the stride of their one channel means nothing.
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")

PRINT_FREQ = 20  # optimizer steps between console lines


@dataclass
class Step:
    """One optimizer step: where it stands, and what its batches have measured so far."""

    epoch: int
    number: int  # within the epoch, from 0
    lr: float
    buffers: list[tuple[Tensor, Tensor]]  # the model's, and as before, if it may be skipped
    means: dict[str, Tensor]

    def __str__(self) -> str:
        return f"epoch {self.epoch}, step {self.number + 1}, lr {self.lr:.3g}"


class Training:
    """Trains a model, epoch by epoch:

        for batch in training.batches(epoch):
            ...  # forward pass
            training.backward({"loss": loss})
        means = training.means()

    Args:
        model: not wrapped in DDP.
        loader: batches for whole optimizer steps, from `train_loader`.
        optimizer: leaves a step out where its `found_inf` is 1, as torch's fused ones do.
        args: accum_iter, seed, epochs, skip_nonfinite, compile, and the learning rate's schedule.
        run: after its `resume`; it counts the steps of the epoch and saves within it.
        clip_grad: the largest gradient norm; None does not clip.
    Attributes:
        model: in DDP.
        precision, optimizer, log: as given; the log is the run's.
        steps: optimizer steps per epoch.
        _metrics, _finite: means of the epoch, and the check of each step.
        _step: the current one.
        _first, _since: the step that this process began the epoch with, and when.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: TrainLoader,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        args: argparse.Namespace,
        run: Run,
        clip_grad: float | None = None,
    ):
        self.loader, self.optimizer, self.precision = loader, optimizer, precision
        self.args, self.run, self.clip_grad = args, run, clip_grad
        self.steps = len(loader) // args.accum_iter
        self._metrics = MetricLogger()
        scaled = precision.scaler.is_enabled()
        self._finite = FiniteCheck(args.skip_nonfinite, scaled, run.last_saved)
        self._step: Step | None = None
        self._first, self._since = 0, 0.0
        run.begin(loader, self._metrics, self.steps)
        self.log = RunLog(args, run, self.steps)
        if args.compile:
            if getattr(args, "grad_checkpointing", False):
                # torch 2.6 fails to split checkpointed blocks among DDP's buckets, 2.14 at times;
                # unsplit, gradients are exchanged after the whole backward pass.
                torch._dynamo.config.optimize_ddp = False
            model.compile()
        # Not static_graph: it saves no time here, and torch's does not work with no_sync.
        self.model = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def batches(self, epoch: int) -> Iterator[Any]:
        """The batches of an epoch that are left to train on, from the loader.

        After each, the caller passes its losses to `backward`; the optimizer's step follows when
        the next batch is asked for.

        Raises:
            UserError: a loss or gradient is not finite, and no more steps may be skipped, or too
                many images are not readable; on every rank.
            Stopped: on request, after saving.
        """
        self._begin_epoch(epoch)
        accum_iter = self.args.accum_iter
        done = self.run.step
        watched = self._metrics.watch(self.loader.epoch(epoch, done))
        for index, batch in enumerate(watched, start=done * accum_iter):
            number, part = divmod(index, accum_iter)
            if part == 0:
                self._begin_step(epoch, number)
            seed_all(self.args.seed, epoch, index, get_rank())
            complete = part + 1 == accum_iter
            with contextlib.nullcontext() if complete else self.model.no_sync():
                yield batch
            if complete:
                self._end_step()

    def backward(self, values: dict[str, Tensor], count: int = 1) -> None:
        """Adds the gradient of a batch.

        Args:
            values: scalars: the one to minimise as `loss`, and others to log.
            count: of what they are sums; their means are logged.
        """
        share = self.args.accum_iter
        self.precision.scaler.scale(values["loss"] / share).backward()
        means = self._step.means
        for name, value in values.items():
            means[name] = means.get(name, 0) + value.detach().float() / (share * count)

    def means(self) -> dict[str, float]:
        """The epoch's mean metrics over all ranks, and the learning rate of its last step."""
        return self._metrics.epoch() | {"lr": self._adjust_lr(self.run.epoch, self.steps - 1)}

    def _begin_epoch(self, epoch: int) -> None:
        self.model.train()
        done = self.run.step
        if done == 0:
            self._metrics.begin()
        if done == self.steps:  # TensorBoard starts again with the last step: see `RunLog`
            self.log.add_window(self._metrics.last, (epoch + 1) * self.steps)
        self._first, self._since = done, time.perf_counter()

    def _begin_step(self, epoch: int, number: int) -> None:
        lr = self._adjust_lr(epoch, number)
        buffers = self.model.buffers() if self.args.skip_nonfinite else []
        self._step = Step(epoch, number, lr, [(b, b.clone()) for b in buffers], means={})

    def _adjust_lr(self, epoch: int, number: int) -> float:
        return adjust_learning_rate(self.optimizer, epoch + number / self.steps, self.args)

    def _end_step(self) -> None:
        """Updates the weights, and now and then logs, checks and saves."""
        step, scaler = self._step, self.precision.scaler
        scaler.unscale_(self.optimizer)
        grad_norm = self._clip()
        skipped, lost = self._finite.step(str(step), step.means | {GRADIENT: grad_norm})
        self.optimizer.found_inf = skipped  # not by `scaler.step`, which knows only of gradients
        self.optimizer.step()
        for buffer, before in step.buffers:  # such as BatchNorm's, which may have become NaN
            buffer.copy_(before.where(lost > 0, buffer))
        images = self.loader.batch_size * self.args.accum_iter
        self._metrics.update(images, lost, **step.means)
        scaler.update()
        self.optimizer.zero_grad()

        if (step.number + 1) % PRINT_FREQ == 0 or step.number + 1 == self.steps:
            self._check()
            self._show(grad_norm)
        self.run.after_step(self._check)

    def _clip(self) -> Tensor:
        """The gradient's norm before it is clipped."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = get_total_norm([p.grad for p in parameters], foreach=True)
        if self.clip_grad is not None:
            clip_grads_with_norm_(parameters, self.clip_grad, grad_norm, foreach=True)
        return grad_norm

    def _check(self) -> None:
        """Raises UserError on all ranks if this state must not be saved."""
        self._finite.settle()  # the step's collectives; the update after them needs no peer
        wait_for_device(self.precision.device)
        self._finite.check_weights(str(self._step), self.model)
        self.loader.report_bad()

    def _show(self, grad_norm: Tensor) -> None:
        """Logs the steps since the last time, if any was not skipped."""
        window = self._metrics.window(grad_norm=grad_norm, lr=self._step.lr)
        if not window:
            return
        epoch, done = self._step.epoch, self._step.number + 1
        self.log.add_window(window, epoch * self.steps + done)
        per_step = (time.perf_counter() - self._since) / (done - self._first)
        left = per_step * ((self.args.epochs - epoch) * self.steps - done)
        place = f"epoch {epoch} [{done:{len(str(self.steps))}}/{self.steps}]"
        logger.info(console_line(place, left, window, self.precision.device))
