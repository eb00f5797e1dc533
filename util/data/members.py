"""What an archive holds: where its images lie, with which labels; WebDataset's tars and zips."""

import json
import os
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from util.data.file_list import CLUTTER
from util.data.source import EXTENSIONS, extension_of

BLOCK = 512  # a tar's, in bytes
NAME = 100  # bytes at a header's beginning
PADDING = 2**20  # bytes after a tar's end mark that are looked at: zeros, or another archive
LABELS = ("label", "cls", "class")  # of a sample's .json, the first one that is there
LOCAL_HEADER = 30  # bytes of a zip's member before its name
DEFLATED = 128  # added to an image's kind
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError)


@dataclass
class Members:
    """The images of one archive.

    Attributes:
        offsets, sizes: where each lies, in bytes; in a zip, where its header does.
        kinds: of each, its number in `EXTENSIONS`, sorted; `DEFLATED` more where it is.
        labels: each one's number in `names`, -1 for none.
        names: labels, or where `by_folder` the folders of the images.
        left_out: as `Source`'s.
        damage: what is wrong with the archive; '' for nothing.
    """

    offsets: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    kinds: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    names: list[str] = field(default_factory=list)
    by_folder: bool = True
    left_out: Counter[str] = field(default_factory=Counter)
    damage: str = ""


KINDS = sorted(EXTENSIONS)
_KIND = {extension: number for number, extension in enumerate(KINDS)}


def read_members(path: str) -> Members:
    """Lists an archive; of a damaged one, what comes before the damage."""
    try:
        return _read_zip(path) if extension_of(path) == ".zip" else _read_tar(path)
    except DAMAGED as error:
        return Members(damage=str(error) or type(error).__name__)


def _gather(
    images: list[tuple[str, int, int, int]], labels: dict[int, str] | None, found: Members
) -> Members:
    """Adds images, as (name, offset, size, kind), and their labels; without any, their folders."""
    found.by_folder = not labels
    texts = [labels.get(i) if labels else os.path.dirname(im[0]) for i, im in enumerate(images)]
    found.names = sorted(set(texts) - {None})
    numbers = {name: number for number, name in enumerate(found.names)}
    found.labels = np.array([numbers.get(text, -1) for text in texts], np.int32)
    columns = list(zip(*(image[1:] for image in images), strict=True)) or [(), (), ()]
    found.offsets, found.sizes = (np.array(column, np.int64) for column in columns[:2])
    found.kinds = np.array(columns[2], np.uint8)
    return found


def _is_shown(name: str) -> bool:
    """Not hidden, nor what macOS or WebDataset add."""
    parts = name.split("/")
    added = any(part.startswith(".") or part in CLUTTER for part in parts)
    return not added and not parts[-1].startswith("__")


def _read_zip(path: str) -> Members:
    found, images = Members(), []
    with zipfile.ZipFile(path) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    for member in members:
        if member.is_dir() or not _is_shown(member.filename):
            continue
        extension = extension_of(member.filename)
        readable = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if extension in EXTENSIONS and readable and not member.flag_bits & 1:
            kind = _KIND[extension] + DEFLATED * (member.compress_type == zipfile.ZIP_DEFLATED)
            images.append((member.filename, member.header_offset, member.compress_size, kind))
        elif extension in EXTENSIONS:
            found.left_out["encrypted or of unknown compression"] += 1
        else:
            found.left_out[extension or "without extension"] += 1
    return _gather(images, None, found)


def _read_tar(path: str) -> Members:
    """WebDataset's rules: a sample is what one name, up to its first dot, has."""
    found = Members()
    size = os.path.getsize(path)
    images: list[tuple[str, int, int, int]] = []
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    with open(path, "rb") as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the file is closed)
            for member in tar:
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("cut off")
                name = member.name.removeprefix("./")
                if member.isreg() and _is_shown(name):
                    folder, _, base = name.rpartition("/")
                    key, _, extension = base.partition(".")
                    key = f"{folder}/{key}" if folder else key
                    samples.setdefault(key, {})[extension.lower()] = member
            found.damage = _what_is_wrong(file, tar.offset, size)
        except DAMAGED as error:
            found.damage = str(error)
            if not samples:
                return found
        has_json, labels = True, {}
        for files in samples.values():
            chosen = _images_of(files)
            label = files.get("cls") or (files.get("json") if has_json else None)
            for extension in chosen:
                member = files[extension]
                kind = _KIND[extension_of(f"_.{extension}")]
                text = _label(file, label) if label else None
                if text is not None:
                    labels[len(images)] = text
                elif label and "cls" not in files:
                    has_json = bool(labels)  # those without labels need not all be read
                images.append((member.name, member.offset_data, member.size, kind))
            for extension in files.keys() - set(chosen) - {"cls", "json", "txt"}:
                found.left_out[extension_of(f"_.{extension}") or "without extension"] += 1
    if found.damage and labels and len(images) - 1 not in labels:
        images.pop()  # its label would have followed
    return _gather(images, labels, found)


def _images_of(files: dict[str, tarfile.TarInfo]) -> list[str]:
    """The extensions of a sample's image; in a tar that is not WebDataset's, of several."""
    exact = [extension for extension in files if f".{extension}" in EXTENSIONS]
    if exact or files.keys() & {"cls", "json", "txt"}:
        return exact[:1]
    return [extension for extension in files if extension_of(f"_.{extension}") in EXTENSIONS]


def _label(file: BinaryIO, member: tarfile.TarInfo) -> str | None:
    content = os.pread(file.fileno(), member.size, member.offset_data)
    if member.name.lower().endswith(".cls"):
        return content.decode(errors="replace").strip() or None
    try:
        values = json.loads(content)
        found = next((values[name] for name in LABELS if name in values), None)
    except (ValueError, TypeError):
        return None
    return str(found) if isinstance(found, int | str) else None


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


def read_member(fd: int, offset: int, size: int, is_zip: bool) -> tuple[str, bytes]:
    """An image's name in its archive, and its bytes as they lie there."""
    if not is_zip:  # the name is in the block before
        content = os.pread(fd, BLOCK + size, offset - BLOCK)
        return _text(content[:NAME]), content[BLOCK:]
    header = os.pread(fd, LOCAL_HEADER, offset)
    length, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    name = os.pread(fd, length, offset + LOCAL_HEADER)
    return _text(name), os.pread(fd, size, offset + LOCAL_HEADER + length + extra)


def _text(name: bytes) -> str:
    return name.partition(b"\0")[0].decode(errors="replace")


def of_split(paths: list[str], names: tuple[str, ...]) -> list[str]:
    """Those whose file names say that they are of a split, by the first of its names found."""
    for name in names:
        if found := [path for path in paths if name in _words(path)]:
            return found
    return []


def _words(path: str) -> list[str]:
    letters = "".join(c if c.isalpha() else " " for c in Path(path).name.lower())
    return letters.split()
