"""Runs of two processes that are killed, stopped and spoilt; what remains must be as if never.

    python -m pytest -m faults tests/test_faults_run.py

Processes are forked from a server that has imported all they need, so that a start takes a tenth
of a second. What is done to a run (`Fault`) is patched into its processes; the scripts have no
hooks for it. Random moments are seeded.
"""

import datetime
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, free_port
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.run import checkpoint

pytestmark = pytest.mark.faults

ENDS = {signal.SIGKILL: 30, signal.SIGTERM: 10}  # of runs, at random moments
SAVE_KILLS = 50  # in the writing of a file, of a process that does nothing but save
GONE = 60  # seconds in which a dead process must end all others

server = multiprocessing.get_context("forkserver")
counts = Counter()


@pytest.fixture(scope="module", autouse=True)
def _server():
    modules = ["main_pretrain", "torch.utils.tensorboard", "sklearn.datasets", __name__]
    server.set_forkserver_preload(modules)
    yield
    print("\n" + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))


@dataclass
class Fault:
    """Does something to one rank, or all, where a batch begins."""

    act: Callable[[], None]
    epoch: int
    index: int
    rank: int | None = None


def at(*faults: Fault) -> None:
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


def impatient() -> None:
    """Time limits of seconds, where a run has minutes."""
    from util import distributed

    distributed.JOIN_TIMEOUT = distributed.STEP_TIMEOUT = datetime.timedelta(seconds=4)


def no_more_saving() -> None:
    """The process ends where an epoch is to be saved, which is when all of it has been logged."""
    from util.run.run import Run

    Run.save = lambda *args, **kwargs: die()


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


def note_images(folder: str) -> None:
    """Writes down which images this process was asked for."""
    from util.data import order

    original = order.SeededDataset.__getitem__
    file = open(f"{folder}/images-{os.getpid()}", "a")  # noqa: SIM115

    def getitem(self, key):
        print(*key, file=file, flush=True)
        return original(self, key)

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
        self, flags: list, folder: Path, ranks: int, patches=(), bare: bool = False, missing=0
    ):
        folder.mkdir(exist_ok=True)
        self.stderr = [folder / f"rank{rank}.2" for rank in range(ranks - missing)]
        port = str(free_port())
        self.members = []
        for rank in range(ranks - missing):
            place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
            place |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            words = [str(flag) for flag in flags]
            if bare:
                words += ["--dist_url", f"tcp://localhost:{port}"]
                words += ["--world_size", str(ranks), "--local_rank", str(rank)]
            args = (words, {} if bare else place, str(folder / f"rank{rank}"), list(patches))
            self.members.append(server.Process(target=_process, args=args))
        self.begin = time.monotonic()
        for member in self.members:
            member.start()

    def send(self, number: int) -> bool:
        """A signal to all that still run; whether there were any."""
        running = [member for member in self.members if member.is_alive()]
        for member in running:
            os.kill(member.pid, number)
        return bool(running)

    def wait(self, timeout: float = GONE) -> list[int]:
        """Exit statuses, once all are gone, with whatever they started."""
        sessions = {str(member.pid) for member in self.members}
        _wait_until_gone(lambda pid: _session(pid) in sessions, timeout)
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


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()]


def _wait_until_gone(chosen: Callable[[str], bool], timeout: float = GONE) -> None:
    """Waits until there is no such process; kills those that are left in the end, and complains."""
    end = time.monotonic() + timeout
    while left := [pid for pid in _processes() if chosen(pid)]:
        if time.monotonic() > end:
            for pid in left:
                os.kill(int(pid), signal.SIGKILL)
            raise AssertionError(f"still there after {timeout} s: {left}")
        time.sleep(0.02)


def _session(pid: str) -> str:
    """A process's session; '' for one that is gone or waits to be collected."""
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return ""
    return "" if state == "Z" else session


