"""Signals and the clock, turned into decisions that all ranks take at the same step."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
import torch.distributed as dist

from util.distributed import from_rank_zero, get_world_size, host_group
from util.errors import Stopped

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Interrupts:
    """Stop requests and save intervals, of whichever rank has one first.

    Until the first `poll` there is nothing to save: a signal ends this process at once.

    Args:
        save_interval: seconds between saves within an epoch.
    """

    def __init__(self, save_interval: float):
        self.save_interval = save_interval
        self._requested = 0  # the signal that asked this rank to stop
        self._polled = False
        # Flags travel beside the gradients and are read one step late: no rank waits.
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self.saved()
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:  # not a launcher's own, as submitit's
                _handle(number, _stop_at_once)

    def _on_signal(self, number: int, _frame: object) -> None:
        self._requested = number
        if number == signal.SIGINT:  # a second Ctrl-C stops at once
            signal.signal(signal.SIGINT, signal.default_int_handler)
            logger.warning("saving at the next step, then stopping; Ctrl-C again stops at once")

    def poll(self) -> tuple[int, bool]:
        """Once per optimiser step, on every rank: the signal to stop for (0: none), save now?

        All ranks get the same answer at the same step.
        """
        if not self._polled:
            self._polled = True
            for number in STOP_SIGNALS:
                _handle(number, self._on_signal)
        due = time.monotonic() - self._since >= self.save_interval
        flags = torch.tensor([self._requested, int(due)])
        if get_world_size() == 1:
            return self._requested, due
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=host_group(), async_op=True)
        pending, self._pending = self._pending, (flags, work)
        if pending is None:
            return 0, False
        flags, work = pending
        work.wait()
        due, self._late = bool(flags[1]) and not self._late, False
        return int(flags[0]), due

    def saved(self) -> None:
        """Starts the interval to the next save; every rank calls it after the same step."""
        self._since = time.monotonic()
        self._late = self._pending is not None  # what is under way asked for this very save


def _handle(number: int, handler: Callable) -> None:
    if threading.current_thread() is threading.main_thread():  # no other can
        signal.signal(number, handler)


def _stop_at_once(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one need not be so gentle
    raise Stopped(number)


def ignore_signals(*_: object) -> None:
    """For loader processes: stopping is their parent's business, whoever gets the signal."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def polled(loader: Sized, poll: Callable[[], None]) -> Iterator[Any]:
    """A loader's batches with a `poll` after each, as often on every rank.

    Args:
        loader: rank 0's has as many batches as any other rank's.
    """
    most = from_rank_zero(lambda: len(loader))
    for batch in loader:
        yield batch
        poll()
    for _ in range(most - len(loader) + 1):  # one more, since a poll reads what the last one asked
        poll()


def no_poll() -> None:
    """Where there is nothing to save: a signal then ends the process at once."""
