"""One writer per folder: the lock, and what it means where file systems have none."""

import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from conftest import VIT, run_main, state_of, the_error

import main_pretrain
from util.errors import UserError
from util.parents import start_time
from util.run import lock


@pytest.fixture(autouse=True)
def _free():
    yield
    lock.release_locks()


@pytest.fixture
def of_another(tmp_path):
    """Puts the lock of another process there, as one leaves that is killed, or cannot lock."""

    def put(**other) -> None:
        owner = {"host": socket.gethostname(), "pid": os.getppid(), "job": None}
        owner |= {"started": start_time(os.getppid()), "since": "2026-01-02 03:04:05"}
        (tmp_path / lock.LOCK).write_text(json.dumps(owner | other))

    return put


@pytest.fixture
def no_locks(monkeypatch):
    """A file system as NFS without its lock daemon."""

    def lockf(*_):
        raise OSError("No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)


def locked_elsewhere(folder) -> str:
    """What another process is told that tries to lock a folder; '' if it may."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        lock._held.clear()
        lock._beating = None
        try:
            lock.lock_folder(folder)
            words = ""
        except UserError as error:
            words = str(error)
        os.write(writer, words.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with open(reader) as file:
        return file.read()


def test_the_second_is_told_who_is_the_first(tmp_path):
    lock.lock_folder(tmp_path)
    lock.lock_folder(tmp_path / ".")  # log_dir, where it is output_dir
    words = locked_elsewhere(tmp_path)
    who = f"process {os.getpid()} on {socket.gethostname()}, since "
    assert words.startswith(f"{tmp_path} is in use by another run: {who}")
    lock.release_locks()
    assert not (tmp_path / lock.LOCK).exists()
    assert locked_elsewhere(tmp_path) == ""


def test_a_folder_that_is_removed_during_a_run_is_noticed(tmp_path, monkeypatch):
    """And the lock of another run that begins there is left alone."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    folder = tmp_path / "out"
    lock.lock_folder(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / lock.LOCK).write_text(json.dumps(lock._myself()))  # as another run's
    deadline = time.monotonic() + 10
    while not lock._taken and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(UserError, match="has been removed or replaced during the run"):
        lock.check_locks()
    lock.release_locks()
    assert (folder / lock.LOCK).exists()


def test_a_file_system_that_fails_for_a_moment_ends_no_run(tmp_path, monkeypatch):
    lock.lock_folder(tmp_path)
    path = tmp_path / lock.LOCK
    file, _ = lock._held[path]
    assert lock._is_there(path, file)

    def fails(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "stat", fails)
    with pytest.raises(OSError, match="Stale"):  # which `_beat` passes over
        lock._is_there(path, file)
    monkeypatch.undo()
    path.unlink()
    assert not lock._is_there(path, file)
    lock.release_locks()


def test_a_lock_that_was_left_behind_is_none(of_another, tmp_path):
    of_another()  # of a process that is alive, but does not hold it
    lock.lock_folder(tmp_path)
    assert json.loads((tmp_path / lock.LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_what_is_written_in_a_lock_may_be_cut_off(content, no_locks, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    (tmp_path / lock.LOCK).write_text(content)
    lock.lock_folder(tmp_path)


@pytest.mark.parametrize(
    ("other", "age", "alive"),
    [
        ({}, 0, True),
        ({}, 1e6, True),  # this machine knows its processes
        ({"started": 1}, 0, False),  # another process has got its number
        ({"pid": 2**22 + 1}, 0, False),
        ({"host": "node7"}, 0, True),
        ({"host": "node7"}, lock.SILENT + 1, False),
        ({"host": "node7", "job": "12"}, 0, True),
        ({"host": "node7", "job": "11", "restarts": 1}, 0, False),  # an earlier start of this job
        ({"host": "node7", "job": "11", "restarts": 2}, 0, True),  # another step of it
        ({"job": "11", "restarts": 2}, 0, True),
    ],
)
def test_without_locks_a_live_owner_is_told_from_a_dead_one(
    other, age, alive, of_another, no_locks, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    of_another(**other)
    then = time.time() - age
    os.utime(tmp_path / lock.LOCK, (then, then))
    if not alive:
        lock.lock_folder(tmp_path)
        return
    with pytest.raises(UserError, match=r"in use by another run: .*since 2026-01-02 03:04:05"):
        lock.lock_folder(tmp_path)


def test_locks_that_other_machines_may_not_see_do_not_decide_alone(
    of_another, tmp_path, monkeypatch
):
    of_another(host="node7")
    monkeypatch.setattr(lock, "_mount", lambda path: ("nfs", ["rw", "local_lock=all"]))
    with pytest.raises(UserError, match=r"process \d+ on node7, since"):
        lock.lock_folder(tmp_path)
    monkeypatch.setattr(lock, "_mount", lambda path: ("nfs4", ["rw", "local_lock=none"]))
    lock.lock_folder(tmp_path)  # the server knows better than the content


def test_a_requeued_job_does_not_wait_for_a_server_to_forget_its_dead_node(
    of_another, tmp_path, monkeypatch
):
    monkeypatch.setattr(lock, "_lock", lambda file: False)
    monkeypatch.setattr(lock, "_mount", lambda path: ("nfs", ["rw"]))
    of_another(host="node7", job="11", restarts=0)
    with pytest.raises(UserError, match=r"process \d+ on node7, job 11"):
        lock.lock_folder(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock.lock_folder(tmp_path)


def test_of_many_that_want_a_folder_without_locks_one_has_it(no_locks, tmp_path, monkeypatch):
    children = []
    for _ in range(8):
        if (child := os.fork()) == 0:
            try:
                lock.lock_folder(tmp_path)
                time.sleep(2)
                os._exit(0)
            except UserError as error:
                os._exit(1 if "in use by another run: process" in str(error) else 2)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(statuses) == [0] + 7 * [1]


def test_the_loser_of_a_race_is_told_who_has_won(tmp_path):
    """It may come between the winner's lock and what that writes."""
    lock.lock_folder(tmp_path)
    file, content = lock._held[(tmp_path / lock.LOCK).resolve()]
    file.truncate(0)
    threading.Timer(0.3, lambda: (file.write(content), file.flush())).start()
    assert f"process {os.getpid()} on" in locked_elsewhere(tmp_path)


def test_a_run_gives_signs_of_life_and_notices_who_has_not_seen_them(
    of_another, tmp_path, monkeypatch
):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    lock.lock_folder(tmp_path)
    os.utime(tmp_path / lock.LOCK, (0, 0))
    time.sleep(0.3)
    assert time.time() - (tmp_path / lock.LOCK).stat().st_mtime < 10
    lock.check_locks()
    if os.fork() == 0:  # closing the file here would give up the lock
        of_another(host="node7")
        os._exit(0)
    os.wait()
    time.sleep(0.3)
    with pytest.raises(UserError, match=r"has been taken by another run: process .* on node7"):
        lock.check_locks()
    lock.release_locks()
    assert (tmp_path / lock.LOCK).exists()  # another's by now


def test_file_systems_are_known_by_where_they_are(tmp_path, monkeypatch):
    assert lock._mount(tmp_path)[0] not in ("", "proc")
    assert lock._mount(tmp_path.__class__("/proc/self"))[0] == "proc"
    table = "a / ext4 rw 0 0\nb /a\\040b autofs rw 0 0\nc /a\\040b nfs4 rw,nolock 0 0\n"
    monkeypatch.setattr(tmp_path.__class__, "read_text", lambda path: table)
    assert lock._mount(tmp_path.__class__("/a b/c")) == ("nfs4", ["rw", "nolock"])


def test_readers_are_not_locked_out(flags, photos, tmp_path, forks):
    out = tmp_path / "out"
    assert run_main(main_pretrain, *flags, "--epochs", 1) == 0
    weights = out / "checkpoint-last.pth"
    lock.lock_folder(out)
    assert locked_elsewhere(out)
    probe = ["--data_path", photos, *VIT, "--finetune", weights]
    for module, *words in (
        ("main_linprobe", *probe, "--epochs", 1, "--batch_size", 16, "--output_dir", ""),
        ("main_linprobe", *probe, "--knn", "--output_dir", out),
        ("util.export", "--checkpoint", weights),
        ("util.visualize", "--checkpoint", weights, "--data_path", photos),
    ):
        status, _, err = forks.run(module, *words, cwd=tmp_path)
        assert status == 0, err


def test_a_run_into_a_folder_in_use_is_refused_and_leaves_no_trace(flags, tmp_path, forks):
    lock.lock_folder(tmp_path / "out")
    new = tmp_path / "a/b/new"
    for extra in ([], ["--resume", "auto"], ["--overwrite"], ["--output_dir", new]):
        words = [*flags, "--log_dir", tmp_path / "out", *extra]  # the one or the other
        status, _, err = forks.run("main_pretrain", *words, cwd=tmp_path)
        assert status == 1
        assert f"{tmp_path / 'out'} is in use by another run: process {os.getpid()} on" in err
        assert "give another folder, or end that run" in the_error(err)
    assert locked_elsewhere(tmp_path / "out")
    assert not (tmp_path / "a").exists()


def test_a_run_holds_its_folders_for_its_life(flags, tmp_path, monkeypatch):
    said = []

    def ask_after_saving(self, epoch, save=main_pretrain.Run.save):
        save(self, epoch)
        said.extend(locked_elsewhere(tmp_path / name) for name in ("out", "tb"))

    monkeypatch.setattr(main_pretrain.Run, "save", ask_after_saving)
    assert run_main(main_pretrain, *flags, "--epochs", 1, "--log_dir", tmp_path / "tb") == 0
    assert len(said) == 2
    assert all("in use by another run" in words for words in said)
    assert locked_elsewhere(tmp_path / "out") == locked_elsewhere(tmp_path / "tb") == ""
    assert state_of(tmp_path / "out")["epoch"] == 0
