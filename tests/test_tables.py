"""Parquet and data sets of Hugging Face's train as a folder of the same images does."""

import io
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same_run, at_step, log_of, run_main, the_error
from PIL import Image

import main_pretrain
from util.datasets import open_dataset, open_labelled
from util.errors import UserError

datasets = pytest.importorskip("datasets", reason="it is optional")


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_images_and_labels_are_the_folder_s(prefix, table, photos):
    train, val, classes = open_labelled(f"{prefix}{table}")
    assert classes == 2
    for ours, split in ((train, True), (val, False)):
        theirs = open_dataset(str(photos), split)
        assert ours.classes == theirs.classes
        assert ours.targets.tolist() == theirs.targets.tolist()
        for index in range(len(theirs)):
            assert ours.content(index)[0].read() == Path(theirs.name(index)).read_bytes()
    assert "(image, label)" in train.where


def test_a_run_ends_in_the_folder_s_bits_though_it_is_stopped(flags, table, tmp_path, monkeypatch):
    flags = [*flags, "--epochs", 2]
    assert run_main(main_pretrain, *flags, "--output_dir", tmp_path / "whole") == 0
    flags += ["--data_path", table]
    with monkeypatch.context() as patch:
        at_step(patch, 1, 1, lambda: signal.raise_signal(signal.SIGTERM))
        assert run_main(main_pretrain, *flags) == 128 + signal.SIGTERM
    assert run_main(main_pretrain, *flags, "--resume", "auto", "--num_workers", 2) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "out")
    assert "2 .parquet files of" in log_of(tmp_path / "out")[0]["data"]["train"]


def test_what_save_to_disk_wrote_is_loaded(table, tmp_path):
    datasets.load_dataset(str(table)).save_to_disk(str(tmp_path / "saved"))
    ours, theirs = (open_dataset(f"hf:{path}", True) for path in (tmp_path / "saved", table))
    assert ours.targets.tolist() == theirs.targets.tolist()
    assert ours.content(5)[0].read() == theirs.content(5)[0].read()


def parquet(folder: Path, columns: dict, features: dict | None = None) -> str:
    rows = datasets.Dataset.from_dict(columns, features and datasets.Features(features))
    rows.to_parquet(str(folder / "a.parquet"))
    return str(folder)


def picture(shade: int) -> dict:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), shade).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "x.png"}


def test_other_columns_of_labels(tmp_path):
    columns = {"img": [picture(i) for i in range(3)], "fine_label": ["10", "9", "10"]}
    features = {"img": datasets.Image(), "fine_label": datasets.Value("string")}
    dataset = open_dataset(parquet(tmp_path, columns, features), train=True)
    assert dataset.classes == ["9", "10"]
    assert dataset.targets.tolist() == [1, 0, 1]
    assert [np.asarray(dataset[i][0])[0, 0] for i in range(3)] == [0, 1, 2]


def test_missing_images_and_labels_are_told(tmp_path, flags, capsys):
    columns = {"image": [picture(i) for i in range(31)] + [None], "label": [0] * 31 + [-1]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    path = parquet(tmp_path, columns, features)
    assert run_main(main_pretrain, *flags, "--epochs", 1, "--data_path", path) == 0
    assert "row 31' is not readable (the row has no image)" in capsys.readouterr().out
    with pytest.raises(UserError, match="1 of 32 rows have no label"):
        open_labelled(path, val_fraction=0.5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: parquet(folder, {"text": ["a"]}), "no column of images; it has text"),
        (lambda folder: (folder / "a.parquet").write_bytes(b"x"), "a.parquet: "),
        (lambda folder: "hf:" + str(folder / "none"), "none: Couldn't find any data file"),
    ],
)
def test_what_is_no_table_of_images_is_one_line(make, words, tmp_path, flags, capsys):
    path = make(tmp_path)
    path = path if isinstance(path, str) else tmp_path
    assert run_main(main_pretrain, *flags, "--data_path", path) == 1
    assert words in the_error(capsys.readouterr().err)


def test_without_the_library_the_error_names_it(table, flags, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert run_main(main_pretrain, *flags, "--data_path", table) == 1
    assert "pip install datasets" in the_error(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("kind", "values", "classes", "targets"),
    [
        ("string", ["b", None, "a"], ["a", "b"], [1, -1, 0]),
        ("int64", [7, None, -1], ["7"], [0, -1, -1]),
        ("float32", [0.5, 1.0, 2.0], [""], [0, 0, 0]),
    ],
)
def test_labels_of_any_type_are_taken_or_told(kind, values, classes, targets, tmp_path, caplog):
    columns = {"image": [picture(i) for i in range(3)], "label": values}
    features = {"image": datasets.Image(), "label": datasets.Value(kind)}
    with caplog.at_level("INFO"):
        dataset = open_dataset(parquet(tmp_path, columns, features), train=True)
    assert (dataset.classes, dataset.targets.tolist()) == (classes, targets)
    assert ("not used as classes" in caplog.text) == (kind == "float32")


def test_images_without_any_label_are_pretrained_on(tmp_path, flags):
    """As ImageNet's test split."""
    columns = {"image": [picture(i) for i in range(32)], "label": [-1] * 32}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    path = parquet(tmp_path, columns, features)
    assert run_main(main_pretrain, *flags, "--epochs", 1, "--data_path", path) == 0
    assert log_of(tmp_path / "out")[0]["data"]["train"].count("without labels") == 1


def test_columns_that_are_no_images_are_one_line(tmp_path):
    path = parquet(tmp_path, {"image": [1, 2], "label": [0, 1]})
    with pytest.raises(UserError, match="column image: "):
        open_dataset(path, train=True)


def test_a_cache_that_another_machine_lacks_is_one_line(table, monkeypatch):
    import pickle

    dataset = open_dataset(str(table), train=True)
    sent = pickle.dumps(dataset)
    assert pickle.loads(sent).targets.tolist() == dataset.targets.tolist()

    def missing(*_):
        raise FileNotFoundError(2, "No such file", "/cache/x.arrow")

    monkeypatch.setattr("util.data.tables.pickle.loads", missing)
    with pytest.raises(UserError, match=r"/cache/x\.arrow: every machine must see this cache"):
        dataset.__setstate__(dataset.__getstate__())


@pytest.mark.parametrize("name", ["hf:", "hf::x"])
def test_a_name_is_wanted(name):
    with pytest.raises(UserError, match="hf:NAME or hf:NAME:CONFIG"):
        open_dataset(name, train=True)


def test_all_splits_at_once_and_one_saved_alone(table, tmp_path):
    assert len(open_dataset(f"hf:{table}", None)) == 64
    datasets.load_dataset(str(table), split="train").save_to_disk(str(tmp_path / "one"))
    assert len(open_dataset(f"hf:{tmp_path}/one", True)) == 48
