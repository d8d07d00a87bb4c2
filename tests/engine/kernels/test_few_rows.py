"""Products over a few rows: the kernel compiles anywhere, and on a device it computes what PyTorch computes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:  # importing these chooses between the interpreter and the compiler, which conftest does first
    from dendrite.engine.kernels.few_rows import Cut


def test_an_instruction_names_all_its_registers(device: torch.device) -> None:
    """Four sums a tile of rows, then where the operands lie."""
    from dendrite.engine.kernels.few_rows import operands

    spelled = operands(2)
    assert spelled["ROWS"] == '"16"'
    assert spelled["SUMS"] == '"{%0, %1, %2, %3, %4, %5, %6, %7}"'
    assert (spelled["WEIGHT_AT"], spelled["X_AT"]) == ('"%8"', '"%9"')
    assert str(spelled["SUMS_BOUND"]).count("+f") == 8


@pytest.mark.parametrize("row_tiles", [1, 3, 8])
@pytest.mark.parametrize(
    "is_gated, is_sums, is_half", [(False, False, True), (False, True, False), (True, False, False)]
)
def test_the_kernel_compiles(
    row_tiles: int, is_gated: bool, is_sums: bool, is_half: bool, device: torch.device
) -> None:
    """For a Hopper, by the runtime compiler, without a device."""
    pytest.importorskip("cuda.bindings", reason="NVRTC's bindings are made for Linux")
    from dendrite.engine.kernels.few_rows import operands
    from dendrite.engine.kernels.nvrtc import cubin

    switches = {"GATED": int(is_gated), "PARTS": int(is_sums), "IS_HALF": int(is_half)}
    constants = {"G": 2, "LONG": 2, "STAGES": 3, **switches, **operands(row_tiles)}
    assert cubin("few_rows.cu", list(constants.items()), "sm_90a").startswith(b"\x7fELF")


def test_what_does_not_compile_says_why(device: torch.device) -> None:
    """The error holds the compiler's messages."""
    pytest.importorskip("cuda.bindings", reason="NVRTC's bindings are made for Linux")
    from dendrite.engine.kernels.nvrtc import CompileError, cubin

    with pytest.raises(CompileError, match=r"few_rows\.cu does not compile"):
        cubin("few_rows.cu", [], "sm_90a")


def random_cut(rng: random.Random, num_rows: int, *, num_splits: int) -> Cut:
    """One that fits a block's shared memory."""
    from dendrite.engine.kernels.few_rows import Cut
    from dendrite.engine.kernels.nvrtc import MAX_SHARED_BYTES

    while True:
        cut = Cut(rng.choice([1, 2, 4]), rng.choice([1, 2, 4]), rng.choice([2, 3, 5]), num_splits)
        if cut.shared_bytes(num_rows) <= MAX_SHARED_BYTES:
            return cut


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, *, is_gated: bool) -> Tensor:
    """The product in float32."""
    product = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if not is_gated:
        return product
    gate, up = product.chunk(2, dim=1)
    return F.silu(gate) * up


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["whole", "gated", "sums"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_those_of_float32(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Any number of rows, odd widths, all cuts; what lies beside the weight and the rows is poison."""
    from dendrite.engine.kernels.few_rows import few_rows_linear, few_rows_sums
    from dendrite.engine.kernels.nvrtc import can_compile

    if not can_compile(device):
        pytest.skip("the kernel is made for a Hopper with cuda-bindings, this is another device")
    rng = random.Random(kind)
    for _ in range(25):
        num_rows, depth = rng.randint(1, 64), 64 * rng.choice([1, 2, 9, 24, 64])
        width = rng.choice([1, 7, 16, 40, 100, 576, 1000])
        is_gated = kind == "gated"
        poisoned = torch.full((2 * width + 1, depth), float("nan"), dtype=dtype, device=device)
        weight = poisoned[: width * (2 if is_gated else 1)]
        weight.normal_().mul_(0.1)
        bias = torch.randn(len(weight), device=device).to(dtype) if rng.random() < 0.5 else None
        rows = torch.full((num_rows + 8, depth), float("nan"), dtype=dtype, device=device)
        x = rows[:num_rows].normal_()
        cut = random_cut(rng, num_rows, num_splits=rng.choice([2, 3, 5]) if kind == "sums" else 1)
        if kind == "sums":
            result = few_rows_sums(x, weight, bias, cut).sum(0)
        else:
            result = few_rows_linear(x, weight, bias, cut, is_gated=is_gated).float()
        wanted = expected(x, weight, bias, is_gated=is_gated)
        torch.testing.assert_close(result, wanted, rtol=0.02, atol=0.01 * float(wanted.abs().max()))
