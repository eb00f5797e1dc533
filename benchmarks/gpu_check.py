"""What only a GPU can show, in one command of about ten minutes.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --only parts rates --json check.json
    python benchmarks/gpu_check.py --device cpu

Each line says pass, miss (it works, but not as well as we aim at), error, or nothing where there is
nothing to reach; after an error it goes on. The table is made for benchmarks/README.md. On a CPU
the same code runs, in five minutes, to be sure of the code: its numbers say nothing of GPUs.
"""

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import describe_machine, measure, peak_memory, run_script
from end_to_end import loader_rate
from loader import FILES, photo
from saving import state_of
from torch import Tensor
from torch.multiprocessing import start_processes
from train_step import backward, beside_matmul, parse, step_flops, training_step

from engine_pretrain import total_loss
from loss_contrastive import GlobalBatchNorm, nt_xent
from model_mae import build_model
from util.args import pretrain_parser
from util.data.augment import augment
from util.features import Features, knn_accuracy
from util.precision import Precision
from util.run.background import HostCopy
from util_contrastive import draw_parameters

Line = tuple[str, str, str, bool | None]  # what, value, aim, whether it is reached

TOLERANCE = 1e-3  # of fp32 results, relative to the largest value: sums are in another order there
ROUGH = 0.05  # of losses that were computed in another way
RATES = {"CAN": 0.45, "MAE": 0.45, "SimCLR": 0.5}  # of the matrix product's, in bf16
WAIT, STALL, AUGMENTATION = 0.02, 0.3, 0.15  # share of time; seconds; share of a step's time
RUN = ["--data_path", "digits", "--model", "mae_vit_nano_patch4", "--input_size", "32"]
RUN += ["--batch_size", "256", "--warmup_epochs", "0", "--num_workers", "2", "--epochs", "6"]


class Check:
    """Where it runs, and at which size.

    Attributes:
        sizes: models with the images of a step.
    """

    SIZES: ClassVar = {"base_patch16": 256, "large_patch16": 128}  # on a GPU

    def __init__(self, device: str):
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.on_gpu = device == "cuda"
        self.sizes = self.SIZES if self.on_gpu else {"tiny_patch16": 2}
        self.model, self.batch = next(iter(self.sizes.items()))
        self.workers = min(16, os.cpu_count() or 1)


def versions(check: Check) -> Iterator[Line]:
    """What it ran on."""
    yield "machine", describe_machine(check.device), "", None
    yield "CUDA", str(torch.version.cuda), "", None
    if check.on_gpu:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        for words in (query, ["nvidia-smi", "topo", "-m"]):
            found = subprocess.run(words, capture_output=True, text=True).stdout.strip()
            yield words[1].lstrip("-").split("=")[0], found, "", None
        yield "nccl", ".".join(map(str, torch.cuda.nccl.version())), "", None


@contextmanager
def same_draws() -> Iterator[None]:
    """Random numbers of the CPU's generator, on whatever device."""
    rand, randn = torch.rand, torch.randn
    torch.manual_seed(0)
    with mock.patch.multiple(
        torch,
        rand=lambda *size, device="cpu", **_: rand(*size).to(device),
        randn_like=lambda like: randn(like.shape).to(like.device),
    ):
        yield


def parts(check: Check) -> Iterator[Line]:
    """Forward and backward of each part in fp32, without TF32, against the CPU."""
    torch.backends.cudnn.allow_tf32 = False  # of the patch embedding; a matrix product's is off
    yield from (same(f"{kind}, loss and gradients", *losses(check, kind)) for kind in RATES)
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(1000, 128), dim=1)
    crops = (255 * torch.rand(32, 3, 64, 64)).byte()
    parameters = torch.stack([draw_parameters() for _ in crops])
    norm = GlobalBatchNorm(128).train()
    for name, run in (
        ("NT-Xent", lambda device: nt_xent(rows.to(device))[0]),
        ("augmentation", lambda device: augment(crops.to(device), parameters)),
        ("BatchNorm of the head", lambda device: copy.deepcopy(norm).to(device)(rows.to(device))),
        ("kNN, percent", lambda device: neighbours(rows.to(device))),
    ):
        yield same(name, run(check.device), run(torch.device("cpu")))


def same(
    name: str, found: Tensor | float, expected: Tensor | float, tolerance: float = TOLERANCE
) -> Line:
    """By the largest difference, relative to the largest value."""
    found, expected = (torch.as_tensor(value).detach().cpu() for value in (found, expected))
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    return name, f"differs by {error:.1e}", f"{tolerance:g}", error < tolerance


