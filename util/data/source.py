"""What every data set of the user's own has, wherever its images lie."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from io import BytesIO

import numpy as np
from torch.utils.data import Dataset, Subset

from util.data.images import NotPillows, open_image
from util.errors import UserError

# Of files that `open_image` reads.
EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c",
    ".avif", ".avifs", ".npy",
))  # fmt: skip
# Names of training's and of validation's images, in any case; the first one found is taken.
SPLITS = {True: ("train", "training"), False: ("val", "valid", "validation", "test"), None: ()}
SPLIT_NAMES = frozenset(SPLITS[True] + SPLITS[False])
LABELS = ("targets", "labels", "_labels")  # names that torchvision's datasets have for them
SURE_SPLITS = {"val", "validation", "test", "training"}


class Source(Dataset):
    """(image, label) pairs, by number; images are decoded when their pixels are needed.

    Attributes:
        where: what was opened, in words.
        classes: their names; [""] without classes.
        targets: every image's class, int32; -1 where the source does not tell it.
        groups: how many images, one after another, lie in one file; None where each has its own.
        left_out: how many files are no images, by extension.
        empty: classes without images.
        renumbered: what `renumber` was given; None until then.
    """

    where: str
    classes: list[str]
    targets: np.ndarray
    groups: np.ndarray | None = None
    left_out: Counter[str]
    empty: list[str] = []  # noqa: RUF012 (never changed)
    renumbered: tuple[list[str], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[NotPillows, int]:
        return open_image(*self.content(index)), int(self.targets[index])

    def content(self, index: int) -> tuple[str | BytesIO, str]:
        """An image's path or bytes, and its file name.

        Raises:
            BadImage, OSError: it cannot be read.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call an image."""
        raise NotImplementedError

    def why_no_classes(self) -> str:
        """Why the labels cannot be believed; '' if they can."""
        return ""

    def renumber(self, classes: list[str], order: np.ndarray) -> None:
        """Gives the classes other numbers; copies in other processes have them, too.

        Args:
            order: [K + 1], the new number of each class, and -1.
        """
        before = self.renumbered
        self.renumbered = classes, order if before is None else order[before[1]]
        self.classes, self.targets = classes, order[self.targets]

    def identity(self) -> str:
        """What another data set has not: a digest of all names."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(os.fsencode(self.name(index)) + b"\n")
        return digest.hexdigest()


def rebuilt(
    kind: type[Source], renumbered: tuple[list[str], np.ndarray] | None, *state: object
) -> Source:
    """A source from what its `__reduce__` sends to another process, by its `_take`."""
    source = kind.__new__(kind)
    source._take(*state)
    if renumbered:
        source.renumber(*renumbered)
    return source


class Part(Subset):
    """The chosen images of a data set."""

    def __init__(self, dataset: Dataset, chosen: np.ndarray):
        super().__init__(dataset, np.flatnonzero(chosen))
        self.groups = None
        if (groups := getattr(dataset, "groups", None)) is not None:
            group = np.searchsorted(np.cumsum(groups), self.indices, side="right")
            self.groups = np.bincount(group, minlength=len(groups))

    @property
    def targets(self) -> np.ndarray:
        return labels_of(self.dataset)[self.indices]

    @property
    def classes(self) -> list[str]:
        return classes_of(self.dataset)

    def name(self, index: int) -> str:
        return name_of(self.dataset, self.indices[index])


def labels_of(dataset: Dataset) -> np.ndarray:
    """Every image's label; torchvision's datasets have three names for them."""
    return np.asarray(next(getattr(dataset, name) for name in LABELS if hasattr(dataset, name)))


def classes_of(dataset: Dataset) -> list[str]:
    """The names of its classes, or their numbers."""
    if hasattr(dataset, "classes"):
        return list(dataset.classes)
    return [str(label) for label in np.unique(labels_of(dataset)).tolist()]


def match_classes(dataset: Dataset, theirs: list[str], ours: list[str], source: str) -> None:
    """Gives a dataset's labels, or those of what it is a part of, a classifier's order of classes.

    Raises:
        UserError: they are others.
    """
    if theirs == ours:
        return
    if twice := sorted({name for name in theirs if theirs.count(name) > 1}):
        raise UserError(f"classes named twice cannot be told apart: {few(twice)}")
    if odd := sorted(set(theirs) ^ set(ours)):
        where = [f"{name} ({'the data' if name in ours else source})" for name in odd[:5]]
        raise UserError(f"{len(odd)} classes are in one only: {', '.join(where)}")
    base = getattr(dataset, "dataset", dataset)
    order = np.array([*map(theirs.index, ours), -1], np.int32)
    if isinstance(base, Source):
        base.renumber(theirs, order)
        return
    name = next(name for name in LABELS if hasattr(base, name))
    setattr(base, name, order[labels_of(base)])
    base.classes = theirs


def name_of(dataset: Dataset, index: int) -> str:
    """An image's file if the dataset names it, else its number."""
    return dataset.name(index) if hasattr(dataset, "name") else f"image {index}"


def in_order(classes: Iterable[str]) -> list[str]:
    """Sorted: numbers by their values, texts by their letters."""
    numbers = all(name.isdecimal() for name in classes)
    return sorted(classes, key=lambda name: (int(name), name) if numbers else name)


def few(names: list[str]) -> str:
    """The first ones."""
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def extension_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()
