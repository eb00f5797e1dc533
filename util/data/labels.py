"""Labels in a table beside the images."""

import csv
import logging
import os
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np

from util.data.image_folder import ImageFiles
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
        rows = read_labels(table)
        self.classes = classes = in_order(set(rows.values()))
        numbers = {name: number for number, name in enumerate(classes)}

        prefix = os.path.relpath(images.root, data_path)
        chosen, targets = [], []
        for i in range(len(images)):
            name = os.path.relpath(images.name(i), images.root)
            for known in (os.path.normpath(os.path.join(prefix, name)), name):
                if (label := rows.pop(known, None)) is not None:
                    chosen.append(i)
                    targets.append(numbers[label])
                    break
        lost = [file for file in islice(rows, 1000) if not Path(data_path, file).exists()]
        if lost:
            logger.warning(f"warning: --labels {table}: not in {data_path}: {few(lost)}")
        self.chosen, self.targets = np.array(chosen, np.int64), np.array(targets, np.int32)
        self.left_out = images.left_out + Counter()
        if unnamed := len(images) - len(chosen):
            self.left_out[f"images that {table} does not have"] = unnamed
        present = set(self.targets.tolist())
        self.empty = [name for name in classes if numbers[name] not in present]

    def content(self, index: int) -> tuple[str, str]:
        return self.images.content(self.chosen[index])

    def name(self, index: int) -> str:
        return self.images.name(self.chosen[index])


def read_labels(table: str) -> dict[str, str]:
    """Labels by file.

    Raises:
        UserError: no such file, no such columns, or a row without one of them.
    """
    path, _, column = table.partition(":")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UserError(f"--labels {table}: {getattr(error, 'strerror', error)}") from None
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    rows = csv.reader(text.splitlines(), delimiter=delimiter)
    header = [name.strip().lower() for name in next(rows, [])]
    file, label = (
        next((header.index(name) for name in names if name in header), None)
        for names in (FILE, (column.lower(),) if column else LABEL)
    )
    if file is None or label is None:
        other = f"{path}:COLUMN takes another for label"
        raise UserError(
            f"--labels {table}: no columns file and label, but {first.strip()}; {other}"
        )
    found = {}
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) <= max(file, label) or not row[file].strip() or not row[label].strip():
            raise UserError(f"--labels {table}: line {number} lacks a file or a label")
        name, value = os.path.normpath(row[file].strip()), row[label].strip()
        if found.setdefault(name, value) != value:
            raise UserError(f"--labels {table}: line {number}: two labels for {name}")
    return found
