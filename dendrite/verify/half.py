"""The cases of half precision: logits along the float32 reference's tokens, held to what Transformers itself loses.

No token is promised in bfloat16 or float16, so both sides are made to take the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dendrite.verify.judge import Expected, largest_difference
from dendrite.verify.reference import Reference
from dendrite.verify.report import Row, Verdict
from dendrite.verify.subject import Subject

LOSS = 2.0
"""How many times the error of Transformers' own run ours may be: both round at every layer, in other places."""
LEAST = {"bfloat16": 0.05, "float16": 0.00625}
"""A difference of a logit that is never held against us: less than the step between two of its numbers above 8."""


def forced(subject: Subject, halved: Reference, expected: Expected, *, num_tokens: int) -> Iterator[Row]:
    """A cold prompt and a fork of it, both along the reference's tokens."""
    prompt = expected.prompt.token_ids
    path = [*prompt, *expected.token_ids[: num_tokens - 1]]
    truth = expected.logits[:num_tokens]
    theirs = halved.logits(path, num_tokens)
    dtype = subject.engine.spec.dtype
    tolerance = max(LEAST[dtype], LOSS * largest_difference(theirs, truth))
    with subject.engine.root(token_ids=prompt) as root:
        logits = subject.forced(root, expected.token_ids[:num_tokens])
        yield _row(dtype, f"{expected.prompt.name}, cold", logits, truth, tolerance)
        at = max(1, len(prompt) - 1)
        with root.fork(1, at=at)[0] as fork:
            logits = subject.forced(fork.append(prompt[at:]), expected.token_ids[:num_tokens])
        yield _row(dtype, f"{expected.prompt.name}, forked at {at}", logits, truth, tolerance)


def _row(dtype: str, case: str, logits: Tensor, truth: Tensor, tolerance: float) -> Row:
    difference = largest_difference(logits, truth)
    num_equal = int((logits.argmax(-1) == truth.argmax(-1)).sum())
    verdict: Verdict = "ok" if difference <= tolerance else "miss"
    note = f"logits against float32; the tolerance is twice the error of Transformers' own {dtype}"
    return Row(dtype, case, num_equal, len(truth), difference, tolerance, verdict, note)
