"""What the tests share: real images, small models, and scripts run as people run them."""

import argparse
import atexit
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from forks import Forks, free_port
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.multiprocessing import start_processes

import model_mae
import util.shards as shards_tool
from util.args import pretrain_parser
from util.datasets import open_dataset
from util.errors import STOP_SIGNALS
from util.run import checkpoint, training
from util.run.launch import SETTLE, launch

ROOT = Path(__file__).resolve().parent.parent

for number in (signal.SIGHUP, signal.SIGINT):  # ignored where the tests run in the background,
    if signal.getsignal(number) is signal.SIG_IGN:  # which what they start would inherit
        signal.signal(number, signal.SIG_DFL)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="huggingface-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

torch.set_num_threads(1)  # the models here are too small to share out

# The garbage of runs in this process holds process groups, whose threads a forked loader process
# lacks: it would wait for them for ever if its collector came upon one.
os.register_at_fork(after_in_child=gc.freeze)

SCRIPTS = ["main_pretrain", "main_finetune", "main_linprobe"]

# A model and a batch that take milliseconds; `--num_workers 0` saves the loader's processes.
TINY = ["--model", "mae_vit_nano_patch4", "--input_size", "8", "--num_workers", "0"]
TINY += ["--device", "cpu"]
VIT = ["--model", "vit_nano_patch4", *TINY[2:]]

SMALL = {
    "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4,
    "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4,
    "norm_layer": model_mae.NORM_LAYER,
}  # fmt: skip


def fill(shape: tuple[int, ...], k: int, scale: float) -> torch.Tensor:
    """The reference values' numbers: scale * sin(0.37 (k + 1) n + k) for n = 1, 2, ..."""
    n = np.arange(1, np.prod(shape) + 1)
    return torch.from_numpy(scale * np.sin(n * 0.37 * (k + 1) + k)).float().reshape(shape)


def small_mae(**kwargs) -> model_mae.MaskedAutoencoderViT:
    torch.manual_seed(0)
    return model_mae.MaskedAutoencoderViT(**{**SMALL, "noise_loss": True, **kwargs})


def objective(**flags) -> argparse.Namespace:
    """Pretraining's flags, by default or as given."""
    args = pretrain_parser().parse_args(["--data_path", "x"])
    vars(args).update(flags)
    return args


def run(*command: str, timeout: float = 400, **env: str) -> subprocess.CompletedProcess:
    """A command in the repository's root, with its output as text; one thread per process."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | env
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={"OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def python(*words: str, processes: int = 1, **kwargs) -> subprocess.CompletedProcess:
    """`python WORDS`, or `torchrun --nproc_per_node=PROCESSES WORDS`."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        launcher += [f"--master_port={free_port()}"]
    return run(sys.executable, *launcher, *words, **kwargs)


def run_main(script: ModuleType, *flags: object) -> int:
    """A script's exit status, run in this process, as its last line runs it."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        launch(script.main, script.get_args_parser().parse_args([str(flag) for flag in flags]))
    except SystemExit as error:
        return error.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def complaints(stderr: str) -> list[str]:
    """The lines on standard error, but for those that name flags without use."""
    return [line for line in stderr.strip().splitlines() if " is not used here: " not in line]


def the_error(stderr: str) -> str:
    """The one line on standard error that tells the user what is wrong."""
    lines = complaints(stderr)
    assert len(lines) == 1, stderr
    assert ": error: " in lines[0]
    return lines[0]


def flags_error(parse: Callable, flags: list[str], capsys) -> str:
    """The one line that a parser ends with, with status 2."""
    with pytest.raises(SystemExit) as end:
        parse(*flags)
    assert end.value.code == 2
    return the_error(capsys.readouterr().err)


def at_step(monkeypatch, epoch: int, index: int, act: Callable[[], object]) -> None:
    """Calls `act` at the beginning of a batch."""

    def seed_all(seed, *position, original=training.seed_all):
        original(seed, *position)
        if position[:2] == (epoch, index):
            act()

    monkeypatch.setattr(training, "seed_all", seed_all)


def state_of(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / f"checkpoint-{name}.pth", weights_only=True)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def losses_of(folder: Path) -> list[dict]:
    """What the log says of learning, without its timings and what was opened."""
    others = ("train_images_per_second", "train_data_wait", "data")
    return [{k: v for k, v in line.items() if k not in others} for line in log_of(folder)]


def assert_same_state(file: Path, other: Path) -> None:
    """Two checkpoints hold the same weights, optimizer state and results, bit for bit."""
    one, two = (torch.load(path, weights_only=True) for path in (file, other))
    for key in ("model", "optimizer", "scaler", "epoch", "best"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)


def assert_same_run(folder: Path, other: Path) -> None:
    """Two runs ended in the same state, and logged the same losses."""
    assert_same_state(folder / checkpoint.LAST, other / checkpoint.LAST)
    assert losses_of(folder) == losses_of(other)


def content_of(folder: Path) -> dict:
    """The files and folders in a folder, with the files' sizes."""
    files = [path for path in folder.rglob("*") if not path.is_fifo() and not path.is_socket()]
    return {path: path.stat().st_size for path in files if path.is_file()} | dict.fromkeys(files)


