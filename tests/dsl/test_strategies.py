"""Every strategy against its definition, written out by brute force over paths of trees whose values are known."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dendrite as dd
from dendrite.dsl.strategies.base import Expand, ProgramFacts, Reflect, Vote
from dendrite.dsl.types import StepId
from tests.dsl.world import Path, Values, World, searched, worlds

Rule = Literal["uct", "puct"]
Backup = Literal["mean", "max"]
FACTS = ProgramFacts(has_score=True, has_observe=True, has_selector=False, keep=None)


def complete(depth: int, width: int, value: Callable[[Path], float]) -> Values:
    """A full tree."""
    values: Values = {}
    level: list[Path] = [()]
    for _ in range(depth):
        level = [(*path, index) for path in level for index in range(width)]
        values |= {path: value(path) for path in level}
    return values


def children_of(world: World, path: Path) -> list[Path]:
    return [(*path, index) for index in range(world.width) if (*path, index) in world.values]


def highest(world: World, paths: list[Path]) -> Path:
    """The best as strategies rank it; the root has no value."""
    return max(paths, key=lambda path: (world.values.get(path, -math.inf), len(path)))


# --- best first ----------------------------------------------------------------------------------------------------


@given(worlds(), st.integers(1, 8))
def test_best_first_is_what_its_definition_says(world: World, num: int) -> None:
    """It expands the highest open value of the whole tree, `num` times, and returns the highest it has seen."""
    opened: list[Path] = [()]
    seen: list[Path] = [()]
    expanded: list[Path] = []
    while opened and len(expanded) < num:
        path = highest(world, opened)
        opened.remove(path)
        expanded.append(path)
        seen += children_of(world, path)
        opened += [child for child in children_of(world, path) if child not in world.terminal]
    assert searched(dd.BestFirst(num), world) == highest(world, seen)
    assert world.expanded == expanded


def test_best_first_in_parallel_takes_the_best_open_nodes() -> None:
    """Two at a time: the next best joins what is under way."""
    world = World(complete(2, 3, lambda path: float(path[-1])), width=3)
    searched(dd.BestFirst(3, parallel=2), world)
    assert world.expanded == [(), (2,), (1,)]


# --- depth first ---------------------------------------------------------------------------------------------------


def depth_first(world: World, depth: int, threshold: float) -> tuple[list[Path], Path]:
    """Algorithm 2 of Tree of Thoughts, as the paper has it: what it expands, and the best end it outputs."""
    expanded: list[Path] = []
    ends: list[Path] = []

    def visit(path: Path) -> None:
        if len(path) == depth or path in world.terminal:
            ends.append(path)
            return
        expanded.append(path)
        for child in sorted(children_of(world, path), key=lambda child: -world.values[child]):
            if world.values[child] >= threshold:
                visit(child)

    visit(())
    seen = [()] + [child for path in expanded for child in children_of(world, path)]
    return expanded, highest(world, ends or seen)


@given(worlds(), st.integers(1, 4), st.none() | st.integers(0, 60))
def test_depth_first_is_what_its_definition_says(world: World, depth: int, threshold: int | None) -> None:
    """The same expansions in the same order, and the same end, for any threshold to turn back at."""
    expanded, best = depth_first(world, depth, -math.inf if threshold is None else threshold)
    assert searched(dd.DepthFirst(depth, threshold=threshold), world) == best
    assert world.expanded == expanded


def test_depth_first_stops_at_the_goal() -> None:
    """What is left on the stack is not tried."""
    world = World(complete(3, 2, lambda path: float(path[-1])), width=2, goal=(1, 1))
    assert searched(dd.DepthFirst(3), world) == (1, 1)
    assert world.expanded == [(), (1,)]


# --- Monte Carlo ---------------------------------------------------------------------------------------------------


def plain_mcts(world: World, strategy: dd.MCTS) -> list[Path]:
    """The textbook's algorithm on lists of what was seen below each path, one leaf at a time: what it expands."""
    below: dict[Path, list[float]] = {(): []}
    done: set[Path] = set()
    expanded: list[Path] = []

    def is_closed(path: Path) -> bool:
        if path in world.terminal:
            return True
        return path in done and all(is_closed(child) for child in children_of(world, path))

    def mass(path: Path) -> float:
        return math.exp(world.logprobs.get(path, 0.0))

    def urgency(path: Path) -> float:
        every = [value for values in below.values() for value in values]
        low, high = min(every), max(every)
        own = below[path]
        worth = sum(own) / len(own) if strategy.backup == "mean" else max(own)
        worth = (worth - low) / (high - low) if high > low else 0.0
        above = len(below[path[:-1]])
        if strategy.rule == "uct":
            return worth + strategy.exploration * math.sqrt(math.log(above) / len(own))
        prior = mass(path) / sum(map(mass, children_of(world, path[:-1])))
        return worth + strategy.exploration * prior * math.sqrt(above) / (1 + len(own))

    while len(expanded) < strategy.iterations and not is_closed(()):
        path: Path = ()
        while path in done:
            path = max((child for child in children_of(world, path) if not is_closed(child)), key=urgency)
        expanded.append(path)
        done.add(path)
        for child in children_of(world, path):
            for length in range(len(child) + 1):
                below.setdefault(child[:length], []).append(world.values[child])
    return expanded


