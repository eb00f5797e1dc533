"""The process group, and what goes over it. One process is a group of size 1."""

import argparse
import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from util.errors import UserError
from util.meeting import meet, place

T = TypeVar("T")

_host_group: dist.ProcessGroup | None = None
_patient_group: dist.ProcessGroup | None = None  # for `from_rank_zero`
STEP_TIMEOUT = datetime.timedelta(minutes=10)  # a process that is later than this has hung
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
        UserError: no such GPU, or the processes cannot meet at dist_url.
    """
    global _host_group, _patient_group
    rank, local_rank, world_size = place(args)
    device = choose_device(args.device, local_rank)
    store = meet(args, rank, world_size)
    group = {"store": store, "rank": rank, "world_size": world_size, "timeout": STEP_TIMEOUT}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **group)
    _host_group = dist.new_group(backend="gloo", timeout=STEP_TIMEOUT)
    _patient_group = dist.new_group(backend="gloo", timeout=RANK_ZERO_TIMEOUT)
    return device


def host_group() -> dist.ProcessGroup:
    """All ranks over gloo, for flags and objects that stay on the host."""
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


def gather_rows(
    rows: torch.Tensor, total: int, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """All ranks' rows, where rank r of W holds the rows r, r + W, ... of `total`.

    Args:
        group: `host_group()` for rows that are on the host.
    """
    world_size = get_world_size()
    if world_size == 1:
        return rows
    most = -(-total // world_size)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded, group=group)
    return torch.stack(gathered, dim=1).flatten(0, 1)[:total]
