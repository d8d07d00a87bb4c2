"""The kernels of the tree attention: a persistent one over a work list, and the merge of its partial results.

Both read what there is to do from `work`, a packed `WorkList` in device memory, so that one launch of a fixed grid, or
one captured graph, serves any tree. Softmax is online, in base 2 and float32 (FlashAttention: Dao, 2023; splitting over
keys with a log-sum-exp merge: Flash-Decoding, Dao et al., 2023).

Importing this needs Triton. Set TRITON_INTERPRET=1 before the first import to run the kernels on the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FLOOR = tl.constexpr(-1.0e30)
"""What a running maximum starts from: finite, so that a row that reads nothing yet never subtracts infinities."""


@triton.jit
def _accumulate(scores, values, top, total, output, is_seen, scale, PRECISION: tl.constexpr):
    """One block's online softmax: scores [M, N], values [N, D]; rows that are not `is_seen` [M] stay as they were.

    A row leaves a block out by an infinite shift, which costs nothing per score, where a mask would.
    """
    higher = tl.where(is_seen, tl.maximum(top, tl.max(scores, 1) * scale), top)
    shift = tl.where(is_seen, higher, float("inf"))
    weights = tl.math.exp2(scores * scale - shift[:, None])
    fade = tl.math.exp2(top - higher)
    total = total * fade + tl.sum(weights, 1)
    output = tl.dot(weights.to(values.dtype), values, output * fade[:, None], input_precision=PRECISION)
    return higher, total, output


@triton.jit
def attend_items(
    query,  # [num_rows, num_heads, head_dim], rows `query_stride` apart
    output,  # [num_rows, num_heads, head_dim], contiguous
    pool,  # [2, num_kv_heads, num_slots, head_dim] of one layer
    pool_tiles,  # tensor descriptor of the same memory as [2 * num_kv_heads * num_slots, head_dim], or None
    partials,  # float32 [max_partials, BLOCK_M, head_dim]
    partial_lse,  # float32 [max_partials, BLOCK_M], base 2
    work,  # int32, a packed WorkList
    scale,  # of scores, times log2(e)
    num_slots,
    query_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ENTRY_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each program attends its items: one tile's rows, one K/V head, a stretch of the tile's blocks of keys.

    What it reads of the work list was there before the kernel in front started: it reads ahead of waiting for it.
    """
    if PDL:
        gdc_launch_dependents()
    starts = work + 8 + tl.program_id(0)
    items = work + 9 + tl.num_programs(0)
    strips = work + tl.load(work + 3)
    entries = work + tl.load(work + 4)
    lane = tl.arange(0, BLOCK_M)
    row = lane // GROUP
    column = tl.arange(0, HEAD_DIM)
    key = tl.arange(0, BLOCK_N)
    offset = key % ENTRY_KEYS
    values_at = num_slots.to(tl.int64) * (NUM_KV_HEADS * HEAD_DIM)
    for index in range(tl.load(starts), tl.load(starts + 1)):
        item = items + index * 8
        row_start = tl.load(item)
        num_rows = tl.load(item + 1)
        head = tl.load(item + 2)
        first_block = tl.load(item + 3)
        last_block = tl.load(item + 4)
        first_gather = tl.load(item + 5)
        last_gather = tl.load(item + 6)
        partial = tl.load(item + 7)
        # Where blocks lie is read a block ahead, so that a block's loads do not wait for it.
        strip = strips + first_block * 2
        strip_slot = tl.load(strip, mask=first_block < last_block, other=0)
        strip_readers = tl.load(strip + 1, mask=first_block < last_block, other=0)
        entry = entries + (first_gather * (BLOCK_N // ENTRY_KEYS) + key // ENTRY_KEYS) * 2
        place = tl.load(entry, mask=first_gather < last_gather, other=0)
        readers = tl.load(entry + 1, mask=first_gather < last_gather, other=0)
        if PDL:
            gdc_wait()
        is_row = (row < num_rows) & (lane < GROUP * (BLOCK_M // GROUP))
        query_head = head * GROUP + lane % GROUP
        query_at = (row_start + row).to(tl.int64) * query_stride + query_head * HEAD_DIM
        queries = tl.load(query + query_at[:, None] + column[None, :], mask=is_row[:, None], other=0.0)
        top = tl.full([BLOCK_M], FLOOR, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        result = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        keys_of_head = pool + head.to(tl.int64) * num_slots * HEAD_DIM

        for block in tl.range(first_block, last_block, num_stages=STAGES):
            slot = strip_slot
            is_seen = is_row & (row >= (strip_readers & 255)) & (row < (strip_readers >> 8))
            strip += tl.where(block + 1 < last_block, 2, 0)
            strip_slot = tl.load(strip)
            strip_readers = tl.load(strip + 1)
            if USE_TILES:
                keys = pool_tiles.load([head * num_slots + slot, 0])
                values = pool_tiles.load([(NUM_KV_HEADS + head) * num_slots + slot, 0])
            else:
                at = keys_of_head + (slot + key).to(tl.int64)[:, None] * HEAD_DIM + column[None, :]
                keys = tl.load(at)
                values = tl.load(at + values_at)
            scores = tl.dot(queries, keys.T, input_precision=PRECISION)
            top, total, result = _accumulate(scores, values, top, total, result, is_seen, scale, PRECISION)

        for block in tl.range(first_gather, last_gather, num_stages=STAGES):
            slot = place // ENTRY_KEYS + tl.minimum(offset, place % ENTRY_KEYS)
            low = ((readers >> 8) & 255) + (readers >> 24) * offset
            high = tl.where(offset < (readers & 255), (readers >> 16) & 255, 0)
            entry += tl.where(block + 1 < last_gather, BLOCK_N // ENTRY_KEYS * 2, 0)
            place = tl.load(entry)
            readers = tl.load(entry + 1)
            at = keys_of_head + slot.to(tl.int64)[:, None] * HEAD_DIM + column[None, :]
            keys = tl.load(at)
            scores = tl.dot(queries, keys.T, input_precision=PRECISION)
            is_read = (row[:, None] >= low[None, :]) & (row[:, None] < high[None, :])
            scores = tl.where(is_read, scores, float("-inf"))
            values = tl.load(at + values_at)
            top, total, result = _accumulate(scores, values, top, total, result, is_row, scale, PRECISION)

        is_empty = total == 0.0
        total = tl.where(is_empty, 1.0, total)
        result = result / total[:, None]
        if partial < 0:
            output_at = ((row_start + row).to(tl.int64) * (NUM_KV_HEADS * GROUP) + query_head) * HEAD_DIM
            tl.store(
                output + output_at[:, None] + column[None, :], result.to(output.dtype.element_ty), mask=is_row[:, None]
            )
        else:
            lane_at = partial * BLOCK_M + lane
            tl.store(partial_lse + lane_at, tl.where(is_empty, FLOOR, top + tl.math.log2(total)), mask=is_row)
            partial_at = lane_at.to(tl.int64)[:, None] * HEAD_DIM + column[None, :]
            tl.store(partials + partial_at, result, mask=is_row[:, None])


@triton.jit
def merge_partials(
    output,  # [num_rows, num_heads, head_dim], contiguous
    partials,  # float32 [max_partials, BLOCK_M, head_dim]
    partial_lse,  # float32 [max_partials, BLOCK_M], base 2
    work,  # int32, a packed WorkList
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, query head) merges the partial results of one row of one head, `WIDTH` at a time."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    query_head = tl.program_id(1)
    head = query_head // GROUP
    if row < tl.load(work):
        tile = tl.load(work + tl.load(work + 5) + row)
        pair = work + tl.load(work + 6) + (tile * NUM_KV_HEADS + head) * 4
        first = tl.load(pair)
        count = tl.load(pair + 1)
        lane = (row - tl.load(pair + 2)) * GROUP + query_head % GROUP
        if PDL:
            gdc_wait()
        if count > 1:
            column = tl.arange(0, HEAD_DIM)
            top = tl.full([1], FLOOR, tl.float32)
            total = tl.zeros([1], tl.float32)
            result = tl.zeros([HEAD_DIM], tl.float32)
            for begin in range(0, count, WIDTH):
                part = begin + tl.arange(0, WIDTH)
                is_part = part < count
                at = (first + part) * BLOCK_M + lane
                lse = tl.load(partial_lse + at, mask=is_part, other=FLOOR)
                place = partials + at.to(tl.int64)[:, None] * HEAD_DIM + column[None, :]
                outputs = tl.load(place, mask=is_part[:, None], other=0.0)
                higher = tl.maximum(top, tl.max(lse, 0))
                weights = tl.where(is_part, tl.math.exp2(lse - higher), 0.0)
                fade = tl.math.exp2(top - higher)
                total = total * fade + tl.sum(weights, 0)
                result = result * fade + tl.sum(weights[:, None] * outputs, 0)
                top = higher
            place = output + (row * NUM_KV_HEADS * GROUP + query_head).to(tl.int64) * HEAD_DIM + column
            tl.store(place, (result / total).to(output.dtype.element_ty))
