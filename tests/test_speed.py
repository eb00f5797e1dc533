"""What keeps a processor busy: compiling once, not waiting in accumulation, using memory again."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from functools import partialmethod

import pytest
import torch
from conftest import ROOT, TINY, run_main
from timm.layers import use_fused_attn
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import main_pretrain
from model_mae import MaskedAutoencoderViT
from util.precision import choose_attention

FLAGS = [*TINY, "--batch_size", 4, "--accum_iter", 2]


@pytest.mark.parametrize(
    "objective",
    [[], ["--weight_simclr", 0, "--weight_mae", 1], ["--weight_mae", 0, "--weight_simclr", 1]],
    ids=["CAN", "MAE", "SimCLR"],
)
def test_accumulation_evaluation_and_preview_share_one_compiled_graph(
    objective, photos, tmp_path, monkeypatch
):
    # "aot_eager" generates no code, which would take minutes: graphs come from the tracing before.
    compile_whole = partialmethod(nn.Module.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(MaskedAutoencoderViT, "compile", compile_whole)
    torch._dynamo.reset()
    counters.clear()
    flags = [*FLAGS, "--data_path", photos, *objective, "--epochs", 2, "--eval_freq", 1]
    assert run_main(main_pretrain, *flags, "--output_dir", tmp_path, "--compile") == 0
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_model_that_recomputes_activations_is_not_split(photos, monkeypatch):
    """torch 2.6 fails to split it among DDP's buckets."""
    split = []

    def compiled(self) -> None:
        split.append(torch._dynamo.config.optimize_ddp)

    monkeypatch.setattr(MaskedAutoencoderViT, "compile", compiled)
    flags = [*TINY, "--data_path", photos, "--batch_size", 4, "--output_dir", "", "--compile"]
    before = torch._dynamo.config.optimize_ddp
    try:
        for more in ([], ["--grad_checkpointing"]):
            assert run_main(main_pretrain, *flags, "--epochs", 1, "--warmup_epochs", 0, *more) == 0
    finally:
        torch._dynamo.config.optimize_ddp = before
    assert split == [before, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_accumulated_gradients_are_not_waited_for(precision, photos, monkeypatch):
    windows = []

    @contextlib.contextmanager
    def watched(self, no_sync=DistributedDataParallel.no_sync) -> Iterator[None]:
        with no_sync(self):
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield  # forward, losses, backward
            finally:
                torch.cuda.set_sync_debug_mode("default")
        windows.append(self)

    monkeypatch.setattr(DistributedDataParallel, "no_sync", watched)
    flags = [*FLAGS, "--data_path", photos, "--epochs", 1, "--output_dir", ""]
    assert run_main(main_pretrain, *flags, "--device", "cuda", "--precision", precision) == 0
    assert len(windows) == 6  # of 48 images, each second batch of 4


@pytest.mark.parametrize(("precision", "fused"), [("fp32", True), ("bf16", False)])
def test_attention_on_cpus(precision, fused, photos, monkeypatch):
    seen = set()

    def forward(self, imgs, mask_ratio, run=MaskedAutoencoderViT.forward):
        seen.update(block.attn.fused_attn for block in self.blocks)
        return run(self, imgs, mask_ratio)

    monkeypatch.setattr(MaskedAutoencoderViT, "forward", forward)
    flags = [*FLAGS, "--data_path", photos, "--epochs", 1, "--output_dir", ""]
    assert run_main(main_pretrain, *flags, "--device", "cpu", "--precision", precision) == 0
    assert seen == {fused}


def test_attention_on_gpus_is_fused_whatever_ran_before():
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.bfloat16)):
        choose_attention(torch.device(device), dtype)
        assert use_fused_attn() == (device == "cuda")


def test_freed_memory_is_used_again():
    program = """
import resource, torch
from util.precision import keep_freed_memory

def page_faults(block=2**28):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(block, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = page_faults()
keep_freed_memory()
page_faults()
print(first, page_faults())
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    given_back, kept = map(int, result.stdout.split())
    assert kept < 0.01 * given_back  # pages that the system had to clear
