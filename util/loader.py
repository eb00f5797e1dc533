"""Batches that arrive on the training device, ready for the model."""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from util.distributed import from_rank_zero, get_world_size, host_group
from util.errors import UserError

logger = logging.getLogger(__name__)

MOST_BAD = 0.01  # of a data set's images may be unreadable; one always may
BAD_LIST = "bad-images.txt"

_warned_of: set[str] = set()  # files


class DeviceLoader(DataLoader):
    """A loader of (inputs, labels) whose inputs are on the device.

    On a GPU they are copied and finished on a stream of their own. Nothing waits for it but the
    step that needs them; while the host runs ahead, that work overlaps with the step before.

    Args:
        device: where the inputs go.
        finish: makes the device's inputs of a batch of the data set's: on a GPU on the loader's
            stream, on a CPU in the loader's processes. If not given, inputs are copied as they are.
        output_dir: where bad images are listed; '' nowhere.
    """

    def __init__(
        self,
        *args: Any,
        device: torch.device,
        finish: Callable[[Any, torch.device], Any] | None = None,
        output_dir: str = "",
        **kwargs: Any,
    ):
        if finish and device.type == "cpu":
            kwargs["collate_fn"] = partial(_finished_batch, finish, device)
            finish = None
        super().__init__(*args, **kwargs)
        self.output_dir = output_dir
        self.bad: set[str] = set()  # the same on all ranks
        self._met: dict[str, str] = {}  # by this rank, since the last report
        self.device, self.finish = device, finish or to_device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        try:
            batches = super().__iter__()
        except OSError as error:  # too many open files, no memory for another process
            raise UserError(
                f"--num_workers {self.num_workers}: cannot start them: {error.strerror}"
            ) from None
        for inputs, labels, *bad in batches:
            for names, reasons in bad:  # as `SeededDataset` has them
                self._met |= {n: why for n, why in zip(names, reasons, strict=True) if n}
            if self.stream is None:
                yield self.finish(inputs, self.device), labels
                continue
            with torch.cuda.stream(self.stream):
                inputs = self.finish(inputs, self.device)
            compute = torch.cuda.current_stream(self.device)
            compute.wait_stream(self.stream)
            for tensor in inputs if isinstance(inputs, list | tuple) else [inputs]:
                tensor.record_stream(compute)  # its memory is not free before the step is done
            yield inputs, labels

    def report_bad(self) -> None:
        """Warns of the bad images that any rank has met since the last call; every rank calls it.

        Raises:
            UserError: they are too many; on every rank.
        """
        met, self._met = _over_ranks(self._met), {}
        new = sorted(met.keys() - self.bad)
        if not new:
            return
        self.bad.update(new)
        where = from_rank_zero(lambda: self._tell({name: met[name] for name in new}))
        if len(self.bad) > max(1, MOST_BAD * len(self.dataset)):
            raise UserError(
                f"{len(self.bad)} of {len(self.dataset)} images are not readable, more than "
                f"{MOST_BAD:.0%}: {where}"
            )

    def _tell(self, bad: dict[str, str]) -> str:
        """Warns of bad images and lists them; returns the list's path, or without one a few."""
        warn_of(bad)
        path = Path(self.output_dir, BAD_LIST)
        if self.output_dir and _append(path, bad):
            return f"listed in {path}"
        return ", ".join(sorted(self.bad)[:3]) + ", ..."


def warn_of(bad: dict[str, str]) -> None:
    """Says of each file once that it is bad, and why."""
    for name, reason in bad.items():
        if name not in _warned_of:
            logger.warning(f"warning: {name!r} is not readable ({reason}): another image is used")
    _warned_of.update(bad)


def _over_ranks(mapping: dict[str, str]) -> dict[str, str]:
    """The union of all ranks' mappings."""
    if get_world_size() == 1:
        return mapping
    size = torch.tensor(len(mapping))
    dist.all_reduce(size, group=host_group())
    if not size:  # as nearly always
        return {}
    mappings = [None] * get_world_size()
    dist.all_gather_object(mappings, mapping, group=host_group())
    return {name: why for mapping in mappings for name, why in mapping.items()}


def _append(path: Path, names: Iterable[str]) -> bool:
    """Adds names, a line each, to a list unless they are in it; False where it is not writable."""
    try:
        with open(path, "a+", errors="surrogateescape") as file:
            file.seek(0)
            known = set(file.read().splitlines())
            file.writelines(f"{name}\n" for name in names if name not in known)
    except OSError:
        return False
    return True


def _finished_batch(finish: Callable, device: torch.device, samples: list) -> list:
    inputs, *rest = default_collate(samples)
    return [finish(inputs, device), *rest]


def to_device(inputs: Any, device: torch.device) -> Any:
    """A tensor, or a list or tuple of them, copied without waiting where memory is pinned."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    return [to_device(part, device) for part in inputs]
