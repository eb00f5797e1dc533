"""What a classifier says, in files; classes are those of the checkpoint, by their names."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import log_of, run_main, state_of, the_error
from PIL import Image

import main_finetune
import main_linprobe
from util.predictions import balanced_weights

TINY_VIT = ["--model", "vit_nano_patch4", "--input_size", 8, "--num_workers", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Shades of grey in three classes of 24, 6 and 6 images, and for validation 8, 2 and 2."""
    root = tmp_path_factory.mktemp("shades")
    for split, counts in (("train", (24, 6, 6)), ("val", (8, 2, 2))):
        for name, base, count in zip("abc", (20, 120, 220), counts, strict=True):
            for i in range(count):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (base + i, base, base)).save(path)
    return root


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    flags = ["--data_path", data, *TINY_VIT, "--batch_size", 4, "--epochs", 12, "--blr", 50]
    flags += ["--warmup_epochs", 1, "--output_dir", out, "--seed", 3]
    assert run_main(main_linprobe, *flags) == 0
    return out


def weigh(data: Path, trained: Path, *flags: object) -> int:
    words = [*TINY_VIT, "--resume", trained / "checkpoint-last.pth", "--output_dir", "", *flags]
    return run_main(main_linprobe, "--data_path", data, "--eval", "--batch_size", 5, *words)


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_predictions_agree_with_the_scores(data, trained, tmp_path, capsys):
    files = ["--predictions", tmp_path / "p.csv", "--per_class", tmp_path / "c.csv"]
    assert weigh(data, trained, *files) == 0
    last = log_of(trained)[-1]
    shown = f"top-1 {last['test_acc1']:.2f} %, balanced {last['test_balanced']:.2f} %"
    assert shown in capsys.readouterr().out
    rows = table(tmp_path / "p.csv")
    assert [row["file"] for row in rows] == sorted(map(str, data.glob("val/*/*.png")))
    assert all(Path(row["file"]).parent.name == row["label"] for row in rows)
    right = [row["class_1"] == row["label"] for row in rows]
    assert 100 * np.mean(right) == pytest.approx(last["test_acc1"])
    for row in rows:
        best = [float(row[f"probability_{place}"]) for place in (1, 2, 3)]
        assert best == sorted(best, reverse=True)
        assert sum(best) == pytest.approx(1, abs=2e-4)
        assert {row[f"class_{place}"] for place in (1, 2, 3)} == set("abc")
    classes = table(tmp_path / "c.csv")
    assert [(row["class"], row["images"]) for row in classes] == [
        ("a", "8"),
        ("b", "2"),
        ("c", "2"),
    ]
    accuracies = [float(row["accuracy"]) for row in classes]
    assert np.mean(accuracies) == pytest.approx(last["test_balanced"], abs=0.01)


def test_a_folder_without_labels_is_classified(data, trained, tmp_path):
    (tmp_path / "new/train").mkdir(parents=True)
    for i, file in enumerate(sorted(data.glob("val/*/*.png"))):
        shutil.copy(file, tmp_path / "new" / ("train" if i % 2 else "") / f"{i:02d}.png")
    words = [*TINY_VIT, "--resume", trained / "checkpoint-last.pth", "--output_dir", ""]
    words += ["--predictions", tmp_path / "p.csv", "--predict", tmp_path / "new"]
    assert run_main(main_linprobe, *words) == 0
    assert weigh(data, trained, "--predictions", tmp_path / "labelled.csv") == 0
    rows = sorted(table(tmp_path / "p.csv"), key=lambda row: Path(row["file"]).name)
    assert len(rows) == 12
    for ours, theirs in zip(rows, table(tmp_path / "labelled.csv"), strict=True):
        assert "label" not in ours
        assert ours["class_1"] == theirs["class_1"]


@pytest.mark.parametrize("share", [["--dist_eval"], []])
def test_two_processes_write_what_one_does(share, data, trained, forks, tmp_path):
    files = ["--predictions", tmp_path / "one.csv", "--per_class", tmp_path / "d.csv"]
    assert weigh(data, trained, *files) == 0
    words = ["--data_path", data, *TINY_VIT, "--eval", *share, "--output_dir", ""]
    words += ["--resume", trained / "checkpoint-last.pth", "--predictions", tmp_path / "two.csv"]
    words += ["--per_class", tmp_path / "c.csv"]
    status, _, said = forks.run("main_linprobe", *words, cwd=tmp_path, processes=2)
    assert status == 0, said
    one, two = table(tmp_path / "one.csv"), table(tmp_path / "two.csv")
    assert [list(row.values())[:3] for row in one] == [list(row.values())[:3] for row in two]
    assert table(tmp_path / "c.csv") == table(tmp_path / "d.csv")


