import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console, Group

from dendrite.demo.examples import prompt
from dendrite.demo.growth import Row
from dendrite.demo.program import search
from dendrite.demo.task import Poem
from dendrite.demo.watchers import Lines, LiveTree, Watcher, drawn, watcher
from dendrite.testing import scripted_engine
from tests.demo.script import GOOD, WORD, wins


class Clock:
    """Tells the time it is set to."""

    def __init__(self, *, tick: float) -> None:
        self.now = 0.0
        self._tick = tick

    def __call__(self) -> float:
        self.now += self._tick
        return self.now


def terminal(height: int = 30, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, _environ={"TERM": "xterm"})


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@contextmanager
def watched(shown: Watcher) -> Iterator[None]:
    """A whole search on the scripted model, every event shown."""
    with scripted_engine(wins) as engine, shown:
        for event in search(WORD, width=4, keep=2).stream(engine, prompt(WORD), state=Poem(WORD), seed=1):
            shown.saw(event)
            if event.result is not None:
                event.result.close()
    yield


def test_lines_are_one_for_each_round() -> None:
    """What was tried, what of it is right, who goes on, the best line, and the seconds so far."""
    console = Console(file=io.StringIO(), width=40)
    with watched(Lines(console, WORD, clock=Clock(tick=1.5))):
        first, last = text_of(console).splitlines()
    assert first.startswith("line 1 of 2 (A): 8 tried, ")
    assert first.endswith(f'2 go on; best so far ends "{GOOD[0]}"  [1.5 s]')
    assert last.startswith("line 2 of 2 (B): 8 tried, ")
    assert last.endswith(f'complete; best so far ends "{GOOD[1]}"  [3.0 s]')
    assert "\x1b" not in text_of(console)


def test_the_live_tree_ends_with_the_best_path_on_the_screen() -> None:
    """Both lines of the poem, and what became of the last round."""
    console = terminal()
    with watched(LiveTree(console, WORD, clock=Clock(tick=1.0))):
        last = text_of(console)[-2000:]
    assert all(line in last for line in GOOD)
    assert "line 2 of 2 (B)" in last
    assert "writing line 2 (B)" not in last.rpartition("Ants")[2]


@pytest.mark.parametrize("tick, num_rounds_drawn", [(0.1, 0), (0.2, 1)])
def test_the_live_tree_redraws_at_most_four_times_a_second(tick: float, num_rounds_drawn: int) -> None:
    """A round that ends too soon after a drawing is not drawn; the end always is. The clock ticks when it is read."""
    console = terminal()
    with watched(LiveTree(console, WORD, clock=Clock(tick=tick))):
        assert text_of(console).count("writing line 2 (B)") == num_rounds_drawn
    assert "line 2 of 2 (B)" in text_of(console)


def test_the_live_tree_fits_the_terminal() -> None:
    """In ten rows there is no room for all that was tried: most of it is folded."""
    console = terminal(height=10)
    with watched(LiveTree(console, WORD, clock=Clock(tick=1.0))):
        assert "break a rule (" in text_of(console) or "more lines tried" in text_of(console)


def test_a_row_that_is_too_long_ends_in_an_ellipsis() -> None:
    """It never wraps: the height of the picture is known."""
    console = Console(file=io.StringIO(), width=20)
    row = Row("├─ ", "broken", "A very long line indeed", letter="A", note="wrong length")
    console.print(Group(drawn(row)))
    assert text_of(console) == "├─ A  A very long l…\n"


@pytest.mark.parametrize(
    "console, plain, kind",
    [
        (terminal(), False, LiveTree),
        (terminal(), True, Lines),
        (Console(file=io.StringIO()), False, Lines),
        (Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"}), False, Lines),
    ],
    ids=["terminal", "--plain", "piped", "dumb"],
)
def test_only_a_terminal_gets_a_tree(console: Console, plain: bool, kind: type[object]) -> None:
    """And not if it cannot move its cursor, or the user wants lines."""
    assert type(watcher(console, WORD, plain=plain)) is kind
