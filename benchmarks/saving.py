"""How long a save holds up training: the state copied and written by a thread, against writing it.

python benchmarks/saving.py
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from common import describe_machine, table
from torch import Tensor

from util.errors import UserError
from util.run import checkpoint
from util.run.background import Background, HostCopy

FILES = ("checkpoint-best.pth", "checkpoint-9.pth", "checkpoint-last.pth")


def state_of(parameters: int, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """As much as a model and AdamW's averages hold, in tensors of a ViT-B's mean size."""
    names = ("weight", "exp_avg", "exp_avg_sq")
    sizes = range(max(1, parameters // 500_000))
    return {
        name: {str(i): torch.randn(min(parameters, 500_000), device=device) for i in sizes}
        for name in names
    }


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(describe_machine(device))
    state = state_of(round(args.millions * 1e6), device)
    size = sum(t.nbytes for part in state.values() for t in part.values())
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    holder, background = HostCopy(), Background()
    rows = []

    def write(copy: dict) -> list[UserError]:
        checkpoint.save(copy, folder / FILES[0])
        for name in FILES[1:]:
            checkpoint.copy_file(folder / FILES[0], folder / name)
        return []

    try:
        for number in range(args.saves):
            begin = time.perf_counter()
            for name in FILES:
                checkpoint.save(state, folder / name)
            waited = time.perf_counter() - begin
            begin = time.perf_counter()
            copy = holder.take(state)
            background.start(lambda copy=copy: write(copy))
            held_up = time.perf_counter() - begin
            background.wait()
            whole = time.perf_counter() - begin
            kind = "first" if number == 0 else "later"
            rows.append([kind, f"{waited:.2f}", f"{held_up:.2f}", f"{whole:.2f}"])
    finally:
        shutil.rmtree(folder)
    print(f"a state of {size / 1e9:.1f} GB into {len(FILES)} files, seconds")
    table(["save", "written thrice", "by a thread: training waits", "all of it"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=110, help="of parameters")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", help="where; default: the system's for temporary files")
    main(parser.parse_args())
