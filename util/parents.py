"""Processes that end when the one that started them does; by Linux's parent-death signal.

To be imported before torch, which takes seconds: what started this process may end meanwhile.
"""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
# What names a launcher in the environment of the processes that it starts.
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
LAUNCHERS += ("SUBMITIT_LOCAL_JOB_ID",)
ORPHANAGES = ("systemd", "init", "tini", "dumb-init", "docker-init", "catatonit")  # adopt orphans
# Its own names, where a container starts it; the last is torch's, since 2.7.
TORCHRUNS = ("python", "torchrun", "accelerate", "pt_elastic")

_parent = os.getppid()


def _remember() -> None:
    global _parent
    _parent = os.getppid()


os.register_at_fork(after_in_child=_remember)


def end_with_parent(number: signal.Signals) -> None:
    """Has the kernel send this process a signal when its parent ends; where that is Linux's."""
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def end_with_launcher() -> None:
    """Has this process stop, as by SIGTERM, when the launcher that started it ends.

    One that a shell has started is left alone: `nohup` and `&` outlive their shell.
    """
    if any(name in os.environ for name in LAUNCHERS):
        end_with_parent(signal.SIGTERM)
        if launcher_has_ended():
            print("the launcher has ended, and so does this process", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)


def launcher_has_ended() -> bool:
    """Whether a launcher started this process, and has left it to be adopted."""
    if not any(name in os.environ for name in LAUNCHERS):
        return False
    return os.getppid() != _parent or _is_adopted()


def _is_adopted() -> bool:
    """Whether torchrun, the parent of what it starts, ended before this process could look."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    with contextlib.suppress(OSError):  # what is hidden from us is no reason to end
        parent = os.getppid()
        name = Path(f"/proc/{parent}/comm").read_text().strip()
        return name in ORPHANAGES or (parent == 1 and not name.startswith(TORCHRUNS))
    return False


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


def _outermost() -> str:
    """The file whose code Python was started for, with or without `-m`."""
    frame, files = sys._getframe(), []
    while frame:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    return next(file for file in reversed(files) if not file.endswith(("runpy.py", "runpy>")))


def is_script() -> bool:
    """Whether this process is one of our scripts; not a notebook, nor within a debugger."""
    util, file = Path(__file__).resolve().parent, Path(_outermost()).resolve()
    ours = file.suffix == ".py" and file.parent in (util, util.parent)  # not "<string>"
    return ours and not sys.flags.interactive


if is_script():  # from now on, by SIGTERM's default action; `launch` asks for the others
    end_with_launcher()
