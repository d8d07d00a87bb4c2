"""Constraints in programs: of a node, of an `@expand`, of a side question; over a scripted model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest

import dendrite as dd
from dendrite.testing import node, scripted_engine


@dataclass(frozen=True)
class Walk:
    at: int = 0


def reply(text: str) -> list[str]:
    """The script likes to go up, sometimes down, and never stops of its own accord."""
    return [" up and away", " up or so", " down"]


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    """An engine that must hold nothing at the end."""
    with scripted_engine(reply) as made:
        yield made
        made.check_integrity()
        assert made.stats().blocks_used == 0


def legal(walk: Walk) -> list[str]:
    return [] if walk.at == 3 else [" up", " down"] if walk.at else [" up"]


@dd.expand(width=6)
def move(at: dd.Node[Walk]) -> dd.Gen:
    return dd.Gen("\nGo:", choices=legal(at.state))


@dd.observe
def step(at: dd.Node[Walk]) -> Walk:
    return Walk(at.state.at + {" up": 1, " down": -1}[at.text])


@dd.score
def height(at: dd.Node[Walk]) -> float:
    return at.state.at


walk = dd.compile(move, step, height, dd.prune(keep=3), strategy=dd.Beam(depth=5))


def test_children_are_legal_moves_of_their_own_node(engine: dd.Engine) -> None:
    """Each text is one of its parent's choices, whatever the model would rather say."""
    with walk.run(engine, "Walk.", state=Walk(), seed=1) as result:
        nodes = list(result.tree)[1:]
        assert {at.text for at in nodes} == {" up", " down"}
        assert all(at.text in legal(at.parent.state) for at in nodes if at.parent is not None)
        assert result.best.state.at == 3


def test_no_choice_makes_no_child(engine: dd.Engine) -> None:
    """A node without legal moves is a leaf; a search that starts at one ends there."""
    with walk.run(engine, "Walk.", state=Walk(3), seed=1) as result:
        assert (len(result.tree), result.stopped) == (1, "done")


def test_gen_reads_as_the_constraint_it_is() -> None:
    """In a unit test, without an engine."""
    assert move(node(state=Walk(1))).constraint == dd.Constraint(choices=[" up", " down"])
    assert dd.Gen("x").constraint is None
    with pytest.raises(dd.ConstraintError, match="one of"):
        _ = dd.Gen(regex="a", choices=["b"]).constraint


