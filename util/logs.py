"""What a run shows: console lines, TensorBoard's files, log.txt with a JSON object per epoch."""

import argparse
import datetime
import json
import logging
import math
import resource
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from util.distributed import from_rank_zero, get_world_size, is_main_process
from util.errors import UserError
from util.file_list import write_lists
from util.lr_sched import global_batch
from util.precision import Precision

logger = logging.getLogger(__name__)


class RunLog:
    """Written by rank 0 alone; nothing is written where no folder is given.

    Args:
        args: output_dir and log_dir, made here if need be.
        epoch, steps: what a resumed run begins with, and the optimiser steps done before it;
            whatever was logged of later ones is taken back.
    Raises:
        UserError: a folder cannot be made or written to; on every rank.
    """

    def __init__(self, args: argparse.Namespace, epoch: int = 0, steps: int = 0):
        self.writer, self.path = None, None
        from_rank_zero(lambda: _make_folders(args.output_dir, args.log_dir))
        if not is_main_process():
            return
        write_lists()
        if args.log_dir:
            self.writer = SummaryWriter(args.log_dir, purge_step=steps + 1)
        if args.output_dir:
            self.path = Path(args.output_dir) / "log.txt"
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = self.path.with_name("log.txt.tmp")
            kept.write_text("".join(f"{line}\n" for line in lines if _epoch_of(line) < epoch))
            kept.replace(self.path)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Adds points to TensorBoard's curves at an optimiser step."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Adds a uint8 image [3, H, W] to TensorBoard."""
        if self.writer is not None:
            self.writer.add_image(name, image, step)

    def epoch(self, values: dict[str, float | int]) -> None:
        """Adds a line to log.txt and brings TensorBoard's file up to date."""
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _epoch_of(line: str) -> float:
    """The epoch of a line of log.txt; infinity for one that a crash has cut off."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _make_folders(*folders: str) -> None:
    for folder in filter(None, folders):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / ".writable").touch()
            (Path(folder) / ".writable").unlink()
        except OSError as error:
            raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from None


def describe_run(
    args: argparse.Namespace, model: nn.Module, precision: Precision, steps_per_epoch: int
) -> None:
    """Prints what will be trained how, and warns of a warm-up that takes much of the run."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    count = f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
    logger.info(f"model: {args.model}, {count} trained parameters")
    logger.info(
        f"batch: {global_batch(args)} images = {args.batch_size} x {args.accum_iter} "
        f"accumulated x {get_world_size()} processes, {steps_per_epoch} steps per epoch, "
        f"lr {args.lr:.3g}"
    )
    logger.info(
        f"device: {precision.device.type} x {get_world_size()}, {precision}, "
        f"torch {torch.__version__}"
    )
    if args.warmup_epochs > args.epochs / 5:
        logger.warning(
            f"warning: --warmup_epochs {args.warmup_epochs} is more than a fifth of "
            f"--epochs {args.epochs}"
        )


def console_line(
    place: str, left: float, terms: list[str], window: dict[str, float], device: torch.device
) -> str:
    """One line for people.

    Args:
        place: epoch and step.
        left: the rest of the run, in seconds.
        terms: the script's own words.
        window: a `MetricLogger.window()`, with `grad_norm` and `lr`.
    """
    eta = datetime.timedelta(seconds=round(left))
    rates = f"{window['images_per_second']:.0f} img/s  data {window['data_wait']:.0%}"
    step = f"grad {window['grad_norm']:.2g}  lr {window['lr']:.2e}"
    memory = f"mem {memory_gib(device):.1f} GiB"
    return "  ".join([place, f"eta {eta}", *terms, step, rates, memory])


def memory_gib(device: torch.device) -> float:
    """The most memory that this process has taken so far: the GPU's, or on CPUs the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
