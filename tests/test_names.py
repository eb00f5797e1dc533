"""Names that code derived from MAE and the CAN release imports, and what it expects of them."""

import argparse
import importlib
import random

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from util.args import finetune_parser

NAMES = {
    "util.lars": ["LARS"],
    "util.lr_sched": ["adjust_learning_rate"],
    "util.lr_decay": ["param_groups_lrd"],
    "util.pos_embed": ["get_2d_sincos_pos_embed", "interpolate_pos_embed"],
    "util.crop": ["RandomResizedCrop"],
    "util.datasets": ["build_dataset", "build_transform"],
    "util.misc": [
        "init_distributed_mode", "get_rank", "get_world_size", "is_main_process", "MetricLogger",
    ],
    "model_mae": ["MaskedAutoencoderViT", "mae_vit_base_patch16", "mae_vit_large_patch16"],
    "model_vit": ["VisionTransformer", "vit_base_patch16", "vit_huge_patch14"],
    "loss_contrastive": ["SupConLoss"],
    "util_contrastive": ["TwoCropTransform", "GaussianBlur"],
}  # fmt: skip


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in NAMES.items() for n in names])
def test_names_stay_where_mae_has_them(module, name):
    assert callable(getattr(importlib.import_module(module), name))
    assert name.partition("vit_")[0] in (ROOT / "docs/CODE.md").read_text()


def test_a_training_loop_in_mae_s_manner(photos):
    """Its calls, in its order: data, model, layer-wise rates, schedule, steps."""
    from model_vit import vit_nano_patch4
    from util import lr_decay, lr_sched, misc
    from util.datasets import build_dataset

    flags = ["--data_path", str(photos), "--input_size", "8", "--model", "vit_nano_patch4"]
    args = finetune_parser().parse_args([*flags, "--lr", "1e-3", "--epochs", "10"])
    assert (misc.get_rank(), misc.get_world_size(), misc.is_main_process()) == (0, 1, True)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    train, val = build_dataset(is_train=True, args=args), build_dataset(is_train=False, args=args)
    assert (len(train), len(val)) == (48, 16)
    model = vit_nano_patch4(img_size=8, num_classes=2, global_pool=True, drop_path_rate=0.1)
    groups = lr_decay.param_groups_lrd(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.75
    )
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    metrics = misc.MetricLogger()
    for step, (samples, labels) in enumerate(torch.utils.data.DataLoader(train, 16)):
        lr_sched.adjust_learning_rate(optimizer, 5 + step / 3, args)
        loss = torch.nn.functional.cross_entropy(model(samples), labels)
        loss.backward()
        optimizer.step()
        metrics.update(len(samples), loss=loss.detach())
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.957e-3, rel=1e-3)  # after warm-up
    assert 0 < metrics.window()["loss"] < 5


def test_a_probe_s_crop_and_optimizer_in_mae_s_manner():
    from util.crop import RandomResizedCrop
    from util.lars import LARS

    assert RandomResizedCrop(8, interpolation=3)(Image.new("RGB", (20, 10))).size == (8, 8)
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    LARS([parameter], lr=0.1, weight_decay=0.0).step()
    assert (parameter < 1).all()


def test_positions_of_a_checkpoint_in_mae_s_manner():
    from model_vit import vit_nano_patch4
    from util.pos_embed import get_2d_sincos_pos_embed, interpolate_pos_embed

    weights = {"pos_embed": torch.randn(1, 5, 96)}
    interpolate_pos_embed(vit_nano_patch4(img_size=16), weights)
    assert weights["pos_embed"].shape == (1, 17, 96)
    assert get_2d_sincos_pos_embed(96, 4, cls_token=True).shape == (17, 96)


def test_contrast_in_the_release_s_manner():
    from loss_contrastive import SupConLoss
    from util_contrastive import GaussianBlur, TwoCropTransform

    two = TwoCropTransform(GaussianBlur([0.1, 2.0]))(Image.new("RGB", (20, 20)))
    assert [view.size for view in two] == [(20, 20), (20, 20)]
    features = torch.nn.functional.normalize(torch.randn(4, 2, 8), dim=-1)
    assert SupConLoss(temperature=0.1)(features) > 0


def test_one_process_joins_a_group_of_its_own():
    from util.misc import init_distributed_mode

    args = argparse.Namespace(
        device="cpu", dist_url="env://", world_size=1, local_rank=-1, dist_on_itp=False
    )
    try:
        assert init_distributed_mode(args) == torch.device("cpu")
    finally:
        torch.distributed.destroy_process_group()
