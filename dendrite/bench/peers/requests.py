"""The suite's cases on an engine that takes requests: every branch is a prompt with its whole path.

That is how users of such engines must say it. Their prefix caches are on, and the round that warms an engine up fills
them, as far as the case's own prompts repeat.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from dendrite.bench.cases import (
    Case,
    Decode,
    Fanout,
    FirstToken,
    MonteCarlo,
    Prompts,
    Score,
    Thoughts,
    cue,
    from_message,
)
from dendrite.bench.peers.protocol import Answer, Message, PeerError

Tokens = list[int]
Repetition = Callable[[], float]
"""One repetition; the figure's value in milliseconds."""


class RequestEngine(Protocol):
    """An engine from prompts to tokens, at `cases.TEMPERATURE`, ends of text ignored."""

    def generate(self, prompts: Sequence[Tokens], num_tokens: int) -> list[Tokens]:
        """Exactly `num_tokens` tokens after each prompt, in the order of the prompts."""

    def score(self, prompts: Sequence[Tokens], start: int) -> None:
        """Log-probabilities of each prompt's tokens from `start` on.

        Raises:
            PeerError: the engine has no way to do it.
        """


def request_answer(engine: RequestEngine, vocab_size: int) -> Answer:
    """The answer of a peer that is asked for one repetition of a case at a time."""
    opened: dict[Case, Repetition] = {}

    def answer(message: Message) -> Mapping[str, float]:
        case = from_message(message)
        if case not in opened:
            opened.clear()
            opened[case] = repetition(engine, case, Prompts(case, vocab_size), vocab_size)
        return {case.figure: opened[case]()}

    return answer


def repetition(engine: RequestEngine, case: Case, prompts: Prompts, vocab_size: int) -> Repetition:
    """What runs one repetition of the case.

    Raises:
        PeerError: requests cannot express the case.
    """
    if isinstance(case, Decode):
        return _decode(engine, case, prompts)
    if isinstance(case, Fanout):
        prefix = prompts.tokens(case.prefix)
        return lambda: _milliseconds(lambda: engine.generate([prefix] * case.branches, case.tokens))
    if isinstance(case, FirstToken):
        return _first_token(engine, case, prompts)
    if isinstance(case, Thoughts):
        return lambda: _thoughts(engine, case, prompts.tokens(case.prompt), cue(vocab_size))
    if isinstance(case, MonteCarlo):
        return lambda: _monte_carlo(engine, case, prompts.tokens(case.prompt), cue(vocab_size))
    if isinstance(case, Score):
        return _score(engine, case, prompts)
    raise PeerError(f"requests cannot express {case.workload}")


def _milliseconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


def _decode(engine: RequestEngine, case: Decode, prompts: Prompts) -> Repetition:
    batch = [prompts.tokens(case.prompt) for _ in range(case.batch)]

    def run() -> float:
        short = _milliseconds(lambda: engine.generate(batch, case.short))
        return (_milliseconds(lambda: engine.generate(batch, case.long)) - short) / (case.long - case.short)

    return run


def _first_token(engine: RequestEngine, case: FirstToken, prompts: Prompts) -> Repetition:
    prefix = prompts.tokens(case.prefix)

    def run() -> float:
        own = [prompts.tokens(1) for _ in range(case.children)]
        return _milliseconds(lambda: engine.generate([prefix + tokens for tokens in own], 1))

    return run


def _score(engine: RequestEngine, case: Score, prompts: Prompts) -> Repetition:
    prefix = prompts.tokens(case.prefix)

    def run() -> float:
        choices = [prompts.tokens(case.tokens) for _ in range(case.choices)]
        return _milliseconds(lambda: engine.score([prefix + choice for choice in choices], case.prefix))

    return run


def _thoughts(engine: RequestEngine, case: Thoughts, prompt: Tokens, question: Tokens) -> float:
    began = time.perf_counter()
    front = [prompt]
    for _ in range(case.depth):
        parents = [path for path in front for _ in range(case.branch)]
        thoughts = [path + out for path, out in zip(parents, engine.generate(parents, case.tokens), strict=True)]
        engine.generate([path + question for path in thoughts], 1)
        front = sorted(thoughts, key=lambda path: hash(tuple(path[-4:])))[: case.keep]
    return (time.perf_counter() - began) * 1e3


def _monte_carlo(engine: RequestEngine, case: MonteCarlo, prompt: Tokens, question: Tokens) -> float:
    began = time.perf_counter()
    nodes = [prompt]
    for pick in case.picks():
        path = nodes[pick]
        children = [path + out for out in engine.generate([path] * case.branch, case.tokens)]
        engine.generate([child + question for child in children], 1)
        nodes += children
    return (time.perf_counter() - began) * 1e3
