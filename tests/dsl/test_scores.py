"""Scores that are more than a function's number: reward models, shared questions, batches across asks; and the bar."""

import asyncio
import inspect
import io
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

import dendrite as dd
from dendrite.dsl.progress import ProgressBar
from dendrite.testing import Reply, scripted_engine


def script(text: str) -> Reply:
    return [" a\n", " b\n", " c\n"] if text.endswith("Step:") else {" yes": 0.75, " no": 0.25}


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    with scripted_engine(script) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats().blocks_used == 0


STEP = dd.expand(cue="\nStep:", width=3, stop="\n")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_model_scores_texts_in_batches(engine: dd.Engine, is_async: bool) -> None:
    """It gets transcripts, never more than a batch of them, of all nodes that are under way."""
    sizes: list[int] = []

    def rate(texts: list[str]) -> list[float]:
        sizes.append(len(texts))
        return [float(len(text)) for text in texts]

    async def arate(texts: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return rate(texts)

    model = dd.reward(arate if is_async else rate, batch=4, weight=2.0)
    program = dd.compile(STEP, model, strategy=dd.Beam(depth=2))
    assert "rate" in program.explain()
    with program.run(engine, "Go.", seed=1) as result:
        assert all(node.value == 2.0 * len(node.transcript) for node in list(result.tree)[1:])
    assert sum(sizes) == 12
    assert max(sizes) <= 4


def test_a_score_of_many_gathers_across_asks(engine: dd.Engine) -> None:
    """Without a batch size it is called once for all that is under way: three parents' children in one call."""
    sizes: list[int] = []

    def rate(texts: list[str]) -> list[float]:
        sizes.append(len(texts))
        return [0.0 for _ in texts]

    dd.compile(STEP, dd.reward(rate), strategy=dd.Beam(depth=3)).run(engine, "Go.").close()
    assert sizes == [3, 9, 27]


def test_scores_that_share_a_question_share_its_prefill(engine: dd.Engine) -> None:
    """Two choices after one long question cost its tokens once."""
    question = "\nA question of some length, which both of these put: is it good?"

    @dd.score
    def good(node: dd.Node) -> dd.Choice:
        return dd.Choice(["yes", "no"], question, normalize="sum")

    @dd.score(weight=0.5)
    def also(node: dd.Node) -> dd.Choice:
        return dd.Choice({"no": 1.0, "yes": 0.0}, question, normalize="sum")

    computed = []
    for scores in ((good,), (good, also)):
        with dd.compile(STEP, *scores, strategy=dd.Beam(depth=1)).run(engine, "Go.", seed=1) as result:
            computed.append(result.usage.tokens_computed)
            values = [node.value for node in list(result.tree)[1:]]
    assert values == pytest.approx([0.75 + 0.5 * 0.25] * 3, abs=1e-4)
    assert computed[1] - computed[0] < len(question)


def test_the_progress_bar_counts_along(engine: dd.Engine) -> None:
    """Asks, nodes, depth and the best value; nothing is drawn by a thread."""
    out = io.StringIO()
    program = dd.compile(STEP, dd.reward(lambda texts: [1.5 for _ in texts]), strategy=dd.Beam(depth=2))
    with ProgressBar("Beam", console=Console(file=out, force_terminal=True, width=100)) as bar:
        for event in program.stream(engine, "Go.", seed=1):
            bar.saw(event)
        assert bar.text == "Beam: 6 asks, 12 nodes, depth 2, best 1.5"
    assert "12 nodes" in out.getvalue()
    program.run(engine, "Go.", seed=1, progress=True).close()


def test_errors_of_compile_say_where() -> None:
    """The line of the call, beside the line of the part, which may stand elsewhere and have no function."""
    with pytest.raises(dd.ProgramError) as caught:
        dd.compile(STEP, strategy=dd.MCTS(3))
    assert any(__file__ in note for note in caught.value.__notes__)
    for part in (dd.expand(cue="x", width=0), dd.prune(keep=0), dd.expand(cue="x", grammar="...")):
        line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]  # CPython has frames
        with pytest.raises(dd.ProgramError, match=rf"{re.escape(__file__)}:{line}"):
            dd.compile(STEP, part, dd.reward(len), strategy=dd.Beam(depth=1))


def test_a_search_inside_a_search(engine: dd.Engine) -> None:
    """`arun` on a node's branch, from a function of another program; neither disturbs the other."""
    inner = dd.compile(STEP, dd.reward(lambda texts: [float(text.count("a")) for text in texts]), strategy=dd.Beam(1))

    @dd.score
    async def look_ahead(node: dd.Node) -> float:
        with await inner.arun(node.branch, seed=node.id) as result:
            return result.best.value or 0.0

    outer = dd.compile(STEP, look_ahead, dd.prune(keep=1), strategy=dd.Beam(depth=2))
    trees = []
    for _ in range(2):
        with outer.run(engine, "Go.", seed=2) as result:
            assert result.best.value is not None
            assert result.best.value >= result.best.transcript.count("a")
            trees.append(result.tree.to_json())
    assert trees[0] == trees[1]
