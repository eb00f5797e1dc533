"""The process group, and what goes over it. One process is a group of size 1."""

import argparse
import contextlib
import datetime
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from util.errors import UserError
from util.meeting import master, meet, place
from util.network import settle_network
from util.peers import watch_peers

T = TypeVar("T")

_host_group: dist.ProcessGroup | None = None
_patient_group: dist.ProcessGroup | None = None  # for `from_rank_zero`
STEP_TIMEOUT = datetime.timedelta(minutes=10)  # a process that is later than this has hung
GATHERED = 2**14  # rows of all processes that are sent at once
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MOST_FILES = 2**16
GLOO = "gloo (GLOO_SOCKET_IFNAME names the interface to take)"
RANK_ZERO_TIMEOUT = datetime.timedelta(hours=12)  # it may list a million files, or download them


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def choose_device(name: str | None, local_rank: int) -> torch.device:
    """This process's device, given `--device` and its rank on this machine.

    Raises:
        UserError: there is no such device.
    """
    if (name or "cuda") == "cuda" and torch.cuda.is_available():
        visible = torch.cuda.device_count()
        # With srun --gpus-per-task=1 each task sees only its own GPU.
        bound = visible == 1 and os.environ.get("SLURM_LOCALID") == str(local_rank)
        index = 0 if bound else local_rank
        if index >= visible:
            raise UserError(f"no GPU for process {local_rank} of this machine: there are {visible}")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if name == "cuda":
        raise UserError("--device cuda: no usable GPU here; --device cpu trains without one")
    return torch.device("cpu")


def init_distributed_mode(args: argparse.Namespace) -> torch.device:
    """Joins the process group: nccl on GPUs, gloo on CPUs.

    Args:
        args: device, dist_url, and where no launcher says them: world_size, local_rank,
            dist_on_itp.
    Returns:
        This process's device.
    Raises:
        UserError: no such GPU, or not everywhere; the processes cannot meet at dist_url, or reach
            each other.
    """
    global _host_group, _patient_group
    _allow_files()
    rank, local_rank, world_size = place(args)
    device = choose_device(args.device, local_rank)
    store = meet(args, rank, world_size)
    if world_size > 1:
        settle_network(store, rank, world_size, device.type, master(args))
    group = {"store": store, "rank": rank, "world_size": world_size, "timeout": STEP_TIMEOUT}
    try:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device, **group)
        else:
            dist.init_process_group("gloo", **group)
        _host_group = dist.new_group(backend="gloo", timeout=STEP_TIMEOUT)
        _patient_group = dist.new_group(backend="gloo", timeout=RANK_ZERO_TIMEOUT)
        if device.type == "cuda" and world_size > 1:
            watch_peers(dist.new_group(backend="gloo", timeout=STEP_TIMEOUT))
    except RuntimeError as error:
        ended = dist.is_initialized() and "by peer" in str(error)  # another process
        if ended or isinstance(error, dist.DistError) or "gloo" not in str(error).lower():
            raise
        line = str(error).splitlines()[0]
        raise UserError(f"the processes do not reach each other over {GLOO}: {line}") from None
    return device


def _allow_files() -> None:
    """As many open files as the system lets this process have: each other rank takes several."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def host_group() -> dist.ProcessGroup:
    """All ranks over gloo, for flags and objects that stay on the host."""
    return _host_group


def hosts() -> list[tuple[str, str]]:
    """By rank, the kernel and the name of the machine that it runs on; called by all ranks."""
    kernel = name = socket.gethostname()
    with contextlib.suppress(OSError):  # not in every container
        kernel = BOOT_ID.read_text()
    found = [(kernel, name)] * get_world_size()
    if len(found) > 1:
        dist.all_gather_object(found, found[0], group=_host_group)
    return found


def machines() -> list[str]:
    """The names of those that the processes run on; two may have one name, but not one kernel."""
    return sorted(dict(hosts()).values())


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


def max_over_ranks(number: int) -> int:
    """The largest of all ranks' numbers."""
    largest = torch.tensor(number)
    if get_world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=_host_group)
    return int(largest)


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
    group = None if rows.is_cuda else _host_group
    gathered = rows.new_empty(total, *rows.shape[1:])
    most = -(-total // world_size)
    step = max(1, GATHERED // world_size)
    for start in range(0, most, step):  # in parts: no second copy of all
        count = min(step, most - start)
        part = rows.new_zeros(count, *rows.shape[1:])
        part[: len(rows) - start] = rows[start : start + count]
        parts = [torch.empty_like(part) for _ in range(world_size)]
        dist.all_gather(parts, part, group=group)
        for rank, found in enumerate(parts):
            place = gathered[start * world_size + rank : (start + count) * world_size : world_size]
            place.copy_(found[: len(place)])
    return gathered
