"""Embeddings of images by a checkpoint's encoder, as a file.

    python -m util.embed --checkpoint my_run/checkpoint-last.pth --data_path images --out out.npz
    torchrun --nproc_per_node=4 -m util.embed --checkpoint ... --data_path ... --out out.parquet

Shapes: M images, D width (twice the encoder's for `--pool both`).
"""

import util.parents  # isort: skip  # noqa: F401 (before torch, see there)

import argparse
import csv
import json
import logging
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from util.args import common_flags
from util.data.index import Strings
from util.data.loader import eval_loader
from util.data.order import SeededDataset
from util.data.source import Source, classes_of, labels_of, name_of
from util.data.survey import inherit_pixels, settle_pixels
from util.data.transforms import eval_transform_of
from util.datasets import open_dataset
from util.distributed import (
    from_rank_zero,
    get_rank,
    get_world_size,
    host_group,
    init_distributed_mode,
    machines,
)
from util.encoders import Encoder
from util.errors import UserError
from util.files import written_whole
from util.parser import Parser, Sides, number
from util.precision import Precision
from util.run.checkpoint import load_published
from util.run.launch import launch, session
from util.run.logs import Progress, log_to_console

logger = logging.getLogger(__name__)

ROWS = 4096  # written at once
KEPT = ("data_path", "labels", "resize", "batch_size", "num_workers", "pin_mem", "no_pin_mem",
        "in_chans", "pages", "pixel_range", "pixel_mean", "pixel_std", "device", "precision",
        "world_size", "local_rank", "dist_on_itp", "dist_url")  # fmt: skip


def get_args_parser() -> Parser:
    parser = Parser(prog="util.embed", description="Write a checkpoint's embeddings of images")
    add = parser.add_argument
    add("--checkpoint", required=True, help="path or URL, of any layout that --init takes")
    add("--out", required=True, metavar="FILE", help=f"one of {', '.join(WRITERS)}")
    add("--pool", choices=("cls", "mean", "both"), default="mean",
        help="the cls token, the mean over patches, or both, one after the other")  # fmt: skip
    add("--input_size", type=number(int, 1, 4096, "[]"), nargs="+", action=Sides, metavar="SIDE",
        help="side of the images, or height and width; default: the checkpoint's")  # fmt: skip
    for action in common_flags()._actions:
        if action.dest in KEPT:
            parser._add_action(action)
    return parser


@session
def main(args: argparse.Namespace) -> None:
    write = WRITERS.get(Path(args.out).suffix)
    if write is None:
        raise UserError(f"--out {args.out}: the name must end in {', '.join(WRITERS)}")
    if not args.data_path:
        raise UserError("the following arguments are required: --data_path")
    if write is write_parquet:
        import_pyarrow()  # before the work
    device = init_distributed_mode(args)
    log_to_console()
    if len(names := machines()) > 1:  # which write one file's pages over each other's
        raise UserError(f"the processes must run on one machine, not on {', '.join(names)}")
    vars(args).update(seed=0, output_dir="")
    state = load_published(args.checkpoint)
    encoder = Encoder(state, args.checkpoint, args.input_size).to(device)
    args.input_size = encoder.vit.patch_embed.img_size
    inherit_pixels(args, state.get("args", {}), args.checkpoint)
    channels = encoder.vit.patch_embed.proj.in_channels
    if args.in_chans not in (None, channels):
        raise UserError(f"--in_chans {args.in_chans}: {args.checkpoint} takes {channels} channels")
    args.in_chans = channels
    images = from_rank_zero(lambda: open_dataset(args.data_path, None, labels=args.labels))
    settle_pixels(args, images=images)
    temporary = f"{args.out}.tmp.npy"
    try:
        embed(encoder, images, args, Precision(args.precision, device), temporary)
        from_rank_zero(lambda: finish(args.out, write, temporary, images))
    finally:
        if get_rank() == 0:
            Path(temporary).unlink(missing_ok=True)
    logger.info(f"{args.out}: {len(images):,} embeddings of width {width_of(encoder, args.pool)}")


def width_of(encoder: Encoder, pool: str) -> int:
    return encoder.vit.embed_dim * (2 if pool == "both" else 1)


def embed(
    encoder: Encoder, images: Dataset, args: argparse.Namespace, precision: Precision, path: str
) -> None:
    """Writes [M, D], float32, into an .npy file, of which each process fills its images' rows.

    Raises:
        UserError: it cannot be written, or too many images are not readable.
    """
    shape = len(images), width_of(encoder, args.pool)
    from_rank_zero(lambda: _create(path, shape))
    rows = np.lib.format.open_memmap(path, mode="r+")
    data = SeededDataset(images, eval_transform_of(args), seed=0)
    loader = eval_loader(data, args, precision.device, share=True, once=True)
    place, progress = get_rank(), Progress(len(images))
    for batch, _ in loader:
        with precision.autocast():
            cls, mean = encoder(batch)
        found = {"cls": [cls], "mean": [mean], "both": [cls, mean]}[args.pool]
        found = torch.cat(found, dim=1).float().cpu().numpy()
        found[np.array(loader.replaced, bool)] = np.nan
        rows[place : place + len(found) * get_world_size() : get_world_size()] = found
        place += len(found) * get_world_size()
        progress.show(min(place, len(images)), "images")
    rows.flush()
    loader.report_bad()
    if loader.bad:
        logger.info(f"{len(loader.bad):,} images are not readable: their embeddings are NaN")
    if get_world_size() > 1:
        dist.barrier(host_group())


