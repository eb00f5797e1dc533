"""What an archive holds: where its images lie, with which labels; WebDataset's tars and zips."""

import json
import os
import posixpath
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from util.data.file_list import is_shown
from util.data.source import EXTENSIONS, SPLIT_NAMES, SPLITS, extension_of

BLOCK = 512  # a tar's, in bytes
PADDING = 2**20  # bytes after a tar's end mark that are looked at: zeros, or another archive
LABELS = ("label", "cls", "class")  # of a sample's .json, the first one that is there
LOCAL_HEADER = 30  # bytes of a zip's member before its name
UTF8 = 0x800  # a flag of its name; without it, it is in cp437
DEFLATED = 128  # added to an image's kind
SIDES = {"cls", "json", "txt"}  # what stands beside an image in a sample
MOST_SILENT = 100


@dataclass
class Members:
    """The images of one archive.

    Attributes:
        offsets, sizes: where each lies, in bytes; in a zip, where its header does.
        kinds: of each, its number in `EXTENSIONS`, sorted; `DEFLATED` more where it is.
        heads: blocks of 512 bytes before each that tell its name; 0 in a zip.
        labels: each one's number in `names`, -1 for none.
        places, folders: each image's number among the folders of the images.
        names: labels, or where `by_folder` the folders of the images.
        left_out: as `Source`'s.
        damage: what is wrong with the archive; '' for nothing.
    """

    offsets: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    kinds: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    heads: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    folders: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    by_folder: bool = True
    left_out: Counter[str] = field(default_factory=Counter)
    damage: str = ""

    @staticmethod
    def splits(archives: list["Members"]) -> np.ndarray:
        """Of all images of some archives, as `_splits_of` has them of all folders together."""
        split_of = _splits_of({folder for archive in archives for folder in archive.folders})
        parts = [np.array([split_of[f] for f in a.folders], np.uint8)[a.places] for a in archives]
        return np.concatenate(parts)


class File(NamedTuple):
    """A member of an archive: its name, and where its content lies, in bytes.

    `head` are the blocks of a tar before the content that tell the name.
    """

    name: str
    offset: int
    size: int
    kind: int = 0
    head: int = 0


KINDS = sorted(EXTENSIONS)
_KIND = {extension: number for number, extension in enumerate(KINDS)}


def read_members(path: str) -> Members:
    """Lists an archive; of a damaged one, what comes before the damage."""
    try:
        return _read_zip(path) if extension_of(path) == ".zip" else _read_tar(path)
    except Exception as error:  # the readers raise all kinds for damaged files
        return Members(damage=str(error) or type(error).__name__)


def _gather(images: list[File], labels: dict[int, str], found: Members) -> Members:
    """Adds images and their labels, by place; without any, their folders."""
    found.by_folder = not labels
    folders = [os.path.dirname(image.name) for image in images]
    texts = [labels.get(i) for i in range(len(images))] if labels else folders
    found.names = sorted(set(texts) - {None})
    numbers = {name: number for number, name in enumerate(found.names)}
    found.labels = np.array([numbers.get(text, -1) for text in texts], np.int32)
    found.offsets = np.array([image.offset for image in images], np.int64)
    found.sizes = np.array([image.size for image in images], np.int64)
    found.kinds = np.array([image.kind for image in images], np.uint8)
    found.heads = np.array([image.head for image in images], np.uint16)
    found.folders = sorted(set(folders))
    numbers = {folder: number for number, folder in enumerate(found.folders)}
    found.places = np.array([numbers[folder] for folder in folders], np.int32)
    return found


def _splits_of(folders: set[str]) -> dict[str, int]:
    """By folder, 1 for training's, 2 for validation's, 0 for neither; by its outermost such name.

    A class below a split may be called train, and so may what all folders lie in.
    """
    numbers = {name: n for n, train in ((1, True), (2, False)) for name in SPLITS[train]}
    shared = len(os.path.commonpath(folders)) if folders else 0
    for start in (shared, 0):
        parts = {folder: folder[start:].lower().split("/") for folder in folders}
        found = {f: next((numbers[p] for p in ps if p in numbers), 0) for f, ps in parts.items()}
        if {1, 2} <= set(found.values()):
            break
    return found


def _slashed(name: str) -> str:
    """A zip's member's name; old tools of Windows have other separators."""
    return name.replace("\\", "/")


def _inside(name: str) -> str:
    """A member's path without what leads to the folder it was packed in, such as `../`."""
    return posixpath.normpath(f"/{name}").lstrip("/")


def _is_shown(name: str) -> bool:
    return all(map(is_shown, name.split("/")))


def _read_zip(path: str) -> Members:
    found, images = Members(), []
    with zipfile.ZipFile(path) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    for member in members:
        given = _slashed(member.filename)
        name = _inside(given)
        if given.endswith("/") or not _is_shown(name):
            continue
        extension = extension_of(name)
        readable = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if extension in EXTENSIONS and readable and not member.flag_bits & 1:
            kind = _KIND[extension] + DEFLATED * (member.compress_type == zipfile.ZIP_DEFLATED)
            place = member.header_offset, member.compress_size
            images.append(File(name, *place, kind))
        elif extension in EXTENSIONS:
            found.left_out["encrypted or of unknown compression"] += 1
        else:
            found.left_out[extension or "without extension"] += 1
    return _gather(images, {}, found)


