"""The exported encoder in timm's own ViT."""

import json

import pytest
import timm
import torch
from conftest import fill, run_main, the_error

from model_mae import MODELS, mae_vit_tiny_patch4
from model_vit import build_probe, vit_tiny_patch4
from util import export
from util.args import linprobe_parser
from util.run.checkpoint import load_published, save
from util.weights import load_encoder


def exported(model, tmp_path, capsys) -> tuple[torch.nn.Module, str]:
    """What timm makes of a model's checkpoint, by the call that the export prints."""
    save({"model": model.state_dict(), "epoch": 0}, tmp_path / "c.pth")
    out = tmp_path / "made/vit.safetensors"
    assert run_main(export, "--checkpoint", tmp_path / "c.pth", "--out", out) == 0
    call = capsys.readouterr().out.split("load with ")[1].split(", on images")[0]
    return eval(call, {"timm": timm}).eval(), call


def probe(model: str, size: int, *flags: str):
    args = ["--data_path", "x", "--model", model, "--input_size", str(size), *flags]
    return build_probe(linprobe_parser().parse_args(args), num_classes=3)


@pytest.mark.parametrize("size", ["tiny"])
def test_loads_strictly_into_timm_with_equal_features(size, tmp_path, capsys):
    torch.manual_seed(0)
    model = MODELS[f"mae_vit_{size}_patch16"]()
    torch.nn.init.normal_(model.norm.weight)
    theirs, call = exported(model, tmp_path, capsys)
    path = tmp_path / "made/vit.safetensors"
    assert call == (
        f"timm.create_model('vit_{size}_patch16_224', num_classes=0, checkpoint_path='{path}')"
    )
    images = fill((1, 3, 224, 224), 5, 1.5)
    ours = probe(f"vit_{size}_patch16", 224)
    load_encoder(ours, model.state_dict(), "x")
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours.features(images), rtol=0, atol=1e-5)

    pooled = timm.create_model(
        f"vit_{size}_patch16_224", num_classes=0, global_pool="avg", fc_norm=False,
        checkpoint_path=path,
    ).eval()  # fmt: skip
    ours = probe(f"vit_{size}_patch16", 224, "--global_pool")
    load_encoder(ours, model.state_dict(), "x")
    with torch.no_grad():
        torch.testing.assert_close(pooled(images), ours.features(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("global_pool", [False, True])
def test_fine_tuned_and_probed_checkpoints(global_pool, tmp_path, capsys):
    torch.manual_seed(0)
    images = fill((2, 3, 16, 16), 5, 1.5)
    tuned = vit_tiny_patch4(img_size=16, num_classes=3, global_pool=global_pool).eval()
    theirs, call = exported(tuned, tmp_path, capsys)
    assert "patch_size=4, img_size=16" in call
    assert ("global_pool='avg'" in call) == global_pool
    torch.testing.assert_close(theirs(images), tuned.features(images), rtol=0, atol=1e-5)

    probed = probe("vit_tiny_patch4", 16)
    theirs, _ = exported(probed, tmp_path, capsys)
    torch.testing.assert_close(theirs(images), probed.features(images), rtol=0, atol=1e-5)


def test_a_size_that_timm_does_not_have(tmp_path, capsys):
    model = probe("vit_nano_patch4", 16)
    theirs, call = exported(model, tmp_path, capsys)
    assert "'vit_tiny_patch16_224', num_classes=0, patch_size=4, embed_dim=96, depth=4" in call
    images = fill((2, 3, 16, 16), 5, 1.5)
    torch.testing.assert_close(theirs(images), model.features(images), rtol=0, atol=1e-5)


def _headless(weights):
    del weights["norm.weight"]


def _placeless(weights):
    del weights["pos_embed"]


def _other_width(weights):
    weights["patch_embed.proj.weight"] = torch.zeros(100, 3, 4, 4)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_headless, "it has no norm.weight"),
        (_placeless, "has no usable pos_embed"),
        (_other_width, "an unknown size: width 100, depth 12"),
        (dict.clear, "holds no encoder"),
    ],
)
def test_what_is_no_encoder_is_refused(spoil, words, tmp_path, capsys):
    weights = dict(mae_vit_tiny_patch4(img_size=8).state_dict())
    spoil(weights)
    save({"model": weights}, tmp_path / "c.pth")
    out = tmp_path / "x.safetensors"
    assert run_main(export, "--checkpoint", tmp_path / "c.pth", "--out", out) == 1
    assert words in the_error(capsys.readouterr().err)
    assert not out.exists()


