"""The recipes in the model: against an independent oracle, and two processes as one."""

import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, in_processes, small_mae
from test_recipes import PAPER, parse
from torch.nn.parallel import DistributedDataParallel

from engine_pretrain import total_loss
from loss_contrastive import GlobalBatchNorm, projection_head
from model_mae import MaskedAutoencoderViT
from util.recipes import Parts

# --- the paper's recipe in plain functions of the weights w, for images of 32 x 32, patches of 8


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def layer_norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def transformer(w, name, x, depth, heads):
    for i in range(depth):
        at = f"{name}.{i}"
        qkv = linear(w, f"{at}.attn.qkv", layer_norm(w, f"{at}.norm1", x))
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        weights = torch.einsum("nihd,njhd->nhij", q, k) / math.sqrt(q.shape[-1])
        seen = torch.einsum("nhij,njhd->nihd", weights.softmax(-1), v).flatten(2)
        x = x + linear(w, f"{at}.attn.proj", seen)
        hidden = F.gelu(linear(w, f"{at}.mlp.fc1", layer_norm(w, f"{at}.norm2", x)))
        x = x + linear(w, f"{at}.mlp.fc2", hidden)
    return x


def cut(imgs):
    """Patches [N, 16, 8 * 8 * 3], rows first."""
    patches = imgs.reshape(len(imgs), 3, 4, 8, 4, 8)
    return torch.einsum("nchpwq->nhwpqc", patches).reshape(len(imgs), 16, 192)


def normalised(patches):
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / torch.sqrt(var + 1e-6)


def encoded(w, imgs, keep):
    patches = F.conv2d(imgs, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], 8)
    patches = patches.flatten(2).transpose(1, 2) + w["pos_embed"][:, 1:]
    cls = (w["cls_token"] + w["pos_embed"][:, :1]).expand(len(imgs), -1, -1)
    tokens = torch.cat([cls, patches[torch.arange(len(imgs))[:, None], keep]], 1)
    return layer_norm(w, "norm", transformer(w, "blocks", tokens, 2, 4))


