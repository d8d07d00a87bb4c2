"""Linear layers over the few rows of a decoding step, where reading the weight is all the time there is.

One row goes through `_one_row`: products and sums, no matrix unit. 2 to 64 rows go through `_few_rows`, which gives
the weight's rows to the matrix unit as the tall side:

    out[n, m] = sum over k of  weight[n, k] * x[m, k]          n: up to 128 at a time, m: 16, 32 or 64, padded

Both ask for the first part of the weight before they wait for the kernel in front, so that memory stays busy between
kernels. Sums are in float32, in an order that depends on the shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dendrite.engine.kernels.launch import overlap


@dataclass(frozen=True)
class Tiling:
    """How a product is cut, for one shape and number of rows."""

    block_n: int
    """Outputs that one program computes."""
    block_k: int
    """Inputs that it reads at a time; divides their number."""
    num_warps: int
    num_stages: int
    """Parts of the weight in flight at a time; with one row, what the compiler makes of it."""
    ahead: int = 0
    """Bytes of each of the weight's rows that are asked for before the kernel in front has ended; 16 divides them."""


@dataclass(frozen=True)
class Fusion:
    """What is computed along with the product."""

    norm: tuple[Tensor, float] | None = None
    """RMS norm of x: its weight [depth] and epsilon. For one row."""
    is_gated: bool = False
    """The weight is a gate's above an up projection's, and the result is silu(gate) * up."""
    residual: Tensor | None = None
    """[num_rows, width], what the result is added to, in place; it is returned."""


NO_FUSION = Fusion()


def few_rows_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiling: Tiling, fusion: Fusion = NO_FUSION
) -> Tensor:
    """`x @ weight.T + bias` for 1 to 64 rows.

    Args:
        x: [num_rows, depth], contiguous.
        weight: [width, depth], contiguous; [2 * width, depth] where it is gated.
        bias: as many as the weight's rows, or None.
        tiling: how to cut it.
        fusion: what to compute along with it.

    Returns:
        [num_rows, width].
    """
    num_rows, depth = x.shape
    width = weight.shape[0] // 2 if fusion.is_gated else weight.shape[0]
    assert depth % tiling.block_k == 0
    assert num_rows == 1 or fusion.norm is None
    out = (
        fusion.residual
        if fusion.residual is not None
        else torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    )
    constants = {
        "GATED": fusion.is_gated,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": fusion.residual is not None,
        "DEPTH": depth,
        "BLOCK_N": tiling.block_n,
        "BLOCK_K": tiling.block_k,
        "num_warps": tiling.num_warps,
        **overlap(x.device),
    }
    grid = (triton.cdiv(width, tiling.block_n),)
    if num_rows == 1:
        norm_weight, epsilon = fusion.norm if fusion.norm is not None else (x, 0.0)
        _one_row[grid](
            x, norm_weight, weight, weight if bias is None else bias, out, width, epsilon,
            HAS_NORM=fusion.norm is not None, **constants
        )  # fmt: skip
    else:
        _few_rows[grid](
            x, weight, weight if bias is None else bias, out, num_rows, width,
            BLOCK_M=max(16, triton.next_power_of_2(num_rows)), STAGES=tiling.num_stages,
            AHEAD=tiling.ahead if constants["PDL"] else 0, **constants
        )  # fmt: skip
    return out


@triton.jit
def _ask_ahead(addresses, AHEAD: tl.constexpr):
    """Bring `AHEAD` bytes from each address to the L2 cache, without waiting."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [addresses, AHEAD],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _one_row(
    x,
    norm_weight,
    weight,
    bias,
    out,
    width,
    epsilon,
    HAS_NORM: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = outputs < width
    rows = tl.where(inside, outputs, 0).to(tl.int64)
    inputs = tl.arange(0, BLOCK_K)
    tile = weight + rows[:, None] * DEPTH + inputs[None, :]
    up_tile = tile + width.to(tl.int64) * DEPTH if GATED else tile
    part = tl.load(tile, eviction_policy="evict_first")
    up_part = tl.load(up_tile, eviction_policy="evict_first") if GATED else part
    scale = tl.load(norm_weight + inputs).to(tl.float32) if HAS_NORM else 0.0
    if PDL:
        gdc_wait()
    sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    up_sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    squares = tl.zeros([BLOCK_K], dtype=tl.float32)
    for start in range(BLOCK_K, DEPTH + BLOCK_K, BLOCK_K):
        given = tl.load(x + (start - BLOCK_K) + inputs).to(tl.float32)
        more = start < DEPTH
        next_part = tl.load(tile + start, mask=more, eviction_policy="evict_first")
        next_up = tl.load(up_tile + start, mask=more, eviction_policy="evict_first") if GATED else next_part
        if HAS_NORM:
            squares += given * given
            given *= scale
            scale = tl.load(norm_weight + start + inputs, mask=more).to(tl.float32)
        sums += part.to(tl.float32) * given[None, :]
        if GATED:
            up_sums += up_part.to(tl.float32) * given[None, :]
        part = next_part
        up_part = next_up
    result = tl.sum(sums, axis=1)
    up = tl.sum(up_sums, axis=1) if GATED else result
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(squares) / DEPTH + epsilon)
        result *= inverse
        up *= inverse
    if HAS_BIAS:
        result += tl.load(bias + rows).to(tl.float32)
        if GATED:
            up += tl.load(bias + width + rows).to(tl.float32)
    if GATED:
        result = result * tl.sigmoid(result) * up
    if HAS_RESIDUAL:
        result += tl.load(out + rows).to(tl.float32)
    tl.store(out + outputs, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _few_rows(
    x,
    weight,
    bias,
    out,
    num_rows,
    width,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = outputs < width
    rows = tl.where(inside, outputs, 0).to(tl.int64)
    inputs = tl.arange(0, BLOCK_K)
    given_rows = tl.arange(0, BLOCK_M)
    tile = weight + rows[:, None] * DEPTH + inputs[None, :]
    up_tile = tile + width.to(tl.int64) * DEPTH if GATED else tile
    given_tile = x + tl.where(given_rows < num_rows, given_rows, 0)[None, :] * DEPTH + inputs[:, None]
    if AHEAD:
        _ask_ahead((weight + rows * DEPTH).to(tl.int64, bitcast=True), AHEAD)
        if GATED:
            _ask_ahead((weight + (rows + width) * DEPTH).to(tl.int64, bitcast=True), AHEAD)
    if PDL:
        gdc_wait()
    sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    up_sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
        part = tl.load(tile + start, eviction_policy="evict_first")
        given = tl.load(given_tile + start)
        sums = tl.dot(part, given, sums, input_precision="ieee")
        if GATED:
            up_part = tl.load(up_tile + start, eviction_policy="evict_first")
            up_sums = tl.dot(up_part, given, up_sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + rows).to(tl.float32)[:, None]
        if GATED:
            up_sums += tl.load(bias + width + rows).to(tl.float32)[:, None]
    if GATED:
        sums = sums * tl.sigmoid(sums) * up_sums
    result = tl.trans(sums)
    places = out + given_rows[:, None] * width + outputs[None, :]
    kept = (given_rows < num_rows)[:, None] & inside[None, :]
    if HAS_RESIDUAL:
        result += tl.load(places, mask=kept, other=0).to(tl.float32)
    tl.store(places, result.to(out.dtype.element_ty), mask=kept)
