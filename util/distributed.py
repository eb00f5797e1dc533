"""One process or many: the group, who speaks for it, and how a script ends.

One process is a group of size 1, so that nothing else has to ask.
"""

import argparse
import contextlib
import ctypes
import datetime
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from util.errors import Stopped, UserError
from util.precision import choose_attention, resolve_precision

logger = logging.getLogger(__name__)
T = TypeVar("T")

_store: dist.Store | None = None  # shared by all ranks; see _first_to_report
_host_group: dist.ProcessGroup | None = None
_patient_group: dist.ProcessGroup | None = None  # for `from_rank_zero`
OTHERS_TIMEOUT = 1.0  # seconds that an error waits for others to meet it as well
JOIN_TIMEOUT = datetime.timedelta(minutes=15)  # from the first process's start to the last's
STEP_TIMEOUT = datetime.timedelta(minutes=10)  # a process that keeps others waiting longer hangs
RANK_ZERO_TIMEOUT = datetime.timedelta(hours=12)  # it may list a million files, or download them


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def _place(args: argparse.Namespace) -> tuple[int, int, int]:
    """Rank, rank on this machine and world size: from whatever launched us, else from flags."""
    env = os.environ
    if args.dist_on_itp:
        prefix = "OMPI_COMM_WORLD_"
        names = [prefix + "RANK", prefix + "LOCAL_RANK", prefix + "SIZE"]
    elif "RANK" in env and "WORLD_SIZE" in env:  # torchrun, torch.distributed.launch
        names = ["RANK", "LOCAL_RANK", "WORLD_SIZE"]
    elif "SLURM_STEP_NUM_TASKS" in env:  # srun; absent in the batch script itself
        names = ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"]
    else:
        rank = max(args.local_rank, 0)
        return rank, rank, args.world_size
    fallback = {names[1]: str(max(args.local_rank, 0))}
    try:
        rank, local_rank, world_size = (int((fallback | dict(env))[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(f"the launcher's environment is incomplete: {error}") from None
    return rank, local_rank, world_size


def _device(args: argparse.Namespace, local_rank: int) -> torch.device:
    if (args.device or "cuda") == "cuda" and torch.cuda.is_available():
        visible = torch.cuda.device_count()
        # With srun --gpus-per-task=1 each task sees its own GPU alone.
        bound = visible == 1 and os.environ.get("SLURM_LOCALID") == str(local_rank)
        index = 0 if bound else local_rank
        if index >= visible:
            raise UserError(
                f"process {local_rank} of this machine has no GPU of its own: there are {visible}"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if args.device == "cuda":
        raise UserError(
            "--device cuda: no usable GPU here (torch.cuda.is_available() is false); "
            "--device cpu trains without"
        )
    device = torch.device("cpu")
    keep_freed_memory()
    choose_attention(resolve_precision(args.precision, device))
    return device


def keep_freed_memory() -> None:
    """Lets this process use again what it frees, where its C library is glibc.

    glibc by default hands large blocks back to the system, which clears every page before a
    process gets it anew: of a training step on a CPU, up to a fifth of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(ctypes.c_int(-3), ctypes.c_int(2**30))  # M_MMAP_THRESHOLD, bytes
        mallopt(ctypes.c_int(-1), ctypes.c_int(-1))  # M_TRIM_THRESHOLD: never


def init_distributed_mode(args: argparse.Namespace) -> torch.device:
    """Joins the process group (nccl on GPUs, gloo on CPUs) and sets up logging.

    Args:
        args: device, dist_url, and the fallbacks of launchers: world_size, local_rank, dist_on_itp.
    Returns:
        This process's device.
    Raises:
        UserError: no such GPU, or the processes cannot meet at dist_url.
    """
    global _store, _host_group, _patient_group
    rank, local_rank, world_size = _place(args)
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s rank {rank}: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
        force=True,
    )
    device = _device(args, local_rank)
    # Under torchrun the processes meet at the launcher's store, which tcp:// on torch before 2.14
    # takes for a store at the url's port, where nobody is.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    url = "env://" if agent and not args.dist_on_itp else args.dist_url
    try:
        if world_size == 1:
            _store = dist.HashStore()
        else:
            _store, _, _ = next(dist.rendezvous(url, rank, world_size, timeout=JOIN_TIMEOUT))
        # The store of a single torchrun outlives its restarts, with the addresses of those who
        # died. Several torchruns meet at a new store each time, and may count restarts differently.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            _store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], _store)
        # A launcher's store is there before the processes are, and nccl does not wait for them.
        _store.set(f"here/{rank}", "")
        _store.wait([f"here/{other}" for other in range(world_size)], JOIN_TIMEOUT)
    except (ValueError, RuntimeError, OSError) as error:  # RuntimeError: the network's, port in use
        line = str(error).splitlines()[0]
        raise UserError(f"--dist_url {args.dist_url}: the processes cannot meet: {line}") from None
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_store,
        rank=rank,
        world_size=world_size,
        timeout=STEP_TIMEOUT,
    )
    _host_group = dist.new_group(backend="gloo", timeout=STEP_TIMEOUT)
    _patient_group = dist.new_group(backend="gloo", timeout=RANK_ZERO_TIMEOUT)
    return device


def host_group() -> dist.ProcessGroup:
    """All ranks over gloo, for flags and objects that need no GPU."""
    return _host_group


def from_rank_zero(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; its UserError is raised on every rank."""
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = make()
        except UserError as error:
            outcome[1] = str(error)
    if get_world_size() > 1:
        dist.broadcast_object_list(outcome, group=_patient_group)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean over all ranks of a tensor, which is overwritten."""
    return sum_over_ranks(values).div_(get_world_size())


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks of a tensor, which is overwritten."""
    if get_world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Gives every rank rank 0's buffers, such as BatchNorm's statistics."""
    if get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def gather_rows(rows: torch.Tensor, total: int) -> torch.Tensor:
    """All ranks' rows, where rank r of W holds the rows r, r + W, ... of `total`."""
    world_size = get_world_size()
    if world_size == 1:
        return rows
    most = -(-total // world_size)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded)
    return torch.stack(gathered, dim=1).flatten(0, 1)[:total]


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Runs a script to its end: exit status 0, or 1 after one line for the user.

    A process that fails ends at once, without waiting for others, and they notice.
    """
    try:
        try:
            main(args)
        except UserError as error:
            _fail(str(error))
        except torch.OutOfMemoryError:
            _fail("out of GPU memory: lower --batch_size (and raise --accum_iter to match)")
        except Stopped:
            raise
        except Exception as error:
            if get_world_size() == 1:
                raise
            if _is_of_a_peer(error):
                _fail(
                    "another process of this run died or hung, its own messages may say why; "
                    "--resume auto goes on from the last save",
                    of_a_peer=True,
                )
            traceback.print_exc()
            _leave()
        finally:
            _end_loaders()
            if dist.is_initialized():
                dist.destroy_process_group()
    except Stopped as stopped:  # also one that comes while an error is handled
        after = " after saving; --resume auto goes on from here" if stopped.saved else ""
        logger.info(f"stopped by {stopped}{after}")
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        sys.exit(130)


def _is_of_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another process did not take part in it to the end."""
    if isinstance(error, dist.DistError):  # nccl's, the store's
        return True
    gloos = ("gloo/transport", "Operation timed out!", "timeout caused pair closure")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in gloos)


def _fail(message: str, of_a_peer: bool = False) -> None:
    """One line from all ranks together, and status 1."""
    if _first_to_report(of_a_peer):
        # From a loader process the line arrives at the end of that process's traceback.
        message = message.rsplit("UserError: ", 1)[-1].strip().replace("\n", "\\n")
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
    _let_others_ask()
    _leave()


def _first_to_report(of_a_peer: bool) -> bool:
    """True on the one rank that asks first: an error that all ranks meet is shown once.

    Where nobody is left to ask, rank 0 has shown what others met as well; unless it was killed.
    """
    if _store is None or get_world_size() == 1:
        return True
    if of_a_peer:
        time.sleep(OTHERS_TIMEOUT)  # a process that dies closes one connection after another
    if _store_is_gone():
        return of_a_peer
    try:
        return _store.add("errors_reported", 1) == 1
    except RuntimeError:
        return of_a_peer


def _let_others_ask() -> None:
    """Rank 0, which may hold the store, stays until all ranks have asked who reports."""
    if get_world_size() == 1 or not is_main_process() or _store_is_gone():
        return
    end = time.monotonic() + OTHERS_TIMEOUT
    with contextlib.suppress(RuntimeError):  # it ends meanwhile
        while _store.add("errors_reported", 0) < get_world_size() and time.monotonic() < end:
            time.sleep(0.05)


def _store_is_gone() -> bool:
    """Whether the process that holds the store has ended; asking it, torch would print a page."""
    store = _store
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return False
    try:
        socket.create_connection((store.host, store.port), OTHERS_TIMEOUT).close()
    except OSError:
        return True
    return False


def _end_loaders() -> None:
    """Ends loader processes that are left, which may be waiting for a file for ever."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would take it for an accident
    for process in multiprocessing.active_children():
        process.kill()


def _leave() -> None:
    """Ends this process with status 1."""
    if get_world_size() == 1:
        sys.exit(1)
    _end_loaders()
    # Taking the group down would wait for the others; those who wait for us notice that we left.
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1)
