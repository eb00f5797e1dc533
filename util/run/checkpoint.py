"""Checkpoint files: written whole or not at all, read without running what is in them."""

import _codecs
import argparse
import contextlib
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import socket
import stat
import zipfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from util.distributed import from_rank_zero
from util.errors import UserError
from util.layouts import CONTAINERS, find_weights, settle_grid, to_ours
from util.sizes import SIZES

logger = logging.getLogger(__name__)

LAST = "checkpoint-last.pth"
BEST = "checkpoint-best.pth"
NUMBERED = "checkpoint-{}.pth"  # by epoch
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)*")  # left in names by DDP and compile
# What a checkpoint may hold besides tensors and plain types: the flags of MAE and the CAN release,
# and numbers of NumPy's.
ALLOWED = [argparse.Namespace, np.ndarray, np.dtype, _codecs.encode]
ALLOWED += [type(np.dtype(kind)) for kind in "?bhilqBHILQefd"]
ALLOWED += [
    (value.__reduce__()[0], f"numpy.{core}.multiarray.{name}")  # NumPy 2, NumPy 1
    for value, name in ((np.float64(0), "scalar"), (np.zeros(0), "_reconstruct"))
    for core in ("_core", "core")
]
FLAGS = "can_flags"  # in a .safetensors file's metadata: what images it is for, as JSON
HUGGING_FACE_FILES = ("pytorch_model.bin", "model.safetensors")  # in a model's folder
BLOCK = 2**24  # bytes copied at once
DOWNLOAD_TIMEOUT = 60.0  # seconds without data
HASH = re.compile(
    r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,})\."
)  # a hash in torch.hub's names, not a date


def save(state: dict[str, Any], path: Path) -> None:
    """Writes tensors and plain types; a reader finds the old file or the new one, never a part.

    Raises:
        UserError: the file cannot be written (no permission, disk full); the old one is untouched.
    """
    _write(path, lambda file: torch.save(state, file))


def copy_file(source: Path, path: Path) -> bool:
    """Copies a checkpoint, as safely as `save`; False if it cannot be read, or not be written.

    Not a link: damage to one file must leave the other good.
    """

    def copy(file: IO[bytes]) -> None:
        with open(source, "rb") as content:
            shutil.copyfileobj(content, file, BLOCK)

    try:
        _write(path, copy)
    except UserError:
        return False
    return True


