"""What the suite has found so far, as a result at any moment."""

from __future__ import annotations

import time
from collections.abc import Iterator

from dendrite.bench.cases import Case
from dendrite.bench.figures import Figure, Result, figure
from dendrite.bench.floors import Dimensions, floor_of, rates_of
from dendrite.bench.goals import goal_of
from dendrite.bench.machine import Machine
from dendrite.bench.rounds import Samples, ratio_of
from dendrite.bench.subject import Subject
from dendrite.engine.structure import context_length

OURS = "dendrite"


class Board:
    """Samples by case and engine, and the notes."""

    def __init__(self, subject: Subject, machine: Machine) -> None:
        config = subject.config()
        self.dtype = subject.dtype
        self.context_length = context_length(config)
        self.vocab_size = int(config.vocab_size)
        self.notes: list[str] = []
        self.extras: list[Figure] = []
        """Figures that are no case's: of forks."""
        self._subject = subject
        self._machine = machine
        self._began = time.monotonic()
        self._samples: dict[Case, dict[str, Samples]] = {}
        self._dimensions = Dimensions.of(config, dtype=self.dtype)
        self._rates = rates_of(machine.gpu)

    def add(self, case: Case, engine: str, samples: Samples) -> None:
        """Keep what an engine reached in a case."""
        if samples:
            self._samples.setdefault(case, {})[engine] = samples

    def note_once(self, note: str) -> None:
        """Add a note unless it is there."""
        if note not in self.notes:
            self.notes.append(note)

    def result(self) -> Result:
        """All of it, as it is now."""
        figures = (*self.extras, *(found for case in self._samples for found in self._figures(case)))
        seconds = time.monotonic() - self._began
        return Result("suite", self._subject.name, self._machine, figures, tuple(self.notes), seconds)

    def _figures(self, case: Case) -> Iterator[Figure]:
        engines = self._samples[case]
        floor = floor_of(case, self._dimensions, self._rates) if self._dimensions is not None else None
        goal = goal_of(case, shape=self._subject.shape, gpu=self._machine.gpu)
        ours = engines.get(OURS, {})
        for engine, samples in engines.items():
            for name, values in samples.items():
                is_main = name == case.figure
                ratio = None
                if engine != OURS and name in ours:
                    ratio = ratio_of(ours[name], values, more_is_better=False)
                yield figure(
                    case.name,
                    engine,
                    name,
                    case.unit,
                    values,
                    ratio=ratio,
                    at_most=goal if is_main and engine == OURS else None,
                    floor=floor if is_main else None,
                )