def losses(check: Check, kind: str) -> tuple[Tensor, Tensor]:
    """Loss and gradients of a small model, there and on the CPU, as one tensor each."""
    args = parse(kind, "mae_vit_tiny_patch16")
    torch.manual_seed(1)
    model, imgs = build_model(args), torch.randn(8, 3, 224, 224)
    found = []
    for device in (check.device, torch.device("cpu")):
        there = copy.deepcopy(model).to(device)
        with same_draws():
            loss = total_loss(there(imgs.to(device), mask_ratio=args.mask_ratio), args)["loss"]
        loss.backward()
        gradients = [p.grad.norm().cpu() for p in there.parameters() if p.grad is not None]
        found.append(torch.stack([loss.detach().cpu(), *gradients]))
    return found[0], found[1]


def neighbours(rows: Tensor) -> Tensor:
    labels = torch.arange(len(rows), device=rows.device) % 7
    return torch.tensor(knn_accuracy(Features(rows, labels), Features(rows, labels)))


def waits(check: Check) -> Iterator[Line]:
    """Forward, losses and backward without the host waiting for the GPU."""
    precision = Precision("bf16", check.device)
    args = parse("CAN", f"mae_vit_{check.model}")
    model = build_model(args).to(check.device)
    imgs = torch.randn(4, 3, 224, 224, device=check.device)
    backward(model, imgs, args, precision)
    if not check.on_gpu:
        yield "waits of the host", "only a GPU has them", "", None
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward(model, imgs, args, precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield "waits of the host", "none", "none", True


def half_of_a_batch(rank: int, port: int, device: str, rows: Tensor, path: str) -> None:
    """The gradient of NT-Xent for one process's half of the rows, of two processes."""
    there = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    backend = "nccl" if device == "cuda" else "gloo"
    place = {"init_method": f"tcp://localhost:{port}", "rank": rank, "world_size": 2}
    dist.init_process_group(backend, **place)
    own = rows.chunk(2, dim=1)[rank].flatten(0, 1).to(there).requires_grad_()
    (nt_xent(own)[0] / 2).backward()
    torch.save(own.grad.cpu(), f"{path}/{rank}.pth")
    dist.destroy_process_group()


def two_ranks(check: Check) -> Iterator[Line]:
    """Two processes compute one's gradient, over nccl or gloo."""
    if check.on_gpu and torch.cuda.device_count() < 2:
        yield "gradient of two ranks", "there is one GPU", "", None
        return
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(2, 64, 128), dim=-1)  # views, images
    whole = rows.flatten(0, 1).requires_grad_()
    nt_xent(whole)[0].backward()
    with tempfile.TemporaryDirectory() as folder:
        port = 20000 + os.getpid() % 10000
        start_processes(half_of_a_batch, (port, check.device.type, rows, folder), 2)
        halves = [torch.load(f"{folder}/{rank}.pth").unflatten(0, (2, -1)) for rank in (0, 1)]
    yield same("gradient of two ranks", torch.cat(halves, dim=1).flatten(0, 1), whole.grad)


def resume(check: Check) -> Iterator[Line]:
    """Runs that are stopped and resumed end where one that nothing happened to ends."""
    device = check.device.type
    with tempfile.TemporaryDirectory() as folder:
        whole = run_script(device, f"{folder}/whole", *RUN)[-1]["train_loss"]
        for number in (signal.SIGTERM, signal.SIGKILL):
            out = f"{folder}/{number.name}"
            run_script(device, out, *RUN, "--save_freq", "1", stop=number)
            again = run_script(device, out, *RUN, "--resume", "auto")[-1]["train_loss"]
            yield same(f"loss after {number.name}", again, whole, ROUGH)


def compiled(check: Check) -> Iterator[Line]:
    """`--compile`: the same losses."""
    flags, device = [*RUN, "--epochs", "2"], check.device.type
    with tempfile.TemporaryDirectory() as folder:
        eager = run_script(device, f"{folder}/eager", *flags)[-1]["train_loss"]
        fast = run_script(device, f"{folder}/compiled", *flags, "--compile")[-1]["train_loss"]
    yield same("loss with --compile", fast, eager, ROUGH)


def rates(check: Check) -> Iterator[Line]:
    """Steps in bf16, as a share of the matrix product's measured rate; and their memory."""
    precision = Precision("bf16", check.device)
    for size, batch in check.sizes.items():
        for kind, aim in RATES.items():
            name, options = f"mae_vit_{size}", argparse.Namespace(grad_checkpointing=False)
            options.model, options.batch_size = name, batch
            step = training_step(kind, precision, options)
            seconds, product = beside_matmul(step, precision)
            share = step_flops(kind, name) * batch / seconds / product
            gib = peak_memory(step, check.device) / 2**30
            images = f"{batch / seconds:.1f} images/s, {gib:.1f} GiB"
            where = f"{kind} {size}, of matmul"
            yield where, f"{share:.0%} ({images})", f"{aim:.0%}", share >= aim
            del step
            if check.on_gpu:
                torch.cuda.empty_cache()


