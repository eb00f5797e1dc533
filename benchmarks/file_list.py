"""Seconds to list a folder of many files, and to take the list from its cache at the next start.

python benchmarks/file_list.py --files 1000000
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from common import table

import util.data.file_list
from util.data.file_list import SETTLED, write_lists
from util.datasets import ImageFiles

FOLDERS = 1000  # classes


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        root, cache = Path(name, "images"), Path(name, "files-train.safetensors")
        for folder in range(FOLDERS):
            (root / f"{folder:04}").mkdir(parents=True)
            for file in range(folder, options.files, FOLDERS):
                os.close(os.open(root / f"{folder:04}/{file:08}.jpg", os.O_CREAT))
        time.sleep(SETTLED / 1e9)  # a folder that changed just now is not kept

        seconds = []
        for _ in ("disk", "cache"):
            begin = time.perf_counter()
            images = ImageFiles(root, cache)
            seconds.append(time.perf_counter() - begin)
            assert len(images) == options.files
            write_lists()
        assert cache.exists(), f"fewer than {util.data.file_list.WORTH_KEEPING} files are not kept"
        size = f"{cache.stat().st_size / 1e6:.0f}"
    columns = [f"{s:.2f}" for s in seconds]
    table(
        ["files", "from disk, s", "from cache, s", "cache, MB"],
        [[f"{len(images):,}", *columns, size]],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    main(parser.parse_args())
