"""What products go through is measured, and never changes what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

if TYPE_CHECKING:  # importing these chooses between the interpreter and the compiler, which conftest does first
    from dendrite.engine.kernels.linear import Tiling
    from dendrite.engine.passes.stream import Projection, Stream

WIDTH = 64


class TwoProducts:
    """A layer whose products are off by `error` once they do not go through the BLAS."""

    def __init__(self, dtype: torch.dtype, error: float | type[Exception] = 0.0) -> None:
        from dendrite.engine.passes.stream import Projection

        linears = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype).requires_grad_(requires_grad=False) for _ in "ab"]
        self.projections: tuple[Projection, ...] = tuple(Projection([linear]) for linear in linears)
        self.seen: list[dict[int, Tiling]] = []
        self._error = error

    def run_products(self, stream: Stream) -> None:
        self.seen.append(dict(self.projections[0].tilings))
        is_blas = stream.residual.shape[0] not in self.projections[0].tilings
        if not is_blas and isinstance(self._error, type):
            raise self._error
        stream.residual += 1 if is_blas or isinstance(self._error, type) else 1 + self._error


def stopwatch(*seconds: float) -> Callable[[Callable[[], object]], float]:
    """Times in the order of the measurements; it runs nothing."""
    times: Iterator[float] = iter(seconds)
    return lambda run: next(times)


def chosen(layer: TwoProducts) -> list[list[int]]:
    """The buckets that each projection has a tiling for."""
    return [sorted(projection.tilings) for projection in layer.projections]


@pytest.mark.parametrize(
    "seconds, buckets",
    [
        ((10, 9, 8, 10, 9, 8), [1, 16]),  # faster in both buckets
        ((10, 9, 8, 10, 11, 12), [1]),
        ((10, 9.9, 9.8, 10, 5, 12), [16]),  # in the first, within the noise
        ((1, 2, 3, 1, 2, 3), []),
    ],
)
def test_the_fastest_is_taken(seconds: tuple[float, ...], buckets: list[int]) -> None:
    """For each bucket of rows the BLAS or the fastest tilings, all projections alike."""
    from dendrite.engine.passes.tuning import tune

    layers = [TwoProducts(torch.bfloat16) for _ in range(3)]
    tune(layers, WIDTH, stopwatch(*seconds))
    assert [chosen(layer) for layer in layers] == [[buckets, buckets]] * 3


def test_of_two_faster_ones_the_fastest_is_taken() -> None:
    """The first tilings win over the second where they take less time."""
    from dendrite.engine.kernels.tilings import tilings_for
    from dendrite.engine.passes.tuning import tune

    layer = TwoProducts(torch.bfloat16)
    tune([layer], WIDTH, stopwatch(10, 5, 6, 10, 6, 5))
    assert layer.projections[0].tilings == {
        1: next(tilings_for(1, WIDTH, is_gated=False)),
        16: list(tilings_for(16, WIDTH, is_gated=False))[1],
    }


@pytest.mark.parametrize("error", [0.5, float("nan"), RuntimeError])
def test_what_computes_something_else_is_never_taken(error: float | type[Exception]) -> None:
    """Kernels that are off, give NaN or cannot be compiled leave the BLAS in place."""
    from dendrite.engine.passes.tuning import tune

    layer = TwoProducts(torch.float16, error)
    tune([layer], WIDTH, stopwatch(10, 10))
    assert chosen(layer) == [[], []]
    assert any(seen for seen in layer.seen), "it was tried"


def test_float32_stays_with_the_blas() -> None:
    """Its results are what others are compared with."""
    from dendrite.engine.passes.tuning import tune

    layer = TwoProducts(torch.float32)
    tune([layer], WIDTH, stopwatch())
    assert chosen(layer) == [[], []]
    assert layer.seen == []


@pytest.mark.gpu
def test_a_device_is_timed() -> None:
    """More work takes longer, by the graph's replays."""
    from dendrite.engine.passes.tuning import seconds_on_device

    matrix = torch.randn(4096, 4096, device="cuda")
    matrix @ matrix
    once = seconds_on_device(lambda: matrix @ matrix)
    assert 0 < once < seconds_on_device(lambda: [matrix @ matrix for _ in range(10)])
