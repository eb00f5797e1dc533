"""Time and memory of NT-Xent, forward and backward: the whole similarity matrix against tiles.

python benchmarks/nt_xent.py
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import describe_machine, measure, peak_memory, table
from torch import Tensor

from loss_contrastive import nt_xent

DIM = 128  # width of CAN's projections
TEMPERATURE = 0.1


def plain_nt_xent(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """The same loss and top-1 accuracy from all similarities at once, by autograd."""
    own = torch.arange(len(embeddings), device=embeddings.device)
    logits = embeddings @ embeddings.T / TEMPERATURE
    logits[own, own] = -torch.inf
    positive = own.roll(len(own) // 2)
    loss = F.cross_entropy(logits, positive)
    return loss, (logits.argmax(dim=1) == positive).float().mean()


def step(form: Callable, embeddings: Tensor) -> None:
    embeddings.grad = None
    form(embeddings)[0].backward()


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    print(describe_machine(device))
    rows = []
    for power in range(args.smallest, args.largest + 1):
        count = 2**power
        embeddings = F.normalize(torch.randn(count, DIM, device=device), dim=1).requires_grad_()
        forms = {"tiled": nt_xent}
        if power <= args.largest_plain:
            forms["plain"] = plain_nt_xent

        steps = {name: partial(step, form, embeddings) for name, form in forms.items()}
        seconds = measure(steps, device)
        mebibytes = {name: peak_memory(run, device) / 2**20 for name, run in steps.items()}
        whole = "plain" in forms
        rows.append(
            [
                f"{count}",
                f"{1e3 * seconds['plain']:.1f}" if whole else "-",
                f"{1e3 * seconds['tiled']:.1f}",
                f"{seconds['tiled'] / seconds['plain']:.2f}" if whole else "-",
                f"{mebibytes['plain']:.0f}" if whole else "-",
                f"{mebibytes['tiled']:.0f}",
            ]
        )
    table(["embeddings", "plain ms", "tiled ms", "time ratio", "plain MiB", "tiled MiB"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smallest", type=int, default=10, help="log2 of embeddings")
    parser.add_argument("--largest", type=int, default=15, help="log2 of embeddings")
    parser.add_argument(
        "--largest_plain", type=int, default=13, help="log2; above, the plain form is left out"
    )
    main(parser.parse_args())
