"""Chooses, by measuring, what the products of a fused model's layers go through: the BLAS or kernels for few rows.

    1 row         BLAS ── first tilings ── second tilings      all layers' products, norms and activations, as one graph
    2 to 16 rows  BLAS ── first tilings ── second tilings      the shortest time wins; what cannot be compiled is out

It runs when a model is loaded, over the model's own weights, so that no cache holds them; nothing is kept for the next
load but the kernels, which Triton keeps. What computes something else than the BLAS is never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from triton.errors import TritonError

from dendrite.engine.kernels.linear import Tiling
from dendrite.engine.kernels.tilings import FEW, tilings_for
from dendrite.engine.passes.stream import Projection, Stream

BUCKETS = (1, FEW)
MARGIN = 0.97
"""A tiling must take less than this part of the BLAS's time, so that noise does not decide between equals."""
TOLERANCE = 0.02
"""How far the stream may be off the BLAS's after a layer, as a part of its length, in half precision."""
REPLAYS = 5


class Layer(Protocol):
    """What is measured of a fused layer."""

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The products, in the order in which they run."""

    def run_products(self, stream: Stream) -> None:
        """All but the attention."""


@torch.inference_mode()
def tune(layers: Sequence[Layer], hidden_size: int, measure: Callable[[Callable[[], object]], float]) -> None:
    """Set each projection's tilings to the fastest, one choice a bucket for all layers.

    float32 stays with the BLAS, whose sums are the reference.

    Args:
        layers: all layers of a model.
        hidden_size: width of the stream.
        measure: gives the seconds that a function takes on the device.
    """
    weight = layers[0].projections[0].weight
    if weight.dtype == torch.float32:
        return
    for bucket in BUCKETS:
        given = torch.randn((bucket, hidden_size), dtype=weight.dtype, device=weight.device)
        _tune_bucket(layers, bucket, given, measure)


def _tune_bucket(
    layers: Sequence[Layer], bucket: int, given: Tensor, measure: Callable[[Callable[[], object]], float]
) -> None:
    expected = _run(layers[:1], given)
    best, shortest = {}, MARGIN * measure(lambda: _run(layers, given))
    for tilings in _candidates(layers[0], bucket):
        _set(layers, bucket, tilings)
        try:
            if not _is_close(_run(layers[:1], given), expected):
                continue
            seconds = measure(lambda: _run(layers, given))
        except (TritonError, RuntimeError):  # made for a larger device, or for another version of the compiler
            continue
        if seconds < shortest:
            best, shortest = tilings, seconds
    _set(layers, bucket, best)


def _run(layers: Sequence[Layer], given: Tensor) -> Tensor:
    """The stream after the layers' products."""
    stream = Stream(given.clone(), None)
    for layer in layers:
        layer.run_products(stream)
    return stream.residual if stream.delta is None else stream.residual + stream.delta


def _candidates(layer: Layer, bucket: int) -> Iterator[dict[int, Tiling]]:
    """Tilings of all the layer's projections, by their index."""
    ways = [tilings_for(bucket, part.weight.shape[1], is_gated=part.is_gated) for part in layer.projections]
    for together in zip(*ways, strict=False):
        yield dict(enumerate(together))


def _set(layers: Sequence[Layer], bucket: int, tilings: dict[int, Tiling]) -> None:
    for layer in layers:
        for index, projection in enumerate(layer.projections):
            projection.tilings.pop(bucket, None)
            if index in tilings:
                projection.tilings[bucket] = tilings[index]


def _is_close(result: Tensor, expected: Tensor) -> bool:
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
