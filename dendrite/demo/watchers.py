"""Who shows a search while it runs: a tree on a terminal, a line for each round elsewhere.

Watchers are called between the engine's steps, from the event loop, and draw there and then: nothing draws while a
step runs, where a second Python thread would slow it down.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

import dendrite as dd
from dendrite.demo.growth import Growth, Round, Row
from dendrite.demo.task import Poem

MAX_REDRAWS = 4
"""A second, the last one aside."""

_STYLES = {"best": "green", "kept": "", "let go": "dim", "broken": "dim red", "folded": "dim italic"}
_Clock = Callable[[], float]


class Watcher(Protocol):
    """Shows one search; a context manager around it."""

    def saw(self, event: dd.Event[Poem]) -> None:
        """Take in, and perhaps show, what happened."""

    def __enter__(self) -> Self: ...
    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None: ...


class Lines:
    """One line for each round, for files and pipes."""

    def __init__(self, console: Console, word: str, *, clock: _Clock = time.monotonic) -> None:
        self._console = console
        self._growth = Growth(word)
        self._clock = clock
        self._start = clock()

    def saw(self, event: dd.Event[Poem]) -> None:
        """Print a line when a round ends."""
        if end := self._growth.saw(event):
            text = told(end, len(self._growth.word))
            best = f'; best so far ends "{end.best}"' if end.best else ""
            line = f"{text}{best}  [{self._clock() - self._start:.1f} s]"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        pass


class LiveTree:
    """The tree as it grows, folded to the terminal's height; what is drawn last stays on the screen."""

    def __init__(self, console: Console, word: str, *, clock: _Clock = time.monotonic) -> None:
        self._growth = Growth(word)
        self._console = console
        self._clock = clock
        self._start = clock()
        self._drawn_at = -1.0
        self._status = Text("reading the prompt", style="bold")
        self._live = Live(self._picture(), console=console, auto_refresh=False, vertical_overflow="crop")

    def saw(self, event: dd.Event[Poem]) -> None:
        """Redraw when a round ends, unless the last drawing is too young; always at the end."""
        end = self._growth.saw(event)
        if end is None:
            return
        self._status = self._say(end, is_over=event.kind == "done")
        if event.kind == "done" or self._clock() - self._drawn_at >= 1 / MAX_REDRAWS:
            self._draw()

    def _draw(self) -> None:
        self._drawn_at = self._clock()
        self._live.update(self._picture(), refresh=True)

    def _say(self, end: Round, *, is_over: bool) -> Text:
        word = self._growth.word
        status = Text(f"{told(end, len(word))}  {self._clock() - self._start:.1f} s", style="dim")
        if not is_over and end.number < len(word):
            status.append(f"\nwriting line {end.number + 1} ({word[end.number]}) …", style="not dim bold")
        return status

    def _picture(self) -> Group:
        rows = self._growth.rows(max(8, self._console.height - 6))
        return Group(*map(drawn, rows), self._status)

    def __enter__(self) -> Self:
        self._live.__enter__()
        self._draw()
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._live.__exit__(t, e, tb)


def watcher(console: Console, word: str, *, plain: bool) -> Watcher:
    """A tree where the console can redraw one and `plain` does not forbid it, else lines."""
    if plain or not console.is_terminal or console.is_dumb_terminal:
        return Lines(console, word)
    return LiveTree(console, word)


def drawn(row: Row) -> Text:
    """A row of the tree in colours; too long a line ends in an ellipsis rather than wrapping."""
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(row.rails, style="dim")
    if row.letter:
        text.append(f"{row.letter}  ", style=f"bold {_STYLES[row.kind]}")
    text.append(row.text, style=_STYLES[row.kind])
    if row.note:
        text.append(f"  {row.note}", style="red")
    return text


def told(end: Round, num_lines: int) -> str:
    """A round in words."""
    return (
        f"line {end.number} of {num_lines} ({end.letter}): {end.num_tried} tried, {end.num_right} keep the rules, "
        f"{end.num_kept} {'complete' if end.number == num_lines else 'go on'}"
    )
