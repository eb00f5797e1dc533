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
from util.errors import STOP_SIGNALS, Stopped
from util.parents import launcher_has_ended

logger = logging.getLogger(__name__)

Poll = Callable[[], None]  # what saves and stops between the batches of an evaluation: `Run.poll`


class Interrupts:
    """Stop requests and save intervals, from whichever rank has one first.

    Before the first `poll` there is nothing to save: a signal then ends this process at once.

    Args:
        save_interval: seconds between saves.
    Attributes:
        _requested: the signal that asked this rank to stop; 0 for none.
        _polled: whether there has been a `poll`.
        _since: when the interval began.
        _pending: flags being reduced beside the gradients; read one step late, so no rank waits.
        _late: whether those asked for a save before the last one was made.
    """

    def __init__(self, save_interval: float):
        self.save_interval = save_interval
        self._requested, self._polled = 0, False
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self.saved()
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:  # not a launcher's own, as submitit's
                _handle(number, _stop_at_once)

    def _on_signal(self, number: int, _frame: object) -> None:
        self._requested = number
        if number == signal.SIGINT:  # the second ends this process, but no file that it writes
            signal.signal(signal.SIGINT, signal.default_int_handler)
            logger.warning("saving at the next step, then stopping; Ctrl-C again does not save")

    def poll(self) -> tuple[int, bool]:
        """Once per optimizer step, on every rank: the signal to stop for (0: none), save now?

        All ranks get the same answer at the same step.
        """
        if not self._polled:
            self._polled = True
            if launcher_has_ended():  # while another's handler took the signal, as submitit's does
                self._requested = signal.SIGTERM
            for number in STOP_SIGNALS:
                _handle(number, self._on_signal)
        due = self.is_due()
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

    def is_due(self) -> bool:
        """Whether this rank's interval is over."""
        return time.monotonic() - self._since >= self.save_interval

    def saved(self) -> None:
        """Restarts the save interval; every rank calls it after the same step."""
        self._since = time.monotonic()
        self._late = self._pending is not None


_before: dict[int, Any] = {}  # handlers, by signal


def _handle(number: int, handler: Callable) -> None:
    # by nohup, or a shell's &
    ignored = (
        number in (signal.SIGHUP, signal.SIGINT) and signal.getsignal(number) is signal.SIG_IGN
    )
    if threading.current_thread() is threading.main_thread() and not ignored:  # no other may
        _before.setdefault(number, signal.getsignal(number))
        signal.signal(number, handler)


def restore_handlers() -> None:
    """Undoes what `Interrupts` did to this process."""
    if threading.current_thread() is threading.main_thread():
        while _before:
            signal.signal(*_before.popitem())


def _stop_at_once(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second signal kills
    raise Stopped(number)


def polled(loader: Sized, poll: Poll | None) -> Iterator[Any]:
    """A loader's batches with a `poll` after each, if any, equally often on every rank.

    Args:
        loader: rank 0's has as many batches as any other rank's, or more.
    """
    if poll is None:
        yield from loader
        return
    most = from_rank_zero(lambda: len(loader))
    for batch in loader:
        yield batch
        poll()
    for _ in range(most - len(loader) + 1):  # one more, since a poll reads the last one's flags
        poll()
