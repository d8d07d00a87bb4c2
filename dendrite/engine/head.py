"""From hidden rows to what requests asked of them: a token each for generations, a log-probability for scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dendrite.engine.generation import GenerationRequest
from dendrite.engine.requests import ScoreRequest
from dendrite.engine.runner import Runner
from dendrite.engine.sampling import LogitsError, Sampler, log_softmax_at
from dendrite.engine.sampling_row import Sampled
from dendrite.engine.scheduler import Read

ROWS_AT_ONCE = 256
"""Rows whose logits are held at once: 50 MB in float32 for a vocabulary of 49,152."""

Result = Sampled | float | LogitsError


class Head:
    """The language-model head and the sampler over one step's reads."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._sampler = Sampler()

    def read(self, reads: Sequence[Read], hidden: Tensor | None) -> list[Result]:
        """One result a read, in order. `hidden` is the step's output, `[num_outputs, hidden_size]`.

        Logits that cannot be used (NaN) come back as a `LogitsError` in the place of the reads they spoil.
        """
        results: list[Result] = []
        for first in range(0, len(reads), ROWS_AT_ONCE):
            results += self._read_part(reads[first : first + ROWS_AT_ONCE], hidden)
        return results

    def _read_part(self, reads: Sequence[Read], hidden: Tensor | None) -> list[Result]:
        rows, places = _distinct_rows(reads, hidden)
        logits = self._runner.logits(rows)
        results: dict[int, Result] = {}
        drawing = [i for i, read in enumerate(reads) if isinstance(read.request, GenerationRequest)]
        scoring = [i for i, read in enumerate(reads) if isinstance(read.request, ScoreRequest)]
        if drawing:
            self._draw(reads, _rows_at(logits, [places[i] for i in drawing]), drawing, results)
        if scoring:
            self._score(reads, _rows_at(logits, [places[i] for i in scoring]), scoring, results)
        return [results[i] for i in range(len(reads))]

    def _draw(self, reads: Sequence[Read], logits: Tensor, which: list[int], results: dict[int, Result]) -> None:
        states = [request.row for i in which if isinstance(request := reads[i].request, GenerationRequest)]
        try:
            results.update(zip(which, self._sampler.sample(logits, states), strict=True))
        except LogitsError as error:
            self._without(error, reads, logits, which, results, self._draw)

    def _score(self, reads: Sequence[Read], logits: Tensor, which: list[int], results: dict[int, Result]) -> None:
        tokens = [_wanted_token(reads[i]) for i in which]
        try:
            values = log_softmax_at(logits, torch.tensor(tokens, device=logits.device))
            results.update(zip(which, values.tolist(), strict=True))
        except LogitsError as error:
            self._without(error, reads, logits, which, results, self._score)

    def _without(
        self,
        error: LogitsError,
        reads: Sequence[Read],
        logits: Tensor,
        which: list[int],
        results: dict[int, Result],
        again: Callable[[Sequence[Read], Tensor, list[int], dict[int, Result]], None],
    ) -> None:
        """Gives the spoilt rows their error and reads the others once more."""
        spoilt = set(error.rows)
        results.update((which[row], error) for row in spoilt)
        good = [row for row in range(len(which)) if row not in spoilt]
        if good:
            again(reads, logits[torch.tensor(good, device=logits.device)], [which[row] for row in good], results)


def _wanted_token(read: Read) -> int:
    assert isinstance(read.request, ScoreRequest)
    return read.request.candidates[read.candidate][read.index]


def _distinct_rows(reads: Sequence[Read], hidden: Tensor | None) -> tuple[Tensor, list[int]]:
    """The distinct hidden rows that are read, `[num_rows, hidden_size]`, and the place of each read's among them.

    Eight forks that draw their first token read one row, whose logits are computed once.
    """
    sources: list[tuple[Tensor, int]] = []
    place_of: dict[tuple[int, int], int] = {}
    places: list[int] = []
    for read in reads:
        tensor, row = (hidden, read.source) if isinstance(read.source, int) else read.source
        assert isinstance(tensor, Tensor)
        place = place_of.setdefault((id(tensor), row), len(sources))
        if place == len(sources):
            sources.append((tensor, row))
        places.append(place)
    first = sources[0][0]
    if all(tensor is first for tensor, _ in sources):
        return _rows_at(first, [row for _, row in sources]), places
    return torch.stack([tensor[row] for tensor, row in sources]), places


def _rows_at(tensor: Tensor, rows: list[int]) -> Tensor:
    """Those rows of the tensor; itself where they are all of them in order."""
    if rows == list(range(len(tensor))):
        return tensor
    return tensor[torch.tensor(rows, device=tensor.device)]
