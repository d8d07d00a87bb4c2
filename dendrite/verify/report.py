"""What a verification found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from dendrite.verify.pins import Pins

Verdict = Literal["ok", "rounding", "miss"]
"""`rounding`: not equal, and float32 cannot tell who is right; see `dendrite.verify.judge`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One case: what was compared and how it came out."""

    group: str
    """What it is about: `greedy`, `fork`, `score` …"""
    case: str
    tokens_equal: int
    """Leading tokens that equal the reference's."""
    tokens_total: int
    """0 where no tokens are compared."""
    max_difference: float
    """Of a logit, or of a log-probability where the note says so; to the first unequal token, that one included."""
    tolerance: float
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All cases of one run."""

    model: str
    dtype: str
    rows: tuple[Row, ...]
    seconds: float
    pins: Pins | None = None
    """What it was made with; None for rows that were put together by hand."""
    tolerances: dict[str, str] = field(default_factory=dict)
    """What is allowed, in words, by what is compared."""

    @property
    def ok(self) -> bool:
        """Whether there was something to compare and nothing of it is a miss."""
        return bool(self.rows) and not self.misses

    @property
    def misses(self) -> tuple[Row, ...]:
        """The cases that came out wrong."""
        return tuple(row for row in self.rows if row.verdict == "miss")

    @property
    def rounded(self) -> tuple[Row, ...]:
        """The cases that rounding decided."""
        return tuple(row for row in self.rows if row.verdict == "rounding")

    def to_json(self) -> dict[str, object]:
        """Plain values for `json.dumps`."""
        return {**asdict(self), "ok": self.ok}
