"""The number format of the forward pass; parameters, optimiser and losses stay float32."""

import torch
from timm.layers import set_fused_attn


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `--precision` means on a device.

    Args:
        name: auto, bf16, fp16 or fp32. auto is bf16 where the device computes it natively
            (NVIDIA from Ampere on, CPUs with AMX or AVX512-BF16), fp16 on older GPUs, else fp32.
    """
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    questions = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # torch has no public ones
    native = any(getattr(torch.cpu, question, bool)() for question in questions)
    return torch.bfloat16 if native else torch.float32


def choose_attention(dtype: torch.dtype) -> None:
    """Which attention the models built from now on have on a CPU.

    In 16 bits torch's fused one is slow there (mostly its backward pass): matrix products and a
    softmax take three quarters of a ViT-B/16 step's time, for a fifth more memory.
    """
    set_fused_attn(enable=dtype == torch.float32)


class Precision:
    """Autocast and loss scaling of one run.

    `autocast()` is the context of a forward pass; `scaler` does nothing but for float16.
    """

    def __init__(self, name: str, device: torch.device):
        self.device = device
        self.dtype = resolve_precision(name, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")
