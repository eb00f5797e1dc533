"""What people get wrong: one clear line, exit status 1, and nothing half-made."""

import socket

import pytest
import torch
from conftest import TINY, free_port, python, run_main, the_error

import main_pretrain


@pytest.fixture
def fails(tmp_path, capsys):
    """Runs pretraining with flags that must fail; returns its one line."""

    def check(*flags: object) -> str:
        out = tmp_path / "never made"
        assert run_main(main_pretrain, *TINY, "--epochs", 1, "--output_dir", out, *flags) == 1
        assert not out.exists()
        return the_error(capsys.readouterr().err)

    return check


def test_missing_folder(fails, tmp_path):
    line = fails("--data_path", tmp_path / "nowhere")
    assert "nowhere: no such folder, nor a name: digits, cifar10" in line


def test_file_instead_of_folder(fails, tmp_path):
    (tmp_path / "file").touch()
    assert "is a file, not a folder" in fails("--data_path", tmp_path / "file")


@pytest.mark.parametrize("folders", ["empty", "train", "train/class", "class"])
def test_folder_without_images(fails, tmp_path, folders):
    (tmp_path / "data" / folders).mkdir(parents=True)
    assert "no images in" in fails("--data_path", tmp_path / "data")


def test_fewer_images_than_a_step(fails, photos):
    line = fails("--data_path", photos, "--batch_size", 49)
    assert "48 images do not fill one step of 49 (batch_size x accum_iter x processes)" in line


def test_a_batch_of_one_has_no_negatives(fails, photos):
    assert "--batch_size 1 leaves no other image" in fails("--data_path", photos, "--batch_size", 1)


def test_cuda_where_there_is_none(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: no usable GPU here" in fails("--data_path", "digits", "--device", "cuda")


def test_output_dir_is_a_file(photos, tmp_path, capsys):
    (tmp_path / "file").touch()
    flags = ["--data_path", photos, *TINY, "--batch_size", 8, "--output_dir", tmp_path / "file"]
    assert run_main(main_pretrain, *flags) == 1
    error = the_error(capsys.readouterr().err)
    assert error.endswith("/file is not a folder")


def test_missing_checkpoint(fails, photos, tmp_path):
    flags = ["--data_path", photos, "--batch_size", 8]
    assert "no checkpoint at" in fails(*flags, "--resume", tmp_path / "nothing.pth")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_unreadable_checkpoint(fails, photos, tmp_path, content):
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    assert str(path) in fails("--data_path", photos, "--batch_size", 8, "--resume", path)


def test_checkpoint_without_a_model(fails, photos, tmp_path):
    torch.save({"optimizer": {}}, tmp_path / "other.pth")
    line = fails("--data_path", photos, "--batch_size", 8, "--resume", tmp_path / "other.pth")
    assert "holds no model: it has optimizer; expected tensors by name" in line


class Bomb:
    """A pickle that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_checkpoint_that_would_run_code(fails, photos, tmp_path):
    torch.save({"model": Bomb(str(tmp_path / "proof"))}, tmp_path / "hostile.pth")
    line = fails("--data_path", photos, "--batch_size", 8, "--resume", tmp_path / "hostile.pth")
    assert "nothing in it was run" in line
    assert not (tmp_path / "proof").exists()


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A checkpoint of one epoch."""
    out = tmp_path_factory.mktemp("trained")
    flags = ["--data_path", photos, *TINY, "--batch_size", 16, "--epochs", 1, "--output_dir", out]
    assert run_main(main_pretrain, *flags) == 0
    return out / "checkpoint-last.pth"


def test_checkpoint_of_another_architecture(fails, photos, trained):
    flags = ["--data_path", photos, "--batch_size", 8, "--resume", trained, "--input_size", 16]
    line = fails(*flags)
    assert "another architecture: pos_embed is [1, 5, 96], not [1, 17, 96]" in line


def test_checkpoint_of_another_objective(fails, photos, trained):
    flags = ["--data_path", photos, "--batch_size", 8, "--resume", trained]
    line = fails(*flags, "--weight_simclr", 0, "--weight_mae", 1)
    assert "its optimizer state belongs to another objective" in line


def test_weights_alone_cannot_be_resumed(fails, photos, trained, tmp_path):
    weights = {"model": torch.load(trained, weights_only=True)["model"]}
    torch.save(weights, tmp_path / "weights.pth")
    line = fails("--data_path", photos, "--batch_size", 8, "--resume", tmp_path / "weights.pth")
    assert "it has no epoch and no optimizer and no scaler" in line


def test_unreadable_image_in_a_loader_process(tmp_path, capsys, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "broken.jpg").write_bytes(b"no image")
    first = torch.zeros(1, 3, 8, 8)  # the preview would meet it first
    monkeypatch.setattr(main_pretrain, "preview_images", lambda *_: first)
    flags = ["--data_path", tmp_path / "data", *TINY, "--batch_size", 1, "--num_workers", 1]
    flags += ["--weight_simclr", 0, "--output_dir", tmp_path / "out"]
    assert run_main(main_pretrain, *flags) == 1
    assert "broken.jpg is not a readable image" in the_error(capsys.readouterr().err)


def test_every_rank_ends_and_one_speaks(tmp_path):
    flags = ["--data_path", tmp_path / "nowhere", *TINY, "--output_dir", tmp_path / "out"]
    result = python("main_pretrain.py", *flags, processes=2)
    assert result.returncode == 1
    ours = [line for line in result.stderr.splitlines() if line.startswith("main_pretrain.py: ")]
    assert len(ours) == 1
    assert "no such folder" in ours[0]
    assert "exitcode  : 1" in result.stderr
    assert not (tmp_path / "out").exists()


def test_port_in_use(forks, tmp_path):
    with socket.socket() as taken:
        taken.bind(("localhost", free_port()))
        taken.listen()
        url = f"tcp://localhost:{taken.getsockname()[1]}"
        flags = ["--data_path", "digits", *TINY, "--output_dir", tmp_path / "out"]
        flags += ["--dist_url", url, "--world_size", 2, "--local_rank", 0]
        status, _, said = forks.run("main_pretrain", *flags, cwd=tmp_path)
    assert status == 1
    line = the_error(said)
    assert f"--dist_url {url}: the processes cannot meet" in line
    assert "in use" in line
    assert not (tmp_path / "out").exists()


def test_too_few_gpus_are_counted(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    flags = [*TINY, "--data_path", "digits", "--device", "cuda"]
    flags += ["--world_size", 2, "--local_rank", 1]
    assert run_main(main_pretrain, *flags) == 1
    assert "no GPU for process 1 of this machine: there are 1" in the_error(capsys.readouterr().err)
