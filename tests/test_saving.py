"""Checkpoints are written while training goes on, from a copy, no more often than asked for."""

import os
import shutil
import signal
import threading
import time

import pytest
import torch
from conftest import at_step, in_processes, run_main, state_of, the_error
from fake_cuda import fake_cuda

import main_finetune
import main_pretrain
from util.args import finetune_parser
from util.errors import UserError
from util.run import checkpoint
from util.run import run as util_run
from util.run.background import Background, HostCopy, finish_background
from util.run.checkpoint import BEST, LAST
from util.run.run import Run


def test_a_copy_is_taken_once_and_reused():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"args": {"betas": (0.9, 0.95)}, "epoch": 3, "metrics": [{"sum": torch.ones(2)}]}
    holder = HostCopy()
    first = holder.take(state)
    before = first["model"]["weight"].data_ptr()
    torch.testing.assert_close(first, state, rtol=0, atol=0)
    with torch.no_grad():
        model.weight.zero_()
    assert first["model"]["weight"].abs().sum() > 0
    second = holder.take(state)
    assert second["model"]["weight"].data_ptr() == before
    torch.testing.assert_close(second, state, rtol=0, atol=0)
    assert second["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert (second["args"], second["epoch"]) == ({"betas": (0.9, 0.95)}, 3)


def test_a_copy_is_taken_where_no_memory_can_be_pinned(monkeypatch):
    """Whose pinning the driver refuses."""
    asked = []

    def empty_like(value, original=torch.empty_like, pin_memory=False, **options):
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return original(value, **options)

    with fake_cuda():
        monkeypatch.setattr(torch, "empty_like", empty_like)
        copied = HostCopy().take({"weight": torch.ones(3, device="cuda")})
    assert copied["weight"].device.type == "cpu"
    assert asked == [True, False]


def test_training_goes_on_while_a_file_is_written(flags, tmp_path, monkeypatch):
    """The first file of epoch 0 is held back until a step of epoch 1 has been made."""
    stepped, states = threading.Event(), []

    def save(state, path, original=util_run.save):
        if not states:
            states.append({name: t.clone() for name, t in state["model"].items()})
            assert stepped.wait(60)
            time.sleep(1)  # while the next state is ready to be copied
        original(state, path)

    monkeypatch.setattr(util_run, "save", save)
    at_step(monkeypatch, 1, 1, stepped.set)
    flags += ["--epochs", 2, "--save_freq", 1]
    assert run_main(main_pretrain, *flags) == 0
    written = state_of(tmp_path / "out", "0")["model"]
    torch.testing.assert_close(written, states[0], rtol=0, atol=0)


def fill_disk(monkeypatch) -> None:
    """For the files of the first epoch."""

    def save(state, path, original=util_run.save):
        if state["epoch"] == 0:
            raise UserError(f"cannot write {path}: No space left on device")
        original(state, path)

    monkeypatch.setattr(util_run, "save", save)


def test_what_cannot_be_written_is_told_at_the_next_step(flags, tmp_path, monkeypatch, capsys):
    fill_disk(monkeypatch)
    at_step(monkeypatch, 1, 0, lambda: time.sleep(0.5))
    assert run_main(main_pretrain, *flags, "--epochs", 2, "--save_freq", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    (told,) = (i for i, line in enumerate(lines) if "checkpoint-0.pth: No space left" in line)
    assert any("epoch 1 [" in line for line in lines[told:])
    assert sorted(p.name for p in (tmp_path / "out").glob("*.pth")) == [
        "checkpoint-1.pth",
        "checkpoint-last.pth",
    ]


def test_a_failure_before_the_last_save_does_not_end_the_run(flags, tmp_path, monkeypatch, capsys):
    """Which is told even where no step follows it."""
    fill_disk(monkeypatch)
    monkeypatch.setattr(util_run.Run, "poll", lambda *_: None)
    assert run_main(main_pretrain, *flags, "--epochs", 2, "--save_freq", 1) == 0
    assert "checkpoint-0.pth: No space left on device; training" in capsys.readouterr().out


def test_the_last_file_is_waited_for(flags, tmp_path, monkeypatch, capsys):
    def save(state, path):
        time.sleep(0.5)
        raise UserError(f"cannot write {path}: Disk quota exceeded")

    monkeypatch.setattr(util_run, "save", save)
    assert run_main(main_pretrain, *flags, "--epochs", 1) == 1
    assert "Disk quota exceeded" in the_error(capsys.readouterr().err)


@pytest.mark.parametrize(("interval", "epochs"), [(60, [1, 1, 3, 3]), (1e-9, [0, 1, 1, 2, 3, 3])])
def test_epochs_shorter_than_the_interval_are_not_all_saved(interval, epochs, flags, monkeypatch):
    """Every second is numbered; the last of several files is copied from the first."""
    seen = []
    monkeypatch.setattr(util_run.Run, "poll", lambda *_: None)
    monkeypatch.setattr(util_run, "save", lambda state, path: seen.append(state["epoch"]))
    monkeypatch.setattr(util_run, "copy_file", lambda *_: seen.append(seen[-1]) or True)
    flags += ["--epochs", 4, "--save_freq", 2, "--save_interval", interval]
    assert run_main(main_pretrain, *flags) == 0
    assert seen == epochs


def test_what_cannot_be_copied_is_saved(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(util_run, "copy_file", lambda source, path: False)
    assert run_main(main_pretrain, *flags, "--epochs", 1) == 0
    assert state_of(tmp_path / "out", "0")["epoch"] == state_of(tmp_path / "out")["epoch"] == 0


def test_copies_share_nothing(tmp_path):
    checkpoint.save({"model": {"a": torch.ones(3)}}, tmp_path / "a.pth")
    checkpoint.copy_file(tmp_path / "a.pth", tmp_path / "b.pth")
    with open(tmp_path / "a.pth", "r+b") as file:
        file.write(b"damage")
    assert checkpoint.load(tmp_path / "b.pth")["model"]["a"].tolist() == [1, 1, 1]
    assert not checkpoint.copy_file(tmp_path / "a.pth", tmp_path / "no/b.pth")
    assert not checkpoint.copy_file(tmp_path / "none.pth", tmp_path / "b.pth")
    assert checkpoint.load(tmp_path / "b.pth")["model"]["a"].tolist() == [1, 1, 1]


def test_errors_of_the_program_are_not_lost():
    background = Background()
    background.start(lambda: 1 / 0)
    background.wait()
    with pytest.raises(ZeroDivisionError):
        background.failures()


def test_a_wait_that_ctrl_c_ends_leaves_the_work_to_be_waited_for():
    """Until Python 3.12 a thread counts as ended after that."""
    background, held, done = Background(), threading.Event(), []

    def work():
        held.wait(60)
        time.sleep(0.3)
        done.append(True)
        return []

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        background.start(work)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            background.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        held.set()
    background.wait()
    assert done


def test_without_more_threads_the_work_is_done_at_once(monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    background, error = Background(), UserError("cannot write")
    background.start(lambda: [error])
    assert background.failures() == [error]


def test_what_nobody_asked_for_is_told_at_the_end(caplog):
    background = Background()
    background.start(lambda: [UserError("cannot write it")])
    finish_background()
    assert caplog.messages == ["warning: cannot write it"]


def _scores_of_a_rank(rank: int, folder: str) -> None:
    flags = ["--data_path", "digits", "--epochs", "9", "--output_dir", folder]
    run, saved = Run(finetune_parser().parse_args(flags)), []
    assert run.last_saved() == "this run has saved nothing yet"
    run._save = lambda names, *_: saved.append(names)
    for epoch, scores in enumerate([(1, 1), (2, 1), (2, 3), (3, 3)]):
        run.save(epoch, float(scores[rank]))
    assert saved == 3 * [[BEST, LAST]]
    run._saved = "" if rank else "epoch 3, step 0"  # only rank 0 writes
    assert run.last_saved() == f"{LAST} is of epoch 3, step 0"


def test_ranks_of_unlike_scores_save_alike(tmp_path):
    in_processes(_scores_of_a_rank, 2, str(tmp_path))


def _resume_a_folder_of_its_own(rank: int, folder: str) -> None:
    flags = ["--data_path", "digits", "--output_dir", f"{folder}/{rank}", "--resume", "auto"]
    flags += ["--model", "vit_nano_patch4", "--input_size", "8"]
    run = Run(finetune_parser().parse_args(flags))
    with pytest.raises(UserError, match="is not the same on all machines"):
        run.resume(torch.nn.Linear(1, 1))


def test_ranks_that_see_other_checkpoints_do_not_train(tmp_path):
    """As on nodes whose disks are their own."""
    flags = ["--data_path", "digits", "--output_dir", tmp_path / "0", "--epochs", 1]
    flags += ["--model", "vit_nano_patch4", "--input_size", 8, "--num_workers", 0]
    flags += ["--batch_size", 256, "--warmup_epochs", 0, "--device", "cpu"]
    assert run_main(main_finetune, *flags) == 0
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    state = state_of(tmp_path / "1")
    checkpoint.save(state | {"epoch": state["epoch"] + 1}, tmp_path / "1" / LAST)
    in_processes(_resume_a_folder_of_its_own, 2, str(tmp_path))


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    """Else a power cut may leave neither."""
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=original: done.append(n) or f(*a))
    checkpoint.save({"epoch": 0}, tmp_path / "x.pth")
    assert done == ["fsync", "replace", "fsync"]  # the last is the folder's


def test_the_save_interval_is_in_minutes(flags, monkeypatch):
    seconds = []

    class Spy(util_run.Interrupts):
        def __init__(self, save_interval):
            seconds.append(save_interval)
            super().__init__(save_interval)

    monkeypatch.setattr(util_run, "Interrupts", Spy)
    assert run_main(main_pretrain, *flags, "--epochs", 1, "--save_interval", 7) == 0
    assert seconds == [420]
