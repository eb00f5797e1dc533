"""Pretraining from flags to files, in this process and in two."""

import logging
import math

import pytest
import torch
import torch._inductor.config
from conftest import TINY, log_of, losses_of, run_main
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
from util.lr_sched import adjust_learning_rate
from util.run import training

DIGITS = ["--data_path", "digits", *TINY]
MAE = ["--weight_simclr", 0, "--weight_mae", 1]


def test_all_losses_fall_on_digits(tmp_path):
    flags = ["--epochs", 3, "--warmup_epochs", 1, "--batch_size", 64, "--blr", 4e-3]
    assert run_main(main_pretrain, *DIGITS, *flags, "--output_dir", tmp_path) == 0
    first, *_, last = log_of(tmp_path)
    assert last["train_loss"] < 0.8 * first["train_loss"]
    assert last["train_reconstruction"] < 0.8 * first["train_reconstruction"]
    assert last["train_noise"] < 0.2 * first["train_noise"]
    assert last["train_contrastive"] < first["train_contrastive"]


@pytest.mark.parametrize(
    ("flags", "terms"),
    [
        ([], {"reconstruction", "noise", "noise_zero", "contrastive", "contrastive_top1"}),
        (MAE, {"reconstruction"}),
        (["--weight_mae", 0], {"contrastive", "contrastive_top1"}),
        (["--norm_pix_loss", "--precision", "fp16"], {"reconstruction", "noise"}),
    ],
    ids=["CAN", "MAE", "SimCLR", "fp16"],
)
def test_each_objective_runs_and_logs_its_terms(flags, terms, photos_run, tmp_path):
    assert run_main(main_pretrain, *photos_run, "--epochs", 1, *flags) == 0
    logged = {name.removeprefix("train_") for name in log_of(tmp_path / "out")[0]}
    optional = {"reconstruction", "noise", "noise_zero", "contrastive", "contrastive_top1"}
    assert terms <= logged
    if "fp16" not in flags:
        assert logged & optional == terms


def test_start_up_says_what_will_be_trained(photos_run, capsys):
    assert run_main(main_pretrain, *photos_run, "--accum_iter", 3, "--epochs", 1) == 0
    out = capsys.readouterr().out
    for words in (
        "objective: CAN = 0.679 reconstruction + 0.291 noise + 0.03 contrastive, "
        "mask ratio 0.5, noise up to 0.05, 2 of 4 patches kept",
        "model: mae_vit_nano_patch4, 0.6 M trained parameters",
        "batch: 48 images = 16 x 3 accumulated x 1 processes, 1 steps per epoch, lr 0.000188",
        "contrast: 30 negatives per anchor",
        "warning: --accum_iter 3 adds up gradients, not negatives",
        "warning: --warmup_epochs 40 is more than a fifth of --epochs 1",
        "device: cpu x 1",
        "epoch 0 [1/1]",
        "eta 0:00:00",
    ):
        assert words in out


def test_checkpoints_and_their_names(photos_run, tmp_path):
    assert run_main(main_pretrain, *photos_run, "--epochs", 5, "--save_freq", 2) == 0
    names = {path.name for path in (tmp_path / "out").glob("*.pth*")}
    assert names == {f"checkpoint-{name}.pth" for name in ("last", 1, 3, 4)}
    last = torch.load(tmp_path / "out/checkpoint-last.pth", weights_only=True)
    assert {"model", "optimizer", "scaler", "epoch", "args"} <= set(last)
    assert last["epoch"] == 4
    assert last["args"]["mask_ratio"] == 0.5


def test_empty_output_dir_saves_nothing(photos_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main(main_pretrain, *photos_run, "--epochs", 1, "--output_dir", "") == 0
    assert list(tmp_path.iterdir()) == []


def test_schedule_equals_the_reference():
    """lr 1e-3, min_lr 1e-6, 5 of 50 epochs warm-up; computed with MAE's code."""
    args = main_pretrain.get_args_parser().parse_args(["--data_path", "x"])
    args.lr, args.min_lr, args.warmup_epochs, args.epochs = 1e-3, 1e-6, 5, 50
    parameter = torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [parameter]}, {"params": [], "lr_scale": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    expected = {
        0: 0.0, 0.5: 0.0001, 2.5: 0.0005, 5: 0.001, 10.25: 0.0009668234230353523,
        27.5: 0.0005005000000000001, 49.9: 1.0121724626553238e-06,
    }  # fmt: skip
    for epoch, lr in expected.items():
        assert adjust_learning_rate(optimizer, epoch, args) == pytest.approx(lr, rel=1e-12)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, lr / 2])


def test_learning_rate_follows_the_schedule_at_every_step(photos_run, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "PRINT_FREQ", 1)
    flags = ["--epochs", 4, "--warmup_epochs", 2, "--lr", 1e-3, "--min_lr", 1e-5]
    assert run_main(main_pretrain, *photos_run, *flags) == 0
    events = EventAccumulator(str(tmp_path / "out"))
    events.Reload()
    rates = [event.value for event in events.Scalars("train/lr")]
    expected = [1e-3 * step / 6 for step in range(6)]
    expected += [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert rates == pytest.approx(expected, rel=1e-6)


def weights_after(tmp_path, *flags) -> dict:
    assert run_main(main_pretrain, *flags, "--output_dir", tmp_path) == 0
    return torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)["model"]


