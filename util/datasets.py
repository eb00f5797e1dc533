"""Image datasets by path or name; `build_dataset` and `build_transform` under MAE's names."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset
from torchvision import datasets

from util.data.image_folder import ImageFiles, find_split, left_out_words, unused_beside
from util.data.images import read_image
from util.data.labels import Labelled
from util.data.members import of_splits
from util.data.shards import Shards, find_archives
from util.data.source import (
    SPLITS,
    Part,
    Source,
    classes_of,
    extension_of,
    few,
    labels_of,
    match_classes,
)
from util.data.tables import HUB, open_hub, open_parquet
from util.data.transforms import build_transform
from util.errors import NoSplit, UserError

logger = logging.getLogger(__name__)

DOWNLOADS = "data"  # torchvision's datasets, under the current folder


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, 8 x 8, every fifth of them for validation."""

    def __init__(self, train: bool):
        from sklearn.datasets import load_digits  # takes a second, and is needed only here

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


@dataclass
class Transformed(Dataset):
    """Another dataset's images, transformed, with their labels."""

    dataset: Dataset
    transform: Callable[[Image.Image], Any]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return read_image(self.dataset, index, self.transform)


class Both(ConcatDataset):
    """Training and validation images of a named dataset."""

    def __init__(self, parts: list[Dataset]):
        super().__init__(parts)
        self.targets = np.concatenate([labels_of(part) for part in parts])
        self.classes = classes_of(parts[0])


def build_dataset(is_train: bool, args: argparse.Namespace) -> Dataset:
    """MAE's: (tensor, label) pairs of `--data_path`, transformed for fine-tuning.

    Args:
        args: data_path, and as `build_transform`'s.
    Raises:
        UserError: as `open_dataset`, `build_transform`.
    """
    images = open_dataset(args.data_path, is_train, labels=getattr(args, "labels", ""))
    return Transformed(images, build_transform(is_train, args))


def open_dataset(
    data_path: str, train: bool | None, cache_dir: str = "", labels: str = ""
) -> Dataset:
    """A dataset of (PIL image, label) pairs; files are decoded when their pixels are needed.

    Args:
        data_path: a name of `NAMED`; `hf:NAME[:CONFIG]`; a folder of images, of archives or of
            Parquet files, with `train/` and `val/` (or others of `SPLITS`), or, for training, any;
            or archives by name, as `find_archives`. `./digits` is a folder, `digits` a name.
        train: for training, or for validation; None takes all that is there, splits or not.
        cache_dir: where a large folder's list of files is kept for the next time; '' nowhere.
        labels: a table of the images' labels, as `Labelled`'s; '' for none.
    Raises:
        UserError: no such folder or name, no images there, or the download failed.
    """
    if labels and (data_path in NAMED or data_path.startswith(HUB)):
        raise UserError(f"--labels is for a folder of images, and {data_path} has its own")
    if data_path in NAMED:
        try:
            if train is None:
                return Both([NAMED[data_path](part) for part in (True, False)])
            return NAMED[data_path](train)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot get the dataset {data_path}: {error}") from None
    try:
        dataset = _open_own(data_path, train, cache_dir)
        if labels and isinstance(dataset, ImageFiles):
            dataset = Labelled(dataset, labels, data_path)
        elif labels:
            raise UserError(f"--labels is for a folder of images, not {dataset.where}")
    except OSError as error:
        where = "" if error.filename in (None, data_path) else f"{error.filename}: "
        raise UserError(f"--data_path {data_path}: {where}{error.strerror}") from None
    if len(dataset) == 0:
        found = left_out_words(dataset.left_out)
        known = "; what can be read: .jpg, .png, .tif, .npy, ... (docs/DATA.md)"
        raise UserError(
            f"no images in {dataset.where}" + f"; left out {found}{known}" * bool(found)
        )
    return dataset


def _open_own(data_path: str, train: bool | None, cache_dir: str) -> Source:
    """What lies at a path, or is called by a name of the Hub's."""
    if data_path.startswith(HUB):
        return open_hub(data_path, train) or _no_split(data_path, train)
    if paths := find_archives(data_path):
        return _open_archives(paths, data_path, train, cache_dir)
    root = Path(data_path)
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "no such folder"
        raise UserError(f"--data_path {root}: {what}, nor a name: {', '.join(NAMED)}")
    split = find_split(root, train)
    names = {True: "files-train", False: "files-val", None: "files"}
    cache = Path(cache_dir) / names[train] if cache_dir else None
    images = ImageFiles(split or root, cache and cache.with_suffix(".safetensors"))
    if images.archives:
        return _open_archives(images.archives, split or root, train, cache_dir, bool(split))
    if split and train and (others := unused_beside(split)):
        logger.warning(f"warning: {root}: {split.name}/ is used, not {few(others)}")
    if split is None and train is not None:
        if not train:
            _no_split(root, train)
        if other := find_split(root, False):
            logger.warning(f"warning: no train/ in {root}: all of it is used, {other.name}/ too")
    return images


