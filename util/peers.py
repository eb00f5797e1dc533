"""Notices when another process of a run on GPUs ends, and waits for GPUs.

nccl waits for an ended process for ten minutes. Where the host waits for the GPU meanwhile, it can
look around; but behind a kernel that waits so, the GPU's queue fills up, and launching one more
kernel then holds the main thread. So a thread asks all processes every second, over gloo.
"""

import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

BEAT = 1.0  # seconds between two questions
GRACE = 5.0  # seconds for the main thread to notice, before the thread ends the process
LAST = 10.0  # seconds for the others' answer to the last question
POLL = 1e-3  # seconds between looks at a GPU


class Watch:
    """A thread that asks whether all processes are there.

    Args:
        group: of all ranks, over gloo, for this alone.
        end: ends this process, where the main thread does not, or cannot; None: nothing does.
    Attributes:
        lost: what another process's end has raised here.
        _noticed: the main thread ends this process.
        _over: so do all ranks, after the same step: the next question is the last.
    """

    def __init__(self, group: dist.ProcessGroup, end: Callable[[], None] | None):
        self.lost: RuntimeError | None = None
        self._noticed, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._ask, args=(group, end), daemon=True)
        self._thread.start()

    def _ask(self, group: dist.ProcessGroup, end: Callable[[], None] | None) -> None:
        there = torch.ones(1)
        try:
            while there:
                there.fill_(not self._over.is_set())
                dist.all_reduce(there, dist.ReduceOp.MIN, group=group)
                self._over.wait(BEAT)
        except RuntimeError as error:
            self.lost = error
            if end is not None and not self._noticed.wait(GRACE):
                end()

    def stop(self, agreed: bool) -> None:
        """The main thread ends this process: `agreed`, all ranks' do so after the same step."""
        self._noticed.set()
        if agreed:
            self._over.set()
            self._thread.join(LAST)


_watch: Watch | None = None
_end: Callable[[], None] | None = None


def end_by(end: Callable[[], None]) -> None:
    """What the next `watch_peers` ends this process by, where the main thread does not."""
    global _end
    _end = end


def watch_peers(group: dist.ProcessGroup) -> None:
    """Starts a `Watch`; called by all ranks."""
    global _watch
    _watch = Watch(group, _end)


def stop_watching(agreed: bool) -> None:
    """Ends it, if there is one; see `Watch.stop`."""
    global _watch
    if _watch is not None:
        _watch.stop(agreed)
        _watch = None


def wait_for(event: torch.cuda.Event) -> None:
    """Waits for a GPU, but hears signals, and notices when another process has ended.

    Raises:
        RuntimeError: gloo's, of another process's end.
    """
    while not event.query():
        if _watch is not None and _watch.lost is not None:
            raise _watch.lost
        time.sleep(POLL)


def wait_for_device(device: torch.device) -> None:
    """Waits for all that a GPU's current stream was asked for, as `wait_for`."""
    if device.type == "cuda":
        event = torch.cuda.Event()
        event.record()
        wait_for(event)
