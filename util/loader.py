"""Batches that arrive on the training device, ready for the model."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader


class DeviceLoader(DataLoader):
    """A loader of (inputs, labels) whose inputs are on the device.

    On a GPU they are copied and finished on a stream of their own. Nothing waits for it but the
    step that needs them; while the host runs ahead, that work overlaps with the step before.

    Args:
        device: where the inputs go.
        finish: makes the device's inputs of the data set's; what it does to them on the GPU
            happens on the loader's stream. If not given, inputs are copied as they are.
    """

    def __init__(
        self,
        *args: Any,
        device: torch.device,
        finish: Callable[[Any, torch.device], Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.device, self.finish = device, finish or to_device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for inputs, labels in super().__iter__():
            if self.stream is None:
                yield self.finish(inputs, self.device), labels
                continue
            with torch.cuda.stream(self.stream):
                inputs = self.finish(inputs, self.device)
            compute = torch.cuda.current_stream(self.device)
            compute.wait_stream(self.stream)
            for tensor in inputs if isinstance(inputs, list | tuple) else [inputs]:
                tensor.record_stream(compute)  # its memory is not free before the step is done
            yield inputs, labels


def to_device(inputs: Any, device: torch.device) -> Any:
    """A tensor, or a list or tuple of them, copied without waiting where memory is pinned."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    return [to_device(part, device) for part in inputs]
