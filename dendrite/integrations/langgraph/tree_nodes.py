"""Nodes for graphs that drive the tree themselves. Between them the state carries handles, texts and scores.

    fork_node ──► generate_node ──► score_node ──► prune_node ──► pick_node (a human) ──► fork_node …

Each names the keys of the state that it reads and writes. All of them work in sync and async graphs, give the same in
a retry, and leave no branch behind, however they end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.runnables import Runnable, RunnableLambda
from langgraph.types import interrupt

from dendrite.dsl.choice import Choice
from dendrite.dsl.fronts import Waiter
from dendrite.dsl.run import as_messages
from dendrite.dsl.types import Prompt
from dendrite.engine.branch import Branch
from dendrite.engine.errors import RequestError
from dendrite.integrations.langgraph.branch_lists import State, Update, listed, opened_branches
from dendrite.integrations.langgraph.handles import Snapshot, handle_of
from dendrite.integrations.langgraph.sources import EngineSource, NodeEngine, current_runtime, run_path


def fork_node(
    n: int,
    *,
    engine: EngineSource,
    branch: str = "branch",
    branches: str = "branches",
    prompt: Callable[[Any], Prompt] | None = None,
) -> Runnable[Any, Any]:
    """A node that makes `n` branches that draw differently out of one; nothing is computed.

    Args:
        n: how many.
        engine: an Engine, a name, or a function of the Runtime.
        branch: the state's key of the handle to fork.
        branches: the key that the forks' handles are put under.
        prompt: what to start from where the state has no handle yet: text is a user's turn, messages are a chat.
    """
    if n < 1:
        raise RequestError(f"fork_node({n}): give 1 or more")
    source = NodeEngine(engine)

    def run(state: State) -> Update:
        handle = state.get(branch)
        if handle:
            start = Snapshot.read(handle)
        elif prompt is not None:
            runtime = current_runtime()
            with source.get(runtime).root(messages=as_messages(prompt(state))) as root:
                start = Snapshot.read(handle_of(root)).fork(*run_path(runtime))
        else:
            raise RequestError(f"the state has no handle under {branch!r}: set it, or give fork_node a prompt=")
        return {branches: [start.fork("fork", index).handle() for index in range(n)]}

    return RunnableLambda(run, name="fork")


def score_node(
    choice: Choice, *, engine: EngineSource, branches: str = "branches", scores: str = "scores"
) -> Runnable[Any, Any]:
    """A node that scores every branch by what the model would say next.

        score_node(dd.Choice({"yes": 1.0, "no": 0.0}, " Is this good?"), engine=engine)

    Args:
        choice: answers with their values, and a question that is asked first; nothing of it stays on the branch.
        engine: an Engine, a name, or a function of the Runtime.
        branches: the state's key of the handles.
        scores: the key that the scores are put under, in the same order: the expected values.
    """
    source = NodeEngine(engine)
    if choice.fresh or choice.normalize == "unconditional" or not isinstance(choice.question, str):
        raise RequestError("score_node asks a Choice after the branch: give its question as text, and not fresh")

    async def scored(opened: Sequence[Branch]) -> Update:
        return {scores: list(await asyncio.gather(*(_expected(choice, branch) for branch in opened)))}

    async def arun(state: State) -> Update:
        with opened_branches(source, state, branches) as (_, opened):
            return await scored(opened)

    def run(state: State) -> Update:
        with opened_branches(source, state, branches) as (_, opened), Waiter() as waiter:
            return waiter.wait(scored(opened))

    return RunnableLambda(run, afunc=arun, name="score")


def prune_node(
    keep: int, *, branches: str = "branches", scores: str = "scores", also: Sequence[str] = ()
) -> Runnable[Any, Any]:
    """A node that keeps the `keep` best branches, best first; of equal ones the earlier.

    Args:
        keep: how many.
        branches: the state's key of the handles.
        scores: the key of their scores.
        also: further keys with a value for each branch, such as "texts".
    """
    if keep < 1:
        raise RequestError(f"prune_node({keep}): give 1 or more")

    def run(state: State) -> Update:
        values = listed(state, scores)
        order = sorted(range(len(values)), key=lambda index: -values[index])[:keep]
        columns = {name: listed(state, name) for name in (branches, scores, *also)}
        for name, column in columns.items():
            if len(column) != len(values):
                raise RequestError(f"{name!r} has {len(column)} entries and {scores!r} has {len(values)}")
        return {name: [column[index] for index in order] for name, column in columns.items()}

    return RunnableLambda(run, name="prune")


def pick_node(
    *, branches: str = "branches", branch: str = "branch", show: Sequence[str] = ("texts", "scores")
) -> Runnable[Any, Any]:
    """A node at which a human picks the branch that goes on: resume with its index, `Command(resume=1)`.

    The graph is interrupted with what `show` names; the branches are parked as handles meanwhile and hold no memory. An
    answer that picks none is asked again, with a `problem`.

    Args:
        branches: the state's key of the handles, or of `Found.branches`.
        branch: the key that the picked handle is put under.
        show: further keys to show, where the state has them.
    """

    def run(state: State) -> Update:
        offered = listed(state, branches)
        entries = [entry for entry in offered if isinstance(entry, Mapping)]
        question = {
            "type": "dendrite.pick",
            "num_branches": len(offered),
            "branches": [{name: value for name, value in entry.items() if name != "handle"} for entry in entries],
            **{name: state[name] for name in show if name in state},
        }
        picked = interrupt(question)
        while not isinstance(picked, int) or isinstance(picked, bool) or not 0 <= picked < len(offered):
            problem = f"{picked!r} picks no branch: resume with a number from 0 to {len(offered) - 1}"
            picked = interrupt({**question, "problem": problem})
        entry = offered[picked]
        return {branch: entry["handle"] if isinstance(entry, Mapping) else entry}

    return RunnableLambda(run, name="pick")


async def _expected(choice: Choice, branch: Branch) -> float:
    with branch.fork() as asked:
        if choice.question:
            asked.append(str(choice.question))
        return choice.reading(await asked.ascore_tokens(choice.continuations(branch.text)))
