"""How products over few rows may be cut. Which of these is fast on a device is for `passes.tuning` to measure."""

from __future__ import annotations

from collections.abc import Iterator

from dendrite.engine.kernels.linear import Tiling

FEW = 16
"""Rows that one step of a matrix unit takes along; more go through the BLAS."""
SHORTEST_BLOCK = 64


def bucket_of(num_rows: int) -> int | None:
    """Numbers of rows that share their tilings: 1, or up to `FEW`, named by the largest; None for more."""
    return 1 if num_rows == 1 else FEW if num_rows <= FEW else None


def tilings_for(bucket: int, depth: int, *, is_gated: bool) -> Iterator[Tiling]:
    """Ways to cut a product over `depth` inputs, the likeliest first; none where blocks would be too short."""
    longest = depth & -depth  # the largest power of two that divides it
    if longest < SHORTEST_BLOCK:
        return
    if bucket == 1:
        for elements, block_k in ((4096, 1024), (4096, 2048)):
            block = min(longest, block_k)
            outputs = max(elements // block // (2 if is_gated else 1), 1)
            yield Tiling(block_n=outputs, block_k=block, num_warps=4, num_stages=1)
        return
    for block_n, block_k, num_stages in ((64, 128, 5), (32, 256, 4)):
        block = min(longest, block_k)
        stages = (num_stages + 1) // 2 if is_gated else num_stages  # gate and up share the memory
        yield Tiling(block_n=block_n, block_k=block, num_warps=4, num_stages=stages, ahead=min(1024, longest * 2))
