"""Runs on images of other depths, channels and shapes, and what they say."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, flags_error, log_of, run_main, state_of, the_error
from PIL import Image
from test_pixels import write

import main_finetune
import main_linprobe
import main_pretrain
from util import export, visualize


def textures(folder: Path, high: int, dtype=np.uint16, chans: int = 1, suffix=".png") -> Path:
    """Two classes of stripes that use the values 0 .. high."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 16)):
        for label in (0, 1):
            (folder / split / f"c{label}").mkdir(parents=True)
            for i in range(count):
                y, x = np.mgrid[:32, :32]
                phase, turn = rng.uniform(0, 6.28), rng.uniform(0, 3.14)
                along = x * np.cos(turn) + y * np.sin(turn)
                grey = 0.5 + 0.3 * np.sin(along * (1.2 if label else 0.3) + phase)
                grey = (grey + rng.normal(0, 0.1, grey.shape)).clip(0, 1) * high
                array = grey if chans == 1 else np.stack([grey] * chans, -1)
                kwargs = {}
                if chans > 1:
                    kwargs = {"photometric": "minisblack", "planarconfig": "contig"}
                file = folder / split / f"c{label}" / f"{i}{suffix}"
                write(file, array.round().astype(dtype), **kwargs)
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return textures(tmp_path_factory.mktemp("full") / "data", 65535)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    return textures(tmp_path_factory.mktemp("twelve") / "data", 4095)


VIT = ["--model", "vit_nano_patch4", "--input_size", 32, "--num_workers", 0, "--device", "cpu"]


def knn(capsys, data: Path, *flags) -> tuple[float, str]:
    words = ["--data_path", data, *VIT, "--knn", "--batch_size", 8, "--output_dir", "", *flags]
    assert run_main(main_linprobe, *words) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    return float(re.search(r"kNN top-1 ([\d.]+)", out)[1]), out


def test_twelve_bits_in_sixteen_are_worth_as_much_as_sixteen(full, twelve, capsys):
    best, out = knn(capsys, full)
    assert "all looked at" in out
    assert "grey uint16, 32 x 32 pixels, values 0 to 65535" in out
    assert "uses the whole scale" not in out
    _, out = knn(capsys, twelve)
    assert "values reach 4095 of 65535: --pixel_range 0 4095, or auto, uses the whole" in out
    for flags in (["--pixel_range", 0, 4095], ["--pixel_range", "auto"]):
        found, out = knn(capsys, twelve, *flags)
        assert abs(found - best) <= 4
    assert "--pixel_range 0 40" in out  # measured
    assert best > 80


