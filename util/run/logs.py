"""What a run shows: console lines, TensorBoard's files, log.txt with a JSON object per epoch."""

import contextlib
import datetime
import json
import logging
import os
import resource
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from util.distributed import get_rank, get_world_size, is_main_process
from util.lr_sched import global_batch
from util.precision import Precision
from util.run.folder import LOG
from util.run.run import Run
from util.sizes import height_width

logger = logging.getLogger(__name__)

LOSSES = ("loss", "reconstruction", "contrastive", "noise", "noise_zero")
REPORT = 5.0  # seconds between lines of progress
USUAL_PATCHES = 1024  # of an image, at most: 512 pixels in patches of 16


def log_to_console() -> None:
    """Prints logged lines: rank 0's, and other ranks' warnings; no tracebacks of TensorBoard's."""
    rank = get_rank()
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # in a locale without unicode
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s rank {rank}: %(message)s",
        datefmt="%H:%M:%S",
        handlers=[Console(sys.stdout)],
        force=True,
    )
    threading.excepthook = _excepthook


class Console(logging.StreamHandler):
    """Given up quietly when it is gone (`| head`, a closed terminal, a full disk)."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError | ValueError) or isinstance(error, UnicodeError):
            super().handleError(record)
            return
        with contextlib.suppress(OSError, ValueError):  # what is left to flush goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        self.stream = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the run)


def _excepthook(args: threading.ExceptHookArgs) -> None:
    # `RunLog` gets the OSErrors of TensorBoard's thread too, and reports them.
    if not (isinstance(args.exc_value, OSError) and "Writer" in type(args.thread).__name__):
        threading.__excepthook__(args)


class RunLog:
    """TensorBoard's files and log.txt, written by rank 0 alone; nothing without a folder.

    A full disk does not end the run: what cannot be written is lost, with a warning.

    Args:
        args: output_dir of log.txt and log_dir of TensorBoard; '' for none.
        run: after its `begin`. TensorBoard's points from its next step on are dropped. If only the
            evaluation of an epoch is left, those of the last step too: both have the same place.
        steps: of an epoch.
    Attributes:
        _path, _folder: log.txt and TensorBoard's folder; empty on other ranks.
        _data: what was opened, for the first line.
        _steps, _offset: of an epoch; added to all, see `Run`.
        _writer, _purge_step: TensorBoard's, opened for the first point, which drops later ones.
    """

    def __init__(self, args: Namespace, run: Run, steps: int):
        self._steps, self._data = steps, run.data
        main = is_main_process()
        self._path = Path(args.output_dir, LOG) if args.output_dir and main else None
        self._folder = args.log_dir if main else ""
        self._writer: SummaryWriter | None = None
        self._offset = run.offset
        self._purge_step: int | None = run.offset + run.epoch * steps + min(run.step + 1, steps)

    def add_window(self, values: dict[str, float], step: int) -> None:
        """Adds a window's metrics to TensorBoard, at a step counted from the run's beginning."""
        tagged = {f"{'loss' if n in LOSSES else 'train'}/{n}": v for n, v in values.items()}
        self._scalars(tagged, step)

    def add_epoch(self, epoch: int, train: dict[str, float], tests: dict[str, float]) -> None:
        """Adds a line to log.txt, and the scores of the evaluation to TensorBoard.

        Args:
            train: the epoch's mean metrics, which the line names train_*.
            tests: scores by the name that they have in the line.
        """
        self._scalars({f"perf/{n}": v for n, v in tests.items()}, (epoch + 1) * self._steps)
        if self._path is None:
            return
        line = {"epoch": epoch} | {f"train_{name}": v for name, v in train.items()} | tests
        line |= {"data": self._data} if epoch == 0 else {}
        size = None
        try:
            with open(self._path, "a") as file:
                size = file.tell()
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self._path, size)  # to whole lines
            lost = f"the line of epoch {epoch} is lost"
            logger.warning(f"warning: cannot write {self._path}: {error.strerror}; {lost}")

    def add_image(self, name: str, image: Image.Image, epoch: int) -> None:
        """Adds a picture to TensorBoard at the end of an epoch."""
        step = self._offset + (epoch + 1) * self._steps
        pixels = np.asarray(image)
        self._write(lambda writer: writer.add_image(name, pixels, step, dataformats="HWC"))

    def _scalars(self, values: dict[str, float], step: int) -> None:
        step += self._offset
        if values:
            self._write(lambda writer: [writer.add_scalar(n, v, step) for n, v in values.items()])

    def _write(self, add: Callable[[SummaryWriter], Any]) -> None:
        if not self._folder:
            return
        try:
            if self._writer is None:
                self._writer = self._opened()
            add(self._writer)
            self._writer.flush()  # before a checkpoint that is later than these points
            self._purge_step = None
        except OSError as error:
            self._writer = None  # it stops at its first error; the next one starts a new file
            logger.warning(f"warning: cannot write to {self._folder}: {error.strerror}")
        except UnicodeError:  # LC_ALL=C, and a folder whose name is not ASCII
            why = "it cannot write to a folder of that name in this locale"
            logger.warning(f"warning: no TensorBoard in {self._folder}: {why}")
            self._folder = ""

    def _opened(self) -> SummaryWriter:
        # TensorBoard reads files in the order of their names: second, host, process, a count. Of
        # two of one second the later may come first, and then drops none of the other's points.
        while any(Path(self._folder).glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.05)
        return SummaryWriter(self._folder, purge_step=self._purge_step)

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()


def describe_run(args: Namespace, model: nn.Module, precision: Precision, steps: int) -> None:
    """Prints what will be trained how, and warns of settings that are rarely meant.

    Args:
        steps: of an epoch.
    """
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    count = f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
    logger.info(f"model: {args.model}, {count} trained parameters")
    processes, device = get_world_size(), precision.device.type
    logger.info(
        f"batch: {global_batch(args)} images = {args.batch_size} x {args.accum_iter} "
        f"accumulated x {processes} processes, {steps} steps per epoch, lr {args.lr:.3g}"
    )
    logger.info(f"device: {device} x {processes}, {precision}, torch {torch.__version__}")
    if not is_main_process():
        return
    warmup, epochs = args.warmup_epochs, args.epochs
    if warmup > epochs / 5:
        logger.warning(
            f"warning: --warmup_epochs {warmup} is more than a fifth of --epochs {epochs}"
        )
    height, width = height_width(args.input_size)
    if (patches := height * width // args.patch_size**2) > USUAL_PATCHES:
        given = f"{height}" if height == width else f"{height} {width}"
        why = f"--input_size {given} with patches of {args.patch_size} pixels"
        logger.warning(f"warning: {why} makes {patches:,} patches per image: unusual, and slow")


class Progress:
    """Lines about how far some long work is, one every few seconds.

    Args:
        total: how much there is to do.
    """

    def __init__(self, total: int):
        self.total = total
        self._begin = self._shown = time.monotonic()

    def show(self, done: int, what: str, where: str = "") -> None:
        """Such as `WHERE10 of 20 WHAT, eta 0:00:10`, if it is time."""
        if (now := time.monotonic()) - self._shown > REPORT:
            self._shown = now
            seconds = (now - self._begin) * (self.total - done) / done
            left = datetime.timedelta(seconds=round(seconds))
            logger.info(f"{where}{done:,} of {self.total:,} {what}, eta {left}")


def console_line(place: str, left: float, window: dict[str, float], device: torch.device) -> str:
    """One console line.

    Args:
        place: epoch and step.
        left: the rest of the run, in seconds.
        window: a `MetricLogger.window()`, with `grad_norm` and `lr`.
    """
    words = [place, f"eta {datetime.timedelta(seconds=round(left))}", f"loss {window['loss']:.4f}"]
    if "reconstruction" in window:
        words.append(f"reconstruction {window['reconstruction']:.4f}")
    if "noise" in window:
        words.append(f"noise {window['noise']:.5f} (zero {window['noise_zero']:.5f})")
    if "contrastive" in window:
        words.append(
            f"contrastive {window['contrastive']:.3f} (top-1 {window['contrastive_top1']:.1%})"
        )
    words.append(f"grad {window['grad_norm']:.2g}  lr {window['lr']:.2e}")
    words.append(f"{window['images_per_second']:.0f} img/s  data {window['data_wait']:.0%}")
    return "  ".join([*words, f"mem {memory_gib(device):.1f} GiB"])


def memory_gib(device: torch.device) -> float:
    """The most memory that this process has used so far: on the GPU, or in RAM on CPUs."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
