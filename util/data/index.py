"""Lists of what a data set holds, as arrays that no process copies: in a file that is mapped."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from util.errors import UserError
from util.files import written_whole

SENT_WHOLE = 64 * 2**20  # bytes; a larger index is sent to other processes as its file's name


class Index(dict[str, np.ndarray]):
    """Arrays by name, and `notes` of plain types.

    Other processes get a small one whole, and map a large one's file themselves, if it has one.

    Attributes:
        notes: among them `id`, which indices of other data do not have.
        path: the file that the arrays are mapped from; None while they are in memory.
    """

    def __init__(self, arrays: dict[str, np.ndarray], notes: dict[str, Any]):
        super().__init__(arrays)
        self.notes, self.path = notes, None

    @classmethod
    def read(cls, path: Path) -> "Index | None":
        """A file's; None if there is no such file, or none of ours."""
        try:
            with safe_open(path, framework="pt") as file:  # whose tensors are mapped
                notes = json.loads(file.metadata()["notes"])
                index = cls({name: file.get_tensor(name).numpy() for name in file.keys()}, notes)  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        index.path = path
        return index

    def strings(self, name: str) -> "Strings":
        """Those that `Strings.named` gave a name."""
        return Strings(self[name], self[f"{name}_ends"])

    def write(self, path: Path) -> bool:
        """Writes the file, whole or not at all; whether it could."""
        try:
            with written_whole(path) as temporary:
                save_file(dict(self), temporary, {"notes": json.dumps(self.notes)})
        except (OSError, SafetensorError):
            return False
        return True

    def __reduce__(self) -> tuple:
        if self.path and sum(array.nbytes for array in self.values()) > SENT_WHOLE:
            return _map, (self.path, self.notes["id"])
        return Index, (dict(self), self.notes)


def _map(path: Path, identity: str) -> Index:
    """Raises UserError where another machine does not see the file."""
    index = Index.read(path)
    if index is None or index.notes["id"] != identity:
        raise UserError(f"{path}: every machine must see this file, and this one does not")
    return index


class Strings(Sequence):
    """Many strings as one array of bytes and one of ends, which loader processes share."""

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data, self.ends = data, ends

    @classmethod
    def pack(cls, strings: Iterable[str]) -> "Strings":
        encoded = [os.fsencode(string) for string in strings]
        ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def named(self, name: str) -> dict[str, np.ndarray]:
        """Their arrays, for an index."""
        return {name: self.data, f"{name}_ends": self.ends}

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.data[start : self.ends[index]].tobytes())
