"""Where work is launched: on a stream of a CUDA device, in order and without waiting.

On the CPU, where Triton's interpreter runs the same kernels for tests, a launch is done when it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor


class Launcher:
    """One engine's stream, and memory that copies from and to the device need not wait for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.is_cuda else None

    def launching(self) -> AbstractContextManager[object]:
        """While it is entered, what this thread does on the device goes to the stream."""
        return torch.cuda.stream(self.stream)

    def staged(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros in pinned memory, which PyTorch keeps and hands out again when copies of it are done."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self.is_cuda)

    def to_device(self, staged: Tensor) -> Tensor:
        """A copy on the device, on its way."""
        return staged.to(self.device, non_blocking=True)

    def to_host(self, values: Tensor) -> Tensor:
        """A copy in pinned memory, on its way; `mark` tells when it is there."""
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=self.is_cuda).copy_(values, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        """What waits until all that has been launched so far is done."""
        if not self.is_cuda:
            return _nothing
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    def synchronize(self) -> None:
        """Wait for everything."""
        if self.stream is not None:
            self.stream.synchronize()


def _nothing() -> None:
    pass