def _read_tar(path: str) -> Members:
    found, images, labels = Members(), [], {}
    silent = 0  # .json files without a label so far; not all of them need be read
    with open(path, "rb") as file:
        for sample in _samples(file, found):
            chosen = _images_of(sample)
            for name in chosen:
                extension = extension_of(f"_.{name}")
                images.append(sample[name]._replace(kind=_KIND[extension]))
            side = sample.get("cls") or (sample.get("json") if silent < MOST_SILENT else None)
            if chosen and side:
                label = _label(file, side)
                silent += label is None and not labels
                if label is not None:
                    labels[len(images) - 1] = label
            for name in sample.keys() - set(chosen) - SIDES:
                found.left_out[extension_of(f"_.{name}") or "without extension"] += 1
    if found.damage and labels and len(images) - 1 not in labels:
        images.pop()  # its label would have followed
    return _gather(images, labels, found)


def _samples(file: BinaryIO, found: Members) -> Iterator[dict[str, File]]:
    """WebDataset's: files one after another whose names are the same up to their first dot.

    Args:
        found: its `damage` and `left_out` are set.
    """
    size = os.fstat(file.fileno()).st_size
    key, sample = None, {}
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the file is closed)
        for member in tar:
            if member.offset_data + member.size > size:
                raise tarfile.ReadError("cut off")
            tar.members = []  # which would fill the memory
            name = _inside(member.name)
            if member.islnk() or member.issym():
                found.left_out["links"] += 1
            if not member.isreg() or not _is_shown(name):
                continue
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            if (folder, stem) != key or extension.lower() in sample:
                yield sample
                key, sample = (folder, stem), {}
            head = (member.offset_data - member.offset) // BLOCK
            sample[extension.lower()] = File(name, member.offset_data, member.size, 0, head)
        found.damage = _what_is_wrong(file, tar.offset, size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        found.damage = str(error)
    yield sample


def _images_of(sample: dict[str, File]) -> list[str]:
    """The extensions of a sample's image; of several, where these are but files with like names."""
    images = [name for name in sample if extension_of(f"_.{name}") in EXTENSIONS]
    if sample.keys() & SIDES:
        return [name for name in images if f".{name}" in EXTENSIONS][:1]
    return images


def _label(file: BinaryIO, side: File) -> str | None:
    content = os.pread(file.fileno(), side.size, side.offset)
    if side.name.lower().endswith(".cls"):
        text = content.decode(errors="replace").strip()
    else:
        try:
            values = json.loads(content)
            found = next((values[name] for name in LABELS if name in values), None)
        except (ValueError, TypeError):
            return None
        text = str(found) if isinstance(found, int | str) else ""
    return None if text == "-1" else text or None


def _what_is_wrong(file: BinaryIO, end: int, size: int) -> str:
    """Of a tar whose last header that could be read ended before `end`."""
    block = os.pread(file.fileno(), BLOCK, end)
    if len(block) < BLOCK:
        return "cut off: no end mark"
    if any(block):
        return f"damaged at byte {end:,}"
    if any(os.pread(file.fileno(), PADDING, end)):
        return f"what follows its end mark, {size - end:,} bytes, is not read"
    return ""


def read_name(fd: int, offset: int, head: int) -> str:
    """An image's name in its archive, as `zipfile` and `tarfile` have it.

    Raises:
        OSError, tarfile.TarError: it cannot be read.
    """
    if head:
        blocks = os.pread(fd, head * BLOCK, offset - head * BLOCK)
        if head == 1:
            return tarfile.TarInfo.frombuf(blocks, tarfile.ENCODING, "surrogateescape").name
        return tarfile.open(fileobj=BytesIO(blocks), mode="r:").next().name  # which is a long one
    header = os.pread(fd, LOCAL_HEADER, offset)
    name = os.pread(fd, _lengths(header)[0], offset + LOCAL_HEADER).partition(b"\0")[0]
    is_utf8 = int.from_bytes(header[6:8], "little") & UTF8
    return _slashed(name.decode("utf-8" if is_utf8 else "cp437", "replace"))


def read_content(fd: int, offset: int, size: int, is_zip: bool) -> bytes:
    """An image's bytes, as they lie in its archive."""
    if is_zip:
        offset += LOCAL_HEADER + sum(_lengths(os.pread(fd, LOCAL_HEADER, offset)))
    return os.pread(fd, size, offset)


def _lengths(header: bytes) -> tuple[int, int]:
    """Bytes of a zip's member's name, and of what follows it."""
    return int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")


def of_splits(paths: list[str], train: bool) -> tuple[list[str], list[str]]:
    """Those of a split, and those of the other, as their names tell, or else their folders'.

    Of a split's names the first one found counts; folders' names, where they tell both splits.
    """
    by_name = {path: _words(path) for path in paths}
    folders = {path: os.path.dirname(os.path.abspath(path)) for path in paths}
    shared = len(os.path.commonpath(folders.values()))
    parts = {path: folder[shared:].lower().split(os.sep) for path, folder in folders.items()}
    by_folder = {
        p: [name for name in names if name in SPLIT_NAMES][:1] for p, names in parts.items()
    }
    named = [_of_both(words, train) for words in (by_name, by_folder)]
    return next((both for both in named if all(both)), named[0])


def _of_both(words: dict[str, list[str]], train: bool) -> tuple[list[str], list[str]]:
    return tuple(
        next(filter(None, ([p for p in words if name in words[p]] for name in SPLITS[split])), [])
        for split in (train, not train)
    )


def _words(path: str) -> list[str]:
    letters = "".join(c if c.isalpha() else " " for c in Path(path).name.lower())
    return letters.split()
