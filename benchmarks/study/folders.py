"""Folders of links with the images that the study trains and probes on."""

import argparse
import os
from functools import cache
from pathlib import Path

import torchvision
from sweeps import SHARES, SWEEPS


def prepare(args: argparse.Namespace) -> dict[str, str]:
    """Folders of links with the first images of every class, by share of the labels.

    Where training images are held out to choose by, these are the next ones of each class.
    """
    cifar10 = args.data_path == "cifar10"
    source = download(args.work_dir / "cifar10") if cifar10 else Path(args.data_path)
    held_out, folders = SWEEPS[args.what].held_out, {}
    for share, part in SHARES.items():
        folders[share] = data_folder(args.work_dir, args.images, args.test_images, share, held_out)
        first = args.images if held_out else 0
        for split, part_of, begin, count in (
            ("train", "train", 0, part * args.images),
            ("val", "train" if held_out else "val", first, args.test_images),
        ):
            link_images(source / part_of, folders[share] / split, begin, count)
    return {share: str(folder) for share, folder in folders.items()}


@cache  # every sweep asks for it
def download(folder: Path) -> Path:
    """Writes torchvision's CIFAR-10 as PNGs in class folders; returns their folder."""
    for split in ("train", "val"):
        data = torchvision.datasets.CIFAR10("data", train=split == "train", download=True)
        for index, label in enumerate(data.targets):
            file = folder / split / data.classes[label] / f"{index:05d}.png"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                part = folder / f"{os.getpid()}.part"  # a kill leaves no half of an image
                data[index][0].save(part, "PNG")
                part.replace(file)
    return folder


def link_images(source: Path, target: Path, begin: int, count: float) -> None:
    """Links `count` images of class folders from the `begin`-th on, as many of each class."""
    classes = sorted(folder for folder in source.iterdir() if folder.is_dir())
    begin, end = (round(place / len(classes)) for place in (begin, begin + count))
    for folder in classes:
        links = target / folder.name
        links.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir())[begin:end]:
            if not (links / file.name).exists():
                (links / file.name).symlink_to(file.resolve())


def data_folder(
    work_dir: Path, images: int, test_images: int, share: str = "100", held_out: bool = False
) -> Path:
    return work_dir / f"{images}-{test_images}-{share}{'-held-out' * held_out}"
