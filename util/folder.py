"""The output folder: whether it holds a run already, and what the flags say to do about it."""

import argparse
import os
from pathlib import Path

from util.errors import UserError
from util.loader import BAD_LIST

# What a run leaves behind, apart from its lists of files, which stay true.
CHECKPOINTS = "checkpoint-*.pth"
LEFT_BEHIND = (CHECKPOINTS, "log.txt", "events.out.tfevents.*", BAD_LIST)


def _goes_on(args: argparse.Namespace) -> bool:
    """Whether `--resume` takes up the run that output_dir holds."""
    folder = Path(args.output_dir)
    return args.resume == "auto" or (bool(args.resume) and _is_in(args.resume, folder))


def _is_in(file: str, folder: Path) -> bool:
    return os.path.dirname(os.path.realpath(file)) == os.path.realpath(folder)


def check_folder(args: argparse.Namespace) -> None:
    """Sees to it, before anything is written, that no run is lost by accident.

    Raises:
        UserError: output_dir holds a run that the flags neither go on with nor replace, or would
            remove the weights that they begin with.
    """
    if not args.output_dir or vars(args).get("eval") or _goes_on(args):
        return
    folder = Path(args.output_dir)
    if args.overwrite:
        source = getattr(args, "finetune", "")
        if source and _is_in(source, folder):
            raise UserError(f"--overwrite would remove --finetune {source}")
        return
    try:
        # A run that ended within its first epoch leaves an empty log, and nothing to lose.
        log = folder / "log.txt"
        found = any(folder.glob(CHECKPOINTS)) or (log.exists() and log.stat().st_size > 0)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}") from None
    if found:
        raise UserError(
            f"--output_dir {folder} holds a run: --resume auto goes on with it, --overwrite "
            "removes it"
        )


def clear_folder(args: argparse.Namespace) -> None:
    """With `--overwrite`, removes the run that output_dir holds, unless it is being resumed.

    Raises:
        UserError: a file cannot be removed.
    """
    if not args.overwrite or not args.output_dir or _goes_on(args):  # a requeued job resumes
        return
    for pattern in LEFT_BEHIND:
        for path in Path(args.output_dir).glob(pattern):
            try:
                path.unlink()
            except OSError as error:
                raise UserError(f"--overwrite: cannot remove {path}: {error.strerror}") from None
