"""Folders of images: which files are images, which folders are splits, classes, or neither."""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

from torchvision import datasets

from util.data.file_list import list_files
from util.data.images import BadImage, open_image

# Of files that `open_image` reads.
EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c",
    ".avif", ".avifs", ".npy",
))  # fmt: skip
# Names of the folders for training, and for validation, in any case; the first one found is taken.
SPLITS = {True: ("train", "training"), False: ("val", "valid", "validation", "test")}
SURE_SPLITS = {"val", "validation", "test", "training"}
logger = logging.getLogger(__name__)


def find_split(root: Path, train: bool) -> Path | None:
    """The folder of a split, by its usual names."""
    with os.scandir(root) as entries:
        found = {e.name: e for e in entries if e.name.lower() in SPLITS[train] and e.is_dir()}
    ranks = {name: i for i, name in enumerate(SPLITS[train])}
    order = sorted(found, key=lambda name: (ranks[name.lower()], name != name.lower(), name))
    if len(found) > 1:
        logger.info(f"{order[0]}/ is used, not {_few(sorted(set(found) - {order[0]}))}")
    return root / order[0] if order else None


class ImageFiles(datasets.ImageFolder):
    """The images below a folder; its subfolders are classes unless images lie beside them.

    In the order, and with the labels, of torchvision's ImageFolder; without classes, all are 0.
    Files are decoded when their pixels are needed.

    Attributes:
        left_out: how many files are no images, by extension.
        stray: images beside folders that would otherwise be classes.
        empty: class folders without images.
    """

    def __init__(self, root: Path, cache: Path | None = None):
        self._images: dict[str, list[str]] = {}
        self.left_out: Counter[str] = Counter()
        for folder, names in list_files(root, cache).items():
            self._images[folder] = kept = []
            for name in names:
                extension = os.path.splitext(name)[1].lower()
                if extension in EXTENSIONS or (
                    not extension and _is_image(os.path.join(root, folder, name))
                ):
                    kept.append(name)
                else:
                    self.left_out[extension or "without extension"] += 1
        tops = sorted({_top(folder) for folder in self._images} - {""})
        full = {_top(folder) for folder, names in self._images.items() if names}
        self.stray = self._images[""] if full - {""} else []
        self.empty = [name for name in tops if name not in full] if full else []
        super().__init__(str(root), loader=open_image)
        del self._images

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = sorted({_top(folder) for folder in self._images} - {""})
        if self._images[""] or not classes:
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

    def why_no_classes(self) -> str:
        """Why the labels cannot be believed; '' if they can."""
        splits = {name for names in SPLITS.values() for name in names}
        named = [name for name in self.classes if name.lower() in splits]
        if self.stray:
            return f"images lie beside the class folders: {_few(self.stray)}"
        # A class may be called train or valid.
        if len(named) > 1 or named == self.classes or {n.lower() for n in named} & SURE_SPLITS:
            return f"folders that are splits, not classes: {_few(named)}"
        if self.empty:
            found = f"; left out: {left_out_words(self.left_out)}" if self.left_out else ""
            return f"class folders without images: {_few(self.empty)}{found}"
        return ""


def left_out_words(counts: Counter[str]) -> str:
    """Such as `3 .txt, 1 .zip`."""
    words = [f"{count} {extension}" for extension, count in counts.most_common(5)]
    return ", ".join(words + ["..."] * (len(counts) > 5))


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def _top(folder: str) -> str:
    return folder.split(os.sep)[0]


def _is_image(path: str) -> bool:
    try:
        return open_image(path) is not None
    except BadImage:
        return False
