"""Runs of two processes that are killed, stopped or spoilt: they lose nothing, and never hang."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, assert_same_state, free_port, losses_of
from fleet import (
    GONE,
    Fault,
    Fleet,
    at,
    break_down,
    die,
    empty_disk,
    enlarge_tmpfs,
    environment_of,
    fill_disk,
    hang,
    hang_in_evaluation,
    impatient,
    no_more_saving,
    note_images,
    save_forever,
    saving_in_evaluation,
    server,
    spoil,
    spoil_once,
    start_each,
    stop,
    wait_for_ever,
    wait_until_gone,
)
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.run import checkpoint

pytestmark = pytest.mark.faults

ENDS = {
    signal.SIGKILL: 30,
    signal.SIGTERM: 10,
    signal.SIGHUP: 3,
}  # of runs, at random moments (seeded)
SAVE_KILLS = 50  # in the writing of a file, of a process that does nothing but save

counts = Counter()


@pytest.fixture(scope="module", autouse=True)
def _show_counts():
    yield
    print("\n" + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))


@pytest.fixture(scope="module")
def flags(photos):
    """48 images in 6 steps an epoch on two ranks, three epochs; saves every 180 ms."""
    flags = ["--data_path", photos, *TINY, "--batch_size", 4]
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


def assert_same_files(folder: Path, other: Path) -> None:
    """Two folders hold the same checkpoints, and logs of the same losses."""
    names = sorted(path.name for path in folder.glob("*.pth"))
    assert names == sorted(path.name for path in other.glob("*.pth"))
    for name in names:
        assert_same_state(folder / name, other / name)
    assert losses_of(folder) == losses_of(other)


@pytest.mark.parametrize("number", ENDS, ids=["KILL", "TERM", "HUP"])
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
            if number != signal.SIGKILL and not finished:
                # before Python runs, a signal's own action; where one stops first, the other sees
                assert set(statuses) <= {-number, 128 + number, 1}, fleet.errors()
                counts[f"{number.name} exits {statuses}"] += 1
        assert_same_files(reference, out)
    counts[f"{number.name}s at random moments"] += landed
    counts[f"runs ended by {number.name}s and resumed to the same bits"] += runs


def test_a_kill_during_saving_leaves_a_whole_file(tmp_path):
    path = tmp_path / checkpoint.LAST
    moments = random.Random(0)
    landed = 0
    while landed < SAVE_KILLS:
        saver = server.Process(target=save_forever, args=(str(path),))
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
    lines = losses_of(whole[0])
    assert losses_of(tmp_path) == [lines[0], lines[2]]
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
    assert [line for line in losses_of(small_disk) if line not in losses_of(whole[0])] == []
    if space_returns:
        assert statuses == [0, 0], fleet.errors()
        assert (small_disk / checkpoint.LAST).exists()
    else:
        assert statuses == [1, 1]
        assert "No space left on device" in fleet.error()


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
    flags = ["--data_path", tmp_path, *TINY, "--batch_size"]
    flags += [4, "--num_workers", 1, "--epochs", 1, "--output_dir", tmp_path / "out"]
    fleet = Fleet(flags, tmp_path / "run", 1, [(wait_for_ever, str(tmp_path / "waiting"))])
    end = time.monotonic() + GONE
    while not (tmp_path / "waiting").exists() and time.monotonic() < end:
        time.sleep(0.05)
    fleet.send(signal.SIGTERM)
    assert fleet.wait(10) == [128 + signal.SIGTERM]


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
@pytest.mark.parametrize("data", ["photos", "shards", "table"])
def test_another_number_of_processes_sees_every_image(
    before, after, data, flags, tmp_path, request
):
    flags = [*flags, "--data_path", request.getfixturevalue(data), "--shuffle_window", 20]
    flags += ["--output_dir", tmp_path, "--accum_iter", 2 // before]
    note = (note_images, str(tmp_path))
    fleet = Fleet(flags, tmp_path, before, [(at, Fault(stop, 1, 2 * 2 // before)), note])
    assert set(fleet.wait()) == {128 + signal.SIGTERM}
    flags += ["--resume", "auto", "--accum_iter", 1]  # which the checkpoint knows better
    fleet = Fleet(flags, tmp_path, after, [note])
    assert fleet.wait() == [0] * after, fleet.errors()
    out = (tmp_path / "rank0.1").read_text()
    assert f"not bit-exact from here: {before} processes before, {after} now" in out
    assert f"with --accum_iter {2 // after} the global batch stays 8" in out
    assert ("changed: " in out) == (before == 1)  # the flag was, or none
    assert "6 steps per epoch" in out.split("not bit-exact")[1]
    lines = [line for p in tmp_path.glob("images-*") for line in p.read_text().splitlines()]
    seen = Counter(line for line in lines if line.startswith("1 "))
    assert sorted(seen) == sorted(f"1 {index}" for index in range(48))
    assert set(seen.values()) == {1}
    assert [line["epoch"] for line in losses_of(tmp_path)] == [0, 1, 2]


WRAPPER = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import main_pretrain
from fleet import Fault, at, die
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
    wait_until_gone(lambda pid: mark in environment_of(pid))
    assert result.returncode == 0, result.stderr
    assert_same_files(whole[0], out)
    counts["restarts by torchrun to the same bits"] += 1
