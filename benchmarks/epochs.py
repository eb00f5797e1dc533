"""Epochs of a few steps, with loader processes that go on into the next epoch or stand still.

    python benchmarks/epochs.py

Photos of 500 x 375 pixels are decoded and cropped in loader processes. In place of a step on a GPU
the script sleeps, for as long as the processes need for a batch: neither waits for the other but
where an epoch begins. By the clock; medians over epochs.
"""

import argparse
import statistics
import sys
import time

import torch
from common import ROUNDS, describe_machine, table
from loader import FILES, VIEW, Files, photo

from util.data.loader import TrainLoader, train_loader
from util.data.order import SeededDataset
from util_contrastive import TwoCrops

EPOCHS = 2 * ROUNDS + 1  # the first, which starts the processes, is not counted


class Photos(Files):
    """One photo, as often as an epoch has images."""

    def __init__(self, encoded: bytes, length: int):
        super().__init__(encoded)
        self.length = length

    def __len__(self) -> int:
        return self.length


def per_epoch(loader: TrainLoader, step: float, goes_on: bool) -> float:
    """Median seconds of an epoch whose steps take so long."""
    seconds = []
    for epoch in range(EPOCHS):
        loader.epochs = EPOCHS if goes_on else epoch + 1
        begin = time.perf_counter()
        for _ in loader.epoch(epoch):
            time.sleep(step)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    print(describe_machine(torch.device("cpu")))
    vars(options).update(
        accum_iter=1, epochs=EPOCHS, seed=0, pin_mem=False, output_dir="", shuffle_window=0
    )
    encoded = photo(*FILES[0])

    def loader(steps: int) -> TrainLoader:
        images = Photos(encoded, steps * options.batch_size)
        data = SeededDataset(images, TwoCrops(VIEW, defer=True), seed=0)
        return train_loader(data, options, torch.device("cpu"))

    longest = max(options.steps)
    if not loader(longest).has_ample_room():
        sys.exit("/dev/shm is too small: loader processes would stand still")
    step = per_epoch(loader(longest), 0.0, goes_on=True) / longest  # what the processes can give
    rows = []
    for steps in options.steps:
        still, on = (per_epoch(loader(steps), step, goes_on) for goes_on in (False, True))
        rows.append([str(steps), f"{still:.2f} s", f"{on:.2f} s", f"{still / on:.2f}"])
    table(["steps per epoch", "stand still", "go on", "ratio"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 16, 64])
    main(parser.parse_args())
