"""Bad flags, folders and images: each ends in one clear line, and nothing is written."""

import argparse
import os
import re

import pytest
from conftest import TINY, VIT, complaints, python, the_error
from PIL import Image

from util.args import finetune_parser, linprobe_parser, pretrain_parser
from util.slurm.flags import job_parser

pytestmark = pytest.mark.faults

SCRIPTS = {"pretrain": pretrain_parser, "finetune": finetune_parser, "linprobe": linprobe_parser}
PARSERS = {f"main_{name}": parser for name, parser in SCRIPTS.items()}
PARSERS |= {
    f"submitit_{n}": lambda parser=parser: job_parser(parser()) for n, parser in SCRIPTS.items()
}


# --- flags


def bad_values(action: argparse.Action) -> list[list[str]]:
    """What must not follow a flag: values of the wrong type, out of range, none at all."""
    if action.nargs == 0:
        return []
    bad = [] if action.nargs == "?" else [[]]
    if action.choices:
        bad += [["nonsense"], [""]]
    elif action.type is not None:
        words = ["x", "", "nan", "inf", "1.5", *edges(action)]
        bad += [[word] * (2 if action.nargs == 2 else 1) for word in words if refuses(action, word)]
    return bad


def refuses(action: argparse.Action, word: str) -> bool:
    try:
        action.type(word)
    except (argparse.ArgumentTypeError, ValueError):
        return True
    return False


def edges(action: argparse.Action) -> list[str]:
    """Numbers just outside of a range, from the range that a flag's own complaint names."""
    try:
        action.type("-" + "9" * 30)
    except argparse.ArgumentTypeError as error:
        span = re.search(r"outside ([\[(])([^,]+), ([^)\]]+)([)\]])", str(error))
        if span:
            low = float(span[2])
            words = [f"{low - 1:.0f}"] + [f"{low:.0f}"] * (span[1] == "(")
            if span[3] != "inf":
                high = float(span[3])
                words += [f"{high + 1:.0f}"] + [f"{high:.0f}"] * (span[4] == ")")
            return words
    return []


@pytest.mark.parametrize("script", PARSERS)
def test_every_bad_value_of_every_flag_is_one_line(script, forks, light_forks, tmp_path):
    server = light_forks if script.startswith("submitit_") else forks
    parser = PARSERS[script]()
    cases = []
    for action in parser._actions:
        flag = action.option_strings[0]
        cases += [["--data_path", "digits", flag, *values] for values in bad_values(action)]
        if action.nargs == 0 and flag != "-h":
            cases.append(["--data_path", "digits", f"{flag}=yes"])
    cases += [[], ["digits"], ["--data_path", "digits", "--no_such_flag"]]
    assert len(cases) > 80
    wrong = []
    for case in cases:
        status, out, err = server.run(script, *case, cwd=tmp_path)
        fine = status == 2 and not out and re.fullmatch(rf"{script}\.py: error: .+\n", err)
        if not fine or os.listdir(tmp_path):
            wrong.append((case, status, out, err))
    assert wrong == []
    print(f"{script}: {len(cases)} bad command lines")


CONTRADICTIONS = [
    ("main_pretrain", "--weight_mae 0 --weight_simclr 0"),
    ("main_pretrain", "--mask_ratio 0"),
    ("main_pretrain", "--mask_ratio 0.999"),
    ("main_pretrain", "--input_size 225"),
    ("main_pretrain", "--input_size 400000000"),
    ("main_pretrain", "--start_epoch 2 --epochs 2"),
    ("main_pretrain", "--world_size 2 --local_rank 2"),
    ("main_pretrain", "--dist_url localhost:1"),
    ("main_pretrain", "--resume auto --output_dir="),
    ("main_pretrain", "--resume auto --overwrite"),
    ("main_finetune", "--eval"),
    ("main_finetune", "--eval --resume auto"),
    ("main_finetune", "--mixup 1 --batch_size 7"),
    ("main_finetune", "--cutmix_minmax 0.8 0.2"),
    ("main_finetune", "--aa nonsense"),
    ("main_finetune", "--aa rand-n99999999999999"),
    ("main_finetune", "--model mae_vit_base_patch16"),
    ("main_linprobe", "--knn --eval --resume x"),
    ("main_linprobe", "--knn --resume x"),
    ("main_linprobe", "--batch_size 1"),
    ("submitit_pretrain", "--ngpus 0 --device cuda"),
    ("submitit_pretrain", "--ngpus 1 --device cpu"),
    ("submitit_pretrain", "--ngpus 2 --tasks_per_node 3"),
    ("submitit_pretrain", "--array"),
    ("submitit_pretrain", "--array 0-1 --output_dir out"),
    ("submitit_pretrain", "--set nodes=1,2"),
    ("submitit_pretrain", "--set no_such_flag=1,2"),
    ("submitit_pretrain", "--set epochs=0,1"),
    ("submitit_pretrain", "--output_dir="),
    ("submitit_pretrain", "--job_dir a%d"),
]


@pytest.mark.parametrize(("script", "flags"), CONTRADICTIONS)
def test_contradictory_flags_are_one_line(script, flags, refused):
    refused(script, "--data_path", "digits", *flags.split(), status=2)


COUNTS = sorted(
    flag
    for parser in (pretrain_parser(), finetune_parser())
    for action in parser._actions
    for flag in action.option_strings
    if action.type and not refuses(action, "9" * 30)
)


