"""The kernels of the tree attention: a persistent one over a work list, and the merge of its partial results.

Both read what there is to do from `work`, a packed `WorkList` in device memory, so that one launch of a fixed grid, or
one captured graph, serves any tree. Softmax is online, in base 2 and float32 (FlashAttention: Dao, 2023; splitting over
keys with a log-sum-exp merge: Flash-Decoding, Dao et al., 2023).

Importing this needs Triton. Set TRITON_INTERPRET=1 before the first import to run the kernels on the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
):
    """Each program attends its items: one tile's rows, one K/V head, a stretch of the tile's blocks of keys."""
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
        item = items + index * 12
        row_start = tl.load(item)
        num_rows = tl.load(item + 1)
        head = tl.load(item + 2)
        first_block = tl.load(item + 5)
        last_block = tl.load(item + 6)
        partial = tl.load(item + 9)
        is_row = (row < num_rows) & (lane < GROUP * (BLOCK_M // GROUP))
        query_head = head * GROUP + lane % GROUP
        query_at = (row_start + row).to(tl.int64) * query_stride + query_head * HEAD_DIM
        queries = tl.load(query + query_at[:, None] + column[None, :], mask=is_row[:, None], other=0.0)
        top = tl.full([BLOCK_M], FLOOR, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        result = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        keys_of_head = pool + head.to(tl.int64) * num_slots * HEAD_DIM

        for strip_index in range(tl.load(item + 3), tl.load(item + 4)):
            strip = strips + strip_index * 4
            strip_start = tl.load(strip)
            begin = tl.maximum(first_block, strip_start)
            end = tl.minimum(last_block, tl.load(strip + 4))
            slot = tl.load(strip + 1) + (begin - strip_start) * BLOCK_N
            is_seen = is_row & (row >= tl.load(strip + 2)) & (row < tl.load(strip + 3))
            if USE_TILES:
                at = head * num_slots + slot
                for _ in tl.range(begin, end, num_stages=STAGES):
                    keys = pool_tiles.load([at, 0])
                    scores = tl.dot(queries, keys.T, input_precision=PRECISION)
                    values = pool_tiles.load([at + NUM_KV_HEADS * num_slots, 0])
                    top, total, result = _accumulate(scores, values, top, total, result, is_seen, scale, PRECISION)
                    at += BLOCK_N
            else:
                at = keys_of_head + (slot + key).to(tl.int64)[:, None] * HEAD_DIM + column[None, :]
                for _ in tl.range(begin, end, num_stages=STAGES):
                    keys = tl.load(at)
                    scores = tl.dot(queries, keys.T, input_precision=PRECISION)
                    values = tl.load(at + values_at)
                    top, total, result = _accumulate(scores, values, top, total, result, is_seen, scale, PRECISION)
                    at += BLOCK_N * HEAD_DIM

        first_gather = tl.load(item + 7)
        last_gather = tl.load(item + 8)
        if first_gather < last_gather:
            # Entries are read a block ahead, so that a block's loads do not wait for them.
            entry = entries + (first_gather * (BLOCK_N // ENTRY_KEYS) + key // ENTRY_KEYS) * 2
            place = tl.load(entry)
            readers = tl.load(entry + 1)
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
):
    """Program (row, query head) merges the partial results of one row of one head, `WIDTH` at a time."""
    row = tl.program_id(0)
    query_head = tl.program_id(1)
    head = query_head // GROUP
    if row < tl.load(work):
        tile = tl.load(work + tl.load(work + 5) + row)
        pair = work + tl.load(work + 6) + (tile * NUM_KV_HEADS + head) * 4
        first = tl.load(pair)
        count = tl.load(pair + 1)
        lane = (row - tl.load(pair + 2)) * GROUP + query_head % GROUP
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
