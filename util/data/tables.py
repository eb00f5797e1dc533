"""Images in tables: Parquet files, and data sets of Hugging Face's, through `datasets`."""

import logging
import os
import pickle
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
        try:
            self._read_labels(rows, features)
            images = rows.select_columns([self.column]).with_format(None)
            self.rows = images.cast_column(self.column, datasets.Image(decode=False))
        except UserError:
            raise
        except Exception as error:  # of any class: pyarrow's, datasets's
            raise UserError(f"{where}: column {self.column}: {_line(error)}") from None

    def _read_labels(self, rows: Any, features: dict[str, Any]) -> None:
        self.classes, self.targets = [""], np.zeros(len(rows), np.int32)
        if self.label is None:
            return
        feature, values = features[self.label], rows.with_format("arrow")[self.label].to_pylist()
        known = [value for value in values if value is not None]
        if names := getattr(feature, "names", None):
            self.classes, numbers = list(names), {n: n for n in range(len(names))}
        elif all(isinstance(value, int | str) for value in known):
            names = in_order({str(value) for value in known if str(value) not in ("-1", "")})
            self.classes = names or [""]
            numbers = {name: number for number, name in enumerate(names)}
            values = [None if value is None else str(value) for value in values]
        else:
            logger.info(f"{self.where}: {self.label} is of type {feature}: not used as classes")
            return
        self.targets = np.array([numbers.get(value, -1) for value in values], np.int32)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"rows": pickle.dumps(self.rows)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        try:
            self.rows = pickle.loads(state["rows"])
        except OSError as error:
            where = f"{error.filename}: every machine must see this cache (HF_DATASETS_CACHE)"
            raise UserError(where) from None

    def identity(self) -> str:
        return self.rows._fingerprint

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
    if not name:
        raise UserError(f"--data_path {data_path}: hf:NAME or hf:NAME:CONFIG")
    try:
        tables = _saved(name)
        names = list(tables or datasets.get_dataset_split_names(name, config or None))
        chosen = [split for split in SPLITS[train] if split in names][:1]
        if train is None or (train and len(names) == 1):
            chosen = names
        if not chosen:
            logger.info(f"{data_path} has {', '.join(names)}")
            return None
        parts = [
            tables[split] if tables else datasets.load_dataset(name, config or None, split=split)
            for split in chosen
        ]
        rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except Exception as error:  # of any class
        raise UserError(f"--data_path {data_path}: {_line(error)}") from None
    return Table(rows, f"{data_path}, {' and '.join(chosen)}")


def _saved(folder: str) -> dict[str, Any]:
    """The splits that `save_to_disk` wrote; none where it did not."""
    datasets = import_datasets()
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        return dict(datasets.load_from_disk(folder))
    if os.path.exists(os.path.join(folder, "state.json")):
        return {"all": datasets.load_from_disk(folder)}
    return {}


def _line(error: BaseException) -> str:
    """The reason, which `datasets` keeps behind an error of its own."""
    error = error.__cause__ or error
    return (str(error) or type(error).__name__).splitlines()[0]
