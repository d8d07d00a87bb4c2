"""Linear layers over the few rows of a decoding step: the launch of `few_rows.cu`.

Between one row, whose products a vector unit can do (`linear`), and the hundreds that a BLAS is made for, a step takes
as long as its weights take to read. On an H200 a BLAS stays 6 to 72% above that for an 8B shape's products, and starts
to read only when the kernel in front has ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dendrite.engine.kernels.nvrtc import CudaKernel, compiled

BLOCK = 64
"""Inputs that the kernel takes at a time; their number must be a multiple of it."""
ROWS = 8
"""Rows of a tile."""
MAX_ROWS = 64
OUTPUTS = 64
"""Of a group of threads."""


@dataclass(frozen=True)
class Cut:
    """How a product is cut; see `few_rows.cu`."""

    num_groups: int
    """Groups of 128 threads in a block, which share what is read of x."""
    num_blocks: int
    """Blocks of inputs that are read at once."""
    num_stages: int
    """How often that fits its shared memory: all but one are on their way."""
    num_splits: int = 1
    """Blocks of threads that share the inputs of an output; more than one leave sums to be added."""

    def shared_bytes(self, num_rows: int) -> int:
        """Shared memory of a block of threads, with what it takes to align it."""
        rows = self.num_groups * OUTPUTS + row_tiles(num_rows) * ROWS
        return self.num_stages * self.num_blocks * rows * BLOCK * 2 + 1024


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None, cut: Cut, *, is_gated: bool = False) -> Tensor:
    """`x @ weight.T + bias`, or `silu(gate) * up` of it.

    Args:
        x: [num_rows, depth], contiguous, bfloat16 or float16; `depth` is a multiple of 64.
        weight: [width, depth], contiguous; a gate's above an up projection's, [2 * width, depth], where it is gated.
        bias: as many as the weight's rows, or None.
        cut: how to cut it, into one split.
        is_gated: whether the weight is a gate's and an up projection's.

    Returns:
        [num_rows, width], the dtype of x.
    """
    assert cut.num_splits == 1
    width = len(weight) // 2 if is_gated else len(weight)
    out = torch.empty((len(x), width), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, cut, is_gated=is_gated)
    return out


def few_rows_sums(x: Tensor, weight: Tensor, bias: Tensor | None, cut: Cut) -> Tensor:
    """The same, ungated, as sums that are still to be added: [num_splits, num_rows, width] float32; two or more."""
    assert cut.num_splits > 1
    out = torch.empty((cut.num_splits, len(x), len(weight)), dtype=torch.float32, device=x.device)
    _launch(x, weight, bias, out, cut)
    return out


def prepare(num_rows: int, cut: Cut, weight: Tensor, *, is_gated: bool) -> CudaKernel:
    """Compile what a product over so many rows will be launched with.

    Raises:
        CompileError: it could not be compiled or loaded.
    """
    constants = {
        "G": cut.num_groups,
        "LONG": cut.num_blocks,
        "STAGES": cut.num_stages,
        "GATED": int(is_gated),
        "PARTS": int(cut.num_splits > 1),
        "IS_HALF": int(weight.dtype == torch.float16),
        **operands(row_tiles(num_rows)),
    }
    return compiled("few_rows.cu", "few_rows", constants, weight.device)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, cut: Cut, *, is_gated: bool = False) -> None:
    num_rows, depth = x.shape
    width = out.shape[-1]
    assert num_rows <= MAX_ROWS
    assert depth % BLOCK == 0
    assert x.is_contiguous()
    kernel = prepare(num_rows, cut, weight, is_gated=is_gated)
    outputs = (OUTPUTS // 2 if is_gated else OUTPUTS) * cut.num_groups
    stages = -(-depth // (BLOCK * cut.num_blocks))
    kernel.launch(
        (-(-width // outputs), cut.num_splits),
        128 * cut.num_groups,
        cut.shared_bytes(num_rows),
        (x, weight, bias, out, num_rows, width, depth, -(-stages // cut.num_splits) * cut.num_blocks),
    )


def operands(row_tiles: int) -> dict[str, int | str]:
    """The constants that spell the matrix unit's instruction over so many rows, which names each of its registers."""
    registers = range(4 * row_tiles)
    return {
        "NT": row_tiles,
        "ROWS": f'"{ROWS * row_tiles}"',
        "SUMS": '"{' + ", ".join(f"%{index}" for index in registers) + '}"',
        "SUMS_BOUND": ", ".join(f'"+f"(sum[{index}])' for index in registers),
        "WEIGHT_AT": f'"%{len(registers)}"',
        "X_AT": f'"%{len(registers) + 1}"',
    }


def row_tiles(num_rows: int) -> int:
    """Tiles that take so many rows."""
    return -(-num_rows // ROWS)
