"""What hostile or careless hands can give: flags, folders, files. One line each, nothing lost.

python -m pytest -m faults tests/test_faults_data.py
"""

import argparse
import http.server
import os
import re
import socket
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TINY, python, the_error
from forks import Forks
from PIL import Image

from model_mae import mae_vit_tiny_patch4
from model_vit import vit_tiny_patch4
from util.args import finetune_parser, linprobe_parser, pretrain_parser
from util.errors import UserError
from util.run import checkpoint
from util.slurm.flags import job_parser

pytestmark = pytest.mark.faults

SCRIPTS = {"pretrain": pretrain_parser, "finetune": finetune_parser, "linprobe": linprobe_parser}
PARSERS = {f"main_{name}": parser for name, parser in SCRIPTS.items()}
PARSERS |= {
    f"submitit_{n}": lambda parser=parser: job_parser(parser()) for n, parser in SCRIPTS.items()
}
COMMANDS = ("util.export", "util.visualize")
VIT = ["--model", "vit_tiny_patch4", *TINY[2:]]


@pytest.fixture(scope="module")
def forks():
    with Forks("main_pretrain", "main_finetune", "main_linprobe", *COMMANDS) as server:
        yield server


@pytest.fixture(scope="module")
def light_forks():
    """Without torch, which submitting does not need."""
    with Forks("submitit_pretrain", "submitit_finetune", "submitit_linprobe") as server:
        yield server


@pytest.fixture
def refused(forks, light_forks, tmp_path):
    """Runs a script that must fail without writing anything; returns its one line."""
    folder = tmp_path / "working folder"
    folder.mkdir()

    def check(module: str, *flags: object, status: int = 1, **kwargs) -> str:
        before = content_of(tmp_path)
        server = light_forks if module.startswith("submitit_") else forks
        result = server.run(module, *flags, cwd=folder, **kwargs)
        assert result[0] == status, result
        assert content_of(tmp_path) == before
        return the_error(result[2])

    return check


def content_of(folder: Path) -> dict:
    files = [path for path in folder.rglob("*") if not path.is_fifo() and not path.is_socket()]
    return {path: path.stat().st_size for path in files if path.is_file()} | dict.fromkeys(files)


# --- flags


def bad_values(action: argparse.Action) -> list[list[str]]:
    """What must not follow a flag: values of the wrong type, out of range, none at all."""
    if action.nargs == 0:
        return []
    bad = [] if action.nargs == "?" else [[]]
    if action.choices:
        bad += [["nonsense"], [""]]
    elif action.type is not None:
        words = ["x", "", "nan", "inf", "1.5", *edges(action)]
        bad += [[word] * (2 if action.nargs == 2 else 1) for word in words if refuses(action, word)]
    return bad


def refuses(action: argparse.Action, word: str) -> bool:
    try:
        action.type(word)
    except (argparse.ArgumentTypeError, ValueError):
        return True
    return False


def edges(action: argparse.Action) -> list[str]:
    """Numbers just outside of a range, from the range that a flag's own complaint names."""
    try:
        action.type("-" + "9" * 30)
    except argparse.ArgumentTypeError as error:
        span = re.search(r"outside ([\[(])([^,]+), ([^)\]]+)([)\]])", str(error))
        if span:
            low = float(span[2])
            words = [f"{low - 1:.0f}"] + [f"{low:.0f}"] * (span[1] == "(")
            if span[3] != "inf":
                high = float(span[3])
                words += [f"{high + 1:.0f}"] + [f"{high:.0f}"] * (span[4] == ")")
            return words
    return []


@pytest.mark.parametrize("script", PARSERS)
def test_every_bad_value_of_every_flag_is_one_line(script, forks, light_forks, tmp_path):
    server = light_forks if script.startswith("submitit_") else forks
    parser = PARSERS[script]()
    cases = []
    for action in parser._actions:
        flag = action.option_strings[0]
        cases += [["--data_path", "digits", flag, *values] for values in bad_values(action)]
        if action.nargs == 0 and flag != "-h":
            cases.append(["--data_path", "digits", f"{flag}=yes"])
    cases += [[], ["digits"], ["--data_path", "digits", "--no_such_flag"]]
    assert len(cases) > 80
    wrong = []
    for case in cases:
        status, out, err = server.run(script, *case, cwd=tmp_path)
        fine = status == 2 and not out and re.fullmatch(rf"{script}\.py: error: .+\n", err)
        if not fine or os.listdir(tmp_path):
            wrong.append((case, status, out, err))
    assert wrong == []
    print(f"{script}: {len(cases)} bad command lines")


