"""A report for tests."""

from collections.abc import Iterator
from contextlib import contextmanager

from dendrite.engine.progress import SetDone


class Notes:
    """A report that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[str, int, int]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[SetDone]:
        latest = [0]
        yield lambda done: latest.__setitem__(0, done)
        self.steps.append((label, latest[0], total))
