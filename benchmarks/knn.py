"""What kNN takes in memory and time, of random features in float16.

python benchmarks/knn.py
python benchmarks/knn.py --references 14000000 --width 768 --queries 64    # mapped from a file
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import describe_machine

from util.features import Features, knn_accuracy

CLASSES = 1000
MAPPED_ABOVE = 2**32  # bytes
ROWS = 2**16  # written at once


def references(count: int, width: int, folder: str) -> torch.Tensor:
    """Random features [M, D] in memory, or in a file if they are large."""
    if 2 * count * width <= MAPPED_ABOVE:
        values = np.empty((count, width), np.float16)
    else:
        values = np.memmap(Path(folder, "features"), np.float16, "w+", shape=(count, width))
    random = np.random.default_rng(0)
    for begin in range(0, count, ROWS):
        part = values[begin : begin + ROWS]
        part[:] = random.standard_normal(part.shape, np.float32)
    return torch.from_numpy(values)


def main(args: argparse.Namespace) -> None:
    print(describe_machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        features = references(args.references, args.width, folder)
        train = Features(features, torch.arange(len(features)) % CLASSES)
        val = Features(torch.randn(args.queries, args.width), torch.arange(args.queries) % CLASSES)
        begin = time.perf_counter()
        knn_accuracy(train, val)
        seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    held = features.nbytes / 2**30
    print(f"{args.queries} queries of {len(features):,} x {args.width}: {seconds:.1f} s,")
    print(f"at most {peak:.1f} GiB, of which the features are {held:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--references", type=int, default=1_280_000, help="ImageNet's")
    parser.add_argument("--width", type=int, default=1024, help="ViT-L's")
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--folder", help="where a file of features lies; default: /tmp")
    main(parser.parse_args())
