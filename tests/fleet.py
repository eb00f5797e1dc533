"""Runs of several processes, and what can be done to them: kills, hangs, full disks, NaN.

Processes are forked from a server that has imported all they need, so that a start takes a tenth
of a second. Each process calls some of the functions here before it runs the script, to patch what
is to go wrong into it; the script has no hooks for that.
"""

import contextlib
import ctypes
import datetime
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from forks import free_port, places

from util.run import checkpoint

GONE = 60  # seconds in which a dead process must end all others
CLONE_NEWNS = 0x20000  # Linux's

server = multiprocessing.get_context("forkserver")


@dataclass
class Fault:
    """Does something to one rank, or all, where a batch begins."""

    act: Callable[[], None]
    epoch: int
    index: int
    rank: int | None = None


def at(*faults: Fault) -> None:
    """Makes the faults happen in this process."""
    import util.run.training

    original = util.run.training.seed_all

    def seed_all(seed: int, *position: int) -> None:
        original(seed, *position)
        for fault in faults:
            if position[:2] == (fault.epoch, fault.index) and fault.rank in (None, position[2]):
                fault.act()

    util.run.training.seed_all = seed_all


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def spoil() -> None:
    """From here on the contrastive loss of this rank is NaN."""
    import engine_pretrain

    original = engine_pretrain.nt_xent

    def nt_xent(*args, **kwargs):
        loss, top1 = original(*args, **kwargs)
        return loss * float("nan"), top1

    engine_pretrain.nt_xent = nt_xent


def spoil_once() -> None:
    """The next contrastive loss of this rank is NaN, the others are as they should be."""
    import engine_pretrain

    original = engine_pretrain.nt_xent
    spoil()
    spoilt = engine_pretrain.nt_xent

    def nt_xent(*args, **kwargs):
        engine_pretrain.nt_xent = original
        return spoilt(*args, **kwargs)

    engine_pretrain.nt_xent = nt_xent


def hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang_in_evaluation() -> None:
    import util.features
    from util.distributed import get_rank

    original = util.features.polled

    def polled(loader, poll):
        for batch in original(loader, poll):
            if get_rank() == 1:
                hang()
            yield batch

    util.features.polled = polled


def impatient() -> None:
    """Time limits of seconds, where a run has minutes."""
    from util import distributed, meeting

    meeting.JOIN_TIMEOUT = distributed.STEP_TIMEOUT = datetime.timedelta(seconds=4)


def no_more_saving() -> None:
    """The process ends where an epoch is to be saved, which is when all of it has been logged."""
    from util.run.run import Run

    Run.save = lambda *args, **kwargs: die()


def saving_in_evaluation() -> None:
    """Saves wherever a run may, once there is no more training in the epoch."""
    from util import features

    original = features.polled

    def polled(loader, poll):
        poll.__self__._interrupts.save_interval = 0
        return original(loader, poll)

    features.polled = polled


def break_down() -> None:
    from util.errors import UserError

    raise UserError("this rank alone has a problem")


def limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def fill_disk() -> None:
    limit_files(600)


def empty_disk() -> None:
    limit_files(2**30)


def enlarge_tmpfs() -> None:
    mounts = Path("/proc/mounts").read_text().splitlines()
    (folder,) = [line.split()[1] for line in mounts if "faults_tmpfs" in line]
    subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)


def small_shm(rank: int, size: str) -> None:
    """One rank of several has a /dev/shm of its own, as a container has."""
    if os.environ["RANK"] == str(rank):
        if ctypes.CDLL(None).unshare(CLONE_NEWNS):
            raise PermissionError("no namespace of mounts")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"]
        subprocess.run(["mount", *options], check=True)


def fill_shm() -> None:
    with contextlib.suppress(OSError), open("/dev/shm/other", "ab", buffering=0) as file:
        while True:
            file.write(bytes(2**16))


def note_images(folder: str) -> None:
    """Writes down which images this process was asked for."""
    from util.data import order

    original = order.SeededDataset.__getitem__
    file = open(f"{folder}/images-{os.getpid()}", "a")  # noqa: SIM115

    def getitem(self, key):
        print(*key, file=file, flush=True)
        return original(self, key)

    order.SeededDataset.__getitem__ = getitem


def wait_for_ever(sign: str) -> None:
    from util.data import order

    def getitem(self, key):
        Path(sign).touch()
        time.sleep(1e6)

    order.SeededDataset.__getitem__ = getitem


