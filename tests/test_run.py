"""What a run survives, in one process: full disks, values that are not finite, late signals."""

import errno
import json
import math
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import TINY, in_processes, run_main, the_error
from PIL import Image
from PIL.ImageFile import ImageFile

import engine_finetune
import engine_pretrain
import main_finetune
import main_linprobe
import main_pretrain
import util.features
import util.run.training
from util import distributed
from util.args import pretrain_parser
from util.data.order import EpochSampler
from util.errors import UserError
from util.misc import MetricLogger
from util.run import checkpoint, logs
from util.run import run as util_run
from util.run.finite import GRADIENT, OVERFLOWS, FiniteCheck

TINY = ["--model", "mae_vit_nano_patch4", *TINY[2:], "--warmup_epochs", 1]


@pytest.fixture
def flags(photos, tmp_path):
    """48 images in three steps an epoch."""
    return ["--data_path", photos, *TINY, "--batch_size", 16, "--output_dir", tmp_path / "out"]


def last(folder) -> dict:
    return torch.load(folder / checkpoint.LAST, weights_only=True)


def log_of(folder) -> list[dict]:
    """log.txt without timings."""
    timings = ("train_images_per_second", "train_data_wait")
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timings} for line in lines]


def assert_same_state(folder, other):
    one, two = last(folder), last(other)
    for key in ("model", "optimizer", "scaler", "epoch", "best"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)


def assert_same_run(folder, other):
    assert_same_state(folder, other)
    assert log_of(folder) == log_of(other)


def at_step(monkeypatch, epoch: int, index: int, act) -> None:
    """Calls `act` at the beginning of a batch."""

    def seed_all(seed, *position, original=util.run.training.seed_all):
        original(seed, *position)
        if position[:2] == (epoch, index):
            act()

    monkeypatch.setattr(util.run.training, "seed_all", seed_all)


def run_of(tmp_path, processes: int, monkeypatch, **flags) -> util_run.Run:
    monkeypatch.setattr(util_run, "get_world_size", lambda: processes)
    monkeypatch.setattr("util.lr_sched.get_world_size", lambda: processes)
    words = [f"--{name}={value}" for name, value in flags.items()]
    words += ["--resume", str(tmp_path / "saved.pth"), "--output_dir", ""]
    return util_run.Run(pretrain_parser().parse_args(["--data_path", "x", *words]))


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
    again = [*flags, "--epochs", 3, "--output_dir", tmp_path / "again"]

    def epoch(self, number, *args, original=logs.RunLog.epoch):
        limit(500 if number == 1 else 2**30)  # some of the second line fits
        original(self, number, *args)

    monkeypatch.setattr(logs.RunLog, "epoch", epoch)
    capsys.readouterr()
    with small_disk() as limit:
        assert run_main(main_pretrain, *again) == 0
    out, err = capsys.readouterr()
    assert "log.txt: File too large; the line of epoch 1 is lost" in out
    assert "checkpoint-last.pth: File too large; the run goes on" in out
    assert "Traceback" not in err
    assert_same_state(tmp_path / "out", tmp_path / "again")
    assert log_of(tmp_path / "again") == [log_of(tmp_path / "out")[epoch] for epoch in (0, 2)]
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
    at_step(monkeypatch, 1, 0, lambda: state.update({"read-only": False}))
    assert run_main(main_pretrain, *flags, "--epochs", 2) == 0
    assert "checkpoint-last.pth: Read-only file system; the run goes on" in capsys.readouterr().out
    assert last(tmp_path / "out")["epoch"] == 1


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


def spoil(monkeypatch, *steps: int) -> None:
    """Makes the contrastive loss NaN in some steps, counted from 0, of a run of steps."""
    calls = iter(range(1000))

    def nt_xent(embedding, original=engine_pretrain.nt_xent, **kwargs):
        loss, top1 = original(embedding, **kwargs)
        return (loss * math.nan if next(calls) in steps else loss), top1

    monkeypatch.setattr(engine_pretrain, "nt_xent", nt_xent)


@pytest.mark.parametrize(
    ("steps", "skips", "step"), [([1], 0, 2), ([2], 0, 3), ([0, 1, 2], 2, 3), ([1, 2], 1, 3)]
)
def test_the_exact_step_and_term_are_named(steps, skips, step, flags, monkeypatch, capsys):
    """Micro-batches of 4 images, two a step; one that is bad spoils its step."""
    flags += ["--epochs", 1, "--batch_size", 4, "--accum_iter", 2, "--skip_nonfinite", skips]
    spoil(monkeypatch, *(2 * step + 1 for step in steps))
    assert run_main(main_pretrain, *flags) == 1
    line = the_error(capsys.readouterr().err)
    assert "error: loss is nan, contrastive is nan, gradient norm is nan at epoch 0" in line
    assert f"step {step}, lr " in line