CONTRADICTIONS = [
    ("main_pretrain", "--weight_mae 0 --weight_simclr 0"),
    ("main_pretrain", "--mask_ratio 0"),
    ("main_pretrain", "--mask_ratio 0.999"),
    ("main_pretrain", "--input_size 225"),
    ("main_pretrain", "--input_size 400000000"),
    ("main_pretrain", "--start_epoch 2 --epochs 2"),
    ("main_pretrain", "--world_size 2 --local_rank 2"),
    ("main_pretrain", "--dist_url localhost:1"),
    ("main_pretrain", "--resume auto --output_dir="),
    ("main_pretrain", "--resume auto --overwrite"),
    ("main_finetune", "--eval"),
    ("main_finetune", "--eval --resume auto"),
    ("main_finetune", "--mixup 1 --batch_size 7"),
    ("main_finetune", "--cutmix_minmax 0.8 0.2"),
    ("main_finetune", "--aa nonsense"),
    ("main_finetune", "--aa rand-n99999999999999"),
    ("main_finetune", "--model mae_vit_base_patch16"),
    ("main_linprobe", "--knn --eval --resume x"),
    ("main_linprobe", "--knn --resume x"),
    ("main_linprobe", "--batch_size 1"),
    ("submitit_pretrain", "--ngpus 0 --device cuda"),
    ("submitit_pretrain", "--ngpus 1 --device cpu"),
    ("submitit_pretrain", "--ngpus 2 --tasks_per_node 3"),
    ("submitit_pretrain", "--array"),
    ("submitit_pretrain", "--array 0-1 --output_dir out"),
    ("submitit_pretrain", "--set nodes=1,2"),
    ("submitit_pretrain", "--set no_such_flag=1,2"),
    ("submitit_pretrain", "--set epochs=0,1"),
    ("submitit_pretrain", "--output_dir="),
    ("submitit_pretrain", "--job_dir a%d"),
]


@pytest.mark.parametrize(("script", "flags"), CONTRADICTIONS)
def test_contradictory_flags_are_one_line(script, flags, refused):
    refused(script, "--data_path", "digits", *flags.split(), status=2)


COUNTS = sorted(
    flag
    for parser in (pretrain_parser(), finetune_parser())
    for action in parser._actions
    for flag in action.option_strings
    if action.type and not refuses(action, "9" * 30)
)


@pytest.mark.parametrize("flag", sorted(set(COUNTS) - {"--epochs"}))  # it would take them all
def test_absurd_numbers_are_refused_or_harmless(flag, forks, photos, tmp_path):
    script = "main_pretrain"
    if flag not in pretrain_parser()._option_string_actions:
        script = "main_finetune"
    flags = ["--data_path", photos, *(TINY if script == "main_pretrain" else VIT)]
    flags += ["--batch_size", 24, "--epochs", 1, "--output_dir", "", flag, "9" * 30]
    status, _, err = forks.run(script, *flags, cwd=tmp_path, limit_s=40)
    if status == 0:
        assert err == ""
    else:
        assert status in (1, 2)
        the_error(err)


# --- folders


