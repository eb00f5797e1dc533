"""The output folder: whether it holds a run already, and what a start makes and removes in it."""

import argparse
import json
import math
import os
from pathlib import Path

from util.data.file_list import write_lists
from util.data.loader import BAD_LIST
from util.errors import UserError
from util.run.lock import lock_folder

CHECKPOINTS = "checkpoint-*.pth"
LOG = "log.txt"
# What a run leaves behind, apart from its lists of files, which remain valid.
LEFT_BEHIND = (CHECKPOINTS, LOG, "events.out.tfevents.*", BAD_LIST)


def claim_folder(args: argparse.Namespace) -> None:
    """Makes and locks the run's folders, and refuses to mix or remove runs by accident.

    Folders that it made are removed again if the run ends before it writes to them.

    Raises:
        UserError: a folder cannot be made or written, another run writes to it, it holds a run that
            the flags neither resume nor replace, or --overwrite would remove the weights to start
            from.
    """
    if any(vars(args).get(name) for name in ("eval", "knn", "predict")):  # they write nothing
        return
    folders = [Path(name) for name in dict.fromkeys((args.output_dir, args.log_dir)) if name]
    for folder in folders:  # all, before one is made
        _check_writable(folder)
    for folder in folders:
        lock_folder(folder)
    if not args.output_dir or _is_resumed(args):
        return
    folder = folders[0]
    if args.overwrite:
        for name in ("finetune", "init"):
            source = getattr(args, name, "")
            if source and _is_in(source, folder):
                raise UserError(f"--overwrite would remove --{name} {source}")
        return
    # A run that ended within its first epoch leaves an empty log, and nothing to lose.
    log = folder / LOG
    if any(folder.glob(CHECKPOINTS)) or (log.exists() and log.stat().st_size > 0):
        raise UserError(
            f"--output_dir {folder} holds a run: --resume auto continues it, --overwrite removes it"
        )


def _check_writable(folder: Path) -> None:
    there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), None)
    if there is not None and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = f"no permission for {there}" if there.is_dir() else f"{there} is not a folder"
        raise UserError(f"cannot write to the folder {folder}: {why}")


def open_folder(args: argparse.Namespace, epoch: int) -> None:
    """Prepares output_dir for a run: with --overwrite, removes the run that it holds.

    Removes from log.txt what a resumed run will log again: the lines from `epoch` on.

    Raises:
        UserError: a file cannot be written or removed.
    """
    if not args.output_dir:
        return
    folder = Path(args.output_dir)
    if args.overwrite and not _is_resumed(args):  # a requeued job resumes
        for path in (path for pattern in LEFT_BEHIND for path in folder.glob(pattern)):
            try:
                path.unlink()
            except OSError as error:
                raise UserError(f"--overwrite: cannot remove {path}: {error.strerror}") from None
    _cut_log(folder / LOG, epoch)
    write_lists()


def _is_resumed(args: argparse.Namespace) -> bool:
    """Whether `--resume` continues the run that output_dir holds."""
    if args.resume in ("", "auto"):
        return args.resume == "auto"
    return _is_in(args.resume, Path(args.output_dir))


def _is_in(file: str, folder: Path) -> bool:
    return os.path.dirname(os.path.realpath(file)) == os.path.realpath(folder)


def _cut_log(path: Path, epoch: int) -> None:
    """Removes an epoch's line and later ones from log.txt, and a line that a crash cut off."""
    try:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        temporary = path.with_name(f"{LOG}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines if _epoch_of(line) < epoch))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _epoch_of(line: str) -> float:
    """The epoch of a line of log.txt; infinity for one that is cut off."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return math.inf