def test_weights_that_an_update_spoils_are_not_saved(flags, tmp_path, capsys):
    """One step an epoch, whose loss and gradient are fine: the second's update is not."""
    assert run_main(main_pretrain, *flags, "--epochs", 1) == 0
    good = (tmp_path / "out" / checkpoint.LAST).read_bytes()
    extra = ["--epochs", 2, "--lr", 1e39, "--batch_size", 48, "--resume", "auto"]
    capsys.readouterr()
    assert run_main(main_pretrain, *flags, *extra) == 1
    assert "weights are not finite after epoch 1, step 1" in the_error(capsys.readouterr().err)
    assert (tmp_path / "out" / checkpoint.LAST).read_bytes() == good


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_steps_are_left_out_where_that_is_allowed(precision, flags, tmp_path, monkeypatch, capsys):
    """Weights and optimiser are as if the second and third of four steps had not been."""
    seen = []

    def step(self, closure=None, original=torch.optim.AdamW.step):
        original(self)
        seen.append(self.state[self.param_groups[0]["params"][0]]["step"].item())

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    flags += ["--epochs", 1, "--batch_size", 12, "--precision", precision, "--skip_nonfinite", 2]
    spoil(monkeypatch, 1, 2)
    assert run_main(main_pretrain, *flags) == 0
    assert seen == [1, 2]
    out = capsys.readouterr().out
    assert "step 2, lr " in out
    assert "step skipped, 2 in a row of 2 allowed" in out
    (line,) = log_of(tmp_path / "out")
    assert all(math.isfinite(value) for value in line.values())
    assert all(tensor.isfinite().all() for tensor in last(tmp_path / "out")["model"].values())


def test_a_step_that_is_left_out_leaves_no_trace_in_batchnorm(photos, flags, tmp_path, monkeypatch):
    calls = iter(range(100))

    def to_device(batch, device, original=engine_finetune.to_device):
        inputs, labels = original(batch, device)
        return (inputs * math.nan if next(calls) == 1 else inputs), labels

    monkeypatch.setattr(engine_finetune, "to_device", to_device)
    flags = [*flags[:2], "--model", "vit_nano_patch4", *flags[4:], "--warmup_epochs", 0]
    assert run_main(main_linprobe, *flags, "--epochs", 1, "--skip_nonfinite", 1) == 0
    model = last(tmp_path / "out")["model"]
    assert model["head.0.running_mean"].isfinite().all()
    assert model["head.0.num_batches_tracked"] == 2


def test_an_epoch_of_nothing_but_skipped_steps_is_logged(flags, tmp_path, monkeypatch):
    spoil(monkeypatch, 0, 1, 2)
    assert run_main(main_pretrain, *flags, "--epochs", 1, "--skip_nonfinite", 3) == 0
    assert [sorted(line) for line in log_of(tmp_path / "out")] == [["epoch", "train_lr"]]


def test_overflows_of_float16_are_normal_for_a_while():
    check = FiniteCheck(skips=0, scaled=True)
    infinite = {"loss": torch.tensor(1.0), GRADIENT: torch.tensor(math.inf)}
    for _ in range(OVERFLOWS):
        assert check.step("here", infinite)
        assert check.settle()
    check.step("there", infinite)
    with pytest.raises(UserError, match="gradient norm is inf at there"):
        check.settle()


def _check_on_two_ranks(rank: int) -> None:
    check = FiniteCheck(skips=1, scaled=False)
    values = {"loss": torch.tensor(1.0), GRADIENT: torch.tensor(1.0)}
    assert check.step("first", values)
    bad = values | {"loss": torch.tensor(math.inf if rank else 1.0)}
    assert not check.step("second", bad)  # with gradients that are finite
    with pytest.raises(UserError, match="loss is inf, gradient norm is 1 at third"):
        check.step("third", bad)


def test_one_rank_speaks_for_all():
    in_processes(_check_on_two_ranks, 2)


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
    state = last(tmp_path / "again")
    assert (state["epoch"], state["images"]) == (epoch - 1, 48)
    trained = []
    at_step(monkeypatch, epoch, 0, lambda: trained.append(epoch))
    assert run_main(script, *again) == 0
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
    assert len(last(tmp_path / "out")["bad_images"]) == 2
    capsys.readouterr()
    assert run_main(main_pretrain, *flags, "--resume", "auto") == 1
    assert "3 of 200 images are not readable" in the_error(capsys.readouterr().err)


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
        with pytest.raises(UserError, match="no GPU of its own"):
            distributed.choose_device(args.device, local_rank=1)
    else:
        assert distributed.choose_device(args.device, local_rank=1) == torch.device("cuda", index)
