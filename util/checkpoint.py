"""Checkpoints: written whole or not at all, read without running what is in them."""

import argparse
import hashlib
import logging
import math
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors.torch
import torch
from torch import Tensor, nn

from util.distributed import (
    from_rank_zero,
    get_rank,
    get_world_size,
    host_group,
    is_main_process,
)
from util.errors import Stopped, UserError
from util.interrupt import Interrupts
from util.lr_sched import global_batch
from util.misc import MetricLogger
from util.pos_embed import interpolate_pos_embed

logger = logging.getLogger(__name__)

LAST = "checkpoint-last.pth"
BEST = "checkpoint-best.pth"
READ_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    zipfile.BadZipFile,
    safetensors.SafetensorError,
)


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


def load(source: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU: tensors, plain types and `argparse.Namespace` alone.

    Args:
        source: a path, or a URL (http, https, file), which is downloaded into torch.hub's cache.
    Returns:
        At least "model", the tensors by name, also for a file of nothing but tensors, as timm's
        and `.safetensors` are; flags, where it has any, as the dictionary "args".
    Raises:
        UserError: no such file, not a checkpoint, or one that holds other classes, which could
            run code; none of it is run.
    """
    if str(source).startswith(("http://", "https://", "file://")):
        from_rank_zero(lambda: _download(source))  # other machines then fetch their own copy
        path = _download(source)
    else:
        path = Path(source)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return {"model": safetensors.torch.load_file(path)}
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
    except READ_ERRORS as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read checkpoint {path}: {line}") from None
    if isinstance(state, dict) and state and all(isinstance(v, Tensor) for v in state.values()):
        state = {"model": state}
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict) or not all(isinstance(v, Tensor) for v in model.values()):
        raise UserError(
            f"{path} holds no model: expected tensors by name, or a dictionary with them as 'model'"
        )
    if isinstance(state.get("args"), argparse.Namespace):
        state["args"] = vars(state["args"])
    return state


def _download(url: str) -> Path:
    """A URL's file in torch.hub's cache, fetched if need be; whole or not at all."""
    name = Path(urlparse(url).path).name
    known = re.search(r"-([0-9a-f]{8,})\.", name)  # the hash that torch.hub's names carry
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"  # many are namesakes
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            logger.info(f"downloading {url} to {path}")
            torch.hub.download_url_to_file(url, str(path), known and known[1], progress=False)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: another hash
            raise UserError(f"cannot download {url}: {error}") from None
    return path


def load_model(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Loads all of a model's tensors.

    Raises:
        UserError: a tensor is missing, left over or of another shape; names the first.
    """
    check_same(model.state_dict(), weights, source)
    model.load_state_dict(weights)


def check_same(own: dict[str, Tensor], weights: dict[str, Tensor], source: str | Path) -> None:
    """Raises UserError unless names and shapes are the same."""
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


# What a checkpoint may hold besides the encoder, by the beginnings of names.
OTHER_PARTS = {
    "decoder": ("decoder_", "mask_token"),
    "projection head": ("projection_head.",),
    "noise conditioning": ("noise_pe_mlp.",),
    "classifier": ("head.",),
}


def encoder_part(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The encoder's tensors, and how many there are of each other part."""
    encoder, others = {}, {}
    for name, tensor in weights.items():
        name = name.removeprefix("module.").removeprefix("_orig_mod.")  # left by DDP, compile
        for part, beginnings in OTHER_PARTS.items():
            if name.startswith(beginnings):
                others[part] = others.get(part, 0) + 1
                break
        else:
            encoder[name] = tensor
    return encoder, others


def load_encoder(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Loads all of a downstream ViT but its `head`, and says what was used and what was not.

    Position embeddings are resized to the model's grid. Where the model has a `fc_norm` and the
    weights have none, as pretrained ones do, it stays new and their `norm` is left, as in MAE.

    Args:
        weights: a "model" of `load`: of CAN or MAE, pretrained or fine-tuned, or timm's.
        source: where they come from, for messages.
    Raises:
        UserError: a tensor of the encoder is missing or of another shape, or the weights hold one
            that has no place in it; names the first.
    """
    encoder, unused = encoder_part(weights)
    wanted = {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}
    new = ["head"]
    if "fc_norm.weight" in wanted and "norm.weight" in encoder:
        new.append("fc_norm")
        for kind in ("weight", "bias"):
            del wanted[f"fc_norm.{kind}"], encoder[f"norm.{kind}"]
        unused["norm"] = 2
    interpolate_pos_embed(model, encoder)
    check_same(wanted, encoder, source)
    model.load_state_dict(model.state_dict() | encoder)
    left = ", ".join(f"{part} ({count})" for part, count in unused.items()) or "nothing"
    logger.info(
        f"encoder: {len(encoder)} tensors of {source}; left there: {left}; new: {', '.join(new)}"
    )


class Run:
    """Where one training run's state goes and comes from, and when.

    A checkpoint's `epoch` is the last complete one, `step` the optimiser steps done of the next,
    `metrics` what each rank has measured in them. Random numbers need no state: they are a
    function of (seed, epoch, step, rank), see `util.misc.seed_all`.

    `best` is the highest score so far.

    Args:
        args: output_dir ('' saves nothing), resume, save_freq, save_interval, epochs, start_epoch.
        model: not wrapped in DDP.
        **states: what else has `state_dict()` and is part of the run: optimizer, scaler, ...
    """

    def __init__(self, args: argparse.Namespace, model: nn.Module, **states: Any):
        self.args, self.model, self.states = args, model, states
        self.device = next(model.parameters()).device
        self.folder = Path(args.output_dir) if args.output_dir else None
        self.epoch, self.step = args.start_epoch, 0
        self._metrics: list[dict] = []
        self._interrupts = Interrupts(60 * args.save_interval)
        self.best = -math.inf

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
        self.best = state.get("best", self.best)
        logger.info(f"resumed {path}: epoch {self.epoch}, step {self.step}")

    def begin_epoch(self, metrics: MetricLogger) -> int:
        """The steps of this epoch that are done already; `metrics` takes up what they measured."""
        step, self.step = self.step, 0
        if step and len(self._metrics) == get_world_size():
            metrics.load_state_dict(self._metrics[get_rank()], self.device)
        return step

    def after_step(
        self, epoch: int, step: int, metrics: MetricLogger, grad_norm: Tensor | None = None
    ) -> None:
        """Saves within an epoch when the interval is over, or when asked to stop.

        Args:
            step: optimiser steps done of the epoch.
            grad_norm: of the step, the same on all ranks, where it must be finite.
        Raises:
            UserError: what would be saved is not finite; on all ranks.
            Stopped: some rank got a signal; on all ranks, after saving.
        """
        number, due = self._interrupts.poll()
        if not (number or due):
            return
        if not metrics.finite() or not (grad_norm is None or grad_norm.isfinite()):
            raise UserError(
                f"loss or gradient is not finite at epoch {epoch}, step {step}; the last "
                "checkpoint is from before"
            )
        states = [None] * get_world_size()
        torch.distributed.all_gather_object(states, metrics.state_dict(), group=host_group())
        self._write(epoch - 1, images=step * global_batch(self.args), metrics=states)
        if number:
            raise Stopped(number)

    def save(self, epoch: int, score: float | None = None) -> None:
        """Saves the state after an epoch: always the last, every save_freq epochs a numbered.

        Args:
            score: the state with the highest so far is also kept as the best.
        """
        names = [LAST]
        if (epoch + 1) % self.args.save_freq == 0 or epoch + 1 == self.args.epochs:
            names.append(f"checkpoint-{epoch}.pth")
        if score is not None and score > self.best:
            self.best = score
            names.append(BEST)
        self._write(epoch, *names)

    def _write(self, epoch: int, *names: str, **position: Any) -> None:
        self._interrupts.saved()
        if self.folder is None or not is_main_process():
            return
        state = {name: part.state_dict() for name, part in self.states.items()}
        state |= {"model": self.model.state_dict(), "epoch": epoch, "best": self.best}
        state["args"] = vars(self.args)
        for name in names or (LAST,):
            save(state | position, self.folder / name)
