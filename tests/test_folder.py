"""The output folder: no run is lost by accident, nor mixed with another."""

import pytest
from conftest import TINY, run_main, the_error

import main_linprobe
import main_pretrain


@pytest.fixture
def flags(photos, tmp_path):
    """One short epoch."""
    flags = ["--data_path", photos, *TINY, "--batch_size", 48]
    return [*flags, "--epochs", 1, "--output_dir", tmp_path / "out"]


def probing(flags: list) -> list:
    return ["vit_nano_patch4" if word == "mae_vit_nano_patch4" else word for word in flags]


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_second_run_needs_a_word(flags, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_main(main_pretrain, *flags, "--epochs", 2, "--save_freq", 1) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert run_main(main_pretrain, *flags) == 1
    line = the_error(capsys.readouterr().err)
    assert f"{out} holds a run: --resume auto continues it, --overwrite removes it" in line
    assert run_main(main_pretrain, *flags, "--overwrite", "--data_path", tmp_path / "x") == 1
    assert {path: path.read_bytes() for path in out.iterdir()} == before  # not even then

    (out / "notes.txt").touch()
    assert run_main(main_pretrain, *flags, "--overwrite") == 0
    kept = {name for name in names(out) if not name.startswith("events.")}
    assert kept == {"checkpoint-last.pth", "checkpoint-0.pth", "log.txt", "notes.txt"}
    assert len(names(out)) - len(kept) == 1
    assert len((out / "log.txt").read_text().splitlines()) == 1


def test_resuming_from_elsewhere_does_not_cost_the_run_that_is_there(flags, tmp_path, capsys):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    for folder in (elsewhere, out):
        assert run_main(main_pretrain, *flags, "--output_dir", folder) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    more = ["--epochs", 2, "--resume", elsewhere / "checkpoint-0.pth"]
    assert run_main(main_pretrain, *flags, *more) == 1
    assert "holds a run" in the_error(capsys.readouterr().err)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert run_main(main_pretrain, *flags, *more, "--output_dir", tmp_path / "new") == 0


def test_a_run_that_did_not_get_far_is_none(flags, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.txt").touch()
    assert run_main(main_pretrain, *flags) == 0


@pytest.mark.parametrize(
    ("script", "extra", "words"),
    [
        (main_pretrain, ["--weight_simclr", 0], "--weight_simclr is 0.03 there, 0.0 here"),
        (main_pretrain, ["--input_size", 12], "--input_size is 8 there, 12 here"),
        (main_linprobe, [], "--model is 'mae_vit_nano_patch4' there"),
    ],
    ids=["objective", "size", "script"],
)
def test_resuming_another_experiment_says_what_differs(
    script, extra, words, flags, tmp_path, capsys
):
    assert run_main(main_pretrain, *flags) == 0
    log = (tmp_path / "out/log.txt").read_bytes()
    capsys.readouterr()
    if script is main_linprobe:
        flags = probing(flags)
    assert run_main(script, *flags, "--resume", "auto", *extra) == 1
    assert words in the_error(capsys.readouterr().err)
    assert (tmp_path / "out/log.txt").read_bytes() == log


def test_what_a_run_begins_with_is_not_removed(flags, tmp_path, capsys):
    assert run_main(main_pretrain, *flags) == 0
    weights = tmp_path / "out/checkpoint-last.pth"
    capsys.readouterr()
    assert run_main(main_linprobe, *probing(flags), "--finetune", weights, "--overwrite") == 1
    assert "--overwrite would remove --finetune" in the_error(capsys.readouterr().err)
    assert run_main(main_pretrain, *flags, "--init", weights, "--overwrite") == 1
    assert "--overwrite would remove --init" in the_error(capsys.readouterr().err)
    assert weights.exists()
