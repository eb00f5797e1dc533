"""The downstream ViT: reference values, and the same features as pretraining's encoder."""

import pytest
import torch
from conftest import fill

from model_mae import NORM_LAYER, MaskedAutoencoderViT
from model_vit import LinearProbe, VisionTransformer
from util.weights import load_encoder

ENCODER = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
IMAGES = fill((2, 3, 32, 32), 5, 1.5)

# MAE's models_vit.py, with weights filled as below
LOGITS = {
    False: [
        [-0.4852465, 0.621353, -0.0439906, -0.5601056, 0.4738245, 0.2098708, -0.6965395,
         0.4207021, 0.2918798, -0.6059311],
        [-0.487605, 0.6336449, -0.051816, -0.5659142, 0.4864623, 0.2052088, -0.705315,
         0.4326345, 0.2907692, -0.6169433],
    ],
    True: [
        [-0.0462005, -0.0548489, 0.0268509, -0.0499325, -0.0265133, 0.0383505, -0.0447847,
         0.0071953, 0.0470045, -0.0342038],
        [-0.0488069, -0.0575574, 0.024129, -0.0525788, -0.0289972, 0.0361104, -0.0467079,
         0.0056522, 0.0458919, -0.0348495],
    ],
}  # fmt: skip


def filled(model: torch.nn.Module) -> torch.nn.Module:
    state = {}
    for k, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        state[name] = one + fill(tuple(tensor.shape), k, 0.05)
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("global_pool", [False, True], ids=["cls_token", "global_pool"])
def test_logits_equal_the_reference(global_pool):
    model = filled(VisionTransformer(**ENCODER, num_classes=10, global_pool=global_pool))
    block = ["attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2", "norm1", "norm2"]
    modules = [f"blocks.{i}.{name}" for i in range(2) for name in block]
    modules += ["head", "patch_embed.proj", "fc_norm" if global_pool else "norm"]
    names = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    assert set(model.state_dict()) == names | {"cls_token", "pos_embed"}
    torch.testing.assert_close(model(IMAGES), torch.tensor(LOGITS[global_pool]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("global_pool", [False, True], ids=["cls_token", "global_pool"])
def test_probe_sees_the_pretrained_encoder_with_its_norm(global_pool):
    """Pooling averages the patches after the pretrained norm; pretraining's code is the oracle."""
    mae = MaskedAutoencoderViT(
        **ENCODER, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4, norm_layer=NORM_LAYER
    )
    torch.nn.init.normal_(mae.norm.weight)
    probe = LinearProbe(5, **ENCODER, global_pool=global_pool)
    load_encoder(probe, mae.state_dict(), "mae")
    tokens, *_ = mae.forward_encoder(IMAGES, mask_ratio=0.0)
    expected = tokens[:, 1:].mean(dim=1) if global_pool else tokens[:, 0]
    torch.testing.assert_close(probe.features(IMAGES), expected, rtol=0, atol=1e-5)
    if not global_pool:
        torch.testing.assert_close(mae.features(IMAGES), expected, rtol=0, atol=1e-5)


def test_probe_trains_its_head_alone():
    probe = LinearProbe(5, **ENCODER).train()
    training = {name for name, module in probe.named_modules() if module.training}
    assert training == {"", "head", "head.0", "head.1"}
    assert {n for n, p in probe.named_parameters() if p.requires_grad} == {
        "head.1.weight",
        "head.1.bias",
    }
    assert not probe.features(IMAGES).requires_grad
    assert probe(IMAGES).requires_grad
    assert isinstance(probe.head[0], torch.nn.BatchNorm1d)
    assert (probe.head[0].affine, probe.head[0].eps) == (False, 1e-6)
    probe.eval()
    assert not any(module.training for module in probe.modules())
