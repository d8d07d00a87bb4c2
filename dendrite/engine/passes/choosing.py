"""What the products of a fused decoder go through: measured when a model is loaded, with the attention between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dendrite.engine.attention.base import AttentionBackend, AttentionStep
from dendrite.engine.batch import Plan, Segment
from dendrite.engine.kernels.nvrtc import can_compile
from dendrite.engine.passes.cutting import cut_products
from dendrite.engine.passes.fused import FusedLayer, RotaryTable
from dendrite.engine.passes.stream import Stream
from dendrite.engine.passes.tuning import tune

MEASURED_KEYS = 4096
"""What a row attends to while products are measured, if the pool has as much."""


def choose_products(
    decoder: nn.Module, backend: AttentionBackend, measure: Callable[[Callable[[], object]], float]
) -> None:
    """Choose, by measuring, what the products of a decoder's layers go through; layers that are not fused stay.

    Args:
        decoder: what was fused.
        backend: its attention; the pool holds nobody's K/V yet, and is all zeros afterwards.
        measure: gives the seconds that a function, which has run once already, takes on the current device.
    """
    layers = [layer for layer in decoder.modules() if isinstance(layer, FusedLayer)]
    if not layers:
        return
    pool = backend.pool
    used = pool.data[:, :, :, : pool.block_size + MEASURED_KEYS]  # the first block is trash
    used.normal_()
    if can_compile(used.device):
        cut_products([layer.projections for layer in layers], measure)
    num_keys = used.shape[3] - pool.block_size
    tune(layers, _lone_row(decoder, backend, first=pool.block_size, num_keys=num_keys), measure)
    used.zero_()


def _lone_row(
    decoder: nn.Module, backend: AttentionBackend, *, first: int, num_keys: int
) -> Callable[[Sequence[FusedLayer]], Tensor]:
    """What takes one row through some layers, reading `num_keys` slots from `first` on and keeping nothing."""
    backend.prepare(Plan(1, (Segment(((first, first + num_keys),), num_keys, 0, 1),)))
    like = backend.pool.data
    given = torch.randn((1, backend.spec.hidden_size), device=like.device).to(like.dtype)
    in_trash = torch.zeros(1, dtype=torch.int64, device=like.device)
    rotation = cast("RotaryTable", decoder.rotary_emb)(given, in_trash[None])

    def run(layers: Sequence[FusedLayer]) -> Tensor:
        stream, step = Stream(given.clone(), None), AttentionStep(backend, in_trash)
        for layer in layers:
            stream = layer(stream, position_embeddings=rotation, dendrite_step=step)
        return stream.total()

    return run
