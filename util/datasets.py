"""Image data sets by folder or name, and the order and randomness in which they are seen."""

import argparse
import contextlib
import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import Dataset, DistributedSampler, Sampler, Subset
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.crop import RandomResizedCrop
from util.distributed import get_rank, get_world_size, is_main_process
from util.errors import UserError
from util.file_list import list_files
from util.images import BadImage, open_image, to_rgb
from util.interrupt import ignore_signals
from util.loader import DeviceLoader, warn_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DOWNLOADS = "data"  # where torchvision's data sets go, under the current folder
REPLACEMENTS = 20  # images that are tried in place of one that cannot be read


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


class ImageFiles(datasets.ImageFolder):
    """The images below a folder; classes are its subfolders unless images lie beside those.

    In the order, and with the labels, of torchvision's ImageFolder; without classes, all are 0.
    A file is decoded when its pixels are wanted.
    """

    def __init__(self, root: Path, cache: Path | None = None):
        self._images = {
            folder: [name for name in names if name.lower().endswith(IMG_EXTENSIONS)]
            for folder, names in list_files(root, cache).items()
        }
        super().__init__(str(root), loader=open_image)
        del self._images

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = sorted({_top(folder) for folder in self._images} - {""})
        if self._images[""] or all(name.startswith(".") for name in classes):
            classes = [""]
        return classes, {name: label for label, name in enumerate(classes)}

    def make_dataset(
        self, directory: str, class_to_idx: dict[str, int], **_: Any
    ) -> list[tuple[str, int]]:
        folders = sorted(self._images)
        if "" not in class_to_idx:
            folders.sort(key=_top)
        return [
            (os.path.join(directory, folder, name), class_to_idx.get(_top(folder), 0))
            for folder in folders
            for name in self._images[folder]
        ]


def _top(folder: str) -> str:
    return folder.split(os.sep)[0]


def open_dataset(data_path: str, train: bool, cache_dir: str = "") -> Dataset:
    """A data set of (PIL image, label) pairs; files are decoded when their pixels are wanted.

    Args:
        data_path: a name of `NAMED`, or a folder with `train/` and `val/`, or, for training, any
            folder of images. `./digits` is a folder, `digits` a name.
        cache_dir: where a large folder's list of files is kept for the next time; '' nowhere.
    Raises:
        UserError: no such folder or name, no images there, or the download failed.
    """
    if data_path in NAMED:
        try:
            return NAMED[data_path](train)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot get the data set {data_path}: {error}") from None
    root = Path(data_path)
    try:
        dataset = _open_folder(root, train, cache_dir)
    except OSError as error:
        where = "" if error.filename in (None, data_path) else f"{error.filename}: "
        raise UserError(f"--data_path {data_path}: {where}{error.strerror}") from None
    if len(dataset) == 0:
        raise UserError(f"no images in {dataset.root}")
    return dataset


def _open_folder(root: Path, train: bool, cache_dir: str) -> "ImageFiles":
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "no such folder"
        raise UserError(f"--data_path {root}: {what}, nor a name: {', '.join(NAMED)}")
    split = root / ("train" if train else "val")
    if not split.is_dir():
        if not train:
            raise UserError(
                f"--data_path {root}: no folder val/ in it; --val_fraction 0.1 holds out a "
                "tenth of the training images instead"
            )
        split = root
    cache = Path(cache_dir) / f"files-{'train' if train else 'val'}.json" if cache_dir else None
    return ImageFiles(split, cache)


def read_image(
    dataset: Dataset, index: int, transform: Callable[[Image.Image], Any]
) -> tuple[Any, int]:
    """A transformed RGB image and its label.

    A transform that has `decodes` set gets the image as its file holds it.

    Raises:
        BadImage: the file is not a readable image.
    """
    try:
        image, label = dataset[index]
    except Exception as error:  # torchvision's own data sets open, and some decode, in here
        raise BadImage(error) from None
    return transform(image if getattr(transform, "decodes", False) else to_rgb(image)), label


