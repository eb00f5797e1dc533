"""Encoders in the layouts that others publish compute what the libraries that made them compute."""

from pathlib import Path

import pytest
import timm
import torch
from conftest import run_main, state_of, the_error

import main_pretrain
from model_mae import mae_vit_tiny_patch16
from model_vit import MODELS
from util.errors import UserError
from util.layouts import from_hugging_face, to_hugging_face
from util.run.checkpoint import load_published
from util.weights import load_encoder, start_from

IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def timms(**kwargs) -> torch.nn.Module:
    torch.manual_seed(5)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs).eval()
    for parameter in model.parameters():  # timm's start has zeros, which hide a mix-up
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def beside(weights: dict, prefix: str) -> dict:
    """Another encoder, which is not to be taken, and a head."""
    others = {f"{prefix}{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    return others | {"head.mlp.0.weight": torch.zeros(2, 2)}


def below(weights: dict, prefix: str) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


LAYOUTS = {
    "timm": lambda w: w,
    "DDP and compile": lambda w: {"model": below(w, "module._orig_mod.")},
    "DINO": lambda w: {"student": below(w, "module.backbone."), "epoch": 1,
                       "teacher": below(w, "backbone.") | {"head.mlp.weight": torch.zeros(2, 2)}},
    "MoCo v3": lambda w: {"state_dict": below(w, "module.base_encoder.")
                          | beside(w, "module.momentum_encoder."), "arch": "vit"},
    "Lightning": lambda w: {"state_dict": below(w, "backbone.") | beside(w, "teacher_backbone."),
                            "hyper_parameters": {"a": 1}},
    "solo-learn": lambda w: {"state_dict": below(w, "backbone.") | beside(w, "momentum_backbone.")},
    "timm's training": lambda w: {"state_dict": w, "state_dict_ema": beside(w, ""), "version": 2},
    "only the average": lambda w: {"model_ema": w},
}  # fmt: skip


def features(path: Path) -> torch.Tensor:
    model = MODELS["vit_tiny_patch16"](num_classes=3)
    load_encoder(model, load_published(path)["model"], path)
    with torch.no_grad():
        return model.eval().forward_features(IMAGES)


@pytest.mark.parametrize("name", LAYOUTS)
def test_features_are_timm_s(name, tmp_path):
    model = timms()
    torch.save(LAYOUTS[name](model.state_dict()), tmp_path / "a.pth")
    with torch.no_grad():
        torch.testing.assert_close(features(tmp_path / "a.pth"), model.forward_features(IMAGES))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="it is needed here alone")
    root = tmp_path_factory.mktemp("hf")
    sizes = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 768, "image_size": 224, "patch_size": 16}
    decoder = {"decoder_hidden_size": 128, "decoder_num_hidden_layers": 1}
    decoder |= {"decoder_num_attention_heads": 4, "decoder_intermediate_size": 512}
    torch.manual_seed(6)
    models = {
        "ViTModel": transformers.ViTModel(transformers.ViTConfig(**sizes)),
        "ViTForImageClassification": transformers.ViTForImageClassification(
            transformers.ViTConfig(**sizes, num_labels=4)
        ),
        "ViTMAEModel": transformers.ViTMAEModel(transformers.ViTMAEConfig(**sizes, mask_ratio=0.0)),
        "ViTMAEForPreTraining": transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(**sizes, **decoder)
        ),
    }
    for name, model in models.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        model.eval().save_pretrained(root / name)
        torch.save(model.state_dict(), root / f"{name}.bin")
    return root, models


