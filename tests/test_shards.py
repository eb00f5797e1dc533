"""Archives train as the folder does that they were made of; what is wrong with them is told."""

import io
import os
import signal
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_run, at_step, log_of, run_main
from PIL import Image

import main_linprobe
import main_pretrain
from util.args import pretrain_parser
from util.data.order import SeededDataset
from util.data.shards import braces
from util.data.survey import settle_pixels
from util.datasets import open_dataset, open_labelled
from util.errors import UserError
from util_contrastive import two_crops


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def picture(shade: int, kind: str = "PNG", side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (shade, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def labelled(labels: dict[str, int], folder: str = "") -> dict[str, bytes]:
    """Images by name, each of its own shade, with .cls."""
    files = {}
    for shade, (name, label) in enumerate(labels.items()):
        files |= {f"{folder}{name}.png": picture(shade), f"{folder}{name}.cls": b"%d" % label}
    return files


def shades(dataset) -> list[int]:
    return [dataset[i][0].convert("RGB").getpixel((0, 0))[0] for i in range(len(dataset))]


def test_views_and_labels_are_those_of_the_folder(photos, shards):
    args = pretrain_parser().parse_args(["--data_path", "x", "--input_size", "16", "--model",
                                         "mae_vit_nano_patch4"])  # fmt: skip
    settle_pixels(args, train=(folder := open_dataset(str(photos), train=True)))
    ours = open_dataset(str(shards), train=True)
    assert ours.classes == folder.classes
    assert ours.targets.tolist() == folder.targets.tolist()
    transform = two_crops(args)
    for index in range(48):
        pairs = [SeededDataset(data, transform, 3)[1, index] for data in (ours, folder)]
        for one, two in zip(pairs[0][0], pairs[1][0], strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_with_the_full_shuffle_a_run_ends_in_the_folder_s_bits(flags, shards, tmp_path):
    extra = ["--epochs", 2, "--eval_freq", 2]
    assert run_main(main_pretrain, *flags, *extra) == 0
    extra += ["--data_path", shards, "--shuffle_window", 0, "--output_dir", tmp_path / "two"]
    assert run_main(main_pretrain, *flags, *extra) == 0
    assert_same_run(tmp_path / "out", tmp_path / "two")
    assert "5 .tar files of" in log_of(tmp_path / "two")[0]["data"]["train"]


@pytest.mark.parametrize("window", [None, 1, 20])
def test_a_stop_within_an_epoch_loses_nothing(window, flags, shards, tmp_path, monkeypatch):
    flags = [*flags, "--data_path", shards, "--epochs", 2]
    flags += ["--shuffle_window", window] if window else []
    assert run_main(main_pretrain, *flags, "--output_dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        at_step(patch, 1, 1, lambda: signal.raise_signal(signal.SIGTERM))
        assert run_main(main_pretrain, *flags) == 128 + signal.SIGTERM
    assert run_main(main_pretrain, *flags, "--resume", "auto") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_a_changed_window_is_told(flags, shards, tmp_path, monkeypatch, capsys):
    flags = [*flags, "--data_path", shards, "--epochs", 1]
    at_step(monkeypatch, 0, 1, lambda: signal.raise_signal(signal.SIGTERM))
    assert run_main(main_pretrain, *flags) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert run_main(main_pretrain, *flags, "--shuffle_window", 5, "--resume", "auto") == 0
    assert "--shuffle_window was None, is 5: in another order" in capsys.readouterr().out


def test_shards_are_probed(shards, tmp_path):
    flags = ["--data_path", shards, "--model", "vit_nano_patch4", "--input_size", 8, "--epochs", 1]
    flags += ["--batch_size", 16, "--num_workers", 0, "--output_dir", tmp_path, "--device", "cpu"]
    assert run_main(main_linprobe, *flags) == 0
    assert "val: 16 images" in log_of(tmp_path)[0]["data"]["val"]
    assert log_of(tmp_path)[0]["test_acc1"] % 6.25 == 0  # all of them


def test_what_webdataset_writes_is_read(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="it is not installed")
    with webdataset.ShardWriter(str(tmp_path / "x-%03d.tar"), maxcount=3, verbose=0) as sink:
        for i in range(7):
            image = np.full((8, 8, 3), 30 * i, np.uint8)
            sample = {"__key__": f"a/{i:04d}", "png": image, "cls": 10 - i, "txt": "words"}
            sink.write(sample | {"seg.png": image})
    for path in (tmp_path / "x-{000..002}.tar", tmp_path / "x-*.tar", tmp_path):
        dataset = open_dataset(str(path), train=True)
        assert shades(dataset) == [30 * i for i in range(7)]
        assert dataset.groups.tolist() == [3, 3, 1]
    assert dataset.classes == ["4", "5", "6", "7", "8", "9", "10"]
    assert [dataset.classes[label] for label in dataset.targets] == [str(10 - i) for i in range(7)]
    assert dataset.left_out == {".png": 7}


def test_labels_may_be_in_json(tmp_path):
    files = {}
    for i, label in enumerate((b'{"label": "cat"}', b'{"label": "ant", "width": 8}')):
        files |= {f"{i}.jpg": picture(i, "JPEG"), f"{i}.json": label}
    dataset = open_dataset(str(tar_of(tmp_path / "a.tar", files)), train=True)
    assert [dataset.classes[label] for label in dataset.targets] == ["cat", "ant"]
    assert dataset.classes == ["ant", "cat"]


def test_captions_are_no_labels(tmp_path):
    """img2dataset's files."""
    files = {}
    for i in range(3):
        more = {f"{i}.txt": b"a cat", f"{i}.json": b'{"url": "x", "caption": "a cat"}'}
        files |= {f"{i}.jpg": picture(i, "JPEG")} | more
    dataset = open_dataset(str(tar_of(tmp_path / "a.tar", files)), train=True)
    assert (len(dataset), dataset.classes) == (3, [""])


def test_a_label_that_is_missing_is_told(tmp_path):
    files = {"0.png": picture(0), "0.cls": b"0", "1.png": picture(1), "2.png": picture(2)}
    path = tar_of(tmp_path / "a.tar", files | {"2.cls": b"1"})
    assert open_dataset(str(path), train=True).targets.tolist() == [0, -1, 1]
    with pytest.raises(UserError, match=r"a.tar: 1 of 3 images have no label"):
        open_labelled(str(path), val_fraction=0.5)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_archives_of_folders_are_read_as_folders(suffix, photos, tmp_path):
    folder = {split: open_dataset(str(photos), split) for split in (True, False)}
    files = {}
    for data in folder.values():
        for name in map(data.name, range(len(data))):
            inside = os.path.join("photos.of.2026", os.path.relpath(name, photos))
            files[inside.replace(".jpg", ".x.jpg")] = Path(name).read_bytes()
    files |= {"__MACOSX/._1.jpg": b"", "photos.of.2026/train/notes.md": b"x"}
    path = tmp_path / f"photos{suffix}"
    if suffix == ".tar":
        tar_of(path, files)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for number, (name, content) in enumerate(files.items()):
                archive.writestr(name, content, 8 * (number % 2))  # each other one is deflated
    for split, data in folder.items():
        ours = open_dataset(str(path), split)
        assert ours.classes == data.classes
        assert ours.targets.tolist() == data.targets.tolist()
        for index in range(len(data)):
            assert ours.content(index)[0].read() == Path(data.name(index)).read_bytes()
        assert ours.left_out[".md"] == 1
        assert str(path) in ours.name(0)
        assert "china" in ours.name(0)


def test_splits_are_found_by_file_names(tmp_path, caplog):
    for name in ("imagenet-train-00", "imagenet-train-01", "imagenet-validation-00"):
        tar_of(tmp_path / f"{name}.tar", {"0.png": picture(0), "0.cls": name[-1:].encode()})
    assert len(open_dataset(str(tmp_path), train=True)) == 2
    assert len(open_dataset(str(tmp_path), train=False)) == 1
    pattern = f"{tmp_path}/imagenet-{{train-{{00..01}},validation-00}}.tar"
    assert len(open_dataset(pattern, train=False)) == 1
    with pytest.raises(UserError, match="none of val/"):
        open_dataset(f"{tmp_path}/imagenet-train-{{00..01}}.tar", train=False)


def test_a_list_of_paths(tmp_path):
    for name in "ba":
        tar_of(tmp_path / f"{name}.tar", {"0.png": picture(ord(name))})
    (tmp_path / "list.txt").write_text("b.tar\n\na.tar\n")
    assert shades(open_dataset(str(tmp_path / "list.txt"), train=True)) == [ord("b"), ord("a")]


def test_braces_are_the_shell_s():
    for pattern in (
        "a{08..11}b",
        "{a,b{1..2}}-{x,y}",
        "plain",
        "{0..2}{a,b}",
        "{11..9}",
        "{8..010}",
    ):
        shell = subprocess.run(
            ["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True
        )
        if "," in pattern.partition("{")[2].partition("{")[0]:  # lists of lists in another order
            assert sorted(braces(pattern)) == sorted(shell.stdout.split())
        else:
            assert braces(pattern) == shell.stdout.split()


def damaged(kind: str, folder: Path) -> Path:
    """A shard of 20 images of which ten can be read, or none."""
    path = folder / "a.tar"
    files = {}
    for i in range(20):
        files |= {f"{i:02d}.png": picture(10 * i), f"{i:02d}.cls": b"%d" % (i % 2)}
    tar_of(path, files)
    with tarfile.open(path) as tar:
        tenth = tar.getmember("10.png")
    content = bytearray(path.read_bytes())
    if kind == "cut within an image":
        content = content[: tenth.offset_data + 10]
    elif kind == "cut before a label":
        content = content[: tenth.offset_data + 512]
    elif kind == "cut between images":
        content = content[: tenth.offset]
    elif kind == "overwritten":
        content[tenth.offset : tenth.offset + 512] = b"x" * 512
    elif kind == "two in one":
        content = content[: tenth.offset] + bytes(1024) + content
    elif kind == "empty":
        content = b""
    elif kind == "no tar":
        content = b"x" * 5000
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut within an image", "cut off"),
        ("cut before a label", "cut off"),
        ("cut between images", "cut off: no end mark"),
        ("overwritten", "damaged at byte"),
        ("two in one", "what follows its end mark, "),
        ("empty", "empty file"),
        ("no tar", "invalid header"),
    ],
)
def test_damage_costs_what_it_hits_and_is_told(kind, words, tmp_path, caplog):
    damaged(kind, tmp_path)
    tar_of(tmp_path / "b.tar", {"0.png": picture(255), "0.cls": b"1"})
    dataset = open_dataset(str(tmp_path), train=True)
    left = [] if kind in ("empty", "no tar") else [10 * i for i in range(10)]
    assert shades(dataset) == [*left, 255]
    assert dataset.why_no_classes() == ""
    assert f"warning: {tmp_path}/a.tar: {words}" in caplog.text
    assert f"; the {len(left)} images before that are used" in caplog.text
    assert dataset.left_out["ends of damaged archives"] == 1


def test_damaged_images_are_counted_as_files_are(flags, tmp_path, capsys):
    files = {f"{i:02d}.png": picture(i) for i in range(32)}
    tar_of(tmp_path / "a.tar", files | {"05.png": b"no image"})
    flags = [*flags, "--data_path", tmp_path / "a.tar", "--epochs", 1]
    assert run_main(main_pretrain, *flags) == 0
    assert "a.tar: 05.png' is not readable (unknown format)" in capsys.readouterr().out
    assert (tmp_path / "out/bad-images.txt").read_text() == f"{tmp_path}/a.tar: 05.png\n"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("x-{00..02}.tar", r"2 of 3: .*x-01.tar, .*x-02.tar: no such file"),
        ("x-00.tar.gz", "compressed: unpack it to a .tar first"),
        ("none-*.tar", "no such file"),
        ("empty.txt", "names no file"),
        ("", r"holds .tar and .zip: name those to use, such as '.*/\*.tar'"),
    ],
)
def test_what_cannot_be_opened_is_one_line(path, words, tmp_path):
    tar_of(tmp_path / "x-00.tar", {"0.png": picture(0)})
    (tmp_path / "a.zip").touch()
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=words):
        open_dataset(str(tmp_path / path), train=True)


def test_without_shards_for_validation_the_error_says_what_to_do(shards):
    with pytest.raises(UserError, match=r"name them val-\.\.\., or give --val_fraction 0.1"):
        open_dataset(str(shards / "train"), train=False)
    train, val, classes = open_labelled(str(shards / "train"), val_fraction=0.25)
    assert (len(train), len(val), classes) == (36, 12, 2)
    assert train.groups.sum() == 36
