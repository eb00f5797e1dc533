"""The two recipes of CAN: flags, runs, old checkpoints."""

import pytest
import timm
import torch
from conftest import flags_error, log_of, run_main, small_mae, state_of, the_error

import main_linprobe
import main_pretrain
from engine_pretrain import describe_objective
from model_mae import model_from_checkpoint
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
