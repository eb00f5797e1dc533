"""`--blr auto`: every head trains as if it were alone, and held-out training images choose."""

import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_same_run, at_step, log_of, run_main, state_of, the_error

import main_linprobe
from util import export
from util.probe_grid import POOLS, RATES, GridHeads

FLAGS = ["--model", "vit_nano_patch4", "--input_size", 16, "--num_workers", 0, "--device", "cpu"]
FLAGS += ["--data_path", "digits", "--batch_size", 256, "--blr", "auto", "--warmup_epochs", 1]


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_each_head_trains_as_if_it_were_alone(decay):
    torch.manual_seed(0)
    heads = GridHeads(width=6, classes=4)
    start = heads.weight.detach() * heads.scale[:, None, None]
    assert torch.allclose(start, start[:1].expand_as(start))
    features, labels = torch.randn(5, 16, 12), torch.randint(4, (5, 16))
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.5, momentum=0.9)
    for some, answers in zip(features, labels, strict=True):
        optimizer.zero_grad()
        heads.loss(heads(some), answers, decay=decay).backward()
        optimizer.step()
    for head in (0, 7, 12, 13, 20, 25):
        part = slice(6 * (head // 13), 6 * (head // 13) + 6)
        alone = torch.nn.Linear(6, 4)
        alone.weight.data, alone.bias.data = start[0].clone(), torch.zeros(4)
        norm = torch.nn.BatchNorm1d(6, affine=False, eps=1e-6)
        groups = [{"params": [alone.weight], "weight_decay": decay}, {"params": [alone.bias]}]
        optimizer = torch.optim.SGD(groups, lr=0.5 * RATES[head % 13], momentum=0.9)
        for some, answers in zip(features, labels, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(alone(norm(some[:, part])), answers).backward()
            optimizer.step()
        ours = heads.weight[head] * heads.scale[head]
        torch.testing.assert_close(ours, alone.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            heads.bias[head] * heads.scale[head], alone.bias, rtol=1e-3, atol=1e-4
        )


def test_rates_cover_three_decades():
    assert (len(RATES), len(POOLS)) == (13, 2)
    assert RATES[-1] / RATES[0] == pytest.approx(1000)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("grid") / "out"
    assert run_main(main_linprobe, *FLAGS, "--epochs", 15, "--output_dir", out) == 0
    return out


def test_the_best_on_held_out_images_is_reported(run):
    last = log_of(run)[-1]
    grid = {name: value for name, value in last.items() if name.startswith("grid_")}
    assert len(grid) == 26
    chosen = int(state_of(run)["model"]["head.chosen"])
    assert last[f"grid_{GridHeads.name(chosen)}"] == max(grid.values())
    assert max(grid.values()) > min(grid.values())
    assert last["test_acc1"] > 70
    assert 0 < last["train_loss"] < math.log(10)  # the mean of all, of which no rate diverges


def test_the_checkpoint_is_the_chosen_probe_s(run, tmp_path, capsys):
    last = log_of(run)[-1]
    flags = ["--eval", "--resume", run / "checkpoint-last.pth", "--output_dir", ""]
    words = [*FLAGS[: FLAGS.index("--blr")], *flags, "--precision", "fp32"]
    assert run_main(main_linprobe, *words) == 0
    shown = float(capsys.readouterr().out.rsplit("top-1 ", 1)[1].split(" %")[0])
    assert shown == pytest.approx(last["test_acc1"], abs=0.6)  # of cached features, in bf16
    words = ["--checkpoint", run / "checkpoint-last.pth", "--out", tmp_path / "vit"]
    assert run_main(export, *words) == 0
    assert timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).num_classes == 10


def test_a_stop_loses_nothing(tmp_path, monkeypatch):
    flags = [*FLAGS, "--epochs", 3]
    assert run_main(main_linprobe, *flags, "--output_dir", tmp_path / "whole") == 0
    flags += ["--output_dir", tmp_path / "out"]
    with monkeypatch.context() as patch:
        at_step(patch, 1, 2, lambda: signal.raise_signal(signal.SIGTERM))
        assert run_main(main_linprobe, *flags) == 128 + signal.SIGTERM
    assert run_main(main_linprobe, *flags, "--resume", "auto") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_validation_images_do_not_choose(photos, tmp_path):
    """Their classes exchanged, the choice is the same and the accuracy is what is left of 100 %."""
    flags = [*FLAGS, "--epochs", 4, "--batch_size", 8, "--data_path"]
    shutil.copytree(photos, tmp_path / "data")
    assert run_main(main_linprobe, *flags, photos, "--output_dir", tmp_path / "one") == 0
    val = tmp_path / "data/val"
    for old, new in (("china", "x"), ("flower", "china"), ("x", "flower")):
        (val / old).rename(val / new)
    words = ["--output_dir", tmp_path / "two"]
    assert run_main(main_linprobe, *flags, tmp_path / "data", *words) == 0
    one, two = (state_of(tmp_path / name)["model"]["head.chosen"] for name in ("one", "two"))
    assert one == two
    scores = [log_of(tmp_path / name)[-1]["test_acc1"] for name in ("one", "two")]
    assert np.sum(scores) == pytest.approx(100)


def test_the_grid_and_a_rate_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        main_linprobe.get_args_parser().parse_args([str(word) for word in FLAGS] + ["--lr", "1"])
    assert "--blr auto chooses the learning rate" in the_error(capsys.readouterr().err)
