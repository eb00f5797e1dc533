"""Training steps per objective and number format, against the machine's own matrix products.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --model mae_vit_large_patch16 --batch_size 128
    python benchmarks/train_step.py --profile

A step is what main_pretrain.py does with a batch that is already on the device: forward, losses,
backward, AdamW. Its FLOPs are counted by torch (3 forward passes' worth, but for the patches'
pixels, which need no gradient); the matrix product is 4096 x 1024 x 4096, in the same format.
A CPU is measured on one core, in processor time. `--profile` shows instead where the time of a step
goes.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from common import describe_machine, measure, peak_memory, table
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from engine_pretrain import total_loss
from model_mae import build_model
from util.args import pretrain_parser
from util.precision import Precision, keep_freed_memory

FLAGS = {
    "CAN": [],
    "MAE": ["--weight_simclr", "0", "--weight_mae", "1"],
    "SimCLR": ["--weight_mae", "0", "--weight_simclr", "1"],
}
MATMUL = (4096, 1024, 4096)
MATMULS = 10  # in one measurement

# The kind of an operation: the first whose pattern is found in its path, callers first. Casts are
# autocast's; copies, of all else.
KINDS = {
    "AdamW": r"Optimizer\.step",
    "contrastive loss": r"_NTXent",
    "attention": r"scaled_dot_product|flash_attention|bmm|softmax",
    "matmul": r"::(mm|addmm|mkldnn_linear)$",
    "casts": r"_to_copy",
    "norm, GELU": r"layer_norm|gelu",
    "gather, copy": r"copy_|gather|scatter|cat$|index|sort|fill_",
    "the rest": "",
}


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
    objective: str, precision: Precision, options: argparse.Namespace, compiled: bool = False
) -> Callable[[], None]:
    args = parse(objective, options.model)
    model = build_model(args).to(precision.device)
    model.grad_checkpointing = options.grad_checkpointing
    if compiled:
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


def beside_matmul(step: Callable[[], None], precision: Precision) -> tuple[float, float]:
    """Seconds of a step, and the matrix product's FLOP/s, measured in turns."""
    runs = {"step": step, "matmul": matmul(precision)}
    seconds = measure(runs, precision.device)
    rows, inner, columns = MATMUL
    return seconds["step"], MATMULS * 2 * rows * inner * columns / seconds["matmul"]


def shares(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Of a step's time, by kind of operation."""
    step()  # to warm up
    with profile() as record:
        step()
    times = Counter()
    for event in record.events():
        if event.device_type != DeviceType.CPU:  # a kernel, which counts for who launched it
            continue
        path, caller = event.name, event.cpu_parent
        while caller is not None:
            path, caller = f"{caller.name}/{path}", caller.cpu_parent
        kind = next(name for name, pattern in KINDS.items() if re.search(pattern, path))
        on_gpu = device.type == "cuda"
        times[kind] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return {kind: times[kind] / times.total() for kind in KINDS}


def contenders(options: argparse.Namespace, device: torch.device) -> Iterator[tuple]:
    """Name, objective, precision and step of each row."""
    for name in options.precisions:
        precision = Precision(name, device)
        for compiled in (False, True) if options.compiled else (False,):
            for objective in options.objectives:
                step = training_step(objective, precision, options, compiled)
                yield f"{objective} {name}{', compiled' * compiled}", objective, precision, step


def rates(options: argparse.Namespace, device: torch.device) -> None:
    """Prints what each step reaches."""
    images, flops_of_can, seconds_of_can, rows = options.batch_size, 0.0, 0.0, []
    for name, objective, precision, step in contenders(options, device):
        seconds, rate = beside_matmul(step, precision)
        flops = step_flops(objective, options.model) * images
        if objective == "CAN":  # the first in its number format
            flops_of_can, seconds_of_can = flops, seconds
        rows.append(
            [
                name,
                f"{images / seconds:.2f}",
                f"{flops / 1e9 / images:.0f}",
                f"{flops / seconds / rate:.0%}",
                f"{rate / 1e9:.0f}",
                f"{seconds / seconds_of_can:.2f}" if seconds_of_can else "-",
                f"{flops / flops_of_can:.2f}" if flops_of_can else "-",
                f"{peak_memory(step, device) / 2**30:.2f}",
            ]
        )
    header = ["step", "images/s", "GFLOP/image", "of matmul", "GFLOP/s"]
    table([*header, "time / CAN", "FLOPs / CAN", "GiB"], rows)


def main(options: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()  # as main_pretrain.py does
    if options.batch_size is None:
        options.batch_size = 256 if device.type == "cuda" else 8
    if options.compiled is None:
        options.compiled = device.type == "cuda"
    print(describe_machine(device))
    print(f"{options.model}, {options.batch_size} images")
    if not options.profile:
        rates(options, device)
        return
    rows = []
    for name, _, _, step in contenders(options, device):
        rows.append([name, *(f"{share:.0%}" for share in shares(step, device).values())])
    table(["share of the step", *KINDS], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mae_vit_base_patch16")
    parser.add_argument("--batch_size", type=int, help="if not given, 256 on a GPU, 8 on a CPU")
    parser.add_argument("--objectives", nargs="+", choices=FLAGS, default=list(FLAGS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="rows of compiled steps, too; if not given, on GPUs",
    )
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    parser.add_argument("--grad_checkpointing", action="store_true")
    main(parser.parse_args())
