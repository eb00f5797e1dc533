"""What a resume says: of a finished run, other flags, a damaged checkpoint; and second calls."""

import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from argparse import Namespace

import pytest
import torch
from conftest import TINY, VIT, assert_same_run, losses_of, run_main, state_of, the_error
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_linprobe
import main_pretrain
from util.errors import STOP_SIGNALS
from util.run import checkpoint
from util.run.lock import LOCK


@pytest.fixture(scope="module")
def first(photos, tmp_path_factory):
    """Flags without an output folder, and the folder of two epochs of them."""
    flags = ["--data_path", photos, *TINY]
    flags += ["--batch_size", 8, "--warmup_epochs", 0]
    folder = tmp_path_factory.mktemp("first")
    args = [*flags, "--epochs", 2, "--save_freq", 1, "--output_dir", folder]
    assert run_main(main_pretrain, *args) == 0
    return flags, folder


@pytest.fixture
def resumed(first, tmp_path, capsys):
    """Continues a copy of that run with more flags; returns its status, output and errors."""
    flags, folder = first
    out = shutil.copytree(folder, tmp_path / "out")

    def resume(*more):
        words = [*flags, "--epochs", 2, "--output_dir", out, "--resume", "auto", *more]
        status = run_main(main_pretrain, *words)
        said = capsys.readouterr()
        return status, said.out, said.err

    resume.out = out
    return resume


def changes(out: str) -> list[str]:
    return [line[9:] for line in out.splitlines() if " changed: " in line]


def test_a_finished_run_says_so(resumed):
    before = state_of(resumed.out)["model"]
    status, out, _ = resumed()
    assert status == 0
    assert "all 2 epochs are done; a larger --epochs trains longer" in out
    assert not changes(out)
    torch.testing.assert_close(state_of(resumed.out)["model"], before, rtol=0, atol=0)
    assert [line["epoch"] for line in losses_of(resumed.out)] == [0, 1]


def test_each_flag_that_differs_is_said_with_what_it_means(resumed, photos, tmp_path):
    data = shutil.copytree(photos, tmp_path / "data")
    more = ["--epochs", 3, "--blr", 2e-3, "--batch_size", 16, "--weight_decay", 0.1]
    status, out, err = resumed(*more, "--data_path", data, "--num_workers", 1)
    assert status == 0, err
    assert "all 2 epochs are done" not in out
    lr = "the learning rate follows the new schedule from here on"
    said = {line.split()[1]: line for line in changes(out)}
    assert said["--epochs"] == f"changed: --epochs was 2, is 3: {lr}"
    assert said["--blr"] == f"changed: --blr was 0.001, is 0.002: {lr}"
    images = "the epoch continues at the same image, in steps of the new size"
    assert said["--batch_size"] == f"changed: --batch_size was 8, is 16: {images}"
    assert said["--data_path"].startswith(f"changed: --data_path was {photos}, is {data}: ")
    assert said["--weight_decay"].endswith(", is 0.1: it holds from here on")
    assert "--num_workers" not in said  # changes nothing


def test_other_numbers_of_images_are_said(resumed, photos, tmp_path):
    """The folder that the run was given, with an image more."""
    link = tmp_path / "photos"
    link.symlink_to(photos)
    _, out, _ = resumed("--data_path", link, "--epochs", 3)
    assert not any(line.startswith("changed: train") for line in changes(out))
    shutil.copytree(photos, tmp_path / "more")
    image = next((tmp_path / "more/train").rglob("*.jpg"))
    shutil.copy(image, image.with_stem("another"))
    link.unlink()
    link.symlink_to(tmp_path / "more")
    _, out, _ = resumed("--data_path", link, "--epochs", 4)
    assert "changed: train had 48 images, has 49" in changes(out)  # of this epoch none is seen yet


def test_flags_that_no_run_makes_use_of_hinder_no_resume(resumed):
    strong = ["--epochs", 3, "--jitter_strength", 1]
    status, _, err = resumed(*strong)
    assert "--jitter_strength is 0.5 there, 1.0 here" in the_error(err)
    state = state_of(resumed.out)
    weak = state | {"args": state["args"] | {"augment": "weak"}}  # which has no colours
    checkpoint.save(weak, resumed.out / checkpoint.LAST)
    status, _, err = resumed(*strong, "--augment", "weak")
    assert status == 0, err