@pytest.mark.parametrize(
    "given, pattern",
    [
        ({"choices": [" up", " left"]}, " up| left"),
        ({"regex": " (up|down) [0-9]"}, " (up|down) [0-9]"),
        ({"grammar": 'start: " " ("up" | "down") ","'}, " (up|down),"),
        ({"schema": {"enum": ["up", "down"]}}, '"(up|down)"'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, Mapping) else "",
)
def test_expand_takes_the_same_constraints(engine: dd.Engine, given: dict[str, object], pattern: str) -> None:
    """As arguments they hold for every child, of a part by itself and of a function that returns a plain cue."""

    def cue(at: dd.Node) -> str:
        return "\nGo:"

    score = dd.score(lambda at: 1.0)
    for part in (dd.expand(cue="\nGo:", width=3, **given), dd.expand(width=3, **given)(cue)):  # type: ignore[call-overload]  # any of them
        program = dd.compile(part, score, strategy=dd.Beam(depth=1))
        assert next(iter(given)) in program.explain()
        with program.run(engine, "Walk.", seed=2) as result:
            assert all(re.fullmatch(pattern, at.text) for at in list(result.tree)[1:])


def test_what_gen_says_goes_before_what_expand_says(engine: dd.Engine) -> None:
    """A node's own constraint replaces the common one."""

    @dd.expand(width=2, regex="[0-9]")
    def either(at: dd.Node) -> dd.Gen:
        return dd.Gen("\nGo:", choices=[" up"]) if at.depth else dd.Gen("\nGo:")

    program = dd.compile(either, dd.score(lambda at: 1.0), strategy=dd.Beam(depth=2))
    with program.run(engine, "Walk.", seed=2) as result:
        texts = {at.depth: at.text for at in result.tree}
        assert texts[1].isdigit()
        assert texts[2] == " up"


@pytest.mark.parametrize(
    "given, match",
    [
        ({"regex": "("}, "unclosed group"),
        ({"grammar": "start: nothing_of_that_name"}, "unknown name"),
        ({"schema": {"type": "nonsense"}}, "nonsense"),
        ({"choices": []}, "nothing to choose"),
        ({"regex": "a", "schema": int}, "one of schema="),
    ],
)
def test_a_static_grammar_that_is_invalid_fails_at_compile_time(given: dict[str, object], match: str) -> None:
    """With the line of the function, and with llguidance's message."""

    @dd.expand(**given)  # type: ignore[call-overload, untyped-decorator]  # any of them
    def wrong(at: dd.Node) -> str:
        return "x"

    with pytest.raises(dd.ProgramError, match=rf"wrong \(.*test_constraints\.py:\d+\): (?s:.*){match}"):
        dd.compile(wrong, dd.score(lambda at: 1.0), strategy=dd.Beam(depth=1))


def test_an_invalid_grammar_of_a_node_names_function_and_node(engine: dd.Engine) -> None:
    """It counts as the function's failure: it ends the run, or drops the node under on_error="drop"."""

    @dd.expand(width=2)
    def wrong(at: dd.Node) -> dd.Gen:
        return dd.Gen("\nGo:", regex="[" if at.depth else " up")

    parts = (wrong, dd.score(lambda at: 1.0))
    with pytest.raises(dd.CallbackError, match=r"wrong .*cannot be used: regex '\['(?s:.*)node root/0") as caught:
        dd.compile(*parts, strategy=dd.Beam(depth=2)).run(engine, "Walk.")
    assert isinstance(caught.value.__cause__, dd.ConstraintError)
    with dd.compile(*parts, strategy=dd.Beam(depth=2), on_error="drop").run(engine, "Walk.") as result:
        assert result.best.depth == 1


async def test_a_dead_end_drops_its_child_alone(engine: dd.Engine) -> None:
    """The event says why, no function sees the child, and the search goes on with the others."""
    seen: list[str] = []

    @dd.expand(width=8)
    def risky(at: dd.Node) -> dd.Gen:
        return dd.Gen("\nGo:", grammar=r'start: " up" | " down" /[^\s\S]/')

    @dd.observe
    def watch(at: dd.Node) -> None:
        seen.append(at.text)

    program = dd.compile(risky, watch, dd.score(lambda at: 1.0), strategy=dd.Beam(depth=1))
    events = [event async for event in program.astream(engine, "Walk.", seed=3)]
    dropped = [event.detail for event in events if event.kind == "dropped"]
    assert events[-1].result is not None
    with events[-1].result as result:
        assert result.best.text == " up"
    assert dropped
    assert all("grammar" in why for why in dropped)
    assert seen
    assert set(seen) == {" up"}
    assert len(seen) + len(dropped) == 8


def test_a_side_question_can_be_constrained(engine: dd.Engine) -> None:
    """`Node.ask` takes a constraint, too."""
    answers: list[str] = []

    @dd.score
    async def asked(at: dd.Node) -> float:
        reply = await at.ask(" Rate:", constraint=dd.Constraint(regex="[1-9]"))
        answers.append(reply.text)
        return float(reply.text)

    program = dd.compile(dd.expand(cue="\nGo:", width=2, max_tokens=4), asked, strategy=dd.Beam(depth=1))
    with program.run(engine, "Walk.", seed=3):
        assert all(re.fullmatch("[1-9]", answer) for answer in answers)
        assert len(answers) == 2


def test_a_constrained_search_is_the_same_twice() -> None:
    """Forced tokens take no randomness: equal seeds give equal trees."""
    texts = []
    for _ in range(2):
        with scripted_engine(reply) as engine, walk.run(engine, "Walk.", state=Walk(), seed=9) as result:
            texts.append([at.text for at in result.tree])
    assert texts[0] == texts[1]


def test_tree_search_over_legal_moves_sees_forced_tokens_too(engine: dd.Engine) -> None:
    """PUCT weighs moves by the model's probability, for which forced tokens are drawn and have theirs."""
    program = dd.compile(move, step, height, strategy=dd.MCTS(12, parallel=3, rule="puct"))
    with program.run(engine, "Walk.", state=Walk(), seed=1) as result:
        nodes = list(result.tree)[1:]
        assert nodes
        assert all(at.text in legal(at.parent.state) for at in nodes if at.parent is not None)
    assert engine.stats().tokens_forced == 0
