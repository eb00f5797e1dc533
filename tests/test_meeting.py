"""How processes find each other, and nobody else's; and that none outlives its launcher."""

import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
from conftest import ROOT, free_port, losses_of, run

from util import meeting, parents
from util.args import pretrain_parser
from util.errors import UserError

LAUNCHER_NAMES = (*meeting.TORCHRUN, *meeting.SRUN, *meeting.OPEN_MPI, *meeting.MPICH)


def args_of(*words: str) -> SimpleNamespace:
    return pretrain_parser().parse_args(["--data_path", "x", *words])


@pytest.mark.parametrize(
    ("words", "env", "place"),
    [
        ([], {}, (0, 0, 1)),
        (["--world_size", "3", "--local_rank", "2"], {}, (2, 2, 3)),
        ([], {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, (5, 1, 8)),
        (["--local_rank", "1"], {"RANK": "5", "WORLD_SIZE": "8"}, (5, 1, 8)),  # an older launcher
        ([], dict(zip(meeting.SRUN, "314", strict=True)), (3, 1, 4)),
        ([], dict(zip(meeting.OPEN_MPI, "102", strict=True)), (1, 0, 2)),
        ([], dict(zip(meeting.MPICH, "102", strict=True)), (1, 0, 2)),
        # mpirun, but of one process each, under another launcher or of none
        ([], dict(zip(meeting.OPEN_MPI, "001", strict=True)), (0, 0, 1)),
        (["--world_size", "2"], dict(zip(meeting.OPEN_MPI, "001", strict=True)), (0, 0, 2)),
        (["--dist_on_itp"], dict(zip(meeting.OPEN_MPI, "001", strict=True)), (0, 0, 1)),
        ([], {**dict(zip(meeting.SRUN, "102", strict=True)), "PMI_SIZE": "7"}, (1, 0, 2)),
        # mpirun inside a step of SLURM's, whose processes are mpirun's helpers
        ([], dict(zip(meeting.SRUN + meeting.OPEN_MPI, "001314", strict=True)), (3, 1, 4)),
        ([], dict(zip(meeting.SRUN + meeting.OPEN_MPI, "102314", strict=True)), (3, 1, 4)),
        ([], dict(zip(meeting.SRUN + meeting.MPICH, "102314", strict=True)), (3, 1, 4)),
    ],
)
def test_the_launcher_says_who_one_is(words, env, place, monkeypatch):
    for name in LAUNCHER_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert meeting.place(args_of(*words)) == place


def test_a_launcher_that_says_half_is_an_error(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="environment is incomplete: 'OMPI_COMM_WORLD_RANK'"):
        meeting.place(args_of())


stores = {}


def meet_in_threads(
    monkeypatch, starts: list[tuple[int, tuple[str, int]]], keep=False, same=None
) -> dict:
    """What becomes of members (rank, identity) of two, at the store of a launcher, in this order.

    Each begins when those before it wait. The store may be kept for the next call.
    """
    port = stores.get("port") or free_port()
    store = stores.get("store") or dist.TCPStore(
        "localhost", port, is_master=True, wait_for_workers=False
    )
    stores.clear()
    if keep:
        stores.update(port=port, store=store)
    identities, outcomes = {}, {}
    monkeypatch.setattr(meeting, "identity", lambda: identities[threading.current_thread().name])
    clients = {}
    monkeypatch.setattr(meeting, "_store", lambda *_: clients[threading.current_thread().name])

    def member(rank: int) -> None:
        name = threading.current_thread().name
        try:
            own = meeting.meet(args_of(), rank, 2)
            own.set(f"says {rank}", name)
            outcomes[name] = {own.get(f"says {other}").decode() for other in (0, 1)}
        except UserError as error:
            outcomes[name] = str(error)

    threads = []
    for rank, identity in starts:
        name = f"{rank} of {identity[1]}" + " again" * (f"{rank} of {identity[1]}" in identities)
        identities[name] = (same or identity[0], identity[1])
        clients[name] = dist.TCPStore("localhost", port, wait_for_workers=False)
        threads.append(threading.Thread(target=member, args=(rank,), name=name))
        threads[-1].start()
        time.sleep(0.3)
    for thread in threads:
        thread.join(20)
    del store
    return outcomes


def test_a_process_of_an_earlier_start_is_told_so(monkeypatch):
    old, new = ("torchrun", 1), ("torchrun", 2)
    outcomes = meet_in_threads(monkeypatch, [(1, old), (0, new), (1, new)])
    assert outcomes["1 of 1"] == "this process belongs to an earlier start of the run, and ends"
    assert outcomes["0 of 2"] == outcomes["1 of 2"] == {"0 of 2", "1 of 2"}


def test_one_that_comes_late_from_an_earlier_start_is_told_so_too(monkeypatch):
    old, new = ("torchrun", 1), ("torchrun", 2)
    outcomes = meet_in_threads(monkeypatch, [(0, new), (1, old), (1, new)])
    assert "an earlier start" in outcomes["1 of 1"]
    assert outcomes["0 of 2"] == outcomes["1 of 2"] == {"0 of 2", "1 of 2"}


def test_without_an_identity_of_its_own_a_start_is_told_by_its_call(monkeypatch):
    """Of the old start rank 1 has answered and gone, as in a restart of several torchruns."""
    outcomes = meet_in_threads(monkeypatch, [(0, ("any", 0)), (1, ("any", 0))], keep=True)
    assert len(outcomes) == 2
    again = meet_in_threads(monkeypatch, [(1, ("any", 0)), (0, ("any", 0))], keep=True)
    assert all(isinstance(outcome, set) for outcome in again.values()), again
    # Rank 0 comes first, and rank 1 is not taken for the one of before.
    again = meet_in_threads(monkeypatch, [(0, ("any", 0)), (1, ("any", 0))], keep=True)
    assert all(isinstance(outcome, set) for outcome in again.values()), again


def test_of_two_with_one_rank_the_second_is_told(monkeypatch):
    monkeypatch.setattr(meeting, "JOIN_TIMEOUT", timedelta(seconds=3))
    names = [(1, ("any", 0)), (1, ("any ", 0)), (0, ("any", 0))]
    outcomes = meet_in_threads(monkeypatch, names, same="any")
    assert sorted(map(str, outcomes.values()))[-1].startswith("{")
    assert meeting.LATE in outcomes.values()


def test_the_wait_names_who_is_missing(monkeypatch, capfd):
    monkeypatch.setattr(meeting, "PATIENCE", 0.5)
    monkeypatch.setattr(meeting, "JOIN_TIMEOUT", timedelta(seconds=1.8))
    outcomes = meet_in_threads(monkeypatch, [(0, ("any", 0))])
    lines = capfd.readouterr().err.splitlines()
    assert [line.rsplit(" ", 2)[0] for line in lines] == ["rank 1 of 2 has not come after"] * 3
    assert outcomes["0 of 0"].endswith("the processes cannot meet: rank 1 of 2 has not come")


def test_rank_zero_is_missed_too(monkeypatch, capfd):
    monkeypatch.setattr(meeting, "PATIENCE", 0.5)
    monkeypatch.setattr(meeting, "JOIN_TIMEOUT", timedelta(seconds=2))
    args = args_of("--dist_url", f"tcp://localhost:{free_port()}")
    with pytest.raises(UserError, match="the processes cannot meet"):
        meeting.meet(args, 1, 2)
    assert "rank 0 of 2 has not come after 1 s" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("tcp://node7:1234", ("node7", 1234)),
        ("tcp://[::1]:1234", ("::1", 1234)),
        ("tcp://node7", "it needs a port"),
        ("env://", "MASTER_PORT is ''"),
    ],
)
def test_where_to_meet(url, place, monkeypatch):
    found = []
    monkeypatch.setattr(dist, "TCPStore", lambda host, port, *_, **__: found.append((host, port)))
    monkeypatch.setenv("MASTER_ADDR", "node8")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    if isinstance(place, str):
        with pytest.raises(UserError, match=place):
            meeting.meet(args_of("--dist_url", url), 0, 2)
    else:
        meeting._store(args_of("--dist_url", url), 0, 2)
        assert found == [place]


