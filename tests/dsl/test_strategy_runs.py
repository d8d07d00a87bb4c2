"""Strategies in whole searches on the scripted engine: one program, swapped by one argument; nothing is left behind."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import dendrite as dd
from dendrite.dsl.types import StepId
from dendrite.testing import Reply, scripted_engine

Walk = tuple[dd.Candidate, bool]


@dataclass(frozen=True)
class Sum:
    total: int = 0


def digits(text: str) -> Reply:
    if text.endswith("Step:"):
        return [" 1\n", " 5\n", " 9\n"]
    if text.endswith("wrong?"):
        return "too much" if "9" in text else "too little"
    return {" yes": 0.75, " no": 0.25}


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    with scripted_engine(digits) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats().blocks_used == 0


@dd.expand(width=3, stop="\n")
def step(node: dd.Node[Sum]) -> str:
    return "".join(f"\n[{lesson}]" for lesson in node.reflections) + "\nStep:"


@dd.observe
def add(node: dd.Node[Sum]) -> dd.Outcome[Sum]:
    total = node.state.total + int(node.text)
    return dd.Outcome(Sum(total), goal=total == 19, terminal=total > 19)


@dd.score
def closeness(node: dd.Node[Sum]) -> float:
    return -abs(19.0 - node.state.total)


STRATEGIES: list[dd.Strategy] = [
    dd.Beam(depth=8),
    dd.DepthFirst(depth=8),
    dd.BestFirst(30, parallel=3),
    dd.MCTS(40, parallel=4),
    dd.MCTS(40, parallel=2, rule="puct", backup="max", rollout=3),
    dd.LATS(30, reflect="\nWhat is wrong?"),
    dd.BestOfN(30, depth=8),
    dd.AdaptiveBranching(120, parallel=4),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_one_program_runs_under_every_strategy(engine: dd.Engine, strategy: dd.Strategy) -> None:
    """It finds the goal, twice the same way by seed, keeps its best path alone and gives that back."""
    program = dd.compile(step, add, closeness, dd.prune(keep=3), strategy=dd.Beam(1)).replace(strategy=strategy)
    trees = []
    for _ in range(2):
        with program.run(engine, "Reach 19.", state=Sum(), seed=1) as result:
            assert result.stopped == "goal"
            assert result.best.state == Sum(19)
            assert sum(int(node.text) for node in result.best.path[1:]) == 19
            assert engine.stats().branches == len(result.best.path)
            assert result.best.branch.text.endswith(result.best.transcript.removeprefix("Reach 19."))
            trees.append(result.tree.to_json())
    assert trees[0] == trees[1]


def test_self_refine_revises_what_was_criticised(engine: dd.Engine) -> None:
    """Draft and critique stay in the text that the revision continues; the best draft is returned."""
    write = dd.expand(cue="\nStep:", stop="\n")
    program = dd.compile(write, add, closeness, strategy=dd.SelfRefine(2, critique="\nWhat is wrong?"))
    with program.run(engine, "Go.", state=Sum(), seed=2) as result:
        assert [node.depth for node in result.tree] == [0, 1, 2, 3]
        last = list(result.tree)[-1]
        assert last.transcript.count("\nWhat is wrong?too ") == 2
        assert result.best.branch.text.endswith(result.best.transcript.removeprefix("Go."))
        assert result.usage.tokens_generated > 0


def test_lats_puts_reflections_before_later_nodes_only(engine: dd.Engine) -> None:
    """The functions see them; nothing of the question is in anybody's text; `reflected` says what was said."""

    @dd.observe
    def fail(node: dd.Node[Sum]) -> dd.Outcome[Sum]:
        total = node.state.total + int(node.text)
        return dd.Outcome(Sum(total), terminal=total > 9)

    program = dd.compile(step, fail, closeness, strategy=dd.LATS(6, reflect="\nWhat is wrong?"))
    events = list(program.stream(engine, "Go.", state=Sum(), seed=3))
    result = events[-1].result
    assert result is not None
    said = [event.detail for event in events if event.kind == "reflected"]
    assert said
    assert set(said) <= {"too much", "too little"}
    transcripts = [node.transcript for node in result.tree]
    assert any(f"[{said[0]}]\nStep:" in text for text in transcripts)
    assert not any("What is wrong?" in text for text in transcripts)
    assert max(len(node.reflections) for node in result.tree) <= 3
    result.close()


