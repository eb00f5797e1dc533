"""Shards that `python -m util.shards` writes."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_main, the_error, write_shards
from PIL import Image
from test_shards import picture

import util.shards
from util.datasets import open_dataset


def test_shards_are_shuffled_once_and_lose_nothing(photos, tmp_path):
    dataset = open_dataset(str(write_shards(photos, tmp_path / "out")), train=True)
    folder = open_dataset(str(photos), train=True)
    contents = {Path(folder.name(i)).read_bytes(): folder.targets[i] for i in range(48)}
    ours = {dataset.content(i)[0].getvalue(): dataset.targets[i] for i in range(48)}
    assert ours == contents
    assert list(ours) != list(contents)
    assert dataset.classes == folder.classes


def test_large_images_are_made_smaller_and_upright(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    ramp = np.linspace(0, 255, 100 * 60, dtype=np.uint8).reshape(60, 100)
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.fromarray(ramp).save(tmp_path / "in/a.jpg", exif=exif, quality=95)
    Image.fromarray(ramp).resize((20, 12)).save(tmp_path / "in/b.bmp")
    Image.fromarray(np.dstack(4 * [ramp])).save(tmp_path / "in/c.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "in/d.png")
    (tmp_path / "in/e.jpg").write_bytes(b"no image")
    out = write_shards(tmp_path / "in", tmp_path / "out", "--max_side", 32, "--keep_order")
    shown = capsys.readouterr().out
    assert "/in/e.jpg' is not readable (unknown format): left out" in shown
    assert "1 made smaller" in shown
    assert "2 as they were, though large" in shown
    dataset = open_dataset(str(out), train=True)
    assert [dataset[i][0].size for i in range(4)] == [(19, 32), (20, 12), (100, 60), (100, 60)]
    small = np.asarray(dataset[0][0], float)
    assert small.ndim == 2
    expected = Image.fromarray(np.rot90(ramp, -1)).resize((19, 32), Image.Resampling.BICUBIC)
    assert np.abs(small - np.asarray(expected, float)).max() < 8
    assert dataset.content(1)[0].read() == (tmp_path / "in/b.bmp").read_bytes()


@pytest.mark.faults
def test_writing_shards_goes_on_where_it_was_killed(photos, tmp_path):
    whole = write_shards(photos, tmp_path / "whole", "--shard_images", 1)
    words = [sys.executable, "-m", "util.shards", "--data_path", photos, "--out", tmp_path / "out"]
    words = [*map(str, words), "--shard_images", "1", "--num_workers", "1"]
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not list(tmp_path.glob("out/train/0*")):
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait() != 0
        assert "Traceback" not in process.stderr.read()
        for path in list(tmp_path.glob("out/train/*.tar"))[1:]:  # for the next to be stopped, too
            path.unlink()
    assert subprocess.run(words, cwd=ROOT).returncode == 0
    assert not list(tmp_path.glob("out/*/*.tmp"))
    files = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*.tar")}
    ours = tmp_path / "out"
    assert files == {path.relative_to(ours): path.read_bytes() for path in ours.rglob("*.tar")}


def test_shards_of_other_images_are_not_mixed(photos, shards, tmp_path, capsys):
    words = ["--data_path", photos, "--out", shards, "--shard_images", 10, "--keep_order"]
    assert run_main(util.shards, *words, "--quality", 80) == 1
    error = the_error(capsys.readouterr().err)
    assert "holds other shards: quality was 90, is 80; give another --out" in error
    (tmp_path / "notes").touch()
    assert run_main(util.shards, "--data_path", photos, "--out", tmp_path) == 1
    assert "is not empty, and holds no shards.json" in the_error(capsys.readouterr().err)


def test_named_datasets_are_written_without_loss(tmp_path):
    ours = open_dataset(str(write_shards("digits", tmp_path / "out", "--keep_order")), train=False)
    theirs = open_dataset("digits", train=False)
    for index in (0, 100, 359):
        assert ours[index][0].tobytes() == theirs[index][0].tobytes()
        assert ours[index][1] == theirs[index][1]


def test_written_shards_have_endings_that_are_read(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "photo").write_bytes(picture(1, "JPEG"))
    (folder / "b").write_bytes(picture(2))
    dataset = open_dataset(str(write_shards(folder, tmp_path / "out", "--keep_order")), True)
    assert [dataset.content(i)[1] for i in range(2)] == [".png", ".jpg"]


def test_a_source_that_changed_is_noticed(photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "in")
    out = write_shards(tmp_path / "in", tmp_path / "out")
    first = next((tmp_path / "in/train/china").iterdir())
    first.rename(first.with_name("new.jpg"))
    words = ["--data_path", tmp_path / "in", "--out", out, "--shard_images", 10]
    assert run_main(util.shards, *words) == 1
    assert "holds other shards: train digest was" in the_error(capsys.readouterr().err)


def test_a_damaged_manifest_and_unreadable_images_are_one_line(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/shards.json").touch()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(b"no image")
    words = ["--data_path", tmp_path / "in", "--max_side", 8]
    assert run_main(util.shards, *words, "--out", tmp_path / "out") == 1
    assert "shards.json is damaged" in the_error(capsys.readouterr().err)
    assert run_main(util.shards, *words, "--out", tmp_path / "new") == 1
    assert "none of the images of" in the_error(capsys.readouterr().err)


def test_transparency_is_kept_and_named_datasets_are_made_smaller(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    image = Image.new("P", (64, 64), 3)
    image.save(folder / "a.png", transparency=3)
    out = write_shards(folder, tmp_path / "out", "--max_side", 32)
    assert open_dataset(str(out), True).content(0)[0].read() == (folder / "a.png").read_bytes()
    small = write_shards("digits", tmp_path / "digits", "--max_side", 4)
    assert open_dataset(str(small), True)[0][0].size == (4, 4)


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (3, 700)])
def test_strips_are_made_smaller(size, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "in/a.jpg")
    out = write_shards(tmp_path / "in", tmp_path / "out", "--max_side", 16)
    image = open_dataset(str(out), True)[0][0]
    assert (max(image.size), min(image.size)) == (16, 1)
    assert np.abs(np.asarray(image, int) - (200, 100, 50)).max() < 5