def test_classes_go_by_their_names(data, trained, forks, tmp_path, capsys):
    """Only val/ is there; classes that sort otherwise, or are others, are not taken on trust."""
    assert state_of(trained)["classes"] == ["a", "b", "c"]
    shutil.copytree(data / "val", tmp_path / "data/val")
    assert weigh(data, trained) == 0
    expected = capsys.readouterr().out.strip().splitlines()[-1].split(" ", 1)[1]
    assert weigh(tmp_path / "data", trained) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith(expected)
    # The same set in another order: the checkpoint's names, turned round.
    state = state_of(trained)
    state["classes"] = ["c", "b", "a"]
    state["model"]["head.1.weight"] = state["model"]["head.1.weight"].flip(0)
    state["model"]["head.1.bias"] = state["model"]["head.1.bias"].flip(0)
    (tmp_path / "turned").mkdir()
    torch.save(state, tmp_path / "turned/checkpoint-last.pth")
    assert weigh(data, tmp_path / "turned") == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith(expected)
    words = ["--data_path", data, *TINY_VIT, "--batch_size", 5, "--output_dir", "", "--eval"]
    words += ["--resume", tmp_path / "turned/checkpoint-last.pth"]
    # of two processes, only one has opened the data
    status, out, err = forks.run("main_linprobe", *words, cwd=tmp_path, processes=2)
    assert status == 0, err
    assert out.strip().splitlines()[-1].endswith(expected), out
    (tmp_path / "data/val/b").rename(tmp_path / "data/val/bee")
    assert weigh(tmp_path / "data", trained) == 1
    assert "2 classes are in one only: b (" in (line := the_error(capsys.readouterr().err))
    assert "bee (the data)" in line


def test_training_is_not_resumed_with_other_classes(data, trained, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "b").rename(tmp_path / "data" / split / "bee")
    flags = ["--data_path", tmp_path / "data", *TINY_VIT, "--batch_size", 4, "--epochs", 14]
    flags += ["--resume", trained / "checkpoint-last.pth", "--output_dir", tmp_path / "out"]
    assert run_main(main_linprobe, *flags) == 1
    assert "its classes are others (b, bee); --finetune" in the_error(capsys.readouterr().err)


def test_what_fits_other_shapes_is_the_checkpoint_s(data, tmp_path, capsys):
    """A mark at the edge of wide images, which the middle of them does not show."""
    for file in data.glob("*/[ab]/*.png"):
        copy = tmp_path / "data" / file.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (24, 8), (90, 90, 90))
        image.paste((250, 0, 0) if file.parent.name == "a" else (0, 0, 250), (0, 0, 6, 8))
        image.save(copy)
    flags = ["--data_path", tmp_path / "data", *TINY_VIT, "--epochs", 2, "--blr", 50]
    flags += ["--batch_size", 4, "--warmup_epochs", 0, "--cache_features", "--resize", "squash"]
    assert run_main(main_linprobe, *flags, "--output_dir", tmp_path / "out") == 0
    loss = f"loss {log_of(tmp_path / 'out')[-1]['test_loss']:.4f}"
    for resize, same in (([], True), (["--resize", "crop"], False)):
        capsys.readouterr()
        assert weigh(tmp_path / "data", tmp_path / "out", *resize) == 0
        assert (loss in capsys.readouterr().out) == same


def test_a_share_of_the_training_images_keeps_its_classes(data, trained, capsys):
    assert weigh(data, trained, "--val_fraction", 0.5) == 0
    said = capsys.readouterr()
    assert "top-1" in said.out
    assert "was trained on some of these images, with --val_fraction 0.0" in said.out + said.err


def test_balanced_weights_make_classes_alike():
    weights = balanced_weights(np.array([0] * 6 + [1] * 3 + [2]), 3)
    counts = torch.tensor([6.0, 3.0, 1.0])
    torch.testing.assert_close(weights * counts, torch.full((3,), 10 / 3))


