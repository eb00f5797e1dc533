"""Images in archives: WebDataset's tar shards and zips, read at any place by a kept index."""

import functools
import glob
import hashlib
import logging
import multiprocessing
import os
import re
import signal
import tarfile
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from util.data.file_list import ARCHIVES, WORTH_KEEPING, keep, top_of
from util.data.images import BadImage
from util.data.index import Index, Strings
from util.data.members import DEFLATED, KINDS, Members, read_content, read_members, read_name
from util.data.source import (
    SPLIT_NAMES,
    SPLITS,
    SURE_SPLITS,
    Source,
    extension_of,
    few,
    in_order,
    rebuilt,
)
from util.data.workers import count_processors
from util.errors import NoSplit, UserError
from util.files import read_utf8
from util.parents import end_with_parent

logger = logging.getLogger(__name__)

RULES = 4  # an index by other rules is not believed
SHOWN = 5  # damaged archives that are named
SLOW = 64  # archives whose indexing is worth a line
OPEN_FILES = 64  # archives that a process keeps open
CLASSES = "classes.txt"  # beside the shards: a class's name per line, in the order of its number
WITHOUT = "name them val-..., or give --val_fraction 0.1"
COLUMNS = ("offsets", "sizes", "kinds", "heads", "labels", "splits")


