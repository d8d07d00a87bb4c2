"""Does this machine compute a row alike in any company? Found out when a deterministic engine is loaded.

Libraries choose another kernel for another number of rows, and what they choose depends on the processor. So one layer
of the model and its head are run over the same random rows, cut in several ways, and every result is compared bit for
bit: one after the other, in chunks of many sizes, and as branches that share a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from dendrite.engine.attention.base import AttentionStep
from dendrite.engine.attention.ordered import OrderedAttention
from dendrite.engine.batch import Plan, Segment
from dendrite.engine.errors import ModelError
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.passes.lean import LeanLayers
from dendrite.engine.spec import ModelSpec

CUTS = ((1, 2, 3, 4, 5, 7, 9, 15, 17, 33, 96), (64, 65, 63), (1,) * 140 + (52,), (2, 190))
"""Sizes of chunks; each adds up to all rows."""
NUM_ROWS = sum(CUTS[0])
SHARED = 70
"""Rows that the others share when they run as branches."""
BLOCK_SIZE = 16


@torch.inference_mode()
def check_invariance(decoder: nn.Module, logits: Callable[[Tensor], Tensor], spec: ModelSpec) -> None:
    """Run the decoder's first layer and the head in several cuts.

    Args:
        decoder: its layers lean and steady (`passes`).
        logits: the head, from [n, hidden_size].
        spec: the model's dimensions.

    Raises:
        ModelError: some row's bits differed.
    """
    trial = _Trial(decoder, spec)
    whole = trial.run([(0, NUM_ROWS)])
    for sizes in CUTS:
        bounds = [0, *accumulate(sizes)]
        if not torch.equal(trial.run(list(pairwise(bounds))), whole):
            raise _refusal("a layer", f"chunks of {min(sizes)} to {max(sizes)} rows")
    for every in (1, 3, 40):
        rows = list(range(SHARED, NUM_ROWS, every))
        if not torch.equal(trial.run_leaves(rows), whole[rows]):
            raise _refusal("a layer", f"{len(rows)} branches")
    few = whole[:: NUM_ROWS // 32]
    expected = logits(few)
    for size in (1, 2, 3, 5, 17):
        if not torch.equal(torch.cat([logits(part) for part in few.split(size)]), expected):
            raise _refusal("the head", f"{size} rows")


def _refusal(what: str, cut: str) -> ModelError:
    return ModelError(
        f"deterministic=True cannot be kept on this machine: {what} gave {cut} other bits than all rows at once. "
        "Leave it off, or use another dtype or number of threads"
    )


class _Trial:
    """One layer over random rows of one path, with a K/V pool of its own."""

    def __init__(self, decoder: nn.Module, spec: ModelSpec) -> None:
        layers = decoder.get_submodule("layers.0")
        assert isinstance(layers, LeanLayers), "a steady decoder runs its layers as one module"
        self._layer = layers.first()
        self._rotary = decoder.get_submodule("rotary_emb")
        one = replace(spec, num_layers=1)
        pool = KVPool(one, num_blocks=-(-NUM_ROWS // BLOCK_SIZE), block_size=BLOCK_SIZE, device=torch.device("cpu"))
        self._backend = OrderedAttention(pool, one)
        generator = torch.Generator().manual_seed(0)
        given = torch.randn((NUM_ROWS, spec.hidden_size), generator=generator)
        self._given = given.to(getattr(torch, spec.dtype))

    def run(self, chunks: Sequence[tuple[int, int]]) -> Tensor:
        """The layer's output [NUM_ROWS, hidden_size], computed chunk by chunk."""
        parts = []
        for first, last in chunks:
            segments = [_segment(0, first, 0, last - first)] if first else []
            segments.append(_segment(first, last, 0, last - first, is_causal=True))
            parts.append(self._step(range(first, last), segments))
        return torch.cat(parts)

    def run_leaves(self, rows: Sequence[int]) -> Tensor:
        """Those rows' output [len(rows), hidden_size], each as a branch of the first `SHARED` rows."""
        shared = _segment(0, SHARED, 0, len(rows))
        own = [_segment(SHARED, row + 1, place, place + 1) for place, row in enumerate(rows)]
        return self._step(rows, [shared, *own])

    def _step(self, rows: Sequence[int], segments: Sequence[Segment]) -> Tensor:
        positions = torch.tensor(list(rows))
        hidden = self._given[positions].unsqueeze(0)
        self._backend.prepare(Plan(len(rows), tuple(segments)))
        step = AttentionStep(self._backend, positions + BLOCK_SIZE)
        rotation = self._rotary(hidden, position_ids=positions.unsqueeze(0))
        output: Tensor = self._layer(hidden, position_embeddings=rotation, dendrite_step=step)
        return output[0]


def _segment(first: int, last: int, row_start: int, row_end: int, *, is_causal: bool = False) -> Segment:
    causal_rows = last - first if is_causal else 0
    return Segment(((first + BLOCK_SIZE, last + BLOCK_SIZE),), last - first, row_start, row_end, causal_rows)