def test_votes_decide(engine: dd.Engine) -> None:
    """The majority's answer comes back, and whoever abstains does not count."""

    def answer(node: dd.Node) -> str | None:
        return None if node.text == " 9" else node.text

    program = dd.compile(dd.expand(cue="\nStep:", stop="\n"), strategy=dd.BestOfN(25, vote=answer))
    with program.run(engine, "Go.", seed=4) as result:
        texts = [node.text for node in list(result.tree)[1:]]
        assert len(texts) == 25
        assert result.best.text == max((" 1", " 5"), key=texts.count)
        assert result.usage.tokens_logical > 5 * result.usage.tokens_computed / 2


def test_a_vote_that_fails_is_named(engine: dd.Engine) -> None:
    """A ballot must be something that can be counted."""
    vote: Any = lambda node: [1]  # noqa: E731 - of a type that no checker would let through
    program = dd.compile(dd.expand(cue="\nStep:", stop="\n"), strategy=dd.BestOfN(3, vote=vote))
    with pytest.raises(dd.CallbackError, match=r"returned \[1\], which cannot be hashed"):
        program.run(engine, "Go.")


def test_puct_reads_the_priors_of_moves_off_the_model(engine: dd.Engine) -> None:
    """Children that code made are weighed by the model in one pass, where the rule asks for it."""

    @dd.expand
    def moves(node: dd.Node) -> list[dd.Child]:
        return [dd.Child(f"\nStep:{move}\n", None) for move in (" 1", " 7", " 5")] if node.depth < 1 else []

    @dd.score
    def same(node: dd.Node) -> float:
        return 0.5

    with dd.compile(moves, same, strategy=dd.MCTS(4, rule="puct")).run(engine, "Go.") as result:
        logprobs = [node.logprob for node in list(result.tree)[1:]]
        assert all(logprob is not None for logprob in logprobs)
        assert logprobs[1] == min(logprob for logprob in logprobs if logprob is not None)
    with dd.compile(moves, same, strategy=dd.MCTS(4)).run(engine, "Go.") as result:
        assert [node.logprob for node in list(result.tree)[1:]] == [None] * 3


def test_equal_states_merge(engine: dd.Engine) -> None:
    """Of the nodes that reach one total the first goes on, in the order asked, whatever is done first."""
    program = dd.compile(
        dd.expand(cue="\nStep:", width=6, stop="\n"),
        add,
        closeness,
        strategy=dd.Beam(depth=2),
        merge=lambda node: node.state,
    )
    events = list(program.stream(engine, "Go.", state=Sum(), seed=5))
    result = events[-1].result
    assert result is not None
    kept = [node.state for node in result.tree if node.status != "merged"]
    assert len(kept) == len(set(kept)), "each total once"
    assert {event.kind for event in events if event.node.status == "merged"} >= {"merged"}
    merged = next(event for event in events if event.kind == "merged")
    assert merged.detail.startswith("the same as root/")
    assert merged.node.value is None, "it was not scored"
    ids = {node.state: node.id for node in result.tree if node.status != "merged"}
    assert all(ids[node.state] < node.id for node in result.tree if node.status == "merged")
    result.close()


def test_a_strategy_of_ones_own(engine: dd.Engine) -> None:
    """What the docs show: a few lines over plain values."""

    class Greedy(dd.Strategy[tuple[dd.Candidate, bool]]):
        def begin(self, root: dd.Candidate, seed: int = 0) -> Walk:
            return (root, False)

        def ask(self, state: Walk) -> tuple[Walk, list[dd.Expand]]:
            node, is_waiting = state
            if is_waiting or node.is_terminal:
                return state, []
            return (node, True), [dd.Expand(node.id)]

        def tell(self, state: Walk, told: object) -> Walk:
            assert isinstance(told, dd.Expanded)
            return (max(told.children, key=lambda child: child.rank), False)

        def best(self, state: Walk) -> StepId:
            return state[0].id

        def live(self, state: Walk) -> list[StepId]:
            return [state[0].id]

        def __str__(self) -> str:
            return "Greedy()"

    with dd.compile(step, add, closeness, strategy=Greedy()).run(engine, "Go.", state=Sum(), seed=6) as result:
        assert result.best.status in ("goal", "terminal")
        assert result.best.depth >= 3