class Shards(Source):
    """The images of archives, in their order.

    Classes are the samples' `.cls`, or `label` in `.json`; in archives without those, folders.

    Args:
        paths: of the archives.
        train: which of the folders in them to take, where they are splits; None takes all, of
            archives that are of one split.
        where: the data set in words.
        cache_dir: where the index goes if it cannot be written beside the archives; '' nowhere.
    """

    def __init__(self, paths: list[str], train: bool | None, where: str, cache_dir: str = ""):
        index = _open_index(paths, cache_dir)
        damage: dict[str, str] = index.notes["damage"]  # by the archive's number
        for number in list(damage)[:SHOWN]:
            used = f"the {index['counts'][int(number)]:,} images before that are used"
            logger.warning(f"warning: {paths[int(number)]}: {damage[number]}; {used}")
        self._take(Strings.pack(paths), train, where, index)
        if self.guess:
            logger.warning(f"warning: {where}: {self.guess}")

    def __reduce__(self) -> tuple:
        state = self.paths, self.train, self.where, self.index
        return rebuilt, (Shards, self.renumbered, *state)

    def _take(self, paths: Strings, train: bool | None, where: str, index: Index) -> None:
        """Sets all attributes; what can be taken from the index is not copied."""
        self.paths, self.train, self.where, self.index = paths, train, where, index
        self.groups = index["counts"]
        names = index.strings("names")
        self.left_out = Counter(index.notes["left_out"])
        if damaged := len(index.notes["damage"]):
            self.left_out["ends of damaged archives"] = damaged
        self.chosen, self.stray, self.guess = None, False, ""
        if index.notes["by_folder"]:
            self._take_folders(list(names), train)
        else:
            self._take_labels(list(names), Path(paths[0]).with_name(CLASSES))
        self.ends = np.cumsum(self.groups)

    def _take_labels(self, names: list[str], listed: Path) -> None:
        """Classes by their labels; numbers may have names, in `classes.txt`."""
        self.classes, self.targets = names, self.index["labels"]
        titles = read_lines(listed) if listed.exists() else []
        if titles and all(name.isdecimal() and int(name) < len(titles) for name in names):
            numbers = list(map(int, names))
            if numbers != list(range(len(names))):
                self.targets = np.array([*numbers, -1], np.int32)[self.targets]
            self.classes = titles
            present = set(numbers)
            self.empty = [title for n, title in enumerate(titles) if n not in present]
        if self.train is not None:
            self._take_split()

    def _take_split(self) -> None:
        """Keeps images in folders of a split's name, if there are both splits, or nothing beside.

        Raises:
            NoSplit: there are none for validation.
        """
        splits = self.index["splits"]
        found = {n for n in range(3) if (splits == n).any()} if splits.any() else {0}
        are_splits = 0 not in found or found == {0, 1, 2}
        if are_splits:
            self._choose(splits == (1 if self.train else 2))
            self._leave_out(splits == 0)
        elif found != {0}:
            self.guess = "all is used: folders named as one split, beside others, may be classes"
        if self.train is False and not (are_splits and len(self.targets)):
            raise NoSplit(f"{self.where}: no archives for validation; {WITHOUT}")

    def _leave_out(self, mask: np.ndarray) -> None:
        if count := int(mask.sum()):
            self.left_out["images of no split"] = count

    def _choose(self, mask: np.ndarray) -> None:
        """Keeps some of the images."""
        self.chosen, self.targets = np.flatnonzero(mask), self.targets[mask]
        shard = np.repeat(np.arange(len(self.groups)), self.groups)
        self.groups = np.bincount(shard[mask], minlength=len(self.groups))

    def _take_folders(self, folders: list[str], train: bool | None) -> None:
        """Classes as of a folder of images, below what all have in common, and below a split."""
        tops = {top_of(folder) for folder in folders}
        while len(tops) == 1 and tops != {""} and not tops & {*SPLITS[True], *SPLITS[False]}:
            folders = [folder.partition("/")[2] for folder in folders]
            tops = {top_of(folder) for folder in folders}
        splits = () if train is None else SPLITS[train]
        wanted = next((t for s in splits for t in sorted(tops) if t.lower() == s), None)
        if wanted is None and train is False:
            raise NoSplit(f"{self.where}: no folder for validation in it; {WITHOUT}")
        taken = np.array([wanted in (None, top_of(f)) for f in folders] + [False])
        if wanted is not None:
            others = sorted(top for top in tops if top.lower() not in SPLIT_NAMES)
            unused = np.array([top_of(f) in others for f in folders] + [False])
            self._leave_out(unused[self.index["labels"]])
            alone = not any(top.lower() in SPLITS[not train] for top in tops)
            if any(others) and (train or alone):
                self.guess = f"{wanted}/ is used, not {few(list(filter(None, others)))}"
            folders = [f.partition("/")[2] for f in folders]
        tops = [top_of(folder) for folder in folders]
        full = {top for top, take in zip(tops, taken, strict=False) if take}
        self.classes = [""] if "" in full or not full else sorted(full)
        numbers = {name: number for number, name in enumerate(self.classes)}
        labels = np.array([numbers.get(top, 0) for top in tops] + [0], np.int32)
        self.targets = self.index["labels"]
        if labels[:-1].tolist() != list(range(len(folders))):
            self.targets = labels[self.targets]
        self.stray = "" in full and len(full) > 1
        if not taken[:-1].all():
            self._choose(taken[self.index["labels"]])

    def content(self, index: int) -> tuple[BytesIO, str]:
        shard, offset, size, kind, head = self._place(index)
        data = read_content(self._opened(shard), offset, size, is_zip=not head)
        if len(data) < size:
            raise BadImage("the archive is cut off")
        if kind >= DEFLATED:
            try:
                data = zlib.decompress(data, -zlib.MAX_WBITS)
            except zlib.error as error:
                raise BadImage(error) from None
        return BytesIO(data), KINDS[kind % DEFLATED]

    def name(self, index: int) -> str:
        shard, offset, _, _, head = self._place(index)
        try:
            return f"{self.paths[shard]}: {read_name(self._opened(shard), offset, head)}"
        except (OSError, BadImage, tarfile.TarError):
            return f"{self.paths[shard]}: image {index}"

    def identity(self) -> str:
        return self.index.notes["id"]

    def _opened(self, shard: int) -> int:
        sizes, times = self.index["shard_sizes"], self.index["shard_times"]
        return _opened(self.paths[shard], int(sizes[shard]), int(times[shard])).fileno()

    def _place(self, index: int) -> tuple[int, int, int, int, int]:
        """An image's archive, offset, size, kind and head."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        row = index if self.chosen is None else self.chosen[index]
        return shard, *(int(self.index[column][row]) for column in COLUMNS[:4])

    def why_no_classes(self) -> str:
        if missing := int((self.targets == -1).sum()):
            return f"{missing:,} of {len(self):,} images have no label"
        if self.stray:
            return "images lie beside the class folders"
        if named := {name.lower() for name in self.classes} & SURE_SPLITS:
            return f"folders that are splits, not classes: {few(sorted(named))}"
        return ""


@functools.lru_cache(OPEN_FILES)
def _opened(path: str, size: int, time_ns: int) -> BinaryIO:
    """An archive, which the last use closes; raises BadImage if it is not what was indexed."""
    file = open(path, "rb")  # noqa: SIM115
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != (size, time_ns):
        raise BadImage("its archive has changed since it was indexed")
    return file


def read_lines(path: str | Path) -> list[str]:
    """A text file's lines, but for blank ones at its end; raises UserError if it is none."""
    lines = read_utf8(path, path, "surrogateescape").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def find_archives(data_path: str) -> list[str] | None:
    """The archives that a pattern, a list in a text file, or a path names; None if it is none.

    Raises:
        UserError: it names none that is there, or one that can only be read from its beginning.
    """
    if data_path.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise UserError(f"--data_path {data_path}: compressed: unpack it to a .tar first")
    if data_path.endswith(".txt") and os.path.isfile(data_path):
        folder = os.path.dirname(data_path)
        lines = filter(None, map(str.strip, read_lines(data_path)))
        paths = [os.path.join(folder, os.path.expanduser(line)) for line in lines]
    elif os.path.isfile(data_path):
        return [data_path] if extension_of(data_path) in ARCHIVES else None
    elif any(letter in data_path for letter in "{*?") and not os.path.isdir(data_path):
        words = braces(os.path.expanduser(data_path))
        paths = [found for word in words for found in sorted(glob.glob(word)) or [word]]
    else:
        return None
    if missing := [path for path in paths if not os.path.isfile(path)]:
        words = f"{few(missing)}: no such file"
        raise UserError(f"--data_path {data_path}: {len(missing)} of {len(paths)}: {words}")
    if not paths:
        raise UserError(f"--data_path {data_path}: names no file")
    if odd := [path for path in paths if extension_of(path) not in ARCHIVES]:
        raise UserError(f"--data_path {data_path}: not {', '.join(ARCHIVES)}: {few(odd)}")
    return list(dict.fromkeys(paths))


