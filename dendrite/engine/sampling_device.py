"""Sampling on the device, in a step that a CUDA graph can capture: what `sampling.py` does, without its edits.

    logits ──┬── temperature 0: the first largest
             └── / temperature ─ softmax ─ (top-k ─ top-p ─ min-p) ─ inverse CDF at the uniform of (key, position)

The uniforms are those of `random.py` to the bit. Sums are added up in another order than on the CPU, so a draw whose
uniform lies within rounding of a border between two tokens may fall to the other one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dendrite.engine.kernels.launch import overlap, power_of_two
from dendrite.engine.kernels.sampling import choose, cut, sum_kept, survey

CHUNK = 2048
"""Tokens of one program; 63 chunks make a vocabulary of 128,256."""
BLOCK = 8192
"""Tokens that the search for a cut reads at a time."""

_UNUSED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""Lower bits of a logit in float32 that are always zero."""


@dataclass(frozen=True)
class DrawParams:
    """What each row's token depends on besides its logits; on a graph's device, static buffers."""

    keys: Tensor
    """[num_rows] int64, the branches' 64-bit keys, as signed numbers."""
    positions: Tensor
    """[num_rows] int64, absolute positions of the tokens to draw."""
    temperatures: Tensor
    """[num_rows] float32; 0 takes the first largest."""
    top_ks: Tensor
    """[num_rows] int32; 0 keeps all."""
    top_ps: Tensor
    """[num_rows] float32; 1 keeps all."""
    min_ps: Tensor
    """[num_rows] float32; 0 keeps all."""

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> DrawParams:
        """Buffers for that many rows, filled so that each row takes its first largest token."""
        return cls(
            keys=torch.zeros(num_rows, dtype=torch.int64, device=device),
            positions=torch.zeros(num_rows, dtype=torch.int64, device=device),
            temperatures=torch.zeros(num_rows, device=device),
            top_ks=torch.zeros(num_rows, dtype=torch.int32, device=device),
            top_ps=torch.ones(num_rows, device=device),
            min_ps=torch.zeros(num_rows, device=device),
        )

    def first(self, num_rows: int) -> DrawParams:
        """Views of the first rows."""
        return DrawParams(
            self.keys[:num_rows],
            self.positions[:num_rows],
            self.temperatures[:num_rows],
            self.top_ks[:num_rows],
            self.top_ps[:num_rows],
            self.min_ps[:num_rows],
        )


@dataclass(frozen=True)
class Draws:
    """What was drawn."""

    tokens: Tensor
    """[num_rows] int64; -1 for a row whose logits hold NaN or infinity, or are all -inf."""
    logprobs: Tensor
    """[num_rows] float32, of the tokens in the model's own distribution; NaN where the token is -1."""
    normalizers: Tensor
    """[num_rows] float32, the log of the sum of the exponentials of the logits; NaN where the token is -1."""


def draw_tokens(logits: Tensor, params: DrawParams, *, filtered: bool) -> Draws:
    """Draw the next token of every row.

    Args:
        logits: [num_rows, vocab], any floating type, rows contiguous; not changed.
        params: of these rows.
        filtered: whether top-k, top-p and min-p are applied at all. Rows that set none are drawn as without.

    Returns:
        The draws, in new memory.
    """
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1
    num_chunks = triton.cdiv(vocab, CHUNK)
    chunks = power_of_two(num_chunks)
    floats = torch.empty((3, num_rows, num_chunks), device=logits.device)
    integers = torch.empty((2, num_rows, num_chunks), dtype=torch.int32, device=logits.device)
    peaks, raw_sums, sums = floats.unbind()
    firsts, ties = integers.unbind()
    options = overlap(logits.device)
    shape = (vocab, logits.stride(0))
    survey[(num_rows, num_chunks)](
        logits, params.temperatures, peaks, raw_sums, sums, firsts, *shape, CHUNK=CHUNK, **options
    )
    largests = torch.empty((2, num_rows), device=logits.device)
    limits, quotas = largests[1], torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if filtered:
        cut[(num_rows,)](
            logits, params.temperatures, params.top_ks, params.top_ps, peaks, largests, limits, quotas,
            logits.stride(0), num_chunks, VOCAB=vocab, SHIFT=_UNUSED_BITS[logits.dtype],
            CHUNKS=chunks, BLOCK=BLOCK, num_warps=16, **options
        )  # fmt: skip
        sum_kept[(num_rows, num_chunks)](
            logits, params.temperatures, params.min_ps, largests, limits, sums, ties, *shape, CHUNK=CHUNK, **options
        )
    draws = Draws(
        tokens=torch.empty(num_rows, dtype=torch.int64, device=logits.device),
        logprobs=torch.empty(num_rows, device=logits.device),
        normalizers=torch.empty(num_rows, device=logits.device),
    )
    choose[(num_rows,)](
        logits, params.keys, params.positions, params.temperatures, params.min_ps, peaks, raw_sums, sums, firsts,
        limits, quotas, ties, draws.tokens, draws.logprobs, draws.normalizers, *shape, num_chunks,
        FILTERED=filtered, CHUNKS=chunks, CHUNK=CHUNK, **options
    )  # fmt: skip
    return draws