def test_a_start_has_an_identity_of_its_own(monkeypatch):
    for name in ("GROUP_WORLD_SIZE", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert meeting.identity() == ("any", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    assert meeting.identity() == ("slurm-11", 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert meeting.identity() == ("slurm-11", 2)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    first = meeting.identity()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert meeting.identity() == (first[0], first[1] + 1)
    assert first[1] // 1000 == parents.start_time(os.getppid())


MPI_RUN = """
for rank in 0 1; do
  OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_LOCAL_RANK=$rank OMPI_COMM_WORLD_SIZE=2 \
    OMPI_COMM_WORLD_LOCAL_SIZE=2 "$@" &
done
wait
"""


@pytest.mark.faults
def test_mpirun_needs_no_flag(flags, tmp_path):
    command = [sys.executable, "main_pretrain.py", *flags, "--epochs", "1"]
    done = run("bash", "-c", MPI_RUN, "mpirun", *command)
    assert "batch: 32 images = 16 x 1 accumulated x 2 processes" in done.stdout, done.stderr
    assert len(losses_of(tmp_path / "out")) == 1


CHILD = """
import os, signal, sys, time
time.sleep({before})
sys.path.insert(0, {root!r})
from util.parents import end_with_launcher
print(os.getpid(), flush=True)
time.sleep({delay})
end_with_launcher()
print("waits", flush=True)
time.sleep(60)
"""


def start_child(tmp_path, before=0, delay=0, **env):
    """A launcher that starts a process, and that process's number, if it is known at once."""
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(root=str(ROOT), before=before, delay=delay))
    # The shell waits, as launchers do; its own name tells nothing.
    command = ["bash", "-c", f"{sys.executable} {script} & echo $!; wait"]
    clean = {k: v for k, v in os.environ.items() if k not in parents.LAUNCHERS}
    launcher = subprocess.Popen(command, env=clean | env, stdout=subprocess.PIPE, text=True)
    return launcher, int(launcher.stdout.readline())


def ends(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("when", ["after", "while it imports", "before"])
@pytest.mark.parametrize("name", ["TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"])
def test_a_process_ends_with_its_launcher(name, when, tmp_path):
    """Also one whose launcher has ended before it could ask to be told."""
    delays = {"after": {}, "while it imports": {"delay": 0.5}, "before": {"before": 0.5}}[when]
    launcher, child = start_child(tmp_path, **delays, **{name: "x"})
    if when != "before":
        launcher.stdout.readline()
    if when == "after":
        assert launcher.stdout.readline() == "waits\n"
    launcher.kill()
    if when == "before" and name == "SLURM_STEP_ID":  # any may have started it
        assert not ends(child, 1.5)
        os.kill(child, signal.SIGKILL)
    else:
        assert ends(child, 10)


def test_a_process_of_a_shell_outlives_it(tmp_path):
    """As one does that is started with `nohup ... &`, or by cron."""
    launcher, child = start_child(tmp_path)
    launcher.stdout.readline()
    assert launcher.stdout.readline() == "waits\n"
    launcher.kill()
    assert not ends(child, 1)
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("main", "ours"),
    [(ROOT / "main_pretrain.py", True), (ROOT / "util/embed.py", True), (None, False),
     (ROOT / ".venv/lib/python3.12/site-packages/pytest/__main__.py", False)],
)  # fmt: skip
def test_a_script_is_told_from_other_programs(main, ours, monkeypatch):
    """Its process ends by itself: pytest's, or a notebook's, would be gone in its midst."""
    assert not parents.is_script()
    monkeypatch.setattr(parents, "_outermost", lambda: str(main or "<stdin>"))
    assert parents.is_script() == ours


@pytest.mark.parametrize("way", [[], ["-m", "pdb", "-c", "continue"], ["-m", "cProfile"]])
def test_debuggers_run_a_script_within_their_own_process(way, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.append({str(ROOT)!r})\n"
                      "from util import parents; print('of', parents._outermost())")  # fmt: skip
    said = run(sys.executable, *way, script).stdout
    assert "of /" in said
    assert (f"of {script}\n" in said) == (not way), said


def test_torchruns_own_name_is_known():
    names = re.findall(r'_set_thread_name\("(.+?)"\)', inspect.getsource(torch.distributed.run))
    assert all(name.startswith(parents.TORCHRUNS) for name in names)


def test_start_times_tell_processes_apart():
    assert parents.start_time(os.getpid()) >= parents.start_time(os.getppid()) > 0
    assert parents.start_time(2**22 + 1) == 0
