"""Embeddings as files: the encoder's own, of every image once, in any format."""

import csv
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import in_processes, python, run_main, the_error
from safetensors import safe_open

import main_pretrain
from util import distributed, embed
from util.data.transforms import eval_transform
from util.datasets import open_dataset


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "timm.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), path)
    return path


def embedded(weights: Path, data: Path | str, out: Path, *flags: object) -> int:
    words = ["--checkpoint", weights, "--data_path", data, "--out", out, "--input_size", 32]
    words += ["--device", "cpu", "--precision", "fp32", "--num_workers", 0, "--batch_size", 7]
    return run_main(embed, *words, *flags)


@pytest.fixture(scope="module")
def expected(weights, photos) -> np.ndarray:
    """By timm: cls and mean over patches of the 16 validation images."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    state = torch.load(weights)
    positions = timm.layers.resample_abs_pos_embed(state["pos_embed"], (2, 2), antialias=False)
    model.load_state_dict(state | {"pos_embed": positions})
    images = open_dataset(str(photos), train=False)
    pixels = torch.stack([eval_transform(32)(images[i][0]) for i in range(16)])
    with torch.no_grad():
        tokens = model.eval().forward_features(pixels)
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1).numpy()


def read(path: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Embeddings, files and labels."""
    if path.suffix == ".npz":
        found = np.load(path)
        return found["embeddings"], found["files"].tolist(), found["labels"].tolist()
    if path.suffix == ".csv":
        rows = list(csv.reader(path.open()))[1:]
        numbers = np.array([[float(word) for word in row[2:]] for row in rows])
        return numbers, [row[0] for row in rows], [row[1] for row in rows]
    if path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        numbers = np.array(table["embedding"].to_pylist())
        return numbers, table["file"].to_pylist(), table["label"].to_pylist()
    with safe_open(path, "np") as file:
        classes = json.loads(file.metadata()["classes"])
        labels = [classes[label] for label in file.get_tensor("labels")]
        text, ends = file.get_tensor("files").tobytes(), file.get_tensor("files_ends").tolist()
        starts = [0, *ends[:-1]]
        files = [text[a:b].decode() for a, b in zip(starts, ends, strict=True)]
        return file.get_tensor("embeddings"), files, labels


@pytest.mark.parametrize("suffix", [".npz", ".csv", ".parquet", ".safetensors"])
def test_every_format_holds_timm_s_features(suffix, weights, photos, expected, tmp_path):
    out = tmp_path / f"new/a{suffix}"
    assert embedded(weights, photos / "val", out, "--pool", "both") == 0
    numbers, files, labels = read(out)
    np.testing.assert_allclose(numbers, expected, rtol=1e-3, atol=1e-4)
    assert files == sorted(map(str, (photos / "val").glob("*/*.jpg")))
    assert labels == [Path(file).parent.name for file in files]
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize(("pool", "part"), [("cls", slice(0, 192)), ("mean", slice(192, 384))])
def test_either_pool_can_be_chosen(pool, part, weights, photos, expected, tmp_path):
    assert embedded(weights, photos / "val", tmp_path / "a.npz", "--pool", pool) == 0
    numbers = np.load(tmp_path / "a.npz")["embeddings"]
    np.testing.assert_allclose(numbers, expected[:, part], rtol=1e-3, atol=1e-4)


def test_processes_share_the_images(weights, photos, expected, tmp_path):
    words = ["--checkpoint", weights, "--data_path", photos / "val", "--out", tmp_path / "a.npz"]
    words += ["--input_size", 32, "--precision", "fp32", "--num_workers", 1, "--pool", "both"]
    done = python("-m", "util.embed", *map(str, words), "--device", "cpu", processes=2)
    assert done.returncode == 0, done.stderr
    numbers, files, _ = read(tmp_path / "a.npz")
    np.testing.assert_allclose(numbers, expected, rtol=1e-3, atol=1e-4)
    assert files == sorted(files)


