"""The gated activation of an MLP in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dendrite.engine.kernels.launch import overlap

BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`, computed in float32 and rounded once.

    Args:
        gate_up: [num_rows, 2 * width], contiguous: gate, then up.

    Returns:
        [num_rows, width].
    """
    num_rows, double = gate_up.shape
    width = double // 2
    product = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_rows, triton.cdiv(width, BLOCK))
    _silu_mul[grid](gate_up, product, width, BLOCK=BLOCK, num_warps=4, **overlap(gate_up.device))
    return product


@triton.jit
def _silu_mul(gate_up, product, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(product + row * width + columns, value.to(product.dtype.element_ty), mask=inside)
