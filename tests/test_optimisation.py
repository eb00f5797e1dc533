"""LARS and layer-wise learning rates against values computed with MAE's code."""

import pytest
import torch
from conftest import fill

from model_vit import VisionTransformer
from util.lars import LARS
from util.lr_decay import param_groups_lrd


def test_lars_equals_the_reference():
    """lr 0.5, weight decay 0.01, three steps."""
    weight = torch.nn.Parameter(fill((4, 3), 1, 1.0))
    bias = torch.nn.Parameter(fill((4,), 2, 1.0))
    optimizer = LARS([weight, bias], lr=0.5, weight_decay=0.01)
    for step in range(3):
        weight.grad, bias.grad = fill((4, 3), step + 4, 1.0), fill((4,), step + 8, 1.0)
        optimizer.step()
    expected = [
        0.985115647315979, 0.6135504841804504, -0.07787008583545685, -0.7294459939002991,
        -1.000415325164795, -0.7472327947616577, -0.10227984935045242, 0.5948562026023865,
        0.9804993867874146, 0.8541535139083862, 0.282700777053833, -0.440731942653656,
    ]  # fmt: skip
    assert weight.flatten().tolist() == pytest.approx(expected, abs=2e-6)
    expected = [0.6860759258270264, -1.1232389211654663, -0.5818943381309509, -0.21909436583518982]
    assert bias.tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(("weight", "grad", "after"), [(0.0, 2.0, -1.0), (3.0, 0.0, 3.0)])
def test_lars_where_a_norm_is_zero_is_plain_momentum(weight, grad, after):
    parameter = torch.nn.Parameter(torch.full((2, 2), weight))
    parameter.grad = torch.full((2, 2), grad)
    LARS([parameter], lr=0.5).step()
    assert parameter.flatten().tolist() == [after] * 4


def test_layer_decay_groups_equal_the_reference():
    """Depth 3, decay 0.75: 0.75^4 at the stem, 1 at the head; no weight decay in one dimension."""
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=12, depth=3, num_heads=2, num_classes=4
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_lrd(model, 0.05, model.no_weight_decay(), 0.75)
    found = {
        (group["lr_scale"], group["weight_decay"]): {names[id(p)] for p in group["params"]}
        for group in groups
    }
    expected = {
        (0.31640625, 0.0): {"cls_token", "patch_embed.proj.bias", "pos_embed"},
        (0.31640625, 0.05): {"patch_embed.proj.weight"},
        (1.0, 0.0): {"head.bias", "norm.bias", "norm.weight"},
        (1.0, 0.05): {"head.weight"},
    }
    for i, scale in enumerate([0.421875, 0.5625, 0.75]):
        weights = {f"blocks.{i}.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1")}
        weights.add(f"blocks.{i}.mlp.fc2.weight")
        norms = {f"blocks.{i}.norm{k}.{kind}" for k in (1, 2) for kind in ("weight", "bias")}
        expected[scale, 0.05] = weights
        expected[scale, 0.0] = norms | {name.replace("weight", "bias") for name in weights}
    assert found == expected
    assert len(groups) == len(expected)
