"""Writes any data set as WebDataset's tar shards, with large images made smaller if asked to.

    python -m util.shards --data_path IMAGES --out SHARDS --max_side 512 --quality 90

Called again, it goes on where it was stopped. `--data_path SHARDS` then trains on them.
"""

import argparse
import io
import json
import logging
import multiprocessing
import os
import re
import signal
import tarfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from util.data.images import BadImage, NotPillows, has_pages, is_deep, open_image, to_8_bits
from util.data.pixels import ALPHA
from util.data.shards import CLASSES
from util.data.source import EXTENSIONS, Source, classes_of, extension_of, name_of
from util.data.workers import count_processors
from util.datasets import open_dataset
from util.errors import NoSplit, UserError
from util.files import written_whole
from util.parents import end_with_parent
from util.parser import COUNT, POSITIVE, Parser, number
from util.run.launch import launch
from util.run.lock import LOCK, lock_folder
from util.run.logs import Progress, log_to_console

logger = logging.getLogger(__name__)

MANIFEST = "shards.json"
FORMATS = {"MPO": ".jpg", "JPEG": ".jpg", "JPEG2000": ".jp2"}  # of files without an extension
STEM = 60  # letters of a file's name that its name in the shard keeps
SAMPLING = 0  # of colours in JPEGs: none, which a quality of 90 deserves


# fmt: off
def get_args_parser() -> Parser:
    parser = Parser(prog="util.shards", description="Write images as WebDataset's tar shards")
    add = parser.add_argument
    add("--data_path", required=True, help="the images, as in pretraining")
    add("--labels", default="", metavar="FILE.csv", help="as in pretraining")
    add("--out", required=True, metavar="FOLDER", help="where train/ and val/ with shards go")
    add("--max_side", type=POSITIVE, help="images with a longer side are made smaller, and JPEGs; "
        "default: all files are kept, byte by byte")
    add("--quality", type=number(int, 1, 100, "[]"), default=90, help="of these JPEGs")
    add("--shard_images", type=POSITIVE, default=1000, help="images in a shard")
    add("--keep_order", action="store_true", help="do not shuffle the images")
    add("--seed", type=COUNT, default=0, help="of the shuffling")
    add("--num_workers", type=POSITIVE, default=count_processors(), help="processes")
    return parser
# fmt: on


def main(args: argparse.Namespace) -> None:
    log_to_console()
    splits = {"train": open_dataset(args.data_path, True, labels=args.labels)}
    try:
        splits["val"] = open_dataset(args.data_path, False, labels=args.labels)
    except NoSplit as error:
        logger.info(f"no val/ is written: {error}")
    out = Path(args.out)
    lock_folder(out)
    try:
        _claim(out, args, splits)
        written = sum(write_split(data, out / name, args) for name, data in splits.items())
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}") from None
    if not written:
        raise UserError(f"none of the images of {args.data_path} can be read")
    print(f"{out}: done; --data_path {out} reads it")


def _claim(out: Path, args: argparse.Namespace, splits: dict[str, Dataset]) -> None:
    """Raises UserError if the folder holds shards of other images or flags."""
    flags = {k: v for k, v in vars(args).items() if k not in ("out", "num_workers")}
    for name, data in splits.items():
        flags[f"{name} images"] = len(data)
        flags[f"{name} digest"] = data.identity() if isinstance(data, Source) else ""
    manifest = out / MANIFEST
    if manifest.exists():
        try:
            before = json.loads(manifest.read_text())
        except ValueError:
            raise UserError(f"{manifest} is damaged: remove {out}, or give another --out") from None
        if odd := sorted(k for k in {*flags, *before} if before.get(k) != flags.get(k)):
            was = ", ".join(f"{k} was {before.get(k)}, is {flags.get(k)}" for k in odd)
            raise UserError(f"{out} holds other shards: {was}; give another --out")
        return
    if set(os.listdir(out)) - {LOCK}:
        raise UserError(f"--out {out} is not empty, and holds no {MANIFEST}")
    with written_whole(manifest) as temporary:
        temporary.write_text(json.dumps(flags, indent=1))


