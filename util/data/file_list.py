"""The files below a folder: listed once, and kept beside the output for the next start."""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from util.data.index import Index, Strings

WORTH_KEEPING = 10_000  # files; fewer are listed within a second even on slow disks
SETTLED = 2 * 10**9  # nanoseconds: the clocks of some file systems are as coarse as that

ARCHIVES = (".tar", ".zip", ".parquet")
CLUTTER = {"__macosx", "thumbs.db", "desktop.ini"}  # in any case; not hidden by a dot
CLUTTER |= {"@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
RULES = 5  # what is left out, and in which order; of a list by other rules nothing is believed

_unwritten: dict[Path, Index] = {}  # by cache file


def list_files(root: Path, is_image: Callable[[str], bool], cache: Path | None = None) -> Index:
    """The images below a folder, folder by folder; those of a top folder stand together.

    Links are followed, unless they lead to a folder on the way to them; what is hidden, and what
    systems leave beside images, is left out.

    Args:
        is_image: tells it from the path.
        cache: a file with `root`'s list. It is valid as long as the modification time of every
            folder is unchanged: adding, removing or renaming files or folders changes it. If there
            are many files, the next `write_lists` writes it.
    Returns:
        The strings `names` and `folders` ("" for the root itself, "a/b" below it); `counts`, images
        in each folder. Its notes: `left_out`, the other files' number by extension, and, where
        there are no images, `archives`, those of `ARCHIVES` among them.
    Raises:
        PermissionError: a folder is not readable.
    """
    kept = _read(root, cache) if cache else None
    if kept is not None:
        return kept
    listing, times = {}, {}
    left_out, archives = Counter(), []
    ways = {str(root): (os.path.realpath(root),)}
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        ways |= _ways_on(folder, filter(is_shown, folders), ways.pop(folder))
        folders[:] = [name for name in folders if os.path.join(folder, name) in ways]
        relative = os.path.relpath(folder, root)
        relative = "" if relative == os.curdir else relative
        times[relative] = os.stat(folder).st_mtime_ns
        listing[relative] = images = []
        for name in sorted(filter(is_shown, names)):
            if is_image(path := os.path.join(folder, name)):
                images.append(name)
                continue
            extension = os.path.splitext(name)[1].lower()
            left_out[extension or "without extension"] += 1
            if extension in ARCHIVES:
                archives.append(path)
    images = sum(map(len, listing.values()))
    notes = {"root": str(root.resolve()), "rules": RULES, "left_out": left_out}
    index = _pack(listing, times, notes | {"archives": [] if images else sorted(archives)})
    settled = max(times.values()) < time.time_ns() - SETTLED  # else a change might go unnoticed
    if cache and settled and images >= WORTH_KEEPING:
        keep(cache, index)
    return index


def _pack(listing: dict[str, list[str]], times: dict[str, int], notes: dict) -> Index:
    order = sorted(listing)
    if not listing[""]:
        order.sort(key=top_of)
    counts = np.array([len(listing[folder]) for folder in order], np.int64)
    arrays = {"counts": counts, "times": np.array([times[f] for f in order], np.int64)}
    arrays |= Strings.pack(name for f in order for name in listing[f]).named("names")
    arrays |= Strings.pack(order).named("folders")
    identity = repr(notes["root"]).encode() + b"".join(array.tobytes() for array in arrays.values())
    notes["id"] = hashlib.sha256(identity).hexdigest()
    return Index(arrays, notes)


def top_of(folder: str) -> str:
    """The first folder of a relative path."""
    return folder.split(os.sep)[0]


def is_shown(name: str) -> bool:
    """Neither hidden nor what systems add."""
    return not name.startswith(".") and name.lower() not in CLUTTER


def _ways_on(folder: str, names: Iterable[str], way: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The ways to the folders in a folder, but for links that lead back.

    A way has the real paths of the folders whose links it went through, and of where it ends.
    """
    found = {}
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.islink(path):
            found[path] = (*way[:-1], os.path.join(way[-1], name))
            continue
        target = os.path.realpath(path)
        if not any(f"{real}/".startswith(f"{target.rstrip('/')}/") for real in way):
            found[path] = (*way, target)
    return found


def _raise(error: OSError) -> None:
    raise error


def _read(root: Path, cache: Path) -> Index | None:
    kept = Index.read(cache)
    try:
        if kept and (kept.notes["root"], kept.notes["rules"]) == (str(root.resolve()), RULES):
            folders = kept.strings("folders")
            times = zip(folders, kept["times"].tolist(), strict=True)
            if all(os.stat(root / folder).st_mtime_ns == time for folder, time in times):
                return kept
    except (OSError, KeyError, ValueError):  # a folder is gone, or the file is not one of ours
        pass
    return None


def keep(path: Path, index: Index) -> None:
    """Has the next `write_lists` write an index."""
    _unwritten[path] = index


def write_lists() -> None:
    """Writes the lists to their caches; to be called once the run has its output folder."""
    while _unwritten:
        path, index = _unwritten.popitem()
        index.write(path)  # if it cannot, the next start lists them again
