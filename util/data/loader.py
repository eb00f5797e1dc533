"""Batches on the training device, ready for the model; unreadable images are counted."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from util.data.order import EpochSampler, EvalSampler
from util.data.source import labels_of
from util.data.workers import (
    begin_worker,
    compare_to_processors,
    free_shared_memory,
    shared_memory_words,
    workers_noted,
)
from util.distributed import from_rank_zero, get_rank, get_world_size, host_group, hosts
from util.errors import UserError

logger = logging.getLogger(__name__)

SHARDS_SEEN = 20  # shards whose classes are looked at
WINDOW = 20_000  # images of shards to shuffle at once, if not given
MOST_BAD = 0.01  # of a dataset's images may be unreadable; one always may
BAD_LIST = "bad-images.txt"
AMPLE = 5  # times training's batches: an evaluation's are float32, and up to four times as large

_warned_of: set[str] = set()  # files


class DeviceLoader(DataLoader):
    """A loader of (inputs, labels) whose inputs are on the device.

    On a GPU they are copied and finished on a stream of their own; only the step that needs them
    waits for it. While the host runs ahead, that work overlaps with the step before.

    Args:
        dataset: takes (epoch, index), as `SeededDataset` does.
        sampler: of those keys.
        args: batch_size, num_workers, pin_mem; output_dir, where bad images are listed, '' nowhere.
        device: where the inputs go.
        finish: makes the device's inputs from a batch of the dataset's: on a GPU on the loader's
            stream, on a CPU in the loader's processes. If not given, inputs are copied as they are.
        num_workers: in place of the flag's.
        once: there will be one pass: its processes end after it.
    Attributes:
        bad: the images that were unreadable so far; the same on all ranks.
        replaced: which of the last batch's images are others, in place of unreadable ones.
        _met: those that this rank has met since the last report, with the reasons.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        args: argparse.Namespace,
        device: torch.device,
        finish: Callable[[Any, torch.device], Any] | None = None,
        num_workers: int | None = None,
        once: bool = False,
    ):
        workers = args.num_workers if num_workers is None else num_workers
        on_host = finish and device.type == "cpu"
        compare_to_processors(workers)
        super().__init__(
            dataset,
            batch_size=args.batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0 and not once,
            pin_memory=args.pin_mem and device.type == "cuda",
            worker_init_fn=begin_worker,
            collate_fn=partial(_finished_batch, finish, device) if on_host else None,
        )
        self.output_dir = args.output_dir
        self.bad: set[str] = set()
        self.replaced: list[bool] = []
        self._met: dict[str, str] = {}
        self.device, self.finish = device, to_device if on_host or not finish else finish
        self.stream = copy_stream(device) if device.type == "cuda" else None

    @cached_property
    def shared_memory(self) -> tuple[int, float]:
        """Bytes of /dev/shm: those that batches may take, and those free before any process starts.

        Of all loaders like this on this machine; a collective where it is read first.
        """
        free, key = free_shared_memory(), next(iter(self.sampler), None)
        image = _size(self.collate_fn([self.dataset[key]])) if key is not None else 0
        names = [name for _, name in hosts()]
        waiting = self.batch_size * self.prefetch_factor * self.num_workers
        return image * waiting * names.count(names[get_rank()]), free

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return map(self._ready, self._begin())  # which keeps no batch, as a generator's frame would

    def _begin(self) -> Iterator[list]:
        """A pass over the dataset's batches, by torch's own iterator.

        Raises:
            UserError: loader processes would fill /dev/shm, or cannot be started.
        """
        if self.num_workers and self._iterator is None:
            need, free = self.shared_memory
            if need > free:
                raise UserError(
                    f"--num_workers {self.num_workers}: loader processes put up to "
                    f"{need / 1e6:.0f} MB of batches into shared memory; {shared_memory_words()}"
                )
        try:
            with workers_noted():
                return super().__iter__()
        except OSError as error:  # too many open files, no memory for another process
            sys.unraisablehook = lambda _: None  # torch's loader, half made, complains at its end
            raise UserError(f"cannot start {self.num_workers} workers: {error.strerror}") from None

    def _ready(self, batch: list) -> tuple[Any, Tensor]:
        """A batch of the dataset's with its inputs on the device; notes which were unreadable."""
        inputs, labels, *bad = batch
        self.replaced = [bool(name) for names, _ in bad for name in names]
        for names, reasons in bad:  # as `SeededDataset` has them
            self._met |= {n: why for n, why in zip(names, reasons, strict=True) if n}
        return self._on_device(inputs), labels

    def _on_device(self, inputs: Any) -> Any:
        if self.stream is None:
            return self.finish(inputs, self.device)
        with torch.cuda.stream(self.stream):
            inputs = self.finish(inputs, self.device)
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self.stream)
        for tensor in inputs if isinstance(inputs, list | tuple) else [inputs]:
            tensor.record_stream(compute)  # keeps its memory until the step is done
        return inputs

    def remember_bad(self, names: Iterable[str]) -> None:
        """Counts images that were unreadable before a resume."""
        self.bad.update(names)

    def report_bad(self) -> None:
        """Warns of the bad images that any rank has met since the last call; every rank calls it.

        Raises:
            UserError: there are too many; on every rank.
        """
        met, self._met = _over_ranks(self._met), {}
        new = sorted(met.keys() - self.bad)
        if not new:
            return
        self.bad.update(new)
        where = from_rank_zero(lambda: self._tell({name: met[name] for name in new}))
        if len(self.bad) > max(1, MOST_BAD * len(self.dataset)):
            found = f"{len(self.bad)} of {len(self.dataset)} images are not readable"
            raise UserError(f"{found}, more than {MOST_BAD:.0%}: {where}")

    def _tell(self, bad: dict[str, str]) -> str:
        """Warns of bad images and lists them; returns the list's path, or without one a few."""
        warn_of(bad)
        path = Path(self.output_dir, BAD_LIST)
        with contextlib.suppress(OSError):
            if self.output_dir:
                with open(path, "a", errors="surrogateescape") as file:
                    file.writelines(f"{name}\n" for name in bad)
                return f"listed in {path}"
        return ", ".join(sorted(self.bad)[:3]) + ", ..."