def augmentation(check: Check) -> Iterator[Line]:
    """Two views of a batch, beside a step's time."""
    torch.manual_seed(0)
    parameters = torch.stack([draw_parameters() for _ in range(check.batch)])
    crops = (255 * torch.rand(check.batch, 3, 224, 224)).byte().to(check.device)
    options = argparse.Namespace(model=f"mae_vit_{check.model}", batch_size=check.batch)
    options.grad_checkpointing = False
    runs = {"step": training_step("CAN", Precision("bf16", check.device), options)}
    for name, fast in (("eager", False), ("compiled", True))[: 1 + check.on_gpu]:
        runs[name] = lambda fast=fast: [augment(crops, parameters, compiled=fast) for _ in range(2)]
    seconds = measure(runs, check.device)
    for name in list(runs)[1:]:
        share = seconds[name] / seconds["step"]
        value = f"{1e3 * seconds[name]:.1f} ms, {share:.0%} of a step"
        yield f"augmentation, {name}", value, f"{AUGMENTATION:.0%}", share <= AUGMENTATION


def data(check: Check) -> Iterator[Line]:
    """main_pretrain.py on JPEGs: how long it waits for images; and the loader alone."""
    # Enough that the pause at an epoch's beginning, when nothing is read ahead, does not count.
    encoded, steps = photo(*FILES[0]), 200 if check.on_gpu else 6
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "images").mkdir()
        first = Path(folder, "images", "0.jpg")
        first.write_bytes(encoded)
        for i in range(1, steps * check.batch):
            os.link(first, first.with_stem(str(i)))
        flags = ["--data_path", f"{folder}/images", "--model", f"mae_vit_{check.model}"]
        flags += ["--batch_size", str(check.batch), "--num_workers", str(check.workers)]
        flags += ["--epochs", "2", "--warmup_epochs", "0"]
        last = run_script(check.device.type, f"{folder}/out", *flags)[-1]
        rate = f"{last['train_images_per_second']:.0f} images/s"
        share = last["train_data_wait"]
        yield "waiting for images", f"{share:.1%} ({rate})", f"{WAIT:.0%}", share <= WAIT
        args = pretrain_parser().parse_args([*flags, "--output_dir", ""])
        alone = loader_rate(args, check.device)
        yield f"loader, {check.workers} processes", f"{alone:.0f} images/s", "", None


def contrast(check: Check) -> Iterator[Line]:
    """NT-Xent, forward and backward."""
    for count in (8192, 32768) if check.on_gpu else (1024,):
        rows = F.normalize(torch.randn(count, 128, device=check.device), dim=1).requires_grad_()
        seconds = measure({"": lambda rows=rows: nt_xent(rows)[0].backward()}, check.device)[""]
        yield f"NT-Xent of {count:,}", f"{1e3 * seconds:.1f} ms", "", None


def saving(check: Check) -> Iterator[Line]:
    """How long a copy of a state of 1.3 GB holds up training; the first also finds its memory."""
    state, holder = state_of(110_000_000 if check.on_gpu else 1_000_000, check.device), HostCopy()
    for name in ("first", "later"):
        begin = time.perf_counter()
        holder.take(state)
        stall = time.perf_counter() - begin
        aim, reached = (f"{STALL} s", stall <= STALL) if name == "later" else ("", None)
        yield f"stall by a save, {name}", f"{stall:.2f} s", aim, reached


CHECKS: dict[str, Callable[[Check], Iterator[Line]]] = {
    "versions": versions, "parts": parts, "waits": waits, "two_ranks": two_ranks,
    "resume": resume, "compiled": compiled, "rates": rates, "augmentation": augmentation,
    "data": data, "contrast": contrast, "saving": saving,
}  # fmt: skip


def lines_of(name: str, check: Check) -> Iterator[dict[str, str]]:
    """A check's lines, or at its first error that."""
    try:
        for what, value, aim, reached in CHECKS[name](check):
            verdict = {True: "pass", False: "miss", None: ""}[reached]
            yield {"check": name, "what": what, "value": value, "aim": aim, "verdict": verdict}
    except Exception as error:
        words = (str(error) or type(error).__name__).strip().splitlines()[0]
        yield {"check": name, "what": name, "value": words, "aim": "", "verdict": "error"}


def main(options: argparse.Namespace) -> int:
    if options.device == "cpu":
        torch.set_num_threads(1)
    check, found = Check(options.device), []
    print("| | | aim | |\n|---|---|---|---|")
    for name in options.only:
        for line in lines_of(name, check):
            found.append(line)
            value = line["value"].replace("\n", "<br>").replace("|", "/")
            print(f"| {line['what']} | {value} | {line['aim']} | {line['verdict']} |", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    verdicts = [line["verdict"] for line in found]
    print(", ".join(f"{verdicts.count(v)} {v}" for v in ("pass", "miss", "error")))
    return int("error" in verdicts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--json", help="file to write the lines to, too")
    sys.exit(main(parser.parse_args()))
