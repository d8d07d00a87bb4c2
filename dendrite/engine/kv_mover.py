"""Moves K/V between the pool, host memory and files. Which tokens go where is the swap space's business."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dendrite.engine.ids import BlockId
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.swap import Spans


class PoolMover:
    """`dendrite.engine.swap.KVMover` over a `KVPool`.

    On a GPU copies go through pinned memory on the current stream, behind the steps in flight; a copy that is read on
    the host (for a file) waits for the device first.
    """

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool

    def save(self, spans: Spans) -> Tensor:
        """The K/V of those slots in host memory, [num_layers, 2, num_kv_heads, num_tokens, head_dim]."""
        data = self._pool.data
        parts = torch.cat([data[:, :, :, first:last] for first, last in spans], dim=3)
        if data.device.type == "cpu":
            return parts
        host = torch.empty(parts.shape, dtype=parts.dtype, pin_memory=True)
        return host.copy_(parts, non_blocking=True)

    def load(self, saved: object, slots: Sequence[int]) -> None:
        """Puts the first tokens of a copy into the slots, one each."""
        assert isinstance(saved, Tensor)
        data = self._pool.data
        data.index_copy_(3, self._pool.numbers(slots), saved[:, :, :, : len(slots)].to(data.device, non_blocking=True))

    def copy_blocks(self, copies: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Copy whole blocks of all layers."""
        self._pool.copy_blocks(copies)

    def digests(self, block_ids: Sequence[BlockId]) -> list[int]:
        """The sum of each block's words, each times an odd number of its own: a changed word changes the sum."""
        return self._pool.digests(block_ids)

    def checksum(self, saved: object) -> int:
        """The CRC-32 of a copy's bytes."""
        assert isinstance(saved, Tensor)
        self.settle()
        raw = saved.contiguous().flatten().view(torch.uint8).numpy()
        return zlib.crc32(raw)  # type: ignore[arg-type] # torch's stub hides that an array is a buffer

    def write(self, saved: object, path: Path) -> None:
        """Write a copy to a safetensors file."""
        assert isinstance(saved, Tensor)
        self.settle()
        try:
            save_file({"kv": saved.contiguous()}, path)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    def read(self, path: Path) -> Tensor:
        """Read a copy from such a file."""
        try:
            return load_file(path)["kv"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def settle(self) -> None:
        """Wait until copies that a device is still making have arrived."""
        if self._pool.data.device.type == "cuda":
            torch.cuda.synchronize(self._pool.data.device)