def braces(pattern: str) -> list[str]:
    """The words of a shell's braces: `{00..12}` counts, `{a,b}` lists; they may be nested."""
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        return [pattern]
    before, after, words = pattern[: group.start()], pattern[group.end() :], group[1].split(",")
    if ends := re.fullmatch(r"(\d+)\.\.(\d+)", group[1]):
        first, last = map(int, ends.groups())
        digits = max(map(len, ends.groups())) if "0" in (ends[1][0], ends[2][0]) else 0
        step = 1 if first <= last else -1
        words = [f"{n:0{digits}d}" for n in range(first, last + step, step)]
    return list(dict.fromkeys(found for w in words for found in braces(f"{before}{w}{after}")))


def _open_index(paths: list[str], cache_dir: str) -> Index:
    """The kept index, if it is of these archives as they are; else another, which is kept."""
    parents = {os.path.dirname(os.path.abspath(path)) for path in paths}
    folder = os.path.commonpath(list(parents))
    names = Strings.pack(os.path.relpath(path, folder) for path in paths)
    digest = hashlib.sha256(names.data.tobytes()).hexdigest()[:8]
    where = [folder] if len(parents) == 1 else []  # else it would lie far from them
    places = [Path(p, f"can-index-{digest}.safetensors") for p in (*where, cache_dir) if p]
    try:
        stats = [os.stat(path) for path in paths]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    found = {
        "shard_sizes": np.array([stat.st_size for stat in stats], np.int64),
        "shard_times": np.array([stat.st_mtime_ns for stat in stats], np.int64),
    }
    found |= names.named("paths")
    for place in places:
        kept = Index.read(place)
        if (
            kept
            and kept.notes.get("rules") == RULES
            and all(
                name in kept and np.array_equal(kept[name], array) for name, array in found.items()
            )
        ):
            return kept
    index = _make_index(paths, found)
    if len(index["offsets"]) < WORTH_KEEPING:
        return index
    if where and index.write(places[0]):
        return Index.read(places[0])
    if cache_dir:
        if where:
            logger.info(f"{folder} cannot be written to: its index is kept in {cache_dir}")
        keep(places[-1], index)
    return index


def _make_index(paths: list[str], found: dict[str, np.ndarray]) -> Index:
    begin = time.monotonic()
    if len(paths) >= SLOW:
        logger.info(f"indexing {len(paths):,} archives, once")
    processes = min(count_processors(), len(paths))
    if processes > 1:
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, fork, end_with_parent, (signal.SIGKILL,)) as pool:
            archives = list(pool.map(read_members, paths, chunksize=max(1, len(paths) // 1000)))
    else:
        archives = list(map(read_members, paths))
    index = _merge(archives, found)
    if len(paths) >= SLOW:
        images, seconds = len(index["offsets"]), time.monotonic() - begin
        logger.info(f"{images:,} images indexed in {seconds:.0f} s")
    return index


def _merge(archives: list[Members], found: dict[str, np.ndarray]) -> Index:
    """One index of all archives; folders count as labels only where no archive has labels."""
    by_folder = all(archive.by_folder for archive in archives)
    used = [archive.names for archive in archives if archive.by_folder == by_folder]
    names = in_order({name for names in used for name in names})
    numbers = {name: number for number, name in enumerate(names)}
    for archive in archives:
        known = numbers if archive.by_folder == by_folder else {}
        new = [known.get(name, -1) for name in archive.names]
        archive.labels = np.array([*new, -1], np.int32)[archive.labels]
    arrays = {c: np.concatenate([getattr(a, c) for a in archives]) for c in COLUMNS[:-1]}
    arrays["splits"] = Members.splits(archives)
    arrays |= Strings.pack(names).named("names")
    arrays["counts"] = np.array([len(archive.offsets) for archive in archives], np.int64)
    damage = {str(n): archive.damage for n, archive in enumerate(archives) if archive.damage}
    left_out = sum((archive.left_out for archive in archives), Counter())
    notes = {"rules": RULES, "by_folder": by_folder, "left_out": left_out, "damage": damage}
    identity = b"".join(array.tobytes() for array in found.values())
    notes["id"] = hashlib.sha256(identity).hexdigest()
    return Index(arrays | found, notes)
