"""Checkpoints that are hostile, damaged or another run's: one clear line each, and no harm done."""

import http.server
import os
import socket
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TINY, VIT, content_of, the_error

from model_mae import mae_vit_nano_patch4
from model_vit import vit_nano_patch4
from util.errors import UserError
from util.run import checkpoint

pytestmark = pytest.mark.faults


# --- pickles with code


class Payload:
    """A pickle that would make a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture(scope="module")
def states() -> dict:
    """What pretraining, and what fine-tuning would have written."""
    return {
        "mae": {"model": mae_vit_nano_patch4(img_size=8).state_dict(), "epoch": 0},
        "vit": {"model": vit_nano_patch4(img_size=8, num_classes=2).state_dict(), "epoch": 0},
    }


LOADERS = {
    "resume": ["main_pretrain", *TINY, "--batch_size", 8, "--resume"],
    "finetune": ["main_finetune", *VIT, "--finetune"],
    "probe": ["main_linprobe", *VIT, "--finetune"],
    "knn": ["main_linprobe", *VIT, "--knn", "--finetune"],
    "eval": ["main_finetune", *VIT, "--cls_token", "--eval", "--resume"],
    "visualize": ["util.visualize", "--checkpoint"],
    "export": ["util.export", "--checkpoint"],
}


@pytest.fixture
def loads(refused, photos):
    """Has a file read in one of the ways of `LOADERS`, where it must be refused."""

    def check(loader: str, path: Path | str) -> str:
        module, *flags = LOADERS[loader]
        if loader != "export":
            flags = ["--data_path", photos, *flags]
        if module.startswith("main_"):
            flags = ["--output_dir", "out", *flags]
        return refused(module, *flags, path, limit_s=20)

    return check


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("place", ["model", "args", "whole"])
def test_a_pickle_with_code_runs_none_of_it(loader, place, loads, states, tmp_path):
    payload = Payload(tmp_path / "ran")
    state = payload if place == "whole" else states["mae"] | {place: payload}
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=place != "args")
    assert "nothing in it was run" in loads(loader, tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


# --- from the web


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A server of a folder's files; its address, and where torch.hub keeps what it fetched."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield folder, f"http://localhost:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_hostile_files_from_the_web(web, states, tmp_path, forks):
    folder, url = web
    torch.save(states["mae"] | {"args": Payload(tmp_path / "ran")}, folder / "mae.pth")
    torch.save(states["mae"], folder / "mae-0123abcd.pth")
    home = tmp_path / "home"
    home.mkdir()
    for name, words in {
        "mae.pth": "nothing in it was run",
        "mae-0123abcd.pth": "invalid hash",
        "missing.pth": "404",
        "": "is not a checkpoint",  # the list of files, as HTML
    }.items():
        flags = ["--checkpoint", f"{url}/{name}"]
        status, _, err = forks.run("util.export", *flags, cwd=tmp_path, TORCH_HOME=str(home))
        assert (status, words in the_error(err)) == (1, True), err
    assert not (tmp_path / "ran").exists()
    assert [path for path in home.rglob("*") if path.is_file()] == []  # nothing bad is kept


def test_a_date_in_a_name_is_no_hash(web, states, tmp_path, monkeypatch):
    folder, url = web
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save(states["mae"], folder / "mae-20240101.pth")
    assert checkpoint.load(f"{url}/mae-20240101.pth")["epoch"] == 0


def test_a_silent_server_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(checkpoint, "DOWNLOAD_TIMEOUT", 0.3)
    with socket.create_server(("localhost", 0)) as server:
        url = f"http://localhost:{server.getsockname()[1]}/x.pth"
        with pytest.raises(UserError, match=r"cannot download .*timed out"):
            checkpoint.load(url)
    assert socket.getdefaulttimeout() is None


# --- files that are no checkpoints


def members(path: Path, state: dict) -> dict[str, bytes]:
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path: Path, contents: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def truncated(path: Path, state: dict) -> None:
    torch.save(state, path)
    os.truncate(path, path.stat().st_size // 2)


def a_socket(path: Path, _: dict) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # a socket's path may not be long


def shortened(path: Path, state: dict) -> None:
    """A tensor that claims more numbers than its storage holds."""
    contents = members(path, state)
    data = next(name for name in contents if name.endswith("data/0"))
    pack(path, contents | {data: contents[data][:8]})


def header(length: int):
    return lambda path, _: path.write_bytes(length.to_bytes(8, "little") + b"{}")


SURPRISES = {
    "folder.pth": lambda path, _: path.mkdir(),
    "zero.pth": lambda path, _: path.symlink_to("/dev/zero"),
    "loop.pth": lambda path, _: path.symlink_to(path),
    "pipe.pth": lambda path, _: os.mkfifo(path),
    "socket.pth": a_socket,
    "empty.pth": lambda path, _: path.touch(),
    "text.pth": lambda path, _: path.write_text("not a checkpoint\n" * 99),
    "zeros.pth": lambda path, _: path.write_bytes(bytes(10**5)),
    "truncated.pth": truncated,
    "members.pth": lambda path, _: pack(path, {"a": b"1", "../../b": b"2"}),
    "archive.pth": lambda path, _: pack(path, {"archive/data.pkl": b"\x80\x02."}),
    "bytes.pth": lambda path, _: pack(path, {"a/data.pkl": bytes(10**8)}, zipfile.ZIP_DEFLATED),
    "short.pth": shortened,
    "strings.pth": lambda path, state: torch.save(
        {"model": dict.fromkeys(state["model"], "x")}, path
    ),
    "scalars.pth": lambda path, state: torch.save(
        {"model": dict.fromkeys(state["model"], torch.tensor(1.0))}, path
    ),
    "integers.pth": lambda path, state: torch.save(
        {"model": {k: v.long() for k, v in state["model"].items()}}, path
    ),
    "nan.pth": lambda path, state: torch.save(
        {"model": {k: v / 0 for k, v in state["model"].items()}}, path
    ),
    "length.safetensors": header(2**60),
    "overrun.safetensors": header(2**20),
    "empty.safetensors": header(2),
    "text.safetensors": lambda path, _: path.write_text("not a checkpoint\n" * 99),
    "nan.safetensors": lambda path, state: safetensors.torch.save_file(
        {k: v / 0 for k, v in state["model"].items()}, path
    ),
}


@pytest.mark.parametrize("loader", ["export", "visualize", "resume", "finetune"])
@pytest.mark.parametrize("name", SURPRISES)
def test_surprising_files_are_one_line(loader, name, loads, states, tmp_path):
    SURPRISES[name](tmp_path / name, states["mae"])
    line = loads(loader, tmp_path / name)
    assert name in line or loader not in ("export", "resume")
    assert len(line) < 500


# --- damaged states


DAMAGE = {
    "epoch": ["three", -2, 1.5, None, [1]],
    "images": [-1, "many"],
    "global_batch": [-16, 0, None],
    "optimizer": [[], {}, {"state": 1, "param_groups": [1]}, {"state": {}, "param_groups": []}],
}


@pytest.fixture(scope="module")
def trained(forks, photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--data_path", photos, *TINY, "--batch_size", 16, "--epochs", 1]
    assert forks.run("main_pretrain", *flags, "--output_dir", "out", cwd=folder)[0] == 0
    return folder / "out"


@pytest.mark.parametrize(
    ("part", "value"), [(part, value) for part, values in DAMAGE.items() for value in values]
)
def test_damaged_positions_are_one_line(part, value, loads, trained, tmp_path):
    state = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    torch.save(state | {part: value}, tmp_path / "x.pth")
    assert part in loads("resume", tmp_path / "x.pth")


def _unfused(state: dict) -> None:
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = False


def _first(state: dict) -> dict:
    return next(iter(state["optimizer"]["state"].values()))


# States that do not fit; with some of them the optimizer's step would write beyond a tensor's end.
MISFITS = {
    "its optimizer": [
        lambda s: _first(s).update(step=torch.empty((), device="meta")) or _unfused(s),
        lambda s: _first(s).update(exp_avg=torch.zeros(3)),
        lambda s: _first(s).update(exp_avg=torch.zeros(1).expand_as(_first(s)["exp_avg"])),
        lambda s: _first(s).update(exp_avg="x" * 9999),
        lambda s: _first(s).update(step=torch.zeros(2)),
        lambda s: s["optimizer"]["param_groups"][0]["params"].pop(),
    ],
    "no epoch": [lambda s: s.pop("epoch")],
    "is nan": [lambda s: _first(s).update(exp_avg_sq=_first(s)["exp_avg_sq"] * float("nan"))],
    "but an epoch has 3": [lambda s: s.update(images=10**9)],
    "metrics": [lambda s: s.update(metrics=[1], images=16)],
}


@pytest.mark.parametrize(
    ("said", "damage"), [(said, damage) for said, some in MISFITS.items() for damage in some]
)
def test_states_that_do_not_fit_are_one_line(said, damage, trained, forks, photos, tmp_path):
    state = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    damage(state)
    torch.save(state, tmp_path / "x.pth")
    flags = ["--data_path", photos, *TINY, "--batch_size", 16, "--epochs", 2, "--output_dir", ""]
    status, _, err = forks.run("main_pretrain", *flags, "--resume", "x.pth", cwd=tmp_path)
    assert (status, said in the_error(err)) == (1, True), err


def test_settings_of_the_optimizer_are_the_flags(trained, forks, photos, tmp_path):
    state = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        del group["betas"]
        group |= {"eps": "x", "weight_decay": 0.9, "lr_scale": 50.0}
    torch.save(state, tmp_path / "x.pth")
    flags = ["--data_path", photos, *TINY, "--batch_size", 16, "--epochs", 2, "--output_dir", "out"]
    status, _, err = forks.run("main_pretrain", *flags, "--resume", "x.pth", cwd=tmp_path)
    assert status == 0, err
    state = torch.load(tmp_path / "out/checkpoint-last.pth", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0, 0.05]
    assert not any("lr_scale" in group for group in groups)


# --- whose folder it is


def run_in(forks, folder: Path, module: str, *flags: object) -> tuple[int, str]:
    status, _, err = forks.run(module, *flags, "--output_dir", "out", cwd=folder)
    return status, err


def test_a_folder_with_a_run_is_neither_overwritten_nor_mixed_up(forks, photos, trained, tmp_path):
    data = ["--data_path", photos]
    pretrain = [*data, *TINY, "--batch_size", 16, "--epochs", 1]
    probe = ["main_linprobe", *data, *VIT, "--batch_size", 16, "--epochs", 1]
    folder = trained.parent
    before = content_of(folder)
    for words, expected in {
        ("main_pretrain", *pretrain): "holds a run: --resume auto continues it",
        (*probe,): "holds a run: --resume auto continues it",
        (*probe, "--overwrite", "--finetune", "out/checkpoint-last.pth"): "would remove",
        ("main_pretrain", *pretrain, "--resume", "auto", "--weight_simclr", 0): "--weight_simclr",
        ("main_pretrain", *pretrain, "--resume", "auto", "--seed", 7): "--seed is 0 there, 7 here",
        ("main_pretrain", *pretrain, "--resume", "auto", "--input_size", 12): "--input_size is 8",
        (*probe, "--resume", "auto"): "--model is 'mae_vit_nano_patch4' there",
    }.items():
        status, err = run_in(forks, folder, *words)
        assert (status, expected in the_error(err)) == (1, True), err
    assert content_of(folder) == before
    assert run_in(forks, folder, *probe, "--knn") == (0, "")  # writes nothing
    assert content_of(folder) == before
