"""Epochs of a few steps, with loader processes that go on into the next epoch or stand still.

    python benchmarks/epochs.py

Photos of 500 x 375 pixels are decoded and cropped in loader processes. In place of a GPU's step the
script sleeps as long as these need for a batch, which is where waiting for them costs most. By the
clock; medians over epochs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from common import ROUNDS, describe_machine, table
from loader import FILES, VIEW, Files, photo

from util.data.loader import train_loader
from util.data.order import SeededDataset
from util_contrastive import TwoCrops

EPOCHS = 2 * ROUNDS + 1  # the first, which starts the processes, is not counted


class Epochs(Files):
    """One photo, as often as an epoch has images."""

    def __init__(self, encoded: bytes, length: int):
        super().__init__(encoded)
        self.length = length

    def __len__(self) -> int:
        return self.length


def per_epoch(batches: Callable[[int], Iterator], step: float) -> float:
    """Median seconds of an epoch whose steps take so long."""
    seconds = []
    for epoch in range(EPOCHS):
        begin = time.perf_counter()
        for _ in batches(epoch):
            time.sleep(step)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    print(describe_machine(torch.device("cpu")))
    vars(options).update(accum_iter=1, seed=0, pin_mem=False, output_dir="", shuffle_window=0)
    encoded, step, rows = photo(*FILES[0]), 0.0, []
    for steps in (64, *options.steps):
        images = Epochs(encoded, steps * options.batch_size)
        data = SeededDataset(images, TwoCrops(VIEW, defer=True), seed=0)
        still, on = (train_loader(data, options, torch.device("cpu")) for _ in range(2))
        if not step:  # of what the processes can give at most
            step = per_epoch(lambda epoch: on.epoch(epoch, EPOCHS), 0.0) / steps
            continue
        stands = per_epoch(lambda epoch: still.epoch(epoch, epoch + 1), step)
        goes = per_epoch(lambda epoch: on.epoch(epoch, EPOCHS), step)
        rows.append([str(steps), f"{stands:.2f} s", f"{goes:.2f} s", f"{stands / goes:.2f}"])
    table(["steps per epoch", "stand still", "go on", "ratio"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 16, 64])
    main(parser.parse_args())
