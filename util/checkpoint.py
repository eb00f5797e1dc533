"""Checkpoints: written whole or not at all, read without running what is in them."""

import argparse
import contextlib
import hashlib
import logging
import os
import pickle
import re
import socket
import stat
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import safetensors.torch
import torch
from torch import Tensor, nn

from util.distributed import from_rank_zero
from util.errors import UserError
from util.pos_embed import interpolate_pos_embed

logger = logging.getLogger(__name__)

LAST = "checkpoint-last.pth"
BEST = "checkpoint-best.pth"
NUMBERED = "checkpoint-{}.pth"  # by epoch
SILENCE = 60.0  # seconds of it that end a download


def save(state: dict[str, Any], path: Path) -> None:
    """Writes tensors and plain types: a reader finds the old file or the new, never a part.

    Raises:
        UserError: the file cannot be written (no permission, disk full); the old one is untouched.
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
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # the disk may have turned read-only
            temporary.unlink()
        # torch's zip writer hides what it met behind a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror}") from None


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
    if not str(source).startswith(("http://", "https://", "file://")):
        return _checked(_read(Path(source)), source)
    from_rank_zero(lambda: _download(source))  # other machines then fetch their own copy
    path = _download(source)
    try:
        return _checked(_read(path), source)
    except UserError:
        path.unlink(missing_ok=True)  # cut short, perhaps: the next time fetches it again
        raise


def _read(path: Path) -> Any:
    """What is in a file; raises as `load`."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no checkpoint at {path}") from None
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"no checkpoint at {path}: it is a folder or a device, not a file")
    if status.st_size == 0:
        raise UserError(f"cannot read checkpoint {path}: it is empty")
    try:
        if path.suffix == ".safetensors":
            return {"model": safetensors.torch.load_file(path)}
        _refuse_compressed(path, status.st_size)
        # The CAN release and MAE store their flags as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).replace("WeightsUnpickler error: ", "").strip().splitlines()
        reason = next((line for line in reason if "GLOBAL" in line or "Unsupported" in line), "")
        raise UserError(
            f"{path} is not a checkpoint of tensors and plain types; nothing in it "
            f"was run. {reason}".strip()
        ) from None
    except Exception as error:  # of any class: the readers meet garbage unprepared
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read checkpoint {path}: {line}") from None


def _refuse_compressed(path: Path, size: int) -> None:
    """Raises ValueError for a zip archive that unpacks to more than its size in bytes."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return
        unpacked = sum(member.file_size for member in zipfile.ZipFile(file).infolist())
    if unpacked > size:
        raise ValueError(f"{size} bytes that unpack to {unpacked}, and torch compresses nothing")


def _checked(state: Any, source: str | Path) -> dict[str, Any]:
    """What `load` returns, of what a file held."""
    if isinstance(state, dict) and state and all(isinstance(v, Tensor) for v in state.values()):
        state = {"model": state}
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict) or not all(_is_weight(*item) for item in model.items()):
        raise UserError(
            f"{source} holds no model: expected tensors by name, or a dictionary with them as "
            "'model'"
        )
    if isinstance(state.get("args"), argparse.Namespace):
        state["args"] = vars(state["args"])
    if not isinstance(state.get("args", {}), dict):
        del state["args"]
    return state


def _is_weight(name: Any, value: Any) -> bool:
    """Whether it is a named tensor whose numbers are all there."""
    if not (isinstance(name, str) and isinstance(value, Tensor)):
        return False
    there = value.layout == torch.strided and value.device.type == "cpu"
    return there and value.nbytes <= value.untyped_storage().nbytes()


def _download(url: str) -> Path:
    """A URL's file in torch.hub's cache, fetched if need be; whole or not at all."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        place = urlparse(url)
        name = Path(place.path).name
        # The hash that torch.hub's names carry, or a date.
        known = re.search(r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,})\.", name)
        # Many are namesakes.
        path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
        if not path.is_file():
            if place.scheme == "file" and not Path(url2pathname(place.path)).is_file():
                raise FileNotFoundError("no such file")
            folder.mkdir(parents=True, exist_ok=True)
            logger.info(f"downloading {url} to {path}")
            before = socket.getdefaulttimeout()
            socket.setdefaulttimeout(SILENCE)
            try:
                torch.hub.download_url_to_file(url, str(path), known and known[1], progress=False)
            finally:
                socket.setdefaulttimeout(before)
    except (OSError, ValueError, RuntimeError, HTTPException) as error:
        raise UserError(f"cannot download {url}: {error}") from None  # RuntimeError: another hash
    return path


def load_model(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Loads all of a model's tensors.

    Raises:
        UserError: a tensor is missing, left over or of another shape; names the first.
    """
    check_same(model.state_dict(), weights, source)
    model.load_state_dict(weights)


def check_same(own: dict[str, Tensor], weights: dict[str, Tensor], source: str | Path) -> None:
    """Raises UserError unless names, shapes and kinds are the same and all weights finite."""
    for name, tensor in own.items():
        if name not in weights:
            raise UserError(f"{source} is of another architecture: it has no {name}")
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{source} is of another architecture: {name} is "
                f"{list(weights[name].shape)} there, {list(tensor.shape)} here"
            )
        if weights[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(
                f"{source} is damaged: {name} is {weights[name].dtype}, not {tensor.dtype}"
            )
        if not weights[name].float().isfinite().all():
            raise UserError(f"{source} is of no use: {name} is not finite (NaN or infinite)")
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
