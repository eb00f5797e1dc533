"""The two recipes of CAN: flags, equations against an independent oracle, old checkpoints."""

import math
from dataclasses import fields

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import (
    SMALL,
    flags_error,
    in_processes,
    log_of,
    run_main,
    small_mae,
    state_of,
    the_error,
)
from torch.nn.parallel import DistributedDataParallel

import main_linprobe
import main_pretrain
from engine_pretrain import describe_objective, total_loss
from loss_contrastive import GlobalBatchNorm, projection_head
from model_mae import MaskedAutoencoderViT, model_from_checkpoint
from util import export
from util.args import linprobe_parser, pretrain_parser
from util.recipes import RECIPES, Parts, shown
from util.run import checkpoint
from util.weights import start_from, warn_of_pooling

PAPER = Parts.of(RECIPES["paper"] | {"projection_dim": 24})


def parse(*flags: str):
    return pretrain_parser().parse_args(["--data_path", "x", *flags])


def test_the_command_line_overrides_the_recipe():
    paper = parse("--recipe", "paper")
    assert (paper.pool, paper.norm_pix_loss, paper.projection_dim) == ("patches", True, 4096)
    assert paper.weight_mae * paper.weight_noise == pytest.approx(0.3)
    assert paper.weight_mae * (1 - paper.weight_noise) == pytest.approx(0.67)
    other = parse("--recipe", "paper", "--pool", "cls", "--no_norm_pix_loss")
    assert (other.pool, other.norm_pix_loss, other.projection_dim) == ("cls", False, 4096)
    release = parse()
    assert (release.pool, release.norm_pix_loss, release.crop_scale) == ("all", False, [0.2, 1.0])
    assert Parts.of(vars(release)) == Parts()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", RECIPES["release"])
def test_each_flag_overrides_either_recipe_on_either_side(recipe, name):
    other = RECIPES["release" if recipe == "paper" else "paper"][name]
    value = {"temperature": 0.2, "projection_dim": 96}.get(name, other)
    words = [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    if isinstance(value, bool):
        words = [f"--{name}" if value else f"--no_{name}"]
    for flags in (["--recipe", recipe, *words], [*words, "--recipe", recipe]):
        found = {key: v for key, v in vars(parse(*flags)).items() if key in RECIPES[recipe]}
        assert found == RECIPES[recipe] | {name: value}


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


def test_a_run_of_the_paper_s_recipe_from_start_to_probe(photos_run, tmp_path, capsys):
    flags = [*photos_run, "--recipe", "paper", "--projection_dim", 32]
    flags += ["--epochs", 2, "--warmup_epochs", 1]
    assert run_main(main_pretrain, *flags) == 0
    out = capsys.readouterr().out
    weight = shown(RECIPES["paper"]["weight_noise"])  # so that it can be typed back
    assert (
        f"recipe paper: norm_pix_loss on, noise_target normalised, weight_noise {weight}, " in out
    )
    assert "objective: CAN = 0.67 reconstruction + 0.3 noise + 0.03 contrastive" in out
    assert 0.8 < log_of(tmp_path / "out")[0]["train_noise_zero"] < 1.1
    state = state_of(tmp_path / "out")
    model = model_from_checkpoint(state, "x")
    assert model.parts == Parts.of(RECIPES["paper"] | {"projection_dim": 32})
    again = [*flags, "--resume", "auto", "--epochs", 3]
    assert run_main(main_pretrain, *again) == 0
    assert run_main(main_pretrain, *again, "--pool", "cls") == 1
    assert "--pool is 'patches' there, 'cls' here" in the_error(capsys.readouterr().err)
    assert run_main(main_pretrain, *again, "--local_negatives") == 1
    assert "--local_negatives is False there, True here" in the_error(capsys.readouterr().err)
    release = [*photos_run, "--resume", "auto", "--epochs", 3, "--warmup_epochs", 1]
    assert run_main(main_pretrain, *release) == 1  # all of it differs: one flag brings it back
    said = the_error(capsys.readouterr().err)
    assert said.endswith("--recipe is 'paper' there, 'release' here; give another --output_dir")
    assert run_main(main_pretrain, *again, "--weight_noise", weight) == 0


def test_what_reads_the_paper_s_encoder_reads_the_patches(photos_run, tmp_path, capsys):
    flags = [*photos_run, "--recipe", "paper", "--projection_dim", 32, "--epochs", 1]
    assert run_main(main_pretrain, *flags, "--warmup_epochs", 0, "--eval_freq", 1) == 0
    weights = tmp_path / "out/checkpoint-last.pth"
    model = model_from_checkpoint(state_of(tmp_path / "out"), "x").eval()
    imgs = torch.randn(2, 3, *model.patch_embed.img_size)
    capsys.readouterr()
    probe = [str(word).removeprefix("mae_") for word in photos_run]
    probe = [*probe, "--model", "vit_nano_patch4", "--output_dir", "", "--epochs", 1]
    assert run_main(main_linprobe, *probe, "--finetune", weights) == 0
    assert "not by the cls token, which is read here" in capsys.readouterr().out
    for path in (tmp_path / "vit", tmp_path / "vit.safetensors", tmp_path / "again"):
        assert run_main(export, "--checkpoint", weights, "--out", path) == 0
        weights = path  # of which the next is made
    said = capsys.readouterr().out
    assert said.count("an encoder, of the mean over patches") == 2
    call = said.split("load with ")[2].split(", on images")[0]
    from_file = eval(call, {"timm": timm}).eval()
    vit = timm.create_model(f"local-dir:{weights}", pretrained=True).eval()
    for theirs in (vit, from_file):
        torch.testing.assert_close(theirs(imgs), model.features(imgs), rtol=0, atol=1e-5)
    theirs = ["--out", tmp_path / "hf", "--format", "transformers"]
    assert run_main(export, "--checkpoint", weights, *theirs) == 0
    assert "read last_hidden_state[:, 1:].mean(1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pretrained", "flags", "warned"),
    [
        ("--recipe paper", "", True),
        ("--recipe paper", "--knn", True),
        ("--recipe paper", "--global_pool", False),
        ("--recipe paper", "--blr auto", False),
        ("--recipe paper --weight_simclr 0", "", False),
        ("--recipe paper --pool all", "", False),
        ("", "", False),
    ],
)
def test_a_probe_of_what_was_not_contrasted_is_warned_of(pretrained, flags, warned, caplog):
    args = linprobe_parser().parse_args(["--data_path", "x", *flags.split()])
    warn_of_pooling(args, vars(parse(*pretrained.split())), "x.pth")
    says = "x.pth was trained by the mean over patches, not by the cls token"
    assert (says in caplog.text) == warned


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({}, ["norm_pix_loss on, here it is off", "noise_target normalised, here it is raw"]),
        ({"noise_loss": False}, ["norm_pix_loss on, here it is off"]),
        ({"reconstruct": False}, []),
        ({"norm_pix_loss": True, "parts": PAPER}, []),
    ],
)
def test_a_start_from_a_decoder_of_other_targets_is_told(flags, told, caplog):
    there = small_mae(norm_pix_loss=True, parts=PAPER).state_dict()
    parts = Parts(mask_token_width="encoder", noise_level_tokens="all")  # of the same shapes
    with caplog.at_level("INFO"):
        there_flags = vars(parse("--recipe", "paper")) | {"noise_loss": True}
        start_from(small_mae(**{"parts": parts} | flags), there, "x", there_flags)
    says = [words.split("with --")[1] for words in caplog.messages if "the decoder of x" in words]
    assert says == told