def test_a_nearly_constant_range_is_said(tmp_path, capsys):
    data = textures(tmp_path / "data", 3, np.uint8)
    assert "nearly constant: values 0 to 3 of 255; --pixel_range auto" in knn(capsys, data)[1]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Six bands of 16 bits, 12 of them used, and a run on them."""
    folder = tmp_path_factory.mktemp("bands")
    data = textures(folder / "data", 4095, chans=6, suffix=".tif")
    flags = ["--data_path", data, "--model", "mae_vit_nano_patch4", "--input_size", 16, 32]
    flags += ["--patch_size", 8, "--in_chans", 6, "--pixel_range", "auto", "--num_workers", 0]
    flags += ["--device", "cpu", "--batch_size", 8, "--epochs", 1, "--warmup_epochs", 0]
    flags += ["--flip", "both", "--rotate90", "--eval_freq", 1, "--resize", "squash"]
    assert run_main(main_pretrain, *flags, "--output_dir", folder / "out") == 0
    return data, folder / "out"


def test_bands_are_pretrained_and_probed_and_exported(pretrained, tmp_path, capsys):
    data, out = pretrained
    state = state_of(out)
    assert "knn_acc1" in log_of(out)[0]
    flags = state["args"]
    assert state["model"]["patch_embed.proj.weight"].shape[1:] == (6, 8, 8)
    low, high = flags["pixel_range"]
    assert 0 <= low < 50
    assert 4000 < high <= 4095
    assert len(flags["pixel_mean"]) == len(flags["pixel_std"]) == 6
    assert 0.3 < flags["pixel_mean"][0] < 0.7
    last = out / "checkpoint-last.pth"
    vit = ["--data_path", data, *VIT, "--input_size", 16, 32, "--patch_size", 8, "--epochs", 1]
    vit += ["--finetune", last, "--warmup_epochs", 0, "--batch_size", 8]
    for script in (main_linprobe, main_finetune):
        folder = tmp_path / script.__name__
        assert run_main(script, *vit, "--output_dir", folder) == 0, capsys.readouterr().err
        theirs = state_of(folder)["args"]
        for name in ("in_chans", "pixel_range", "pixel_mean", "pixel_std"):
            assert theirs[name] == flags[name]  # the checkpoint's
    said = capsys.readouterr().out
    assert "--aa and --color_jitter are for RGB of 8 bits: not used for these images" in said
    picture = tmp_path / "a.png"
    words = ["--checkpoint", last, "--data_path", data, "--out", picture]
    assert run_main(visualize, *words) == 0
    assert Image.open(picture).size[0] > Image.open(picture).size[1]
    assert run_main(export, "--checkpoint", last, "--out", tmp_path / "a.safetensors") == 0
    said = capsys.readouterr().out
    assert f"whose values {low:g} to {high:g} became 0 to 1, normalised by mean" in said
    call = re.search(r"timm\.create_model\((.*)\), on", said)[1]
    model = eval(f"timm.create_model({call})", {"timm": timm}).eval()
    assert model.patch_embed.grid_size == (2, 4)
    assert model(torch.zeros(1, 6, 16, 32)).shape == (1, 96)


def test_flips_are_the_checkpoint_s_unless_given_also_when_resumed(pretrained, tmp_path, capsys):
    """Text pretrained without mirroring, say, must not be fine-tuned mirrored."""
    data, out = pretrained
    last, folder = out / "checkpoint-last.pth", tmp_path / "out"
    flags = ["--data_path", data, *VIT, "--input_size", 16, 32, "--patch_size", 8, "--batch_size"]
    flags += [8, "--warmup_epochs", 0, "--finetune", last, "--output_dir", folder]
    assert run_main(main_finetune, *flags, "--epochs", 1, "--no_rotate90") == 0
    assert f"--flip both, as {last} has it" in capsys.readouterr().out
    theirs = state_of(folder)["args"]
    assert (theirs["flip"], theirs["rotate90"]) == ("both", False)
    again = [main_finetune, *flags, "--epochs", 2, "--resume", "auto"]
    assert run_main(*again, "--flip", "none") == 1
    said = the_error(capsys.readouterr().err)
    assert "of another experiment: --flip is 'both' there, 'none' here" in said
    assert run_main(*again) == 0
    assert state_of(folder)["args"]["rotate90"] is False
    assert run_main(main_finetune, *flags, "--overwrite", "--epochs", 1) == 0
    assert f"--rotate90, as {last} has it" in capsys.readouterr().out


def test_a_flag_that_differs_from_the_checkpoint_s_is_said(pretrained, capsys):
    data, out = pretrained
    flags = ["--input_size", 16, 32, "--patch_size", 8, "--finetune", out / "checkpoint-last.pth"]
    _, said = knn(capsys, data, *flags, "--pixel_range", 0, 4000)
    assert "warning: --pixel_range is 0 4000, but " in said


def test_a_resume_keeps_what_was_measured_and_refuses_another_range(pretrained, tmp_path, capsys):
    data, out = pretrained
    shutil.copytree(out, tmp_path / "out")
    flags = ["--data_path", data, "--model", "mae_vit_nano_patch4", "--input_size", 16, 32]
    flags += ["--patch_size", 8, "--num_workers", 0, "--device", "cpu", "--batch_size", 8]
    flags += ["--epochs", 2, "--warmup_epochs", 0, "--flip", "both", "--rotate90", "--resize"]
    flags += ["squash", "--resume", "auto", "--output_dir", tmp_path / "out", "--eval_freq", 1]
    assert run_main(main_pretrain, *flags, "--pixel_range", 0, 1000) == 1
    assert "--pixel_range is 0 1000, but " in the_error(capsys.readouterr().err)
    assert run_main(main_pretrain, *flags) == 0
    said = capsys.readouterr().out
    assert "measured" not in said
    assert state_of(tmp_path / "out")["args"]["pixel_range"] == state_of(out)["args"]["pixel_range"]


def test_bands_without_the_flag_are_refused_with_it(pretrained, capsys):
    data, _ = pretrained
    flags = ["--data_path", data, *TINY, "--output_dir", ""]
    assert run_main(main_pretrain, *flags) == 1
    assert "6 channels, not 3: --in_chans 6 reads them" in the_error(capsys.readouterr().err)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_a_mark_at_the_edge_of_a_wide_image_is_seen_unless_it_is_cut_off(resize, tmp_path, capsys):
    """Two classes that differ in the left and right thirty-second of 4:1 images alone."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 16)):
        for label in (0, 1):
            folder = tmp_path / split / f"c{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                grey = rng.integers(90, 120, (32, 128), np.uint8)
                grey[:, :12] = 250 if label else 5
                write(folder / f"{i}.png", grey)
    found, _ = knn(capsys, tmp_path, "--resize", resize)
    assert found > 95 if resize != "crop" else found < 75


def test_measured_mean_and_deviation_are_those_of_the_images(full, tmp_path, capsys):
    flags = ["--data_path", full, *TINY[:2], "--input_size", 32, *TINY[4:], "--in_chans", 1]
    flags += ["--batch_size", 8, "--epochs", 1, "--warmup_epochs", 0, "--pixel_std", "auto"]
    assert run_main(main_pretrain, *flags, "--output_dir", tmp_path / "out") == 0
    args = state_of(tmp_path / "out")["args"]
    every = np.stack([np.asarray(Image.open(f)) for f in sorted((full / "train").rglob("*.png"))])
    assert args["pixel_mean"][0] == pytest.approx(every.mean() / 65535, rel=0.02)
    assert args["pixel_std"][0] == pytest.approx(every.std() / 65535, rel=0.02)
    assert "--pixel_mean 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pixel_range", "5", "5"], "LOW is not below HIGH"),
        (["--pixel_range", "5"], "not 2 numbers, nor auto or dtype"),
        (["--pixel_range", "nan", "5"], "not 2 numbers"),
        (["--pixel_mean", "x"], "not a number for each channel, nor auto"),
        (["--pixel_std", "0", "1", "1"], "above 0"),
        (["--in_chans", "4", "--pixel_mean", "1", "2"], "2 values, but --in_chans 4"),
        (["--in_chans", "0"], "0 is outside"),
        (["--input_size", "8", "8", "8"], "one side, or H and W"),
        (["--input_size", "8", "10"], "--input_size 8 10 is not a multiple of the patch size 4"),
        (["--patch_size", "3"], "not a multiple of the patch size 3"),
        (["--flip", "up"], "invalid choice"),
    ],
)
def test_bad_flags_are_one_line(flags, words, photos, capsys):
    def parse(*given: str):
        return main_pretrain.get_args_parser().parse_args(given)

    given = list(map(str, ["--data_path", photos, *TINY, *flags]))
    assert words in flags_error(parse, given, capsys)
