"""Beam search as a pure strategy: asked, told, and compared with the definition."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dendrite.dsl.strategies.base import Expand, ProgramFacts, Select
from dendrite.dsl.strategies.beam import Beam
from dendrite.dsl.types import StepId
from dendrite.engine.errors import ProgramError
from tests.dsl.world import World, searched, worlds

FACTS = ProgramFacts(has_score=True, has_observe=False, has_selector=False, keep=None)


def by_definition(world: World, depth: int) -> tuple[int, ...]:
    """Beam search written out over paths, level by level; terminal nodes wait aside."""
    frontier: list[tuple[int, ...]] = [()]
    ended: list[tuple[int, ...]] = []
    last: list[tuple[int, ...]] = frontier
    for _ in range(depth):
        children = [(*path, i) for path in frontier for i in range(world.width) if (*path, i) in world.values]
        ended += [path for path in children if path in world.terminal]
        ranked = sorted((path for path in children if path not in world.terminal), key=lambda p: -world.values[p])
        frontier = ranked[: world.keep]
        if not frontier:
            break
        last = frontier
    pool = [*frontier, *ended] or last[:1]
    return max(pool, key=lambda path: (world.values.get(path, float("-inf")), len(path)))


@given(worlds(), st.integers(1, 4))
def test_beam_is_what_its_definition_says(world: World, depth: int) -> None:
    """The best node is the oracle's, over trees with dead ends and terminal nodes, for any keep and depth."""
    assert searched(Beam(depth), world) == by_definition(world, depth)


def test_the_frontier_is_asked_for_at_once() -> None:
    """A round is one wave of expansions, in the frontier's order, then one selection over all its children."""
    world = World({(0,): 1, (1,): 3, (2,): 2}, width=3, keep=2)
    beam = Beam(2)
    state, asks = beam.ask(beam.begin(world.nodes[0]))
    assert asks == [Expand(StepId(0))]
    assert beam.ask(state)[1] == ()
    state, asks = beam.ask(beam.tell(state, world.answer(asks[0])))
    assert asks == [Select((StepId(1), StepId(2), StepId(3)))]
    state, asks = beam.ask(beam.tell(state, world.answer(asks[0])))
    assert asks == [Expand(StepId(2)), Expand(StepId(3))]


def test_the_first_goal_in_ask_order_ends_the_search() -> None:
    """What comes after the goal is told but asks for nothing; the goal is best whatever its value."""
    world = World({(0,): 9, (1,): 1}, width=2, goal=(1,))
    assert searched(Beam(5), world) == (1,)
    assert len(world.nodes) == 3


def test_states_are_values() -> None:
    """Telling returns a new state; the old one can be told something else."""
    world = World({(0,): 1, (1,): 2}, width=2, keep=None)
    beam = Beam(1)
    before, asks = beam.ask(beam.begin(world.nodes[0]))
    kept = replace(before)
    beam.tell(before, world.answer(asks[0]))
    assert before == kept


@pytest.mark.parametrize(
    "beam, facts, complaint",
    [
        (Beam(0), FACTS, "1 or more"),
        (Beam(1), replace(FACTS, has_score=False, keep=3), r"keep=3.* needs a @score"),
        (Beam(1), replace(FACTS, has_score=False), "nothing to tell nodes apart by"),
    ],
)
def test_programs_it_cannot_run_are_refused(beam: Beam, facts: ProgramFacts, complaint: str) -> None:
    """Each with what to add."""
    with pytest.raises(ProgramError, match=complaint):
        beam.check(facts)
    beam_that_can = Beam(1)
    beam_that_can.check(FACTS)
    beam_that_can.check(replace(FACTS, has_score=False, has_selector=True, keep=1))
