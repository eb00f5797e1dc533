"""Labels from a table, for folders without classes."""

import unicodedata
from pathlib import Path

import pytest
from conftest import log_of, run_main, the_error
from PIL import Image

import main_linprobe
from util.datasets import open_dataset, open_labelled
from util.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    for split, count in (("train", 6), ("val", 4)):
        for i in range(count):
            path = tmp_path / f"data/{split}/{i % 2}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    return tmp_path / "data"


def table(folder: Path, text: str) -> str:
    (folder / "labels.csv").write_text(text)
    return str(folder / "labels.csv")


def test_files_are_found_in_the_folder_or_its_split(folder):
    rows = "file,label\n./train/0/0.png,10\ntrain/1/1.png,9\nval/0/0.png,9\n0/4.png,9\n"
    train, val, classes = open_labelled(str(folder), labels=table(folder, rows))
    assert (classes, train.classes) == (2, ["9", "10"])
    assert [Path(train.name(i)).name for i in range(len(train))] == ["0.png", "4.png", "1.png"]
    assert train.targets.tolist() == [1, 0, 0]
    assert (val.targets.tolist(), val.empty) == ([0], ["10"])
    assert train.left_out[f"images that {folder}/labels.csv does not have"] == 3


def test_a_path_that_fits_images_of_two_splits_is_asked_about(folder):
    (folder / "val").rename(folder / "test")  # as Kaggle's, whose table is of the training images
    path = table(folder, "file,label\n0/0.png,a\n1/1.png,b\n")
    for split, name in ((True, "train/0/0.png"), (False, "test/0/0.png"), (None, "test/0/0.png")):
        with pytest.raises(UserError, match=r"0/0.png is in test/, train/: which one\? ") as error:
            open_dataset(str(folder), split, labels=path)
        assert str(error.value).endswith(f"Write {name}")
    path = table(folder, "file,label\ntrain/0/0.png,a\n1/5.png,b\n")
    assert open_dataset(str(folder), True, labels=path).targets.tolist() == [0, 1]