def test_our_own_checkpoints_and_other_sources(flags, shards, photos, tmp_path):
    assert run_main(main_pretrain, *flags, "--epochs", 1) == 0
    weights = tmp_path / "out/checkpoint-last.pth"
    for name, data in (("folder", photos / "train"), ("shards", shards / "train")):
        words = ["--checkpoint", weights, "--data_path", data, "--out", tmp_path / f"{name}.npz"]
        assert run_main(embed, *words, "--device", "cpu", "--num_workers", 0) == 0
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("folder", "shards"))
    assert np.array_equal(one["embeddings"], two["embeddings"])
    assert one["labels"].tolist() == two["labels"].tolist()
    words = ["--checkpoint", weights, "--data_path", photos, "--out", tmp_path / "all.npz"]
    assert run_main(embed, *words, "--device", "cpu", "--num_workers", 0) == 0
    assert len(np.load(tmp_path / "all.npz")["embeddings"]) == 64
    assert "labels" not in np.load(tmp_path / "all.npz")  # train and val are no classes


@pytest.mark.parametrize(
    ("out", "words"),
    [("a.txt", "must end in .npz, .csv, .parquet, .safetensors"), (".", "must end in")],
)
def test_bad_names_of_files_are_one_line(out, words, weights, photos, tmp_path, capsys):
    assert embedded(weights, photos, tmp_path / out) == 1
    assert words in the_error(capsys.readouterr().err)


def test_what_cannot_be_written_leaves_nothing(weights, photos, tmp_path, capsys):
    (tmp_path / "a.npz").mkdir()
    assert embedded(weights, photos / "val", tmp_path / "a.npz") == 1
    assert "cannot write" in the_error(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_unreadable_images_have_no_embedding(weights, photos, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i, file in enumerate(sorted(photos.glob("*/*/*.jpg"))):
        (tmp_path / f"in/{i:03d}.jpg").write_bytes(file.read_bytes() if i != 3 else b"no image")
    assert embedded(weights, tmp_path / "in", tmp_path / "a.npz") == 0
    assert "1 images are not readable: their embeddings are NaN" in capsys.readouterr().out
    missing = np.isnan(np.load(tmp_path / "a.npz")["embeddings"]).all(axis=1)
    assert missing.tolist() == [i == 3 for i in range(64)]


def test_an_input_size_fits_the_patches(weights, photos, tmp_path, capsys):
    words = ["--checkpoint", weights, "--data_path", photos, "--out", tmp_path / "a.npz"]
    assert run_main(embed, *words, "--input_size", 40, "--device", "cpu") == 1
    assert "40 is not a multiple of the patch size 16" in the_error(capsys.readouterr().err)


def test_channels_are_the_encoder_s(weights, photos, tmp_path, capsys):
    words = ["--checkpoint", weights, "--data_path", photos, "--out", tmp_path / "a.npz"]
    assert run_main(embed, *words, "--in_chans", 1, "--device", "cpu") == 1
    assert f"--in_chans 1: {weights} takes 3 channels" in the_error(capsys.readouterr().err)


def test_a_named_dataset_is_embedded_whole(weights, tmp_path):
    assert embedded(weights, "digits", tmp_path / "a.npz", "--batch_size", 256) == 0
    found = np.load(tmp_path / "a.npz")
    assert found["embeddings"].shape == (1797, 192)
    assert len(set(found["labels"].tolist())) == 10


def _on_machine(rank: int, folder: Path) -> None:
    distributed._host_group = torch.distributed.group.WORLD
    assert distributed.machines() == [socket.gethostname()]
    distributed.BOOT_ID = folder / "none"
    assert distributed.machines() == [socket.gethostname()]
    kernel = folder / str(rank)
    kernel.write_text(f"{rank}")
    distributed.BOOT_ID = kernel
    assert distributed.machines() == [socket.gethostname()] * 2  # of one name
    socket.gethostname = lambda: f"node{rank}"
    assert distributed.machines() == ["node0", "node1"]


def test_processes_know_on_how_many_machines_they_are(tmp_path):
    in_processes(_on_machine, 2, tmp_path)


def test_several_machines_are_refused(weights, photos, tmp_path, monkeypatch, capsys):
    """They would write whole pages of one file over each other's rows."""
    monkeypatch.setattr(embed, "machines", lambda: ["node0", "node1"])
    assert embedded(weights, photos, tmp_path / "out.npz") == 1
    said = the_error(capsys.readouterr().err)
    assert "the processes must run on one machine, not on node0, node1" in said
