"""What a benchmark found: figures with their spread, beside whom they are compared with."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dendrite.bench.machine import Machine


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of one engine on one workload: the median of its samples and their range."""

    workload: str
    engine: str
    name: str
    """What was measured: `decode`, `fork` …"""
    unit: str
    median: float
    low: float
    high: float
    num_samples: int
    ratio: float | None = None
    """How many times as well the engine under test did: above 1 it is faster than this one."""
    goal: str = ""
    """What was aimed at, as text: `≤ 10`, `ratio ≥ 2`."""
    is_met: bool | None = None
    note: str = ""
    floor: float | None = None
    """The least that the device allows, in the same unit."""


@dataclass(frozen=True, slots=True)
class Result:
    """One run of a benchmark."""

    benchmark: str
    model: str
    machine: Machine
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]
    """What a reader must know: peers that did not run, a machine that was busy."""
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Plain values for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Result:
        """The result that `to_json` wrote.

        Raises:
            KeyError, TypeError: it is none.
        """
        machine = Machine(**values["machine"])
        figures = tuple(Figure(**found) for found in values["figures"])
        rest = {name: values[name] for name in ("benchmark", "model", "seconds")}
        return cls(machine=machine, figures=figures, notes=tuple(values["notes"]), **rest)


def figure(
    workload: str,
    engine: str,
    name: str,
    unit: str,
    samples: Sequence[float],
    *,
    ratio: float | None = None,
    at_most: float | None = None,
    ratio_at_least: float | None = None,
    note: str = "",
    floor: float | None = None,
) -> Figure:
    """A figure of samples, held to at most one goal.

    Args:
        workload: what was run.
        engine: who ran it.
        name: what was measured.
        unit: of the samples.
        samples: one a repetition, at least one.
        ratio: see `Figure.ratio`.
        at_most: the goal for the median.
        ratio_at_least: the goal for the ratio.
        note: for the reader.
        floor: see `Figure.floor`.
    """
    median = statistics.median(samples)
    goal, is_met = "", None
    if at_most is not None:
        goal, is_met = f"≤ {at_most:g} {unit}".strip(), median <= at_most
    elif ratio_at_least is not None and ratio is not None:
        goal, is_met = f"ratio ≥ {ratio_at_least:g}", ratio >= ratio_at_least
    spread = (min(samples), max(samples), len(samples))
    return Figure(workload, engine, name, unit, median, *spread, ratio, goal, is_met, note, floor)
