"""Work that a thread does while training goes on: writing checkpoints."""

import contextlib
import copy
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from util.errors import UserError
from util.peers import wait_for_device

logger = logging.getLogger(__name__)

_all: set["Background"] = set()


class Background:
    """One piece of work at a time.

    Attributes:
        _done: whether nothing is being done. Waits are for this: until Python 3.12, one for the
            thread that Ctrl-C ends takes the thread for ended.
        _failed: what went wrong, until it is asked for.
    """

    def __init__(self):
        self._done = threading.Event()
        self._done.set()
        self._failed: list[Exception] = []

    def start(self, work: Callable[[], list[UserError]]) -> None:
        """Waits for the work before, then returns while the thread goes on with this.

        Args:
            work: returns what went wrong.
        """
        self.wait()
        thread = threading.Thread(target=self._work, args=(work,))
        _all.add(self)
        self._done.clear()
        try:
            thread.start()
        except RuntimeError:  # this process may start no more threads
            self._work(work)
        except BaseException:
            if thread.ident is None:  # nobody else will
                self._done.set()
            raise

    def _work(self, work: Callable[[], list[UserError]]) -> None:
        try:
            failed = work()
            self._failed.extend(failed)
        except Exception as error:
            self._failed.append(error)
        finally:
            self._done.set()

    def wait(self) -> None:
        self._done.wait()

    def failures(self) -> list[UserError]:
        """What went wrong since the last call; raises what the work has raised."""
        failed, self._failed = self._failed, []
        for error in failed:
            if not isinstance(error, UserError):
                raise error
        return failed


def finish_background() -> None:
    """Waits for all that is still being done, before this process ends; tells what went wrong."""
    for background in list(_all):
        background.wait()
        for error in background._failed:
            logger.warning(f"warning: {error}")
        _all.discard(background)


class HostCopy:
    """A copy of a state in the host's memory, which the next one reuses.

    Attributes:
        state: dictionaries, lists and tuples of tensors and plain types.
    """

    def __init__(self):
        self.state: dict[str, Any] = {}

    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """Copies a state, and returns the copy; from a GPU into pinned memory if it can be had."""
        on_gpu: list[torch.device] = []
        self.state = _copied(state, self.state, on_gpu)
        for device in set(on_gpu):
            wait_for_device(device)
        return self.state


def _buffer(value: Tensor) -> Tensor:
    """Memory of the host for a tensor; pinned for a GPU's, where it can be had."""
    if value.is_cuda:
        with contextlib.suppress(RuntimeError):  # WSL, for one, pins no more than half
            return torch.empty_like(value, device="cpu", pin_memory=True)
    return torch.empty_like(value, device="cpu")


def _copied(value: Any, before: Any, on_gpu: list[torch.device]) -> Any:
    if isinstance(value, Tensor):
        if value.is_cuda:
            on_gpu.append(value.device)
        alike = isinstance(before, Tensor) and before.shape == value.shape
        if not alike or before.dtype != value.dtype:
            before = _buffer(value)
        return before.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        old = before if isinstance(before, dict) else {}
        return {name: _copied(part, old.get(name), on_gpu) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(part, None, on_gpu) for part in value)
    return copy.deepcopy(value)
