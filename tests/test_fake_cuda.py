"""The three scripts on CUDA, whose tensors are fake: on one device throughout, and no host waits.

Allowed is what happens rarely: at start-up, when a line is printed, at the end of an epoch.
"""

import argparse
import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

import pytest
import torch
from conftest import ROOT, run_main
from fake_cuda import asked, fake_cuda

import engine_finetune
import engine_pretrain
import main_finetune
import main_linprobe
import main_pretrain
from util.data import augment
from util.run import background
from util_contrastive import draw_parameters

pytestmark = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 10),
    reason="older fake tensors ask for a driver",
)

STARTUP = {
    ("a copy to cuda", "main_pretrain.py:main"),  # the model
    ("a copy to cuda", "engine_finetune.py:set_up"),
    ("a copy to cuda", "engine_finetune.py:fit_grid"),
    ("a copy to cuda", "util/features.py:part"),
    ("a copy to cuda", "engine_finetune.py:class_weights"),
}
SAVED = {("a copy to cpu", "util/misc.py:state_dict"), ("a number", "util/run/run.py:_write")}
PRINTED = {  # every 20 steps, and at an epoch's end
    ("a number", "util/misc.py:window"),
    ("a number", "util/run/finite.py:check_weights"),
}
EPOCH = {  # once, after evaluation
    ("a copy to cpu", "util/predictions.py:of"),
    ("a number", "util/features.py:knn_accuracies"),
    ("a number", "engine_finetune.py:fit_grid"),
    ("a copy to cpu", "engine_finetune.py:fit_grid"),
    ("a copy to cpu", "util/features.py:cpu"),
    ("a number", "util/probe_grid.py:name"),
    ("a number", "util/probe_grid.py:tally"),
}
PICTURES = {  # of a few images, by rank 0, once an epoch that is evaluated
    ("a copy to cuda", "main_pretrain.py:look_at_features"),
    ("a copy to cpu", "util/encoders.py:__init__"),
    ("a number", "util/weights.py:check_same"),
    ("a number", "util/pictures.py:neighbours"),
    ("a copy to cuda", "util/pictures.py:neighbours"),
    ("a copy to cpu", "util/pictures.py:components"),
    ("a copy to cpu", "util/pictures.py:heat"),
    ("a copy to cpu", "util/pictures.py:to_image"),
    ("a copy to cpu", "util/visualize.py:reconstruction_grid"),
    ("a copy to cuda", "util/visualize.py:reconstruction_grid"),
}
VIT = ["--model", "vit_nano_patch4", "--input_size", 8, "--num_workers", 0, "--warmup_epochs", 0]
MIX = ["--mixup", 0.8, "--cutmix", 1, "--clip_grad", 1, "--accum_iter", 2]
MAE = ["--model", "mae_vit_nano_patch4", *VIT[2:]]
RUNS = {
    "CAN": (main_pretrain, ["--accum_iter", 2, "--eval_freq", 1, "--skip_nonfinite", 3, *MAE]),
    "paper": (main_pretrain, ["--recipe", "paper", "--epochs", 1, *MAE]),
    "MAE": (main_pretrain, ["--weight_simclr", 0, "--norm_pix_loss", "--epochs", 1, *MAE]),
    "float16": (main_pretrain, ["--precision", "fp16", "--epochs", 1, *MAE]),
    "probe": (main_linprobe, [*VIT, "--class_weights", "balanced", "--skip_nonfinite", 3]),
    "cached probe": (main_linprobe, [*VIT, "--cache_features", "--dist_eval"]),
    "grid": (main_linprobe, [*VIT, "--blr", "auto"]),
    "kNN": (main_linprobe, [*VIT, "--knn"]),
    "fine-tuning": (main_finetune, [*VIT, *MIX]),
}


def run(script: ModuleType, photos, tmp_path, *flags: object) -> set[tuple[str, str]]:
    """Where the host would wait."""
    words = ["--data_path", photos, "--batch_size", 12, "--epochs", 2, *flags]
    words += ["--device", "cuda", "--save_interval", 1e-9, "--output_dir", tmp_path / "out"]
    with fake_cuda() as fake:
        assert run_main(script, *words) == 0
    return set(fake.waits)


