"""How products over a few rows are cut is measured, and never changes what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # importing these chooses between the interpreter and the compiler, which conftest does first
    from dendrite.engine.kernels.few_rows import Cut
    from dendrite.engine.passes.stream import Projection

WIDTH = 64


def projection_of(dtype: torch.dtype, *, depth: int = WIDTH, error: float | type[Exception] = 0.0) -> Projection:
    """A projection whose product is off by `error` where it does not go through the BLAS."""
    from dendrite.engine.kernels.few_rows import row_tiles
    from dendrite.engine.passes.stream import Projection

    class Cuttable(Projection):
        def product(self, x: Tensor) -> Tensor:
            cut = self.cuts.get(row_tiles(len(x)))
            self.cuts, cuts = {}, self.cuts
            result = super().product(x)
            self.cuts = cuts
            if cut is None:
                return result
            if isinstance(error, type):
                raise error
            return torch.stack([result * (1 + error)] + [torch.zeros_like(result)] * (cut.num_splits - 1)).squeeze(0)

    return Cuttable([nn.Linear(depth, WIDTH, bias=False, dtype=dtype).requires_grad_(requires_grad=False)])


def stopwatch(*seconds: float) -> Callable[[Callable[[], object]], float]:
    """Times in the order of the measurements, the last one again and again; it runs nothing."""
    times: Iterator[float] = iter(seconds)
    return lambda run: next(times, seconds[-1])


def ways() -> tuple[Cut, ...]:
    from dendrite.engine.passes.cutting import cuts_for

    return cuts_for(projection_of(torch.bfloat16))


def test_the_fastest_cut_is_taken_for_its_rows_and_fewer(device: torch.device) -> None:
    """Of each measured number of rows, in all layers alike; sizes between are cut like the next larger one."""
    from dendrite.engine.passes.cutting import cut_products

    first, second = ways()[:2]
    layers = [[projection_of(torch.bfloat16)] for _ in range(3)]
    slow = [9.0] * (len(ways()) - 2)
    cut_products(layers, stopwatch(10, 8, 9, *slow, 10, 11, 12, *[11.0] * len(slow), 10, 9, 8, *slow, 1, 2))
    wanted = {0: first, 1: first, 3: second, 4: second}  # at 16 rows and at 64 the BLAS was faster
    assert [projection.cuts for layer in layers for projection in layer] == [wanted] * 3


@pytest.mark.parametrize("error", [0.5, float("nan"), RuntimeError])
def test_what_computes_something_else_is_never_cut(error: float | type[Exception], device: torch.device) -> None:
    """Kernels that are off, give NaN or cannot be launched leave the BLAS in place."""
    from dendrite.engine.passes.cutting import cut_products

    projection = projection_of(torch.float16, error=error)
    cut_products([[projection]], stopwatch(10, 1))
    assert projection.cuts == {}


@pytest.mark.parametrize("dtype, depth", [(torch.float32, WIDTH), (torch.bfloat16, WIDTH + 32)])
def test_float32_and_odd_depths_stay_with_the_blas(dtype: torch.dtype, depth: int, device: torch.device) -> None:
    """float32 is what others are compared with; the kernel takes whole blocks of 64 inputs."""
    from dendrite.engine.passes.cutting import cut_products

    projection = projection_of(dtype, depth=depth)
    cut_products([[projection]], stopwatch(10, 1))
    assert projection.cuts == {}


def test_sums_are_added_up_by_the_norm_and_the_rotation(device: torch.device) -> None:
    """Both take a product in parts, and give what they give of the whole."""
    from dendrite.engine.kernels.norm import add_rms_norm
    from dendrite.engine.kernels.rotary import rotate_and_keep

    parts = torch.randn((3, 5, 96), device=device)
    residual, weight = torch.randn((5, 96), device=device), torch.randn(96, device=device)
    whole, in_parts = residual.clone(), residual.clone()
    expected = add_rms_norm(whole, parts.sum(0), weight, 1e-5)
    torch.testing.assert_close(add_rms_norm(in_parts, parts, weight, 1e-5), expected)
    torch.testing.assert_close(in_parts, whole)

    angles = torch.randn((9, 8), device=device)
    positions, slots = torch.tensor([3, 1, 8, 0, 5], device=device), torch.arange(5, device=device)
    found = []
    for qkv in (parts, parts.sum(0)):
        kept = torch.zeros((2, 1, 6, 16), device=device)
        query = rotate_and_keep(
            qkv, angles.cos(), angles.sin(), positions=positions, slots=slots, kept=kept, head_norms=None
        )
        found.append((query, kept))
    torch.testing.assert_close(found[0], found[1])