def _process(flags: list[str], env: dict[str, str], out: str, patches: list) -> None:
    os.setsid()  # so that its loader processes can be found
    multiprocessing.set_start_method("fork", force=True)  # for those; the server set its own
    os.environ.update(env)
    for stream in (1, 2):
        os.dup2(os.open(f"{out}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = ["main_pretrain.py"]
    torch.set_num_threads(1)
    for function, *args in patches:
        function(*args)
    import main_pretrain
    from util.run.launch import launch

    launch(main_pretrain.main, main_pretrain.get_args_parser().parse_args(flags))


class Fleet:
    """The processes of one run; as a launcher would start them, or each by flags alone.

    Some may be missing, the last.
    """

    def __init__(
        self, flags: list, folder: Path, ranks: int, patches=(), bare=False, missing=0, **env: str
    ):
        folder.mkdir(exist_ok=True)
        self.stderr = [folder / f"rank{rank}.2" for rank in range(ranks - missing)]
        port = env.get("MASTER_PORT") or free_port()
        self.members = []
        for rank, place in enumerate(places(ranks, port)[: ranks - missing]):
            words = [str(flag) for flag in flags]
            if bare:
                words += ["--dist_url", f"tcp://localhost:{port}"]
                words += ["--world_size", str(ranks), "--local_rank", str(rank)]
            args = (words, {} if bare else place | env, str(folder / f"rank{rank}"), list(patches))
            self.members.append(server.Process(target=_process, args=args))
        self.begin = time.monotonic()
        for member in self.members:
            member.start()

    def send(self, number: int) -> bool:
        """A signal to all that still run; whether there were any."""
        sent = 0
        for member in self.members:
            with contextlib.suppress(ProcessLookupError):  # it ends just now
                if member.is_alive():
                    os.kill(member.pid, number)
                    sent += 1
        return sent > 0

    def wait(self, timeout: float = GONE) -> list[int]:
        """Exit statuses, once all are gone, with whatever they started."""
        sessions = {str(member.pid) for member in self.members}
        wait_until_gone(lambda pid: _session(pid) in sessions, timeout)
        for member in self.members:
            member.join()
        assert not [p for p in os.listdir("/dev/shm") if any(f"_{s}_" in p for s in sessions)]
        return [member.exitcode for member in self.members]

    def errors(self) -> list[str]:
        """Lines on standard error, without torch's own warnings.

        Each once: several ranks may say the same, where no launcher ends them after the first.
        """
        lines = [line for path in self.stderr for line in path.read_text().splitlines()]
        lines = [line for line in lines if not line.startswith(("[W", "[E", "[rank"))]
        return list(dict.fromkeys(lines))

    def error(self) -> str:
        """The one line that tells what is wrong."""
        lines = self.errors()
        assert len(lines) == 1, "\n".join(lines)
        assert lines[0].startswith("main_pretrain.py: error: ")
        return lines[0]


def start_each(cases: list, act: Callable[[], None], flags: list, folder: Path) -> dict:
    """Runs with loader processes, all at once: of (rank, bare), the rank has something to do."""
    fleets = {}
    for rank, bare in cases:
        out = folder / f"{rank}-{bare}"
        words = [*flags, "--output_dir", out, "--num_workers", 1]
        fleets[rank, bare] = Fleet(words, out, 2, [(at, Fault(act, 1, 3, rank=rank))], bare)
    return fleets


def save_forever(path: str) -> None:
    state = {"model": {"weight": torch.zeros(2**18)}, "count": 0}
    while True:
        state["count"] += 1
        state["model"]["weight"].fill_(state["count"])
        checkpoint.save(state, Path(path))


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()]


def _told(pid: str) -> str:
    """What a process is, and does: for a complaint about it."""
    with contextlib.suppress(OSError):
        folder = Path("/proc", pid)
        words = folder.joinpath("cmdline").read_text().replace("\0", " ")[-120:]
        lines = folder.joinpath("status").read_text().splitlines()
        kept = [line for line in lines if line.startswith(("State", "PPid", "Threads", "Sig"))]
        return f"{pid}: ...{words}: {', '.join(kept)}, {folder.joinpath('wchan').read_text()}"
    return f"{pid}: gone meanwhile"


def wait_until_gone(chosen: Callable[[str], bool], timeout: float = GONE) -> None:
    """Waits until there is no such process; kills those that are left in the end, and complains."""
    end = time.monotonic() + timeout
    while left := [pid for pid in _processes() if chosen(pid)]:
        if time.monotonic() > end:
            states = [_told(pid) for pid in left]
            for pid in left:
                os.kill(int(pid), signal.SIGKILL)
            raise AssertionError(f"still there after {timeout} s: {states}")
        time.sleep(0.02)


def _session(pid: str) -> str:
    """A process's session; '' for one that is gone or waits to be collected."""
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return ""
    return "" if state == "Z" else session


def environment_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""
