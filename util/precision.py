"""The number format of the forward pass; parameters, optimizer and losses stay float32."""

import ctypes
import logging

import torch
from timm.layers import set_fused_attn

from util.distributed import is_main_process, max_over_ranks

logger = logging.getLogger(__name__)

FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CAPABILITY = list(FORMATS.values())  # what `auto` prefers, last
_unfused = False  # attention, by `choose_attention`


def native_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes it itself (NVIDIA from Ampere on, CPUs with AMX or
    AVX512-BF16), float16 on older GPUs, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    questions = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # torch has no public ones
    native = any(getattr(torch.cpu, question, bool)() for question in questions)
    return torch.bfloat16 if native else torch.float32


def common_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `--precision` means: auto is the least capable process's native one, for all.

    Ranks of other formats would scale losses by other factors, and drift apart.
    """
    own = CAPABILITY.index(native_precision(device))
    least, most = -max_over_ranks(-own), max_over_ranks(own)
    common, best = (str(CAPABILITY[place]).removeprefix("torch.") for place in (least, most))
    dtype = FORMATS.get(name, CAPABILITY[least])
    warning = ""
    if name == "auto" and least < most:
        warning = f"warning: not all processes compute in {best}: all use {common}"
    elif CAPABILITY.index(dtype) > least:
        warning = f"warning: --precision {name} is emulated, and slow: auto takes {common}"
    elif name == "fp16" and device.type == "cpu":  # few compute it, and torch does not tell which
        warning = f"warning: --precision fp16 is slow on most CPUs: auto takes {common}"
    if warning and is_main_process():
        logger.warning(warning)
    return dtype


def choose_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Chooses the attention of models that are built from now on.

    torch's fused attention is slow on CPUs in 16 bits, mostly in its backward pass: with matrix
    products and a softmax a ViT-B/16 step takes three quarters of the time and a fifth more memory.
    """
    global _unfused
    before, _unfused = _unfused, device.type == "cpu" and dtype != torch.float32
    if _unfused != before:  # else it is as timm, or its user, has set it
        set_fused_attn(enable=not _unfused)


def keep_freed_memory() -> None:
    """Lets this process reuse the memory that it frees, where its C library is glibc.

    By default glibc returns large blocks to the system, which clears every page before it hands
    them out again: up to a fifth of a training step's time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(ctypes.c_int(-3), ctypes.c_int(2**30))  # M_MMAP_THRESHOLD, bytes
        mallopt(ctypes.c_int(-1), ctypes.c_int(-1))  # M_TRIM_THRESHOLD: never


class Precision:
    """Autocast and loss scaling of one run; to be made before the model, on every rank.

    On a CPU this also makes this process's steps fast: see `choose_attention` and
    `keep_freed_memory`.

    Attributes:
        device, dtype: where and in which format forward passes run.
        scaler: scales losses in float16, and does nothing otherwise.
    """

    def __init__(self, name: str, device: torch.device):
        self.device = device
        self.dtype = common_precision(name, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        choose_attention(device, self.dtype)
        if device.type == "cpu":
            keep_freed_memory()

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")
