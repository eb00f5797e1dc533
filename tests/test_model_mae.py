"""The masked autoencoder: reference values, what is noised, kept and computed."""

import pytest
import torch
from conftest import fill, objective, small_mae

import model_mae
from engine_pretrain import total_loss
from model_mae import MODELS, MaskedAutoencoderViT, noise_level_embedding

# Losses (reconstruction, contrastive, noise), total, gradient norm and sum |pred| of the public
# release's model of this size, std 0, with every weight filled by `filled` and fixed mask scores.
REFERENCE = {
    (0.75, False): (1.1305240392684937, 1.9779810905456543, 0.005246774759143591,
                    0.8284920454025269, 0.38401215166252234, 1476.0046088205709),
    (0.5, False): (1.1305673122406006, 1.9470411539077759, 0.00524332607164979,
                   0.8275922536849976, 0.04078720804088694, 1470.4666367471022),
    (0.75, True): (1.000282883644104, 1.9779810905456543, 0.005246774759143591,
                   0.7400583028793335, 0.3839823125542812, 1476.0046088205709),
}  # fmt: skip
MASK_OF_FIRST_IMAGE = {
    0.75: [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 1, 0, 1, 0],
    0.5: [0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0],
}
BLOCK_KEYS = [
    "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
    "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias",
    "mlp.fc2.weight", "mlp.fc2.bias",
]  # fmt: skip


def filled(model: MaskedAutoencoderViT) -> MaskedAutoencoderViT:
    """The reference's weights: deterministic numbers by the alphabetical place of each name."""
    state = model.state_dict()
    for k, (name, tensor) in enumerate(sorted(state.items())):
        if "pos_embed" not in name:
            one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            state[name] = one + fill(tensor.shape, k, 0.05)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(("case", "expected"), REFERENCE.items(), ids=str)
def test_losses_and_gradients_equal_the_reference(case, expected, monkeypatch):
    mask_ratio, norm_pix_loss = case
    model = filled(small_mae(std=0.0, norm_pix_loss=norm_pix_loss))
    scores, rand = fill((8, 16), 7, 0.5) + 0.5, torch.rand
    monkeypatch.setattr(
        torch, "rand", lambda *size, **kw: scores if size == (8, 16) else rand(*size, **kw)
    )
    parts = model(fill((8, 3, 32, 32), 5, 1.5), mask_ratio)
    losses = total_loss(parts, objective(noise_loss=True))
    losses["loss"].backward()

    grads = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    names = ("reconstruction", "contrastive", "noise", "loss")
    actual = [losses[name].item() for name in names]
    actual += [torch.stack(grads).norm().item(), parts["pred"].abs().sum().item()]
    assert actual == pytest.approx(expected, rel=2e-6)
    assert parts["mask"][0].tolist() == MASK_OF_FIRST_IMAGE[mask_ratio]


def test_state_dict_keys_are_the_release_s():
    blocks = [f"blocks.{i}.{key}" for i in range(2) for key in BLOCK_KEYS]
    expected = [
        "cls_token", "pos_embed", "mask_token", "decoder_pos_embed",
        "patch_embed.proj.weight", "patch_embed.proj.bias", *blocks, "norm.weight", "norm.bias",
        *[f"{name}.{i}.{part}" for name in ("projection_head", "noise_pe_mlp")
          for i in (0, 2) for part in ("weight", "bias")],
        "decoder_embed.weight", "decoder_embed.bias",
        *[f"decoder_blocks.0.{key}" for key in BLOCK_KEYS],
        "decoder_norm.weight", "decoder_norm.bias", "decoder_pred.weight", "decoder_pred.bias",
    ]  # fmt: skip
    for kwargs in ({}, {"noise_loss": False, "contrastive": False}, {"reconstruct": False}):
        assert sorted(small_mae(**kwargs).state_dict()) == sorted(expected)


def test_noise_leaves_the_images_and_the_target_clean():
    model = small_mae(std=5.0)
    imgs = torch.randn(8, 3, 32, 32)
    before = imgs.clone()
    parts = model(imgs, 0.5)
    assert torch.equal(imgs, before)
    error = (parts["pred"] - model.patchify(before)).pow(2).mean(-1)
    expected = (error * parts["mask"]).sum() / parts["mask"].sum()
    assert parts["reconstruction"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_noise_is_uniform_in_level_and_normal_in_shape():
    torch.manual_seed(0)
    imgs = torch.zeros(4000, 3, 8, 8)
    noised, noise, level = small_mae(img_size=8, std=0.2).add_noise(imgs)
    assert torch.equal(noised, noise)
    measured = noise.flatten(1).std(dim=1) / (0.2 * level)
    assert measured.mean().item() == pytest.approx(1, abs=0.01)  # 192 pixels: spread 0.05
    assert level.mean().item() == pytest.approx(1 / 2, abs=0.02)
    assert level.var().item() == pytest.approx(1 / 12, abs=0.005)


def test_noise_term_has_the_zero_prediction_s_value_beside_it():
    model = small_mae(std=0.3)
    imgs = torch.randn(64, 3, 32, 32)
    noise = torch.randn_like(imgs) * 0.3
    mask = torch.zeros(64, 16)
    mask[:, 8:] = 1
    visible = model.patchify(noise)[:, :8]
    losses = model.forward_loss(imgs, torch.zeros(64, 16, 192), mask, noise)
    assert losses["noise"].item() == losses["noise_zero"].item()
    assert losses["noise_zero"].item() == pytest.approx(visible.pow(2).mean().item(), rel=1e-5)


def test_noise_level_changes_the_prediction():
    model = small_mae()
    latent, _, ids_restore = model.forward_encoder(torch.randn(2, 3, 32, 32), 0.5)
    with torch.no_grad():
        low, high = (
            model.forward_decoder(latent, ids_restore, torch.full((2,), level))
            for level in (0.01, 0.02)
        )
    # One hundredth of the range is a step of 10 of 1000: as visible as a different level should be.
    assert (low - high).abs().mean() > 0.01 * low.abs().mean()


def test_noise_level_embedding_spans_its_range():
    embedding = noise_level_embedding(torch.tensor([0.0, 0.5, 1.0]))
    assert embedding.shape == (3, 128)
    assert embedding[0].tolist() == [0.0] * 64 + [1.0] * 64
    assert embedding[2, 0].item() == pytest.approx(torch.tensor(1000.0).sin().item(), abs=1e-4)
    assert (embedding[1] - embedding[2]).abs().max() > 1


def test_per_patch_normalisation_has_mean_0_and_variance_1():
    model = small_mae(norm_pix_loss=True)
    imgs = torch.randn(2, 3, 32, 32) * 7 + 3
    patches = model.patchify(imgs)
    normalised = (patches - patches.mean(-1, keepdim=True)) / model.patch_std(patches)
    loss = model.forward_loss(imgs, normalised, torch.ones(2, 16))["reconstruction"]
    assert loss.item() == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(normalised.var(-1), torch.ones(2, 16), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0.75, 4), (0.5, 8), (0.9, 1), (0.0, 16)])
