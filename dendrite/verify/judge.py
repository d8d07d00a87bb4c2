"""From what both sides produced to a row: equal tokens, the largest difference, a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dendrite.verify.prompts import Prompt
from dendrite.verify.report import Row, Verdict

TOLERANCE = 1e-4
"""Of a float32 logit, and of the log-probability of one token. Transformers' own attention functions differ among
themselves by a third of this on usual prompts, and by all of it on some."""
LOSS = 2.0
"""Above the tolerance, float64 decides: ours passes as rounding if it is within the tolerance of float64, or no more
than this many times as far from it as the float32 reference is."""
TIE = 1e-5
"""Where the reference itself puts our token this little behind its own, the order of additions decides which of the two
comes first, and no order is the right one. It passes as rounding, by name, and not as equal. A wider gap is a miss."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the reference does with a prompt."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    """Of `generate`, greedy."""
    logits: Tensor
    """[len(token_ids), vocab_size], float32: row i is what token i follows from."""
    exact: Callable[[], Tensor]
    """The same logits in float64; slow the first time."""

    @property
    def path(self) -> list[int]:
        """The prompt and what follows."""
        return [*self.prompt.token_ids, *self.token_ids]


def judge_tokens(
    group: str,
    case: str,
    got: Sequence[int],
    expected: Expected,
    *,
    logits: Tensor | None = None,
    logprobs: Sequence[float] = (),
    first: int = 0,
    note: str = "",
) -> Row:
    """Compare greedy tokens, and their logits where there are any.

    Args:
        group: what the row is about.
        case: the row's name.
        got: the engine's tokens.
        expected: the reference's.
        logits: [len(got), vocab_size], what the engine's tokens were taken from.
        logprobs: of the engine's tokens, where there are no logits to compare.
        first: which of the reference's tokens `got` begins at.
        note: for the row.
    """
    wanted = expected.token_ids[first : first + len(got)]
    pairs = zip(got, wanted, strict=True)
    num_equal = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), len(wanted))
    verdict: Verdict = "ok"
    difference = 0.0
    if logits is not None:  # those of an unequal token still follow from equal tokens
        difference, verdict, why = _judge_logits(logits[: num_equal + 1], expected, first)
        note = _joined(note, why)
    elif logprobs:
        difference = _logprob_difference(logprobs[:num_equal], got, expected.logits[first:])
        verdict = "ok" if difference <= TOLERANCE else "miss"
    if num_equal < len(wanted):
        row = expected.logits[first + num_equal]
        gap = float(row.max() - row[got[num_equal]])
        verdict = "rounding" if gap < TIE and verdict != "miss" else "miss"
        note = _joined(note, f"token {first + num_equal}: {got[num_equal]} is {gap:.1e} behind {wanted[num_equal]}")
    return Row(group, case, num_equal, len(wanted), difference, TOLERANCE, verdict, note)


def judge_prefill(group: str, case: str, logits: Tensor, expected: Expected) -> Row:
    """Judge the logits that a prompt ends with, `[1, vocab_size]`."""
    difference, verdict, note = _judge_logits(logits, expected, 0)
    return Row(group, case, 0, 0, difference, TOLERANCE, verdict, note)


def judge_difference(group: str, case: str, difference: float, *, tolerance: float = TOLERANCE, note: str = "") -> Row:
    """Judge a difference alone."""
    verdict: Verdict = "ok" if difference <= tolerance else "miss"  # a NaN is a miss
    return Row(group, case, 0, 0, difference, tolerance, verdict, note)


def _judge_logits(logits: Tensor, expected: Expected, first: int) -> tuple[float, Verdict, str]:
    """(largest difference, verdict, why) of logits `[num_rows, vocab_size]` from the reference's row `first` on."""
    rows = slice(first, first + len(logits))
    difference = largest_difference(logits, expected.logits[rows])
    if difference <= TOLERANCE or math.isnan(difference):
        return difference, "ok" if difference <= TOLERANCE else "miss", ""
    exact = expected.exact()[rows]
    ours, theirs = largest_difference(logits, exact), largest_difference(expected.logits[rows], exact)
    verdict: Verdict = "rounding" if ours <= max(TOLERANCE, LOSS * theirs) else "miss"
    return difference, verdict, f"off float64 by {ours:.1e}, the reference by {theirs:.1e}"


def _logprob_difference(logprobs: Sequence[float], token_ids: Sequence[int], logits: Tensor) -> float:
    num_tokens = len(logprobs)
    if not num_tokens:
        return 0.0
    table = logits[:num_tokens].double().log_softmax(-1)
    theirs = table.gather(1, torch.tensor(token_ids[:num_tokens]).unsqueeze(1)).squeeze(1)
    return largest_difference(torch.tensor(logprobs, dtype=theirs.dtype), theirs)


def judge_worst(group: str, case: str, rows: Sequence[Row], *, note: str = "") -> Row:
    """Many small comparisons as one row: sums of tokens, the worst of everything else, the first misses by name."""
    verdicts = {row.verdict for row in rows}
    verdict: Verdict = "miss" if "miss" in verdicts else "rounding" if "rounding" in verdicts else "ok"
    bad = [f"{row.case}: {row.note or f'{row.max_difference:.1e}'}" for row in rows if row.verdict != "ok"]
    return Row(
        group,
        case,
        sum(row.tokens_equal for row in rows),
        sum(row.tokens_total for row in rows),
        max(row.max_difference for row in rows),
        max(row.tolerance for row in rows),
        verdict,
        _joined(note, *bad[:3]),
    )


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two logits; NaN if there is one."""
    return float((ours - theirs).abs().max())


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