def write_split(data: Dataset, folder: Path, args: argparse.Namespace) -> int:
    """Writes the shards that are not there yet, in parallel, each whole or not at all.

    Returns:
        How many images there are now, or at least one.

    Raises:
        UserError, OSError: they cannot be written.
    """
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.tmp"):  # what a start that was killed left
        path.unlink(missing_ok=True)
    order = np.arange(len(data))
    if not args.keep_order:
        order = np.random.default_rng(args.seed).permutation(order)
    classes = classes_of(data)
    if classes != [""]:
        lines = "".join(f"{name}\n" for name in classes)
        (folder / CLASSES).write_text(lines, "utf-8", "surrogateescape")
    starts = range(0, len(data), args.shard_images)
    digits = max(5, len(str(len(starts))))
    paths = {start: folder / f"{n:0{digits}d}.tar" for n, start in enumerate(starts)}
    left = [start for start, path in paths.items() if not path.exists()]
    if len(left) < len(paths):
        logger.info(f"{folder}: {len(paths) - len(left):,} of {len(paths):,} shards are there")
        if not left:
            return 1
    total, progress = Counter(), Progress(len(left))
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(args.num_workers, fork, _begin, (data, args)) as pool:
        jobs = [
            pool.submit(_write_shard, paths[start], start, order[start : start + args.shard_images])
            for start in left
        ]
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                counts, bad = job.result()
                total += counts
                for name, reason in bad.items():
                    logger.warning(f"warning: {name!r} is not readable ({reason}): left out")
                progress.show(done, "shards", f"{folder}: ")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise
    size, images = total.pop("bytes", 0) / 1e6, sum(total.values())
    words = ", ".join(f"{count:,} {what}" for what, count in total.most_common())
    logger.info(f"{folder}: {len(left):,} shards, {size:,.1f} MB: {words or 'nothing'}")
    return images + len(paths) - len(left)


_data: Dataset
_args: argparse.Namespace


def _begin(data: Dataset, args: argparse.Namespace) -> None:
    global _data, _args
    _data, _args = data, args
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    end_with_parent(signal.SIGKILL)


def _write_shard(path: Path, first: int, indices: np.ndarray) -> tuple[Counter, dict[str, str]]:
    """Writes some images; returns what was done to how many, and bad ones with the reason."""
    counts, bad = Counter(), {}
    with_labels = classes_of(_data) != [""]
    with (
        written_whole(path) as temporary,
        tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for position, index in enumerate(indices.tolist(), start=first):
            name = name_of(_data, index)
            try:
                content, extension, label, what = _sample(index)
            except (BadImage, OSError) as error:
                bad[name] = str(error)
                continue
            stem = re.sub(r"[^\w-]", "_", Path(name).stem)[:STEM]
            key = f"{position:08d}-{stem}"
            _add(tar, f"{key}{extension}", content)
            if with_labels and label >= 0:
                _add(tar, f"{key}.cls", str(label).encode())
            counts[what] += 1
            counts["bytes"] += len(content)
    return counts, bad


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _sample(index: int) -> tuple[bytes, str, int, str]:
    """An image file's bytes and extension, its label, and what was done to it."""
    if not isinstance(_data, Source):  # pixels, of a named data set
        image, label = _data[index]
        if _args.max_side and max(image.size) > _args.max_side:
            return *_smaller(image), int(label), "made smaller"
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue(), ".png", int(label), "written as PNG"
    content, name = _data.content(index)
    data = Path(content).read_bytes() if isinstance(content, str) else content.getvalue()
    label, extension = int(_data.targets[index]), extension_of(f"_{name}")
    if extension in EXTENSIONS and _args.max_side is None:
        return data, extension, label, "as they were"
    image = open_image(io.BytesIO(data), name)
    if extension not in EXTENSIONS:
        extension = FORMATS.get(image.format, f".{image.format.lower()}")
    if _args.max_side is None or max(image.size) <= _args.max_side:
        return data, extension, label, "as they were"
    special = isinstance(image, NotPillows) or is_deep(image) or image.mode in ALPHA
    special = special or "transparency" in image.info
    if special or has_pages(image):
        what = "as they were, though large: of more than 8 bits, alpha, pages"
        return data, extension, label, what
    return *_smaller(image), label, "made smaller"


def _smaller(image: Image.Image) -> tuple[bytes, str]:
    """A JPEG of an image, upright, whose longer side is `--max_side`, and its extension."""
    side = _args.max_side
    mode = "L" if image.mode in ("1", "L") else "RGB"
    shrink = max(1, max(image.size) // (2 * side))  # of JPEGs, while they are decoded
    pixels = to_8_bits(image, mode, shrink)
    scale = side / max(pixels.size)
    size = [max(1, round(length * scale)) for length in pixels.size]
    buffer = io.BytesIO()
    resized = pixels.resize(size, Image.Resampling.BICUBIC)
    resized.save(buffer, "JPEG", quality=_args.quality, subsampling=SAMPLING)
    return buffer.getvalue(), ".jpg"


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
