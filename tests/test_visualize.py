"""Reconstructions to look at: what is pasted, undone and drawn."""

import argparse

import numpy as np
import pytest
import torch
from conftest import TINY, run_main, the_error
from PIL import Image

import main_pretrain
from model_mae import mae_vit_nano_patch4
from model_vit import vit_nano_patch4
from util import visualize
from util.visualize import reconstruct, reconstruction_grid


@pytest.fixture(scope="module")
def checkpoint(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    flags = ["--data_path", photos, *TINY, "--batch_size", 16, "--epochs", 1, "--output_dir", out]
    assert run_main(main_pretrain, *flags, "--norm_pix_loss") == 0
    return out / "checkpoint-0.pth"


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_visible_patches_are_the_true_ones_and_removed_ones_predicted(norm_pix_loss):
    torch.manual_seed(0)
    model = mae_vit_nano_patch4(img_size=16, norm_pix_loss=norm_pix_loss)
    imgs = torch.randn(2, 3, 16, 16) * 0.5 + 1
    seen, result = reconstruct(model, imgs, 0.5)
    removed = model.patchify(seen).eq(0).all(-1)
    assert removed.sum(1).tolist() == [8, 8]
    true, drawn = model.patchify(imgs), model.patchify(result)
    assert torch.equal(drawn[~removed], true[~removed])
    assert not torch.isclose(drawn[removed], true[removed]).all()
    if norm_pix_loss:  # predictions come back to each patch's own brightness
        with torch.no_grad():
            model.decoder_pred.weight.zero_()
        _, flat = reconstruct(model, imgs, 0.5)
        means = true.mean(-1, keepdim=True).expand_as(true)
        torch.testing.assert_close(model.patchify(flat)[removed], means[removed])


def test_drawing_changes_neither_mode_nor_random_state():
    model = mae_vit_nano_patch4(img_size=16, noise_loss=True)
    model.train()
    before = torch.get_rng_state()
    first = reconstruction_grid(model, torch.zeros(2, 3, 16, 16), 0.5).tobytes()
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert reconstruction_grid(model, torch.zeros(2, 3, 16, 16), 0.5).tobytes() == first


def test_command_draws_a_checkpoint(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "new folder" / "grid.png"
    flags = ["--checkpoint", checkpoint, "--data_path", photos, "--out", out]
    assert run_main(visualize, *flags, "--images", 3) == 0
    image = Image.open(out)
    assert image.size == (3 * 116 + 4, 3 * 116 + 4)  # 8-pixel images, magnified to be seen
    assert len(np.unique(np.asarray(image))) > 100
    assert "3 images; rows: clean, 50% masked, reconstructed" in capsys.readouterr().out


@pytest.mark.parametrize("args", [None, argparse.Namespace(norm_pix_loss=True, mask_ratio=0.75)])
def test_command_draws_mae_s_own_checkpoints(args, checkpoint, photos, tmp_path, capsys):
    """facebookresearch/mae's layout: no projection head, no noise conditioning, a Namespace."""
    weights = torch.load(checkpoint, weights_only=True)["model"]
    ours = ("projection_head.", "noise_pe_mlp.")
    state = {"model": {k: v for k, v in weights.items() if not k.startswith(ours)}}
    torch.save(state | ({"args": args} if args else {}), tmp_path / "mae.pth")
    flags = ["--checkpoint", tmp_path / "mae.pth", "--data_path", photos]
    assert run_main(visualize, *flags, "--out", tmp_path / "x.png", "--norm_pix_loss") == 0
    assert "75% masked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fc.weight": torch.zeros(3)}, "holds no encoder"),
        ({"patch_embed.proj.weight": torch.zeros(9, 3, 4, 4)}, "an unknown size: width 9, depth 0"),
        (vit_nano_patch4(img_size=8).state_dict(), "it has no decoder_pred.weight"),
    ],
)
def test_other_checkpoints_are_refused(content, message, photos, tmp_path, capsys):
    torch.save({"model": content}, tmp_path / "other.pth")
    flags = ["--checkpoint", tmp_path / "other.pth", "--data_path", photos]
    assert run_main(visualize, *flags, "--out", tmp_path / "x.png") == 1
    assert message in the_error(capsys.readouterr().err)
    assert not (tmp_path / "x.png").exists()


def test_unknown_picture_format(checkpoint, photos, tmp_path, capsys):
    flags = ["--checkpoint", checkpoint, "--data_path", photos, "--out", tmp_path / "x.foo"]
    assert run_main(visualize, *flags) == 1
    assert "the name must end as a picture's, such as .png" in the_error(capsys.readouterr().err)