def test_masking_keeps_the_stated_number(mask_ratio, kept):
    model = small_mae()
    x = torch.arange(16.0).reshape(1, 16, 1).expand(3, -1, 2)
    tokens, mask, ids_restore = model.random_masking(x, mask_ratio)
    assert tokens.shape == (3, kept, 2)
    assert mask.sum(1).tolist() == [16 - kept] * 3
    for row in range(3):
        visible = (mask[row] == 0).nonzero().flatten().tolist()
        assert sorted(tokens[row, :, 0].tolist()) == visible
        order = [int(tokens[row, ids_restore[row, patch], 0]) for patch in visible]
        assert order == visible  # ids_restore finds each kept patch


def test_every_patch_is_kept_equally_often():
    torch.manual_seed(0)
    _, mask, _ = small_mae().random_masking(torch.zeros(4000, 16, 1), 0.5)
    assert (mask.mean(0) - 0.5).abs().max() < 0.04  # 5 standard errors


def test_embedding_kept_patches_equals_embedding_all_and_choosing():
    model = small_mae()
    imgs = torch.randn(2, 3, 32, 32)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(3)
    model.forward_encoder(imgs, 0.5)

    everything = model.patch_embed(imgs) + model.pos_embed[:, 1:]
    torch.manual_seed(3)
    expected, _, _ = model.random_masking(everything, 0.5)
    torch.testing.assert_close(seen[0][:, 1:], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "channels"), [((32, 32), 3), ((16, 40), 1), ((24, 8), 5)])
def test_any_channels_and_rectangles(size, channels):
    model = small_mae(img_size=size, in_chans=channels)
    imgs = torch.randn(4, channels, *size)
    assert torch.equal(model.unpatchify(model.patchify(imgs)), imgs)
    parts = model(imgs, 0.5)
    assert parts["pred"].shape == (4, size[0] * size[1] // 64, 64 * channels)
    sum(parts[name] for name in ("reconstruction", "noise")).backward()


def test_patchify_puts_channels_last_within_a_patch():
    imgs = torch.arange(2 * 3 * 16 * 16.0).reshape(2, 3, 16, 16)
    patches = small_mae(img_size=16).patchify(imgs)
    assert torch.equal(patches[1, 3].reshape(8, 8, 3), imgs[1, :, 8:, 8:].permute(1, 2, 0))


def test_image_size_must_be_whole_patches():
    with pytest.raises(ValueError, match="32, 30"):
        small_mae(img_size=(32, 30))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("base_patch16", 86.6), ("large_patch16", 304.3), ("huge_patch14", 632.0)],
)
def test_released_sizes(name, parameters):
    """Encoder parameters in millions as in the ViT and MAE papers (with their 1000-way head)."""
    with torch.device("meta"):
        model = MODELS[f"mae_vit_{name}"]()
    encoder = sum(
        p.numel()
        for key, p in model.named_parameters()
        if key.startswith(("cls_token", "pos_embed", "patch_embed", "blocks", "norm"))
    )
    head = 1000 * (model.norm.weight.numel() + 1)
    assert (encoder + head) / 1e6 == pytest.approx(parameters, abs=0.06)
    assert model.decoder_embed.out_features == 512
    assert len(model.decoder_blocks) == 8


def test_builders_and_table_agree():
    assert {name for name in vars(model_mae) if name.startswith("mae_vit_")} == set(MODELS)


def test_checkpointed_activations_change_no_gradient():
    gradients, saved = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = model_mae.mae_vit_nano_patch4(img_size=16, noise_loss=True)
        model.grad_checkpointing = checkpointing
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: (kept.append(x.numel()), x)[1], lambda x: x
        ):
            parts = model(torch.randn(4, 3, 16, 16), mask_ratio=0.5)
        (parts["reconstruction"] + parts["noise"] + parts["embedding"].sum()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        saved.append(sum(kept))
    assert saved[1] < saved[0] / 4
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.slow
def test_noise_is_learnt_where_nothing_hides_it():
    """Strong noise on images of one grey: far less is left than a prediction of zero leaves."""
    torch.manual_seed(0)
    model = model_mae.mae_vit_nano_patch4(img_size=16, noise_loss=True, std=1.0, contrastive=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        parts = model(torch.zeros(128, 3, 16, 16), mask_ratio=0.5)
        parts["noise"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert parts["noise"] < 0.5 * parts["noise_zero"]