def test_accumulated_batches_train_as_one_batch(photos_run, tmp_path, monkeypatch):
    """With masks that do not differ, MAE's loss is a mean over images."""

    def first_half(self, x, mask_ratio):
        ids = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        return x[:, :2], (ids >= 2).float(), ids

    monkeypatch.setattr("model_mae.MaskedAutoencoderViT.random_masking", first_half)
    flags = [*photos_run, *MAE, "--mask_ratio", 0.5, "--precision", "fp32", "--epochs", 1]
    flags += ["--warmup_epochs", 0, "--lr", 1e-3]
    whole = weights_after(tmp_path / "whole", *flags)
    parts = weights_after(tmp_path / "parts", *flags, "--batch_size", 4, "--accum_iter", 4)
    for name, tensor in whole.items():
        # Adam's first steps have size lr whatever the gradient: rounding may flip a tiny one
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


def test_gradients_are_reduced_once_per_step(photos_run, monkeypatch):
    reductions, batches = [], []

    class Counted(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, self.count)

        @staticmethod
        def count(state, bucket):
            reductions.append(bucket.is_last())
            assert batches[-1] % 4 == 3  # the last of a step's four: its gradient is the sum's
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

    def seed_all(seed, *position, original=training.seed_all):
        original(seed, *position)
        batches.extend(position[1:2])

    monkeypatch.setattr(training, "seed_all", seed_all)
    monkeypatch.setattr(training, "DistributedDataParallel", Counted)
    flags = ["--epochs", 2, "--batch_size", 4, "--accum_iter", 4, "--output_dir", ""]
    assert run_main(main_pretrain, *photos_run, *flags) == 0
    assert sum(reductions) == 6  # 48 images in steps of 16, two epochs


def test_the_host_waits_for_metrics_once_a_window(monkeypatch, tmp_path):
    fetched = []
    for name in ("item", "tolist"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, original=original: fetched.append(original) or original(self),
        )
    monkeypatch.setattr(main_pretrain, "reconstruction_grid", lambda *_: torch.zeros(3, 1, 1))
    monkeypatch.setattr("util.data.order.SeededDataset.__getitem__", lambda *_: (
        [torch.zeros(3, 8, 8)] * 2, 0))  # fmt: skip
    monkeypatch.setattr("util_contrastive.TwoCrops.finish", lambda _, views, device: views)
    monkeypatch.setattr("util.data.order.EpochSampler.__iter__", lambda self: iter(
        [(0, 0)] * len(self)))  # fmt: skip
    monkeypatch.setattr(main_pretrain, "preview_images", lambda *_: torch.zeros(1, 3, 8, 8))
    before = len(fetched)
    flags = ["--epochs", 1, "--batch_size", 8, "--output_dir", ""]
    assert run_main(main_pretrain, *DIGITS, *flags) == 0
    # 179 steps are 9 windows: one transfer of the sums, one of the gradient norm
    assert 9 <= len(fetched) - before <= 2 * 9 + 2


def test_no_weight_decay_on_biases_norms_and_tokens(photos_run, monkeypatch):
    seen = []

    class Spy(torch.optim.AdamW):
        def __init__(self, groups, **kwargs):
            seen.append((groups, kwargs))
            super().__init__(groups, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    assert run_main(main_pretrain, *photos_run, "--epochs", 1) == 0
    groups, kwargs = seen[0]
    assert kwargs["betas"] == (0.9, 0.95)
    for group in groups:
        for parameter in group["params"]:
            token = parameter.ndim == 3
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 and not token else 0.0)


def test_two_processes_agree_and_see_everything(photos, forks, tmp_path):
    """The run ends, counts negatives of both ranks, and logs numbers of the whole fleet once; that
    its weights are those of one process is the DDP test's business."""
    flags = ["--data_path", photos, *TINY, "--batch_size", 8, "--epochs", 2]
    flags += ["--output_dir", tmp_path]
    status, out, err = forks.run("main_pretrain", *flags, cwd=tmp_path, processes=2)
    assert status == 0, err
    assert "contrast: 30 negatives per anchor" in out
    assert "batch: 16 images = 8 x 1 accumulated x 2 processes, 3 steps per epoch" in out
    assert out.count("epoch 1 [3/3]") == 1
    assert len(log_of(tmp_path)) == 2


@pytest.mark.slow
def test_compiling_changes_neither_losses_nor_keys(photos_run, tmp_path, monkeypatch):
    # else a compiled model draws its masks and noise in another order
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)
    flags = [*photos_run, "--epochs", 1, "--precision", "fp32"]
    plain = weights_after(tmp_path / "plain", *flags)
    compiled = weights_after(tmp_path / "compiled", *flags, "--compile")
    assert sorted(plain) == sorted(compiled)
    plain, compiled = (losses_of(tmp_path / name)[0] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)
    logging.getLogger("torch._dynamo").setLevel(logging.WARNING)
