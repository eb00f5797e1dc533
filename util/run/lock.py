"""One writer per folder: a lock that ends with the process that holds it."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import IO

from util.errors import UserError
from util.parents import start_time

LOCK = ".lock"
# Where locks may be known to this machine alone, or not kept at all, the lock's content decides,
# too: by the options and types of file systems.
LOCAL_OPTIONS = ("nolock", "localflock", "nobrl", "local_lock=all", "local_lock=posix")
LOCAL_TYPES = ("fuse", "9p", "virtiofs", "afs")
SHARED_TYPES = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "wekafs", "panfs")
BEAT = 60.0  # seconds between signs of life
SILENT = 600.0  # seconds without one, after which an owner on another machine is taken for dead
SETTLE = 1.0  # seconds in which all write that want a folder without locks; the last has it

_held: dict[Path, tuple[IO[str], str]] = {}  # with the content
_made: list[Path] = []  # folders, parents first
_taken: list[str] = []  # by whom
_beating: tuple[threading.Event, threading.Thread] | None = None  # gives signs of life; its end


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
        _held[path] = _take(folder, path)
    except OSError as error:
        where = f"{path.name}: " if error.filename == str(path) else ""
        why = f"cannot write to the folder {folder}: {where}{error.strerror}"
        raise UserError(why) from None
    _start_beating()


def _take(folder: Path, path: Path) -> tuple[IO[str], str]:
    """The open lock file and its content. No other file of it may be closed: that unlocks it."""
    while True:
        file = open(path, "a+")  # noqa: SIM115 (kept open)
        locked = _lock(file)
        if _is_there(path, file):
            break
        file.close()  # its owner has just removed it
    owner = _owner(file, patient=locked is False)
    scope = _scope(path)
    if locked is False:
        # A machine that is gone keeps its lock on a server until it is back; this job may have run
        # there before.
        refused = not (scope == "all" and _is_earlier(owner))
    else:
        refused = (locked is None or scope == "unknown") and _is_alive(owner, path)
    if refused:
        raise UserError(f"{folder} is in use by {_words(owner)}")
    content = json.dumps(_myself())
    file.truncate(0)
    file.write(content)
    file.flush()
    with contextlib.suppress(OSError):
        path.chmod(0o666)  # what is left behind hinders no other user
    if locked is None:
        time.sleep(SETTLE)
        if (last := _owner(file)) != json.loads(content):
            raise UserError(f"{folder} is in use by {_words(last)}")
    return file, content


def _is_there(path: Path, file: IO[str]) -> bool:
    """Whether an open lock file still has its path, and no other one."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):  # not if the network fails for a moment
        return False
    return os.path.samestat(os.fstat(file.fileno()), found)


def check_locks() -> None:
    """Raises UserError if a folder was removed, or taken by a run that heard no sign of life."""
    if _taken:
        raise UserError(_taken[0])


def _start_beating() -> None:
    global _beating
    if _beating is None:
        ended = threading.Event()
        thread = threading.Thread(target=_beat, args=(ended,), daemon=True)
        thread.start()
        _beating = ended, thread


def _beat(ended: threading.Event) -> None:
    """Gives signs of life to other machines, and looks for a run that has not seen them."""
    while not ended.wait(BEAT):
        for path, (file, content) in list(_held.items()):
            with contextlib.suppress(OSError, ValueError):
                if not _is_there(path, file):
                    _taken.append(f"{path.parent} has been removed or replaced during the run")
                elif (last := _owner(file, patient=True)) != json.loads(content):
                    _taken.append(f"{path.parent} has been taken by {_words(last)}")
                else:
                    os.utime(path)


def release_locks() -> None:
    """Gives up all locks of this process, and removes the folders that it made for nothing."""
    global _beating
    if _beating is not None:
        ended, thread = _beating
        ended.set()
        thread.join(BEAT)  # it may be reading a lock
        _beating = None
    for path, (file, content) in _held.items():
        with contextlib.suppress(OSError):
            if _is_there(path, file) and _owner(file) == json.loads(content):
                path.unlink()
        file.close()
    _held.clear()
    _taken.clear()
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
    ids = {"host": socket.gethostname(), "pid": pid, "started": start_time(pid)}
    job = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    return ids | {"job": job[0], "restarts": job[1], "since": now}


def _owner(file: IO[str], patient: bool = False) -> dict:
    """Who wrote a lock's content; {} if nobody can be read from it.

    Args:
        patient: who holds the lock may be about to write it.
    """
    for _ in range(20 if patient else 1):
        with contextlib.suppress(ValueError):
            if isinstance(found := json.loads(os.pread(file.fileno(), 4096, 0)), dict) and found:
                return found
        if patient:
            time.sleep(0.1)
    return {}


def _is_earlier(owner: dict) -> bool:
    """Whether that is an earlier start of this SLURM job."""
    me = _myself()
    same = owner.get("job") is not None and owner["job"] == me["job"]
    return same and owner.get("restarts", 0) < me["restarts"]


def _is_alive(owner: dict, path: Path) -> bool:
    """Whether the run that wrote a lock's content may still write to its folder."""
    if not owner or _is_earlier(owner):
        return False
    if owner.get("host") == socket.gethostname():
        return start_time(int(owner["pid"])) == owner["started"]
    return time.time() - path.stat().st_mtime < SILENT


def _words(owner: dict) -> str:
    if not owner:
        return "another run, which has not said who it is; give another folder, or end that run"
    job = f", job {owner['job']}" if owner.get("job") else ""
    who = f"process {owner.get('pid')} on {owner.get('host')}{job}, since {owner.get('since')}"
    return f"another run: {who}; give another folder, or end that run"


def _scope(path: Path) -> str:
    """Which machines are told of a lock: all, the one that alone has the file, or unknown."""
    kind, options = _mount(path)
    if kind.startswith(LOCAL_TYPES) or any(word in options for word in LOCAL_OPTIONS):
        return "unknown"
    return "all" if kind.startswith(SHARED_TYPES) else "one"


def _mount(path: Path) -> tuple[str, list[str]]:
    """Type and options of the file system that holds a path; ("", []) if unknown."""
    found, longest = ("", []), -1
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, place, kind, options, *_ = line.split()
            place = place.encode().decode("unicode_escape")  # "\\040" is a space
            if path.is_relative_to(place) and len(place) >= longest:  # the last one is on top
                found, longest = (kind, options.split(",")), len(place)
    return found
