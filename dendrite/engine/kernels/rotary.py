"""Head norms, rope and the K/V append of a layer in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dendrite.engine.kernels.launch import overlap, power_of_two

HEADS = 4
"""Heads that one program takes."""


def rotate_and_keep(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor,
    slots: Tensor,
    kept: Tensor,
    head_norms: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """Rotate queries and keys, and keep keys and values in the pool.

    Args:
        qkv: [num_rows, (num_heads + 2 * num_kv_heads) * head_dim], contiguous: queries, keys, values; or sums still
            to be added, [num_parts, num_rows, ...], whose total is rounded to the dtype of `kept`.
        cos: [num_positions, head_dim / 2], contiguous; row p is for position p.
        sin: the same.
        positions: [num_rows] int64, below `num_positions`.
        slots: [num_rows] int64, where each row's K/V is kept; rows that share a slot leave either's.
        kept: the layer's part of the pool, [2, num_kv_heads, num_slots, head_dim]; written.
        head_norms: the norm weights [head_dim] of queries and of keys, and their epsilon (Qwen3).

    Returns:
        [num_rows, num_heads, head_dim], the rotated queries.
    """
    _, num_kv_heads, _, head_dim = kept.shape
    assert kept.stride(2) == head_dim
    assert kept.stride(3) == 1
    num_rows, width = qkv.shape[-2:]
    num_heads = width // head_dim - 2 * num_kv_heads
    query = torch.empty((num_rows, num_heads, head_dim), dtype=kept.dtype, device=qkv.device)
    query_norm, key_norm, epsilon = head_norms if head_norms is not None else (cos, cos, 0.0)
    _rotate_and_keep[(num_rows, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS))](
        qkv,
        cos,
        sin,
        positions,
        slots,
        query_norm,
        key_norm,
        query,
        kept,
        kept.stride(0),
        kept.stride(1),
        epsilon,
        NUM_PARTS=qkv.numel() // (num_rows * width),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF_BLOCK=power_of_two(head_dim // 2),
        HEAD_BLOCK=HEADS,
        HAS_NORMS=head_norms is not None,
        num_warps=1,
        **overlap(qkv.device),
    )
    return query


@triton.jit
def _rotate_and_keep(
    qkv,
    cos,
    sin,
    positions,
    slots,
    query_norm,
    key_norm,
    query,
    kept,
    kept_stride,  # from K to V
    head_stride,
    epsilon,
    NUM_PARTS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    HALF: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK))[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (column < HALF)
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    WIDTH: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    source = qkv + row * WIDTH + head * HEAD_DIM + column
    first = tl.load(source, mask=inside, other=0)
    second = tl.load(source + HALF, mask=inside, other=0)
    part_size = tl.num_programs(0).to(tl.int64) * WIDTH
    for part in tl.static_range(1, NUM_PARTS):
        first += tl.load(source + part * part_size, mask=inside, other=0)
        second += tl.load(source + part * part_size + HALF, mask=inside, other=0)
    first = first.to(query.dtype.element_ty)
    second = second.to(query.dtype.element_ty)
    slot = tl.load(slots + row).to(tl.int64)
    turn = tl.load(positions + row).to(tl.int64) * HALF + column
    cosine = tl.load(cos + turn, mask=column < HALF, other=0).to(tl.float32)
    sine = tl.load(sin + turn, mask=column < HALF, other=0).to(tl.float32)
    x = first.to(tl.float32)
    y = second.to(tl.float32)
    if HAS_NORMS:
        squares = tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)
        inverse = tl.rsqrt(squares / HEAD_DIM + epsilon)[:, None]
        in_half = (column < HALF) & (head >= 0)
        query_x = tl.load(query_norm + column, mask=column < HALF, other=0).to(tl.float32)
        query_y = tl.load(query_norm + HALF + column, mask=column < HALF, other=0).to(tl.float32)
        key_x = tl.load(key_norm + column, mask=column < HALF, other=0).to(tl.float32)
        key_y = tl.load(key_norm + HALF + column, mask=column < HALF, other=0).to(tl.float32)
        x = x * inverse * tl.where(is_query & in_half, query_x, key_x)
        y = y * inverse * tl.where(is_query & in_half, query_y, key_y)
    turned_x = (x * cosine - y * sine).to(query.dtype.element_ty)
    turned_y = (y * cosine + x * sine).to(query.dtype.element_ty)

    target = query + (row * NUM_HEADS + head) * HEAD_DIM + column
    tl.store(target, turned_x, mask=inside & is_query)
    tl.store(target + HALF, turned_y, mask=inside & is_query)
    kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
    target = kept + is_value.to(tl.int64) * kept_stride + kv_head.to(tl.int64) * head_stride + slot * HEAD_DIM + column
    tl.store(target, tl.where(is_value, first, turned_x), mask=inside & (head >= NUM_HEADS))
    tl.store(target + HALF, tl.where(is_value, second, turned_y), mask=inside & (head >= NUM_HEADS))
