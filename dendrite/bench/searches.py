"""The suite's cases on this engine, as a program that uses it would write them: fork, append, generate, prune."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import singledispatch

from dendrite.bench.cases import (
    TEMPERATURE,
    Case,
    Decode,
    Fanout,
    FirstToken,
    Memory,
    MonteCarlo,
    Prompts,
    Score,
    Thoughts,
    cue,
)
from dendrite.bench.rounds import Run
from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine

UNSHARED = "K/V of separate requests"


@singledispatch
def opened(case: Case, engine: Engine) -> AbstractContextManager[Run]:
    """What runs one repetition of the case, while what its repetitions share (a warm prefix) is there.

    Each repetition gives figure -> value in the case's unit, and leaves nothing in the engine.
    """
    raise AssertionError(f"{case.name} cannot be run on {engine}")


@opened.register
@contextmanager
def _decode(case: Decode, engine: Engine) -> Iterator[Run]:
    prompts = Prompts(case, engine.spec.vocab_size)
    with ExitStack() as stack:
        roots = [stack.enter_context(engine.root(token_ids=prompts.tokens(case.prompt))) for _ in range(case.batch)]

        def seconds(tokens: int) -> float:
            began = time.perf_counter()
            branches = [root.fork() for root in roots]
            _generate(engine, branches, tokens)
            _prune(branches)
            return time.perf_counter() - began

        def run() -> dict[str, float]:
            short = seconds(case.short)
            return {case.figure: (seconds(case.long) - short) / (case.long - case.short) * 1e3}

        yield run


@opened.register
@contextmanager
def _fanout(case: Fanout, engine: Engine) -> Iterator[Run]:
    prompts = Prompts(case, engine.spec.vocab_size)
    with engine.root(token_ids=prompts.tokens(case.prefix)) as root:

        def run() -> dict[str, float]:
            began = time.perf_counter()
            branches = root.fork(case.branches)
            _generate(engine, branches, case.tokens)
            _prune(branches)
            return {case.figure: (time.perf_counter() - began) * 1e3}

        yield run


@opened.register
@contextmanager
def _first_token(case: FirstToken, engine: Engine) -> Iterator[Run]:
    prompts = Prompts(case, engine.spec.vocab_size)
    with engine.root(token_ids=prompts.tokens(case.prefix)) as root:

        def run() -> dict[str, float]:
            own = [prompts.tokens(1) for _ in range(case.children)]
            began = time.perf_counter()
            children = root.fork(case.children)
            for child, tokens in zip(children, own, strict=True):
                child.append(tokens)
            _generate(engine, children, 1)
            _prune(children)
            return {case.figure: (time.perf_counter() - began) * 1e3}

        yield run


@opened.register
@contextmanager
def _thoughts(case: Thoughts, engine: Engine) -> Iterator[Run]:
    prompts = Prompts(case, engine.spec.vocab_size)
    yield lambda: {case.figure: _grow_thoughts(engine, case, prompts) * 1e3}


@opened.register
@contextmanager
def _monte_carlo(case: MonteCarlo, engine: Engine) -> Iterator[Run]:
    prompts = Prompts(case, engine.spec.vocab_size)
    yield lambda: {case.figure: _grow_monte_carlo(engine, case, prompts) * 1e3}


def _grow_thoughts(engine: Engine, case: Thoughts, prompts: Prompts) -> float:
    """Seconds of one search. Who survives is not the point: it is decided by the last tokens, as for every engine."""
    prompt = prompts.tokens(case.prompt)
    began = time.perf_counter()
    root = engine.root(token_ids=prompt)
    front = [root]
    for _ in range(case.depth):
        thoughts = [thought for parent in front for thought in parent.fork(case.branch)]
        outs = _generate(engine, thoughts, case.tokens)
        _values(engine, thoughts)
        ranked = sorted(zip(outs, thoughts, strict=True), key=lambda pair: hash(pair[0][-4:]))
        survivors = [thought for _, thought in ranked[: case.keep]]
        _prune([thought for _, thought in ranked[case.keep :]])
        _prune(front)
        front = survivors
    _prune(front)
    return time.perf_counter() - began


def _grow_monte_carlo(engine: Engine, case: MonteCarlo, prompts: Prompts) -> float:
    """Seconds of one search; the whole tree stays until its end."""
    prompt = prompts.tokens(case.prompt)
    began = time.perf_counter()
    nodes = [engine.root(token_ids=prompt)]
    for pick in case.picks():
        children = nodes[pick].fork(case.branch)
        _generate(engine, children, case.tokens)
        _values(engine, children)
        nodes += children
    _prune(nodes)
    return time.perf_counter() - began


@opened.register
@contextmanager
def _score(case: Score, engine: Engine) -> Iterator[Run]:
    prompts = Prompts(case, engine.spec.vocab_size)
    with engine.root(token_ids=prompts.tokens(case.prefix)) as root:
        root.score([prompts.tokens(1)])  # computes the prefix, so that the first repetition is a step like the others

        def run() -> dict[str, float]:
            choices = [prompts.tokens(case.tokens) for _ in range(case.choices)]
            began = time.perf_counter()
            root.score(choices)
            return {case.figure: (time.perf_counter() - began) * 1e3}

        yield run


@opened.register
@contextmanager
def _memory(case: Memory, engine: Engine) -> Iterator[Run]:
    prompts = Prompts(case, engine.spec.vocab_size)
    with engine.root(token_ids=prompts.tokens(case.prefix)) as root:

        def run() -> dict[str, float]:
            branches = root.fork(case.branches)
            _generate(engine, branches, case.tokens)
            stats = engine.stats()
            _prune(branches)
            blocks_each = -(-case.length // engine.config.block_size)
            return {
                case.figure: stats.blocks_used * stats.block_bytes / 1e6,
                UNSHARED: case.branches * blocks_each * stats.block_bytes / 1e6,
            }

        yield run


def _values(engine: Engine, branches: Sequence[Branch]) -> None:
    """One token after a cue, for each branch, which stays as it is."""
    asked = [branch.fork().append(cue(engine.spec.vocab_size)) for branch in branches]
    _generate(engine, asked, 1)
    _prune(asked)


def _generate(engine: Engine, branches: Sequence[Branch], tokens: int) -> list[tuple[int, ...]]:
    outs = engine.generate(branches, max_tokens=tokens, temperature=TEMPERATURE, ignore_eos=True)
    return [out.token_ids for out in outs]


def _prune(branches: Sequence[Branch]) -> None:
    for branch in branches:
        branch.prune()