@pytest.fixture(scope="module")
def waits(photos, tmp_path_factory) -> Callable[[str], set[tuple[str, str]]]:
    """Of one of `RUNS`."""

    @cache
    def waits(name: str) -> set[tuple[str, str]]:
        script, flags = RUNS[name]
        return run(script, photos, tmp_path_factory.mktemp("fake"), *flags)

    return waits


@pytest.mark.parametrize("name", RUNS)
def test_a_script_runs_on_one_device_and_waits_only_where_it_may(name, waits):
    allowed = STARTUP | SAVED | PRINTED | EPOCH
    allowed |= PICTURES if RUNS[name][0] is main_pretrain else set()
    assert waits(name) - allowed == set()


def test_no_wait_is_allowed_that_none_needs(waits):
    found = set().union(*map(waits, RUNS))
    assert (STARTUP | SAVED | PRINTED | EPOCH | PICTURES) - found == set()


def test_batches_and_saves_wait_for_their_copies(photos, tmp_path, monkeypatch):
    """The step for its batch, whose memory is kept until then; the writer for the weights."""
    waited = []
    monkeypatch.setattr(background, "wait_for_device", waited.append)
    run(main_pretrain, photos, tmp_path, *MAE, "--epochs", 1, "--augment", "none")
    steps = 48 // 12
    assert asked["wait_stream"] >= steps
    assert asked["record_stream"] >= 2 * steps  # two views
    assert waited == [torch.device("cuda", 0)] * (steps + 1)  # and at the end


def test_the_check_for_the_first_gpu_runs(monkeypatch, capsys):
    """What it needs no values for; on CPUs all of it runs, see test_benchmarks."""
    monkeypatch.setenv("BENCHMARK_SECONDS", "0")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu_check = importlib.import_module("gpu_check")
    compiled = []  # which needs a GPU's compiler
    monkeypatch.setattr(augment, "compiled_run", lambda: compiled.append(1) or augment.run_all)
    monkeypatch.setattr(gpu_check.Check, "SIZES", {"tiny_patch16": augment.COMPILED_FROM})
    monkeypatch.setattr(gpu_check, "RATES", {"CAN": 0.45})
    only = ["waits", "rates", "augmentation", "contrast"]
    with fake_cuda():
        gpu_check.main(argparse.Namespace(device="cuda", only=only, json=None))
    assert "0 error" in capsys.readouterr().out
    assert compiled


def test_small_batches_are_not_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(augment, "compiled_run", lambda: compiled.append(1) or augment.run_all)
    with fake_cuda():
        for count in (augment.COMPILED_FROM - 1, augment.COMPILED_FROM):
            crops = torch.zeros(count, 3, 8, 8, dtype=torch.uint8, device="cuda")
            parameters = torch.stack([draw_parameters() for _ in range(count)])
            augment.augment(crops, parameters, compiled=True)
            assert len(compiled) == (count == augment.COMPILED_FROM)


def test_a_planted_wait_is_found(photos, tmp_path, monkeypatch):
    def total_loss(*args, original=engine_pretrain.total_loss):
        parts = original(*args)
        parts["loss"].item()
        return parts

    monkeypatch.setattr(engine_pretrain, "total_loss", total_loss)
    waits = run(main_pretrain, photos, tmp_path, *MAE, "--epochs", 1)
    assert ("a number", "engine_pretrain.py:train_one_epoch") in waits


@pytest.mark.parametrize("kind", ["an index", "an operand"])
def test_a_planted_tensor_of_the_cpu_is_found(kind, photos, tmp_path, monkeypatch):
    def to_device(batch, device, original=engine_finetune.to_device):
        inputs, labels = original(batch, device)
        if kind == "an index":
            return inputs[torch.arange(len(inputs))], labels
        return inputs * torch.ones(len(inputs), 1, 1, 1), labels

    monkeypatch.setattr(engine_finetune, "to_device", to_device)
    if kind == "an index":
        waits = run(main_linprobe, photos, tmp_path, *VIT)
        assert ("an index on the CPU", "engine_finetune.py:train_one_epoch") in waits
    else:
        with pytest.raises(RuntimeError, match="on the same device"):
            run(main_linprobe, photos, tmp_path, *VIT)
