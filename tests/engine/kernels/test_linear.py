"""Products over one row, with all that their kernels can do beside them, in plain float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F


@pytest.mark.parametrize("has_bias, is_gated, has_residual", list(itertools.product([False, True], repeat=3)))
def test_products_and_what_stands_beside_them(
    has_bias: bool, is_gated: bool, has_residual: bool, device: torch.device
) -> None:
    """Bias, gate and residual in every combination, over a width that no block divides; with its norm."""
    from dendrite.engine.kernels.linear import Fusion, Tiling, one_row_linear

    generator = torch.Generator().manual_seed(1)
    width, depth = 40, 96
    x, residual, norm = (torch.randn(*shape, generator=generator) for shape in [(1, depth), (1, width), (depth,)])
    weight = torch.randn(width * (1 + is_gated), depth, generator=generator)
    bias = torch.randn(len(weight), generator=generator) if has_bias else None
    exact = F.rms_norm(x.double(), (depth,), norm.double(), 1e-5)
    exact = F.linear(exact, weight.double(), None if bias is None else bias.double())
    if is_gated:
        exact = F.silu(exact[:, :width]) * exact[:, width:]
    exact += residual if has_residual else 0

    fusion = Fusion(
        norm=(norm.to(device), 1e-5),
        is_gated=is_gated,
        residual=residual.to(device) if has_residual else None,
    )
    tiling = Tiling(block_n=16, block_k=32, num_warps=4)
    on_device = [tensor.to(device) if tensor is not None else None for tensor in (x, weight, bias)]
    result = one_row_linear(on_device[0], on_device[1], on_device[2], tiling, fusion)  # type: ignore[arg-type]  # only the bias is None
    torch.testing.assert_close(result.cpu().double(), exact, rtol=1e-4, atol=1e-3)
    assert (result is fusion.residual) == has_residual


@pytest.mark.parametrize("depth", [64, 576, 1024, 1536, 4096, 14336])
def test_tilings_fit_their_depth(depth: int) -> None:
    """Whatever the depth, blocks divide it, and none is tried twice."""
    from dendrite.engine.passes.tuning import tilings_for

    tilings = tilings_for(depth)
    assert 0 < len(tilings) == len(set(tilings))
    for tiling in tilings:
        assert depth % tiling.block_k == 0
        assert tiling.block_n & (tiling.block_n - 1) == 0 < tiling.block_n


def test_short_blocks_are_not_worth_a_kernel() -> None:
    """A depth that only small powers of two divide stays with the BLAS."""
    from dendrite.engine.passes.tuning import tilings_for

    assert tilings_for(1000) == []
