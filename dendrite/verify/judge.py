"""From what both sides produced to a row: equal tokens, the largest difference, a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dendrite.verify.prompts import Prompt
from dendrite.verify.report import Row, Verdict

TOLERANCE = 1e-4
"""Of a float32 logit, and of the log-probability of one token. Two orders of the same additions over a few hundred
numbers of size ten differ by about a third of this."""
TIE = 1e-5
"""Where the reference itself puts our token this little behind its own, rounding decides which of the two comes first;
no order of additions is the right one. It is reported as a tie, by name, and not as equal. Any wider gap is a miss."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the reference does with a prompt."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    """Of `generate`, greedy."""
    logits: Tensor
    """[len(token_ids), vocab_size], float32: row i is what token i follows from."""

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
    difference = 0.0
    if logits is not None:
        num_rows = min(num_equal + 1, len(got))  # the unequal token's logits still follow from equal tokens
        difference = largest_difference(logits[:num_rows], expected.logits[first : first + num_rows])
    elif logprobs and num_equal:
        table = expected.logits[first : first + num_equal].double().log_softmax(-1)
        theirs = table.gather(1, torch.tensor(got[:num_equal]).unsqueeze(1)).squeeze(1)
        difference = largest_difference(torch.tensor(logprobs[:num_equal], dtype=theirs.dtype), theirs)
    verdict: Verdict = "ok" if difference <= TOLERANCE else "miss"
    if num_equal < len(wanted):
        row = expected.logits[first + num_equal]
        gap = float(row.max() - row[got[num_equal]])
        verdict = "tie" if gap < TIE and verdict == "ok" else "miss"
        note = _joined(note, f"token {first + num_equal}: {got[num_equal]} is {gap:.1e} behind {wanted[num_equal]}")
    return Row(group, case, num_equal, len(wanted), difference, TOLERANCE, verdict, note)


def judge_difference(group: str, case: str, difference: float, *, tolerance: float = TOLERANCE, note: str = "") -> Row:
    """Judge a difference alone."""
    verdict: Verdict = "ok" if difference <= tolerance else "miss"  # a NaN is a miss
    return Row(group, case, 0, 0, difference, tolerance, verdict, note)


def judge_worst(group: str, case: str, rows: Sequence[Row], *, note: str = "") -> Row:
    """Many small comparisons as one row: sums of tokens, the worst of everything else, the first misses by name."""
    verdicts = {row.verdict for row in rows}
    verdict: Verdict = "miss" if "miss" in verdicts else "tie" if "tie" in verdicts else "ok"
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
