"""What a run shows: console lines, TensorBoard's files, log.txt with a JSON object per epoch."""

import argparse
import contextlib
import datetime
import json
import logging
import math
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from util.distributed import from_rank_zero, get_world_size, is_main_process
from util.errors import UserError
from util.file_list import write_lists
from util.folder import clear_folder
from util.lr_sched import global_batch
from util.precision import Precision
from util.run import Run

logger = logging.getLogger(__name__)


class RunLog:
    """Written by rank 0 alone; nothing is written where no folder is given.

    A full disk does not end the run. Lines of log.txt then wait for the next epoch, in checkpoints
    if need be; TensorBoard misses what it could not write.

    Args:
        args: output_dir and log_dir, made here if need be; overwrite.
        run: where a resumed run begins; whatever was logged of later steps is taken back. Where an
            epoch's training is done, that is its last step, where its evaluation stands, too.
        steps: of an epoch.
    Raises:
        UserError: a folder cannot be made or written to; on every rank.
    """

    def __init__(self, args: argparse.Namespace, run: Run, steps: int):
        self.writer, self.folder, self.path = None, None, None
        self._purge_step: int | None = run.epoch * steps + min(run.step + 1, steps)
        self._waiting = run.waiting
        from_rank_zero(lambda: _make_folders(args.output_dir, args.log_dir))
        from_rank_zero(lambda: clear_folder(args))
        if args.output_dir:
            path = Path(args.output_dir) / "log.txt"
            there = from_rank_zero(lambda: _cut_off(path, run.epoch))
            self._waiting[:] = [w for w in self._waiting if _epoch_of(w) not in there]
        if not is_main_process():
            return
        write_lists()
        self.folder = args.log_dir or None
        self.path = path if args.output_dir else None
        threading.excepthook = _excepthook

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Adds points to TensorBoard's curves at an optimiser step."""

        def add(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._tensorboard(add)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Adds a uint8 image [3, H, W] to TensorBoard."""
        self._tensorboard(lambda writer: writer.add_image(name, image, step))

    def _tensorboard(self, add: Callable[[SummaryWriter], None]) -> None:
        if self.folder is None:
            return
        try:
            if self.writer is None:
                self.writer = SummaryWriter(self.folder, purge_step=self._purge_step)
            add(self.writer)
            self.writer.flush()  # a save that follows counts on it
            self._purge_step = None
        except OSError as error:
            self.writer = None  # it ends at its first error; the next begins a file of its own
            logger.warning(f"warning: cannot write to {self.folder}: {error.strerror}")

    def epoch(self, values: dict[str, float | int]) -> None:
        """Adds a line to log.txt."""
        if self.path is None:
            return
        self._waiting.append(json.dumps(values) + "\n")
        self._write_lines()

    def _write_lines(self) -> None:
        """What has waited until now."""
        if not self._waiting:
            return
        size = None
        try:
            with open(self.path, "a") as file:
                size = file.tell()
                file.writelines(self._waiting)
            self._waiting.clear()
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)  # no part of a line stays
            logger.warning(f"warning: cannot write {self.path}: {error.strerror}")

    def close(self) -> None:
        """Writes what has waited until now."""
        self._write_lines()
        if self.writer is not None:
            with contextlib.suppress(OSError):
                self.writer.close()


def _excepthook(args: threading.ExceptHookArgs) -> None:
    # TensorBoard's thread passes its OSError on to `RunLog` besides: once is enough.
    if not (isinstance(args.exc_value, OSError) and "Writer" in type(args.thread).__name__):
        threading.__excepthook__(args)


def _cut_off(path: Path, epoch: int) -> set[float]:
    """Takes an epoch's line and later ones off log.txt, and what a crash has left of one.

    Returns:
        The epochs whose lines stay.
    """
    try:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = {line: _epoch_of(line) for line in lines if _epoch_of(line) < epoch}
        temporary = path.with_name("log.txt.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)
        return set(kept.values())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _epoch_of(line: str) -> float:
    """The epoch of a line of log.txt; infinity for one that a crash has cut off."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _make_folders(*folders: str) -> None:
    for folder in filter(None, folders):  # first of all, not to make one of two
        there = next((p for p in [Path(folder), *Path(folder).parents] if os.path.lexists(p)), None)
        if there is not None and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            why = "no permission" if there.is_dir() else "is a file"
            raise UserError(f"cannot write to the folder {folder}: {there}: {why}")
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