def test_checkpoints_older_than_recipes_are_the_release_s(photos_run, tmp_path, capsys):
    flags = [*photos_run, "--epochs", 1]
    assert run_main(main_pretrain, *flags) == 0
    state = state_of(tmp_path / "out")
    for name in ("recipe", *RECIPES["release"]):
        if name not in ("norm_pix_loss", "weight_noise"):
            del state["args"][name]
    checkpoint.save(state, tmp_path / "out" / checkpoint.LAST)
    again = [*flags, "--epochs", 2, "--resume", "auto"]
    assert run_main(main_pretrain, *again) == 0
    capsys.readouterr()
    path = tmp_path / "out" / checkpoint.LAST  # told, where it may differ
    other = [*flags, "--output_dir", "", "--epochs", 3, "--resume", path]
    assert run_main(main_pretrain, *other, "--jitter_strength", 1) == 0
    assert "changed: --jitter_strength was 0.5, is 1.0" in capsys.readouterr().out
    assert run_main(main_pretrain, *again, "--epochs", 3, "--recipe", "paper") == 1
    assert "of another experiment" in the_error(capsys.readouterr().err)
    assert run_main(main_pretrain, *other, "--mask_token_width", "encoder") == 1
    says = "another architecture: mask_token is [1, 1, 64], not [1, 1, 96]; --mask_token_width is"
    assert f"{says} 'decoder' there, 'encoder' here" in the_error(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ("--recipe paper", {}),
        (
            "--recipe paper --projection_layers 1 --projection_dim 64",
            {"projection_dim": "--projection_layers is 1"},
        ),
        (
            "--weight_simclr 0 --pool cls --std 0.1 --noise_target normalised",
            {
                "pool": "nothing is contrasted",
                "std": "no noise is added",
                "noise_target": "no noise is predicted",
            },
        ),
        ("--weight_mae 0 --norm_pix_loss", {"norm_pix_loss": "nothing is reconstructed"}),
        ("--augment weak --blur_prob 0 --crop_scale 0.5 1", {"blur_prob": "--augment is weak"}),
        ("--augment none --crop_scale 0.5 1", {"crop_scale": "--augment is none"}),
    ],
)
def test_what_does_nothing_is_said(flags, idle, caplog, capsys):
    args = parse(*flags.split())
    said = capsys.readouterr().err.splitlines()
    expected = [f"warning: --{name} is not used here: {why}" for name, why in idle.items()]
    assert sorted(line.split(": ", 1)[1] for line in said) == sorted(expected)
    model = small_mae(contrastive=args.weight_simclr > 0, reconstruct=args.weight_mae > 0)
    with caplog.at_level("INFO"):
        describe_objective(args, model)
    (recipe,) = (r.message for r in caplog.records if r.message.startswith("recipe "))
    assert not any(f" {name} " in recipe for name in idle)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--recipe mine", "'mine'"),
        ("--crop_scale 0.9 0.2", "--crop_scale 0.9 0.2: the first is larger"),
        ("--crop_scale 0 1", "0 is outside (0, 1]"),
        ("--projection_layers 0", "0 is outside [1, 8]"),
        ("--jitter_strength 3", "3 is outside [0, 2.5]"),
        ("--temperature 0", "0 is outside (0, inf)"),
    ],
)
def test_bad_values_are_one_line(flags, words, capsys):
    assert words in flags_error(parse, flags.split(), capsys)