@given(worlds(), st.sampled_from(["uct", "puct"]), st.sampled_from(["mean", "max"]), st.integers(1, 12), st.data())
def test_mcts_is_what_the_textbook_says(
    world: World, rule: Rule, backup: Backup, num: int, data: st.DataObject
) -> None:
    """The same leaves in the same order as plain lists give, for both rules and both ways to back up."""
    world.logprobs = {path: data.draw(st.floats(-4, 0)) for path in world.values}
    strategy = dd.MCTS(num, rule=rule, backup=backup)
    expanded = plain_mcts(world, strategy)
    best = searched(strategy, world)
    assert world.expanded == expanded
    assert best == highest(world, [()] + [child for path in expanded for child in children_of(world, path)])


@settings(max_examples=40)
@given(worlds(), st.sampled_from(["uct", "puct"]), st.integers(1, 5))
def test_mcts_with_time_enough_finds_the_best_of_the_whole_tree(world: World, rule: Rule, parallel: int) -> None:
    """It expands every node that is no end exactly once, however many leaves are under way, and then stops."""
    best = searched(dd.MCTS(1000, parallel=parallel, rule=rule), world)
    inner = [path for path in [(), *world.values] if path not in world.terminal]
    assert sorted(world.expanded) == sorted(inner)
    assert best == highest(world, [(), *world.values])


def test_parallel_leaves_differ_by_virtual_loss() -> None:
    """Four leaves at once: leaves under way count as losses, so the search spreads over the root's children."""
    world = World(complete(3, 4, lambda path: 1.0 - path[0] / 10), width=4)
    strategy = dd.MCTS(50, parallel=4)
    state, asks = strategy.ask(strategy.begin(world.nodes[0]))
    assert asks == [Expand(StepId(0))]
    state, asks = strategy.ask(strategy.tell(state, world.answer(asks[0])))
    assert len(asks) == len(set(asks)) == 4
    assert {world.paths[ask.node][0] for ask in asks if isinstance(ask, Expand)} == {0, 1, 2, 3}
    assert strategy.ask(state)[1] == []


def test_a_rollout_plays_a_leaf_out_before_it_is_expanded() -> None:
    """Children's own values are not looked at: what counts is where one child after the other leads."""
    values = complete(4, 2, lambda path: 0.0) | {(0,): 9.0, (1, 0, 0): 5.0}
    world = World(values, width=2)
    searched(dd.MCTS(3, rollout=2), world)
    assert world.expanded == [(), (0,), (0, 0), (1,), (1, 0)]
    plays = [ask for ask in world.asks if isinstance(ask, Expand) and ask.width == 1]
    assert len(plays) == 4
    world = World(values, width=2)
    searched(dd.MCTS(4, rollout=2), world)
    assert world.expanded[-1] == (1,), "the play below it ended at 5, the other at 0"