def in_processes(function, count: int, *args) -> None:
    """Runs function(rank, init_file, *args) in `count` processes, each in a gloo group."""
    start_processes(
        _member, (function, count, free_port(), *args), count, start_method="forkserver"
    )


def _member(rank: int, function, count: int, port: int, *args) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=count
    )
    try:
        function(rank, *args)
    finally:
        time.sleep(SETTLE)
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session", autouse=True)
def _forkserver_imports_once():
    """What each process would take seconds to import; ours are looked for where pytest began."""
    modules = ["timm.models.vision_transformer", "torch.utils.tensorboard", "sklearn.datasets"]
    ours = [*SCRIPTS, "util.shards"] if Path.cwd() == ROOT else []
    torch.multiprocessing.set_forkserver_preload([*modules, "pytest", *ours])


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """An ImageFolder of real JPEGs, cut from scikit-learn's two photographs.

    train/ holds 24 images of each of two classes, val/ 8; 64 pixels a side.
    """
    root = tmp_path_factory.mktemp("photos")
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        tiles = [
            photo[y : y + 64, x : x + 64]
            for y in range(0, photo.shape[0] - 64, 64)
            for x in range(0, photo.shape[1] - 64, 64)
        ]
        for i, tile in enumerate(tiles[:32]):
            folder = root / ("val" if i % 4 == 3 else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(tile).save(folder / f"{i:02d}.jpg", quality=90)
    return root


def write_shards(source: Path | str, out: Path, *flags: object) -> Path:
    words = ["--data_path", source, "--out", out, "--shard_images", 10, "--num_workers", 2, *flags]
    assert run_main(shards_tool, *words) == 0
    return out


@pytest.fixture(scope="session")
def shards(photos, tmp_path_factory) -> Path:
    """The photos, byte by byte and in their order: five shards, and two for validation."""
    return write_shards(photos, tmp_path_factory.mktemp("shards") / "out", "--keep_order")


@pytest.fixture(scope="session")
def table(photos, tmp_path_factory) -> Path:
    """The photos as the Hub has ImageNet: data/train-00000-of-00002.parquet, ..."""
    datasets = pytest.importorskip("datasets", reason="it is optional")
    root = tmp_path_factory.mktemp("table") / "data"
    root.mkdir()
    for split, name, parts in ((True, "train", 2), (False, "validation", 1)):
        folder = open_dataset(str(photos), split)
        names = map(folder.name, range(len(folder)))
        images = [{"path": None, "bytes": Path(name).read_bytes()} for name in names]
        label = datasets.ClassLabel(names=folder.classes)
        features = datasets.Features({"image": datasets.Image(), "label": label})
        rows = {"image": images, "label": folder.targets.tolist()}
        rows = datasets.Dataset.from_dict(rows, features=features)
        for part in range(parts):
            path = root / f"{name}-{part:05d}-of-{parts:05d}.parquet"
            rows.shard(parts, part, contiguous=True).to_parquet(str(path))
    return root.parent


@pytest.fixture
def photos_run(photos, tmp_path) -> list:
    """Flags of a run over 48 real images in steps of 16, three an epoch."""
    return ["--data_path", photos, *TINY, "--batch_size", 16, "--output_dir", tmp_path / "out"]


@pytest.fixture
def flags(photos_run) -> list:
    """The same with a warmup for few epochs. Some files have their own fixture instead."""
    return [*photos_run, "--warmup_epochs", 1]


@pytest.fixture(scope="session")
def forks():
    """Starts scripts, and the commands for checkpoints, within milliseconds."""
    with Forks(*SCRIPTS, "util.export", "util.visualize") as server:
        yield server


@pytest.fixture(scope="session")
def light_forks():
    """The same for submitting, which does not need torch."""
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
