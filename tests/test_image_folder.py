"""Folders as people have them: leftovers, other names, links; what is left out is told."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import TINY, VIT, log_of, run_main, state_of, the_error
from PIL import Image

import main_linprobe
import main_pretrain
from util.data.image_folder import EXTENSIONS
from util.datasets import open_dataset, open_labelled
from util.errors import UserError

CLASSES = ("airplane", "bird", "ship")


@pytest.fixture
def root(tmp_path) -> Path:
    """train/ with 4 images of each class, val/ with 2; all different."""
    shade = iter(range(1000))
    for split, count in (("train", 4), ("val", 2)):
        for name in CLASSES:
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (next(shade) * 5, 0, 99)).save(folder / f"{i}.jpg")
    return tmp_path / "images"


def clutter(root: Path) -> None:
    for place in (".ipynb_checkpoints", "bird/.ipynb_checkpoints", "__MACOSX/bird"):
        (root / "train" / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / "train" / place / "a-checkpoint.jpg")
    (root / "train/ship/._0.jpg").write_bytes(b"\0\5\x16\7" + bytes(120))
    (root / "train/ship/Thumbs.db").touch()


def names_of(dataset) -> list[str]:
    return [dataset.name(i) for i in range(len(dataset))]


def test_leftovers_are_neither_images_nor_classes(root):
    before = names_of(open_dataset(str(root), train=True))
    clutter(root)
    after = open_dataset(str(root), train=True)
    assert names_of(after) == before
    assert tuple(after.classes) == CLASSES
    assert not after.left_out


@pytest.mark.parametrize(
    ("train", "val"),
    [("Train", "Test"), ("train", "valid"), ("training", "validation"), ("TRAIN", "VAL")],
)
def test_splits_are_found_by_their_usual_names(train, val, root):
    (root / "train").rename(root / train)
    (root / "val").rename(root / val)
    images, held_out, classes = open_labelled(str(root))
    assert (len(images), len(held_out), classes) == (12, 6, 3)
    assert Path(images.root) == root / train
    assert Path(held_out.root) == root / val


def test_val_is_preferred_to_test_and_that_is_said(root, caplog):
    caplog.set_level("INFO")
    (root / "Test").mkdir()
    assert Path(open_dataset(str(root), train=False).root) == root / "val"
    assert "val/ is used, not Test" in caplog.text


def test_one_split_name_among_classes_is_no_class(root):
    (root / "train/bird").rename(root / "train/test")
    with pytest.raises(UserError, match="folders that are splits, not classes: test"):
        open_labelled(str(root))


def test_pretraining_on_a_validation_folder_is_said(root, caplog):
    (root / "train").rename(root / "other")
    assert len(open_dataset(str(root), train=True)) == 18
    assert f"warning: no train/ in {root}: all of it is used, val/ too" in caplog.text


def test_held_out_images_are_told_as_what_they_are(root, capsys):
    (root / "train/bird/a.dcm").touch()
    flags = ["--data_path", root, *VIT, "--output_dir", ""]
    flags += ["--val_fraction", 0.25, "--batch_size", 2, "--knn"]
    assert run_main(main_linprobe, *flags) == 0
    out = capsys.readouterr().out
    assert f"train: 9 images of {root}/train in 3 classes of 3; left out 1 .dcm; all" in out
    assert f"val: 3 images of {root}/train in 3 classes of 1; left out 1 .dcm; all" in out


def test_splits_are_not_classes(root):
    (root / "train").rename(root / "test")
    with pytest.raises(UserError, match="folders that are splits, not classes: test, val"):
        open_labelled(str(root), val_fraction=0.5)
    assert len(open_dataset(str(root), train=True)) == 18  # whose labels nobody asks for


def test_one_class_may_be_called_train(root):
    (root / "train/bird").rename(root / "train/train")
    (root / "val/bird").rename(root / "val/train")
    assert open_labelled(str(root))[0].classes == ["airplane", "ship", "train"]


def test_what_lies_beside_the_splits_is_told(root, caplog):
    (root / "train/bird").rename(root / "train/train")
    for folder, file in (("notes", "a.txt"), (".hidden", "a.jpg")):
        (root / "train" / folder).mkdir()
        (root / "train" / folder / file).touch()
    assert len(open_dataset(str(root), train=True)) == 12
    assert "is used, not" not in caplog.text
    assert len(open_dataset(str(root / "train"), train=True)) == 4
    assert f"warning: {root}/train: train/ is used, not airplane, ship" in caplog.text
    shutil.copytree(root / "val", root / "unlabeled")  # beside train/ and val/
    open_dataset(str(root), train=False)
    assert f"{root}: " not in caplog.text
    open_dataset(str(root), train=True)
    assert f"warning: {root}: train/ is used, not unlabeled" in caplog.text


def test_a_stray_image_is_named(root):
    Image.new("RGB", (8, 8)).save(root / "train/preview.jpg")
    with pytest.raises(UserError, match=r"beside the class folders: preview\.jpg"):
        open_labelled(str(root))
    assert len(open_dataset(str(root), train=True)) == 13


def test_an_empty_class_is_named(root):
    (root / "train/zebra").mkdir()
    (root / "train/zebra/notes.txt").touch()
    with pytest.raises(UserError, match=r"without images: zebra; left out: 1 \.txt"):
        open_labelled(str(root))


def test_a_class_that_val_lacks_is_named(root):
    for file in (root / "val/ship").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="val: class folders without images: ship"):
        open_labelled(str(root))
    (root / "val/ship").rmdir()
    with pytest.raises(UserError, match="must hold the same classes; 1 are in one only: ship"):
        open_labelled(str(root))


def test_links_are_followed_and_loops_are_not(root, tmp_path):
    linked = tmp_path / "links"
    for split in ("train", "val"):
        (linked / split).mkdir(parents=True)
        for name in CLASSES:
            os.symlink(root / split / name, linked / split / name)
    os.symlink(linked / "train", linked / "train/loop")
    os.symlink(root / "train", root / "train/bird/loop")
    dataset = open_dataset(str(linked), train=True)
    assert len(dataset) == len(set(map(os.path.realpath, names_of(dataset)))) == 12
    assert tuple(dataset.classes) == CLASSES


@pytest.mark.parametrize("count", [2, 3])
def test_links_between_folders_come_to_an_end(count, tmp_path):
    """Each way through them that comes to no folder twice: a, a/b, a/b/c, a/c, a/c/b, b, ..."""
    names = "abc"[:count]
    for outside in (tmp_path / "one", tmp_path / "two"):
        for name in names:
            (outside / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(outside / name / "1.png")
            for other in set(names) - {name}:
                (outside / name / other).symlink_to(f"../{other}")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/x").symlink_to(tmp_path / "two/a")
    (tmp_path / "two/a/up").symlink_to(tmp_path)
    assert len(open_dataset(str(tmp_path / "one"), train=True)) == {2: 4, 3: 15}[count]
    assert len(open_dataset(str(tmp_path / "images"), train=True)) == {2: 2, 3: 5}[count]


@pytest.mark.parametrize("extension", [*sorted(EXTENSIONS - {".npy"}), ""])
def test_every_extension_that_the_decoder_reads_is_taken(extension, root):
    for split in ("train", "val"):
        for file in (root / split / "bird").iterdir():
            file.rename(file.with_suffix(extension.upper()))
    images, held_out, _ = open_labelled(str(root))
    assert (len(images), len(held_out)) == (12, 6)


def test_what_is_left_out_is_counted_and_told(root, tmp_path, capsys):
    for i in range(3):
        (root / f"train/bird/{i}.txt").touch()
    (root / "train/ship/nothing").write_text("no image")
    (root / "train/ship/a.zip").touch()
    flags = ["--data_path", root, *TINY, "--batch_size", 4, "--epochs", 1, "--warmup_epochs", 0]
    flags += ["--eval_freq", 1, "--output_dir", tmp_path / "out"]
    assert run_main(main_pretrain, *flags) == 0
    out = capsys.readouterr().out
    line = f"train: 12 images of {root}/train in 3 classes of 4; left out 3 .txt, 1 .zip, "
    line += "1 without extension; all looked at: RGB uint8, 16 x 16 pixels, values 0 to "
    assert line in out
    assert f"val: 6 images of {root}/val in 3 classes of 2; all looked at" in out


def test_what_was_opened_is_in_the_log_and_the_checkpoint(root, tmp_path, capsys):
    flags = ["--data_path", root, *TINY, "--batch_size", 4, "--epochs", 2, "--warmup_epochs", 0]
    assert run_main(main_pretrain, *flags, "--output_dir", tmp_path / "out") == 0
    data = state_of(tmp_path / "out")["data"]
    assert data["train"].startswith(f"train: 12 images of {root}/train")
    first, second = log_of(tmp_path / "out")
    assert first["data"] == data
    assert "data" not in second
    assert data["train"] in capsys.readouterr().out


def test_archives_are_no_images_and_are_named(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shard-000.tar").write_bytes(b"x" * 1000)
    flags = ["--data_path", tmp_path / "data", *TINY, "--output_dir", ""]
    assert run_main(main_pretrain, *flags) == 1
    shown = capsys.readouterr()
    assert "shard-000.tar" in (line := the_error(shown.err))
    assert "no images" in line
    assert "left out 1 ends of damaged archives" in line
    assert "shard-000.tar: invalid header; the 0 images before that are used" in shown.out


def test_too_few_images_are_an_error(root, capsys):
    flags = ["--data_path", root, *VIT, "--output_dir", ""]
    assert run_main(main_linprobe, *flags) == 1
    assert "12 images do not fill one step of 512" in the_error(capsys.readouterr().err)
