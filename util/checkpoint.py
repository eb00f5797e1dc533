"""Checkpoints: written whole or not at all, read without running what is in them."""

import argparse
import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.datasets import global_batch
from util.distributed import from_rank_zero, get_rank, get_world_size, is_main_process
from util.errors import Stopped, UserError
from util.interrupt import Interrupts
from util.misc import MetricLogger

logger = logging.getLogger(__name__)

LAST = "checkpoint-last.pth"


def save(state: dict[str, Any], path: Path) -> None:
    """Writes tensors and plain types: a reader finds the old file or the new, never a part.

    Raises:
        UserError: the file cannot be written (no permission, disk full).
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename, too, must outlive a power cut
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's zip writer, disk full
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from None


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU: tensors, plain types and `argparse.Namespace` alone.

    Raises:
        UserError: no such file, not a checkpoint, or one that holds other classes, which could
            run code; none of it is run.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        # The CAN release and MAE store their flags as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).replace("WeightsUnpickler error: ", "").strip().splitlines()
        reason = next((line for line in reason if "GLOBAL" in line or "Unsupported" in line), "")
        raise UserError(
            f"{path} is not a checkpoint of tensors and plain types; nothing in it "
            f"was run. {reason}".strip()
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read checkpoint {path}: {line}") from None
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path} holds no model: expected a dictionary with the key 'model'")
    return state


def load_model(model: nn.Module, weights: dict[str, torch.Tensor], source: str | Path) -> None:
    """Loads all of a model's tensors.

    Raises:
        UserError: a tensor is missing, left over or of another shape; names the first.
    """
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise UserError(f"{source} is of another architecture: it has no {name}")
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{source} is of another architecture: {name} is "
                f"{list(weights[name].shape)} there, {list(tensor.shape)} here"
            )
    for name in weights:
        if name not in own:
            raise UserError(f"{source} is of another architecture: {name} has no place here")
    model.load_state_dict(weights)


class Run:
    """Where one training run's state goes and comes from, and when.

    A checkpoint's `epoch` is the last complete one, `step` the optimiser steps done of the next,
    `metrics` what each rank has measured in them. Random numbers need no state: they are a
    function of (seed, epoch, step, rank), see `util.misc.seed_all`.

    Args:
        args: output_dir ('' saves nothing), resume, save_freq, save_interval, epochs, start_epoch.
        model: not wrapped in DDP.
        **states: what else has `state_dict()` and is part of the run: optimizer, scaler, ...
    """

    def __init__(self, args: argparse.Namespace, model: nn.Module, **states: Any):
        self.args, self.model, self.states = args, model, states
        self.folder = Path(args.output_dir) if args.output_dir else None
        self.epoch, self.step = args.start_epoch, 0
        self._metrics: list[dict] = []
        self._interrupts = Interrupts(60 * args.save_interval)

    def resume(self) -> None:
        """Loads what `--resume` names; `epoch` and `step` are then where to begin.

        Raises:
            UserError: no such checkpoint, not a checkpoint, or one of another run.
        """
        path = self.args.resume
        if path == "auto":
            path = self.folder / LAST
            if not from_rank_zero(path.exists):
                logger.info(f"no {path} yet: starting from the beginning")
                return
        if not path:
            return
        state = load(path)
        load_model(self.model, state["model"], path)
        for name, part in self.states.items():
            if name not in state:
                raise UserError(f"{path} cannot be resumed: it has weights, but no {name} state")
            try:
                part.load_state_dict(state[name])
            except (ValueError, RuntimeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path} cannot be resumed: its {name} state belongs to another objective or "
                    f"precision ({str(error).splitlines()[0]})"
                ) from None
        self.epoch = state["epoch"] + 1
        # In images, so that another number of processes goes on from the same place.
        self.step = state.get("images", 0) // global_batch(self.args)
        self._metrics = state.get("metrics", [])
        logger.info(f"resumed {path}: epoch {self.epoch}, step {self.step}")

    def begin_epoch(self, metrics: MetricLogger) -> int:
        """The steps of this epoch that are done already; `metrics` takes up what they measured."""
        step, self.step = self.step, 0
        if step and len(self._metrics) == get_world_size():
            metrics.load_state_dict(self._metrics[get_rank()])
        return step

    def after_step(self, epoch: int, step: int, metrics: MetricLogger) -> None:
        """Saves within an epoch when the interval is over, or when asked to stop.

        Args:
            step: optimiser steps done of the epoch.
        Raises:
            Stopped: some rank got a signal; on all ranks, after saving.
        """
        number, due = self._interrupts.poll()
        if not (number or due):
            return
        states = [None] * get_world_size()
        torch.distributed.all_gather_object(states, metrics.state_dict())
        self._write(epoch - 1, images=step * global_batch(self.args), metrics=states)
        if number:
            raise Stopped(number)

    def save(self, epoch: int) -> None:
        """Saves the state after an epoch: always the last, every save_freq epochs a numbered."""
        numbered = (epoch + 1) % self.args.save_freq == 0 or epoch + 1 == self.args.epochs
        names = [LAST, f"checkpoint-{epoch}.pth"] if numbered else [LAST]
        self._write(epoch, *names)

    def _write(self, epoch: int, *names: str, **position: Any) -> None:
        self._interrupts.saved()
        if self.folder is None or not is_main_process():
            return
        state = {name: part.state_dict() for name, part in self.states.items()}
        state |= {"model": self.model.state_dict(), "epoch": epoch, "args": vars(self.args)}
        for name in names or (LAST,):
            save(state | position, self.folder / name)
