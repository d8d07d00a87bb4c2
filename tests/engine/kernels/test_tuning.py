"""What products go through is measured, and never changes what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # importing these chooses between the interpreter and the compiler, which conftest does first
    from dendrite.engine.kernels.linear import Tiling
    from dendrite.engine.passes.stream import Projection

WIDTH = 64


class TwoProducts:
    """A layer whose products are off by `error` once one of them does not go through the BLAS."""

    def __init__(self, dtype: torch.dtype, error: float | type[Exception] = 0.0) -> None:
        from dendrite.engine.passes.stream import Projection

        linears = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype).requires_grad_(requires_grad=False) for _ in "ab"]
        self.projections: tuple[Projection, ...] = tuple(Projection([linear]) for linear in linears)
        self.seen: set[tuple[Tiling | None, ...]] = set()
        self._error = error

    def run(self, layers: Sequence[TwoProducts]) -> Tensor:
        """The stream after some layers, this one the first of them."""
        assert layers[0] is self
        self.seen.add(chosen(self))
        is_blas = chosen(self) == (None, None)
        if not is_blas and isinstance(self._error, type):
            raise self._error
        return torch.ones(1, WIDTH) * (1 if is_blas or isinstance(self._error, type) else 1 + self._error)


def stopwatch(*seconds: float) -> Callable[[Callable[[], object]], float]:
    """Times in the order of the measurements; it runs nothing."""
    times: Iterator[float] = iter(seconds)
    return lambda run: next(times)


def chosen(layer: TwoProducts) -> tuple[Tiling | None, ...]:
    """Each projection's tiling."""
    return tuple(projection.tiling for projection in layer.projections)


@pytest.mark.parametrize(
    "seconds, taken",
    [
        ((10, 9, 8, 8.5, 7, 7.5, 7.2), (0, 1)),  # each projection has its own; the last one is looked at first
        ((10, 11, 9, 9.5, 9.5, 10, 12), (None, 1)),
        ((10, 9.99, 9.98, 9.99, 5, 12, 5), (0, None)),  # the first within the noise
        ((1, 2, 3, 4, 2, 3, 4), (None, None)),
    ],
)
def test_the_fastest_is_taken(seconds: tuple[float, ...], taken: tuple[int | None, ...]) -> None:
    """For each projection the BLAS or the fastest tiling, in all layers alike."""
    from dendrite.engine.passes.tuning import tilings_for, tune

    layers = [TwoProducts(torch.bfloat16) for _ in range(3)]
    tune(layers, layers[0].run, stopwatch(*seconds))
    ways = tilings_for(WIDTH)
    assert [chosen(layer) for layer in layers] == [tuple(None if at is None else ways[at] for at in taken)] * 3


@pytest.mark.parametrize("with_cuts, without, is_cut", [(9.0, 10.0, True), (9.0, 8.0, False)])
def test_a_lone_row_is_cut_only_where_that_is_faster(with_cuts: float, without: float, is_cut: bool) -> None:
    """Both ways are timed with each one's best tilings; the cuts for more rows stay either way."""
    from dendrite.engine.kernels.few_rows import Cut
    from dendrite.engine.passes.stream import LONE_ROW
    from dendrite.engine.passes.tuning import tilings_for, tune

    layer = TwoProducts(torch.bfloat16)
    cut = Cut(1, 2, 3)
    for projection in layer.projections:
        projection.cuts = {LONE_ROW: cut, 1: cut}
    slower = [20.0] * 2 * len(tilings_for(WIDTH))
    tune([layer], layer.run, stopwatch(with_cuts, *slower, without, *slower))
    assert [projection.cuts for projection in layer.projections] == [
        {LONE_ROW: cut, 1: cut} if is_cut else {1: cut}
    ] * 2
    assert chosen(layer) == (None, None)


@pytest.mark.parametrize("error", [0.5, float("nan"), RuntimeError])
def test_what_computes_something_else_is_never_taken(error: float | type[Exception]) -> None:
    """Kernels that are off, give NaN or cannot be compiled leave the BLAS in place."""
    from dendrite.engine.passes.tuning import tune

    layer = TwoProducts(torch.float16, error)
    tune([layer], layer.run, stopwatch(10))
    assert chosen(layer) == (None, None)
    assert len(layer.seen) > 1, "others were tried"


def test_float32_stays_with_the_blas() -> None:
    """Its results are what others are compared with."""
    from dendrite.engine.passes.tuning import tune

    layer = TwoProducts(torch.float32)
    tune([layer], layer.run, stopwatch())
    assert chosen(layer) == (None, None)
    assert not layer.seen


@pytest.mark.gpu
def test_a_device_is_timed() -> None:
    """More work takes longer, by the graph's replays."""
    from dendrite.engine.passes.tuning import seconds_on_device

    matrix = torch.randn(4096, 4096, device="cuda")
    matrix @ matrix
    once = seconds_on_device(lambda: matrix @ matrix)
    assert 0 < once < seconds_on_device(lambda: [matrix @ matrix for _ in range(10)])
