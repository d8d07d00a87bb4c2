"""Residual add and RMS norm in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dendrite.engine.kernels.launch import overlap, power_of_two


def add_rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """`residual += delta`, then the RMS norm of the sum, computed in float32 and rounded once.

    Args:
        residual: [num_rows, width], contiguous; changed in place where there is a delta.
        delta: [num_rows, width], contiguous, or sums still to be added, [num_parts, num_rows, width]; None for nothing.
        weight: [width].
        epsilon: what is added to the mean square.

    Returns:
        [num_rows, width].
    """
    num_rows, width = residual.shape
    normed = torch.empty_like(residual)
    _add_rms_norm[(num_rows,)](
        residual,
        residual if delta is None else delta,
        weight,
        normed,
        width,
        epsilon,
        NUM_PARTS=0 if delta is None else delta.numel() // residual.numel(),
        BLOCK=power_of_two(width),
        num_warps=min(max(power_of_two(width) // 512, 1), 8),
        **overlap(residual.device),
    )
    return normed


@triton.jit
def _add_rms_norm(
    residual, delta, weight, normed, width, epsilon, NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_launch_dependents()
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    places = tl.program_id(0).to(tl.int64) * width + columns
    scale = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    if PDL:
        gdc_wait()
    total = tl.load(residual + places, mask=inside, other=0)
    if NUM_PARTS > 0:
        part_size = tl.num_programs(0).to(tl.int64) * width
        added = tl.load(delta + places, mask=inside, other=0).to(tl.float32)
        for part in tl.static_range(1, NUM_PARTS):
            added += tl.load(delta + part * part_size + places, mask=inside, other=0).to(tl.float32)
        total = (total.to(tl.float32) + added).to(residual.dtype.element_ty)
        tl.store(residual + places, total, mask=inside)
    values = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values) / width + epsilon)
    tl.store(normed + places, (values * inverse * scale).to(normed.dtype.element_ty), mask=inside)
