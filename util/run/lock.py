"""One writer per folder: a lock that ends with the process that holds it."""

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from util.errors import UserError
from util.parents import start_time

LOCK = ".lock"
# File systems of several machines, which may keep locks to one of them: there, and where there are
# no locks at all, the lock's content decides, too.
SHARED = ("nfs", "nfs4", "lustre", "cifs", "smb3", "ceph", "beegfs", "gpfs", "fuse")
BEAT = 60.0  # seconds between signs of life
SILENT = 600.0  # seconds without one, after which an owner on another machine is taken for dead

_held: dict[Path, IO[str]] = {}
_made: list[Path] = []  # folders, parents first
_last_beat = 0.0


def lock_folder(folder: Path) -> None:
    """Makes a folder and takes its lock, until `release_locks` or the end of this process.

    Raises:
        UserError: another run has it, or it cannot be written.
    """
    path = folder.resolve() / LOCK
    if path in _held:
        return
    try:
        missing = [place for place in path.parents if not place.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        _made.extend(reversed(missing))
        while True:
            file = open(path, "a+")  # noqa: SIM115 (kept open)
            locked = _lock(file)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
            file.close()  # its owner has just removed it
        file.seek(0)
        owner = _parse(file.read())
        decides = locked is None or _file_system(path).split(".")[0] in SHARED
        if locked is False or (decides and _is_alive(owner, path)):
            raise UserError(f"{folder} is in use by {_words(owner)}")
        file.truncate(0)
        file.write(json.dumps(_myself()))
        file.flush()
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from None
    _held[path] = file


def beat() -> None:
    """Gives a sign of life to other machines, once in a while; to be called often."""
    global _last_beat
    if time.monotonic() - _last_beat > BEAT:
        _last_beat = time.monotonic()
        for path in _held:
            with contextlib.suppress(OSError):
                os.utime(path)


def release_locks() -> None:
    """Gives up all locks of this process, and removes the folders that it made for nothing."""
    for path, file in _held.items():
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()
    _held.clear()
    while _made:
        with contextlib.suppress(OSError):  # not empty
            _made.pop().rmdir()


def _lock(file: IO[str]) -> bool | None:
    """Whether the lock was free; None where the file system has no locks.

    By `lockf`, not `flock`: loader processes, which may outlive this one, do not inherit it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _myself() -> dict[str, str | int | None]:
    pid, now = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
    job = os.environ.get("SLURM_JOB_ID")
    ids = {"host": socket.gethostname(), "pid": pid, "started": start_time(pid), "job": job}
    return ids | {"since": now}


def _parse(text: str) -> dict:
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(text), dict):
            return found
    return {}


def _is_alive(owner: dict, path: Path) -> bool:
    """Whether the run that wrote a lock's content may still write to its folder."""
    me = _myself()
    if not owner or (owner.get("job") and owner["job"] == me["job"]):  # an earlier start of the job
        return False
    if owner.get("host") == me["host"]:
        return start_time(int(owner["pid"])) == owner["started"]
    return time.time() - path.stat().st_mtime < SILENT


def _words(owner: dict) -> str:
    job = f", job {owner['job']}" if owner.get("job") else ""
    who = f"process {owner.get('pid')} on {owner.get('host')}{job}, since {owner.get('since')}"
    return f"another run: {who}; give another folder, or end that run"


def _file_system(path: Path) -> str:
    """The type of the file system that holds a path, such as ext4 or nfs4; '' if unknown."""
    found, longest = "", -1
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, place, kind, *_ = line.split()
            if path.is_relative_to(place) and len(place) > longest:
                found, longest = kind, len(place)
    return found
