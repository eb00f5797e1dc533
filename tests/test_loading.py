"""Encoders from everybody's files, and what is refused."""

import argparse
import os

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import nn

from model_mae import NORM_LAYER, MaskedAutoencoderViT
from model_vit import LinearProbe, VisionTransformer
from util.errors import UserError
from util.run.checkpoint import load
from util.weights import load_encoder

ENCODER = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def pretrained(**changes: int) -> MaskedAutoencoderViT:
    torch.manual_seed(1)
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return MaskedAutoencoderViT(**ENCODER | decoder | changes, norm_layer=NORM_LAYER)


def downstream(global_pool: bool = False, **changes: int) -> VisionTransformer:
    torch.manual_seed(2)
    return VisionTransformer(**ENCODER | changes, num_classes=5, global_pool=global_pool)


def assert_loaded(model: nn.Module, weights: dict, *new: str):
    for name, tensor in model.state_dict().items():
        assert name.startswith(new) or torch.equal(tensor, weights[name]), name


def test_release_checkpoint_with_a_pickled_namespace(tmp_path, caplog):
    """The layout of the public release: `args` is a Namespace."""
    weights = pretrained().state_dict()
    release = {"model": weights, "optimizer": {}, "scaler": {}, "epoch": 49}
    release["args"] = argparse.Namespace(model="mae_vit_base_patch16", mask_ratio=0.75)
    torch.save(release, tmp_path / "checkpoint-49.pth")
    model = downstream()
    head = model.head.weight.clone()
    with caplog.at_level("INFO"):
        load_encoder(model, load(tmp_path / "checkpoint-49.pth")["model"], "checkpoint-49.pth")
    assert_loaded(model, weights, "head.")
    assert torch.equal(model.head.weight, head)
    assert "30 tensors of checkpoint-49.pth" in caplog.text
    for part in ("projection head (4)", "noise conditioning (4)", "decoder (20)", "new: head"):
        assert part in caplog.text


def test_pretrained_norm_gives_way_to_a_new_one_under_global_pool(caplog):
    """As in MAE's fine-tuning."""
    weights, model = pretrained().state_dict(), downstream(global_pool=True)
    with caplog.at_level("INFO"):
        load_encoder(model, weights, "x")
    assert_loaded(model, weights, "head.", "fc_norm.")
    assert torch.equal(model.fc_norm.weight, torch.ones(24))
    assert "norm (2)" in caplog.text
    assert "new: head, fc_norm" in caplog.text


def test_fine_tuned_checkpoint_brings_its_fc_norm():
    source = downstream(global_pool=True)
    nn.init.normal_(source.fc_norm.weight)
    model = downstream(global_pool=True)
    nn.init.normal_(model.head.weight)
    load_encoder(model, source.state_dict(), "x")
    assert_loaded(model, source.state_dict(), "head.")