@pytest.fixture(scope="module")
def flags(photos):
    """48 images in 6 steps an epoch on two ranks, three epochs; saves every 180 ms."""
    flags = ["--data_path", photos, "--model", "mae_vit_nano_patch4", *TINY[2:], "--batch_size", 4]
    flags += ["--epochs", 3, "--warmup_epochs", 1, "--save_interval", 3e-3, "--save_freq", 2]
    return [*flags, "--eval_freq", 3]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of a run that nothing happened to, and its length in seconds."""
    folder = tmp_path_factory.mktemp("whole")
    for _ in range(2):  # the first starts the server
        fleet = Fleet([*flags, "--output_dir", folder, "--overwrite"], folder, 2)
        assert fleet.wait() == [0, 0], fleet.errors()
        length = time.monotonic() - fleet.begin
    return folder, length


def log_of(folder: Path) -> list[dict]:
    timings = ("train_images_per_second", "train_data_wait")
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timings} for line in lines]


def assert_same_run(folder: Path, other: Path) -> None:
    names = sorted(path.name for path in folder.glob("*.pth"))
    assert names == sorted(path.name for path in other.glob("*.pth"))
    for name in names:
        one, two = (torch.load(f / name, weights_only=True) for f in (folder, other))
        for key in ("model", "optimizer", "scaler", "epoch", "best"):
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
    assert log_of(folder) == log_of(other)


@pytest.mark.parametrize("number", ENDS, ids=["KILL", "TERM"])
def test_runs_ended_at_random_moments_go_on_to_the_same_bits(number, flags, whole, tmp_path):
    reference, length = whole
    moments = random.Random(number)
    landed = runs = 0
    while landed < ENDS[number]:
        runs += 1
        out = tmp_path / str(runs)
        finished = False
        while not finished:
            fleet = Fleet([*flags, "--output_dir", out, "--resume", "auto"], out, 2)
            if landed < ENDS[number]:
                time.sleep(moments.uniform(0, length))
                landed += fleet.send(number)
            statuses = fleet.wait()
            finished = statuses == [0, 0]
            if number == signal.SIGTERM and not finished:
                # before Python runs, a signal's own action; where one stops first, the other sees
                assert set(statuses) <= {-number, 128 + number, 1}, fleet.errors()
                counts[f"SIGTERM exits {statuses}"] += 1
        assert_same_run(reference, out)
    counts[f"{number.name}s at random moments"] += landed
    counts[f"runs ended by {number.name}s and resumed to the same bits"] += runs


def _save_forever(path: str) -> None:
    state = {"model": {"weight": torch.zeros(2**18)}, "count": 0}
    while True:
        state["count"] += 1
        state["model"]["weight"].fill_(state["count"])
        checkpoint.save(state, Path(path))


def test_a_kill_during_saving_leaves_a_whole_file(tmp_path):
    path = tmp_path / checkpoint.LAST
    moments = random.Random(0)
    landed = 0
    while landed < SAVE_KILLS:
        saver = server.Process(target=_save_forever, args=(str(path),))
        temporary = path.with_name(path.name + ".tmp")
        temporary.unlink(missing_ok=True)
        saver.start()
        while not temporary.exists():
            time.sleep(1e-3)
        time.sleep(moments.uniform(0, 0.02))
        saver.kill()
        saver.join()
        landed += temporary.exists()
        if path.exists():
            state = checkpoint.load(path)
            assert state["model"]["weight"].eq(state["count"]).all()
            counts["files that were whole after SIGKILLs of a process that saves"] += 1
    counts["SIGKILLs that landed in the writing of a file"] += landed


def test_a_full_disk_does_not_end_a_run(flags, whole, tmp_path):
    faults = Fault(fill_disk, 1, 2), Fault(empty_disk, 2, 0)
    fleet = Fleet([*flags, "--output_dir", tmp_path], tmp_path, 2, [(at, *faults)])
    # its own output is a file, too, and the first rank's is cut off
    assert fleet.wait() == [0, 0], fleet.errors()
    lines = log_of(whole[0])
    assert log_of(tmp_path) == [lines[0], lines[2]]
    one, two = (torch.load(f / checkpoint.LAST, weights_only=True) for f in (tmp_path, whole[0]))
    torch.testing.assert_close(one["model"], two["model"], rtol=0, atol=0)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, where this machine lets us mount one."""
    folder = tmp_path / "faults_tmpfs"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("space_returns", [False, True])
def test_a_disk_of_one_mebibyte(space_returns, flags, whole, small_disk, tmp_path):
    faults = [Fault(enlarge_tmpfs, 2, 0, rank=0)] * space_returns
    fleet = Fleet([*flags, "--output_dir", small_disk], tmp_path, 2, [(at, *faults)])
    statuses = fleet.wait()
    assert not list(small_disk.glob("*.tmp"))
    assert [line for line in log_of(small_disk) if line not in log_of(whole[0])] == []
    if space_returns:
        assert statuses == [0, 0], fleet.errors()
        assert (small_disk / checkpoint.LAST).exists()
    else:
        assert statuses == [1, 1]
        assert "No space left on device" in fleet.error()


