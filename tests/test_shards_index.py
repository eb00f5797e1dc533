"""The index of archives: kept, shared by processes, and the order that it gives."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_shards import labelled, picture, shades, tar_of

import util.data.shards
from util.args import pretrain_parser
from util.data.file_list import write_lists
from util.data.images import BadImage
from util.data.index import Index
from util.data.loader import train_loader
from util.data.order import SeededDataset
from util.data.shards import Shards
from util.datasets import open_dataset
from util.errors import UserError


@pytest.fixture
def kept(monkeypatch):
    """Indices of small archives are kept, too."""
    monkeypatch.setattr(util.data.shards, "WORTH_KEEPING", 1)


def reads(monkeypatch, path: Path, cache: str = "") -> tuple[list[str], Shards]:
    """The archives that an opening lists, and the data set."""
    seen = []
    monkeypatch.setattr(util.data.shards, "ProcessPoolExecutor", None)  # all in this process
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    original = util.data.members.read_members
    monkeypatch.setattr(
        util.data.shards, "read_members", lambda name: seen.append(name) or original(name)
    )
    return seen, open_dataset(str(path), True, cache)


def test_an_index_is_kept_and_believed_while_it_is_true(kept, tmp_path, monkeypatch):
    tar_of(tmp_path / "a.tar", {"0.png": picture(1)})
    tar_of(tmp_path / "b.tar", {"0.png": picture(2)})
    assert len(reads(monkeypatch, tmp_path)[0]) == 2
    seen, dataset = reads(monkeypatch, tmp_path)
    assert (seen, shades(dataset)) == ([], [1, 2])
    tar_of(tmp_path / "b.tar", {"0.png": picture(3), "1.png": picture(4)})
    seen, dataset = reads(monkeypatch, tmp_path)
    assert (len(seen), shades(dataset)) == (2, [1, 3, 4])
    (index,) = tmp_path.glob("can-index-*")
    index.write_bytes(index.read_bytes()[:100])
    assert len(reads(monkeypatch, tmp_path)[0]) == 2


def test_an_archive_that_changes_meanwhile_is_not_misread(tmp_path):
    path = tar_of(tmp_path / "a.tar", {"0.png": picture(1), "1.png": picture(2)})
    dataset = open_dataset(str(path), train=True)
    util.data.shards._opened.cache_clear()
    with open(path, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(BadImage, match="has changed since it was indexed"):
        dataset[0]
    assert dataset.name(1) == f"{path}: image 1"


def test_where_shards_cannot_be_written_to_the_output_keeps_the_index(
    kept, tmp_path, monkeypatch, caplog
):
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    tar_of(folder / "a.tar", {"0.png": picture(1)})
    write = Index.write
    monkeypatch.setattr(Index, "write", lambda self, p: p.parent != folder and write(self, p))
    with caplog.at_level("INFO"):
        reads(monkeypatch, folder, str(out))
    assert f"{folder} cannot be written to: its index is kept in {out}" in caplog.text
    write_lists()
    assert len(list(out.glob("can-index-*"))) == 1
    assert reads(monkeypatch, folder, str(out))[0] == []


def test_two_processes_may_index_at_once(tmp_path):
    for n in range(8):
        tar_of(tmp_path / f"{n}.tar", {f"{i}.png": picture(i) for i in range(50)})
    code = "import sys, util.data.shards as s; s.WORTH_KEEPING = 1\n"
    code += "from util.datasets import open_dataset\n"
    code += "data = open_dataset(sys.argv[1], True); print(len(data), data.index.path)"
    words = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    (index,) = {process.communicate()[0] for process in both}
    (path,) = tmp_path.glob("can-index-*")
    assert index.split() == ["400", str(path)]
    assert not list(tmp_path.glob("*.tmp"))


def test_an_archive_of_the_same_size_is_told_by_its_time(tmp_path):
    path = tar_of(tmp_path / "a.tar", labelled({"0": 0, "1": 1}))
    dataset = open_dataset(str(path), train=True)
    util.data.shards._opened.cache_clear()
    size = path.stat().st_size
    tar_of(path, {f"{i}.png": picture(9 - i) for i in range(2)} | {"x.cls": b"0", "y.cls": b"1"})
    os.utime(path, ns=(0, 0))
    assert path.stat().st_size == size
    with pytest.raises(Exception, match="has changed since it was indexed"):
        dataset[0]


def test_other_ranks_map_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr(util.data.shards, "WORTH_KEEPING", 1)
    monkeypatch.setattr("util.data.index.SENT_WHOLE", 0)
    path = tar_of(tmp_path / "a.tar", labelled({str(i): i % 3 for i in range(500)}))
    dataset = open_dataset(str(path), train=True)
    sent = pickle.dumps(dataset)
    assert len(sent) < 2000
    again = pickle.loads(sent)
    assert again.targets.tolist() == dataset.targets.tolist()
    assert again.name(7) == dataset.name(7)
    (index,) = tmp_path.glob("can-index-*")
    dataset.index.write(index)  # by another run, at the same time
    assert len(pickle.loads(sent)) == 500
    index.unlink()
    with pytest.raises(UserError, match="every machine must see this file"):
        pickle.loads(sent)


def test_folders_are_sent_as_their_index(photos):
    dataset = open_dataset(str(photos), train=True)
    again = pickle.loads(pickle.dumps(dataset))
    assert [again.name(i) for i in range(48)] == [dataset.name(i) for i in range(48)]
    assert (again.classes, again.where) == (dataset.classes, dataset.where)


def window_of(path: Path, *flags: str) -> int:
    args = pretrain_parser().parse_args(["--data_path", "x", "--batch_size", "4", *flags])
    data = SeededDataset(open_dataset(str(path), train=True), lambda image: 0, 0)
    return train_loader(data, args, torch.device("cpu"), num_workers=0).sampler.window


def test_shards_of_one_class_each_are_not_windowed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("util.data.loader.WINDOW", 7)
    caplog.set_level(logging.INFO)
    for kind in ("sorted", "mixed"):
        (tmp_path / kind).mkdir()
        for n in range(4):
            labels = {str(i): n if kind == "sorted" else i % 4 for i in range(8)}
            tar_of(tmp_path / kind / f"{n}.tar", labelled(labels))

    for kind, window in (("mixed", 7), ("sorted", 0)):
        assert window_of(tmp_path / kind) == window
    assert "shards hold one class each: all images are shuffled at once" in caplog.text
    assert window_of(tmp_path / "sorted", "--shuffle_window", "9") == 9


def test_the_window_s_order_follows_the_seed():
    from util.data.order import EpochSampler

    groups = np.full(10, 10)
    orders = [[i for _, i in EpochSampler(range(100), 4, seed, groups, 20)] for seed in (0, 1)]
    assert orders[0] != orders[1]
