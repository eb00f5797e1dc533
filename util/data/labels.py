"""Labels in a table beside the images."""

import csv
import functools
import io
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Callable

import numpy as np

from util.data.image_folder import ImageFiles
from util.data.source import SPLIT_NAMES, Source, few, in_order
from util.errors import UserError
from util.files import read_utf8

logger = logging.getLogger(__name__)

FILE, LABEL = ("file", "filename", "file_name", "image", "path"), ("label", "class", "target")


class Labelled(Source):
    """A folder's images that a table has, with its labels as classes.

    Args:
        table: a CSV with a header, and columns named as `FILE` and `LABEL` have it; after a colon,
            another column of labels. Files by their path within `data_path` or the split's folder.
    Raises:
        UserError: the table cannot be read, or a path of it fits images of two splits.
    """

    def __init__(self, images: ImageFiles, table: str, data_path: str):
        self.images, self.where = images, f"{images.where}, labels of {table}"
        rows = read_labels(table, data_path)
        self.classes = classes = in_order(set(rows.values()))
        numbers = {name: number for number, name in enumerate(classes)}
        prefix = os.path.relpath(images.root, data_path)
        inside = "" if prefix == os.curdir else f"{prefix}/"
        splits = [f"{n}/" for n in sorted(os.listdir(data_path)) if n.lower() in SPLIT_NAMES]
        is_there = _finder(data_path)

        chosen, targets, used = [], [], set()
        for i, name in enumerate(images.relative_names()):
            file = whole = _normal(inside + name)
            if whole not in rows and whole.startswith(tuple(splits)):
                file = whole.partition("/")[2]
            if file not in rows:
                continue
            if file != whole:  # a row with the split's name is of one image
                homes = [s for s in splits if f"{s}{file}" not in rows and is_there(f"{s}{file}")]
                homes += [data_path] * is_there(file)
                if len(homes) > 1:
                    which = f"{file} is in {few(homes)}: which one? Write {whole}"
                    raise UserError(f"--labels {table}: {which}")
            used.add(file)
            chosen.append(i)
            targets.append(numbers[rows[file]])
        unused = (file for file in rows if file not in used)
        lost = [file for file in unused if not any(is_there(s + file) for s in ("", *splits))]
        if lost:
            logger.warning(f"warning: --labels {table}: {len(lost):,} not there: {few(lost)}")
        self.chosen, self.targets = np.array(chosen, np.int64), np.array(targets, np.int32)
        self.left_out = Counter(images.left_out)
        if unnamed := len(images) - len(chosen):
            self.left_out[f"images that {table} does not have"] = unnamed
        present = set(self.targets.tolist())
        self.empty = [name for name in classes if numbers[name] not in present]

    def content(self, index: int) -> tuple[str, str]:
        return self.images.content(self.chosen[index])

    def name(self, index: int) -> str:
        return self.images.name(self.chosen[index])


def _normal(path: str) -> str:
    """A path as it is compared: Windows has other separators, macOS other forms of letters."""
    return unicodedata.normalize("NFC", path.replace("\\", "/"))


def _finder(root: str) -> Callable[[str], bool]:
    """Tells whether a path as `_normal` has it is there; each folder is listed once."""

    @functools.cache
    def names(folder: str) -> dict[str, str]:
        try:
            return {_normal(name): name for name in os.listdir(folder)}
        except OSError:  # no folder, or none that can be read
            return {}

    def is_there(path: str) -> bool:
        folder = root
        for part in path.split("/"):
            name = names(folder).get(part)
            if name is None:
                return False
            folder = os.path.join(folder, name)
        return True

    return is_there


def read_labels(table: str, data_path: str) -> dict[str, str]:
    """Labels by file, within `data_path`, its path as `_normal` has it.

    Raises:
        UserError: no such file, no such columns, or a row without one of them.
    """
    path, _, column = (table, "", "") if os.path.exists(table) else table.rpartition(":")
    path, column = (path, column) if path else (table, "")
    text = read_utf8(path, f"--labels {table}")
    first = text.partition("\n")[0].strip()
    delimiter = max(",;\t", key=first.count)
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header = [name.strip().lower() for name in next(rows, [])]
    file, label = (
        next((header.index(name) for name in names if name in header), None)
        for names in (FILE, (column.lower(),) if column else LABEL)
    )
    if file is None or label is None:
        other = f"{path}:COLUMN takes another for label"
        raise UserError(f"--labels {table}: no columns file and label, but {first}; {other}")
    found = {}
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) <= max(file, label) or not row[file].strip() or not row[label].strip():
            raise UserError(f"--labels {table}: line {number} lacks a file or a label")
        name, value = os.path.normpath(_normal(row[file].strip())), row[label].strip()
        if os.path.isabs(name):
            name = os.path.relpath(name, _normal(os.path.abspath(data_path)))
        if found.setdefault(name, value) != value:
            raise UserError(f"--labels {table}: line {number}: two labels for {name}")
    return found
