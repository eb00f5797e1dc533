"""The objectives: which parts of the model each one runs and trains, and how its terms add up."""

import pytest
import torch
from conftest import objective, small_mae

from engine_pretrain import total_loss


def test_total_is_the_documented_weighted_sum():
    parts = {name: torch.tensor(v) for name, v in [("reconstruction", 2.0), ("noise", 3.0)]}
    losses = total_loss(parts, objective())
    assert losses["loss"].item() == pytest.approx(0.679 * 2 + 0.291 * 3)


def test_mae_objective_runs_neither_projector_nor_gather(monkeypatch):
    def never(*_):
        raise AssertionError("the MAE baseline must not contrast")

    monkeypatch.setattr("loss_contrastive.gather_with_grad", never)
    monkeypatch.setattr("engine_pretrain.nt_xent", never)
    model = small_mae(noise_loss=False, contrastive=False)
    model.projection_head.register_forward_hook(never)
    model.noise_pe_mlp.register_forward_hook(never)
    parts = model(torch.randn(4, 3, 32, 32), 0.75)
    losses = total_loss(parts, objective(weight_simclr=0.0, weight_mae=1.0, noise_loss=False))
    assert sorted(losses) == ["loss", "reconstruction"]
    assert losses["loss"] == losses["reconstruction"]


def test_simclr_objective_runs_no_decoder():
    model = small_mae(noise_loss=False, reconstruct=False)
    parts = model(torch.randn(4, 3, 32, 32), 0.0)
    assert sorted(parts) == ["embedding", "mask"]


@pytest.mark.parametrize(
    ("kwargs", "frozen"),
    [
        ({}, set()),
        ({"noise_loss": False}, {"noise_pe_mlp"}),
        ({"noise_loss": False, "contrastive": False}, {"noise_pe_mlp", "projection_head"}),
        (
            {"reconstruct": False},
            {"noise_pe_mlp", "mask_token", "decoder_embed", "decoder_blocks", "decoder_norm",
             "decoder_pred"},
        ),
    ],
    ids=["CAN", "no noise", "MAE", "SimCLR"],
)  # fmt: skip
def test_exactly_the_trained_parameters_get_gradients(kwargs, frozen):
    model = small_mae(**kwargs)
    mask_ratio = 0.5 if model.reconstruct else 0.0
    weights = {"weight_simclr": 0.03 * model.contrastive, "weight_mae": 0.97 * model.reconstruct}
    total_loss(model(torch.randn(4, 3, 32, 32), mask_ratio), objective(**weights))[
        "loss"
    ].backward()
    without = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert without == frozen | {"pos_embed", "decoder_pos_embed"}


def test_contrast_alone_tells_a_batch_of_images_apart():
    torch.manual_seed(0)
    imgs = torch.randn(8, 3, 32, 32)
    views = torch.cat([imgs, imgs]) + 0.3 * torch.randn(16, 3, 32, 32)
    model = small_mae(noise_loss=False, reconstruct=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        losses = total_loss(model(views, 0.5), objective(weight_simclr=1.0, weight_mae=0.0))
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses["contrastive"] < 0.5  # chance is log 15 = 2.7
    assert losses["contrastive_top1"] > 0.8
