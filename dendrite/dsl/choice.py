"""Reading a value off the model: which of a few labels would it say next, and how likely is each.

A `Choice` is scored in one pass over all its labels. `reading` is the arithmetic, on plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from dendrite.dsl.types import Prompt, as_finite, is_prompt
from dendrite.engine.arguments import shortened
from dendrite.engine.errors import ProgramError

Normalize = Literal["sum", "mean", "unconditional"]
Read = Literal["expected", "argmax"]


class Choice:
    r"""A score that is read from the model: its opinion over labels, each worth a number.

        dd.Choice({"sure": 1.0, "maybe": 0.3, "no": 0.0}, "\nCan this reach 24?")

    The question is put after the node's transcript on a temporary branch, and the log-probabilities of all labels are
    taken in one pass. After text that does not end in white space, a label is read with a space before it. A softmax
    over the labels gives their probabilities.

    Args:
        labels: label -> its worth. A list counts evenly down from 1.0 for the first to 0.0 for the last.
        question: text, or chat messages; empty asks for the labels right after the transcript.
        fresh: put the question on a root of its own, without the transcript; text is then a user's turn.
        normalize: how a label of several tokens compares with others. `"sum"` takes its whole log-probability, `"mean"`
            that of one token on average, `"unconditional"` takes the sum and subtracts what the label has after the
            question alone, without the transcript, so that labels which are likely anywhere gain nothing by it
            (Holtzman et al., 2021).
        read: `"expected"` weighs every label's worth by its probability, `"argmax"` takes the likeliest label's.

    Raises:
        ProgramError: no labels, an empty or repeated one, a worth that is not finite, or options that exclude each
            other.
    """

    def __init__(
        self,
        labels: Mapping[str, float] | Sequence[str],
        question: Prompt = "",
        *,
        fresh: bool = False,
        normalize: Normalize = "mean",
        read: Read = "expected",
    ) -> None:
        self.labels: Mapping[str, float] = _worths(labels)
        self.question = question
        self.fresh = fresh
        self.normalize = normalize
        self.read = read
        if not is_prompt(question):
            raise ProgramError(f"the question {shortened(question)} of a Choice is neither text nor chat messages")
        if normalize not in ("sum", "mean", "unconditional"):
            raise ProgramError(f'normalize={normalize!r}: give "sum", "mean" or "unconditional"')
        if read not in ("expected", "argmax"):
            raise ProgramError(f'read={read!r}: give "expected" or "argmax"')
        if not question and (fresh or normalize == "unconditional"):
            asked = "fresh=True" if fresh else 'normalize="unconditional"'
            raise ProgramError(f"a Choice with {asked} needs a question: it is all that the model then reads")
        if fresh and normalize == "unconditional":
            raise ProgramError(
                'normalize="unconditional" subtracts what the question alone says, and with fresh=True nothing else is '
                'said: use "mean" or "sum"'
            )

    def continuations(self, transcript: str) -> list[str]:
        """The labels as they continue the question, or the transcript where there is no question."""
        starts_a_turn = self.fresh or not isinstance(self.question, str)
        before = "" if starts_a_turn else str(self.question) or transcript
        if not before or before[-1].isspace():
            return list(self.labels)
        return [label if label[0].isspace() else f" {label}" for label in self.labels]

    def reading(self, logprobs: Sequence[Sequence[float]], neutral: Sequence[Sequence[float]] | None = None) -> float:
        """The score.

        Args:
            logprobs: log-probability of each token of each label, in the labels' order.
            neutral: the same after the question alone; for `"unconditional"`.
        """
        return sum(p * worth for p, worth in zip(self._weights(logprobs, neutral), self.labels.values(), strict=True))

    def probabilities(
        self, logprobs: Sequence[Sequence[float]], neutral: Sequence[Sequence[float]] | None = None
    ) -> list[float]:
        """The softmax over the normalised labels, in their order."""
        totals = [sum(tokens) for tokens in logprobs]
        if self.normalize == "mean":
            totals = [total / len(tokens) for total, tokens in zip(totals, logprobs, strict=True)]
        elif self.normalize == "unconditional":
            assert neutral is not None, "the neutral pass is made for every unconditional choice"
            totals = [total - sum(tokens) for total, tokens in zip(totals, neutral, strict=True)]
        highest = max(totals)
        masses = [math.exp(total - highest) for total in totals]
        return [mass / sum(masses) for mass in masses]

    def _weights(self, logprobs: Sequence[Sequence[float]], neutral: Sequence[Sequence[float]] | None) -> list[float]:
        probabilities = self.probabilities(logprobs, neutral)
        if self.read == "expected":
            return probabilities
        likeliest = probabilities.index(max(probabilities))
        return [float(index == likeliest) for index in range(len(probabilities))]

    def __repr__(self) -> str:
        return f"Choice({list(self.labels)}, {self.question!r})"


def _check_labels(labels: object) -> None:
    if not isinstance(labels, Mapping | Sequence) or isinstance(labels, str | bytes) or not labels:
        raise ProgramError("a Choice needs labels: a list of them, or a dict of label -> worth")
    for label in labels:
        if not (isinstance(label, str) and is_prompt(label)):
            raise ProgramError(f"the label {shortened(label)} of a Choice is no text: give strings")


def _worths(labels: Mapping[str, float] | Sequence[str]) -> Mapping[str, float]:
    _check_labels(labels)
    if not isinstance(labels, Mapping):
        if len(set(labels)) < len(labels):
            raise ProgramError(f"a Choice has a label twice: {list(labels)}")
        last = max(1, len(labels) - 1)
        labels = {label: 1.0 - index / last for index, label in enumerate(labels)}
    for label, worth in labels.items():
        if not label.strip():
            raise ProgramError(f"the label {label!r} of a Choice is empty: give text that the model can say")
        if as_finite(worth) is None:
            raise ProgramError(f"the label {label!r} of a Choice is worth {worth!r}: give a finite number")
    return {label: float(worth) for label, worth in labels.items()}
