"""Probing and fine-tuning from flags to files."""

import random
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, VIT, at_step, log_of, losses_of, run_main, state_of, the_error
from PIL import Image
from torchvision.transforms import Compose

import main_finetune
import main_linprobe
import main_pretrain
import model_mae
from util.data.pixels import Pixels
from util.data.transforms import eval_transform_of
from util.datasets import build_transform, open_labelled
from util.run import checkpoint

MIXES = ["--mixup", 0.8, "--cutmix", 1.0]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint as pretraining writes it, of an encoder that has learnt nothing."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint-49.pth"
    checkpoint.save(
        {"model": model_mae.mae_vit_nano_patch4(img_size=8).state_dict(), "epoch": 49}, path
    )
    return path


@pytest.fixture
def flags(photos, pretrained, tmp_path):
    """48 images of two classes to train on, in three steps an epoch, and 16 to validate."""
    data = ["--data_path", photos, *VIT, "--batch_size", 16, "--warmup_epochs", 1]
    return [*data, "--finetune", pretrained, "--output_dir", tmp_path / "out"]


def same_tensors(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("extra", [[], ["--cache_features"], ["--global_pool"]], ids=str)
def test_probing_leaves_the_encoder_bit_identical(extra, flags, pretrained, tmp_path):
    assert run_main(main_linprobe, *flags, "--epochs", 2, *extra) == 0
    before = torch.load(pretrained, weights_only=True)["model"]
    after = state_of(tmp_path / "out")["model"]
    head = {name for name in after if name.startswith("head.")}
    assert head == {"head.1.weight", "head.1.bias"} | {
        f"head.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    encoder = after.keys() - head
    assert same_tensors({k: after[k] for k in encoder}, {k: before[k] for k in encoder})
    assert after["head.0.num_batches_tracked"] == 2 * 3


def test_cached_features_train_as_images_do_where_these_are_not_augmented(
    flags, tmp_path, monkeypatch
):
    def unchanged(args):
        """Evaluation's, normalised by the loader as the probe's crops are."""
        return Compose([*eval_transform_of(args).transforms[:-1], Pixels.of(args).as_tensor])

    monkeypatch.setattr(main_linprobe, "probe_transform_of", unchanged)
    flags += ["--epochs", 3, "--precision", "fp32", "--blr", 10]
    assert run_main(main_linprobe, *flags) == 0
    assert run_main(main_linprobe, *flags, "--cache_features", "--output_dir", tmp_path / "c") == 0
    images, cached = (state_of(tmp_path / name)["model"] for name in ("out", "c"))
    for name, tensor in images.items():
        torch.testing.assert_close(cached[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("script", "extra"),
    [
        (main_linprobe, []),
        (main_linprobe, ["--cache_features"]),
        (main_finetune, [*MIXES, "--drop_path", 0.3, "--clip_grad", 1]),
    ],
    ids=["probe", "cached", "finetune"],
)
def test_a_signal_within_an_epoch_loses_nothing(script, extra, flags, tmp_path, monkeypatch):
    """Every epoch has three steps of two batches; the signal comes in the second's second step."""
    flags += ["--epochs", 3, "--batch_size", 8, "--accum_iter", 2, *extra]
    assert run_main(script, *flags) == 0

    again = [*flags, "--output_dir", tmp_path / "again", "--resume", "auto"]
    with monkeypatch.context() as patch:
        at_step(patch, 1, 3, lambda: signal.raise_signal(signal.SIGTERM))
        assert run_main(script, *again) == 128 + signal.SIGTERM
    assert run_main(script, *again) == 0
    for name in ("last", "best"):
        whole, parts = (state_of(tmp_path / folder, name) for folder in ("out", "again"))
        assert same_tensors(whole["model"], parts["model"])
        assert whole["best"] == parts["best"]
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "again")


@pytest.mark.parametrize(
    "extra", [[], ["--blr", "auto"], ["--blr", "auto", "--input_size", 8, 32]], ids=str
)
def test_what_is_resumed_needs_no_weights_to_start_from(extra, flags, pretrained, tmp_path):
    copy = shutil.copy(pretrained, tmp_path / "start.pth")
    flags = [*flags, *extra, "--finetune", copy]
    assert run_main(main_linprobe, *flags, "--epochs", 2, "--output_dir", tmp_path / "whole") == 0
    assert run_main(main_linprobe, *flags, "--epochs", 1) == 0
    copy.unlink()
    assert run_main(main_linprobe, *flags, "--epochs", 2, "--resume", "auto") == 0
    whole, parts = (state_of(tmp_path / name)["model"] for name in ("whole", "out"))
    encoder = [name for name in whole if not name.startswith("head.")]
    assert all(torch.equal(whole[name], parts[name]) for name in encoder)
    if extra:  # features are made anew
        torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_an_encoder_that_pools_before_its_norm_is_probed(flags, tmp_path, capsys):
    """As fine-tuning leaves it."""
    assert run_main(main_finetune, *flags, "--epochs", 1) == 0
    flags += ["--finetune", tmp_path / "out/checkpoint-last.pth", "--output_dir", ""]
    assert run_main(main_linprobe, *flags, "--epochs", 1) == 0
    assert "not used: classifier (2), fc_norm (2); new: head, norm" in capsys.readouterr().out


@pytest.mark.parametrize("script", [main_linprobe, main_finetune])
def test_best_checkpoint_evaluates_to_the_best_accuracy_logged(script, flags, tmp_path, capsys):
    extra = ["--epochs", 4, "--blr", 1e-2 if script is main_finetune else 50]
    assert run_main(script, *flags, *extra) == 0
    log = log_of(tmp_path / "out")
    assert all("test_acc5" not in line for line in log)  # two classes
    best = max(log, key=lambda line: line["test_acc1"])
    state = state_of(tmp_path / "out", "best")
    assert state["epoch"] == best["epoch"]
    capsys.readouterr()
    weights = ["--eval", "--resume", tmp_path / "out/checkpoint-best.pth", "--output_dir", ""]
    assert run_main(script, *flags, *weights) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    balanced = f"balanced {best['test_balanced']:.2f} %"
    assert f"top-1 {best['test_acc1']:.2f} %, {balanced}, loss {best['test_loss']:.4f}" in line


def test_knn_in_pretraining_equals_that_of_its_checkpoint(photos, tmp_path, capsys):
    fp32 = ["--data_path", photos, "--precision", "fp32", *VIT[2:], "--output_dir", tmp_path]
    mae = ["--model", "mae_vit_nano_patch4", "--batch_size", 16, "--epochs", 3, "--blr", 0.01]
    assert run_main(main_pretrain, *fp32, *mae, "--eval_freq", 2) == 0
    accuracies = [line.get("knn_acc1") for line in log_of(tmp_path)]
    assert accuracies[0] is None
    assert accuracies[1] is not None
    capsys.readouterr()
    knn = ["--model", "vit_nano_patch4", "--knn", "--finetune", tmp_path / "checkpoint-last.pth"]
    assert run_main(main_linprobe, *fp32, *knn) == 0
    assert f"kNN top-1 {accuracies[-1]:.2f} %" in capsys.readouterr().out


def test_knn_does_not_disturb_pretraining(photos, tmp_path):
    flags = ["--data_path", photos, *TINY, "--batch_size", 16]
    for name, extra in {"without": [], "with": ["--eval_freq", 1]}.items():
        folder = ["--output_dir", tmp_path / name]
        assert run_main(main_pretrain, *flags, "--epochs", 2, *folder, *extra) == 0
    without, with_knn = (state_of(tmp_path / name)["model"] for name in ("without", "with"))
    assert same_tensors(without, with_knn)


def test_every_augmentation_and_regulariser_runs(flags, tmp_path):
    extra = ["--epochs", 1, *MIXES, "--mixup_mode", "elem", "--cutmix_minmax", 0.2, 0.8]
    extra += ["--reprob", 1, "--remode", "rand", "--recount", 2, "--drop_path", 0.5, "--cls_token"]
    extra += ["--aa", "", "--color_jitter", 0.4, "--layer_decay", 0.65, "--input_size", 12]
    assert run_main(main_finetune, *flags, *extra) == 0
    assert state_of(tmp_path / "out")["model"]["pos_embed"].shape[1] == 1 + 9


@pytest.mark.parametrize("policy", ["rand-m10-mstd0.5-inc1", "rand-m0", "augmix-m10", "v0"])
def test_policies_work_at_the_ends_of_their_scales(policy):
    """timm asks for 0 bits of colour there, which Pillow refuses."""
    flags = ["--data_path", "x", "--model", "vit_nano_patch4", "--input_size", "8", "--aa", policy]
    transform = build_transform(True, main_finetune.get_args_parser().parse_args(flags))
    image = Image.fromarray(np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3))
    random.seed(0)
    assert all(transform(image).isfinite().all() for _ in range(200))


def test_clipping_bounds_the_step(flags, tmp_path, monkeypatch):
    norms = []

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(torch.nn.utils.get_total_norm(gradients).item())
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    for limit in ([], ["--clip_grad", 0.01]):
        assert run_main(main_finetune, *flags, "--epochs", 1, "--overwrite", *limit) == 0
    assert min(norms[:3]) > 0.02
    assert max(norms[3:]) == pytest.approx(0.01, rel=1e-3)


def test_two_processes_probe_and_share_the_evaluation(flags, forks, tmp_path, capsys):
    """15 validation images for two processes: the summary is that of one."""
    data = tmp_path / "data"
    shutil.copytree(flags[1], data)
    next((data / "val").rglob("*.jpg")).unlink()
    flags[1] = data
    words = [*flags, "--epochs", 1, "--dist_eval"]
    status, _, said = forks.run("main_linprobe", *words, cwd=tmp_path, processes=2)
    assert status == 0, said
    (line,) = log_of(tmp_path / "out")
    assert run_main(
        main_linprobe, *flags, "--eval", "--resume", tmp_path / "out/checkpoint-last.pth"
    ) == 0  # fmt: skip
    balanced = f"balanced {line['test_balanced']:.2f} %"
    shown = f"top-1 {line['test_acc1']:.2f} %, {balanced}, loss {line['test_loss']:.4f}"
    assert shown in capsys.readouterr().out


def test_val_fraction_splits_every_class_and_loses_nothing(photos):
    train, val, classes = open_labelled(str(photos), val_fraction=0.25)
    assert classes == 2
    assert sorted([*train.indices, *val.indices]) == list(range(48))
    assert np.bincount(val.targets).tolist() == [6, 6]
    assert val.name(3) == val.dataset.name(val.indices[3])
    again = open_labelled(str(photos), val_fraction=0.25)[1]
    assert again.indices.tolist() == val.indices.tolist()


def _without_val(root):
    shutil.rmtree(root / "val")


def _other_classes(root):
    (root / "val/flower").rename(root / "val/flour")


def _one_class(root):
    for part in ("train", "val"):
        shutil.rmtree(root / part / "flower")


@pytest.mark.parametrize("script", [main_linprobe, main_finetune])
@pytest.mark.parametrize(
    ("spoil", "extra", "words"),
    [
        (_without_val, [], ["none of val/, valid/, validation/, test/", "--val_fraction"]),
        (_other_classes, [], ["same classes", "flour, flower"]),
        (_one_class, [], ["no classes to tell apart"]),
        (None, ["--nb_classes", 10], ["--nb_classes 10", "has 2 classes"]),
        (None, ["--finetune", "nowhere.pth"], ["no checkpoint at nowhere.pth"]),
        (None, ["--finetune", "README.md"], ["README.md"]),
        (None, ["--model", "vit_small_patch16", "--input_size", 32], ["another architecture"]),
        (None, ["--patch_size", 2], ["another architecture", "; --patch_size 4 takes them"]),
        (None, ["--eval", "--resume", "PRETRAINED"], ["another architecture", "it has no"]),
        (None, ["--resume", "PRETRAINED"], ["it has no", "--finetune, start from weights alone"]),
    ],
    ids=["val", "classes", "one", "count", "missing", "file", "size", "patch", "eval", "resume"],
)
def test_bad_input_is_one_line(script, spoil, extra, words, flags, pretrained, tmp_path, capsys):
    if spoil:
        shutil.copytree(flags[1], tmp_path / "data")
        flags[1] = tmp_path / "data"
        spoil(flags[1])
    extra = [pretrained if word == "PRETRAINED" else word for word in extra]
    assert run_main(script, *flags, *extra) == 1
    line = the_error(capsys.readouterr().err)
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_unknown_augmentation_policies_are_refused(flags, capsys):
    assert run_main(main_finetune, *flags, "--aa", "rand-x9") == 2
    assert "--aa 'rand-x9'" in the_error(capsys.readouterr().err)


def test_knn_in_pretraining_needs_labels(photos, tmp_path, capsys):
    flags = ["--data_path", photos / "train/china", *TINY]
    assert run_main(main_pretrain, *flags, "--eval_freq", 1, "--output_dir", tmp_path) == 1
    assert "no classes to tell apart" in the_error(capsys.readouterr().err)


def last_top1(capsys) -> float:
    return float(re.findall(r": top-1 ([\d.]+) %", capsys.readouterr().out)[-1])


DIGITS = ["--data_path", "digits", "--input_size", 16, "--num_workers", 0, "--device", "cpu"]


def test_fine_tuning_learns_digits(capsys):
    """From scratch, in two epochs of crops and flips that spoil digits; 10 % is chance."""
    flags = [*DIGITS, "--model", "vit_nano_patch4", "--output_dir", ""]
    recipe = ["--epochs", 3, "--warmup_epochs", 1, "--blr", 8e-3, "--layer_decay", 1, "--aa", ""]
    assert run_main(main_finetune, *flags, *recipe, "--reprob", 0, "--precision", "fp32") == 0
    assert last_top1(capsys) > 20


@pytest.mark.parametrize(("blr", "warned"), [("1", False), ("3000", True)])
def test_a_probe_that_ends_worse_than_guessing_is_pointed_out(blr, warned, capsys):
    """With LARS weights grow without limit where the rate is too high, and accuracy says little."""
    flags = [*DIGITS, "--model", "vit_nano_patch4", "--output_dir", "", "--cache_features"]
    recipe = ["--batch_size", 64, "--epochs", 6, "--warmup_epochs", 1, "--blr", blr]
    assert run_main(main_linprobe, *flags, *recipe) == 0
    words = "is worse than that of guessing, 2.303: the learning rate"
    assert (words in capsys.readouterr().out) == warned


def test_an_epoch_whose_steps_are_all_skipped_ends_well(flags, monkeypatch):
    def cross_entropy(*args, original=F.cross_entropy, **kwargs):
        return original(*args, **kwargs) * float("nan")

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    assert run_main(main_finetune, *flags, "--epochs", 1, "--skip_nonfinite", 9) == 0
