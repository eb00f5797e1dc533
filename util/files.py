"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Where to write a file's content, which takes the file's place at the end, if none raised.

    Its name ends in `.tmp`. Raises OSError where it cannot be put there.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it is in its place, or the folder is read-only
            temporary.unlink()
