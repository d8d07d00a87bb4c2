"""Chooses, by measuring, how products over a few rows are cut, or that they go through the BLAS.

As `tuning`, which comes after it, it runs when a model is loaded, over the model's own weights. Each product is
measured alone: what stands beside it is the same either way. Rows up to 64 make eight kernels a product, one for each
number of tiles of 8 rows; a few of them are measured, and the others are cut like the next larger one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise, product

import torch
from torch import Tensor

from dendrite.engine.kernels.few_rows import BLOCK, ROWS, Cut, prepare, row_tiles
from dendrite.engine.kernels.nvrtc import MAX_SHARED_BYTES
from dendrite.engine.passes.stream import LONE_ROW, Projection
from dendrite.engine.passes.tuning import MARGIN, is_close

SPLIT_CUTS = (
    Cut(1, 2, 6, num_splits=4),
    Cut(1, 2, 3, num_splits=4),
    Cut(2, 2, 5, num_splits=4),
    Cut(2, 1, 8, num_splits=4),
    Cut(2, 2, 4, num_splits=2),
)
WHOLE_CUTS = (Cut(1, 2, 5), Cut(2, 4, 3), Cut(4, 2, 3), Cut(4, 1, 4))
"""Ways to cut a product, picked from sweeps over those of an 8B shape on an H200."""
MEASURED_ROWS = (8, 16, 32, 64)
MAX_LAYERS = 8
"""So many are measured: their weights are more than any cache holds, and all layers are alike."""

Products = Sequence[Projection]


@torch.inference_mode()
def cut_products(layers: Sequence[Products], measure: Callable[[Callable[[], object]], float]) -> None:
    """Set the cuts of each projection, the same in all layers.

    float32 stays with the BLAS, whose sums are the reference.

    Args:
        layers: the projections of each layer of a model.
        measure: gives the seconds that a function takes on the device; it has run once already.
    """
    if layers[0][0].weight.dtype == torch.float32:
        return
    for same in zip(*layers, strict=True):
        ways = cuts_for(same[0])
        _compile(same[0], product(MEASURED_ROWS, ways))
        cuts: dict[int, Cut] = {}
        for fewer, num_rows in pairwise((0, *MEASURED_ROWS)):
            if (cut := _fastest(same[:MAX_LAYERS], num_rows, ways, measure)) is not None:
                cuts |= dict.fromkeys(range(row_tiles(fewer) + 1, row_tiles(num_rows) + 1), cut)
        _compile(same[0], ((tiles * ROWS, cut) for tiles, cut in cuts.items()))  # now, not in the middle of a search
        if 1 in cuts:
            cuts[LONE_ROW] = cuts[1]
        for projection in same:
            projection.cuts = cuts


def cuts_for(projection: Projection) -> tuple[Cut, ...]:
    """Ways to cut a product that may be faster than the BLAS; none where its inputs are no whole blocks."""
    if projection.weight.shape[1] % BLOCK:
        return ()
    return WHOLE_CUTS if projection.is_gated else SPLIT_CUTS + WHOLE_CUTS[:1]


def _compile(projection: Projection, ways: Iterable[tuple[int, Cut]]) -> None:
    """Compile kernels side by side, each for a number of rows; what does not compile says so when it is launched."""

    def compile_one(num_rows: int, cut: Cut) -> None:
        with suppress(RuntimeError):
            prepare(num_rows, cut, projection.weight, is_gated=projection.is_gated)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for num_rows, cut in ways:
            threads.submit(compile_one, num_rows, cut)


def _fastest(
    same: Products, num_rows: int, ways: Sequence[Cut], measure: Callable[[Callable[[], object]], float]
) -> Cut | None:
    """The fastest way to cut one product of several layers; None for the BLAS."""
    weight = same[0].weight
    x = torch.randn((num_rows, weight.shape[1]), dtype=weight.dtype, device=weight.device)

    def run() -> list[Tensor]:
        return [projection.product(x) for projection in same]

    expected = run()[0]
    best, shortest = None, measure(run)
    for cut in ways:
        if cut.shared_bytes(num_rows) > MAX_SHARED_BYTES:
            continue
        try:
            if is_close(_cut(same, num_rows, cut, run)[0], expected):
                seconds = measure(run)
                if seconds < MARGIN * shortest:
                    best, shortest = cut, seconds
        except RuntimeError:  # made for a larger device, or for another version of the compiler
            continue
        finally:
            for projection in same:
                del projection.cuts[row_tiles(num_rows)]
    return best


def _cut(same: Products, num_rows: int, cut: Cut, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Cut all of them and run them."""
    for projection in same:
        projection.cuts[row_tiles(num_rows)] = cut
    return [result.sum(0) if result.dim() > 2 else result for result in run()]
