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
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama as llama

from dendrite.engine.passes.linear import FastLinear, PackedLinear, PlainLinear, SplitLinear

GRAIN = 32_768
"""Numbers that PyTorch computes on one thread; more are shared out evenly."""
ROWS = 32
"""Rows of positions are padded to a multiple of this, so that nothing is left over."""


def steady_silu(x: Tensor) -> Tensor:
    """`silu` of [num_rows, width], a part of wider rows."""
    pieces = x.split(row_pieces(*x.shape, num_threads=torch.get_num_threads()))
    return F.silu(x) if len(pieces) == 1 else torch.cat([F.silu(piece) for piece in pieces])


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


class PairedLinear(nn.Module):
    """A linear layer that computes a single row twice."""

    def __init__(self, linear: FastLinear) -> None:
        super().__init__()
        self._linear = linear

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features]; see the layer's own."""
        return self._linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., num_rows, in_features] to [..., num_rows, out_features]."""
        return self._linear.forward(x) if x.shape[-2] > 1 else self._linear.forward(_twice(x))[..., :1, :]

    def forward_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """`forward(x) + residual`."""
        if x.shape[-2] > 1:
            return self._linear.forward_add(x, residual)
        return self._linear.forward_add(_twice(x), _twice(residual))[..., :1, :]


def _twice(row: Tensor) -> Tensor:
    return torch.cat((row, row), -2)


def pair_rows(model: PreTrainedModel) -> None:
    """Have no linear layer of the model compute a row alone."""
    for module in list(model.modules()):
        if isinstance(module, SplitLinear | PairedLinear):
            continue
        for name, child in list(module.named_children()):
            if isinstance(child, PackedLinear | SplitLinear | PlainLinear):
                setattr(module, name, PairedLinear(child))