def test_other_suffixes_are_refused(tmp_path, capsys):
    assert run_main(export, "--checkpoint", "c.pth", "--out", tmp_path / "x.pth") == 1
    assert "must end in .safetensors" in the_error(capsys.readouterr().err)


def folder_of(state: dict, tmp_path, *flags: object):
    """What the export makes of a checkpoint, as a folder."""
    save({"epoch": 0} | state, tmp_path / "c.pth")
    words = ["--checkpoint", tmp_path / "c.pth", "--out", tmp_path / "made/vit", *flags]
    assert run_main(export, *words) == 0
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["vit"]
    return tmp_path / "made/vit"


@pytest.mark.parametrize("kind", ["pretrained", "cls", "pooled", "probe", "pooled probe"])
def test_timm_opens_the_folder_by_itself(kind, tmp_path):
    torch.manual_seed(0)
    pixels = {"in_chans": 3, "pixel_mean": [0.1, 0.2, 0.3], "pixel_std": [0.4, 0.5, 0.6]}
    state = {"args": pixels | {"resize": "crop", "global_pool": "pooled" in kind}}
    if kind == "pretrained":
        model = mae_vit_tiny_patch4(img_size=16)
    elif "probe" in kind:
        model = probe("vit_tiny_patch4", 16, *["--global_pool"] * ("pooled" in kind))
        torch.nn.init.normal_(model.head[0].running_mean)
        torch.nn.init.uniform_(model.head[0].running_var, 0.5, 2.0)
    else:
        model = vit_tiny_patch4(img_size=16, num_classes=3, global_pool=kind == "pooled")
    images = fill((2, 3, 16, 16), 5, 1.5)
    state |= {"model": model.state_dict(), "classes": ["cat", "dog", "eel"]}
    theirs = timm.create_model(f"local-dir:{folder_of(state, tmp_path)}", pretrained=True).eval()
    if kind == "pretrained":
        ours = probe("vit_tiny_patch4", 16)
        load_encoder(ours, model.state_dict(), "x")
        expected = ours.eval().features(images)
        assert theirs.num_classes == 0
    else:
        expected = model.eval()(images)
        assert theirs.pretrained_cfg["label_names"] == ["cat", "dog", "eel"]
    torch.testing.assert_close(theirs(images), expected, rtol=1e-4, atol=1e-5)
    config = timm.data.resolve_model_data_config(theirs)
    assert (list(config["mean"]), list(config["std"])) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (tuple(config["input_size"]), config["crop_pct"]) == ((3, 16, 16), 0.875)
    assert config["interpolation"] == "bicubic"


@pytest.mark.parametrize("flags", [[], ["--format", "transformers"], None])
def test_what_was_exported_is_read_again_with_its_images(flags, tmp_path):
    """A grid of 4 x 16 has as many patches as one of 8 x 8, which others' weights would have."""
    torch.manual_seed(0)
    model = mae_vit_tiny_patch4(img_size=(16, 64))
    torch.nn.init.normal_(model.pos_embed)
    args = {"input_size": [16, 64], "in_chans": 3, "resize": "pad"}
    args |= {"pixel_mean": [0.1, 0.2, 0.3], "pixel_std": [0.4, 0.5, 0.6]}
    if flags is None:
        save({"model": model.state_dict(), "args": args, "epoch": 0}, tmp_path / "c.pth")
        source = tmp_path / "vit.safetensors"
        assert run_main(export, "--checkpoint", tmp_path / "c.pth", "--out", source) == 0
    else:
        source = folder_of({"model": model.state_dict(), "args": args}, tmp_path, *flags)
    found = load_published(source)
    args.pop("resize") if flags else None  # ViTImageProcessor has none
    assert args.items() <= found["args"].items()
    ours = vit_tiny_patch4(img_size=(16, 64), num_classes=0)
    load_encoder(ours, found["model"], source, found["args"])
    torch.testing.assert_close(ours.pos_embed, model.pos_embed, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{"input_size": 224}, {"pretrained_cfg": "x"}, {}])
