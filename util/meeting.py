"""How the processes of one start find each other, and nobody else's."""

import argparse
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist

from util.errors import UserError
from util.parents import launcher_has_ended, start_time, started_by

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
FIRST_PORT, PORTS = 10000, 20000  # systems give clients ports from 32768 on
LATE = "this process belongs to an earlier start of the run, and ends"


def place(args: argparse.Namespace) -> tuple[int, int, int]:
    """Rank, rank on this machine and world size, from the launcher if there is one, else flags.

    Raises:
        UserError: the launcher's environment is incomplete.
    """
    env = os.environ
    # One that starts the other's helpers, as srun does mpirun's, has fewer processes, or one.
    several = [names for names in (OPEN_MPI, SRUN, MPICH) if env.get(names[2], "1") != "1"]
    if args.dist_on_itp:
        names = OPEN_MPI
    elif "RANK" in env and "WORLD_SIZE" in env:  # torchrun, torch.distributed.launch
        names = TORCHRUN
    elif several:
        names = max(several, key=lambda names: (names[0] in env, len(env[names[2]]), env[names[2]]))
    elif SRUN[2] in env:  # absent in the batch script itself
        names = SRUN
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


def master(args: argparse.Namespace) -> str | None:
    """The name or address of rank 0's machine, if it was given."""
    given = None if _has_agent(args) else urlsplit(args.dist_url).hostname
    return given or os.environ.get("MASTER_ADDR")


def _has_agent(args: argparse.Namespace) -> bool:
    """Whether the launcher has a store, as torchrun's agent."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not args.dist_on_itp


def _store(args: argparse.Namespace, rank: int, world_size: int) -> dist.Store:
    """The launcher's store, or rank 0's at dist_url."""
    env, url = os.environ, args.dist_url
    agent = _has_agent(args)
    if agent or url.startswith("file://"):
        # Under torchrun, whatever dist_url is: before torch 2.14, tcp:// would look for a store at
        # its port, where there is none.
        url = "env://" if agent else url
        store = next(dist.rendezvous(url, rank, world_size, timeout=JOIN_TIMEOUT))[0]
        # torchrun gives each restart a part of its store, but each machine's counts its own.
        return store.underlying_store if isinstance(store, dist.PrefixStore) else store
    if url != "env://":
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if port is None:
            raise ValueError("it needs a port, as in tcp://HOST:PORT")
    elif "MASTER_ADDR" in env:
        host, port = env["MASTER_ADDR"], env.get("MASTER_PORT", "")
        if not port.isdigit():
            raise ValueError(f"MASTER_ADDR is set, but MASTER_PORT is {port!r}")
    elif str(world_size) in (env.get(name) for name in MPI_LOCAL_SIZES):
        name = OPEN_MPI[0] if OPEN_MPI[0] in env else MPICH[0]
        host, port = "localhost", FIRST_PORT + started_by(name) % PORTS
    elif env.get("SLURM_STEP_NUM_NODES") == "1":
        step = int(env["SLURM_JOB_ID"]) * 7 + int(env["SLURM_STEP_ID"])
        host, port = "localhost", FIRST_PORT + step % PORTS
    else:
        raise ValueError("give --dist_url tcp://HOST:PORT, of rank 0's machine")
    with _reminder(lambda: f"rank 0 of {world_size} has not come"):
        return dist.TCPStore(host, int(port), None, rank == 0, JOIN_TIMEOUT, wait_for_workers=False)


def _wait_for_all(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """Rank 0 calls, the others answer its call; each call has a part of the store to itself.

    A launcher's store exists before the processes do, and may outlive them: what an earlier start
    left there is no answer to a new call, and whoever still waits there is told that it is late.
    """
    start, number = identity()
    store = dist.PrefixStore(start, store)
    own, begin, absent = uuid.uuid4().hex, time.monotonic(), set(range(world_size))
    found = _called(store)
    if rank == 0:
        _check_newest(found, number)
        store.set("call", f"{number} {own}")

    def missing() -> str:
        if rank > 0:
            return "" if rank > 1 or not absent else f"rank 0 of {world_size} has not come"
        who = sorted(absent)
        listed = ", ".join(map(str, who[:8])) + ", ..." * (len(who) > 8)
        return f"rank {listed} of {world_size} has not come"

    with _reminder(missing):
        while True:
            if launcher_has_ended():
                raise UserError("the launcher has ended")
            call = _called(store)
            _check_newest(call, number)
            if rank == 0:
                if call != (number, own):
                    raise UserError(LATE)
                here = [other for other in absent if store.check([f"{own}/{other}"])]
                absent.difference_update(here, {0})
                if not absent:
                    store.set(f"{own}/go", "")
                    return dist.PrefixStore(own, store)
            elif call is not None and call[0] == number:
                answer = store.compare_set(f"{call[1]}/{rank}", "", own).decode()
                if answer == own:
                    absent.clear()  # it is rank 0 that knows who is missing
                    if store.check([f"{call[1]}/go"]):
                        return dist.PrefixStore(call[1], store)
                elif call != found:  # another has this rank in a start that is newer than we are
                    raise UserError(LATE)
            if time.monotonic() - begin > JOIN_TIMEOUT.total_seconds():
                raise RuntimeError(missing() or "some have not come")
            time.sleep(POLL)


def _called(store: dist.Store) -> tuple[int, str] | None:
    """The latest start that rank 0 has called to: its number and name."""
    if not store.check(["call"]):
        return None
    number, name = store.get("call").decode().split()
    return int(number), name


def _check_newest(call: tuple[int, str] | None, number: int) -> None:
    """Raises UserError where there is a later start than this process's."""
    if call is not None and call[0] > number:
        raise UserError(LATE)


def identity() -> tuple[str, int]:
    """What this start shares with no other that may meet at the same place, and its number.

    Of torchrun on one machine, when it began and the restarts that it counts; of SLURM, the job's
    restarts. Several torchruns count restarts each for itself.
    """
    env = os.environ
    if env.get("GROUP_WORLD_SIZE") == "1":
        restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
        return "torchrun", 1000 * start_time(started_by("TORCHELASTIC_RUN_ID")) + restarts
    if "SLURM_JOB_ID" in env:
        return f"slurm-{env['SLURM_JOB_ID']}", int(env.get("SLURM_RESTART_COUNT", 0))
    return env.get("TORCHELASTIC_RUN_ID", "any"), 0


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
