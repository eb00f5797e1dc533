"""Batches on the training device, ready for the model; unreadable images are counted."""

import argparse
import atexit
import contextlib
import itertools
import logging
import math
import multiprocessing.process
import multiprocessing.queues
import os
import re
import resource
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from util.data.order import EpochSampler, EvalSampler
from util.data.source import labels_of
from util.distributed import from_rank_zero, get_rank, get_world_size, host_group, hosts
from util.errors import STOP_SIGNALS, UserError
from util.parents import end_with_parent

logger = logging.getLogger(__name__)

SHARDS_SEEN = 20  # shards whose classes are looked at
WINDOW = 20_000  # images of shards to shuffle at once, if not given
MOST_BAD = 0.01  # of a dataset's images may be unreadable; one always may
BAD_LIST = "bad-images.txt"
SHARED_MEMORY = Path("/dev/shm")

_warned_of: set[str] = set()  # files
# Weakly: one that has ended keeps files open for as long as it is known.
_processes: weakref.WeakSet[multiprocessing.process.BaseProcess] = weakref.WeakSet()


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
        super().__init__(
            dataset,
            batch_size=args.batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0 and not once,
            pin_memory=args.pin_mem and device.type == "cuda",
            worker_init_fn=_begin_worker,
            collate_fn=partial(_finished_batch, finish, device) if on_host else None,
        )
        self.output_dir = args.output_dir
        self.bad: set[str] = set()
        self.replaced: list[bool] = []
        self._met: dict[str, str] = {}
        self.device, self.finish = device, to_device if on_host or not finish else finish
        self.stream = copy_stream(device) if device.type == "cuda" else None

    def _check_shared_memory(self) -> float:
        """How many times what loader processes may put into /dev/shm, for batches, fits there.

        Every rank calls it before any has started such processes. Raises UserError below 1.
        """
        free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else math.inf
        names = [name for _, name in hosts()]
        key = next(iter(self.sampler), None)
        if key is None:  # there is no image
            return math.inf
        waiting = self.batch_size * self.prefetch_factor * self.num_workers
        here = names.count(names[get_rank()])
        need = _size(self.collate_fn([self.dataset[key]])) * waiting * here
        if need > free:
            raise UserError(
                f"--num_workers {self.num_workers}: loader processes put up to {need / 1e6:.0f} MB "
                f"of batches into shared memory; {_shared_memory()}"
            )
        return free / need

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        if self.num_workers and self._iterator is None:
            self._check_shared_memory()
        before = set(multiprocessing.active_children())
        try:
            batches = super().__iter__()
        except OSError as error:  # too many open files, no memory for another process
            sys.unraisablehook = lambda _: None  # torch's loader, half made, complains at its end
            raise UserError(f"cannot start {self.num_workers} workers: {error.strerror}") from None
        finally:
            _processes.update(set(multiprocessing.active_children()) - before)
        for inputs, labels, *bad in batches:
            self.replaced = [bool(name) for names, _ in bad for name in names]
            for names, reasons in bad:  # as `SeededDataset` has them
                self._met |= {n: why for n, why in zip(names, reasons, strict=True) if n}
            yield self._on_device(inputs), labels

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

    While an epoch ends, and is evaluated and saved, loader processes go on with the next: else its
    beginning would wait for a whole batch, which makes a good part of an epoch of a few thousand
    images. Not where /dev/shm might not hold these batches beside those of an evaluation.
    """

    _running: Iterator[tuple[Any, Tensor]]
    _next: int | None = None  # the epoch that `_running` goes on with
    _roomy = True

    def epoch(self, epoch: int, epochs: int, steps_done: int = 0) -> Iterator[tuple[Any, Tensor]]:
        """The batches of an epoch, of so many, without those of its first steps."""
        if self._next != epoch or steps_done:
            self.sampler.set_epoch(epoch, steps_done, epochs - 1 - epoch if self._roomy else 0)
            self._running = iter(self)
        self._next = None
        batches = len(self) - steps_done * self.sampler.per_step // self.batch_size
        yield from itertools.islice(self._running, batches)
        if self.sampler.ahead and epoch + 1 < epochs:
            self._next = epoch + 1
        else:
            self._running = iter(())

    def _check_shared_memory(self) -> float:
        times = super()._check_shared_memory()
        if times < 2:
            self._roomy, self.sampler.ahead = False, 0
        return times


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU on which all loaders copy: each more would keep memory of its own."""
    return torch.cuda.Stream(device)


def train_loader(
    dataset: Dataset, args: argparse.Namespace, device: torch.device, **options: Any
) -> TrainLoader:
    """Batches to train on.

    Args:
        args: also accum_iter, seed and shuffle_window.
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
    return TrainLoader(dataset, sampler, args, device, **options)


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


def end_loaders() -> None:
    """Kills the loader processes that are left, which may be waiting for a file forever."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would report an accident
    for process in list(_processes):
        if process.is_alive():
            process.kill()
    _processes.clear()


# Before multiprocessing's own, which would wait for processes that it asked to end by SIGTERM.
atexit.register(end_loaders)


def explain(error: Exception) -> str | None:
    """One line about loader processes that died or cannot be heard; None for other errors."""
    text, (files, _) = str(error), resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = f"`ulimit -n` allows {files} open files"
    if text.startswith("Too many open files"):
        return f"too many open files for --num_workers and the rest of the run: {limit}"
    full = "file </torch_" in text and "No space left" in text
    if full or "out of shared memory" in text or "shared memory(shm)" in text:
        return f"a loader process is out of shared memory: {_shared_memory()}"
    if text.startswith("Pin memory thread exited"):
        return f"the thread that pins batches died, see its own message; {limit}"
    if "in pin memory thread" in text:
        found = re.search(r"^\S*Error: (.+)$", text, re.MULTILINE)
        cause = f" ({found[1]})" if found else ""
        return f"memory for batches cannot be pinned{cause}; --no_pin_mem does without"
    if re.match("DataLoader worker .*(exited|killed)", text):  # else a dataset's own error
        memory = "; is the machine's memory full?" if "signal: Killed" in text else ""
        return f"{text.partition('. ')[0]}{memory}; {_shared_memory()}; {limit}"
    return None


def _shared_memory() -> str:
    """What to do about too little of it."""
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else 0
    return (
        f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free: lower --num_workers, or give Docker "
        "--ipc=host or a larger --shm-size"
    )


def _size(batch: Any) -> int:
    """The bytes of all tensors in a batch."""
    if isinstance(batch, Tensor):
        return batch.nbytes
    return sum(map(_size, batch)) if isinstance(batch, list | tuple) else 0


def _begin_worker(_worker: int) -> None:
    """Loader processes ignore stop signals; they end with their parent, however it ends.

    One that cannot send a batch ends, too: the parent would wait for the batch forever.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    if not multiprocessing.parent_process().is_alive():
        os.kill(os.getpid(), signal.SIGKILL)


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
