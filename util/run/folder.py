"""The output folder: whether it holds a run already, and what a start makes and removes in it."""

import argparse
import json
import math
import os
from pathlib import Path

from util.data.file_list import write_lists
from util.data.loader import BAD_LIST
from util.errors import UserError

CHECKPOINTS = "checkpoint-*.pth"
LOG = "log.txt"
# What a run leaves behind, apart from its lists of files, which remain valid.
LEFT_BEHIND = (CHECKPOINTS, LOG, "events.out.tfevents.*", BAD_LIST)


def check_folder(args: argparse.Namespace) -> None:
    """Refuses, before anything is written, to mix or remove runs by accident.

    Raises:
        UserError: output_dir holds a run that the flags neither resume nor replace, or --overwrite
            would remove the weights to start from.
    """
    writes_nothing = vars(args).get("eval") or vars(args).get("knn")
    if not args.output_dir or writes_nothing or _is_resumed(args):
        return
    folder = Path(args.output_dir)
    if args.overwrite:
        source = getattr(args, "finetune", "")
        if source and _is_in(source, folder):
            raise UserError(f"--overwrite would remove --finetune {source}")
        return
    try:
        # A run that ended within its first epoch leaves an empty log, and nothing to lose.
        log = folder / LOG
        found = any(folder.glob(CHECKPOINTS)) or (log.exists() and log.stat().st_size > 0)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}") from None
    if found:
        raise UserError(
            f"--output_dir {folder} holds a run: --resume auto continues it, --overwrite removes it"
        )


def open_folder(args: argparse.Namespace, epoch: int) -> None:
    """Makes the run's folders; with --overwrite, removes the run that output_dir holds.

    Removes from log.txt what a resumed run will log again: the lines from `epoch` on.

    Raises:
        UserError: a folder or file cannot be made, written or removed.
    """
    _make_folders(args.output_dir, args.log_dir)
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


def _make_folders(*folders: str) -> None:
    for folder in filter(None, folders):  # checks all before it makes one
        there = next((p for p in [Path(folder), *Path(folder).parents] if os.path.lexists(p)), None)
        if there is not None and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            why = "no permission" if there.is_dir() else "is a file"
            raise UserError(f"cannot write to the folder {folder}: {there}: {why}")
    for folder in filter(None, folders):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / ".writable").touch()
            (Path(folder) / ".writable").unlink()
        except OSError as error:
            raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from None


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
