"""One run of a benchmark from its start to its result: how long it took, and who else used the machine meanwhile.

listen ── measure ── listen     what others use is asked twice: the reader is told the worse of both
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from dendrite.bench.figures import Figure, Result
from dendrite.bench.machine import load_note, others_load, this_machine


class Sitting:
    """Begins when it is made, and ends with its result."""

    def __init__(self, benchmark: str) -> None:
        self._benchmark = benchmark
        self._began = time.monotonic()
        self._load = others_load()

    def result(self, model: str, figures: Iterable[Figure], notes: Iterable[str], *, device: str = "cpu") -> Result:
        """What was found.

        Args:
            model: its name, for people.
            figures: what was measured.
            notes: what a reader must know beside what others used of the machine, which is added.
            device: "cpu" or "cuda", which it was measured on.
        """
        told = (*notes, *load_note([self._load, others_load()]))
        seconds = time.monotonic() - self._began
        return Result(self._benchmark, model, this_machine(device), tuple(figures), told, seconds)
