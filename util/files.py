"""Files that are written whole or not at all, and texts as people save them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from util.errors import UserError


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


def read_utf8(path: str | Path, given: str | Path, errors: str = "strict") -> str:
    """A text, with or without a mark at its beginning.

    Args:
        given: what the user gave, for messages.
        errors: `open`'s, of bytes that are not UTF-8.
    Raises:
        UserError: the file cannot be read, or is of another encoding.
    """
    try:
        text = Path(path).read_text("utf-8-sig", errors)
    except OSError as error:
        raise UserError(f"{given}: {error.strerror}") from None
    except UnicodeError:
        text = "\0"
    if "\0" in text:  # as in UTF-16
        raise UserError(f"{given}: this is not UTF-8: save it as UTF-8")
    return text
