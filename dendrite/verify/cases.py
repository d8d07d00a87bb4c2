"""The float32 cases: one function a group, each yielding rows over an engine that is open."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine
from dendrite.verify.judge import TOLERANCE, Expected, judge_difference, judge_prefill, judge_tokens, judge_worst
from dendrite.verify.pins import SEED
from dendrite.verify.prompts import CHATS, TEXTS
from dendrite.verify.reference import Reference
from dendrite.verify.report import Row, Verdict
from dendrite.verify.subject import Subject

CHOICES = (" yes", " no", "\n\n", " It was counted forty-two times.", " Größe 🙂", " 7 12 1984")
AT_ONCE = 48
"""Forks in one batch: those at early offsets compute the rest of their prompt again, each for itself."""


def tokenization(engine: Engine, reference: Reference) -> Row:
    """Prompts become the tokens that Transformers makes of them."""
    tokenizer = engine.tokenizer
    pairs = [(tokenizer.encode(text, bos=True), reference.encode(text)) for text in TEXTS.values()]
    if reference.has_template:
        pairs += [(tokenizer.render(chat), reference.render(chat)) for chat in CHATS.values()]
    num_equal = sum(ours == theirs for ours, theirs in pairs)
    verdict: Verdict = "ok" if num_equal == len(pairs) else "miss"
    return Row("tokens", "texts and chats", num_equal, len(pairs), 0.0, 0.0, verdict, "counts prompts, not tokens")


def greedy(subject: Subject, expected: Expected) -> Iterator[Row]:
    """A cold prompt: the logits it ends with, then every token and its logits."""
    name = expected.prompt.name
    subject.engine.clear_cache()
    with subject.engine.root(token_ids=expected.prompt.token_ids) as root:
        tokens, logits = subject.greedy(root, len(expected.token_ids))
    yield judge_prefill("prefill", name, logits[:1], expected)
    yield judge_tokens("greedy", name, tokens, expected, logits=logits)


def forks(subject: Subject, expected: Expected, *, num_tokens: int, every: bool = False) -> Iterator[Row]:
    """Forks of a warm branch at offsets around the block boundaries: alone, and all in one batch."""
    name, path = expected.prompt.name, expected.path
    last = len(path) - num_tokens
    edges = _around_boundaries(subject.engine.config.block_size, len(expected.prompt.token_ids), last)
    offsets = list(range(1, last + 1)) if every else edges
    with subject.engine.root(token_ids=path) as warm:
        warm.score([" x"])  # computes its K/V and keeps nothing
        alone = list(_forked_alone(subject, warm, expected, edges[::2], num_tokens=num_tokens))
        yield judge_worst("fork", f"{name}, alone", alone, note=f"at {_listed(edges[::2])}")
        batch = list(_forked_together(subject.engine, warm, expected, offsets, num_tokens=num_tokens))
        yield judge_worst("fork", f"{name}, in one batch", batch, note=f"at {_listed(offsets)}")


def _forked_alone(
    subject: Subject, warm: Branch, expected: Expected, offsets: Sequence[int], *, num_tokens: int
) -> Iterator[Row]:
    for at in offsets:
        with _fork(warm, expected, at) as branch:
            first = branch.num_tokens - len(expected.prompt.token_ids)
            tokens, logits = subject.greedy(branch, num_tokens)
            yield judge_tokens("fork", f"at {at}", tokens, expected, logits=logits, first=first)


def _forked_together(
    engine: Engine, warm: Branch, expected: Expected, offsets: Sequence[int], *, num_tokens: int
) -> Iterator[Row]:
    for begin in range(0, len(offsets), AT_ONCE):
        batch = offsets[begin : begin + AT_ONCE]
        branches = [_fork(warm, expected, at) for at in batch]
        firsts = [branch.num_tokens - len(expected.prompt.token_ids) for branch in branches]
        outs = engine.generate(branches, max_tokens=num_tokens, ignore_eos=True)
        for at, first, out in zip(batch, firsts, outs, strict=True):
            yield judge_tokens("fork", f"at {at}", out.token_ids, expected, logprobs=out.logprobs, first=first)
            out.branch.prune()


def _fork(warm: Branch, expected: Expected, at: int) -> Branch:
    """A fork at this offset; inside the prompt, the rest of the prompt is appended, so it is computed again."""
    [branch] = warm.fork(1, at=at)
    return branch.append(expected.prompt.token_ids[at:]) if at < len(expected.prompt.token_ids) else branch


def _around_boundaries(block_size: int, num_prompt: int, last: int) -> list[int]:
    """The offsets one before, on and after block boundaries: the first, and those around the prompt's end and later."""
    boundaries = {block_size, *range(num_prompt // block_size * block_size, last + block_size, block_size)}
    chosen = sorted(boundaries)[: 6 if block_size > 1 else 12]
    return sorted({at for edge in chosen for at in (edge - 1, edge, edge + 1) if 1 <= at <= last})


def company(subject: Subject, expected: Sequence[Expected], *, num_tokens: int) -> Iterator[Row]:
    """All prompts in one batch, beside branches that sample meanwhile and begin and end when they like."""
    engine = subject.engine
    with _noise(engine, expected[0]):
        roots = [engine.root(token_ids=one.prompt.token_ids) for one in expected]
        outs = engine.generate(roots, max_tokens=num_tokens, ignore_eos=True)
        rows = [
            judge_tokens("company", one.prompt.name, out.token_ids, one, logprobs=out.logprobs)
            for one, out in zip(expected, outs, strict=True)
        ]
        for root in roots:
            root.prune()
    yield judge_worst("company", f"{len(rows)} prompts at once, others sampling", rows)


@contextmanager
def _noise(engine: Engine, expected: Expected) -> Iterator[None]:
    done = threading.Event()

    def sample() -> None:
        with engine.root(token_ids=expected.path, seed=SEED) as root:
            lengths = 0
            while not done.is_set():
                lengths = lengths % 7 + 1
                outs = engine.generate(root.fork(lengths), max_tokens=lengths, temperature=1.5, ignore_eos=True)
                for out in outs:
                    out.branch.prune()

    thread = threading.Thread(target=sample, name="dendrite-verify-noise")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def cache(subject: Subject, expected: Expected, *, num_tokens: int) -> Iterator[Row]:
    """Cold, warm and forked are the same; a counter proves that the warm ones were not computed again."""
    engine, prompt = subject.engine, expected.prompt
    engine.clear_cache()
    with engine.root(token_ids=prompt.token_ids) as cold:
        tokens, logits = subject.greedy(cold, num_tokens)
        yield judge_tokens("cache", f"{prompt.name}, cold", tokens, expected, logits=logits)
        before = engine.stats()
        with engine.root(token_ids=prompt.token_ids) as warm:
            tokens, logits = subject.greedy(warm, num_tokens)
        after = engine.stats()
        computed = after.tokens_computed - before.tokens_computed
        note = f"{after.tokens_shared - before.tokens_shared} tokens shared, {computed} computed"
        row = judge_tokens("cache", f"{prompt.name}, warm", tokens, expected, logits=logits, note=note)
        was_hit = computed <= num_tokens + 1  # and one for the prompt's last row, if it has to be read again
        yield row if was_hit else _missed(row, "the prefix was computed again")
        with cold.fork(1, at=len(prompt.token_ids))[0] as fork:
            tokens, logits = subject.greedy(fork, num_tokens)
        yield judge_tokens("cache", f"{prompt.name}, forked", tokens, expected, logits=logits)
    before = engine.stats()
    with engine.root(token_ids=prompt.token_ids) as revived:
        tokens, logits = subject.greedy(revived, num_tokens)
    after = engine.stats()
    note = f"{after.cache_hit_tokens - before.cache_hit_tokens} tokens from the cache"
    row = judge_tokens("cache", f"{prompt.name}, cached", tokens, expected, logits=logits, note=note)
    yield row if after.cache_hits > before.cache_hits else _missed(row, "the cached prefix was not found")


def _missed(row: Row, why: str) -> Row:
    return replace(row, verdict="miss", note=f"{why}: {row.note}")


def scores(subject: Subject, reference: Reference, expected: Expected) -> Row:
    """The score of a continuation is the sum of the reference's log-probabilities."""
    candidates = [subject.engine.tokenizer.encode(choice) for choice in CHOICES]
    with subject.engine.root(token_ids=expected.prompt.token_ids) as root:
        got = root.score(CHOICES)
    wanted = [sum(reference.logprobs(expected.prompt.token_ids, candidate)) for candidate in candidates]
    differences = [abs(ours - theirs) for ours, theirs in zip(got, wanted, strict=True)]
    tolerance = TOLERANCE * max(map(len, candidates))
    note = f"log-probabilities of {len(CHOICES)} choices"
    return judge_difference("score", expected.prompt.name, max(differences), tolerance=tolerance, note=note)


def _listed(offsets: Sequence[int]) -> str:
    if len(offsets) > 12:
        return f"{len(offsets)} offsets from {offsets[0]} to {offsets[-1]}"
    return ", ".join(map(str, offsets))


def drawn(expected: Expected, token_ids: Sequence[int]) -> Row:
    """Tokens that came without their logits: they are the reference's or not."""
    num_equal = next(
        (
            index
            for index, (ours, theirs) in enumerate(zip(token_ids, expected.token_ids, strict=True))
            if ours != theirs
        ),
        len(token_ids),
    )
    verdict: Verdict = "ok" if num_equal == len(token_ids) else "miss"
    return Row("drawn on the device", expected.prompt.name, num_equal, len(token_ids), 0.0, 0.0, verdict)
