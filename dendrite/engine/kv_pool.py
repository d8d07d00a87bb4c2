"""The K/V tensors: one flat pool of slots for all layers, addressed by slot number.

    block      0 (trash)            1                      2
    slot       0 1 2 .. 15         16 17 .. 31            32 33 .. 47         slot = block_id * block_size + offset
    data       [num_layers, 2, num_kv_heads, num_slots, head_dim]             K at index 0, V at index 1

Heads come before slots, so that a contiguous run of slots is, for each head, one contiguous matrix: attention reads a
long shared segment as a view, without a copy. Which blocks are free, and who owns them, is the tree's business.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from dendrite.engine.errors import RequestError
from dendrite.engine.ids import BlockId
from dendrite.engine.spec import ModelSpec

_MAX_DEFAULT_BYTES = 4 << 30
DEVICE_SHARE = 0.85
"""Of a CUDA device's free memory, what the pool takes unless it is told; activations and graphs take the rest."""
DEVICE_RESERVE = 1 << 30
"""Bytes of a CUDA device that are left free at least."""


class KVPool:
    """Keys and values of every layer, `num_blocks` usable blocks and the trash block before them."""

    def __init__(self, spec: ModelSpec, *, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        num_slots = (num_blocks + 1) * block_size
        shape = (spec.num_layers, 2, spec.num_kv_heads, num_slots, spec.head_dim)
        self.data = _zeros(shape, getattr(torch, spec.dtype), device)
        """[num_layers, 2, num_kv_heads, num_slots, head_dim]"""
        self.layers: tuple[Tensor, ...] = tuple(self.data)
        """One view per layer, [2, num_kv_heads, num_slots, head_dim]; made once because views cost time in a step."""
        self.layer_blocks: tuple[Tensor, ...] = tuple(self.data.view(*shape[:3], num_blocks + 1, -1))
        """The same memory by block: [2, num_kv_heads, num_blocks + 1, block_size * head_dim]."""
        self._factors: Tensor | None = None  # of `digests`, made when somebody asks

    def close(self) -> None:
        """Give the memory back, whoever still holds the pool."""
        self.data = self.data.new_empty(0)
        self.layers = self.layer_blocks = ()

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Keep the K/V of the step's rows.

        Args:
            layer: which layer's K/V it is.
            slots: [num_rows], int64.
            kv: [num_rows, 2, num_kv_heads, head_dim].
        """
        self.layers[layer].index_copy_(2, slots, kv.permute(1, 2, 0, 3))

    def copy_blocks(self, copies: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Copy whole blocks of all layers, `(source, destination)`; every source is read before anything is written."""
        if not copies:
            return
        sources, destinations = self.numbers([list(side) for side in zip(*copies, strict=True)])
        is_chained = not {source for source, _ in copies}.isdisjoint({destination for _, destination in copies})
        if self.data.is_cuda and not is_chained and find_spec("triton") is not None:
            from dendrite.engine.kernels.blocks import copy_blocks  # noqa: PLC0415 - only GPUs have Triton

            copy_blocks(self.data, sources, destinations, self.block_size)
            return
        blocks = self.data.unflatten(3, (self.num_blocks + 1, self.block_size))
        blocks.index_copy_(3, destinations, blocks.index_select(3, sources))

    def numbers(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Integers on the pool's device, on their way: a copy that is waited for would wait for the step in flight."""
        pinned = torch.tensor(values, dtype=torch.int64, pin_memory=self.data.is_cuda)
        return pinned.to(self.data.device, non_blocking=True)

    def digests(self, block_ids: Sequence[BlockId]) -> list[int]:
        """A sum over each block's K/V of all layers, modulo 2**64: each word times an odd number of its own.

        An odd factor is invertible, so that no change of one word goes unnoticed.
        """
        words = _as_words(self.data.view(*self.data.shape[:3], self.num_blocks + 1, -1))
        factors = self._factors
        if factors is None:
            shape = (*words.shape[:3], 1, words.shape[4])
            drawn = torch.randint(1 << 62, shape, generator=torch.Generator().manual_seed(0))
            factors = self._factors = (2 * drawn + 1).to(self.data.device)
        chosen = words.index_select(3, torch.tensor(block_ids, dtype=torch.int64, device=self.data.device))
        sums: list[int] = (chosen * factors).sum((0, 1, 2, 4)).tolist()
        return sums


def _as_words(data: Tensor) -> Tensor:
    """The same memory as the widest whole numbers that the last dimension divides into."""
    num_bytes = data.shape[-1] * data.dtype.itemsize
    widest = next(kind for kind in (torch.int64, torch.int32, torch.int16) if num_bytes % kind.itemsize == 0)
    return data.view(widest)


def num_blocks_for(
    spec: ModelSpec, *, kv_memory: int | None, block_size: int, device: torch.device | None = None
) -> int:
    """How many usable blocks fit into `kv_memory` bytes of the device, the CPU unless it is given.

    On a CUDA device None takes most of what is free. On the CPU it takes a quarter of the memory that is available now,
    at most 4 GiB; a pool that could not hold one full context that way may grow to hold it, up to half of what is
    available.

    Raises:
        RequestError: `kv_memory` or `block_size` is too small to hold a single block, or more than is free.
    """
    if block_size < 1:
        raise RequestError(f"block_size must be at least 1, not {block_size}")
    block_bytes = block_size * spec.bytes_per_token
    if device is not None and device.type == "cuda":
        kv_memory = _device_bytes(kv_memory, device)
    elif kv_memory is None:
        kv_memory = _default_bytes(block_bytes * -(-spec.context_length // block_size), _available_bytes())
    num_blocks = kv_memory // block_bytes - 1
    if num_blocks < 1:
        raise RequestError(
            f"kv_memory of {kv_memory} bytes is too small for this model: two blocks (one is set aside) of "
            f"{block_size} tokens take {2 * block_bytes} bytes"
        )
    return num_blocks


def default_swap_bytes(pool_bytes: int) -> int:
    """Host memory for K/V that has left the pool: four pools, at most a quarter of what is available now."""
    return min(4 * pool_bytes, _available_bytes() // 4)


def _device_bytes(kv_memory: int | None, device: torch.device) -> int:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if kv_memory is None:
        return max(0, min(int(free * DEVICE_SHARE), free - DEVICE_RESERVE))
    if kv_memory > free:
        raise RequestError(f"kv_memory of {kv_memory} bytes is more than the {free} that are free on {device}")
    return kv_memory


def _default_bytes(context_bytes: int, available: int) -> int:
    usual = min(available // 4, _MAX_DEFAULT_BYTES)
    return max(usual, context_bytes) if context_bytes <= available // 2 else usual


def _available_bytes() -> int:
    """Memory that can be taken without swapping, the container's limit included where there is one."""
    available = _system_available_bytes()
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(available, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no cgroup, or the limit reads "max"
        return available


def _system_available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return _MAX_DEFAULT_BYTES


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory only once they are written, where the system can do that.

    `torch.zeros` touches every page, which takes seconds for a pool of gigabytes; `torch.empty` may hand out NaNs.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(shape)
