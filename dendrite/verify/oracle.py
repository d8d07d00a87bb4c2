"""The verification as a whole: which cases run, in which order, on which set-ups."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

from dendrite.engine.errors import RequestError
from dendrite.engine.models import load_model
from dendrite.engine.registry import ModelStore
from dendrite.verify import cases, half
from dendrite.verify.half import LEAST
from dendrite.verify.half import LOSS as HALF_LOSS
from dendrite.verify.judge import LOSS, TIE, TOLERANCE, Expected, judge_worst
from dendrite.verify.pins import pins_of
from dendrite.verify.prompts import Prompt, make_prompts
from dendrite.verify.reference import Reference
from dendrite.verify.report import Report, Row
from dendrite.verify.subject import Load, Setup, Subject, opened, opened_whole

NUM_TOKENS = 64
"""Greedy tokens of each prompt."""
MARGIN = 64
"""Tokens of the context left for continuations that are scored."""
BATCHED = 160
"""Unless everything is asked for, the reference runs prompts up to this length as one batch."""
SETUPS = (Setup(1, 37), Setup(8, 64), Setup(32, 100))
GRID = tuple(Setup(block_size, chunk) for block_size in (1, 8, 16, 32) for chunk in (1, 7, 64, 512))

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Run:
    """What all groups of cases need."""

    name: str
    device: str
    full: bool
    load: Load
    progress: Progress
    reference: Reference
    expected: Sequence[Expected]

    def by_name(self, *names: str) -> list[Expected]:
        """The prompts of these names that the model has (no template, no chats)."""
        return [one for one in self.expected if one.prompt.name in names]


def verify(
    name: str,
    *,
    full: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
    load: Load = load_model,
) -> Report:
    """Compare the engine on this machine with an untouched copy of the model in Transformers.

    Args:
        name: a short name, a hub id or a folder.
        full: the whole grid of set-ups, forks at every offset, the reference prompt by prompt; minutes, not a minute.
        dtype: "float32": tokens equal and logits within 1e-4; "bfloat16" or "float16": logits within twice what
            Transformers' own run in it loses.
        device: where the engine runs, "cpu" or "cuda"; the reference runs on the CPU.
        progress: told what runs now.
        load: how the engine's copy is loaded; a test of this command gives it a broken one.

    Raises:
        RequestError: `dtype` is none of these.
        ModelError: no such model, or one that the engine refuses.
    """
    if dtype != "float32" and dtype not in LEAST:
        raise RequestError(f"dtype={dtype!r} cannot be verified: give float32, bfloat16 or float16")
    began = time.monotonic()
    progress = progress or _silence
    progress("loading the reference")
    folder = ModelStore().locate(name).path
    reference = Reference(folder)
    with opened(name, dtype=dtype, setup=Setup(device=device), load=load) as subject:
        exact = cache(partial(Reference, folder, dtype="float64"))
        expected = _expectations(subject, reference, exact, progress, full=full)
        run = _Run(name, device, full, load, progress, reference, expected)
        if dtype == "float32":
            rows = list(_main_rows(run, subject))
        else:
            rows = list(_half_rows(run, subject, Reference(folder, dtype=dtype)))
    if dtype == "float32":
        rows += _setup_rows(run)
        if device != "cpu":
            rows += _drawn_rows(run)
    return Report(name, dtype, tuple(rows), time.monotonic() - began, pins_of(folder), tolerances(dtype))


def tolerances(dtype: str) -> dict[str, str]:
    """What is allowed in a dtype, by what is compared."""
    if dtype in LEAST:
        return {"logits": f"{LEAST[dtype]:g}, or {HALF_LOSS:g} times the error of Transformers' own {dtype}"}
    return {
        "tokens": f"equal, unless the reference puts them within {TIE:g}",
        "logits": f"{TOLERANCE:g}, or {LOSS:g} times as far from float64 as the reference",
        "scores": f"{TOLERANCE:g} a token",
    }


def _silence(_text: str) -> None:
    pass


def _expectations(
    subject: Subject, reference: Reference, exact: Callable[[], Reference], progress: Progress, *, full: bool
) -> list[Expected]:
    engine = subject.engine
    room = engine.spec.context_length - NUM_TOKENS - MARGIN
    if room < 1:
        raise RequestError(f"the model's context of {engine.spec.context_length} tokens is too short to verify")
    prompts = make_prompts(engine.tokenizer, room=room, has_template=reference.has_template)
    expected = []
    for prompt, tokens in _reference_tokens(prompts, reference, progress, batched=0 if full else BATCHED):
        path = [*prompt.token_ids, *tokens[:-1]]
        in_float64 = cache(lambda path=path: exact().logits(path, NUM_TOKENS))
        expected.append(Expected(prompt, tuple(tokens), reference.logits(path, NUM_TOKENS), in_float64))
    return expected


def _reference_tokens(
    prompts: Sequence[Prompt], reference: Reference, progress: Progress, *, batched: int
) -> Iterator[tuple[Prompt, list[int]]]:
    short = [prompt for prompt in prompts if len(prompt.token_ids) <= batched]
    if short:
        progress(f"reference: {len(short)} short prompts, {NUM_TOKENS} tokens each")
        yield from zip(short, reference.greedy([prompt.token_ids for prompt in short], NUM_TOKENS), strict=True)
    for prompt in prompts:
        if len(prompt.token_ids) > batched:
            progress(f"reference: {prompt.name}, {NUM_TOKENS} tokens")
            yield prompt, reference.greedy([prompt.token_ids], NUM_TOKENS)[0]


def _main_rows(run: _Run, subject: Subject) -> Iterator[Row]:
    run.progress("tokenization")
    yield cases.tokenization(subject.engine, run.reference)
    pairs = []
    for expected in run.expected:
        run.progress(f"greedy: {expected.prompt.name}")
        pairs.append(tuple(cases.greedy(subject, expected)))
    for group in zip(*pairs, strict=True):  # all prefills, then all tokens
        yield from group
    for expected in run.expected if run.full else run.by_name("plain", "long chat", "129 tokens"):
        run.progress(f"forks: {expected.prompt.name}")
        yield from cases.forks(subject, expected, num_tokens=8, every=run.full and len(expected.path) < 256)
    run.progress("company")
    yield from cases.company(subject, run.expected, num_tokens=NUM_TOKENS if run.full else 16)
    for expected in run.expected if run.full else run.by_name("chat", "513 tokens"):
        run.progress(f"cache: {expected.prompt.name}")
        yield from cases.cache(subject, expected, num_tokens=16)
    for expected in run.expected if run.full else run.by_name("1 token", "emoji", "chat", "129 tokens"):
        run.progress(f"score: {expected.prompt.name}")
        yield cases.scores(subject, run.reference, expected)


def _setup_rows(run: _Run) -> Iterator[Row]:
    """Other sizes of blocks and chunks, each an engine of its own."""
    for setup in GRID if run.full else SETUPS:
        run.progress(str(setup))
        placed = replace(setup, device=run.device)
        with opened(run.name, dtype="float32", setup=placed, load=run.load) as subject:
            for expected in run.by_name("code", "long chat"):
                rows = [*cases.greedy(subject, expected)] if run.full else []
                rows += cases.forks(subject, expected, num_tokens=8)
                yield judge_worst("set-up", f"{setup}: {expected.prompt.name}", rows)


def _drawn_rows(run: _Run) -> Iterator[Row]:
    """Tokens that the device drew, all prompts in one batch, launched before the tokens before them were read."""
    run.progress("drawn on the device")
    with opened_whole(run.name, dtype="float32", setup=Setup(device=run.device), load=run.load) as engine:
        roots = [engine.root(token_ids=expected.prompt.token_ids) for expected in run.expected]
        outs = engine.generate(roots, max_tokens=NUM_TOKENS, ignore_eos=True)
        for expected, out in zip(run.expected, outs, strict=True):
            yield cases.drawn(expected, out.token_ids)


def _half_rows(run: _Run, subject: Subject, halved: Reference) -> Iterator[Row]:
    for expected in run.expected:
        run.progress(f"{subject.engine.spec.dtype}: {expected.prompt.name}")
        yield from half.forced(subject, halved, expected, num_tokens=NUM_TOKENS if run.full else 16)
