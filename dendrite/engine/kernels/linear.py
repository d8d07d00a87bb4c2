"""Linear layers over the one row of a lone branch's decoding step, where reading the weight is all the time there is.

Products and sums without the matrix unit. A program asks for the first part of its weight before it waits for the
kernel in front, so that memory stays busy between kernels. Sums are in float32, in an order that depends on the shapes
alone.
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
    """How a product is cut."""

    block_n: int
    """Outputs that one program computes: a power of two."""
    block_k: int
    """Inputs that it reads at a time: a power of two that divides their number."""
    num_warps: int


@dataclass(frozen=True)
class Fusion:
    """What is computed along with the product."""

    norm: tuple[Tensor, float] | None = None
    """RMS norm of x: its weight [depth] and epsilon."""
    is_gated: bool = False
    """The weight is a gate's above an up projection's, and the result is silu(gate) * up."""
    residual: Tensor | None = None
    """[1, width], what the result is added to, in place; it is returned."""


NO_FUSION = Fusion()


def one_row_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiling: Tiling, fusion: Fusion = NO_FUSION
) -> Tensor:
    """`x @ weight.T + bias` for one row.

    Args:
        x: [1, depth], contiguous.
        weight: [width, depth], contiguous; [2 * width, depth] where it is gated.
        bias: as many as the weight's rows, or None.
        tiling: how to cut it.
        fusion: what to compute along with it.

    Returns:
        [1, width].
    """
    depth = x.shape[1]
    width = weight.shape[0] // 2 if fusion.is_gated else weight.shape[0]
    assert len(x) == 1
    assert depth % tiling.block_k == 0
    out = fusion.residual if fusion.residual is not None else torch.empty((1, width), dtype=x.dtype, device=x.device)
    norm_weight, epsilon = fusion.norm if fusion.norm is not None else (x, 0.0)
    _one_row[(triton.cdiv(width, tiling.block_n),)](
        x,
        norm_weight,
        weight,
        weight if bias is None else bias,
        out,
        width,
        epsilon,
        HAS_NORM=fusion.norm is not None,
        GATED=fusion.is_gated,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=fusion.residual is not None,
        DEPTH=depth,
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        num_warps=tiling.num_warps,
        **overlap(x.device),
    )
    return out


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
