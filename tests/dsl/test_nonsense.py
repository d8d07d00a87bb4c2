"""What a program's functions and options may not be: refused with what to do; under "drop" only that node is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dendrite as dd
from dendrite.testing import scripted_engine

HALF = "a\udc80"
raw: Any = dd
"""The package as nobody checks it."""


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    with scripted_engine(lambda _: [" go", " stop"]) as engine:
        yield engine
        assert engine.stats().blocks_used == 0
        engine.check_integrity()


@dd.score
def length(node: dd.Node) -> float:
    return float(len(node.text))


STEP = dd.expand(cue="\nStep:", width=2, max_tokens=4)


@pytest.mark.parametrize(
    "build, complaint",
    [
        (
            lambda: raw.compile(raw.expand(cue=HALF), length, strategy=raw.Beam(1)),
            "neither text nor chat messages",
        ),
        (
            lambda: raw.compile(raw.expand(cue="a", stop=3), length, strategy=raw.Beam(1)),
            "stop=3 cannot be used",
        ),
        (
            lambda: raw.compile(raw.expand(cue="a", stop=[3]), length, strategy=raw.Beam(1)),
            "give a string or a list",
        ),
        (
            lambda: raw.compile(raw.expand(cue="a", temperature="hot"), length, strategy=raw.Beam(1)),
            "'hot'",
        ),
        (
            lambda: raw.compile(raw.expand(cue="a", prior="high"), length, strategy=raw.Beam(1)),
            "prior='high'",
        ),
        (
            lambda: raw.compile(raw.expand(cue="a", prior=float("inf")), length, strategy=raw.Beam(1)),
            "prior=inf",
        ),
        (
            lambda: raw.compile(raw.expand(cue="a", when=3), length, strategy=raw.Beam(1)),
            "when=3 is no function",
        ),
        (lambda: raw.compile(STEP, length, strategy=raw.Beam(1), merge=3), "merge=3 is no function"),
        (lambda: raw.compile(STEP, strategy=raw.BestOfN(2, vote="most")), "vote='most' is no function"),
        (
            lambda: raw.compile(STEP, raw.score(weight="heavy")(lambda _: 1.0), strategy=raw.Beam(1)),
            "weight='heavy'",
        ),
        (
            lambda: raw.compile(STEP, length, strategy=raw.Beam(1.5)),
            "depth=1.5 cannot be used: give a whole number",
        ),
        (lambda: raw.compile(STEP, length, strategy=raw.MCTS(4, depth=0)), "depth=0 cannot be used"),
        (lambda: raw.compile(STEP, length, strategy=raw.BestFirst(4, parallel="x")), "parallel='x' cannot be used"),
        (lambda: raw.compile(STEP, length, strategy=raw.BestOfN(4, depth="x")), "depth='x' cannot be used"),
        (lambda: raw.compile(STEP, length, strategy=raw.MCTS(4, exploration="far")), "exploration='far'"),
        (lambda: raw.compile(STEP, length, strategy=raw.MCTS(4, rollout=0.5)), "rollout=0.5 cannot be used"),
        (
            lambda: raw.compile(STEP, length, strategy=raw.AdaptiveBranching(4, depth=0)),
            "depth=0 cannot be used",
        ),
        (lambda: raw.compile(STEP, length, strategy=raw.DepthFirst(2, threshold="low")), "threshold='low'"),
        (
            lambda: raw.compile(STEP, length, strategy=raw.SelfRefine(2, critique=3)),
            "critique=3 is no question",
        ),
        (lambda: raw.Choice(["yes", 3]), "the label 3 of a Choice is no text"),
        (lambda: raw.Choice(3), "needs labels"),
        (lambda: raw.Choice({"yes": "much"}), "is worth 'much': give a finite number"),
        (lambda: raw.Choice(["yes", "no"], 3), "question 3 of a Choice is neither text"),
        (lambda: raw.Budget(tokens="many"), r"Budget\(tokens='many'\) is no whole number"),
        (lambda: raw.Budget(nodes=1.5), r"Budget\(nodes=1.5\) is no whole number"),
        (lambda: raw.Budget(seconds="long"), r"Budget\(seconds='long'\) is no number"),
    ],
)
def test_options_of_the_wrong_type_are_refused_when_the_program_is_built(
    build: Callable[[], object], complaint: str
) -> None:
    """Not as a bare `TypeError`, and not in the middle of a search."""
    with pytest.raises(dd.ProgramError, match=complaint):
        build()


RUNS: Any = dd.compile(STEP, length, strategy=dd.Beam(1))


@pytest.mark.parametrize(
    "run, complaint",
    [
        (lambda engine: RUNS.run(engine, HALF), "the prompt is"),
        (lambda engine: RUNS.run(engine, [{"role": "bard", "content": "x"}]), "the prompt is"),
        (lambda engine: RUNS.run(engine, "p", seed="x"), "seed='x' cannot be used"),
        (lambda engine: RUNS.run(engine, "p", budget=100), "budget=100 is no Budget"),
        (lambda engine: RUNS.run(engine, "p", journal=3.5), "3.5 is no path"),
        (lambda engine: RUNS.resume(3.5, engine), "3.5 is no path"),
        (lambda engine: RUNS.resume("none.jsonl", engine, budget=100), "budget=100 is no Budget"),
        (lambda engine: RUNS.map(engine, 3), "give .prompt, state. pairs"),
        (lambda engine: RUNS.map(engine, ["a"]), "got 'a' as input 0: give .prompt, state. pairs"),
        (lambda engine: RUNS.map(engine, [("a", None)], concurrency="2"), "give a whole number, 1 or more"),
    ],
)
def test_arguments_of_the_wrong_type_begin_no_search(
    engine: dd.Engine, run: Callable[[dd.Engine], object], complaint: str
) -> None:
    """Nothing is made, no file either."""
    with pytest.raises(dd.ProgramError, match=complaint):
        run(engine)


def test_a_seed_that_is_none_begins_no_journal(engine: dd.Engine, tmp_path: Path) -> None:
    """A file with half a header would be in the way of the next try."""
    with pytest.raises(dd.ProgramError):
        RUNS.run(engine, "p", seed="x", journal=tmp_path / "run.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "said, complaint",
    [
        (raw.Gen(3), "a Gen whose cue 3 is neither text nor chat messages"),
        (raw.Gen("a", max_tokens=0), "a Gen with max_tokens=0: give a whole number"),
        (raw.Gen("a", max_tokens="8"), "max_tokens='8'"),
        ([raw.Child(3, None)], "a Child whose text 3"),
        ([raw.Child("fine", None), raw.Child(HALF, None)], "a Child whose text"),
        ([raw.Child("a", None, prior=-1.0)], "prior=-1.0: give a finite number"),
        ([raw.Child("a", None, prior=float("nan"))], "prior=nan"),
        (HALF, "not a cue, a Gen or a list of Children"),
        ([{"role": "bard", "content": "x"}], "not a cue, a Gen or a list of Children"),
        ([{"role": "user", "content": None}], "not a cue, a Gen or a list of Children"),
    ],
)
def test_an_expand_that_returns_nonsense_is_named_or_dropped(engine: dd.Engine, said: object, complaint: str) -> None:
    """The function, its line and the node are in the message; under "drop" the search ends with its root."""

    @dd.expand(max_tokens=4)
    def nonsense(node: dd.Node) -> object:
        return said

    program = dd.compile(nonsense, length, strategy=dd.Beam(2))
    with pytest.raises(dd.CallbackError, match=f"nonsense .*test_nonsense.py.* returned .*{complaint}"):
        program.run(engine, "p")
    dropped = dd.compile(nonsense, length, strategy=dd.Beam(2), on_error="drop")
    with dropped.run(engine, "p") as result:
        assert result.best.depth == 0


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), 10**400, int, [1.0]])
def test_a_score_is_one_finite_number(engine: dd.Engine, number: object) -> None:
    """An infinite one would make every comparison within the range of values NaN."""

    @dd.score
    def judged(node: dd.Node) -> object:
        return number

    for strategy in (dd.Beam(1), dd.MCTS(4)):
        with pytest.raises(dd.CallbackError, match=r"judged .* returned .*, not a (finite )?number"):
            dd.compile(STEP, judged, strategy=strategy).run(engine, "p")


@pytest.mark.parametrize("strategy", [dd.MCTS(6, rule="puct"), dd.AdaptiveBranching(6), dd.Beam(2)], ids=str)
def test_children_without_any_prior_are_drawn_alike(engine: dd.Engine, strategy: dd.Strategy) -> None:
    """Probabilities of a model underflow to 0; shares of nothing are equal shares."""

    @dd.expand
    def moves(node: dd.Node) -> list[dd.Child[object]]:
        return [dd.Child(f" {move}", None, prior=0.0) for move in ("left", "right", "on")]

    with dd.compile(moves, length, strategy=strategy).run(engine, "p", seed=1) as result:
        assert {row["text"] for row in result.tree.to_rows() if row["depth"] == 1} == {" left", " right", " on"}


def test_only_nodes_of_the_frontier_can_be_kept(engine: dd.Engine) -> None:
    """Whatever else is given changes nothing."""
    with RUNS.start(engine, "p", seed=1) as search:
        for frontier in search:
            for nodes in (None, 3, "x", [3], [frontier[0]] * 2):
                with pytest.raises(dd.ProgramError, match=r"keep\(\) takes a list of nodes of this frontier"):
                    search.keep(nodes)
            search.keep(frontier[1:2])
        assert search.result().best == frontier[1]
        search.result().close()


PLACES: dict[str, Callable[[Callable[..., Any]], dd.Program[Any]]] = {
    "expand": lambda call: dd.compile(dd.expand(max_tokens=4)(call), length, strategy=dd.Beam(2)),
    "observe": lambda call: dd.compile(STEP, dd.observe(call), length, strategy=dd.Beam(2)),
    "score": lambda call: dd.compile(STEP, dd.score(call), strategy=dd.Beam(2)),
    "scores": lambda call: dd.compile(STEP, dd.score(batch=2)(call), strategy=dd.Beam(2)),
    "prune": lambda call: dd.compile(STEP, length, dd.prune(call), strategy=dd.Beam(2)),
    "vote": lambda call: dd.compile(STEP, strategy=dd.BestOfN(3, vote=call)),
    "merge": lambda call: dd.compile(STEP, length, strategy=dd.Beam(2), merge=call),
}


def raiser(error: BaseException, *, is_async: bool) -> Callable[[object], object]:
    def plainly(argument: object) -> object:
        raise error

    async def later(argument: object) -> object:
        raise error

    return later if is_async else plainly


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_what_ends_the_process_leaves_no_branch(engine: dd.Engine, place: str, *, is_async: bool) -> None:
    """`sys.exit()` in a function leaves the event loop at once; what was under way is cleaned up all the same."""
    for error in (SystemExit(3), KeyboardInterrupt()):
        program = PLACES[place](raiser(error, is_async=is_async))
        with pytest.raises(type(error)):
            program.run(engine, "p", seed=1)
        assert engine.stats().blocks_used == 0


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_cancellation_from_within_is_a_failure(engine: dd.Engine, place: str, *, is_async: bool) -> None:
    """A function whose own task was cancelled, by its HTTP client say, ended the search as if it were done."""
    program = PLACES[place](raiser(asyncio.CancelledError(), is_async=is_async))
    with pytest.raises(dd.CallbackError, match="was cancelled from within"):
        program.run(engine, "p", seed=1)


@pytest.mark.parametrize("cue", ["\nA longer step than that:", "\nS:"])
def test_a_path_that_fills_the_context_is_dropped_or_ends_the_search(cue: str) -> None:
    """Under "drop" the search goes on with what has room, whether the cue or the text did not fit."""
    step = dd.expand(cue=cue, width=2, max_tokens=8)
    with scripted_engine(lambda _: [" go", " stop"], context_length=64) as engine:
        with pytest.raises(dd.ContextOverflow):
            dd.compile(step, length, strategy=dd.Beam(30)).run(engine, "p", seed=1)
        assert engine.stats().blocks_used == 0
        program = dd.compile(step, length, dd.prune(keep=2), strategy=dd.Beam(30), on_error="drop")
        with program.run(engine, "p", seed=1) as result:
            assert result.stopped == "done"
            assert 0 < result.best.depth < 30
        assert engine.stats().blocks_used == 0
        engine.check_integrity()
