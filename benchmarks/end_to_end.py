"""main_pretrain.py's images per second against its loader's and its step's own.

    python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --model mae_vit_base_patch16 --batch_size 256 --num_workers 12

On generated JPEGs of 500 x 375 pixels. The loader is timed without a model, the step without a
loader, the script as people run it; the script should come close to the slower of the two.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import describe_machine, run_script, table
from loader import FILES, photo
from train_step import training_step

from util.args import pretrain_parser
from util.data.loader import train_loader
from util.data.order import SeededDataset
from util.datasets import open_dataset
from util.precision import Precision, keep_freed_memory
from util_contrastive import two_crops

EPOCHS = 3  # the first, with its start-up, is not counted


def flags(options: argparse.Namespace, folder: Path) -> list[str]:
    values = {
        "data_path": folder / "images",
        "model": options.model,
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "precision": options.precision,
        "epochs": EPOCHS,
        "warmup_epochs": 0,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def loader_rate(args: argparse.Namespace, device: torch.device) -> float:
    transform = two_crops(args)
    data = SeededDataset(open_dataset(args.data_path, train=True), transform, args.seed)
    loader = train_loader(data, args, device, finish=transform.finish)
    for epoch in range(EPOCHS):  # the first starts the processes
        begin = time.perf_counter()
        images = sum(len(labels) for _, labels in loader.epoch(epoch))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return images / (time.perf_counter() - begin)


def step_rate(options: argparse.Namespace, device: torch.device, steps: int) -> float:
    options.grad_checkpointing = False
    step = training_step("CAN", Precision(options.precision, device), options)
    for repeats in (1, steps):  # the first warms up
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return steps * options.batch_size / (time.perf_counter() - begin)


def script_rate(words: list[str], output: Path, device: torch.device) -> float:
    epochs = run_script(device.type, str(output), *words)
    rates = [epoch["train_images_per_second"] for epoch in epochs[1:]]
    return sum(rates) / len(rates)


def main(options: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # the loader has cores of its own
        keep_freed_memory()  # as main_pretrain.py does
    print(describe_machine(device))
    encoded = photo(*FILES[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for i in range(options.steps * options.batch_size):
            (folder / "images" / f"{i:06}.jpg").write_bytes(encoded)
        words = flags(options, folder)
        args = pretrain_parser().parse_args([*words, "--output_dir", ""])
        loader = loader_rate(args, device)
        step = step_rate(options, device, options.steps)
        script = script_rate(words, folder / "output", device)
    slower = min(loader, step)
    row = [options.model, *(f"{rate:.1f}" for rate in (loader, step, script))]
    header = ["images/s", "loader", "step", "main_pretrain.py", "of the slower"]
    table(header, [[*row, f"{script / slower:.0%}"]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mae_vit_tiny_patch16")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=12, help="per epoch")
    main(parser.parse_args())
