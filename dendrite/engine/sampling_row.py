"""What the sampler knows of one running generation, without torch, so that the scheduler can hold it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dendrite.engine.config import SamplingParams
from dendrite.engine.grammars import Guide

_NO_TOKENS = np.empty(0, np.int64)


class SeenTokens:
    """The distinct tokens of a row's prompt and output with their counts in the output, kept as arrays that grow."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._slots = dict(zip(distinct.tolist(), range(len(distinct)), strict=True))
        self._ids = distinct
        self._counts = np.zeros(len(distinct), dtype=np.float32)

    @property
    def ids(self) -> NDArray[np.int64]:
        """[num_seen] token ids."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """[num_seen] times each was generated; 0 for a token of the prompt alone."""
        return self._counts[: len(self._slots)]

    def add(self, token_id: int) -> None:
        """Count one generated token."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.resize(self._ids, 2 * slot + 8)
            self._counts = np.concatenate([self._counts, np.zeros(slot + 8, dtype=np.float32)])
        self._ids[slot] = token_id
        self._counts[slot] += 1


@dataclass(slots=True)
class SampleRow:
    """What the sampler knows of one running generation. Made by `start`; `advance` after each committed token."""

    params: SamplingParams
    key: int
    """The branch's 64-bit key."""
    position: int
    """Absolute position of the token to draw."""
    num_generated: int
    seen: SeenTokens | None
    """None when the row has no penalties."""
    bias: tuple[NDArray[np.int64], NDArray[np.float32]] | None
    """Token ids and what is added to their logits."""
    ends: NDArray[np.int64]
    """Token ids that end the text, forbidden until `min_tokens` are made; none if that is 0."""
    num_ahead: int = 0
    """Tokens before `position` + this that are drawn but not known yet: 1 while the engine looks ahead."""
    guide: Guide | None = None
    """Where the text stands in its grammar; None when the row has no constraint."""

    @classmethod
    def start(
        cls,
        params: SamplingParams,
        *,
        key: int,
        position: int,
        prompt_ids: Sequence[int] = (),
        eos_token_ids: frozenset[int] = frozenset(),
        guide: Guide | None = None,
    ) -> SampleRow:
        """A row about to draw its first token.

        `prompt_ids` are the tokens before it; the repetition penalty reads them, presence and frequency do not.
        """
        penalised = params.presence_penalty != 0 or params.frequency_penalty != 0
        repeats = params.repetition_penalty != 1
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)} if params.min_tokens else ()
        bias = params.logit_bias
        if guide is not None and params.ignore_eos:
            bias = {**bias} | dict.fromkeys(eos_token_ids, -math.inf)  # a grammar would take them for its end
        return cls(
            params=params,
            key=key,
            position=position,
            num_generated=0,
            seen=SeenTokens(prompt_ids if repeats else ()) if penalised or repeats else None,
            bias=(np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)) if bias else None,
            ends=np.array(sorted(ends), np.int64) if ends else _NO_TOKENS,
            guide=guide,
        )

    def advance(self, token_id: int) -> None:
        """Count a token that was generated, drawn or forced, and move to the next position."""
        self.position += 1
        self.num_generated += 1
        if self.seen is not None:
            self.seen.add(token_id)

    @property
    def may_not_end(self) -> bool:
        """Whether `min_tokens` still forbids the tokens that end the text."""
        return self.num_generated < self.params.min_tokens and len(self.ends) > 0

    @property
    def edited(self) -> bool:
        """Whether the model's logits are changed before a token is chosen."""
        return self.seen is not None or self.bias is not None or self.guide is not None or self.may_not_end

    @property
    def draw_position(self) -> int:
        """Absolute position of the token to draw in the step that is launched now."""
        return self.position + self.num_ahead

    @property
    def is_plain(self) -> bool:
        """Whether the draw needs nothing of the host: not the tokens before it, nor logits that only the host edits."""
        return not self.edited and not self.params.top_logprobs

    @property
    def filtered(self) -> bool:
        """Whether unlikely tokens are dropped before a draw."""
        params = self.params
        return params.temperature > 0 and (params.top_p < 1 or params.top_k > 0 or params.min_p > 0)


@dataclass(frozen=True, slots=True)
class Sampled:
    """A row's token."""

    token_id: int
    logprob: float
    """Natural log of its probability in the model's own distribution."""
    top: tuple[tuple[int, float], ...]
    """The `top_logprobs` likeliest tokens with theirs, likeliest first."""