def name_of(dataset: Dataset, index: int) -> str:
    """An image's file where the data set names it, else its number."""
    return dataset.samples[index][0] if hasattr(dataset, "samples") else f"image {index}"


def open_labelled(
    data_path: str,
    nb_classes: int | None = None,
    val_fraction: float = 0.0,
    cache_dir: str = "",
) -> tuple[Dataset, Dataset, int]:
    """Training and validation images with labels, and the number of classes.

    Args:
        nb_classes: what the data must hold, if given.
        val_fraction: if not 0, the share of each class's training images to validate on, in place
            of the data set's own validation images; the same ones every time.
        cache_dir: as `open_dataset`'s.
    Raises:
        UserError: no labels, one class, different classes for training and validation, another
            number than nb_classes; or as `open_dataset`.
    """
    train = open_dataset(data_path, True, cache_dir)
    classes = _classes(train)
    if len(classes) < 2:
        raise UserError(
            f"--data_path {data_path}: no classes to tell apart: images must lie in two or more "
            f"class folders, in train/CLASS/"
        )
    if nb_classes is not None and nb_classes != len(classes):
        raise UserError(f"--nb_classes {nb_classes}: {data_path} has {len(classes)} classes")
    if val_fraction:
        return *_hold_out(train, val_fraction), len(classes)
    val = open_dataset(data_path, False, cache_dir)
    if classes != _classes(val):
        odd = sorted(set(classes) ^ set(_classes(val)))
        raise UserError(
            f"--data_path {data_path}: train/ and val/ must hold the same classes, but "
            f"{len(odd)} are in one alone: {', '.join(odd[:5])}"
        )
    return train, val, len(classes)


def _labels(dataset: Dataset) -> list[int]:
    """Every image's label; torchvision's data sets have three names for them."""
    names = ("targets", "labels", "_labels")
    return [int(label) for label in next(getattr(dataset, n) for n in names if hasattr(dataset, n))]


def _classes(dataset: Dataset) -> list[str]:
    if hasattr(dataset, "classes"):
        return list(dataset.classes)
    return [str(label) for label in sorted(set(_labels(dataset)))]


def _hold_out(dataset: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Splits a data set; of every class at least one image goes to either part."""
    labels = np.array(_labels(dataset))
    shuffled = np.random.default_rng(0).permutation(len(labels))  # whatever --seed is
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out[members[:count]] = True
    return _Part(dataset, ~held_out), _Part(dataset, held_out)


class _Part(Subset):
    """The images of a data set that are chosen, with their file names where it has them."""

    def __init__(self, dataset: Dataset, chosen: np.ndarray):
        super().__init__(dataset, np.flatnonzero(chosen).tolist())
        if hasattr(dataset, "samples"):
            self.samples = [dataset.samples[i] for i in self.indices]


class SeededDataset(Dataset):
    """(epoch, index) -> (augmented image, label, bad), a function of (seed, epoch, index) alone.

    In place of a file that is not a readable image stands another image with its own label, drawn
    anew in each epoch. `bad` is then the file's name and what is wrong with it, else ("", "").

    The epoch travels with the index because loader processes outlive it.

    Raises:
        UserError: neither the file nor any that was drawn to replace it is readable.
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
            # not torch.manual_seed, which would reach for the GPU's generators as well
            torch.default_generator.manual_seed(int(words[0]))
            return read_image(self.dataset, source, self.transform)

    def _stream(self, *key: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self.seed, spawn_key=key)


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


def train_loader(
    dataset: Dataset,
    args: argparse.Namespace,
    device: torch.device,
    finish: Callable[[Any, torch.device], Any] | None = None,
) -> DeviceLoader:
    """Batches in the order of an `EpochSampler`; its `sampler` wants `set_epoch`.

    Args:
        dataset: takes (epoch, index), as `SeededDataset` does.
        args: batch_size, accum_iter, seed, num_workers, pin_mem, output_dir.
        finish: as `DeviceLoader`'s.
    """
    sampler = EpochSampler(dataset, args.batch_size * args.accum_iter, args.seed)
    return _loader(dataset, sampler, args, device, finish)


def eval_loader(
    dataset: Dataset, args: argparse.Namespace, device: torch.device, share: bool
) -> DeviceLoader:
    """Batches of an `EvalSampler`; else as `train_loader`."""
    return _loader(dataset, EvalSampler(dataset, share), args, device)


def _loader(
    dataset: Dataset,
    sampler: Sampler,
    args: argparse.Namespace,
    device: torch.device,
    finish: Callable[[Any, torch.device], Any] | None = None,
) -> DeviceLoader:
    return DeviceLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=sampler,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        pin_memory=args.pin_mem and device.type == "cuda",
        worker_init_fn=ignore_signals,
        device=device,
        finish=finish,
        output_dir=args.output_dir,
    )