class TrainLoader(DeviceLoader):
    """A loader of one epoch after another, in the order of an `EpochSampler`.

    While an epoch ends, and is evaluated and saved, loader processes go on with the next one, which
    would otherwise begin by waiting for a whole batch: a good part of an epoch of a few thousand
    images. They do so only where /dev/shm has ample room for that.

    Args:
        epochs: how many there are; processes go on no further.
    Attributes:
        _running, _next: a pass that is under way, and the epoch that it goes on with.
    """

    def __init__(self, *args: Any, epochs: int, **options: Any):
        super().__init__(*args, **options)
        self.epochs = epochs
        self._running: Iterator[list] | None = None
        self._next: int | None = None

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """The epoch that the sampler stands at, alone."""
        self._running, self._next, self.sampler.ahead = None, None, 0
        return super().__iter__()

    def epoch(self, epoch: int, steps_done: int = 0) -> Iterator[tuple[Any, Tensor]]:
        """The batches of an epoch, without those of its first steps."""
        batches = len(self) - steps_done * self.sampler.per_step // self.batch_size
        if not batches:
            return
        if self._next != epoch or steps_done:
            ahead = max(0, self.epochs - 1 - epoch) if self.has_ample_room() else 0
            self.sampler.set_epoch(epoch, steps_done, ahead)
            self._running = self._begin()
        running, self._running, self._next = self._running, None, None
        for _ in range(batches):
            yield self._ready(next(running))
        if self.sampler.epoch + self.sampler.ahead > epoch:
            self._running, self._next = running, epoch + 1

    def has_ample_room(self) -> bool:
        """Whether there are processes, and /dev/shm holds their batches beside an evaluation's."""
        if not self.num_workers:
            return False
        need, free = self.shared_memory
        return AMPLE * need <= free


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU on which all loaders copy: each more would keep memory of its own."""
    return torch.cuda.Stream(device)


def train_loader(
    dataset: Dataset, args: argparse.Namespace, device: torch.device, **options: Any
) -> TrainLoader:
    """Batches to train on.

    Args:
        args: also epochs, accum_iter, seed and shuffle_window.
        **options: passed on to `DeviceLoader`.
    """
    groups = getattr(getattr(dataset, "dataset", dataset), "groups", None)
    window = args.shuffle_window
    if window is None:
        window = WINDOW if groups is not None and len(groups) > 1 else 0
        if window and _are_sorted(groups, labels_of(dataset.dataset)):
            logger.info("shards hold one class each: all images are shuffled at once")
            window = 0
    per_step = args.batch_size * args.accum_iter
    sampler = EpochSampler(dataset, per_step, args.seed, groups, window)
    return TrainLoader(dataset, sampler, args, device, epochs=args.epochs, **options)


def _are_sorted(groups: np.ndarray, labels: np.ndarray) -> bool:
    """Whether images of one class stand together, which a window of shards would not mix."""
    ends = np.cumsum(groups)
    some = np.unique(np.linspace(0, len(groups) - 1, SHARDS_SEEN).astype(int))
    classes = [len(np.unique(labels[ends[g] - groups[g] : ends[g]])) for g in some if groups[g] > 1]
    among = len(np.unique(labels[np.linspace(0, len(labels) - 1, 1000).astype(int)]))
    return bool(classes) and np.mean(classes) <= 2 < among


def eval_loader(
    dataset: Dataset, args: argparse.Namespace, device: torch.device, share: bool, **options: Any
) -> DeviceLoader:
    """Batches in the order of an `EvalSampler`; options are `DeviceLoader`'s."""
    return DeviceLoader(dataset, EvalSampler(dataset, share), args, device, **options)


def _size(batch: Any) -> int:
    """The bytes of all tensors in a batch."""
    if isinstance(batch, Tensor):
        return batch.nbytes
    return sum(map(_size, batch)) if isinstance(batch, list | tuple) else 0


def warn_of(bad: dict[str, str]) -> None:
    """Warns of each bad file once, with the reason."""
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
    if not size:  # nearly always
        return {}
    mappings = [None] * get_world_size()
    dist.all_gather_object(mappings, mapping, group=host_group())
    return {name: why for mapping in mappings for name, why in mapping.items()}


def _finished_batch(finish: Callable, device: torch.device, samples: list) -> list:
    inputs, *rest = default_collate(samples)
    return [finish(inputs, device), *rest]


def to_device(inputs: Any, device: torch.device) -> Any:
    """A tensor, or a list or tuple of them, copied without waiting if its memory is pinned."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    return [to_device(part, device) for part in inputs]
