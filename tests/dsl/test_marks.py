"""Decorators only mark: the function stays what it was."""

import asyncio

import pytest

import dendrite as dd
from dendrite.dsl.marks import ExpandMark, ObserveMark, PruneMark, ScoreMark, mark_of
from dendrite.testing import node


def test_a_decorated_function_is_the_same_function() -> None:
    """Decorating returns the very object, with a record on it."""

    def step(node: dd.Node) -> str:
        return "\nStep:"

    assert dd.expand(step) is step
    assert dd.expand(width=5)(lambda node: "x")(node()) == "x"
    assert mark_of(step) == ExpandMark()
    assert step(node()) == "\nStep:"


def test_options_are_kept_as_they_were_given() -> None:
    """The record says what the decorator was told, in full."""

    def when(node: dd.Node) -> bool:
        return node.depth > 1

    mark = dd.expand(cue="a", width=2, max_tokens=3, stop=("b",), temperature=0.5, when=when, prior=2.0)
    assert mark == ExpandMark(cue="a", width=2, max_tokens=3, stop=("b",), temperature=0.5, when=when, prior=2.0)

    @dd.observe(concurrency=4)
    async def look(node: dd.Node) -> int:
        return 1

    @dd.score(batch=16, weight=0.5)
    def rate(nodes: list[dd.Node]) -> list[float]:
        return [1.0 for _ in nodes]

    assert mark_of(look) == ObserveMark(concurrency=4)
    assert mark_of(rate) == ScoreMark(batch=16, weight=0.5)
    assert dd.prune(keep=3) == PruneMark(keep=3)
    assert asyncio.run(look(node())) == 1


def test_methods_keep_their_marks_when_bound() -> None:
    """The record lives on the function, and every instance's bound method finds it."""

    class Solver:
        def __init__(self, target: int) -> None:
            self.target = target

        @dd.score
        def near(self, node: dd.Node) -> float:
            return -abs(len(node.text) - self.target)

    assert mark_of(Solver(3).near) == ScoreMark()
    assert Solver(3).near(node("abcd")) == -1.0
    assert Solver(4).near(node("abcd")) == 0.0


def test_one_function_is_one_part() -> None:
    """A second decorator is refused, and the first stays."""

    @dd.expand
    def step(node: dd.Node) -> str:
        return "x"

    with pytest.raises(dd.ProgramError, match="marked @expand already"):
        dd.score(step)
    assert mark_of(step) == ExpandMark()


def test_what_cannot_be_marked_says_so() -> None:
    """A builtin has no place for a record; a number is no function."""
    with pytest.raises(dd.ProgramError, match="decorate the function where it is defined"):
        dd.score(len)
    with pytest.raises(dd.ProgramError, match="decorates a function, not 3"):
        dd.score(3)  # type: ignore[call-overload]  # on purpose