def start_each(cases: list, act: Callable[[], None], flags: list, folder: Path) -> dict:
    """Runs with loader processes, all at once: of (rank, bare), the rank has something to do."""
    fleets = {}
    for rank, bare in cases:
        out = folder / f"{rank}-{bare}"
        words = [*flags, "--output_dir", out, "--num_workers", 1]
        fleets[rank, bare] = Fleet(words, out, 2, [(at, Fault(act, 1, 3, rank=rank))], bare)
    return fleets


def test_a_killed_rank_ends_the_other(flags, tmp_path):
    cases = [(rank, bare) for rank in (0, 1) for bare in (False, True)]
    for (rank, _), fleet in start_each(cases, die, flags, tmp_path).items():
        statuses = fleet.wait()
        assert statuses[rank] == -signal.SIGKILL
        assert statuses[1 - rank] == 1
        assert "another process of this run died or hung" in fleet.error()
        counts["killed ranks, noticed by the other"] += 1


@pytest.mark.parametrize("place", ["training", "evaluation"])
def test_a_rank_that_hangs_ends_the_other(place, flags, tmp_path):
    patches = [(impatient,), (at, Fault(hang, 1, 3, rank=1))]
    if place == "evaluation":
        flags = [*flags, "--eval_freq", 1]
        patches = [(impatient,), (hang_in_evaluation,)]
    fleet = Fleet([*flags, "--output_dir", tmp_path], tmp_path, 2, patches)
    fleet.members[0].join(GONE)
    fleet.send(signal.SIGKILL)  # what hangs, too
    assert fleet.wait()[0] == 1
    assert "another process of this run died or hung" in fleet.error()
    counts["hung ranks, noticed by the other"] += 1


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


def test_a_rank_that_never_comes_is_not_waited_for(flags, tmp_path):
    words = [*flags, "--output_dir", tmp_path / "out"]
    fleet = Fleet(words, tmp_path, 2, [(impatient,)], bare=True, missing=1)
    assert fleet.wait() == [1]
    assert "the processes cannot meet" in fleet.error()
    assert not (tmp_path / "out").exists()


def test_a_loader_process_that_waits_for_ever_is_ended(tmp_path):
    """As one does that reads a file from a server that is gone."""
    for i in range(8):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    flags = ["--data_path", tmp_path, "--model", "mae_vit_nano_patch4", *TINY[2:], "--batch_size"]
    flags += [4, "--num_workers", 1, "--epochs", 1, "--output_dir", tmp_path / "out"]
    fleet = Fleet(flags, tmp_path / "run", 1, [(wait_for_ever, str(tmp_path / "waiting"))])
    end = time.monotonic() + GONE
    while not (tmp_path / "waiting").exists() and time.monotonic() < end:
        time.sleep(0.05)
    fleet.send(signal.SIGTERM)
    assert fleet.wait(10) == [128 + signal.SIGTERM]


def wait_for_ever(sign: str) -> None:
    from util.data import order

    def getitem(self, key):
        Path(sign).touch()
        time.sleep(1e6)

    order.SeededDataset.__getitem__ = getitem


def test_curves_are_neither_doubled_nor_cut(flags, tmp_path):
    """A save within the evaluation, and an end between that epoch's points and its own save."""
    flags = [*flags, "--eval_freq", 1, "--output_dir", tmp_path]
    patches = [(at, Fault(no_more_saving, 1, 3)), (saving_in_evaluation,)]
    assert Fleet(flags, tmp_path, 1, patches).wait() == [-signal.SIGKILL]
    assert Fleet([*flags, "--resume", "auto"], tmp_path, 1).wait() == [0]
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    for tag in tags["scalars"]:
        assert [event.step for event in events.Scalars(tag)] == [12, 24, 36], tag
    for tag in tags["images"]:
        assert [event.step for event in events.Images(tag)] == [12, 24, 36], tag


def saving_in_evaluation() -> None:
    """Saves wherever a run may, once there is no more training in the epoch."""
    from util import features

    original = features.polled

    def polled(loader, poll):
        poll.__self__._interrupts.save_interval = 0
        return original(loader, poll)

    features.polled = polled


def test_a_problem_of_one_rank_is_one_line(flags, tmp_path):
    fleets = start_each([(0, True), (1, True)], break_down, flags, tmp_path)
    for fleet in fleets.values():
        assert fleet.wait() == [1, 1]
        said, *others = sorted(fleet.errors(), reverse=True)
        assert said == "main_pretrain.py: error: this rank alone has a problem"
        assert len(others) <= 1  # the other rank's, if no launcher ended it
        assert all("another process of this run died or hung" in line for line in others)


