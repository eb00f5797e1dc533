"""Starts that go wrong: two into one folder, launchers that are killed, members of other starts."""

import os
import random
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from conftest import ROOT, TINY, free_port, losses_of
from fleet import Fault, Fleet, at, environment_of, fill_shm, small_shm, wait_until_gone
from test_faults_run import assert_same_files

from util.run.lock import LOCK

pytestmark = pytest.mark.faults

RACES = 20
LAUNCHER_KILLS = 5  # of each launcher, at random moments (seeded)
LAUNCHERS = ("run", "launch")  # in torch.distributed


@pytest.fixture(scope="module")
def flags(photos):
    """48 images in 6 steps an epoch on two ranks, five epochs; saves every 180 ms."""
    flags = ["--data_path", photos, *TINY, "--batch_size", 4]
    return [*flags, "--epochs", 5, "--save_interval", 3e-3, "--save_freq", 4, "--eval_freq", 4]


def test_of_two_runs_at_once_into_one_folder_one_trains(flags, tmp_path):
    flags = [*flags, "--epochs", 2, "--warmup_epochs", 0]
    for race in range(RACES):
        words = [*flags, "--output_dir", tmp_path / f"out{race}", "--resume", "auto"]
        fleets = [Fleet(words, tmp_path / f"{race}-{name}", 1) for name in "ab"]
        statuses = [fleet.wait()[0] for fleet in fleets]
        assert sorted(statuses) == [0, 1]
        winner, loser = sorted(fleets, key=lambda fleet: statuses[fleets.index(fleet)])
        who = f"is in use by another run: process {winner.members[0].pid} on "
        assert who in loser.error()
        assert [line["epoch"] for line in losses_of(tmp_path / f"out{race}")] == [0, 1]
        assert not (tmp_path / f"out{race}" / LOCK).exists()


def start(launcher: str, flags: list, out, mark: str) -> subprocess.Popen:
    """A launcher of two processes, whose processes know each other by `mark` in the environment."""
    words = ["-m", f"torch.distributed.{launcher}", "--nproc_per_node=2"]
    words += [f"--master_port={free_port()}", "main_pretrain.py", *flags, "--output_dir", out]
    return subprocess.Popen(
        [sys.executable, *map(str, words), "--resume", "auto"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "FAULTS_RUN": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def launched(flags, tmp_path_factory):
    """The folder of a run that nothing happened to, and its length in seconds."""
    folder = tmp_path_factory.mktemp("launched")
    begin = time.monotonic()
    launcher = start("run", flags, folder, "launched")
    assert launcher.wait() == 0, launcher.stderr.read()
    return folder, time.monotonic() - begin


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_that_is_killed_leaves_no_process_and_loses_nothing(
    name, flags, launched, tmp_path
):
    reference, length = launched
    moments = random.Random(name)
    landed, finished = 0, False
    out, mark = tmp_path / "out", f"FAULTS_RUN={tmp_path}"
    while not finished:
        workers = ["--num_workers", int(name == "launch")]  # these are to end, too
        launcher = start(name, [*flags, *workers], out, str(tmp_path))
        if landed < LAUNCHER_KILLS:
            time.sleep(moments.uniform(0, length))
            launcher.kill()
        finished = launcher.wait() == 0
        landed += launcher.returncode < 0
        wait_until_gone(lambda pid: mark in environment_of(pid), 10)
        if finished and landed < LAUNCHER_KILLS:
            assert_same_files(reference, out)
            out, finished = tmp_path / f"out{landed}", False
    assert_same_files(reference, out)


def test_a_member_of_a_dead_start_does_not_join_the_next(flags, tmp_path):
    """Of the first start only rank 0 lives, and waits, at a launcher's store that has lived on."""
    port = free_port()
    store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    env = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    env |= {"GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}
    words = [*flags, "--epochs", 2, "--warmup_epochs", 0, "--output_dir", tmp_path / "out"]
    old = Fleet(words, tmp_path / "0", 2, missing=1, **env, TORCHELASTIC_RESTART_COUNT="0")
    end = time.monotonic() + 60
    while store.num_keys() < 2:  # rank 0's call
        assert time.monotonic() < end, old.errors()
        time.sleep(0.05)
    new = Fleet(words, tmp_path / "1", 2, **env, TORCHELASTIC_RESTART_COUNT="1")
    assert new.wait() == [0, 0], new.errors()
    assert old.wait() == [1]
    assert "this process belongs to an earlier start of the run, and ends" in old.error()
    late = Fleet(words, tmp_path / "2", 2, missing=1, **env, TORCHELASTIC_RESTART_COUNT="0")
    assert late.wait() == [1]
    assert "an earlier start" in late.error()
    assert [line["epoch"] for line in losses_of(tmp_path / "out")] == [0, 1]


@pytest.mark.parametrize("when", ["start", "later"])
def test_a_small_dev_shm_of_one_rank_ends_both(when, flags, tmp_path):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no permission for a namespace of mounts")
    flags = [*flags, "--num_workers", 1, "--input_size", 64, "--output_dir", tmp_path / "out"]
    patches = [(small_shm, 1, "256k" if when == "start" else "64m")]
    if when == "later":  # batches under way give their space back to later ones
        patches.append((at, *(Fault(fill_shm, 1, step, rank=1) for step in range(6))))
    fleet = Fleet(flags, tmp_path, 2, patches)
    assert fleet.wait() == [1, 1]
    lines = "\n".join(fleet.errors())
    assert lines.count("--ipc=host") == 1, lines
    assert "/dev/shm has" in lines
    assert "--num_workers" in lines


TWO_MACHINES = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import main_pretrain
from fleet import Fault, at, die
from util.run.launch import launch

mark = {mark!r}
if os.environ["RANK"] == "1" and not os.path.exists(mark):
    open(mark, "w").close()
    at(Fault(die, 1, 3, rank=1))
sys.argv[0] = "main_pretrain.py"
launch(main_pretrain.main, main_pretrain.get_args_parser().parse_args())
"""


def test_two_torchruns_restart_the_run_by_themselves(flags, launched, tmp_path):
    """Each counts restarts for itself, and what the first start left is in the store they share."""
    script = tmp_path / "wrapper.py"
    text = {"root": str(ROOT), "tests": str(ROOT / "tests"), "mark": str(tmp_path / "mark")}
    script.write_text(TWO_MACHINES.format(**text))
    place = ["--nnodes=2", "--nproc_per_node=1", "--max_restarts=2", "--rdzv_backend=c10d"]
    place += [f"--rdzv_endpoint=localhost:{free_port()}", "--rdzv_id=x", "--local-addr=localhost"]
    out = tmp_path / "out"
    words = [sys.executable, "-m", "torch.distributed.run", *place, script, *flags]
    words += ["--output_dir", out, "--resume", "auto"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "FAULTS_RUN": str(tmp_path)}
    with open(tmp_path / "said", "w") as said:
        agents = [
            subprocess.Popen([str(word) for word in words], env=env, stdout=said, stderr=said)
            for _ in range(2)
        ]
        try:
            statuses = [agent.wait(150) for agent in agents]
        finally:
            wait_until_gone(lambda pid: f"FAULTS_RUN={tmp_path}" in environment_of(pid), 20)
    assert statuses == [0, 0], (tmp_path / "said").read_text()[-3000:]
    assert (tmp_path / "mark").exists()
    assert_same_files(launched[0], out)