def contrasted(w, latent):
    hidden = latent[:, 1:].mean(1)
    for i in (0, 3):
        hidden = linear(w, f"projection_head.{i}", hidden)
        hidden = (hidden - hidden.mean(0)) / torch.sqrt(hidden.var(0, unbiased=False) + 1e-5)
        norm = f"projection_head.{i + 1}"
        hidden = F.relu(hidden * w[f"{norm}.weight"] + w[f"{norm}.bias"])
    z = linear(w, "projection_head.6", hidden)
    z = z / z.norm(dim=1, keepdim=True)
    similar = (z @ z.T / 0.1).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
    return F.cross_entropy(similar, (torch.arange(len(z)) + len(z) // 2) % len(z))


def decoded(w, latent, level, keep):
    width = latent.shape[-1]
    angles = 1000 * level[:, None] * 10000.0 ** (-torch.arange(width // 2) / (width // 2))
    told = torch.cat([angles.sin(), angles.cos()], 1)
    told = linear(w, "noise_pe_mlp.2", F.relu(linear(w, "noise_pe_mlp.0", told)))
    patches = w["mask_token"].repeat(len(latent), 16, 1)
    patches[torch.arange(len(latent))[:, None], keep] = latent[:, 1:]
    tokens = torch.cat([latent[:, :1], patches + told[:, None]], 1)
    x = linear(w, "decoder_embed", tokens) + w["decoder_pos_embed"]
    x = layer_norm(w, "decoder_norm", transformer(w, "decoder_blocks", x, 1, 4))
    return linear(w, "decoder_pred", x)[:, 1:]


def oracle(w, imgs, noise, level, keep) -> dict[str, torch.Tensor]:
    """What is predicted, and the losses; `keep` [N, K] are the kept patches, as encoded."""
    latent = encoded(w, imgs + noise, keep)
    found = {"pred": decoded(w, latent, level, keep), "contrastive": contrasted(w, latent)}
    errors = [((found["pred"] - normalised(cut(x))) ** 2).mean(-1) for x in (imgs, noise)]
    seen = torch.zeros(len(imgs), 16, dtype=torch.bool)
    seen[torch.arange(len(imgs))[:, None], keep] = True
    found["noise_zero"] = (normalised(cut(noise)) ** 2).mean(-1)[seen].mean()
    found |= {"reconstruction": errors[0][~seen].mean(), "noise": errors[1][seen].mean()}
    terms = 0.67 * found["reconstruction"] + 0.3 * found["noise"] + 0.03 * found["contrastive"]
    return found | {"loss": terms}


def test_the_paper_s_recipe_equals_an_oracle(monkeypatch):
    args = parse("--recipe", "paper")
    torch.manual_seed(0)
    model = small_mae(norm_pix_loss=True, parts=PAPER)
    for parameter in model.parameters():  # no bias, norm or attention is trivial
        torch.nn.init.normal_(parameter, std=0.3)
    imgs = torch.randn(8, 3, 32, 32)
    found = {}

    def add_noise(self, imgs, original=MaskedAutoencoderViT.add_noise):
        found["seen"], found["noise"], found["level"] = original(self, imgs)
        return found["seen"], found["noise"], found["level"]

    def masking(self, x, ratio, original=MaskedAutoencoderViT.random_masking):
        kept, mask, restore = original(self, x, ratio)
        found["keep"] = restore.argsort(1)[:, : kept.shape[1]]
        return kept, mask, restore

    monkeypatch.setattr(MaskedAutoencoderViT, "add_noise", add_noise)
    monkeypatch.setattr(MaskedAutoencoderViT, "random_masking", masking)
    parts = model(imgs, 0.5)
    losses = total_loss(parts, args)
    expected = oracle(model.state_dict(), imgs, found["noise"], found["level"], found["keep"])
    torch.testing.assert_close(parts["pred"], expected.pop("pred"), rtol=1e-4, atol=1e-4)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.parametrize("parts", [Parts(), PAPER])
def test_features_are_of_the_tokens_that_are_contrasted(parts):
    imgs = torch.randn(2, 3, 32, 32)
    for contrastive in (True, False):
        model = small_mae(parts=parts, contrastive=contrastive).eval()
        latent, _, _ = model.forward_encoder(imgs, mask_ratio=0.0)
        patches = contrastive and parts == PAPER
        expected = latent[:, 1:].mean(dim=1) if patches else latent[:, 0]
        torch.testing.assert_close(model.features(imgs), expected)


@pytest.mark.parametrize(("patch", "std", "documented"), [(16, 0.05, 0.97), (4, 0.05, 0.95)])
def test_the_documented_loss_of_predicting_no_noise(patch, std, documented):
    torch.manual_seed(0)
    model = small_mae(patch_size=patch, parts=PAPER, std=std)
    noise = std * torch.rand(4000, 1, 1, 1) * torch.randn(4000, 3, 32, 32)
    mask = torch.zeros(4000, model.patch_embed.num_patches)
    zero = model.forward_loss(noise, model.patchify(noise), mask, noise)["noise_zero"].item()
    numbers, a = 3 * patch**2, 0.001 / std
    assert zero == pytest.approx((1 - 1 / numbers) * (1 - a * math.atan(1 / a)), abs=2e-3)
    assert round(zero, 2) == documented


@pytest.mark.parametrize("row", [field.name for field in fields(Parts)])
def test_each_row_stands_alone(row):
    """It trains, and differs from the release."""
    imgs = torch.randn(4, 3, 32, 32)
    losses = []
    for parts in (Parts(), Parts(**{row: getattr(PAPER, row)})):
        torch.manual_seed(3)
        model = small_mae(parts=parts)
        torch.manual_seed(3)
        losses.append(total_loss(model(imgs, 0.5), parse()))
        losses[-1]["loss"].backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert losses[0]["loss"] != losses[1]["loss"]


def head(rank: int | None = None) -> torch.nn.Module:
    torch.manual_seed(1)
    return projection_head(16, PAPER).double()


def batch() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 + torch.randn(24, 16, generator=generator, dtype=torch.float64)


def step(model: torch.nn.Module, x: torch.Tensor) -> None:
    (model(x) ** 3).mean().backward()


def train_a_share(rank: int, out: str) -> None:
    model = DistributedDataParallel(head())
    for _ in range(2):
        step(model, batch()[rank::2])
    found = [p.grad for p in model.parameters()] + list(model.buffers())
    torch.save(found, f"{out}/{rank}.pth")


def test_batchnorm_of_two_processes_trains_as_one(tmp_path):
    """Gradients, and the running statistics that evaluation uses."""
    in_processes(train_a_share, 2, str(tmp_path))
    model = head()
    for _ in range(2):
        step(model, batch())
    expected = [p.grad for p in model.parameters()] + list(model.buffers())
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pth")
        for tensor, value in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, value, rtol=1e-9, atol=1e-12)


class Settled(MaskedAutoencoderViT):
    """With the noise a function of the image, so that it does not matter who trains on it."""

    def add_noise(self, imgs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        noise = 0.05 * (1000 * imgs).sin()
        return imgs + noise, noise, imgs.mean(dim=(1, 2, 3)).sigmoid()

    def random_masking(self, x: torch.Tensor, mask_ratio: float) -> tuple[torch.Tensor, ...]:
        with torch.random.fork_rng():  # the same patches of every image
            torch.manual_seed(7)
            _, mask, ids_restore = super().random_masking(x[:1], mask_ratio)
        ids = ids_restore.argsort(dim=1)[0, : int((1 - mask).sum())]
        return x[:, ids], mask.expand(len(x), -1), ids_restore.expand(len(x), -1)


def gradients(views: torch.Tensor) -> list[torch.Tensor]:
    """Of the paper's whole objective, and BatchNorm's statistics, of views [2, N, C, H, W]."""
    torch.manual_seed(0)
    model = Settled(**SMALL, noise_loss=True, norm_pix_loss=True, parts=PAPER).double()
    several = torch.distributed.is_initialized()
    trained = DistributedDataParallel(model) if several else model
    losses = total_loss(trained(views.flatten(0, 1), 0.5), parse("--recipe", "paper"))
    losses["loss"].backward()
    return [p.grad for p in model.parameters() if p.grad is not None] + list(model.buffers())


def some_views() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, 3, 32, 32, generator=generator, dtype=torch.float64)


def save_gradients(rank: int, out: str) -> None:
    torch.save(gradients(some_views()[:, rank::2]), f"{out}/{rank}.pth")


def test_two_processes_train_the_paper_s_recipe_as_one(tmp_path):
    in_processes(save_gradients, 2, str(tmp_path))
    expected = gradients(some_views())
    assert len(expected) > 40
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pth")
        for tensor, value in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, value, rtol=1e-4, atol=1e-6)


def test_batchnorm_in_half_precision_computes_in_float32():
    norm, x = GlobalBatchNorm(8), (5 + torch.randn(64, 8)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = norm(x)
    expected = (x.double() - x.double().mean(0)) / (x.double().var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=1e-5)
