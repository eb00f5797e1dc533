"""Losses, gradients and weights that are not finite: where a run stops, and what it leaves out."""

import math

import pytest
import torch
from conftest import in_processes, losses_of, run_main, state_of, the_error

import engine_finetune
import engine_pretrain
import main_linprobe
import main_pretrain
from util.errors import UserError
from util.run import checkpoint
from util.run.finite import GRADIENT, OVERFLOWS, FiniteCheck


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


def test_a_loss_that_is_not_finite_ends_the_run(photos_run, tmp_path, capsys, monkeypatch):
    assert run_main(main_pretrain, *photos_run, "--epochs", 2) == 0
    good = (tmp_path / "out/checkpoint-last.pth").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(
        "engine_pretrain.nt_xent", lambda x, **_: (x.sum() * math.nan, torch.tensor(0.0))
    )
    # also when a save within the epoch falls due before the next look at the losses
    for flags in ([], ["--save_interval", 1e-9]):
        assert run_main(main_pretrain, *photos_run, "--epochs", 3, "--resume", "auto", *flags) == 1
        line = the_error(capsys.readouterr().err)
        assert "loss is nan" in line
        assert "epoch 2" in line
    assert (tmp_path / "out/checkpoint-last.pth").read_bytes() == good


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
    """Weights and optimizer are as if the second and third of four steps had not been."""
    seen = []

    def step(self, closure=None, original=torch.optim.AdamW.step):
        original(self)
        seen.append(self.state[self.param_groups[0]["params"][0]]["step"].item())

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    flags += ["--epochs", 1, "--batch_size", 12, "--precision", precision, "--skip_nonfinite", 2]
    spoil(monkeypatch, 1, 2)
    assert run_main(main_pretrain, *flags) == 0
    assert seen == [1, 1, 1, 2]
    out = capsys.readouterr().out
    assert "step 2, lr " in out
    assert "step skipped, 2 in a row of 2 allowed" in out
    (line,) = losses_of(tmp_path / "out")
    assert all(math.isfinite(value) for value in line.values())
    assert all(tensor.isfinite().all() for tensor in state_of(tmp_path / "out")["model"].values())


@pytest.mark.parametrize(
    ("heads", "steps"), [([], 3), (["--blr", "auto"], 2)], ids=["LARS", "a grid"]
)
@pytest.mark.parametrize("bad", [0, 1])
def test_a_probe_s_step_leaves_no_trace_where_it_is_left_out(
    heads, steps, bad, photos, flags, tmp_path, monkeypatch
):
    """Nor in BatchNorm; a step of nothing but zeros would, by decay and momentum."""
    calls = iter(range(100))

    def to_device(batch, device, original=engine_finetune.to_device):
        inputs, labels = original(batch, device)
        return (inputs * math.nan if next(calls) == bad else inputs), labels

    monkeypatch.setattr(engine_finetune, "to_device", to_device)
    flags = [*flags[:2], "--model", "vit_nano_patch4", *flags[4:], "--warmup_epochs", 0]
    flags += ["--epochs", 1, "--weight_decay", 0.1, *heads, "--skip_nonfinite", 1]
    assert run_main(main_linprobe, *flags) == 0
    state = state_of(tmp_path / "out")
    (tracked,) = (t for name, t in state["model"].items() if "num_batches_tracked" in name)
    assert tracked == steps - 1
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert all(t.isfinite().all() for p in state["optimizer"]["state"].values() for t in p.values())


def test_an_epoch_of_nothing_but_skipped_steps_is_logged(flags, tmp_path, monkeypatch):
    spoil(monkeypatch, 0, 1, 2)
    assert run_main(main_pretrain, *flags, "--epochs", 1, "--skip_nonfinite", 3) == 0
    assert [sorted(line) for line in losses_of(tmp_path / "out")] == [["epoch", "train_lr"]]


def test_overflows_of_float16_are_normal_for_a_while():
    check = FiniteCheck(skips=0, scaled=True)
    infinite = {"loss": torch.tensor(1.0), GRADIENT: torch.tensor(math.inf)}
    for _ in range(OVERFLOWS):
        assert check.step("here", infinite) == (1, 0)
        check.settle()
    check.step("there", infinite)
    with pytest.raises(UserError, match="gradient norm is inf at there"):
        check.settle()


def _check_on_two_ranks(rank: int) -> None:
    check = FiniteCheck(skips=1, scaled=False)
    values = {"loss": torch.tensor(1.0), GRADIENT: torch.tensor(1.0)}
    assert check.step("first", values) == (0, 0)
    bad = values | {"loss": torch.tensor(math.inf if rank else 1.0)}
    assert check.step("second", bad) == (1, 1)  # with gradients that are finite
    assert check.step("third", bad) == (1, 1)
    with pytest.raises(UserError, match="loss is inf, gradient norm is 1 at third"):
        check.settle()


def test_one_rank_speaks_for_all():
    in_processes(_check_on_two_ranks, 2)