def test_nan_on_one_rank_ends_both_at_the_same_step(flags, whole, tmp_path):
    flags = [*flags, "--output_dir", tmp_path, "--epochs", 1, "--save_interval", 60]
    assert Fleet(flags, tmp_path, 2).wait() == [0, 0]
    good = (tmp_path / checkpoint.LAST).read_bytes()
    flags += ["--epochs", 3, "--resume", "auto"]
    fleet = Fleet(flags, tmp_path, 2, [(at, Fault(spoil, 1, 2, rank=1))])
    assert fleet.wait() == [1, 1]
    assert "loss is nan, contrastive is nan" in fleet.error()
    assert "epoch 1, step 3, lr " in fleet.error()
    assert (tmp_path / checkpoint.LAST).read_bytes() == good


def test_nan_on_one_rank_is_left_out_by_both(flags, tmp_path):
    flags = [*flags, "--output_dir", tmp_path, "--skip_nonfinite", 1]
    fleet = Fleet(flags, tmp_path, 2, [(at, Fault(spoil_once, 1, 2, rank=1))])
    assert fleet.wait() == [0, 0], fleet.errors()
    model = torch.load(tmp_path / checkpoint.LAST, weights_only=True)["model"]
    assert all(tensor.isfinite().all() for tensor in model.values())
    out = (tmp_path / "rank0.1").read_text()
    assert out.count("step skipped, 1 in a row of 1 allowed") == 1


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_sees_every_image(before, after, flags, whole, tmp_path):
    flags = [*flags, "--output_dir", tmp_path, "--accum_iter", 2 // before]
    note = (note_images, str(tmp_path))
    fleet = Fleet(flags, tmp_path, before, [(at, Fault(stop, 1, 2 * 2 // before)), note])
    assert set(fleet.wait()) == {128 + signal.SIGTERM}
    flags += ["--resume", "auto", "--accum_iter", 1]  # which the checkpoint knows better
    fleet = Fleet(flags, tmp_path, after, [note])
    assert fleet.wait() == [0] * after, fleet.errors()
    out = (tmp_path / "rank0.1").read_text()
    assert f"not bit-exact from here: {before} processes before, {after} now" in out
    assert f"with --accum_iter {2 // after} the global batch stays 8" in out
    assert "6 steps per epoch" in out.split("not bit-exact")[1]
    lines = [line for p in tmp_path.glob("images-*") for line in p.read_text().splitlines()]
    seen = Counter(line for line in lines if line.startswith("1 "))
    assert sorted(seen) == sorted(f"1 {index}" for index in range(48))
    assert set(seen.values()) == {1}
    assert [line["epoch"] for line in log_of(tmp_path)] == [0, 1, 2]


WRAPPER = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import main_pretrain
from test_faults_run import Fault, at, die
from util.run.launch import launch

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    at(Fault(die, 1, 3, rank=1))
sys.argv[0] = "main_pretrain.py"
launch(main_pretrain.main, main_pretrain.get_args_parser().parse_args())
"""


def test_torchrun_restarts_the_run_by_itself(flags, whole, tmp_path):
    script = tmp_path / "wrapper.py"
    script.write_text(WRAPPER.format(root=str(ROOT), tests=str(ROOT / "tests")))
    out = tmp_path / "out"
    launcher = ["torch.distributed.run", "--nproc_per_node=2", "--max_restarts=3"]
    command = [sys.executable, "-m", *launcher, f"--master_port={free_port()}", script, *flags]
    command += ["--output_dir", out, "--resume", "auto"]
    mark = f"FAULTS_RUN={tmp_path}"
    name, value = mark.split("=")
    env = os.environ | {"OMP_NUM_THREADS": "1", name: value}
    words = [str(word) for word in command]
    result = subprocess.run(words, env=env, capture_output=True, text=True)
    ours = [line for line in result.stderr.splitlines() if line.startswith("main_pretrain.py: ")]
    assert len(ours) <= 1  # the survivor's, if torchrun left it the time
    _wait_until_gone(lambda pid: mark in _environment(pid))
    assert result.returncode == 0, result.stderr
    assert_same_run(whole[0], out)
    counts["restarts by torchrun to the same bits"] += 1


def _environment(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""