def _write(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every file system can
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # so that the rename survives a power cut
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # the disk may have become read-only
            temporary.unlink()
        # torch's zip writer turns an OSError into a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror}") from None


def load(source: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU: only tensors, plain types and `argparse.Namespace`.

    Args:
        source: a path, or a URL (http, https, file), which is downloaded into torch.hub's cache.
    Returns:
        At least "model", tensors by name; also for a file of only tensors, as timm's and
        `.safetensors` are. Flags, if the file has any, as the dictionary "args".
    Raises:
        UserError: no such file, not a checkpoint, or one that holds other classes, which could
            run code; none of it is run.
    """
    if not str(source).startswith(("http://", "https://", "file://")):
        return _checked(_read(Path(source)), source)
    from_rank_zero(lambda: _download(source))  # then each other machine downloads its own copy
    path = _download(source)
    try:
        return _checked(_read(path), source)
    except UserError:
        path.unlink(missing_ok=True)  # it may be incomplete: the next start downloads it again
        raise


def load_published(source: str | Path) -> dict[str, Any]:
    """As `load`, from any of the layouts of `util.layouts`; "model" is in ours.

    Args:
        source: also a folder of Hugging Face's.
    """
    folder, flags = source, {}
    for name in HUGGING_FACE_FILES if os.path.isdir(folder) else ():
        if os.path.exists(file := os.path.join(folder, name)):
            source, flags = file, _beside(Path(folder))
    state = settle_grid(load(source))
    flags = state.get("args", flags)
    return state | {"model": to_ours(state["model"], source), "args": flags}


def _beside(folder: Path) -> dict[str, Any]:
    """What timm's and Hugging Face's files beside weights tell of images, as flags of ours.

    Raises:
        UserError: the model has another number of heads than ours of its width, or another kind.
    """
    found = []
    for name in ("config.json", "preprocessor_config.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads((folder / name).read_text()))
    settings = {name: value for part in found for name, value in part.items()}
    width, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    ours = {size.embed_dim: size.num_heads for size in SIZES.values()}
    if heads and ours.get(width, heads) != heads:
        raise UserError(f"{folder}: {heads} heads for width {width}, where ours have {ours[width]}")
    if isinstance(settings.get("pretrained_cfg"), dict):  # timm's
        settings |= settings["pretrained_cfg"]
    size = settings.get("input_size")
    channels, *sides = size if isinstance(size, list) and len(size) == 3 else (None,)
    mode = {"squash": "squash", "border": "pad", "center": "crop"}.get(settings.get("crop_mode"))
    flags = {
        "input_size": sides or settings.get("image_size"),
        "in_chans": channels or settings.get("num_channels"),
        "pixel_mean": settings.get("mean") or settings.get("image_mean"),
        "pixel_std": settings.get("std") or settings.get("image_std"),
        "resize": mode,
        "global_pool": settings.get("global_pool") == "avg",
    }
    return {name: value for name, value in flags.items() if value}


def _metadata(path: Path) -> dict[str, Any]:
    """The flags that `util.export` writes into a .safetensors file, as "args", if there are any."""
    with safetensors.safe_open(path, "pt") as file:
        flags = (file.metadata() or {}).get(FLAGS)
    return {"args": json.loads(flags)} if flags else {}


def _read(path: Path) -> Any:
    """What a file holds; raises as `load`."""
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
            return {"model": safetensors.torch.load_file(path)} | _metadata(path)
        held = _check_archive(path)
        with torch.serialization.safe_globals(ALLOWED):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if held is not None:
            _check_sizes(state, held)
        return state
    except pickle.UnpicklingError as error:
        reason = str(error).replace("WeightsUnpickler error: ", "").strip().splitlines()
        reason = next((line for line in reason if "GLOBAL" in line or "Unsupported" in line), "")
        why = "is not a checkpoint of tensors and plain types; nothing in it was run."
        raise UserError(f"{path} {why} {reason}".strip()) from None
    except Exception as error:  # the readers raise all kinds for files that are not theirs
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read checkpoint {path}: {line}") from None


def _check_archive(path: Path) -> int | None:
    """The bytes that a zip archive, as torch writes, holds for tensors; None for another file.

    Raises:
        ValueError: it is damaged, for which torch does not look.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # of an older torch
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged, members = archive.testzip(), archive.infolist()
    except zipfile.BadZipFile:
        raise ValueError("it is cut short, or damaged") from None
    if damaged:
        raise ValueError(f"it is damaged: {damaged} does not have its checksum")
    return sum(member.file_size for member in members if "/data/" in member.filename)


def _check_sizes(state: Any, held: int) -> None:
    """Raises ValueError where tensors claim more than the archive holds; older torch reads on."""
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    storages = [t.untyped_storage() for t in tensors if t.layout == torch.strided and not t.is_meta]
    claimed = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if claimed > held:
        raise ValueError(f"it is damaged: tensors of {claimed} bytes, of which it has {held}")


def _checked(state: Any, source: str | Path) -> dict[str, Any]:
    """The result of `load`, from a file's content."""
    if isinstance(state, dict) and state and all(isinstance(v, Tensor) for v in state.values()):
        state = {"model": state}
    model = find_weights(state)
    if model is None:
        names = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else "no names"
        wanted = f"expected tensors by name, alone or as {', '.join(CONTAINERS)}"
        raise UserError(f"{source} holds no model: it has {names or 'nothing'}; {wanted}")
    state["model"] = {WRAPPERS.sub("", name): tensor for name, tensor in model.items()}
    if isinstance(state.get("args"), argparse.Namespace):
        state["args"] = vars(state["args"])
    if not isinstance(state.get("args", {}), dict):
        del state["args"]
    return state


def _download(url: str) -> Path:
    """A URL's file in torch.hub's cache, downloaded if it is not there yet."""
    name = Path(urlparse(url).path).name
    known = HASH.search(name)
    # Other URLs' files may have the same name.
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if path.is_file():
        return path
    logger.info(f"downloading {url} to {path}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), known and known[1], progress=False)
    except (OSError, ValueError, RuntimeError, HTTPException) as error:
        raise UserError(f"cannot download {url}: {error}") from None  # RuntimeError: another hash
    finally:
        socket.setdefaulttimeout(before)
    return path