def _no_split(where: str | Path, train: bool | None) -> NoReturn:
    names = ", ".join(f"{name}/" for name in SPLITS[train])
    other = "main_linprobe.py and main_finetune.py take --val_fraction 0.1 instead"
    raise NoSplit(f"--data_path {where}: none of {names} in it; {other}")


def _open_archives(
    paths: list[str], where: str | Path, train: bool | None, cache_dir: str, is_split: bool = False
) -> Source:
    """Archives or Parquet files; where their names or folders tell splits, those of one."""
    kinds = sorted({extension_of(path) for path in paths})
    if len(kinds) > 1:
        both = f"holds {' and '.join(kinds)}: name those to use, such as '{where}/*{kinds[0]}'"
        raise UserError(f"--data_path {where}: {both}")
    if not is_split and train is not None:
        named, other = of_splits(paths, train)
        unused = sorted(set(paths) - {*named, *other}) if named else []
        if unused:
            logger.warning(f"warning: not used, as no split's: {few(unused)}")
        is_split, paths = bool(named), named or paths
        if other and not named:
            if not train:
                _no_split(where, train)
            logger.warning(f"warning: no files named train in {where}: all are used")
    words = paths[0] if len(paths) == 1 else f"{len(paths):,} {kinds[0]} files of {where}"
    if kinds == [".parquet"]:
        return (
            open_parquet(paths, words)
            if train is not False or is_split
            else _no_split(where, train)
        )
    return Shards(paths, None if is_split else train, words, cache_dir)


def open_labelled(
    data_path: str,
    nb_classes: int | None = None,
    val_fraction: float = 0.0,
    cache_dir: str = "",
    labels: str = "",
) -> tuple[Dataset, Dataset, int]:
    """Training and validation images with labels, and the number of classes.

    Args:
        nb_classes: what the data must hold, if given.
        val_fraction: if not 0, the share of each class's training images to validate on, instead
            of the dataset's own validation images; the same ones for the same images.
        cache_dir, labels: as `open_dataset`'s.
    Raises:
        UserError: no labels, one class, different classes for training and validation, another
            number than nb_classes; or as `open_dataset`.
    """
    train = open_dataset(data_path, True, cache_dir, labels)
    check_classes(train, data_path, nb_classes)
    classes = classes_of(train)
    if val_fraction:
        held = held_out(labels_of(train), val_fraction)
        return Part(train, ~held), Part(train, held), len(classes)
    val = open_dataset(data_path, False, cache_dir, labels)
    check_classes(val, data_path)
    if odd := sorted(set(classes) ^ set(classes_of(val))):
        only = f"{len(odd)} are in one only: {', '.join(odd[:5])}"
        raise UserError(f"--data_path {data_path}: both splits must hold the same classes; {only}")
    match_classes(val, classes, classes_of(val), "the training images")
    return train, val, len(classes)


def check_classes(dataset: Dataset, data_path: str, nb_classes: int | None = None) -> None:
    """Raises UserError where labels cannot be believed, are of one class, or of another number."""
    if isinstance(dataset, Source) and (why := dataset.why_no_classes()):
        raise UserError(f"{dataset.where}: {why}")
    classes = len(classes_of(dataset))
    if classes < 2:
        where = "images must lie in two or more class folders, in train/CLASS/, or have --labels"
        raise UserError(f"--data_path {data_path}: no classes to tell apart: {where}")
    if nb_classes is not None and nb_classes != classes:
        raise UserError(f"--nb_classes {nb_classes}: {data_path} has {classes} classes")


def held_out(labels: np.ndarray, fraction: float) -> np.ndarray:
    """[M] of bool, the same ones for the same labels, though not with an image more or less.

    Each part gets at least one image of every class; of a class of one image, none is held out.
    """
    shuffled = np.random.default_rng(0).permutation(len(labels))  # whatever --seed is
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        chosen[members[:count]] = True
    return chosen
