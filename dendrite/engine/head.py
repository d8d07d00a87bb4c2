"""From hidden rows to what requests asked of them: a token each for generations, a log-probability for scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dendrite.engine.generation import GenerationRequest
from dendrite.engine.grammars import Guide
from dendrite.engine.masks import Masks, MaskWriter
from dendrite.engine.requests import ScoreRequest
from dendrite.engine.runner import Runner
from dendrite.engine.sampling import LogitsError, NoTokenLeft, Sampler, log_softmax_at
from dendrite.engine.sampling_row import Sampled
from dendrite.engine.step import Read

ROWS_AT_ONCE = 256
"""Rows whose logits are held at once: 50 MB in float32 for a vocabulary of 49,152."""

Result = Sampled | float | LogitsError


class Flight(Protocol):
    """One step's reads on their way."""

    tokens: Tensor | None
    """[num_reads] int64 on the runner's device: what was drawn for each read, for the step after to compute; None where
    nobody looks ahead."""
    is_ready: bool
    """Whether the results are there, so that waiting for them hides nothing."""

    def results(self) -> list[Result]:
        """One result a read, in order; waits for them."""


class ReadyFlight:
    """Results that were there at once."""

    def __init__(self, results: list[Result], tokens: Tensor | None = None, *, is_ready: bool = True) -> None:
        self._results = results
        self.tokens = tokens
        self.is_ready = is_ready

    def results(self) -> list[Result]:
        """See `Flight.results`."""
        return self._results


def needs_settled(reads: Sequence[Read]) -> bool:
    """Whether a draw depends on tokens that may still be in flight, or on edits that only the host makes."""
    return any(isinstance(read.request, GenerationRequest) and not read.request.row.is_plain for read in reads)


class Head:
    """The language-model head and the sampler over one step's reads."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._sampler = Sampler()
        self._writer = MaskWriter(runner.spec.vocab_size)

    def launch(self, reads: Sequence[Read], hidden: Tensor | None, masks: Masks | None) -> Flight:
        """Start reading. `hidden` is the step's output, `[num_outputs, hidden_size]`."""
        results = self.read(reads, hidden, masks)
        if not self._runner.look_ahead:
            return ReadyFlight(results)
        tokens = [result.token_id if isinstance(result, Sampled) else 0 for result in results]
        device = hidden.device if hidden is not None else None
        return ReadyFlight(results, torch.tensor(tokens, device=device), is_ready=needs_settled(reads))

    def prepare(self, reads: Sequence[Read]) -> Masks | None:
        """Start computing the masks of the reads under a constraint, to run beside the model; None if there are none.

        Until `read` has them, nobody else may use the requests' guides.
        """
        guides = [guide for read in reads if (guide := _guide_of(read)) is not None]
        return self._writer.begin(guides) if guides else None

    def launching(self) -> AbstractContextManager[object]:
        """Entered by the thread that steps, for as long as it lives."""
        return nullcontext()

    def close(self) -> None:
        """End the thread that computes masks."""
        self._writer.close()

    def read(self, reads: Sequence[Read], hidden: Tensor | None, masks: Masks | None) -> list[Result]:
        """One result a read, in order. `hidden` is the step's output, `[num_outputs, hidden_size]`.

        Logits that cannot be used (NaN) come back as a `LogitsError` in the place of the reads they spoil.
        """
        results: list[Result] = []
        if masks is not None:
            masks.wait()
        for first in range(0, len(reads), ROWS_AT_ONCE):
            results += self._read_part(reads[first : first + ROWS_AT_ONCE], hidden, masks)
        return results

    def _read_part(self, reads: Sequence[Read], hidden: Tensor | None, masks: Masks | None) -> list[Result]:
        rows, places = _distinct_rows(reads, hidden)
        logits = self._runner.logits(rows)
        results: dict[int, Result] = {}
        draw = partial(self._draw, masks=masks)
        for kind, compute in ((GenerationRequest, draw), (ScoreRequest, _score)):
            which = [index for index, read in enumerate(reads) if isinstance(read.request, kind)]
            wanted = _rows_at(logits, [places[index] for index in which]) if which else logits
            results.update(_spoilt_apart(compute, [(index, reads[index]) for index in which], wanted))
        return [results[index] for index in range(len(reads))]

    def _draw(self, reads: Sequence[Read], logits: Tensor, masks: Masks | None) -> Sequence[Result]:
        rows = [read.request.row for read in reads if isinstance(read.request, GenerationRequest)]
        dead = [index for index, row in enumerate(rows) if row.guide is not None and row.guide.error is not None]
        if dead:
            raise NoTokenLeft(dead, "the constraint cannot go on")
        return self._sampler.sample(logits, rows, masks if any(row.guide is not None for row in rows) else None)


def _guide_of(read: Read) -> Guide | None:
    return read.request.row.guide if isinstance(read.request, GenerationRequest) else None


def _score(reads: Sequence[Read], logits: Tensor) -> Sequence[Result]:
    tokens = [
        read.request.candidates[read.candidate][read.index] for read in reads if isinstance(read.request, ScoreRequest)
    ]
    values: list[float] = log_softmax_at(logits, torch.tensor(tokens, device=logits.device)).tolist()
    return values


def _spoilt_apart(
    compute: Callable[[Sequence[Read], Tensor], Sequence[Result]], reads: Sequence[tuple[int, Read]], logits: Tensor
) -> dict[int, Result]:
    """What `compute` gives for each numbered read; rows it cannot use get the error, and the others their results."""
    if not reads:
        return {}
    try:
        results = compute([read for _, read in reads], logits)
        return {index: result for (index, _), result in zip(reads, results, strict=True)}
    except LogitsError as error:
        spoilt = set(error.rows)
        good = [row for row in range(len(reads)) if row not in spoilt]
        rest = logits[torch.tensor(good, dtype=torch.int64, device=logits.device)]
        done = _spoilt_apart(compute, [reads[row] for row in good], rest)
        return done | {reads[row][0]: error for row in spoilt}


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
