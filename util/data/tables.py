"""Images in tables: Parquet files, and data sets of Hugging Face's, through `datasets`."""

import logging
import os
from collections import Counter
from io import BytesIO
from types import ModuleType
from typing import Any

import numpy as np

from util.data.images import BadImage
from util.data.source import SPLITS, Source, in_order
from util.errors import UserError

logger = logging.getLogger(__name__)

HUB = "hf:"  # before the name of a data set
IMAGES, LABELS = ("image", "img", "jpg", "png"), ("label", "labels", "fine_label", "cls", "class")


class Table(Source):
    """The rows of a `datasets.Dataset` that have an image.

    The column of images is the first of that type, or has one of the usual names; that of classes
    likewise.

    Raises:
        UserError: there is no column of images.
    """

    def __init__(self, rows: Any, where: str):
        datasets = import_datasets()
        features = rows.features
        self.column = _choose(features, datasets.Image, IMAGES)
        self.label = _choose(features, datasets.ClassLabel, LABELS)
        if self.column is None:
            raise UserError(f"{where}: no column of images; it has {', '.join(features)}")
        self.where = f"{where} ({', '.join(n for n in (self.column, self.label) if n)})"
        self.left_out = Counter()
        self._read_labels(rows, features)
        rows = rows.select_columns([self.column]).with_format(None)
        self.rows = rows.cast_column(self.column, datasets.Image(decode=False))

    def _read_labels(self, rows: Any, features: dict[str, Any]) -> None:
        self.classes, self.targets = [""], np.zeros(len(rows), np.int32)
        if self.label is None:
            return
        values = np.asarray(rows.with_format("arrow")[self.label])
        if names := getattr(features[self.label], "names", None):
            self.classes = list(names)
        elif values.dtype.kind in "iuUOSb":
            values = values.astype(str)
            self.classes = in_order(np.unique(values).tolist())
            numbers = {name: number for number, name in enumerate(self.classes)}
            values = np.array([numbers[value] for value in values.tolist()], np.int32)
        else:
            raise UserError(f"{self.where}: labels are of type {features[self.label]}")
        self.targets = np.nan_to_num(values.astype(np.float64), nan=-1).astype(np.int32)

    def content(self, index: int) -> tuple[str | BytesIO, str]:
        cell = self.rows[int(index)][self.column]
        if cell is None or not (cell["bytes"] or cell["path"]):
            raise BadImage("the row has no image")
        name = cell["path"] or ""
        return (BytesIO(cell["bytes"]) if cell["bytes"] else name), name

    def name(self, index: int) -> str:
        return f"{self.where}: row {index}"

    def why_no_classes(self) -> str:
        missing = int((self.targets < 0).sum())
        return f"{missing:,} of {len(self):,} rows have no label" if missing else ""


def _choose(features: dict[str, Any], kind: type, names: tuple[str, ...]) -> str | None:
    """A column of a kind, by the first of its usual names if there are several."""
    of_kind = [name for name, feature in features.items() if isinstance(feature, kind)]
    usual = [name for name in names if name in (of_kind or features)]
    return next(iter(usual + of_kind), None)


def import_datasets() -> ModuleType:
    """Raises UserError where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise UserError("Parquet and hf: need a library: pip install datasets") from None
    datasets.disable_progress_bars()
    return datasets


def open_parquet(paths: list[str], where: str) -> Table:
    """Raises UserError where the files are not Parquet, or have no images."""
    datasets = import_datasets()
    try:
        rows = datasets.Dataset.from_parquet(paths)
    except Exception as error:  # of any class: pyarrow's, datasets's, the disk's
        raise UserError(f"{where}: {_line(error)}") from None
    return Table(rows, where)


def open_hub(data_path: str, train: bool | None) -> Table | None:
    """`hf:NAME[:CONFIG]`, as `datasets.load_dataset` finds it; None if it lacks such a split.

    Raises:
        UserError: it cannot be loaded, or has no images.
    """
    datasets = import_datasets()
    name, _, config = data_path.removeprefix(HUB).partition(":")
    try:
        saved = os.path.exists(os.path.join(name, "dataset_dict.json"))  # by `save_to_disk`
        tables = datasets.load_from_disk(name) if saved else {}
        splits = list(tables or datasets.get_dataset_split_names(name, config or None))
        chosen = next((split for split in SPLITS[train] if split in splits), None)
        if chosen is None and train is not False and len(splits) == 1:
            (chosen,) = splits
        if chosen is None:
            logger.info(f"{data_path} has {', '.join(splits)}")
            return None
        rows = (
            tables[chosen] if saved else datasets.load_dataset(name, config or None, split=chosen)
        )
    except Exception as error:  # of any class
        raise UserError(f"--data_path {data_path}: {_line(error)}") from None
    return Table(rows, f"{data_path}, {chosen}")


def _line(error: BaseException) -> str:
    """The reason, which `datasets` keeps behind an error of its own."""
    error = error.__cause__ or error
    return (str(error) or type(error).__name__).splitlines()[0]