def test_a_rollout_ends_at_terminal_nodes_and_dead_ends() -> None:
    """The value is that of the last node there is."""
    world = World({(0,): 1.0, (1,): 2.0, (1, 0): 7.0}, width=2, terminal=frozenset({(1, 0)}))
    assert searched(dd.MCTS(6, rollout=5), world) == (1, 0)
    assert world.expanded[:3] == [(), (0,), (1,)]


def test_the_depth_of_mcts_is_bounded() -> None:
    """Nodes at full depth are ends."""
    world = World(complete(4, 2, lambda path: float(len(path))), width=2)
    assert len(searched(dd.MCTS(1000, depth=2), world)) == 2
    assert len(world.expanded) == 3


# --- LATS ----------------------------------------------------------------------------------------------------------


def test_lats_reflects_on_the_best_failure_before_it_goes_on() -> None:
    """Whatever else is freed waits for the reflection; a goal needs none."""
    values = complete(2, 2, lambda path: float(sum(path)))
    ends = frozenset(path for path in values if len(path) == 2)
    world = World(values, width=2, terminal=ends)
    assert searched(dd.LATS(10, reflect="Why?"), world) == (1, 1)
    kinds = [(type(ask).__name__, world.paths[ask.node]) for ask in world.asks if isinstance(ask, Expand | Reflect)]
    assert kinds == [("Expand", ()), ("Expand", (1,)), ("Reflect", (1, 1)), ("Expand", (0,)), ("Reflect", (0, 1))]
    found = World(values, width=2, terminal=ends, goal=(1, 0))
    assert searched(dd.LATS(10), found) == (1, 0)
    assert not any(isinstance(ask, Reflect) for ask in found.asks)


@given(worlds(), st.integers(1, 12))
def test_lats_searches_as_mcts_does(world: World, num: int) -> None:
    """Reflections aside, the same leaves in the same order."""
    searched(dd.LATS(num, exploration=1.0), world)
    other = World(world.values, width=world.width, terminal=world.terminal)
    searched(dd.MCTS(num, exploration=1.0), other)
    assert world.expanded == other.expanded


# --- best of N -----------------------------------------------------------------------------------------------------


@given(worlds(), st.integers(1, 3), st.integers(1, 3))
def test_best_of_n_returns_the_best_end(world: World, num: int, depth: int) -> None:
    """Of `num` paths that take the first child that is left at each step."""
    paths = children_of(world, ())[:num] or [()]
    for _ in range(depth - 1):
        paths = [
            next(iter(children_of(world, path)), path) if path and path not in world.terminal else path
            for path in paths
        ]
    assert searched(dd.BestOfN(num, depth=depth), world) == highest(world, paths)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_votes_are_counted(answers: list[str], dice: random.Random) -> None:
    """The majority's best node wins; weighted, the answer with the largest sum of values."""
    values: Values = {(index,): float(value) for index, value in enumerate(dice.sample(range(100), len(answers)))}

    def winner(weight: Callable[[Path], float]) -> Path:
        sums: dict[str, float] = defaultdict(float)
        for path in values:
            sums[answers[path[0]]] += weight(path)
        groups = {said: [path for path in values if answers[path[0]] == said] for said in sums}
        best = max(groups, key=lambda said: (sums[said], max(values[path] for path in groups[said])))
        return max(groups[best], key=lambda path: values[path])

    def world() -> World:
        return World(values, width=len(values), ballot=lambda path: answers[path[0]])

    vote: Any = len  # never called: the world counts
    assert searched(dd.BestOfN(len(values), vote=vote), world()) == winner(lambda path: 1.0)
    weighted = dd.BestOfN(len(values), vote=vote, weighted=True)
    assert searched(weighted, world()) == winner(lambda path: values[path])


