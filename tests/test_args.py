"""The command line is an interface: names, defaults, and what each combination resolves to."""

import subprocess
import sys

import pytest
from conftest import ROOT, flags_error, the_error

from util.args import finetune_parser, linprobe_parser, pretrain_parser

# name -> default. A change here changes what people's scripts do.
PRETRAIN_FLAGS = {
    "crop_scale": [0.2, 1.0], "jitter_strength": 0.5, "mask_token_width": "decoder",
    "noise_level_tokens": "visible", "noise_target": "raw", "pool": "all", "projection_dim": None,
    "projection_layers": 2, "projection_norm": "none", "recipe": "release", "temperature": 0.1,
    "accum_iter": 1, "batch_size": 64, "blr": 1e-3, "blur_prob": 0.5, "compile": False,
    "data_path": "x", "device": None, "dist_on_itp": False, "dist_url": "env://",
    "epochs": 400, "eval_freq": 0,
    "grad_checkpointing": False, "input_size": 224, "keep_last": None,
    "local_negatives": False, "local_rank": -1, "log_dir": "./output_dir", "lr": None,
    "mask_ratio": 0.5, "min_lr": 0.0, "model": "mae_vit_large_patch16", "noise_loss": True,
    "norm_pix_loss": False, "num_workers": 10, "output_dir": "./output_dir", "overwrite": False,
    "pin_mem": True,
    "precision": "auto", "resume": "", "save_freq": 20, "save_interval": 15.0,
    "labels": "", "shuffle_window": None,
    "seed": 0, "skip_nonfinite": 0, "start_epoch": 0, "std": 0.05,
    "augment": "ssl", "init": "", "flip": None, "in_chans": None, "pages": None, "patch_size": 16,
    "pixel_mean": None, "pixel_range": None, "pixel_std": None, "resize": None, "rotate90": None,
    "warmup_epochs": 40, "weight_decay": 0.05, "weight_mae": 0.97, "weight_noise": 0.3,
    "weight_simclr": 0.03, "world_size": 1,
}  # fmt: skip

SHARED = {
    name: PRETRAIN_FLAGS[name]
    for name in (
        "accum_iter", "compile", "data_path", "device", "dist_on_itp", "dist_url", "input_size",
        "keep_last", "local_rank", "log_dir", "lr", "num_workers", "output_dir", "overwrite",
        "pin_mem", "precision", "resume", "save_freq", "save_interval", "seed", "skip_nonfinite",
        "start_epoch", "world_size", "flip", "in_chans", "pages", "patch_size", "pixel_mean",
        "pixel_range", "pixel_std", "resize", "rotate90", "labels", "shuffle_window",
    )
}  # fmt: skip

SUPERVISED_FLAGS = SHARED | {
    "dist_eval": False, "eval": False, "finetune": "", "model": "vit_large_patch16",
    "nb_classes": None, "val_fraction": 0.0, "class_weights": None, "predict": "",
    "predictions": "", "per_class": "",
}  # fmt: skip

# MAE's defaults, but for nb_classes, which the data say
FINETUNE_FLAGS = SUPERVISED_FLAGS | {
    "aa": "rand-m9-mstd0.5-inc1", "batch_size": 64, "blr": 1e-3, "clip_grad": None,
    "color_jitter": None, "cutmix": 0.0, "cutmix_minmax": None, "drop_path": 0.1, "epochs": 50,
    "global_pool": True, "layer_decay": 0.75, "min_lr": 1e-6, "mixup": 0.0, "mixup_mode": "batch",
    "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "recount": 1, "remode": "pixel", "reprob": 0.25,
    "resplit": False, "smoothing": 0.1, "warmup_epochs": 5, "weight_decay": 0.05,
}  # fmt: skip

LINPROBE_FLAGS = SUPERVISED_FLAGS | {
    "batch_size": 512, "blr": 0.1, "cache_features": False, "epochs": 90, "global_pool": False,
    "grid": False, "knn": False, "min_lr": 0.0, "warmup_epochs": 10, "weight_decay": 0.0,
}  # fmt: skip