def _create(path: str, shape: tuple[int, int]) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def finish(out: str, write: Callable, rows: str, images: Dataset) -> None:
    """Writes the file from the rows, whole or not at all; raises UserError if it cannot."""
    try:
        with written_whole(out) as temporary:
            write(temporary, np.load(rows, mmap_mode="r"), Names(images))
    except (OSError, ValueError) as error:  # ValueError: names that are no text
        raise UserError(f"cannot write {out}: {error}") from None


class Names:
    """The images' file names, and classes, where there are any."""

    def __init__(self, images: Dataset):
        self.images, self.classes = images, classes_of(images)
        believed = self.classes != [""] and not (
            isinstance(images, Source) and images.why_no_classes()
        )
        self.labels = labels_of(images) if believed else None

    def columns(self, rows: range) -> dict[str, list[str]]:
        found = {"file": [name_of(self.images, row) for row in rows]}
        if self.labels is not None:
            labels = self.labels[rows.start : rows.stop].tolist()
            found["label"] = [self.classes[label] if label >= 0 else "" for label in labels]
        return found


def chunks(rows: np.ndarray, names: Names) -> Iterator[tuple[dict[str, list[str]], np.ndarray]]:
    for start in range(0, len(rows), ROWS):
        some = range(start, min(start + ROWS, len(rows)))
        yield names.columns(some), rows[some.start : some.stop]


def write_npz(path: Path, rows: np.ndarray, names: Names) -> None:
    """As `np.savez` would, but in chunks: embeddings, files and, if there are any, labels."""

    def begin(name: str, kind: np.dtype, shape: tuple[int, ...]) -> IO[bytes]:
        file = archive.open(f"{name}.npy", "w", force_zip64=True)
        header = {"descr": kind.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        return file

    kinds = {}  # wide enough for the longest text
    with zipfile.ZipFile(path, "w") as archive:
        with begin("embeddings", rows.dtype, rows.shape) as file:
            for columns, some in chunks(rows, names):
                file.write(some.tobytes())
                for name, values in columns.items():
                    kinds[name] = max(kinds.get(name, np.dtype("<U1")), np.array(values).dtype)
        for name, kind in kinds.items():
            with begin(f"{name}s", kind, (len(rows),)) as file:
                for columns, _ in chunks(rows, names):
                    file.write(np.array(columns[name], kind).tobytes())


def write_safetensors(path: Path, rows: np.ndarray, names: Names) -> None:
    """The format's header, then the tensors; names as in `Strings`, classes in the metadata."""
    files = Strings.pack(name_of(names.images, row) for row in range(len(rows)))
    labels = {} if names.labels is None else {"labels": names.labels}
    arrays = {"embeddings": rows} | labels | files.named("files")
    header, end = {"__metadata__": {"classes": json.dumps(names.classes)}}, 0
    for name, array in arrays.items():
        kind = {"float32": "F32", "int32": "I32", "int64": "I64", "uint8": "U8"}[str(array.dtype)]
        offsets = [end, end := end + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            for start in range(0, len(array), ROWS):
                file.write(np.ascontiguousarray(array[start : start + ROWS]).tobytes())


def write_table(path: Path, rows: np.ndarray, names: Names) -> None:
    with open(path, "w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file)
        header = [*names.columns(range(0)), *(f"e{i}" for i in range(rows.shape[1]))]
        writer.writerow(header)
        for columns, some in chunks(rows, names):
            for *words, row in zip(*columns.values(), some.tolist(), strict=True):
                writer.writerow([*words, *(f"{value:.7g}" for value in row)])


def import_pyarrow() -> None:
    """Raises UserError where it is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError("--out ...parquet needs a library: pip install pyarrow") from None


def write_parquet(path: Path, rows: np.ndarray, names: Names) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = [(name, pa.string()) for name in names.columns(range(0))]
    schema = pa.schema([*kinds, ("embedding", pa.list_(pa.float32(), rows.shape[1]))])
    with pq.ParquetWriter(path, schema) as writer:
        for columns, some in chunks(rows, names):
            flat = pa.array(np.ascontiguousarray(some).ravel())
            values = pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
            writer.write_table(pa.table([*columns.values(), values], schema=schema))


WRITERS = {
    ".npz": write_npz,
    ".csv": write_table,
    ".parquet": write_parquet,
    ".safetensors": write_safetensors,
}

if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
