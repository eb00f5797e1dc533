"""Labels in a table beside the images."""

import csv
import io
import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np

from util.data.image_folder import ImageFiles, find_split
from util.data.source import Source, few, in_order
from util.errors import UserError

logger = logging.getLogger(__name__)

FILE, LABEL = ("file", "filename", "file_name", "image", "path"), ("label", "class", "target")


class Labelled(Source):
    """A folder's images that a table has, with its labels as classes.

    Args:
        table: a CSV with a header, and columns named as `FILE` and `LABEL` have it; after a colon,
            another column of labels. Files by their path within `data_path` or the split's folder.
    Raises:
        UserError: the table cannot be read.
    """

    def __init__(self, images: ImageFiles, table: str, data_path: str):
        self.images, self.where = images, f"{images.where}, labels of {table}"
        rows = read_labels(table, data_path)
        self.classes = classes = in_order(set(rows.values()))
        numbers = {name: number for number, name in enumerate(classes)}

        prefix = os.path.relpath(images.root, data_path)
        inside = "" if prefix == os.curdir else f"{prefix}/"
        chosen, targets = [], []
        for i, name in enumerate(images.relative_names()):
            label = rows.pop(inside + name, None) or rows.pop(name, None)
            if label is not None:
                chosen.append(i)
                targets.append(numbers[label])
        splits = [find_split(Path(data_path), train) for train in (True, False)]
        roots = [data_path, *filter(None, splits)]
        lost = [file for file in rows if not any(os.path.exists(f"{r}/{file}") for r in roots)]
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


def read_labels(table: str, data_path: str) -> dict[str, str]:
    """Labels by file, within `data_path`.

    Raises:
        UserError: no such file, no such columns, or a row without one of them.
    """
    path, _, column = (table, "", "") if os.path.exists(table) else table.rpartition(":")
    path, column = (path, column) if path else (table, "")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UserError(f"--labels {table}: {getattr(error, 'strerror', error)}") from None
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
        name, value = os.path.normpath(row[file].strip()), row[label].strip()
        if os.path.isabs(name):
            name = os.path.relpath(name, os.path.abspath(data_path))
        if found.setdefault(name, value) != value:
            raise UserError(f"--labels {table}: line {number}: two labels for {name}")
    return found
