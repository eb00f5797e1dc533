"""Files are listed as torchvision lists them, and a kept list is believed only while it is true."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, run_main, the_error
from safetensors.numpy import save_file
from torchvision import datasets

import main_pretrain
import util.data.file_list
from util.data.file_list import list_files, write_lists
from util.data.index import Index, Strings
from util.datasets import open_dataset

LONG_AGO = 1_600_000_000  # seconds


@pytest.fixture
def folder(tmp_path) -> Path:
    """Class folders whose names sort differently with and without what is below them."""
    for name in ("a/2.png", "a/10.png", "a/x/1.jpg", "a-b/1.JPEG", "b/note.txt", ".c/1.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return settle(tmp_path / "images")


def settle(folder: Path) -> Path:
    """As if nothing had changed for years."""
    for path, _, _ in os.walk(folder):
        os.utime(path, (LONG_AGO, LONG_AGO))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(util.data.file_list, "WORTH_KEEPING", 1)
    (tmp_path / "output").mkdir()
    return tmp_path / "output" / "files.safetensors"


def test_images_and_labels_are_image_folder_s(folder):
    ours = open_dataset(str(folder), train=True)
    shutil.rmtree(folder / ".c")  # hidden, and not an image folder of ours
    theirs = datasets.ImageFolder(folder, allow_empty=True)
    names = [ours.name(i) for i in range(len(ours))]
    assert list(zip(names, ours.targets, strict=True)) == theirs.samples
    assert ours.classes == theirs.classes


def is_image(path: str) -> bool:
    return not path.endswith(".txt")


def listing_of(root: Path, cache: Path | None = None) -> dict[str, list[str]]:
    """Image names by folder."""
    index = list_files(root, is_image, cache)
    names = iter(index.strings("names"))
    folders = zip(index.strings("folders"), index["counts"], strict=True)
    return {folder: [next(names) for _ in range(count)] for folder, count in folders}


def walks(monkeypatch, folder: Path, cache: Path) -> tuple[bool, dict]:
    """Whether a listing looked at the folder's files, and the listing."""
    walked = []
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: walked.append(a) or walk(*a, **k))
    listing = listing_of(folder, cache)
    monkeypatch.setattr(os, "walk", walk)
    write_lists()
    return bool(walked), listing


def test_a_list_is_kept(folder, cache, monkeypatch):
    first, second = (walks(monkeypatch, folder, cache) for _ in range(2))
    assert (first[0], second[0]) == (True, False)
    assert first[1] == second[1]
    assert first[1]["a"] == ["10.png", "2.png"]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a/x/3.png").touch(),
        lambda folder: (folder / "a/2.png").unlink(),
        lambda folder: (folder / "a/2.png").rename(folder / "a/3.png"),
        lambda folder: (folder / "d").mkdir(),
        lambda folder: (folder / "b").rename(folder / "e"),
    ],
    ids=["added", "removed", "renamed", "new folder", "folder renamed"],
)
def test_a_kept_list_is_not_believed_after_a_change(folder, cache, monkeypatch, change):
    walks(monkeypatch, folder, cache)
    change(folder)
    again, listing = walks(monkeypatch, folder, cache)
    assert again
    assert listing == listing_of(folder)


def test_another_folder_s_list_is_not_believed(folder, cache, tmp_path, monkeypatch):
    walks(monkeypatch, folder, cache)
    (tmp_path / "other").mkdir()
    assert walks(monkeypatch, tmp_path / "other", cache) == (True, {"": []})


@pytest.mark.parametrize("damage", ["empty", "cut off", "of no list", "of another version"])
def test_a_damaged_list_is_not_believed(folder, cache, monkeypatch, damage):
    walks(monkeypatch, folder, cache)
    if damage == "of no list":
        save_file({"names": np.zeros(2)}, cache)
    elif damage == "of another version":
        monkeypatch.setattr(util.data.file_list, "RULES", 0)
    else:
        cache.write_bytes(cache.read_bytes()[: -9 * (damage == "cut off") or 0])
    assert walks(monkeypatch, folder, cache)[0]


def test_a_list_made_while_files_still_arrive_is_not_kept(folder, cache, monkeypatch):
    (folder / "a/now.png").touch()
    list_files(folder, is_image, cache)
    write_lists()
    assert not cache.exists()


def test_small_folders_leave_nothing_behind(folder, tmp_path):
    (tmp_path / "output").mkdir()
    list_files(folder, is_image, tmp_path / "output/files.safetensors")
    write_lists()
    assert list((tmp_path / "output").iterdir()) == []


def test_a_run_that_cannot_begin_makes_no_folder(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(util.data.file_list, "WORTH_KEEPING", 1)
    monkeypatch.setattr(util.data.file_list, "SETTLED", 0)
    flags = ["--data_path", photos, *TINY, "--epochs", 1, "--output_dir", tmp_path / "out"]
    assert run_main(main_pretrain, *flags, "--batch_size", 49) == 1
    assert "do not fill one step" in the_error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    assert run_main(main_pretrain, *flags, "--batch_size", 16) == 0
    assert (tmp_path / "out" / "files-train.safetensors").exists()


def test_a_list_of_100_000_files_opens_within_a_second(tmp_path):
    root = tmp_path / "images"
    for label in range(1000):
        (root / f"{label:03}").mkdir(parents=True)
    settle(root)
    folders = ["", *(f"{label:03}" for label in range(1000))]
    names = Strings.pack(f"{folder}_{i:05}.JPEG" for folder in folders[1:] for i in range(100))
    arrays = names.named("names") | Strings.pack(folders).named("folders")
    arrays["counts"] = np.array([0] + 1000 * [100])
    arrays["times"] = np.full(1001, LONG_AGO * 10**9)
    notes = {"root": str(root.resolve()), "left_out": {}, "archives": [], "rules": 5, "id": "x"}
    Index(arrays, notes).write(tmp_path / "files-train.safetensors")

    begin = time.process_time()
    dataset = open_dataset(str(root), train=True, cache_dir=str(tmp_path))
    assert time.process_time() - begin < 1
    assert len(dataset) == 100_000
    assert dataset.name(99_999) == str(root / "999" / "999_00099.JPEG")
    assert dataset.targets[-1] == 999
