"""Budgets: never exceeded, and what there is comes back."""

import asyncio
from collections.abc import Iterator

import pytest

import dendrite as dd
from dendrite.testing import Reply, scripted_engine


def script(text: str) -> Reply:
    return [" abcd\n", " efgh\n"] if text.endswith("Step:") else " a long answer to whatever was asked"


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    with scripted_engine(script) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats().blocks_used == 0


@dd.score
def length(node: dd.Node) -> float:
    return len(node.transcript)


PROGRAM = dd.compile(
    dd.expand(cue="\nStep:", width=4, stop="\n", max_tokens=8), length, dd.prune(keep=2), strategy=dd.Beam(depth=5)
)


@pytest.mark.parametrize("tokens", [1, 7, 30, 61])
def test_tokens_are_never_exceeded(engine: dd.Engine, tokens: int) -> None:
    """Generated tokens stay within the budget, and those generated make the result."""
    with PROGRAM.run(engine, "Go.", budget=dd.Budget(tokens=tokens)) as result:
        assert result.stopped == "budget"
        assert 0 < result.usage.tokens_generated <= tokens
        assert result.best.depth > 0
        assert all(node.text for node in result.tree if node.status not in ("dropped", "open") or node == result.best)


@pytest.mark.parametrize("nodes", [1, 4, 5, 13])
def test_nodes_are_never_exceeded(engine: dd.Engine, nodes: int) -> None:
    """As many nodes as allowed are made, and no more."""
    with PROGRAM.run(engine, "Go.", budget=dd.Budget(nodes=nodes)) as result:
        assert result.stopped == "budget"
        assert result.usage.nodes == len(result.tree) - 1 == nodes


def test_an_ample_budget_changes_nothing(engine: dd.Engine) -> None:
    """The same search as without one."""
    ample = dd.Budget(tokens=10_000, nodes=10_000, seconds=10_000, kv_bytes=10**9, branches=100)
    trees = []
    for budget in (None, ample):
        with PROGRAM.run(engine, "Go.", seed=1, budget=budget) as result:
            assert result.stopped == "done"
            trees.append(result.tree.to_json())
    assert trees[0] == trees[1]


def test_a_budget_that_is_just_enough_is_enough(engine: dd.Engine) -> None:
    """What ends with the search's own end is "done"."""
    with PROGRAM.run(engine, "Go.", seed=1) as result:
        nodes, tree = result.usage.nodes, result.tree.to_json()
    with PROGRAM.run(engine, "Go.", seed=1, budget=dd.Budget(nodes=nodes)) as result:
        assert result.stopped == "done"
        assert result.tree.to_json() == tree


@pytest.mark.parametrize("branches", [1, 3, 5, 9, 11])
def test_live_branches_are_never_exceeded(engine: dd.Engine, branches: int) -> None:
    """The search ends where it would need one more; the best it has by then is its result."""
    live: list[int] = []
    for event in PROGRAM.stream(engine, "Go.", budget=dd.Budget(branches=branches)):
        live.append(sum(branch.status != "pruned" for branch in all_branches(event.node)))
        if event.kind == "done":
            assert event.result is not None
            assert event.result.stopped == "budget"
            event.result.close()
    assert max(live) <= branches


def all_branches(node: dd.Node) -> list[dd.Branch]:
    """Those of the whole search that a node belongs to."""
    root = node.branch
    while root.parent is not None:
        root = root.parent
    found = [root]
    for branch in found:
        found += branch.children
    return found


def test_memory_ends_a_search(engine: dd.Engine) -> None:
    """Checked between operations: the round that went over is the last."""
    block_bytes = engine.stats().block_bytes
    with PROGRAM.run(engine, "Go.", budget=dd.Budget(kv_bytes=5 * block_bytes)) as result:
        assert result.stopped == "budget"
        assert result.best.depth == 1


class Clock:
    """A clock that stands still until it is set."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_time_ends_a_search_in_the_middle_of_an_operation(engine: dd.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was under way is cancelled; the rounds before it make the result."""
    clock = Clock()
    monkeypatch.setattr("dendrite.dsl.meter.time", clock)

    @dd.observe
    def look(node: dd.Node) -> None:
        clock.now = 0.0 if node.depth == 1 else 99.99

    @dd.score
    async def slow_below(node: dd.Node) -> float:
        if node.depth == 2:
            await asyncio.sleep(3600)
        return 1.0

    program = dd.compile(dd.expand(cue="\nStep:", width=2, stop="\n"), look, slow_below, strategy=dd.Beam(depth=4))
    with program.run(engine, "Go.", budget=dd.Budget(seconds=100.0)) as result:
        assert result.stopped == "budget"
        assert result.best.depth == 1
        assert {node.status for node in result.tree if node.depth == 2} == {"pruned"}
        assert all(node.depth == 1 for node in result.leaves)


def test_a_users_own_timeout_is_an_error_of_the_function(engine: dd.Engine) -> None:
    """It is not taken for the end of the budget."""

    @dd.score
    async def impatient(node: dd.Node) -> float:
        async with asyncio.timeout(0):
            await asyncio.sleep(3600)
        return 1.0

    program = dd.compile(dd.expand(cue="\nStep:", stop="\n"), impatient, strategy=dd.Beam(depth=1))
    with pytest.raises(dd.CallbackError, match="raised TimeoutError"):
        program.run(engine, "Go.", budget=dd.Budget(seconds=1000))


def test_asks_count_and_end_with_the_budget(engine: dd.Engine) -> None:
    """Near its end asks wait for each other; when nothing is left, their nodes are dropped, past `except Exception`."""
    answers: list[str] = []

    @dd.observe
    async def look(node: dd.Node) -> None:
        try:
            answers.append((await node.ask("Well?", max_tokens=10)).text)
        except Exception:  # noqa: BLE001 - what users write
            answers.append("swallowed")

    program = dd.compile(
        dd.expand(cue="\nStep:", width=4, stop="\n", max_tokens=8), look, length, strategy=dd.Beam(depth=3)
    )
    with program.run(engine, "Go.", budget=dd.Budget(tokens=4 * 6 + 25)) as result:
        assert result.stopped == "budget"
        assert result.usage.tokens_generated <= 49
        assert [len(text) for text in answers][:2] == [10, 10]
        assert "swallowed" not in answers
        assert [node.status for node in list(result.tree)[1:]].count("dropped") == 4 - len(answers)
    assert len(answers) == 3


def test_a_result_may_be_asked_beyond_the_budget(engine: dd.Engine) -> None:
    """What users do with the best node is their own affair."""

    async def main() -> str:
        with await PROGRAM.arun(engine, "Go.", budget=dd.Budget(tokens=30)) as result:
            return (await result.best.ask(" And?", max_tokens=300)).text

    assert asyncio.run(main()) == " a long answer to whatever was asked"


@pytest.mark.parametrize("limit", [{"tokens": 0}, {"nodes": -1}, {"seconds": 0.0}, {"kv_bytes": 0}, {"branches": 0}])
def test_budgets_that_allow_nothing_are_refused(limit: dict[str, int]) -> None:
    """By the name of the limit."""
    with pytest.raises(dd.ProgramError, match=next(iter(limit))):
        dd.Budget(**limit)