def test_whoever_abstains_does_not_count() -> None:
    """Two of one answer beat three that say nothing; where nobody votes, the value decides."""
    values: Values = {(index,): float(index) for index in range(5)}
    vote: Any = len
    said: list[str | None] = ["a", "a", None, None, None]
    world = World(values, width=5, ballot=lambda path: said[path[0]])
    assert searched(dd.BestOfN(5, vote=vote), world) == (1,)
    nobody = World(values, width=5, ballot=lambda path: None)
    assert searched(dd.BestOfN(5, vote=vote), nobody) == (4,)
    assert isinstance(nobody.asks[-1], Vote)


# --- self-refine ---------------------------------------------------------------------------------------------------


def test_self_refine_is_a_chain_and_returns_its_best() -> None:
    """A draft and three revisions, each criticised before the next; the best of four comes back."""
    values = {(0,) * length: value for length, value in enumerate([0.0, 3.0, 1.0, 9.0, 2.0, 5.0]) if length}
    world = World(values, width=1)
    assert searched(dd.SelfRefine(3, critique="Well?"), world) == (0, 0, 0)
    assert [type(ask).__name__ for ask in world.asks] == ["Expand", *["Reflect", "Expand"] * 3]
    assert all(ask.is_kept for ask in world.asks if isinstance(ask, Reflect))


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 5), st.none() | st.integers(1, 6), st.booleans())
def test_self_refine_is_what_its_definition_says(
    values: list[int], rounds: int, end: int | None, is_goal: bool
) -> None:
    """The best of the drafts until the rounds, the drafts or the interest end, whatever their values are."""
    chain = {(0,) * length: float(value) for length, value in enumerate(values, 1)}
    last = () if end is None else (0,) * end
    world = World(chain, width=1, goal=last if is_goal else None, terminal=frozenset({last}) - {()})
    drafts = [path for path in chain if len(path) <= rounds + 1 and (end is None or len(path) <= end)]
    is_found = is_goal and last in drafts
    assert searched(dd.SelfRefine(rounds), world) == (last if is_found else highest(world, [(), *drafts]))
    assert world.paths[1:] == drafts


def test_self_refine_ends_with_goals_ends_and_dead_ends() -> None:
    """Nothing is revised any more."""
    chain = {(0,) * length: float(length) for length in range(1, 5)}
    for world, best in (
        (World(chain, width=1, goal=(0, 0)), (0, 0)),
        (World(chain, width=1, terminal=frozenset({(0,)})), (0,)),
        (World({(0,): 1.0}, width=1), (0,)),
    ):
        assert searched(dd.SelfRefine(3), world) == best


# --- adaptive branching --------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(worlds(num_levels=2), st.integers(1, 4), st.integers(0, 99))
def test_adaptive_branching_with_time_enough_finds_the_best(world: World, parallel: int, seed: int) -> None:
    """One child at a time, until there is no other; then it stops."""
    assert searched(dd.AdaptiveBranching(5000, parallel=parallel), world, seed=seed) == highest(
        world, [(), *world.values]
    )
    assert sorted(world.paths[1:]) == sorted(world.values)
    assert all(ask.width == 1 for ask in world.asks if isinstance(ask, Expand))


def test_adaptive_branching_repeats_by_seed() -> None:
    """What is drawn depends on the seed and on what was told, and on nothing else."""
    runs = []
    for seed in (1, 1, 2):
        world = World(complete(3, 4, lambda path: float(hash(path) % 97)), width=4)
        searched(dd.AdaptiveBranching(30), world, seed=seed)
        runs.append(world.expanded)
    assert runs[0] == runs[1] != runs[2]


def test_adaptive_branching_goes_where_values_rise() -> None:
    """Wider where new children of the root are the best there is, deeper where each step gains."""

    def mean_depth(value: Callable[[Path], float]) -> float:
        depths: list[int] = []
        for seed in range(4):
            world = World(Endless(value), width=1000)
            searched(dd.AdaptiveBranching(40), world, seed=seed)
            depths += [len(path) for path in world.paths[1:]]
        return sum(depths) / len(depths)

    wide = mean_depth(lambda path: 1.0 if len(path) == 1 else 0.0)
    deep = mean_depth(lambda path: float(len(path)))
    assert wide < 2
    assert deep > 3


