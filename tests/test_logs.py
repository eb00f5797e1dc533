"""What a run writes: log.txt, TensorBoard, and checkpoints on disks that are full or read-only."""

import errno
import os
import resource
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import assert_same_state, at_step, log_of, losses_of, run_main, state_of, the_error
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import main_pretrain
from util.run import checkpoint, logs
from util.run.background import finish_background


def test_a_log_cut_off_by_a_crash_is_mended(photos_run, tmp_path):
    assert run_main(main_pretrain, *photos_run, "--epochs", 1) == 0
    with open(tmp_path / "out" / "log.txt", "a") as file:
        file.write('{"epoch": 1, "train_lo')
    assert run_main(main_pretrain, *photos_run, "--epochs", 2, "--resume", "auto") == 0
    assert [line["epoch"] for line in log_of(tmp_path / "out")] == [0, 1]


def test_tensorboard_shows_every_term_and_a_picture(photos_run, tmp_path):
    assert run_main(main_pretrain, *photos_run, "--epochs", 2, "--log_dir", tmp_path / "tb") == 0
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {
        "loss/loss", "loss/reconstruction", "loss/contrastive", "loss/noise", "loss/noise_zero",
        "train/contrastive_top1", "train/grad_norm", "train/lr", "train/images_per_second",
        "train/data_wait",
    }  # fmt: skip
    assert tags["images"] == ["reconstruction"]
    assert [event.step for event in events.Images("reconstruction")] == [3, 6]
    assert [event.step for event in events.Scalars("loss/loss")] == [3, 6]
    zero = events.Scalars("loss/noise_zero")[0].value
    assert zero == pytest.approx(0.05**2 / 3, rel=0.25)  # E sigma^2, from 96 noise levels


def test_a_run_continued_within_the_same_second_drops_the_points_it_writes_anew(
    tmp_path, monkeypatch
):
    counter = event_file_writer.AtomicCounter(9)  # names of files end in it: .10 is before .9
    monkeypatch.setattr(event_file_writer, "_global_uid", counter)
    for loss in 1.0, 2.0:
        run = Namespace(data=None, offset=0, epoch=0, step=0)
        log = logs.RunLog(Namespace(output_dir="", log_dir=str(tmp_path)), run, steps=5)
        log.add_window({"loss": loss}, 3)
        log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("loss/loss")] == [2.0]


@contextmanager
def small_disk() -> Iterator[Callable[[int], None]]:
    """A function that limits the size of files, in bytes; writing beyond is an error as on a full
    disk. No fixture: pytest reports on a test before it takes fixtures down, perhaps to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_for_an_epoch_changes_nothing(flags, tmp_path, monkeypatch, capsys):
    assert run_main(main_pretrain, *flags, "--epochs", 3) == 0
    again = [*flags, "--epochs", 3, "--save_freq", 1, "--output_dir", tmp_path / "again"]

    def epoch(self, number, *args, original=logs.RunLog.add_epoch):
        finish_background()  # what is being written
        limit(500 if number == 1 else 2**30)  # some of the second line fits
        original(self, number, *args)

    monkeypatch.setattr(logs.RunLog, "add_epoch", epoch)
    capsys.readouterr()
    with small_disk() as limit:
        assert run_main(main_pretrain, *again) == 0
    out, err = capsys.readouterr()
    assert "log.txt: File too large; the line of epoch 1 is lost" in out
    assert "checkpoint-last.pth: File too large; training continues" in out
    assert "Traceback" not in err
    assert_same_state(tmp_path / "out" / checkpoint.LAST, tmp_path / "again" / checkpoint.LAST)
    assert losses_of(tmp_path / "again") == [losses_of(tmp_path / "out")[epoch] for epoch in (0, 2)]
    assert not list((tmp_path / "again").glob("*.tmp"))


def test_a_disk_that_turns_read_only_does_not_end_a_run(flags, tmp_path, monkeypatch, capsys):
    replace, unlink = os.replace, Path.unlink

    def refuse(path, original):
        def function(name, *args, **kwargs):
            if state["read-only"] and Path(name).name.startswith("checkpoint-"):
                raise OSError(errno.EROFS, "Read-only file system")
            return original(name, *args, **kwargs)

        monkeypatch.setattr(*path, function)

    state = {"read-only": False}
    refuse((os, "replace"), replace)
    refuse((Path, "unlink"), unlink)
    at_step(monkeypatch, 0, 1, lambda: state.update({"read-only": True}))
    at_step(monkeypatch, 1, 0, lambda: finish_background() or state.update({"read-only": False}))
    assert run_main(main_pretrain, *flags, "--epochs", 2, "--save_freq", 1) == 0
    assert (
        "checkpoint-last.pth: Read-only file system; training continues" in capsys.readouterr().out
    )
    assert state_of(tmp_path / "out")["epoch"] == 1


@pytest.mark.parametrize("stop", [False, True], ids=["last epoch", "stop request"])
def test_a_disk_that_stays_full_fails_the_last_save(stop, flags, tmp_path, monkeypatch, capsys):
    assert run_main(main_pretrain, *flags, "--epochs", 1) == 0
    good = (tmp_path / "out" / checkpoint.LAST).read_bytes()
    at_step(monkeypatch, 1, 0, lambda: limit(1000))
    if stop:
        at_step(monkeypatch, 1, 1, lambda: signal.raise_signal(signal.SIGTERM))
    capsys.readouterr()
    with small_disk() as limit:
        assert run_main(main_pretrain, *flags, "--epochs", 2, "--resume", "auto") == 1
    line = the_error(capsys.readouterr().err)
    assert "cannot write" in line
    assert "File too large" in line
    assert (tmp_path / "out" / checkpoint.LAST).read_bytes() == good
    assert not list((tmp_path / "out").glob("*.tmp"))
