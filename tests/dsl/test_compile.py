"""Compiling: parts are collected, checked and lowered; whatever could not run is refused with what and where."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

import dendrite as dd
from dendrite.dsl.operations import Append, Fork, Generate, Loop, Observe, Open, Propose, Return, Score, Select

if TYPE_CHECKING:
    from decimal import Decimal


@dataclass(frozen=True)
class Game:
    left: tuple[int, ...] = ()


@dataclass(frozen=True)
class HardGame(Game):
    limit: int = 3


@dataclass(frozen=True)
class Trip:
    answer: str | None = None


@dd.expand(width=5)
def move(node: dd.Node[Game]) -> str:
    return "\nStep:"


@dd.expand(cue="\nStep:")
def both(node: dd.Node) -> str:
    return "\nStep:"


@dd.observe
def apply(node: dd.Node[Game]) -> dd.Outcome[Game]:
    return dd.Outcome(node.state)


@dd.observe
async def travel(node: dd.Node[Game]) -> dd.Outcome[Trip] | Game:
    return dd.Outcome(Trip())


@dd.score
def likely(node: dd.Node[Game]) -> float:
    return 1.0


@dd.score
def hard(node: dd.Node[HardGame]) -> float:
    return 1.0


@dd.score
def judge(node: dd.Node[Trip]) -> float:
    return 1.0


@dd.score
def value(node: dd.Node) -> float:
    return 1.0


@dd.score(batch=16)
async def reward(nodes: Sequence[dd.Node]) -> list[float]:
    return [1.0 for _ in nodes]


@dd.score(batch=16)
def batch_of_one(node: dd.Node) -> float:
    return 1.0


@dd.score
def unknown(node: "dd.Node[Decimal]") -> float:
    return 1.0


@dd.prune
def first(nodes: Sequence[dd.Node]) -> Sequence[dd.Node]:
    return nodes[:1]


@dd.prune
def prune_one(node: dd.Node) -> bool:
    return True


@dd.score
def of_two(node: dd.Node, other: dd.Node) -> float:
    return 1.0


def undecorated(node: dd.Node) -> float:
    return 1.0


class Solver:
    @dd.expand
    def step(self, node: dd.Node[Game]) -> str:
        return "x"


BEAM = dd.Beam(depth=3)


def line_of(function: Callable[..., object]) -> str:
    return f"test_compile.py:{function.__code__.co_firstlineno}"


def test_a_program_becomes_a_list_of_operations() -> None:
    """Parts in any order give the operations in the order they run."""
    program = dd.compile(dd.prune(keep=3), likely, apply, move, reward, strategy=BEAM)
    opened, loop, returned = program.operations
    assert isinstance(opened, Open)
    assert isinstance(loop, Loop)
    assert isinstance(returned, Return)
    assert [type(operation) for operation in loop.body] == [Propose, Append, Fork, Generate, Observe, Score, Score]
    assert loop.select == Select(None, 3)
    source, scores = loop.body[0], [operation for operation in loop.body if isinstance(operation, Score)]
    assert isinstance(source, Propose)
    assert source.sources[0].width == 5
    assert [score.takes_many for score in scores] == [False, True]
    assert [score.function.is_async for score in scores] == [False, True]


def test_several_expands_add_up() -> None:
    """Each becomes a source of its own, parts by themselves among them."""
    loop = dd.compile(move, dd.expand(cue="a", width=2), value, strategy=BEAM).operations[1]
    assert isinstance(loop.body[0], Propose)
    assert [source.width for source in loop.body[0].sources] == [5, 2]


def test_bound_methods_and_callables_are_parts() -> None:
    """Whatever carries a mark and can be called."""

    class Rater:
        async def __call__(self, node: dd.Node[Game]) -> float:
            return 1.0

    program = dd.compile(Solver().step, dd.score(Rater()), strategy=BEAM)
    loop = program.operations[1]
    assert isinstance(loop.body[-1], Score)
    assert loop.body[-1].function.is_async
    assert "Solver.step" in program.explain()


@pytest.mark.parametrize(
    "parts",
    [(move, apply, likely), (move, value), (move, hard), (move, unknown), (Solver().step, apply, reward, first)],
    ids=["same", "untyped", "subclass", "unresolvable", "methods"],
)
def test_states_that_go_together_compile(parts: tuple[Callable[..., object], ...]) -> None:
    """Equal, absent, derived and unresolvable annotations all fit."""
    dd.compile(*parts, strategy=BEAM)


def test_mixed_states_are_refused_by_name_and_line() -> None:
    """Both functions are named, with where they stand."""
    with pytest.raises(dd.ProgramError) as caught:
        dd.compile(move, judge, strategy=BEAM)
    assert line_of(move) in str(caught.value)
    assert line_of(judge) in str(caught.value)
    assert "Node[Game]" in str(caught.value)
    assert "Node[Trip]" in str(caught.value)


def test_mixed_local_states_are_refused() -> None:
    """Classes that only the calling function knows are looked up there, even behind string annotations."""

    class Here:
        pass

    class There:
        pass

    @dd.expand
    def step(node: "dd.Node[Here]") -> str:
        return "x"

    @dd.score
    def rate(node: "dd.Node[There]") -> float:
        return 1.0

    with pytest.raises(dd.ProgramError, match="one program, one state"):
        dd.compile(step, rate, strategy=BEAM)


def test_an_observe_that_makes_another_state_is_refused() -> None:
    """What goes in is not what comes out."""
    with pytest.raises(dd.ProgramError, match=r"travel .* makes Trip, which move"):
        dd.compile(move, travel, strategy=BEAM)


def test_a_condition_on_another_state_is_refused() -> None:
    """The function of `when=` takes nodes too."""

    def early(node: dd.Node[Trip]) -> bool:
        return node.depth < 2

    with pytest.raises(dd.ProgramError, match="one program, one state"):
        dd.compile(move, dd.expand(cue="x", when=early), value, strategy=BEAM)


CUE = dd.expand(cue="x")
LOOSE: Any = dd  # the type checker would refuse most of these already


@pytest.mark.parametrize(
    "compile_it, complaint",
    [
        (lambda: LOOSE.compile(value, strategy=BEAM), "no @expand"),
        (lambda: LOOSE.compile(strategy=BEAM), "no @expand"),
        (lambda: LOOSE.compile(move, apply, apply, strategy=BEAM), "one @observe, this one has 2"),
        (lambda: LOOSE.compile(CUE, value, first, dd.prune(keep=1), strategy=BEAM), "one @prune, this one has 2"),
        (lambda: LOOSE.compile(move, undecorated, strategy=BEAM), r"undecorated \(.*decorate it with @dd.expand"),
        (lambda: LOOSE.compile(move, BEAM, strategy=BEAM), r"pass it as strategy=Beam\(depth=3\)"),
        (lambda: LOOSE.compile(move, 3, strategy=BEAM), "3 is no part"),
        (lambda: LOOSE.compile(move, dd.observe(), strategy=BEAM), "no part by itself"),
        (lambda: LOOSE.compile(both, value, strategy=BEAM), "gives the cue, and so does"),
        (lambda: LOOSE.compile(CUE, dd.prune(keep=3), strategy=BEAM), "needs a @score"),
        (lambda: LOOSE.compile(CUE, strategy=BEAM), "nothing to tell nodes apart by"),
        (lambda: LOOSE.compile(CUE, value, dd.prune(keep=0), strategy=BEAM), "keep=0 cannot be used"),
        (lambda: LOOSE.compile(CUE, value, dd.prune(keep=-2), strategy=BEAM), "keep=-2 cannot be used"),
        (lambda: LOOSE.compile(CUE, value, LOOSE.prune(), strategy=BEAM), "keeps nothing"),
        (lambda: LOOSE.compile(LOOSE.expand(width=0), value, strategy=BEAM), "width=0 cannot be used"),
        (lambda: LOOSE.compile(LOOSE.expand(width=1.5), value, strategy=BEAM), "width=1.5 cannot be used"),
        (lambda: LOOSE.compile(LOOSE.expand(max_tokens=0), value, strategy=BEAM), "max_tokens=0 cannot be used"),
        (lambda: LOOSE.compile(LOOSE.expand(temperature=-1), value, strategy=BEAM), "temperature=-1 cannot be used"),
        (lambda: LOOSE.compile(LOOSE.expand(stop=["a", ""]), value, strategy=BEAM), "empty string"),
        (lambda: LOOSE.compile(LOOSE.expand(cue=3), value, strategy=BEAM), "neither text nor chat messages"),
        (lambda: LOOSE.compile(LOOSE.expand(prior=0.0), value, strategy=BEAM), "prior=0.0 cannot be used"),
        (lambda: LOOSE.compile(CUE, batch_of_one, strategy=BEAM), "batch= is for a function of a Sequence"),
        (lambda: LOOSE.compile(CUE, value, prune_one, strategy=BEAM), r"takes a Sequence\[Node\]"),
        (lambda: LOOSE.compile(CUE, of_two, strategy=BEAM), "called with one argument"),
        (lambda: LOOSE.compile(Solver.step, value, strategy=BEAM), "pass a bound method"),
        (lambda: LOOSE.compile(CUE, value, strategy="beam"), "is no strategy"),
        (lambda: LOOSE.compile(CUE, value, strategy=BEAM, on_error="ignore"), '"raise" or "drop"'),
        (lambda: LOOSE.compile(CUE, value, strategy=dd.Beam(depth=0)), "1 or more"),
    ],
)
def test_programs_that_cannot_run_are_refused(compile_it: Callable[[], object], complaint: str) -> None:
    """At compile time, each with what to do."""
    with pytest.raises(dd.ProgramError, match=complaint):
        compile_it()


def test_replace_checks_anew_and_leaves_the_program_alone() -> None:
    """The same parts under another strategy; a refusal changes nothing."""
    program = dd.compile(CUE, value, strategy=BEAM)
    assert "Beam(depth=7)" in program.replace(strategy=dd.Beam(depth=7)).explain()
    with pytest.raises(dd.ProgramError):
        program.replace(strategy=dd.MCTS(0))
    assert "Beam(depth=3)" in program.explain()
