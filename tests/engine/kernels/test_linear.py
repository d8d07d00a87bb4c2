"""Products over few rows, with all that their kernels can do beside them, in plain float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F


@pytest.mark.parametrize("num_rows", [1, 3, 16])
@pytest.mark.parametrize("has_bias, is_gated, has_residual", list(itertools.product([False, True], repeat=3)))
def test_products_and_what_stands_beside_them(
    num_rows: int, has_bias: bool, is_gated: bool, has_residual: bool, device: torch.device
) -> None:
    """Bias, gate and residual in every combination, over a width that no block divides; one row with its norm."""
    from dendrite.engine.kernels.linear import Fusion, Tiling, few_rows_linear

    generator = torch.Generator().manual_seed(num_rows)
    width, depth = 40, 96
    x, residual, norm = (
        torch.randn(*shape, generator=generator) for shape in [(num_rows, depth), (num_rows, width), (depth,)]
    )
    weight = torch.randn(width * (1 + is_gated), depth, generator=generator)
    bias = torch.randn(len(weight), generator=generator) if has_bias else None
    exact = x.double()
    if num_rows == 1:
        exact = F.rms_norm(exact, (depth,), norm.double(), 1e-5)
    exact = F.linear(exact, weight.double(), None if bias is None else bias.double())
    if is_gated:
        exact = F.silu(exact[:, :width]) * exact[:, width:]
    exact += residual if has_residual else 0

    fusion = Fusion(
        norm=(norm.to(device), 1e-5) if num_rows == 1 else None,
        is_gated=is_gated,
        residual=residual.to(device) if has_residual else None,
    )
    tiling = Tiling(block_n=16, block_k=32, num_warps=4, num_stages=2, ahead=64)
    on_device = [tensor.to(device) if tensor is not None else None for tensor in (x, weight, bias)]
    result = few_rows_linear(on_device[0], on_device[1], on_device[2], tiling, fusion)  # type: ignore[arg-type]
    torch.testing.assert_close(result.cpu().double(), exact, rtol=1e-4, atol=1e-3)
    assert (result is fusion.residual) == has_residual


@pytest.mark.parametrize("num_rows, bucket", [(1, 1), (2, 16), (16, 16), (17, None), (500, None)])
def test_rows_fall_into_buckets(num_rows: int, bucket: int | None) -> None:
    """One row has its own kernel, up to 16 share one, more go through the BLAS."""
    from dendrite.engine.kernels.tilings import bucket_of

    assert bucket_of(num_rows) == bucket


@pytest.mark.parametrize("depth", [64, 576, 1024, 1536, 4096, 14336])
@pytest.mark.parametrize("bucket", [1, 16])
@pytest.mark.parametrize("is_gated", [False, True])
def test_tilings_fit_their_depth(depth: int, bucket: int, is_gated: bool) -> None:
    """Whatever the depth, blocks divide it and nothing is asked for beyond a row."""
    from dendrite.engine.kernels.tilings import tilings_for

    tilings = list(tilings_for(bucket, depth, is_gated=is_gated))
    assert tilings
    for tiling in tilings:
        assert depth % tiling.block_k == 0
        assert tiling.block_n & (tiling.block_n - 1) == 0 < tiling.block_n
        assert tiling.ahead <= depth * 2
        assert tiling.ahead % 16 == 0


def test_short_blocks_are_not_worth_a_kernel() -> None:
    """A depth that only small powers of two divide stays with the BLAS."""
    from dendrite.engine.kernels.tilings import tilings_for

    assert list(tilings_for(1, 1000, is_gated=False)) == []