def test_the_whole_folder_s_images_are_found_below_their_splits(folder, caplog):
    path = table(folder, "file,label\n0/4.png,a\nval/1/1.png,b\n1/5.png,b\n")
    dataset = open_dataset(str(folder), None, labels=path)
    names = [Path(dataset.name(i)).relative_to(folder).as_posix() for i in range(len(dataset))]
    assert names == ["train/0/4.png", "train/1/5.png", "val/1/1.png"]
    assert "not there" not in caplog.text


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_paths_as_windows_and_macos_write_them(form, folder, caplog):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    for split in ("train", "val"):
        (folder / split / "0").rename(folder / split / unicodedata.normalize(form, "caf\xe9"))
    rows = "caf\xe9\\4.png,a\ntrain\\1\\5.png,b\nval\\caf\xe9\\0.png,a\n"
    path = table(folder, unicodedata.normalize(other, f"file,label\n{rows}"))
    assert open_dataset(str(folder), True, labels=path).targets.tolist() == [1, 0]
    assert "not there" not in caplog.text
    path = table(folder, unicodedata.normalize(other, "file,label\ncaf\xe9/2.png,a\n"))
    with pytest.raises(UserError, match=r"2.png is in train/, val/: which one\? Write train/caf"):
        open_dataset(str(folder), True, labels=path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_a_table_in_another_encoding_is_one_line(encoding, folder):
    (folder / "labels.csv").write_bytes("file\tlabel\n0/0.png\tcaf\xe9\n".encode(encoding))
    with pytest.raises(UserError, match=r"labels.csv: this is not UTF-8: save it as UTF-8$"):
        open_dataset(str(folder), True, labels=str(folder / "labels.csv"))


@pytest.mark.parametrize(
    "text",
    [
        "Image;Class\n0/4.png;a b\n",
        "\ufefffilename\tid\tlabel\n0/4.png\t1\ta b\n",
        'file,label\n"0/4.png","a b"\n\n',
    ],
)
def test_tables_as_people_write_them(text, folder):
    dataset = open_dataset(str(folder), True, labels=table(folder, text))
    assert (dataset.classes, len(dataset)) == (["a b"], 1)
    assert dataset[0][0].getpixel((0, 0)) == (4, 0, 0)


def test_a_table_may_name_its_column(folder):
    path = table(folder, "image,age,breed\n0/4.png,3,b\n1/5.png,3,a\n")
    assert open_dataset(str(folder), True, labels=f"{path}:breed").targets.tolist() == [1, 0]


def test_files_that_are_not_there_are_told(folder, caplog):
    path = table(folder, "file,label\n0/4.png,a\ntrain/9.png,b\n")
    assert len(open_dataset(str(folder), True, labels=path)) == 1
    assert f"warning: --labels {path}: 1 not there: train/9.png" in caplog.text


def test_a_probe_takes_them(folder, tmp_path):
    rows = "".join(f"{i % 2}/{i}.png,{'ab'[i // 3]}\n" for i in range(6))
    flags = ["--data_path", folder / "train", "--labels", table(folder, f"file,label\n{rows}")]
    flags += ["--model", "vit_nano_patch4", "--input_size", 8, "--epochs", 1, "--batch_size", 2]
    flags += ["--val_fraction", 0.3, "--num_workers", 0, "--output_dir", tmp_path / "out"]
    assert run_main(main_linprobe, *flags, "--device", "cpu") == 0
    assert "labels.csv in 2 classes of 2" in log_of(tmp_path / "out")[0]["data"]["train"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no columns file and label, but ; "),
        ("a,b\n1,2\n", "no columns file and label, but a,b; .*labels.csv:COLUMN takes another"),
        ("file,label\n0/0.png\n", "line 2 lacks a file or a label"),
        ("file,label\n0/0.png,\n", "line 2 lacks a file or a label"),
        ("file,label\n0/0.png,a\n0/0.png,b\n", "line 3: two labels for 0/0.png"),
        ("file,label\nother.png,a\n", r"no images in .*; left out 6 images that"),
    ],
)
def test_tables_that_cannot_be_used_are_one_line(text, words, folder):
    with pytest.raises(UserError, match=words):
        open_dataset(str(folder), True, labels=table(folder, text))


def test_what_has_its_own_labels_takes_no_table(folder, flags, capsys):
    with pytest.raises(UserError, match=r"none\.csv: No such file"):
        open_dataset(str(folder), True, labels="none.csv")
    words = ["--data_path", "digits", "--labels", "x.csv", "--model", "vit_nano_patch4"]
    assert run_main(main_linprobe, *words, "--input_size", 8, "--output_dir", "") == 1
    assert "--labels is for a folder of images, and digits has its own" in the_error(
        capsys.readouterr().err
    )


def test_paths_may_be_absolute_and_tables_have_colons(folder, caplog):
    (folder / "run:1").mkdir()
    rows = "".join(f"{folder}/train/{i % 2}/{i}.png,{i % 2}\n" for i in range(6))
    rows += f"{folder}/val/0/0.png,0\n1/1.png,1\n"
    (folder / "run:1/labels.csv").write_text(f"file,label\n{rows}")
    path = f"{folder}/run:1/labels.csv"
    assert len(open_dataset(str(folder), True, labels=path)) == 6
    assert len(open_dataset(str(folder), True, labels=f"{path}:label")) == 6
    assert len(open_dataset(str(folder), False, labels=path)) == 2  # 1/1.png is in both splits
    assert "not there" not in caplog.text


def test_long_fields_and_odd_line_ends(folder):
    path = table(folder, f'file,label,notes\n0/4.png,a,"{"x" * 200_000}\u2028\ny"\n1/5.png,b,\n')
    assert open_dataset(str(folder), True, labels=path).classes == ["a", "b"]
