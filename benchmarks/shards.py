"""Reading of tar shards against files: system calls, disk, order; and large photos made smaller.

    python benchmarks/shards.py

First, images of 100 KB that no cache holds, read in the order of an epoch by one process; `mixing`
is the mean distance of neighbours in an epoch, in the source, as a share of a full shuffle's.
Second, photos of 1600 x 1200: the usual recipe on the originals, and both of ours on shards of
`--max_side 512`, per second and core.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import ROOT, describe_machine, measure, table
from loader import ALL, CROPS, RECIPE, VIEW, Files, batches, photo

from util.data.order import EpochSampler
from util.data.source import Source
from util.datasets import open_dataset

KB = 100
PER_FOLDER = 500
WINDOWS = (0, 2000, 500)
MAX_SIDE, QUALITY = 512, 90


def make_files(folder: Path, images: int) -> None:
    """Headers of images, and noise, which no file system compresses."""
    head, noise = photo(64, 48, 90), np.random.default_rng(0)
    for i in range(images):
        path = folder / f"{i // PER_FOLDER:03d}" / f"{i:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(head + noise.bytes(KB * 1000 - len(head)))


def write_shards(source: Path, out: Path, *flags: object) -> Path:
    words = ["-m", "util.shards", "--data_path", source, "--out", out, *flags]
    command = [sys.executable, *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*.*"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def counters() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def read_epoch(name: str, folder: Path, window: int) -> list[str]:
    data = open_dataset(str(folder), train=True)
    assert isinstance(data, Source)
    sampler = EpochSampler(data, 1, 0, data.groups, window)
    order = [index for _, index in sampler]
    mixing = np.abs(np.diff(order)).mean() / (len(order) / 3)
    forget(folder)
    before, begin = counters(), time.perf_counter()
    for index in order:
        content, _ = data.content(index)
        size = len(Path(content).read_bytes() if isinstance(content, str) else content.getvalue())
        assert size == KB * 1000
    seconds, after = time.perf_counter() - begin, counters()
    calls = (after["syscr"] - before["syscr"]) / len(order)
    disk = (after["read_bytes"] - before["read_bytes"]) / len(order) / 1000
    rate = f"{len(order) / seconds:.0f}"
    return [name, f"{window:,}" if window else "all", rate, f"{calls:.1f}", f"{disk:.0f}",
            f"{mixing:.2f}"]  # fmt: skip


def reading(images: int) -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as name:
        folder = Path(name, "files")
        make_files(folder, images)
        shards = write_shards(folder, Path(name, "shards"), "--shard_images", 100, "--keep_order")
        rows = [read_epoch("files", folder, 0)]
        rows += [read_epoch("shards of 100", shards / "train", window) for window in WINDOWS]
    columns = ["window", "images/s", "reads each", "KB from disk each", "mixing"]
    table([f"{images:,} images", *columns], rows)


def shrinking() -> None:
    original = photo(1600, 1200, 75)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "source")
        source.mkdir()
        (source / "0.jpg").write_bytes(original)
        flags = ["--max_side", MAX_SIDE, "--quality", QUALITY]
        data = open_dataset(str(write_shards(source, Path(name, "out"), *flags) / "train"), True)
        small = data.content(0)[0].getvalue()
    there, here = batches(Files(original), VIEW), batches(Files(small), VIEW)
    runs = {RECIPE: there[RECIPE], CROPS: here[CROPS], ALL: here[ALL]}
    rates = {name: 1 / seconds for name, seconds in measure(runs, torch.device("cpu")).items()}
    rows = []
    for name, rate in rates.items():
        size = original if name == RECIPE else small
        ratio = f"{rate / rates[RECIPE]:.1f}"
        rows.append([name, f"{len(size) / 1000:.0f}", f"{16 * rate:.0f}", ratio])
    table(["1600 x 1200", "KB", "images/s", "of the recipe"], rows)


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    print(describe_machine(torch.device("cpu")))
    reading(options.images)
    shrinking()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    main(parser.parse_args())
