"""A progress line for a terminal, fed by events of a search; it draws as they come, from no thread of its own."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dendrite.dsl.events import Event

if TYPE_CHECKING:  # rich is loaded when a bar is wanted
    from rich.console import Console

_MAX_REDRAWS = 8
"""A second."""


class ProgressBar:
    """Counts what a search does: `37 asks, 148 nodes (12 rejected), depth 4, best 0.83`.

    with ProgressBar("Beam(depth=4)") as bar:
        for event in program.stream(engine, "Go."):
            bar.saw(event)
    """

    def __init__(self, title: str, *, console: Console | None = None) -> None:
        from rich import progress  # noqa: PLC0415 - only where somebody wants to look

        columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.TimeElapsedColumn())
        self._progress = progress.Progress(*columns, console=console, auto_refresh=False)
        self._title = title
        self._task = self._progress.add_task(title)
        self._drawn_at = 0.0
        self._num_asks = self._num_nodes = self._num_rejected = self._depth = 0
        self._best: float | None = None

    def saw(self, event: Event[object]) -> None:
        """Take in what happened, and redraw unless that was done just now."""
        node = event.node
        self._num_asks += event.kind == "told"
        self._num_nodes += event.kind == "expanded"
        self._num_rejected += event.kind in ("rejected", "merged", "dropped")
        if event.kind == "scored" and node.value is not None:
            self._best = node.value if self._best is None else max(self._best, node.value)
        self._depth = max(self._depth, node.depth)
        if event.kind == "done" or time.monotonic() - self._drawn_at >= 1 / _MAX_REDRAWS:
            self._progress.update(self._task, description=self.text, refresh=True)
            self._drawn_at = time.monotonic()

    @property
    def text(self) -> str:
        """The line without its clock."""
        rejected = f" ({self._num_rejected} rejected)" if self._num_rejected else ""
        best = "" if self._best is None else f", best {self._best:.3g}"
        return f"{self._title}: {self._num_asks} asks, {self._num_nodes} nodes{rejected}, depth {self._depth}{best}"

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()
