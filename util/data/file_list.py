"""The files below a folder: listed once, and kept beside the output for the next start."""

import json
import os
import time
from pathlib import Path

WORTH_KEEPING = 10_000  # files; fewer are listed within a second even on slow disks
SETTLED = 2 * 10**9  # nanoseconds: the clocks of some file systems are as coarse as that

CLUTTER = ("__MACOSX", "Thumbs.db", "desktop.ini")  # not hidden by a dot
RULES = 2  # what is left out; of a list by other rules nothing is believed

_unwritten: dict[Path, dict] = {}  # by cache file


def list_files(root: Path, cache: Path | None = None) -> dict[str, list[str]]:
    """Sorted file names by folder, "" for the root itself, "a/b" below it.

    Links are followed, unless they lead to a folder that they are in; what is hidden, and what
    macOS leaves in archives, is left out.

    Args:
        cache: a file with `root`'s names. It is valid as long as the modification time of every
            folder is unchanged: adding, removing or renaming files or folders changes it. If there
            are many files, the next `write_lists` writes it.
    Raises:
        PermissionError: a folder is not readable.
    """
    kept = _read(root, cache) if cache else None
    if kept is not None:
        return kept
    listing, times = {}, {}
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        folders[:] = [name for name in folders if _is_shown(name) and not _is_loop(folder, name)]
        relative = os.path.relpath(folder, root)
        relative = "" if relative == os.curdir else relative
        times[relative] = os.stat(folder).st_mtime_ns
        listing[relative] = sorted(filter(_is_shown, names))
    listing = {folder: listing[folder] for folder in sorted(listing)}
    settled = max(times.values()) < time.time_ns() - SETTLED  # else a change might go unnoticed
    if cache and settled and sum(map(len, listing.values())) >= WORTH_KEEPING:
        kept = {"root": str(root.resolve()), "times": times, "files": listing}
        _unwritten[cache] = kept | {"rules": RULES}
    return listing


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name not in CLUTTER


def _is_loop(folder: str, name: str) -> bool:
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    inside, target = os.path.realpath(folder), os.path.realpath(path)
    return f"{inside}/".startswith(f"{target.rstrip('/')}/")


def _raise(error: OSError) -> None:
    raise error


def _read(root: Path, cache: Path) -> dict[str, list[str]] | None:
    try:
        kept = json.loads(cache.read_text())
        if kept["root"] != str(root.resolve()) or kept.get("rules") != RULES:
            return None
        if all(os.stat(root / f).st_mtime_ns == time for f, time in kept["times"].items()):
            return kept["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not one of ours
        pass
    return None


def write_lists() -> None:
    """Writes the lists to their caches; to be called once the run has its output folder."""
    while _unwritten:
        cache, content = _unwritten.popitem()
        temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(content))
            os.replace(temporary, cache)
        except OSError:
            temporary.unlink(missing_ok=True)  # the next start lists them again
