"""Choosing one index per row: the first largest, or by inverting the cumulative distribution at a keyed uniform number.

Both work in two levels over chunks of the vocabulary, so that one pass reads all of it and the rest is small:

    weights   [ chunk 0 | chunk 1 | chunk 2 | tail ]
    level 1     sum       sum       sum       sum        which chunk holds the target?
    level 2               w w w w w                      which token in it?
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dendrite.engine.random import GOLDEN, MASK, MULTIPLIER_1, MULTIPLIER_2

CHUNK = 256
"""About the square root of common vocabulary sizes."""


def uniforms(keys: Sequence[int], positions: Sequence[int], device: torch.device) -> Tensor:
    """`random.uniform` of many (key, position) pairs at once, to the bit: [num_rows] float64 in [0, 1)."""
    key = torch.tensor([signed(key) for key in keys], device=device)
    position = torch.tensor(list(positions), device=device)
    value = key + (position + 1) * signed(GOLDEN)  # int64 wraps around as the 64-bit integers of `random.mix` do
    value = (value ^ _shifted(value, 30)) * signed(MULTIPLIER_1)
    value = (value ^ _shifted(value, 27)) * signed(MULTIPLIER_2)
    value = value ^ _shifted(value, 31)
    return _shifted(value, 11).double() * 2.0**-53


def signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


def _shifted(value: Tensor, places: int) -> Tensor:
    # torch shifts int64 arithmetically, so the copies of the sign are masked away.
    return (value >> places) & ((1 << (64 - places)) - 1)


def first_largest(values: Tensor) -> Tensor:
    """[num_rows] int64: the lowest index of each row's maximum; `values` is [num_rows, vocab] without NaN."""
    whole, tail = _chunks(values)
    best = torch.cat([whole.amax(-1), tail.amax(-1, keepdim=True)], 1) if tail.shape[1] else whole.amax(-1)
    chunk = best.argmax(-1, keepdim=True)
    places, inside = _chunk_at(values, chunk, fill=-torch.inf)
    return places.gather(1, inside.argmax(-1, keepdim=True))[:, 0]


def draw(weights: Tensor, fractions: Tensor) -> Tensor:
    """The first index at which the cumulative weight exceeds a fraction of the whole.

    Args:
        weights: [num_rows, vocab], not negative, not all zero in any row.
        fractions: [num_rows] float64 in [0, 1).

    Returns:
        [num_rows] int64; never an index of weight zero.
    """
    whole, tail = _chunks(weights)
    sums = torch.cat([whole.sum(-1), tail.sum(-1, keepdim=True)], 1)
    cumulative = sums.double().cumsum(-1)
    chunk = _invert(cumulative, fractions[:, None])
    size = sums.gather(1, chunk).double()
    before = cumulative.gather(1, chunk) - size
    places, inside = _chunk_at(weights, chunk, fill=0)
    rest = (fractions[:, None] * cumulative[:, -1:] - before) / size
    return places.gather(1, _invert(inside.double().cumsum(-1), rest))[:, 0]


def _chunks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the whole chunks [num_rows, num_chunks, CHUNK] and of what is left [num_rows, fewer than CHUNK]."""
    num_chunks = values.shape[1] // CHUNK
    whole = values[:, : num_chunks * CHUNK].view(len(values), num_chunks, CHUNK)
    return whole, values[:, num_chunks * CHUNK :]


def _chunk_at(values: Tensor, chunk: Tensor, *, fill: float) -> tuple[Tensor, Tensor]:
    """The indices and values [num_rows, CHUNK] of the chunk [num_rows, 1]; `fill` where it runs past the end."""
    places = chunk * CHUNK + torch.arange(CHUNK, device=values.device)
    last = values.shape[1] - 1
    inside = values.gather(1, places.clamp(max=last))
    return places, inside.masked_fill(places > last, fill)


def _invert(cumulative: Tensor, fractions: Tensor) -> Tensor:
    """[num_rows, 1]: the first index whose cumulative weight exceeds that share [num_rows, 1] of the total."""
    total = cumulative[:, -1:]
    # Below the total, so that the found step rises: rounding can never select a weight of zero or run off the end.
    target = torch.minimum(fractions.clamp(min=0) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)
