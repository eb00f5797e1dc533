"""Training steps per objective and number format, against the machine's own matrix products.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --model mae_vit_large_patch16 --batch_size 128 --compile

A step is what main_pretrain.py does with a batch that is already on the device: forward, losses,
backward, AdamW. Its FLOPs are counted by torch (3 forward passes' worth, but for the patches'
pixels, which need no gradient); the matrix product is 4096 x 1024 x 4096, in the same format.
A CPU is measured on one core, in processor time.
"""

import argparse
from collections.abc import Callable

import torch
from common import describe_machine, measure, peak_memory, table
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from engine_pretrain import total_loss
from model_mae import build_model
from util.args import pretrain_parser
from util.precision import Precision

FLAGS = {
    "CAN": [],
    "MAE": ["--weight_simclr", "0", "--weight_mae", "1"],
    "SimCLR": ["--weight_mae", "0", "--weight_simclr", "1"],
}
MATMUL = (4096, 1024, 4096)
MATMULS = 10  # in one measurement


def parse(objective: str, model: str) -> argparse.Namespace:
    return pretrain_parser().parse_args(["--data_path", "-", "--model", model, *FLAGS[objective]])


def backward(
    model: nn.Module, imgs: Tensor, args: argparse.Namespace, precision: Precision
) -> None:
    with precision.autocast():
        parts = model(imgs, mask_ratio=args.mask_ratio)
    precision.scaler.scale(total_loss(parts, args)["loss"]).backward()


def step_flops(objective: str, model: str) -> int:
    """Of one image, two views, on tensors without storage."""
    args = parse(objective, model)
    with torch.device("meta"):
        network, imgs = build_model(args), torch.empty(2, 3, args.input_size, args.input_size)
    with FlopCounterMode(display=False) as counter:
        parts = network(imgs, mask_ratio=args.mask_ratio)
        terms = [
            parts[name].sum() for name in ("reconstruction", "noise", "embedding") if name in parts
        ]
        sum(terms).backward()
    return counter.get_total_flops()


def training_step(
    objective: str, precision: Precision, options: argparse.Namespace
) -> Callable[[], None]:
    args = parse(objective, options.model)
    model = build_model(args).to(precision.device)
    model.grad_checkpointing = options.grad_checkpointing
    if options.compile:
        model.compile()
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), fused=True)
    size = (2 * options.batch_size, 3, args.input_size, args.input_size)
    imgs = torch.randn(size, device=precision.device)

    def step() -> None:
        backward(model, imgs, args, precision)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad()

    return step


def matmul(precision: Precision) -> Callable[[], None]:
    rows, inner, columns = MATMUL
    a = torch.randn(rows, inner, device=precision.device, dtype=precision.dtype)
    b = torch.randn(inner, columns, device=precision.device, dtype=precision.dtype)

    def products() -> None:
        for _ in range(MATMULS):
            a @ b

    return products


def main(options: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    if options.batch_size is None:
        options.batch_size = 256 if device.type == "cuda" else 2
    print(describe_machine(device))
    print(f"{options.model}, {options.batch_size} images{', compiled' * options.compile}")
    rows, seconds_of = [], {}
    for name in options.precisions:
        precision = Precision(name, device)
        for objective in options.objectives:
            step = training_step(objective, precision, options)
            seconds = measure({"step": step, "matmul": matmul(precision)}, device)
            rate = MATMULS * 2 * MATMUL[0] * MATMUL[1] * MATMUL[2] / seconds["matmul"]
            flops = step_flops(objective, options.model) * options.batch_size
            seconds_of[objective, name] = seconds["step"]
            relative = seconds["step"] / seconds_of.get(("CAN", name), seconds["step"])
            rows.append(
                [
                    f"{objective} {name}",
                    f"{options.batch_size / seconds['step']:.2f}",
                    f"{flops / 1e9 / options.batch_size:.0f}",
                    f"{flops / seconds['step'] / rate:.0%}",
                    f"{rate / 1e9:.0f}",
                    f"{relative:.2f}",
                    f"{peak_memory(step, device) / 2**30:.2f}",
                ]
            )
            del step
    header = ["step", "images/s", "GFLOP/image", "of matmul", "GFLOP/s", "time / CAN", "GiB"]
    table(header, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mae_vit_base_patch16")
    parser.add_argument("--batch_size", type=int, help="if not given, 256 on a GPU, 2 on a CPU")
    parser.add_argument("--objectives", nargs="+", choices=FLAGS, default=list(FLAGS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--grad_checkpointing", action="store_true")
    main(parser.parse_args())
