"""Chooses, by measuring, what a lone row's products go through: as few rows do, or a kernel of its own.

    out      as few rows ── tiling ── tiling ── ...      all layers of a row as one graph; what makes it faster is
    ...                                                  kept before the next one is looked at
    q|k|v    as few rows ── tiling ── tiling ── ...

A few rows go through the BLAS or through cuts (`cutting`). It runs when a model is loaded, over the model's own
weights, so that no cache holds them, and with the attention between them: kernels that overlap well with each other may
not do so with it. Nothing is kept for the next load but the kernels, which Triton keeps. What computes something else
is never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from triton.errors import TritonError

from dendrite.engine.kernels.linear import Tiling
from dendrite.engine.passes.stream import LONE_ROW, Projection

TILINGS = (Tiling(2, 1024, num_warps=2), Tiling(4, 2048, num_warps=8), Tiling(1, 4096, num_warps=4))
"""Ways to cut a product, the fastest for one of those of an 8B shape on an H200 each."""
SHORTEST_BLOCK = 64
MARGIN = 0.997
"""What a tiling must at least bring all layers' time down to, so that noise does not decide between equals."""
TOLERANCE = 0.02
"""How far the stream may be off the BLAS's after a layer, as a part of its length, in half precision."""
REPLAYS = 5


class Layer(Protocol):
    """What is measured of a fused layer."""

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The products, in the order in which they run."""


AnyLayer = TypeVar("AnyLayer", bound=Layer)


@torch.inference_mode()
def tune(
    layers: Sequence[AnyLayer],
    run: Callable[[Sequence[AnyLayer]], Tensor],
    measure: Callable[[Callable[[], object]], float],
) -> None:
    """Set each projection's tiling to the fastest, the same in all layers.

    Where products are cut, a lone row is tried with its cuts and without: kernels that norm and add as well pay off
    together or not at all. float32 stays with the BLAS, whose sums are the reference.

    Args:
        layers: all layers of a model.
        run: takes one row through some of the layers and gives the stream after them, the same each time.
        measure: gives the seconds that a function takes on the device.
    """
    if layers[0].projections[0].weight.dtype == torch.float32:
        return
    is_cut = any(projection.cuts for projection in layers[0].projections)
    found = [_one_by_one(layers, run, measure)]
    if is_cut:
        cuts = [projection.cuts.pop(LONE_ROW, None) for projection in layers[0].projections]
        found.append(_one_by_one(layers, run, measure))
        if found[0][0] <= found[1][0]:
            for projection, cut in zip(layers[0].projections, cuts, strict=True):  # all layers have the same dictionary
                projection.cuts |= {LONE_ROW: cut} if cut is not None else {}
    for index, tiling in enumerate(min(found, key=itemgetter(0))[1]):
        _set(layers, index, tiling)


def _one_by_one(
    layers: Sequence[AnyLayer],
    run: Callable[[Sequence[AnyLayer]], Tensor],
    measure: Callable[[Callable[[], object]], float],
) -> tuple[float, list[Tiling | None]]:
    """The seconds of all layers with each projection's best tiling, and these."""
    tilings: list[Tiling | None] = [None] * len(layers[0].projections)
    for index in range(len(tilings)):
        _set(layers, index, None)
    expected = run(layers[:1])
    shortest = measure(lambda: run(layers))
    for index in (
        *range(1, len(tilings)),
        0,
    ):  # the first reads what the last of the layer before has added, or has not
        projection = layers[0].projections[index]
        for tiling in tilings_for(projection.weight.shape[1]):
            _set(layers, index, tiling)
            try:
                if not is_close(run(layers[:1]), expected):
                    continue
                seconds = measure(lambda: run(layers))
            except (TritonError, RuntimeError):  # made for a larger device, or for another version of the compiler
                continue
            if seconds < MARGIN * shortest:
                tilings[index], shortest = tiling, seconds
        _set(layers, index, tilings[index])
    return shortest, tilings


def tilings_for(depth: int) -> list[Tiling]:
    """Ways to cut a product over `depth` inputs; none where blocks would be too short."""
    longest = depth & -depth  # the largest power of two that divides it
    if longest < SHORTEST_BLOCK:
        return []
    cut = (replace(tiling, block_k=min(tiling.block_k, longest)) for tiling in TILINGS)
    return list(dict.fromkeys(cut))


def _set(layers: Sequence[Layer], index: int, tiling: Tiling | None) -> None:
    for layer in layers:
        layer.projections[index].tiling = tiling


def is_close(result: Tensor, expected: Tensor) -> bool:
    """Whether a kernel's result is that of the BLAS but for rounding."""
    distance = torch.linalg.vector_norm((result - expected).float())
    return bool(distance <= TOLERANCE * torch.linalg.vector_norm(expected.float()))  # NaN is not


def seconds_on_device(run: Callable[[], object]) -> float:
    """The median time of a function's kernels, captured in a CUDA graph; it has run once already."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other engines go on meanwhile
        run()
    graph.replay()
    times: list[float] = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[REPLAYS // 2]
