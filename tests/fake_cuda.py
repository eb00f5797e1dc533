"""CUDA where there is none: its tensors are fake, without values; those on the CPU are real.

with fake_cuda() as waits:
    run_main(main_pretrain, "--device", "cuda", ...)

An operation on tensors of two devices raises. Whatever would make the host wait for a GPU is
counted in `waits`, by kind and by the innermost function of ours. Gradients are zeros, values that
are read are ones; streams, events and nccl are stand-ins.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from conftest import ROOT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Operations whose result has a size, or is a number, that the host must know.
WAITING = ("bincount", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave")
WAITING += ("_unique2", "unique_consecutive", "unique_dim")


class FakeCuda(TorchDispatchMode):
    """Runs operations on fake tensors where a GPU's are among them.

    Attributes:
        waits: how often the host would wait, by (kind, function).
        moved: bytes that operations on the GPU read and write, as often as they do.
        calls: their number.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: Counter[tuple[str, str]] = Counter()
        self.moved = self.calls = 0

    def wait(self, kind: str) -> None:
        frame, tests = sys._getframe(1), str(ROOT / "tests")
        while frame:
            file = frame.f_code.co_filename
            inner = frame.f_code.co_name.startswith("<")  # a comprehension, until Python 3.11
            if file.startswith(str(ROOT)) and not (inner or file.startswith(tests)):
                break
            frame = frame.f_back
        place = f"{file[len(str(ROOT)) + 1 :]}:{frame.f_code.co_name}" if frame else "the test"
        self.waits[kind, place] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        fakes = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if not fakes and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        op, name = func.overloadpacket, func.overloadpacket.__name__
        if op is aten._local_scalar_dense:
            self.wait("a number")
            return torch.ones((), dtype=args[0].dtype).item()
        if op in (aten._to_copy, aten.copy_):
            source = args[0] if op is aten._to_copy else args[1]
            target = device or args[0].device
            asynchronous = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if source.device.type != target.type and not asynchronous:
                self.wait(f"a copy to {target.type}")
            if target.type == "cpu":
                ones = torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
                return ones if op is aten._to_copy else args[0].copy_(ones)
        if device is not None and device.type == "cpu":  # as `empty_like` of one on the GPU
            return torch.empty(fakes[0].shape, dtype=kwargs.get("dtype") or fakes[0].dtype)
        if name == "_fused_sgd_":  # torch has no fake one
            return None
        if name in WAITING:
            self.wait(name)
        if name in ("index", "index_put", "index_put_"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.wait("a mask as index")
            elif any(index.device.type == "cpu" for index in indices):
                self.wait("an index on the CPU")
            elif name != "index" and args[2].device.type == "cpu":
                self.wait("a value on the CPU")
        with self.fake:
            found = func(*args, **kwargs)
        if func.namespace == "aten" and not func.is_view:
            self.calls += 1
            touched = [*fakes, *tree_leaves(found)]
            on_gpu = [t for t in touched if isinstance(t, Tensor) and t.is_cuda]
            self.moved += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in on_gpu)
        return found


class Stand(nn.Module):
    """In place of DistributedDataParallel, on one process."""

    def __init__(self, module: nn.Module, **_: object):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def no_sync(self):
        return contextlib.nullcontext()


asked: Counter[str] = Counter()  # of streams and events, by method, since the last `fake_cuda`


class Nothing:
    """In place of streams and events: whatever is asked of it is done, and counted."""

    def __init__(self, *_: object, **__: object):
        pass

    def query(self) -> bool:
        return True

    def __getattr__(self, name: str):
        return lambda *_, **__: asked.update([name])


def backward(loss: Tensor, *_: object, **__: object) -> None:
    """Zeros for every parameter that a loss depends on; torch's engine asks the driver."""
    seen, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaf.grad = torch.zeros_like(leaf)
        ahead += [before for before, _ in node.next_functions]


CUDA = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda _: None,
    "synchronize": lambda *_: None,
    "is_initialized": lambda: False,
    "is_current_stream_capturing": lambda: False,
    "is_bf16_supported": lambda **_: True,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_name": lambda *_: "fake",
    "mem_get_info": lambda *_: (8 * 10**10, 8 * 10**10),
    "max_memory_allocated": lambda *_: 0,
    "memory_allocated": lambda *_: 0,
    "memory_reserved": lambda *_: 0,
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
    "set_sync_debug_mode": lambda _: None,
    "manual_seed_all": lambda _: None,
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda *_: None,
    "_lazy_init": lambda: None,
    "Stream": Nothing,
    "Event": Nothing,
    "current_stream": Nothing,
    "stream": lambda _: contextlib.nullcontext(),
}
TENSOR = {
    "backward": backward,
    "record_stream": lambda *_: asked.update(["record_stream"]),
    "pin_memory": lambda self, *_: self,
    "new_tensor": lambda self, data: torch.tensor(data, dtype=self.dtype).to(self.device),
}


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    init = dist.init_process_group

    def over_gloo(backend: str, device_id: torch.device | None = None, **kwargs: object) -> None:
        assert (backend, device_id) == ("nccl", torch.device("cuda", 0))
        init("gloo", **kwargs)

    mode = FakeCuda()
    asked.clear()
    with contextlib.ExitStack() as stack:
        replace = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        for name, value in CUDA.items():
            replace(torch.cuda, name, value)
        for name, value in TENSOR.items():
            replace(Tensor, name, value)
        replace(dist, "init_process_group", over_gloo)
        stack.enter_context(mock.patch("util.run.training.DistributedDataParallel", Stand))
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(mode)
        yield mode
