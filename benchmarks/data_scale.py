"""Memory and start-up of lists of millions of files, and of an index of 300 million samples.

    python benchmarks/data_scale.py

The lists are synthetic: every file is the same small image, in memory. `old` keeps one tuple of a
path and a label per file, as torchvision's ImageFolder does. The index takes 6 GB of disk.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from common import ROOT, describe_machine, table
from PIL import Image
from torch.utils.data import DataLoader

from util.data.file_list import RULES as FILE_RULES
from util.data.image_folder import ImageFiles
from util.data.index import Index, Strings
from util.data.order import EpochSampler
from util.data.shards import RULES as SHARD_RULES
from util.data.shards import Shards
from util.datasets import open_dataset

FOLDERS = 1000  # classes
WORKERS = 2
BATCH = 64
PER_SHARD = 10_000
RANK, RANKS = 3, 64
BATCHES = 1000
WINDOW = 20_000
LONG_AGO = 1_600_000_000


class Names:
    """Touches what an image's sample needs of the list, and decodes nothing."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> int:
        return len(self.dataset.name(key[1])) + int(self.dataset.targets[key[1]])


class Tuples:
    """The list as it was."""

    def __init__(self, dataset: ImageFiles):
        targets = dataset.targets.tolist()
        self.samples = [(dataset.name(i), label) for i, label in enumerate(targets)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> int:
        path, label = self.samples[key[1]]
        return len(path) + label


def make_list(folder: Path, files: int) -> Path:
    """A kept list, of folders that are there and files that are not."""
    root = folder / "images"
    labels = [f"n{label:08d}" for label in range(FOLDERS)]
    for label in labels:
        (root / label).mkdir(parents=True)
        os.utime(root / label, (LONG_AGO, LONG_AGO))
    os.utime(root, (LONG_AGO, LONG_AGO))
    each = files // FOLDERS
    names = Strings.pack(f"{label}_{i:05d}.JPEG" for label in labels for i in range(each))
    arrays = names.named("names") | Strings.pack(["", *labels]).named("folders")
    arrays["counts"] = np.array([0] + [each] * FOLDERS)
    arrays["times"] = np.full(FOLDERS + 1, LONG_AGO * 10**9)
    notes = {
        "root": str(root.resolve()),
        "rules": FILE_RULES,
        "left_out": {},
        "archives": [],
        "id": "x",
    }
    assert Index(arrays, notes).write(folder / "files-train.safetensors")
    return root


def private(pid: int) -> float:
    """MB that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def full_pass(dataset) -> tuple[float, float]:
    """Private MB of a loader process at its start, and after all names."""
    sampler = EpochSampler(dataset, 1, 0)
    options = {"num_workers": WORKERS, "persistent_workers": True}
    loader = DataLoader(dataset, 1000, sampler=sampler, **options)
    batches = iter(loader)
    next(batches)
    pids = [worker.pid for worker in batches._workers]
    before = max(map(private, pids))
    for _ in batches:
        pass
    return before, max(map(private, pids))


def one_list(options: argparse.Namespace) -> dict[str, float]:
    """To be run in a process of its own."""
    folder = Path(options.folder)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    begin = time.perf_counter()
    content = io.BytesIO(buffer.getvalue()), ""
    with mock.patch.object(ImageFiles, "content", return_value=content):
        images = open_dataset(str(folder / "images"), True, str(folder))
        sampler = EpochSampler(images, BATCH, 0)
        keyed = type("Keyed", (), {"__getitem__": lambda _, key: images[key[1]][1]})()
        next(iter(DataLoader(keyed, BATCH, sampler=sampler, num_workers=WORKERS)))
    seconds = time.perf_counter() - begin
    before, after = full_pass(Tuples(images) if options.old else Names(images))
    return {"seconds": seconds, "before": before, "after": after}


def make_index(folder: Path, samples: int) -> list[str]:
    """An index of empty shards that claims so many samples."""
    paths = [str(folder / f"{n:05d}.tar") for n in range(samples // PER_SHARD)]
    for path in paths:
        Path(path).touch()
    names = Strings.pack(map(os.path.basename, paths))
    arrays = {
        "offsets": np.zeros(samples, np.int64),
        "sizes": np.zeros(samples, np.int64),
        "kinds": np.zeros(samples, np.uint8),
        "heads": np.ones(samples, np.uint16),
        "labels": np.zeros(samples, np.int32),
        "splits": np.zeros(samples, np.uint8),
        "counts": np.full(len(paths), PER_SHARD),
        "shard_sizes": np.zeros(len(paths), np.int64),
        "shard_times": np.array([os.stat(path).st_mtime_ns for path in paths]),
    }
    arrays |= names.named("paths") | Strings.pack([""]).named("names")
    notes = {"rules": SHARD_RULES, "id": "x", "by_folder": True, "left_out": {}, "damage": {}}
    digest = hashlib.sha256(names.data.tobytes()).hexdigest()[:8]
    assert Index(arrays, notes).write(folder / f"can-index-{digest}.safetensors")
    return paths


def one_index(options: argparse.Namespace) -> dict[str, float | str]:
    """To be run in a process of its own."""
    folder = Path(options.folder)
    with (
        mock.patch("util.data.order.get_world_size", return_value=RANKS),
        mock.patch("util.data.order.get_rank", return_value=RANK),
    ):
        before, begin = private(os.getpid()), time.perf_counter()
        images = open_dataset(str(folder), train=True)
        assert isinstance(images, Shards)
        sampler = EpochSampler(images, BATCH, 0, images.groups, WINDOW)
        sampler.set_epoch(1, options.done)
        keys = iter(sampler)
        first = next(keys)
        seconds = time.perf_counter() - begin
        drawn = [first[1]] + [next(keys)[1] for _ in range((BATCHES - options.done) * BATCH - 1)]
        rows = [int(images.index["offsets"][i]) + images._place(i)[0] for i in drawn]
    assert len(rows) == len(drawn)
    tail = np.array(drawn[-(BATCHES // 2) * BATCH :]).tobytes()
    memory = private(os.getpid())
    digest = hashlib.sha256(tail).hexdigest()[:8]
    return {"seconds": seconds, "extra": memory - before, "total": memory, "tail": digest}


def ask(part: str, folder: Path, *flags: str) -> dict:
    """What a part prints, run by a fresh process."""
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder), *flags]
    return json.loads(subprocess.check_output(command, cwd=ROOT, text=True).splitlines()[-1])


def main(options: argparse.Namespace) -> None:
    if options.part:
        parts = {"list": one_list, "index": one_index}
        print(json.dumps(parts[options.part](options)))
        return
    print(describe_machine(torch.device("cpu")))
    rows = []
    for files in options.files:
        with tempfile.TemporaryDirectory() as name:
            make_list(Path(name), files)
            for old in (True, False):
                found = ask("list", Path(name), *["--old"] * old)
                numbers = (found["before"], found["after"], found["after"] - found["before"])
                seconds = "" if old else f"{found['seconds']:.1f}"
                kind = "old" if old else "here"
                rows.append([f"{files:,}", kind, seconds, *(f"{number:.0f}" for number in numbers)])
    columns = ["first batch, s", "worker, MB", "after a pass", "extra"]
    table(["files", "list", *columns], rows)
    with tempfile.TemporaryDirectory() as name:
        make_index(Path(name), options.samples)
        whole, resumed = (ask("index", Path(name), f"--done={n}") for n in (0, BATCHES // 2))
    same = "the same" if whole["tail"] == resumed["tail"] else "OTHERS"
    print(
        f"{options.samples:,} samples: first keys of rank {RANK} of {RANKS} after "
        f"{whole['seconds']:.1f} s, {whole['extra']:.0f} MB beside {whole['total']:.0f} in all; "
        f"batches {BATCHES // 2} to {BATCHES} after a resume: {same}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, nargs="+", default=[1_300_000, 10_000_000])
    parser.add_argument("--samples", type=int, default=300_000_000)
    parser.add_argument("--part", choices=("list", "index"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--old", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--done", type=int, default=0, help=argparse.SUPPRESS)
    main(parser.parse_args())
