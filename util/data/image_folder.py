"""Folders of images: which files are images, which folders are splits, classes, or neither."""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from util.data.file_list import is_shown, list_files, top_of
from util.data.images import BadImage, open_image
from util.data.index import Index
from util.data.source import (
    EXTENSIONS,
    SPLIT_NAMES,
    SPLITS,
    SURE_SPLITS,
    Source,
    extension_of,
    few,
    rebuilt,
)

logger = logging.getLogger(__name__)

LOOK = 10_000  # files of a folder beside a split's to look at: it may hold a million notes


def find_split(root: Path, train: bool | None) -> Path | None:
    """The folder of a split, by its usual names."""
    with os.scandir(root) as entries:
        found = {e.name: e for e in entries if e.name.lower() in SPLITS[train] and e.is_dir()}
    ranks = {name: i for i, name in enumerate(SPLITS[train])}
    order = sorted(found, key=lambda name: (ranks[name.lower()], name != name.lower(), name))
    if len(found) > 1:
        logger.info(f"{order[0]}/ is used, not {few(sorted(set(found) - {order[0]}))}")
    return root / order[0] if order else None


def unused_beside(split: Path) -> list[str]:
    """Folders with images beside a split's, that are no other split's: it may be a class."""
    with os.scandir(split.parent) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and is_shown(e.name))
    others = [name for name in names if name.lower() not in SPLIT_NAMES]
    return [name for name in others if _holds_images(split.parent / name)]


def _holds_images(folder: Path) -> bool:
    files = itertools.chain.from_iterable(names for _, _, names in os.walk(folder))
    some = itertools.islice(files, LOOK)
    return any(extension_of(name) in EXTENSIONS and is_shown(name) for name in some)


class ImageFiles(Source):
    """The images below a folder; its subfolders are classes unless images lie beside them.

    In the order, and with the labels, of torchvision's ImageFolder; without classes, all are 0.

    Attributes:
        archives: files that hold images, if there are none beside them.
        stray: images beside folders that would otherwise be classes.
    """

    def __init__(self, root: Path, cache: Path | None = None):
        self._take(str(root), list_files(root, _is_image, cache))

    def _take(self, root: str, index: Index) -> None:
        self.root, self.where, self.index = root, root, index
        self.names, self.folders = index.strings("names"), index.strings("folders")
        counts = index["counts"]
        self.ends = np.cumsum(counts)
        self.left_out = Counter(index.notes["left_out"])
        self.archives: list[str] = index.notes["archives"]

        tops = [top_of(folder) for folder in self.folders]
        full = {top for top, count in zip(tops, counts, strict=True) if count}
        self.classes = sorted(set(tops) - {""})
        self.stray = []
        if "" in full or not self.classes:
            first = tops.index("")
            if full - {""}:
                start = self.ends[first] - counts[first]
                self.stray = [self.names[i] for i in range(start, self.ends[first])]
            self.classes = [""]
        self.empty = sorted(set(tops) - {""} - full) if full else []
        numbers = {name: label for label, name in enumerate(self.classes)}
        labels = np.array([numbers.get(top, 0) for top in tops], np.int32)
        self.targets = np.repeat(labels, counts)

    def content(self, index: int) -> tuple[str, str]:
        path = self.name(index)
        return path, path

    def name(self, index: int) -> str:
        folder = self.folders[int(np.searchsorted(self.ends, index, side="right"))]
        return os.path.join(self.root, folder, self.names[index])

    def relative_names(self) -> Iterator[str]:
        """All names within the root."""
        names = iter(self.names)
        for folder, count in zip(self.folders, np.diff(self.ends, prepend=0), strict=True):
            yield from (os.path.join(folder, name) for name in itertools.islice(names, int(count)))

    def __reduce__(self) -> tuple:
        return rebuilt, (ImageFiles, self.renumbered, self.root, self.index)

    def why_no_classes(self) -> str:
        named = [name for name in self.classes if name.lower() in SPLIT_NAMES]
        if self.stray:
            return f"images lie beside the class folders: {few(self.stray)}"
        # A class may be called train or valid.
        if len(named) > 1 or named == self.classes or {n.lower() for n in named} & SURE_SPLITS:
            return f"folders that are splits, not classes: {few(named)}"
        if self.empty:
            found = f"; left out: {left_out_words(self.left_out)}" if self.left_out else ""
            return f"class folders without images: {few(self.empty)}{found}"
        return ""


def left_out_words(counts: Counter[str]) -> str:
    """Such as `3 .txt, 1 .zip`."""
    words = [f"{count} {extension}" for extension, count in counts.most_common(5)]
    return ", ".join(words + ["..."] * (len(counts) > 5))


def _is_image(path: str) -> bool:
    extension = extension_of(path)
    if extension:
        return extension in EXTENSIONS
    try:
        return open_image(path) is not None
    except BadImage:
        return False