def eval_transform(input_size: int, crop: float | None = None) -> T.Compose:
    """From a PIL image to [3, input_size, input_size]: resized, centre crop, normalised.

    Args:
        crop: the crop's side as a share of the resized image's shorter side; None for MAE's,
            224/256 up to 224 pixels, all of it beyond.
    """
    if crop is None:
        crop = 224 / 256 if input_size <= 224 else 1.0
    return T.Compose(
        [
            _middle,
            T.Resize(int(input_size / crop), T.InterpolationMode.BICUBIC),
            T.CenterCrop(input_size),
            T.ToTensor(),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def _middle(image: Image.Image) -> Image.Image:
    # All that is seen of a strip lies here; resized whole, one of a few pixels would fill memory.
    longest = 16 * min(image.size)
    return TF.center_crop(image, [min(side, longest) for side in image.size[::-1]])


def probe_transform(input_size: int) -> T.Compose:
    """The linear probe's weak augmentation, from a PIL image to [3, input_size, input_size]."""
    return T.Compose(
        [
            RandomResizedCrop(input_size, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def build_transform(is_train: bool, args: argparse.Namespace) -> T.Compose:
    """Fine-tuning's transform, from a PIL image to [3, input_size, input_size].

    Args:
        args: input_size; for training also color_jitter, aa, reprob, remode, recount.
    Raises:
        UserError: --aa is no policy of timm's, or its numbers do not work.
    """
    if not is_train:
        return eval_transform(args.input_size)
    try:
        transform = create_transform(
            args.input_size,
            is_training=True,
            color_jitter=args.color_jitter,
            auto_augment=args.aa or None,
            interpolation="bicubic",
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"--aa {args.aa} is no augmentation policy of timm's: {error}") from None
    for step in transform.transforms:
        if isinstance(step, RandomResizedCropAndInterpolation):
            step.get_params = _crop_params
        for op in itertools.chain(getattr(step, "ops", []), *getattr(step, "policy", [])):
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
    try:
        transform(Image.new("RGB", (args.input_size, args.input_size)))
    except Exception as error:  # of any class: a policy's numbers are checked where they are used
        raise UserError(f"--aa {args.aa} does not work: {error or type(error).__name__}") from None
    return transform


def _crop_params(image: Image.Image, *ranges: Any) -> tuple[int, int, int, int]:
    # timm's, which rounds a crop of very few pixels to none.
    top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, *ranges)
    return min(top, image.height - 1), min(left, image.width - 1), max(height, 1), max(width, 1)


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    # At the ends of its scale timm asks for 0 bits, a black image, which newer Pillow refuses.
    return posterize(image, max(bits, 1), **kwargs)


def preview_images(dataset: Dataset, count: int, input_size: int) -> torch.Tensor:
    """Images [count, 3, input_size, input_size] spread over a data set, normalised, as they are."""
    data = SeededDataset(dataset, eval_transform(input_size, crop=1.0), seed=0)
    indices = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)
    images, _, bad = zip(*(data[0, int(i)] for i in indices), strict=True)
    if is_main_process():
        warn_of({name: reason for name, reason in bad if name})
    return torch.stack(images)