def test_of_images_that_look_alike_weights_decide(data, tmp_path):
    """A classifier that can tell nothing learns how often each class is drawn: 2/3, or 1/3."""
    for file in data.glob("*/*/*.png"):
        copy = tmp_path / "data" / file.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (9, 9, 9)).save(copy)
    flags = ["--data_path", tmp_path / "data", *TINY_VIT, "--batch_size", 12, "--epochs", 20]
    for name, extra in (("plain", []), ("weighted", ["--class_weights", "balanced"])):
        out = tmp_path / name
        assert run_main(main_linprobe, *flags, *extra, "--blr", 50, "--output_dir", out) == 0
        assert weigh(tmp_path / "data", out, "--predictions", out / "p.csv") == 0
    rows = [table(tmp_path / name / "p.csv")[0] for name in ("plain", "weighted")]
    assert [float(row["probability_1"]) for row in rows] == [
        pytest.approx(2 / 3, abs=0.1),
        pytest.approx(1 / 3, abs=0.1),
    ]


def test_another_input_size_resizes_positions(data, trained, capsys):
    assert weigh(data, trained, "--input_size", 16) == 0
    assert "pos_embed, resized from 2 x 2 to 4 x 4 patches" in capsys.readouterr().out


def test_finetuned_weights_predict_too(data, tmp_path):
    flags = ["--data_path", data, *TINY_VIT, "--batch_size", 12, "--epochs", 1, "--class_weights",
             "balanced", "--mixup", 0.2, "--output_dir", tmp_path / "out"]  # fmt: skip
    assert run_main(main_finetune, *flags) == 0
    words = [*TINY_VIT, "--predict", data, "--resume", tmp_path / "out/checkpoint-last.pth"]
    words += ["--predictions", tmp_path / "p.csv", "--output_dir", ""]
    assert run_main(main_finetune, *words) == 0
    assert len(table(tmp_path / "p.csv")) == 48  # train/ and val/


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eval", "--resume", "R", "--predictions", "D"], "cannot write"),
        (["--eval", "--resume", "R", "--per_class", "D"], "cannot write"),
    ],
)
def test_what_cannot_be_written_is_one_line(flags, words, data, trained, tmp_path, capsys):
    values = {"R": trained / "checkpoint-last.pth", "D": tmp_path}
    flags = [values.get(word, word) for word in flags]
    assert run_main(main_linprobe, "--data_path", data, *TINY_VIT, "--output_dir", "", *flags) == 1
    assert words in the_error(capsys.readouterr().err)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "the following arguments are required: --data_path"),
        (["--predict", "x"], "--predict needs the weights to predict by"),
        (["--predict", "x", "--resume", "y"], "--predict needs a file to write to"),
        (["--data_path", "x", "--predictions", "y"], "--predictions is written with --eval"),
        (["--data_path", "x", "--per_class", "y"], "--per_class is written with --eval"),
    ],
)
def test_flags_that_lack_others_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        main_finetune.get_args_parser().parse_args(flags)
    assert end.value.code == 2
    assert words in the_error(capsys.readouterr().err)


def test_unreadable_images_get_no_prediction(data, trained, tmp_path):
    for i in range(120):
        (tmp_path / "new").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, 20, 20)).save(tmp_path / f"new/{i:03d}.png")
    (tmp_path / "new/005.png").write_bytes(b"no image")
    words = [*TINY_VIT, "--resume", trained / "checkpoint-last.pth", "--output_dir", ""]
    words += ["--predictions", tmp_path / "p.csv", "--predict", tmp_path / "new"]
    assert run_main(main_linprobe, *words) == 0
    rows = table(tmp_path / "p.csv")
    assert (rows[5]["class_1"], rows[5]["probability_3"]) == ("", "")
    assert all(row["class_1"] for i, row in enumerate(rows) if i != 5)


def test_weights_without_a_classifier_predict_nothing(tmp_path, capsys):
    torch.save({"model": {"patch_embed.proj.weight": torch.zeros(2, 3, 4, 4)}}, tmp_path / "a.pth")
    words = [*TINY_VIT, "--predict", tmp_path, "--resume", tmp_path / "a.pth"]
    words += ["--predictions", tmp_path / "p.csv", "--output_dir", ""]
    assert run_main(main_linprobe, *words) == 1
    assert "holds no classifier: it was pretrained alone" in the_error(capsys.readouterr().err)
