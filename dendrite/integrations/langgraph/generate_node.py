"""A node that generates onto branches of the state, telling the streams each token as it comes.

one branch        what it says is the answer: `messages` and `custom`
several           candidates: `custom` alone, each piece with the branch's index
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any, Unpack

from langchain_core.messages import AIMessage, BaseMessageChunk, message_chunk_to_message
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda

from dendrite.dsl.fronts import Waiter
from dendrite.dsl.functions import together
from dendrite.engine.branch import Branch
from dendrite.engine.config import SamplingOptions
from dendrite.engine.generation import Generation
from dendrite.integrations.langgraph.branch_lists import State, Update, opened_branches
from dendrite.integrations.langgraph.branch_speaker import BranchSpeaker
from dendrite.integrations.langgraph.handles import handle_of
from dendrite.integrations.langgraph.sources import EngineSource, NodeEngine, current_runtime, run_path


def generate_node(
    *,
    engine: EngineSource,
    branches: str = "branches",
    texts: str = "texts",
    messages: str | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Runnable[Any, Any]:
    """A node that generates onto all the branches in one batch, and puts their new handles in the old ones' place.

    Tokens go to the `custom` stream as they come, each with the index of its branch, and the finished texts after them.
    Where there is one branch alone, what it says goes to the `messages` stream too, as a chat model's answer does.

    Args:
        engine: an Engine, a name, or a function of the Runtime.
        branches: the state's key of the handles.
        texts: the key that the generated texts are put under, in the same order.
        messages: the key that an only branch's text is put under as a message; none by default.
        sampling: as for `Engine.generate`. Without `seed=` a branch draws by its handle and this execution of the node:
            the same in a retry, something new in a replay. With it, the same handles always get the same texts.
    """
    source = NodeEngine(engine)
    seed = sampling.pop("seed", None)

    def path() -> tuple[object, ...]:
        return run_path(current_runtime()) if seed is None else ("seed", seed)

    def updated(opened: Sequence[Branch], generations: Sequence[Generation], spoken: AIMessage | None) -> Update:
        write = current_runtime().stream_writer
        for index, generation in enumerate(generations):
            event = {"index": index, "text": generation.text, "finish_reason": generation.finish_reason}
            write({"type": "dendrite.generated", **event})
        update: Update = {
            branches: [handle_of(branch) for branch in opened],
            texts: [generation.text for generation in generations],
        }
        if messages is not None and spoken is not None:
            update[messages] = [spoken]
        return update

    def run(state: State, config: RunnableConfig) -> Update:
        with opened_branches(source, state, branches, path=path()) as (_, opened):
            if len(opened) == 1:
                return updated(opened, *_said(opened[0], sampling, config))
            with Waiter() as waiter:
                return updated(opened, waiter.wait(_candidates(opened, sampling)), None)

    async def arun(state: State, config: RunnableConfig) -> Update:
        with opened_branches(source, state, branches, path=path()) as (_, opened):
            if len(opened) == 1:
                return updated(opened, *await _asaid(opened[0], sampling, config))
            return updated(opened, await _candidates(opened, sampling), None)

    return RunnableLambda(run, afunc=arun, name="generate")


def _said(branch: Branch, sampling: SamplingOptions, config: RunnableConfig) -> tuple[list[Generation], AIMessage]:
    """An only branch's answer, told to both streams."""
    speaker, tell = BranchSpeaker(branch=branch, sampling={**sampling}), _teller(0)
    message: BaseMessageChunk | None = None
    for chunk in speaker.stream(branch.text, config):
        tell(chunk.text)
        message = chunk if message is None else message + chunk
    return [speaker.generation], _whole(message)


async def _asaid(
    branch: Branch, sampling: SamplingOptions, config: RunnableConfig
) -> tuple[list[Generation], AIMessage]:
    """`_said` for asyncio."""
    speaker, tell = BranchSpeaker(branch=branch, sampling={**sampling}), _teller(0)
    message: BaseMessageChunk | None = None
    async for chunk in speaker.astream(branch.text, config):
        tell(chunk.text)
        message = chunk if message is None else message + chunk
    return [speaker.generation], _whole(message)


def _whole(chunk: BaseMessageChunk | None) -> AIMessage:
    message = None if chunk is None else message_chunk_to_message(chunk)
    assert isinstance(message, AIMessage), "the speaker says so, and ends with a last chunk"
    return message


async def _candidates(branches: Sequence[Branch], sampling: SamplingOptions) -> list[Generation]:
    """What several branches say, all at once, told to the custom stream."""

    async def follow(index: int, branch: Branch) -> Generation:
        ended: list[Generation] = []
        tell = _teller(index)
        async with aclosing(branch.engine.astream(branch, on_end=ended.append, **sampling)) as pieces:
            async for piece in pieces:
                tell(piece)
        return ended[0]

    return await together([follow(index, branch) for index, branch in enumerate(branches)])


def _teller(index: int) -> Callable[[str], None]:
    """Tells the custom stream what the branch with that index says."""
    write = current_runtime().stream_writer

    def tell(piece: str) -> None:
        if piece:
            write({"type": "dendrite.token", "index": index, "text": piece})

    return tell