def test_a_probe_of_what_was_fine_tuned_to_pool_before_its_norm_has_a_new_one():
    """The probe's BatchNorm leaves nothing of the scale and shift that it lacks."""
    weights = downstream(global_pool=True).state_dict()
    probe = LinearProbe(5, **ENCODER, global_pool=True)
    load_encoder(probe, weights, "x")
    assert (probe.norm.weight == 1).all()
    assert torch.equal(probe.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"])


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_plain_timm_weights(suffix, tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7)
    path = tmp_path / f"vit.{suffix}"
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    save(source.state_dict(), path)
    model = VisionTransformer(img_size=32, embed_dim=192, depth=2, num_heads=3, num_classes=5)
    load_encoder(model, load(path)["model"], path)
    assert_loaded(model, source.state_dict(), "head.")


def test_names_left_by_wrappers(tmp_path):
    weights = pretrained().state_dict()
    wrapped = {f"module._orig_mod.{k}": v for k, v in weights.items()}
    torch.save({"model": wrapped}, tmp_path / "x.pth")
    model = downstream()
    load_encoder(model, load(tmp_path / "x.pth")["model"], "x")
    assert_loaded(model, weights, "head.")


def test_numpy_s_numbers_beside_the_tensors(tmp_path):
    """As files have whose authors logged `best_acc` with NumPy."""
    state = {"model": pretrained().state_dict(), "best": np.float64(1.5), "curve": np.arange(3.0)}
    torch.save(state, tmp_path / "x.pth")
    found = load(tmp_path / "x.pth")
    assert found["best"] == 1.5
    assert found["curve"].tolist() == [0, 1, 2]


def test_a_flipped_bit_is_noticed(tmp_path):
    torch.save({"model": pretrained().state_dict()}, tmp_path / "x.pth")
    content = bytearray((tmp_path / "x.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged: .*data/\d+ does not have its checksum"):
        load(tmp_path / "x.pth")


def test_a_file_that_is_cut_short_says_so(tmp_path):
    torch.save({"model": pretrained().state_dict()}, tmp_path / "x.pth")
    os.truncate(tmp_path / "x.pth", 9999)
    with pytest.raises(UserError, match=r"x\.pth: it is cut short, or damaged"):
        load(tmp_path / "x.pth")


def test_from_a_url_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    path = tmp_path / "mae.pth"
    torch.save({"model": pretrained().state_dict()}, path)
    first = load(path.as_uri())["model"]
    path.unlink()
    second = load(path.as_uri())["model"]
    assert torch.equal(first["cls_token"], second["cls_token"])
    with pytest.raises(UserError, match="cannot download"):
        load((tmp_path / "other/mae.pth").as_uri())  # a namesake is not the same file


def test_a_url_whose_hash_is_wrong_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    path = tmp_path / "mae-0123abcd.pth"
    torch.save({"model": pretrained().state_dict()}, path)
    with pytest.raises(UserError, match="invalid hash"):
        load(path.as_uri())


@pytest.mark.parametrize("side", [8, 32])
def test_positions_are_resized_bicubically(side):
    weights, model = pretrained().state_dict(), downstream(img_size=side)
    load_encoder(model, weights, "x")
    grid = weights["pos_embed"][:, 1:].reshape(1, 2, 2, 24).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side // 8, side // 8), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, -1, 24)
    expected = torch.cat([weights["pos_embed"][:, :1], grid], dim=1)
    torch.testing.assert_close(model.pos_embed.data, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda w: w.pop("blocks.1.mlp.fc1.bias"), "it has no blocks.1.mlp.fc1.bias"),
        (lambda w: w.update(cls_token=torch.zeros(1, 1, 8)), "cls_token is [1, 1, 8], not"),
        (lambda w: w.update({"blocks.2.norm1.bias": torch.zeros(24)}), "unexpected tensor block"),
        (lambda w: w.update(dist_token=torch.zeros(1)), "unexpected tensor dist_token"),
        (lambda w: w.update(pos_embed=torch.zeros(1, 4, 24)), "pos_embed is [1, 4, 24], not"),
        (lambda w: w.update({"norm.bias": torch.zeros(24).long()}), "norm.bias is torch.int64"),
        (lambda w: w.update({"norm.bias": torch.zeros(24) / 0}), "non-finite values in norm.bias"),
    ],
    ids=["missing", "shape", "deeper", "unknown", "positions", "integers", "NaN"],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, line):
    weights, model = dict(pretrained().state_dict()), downstream()
    change(weights)
    before = model.cls_token.clone()
    with pytest.raises(UserError) as error:
        load_encoder(model, weights, "x.pth")
    assert line in str(error.value)
    assert "x.pth" in str(error.value)
    assert torch.equal(model.cls_token, before)


class Payload:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("key", ["args", "model"])
def test_other_classes_are_refused_and_run_nothing(key, tmp_path):
    payload = Payload()
    payload.folder = str(tmp_path / "ran")
    torch.save({"model": pretrained().state_dict()} | {key: payload}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="nothing in it was run") as error:
        load(tmp_path / "bad.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [{"optimizer": {}}, {"model": {"a": 1}}, [1, 2], {}, {"model": {1: torch.ones(1)}}],
    ids=["no model", "number", "list", "nothing", "no name"],
)
def test_files_without_a_model_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match="holds no model"):
        load(tmp_path / "x.pth")


def test_broken_safetensors_are_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot read checkpoint"):
        load(tmp_path / "x.safetensors")


def test_what_is_not_a_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path, tmp_path / "pipe.pth", "/dev/zero"):
        with pytest.raises(UserError, match="a folder or a device, not a file"):
            load(path)


def test_a_broken_download_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    path = tmp_path / "mae.pth"
    path.write_bytes(b"cut short")
    with pytest.raises(UserError, match="is not a checkpoint"):
        load(path.as_uri())
    torch.save({"model": pretrained().state_dict()}, path)
    assert "cls_token" in load(path.as_uri())["model"]
