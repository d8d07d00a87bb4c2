"""Copying K/V blocks of all layers in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COPIED = 1024
"""Elements that one program copies."""


def copy_blocks(pool: Tensor, sources: Tensor, destinations: Tensor, block_size: int) -> None:
    """Copy whole blocks; no destination may be another copy's source.

    Args:
        pool: [num_layers, 2, num_kv_heads, num_slots, head_dim], contiguous; changed in place.
        sources: [num_copies] int64, block ids.
        destinations: the same.
        block_size: slots of a block.
    """
    num_layers, two, num_kv_heads, num_slots, head_dim = pool.shape
    length = block_size * head_dim
    grid = (len(sources), num_layers * two * num_kv_heads, triton.cdiv(length, COPIED))
    _copy_blocks[grid](pool, sources, destinations, num_slots * head_dim, LENGTH=length, COPIED=COPIED)


@triton.jit
def _copy_blocks(pool, sources, destinations, head_stride, LENGTH: tl.constexpr, COPIED: tl.constexpr):
    copy = tl.program_id(0)
    places = tl.program_id(2) * COPIED + tl.arange(0, COPIED)
    head = pool + tl.program_id(1).to(tl.int64) * head_stride + places
    source = tl.load(sources + copy) * LENGTH
    destination = tl.load(destinations + copy) * LENGTH
    tl.store(head + destination, tl.load(head + source, mask=places < LENGTH), mask=places < LENGTH)
