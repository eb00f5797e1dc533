"""Which images a process sees, in which order and with which random numbers."""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from util.data.images import BadImage, read_image
from util.data.source import name_of
from util.distributed import get_rank, get_world_size
from util.errors import UserError

CHUNK = 4096  # numbers of images that are Python objects at once
NEIGHBOURS = 1000  # images that a window takes together, of files with one each
REPLACEMENTS = 20  # images to try in place of one that cannot be read


class SeededDataset(Dataset):
    """(epoch, index) -> (augmented image, label, bad), a function of (seed, epoch, index) alone.

    An unreadable file is replaced by another image with that one's label, another in each epoch;
    `bad` is then the file's name and the reason, otherwise ("", "").

    The epoch is part of the key because loader processes live longer than an epoch.

    Raises:
        UserError: neither the file nor any of its replacements is readable.
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Image.Image], Any], seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int, tuple[str, str]]:
        epoch, index = key
        try:
            return *self._draw(epoch, index, index), ("", "")
        except BadImage as error:
            bad = name_of(self.dataset, index), str(error)
        others = np.random.default_rng(self._stream(2, epoch, index))
        for other in others.integers(len(self), size=REPLACEMENTS).tolist():
            with contextlib.suppress(BadImage):
                return *self._draw(epoch, index, other), bad
        raise UserError(
            f"{bad[0]} is not a readable image ({bad[1]}), nor was any drawn to replace it"
        )

    def _draw(self, epoch: int, index: int, source: int) -> tuple[Any, int]:
        """Image number `source`, with the random numbers that belong to (epoch, index)."""
        words = self._stream(0, epoch, index).generate_state(3, np.uint64)
        # timm's augmentations draw from Python's and NumPy's generators
        random.seed(int(words[1]))
        np.random.seed(words[2] >> np.uint64(32))
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which would also seed the GPU's generators
            torch.default_generator.manual_seed(int(words[0]))
            return read_image(self.dataset, source, self.transform)

    def _stream(self, *key: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self.seed, spawn_key=key)


class EpochSampler(Sampler):
    """This process's share of each shuffled epoch, as (epoch, index), in whole optimizer steps.

    The order is a function of (seed, epoch) alone; of W processes the one of rank r has its places
    r, r + W, ...

    Args:
        per_step: images of this process in one step, batch_size x accum_iter. Images that do not
            fill a step of all processes are left out of the epoch.
        groups: how many images, one after another, lie in one file.
        window: shuffle the groups, and then images within so many of one group after another, so
            that files are read a few at a time; 0 shuffles all at once.
    Attributes:
        epoch, steps_done: the epoch to draw, and its steps that are left out.
        ahead: how many of the following epochs to go on with.
        num_samples, total_size: images of an epoch, of this process and of all processes.
    Raises:
        UserError: the dataset does not fill one step.
    """

    def __init__(
        self,
        dataset: Dataset,
        per_step: int,
        seed: int,
        groups: np.ndarray | None = None,
        window: int = 0,
    ):
        self.length, self.seed, self.groups = len(dataset), seed, groups
        self.window = min(window, self.length)
        self.rank, self.num_replicas = get_rank(), get_world_size()
        global_step = per_step * self.num_replicas
        steps = self.length // global_step
        if steps == 0:
            what = f"one step of {global_step} (batch_size x accum_iter x processes)"
            raise UserError(f"{self.length} images do not fill {what}: lower --batch_size")
        self.per_step, self.epoch, self.steps_done, self.ahead = per_step, 0, 0, 0
        self.num_samples = steps * per_step
        self.total_size = self.num_samples * self.num_replicas

    def __len__(self) -> int:
        """Of one epoch."""
        return self.num_samples

    def set_epoch(self, epoch: int, steps_done: int = 0, ahead: int = 0) -> None:
        """Chooses the epoch to draw next, without its first steps if they are done already."""
        self.epoch, self.steps_done, self.ahead = epoch, steps_done, ahead

    def __iter__(self) -> Iterator[tuple[int, int]]:
        done = self.steps_done
        for epoch in range(self.epoch, self.epoch + 1 + self.ahead):
            yield from ((epoch, index) for index in self._share(epoch, done))
            done = 0

    def _share(self, epoch: int, steps_done: int) -> Iterator[int]:
        place = self.rank + steps_done * self.per_step * self.num_replicas  # in the epoch
        for start, images in self._windows(epoch, place):
            end = min(start + len(images), self.total_size)
            for chunk in range(place, end, CHUNK * self.num_replicas):
                last = min(end, chunk + CHUNK * self.num_replicas)
                yield from images[chunk - start : last - start : self.num_replicas].tolist()
            place += len(range(place, end, self.num_replicas)) * self.num_replicas

    def _windows(self, epoch: int, place: int) -> Iterator[tuple[int, np.ndarray]]:
        """An epoch's order from a place on: where each window starts, and its shuffled images."""
        if not self.window:
            draws = torch.Generator().manual_seed(self.seed + epoch)  # as DistributedSampler
            yield 0, torch.randperm(self.length, generator=draws).numpy()
            return
        groups = self.groups
        if groups is None:  # of files of one image each, neighbours
            groups = np.full(-(-self.length // NEIGHBOURS), NEIGHBOURS)
            groups[-1] -= groups.sum() - self.length
        firsts = np.cumsum(groups) - groups
        order = self._draws(epoch, 0).permutation(len(groups))
        window = (np.cumsum(groups[order]) - groups[order]) // self.window  # of each group
        bounds = np.flatnonzero(np.diff(window, prepend=-1, append=-1))
        start = 0
        for number, chosen in enumerate(itertools.starmap(slice, itertools.pairwise(bounds))):
            members = order[chosen]
            size = int(groups[members].sum())
            if start + size > place:
                images = np.concatenate(
                    [np.arange(firsts[g], firsts[g] + groups[g]) for g in members]
                )
                yield start, self._draws(epoch, 1, number).permutation(images)
            start += size

    def _draws(self, *key: int) -> np.random.Generator:
        words = np.random.SeedSequence(self.seed, spawn_key=(1, *key))
        return np.random.Generator(np.random.PCG64(words))


class EvalSampler(Sampler):
    """All images in order as (0, index), or only this process's share of them.

    The shares do not overlap, and may differ by one image in size.
    """

    def __init__(self, dataset: Dataset, share: bool):
        self.indices = range(len(dataset))
        if share:
            self.indices = self.indices[get_rank() :: get_world_size()]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, index) for index in self.indices)