def test_settings_beside_weights_may_be_others(settings, tmp_path):
    folder = folder_of({"model": mae_vit_tiny_patch4(img_size=16).state_dict()}, tmp_path)
    (folder / "config.json").write_text(json.dumps(settings))
    assert load_published(folder)["args"] == {}


def test_a_slash_at_the_end_of_a_folder_s_name(tmp_path):
    save({"model": mae_vit_tiny_patch4(img_size=16).state_dict(), "epoch": 0}, tmp_path / "c.pth")
    out = f"{tmp_path}/vit/"
    assert run_main(export, "--checkpoint", tmp_path / "c.pth", "--out", out) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"c.pth", "vit"}


def test_what_transformers_is_not_given_is_said(tmp_path, capsys):
    state = {"model": vit_tiny_patch4(img_size=16, num_classes=3).state_dict()}
    folder_of(state, tmp_path, "--format", "transformers")
    assert "; its classifier is left out; its processor squashes" in capsys.readouterr().out


def test_transformers_opens_an_encoder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="it is needed here alone")
    torch.manual_seed(0)
    model = mae_vit_tiny_patch4(img_size=16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    folder = folder_of({"model": model.state_dict()}, tmp_path, "--format", "transformers")
    theirs = transformers.ViTModel.from_pretrained(folder).eval()
    images = fill((2, 3, 16, 16), 5, 1.5)
    ours = vit_tiny_patch4(img_size=16, num_classes=0).eval()
    load_encoder(ours, model.state_dict(), "x")
    found = theirs(images).last_hidden_state
    torch.testing.assert_close(found, ours.forward_features(images), rtol=0, atol=1e-5)


def test_transformers_opens_a_masked_autoencoder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="it is needed here alone")
    torch.manual_seed(0)
    model = mae_vit_tiny_patch4(img_size=16, noise_loss=False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    flags = {"noise_loss": False, "mask_ratio": 0.5, "norm_pix_loss": False}
    state = {"model": model.state_dict(), "args": flags}
    folder = folder_of(state, tmp_path, "--format", "transformers")
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
    images = fill((2, 3, 16, 16), 5, 1.5)
    noise = torch.rand(2, 16)
    original, torch.rand = torch.rand, lambda *a, **k: noise.clone()
    try:
        ours = model(images, mask_ratio=0.5)
    finally:
        torch.rand = original
    found = theirs(images, noise=noise)
    torch.testing.assert_close(found.mask, ours["mask"])
    torch.testing.assert_close(found.logits, ours["pred"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["encoder", "probe"])
def test_onnxruntime_runs_batches_of_any_size(kind, tmp_path, capsys):
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="it is optional, and needed here alone")
    import onnxruntime

    torch.manual_seed(0)
    model = probe("vit_nano_patch4", 16).eval()
    torch.nn.init.normal_(model.head[0].running_mean)
    torch.nn.init.uniform_(model.head[0].running_var, 0.5, 2.0)
    weights = model.state_dict()
    if kind == "encoder":
        weights = {name: t for name, t in weights.items() if not name.startswith("head.")}
    save({"model": weights, "epoch": 0}, tmp_path / "c.pth")
    out = tmp_path / "made/vit.onnx"
    status = run_main(export, "--checkpoint", tmp_path / "c.pth", "--out", out)
    if torch.torch_version.TorchVersion(torch.__version__) < (2, 7):
        assert status == 1
        assert "exports one batch size: update it" in capsys.readouterr().err
        return
    assert status == 0
    name = {"encoder": "embedding", "probe": "logits"}[kind]
    assert f"images -> {name}" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["vit.onnx"]
    session = onnxruntime.InferenceSession(out)
    for size in (1, 5):
        images = fill((size, 3, 16, 16), 5, 1.5)
        (found,) = session.run([name], {"images": images.numpy()})
        expected = model(images) if kind == "probe" else model.features(images)
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out", "a.safetensors", "--format", "transformers"], "writes a folder"),
        (["--out", "FULL"], "is not empty"),
    ],
)
def test_what_cannot_be_written_is_one_line(flags, words, tmp_path, capsys):
    save({"model": mae_vit_tiny_patch4(img_size=16).state_dict(), "epoch": 0}, tmp_path / "c.pth")
    flags = [tmp_path if word == "FULL" else word for word in flags]
    assert run_main(export, "--checkpoint", tmp_path / "c.pth", *flags) == 1
    assert words in the_error(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]
