"""Image data sets by folder or name, and the order and randomness in which they are seen."""

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import datasets

from util.distributed import from_rank_zero, get_rank, get_world_size
from util.errors import UserError
from util.interrupt import ignore_signals

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DOWNLOADS = "data"  # where torchvision's data sets go, under the current folder


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, 8 x 8, every fifth of them for validation."""

    def __init__(self, train: bool):
        from sklearn.datasets import load_digits  # a second to import, and needed here alone

        pixels, labels = load_digits(return_X_y=True)
        chosen = (np.arange(len(labels)) % 5 != 0) == train
        self.images = np.uint8(pixels[chosen] * (255 / 16)).reshape(-1, 8, 8)
        self.targets = labels[chosen].tolist()
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.targets[index]


def _by_train(dataset: type) -> Callable[[bool], Dataset]:
    return lambda train: dataset(DOWNLOADS, train=train, download=True)


def _by_split(dataset: type, train: str, val: str) -> Callable[[bool], Dataset]:
    return lambda is_train: dataset(DOWNLOADS, split=train if is_train else val, download=True)


NAMED: dict[str, Callable[[bool], Dataset]] = {
    "digits": Digits,
    "cifar10": _by_train(datasets.CIFAR10),
    "cifar100": _by_train(datasets.CIFAR100),
    "mnist": _by_train(datasets.MNIST),
    "fashionmnist": _by_train(datasets.FashionMNIST),
    "svhn": _by_split(datasets.SVHN, "train", "test"),
    "stl10": _by_split(datasets.STL10, "train", "test"),
    "food101": _by_split(datasets.Food101, "train", "test"),
    "flowers102": _by_split(datasets.Flowers102, "train", "test"),
    "pets": _by_split(datasets.OxfordIIITPet, "trainval", "test"),
}


class FlatFolder(datasets.ImageFolder):
    """All images below a folder, whatever its subfolders; one class."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return [""], {"": 0}


def _image_folder(root: Path) -> Dataset:
    """ImageFolder where images lie in class folders, else FlatFolder."""
    with os.scandir(root) as entries:
        entries = [entry for entry in entries if not entry.name.startswith(".")]
    loose = any(entry.name.lower().endswith(datasets.folder.IMG_EXTENSIONS) for entry in entries)
    try:
        if any(entry.is_dir() for entry in entries) and not loose:
            return datasets.ImageFolder(str(root), allow_empty=True)
        return FlatFolder(str(root))
    except FileNotFoundError:  # torchvision's word for "no image"
        raise UserError(f"no images in {root}") from None


def open_dataset(data_path: str, train: bool) -> Dataset:
    """A data set of (PIL image, label) pairs.

    Args:
        data_path: a name of `NAMED`, or a folder with `train/` and `val/`, or, for training, any
            folder of images. `./digits` is a folder, `digits` a name.
    Raises:
        UserError: no such folder or name, no images there, or the download failed.
    """
    if data_path in NAMED:
        try:
            return NAMED[data_path](train)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot get the data set {data_path}: {error}") from None
    root = Path(data_path)
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "no such folder"
        raise UserError(f"--data_path {data_path}: {what}, nor a name: {', '.join(NAMED)}")
    split = root / ("train" if train else "val")
    if not split.is_dir():
        if not train:
            raise UserError(f"--data_path {data_path}: no folder val/ in it")
        split = root
    try:
        dataset = _image_folder(split)
    except PermissionError as error:
        raise UserError(f"--data_path {data_path}: {error.filename}: not readable") from None
    if len(dataset) == 0:
        raise UserError(f"no images in {split}")
    return dataset


def read_image(dataset: Dataset, index: int) -> tuple[Image.Image, int]:
    """An RGB image and its label.

    Raises:
        UserError: the file is not a readable image; names it.
    """
    try:
        image, label = dataset[index]
        return image.convert("RGB"), label
    except (OSError, SyntaxError, ValueError) as error:
        name = dataset.samples[index][0] if hasattr(dataset, "samples") else f"image {index}"
        raise UserError(f"{name} is not a readable image ({error})") from None


class SeededDataset(Dataset):
    """(epoch, index) -> (augmented image, label), a function of (seed, epoch, index) alone.

    The epoch travels with the index because loader processes outlive it.
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Image.Image], Any], seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        epoch, index = key
        image, label = read_image(self.dataset, index)
        words = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which would reach for the GPU's generators as well
            torch.default_generator.manual_seed(int(words[0]))
            return self.transform(image), label


class EpochSampler(DistributedSampler):
    """This process's share of each shuffled epoch, as (epoch, index), in whole optimiser steps.

    Args:
        per_step: images of this process in one step, batch_size x accum_iter. What does not fill
            a step of all processes is left out of the epoch, so that none leaks into the next.
    Raises:
        UserError: the data set does not fill one step.
    """

    def __init__(self, dataset: Dataset, per_step: int, seed: int):
        ranks = {"num_replicas": get_world_size(), "rank": get_rank()}
        super().__init__(dataset, **ranks, shuffle=True, seed=seed, drop_last=True)
        steps = len(dataset) // (per_step * self.num_replicas)
        if steps == 0:
            raise UserError(
                f"{len(dataset)} images do not fill one step of "
                f"{per_step * self.num_replicas} (batch_size x accum_iter x processes)"
            )
        self.per_step, self.steps_done = per_step, 0
        self.num_samples = steps * per_step
        self.total_size = self.num_samples * self.num_replicas

    def set_epoch(self, epoch: int, steps_done: int = 0) -> None:
        """The epoch to draw next, without its first steps if they are done already."""
        super().set_epoch(epoch)
        self.steps_done = steps_done

    def __iter__(self) -> Iterator[tuple[int, int]]:
        keys = ((self.epoch, index) for index in super().__iter__())
        return itertools.islice(keys, self.steps_done * self.per_step, None)


def train_loader(
    args: argparse.Namespace, transform: Callable[[Image.Image], Any], device: torch.device
) -> DataLoader:
    """The shuffled, augmented training images; its `sampler` wants `set_epoch`.

    Args:
        args: data_path, batch_size, accum_iter, seed, num_workers, pin_mem.
    """
    dataset = from_rank_zero(lambda: open_dataset(args.data_path, train=True))
    sampler = EpochSampler(dataset, args.batch_size * args.accum_iter, args.seed)
    return DataLoader(
        SeededDataset(dataset, transform, args.seed),
        batch_size=args.batch_size,
        sampler=sampler,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        pin_memory=args.pin_mem and device.type == "cuda",
        drop_last=True,
        worker_init_fn=ignore_signals,
    )


def global_batch(args: argparse.Namespace) -> int:
    """Images per optimiser step, over all processes."""
    return args.batch_size * args.accum_iter * get_world_size()


def preview_images(dataset: Dataset, count: int, input_size: int) -> torch.Tensor:
    """Images [count, 3, input_size, input_size] spread over a data set, normalised, as they are."""
    transform = T.Compose(
        [
            T.Resize(input_size, T.InterpolationMode.BICUBIC),
            T.CenterCrop(input_size),
            T.ToTensor(),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    indices = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
    return torch.stack([transform(read_image(dataset, int(i))[0]) for i in indices])
