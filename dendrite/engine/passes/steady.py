"""Operators of which each row has the same bits, however many rows there are.

PyTorch runs an elementwise operator a few numbers at a time and what is left over one by one, and the two may round a
transcendental function differently. What is left over lies at the end of a row, or, where the numbers of a long tensor
are shared out among threads, wherever a thread's share ends. So such operators run here on pieces of rows that no share
cuts in two. Matrix products have kernels of their own for a single row, so a row is never alone in one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama as llama

GRAIN = 32_768
"""Numbers that PyTorch computes on one thread; more are shared out evenly."""
ROWS = 32
"""Rows of positions are padded to a multiple of this, so that nothing is left over."""


def row_pieces(num_rows: int, width: int, *, num_threads: int) -> list[int]:
    """Numbers of rows that add up to `num_rows`; each piece runs on one thread or gives every thread whole rows."""
    few = max(1, GRAIN // width)
    if num_rows <= few:
        return [num_rows]
    even = num_rows // num_threads * num_threads
    if width > GRAIN or even * width <= (num_threads - 1) * GRAIN:  # fewer threads would share it
        even = 0
    rest = num_rows - even
    pieces = [few] * (rest // few) + [rest % few]
    return [piece for piece in (even, *pieces) if piece]


class SteadyRotary(nn.Module):
    """The model's own rotary embedding, in pieces."""

    def __init__(self, rotary: llama.LlamaRotaryEmbedding) -> None:
        super().__init__()
        self._rotary = rotary
        self._rows = max(ROWS, GRAIN // (2 * rotary.inv_freq.numel()) // ROWS * ROWS)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The cosine and the sine of positions [1, num_rows], each [1, num_rows, head_dim]."""
        num_rows = position_ids.shape[1]
        padded = F.pad(position_ids, (0, -num_rows % ROWS))
        pairs = [self._rotary(x, position_ids=piece) for piece in padded.split(self._rows, dim=1)]
        cos, sin = (torch.cat(parts, 1)[:, :num_rows] for parts in zip(*pairs, strict=True))
        return cos, sin