def test_another_augmentation_is_refused_and_said_where_it_is_meant(resumed):
    more = ["--epochs", 3, "--jitter_strength", 0.9]
    assert "--jitter_strength is 0.5 there, 0.9 here; give another" in the_error(resumed(*more)[2])
    status, out, err = resumed(*more, "--resume", resumed.out / "checkpoint-last.pth")
    assert status == 0, err
    assert "changed: --jitter_strength was 0.5, is 0.9: it holds from here on" in out


def points(folder) -> dict[str, list[int]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_loses_no_points_where_an_epoch_has_fewer_steps(resumed):
    """6 steps an epoch, then 3."""
    before = points(resumed.out)
    status, _, err = resumed("--epochs", 4, "--batch_size", 16)
    assert status == 0, err
    after = points(resumed.out)
    assert before["loss/loss"] == [6, 12]
    assert after["loss/loss"] == [6, 12, 15, 18]
    status, _, err = resumed("--epochs", 5, "--batch_size", 16)  # and from there on
    assert status == 0, err
    assert all(steps == [6, 12, 15, 18, 21] for steps in points(resumed.out).values())


def test_a_damaged_checkpoint_names_a_good_one(resumed):
    last = resumed.out / "checkpoint-last.pth"
    os.truncate(last, last.stat().st_size // 2)
    os.truncate(resumed.out / "checkpoint-1.pth", 1000)
    good = resumed.out / "checkpoint-0.pth"
    status, _, err = resumed()
    assert status == 1
    line = the_error(err)
    assert f"cannot read checkpoint {last}: it is cut short, or damaged" in line
    assert line.endswith(f"; {good} is good: --resume {good} continues from it")
    status, out, err = resumed("--resume", good)
    assert status == 0, err
    assert f"resumed {good}: epoch 1, step 0" in out
    os.truncate(last, 1000)
    os.truncate(good, 1000)
    os.truncate(resumed.out / "checkpoint-1.pth", 1000)
    assert "no numbered one is good either: --overwrite starts over" in the_error(resumed()[2])


def test_one_bit_is_noticed(resumed):
    last = resumed.out / "checkpoint-last.pth"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    status, _, err = resumed()
    assert status == 1
    assert "does not have its checksum" in the_error(err)


def test_names_of_ddp_s_are_taken_by_resuming_and_visualising_too(first, resumed, photos, forks):
    last = resumed.out / "checkpoint-last.pth"
    state = torch.load(last, weights_only=True)
    state["model"] = {f"module.{name}": value for name, value in state["model"].items()}
    torch.save(state, last)
    status, _, err = resumed("--epochs", 3)
    assert status == 0, err
    torch.save(state, last)
    words = ["--checkpoint", last, "--data_path", photos]
    status, _, err = forks.run("util.visualize", *words, cwd=resumed.out)
    assert status == 0, err


def test_main_can_be_called_again_in_the_same_process(first, photos, tmp_path, monkeypatch):
    """As in a notebook: three scripts, then the first one again, to the same bits."""
    flags, _ = first
    own = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    own.start()
    hooks = threading.excepthook, sys.unraisablehook
    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler()])
    loggers = logging.root.handlers[:]
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def call(script, *words) -> Namespace:
        args = script.get_args_parser().parse_args([str(word) for word in words])
        before = Namespace(**vars(args))
        script.main(args)
        assert args == before
        assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == handlers
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
        assert (threading.excepthook, sys.unraisablehook) == hooks
        assert logging.root.handlers == loggers
        assert own.is_alive()
        assert multiprocessing.active_children() == [own]
        assert not torch.distributed.is_initialized()
        assert not list(tmp_path.rglob(LOCK))

    short = [*flags, "--epochs", 1, "--num_workers", 1]
    call(main_pretrain, *short, "--output_dir", tmp_path / "one")
    vit = ["--data_path", photos, *VIT, "--batch_size", 16]
    vit += ["--epochs", 1, "--warmup_epochs", 0, "--output_dir", ""]
    vit += ["--finetune", tmp_path / "one/checkpoint-last.pth"]
    call(main_linprobe, *vit)
    call(main_finetune, *vit)
    call(main_pretrain, *short, "--output_dir", tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    with pytest.raises(Exception, match="holds a run"):
        call(main_pretrain, *short, "--output_dir", tmp_path / "two")
    call(main_pretrain, *short, "--output_dir", tmp_path / "two", "--overwrite")
    own.kill()
    assert_same_run(tmp_path / "one", tmp_path / "two")
