"""Telling the user what a slow step is doing: a bar on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

SetDone = Callable[[int], None]
"""Takes the number of bytes done so far."""


class Report(Protocol):
    """Where messages and progress go."""

    def say(self, line: str) -> None:
        """Show one line."""
        ...

    def track(self, label: str, total: int) -> AbstractContextManager[SetDone]:
        """Show the progress of `total` bytes while the context is open; it yields what to call with the bytes done."""
        ...


class ConsoleReport:
    """A rich bar where the stream is a terminal; otherwise a line at the start and one at the end of each step."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream if stream is not None else sys.stderr, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """Show one line."""
        self._console.print(line, markup=False)

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[SetDone]:
        """Show the progress of `total` bytes while the context is open."""
        if not self._console.is_terminal:
            self.say(f"{label} ({total / 1e6:.0f} MB) ...")
            yield _nothing
            self.say(f"{label}: done")
            return
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(label, total=total)
            yield lambda done: progress.update(task, completed=min(done, total))
            progress.update(task, completed=total)


def _nothing(done: int) -> None:
    """Lines show no progress within a step."""
