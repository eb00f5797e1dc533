"""How the processes of one start find each other, and nobody else's."""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from util.errors import UserError
from util.parents import start_time, started_by

JOIN_TIMEOUT = timedelta(minutes=15)  # from the first process's start to the last's
PATIENCE = 60.0  # seconds of waiting between two lines about it
POLL = 0.2  # seconds
# Variables that launchers set: rank, rank on this machine, processes. MPI's own are used if there
# are several processes; the release's --dist_on_itp asks for Open MPI's in any case.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")
MPICH = ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE")
MPI_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")  # processes of this machine
MPI_PORTS = 20000  # the first of as many


def place(args: argparse.Namespace) -> tuple[int, int, int]:
    """Rank, rank on this machine and world size, from the launcher if there is one, else flags.

    Raises:
        UserError: the launcher's environment is incomplete.
    """
    env = os.environ
    if args.dist_on_itp:
        names = OPEN_MPI
    elif "RANK" in env and "WORLD_SIZE" in env:  # torchrun, torch.distributed.launch
        names = TORCHRUN
    elif "SLURM_STEP_NUM_TASKS" in env:  # srun; absent in the batch script itself
        names = SRUN
    elif several := [names for names in (OPEN_MPI, MPICH) if env.get(names[2], "1") != "1"]:
        names = several[0]
    else:
        rank = max(args.local_rank, 0)
        return rank, rank, args.world_size
    fallback = {names[1]: str(max(args.local_rank, 0))}
    try:
        rank, local_rank, world_size = (int((fallback | dict(env))[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(f"the launcher's environment is incomplete: {error}") from None
    return rank, local_rank, world_size


def meet(args: argparse.Namespace, rank: int, world_size: int) -> dist.Store:
    """Waits for the other processes of this start; returns the store that all of them share.

    Raises:
        UserError: they cannot meet at dist_url, or this process belongs to an earlier start.
    """
    if world_size == 1:
        return dist.HashStore()
    try:
        return _wait_for_all(_store(args, rank, world_size), rank, world_size)
    except (ValueError, RuntimeError, OSError) as error:  # RuntimeError: the network's, port in use
        line = str(error).splitlines()[0]
        raise UserError(f"--dist_url {args.dist_url}: the processes cannot meet: {line}") from None


def _store(args: argparse.Namespace, rank: int, world_size: int) -> dist.Store:
    """The launcher's store, or rank 0's at dist_url."""
    env, url = os.environ, args.dist_url
    agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not args.dist_on_itp
    if agent or url.startswith("file://"):
        # Under torchrun, whatever dist_url is: before torch 2.14, tcp:// would look for a store at
        # its port, where there is none.
        url = "env://" if agent else url
        return next(dist.rendezvous(url, rank, world_size, timeout=JOIN_TIMEOUT))[0]
    if url != "env://":
        host, _, port = url.removeprefix("tcp://").rpartition(":")
    elif "MASTER_ADDR" in env:
        host, port = env["MASTER_ADDR"], env.get("MASTER_PORT", "")
    elif str(world_size) in (env.get(name) for name in MPI_LOCAL_SIZES):
        host, port = "localhost", str(MPI_PORTS + os.getppid() % MPI_PORTS)
    else:
        raise ValueError("give --dist_url tcp://HOST:PORT, of rank 0's machine")
    with _reminder(lambda: f"rank 0 of {world_size} has not come"):
        return dist.TCPStore(host, int(port), None, rank == 0, JOIN_TIMEOUT, wait_for_workers=False)


def _wait_for_all(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """A launcher's store exists before the processes do, and nccl does not wait for them.

    It may also meet with processes of an earlier start that have lived on. So each start has a part
    of the store to itself, and the earlier one's end.
    """
    start, number = identity()
    own = dist.PrefixStore(f"{start}/{number}", store)
    own.set(f"here/{rank}", "")
    begin, absent = time.monotonic(), list(range(world_size))

    def missing() -> str:
        first = next(other for other in range(world_size) if other not in absent)
        who = ", ".join(map(str, absent[:8])) + ", ..." * (len(absent) > 8)
        return f"rank {who} of {world_size} has not come" if rank == first else ""

    with _reminder(missing):
        while True:
            newest = int(store.compare_set(f"newest/{start}", "", str(number)))
            if newest > number:
                raise UserError("this process belongs to an earlier start of the run, and ends")
            if newest < number:
                store.set(f"newest/{start}", str(number))
            absent = [other for other in absent if not own.check([f"here/{other}"])]
            if not absent:
                return own
            if time.monotonic() - begin > JOIN_TIMEOUT.total_seconds():
                raise RuntimeError(missing() or "some have not come")
            time.sleep(POLL)


def identity() -> tuple[str, int]:
    """What this start shares with no other that may meet at the same place, and its number.

    Of torchrun on one machine, when it began and the restarts that it counts; of SLURM, the job's
    restarts. Several torchruns make a new store for every restart.
    """
    env = os.environ
    if env.get("GROUP_WORLD_SIZE") == "1":
        restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
        return "torchrun", 1000 * start_time(started_by("TORCHELASTIC_RUN_ID")) + restarts
    if "SLURM_JOB_ID" in env:
        return f"slurm-{env['SLURM_JOB_ID']}", int(env.get("SLURM_RESTART_COUNT", 0))
    return "any", 0


@contextmanager
def _reminder(words: Callable[[], str]) -> Iterator[None]:
    """Prints every minute what is waited for."""
    done, begin = threading.Event(), time.monotonic()

    def remind() -> None:
        while not done.wait(PATIENCE):
            if line := words():
                seconds = time.monotonic() - begin
                print(f"{line} after {seconds:.0f} s", file=sys.stderr, flush=True)

    threading.Thread(target=remind, daemon=True).start()
    try:
        yield
    finally:
        done.set()