@pytest.mark.parametrize("flag", sorted(set(COUNTS) - {"--epochs"}))  # it would take them all
def test_absurd_numbers_are_refused_or_harmless(flag, forks, photos, tmp_path):
    script = "main_pretrain"
    if flag not in pretrain_parser()._option_string_actions:
        script = "main_finetune"
    flags = ["--data_path", photos, *(TINY if script == "main_pretrain" else VIT)]
    flags += ["--batch_size", 24, "--epochs", 1, "--output_dir", "", flag, "9" * 30]
    status, _, err = forks.run(script, *flags, cwd=tmp_path, limit_s=40)
    if status == 0:
        assert complaints(err) == []
    else:
        assert status in (1, 2)
        the_error(err)


def test_augmentation_that_cannot_work_is_one_line(refused, photos):
    flags = ["--data_path", photos, *VIT, "--batch_size", 8, "--output_dir", "out"]
    assert "--aa augmix-a0" in refused("main_finetune", *flags, "--aa", "augmix-a0")


# --- folders


@pytest.mark.parametrize("script", ["main_pretrain", "main_finetune", "main_linprobe"])
@pytest.mark.parametrize("flag", ["--output_dir", "--log_dir"])
@pytest.mark.parametrize("kind", ["file", "below a file", "no permission", "below no permission"])
def test_folders_that_cannot_be_written(script, flag, kind, refused, photos, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    folder = {"file": "file", "below a file": "file/x", "no permission": "locked"}
    path = tmp_path / folder.get(kind, "locked/x")
    model = TINY if script == "main_pretrain" else VIT
    flags = ["--data_path", photos, *model, "--batch_size", 8, "--output_dir", ""]
    line = refused(script, *flags, flag, path, powerless=True)
    assert str(path) in line


def test_one_folder_is_not_made_where_the_other_cannot_be(refused, photos, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    flags = ["--data_path", photos, *TINY, "--batch_size", 8, "--output_dir", "new", "--log_dir"]
    for path in ("file", "locked/x"):
        refused("main_pretrain", *flags, tmp_path / path, powerless=True)


@pytest.mark.parametrize("flag", ["--data_path", "--output_dir", "--resume"])
@pytest.mark.parametrize("kind", ["long", "loop", "locked"])
def test_odd_paths_are_one_line(flag, kind, refused, photos, tmp_path):
    path = tmp_path / ("x" * 300 if kind == "long" else kind)
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "locked":
        path.mkdir(mode=0o000)
        path /= "x"
    flags = ["--data_path", photos, *TINY, "--batch_size", 8, "--output_dir", "out", flag, path]
    flags += ["--resume", "auto"] * (flag == "--output_dir")
    line = refused("main_pretrain", *flags, powerless=True)
    assert len(line) < 800


@pytest.mark.parametrize("kind", ["file", "no permission", "--cluster slurm"])
def test_jobs_that_cannot_be_submitted(kind, refused, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    flags = ["--data_path", "digits", "--nodes", 1, "--ngpus", 0, "--cluster", "local"]
    flags += ["--job_dir", tmp_path / ("locked" if kind == "no permission" else "file")]
    if kind == "--cluster slurm":
        flags = ["--data_path", "digits", "--cluster", "local", "--nodes", 2]
    refused("submitit_pretrain", *flags, powerless=True)


@pytest.mark.parametrize("script", ["main_pretrain", "main_finetune", "main_linprobe"])
@pytest.mark.parametrize(
    "kind", ["missing", "file", "empty", "locked", "locked inside", "new\nline"]
)
def test_data_that_are_not_there(script, kind, refused, tmp_path):
    data = tmp_path / "data"
    if kind == "file":
        data.touch()
    elif kind in ("empty", "locked", "locked inside"):
        (data / "train/a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(
            data / "train/a/x.png" if kind != "empty" else tmp_path / "x.png"
        )
        if kind != "empty":
            (data if kind == "locked" else data / "train/a").chmod(0o000)
    elif kind == "new\nline":
        data = tmp_path / "new\nline"
    model = TINY if script == "main_pretrain" else VIT
    refused(script, "--data_path", data, *model, "--output_dir", tmp_path / "out", powerless=True)
    data.exists() and data.chmod(0o700)


# --- bad images


@pytest.mark.parametrize(("bad", "status"), [(2, 0), (3, 1)])
def test_ranks_count_bad_images_together(bad, status, tmp_path):
    """Of 200 images 2 may be bad; each process has loaders of its own."""
    for i in range(200):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:03d}.png")
    names = [f"{i:03d}.png" for i in (7, 77, 177)[:bad]]
    for name in names:
        os.truncate(tmp_path / name, 20)
    flags = ["--data_path", tmp_path, *TINY, "--num_workers", 1, "--batch_size", 25]
    flags += ["--epochs", 2, "--output_dir", tmp_path / "out"]
    result = python("main_pretrain.py", *flags, processes=2)
    assert result.returncode == status, result.stderr
    assert [result.stdout.count(f"{name}' is not readable") for name in names] == [1] * bad
    listed = (tmp_path / "out/bad-images.txt").read_text().splitlines()
    assert sorted(listed) == [str(tmp_path / name) for name in names]
    said = [line for line in result.stderr.splitlines() if line.startswith("main_pretrain.py: ")]
    assert len(said) == status
    assert (
        "3 of 200 images are not readable, more than 1%: listed in" in "".join(said) or not status
    )