@pytest.mark.parametrize("suffix", ["", "/model.safetensors", ".bin"])
@pytest.mark.parametrize(
    "name", ["ViTModel", "ViTForImageClassification", "ViTMAEModel", "ViTMAEForPreTraining"]
)
def test_features_are_hugging_face_s(name, suffix, hugging_face):
    root, models = hugging_face
    path = Path(f"{root / name}{suffix}")
    weights = load_published(path)["model"]
    model = timm.models.VisionTransformer(embed_dim=192, depth=2, num_heads=3, num_classes=0)
    for block in model.modules():
        if isinstance(block, torch.nn.LayerNorm):
            block.eps = 1e-12  # theirs
    theirs = models[name]
    inner = getattr(theirs, "vit", theirs)
    encoder = {n: w for n, w in weights.items() if n in model.state_dict()}
    model.load_state_dict(encoder)
    with torch.no_grad():
        if "MAE" in name:
            inner.embeddings.config.mask_ratio = 0.0
            noise = torch.arange(196.0).expand(2, -1)  # keeps the patches in their order
            expected = inner(IMAGES, noise=noise).last_hidden_state
        else:
            expected = inner(IMAGES).last_hidden_state
        ours = model.eval().forward_features(IMAGES)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_decoder_of_hugging_face_s_mae_is_used(hugging_face):
    root, models = hugging_face
    weights = load_published(root / "ViTMAEForPreTraining")["model"]
    theirs = models["ViTMAEForPreTraining"].decoder.state_dict()
    assert torch.equal(weights["decoder_embed.weight"], theirs["decoder_embed.weight"])
    assert torch.equal(weights["mask_token"], theirs["mask_token"])
    assert weights["decoder_blocks.0.attn.qkv.weight"].shape == (384, 128)
    assert weights["decoder_blocks.0.mlp.fc1.weight"].shape == (512, 128)
    assert weights["decoder_pred.weight"].shape == (768, 128)


def test_names_go_there_and_back():
    weights = timms().state_dict()
    back = from_hugging_face(to_hugging_face(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: timms(init_values=1e-5).state_dict(), "has LayerScale (blocks.0.ls1.gamma)"),
        (lambda: timms(reg_tokens=2).state_dict(), "has register tokens (reg_token)"),
        (lambda: {"conv1.weight": torch.zeros(2)}, "holds no encoder: it has conv1.weight, ...; "),
        (lambda: {"state_dict": {"a": 1}}, "holds no model"),
    ],
)
def test_what_is_no_encoder_of_ours_says_so(make, words, tmp_path, flags, capsys):
    torch.save(make(), tmp_path / "a.pth")
    assert run_main(main_pretrain, *flags, "--init", tmp_path / "a.pth") == 1
    assert words in the_error(capsys.readouterr().err)


def test_a_start_takes_what_fits_and_says_it(caplog):
    weights = timms().state_dict()
    torch.manual_seed(0)
    model = mae_vit_tiny_patch16(img_size=96, in_chans=5)
    with caplog.at_level("INFO"):
        start_from(model, dict(weights), "x")
    assert torch.equal(model.blocks[3].attn.qkv.weight, weights["blocks.3.attn.qkv.weight"])
    first = weights["patch_embed.proj.weight"]
    expected = first.repeat(1, 2, 1, 1)[:, :5] * (3 / 5)  # timm's
    torch.testing.assert_close(model.patch_embed.proj.weight, expected)
    assert model.pos_embed.shape == (1, 37, 192)
    words = "150 tensors of x; not used: nothing; new: pos_embed, resized from 14 x 14 to 6 x 6"
    assert words in caplog.text
    assert "adapted from 3 channels to 5, decoder, projection head, noise cond" in caplog.text


def test_a_start_from_a_whole_model_is_that_model(caplog):
    torch.manual_seed(1)
    weights = mae_vit_tiny_patch16().state_dict()
    torch.manual_seed(2)
    model = mae_vit_tiny_patch16()
    with caplog.at_level("INFO"):
        start_from(model, dict(weights), "x")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert "new: nothing" in caplog.text


def test_a_run_starts_from_weights_and_resumes_its_own(flags, tmp_path, capsys):
    first = [*flags, "--epochs", 1, "--output_dir", tmp_path / "first"]
    assert run_main(main_pretrain, *first) == 0
    source = tmp_path / "first/checkpoint-last.pth"
    flags = [*flags, "--init", source, "--lr", 0, "--save_freq", 1]
    assert run_main(main_pretrain, *flags, "--epochs", 1) == 0
    start, end = state_of(tmp_path / "first"), state_of(tmp_path / "out")
    assert all(torch.equal(tensor, end["model"][name]) for name, tensor in start["model"].items())
    assert end["epoch"] == 0
    capsys.readouterr()
    assert run_main(main_pretrain, *flags, "--epochs", 2, "--resume", "auto") == 0
    assert "start: " not in capsys.readouterr().out


def test_whole_modules_are_not_run(tmp_path):
    torch.save(timms(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="nothing in it was run"):
        load_published(tmp_path / "a.pth")
