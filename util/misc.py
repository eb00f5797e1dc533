"""MAE's `misc`: process-group helpers, seeding, metric means."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from util.distributed import (
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    mean_over_ranks,
)

__all__ = ["MetricLogger", "seed_all"]
__all__ += ["get_rank", "get_world_size", "init_distributed_mode", "is_main_process"]

SKIPPED = "skipped"  # the sum that counts steps which are left out of the means


def seed_all(*position: int) -> None:
    """Seeds torch and numpy by a position in the run, such as (seed, epoch, batch, rank).

    Called before every batch, it makes the random numbers a function of the position, so a resumed
    run draws what the uninterrupted one would have drawn.
    """
    seed, *rest = position
    # The key's first number separates these streams from the augmentations' (util.data.order).
    words = np.random.SeedSequence(seed, spawn_key=(1, *rest)).generate_state(2)
    torch.manual_seed(int(words[0]))
    np.random.seed(words[1])


@dataclass
class _Tally:
    """Sums over a part of the run."""

    sums: dict = field(default_factory=dict)  # metric -> sum over updates
    updates: int = 0
    images: int = 0  # of this rank
    wait: float = 0.0  # seconds spent waiting for data
    seconds: float = 0.0

    def add(self, sums: dict, updates: int, images: int, wait: float, seconds: float) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.updates += updates
        self.images += images
        self.wait += wait
        self.seconds += seconds

    def means(self) -> dict[str, float]:
        if not self.updates:
            return {}
        means = {name: value / self.updates for name, value in self.sums.items()}
        means["images_per_second"] = self.images * get_world_size() / self.seconds
        means["data_wait"] = self.wait / self.seconds
        return means


class MetricLogger:
    """Means of metrics over an epoch; they stay on the device until they are asked for.

    `update` only adds; `window` fetches the means since the last call, over all ranks, with one
    transfer; `epoch` gives the means over all windows. Both also hold `images_per_second` of all
    ranks and `data_wait`, the share of time spent waiting for the loader; without any update they
    are empty.

    Attributes:
        last: the last window that was not empty, for a run that resumes there.
        _window, _epoch, _since: sums since the last call and over the epoch; when the window began.
    """

    def __init__(self):
        self.begin()

    def begin(self) -> None:
        """Starts an epoch."""
        self._window, self._epoch = _Tally(), _Tally()
        self.last: dict[str, float] = {}
        self._since = time.perf_counter()

    def watch(self, loader: Iterable) -> Iterator:
        """Iterates over the loader, measuring the time spent waiting for it."""
        batches = iter(loader)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._window.wait += time.perf_counter() - begin
            yield batch

    def update(self, images: int, skipped: Tensor | None = None, **metrics: Tensor) -> None:
        """Adds scalars of one step over a number of images of this rank.

        Args:
            skipped: 1 leaves the step out of the means, 0 does not; a scalar on the device.
        """
        if skipped is not None:
            metrics = {name: value.where(skipped == 0, 0.0) for name, value in metrics.items()}
            metrics[SKIPPED] = skipped
        self._window.add(metrics, updates=1, images=images, wait=0.0, seconds=0.0)

    def window(self, **others: Tensor | float) -> dict[str, float]:
        """Means since the last call, and other values of this rank to log with them."""
        window, self._window = self._window, _Tally()
        if window.sums:
            sums = mean_over_ranks(torch.stack(list(window.sums.values()))).tolist()
            window.sums = dict(zip(window.sums, sums, strict=True))
            window.updates -= round(window.sums.pop(SKIPPED, 0))
        now = time.perf_counter()  # after the transfer: all of the window's work is done
        window.seconds, self._since = now - self._since, now
        self._epoch.add(**vars(window))
        if not (means := window.means()):
            return {}
        self.last = means | {name: float(value) for name, value in others.items()}
        return self.last

    def epoch(self) -> dict[str, float]:
        """Means over all windows so far."""
        return self._epoch.means()

    def state_dict(self) -> dict:
        """What this rank has measured so far, as plain types and tensors."""
        self._window.seconds = time.perf_counter() - self._since
        window = dict(vars(self._window))
        window["sums"] = {name: value.cpu() for name, value in window["sums"].items()}
        return {"window": window, "epoch": dict(vars(self._epoch)), "last": self.last}

    def load_state_dicts(self, states: list[dict], device: torch.device) -> None:
        """Continues from the `state_dict` of each rank; with other ranks the means start again."""
        self.last = states[0].get("last", {})  # older checkpoints have none
        if len(states) != get_world_size():
            return
        state = states[get_rank()]
        self._window, self._epoch = _Tally(**state["window"]), _Tally(**state["epoch"])
        self._window.sums = {k: v.to(device) for k, v in self._window.sums.items()}
        self._since = time.perf_counter() - self._window.seconds
