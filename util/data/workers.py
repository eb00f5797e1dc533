"""Loader processes: how they begin and end, and what their errors mean."""

import atexit
import contextlib
import logging
import math
import multiprocessing.process
import multiprocessing.queues
import os
import re
import resource
import shutil
import signal
import threading
import warnings
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from util.errors import STOP_SIGNALS
from util.parents import end_with_parent

SHARED_MEMORY = Path("/dev/shm")

logger = logging.getLogger(__name__)
warnings.filterwarnings("ignore", "This DataLoader will create")  # `compare_to_processors` does

# Weakly: one that has ended keeps files open for as long as it is known.
_processes: weakref.WeakSet[multiprocessing.process.BaseProcess] = weakref.WeakSet()
os.register_at_fork(after_in_child=_processes.clear)  # they are the parent's


def count_processors() -> int:
    """Those that this process may use; all, where the system does not say (macOS)."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


@cache
def compare_to_processors(workers: int) -> None:
    """Warns, once, of more loader processes than this process has processors."""
    processors = count_processors()
    if workers > processors:
        logger.warning(
            f"warning: --num_workers {workers}, but {processors} processors: fewer may be faster"
        )


def begin_worker(_worker: int) -> None:
    """Loader processes ignore stop signals; they end with their parent, however it ends.

    One that cannot send a batch ends, too: the parent would wait for the batch forever.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    if not multiprocessing.parent_process().is_alive():
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def workers_noted() -> Iterator[None]:
    """Whatever processes start in this block are those that `end_loaders` ends.

    Python's end calls it before torch's and multiprocessing's own: they would send SIGTERM, which
    loader processes ignore, and wait.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        _processes.update(set(multiprocessing.active_children()) - before)
        atexit.unregister(end_loaders)
        atexit.register(end_loaders)


def end_loaders() -> None:
    """Kills the loader processes that are left, which may be waiting for a file forever."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would report an accident
    for process in list(_processes):
        if process.is_alive():
            process.kill()
    _processes.clear()


def explain(error: Exception) -> str | None:
    """One line about loader processes that died or cannot be heard; None for other errors."""
    text, (files, _) = str(error), resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = f"`ulimit -n` allows {files} open files"
    if text.startswith("Too many open files"):
        return f"too many open files for --num_workers and the rest of the run: {limit}"
    full = "file </torch_" in text and "No space left" in text
    if full or "out of shared memory" in text or "shared memory(shm)" in text:
        return f"a loader process is out of shared memory: {shared_memory_words()}"
    if text.startswith("Pin memory thread exited"):
        return f"the thread that pins batches died, see its own message; {limit}"
    if "in pin memory thread" in text and "out of memory" in text:
        return "no more memory can be pinned for batches; --no_pin_mem does without"
    if re.match("DataLoader worker .*(exited|killed)", text):  # else a dataset's own error
        memory = "; is the machine's memory full?" if "signal: Killed" in text else ""
        return f"{text.partition('. ')[0]}{memory}; {shared_memory_words()}; {limit}"
    return None


def free_shared_memory() -> float:
    """Bytes of /dev/shm; infinite where there is none."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else math.inf


def shared_memory_words() -> str:
    """What to do about too little of it."""
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else 0
    return (
        f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free: lower --num_workers, or give Docker "
        "--ipc=host or a larger --shm-size"
    )
