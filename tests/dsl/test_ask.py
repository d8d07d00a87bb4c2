"""Side questions: answered on temporary branches, and gone."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

import dendrite as dd
from dendrite.testing import Reply, node, scripted_engine


def script(text: str) -> Reply:
    if text.endswith("Step:"):
        return [" a\n", " b\n"]
    if text.endswith("Which?"):
        return [" this", " that"]
    if text.endswith("<|user|>Alone?<|end|><|assistant|>"):
        return "quite alone"
    if text.endswith("<|user|>Next?<|end|><|assistant|>"):
        return "next"
    return " read: " + text.count("Step:") * "I"


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    with scripted_engine(script) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats().blocks_used == 0


def searched(
    engine: dd.Engine, look: Callable[[dd.Node], Awaitable[object]], *, seed: int | None = None, depth: int = 2
) -> str:
    """The tree of a search whose observe function asks."""

    @dd.observe
    async def looking(node: dd.Node) -> object:
        return await look(node)

    step = dd.expand(cue="\nStep:", width=2, stop="\n")
    with dd.compile(step, looking, strategy=dd.Beam(depth=depth)).run(engine, "Go.", seed=seed) as result:
        return result.tree.to_json()


def test_an_ask_reads_the_transcript(engine: dd.Engine) -> None:
    """Text continues it; the answer is whole, and its branch is gone."""
    answers: list[str] = []

    async def look(node: dd.Node) -> None:
        before = node.branch.token_ids
        answer = await node.ask(" Well?")
        answers.append(f"{node.depth}{answer.text}")
        assert answer.branch.status == "pruned"
        assert node.branch.token_ids == before

    searched(engine, look)
    assert sorted(set(answers)) == ["1 read: I", "2 read: II"]


def test_a_fresh_ask_reads_nothing_else(engine: dd.Engine) -> None:
    """Text is a user's turn of a new chat, messages are a chat."""
    answers: set[str] = set()

    async def look(node: dd.Node) -> None:
        messages: list[dd.Message] = [{"role": "system", "content": "Hm."}, {"role": "user", "content": "Alone?"}]
        answers.add((await node.ask("Alone?", fresh=True)).text)
        answers.add((await node.ask(messages, fresh=True)).text)

    searched(engine, look)
    assert answers == {"quite alone"}


def test_messages_continue_the_chat(engine: dd.Engine) -> None:
    """The search's own, where it was started as one."""
    answers: set[str] = set()

    async def look(node: dd.Node) -> None:
        answers.add((await node.ask([{"role": "user", "content": "Next?"}])).text)

    searched(engine, look)
    assert answers == {"next"}


def test_options_reach_the_engine(engine: dd.Engine) -> None:
    """Length and stop strings, one or several."""
    answers: set[tuple[str, ...]] = set()

    async def look(node: dd.Node) -> None:
        short = await node.ask("Well?", max_tokens=3)
        stopped = await node.ask("Well?", stop=":")
        stopped_early = await node.ask("Well?", stop=["x", "d"])
        answers.add((short.text, stopped.text, stopped_early.text))

    searched(engine, look, depth=1)
    assert answers == {(" re", " read", " rea")}


def test_asks_at_the_same_time_share_batches_and_repeat_by_seed(engine: dd.Engine) -> None:
    """Sampled asks of one node differ from each other, and are the same again with the same seed."""
    answers: list[tuple[str, ...]] = []  # nodes are looked at together, so which comes first is nobody's promise

    async def look(node: dd.Node) -> str:
        asked = await asyncio.gather(*(node.ask(" Which?", temperature=1.0) for _ in range(6)))
        answers.append((node.transcript, *(answer.text for answer in asked)))
        return ""

    first = searched(engine, look, seed=3)
    half = len(answers)
    assert len({text for _, *texts in answers for text in texts}) == 2
    assert searched(engine, look, seed=3) == first
    assert sorted(answers[half:]) == sorted(answers[:half])


def test_asking_changes_no_search(engine: dd.Engine) -> None:
    """The same seed gives the same tree with and without side questions."""

    async def look(node: dd.Node) -> object:
        await asyncio.gather(node.ask(" Which?", temperature=1.0), node.ask("Alone?", fresh=True))
        return node.state

    async def do_not(node: dd.Node) -> object:
        return node.state

    assert searched(engine, look, seed=1) == searched(engine, do_not, seed=1)


def test_propose_with_a_side_question(engine: dd.Engine) -> None:
    """The Tree-of-Thoughts pattern: moves are read off a fresh answer and become children."""

    @dd.expand
    async def propose(node: dd.Node) -> list[dd.Child]:
        reply = await node.ask("Alone?", fresh=True)
        return [dd.Child(f"\n{word}", word) for word in reply.text.split()]

    @dd.score
    def short(node: dd.Node) -> float:
        return -len(node.text)

    with dd.compile(propose, short, dd.prune(keep=1), strategy=dd.Beam(depth=2)).run(engine, "") as result:
        assert result.best.transcript == "\nquite\nquite"  # equally short ones stay in the order proposed
        assert result.best.state == "quite"
        assert result.usage.tokens_generated == 2 * len("quite alone")


def test_a_failing_ask_leaves_nothing(engine: dd.Engine) -> None:
    """A refused question prunes its branch and reaches the caller as it is."""
    errors: list[Exception] = []

    async def look(node: dd.Node) -> None:
        for max_tokens, temperature in ((0, 0.0), (1, -1.0)):
            try:
                await node.ask("Well?", max_tokens=max_tokens, temperature=temperature)
            except dd.RequestError as error:
                errors.append(error)

    searched(engine, look, depth=1)
    assert len(errors) == 4


async def test_a_unit_tests_node_asks_a_scripted_engine(engine: dd.Engine) -> None:
    """Without an engine it says what to give it."""
    with pytest.raises(dd.BranchError, match="scripted_engine"):
        await node("x").ask("Well?")
    asked = node(" x", transcript="Go.\nStep:", engine=engine)
    assert (await asked.ask(" Well?")).text == " read: I"
    assert (await asked.ask("Alone?", fresh=True)).text == "quite alone"
    asked.branch.prune()
