"""What the tests share: real images, and scripts run as people run them."""

import gc
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.multiprocessing import start_processes

from util.errors import STOP_SIGNALS
from util.run.launch import launch

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)  # the models here are too small to share out

# The garbage of runs in this process holds process groups, whose threads a forked loader process
# lacks: it would wait for them for ever if its collector came upon one.
os.register_at_fork(after_in_child=gc.freeze)

# A model and a batch that take milliseconds; `--num_workers 0` saves the loader's processes.
TINY = ["--model", "mae_vit_tiny_patch4", "--input_size", "8", "--num_workers", "0"]
TINY += ["--device", "cpu"]


def fill(shape: tuple[int, ...], k: int, scale: float) -> torch.Tensor:
    """The reference values' numbers: scale * sin(0.37 (k + 1) n + k) for n = 1, 2, ..."""
    n = np.arange(1, np.prod(shape) + 1)
    return torch.from_numpy(scale * np.sin(n * 0.37 * (k + 1) + k)).float().reshape(shape)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run(*command: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess:
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


def the_error(stderr: str) -> str:
    """The one line on standard error that tells the user what is wrong."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert ": error: " in lines[0]
    return lines[0]


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
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session", autouse=True)
def _forkserver_imports_torch_once():
    torch.multiprocessing.set_forkserver_preload(["torch", "timm.models.vision_transformer"])


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
