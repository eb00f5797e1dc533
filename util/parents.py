"""Processes that end when the one that started them does; by Linux's parent-death signal."""

import contextlib
import ctypes
import os
import signal
from pathlib import Path

PR_SET_PDEATHSIG = 1
# What names a launcher in the environment of the processes that it starts.
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
LAUNCHERS += ("SUBMITIT_LOCAL_JOB_ID",)
ORPHANAGES = ("systemd", "init", "tini", "dumb-init", "docker-init", "catatonit")  # adopt orphans
STARTERS = ("torch", "accelerate", "submitit", "mpi", "srun")  # in the command of a launcher


def end_with_parent(number: signal.Signals, parent: int | None = None) -> None:
    """Has the kernel send this process a signal when its parent ends.

    Args:
        parent: its pid, if known; where it has ended already, the signal is sent at once.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if parent not in (None, os.getppid()):
        os.kill(os.getpid(), number)


def end_with_launcher() -> None:
    """Has this process stop, as by SIGTERM, when the launcher that started it ends.

    One that a shell has started is left alone: `nohup` and `&` outlive their shell.
    """
    if any(name in os.environ for name in LAUNCHERS):
        end_with_parent(signal.SIGTERM)
        if _is_orphan():
            os.kill(os.getpid(), signal.SIGTERM)


def _is_orphan() -> bool:
    """Whether the launcher has ended already: then this process has been adopted."""
    parent = os.getppid()
    try:
        name = Path(f"/proc/{parent}/comm").read_text().strip()
        command = Path(f"/proc/{parent}/cmdline").read_text()
    except OSError:  # ended since
        return True
    adopted = parent == 1 or name in ORPHANAGES
    return adopted and not any(starter in command for starter in STARTERS)


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where there is none."""
    try:
        return int(_stat(pid)[19])
    except OSError:
        return 0


def _stat(pid: int) -> list[str]:
    """What /proc tells of a process: from the third field on, state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def started_by(variable: str) -> int:
    """The pid of the nearest ancestor that did not begin with an environment variable.

    That is what set it for us, though a shell may stand between.
    """
    pid = os.getppid()
    with contextlib.suppress(OSError):  # another user's
        while f"{variable}=" in Path(f"/proc/{pid}/environ").read_text(errors="replace"):
            pid = int(_stat(pid)[1])
    return pid
