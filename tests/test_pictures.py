"""Pictures of what an encoder learnt; what they show is computed another way here."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import run_main, the_error
from PIL import Image

import main_pretrain
from util import pictures, visualize
from util.encoders import Encoder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "timm.pth"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def encoder(weights) -> Encoder:
    return Encoder({"model": torch.load(weights)}, "x")


def test_neighbours_are_the_most_similar_others():
    features = np.random.default_rng(0).normal(size=(30, 5))
    found = pictures.neighbours(torch.from_numpy(features), [3, 17])
    for query, near in zip((3, 17), found, strict=True):
        angles = [
            np.dot(features[query], other) / np.linalg.norm(other) if i != query else -np.inf
            for i, other in enumerate(features)
        ]
        assert near == np.argsort(angles)[::-1][:8].tolist()


def test_attention_is_that_of_the_last_block(encoder):
    imgs = torch.randn(2, 3, 64, 64)
    found = pictures.attentions(encoder, imgs)
    assert found.shape == (2, 3, 4, 4)
    attn = encoder.vit.blocks[-1].attn
    seen = {}
    attn.fused_attn = False  # then it computes the matrix
    hook = attn.attn_drop.register_forward_hook(lambda _, __, output: seen.update(matrix=output))
    encoder.tokens(imgs)
    hook.remove()
    expected = seen["matrix"][:, :, 0, 1:]
    expected = expected / expected.amax(dim=-1, keepdim=True)
    torch.testing.assert_close(found.flatten(2), expected.detach(), rtol=1e-4, atol=1e-5)


def test_components_are_the_principal_ones(encoder):
    imgs = torch.randn(3, 3, 64, 64)
    found = np.stack([np.asarray(one) for one in pictures.components(encoder, imgs)])
    assert found.shape == (3, 4, 4, 3)
    with torch.no_grad():
        patches = encoder.tokens(imgs)[:, 1:].double()
    centred = (patches - patches.mean(dim=0)).flatten(0, 1)  # without what a place has
    first = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    expected = (centred @ first).numpy()
    shown = found.reshape(-1, 3)[:, 0].astype(float)
    inside = (shown > 0) & (shown < 255)
    assert abs(np.corrcoef(expected[inside], shown[inside])[0, 1]) > 0.99


@pytest.mark.parametrize(
    ("what", "words", "columns", "rows"),
    [
        ("neighbours", "4 images, and the nearest of 24 by the mean over patches", 9, 4),
        ("pca", "4 images; colours", 4, 2),
        ("attention", "4 images; where the cls token", 4, 4),
    ],
)
def test_pictures_are_drawn(what, words, columns, rows, weights, photos, tmp_path, capsys):
    out = tmp_path / f"new/{what}.png"
    flags = ["--what", what, "--checkpoint", weights, "--data_path", photos, "--out", out]
    assert run_main(visualize, *flags, "--images", 4, "--among", 24) == 0
    assert words in capsys.readouterr().out
    width, height = Image.open(out).size
    step = pictures.TILE + pictures.GAP
    assert (width - pictures.GAP, height // step) == (columns * step, rows)


def test_curves_of_runs(flags, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="it is optional")
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        assert run_main(main_pretrain, *flags, "--epochs", 2, "--output_dir", run) == 0
    out = tmp_path / "curves.png"
    assert run_main(visualize, "--what", "curves", "--runs", *runs, "--out", out) == 0
    assert "4 curves of 2 runs" in capsys.readouterr().out
    assert Image.open(out).width > 500
    (tmp_path / "c").mkdir()
    (tmp_path / "c/log.txt").write_text('{"epoch": 0}\n')
    for folder, words in (("c", "holds no epoch"), ("d", "cannot read")):
        assert run_main(visualize, "--what", "curves", "--runs", tmp_path / folder) == 1
        assert words in the_error(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--what", "pca"], "required: --checkpoint, --data_path"),
        (["--what", "curves"], "required: --runs"),
    ],
)
def test_missing_flags_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        visualize.get_args_parser().parse_args(flags)
    assert end.value.code == 2
    assert words in the_error(capsys.readouterr().err)


def test_a_picture_of_no_known_format_is_one_line(weights, photos, tmp_path, capsys):
    flags = ["--what", "pca", "--checkpoint", weights, "--data_path", photos]
    assert run_main(visualize, *flags, "--out", tmp_path / "a.xyz", "--images", 2) == 1
    assert "the name must end as a picture's, such as .png" in the_error(capsys.readouterr().err)