def parse(*flags: str):
    return pretrain_parser().parse_args(["--data_path", "x", *flags])


def test_pretraining_flags_and_defaults():
    assert vars(parse()) == PRETRAIN_FLAGS


@pytest.mark.parametrize(
    ("parser", "flags"),
    [(finetune_parser, FINETUNE_FLAGS), (linprobe_parser, LINPROBE_FLAGS)],
    ids=["finetune", "linprobe"],
)
def test_supervised_flags_and_defaults(parser, flags):
    assert vars(parser().parse_args(["--data_path", "x"])) == flags


@pytest.mark.parametrize("parser", [pretrain_parser, finetune_parser, linprobe_parser])
def test_every_flag_says_what_it_does(parser):
    assert [action.dest for action in parser()._actions if not action.help] == []


@pytest.mark.parametrize(
    ("parser", "flags", "words"),
    [
        (finetune_parser, "--mixup -1", "-1 is outside [0, inf)"),
        (finetune_parser, "--mixup 0.8 --batch_size 7", "--batch_size 7 is odd"),
        (finetune_parser, "--cutmix_minmax 0.5 0.5", "no room for a draw"),
        (finetune_parser, "--cutmix_minmax 0.5", "expected 2 arguments"),
        (finetune_parser, "--layer_decay 0", "0 is outside (0, 1]"),
        (finetune_parser, "--clip_grad 0", "0 is outside (0, inf)"),
        (finetune_parser, "--drop_path 1", "1 is outside [0, 1)"),
        (finetune_parser, "--eval", "--eval needs the weights to evaluate"),
        (finetune_parser, "--eval --resume auto", "--eval needs the weights to evaluate"),
        (finetune_parser, "--input_size 225", "not a multiple of the patch size 16"),
        (finetune_parser, "--model mae_vit_base_patch16", "vit_base_patch16"),
        (linprobe_parser, "--model vit_huge_patch14 --input_size 225", "patch size 14"),
        (linprobe_parser, "--eval", "--eval needs the weights to evaluate"),
        (linprobe_parser, "--knn --eval --resume x", "--knn trains nothing"),
        (linprobe_parser, "--batch_size 1", "BatchNorm needs two images"),
        (linprobe_parser, "--val_fraction 1", "1 is outside [0, 1)"),
        (linprobe_parser, "--nb_classes 1", "1 is outside [2, inf)"),
    ],
)  # fmt: skip
def test_supervised_flags_out_of_range_are_one_line(parser, flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        parser().parse_args(["--data_path", "x", *flags.split()])
    assert error.value.code == 2
    assert words in the_error(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("parser", "flags", "idle"),
    [
        (finetune_parser, "--eval --resume x --finetune y", "--finetune"),
        (finetune_parser, "--eval --resume x --cls_token", ""),
        (finetune_parser, "--mixup_prob 0.5 --remode rand --reprob 0", "--mixup_prob --remode"),
        (finetune_parser, "--color_jitter 0.4", "--color_jitter"),
        (finetune_parser, "--color_jitter 0.4 --aa 3a --mixup 0.8 --mixup_prob 0.5", ""),
        (linprobe_parser, "--blr auto --flip none --global_pool", "--flip --global_pool"),
        (
            linprobe_parser,
            "--knn --blr auto --rotate90 --compile --global_pool",
            "--rotate90 --compile --blr",
        ),
        (linprobe_parser, "--predict x --predictions y --resume z", "--data_path"),
        (linprobe_parser, "--knn --global_pool --batch_size 1", ""),
    ],
)
def test_flags_that_do_nothing_are_named_once(parser, flags, idle, capsys):
    parser = parser()
    for _ in range(2):
        parser.parse_args(["--data_path", "x", *flags.split()])
    lines = capsys.readouterr().err.splitlines()
    assert all(" is not used here: " in line for line in lines)
    assert sorted(line.split()[2] for line in lines) == sorted(idle.split())


@pytest.mark.parametrize(
    ("flags", "noise_loss", "mask_ratio"),
    [
        ([], True, 0.5),
        (["--weight_simclr", "0", "--weight_mae", "1"], False, 0.75),
        (["--weight_mae", "0"], False, 0.0),
        (["--no_noise_loss"], False, 0.5),
        (["--weight_simclr", "0", "--noise_loss", "--mask_ratio", "0.6"], True, 0.6),
    ],
    ids=["CAN", "MAE", "SimCLR", "CAN without noise", "MAE with noise"],
)
def test_defaults_follow_the_objective(flags, noise_loss, mask_ratio):
    args = parse(*flags)
    assert (args.noise_loss, args.mask_ratio) == (noise_loss, mask_ratio)


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=1"])
def test_launchers_spell_the_local_rank_in_two_ways(flag):
    assert parse(flag).local_rank == 1


def test_log_dir_follows_output_dir():
    assert parse("--output_dir", "a").log_dir == "a"
    assert parse("--output_dir", "a", "--log_dir", "b").log_dir == "b"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model resnet50", "mae_vit_base_patch16"),
        ("--weight_mae -1", "-1 is outside [0, inf)"),
        ("--weight_simclr nan", "nan is outside [0, inf)"),
        ("--weight_noise 1.5", "1.5 is outside [0, 1]"),
        ("--weight_mae 0 --weight_simclr 0", "nothing to learn"),
        ("--mask_ratio 1", "1 is outside [0, 1)"),
        ("--mask_ratio -0.1", "-0.1 is outside [0, 1)"),
        ("--mask_ratio 0.999", "keeps none of 196 patches"),
        ("--mask_ratio 0", "removes none of 196 patches"),
        ("--std inf", "inf is outside [0, inf)"),
        ("--input_size 225", "225 is not a multiple of the patch size 16"),
        ("--model mae_vit_huge_patch14 --input_size 225", "patch size 14"),
        ("--batch_size 0", "0 is outside [1, inf)"),
        ("--batch_size 1.5", "'1.5' is not an integer"),
        ("--epochs x", "'x' is not an integer"),
        ("--lr=-1e-3", "outside [0, inf)"),
        ("--blr abc", "'abc' is not a number"),
        ("--accum_iter 0", "0 is outside [1, inf)"),
        ("--num_workers -1", "-1 is outside [0, 1024]"),
        ("--warmup_epochs -1", "-1 is outside [0, inf)"),
        ("--precision bf8", "'bf8'"),
        ("--device tpu", "'tpu'"),
        ("--dist_url localhost:10", "'localhost:10' is none of env://"),
        ("--world_size 2 --local_rank 2", "--local_rank 2 is not below --world_size 2"),
        ("--resume auto --output_dir ''", "--resume auto needs an --output_dir"),
        ("--overwrite --resume auto", "--overwrite starts over and --resume continues"),
        ("--epochs", "expected one argument"),
        ("--mask_ratios 0.5", "unrecognized arguments: --mask_ratios"),
        ("--mask 0.5", "unrecognized arguments: --mask"),
    ],
)
def test_bad_flags_exit_2_with_one_line(flags, words, capsys):
    given = [word.replace("''", "") for word in flags.split()]
    assert words in flags_error(parse, given, capsys)


def test_data_path_is_required(capsys):
    with pytest.raises(SystemExit):
        pretrain_parser().parse_args([])
    assert "required: --data_path" in the_error(capsys.readouterr().err)


def test_one_rank_speaks_for_all(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as status:
        parse("--epochs", "0")
    assert status.value.code == 2
    assert capsys.readouterr().err == ""


def test_flags_are_parsed_without_importing_torch():
    code = "import sys, util.args; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
