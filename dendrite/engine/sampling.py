"""From logits to tokens: one call a step, every row with parameters of its own.

What happens to a row, in this order (as vLLM and Transformers do it):

    logits ─ constraint ─ bias ─ penalties ─ ends ─┬─ temperature 0: the first largest
                                                   └─ / temperature ─ softmax ─ top-k ─ top-p ─ min-p ─ inverse CDF

Penalties are the repetition penalty, then frequency and presence; `min_tokens` forbids the ends. The inverse CDF runs
in vocabulary order. Log-probabilities are the model's own: of the logits as they came, before any of this. A draw reads
one uniform number keyed by (branch key, position), so a row's token does not depend on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dendrite.engine.config import SamplingParams
from dendrite.engine.errors import ModelError
from dendrite.engine.masks import Masks
from dendrite.engine.sampling_draw import draw, first_largest, uniforms
from dendrite.engine.sampling_edits import edit
from dendrite.engine.sampling_filters import keep_likely
from dendrite.engine.sampling_masks import MaskTable
from dendrite.engine.sampling_row import Sampled, SampleRow

SCORE_BLOCK = 16
"""Rows that `log_softmax_at` converts and normalises at a time."""

_NOTHING_LEFT = "logit_bias, min_tokens and the constraint leave no token that can be drawn"
SPOILT = "the model's logits hold NaN or infinity, or are all -inf"


class LogitsError(ModelError):
    """Rows from which nothing can be read; `rows` has their indices in the batch. No state was changed."""

    def __init__(self, rows: Sequence[int], reason: str) -> None:
        super().__init__(f"{'row' if len(rows) == 1 else 'rows'} {', '.join(map(str, rows))}: {reason}")
        self.rows = tuple(rows)
        self.reason = reason


class NoTokenLeft(LogitsError):
    """Rows whose bias, `min_tokens` and constraint together forbid every token."""


class Sampler:
    """Draws one token per row. It keeps only scratch memory between calls, so one thread at a time may use it."""

    def __init__(self) -> None:
        # Fresh memory of this size comes as untouched pages in every step, which cost more than the arithmetic.
        self._weights = _Scratch()
        self._work = _Scratch()
        self._table = MaskTable()

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SampleRow], masks: Masks | None = None) -> list[Sampled]:
        """Draw the next token of every row.

        Args:
            logits: [num_rows, vocab], any floating type; not changed.
            rows: [num_rows]; not advanced.
            masks: filled, with those of all rows that have a guide; None where no row has one.

        Raises:
            LogitsError: rows with NaN or infinity; call again without them.
            NoTokenLeft: rows where bias, min_tokens and constraint leave nothing.
        """
        logits = logits.float()
        weights = torch.softmax(logits, -1, out=self._weights.like(logits))
        normalizer = _normalizer(logits, weights)
        _refuse(normalizer.isnan(), SPOILT)
        token_ids = self._choose(logits, weights, rows, masks)
        logprobs = (logits.gather(1, token_ids[:, None])[:, 0] - normalizer).clamp(max=0)
        tops = _likeliest(logits, normalizer, [row.params.top_logprobs for row in rows])
        return [Sampled(*one) for one in zip(token_ids.tolist(), logprobs.tolist(), tops, strict=True)]

    def _choose(self, logits: Tensor, weights: Tensor, rows: Sequence[SampleRow], masks: Masks | None) -> Tensor:
        """Token ids [num_rows]; `weights` is the softmax of `logits`, overwritten where that is not what is drawn."""
        temperatures = torch.tensor([row.params.temperature for row in rows], device=logits.device)
        work = self._work.like(logits)
        edited = any(row.edited for row in rows)
        shaped = logits
        if edited:
            shaped = self._edited(logits, rows, masks)
            _refuse(~shaped.amax(-1).isfinite(), _NOTHING_LEFT, NoTokenLeft)
        greedy = temperatures == 0
        best = first_largest(shaped) if bool(greedy.any()) else None
        if best is not None and bool(greedy.all()):
            return best
        if edited or bool((temperatures != 1).any()):
            # The shift by the maximum keeps the quotient finite at tiny temperatures.
            shifted = torch.sub(shaped, shaped.amax(-1, keepdim=True), out=work)
            torch.softmax(shifted.div_(temperatures.masked_fill(greedy, 1)[:, None]), -1, out=weights)
        if any(row.filtered for row in rows):
            weights = keep_likely(weights, [row.params if row.filtered else _KEEP_ALL for row in rows], work)
        tokens = draw(weights, uniforms([row.key for row in rows], [row.draw_position for row in rows], logits.device))
        return tokens if best is None else torch.where(greedy, best, tokens)

    def _edited(self, logits: Tensor, rows: Sequence[SampleRow], masks: Masks | None) -> Tensor:
        """A copy of the logits in scratch memory, as constraints, bias, penalties and `min_tokens` change them."""
        work = self._work.like(logits)
        if masks is None:
            work.copy_(logits)
        else:
            constrained, bits = masks.rows_of([row.guide for row in rows])
            self._table.forbid(logits, bits, constrained, out=work)
        edit(work, rows)
        return work


_KEEP_ALL = SamplingParams()


@torch.inference_mode()
def log_softmax_at(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probabilities of given tokens, without a normalised copy of all the logits.

    Args:
        logits: [n, vocab], any floating type.
        token_ids: [n] int64.

    Returns:
        [n] float32.

    Raises:
        LogitsError: rows with NaN or infinity.
    """
    logprobs = torch.empty(len(logits), device=logits.device)
    for first in range(0, len(logits), SCORE_BLOCK):
        block = logits[first : first + SCORE_BLOCK].float()
        chosen = block.gather(1, token_ids[first : first + SCORE_BLOCK, None])[:, 0]
        logprobs[first : first + SCORE_BLOCK] = chosen - _normalizer(block, block.softmax(-1))
    _refuse(logprobs.isnan(), SPOILT)
    return logprobs.clamp_(max=0)


class _Scratch:
    """Memory for one float32 matrix, kept from call to call and grown when a larger one is asked for."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def like(self, values: Tensor) -> Tensor:
        """Uninitialised memory of that shape, on that device."""
        if self._memory.numel() < values.numel() or self._memory.device != values.device:
            self._memory = torch.empty(values.numel(), device=values.device)
        return self._memory[: values.numel()].view(values.shape)


def _normalizer(logits: Tensor, weights: Tensor) -> Tensor:
    """[num_rows]: log of the sum of exponentials, read off the softmax at the largest logit; NaN for a spoilt row."""
    return logits.amax(-1) - weights.amax(-1).log()


def _refuse(unusable: Tensor, reason: str, error: type[LogitsError] = LogitsError) -> None:
    if bool(unusable.any()):
        raise error(unusable.nonzero()[:, 0].tolist(), reason)


def _likeliest(logits: Tensor, normalizer: Tensor, widths: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """The first `widths[i]` of each row i's most likely tokens with their log-probabilities."""
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(widths)
    asking = [index for index, width in enumerate(widths) if width]
    if not asking:
        return tops
    if len(asking) < len(widths):
        rows = torch.tensor(asking, device=logits.device)
        logits, normalizer = logits[rows], normalizer[rows]
    values, token_ids = logits.topk(min(max(widths), logits.shape[1]), -1)
    logprobs = (values - normalizer[:, None]).clamp(max=0)
    for index, ids_of_row, logprobs_of_row in zip(asking, token_ids.tolist(), logprobs.tolist(), strict=True):
        tops[index] = tuple(zip(ids_of_row, logprobs_of_row, strict=True))[: widths[index]]
    return tops
