"""Runs that are stopped and resumed: by signals, by the clock, with other numbers of processes."""

import itertools
import math
import os
import signal
import time

import pytest
import torch
from conftest import assert_same_run, at_step, in_processes, run_main, state_of, the_error
from PIL import Image
from PIL.ImageFile import ImageFile
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import engine_finetune
import main_finetune
import main_pretrain
import util.features
from util import distributed
from util.args import pretrain_parser
from util.data.order import EpochSampler
from util.errors import UserError
from util.misc import MetricLogger
from util.run import checkpoint, interrupt, training
from util.run import run as util_run
from util.run.interrupt import Interrupts


def test_resuming_after_an_epoch_equals_never_having_stopped(
    photos_run, tmp_path, monkeypatch, capsys
):
    flags = [*photos_run, "--epochs", 3, "--warmup_epochs", 1, "--save_freq", 1]
    assert run_main(main_pretrain, *flags) == 0

    def stop_after_the_second(self, epoch, save=util_run.Run.save):
        save(self, epoch)
        if epoch == 1:
            raise KeyboardInterrupt

    again = [*flags, "--output_dir", tmp_path / "again", "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(util_run.Run, "save", stop_after_the_second)
        assert run_main(main_pretrain, *again) == 130
    assert run_main(main_pretrain, *again) == 0
    assert "checkpoint-last.pth: epoch 2, step 0" in capsys.readouterr().out
    assert_same_run(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize(
    ("number", "precision"),
    [
        (signal.SIGTERM, "bf16"),
        (signal.SIGUSR1, "fp16"),  # whose loss scale is part of the state
        (signal.SIGUSR2, "fp32"),
        (signal.SIGINT, "auto"),
    ],
)
def test_a_signal_within_an_epoch_loses_nothing(
    number, precision, photos_run, tmp_path, monkeypatch
):
    """Steps of 4 images, 12 an epoch; the signal comes in the second epoch's fifth step."""
    monkeypatch.setattr(training, "PRINT_FREQ", 3)
    flags = [*photos_run, "--epochs", 2, "--warmup_epochs", 1, "--batch_size", 2, "--accum_iter", 2]
    flags += ["--precision", precision]
    assert run_main(main_pretrain, *flags) == 0

    again = [*flags, "--output_dir", tmp_path / "again", "--resume", "auto"]
    with monkeypatch.context() as patch:
        at_step(patch, 1, 9, lambda: os.kill(os.getpid(), number))
        assert run_main(main_pretrain, *again) == 128 + number
    state = state_of(tmp_path / "again")
    assert (state["epoch"], state["images"]) == (0, 5 * 4)
    assert run_main(main_pretrain, *again) == 0
    assert_same_run(tmp_path / "out", tmp_path / "again")

    curves = []
    for name in ("out", "again"):
        events = EventAccumulator(str(tmp_path / name))
        events.Reload()
        curves.append([(e.step, e.value) for e in events.Scalars("loss/loss")])
    assert curves[0] == curves[1]


def test_saves_within_an_epoch_by_the_clock(photos_run, tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(util_run, "save", lambda state, path: saves.append(state.get("images")))
    monkeypatch.setattr(util_run, "copy_file", lambda source, path: True)
    assert run_main(main_pretrain, *photos_run, "--epochs", 1, "--save_interval", 1e-9) == 0
    assert saves == [16, 32, 48, None]  # each step, then checkpoint-0, copied to checkpoint-last


def polls_of_a_rank(rank: int, out: str) -> None:
    """Steps of 20 ms on rank 0, whose clock asks for a save every 100 ms; rank 1 gets a signal."""
    interrupts = Interrupts(0.1 if rank == 0 else 3600)
    saves = []
    for step in range(40):
        if (rank, step) == (1, 30):
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.02)
        number, due = interrupts.poll()
        if number:
            break
        if due:
            saves.append(step)
            interrupts.saved()
    torch.save((saves, number, step), f"{out}/{rank}.pth")


def test_ranks_save_and_stop_at_the_same_steps(tmp_path):
    in_processes(polls_of_a_rank, 2, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    saves, number, step = ranks[0]
    assert (number, step) == (signal.SIGUSR1, 31)  # flags are read a step late
    assert saves
    assert min(b - a for a, b in itertools.pairwise(saves)) > 1  # once per interval


@pytest.mark.parametrize("script", [main_finetune, main_pretrain], ids=["finetune", "kNN"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_signal_during_evaluation_loses_nothing(
    script, epoch, photos, flags, tmp_path, monkeypatch
):
    if script is main_finetune:
        flags = [flags[0], photos, "--model", "vit_nano_patch4", *flags[4:]]
    else:
        flags = [*flags, "--eval_freq", 1]
    flags += ["--epochs", 2]
    assert run_main(script, *flags) == 0

    batches, polled = iter(range(100)), engine_finetune.polled

    def signalled(loader, poll):
        for batch in polled(loader, poll):
            if next(batches) == (epoch if script is main_finetune else 1 + 4 * epoch):
                signal.raise_signal(signal.SIGTERM)
            yield batch

    again = [*flags, "--output_dir", tmp_path / "again", "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(engine_finetune, "polled", signalled)
        patch.setattr(util.features, "polled", signalled)
        assert run_main(script, *again) == 128 + signal.SIGTERM
    state = state_of(tmp_path / "again")
    assert (state["epoch"], state["images"]) == (epoch - 1, 48)
    trained = []
    at_step(monkeypatch, epoch, 0, lambda: trained.append(epoch))
    # with workers, too, which have nothing to load any more
    assert run_main(script, *again, "--num_workers", epoch) == 0
    assert not trained
    assert_same_run(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_before_training_stops_at_once(number, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main_pretrain, "build_model", lambda args: os.kill(os.getpid(), number))
    assert run_main(main_pretrain, *flags) == 128 + number
    assert f"stopped by {signal.Signals(number).name}\n" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_signal_while_an_image_is_decoded_is_not_taken_for_garbage(flags, monkeypatch):
    def load(self, original=ImageFile.load):
        signal.raise_signal(signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(ImageFile, "load", load)
    assert run_main(main_pretrain, *flags, "--epochs", 1) == 128 + signal.SIGTERM


def test_bad_images_are_counted_over_a_stop(flags, tmp_path, monkeypatch, capsys):
    for i in range(200):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:03d}.png")
    flags = [*flags, "--data_path", tmp_path, "--batch_size", 20, "--epochs", 1]
    order = list(EpochSampler(range(200), 20, seed=0))
    for place in (5, 15, 190):
        os.truncate(tmp_path / f"{order[place][1]:03d}.png", 20)
    with monkeypatch.context() as patch:
        at_step(patch, 0, 4, lambda: signal.raise_signal(signal.SIGTERM))
        assert run_main(main_pretrain, *flags) == 128 + signal.SIGTERM
    assert len(state_of(tmp_path / "out")["bad_images"]) == 2
    capsys.readouterr()
    assert run_main(main_pretrain, *flags, "--resume", "auto") == 1
    assert "3 of 200 images are not readable" in the_error(capsys.readouterr().err)


def test_keep_last_removes_old_numbered_checkpoints_alone(flags, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    others = {"checkpoint-best.pth", "checkpoint-99.pth", "checkpoint-0.pth.bak", "my-0.pth"}
    for name in others:
        (out / name).touch()
    extra = ["--save_freq", 1, "--keep_last", 2, "--epochs", 4, "--resume", "auto"]
    assert run_main(main_pretrain, *flags, *extra) == 0
    assert {p.name for p in out.glob("*pth*")} == others | {
        f"checkpoint-{name}.pth" for name in ("last", 2, 3)
    }


def run_of(tmp_path, processes: int, monkeypatch, **flags) -> util_run.Run:
    monkeypatch.setattr(util_run, "get_world_size", lambda: processes)
    monkeypatch.setattr("util.lr_sched.get_world_size", lambda: processes)
    words = [f"--{name}={value}" for name, value in flags.items()]
    words += ["--resume", str(tmp_path / "saved.pth"), "--output_dir", ""]
    return util_run.Run(pretrain_parser().parse_args(["--data_path", "x", *words]))


def test_a_launcher_that_ended_during_the_start_is_noticed_at_the_first_step(monkeypatch):
    """Another's handler took the signal: submitit's ignores SIGTERM until training replaces it."""
    monkeypatch.setattr(interrupt, "launcher_has_ended", lambda: True)
    try:
        assert Interrupts(60).poll()[0] == signal.SIGTERM
    finally:
        interrupt.restore_handlers()


@pytest.mark.parametrize(
    ("number", "kept"), [(signal.SIGHUP, True), (signal.SIGINT, True), (signal.SIGTERM, False)]
)
def test_a_hangup_may_be_ignored_but_no_request_to_stop(number, kept, monkeypatch):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        Interrupts(60).poll()
        assert (signal.getsignal(number) is signal.SIG_IGN) == kept
    finally:
        interrupt.restore_handlers()
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("processes", "batch_size", "accum_iter", "words"),
    [
        (1, 8, 4, "2 processes before, 1 now; with --accum_iter 4 the global batch stays 32"),
        (4, 4, 2, "with --accum_iter 2 the global batch stays 32"),
        (4, 8, 1, "with --accum_iter 1 the global batch stays 32"),
        (3, 8, 3, "the global batch was 32 and is 72"),
        (4, 16, 3, "the global batch was 32 and is 192"),
        (2, 4, 3, None),  # as many processes: what the flags say
    ],
)
def test_other_processes_keep_the_global_batch_if_they_can(
    processes, batch_size, accum_iter, words, tmp_path, monkeypatch, caplog
):
    saved = {"model": {}, "world_size": 2, "global_batch": 32}
    checkpoint.save(saved, tmp_path / "saved.pth")
    with caplog.at_level("INFO"):
        run = run_of(tmp_path, processes, monkeypatch, batch_size=batch_size, accum_iter=3)
    assert run.args.accum_iter == accum_iter
    assert (words in caplog.text) if words else not caplog.text


def test_batches_of_as_large_steps_are_said_to_be(photos_run, tmp_path, capsys):
    flags = [*photos_run, "--warmup_epochs", 0, "--batch_size"]
    assert run_main(main_pretrain, *flags, 8, "--epochs", 1) == 0
    capsys.readouterr()
    again = ["--epochs", 2, "--resume", "auto"]
    assert run_main(main_pretrain, *flags, 4, "--accum_iter", 2, *again) == 0
    out = capsys.readouterr().out
    assert "changed: --batch_size was 8, is 4: steps stay as large" in out
    assert "changed: --accum_iter was 1, is 2: steps stay as large" in out


@pytest.mark.parametrize(("given", "accum_iter"), [(3, 6), (2, 2)])
def test_a_second_restart_adapts_as_the_first_did(given, accum_iter, tmp_path, monkeypatch):
    """The flags of a run on 4 processes, now on 2 for the second time; other flags are meant."""
    saved = {"model": {}, "world_size": 2, "global_batch": 96, "given_accum_iter": 3}
    checkpoint.save(saved | {"args": {"batch_size": 8}}, tmp_path / "saved.pth")
    run = run_of(tmp_path, 2, monkeypatch, batch_size=8, accum_iter=given)
    assert run.args.accum_iter == accum_iter


@pytest.mark.parametrize(
    ("before", "after"), [((2, 8), (1, 16)), ((1, 16), (4, 4)), ((2, 8), (3, 8))]
)
def test_other_processes_see_the_rest_of_the_epoch(before, after, monkeypatch):
    """(processes, images of each in a step); where steps do not match, images are repeated."""

    def indices(processes: int, per_step: int, steps_done: int) -> list[int]:
        monkeypatch.setattr("util.data.order.get_world_size", lambda: processes)
        shares = []
        for rank in range(processes):
            monkeypatch.setattr("util.data.order.get_rank", lambda rank=rank: rank)
            sampler = EpochSampler(range(100), per_step, seed=3)
            sampler.set_epoch(5, steps_done)
            shares.append([index for _, index in sampler])
        return [index for row in zip(*shares, strict=True) for index in row]

    whole = indices(*before, 0)
    seen = whole[: 3 * math.prod(before)]
    rest = indices(*after, len(seen) // math.prod(after))
    assert len(set(rest)) == len(rest)
    assert set(whole) <= set(seen + rest)
    if math.prod(before) == math.prod(after):
        assert seen + rest == whole


def test_means_start_anew_with_another_number_of_processes():
    ranks = [MetricLogger(), MetricLogger()]
    for logger, loss in zip(ranks, (1.0, 3.0), strict=True):
        logger.update(8, loss=torch.tensor(loss))
    states = [rank.state_dict() for rank in ranks]
    del states[0]["last"]  # as older checkpoints are
    one = MetricLogger()
    one.load_state_dicts(states, torch.device("cpu"))
    assert one.window() == {}
    one.load_state_dicts(states[:1], torch.device("cpu"))
    assert one.window()["loss"] == 1


@pytest.mark.parametrize(("local_id", "index"), [("1", 0), ("0", None), (None, None)])
def test_a_task_that_sees_one_gpu_takes_it(local_id, index, monkeypatch):
    """As with srun --gpus-per-task=1; torchrun's processes in one task do not have their own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    if local_id is not None:
        monkeypatch.setenv("SLURM_LOCALID", local_id)
    args = pretrain_parser().parse_args(["--data_path", "x"])
    if index is None:
        with pytest.raises(UserError, match="no GPU for process 1"):
            distributed.choose_device(args.device, local_rank=1)
    else:
        assert distributed.choose_device(args.device, local_rank=1) == torch.device("cuda", index)