class Endless(dict[Path, float]):
    """A tree without end."""

    def __init__(self, value: Callable[[Path], float]) -> None:
        super().__init__()
        self.value = value

    def __contains__(self, path: object) -> bool:
        return True

    def __missing__(self, path: Path) -> float:
        return self.value(path)


# --- what they refuse ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy, facts, complaint",
    [
        (dd.BestFirst(0), FACTS, "max_nodes=0"),
        (dd.BestFirst(3), replace(FACTS, has_score=False), "needs a @score to know which node is best"),
        (dd.DepthFirst(0), FACTS, "depth=0"),
        (dd.DepthFirst(2, threshold=0.5), replace(FACTS, has_score=False), "hold against the threshold"),
        (dd.DepthFirst(2), replace(FACTS, has_score=False, has_observe=False), "nothing to tell nodes apart"),
        (dd.MCTS(0), FACTS, "iterations=0"),
        (dd.MCTS(4, parallel=0), FACTS, "parallel=0"),
        (dd.MCTS(4), replace(FACTS, has_score=False), "needs a @score to back up"),
        (dd.MCTS(4, exploration=-1.0), FACTS, "exploration=-1.0"),
        (dd.MCTS(4, rollout=-1), FACTS, "rollout=-1"),
        (dd.LATS(4), replace(FACTS, has_observe=False), "needs an @observe that says what is terminal"),
        (dd.LATS(4, reflect=""), FACTS, "asks nothing about failures"),
        (dd.BestOfN(0), FACTS, "n=0"),
        (dd.BestOfN(4), replace(FACTS, has_score=False, has_observe=False), "nothing to tell nodes apart"),
        (dd.BestOfN(4, weighted=True), replace(FACTS, has_score=False), "to weigh votes with"),
        (dd.SelfRefine(0), FACTS, "rounds=0"),
        (dd.SelfRefine(2), replace(FACTS, has_observe=False), "nobody says what is wrong"),
        (dd.AdaptiveBranching(0), FACTS, "iterations=0"),
        (dd.AdaptiveBranching(4), replace(FACTS, has_score=False), "needs a @score to learn from"),
    ],
    ids=str,
)
def test_programs_they_cannot_run_are_refused(strategy: dd.Strategy, facts: ProgramFacts, complaint: str) -> None:
    """With what is wrong or missing."""
    with pytest.raises(dd.ProgramError, match=complaint):
        strategy.check(facts)


def test_unknown_rules_are_refused() -> None:
    """What a type checker would say too."""
    with pytest.raises(dd.ProgramError, match="rule='ucb'"):
        dd.MCTS(4, rule="ucb").check(FACTS)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(dd.ProgramError, match="backup='sum'"):
        dd.MCTS(4, backup="sum").check(FACTS)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize(
    "strategy, text",
    [
        (dd.BestFirst(3, parallel=2), "BestFirst(3, parallel=2)"),
        (dd.DepthFirst(4, threshold=0.5), "DepthFirst(depth=4, threshold=0.5)"),
        (dd.MCTS(64, parallel=8, rule="puct"), "MCTS(64, parallel=8, rule='puct')"),
        (dd.LATS(30, reflect="Why?"), "LATS(30, exploration=1.0, reflect='Why?')"),
        (dd.BestOfN(16, vote=len, depth=2), "BestOfN(16, vote=len, depth=2)"),  # type: ignore[arg-type]  # has a name
        (dd.SelfRefine(3), "SelfRefine(rounds=3)"),
        (dd.AdaptiveBranching(60, depth=3), "AdaptiveBranching(60, depth=3)"),
    ],
)
def test_strategies_say_how_they_were_made(strategy: dd.Strategy, text: str) -> None:
    """As a user would write them."""
    assert str(strategy) == text
