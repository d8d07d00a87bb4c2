"""What the search is compared with: whole poems sampled with the same prompt, cues and temperature, never checked."""

from __future__ import annotations

import time
from dataclasses import dataclass

from dendrite.demo.examples import prompt
from dendrite.demo.program import MAX_TOKENS, TEMPERATURE, line_cue
from dendrite.demo.task import Poem, faults
from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine

BATCH = 32
"""Poems sampled at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Poems as they came, and what they took."""

    poems: tuple[Poem, ...]
    tokens_generated: int
    tokens_computed: int
    tokens_logical: int
    """What it would have been with a request for each poem, each computing the prompt anew."""
    seconds: float

    @property
    def num_right(self) -> int:
        """How many keep every rule."""
        return sum(not any(faults(poem.word, poem.lines)) for poem in self.poems)

    @property
    def best(self) -> Poem:
        """The first of those with the most lines that keep the rules."""
        return max(self.poems, key=lambda poem: faults(poem.word, poem.lines).count(None))


async def sample(engine: Engine, word: str, *, num_tokens: int, seed: int) -> Samples:
    """Sample poems until they took at least `num_tokens` tokens.

    Raises:
        EngineError: whatever stopped the engine; the branches made here are pruned.
    """
    start, before = time.monotonic(), engine.stats().tokens_computed
    poems: list[Poem] = []
    spent = logical = 0
    with engine.root(messages=prompt(word), seed=seed) as root:
        while spent < num_tokens:
            batch = await _batch(engine, root, word, _num_more(len(poems), spent, num_tokens))
            poems += batch.poems
            spent += batch.tokens_generated
            logical += batch.tokens_logical
    return Samples(
        poems=tuple(poems),
        tokens_generated=spent,
        tokens_computed=engine.stats().tokens_computed - before,
        tokens_logical=logical,
        seconds=time.monotonic() - start,
    )


def _num_more(num_poems: int, spent: int, num_tokens: int) -> int:
    """A full batch, or as many poems as the rest of the tokens should make, judged by those there are."""
    if not spent:
        return BATCH
    return min(BATCH, max(1, round((num_tokens - spent) * num_poems / spent)))


@dataclass(frozen=True, slots=True)
class _Batch:
    poems: list[Poem]
    tokens_generated: int
    tokens_logical: int


async def _batch(engine: Engine, root: Branch, word: str, num: int) -> _Batch:
    """Sample `num` poems line by line, all in one batch."""
    poems = [Poem(word)] * num
    spent = 0
    branches = root.fork(num)
    try:
        for _ in word:
            for branch, poem in zip(branches, poems, strict=True):
                branch.append(line_cue(poem))
            said = await engine.agenerate(branches, max_tokens=MAX_TOKENS, temperature=TEMPERATURE, stop="\n")
            spent += sum(len(generation.token_ids) for generation in said)
            poems = [poem.add(generation.text.strip()) for poem, generation in zip(poems, said, strict=True)]
        return _Batch(poems, spent, sum(branch.num_tokens for branch in branches))
    finally:
        for branch in branches:
            branch.prune()
