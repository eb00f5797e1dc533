"""How a script ends: with status 0, with one line for the user, or on a signal."""

import atexit
import contextlib
import ctypes
import errno
import functools
import logging
import os
import signal
import sys
import threading
import time
import traceback
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.distributed as dist

from util.data.workers import end_loaders, explain
from util.distributed import get_rank, get_world_size
from util.errors import STOP_SIGNALS, Stopped, UserError
from util.network import RANK_ZERO_FIRST
from util.parents import end_with_launcher, is_script
from util.peers import end_by, stop_watching
from util.run.background import finish_background
from util.run.interrupt import restore_handlers
from util.run.lock import release_locks

logger = logging.getLogger(__name__)

PEER_LOST = "another process of this run died or hung, see its own messages"
# In nccl's errors that tell of another process's end.
NCCL_PEER = (
    "ncclRemoteError", "remote process", "remote peer", "reset by peer", "aborted",
    "collective operation timeout", "wait timeout", "store->get",
)  # fmt: skip
_launched = False  # by `launch`, after which the process ends
# Seconds for gloo's threads to drop the last tensors: until torch 2.7 or so, destroying the group
# keeps Python's lock, which they need for that, and waits for them.
SETTLE = 0.05
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def session(main: Callable[[Namespace], None]) -> Callable[[Namespace], None]:
    """For a script's `main`: leaves its flags as they are, and tears down what it set up.

    So it can be called again in the same Python process, as in a notebook. Where one process of
    several fails, `launch` ends it instead: tearing down would wait for the others.
    """

    @functools.wraps(main)
    def run(args: Namespace) -> None:
        before = Surroundings() if not _launched else None
        try:
            main(Namespace(**vars(args)))
        except BaseException:
            if get_world_size() == 1:
                tear_down(before)
            raise
        tear_down(before)

    return run


class Surroundings:
    """What a run changes of its process: logging, hooks, SIGCHLD, dynamo; to be put back."""

    def __init__(self):
        self.handlers, self.level = logging.root.handlers[:], logging.root.level
        self.hooks = threading.excepthook, sys.unraisablehook
        self.on_child = signal.getsignal(signal.SIGCHLD)
        self.optimize_ddp = torch._dynamo.config.optimize_ddp

    def restore(self) -> None:
        logging.root.handlers[:], logging.root.level = self.handlers, self.level
        threading.excepthook, sys.unraisablehook = self.hooks
        torch._dynamo.config.optimize_ddp = self.optimize_ddp
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self.on_child)


def tear_down(before: Surroundings | None = None, agreed: bool = True) -> None:
    """Ends loader processes and the process group, releases locks, restores what was before.

    Args:
        agreed: all ranks do so after the same step. Else nccl would wait for the others' part of
            what this one has begun, and the process must end without that.
    """
    end_loaders()
    finish_background()
    stop_watching(agreed)
    if dist.is_initialized() and (agreed or get_world_size() == 1):
        time.sleep(SETTLE)
        dist.destroy_process_group()
    release_locks()
    restore_handlers()
    if before is not None:
        before.restore()


def launch(main: Callable[[Namespace], None], args: Namespace) -> None:
    """Runs a script to its end: exit status 0, or 1 after one line for the user.

    A process that fails ends at once, without waiting for the others; these notice and end too.
    The process of a script ends here, without taking Python apart, for which torch needs a second:
    who waits for it, or has sent it another signal, need not wait for that.
    """
    end_with_launcher()
    status = _status_of(main, args)  # by now what an exception held is free, such as files
    if is_script():
        # As multiprocessing ends a process that it has forked. What fails has been printed; Ctrl-C
        # does not undo a run that has ended.
        with contextlib.suppress(Exception, KeyboardInterrupt):
            threading._shutdown()  # joins threads
            atexit._run_exitfuncs()
        _exit(status)
    if status:
        sys.exit(status)


def _status_of(main: Callable[[Namespace], None], args: Namespace) -> int:
    """The exit status of a script, and one line for the user if it is not 0."""
    global _launched
    _launched, agreed = True, False
    end_by(_end_with_peer)
    try:
        try:
            main(args)
            agreed = True
        except UserError as error:
            _fail(str(error))
        except torch.OutOfMemoryError:
            _fail("out of GPU memory: lower --batch_size (and raise --accum_iter to match)")
        except Stopped as stopped:
            agreed = stopped.agreed
            raise
        except Exception as error:
            if line := explain(error):
                _fail(line)
            if get_world_size() == 1:
                raise
            if words := nccl_words(error):
                _fail(words)
            if _is_of_a_peer(error):
                _end_with_peer()
            traceback.print_exc()
            _leave()
        finally:
            tear_down(agreed=agreed)
            _launched = False
    except Stopped as stopped:  # also one that comes while an error is handled
        after = " after saving; --resume auto continues from here" if stopped.saved else ""
        logger.info(f"stopped by {stopped}{after}")
        return 128 + stopped.signal
    except KeyboardInterrupt:
        return 130
    except SystemExit as ended:  # `_fail`'s
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    return 0


def _end_with_peer() -> None:
    _fail(f"{PEER_LOST}; --resume auto continues from the last save")


def _is_of_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another process dropped out of it."""
    if isinstance(error, dist.DistError):  # nccl's, the store's
        return True
    gloos = ("gloo/transport", "Operation timed out!", "timeout caused pair closure")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in gloos)


def nccl_words(error: Exception) -> str:
    """What nccl itself says of an error that is no other process's end; else ''.

    Its message ends with the kind (`ncclInvalidUsage: ...`), a line `Last error:`, and the cause.
    """
    text = str(error)
    if not isinstance(error, dist.DistBackendError) or any(words in text for words in NCCL_PEER):
        return ""
    about, _, cause = text.partition("Last error:")
    lines = [line.strip() for line in about.splitlines() if line.strip()]
    kind = next((line for line in lines if line.startswith("nccl")), lines[0] if lines else "")
    causes = [line.strip() for line in cause.splitlines() if line.strip()]
    return f"nccl: {'; '.join([*causes[:1], kind])}; NCCL_DEBUG=INFO prints more"


def _fail(message: str) -> None:
    """Prints one line and ends this process with status 1."""
    if get_rank() > 0:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
        time.sleep(RANK_ZERO_FIRST)  # if rank 0 failed too, the launcher ends this process now
    # From a loader process the line arrives at the end of that process's traceback.
    message = message.rsplit("UserError: ", 1)[-1].strip().replace("\n", "\\n")
    with contextlib.suppress(OSError):  # a closed console
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
    _leave()


def _leave() -> None:
    """Ends this process with status 1."""
    if get_world_size() == 1:
        sys.exit(1)
    stop_watching(agreed=False)
    end_loaders()
    finish_background()
    release_locks()
    # Destroying the group would wait for the others; those waiting for us notice that we are gone.
    _exit(1)


def _exit(status: int) -> None:
    """Ends this process here and now, with all that it has printed; 1 where a disk is full."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno in FULL:
                status = status or 1
                with contextlib.suppress(OSError):
                    print(f"output was lost: {error.strerror}", file=sys.stderr, flush=True)
        except (ValueError, AttributeError):  # closed; none from the start
            pass
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)  # what libraries have printed, as nccl
    os._exit(status)
