"""Where work is launched: on a stream of a CUDA device, in order and without waiting.

On the CPU, where Triton's interpreter runs the same kernels for tests, a launch is done when it returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

_NOTHING = nullcontext()


class Launcher:
    """One engine's stream, and memory that copies from and to the device need not wait for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.is_cuda else None
        self._entered = threading.local()

    def launching(self) -> AbstractContextManager[object]:
        """While it is entered, what this thread does on the device goes to the stream; entering it again is free."""
        return _NOTHING if self.stream is None or hasattr(self._entered, "stream") else self._launching()

    @contextmanager
    def _launching(self) -> Iterator[None]:
        with torch.cuda.stream(self.stream):
            self._entered.stream = self.stream
            try:
                yield
            finally:
                del self._entered.stream

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


class Staging:
    """Two pinned buffers in turn before a static one: one is filled while the other's copy may still be on its way."""

    def __init__(self, static: Tensor) -> None:
        self._static = static.view(-1)
        self._pinned = [torch.zeros(static.shape, dtype=static.dtype, pin_memory=static.is_cuda) for _ in range(2)]
        self._arrays = [buffer.numpy() for buffer in self._pinned]
        self._copied = [torch.cuda.Event(), torch.cuda.Event()] if static.is_cuda else []
        self._parts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # views, which take as long to make as to copy
        self._turn = 0

    def array(self) -> NDArray[Any]:
        """The buffer to fill, of the static one's shape; it holds what it was filled with two copies ago."""
        self._turn ^= 1
        if self._copied:
            self._copied[self._turn].synchronize()
        return self._arrays[self._turn]

    def send(self, num: int) -> None:
        """Copy the first `num` numbers of what was filled, on the current stream, and maybe some of those behind."""
        key = (self._turn, min(1 << num.bit_length(), self._static.numel()))
        parts = self._parts.get(key)
        if parts is None:
            parts = self._parts[key] = (self._static[: key[1]], self._pinned[self._turn].view(-1)[: key[1]])
        parts[0].copy_(parts[1], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()


def _nothing() -> None:
    pass