@pytest.mark.parametrize("script", ["main_pretrain", "main_finetune", "main_linprobe"])
@pytest.mark.parametrize("flag", ["--output_dir", "--log_dir"])
@pytest.mark.parametrize("kind", ["file", "below a file", "no permission", "below no permission"])
def test_folders_that_cannot_be_written(script, flag, kind, refused, photos, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    folder = {"file": "file", "below a file": "file/x", "no permission": "locked"}
    path = tmp_path / folder.get(kind, "locked/x")
    model = TINY if script == "main_pretrain" else VIT
    flags = ["--data_path", photos, *model, "--batch_size", 8, "--output_dir", ""]
    line = refused(script, *flags, flag, path, powerless=True)
    assert str(path) in line


def test_one_folder_is_not_made_where_the_other_cannot_be(refused, photos, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    flags = ["--data_path", photos, *TINY, "--batch_size", 8, "--output_dir", "new", "--log_dir"]
    for path in ("file", "locked/x"):
        refused("main_pretrain", *flags, tmp_path / path, powerless=True)


@pytest.mark.parametrize("flag", ["--data_path", "--output_dir", "--resume"])
@pytest.mark.parametrize("kind", ["long", "loop", "locked"])
def test_odd_paths_are_one_line(flag, kind, refused, photos, tmp_path):
    path = tmp_path / ("x" * 300 if kind == "long" else kind)
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "locked":
        path.mkdir(mode=0o000)
        path /= "x"
    flags = ["--data_path", photos, *TINY, "--batch_size", 8, "--output_dir", "out", flag, path]
    flags += ["--resume", "auto"] * (flag == "--output_dir")
    line = refused("main_pretrain", *flags, powerless=True)
    assert len(line) < 800


def test_augmentation_that_cannot_work_is_one_line(refused, photos):
    flags = ["--data_path", photos, *VIT, "--batch_size", 8, "--output_dir", "out"]
    assert "--aa augmix-a0" in refused("main_finetune", *flags, "--aa", "augmix-a0")


@pytest.mark.parametrize("kind", ["file", "no permission", "--cluster slurm"])
def test_jobs_that_cannot_be_submitted(kind, refused, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    flags = ["--data_path", "digits", "--nodes", 1, "--ngpus", 0, "--cluster", "local"]
    flags += ["--job_dir", tmp_path / ("locked" if kind == "no permission" else "file")]
    if kind == "--cluster slurm":
        flags = ["--data_path", "digits", "--cluster", "local", "--nodes", 2]
    refused("submitit_pretrain", *flags, powerless=True)


@pytest.mark.parametrize("script", ["main_pretrain", "main_finetune", "main_linprobe"])
@pytest.mark.parametrize(
    "kind", ["missing", "file", "empty", "locked", "locked inside", "new\nline"]
)
def test_data_that_are_not_there(script, kind, refused, tmp_path):
    data = tmp_path / "data"
    if kind == "file":
        data.touch()
    elif kind in ("empty", "locked", "locked inside"):
        (data / "train/a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(
            data / "train/a/x.png" if kind != "empty" else tmp_path / "x.png"
        )
        if kind != "empty":
            (data if kind == "locked" else data / "train/a").chmod(0o000)
    elif kind == "new\nline":
        data = tmp_path / "new\nline"
    model = TINY if script == "main_pretrain" else VIT
    refused(script, "--data_path", data, *model, "--output_dir", tmp_path / "out", powerless=True)
    data.exists() and data.chmod(0o700)


# --- bad images


@pytest.mark.parametrize(("bad", "status"), [(2, 0), (3, 1)])
def test_ranks_count_bad_images_together(bad, status, tmp_path):
    """Of 200 images 2 may be bad; each process has loaders of its own."""
    for i in range(200):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:03d}.png")
    names = [f"{i:03d}.png" for i in (7, 77, 177)[:bad]]
    for name in names:
        os.truncate(tmp_path / name, 20)
    flags = ["--data_path", tmp_path, *TINY, "--num_workers", 1, "--batch_size", 25]
    flags += ["--epochs", 2, "--output_dir", tmp_path / "out"]
    result = python("main_pretrain.py", *flags, processes=2)
    assert result.returncode == status, result.stderr
    assert [result.stdout.count(f"{name}' is not readable") for name in names] == [1] * bad
    listed = (tmp_path / "out/bad-images.txt").read_text().splitlines()
    assert sorted(listed) == [str(tmp_path / name) for name in names]
    said = [line for line in result.stderr.splitlines() if line.startswith("main_pretrain.py: ")]
    assert len(said) == status
    assert (
        "3 of 200 images are not readable, more than 1%: listed in" in "".join(said) or not status
    )


# --- hostile checkpoints


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
        "mae": {"model": mae_vit_tiny_patch4(img_size=8).state_dict(), "epoch": 0},
        "vit": {"model": vit_tiny_patch4(img_size=8, num_classes=2).state_dict(), "epoch": 0},
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
    "bomb.pth": lambda path, state: pack(path, members(path, state), zipfile.ZIP_DEFLATED),
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


def _first(state: dict) -> dict:
    return next(iter(state["optimizer"]["state"].values()))


# States that do not fit; with some of them the optimizer's step would write beyond a tensor's end.
MISFITS = {
    "its optimizer": [
        lambda s: _first(s).update(exp_avg=torch.zeros(3)),
        lambda s: _first(s).update(exp_avg=torch.zeros(1).expand_as(_first(s)["exp_avg"])),
        lambda s: _first(s).update(exp_avg="x" * 9999),
        lambda s: _first(s).update(step=torch.zeros(2)),
        lambda s: s["optimizer"]["param_groups"][0]["params"].pop(),
    ],
    "no epoch": [lambda s: s.pop("epoch")],
    "is nan": [lambda s: _first(s).update(exp_avg_sq=_first(s)["exp_avg_sq"] * float("nan"))],
    "steps of an epoch of 3 are done": [lambda s: s.update(images=10**9)],
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
        group |= {"eps": "x", "weight_decay": 0.9}
    torch.save(state, tmp_path / "x.pth")
    flags = ["--data_path", photos, *TINY, "--batch_size", 16, "--epochs", 2, "--output_dir", "out"]
    status, _, err = forks.run("main_pretrain", *flags, "--resume", "x.pth", cwd=tmp_path)
    assert status == 0, err
    state = torch.load(tmp_path / "out/checkpoint-last.pth", weights_only=True)
    assert [g["weight_decay"] for g in state["optimizer"]["param_groups"]] == [0, 0.05]


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
        (*probe, "--resume", "auto"): "--model is 'mae_vit_tiny_patch4' there",
    }.items():
        status, err = run_in(forks, folder, *words)
        assert (status, expected in the_error(err)) == (1, True), err
    assert content_of(folder) == before
    assert run_in(forks, folder, *probe, "--knn") == (0, "")  # writes nothing
    assert content_of(folder) == before
